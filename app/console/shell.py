"""The frame of every page, and how pages are made here.

A page is a typed function from data to elements (htpy): it knows no SQL and no HTTP. A door beside it (`@get`, `@post`)
asks the same verbs as the API, hands what they return to the page, and answers `shell.answer(page(…))`:

    @get("/console/keys", include_in_schema=False)
    async def keys(customer: NamedDependency[Customer], db: NamedDependency[Database], frame: NamedDependency[Frame]) -> Page:
        found = await db.transaction(lambda session: list_keys(session, customer.caller.account_id, …))
        return frame.answer("Keys", keys_page(found, frame))

What a door may ask for by name: `customer` or `operator` (who is signed in; nobody is sent to sign in before anything
else happens), `frame` (this file: the page around your elements, with the right navigation), and in a POST `form`
(forms.py: its fields; a POST without the session's token was refused already, and `form.once` does a double submit once).
A form begins with `frame.guard()`: its token, and the name by which a second submit is known for the same. After an act,
`frame.see("/console/keys", "key-revoked")` sends to a page that says so (the words are in `SAID`); what is shown once is
answered by the POST itself. A refusal (AppError) becomes a page of its own (door.py); to keep what was typed, catch it and
show `problem(error)` above the form.

A query parameter may not be named as a credential of the API is asked for (key, caller, owner, admin, service, once …).

The policy forbids style attributes, inline scripts and whatever is not ours: no `style=`, no `hx-on`, no `js:`, no
trigger filters. A look is a class in static/console.css; a picture is a file or an inline `<svg>` without style; behaviour
is in static/console.js, by data attributes (data-copy, data-local, data-countdown, data-plot …). Everything works without
it but plots and what comes live. Money, coins and times are written by words.py.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from htpy import (
    Element,
    Fragment,
    Node,
    a,
    body,
    button,
    div,
    fieldset,
    footer,
    form,
    fragment,
    h1,
    h2,
    head,
    header,
    html,
    label,
    legend,
    link,
    main,
    meta,
    nav,
    noscript,
    p,
    script,
    section,
    small,
    span,
    strong,
)
from htpy import (
    input as input_,
)
from htpy import (
    title as title_,
)
from litestar import Response
from litestar.datastructures import Cookie

from app.console import static
from app.console.session import Session, csrf_token, set_cookie
from app.kernel.errors import AppError
from app.kernel.settings import Settings

Page: TypeAlias = Response[str]
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
}  # fmt: skip
CUSTOMERS: Final = (
    ("/console", "Home"), ("/console/topup", "Top up"), ("/console/keys", "Keys"), ("/console/activity", "Activity"),
    ("/console/autotopup", "Auto top-up"), ("/console/account", "Account"),
)  # fmt: skip
OPERATORS: Final = (
    ("/operator", "Today"), ("/operator/accounts", "Accounts"), ("/operator/topups", "Top-ups"),
    ("/operator/prices", "Prices"), ("/operator/tokens", "Tokens"), ("/operator/audit", "Audit"),
)  # fmt: skip
SAID: Final = {
    "signed-out": "You are signed out.",
    "session-over": "Your session is over: it lasts 12 hours, and ends when its credential is revoked. Sign in again.",
}
"""What a page says after an act, by the word in its address; each room adds its own."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a page's own elements. `session` is whose forms the page has; `path` marks the place in the navigation."""

    settings: Settings
    session: Session
    path: str
    said: str = ""
    is_new: bool = False
    """Whether the session begins with this answer, so that its cookie goes with it."""
    cookies: list[Cookie] = field(default_factory=list)
    """What goes with the answer."""

    def answer(
        self,
        title: str,
        *content: Node,
        status: int = 200,
        wide: bool = False,
        scripts: Sequence[str] = (),
        refresh: int = 0,
    ) -> Page:
        """The whole page; `scripts` are names of static files besides the usual ones, such as `uplot.js`. `refresh`: seconds
        after which a browser without scripts asks again."""
        elements = self.page(title, *content, wide=wide, scripts=scripts, refresh=refresh)
        return self._sent(Response(str(elements), status_code=status, media_type="text/html", headers=dict(HEADERS)))

    def see(self, path: str, said: str = "") -> Page:
        """Send to another page after an act, which says `SAID[said]`."""
        assert not said or said in SAID, said
        there = f"{path}{'&' if '?' in path else '?'}said={said}" if said else path
        return self._sent(Response("", status_code=303, media_type="text/html", headers=HEADERS | {"Location": there}))

    def page(
        self, title: str, *content: Node, wide: bool = False, scripts: Sequence[str] = (), refresh: int = 0
    ) -> Element:
        name = self.settings.service_name
        said = SAID.get(self.said)
        return html(lang="en")[
            head[
                meta(charset="utf-8"),
                meta(name="viewport", content="width=device-width, initial-scale=1"),
                meta(name="color-scheme", content="light dark"),
                meta(name="robots", content="noindex"),
                title_[f"{title} · {name}"],
                (link(rel="icon", href=static.url("icon.svg"), type="image/svg+xml")),
                (
                    link(rel="stylesheet", href=static.url(sheet))
                    for sheet in ("oat.css", "console.css", *_sheets(scripts))
                ),
                link(rel="stylesheet", href=static.theme_url(self.settings)),
                (script(src=static.url(each), defer=True) for each in ("htmx.js", "hx-sse.js", *scripts, "console.js")),
                refresh > 0 and _without_scripts(refresh),
            ],
            body[
                a(href="#content", class_="skip")["Skip to the page"],
                self._header(),
                main(id="content", class_="wide" if wide else None)[
                    said and div(class_="said", role="status")[said], h1[title], *content
                ],
                self._footer(),
            ],
        ]

    def guard(self) -> Fragment:
        """What every form begins with: the session's token, and a name of its own by which a double submit is one."""
        return fragment[
            input_(type="hidden", name="csrf", value=csrf_token(self.settings, self.session)),
            input_(type="hidden", name="once", value=secrets.token_hex(16)),
        ]

    def _sent(self, response: Page) -> Page:
        response.cookies.extend(self.cookies)
        if self.is_new:
            response.cookies.append(set_cookie(self.settings, self.session))
        return response

    def _header(self) -> Element:
        places = {"customer": CUSTOMERS, "operator": OPERATORS}.get(self.session.role, ())
        home = self.settings.service_url or "/"
        return header(class_="bar")[
            div[
                a(href=home, class_="brand")[strong[self.settings.service_name]],
                places and nav(aria_label="Pages")[(self._place(path, words) for path, words in places)],
                places and self._leave(),
            ]
        ]

    def _place(self, path: str, words: str) -> Element:
        below = (f"{path}/", f"{path}s/")  # of what `topup` makes, each has its page under `topups`
        is_here = self.path == path or (path.count("/") > 1 and self.path.startswith(below))
        return a(href=path, aria_current="page" if is_here else None)[words]

    def _leave(self) -> Element:
        return form(
            method="post",
            action=f"{'/operator' if self.session.role == 'operator' else '/console'}/sign-out",
            class_="leave",
        )[self.guard(), button(class_="ghost small")["Sign out"]]

    def _footer(self) -> Element:
        return footer(class_="foot")[
            div[
                self.settings.uses_sandbox and p["Sandbox: no real money moves here."],
                p[a(href="/docs")["API reference"], " · ", a(href="/v1/prices")["Prices as data"]],
            ]
        ]


def problem(error: AppError) -> Element:
    """A refusal above the form that it is about."""
    return div(class_="problem", role="alert")[error.message]


def card(*content: Node, title: str = "", class_: str = "") -> Element:
    """A box with a heading."""
    return section(class_=f"card {class_}".strip())[title and h2[title], *content]


def empty(text: str, *does: Node) -> Element:
    """What stands where nothing is yet, and what to do about it."""
    return div(class_="empty")[p[text], *does]


def labelled(words: str, control: Node, hint: str = "") -> Element:
    """A field of a form: its name above, a hint beneath."""
    return label(class_="field")[words, control, hint and small[hint]]


def choices(legend_text: str, name: str, options: Sequence[tuple[str, Node]], chosen: str | None = None) -> Element:
    """Options as chips, one of which is chosen; by keyboard as any radio buttons."""
    return fieldset(class_="chips")[
        legend[legend_text],
        (
            label[input_(type="radio", name=name, value=value, checked=value == chosen), span[words]]
            for value, words in options
        ),
    ]


def _sheets(scripts: Sequence[str]) -> tuple[str, ...]:
    """The stylesheets that belong to these scripts."""
    return ("uplot.css",) if "uplot.js" in scripts else ()


def _without_scripts(seconds: int) -> Element:
    return noscript[meta(http_equiv="refresh", content=str(seconds))]
