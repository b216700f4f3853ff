"""Signing in and out, for customers and operators; and how a newcomer opens an account."""

from typing import Any, Final
from urllib.parse import quote

import msgspec
from htpy import Element, a, button, code, div, p
from htpy import form as form_
from htpy import input as input_
from litestar import Request, get, post
from litestar.di import NamedDependency
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import open_account
from app.accounts.recovery import first_code, no_way_back, recover
from app.admin.tokens import ServiceTokens
from app.console.door import customer_of, operator_of
from app.console.forms import Form
from app.console.session import Customer, Operator, Session, SignedOut, end_cookie, read_session, set_cookie
from app.console.shell import SAID, Frame, Page, card, labelled, problem
from app.console.signed_out import sign_out
from app.kernel.db import Database
from app.kernel.errors import InvalidCreditId, InvalidToken
from app.kernel.ratelimit import count_or_refuse, shares_of
from app.kernel.security import Caller, Kind, canonical_credit_id, canonical_recovery_code
from app.kernel.settings import Settings
from app.keys.issue import Keyring
from app.keys.verify import Verifier

SAID["welcome"] = "Your account is open. Top it up, and call."


class Opened(msgspec.Struct, frozen=True):
    """A new account's secrets, shown to its owner now."""

    credit_id: str
    api_key: str | None = None
    recovery_code: str | None = None


# --- customers --------------------------------------------------------------------------------------


@get("/console/sign-in", sync_to_thread=False)
def sign_in_page(frame: NamedDependency[Frame]) -> Page:
    return frame.answer("Sign in", _sign_in(frame), _newcomer(frame))


@post("/console/sign-in")
async def sign_in(
    request: Request[Any, Any, Any], form: NamedDependency[Form], frame: NamedDependency[Frame], db: NamedDependency[Database],
    settings: NamedDependency[Settings], verifier: NamedDependency[Verifier],
) -> Page:  # fmt: skip
    """With a credit id, or an API key, which then sees what its scopes allow."""
    session = Session.begun("customer", _spelled(form.text("credential")))
    try:
        await customer_of(verifier, session)
    except SignedOut:
        error = InvalidCreditId("No account has this credit id, and no live key is this one. Was it pasted whole?")
        return frame.answer("Sign in", _sign_in(frame, problem(error)), _newcomer(frame), status=401)
    await _begin(request, frame, db, settings, session)
    return frame.see("/console")


@post("/console/sign-out")
async def leave(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame], db: NamedDependency[Database],
    settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    await sign_out(db, customer.session)
    frame.cookies.append(end_cookie(settings, "customer"))
    return frame.see("/console/sign-in", "signed-out")


@post("/console/open")
async def open_one(
    request: Request[Any, Any, Any], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings], keyring: NamedDependency[Keyring],
) -> Page:  # fmt: skip
    """Open an account, sign in with it, and show its secrets this once. Sent twice it is one account."""
    address = request.client.host if request.client else "unknown"

    async def admit() -> None:
        in_all = settings.accounts_per_hour
        for block, share in shares_of(address, settings.accounts_per_hour_per_block, in_all):
            await count_or_refuse(db, f"account/{block}", share, policy="accounts")
        await count_or_refuse(db, "account", in_all, policy="accounts-in-all", is_told=False)

    async def effect(session: Any) -> Opened:
        made = await open_account(session, keyring)
        return Opened(made.credit_id, made.api_key, await first_code(session, keyring, made.account_id))

    opened = await form.once.do(Opened, effect, admit=admit)
    await _begin(request, frame, db, settings, Session.begun("customer", opened.credit_id))
    return frame.answer("Keep this", _kept(opened))


@get("/console/recover", sync_to_thread=False)
def recover_page(frame: NamedDependency[Frame]) -> Page:
    return frame.answer("Recover an account", _recover(frame))


@post("/console/recover")
async def recover_one(
    request: Request[Any, Any, Any],
    form: NamedDependency[Form],
    frame: NamedDependency[Frame],
    db: NamedDependency[Database],
    settings: NamedDependency[Settings],
    keyring: NamedDependency[Keyring],
    verifier: NamedDependency[Verifier],
) -> Page:
    """Another credit id and recovery code by the old code, which is used up; sent twice it is one recovery."""
    ways: list[Caller] = []

    async def admit() -> None:
        address = request.client.host if request.client else "unknown"
        for block, share in shares_of(address, settings.accounts_per_hour_per_block, settings.accounts_per_hour):
            await count_or_refuse(db, f"recover/{block}", share, policy="recoveries")
        way = await verifier.recovering(Kind.RECOVERY_CODE, canonical_recovery_code(form.text("recovery_code")))
        if way is None:
            raise no_way_back()
        ways.append(way)

    async def effect(session: AsyncSession) -> Opened:
        made = await recover(session, keyring, ways[0], revoke_keys=form.has("revoke_keys"))
        return Opened(made.credit_id, made.api_key, made.recovery_code)

    try:
        found = await form.once.do(Opened, effect, admit=admit)
    except InvalidToken:
        error = InvalidToken("This code recovers no account: was it typed whole, and is it the newest one?")
        return frame.answer("Recover an account", _recover(frame, problem(error)), status=401)
    await _begin(request, frame, db, settings, Session.begun("customer", found.credit_id))
    return frame.answer("Keep this", _kept(found))


async def _begin(
    request: Request[Any, Any, Any], frame: Frame, db: Database, settings: Settings, session: Session
) -> None:
    """Begin a session; the one of this role that the browser had until now is over."""
    before = read_session(settings, request.cookies, session.role)
    if before is not None:
        await sign_out(db, before)
    frame.cookies.append(set_cookie(settings, session))


def _recover(frame: Frame, refusal: Element | None = None) -> Element:
    code_field = input_(name="recovery_code", required=True, autocomplete="off", spellcheck="false", maxlength="200")
    return card(
        refusal,
        form_(method="post", action="/console/recover")[
            frame.guard(),
            labelled("Recovery code", code_field, "It was shown when the account was opened, or on its Account page."),
            labelled(
                "Revoke every API key too, and make a new one", input_(type="checkbox", name="revoke_keys", value="yes")
            ),
            button["Recover"],
        ],
        p(class_="quiet")["You get another credit id and another code; the ones before open nothing from then on."],
    )


def _sign_in(frame: Frame, refusal: Element | None = None) -> Element:
    return card(
        refusal,
        form_(method="post", action="/console/sign-in")[
            frame.guard(),
            labelled(
                "Credit id or API key",
                input_(name="credential", type="password", autocomplete="current-password", required=True, autofocus=True, spellcheck="false", maxlength="200"),
                "A credit id may do everything on its account; a key sees what its scopes allow.",
            ),
            button["Sign in"],
        ],
    )  # fmt: skip


def _newcomer(frame: Frame) -> Element:
    return card(
        p["No name, no e-mail, no password: an account is a credit id, which only you have."],
        form_(method="post", action="/console/open")[frame.guard(), button(class_="outline")["Open an account"]],
        title="New here?",
    )


def _kept(opened: Opened) -> Element:
    all_of_it = (("Credit id", opened.credit_id), ("Recovery code", opened.recovery_code), ("API key", opened.api_key))
    kept = [(name, value) for name, value in all_of_it if value]
    return card(
        p[
            "The credit id is the account: whoever has it spends its money. The recovery code gives another one, should it be"
            " lost or stolen: keep the two apart. ",
            "They are shown now and never again.",
        ],
        (secret(name, value) for name, value in kept),
        div(class_="acts")[
            download("credit-id.txt", "".join(f"{name}: {value}\n" for name, value in kept)),
            a(href="/console?said=welcome", class_="button")["I have kept it: go on"],
        ],
    )


def secret(name: str, value: str) -> Element:
    """A secret that is shown, with a button that copies it."""
    return div(class_="secret")[
        p[name], code[value], button(type="button", class_="outline small", data_copy=value)["Copy"]
    ]


def download(file_name: str, text: str) -> Element:
    """A file made of what the page shows; it is saved by the browser alone."""
    return a(href=f"data:text/plain;charset=utf-8,{quote(text)}", download=file_name, class_="button outline")[
        "Download"
    ]


def _spelled(text: str) -> str:
    return canonical_credit_id(text) or text


# --- operators --------------------------------------------------------------------------------------


@get("/operator/sign-in", sync_to_thread=False)
def operator_sign_in_page(frame: NamedDependency[Frame]) -> Page:
    return frame.answer("Operator", _operator_sign_in(frame))


@post("/operator/sign-in")
async def operator_sign_in(
    request: Request[Any, Any, Any], form: NamedDependency[Form], frame: NamedDependency[Frame], db: NamedDependency[Database],
    settings: NamedDependency[Settings], services: NamedDependency[ServiceTokens],
) -> Page:  # fmt: skip
    session = Session.begun("operator", form.text("token"))
    try:
        await operator_of(services, session)
    except SignedOut:
        return frame.answer("Operator", _operator_sign_in(frame, problem(InvalidToken("No live admin token is this one."))), status=401)  # fmt: skip
    await _begin(request, frame, db, settings, session)
    return frame.see("/operator")


@post("/operator/sign-out")
async def operator_leave(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame], db: NamedDependency[Database],
    settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    await sign_out(db, operator.session)
    frame.cookies.append(end_cookie(settings, "operator"))
    return frame.see("/operator/sign-in", "signed-out")


def _operator_sign_in(frame: Frame, refusal: Element | None = None) -> Element:
    return card(
        refusal,
        form_(method="post", action="/operator/sign-in")[
            frame.guard(),
            labelled(
                "Admin token",
                input_(name="token", type="password", autocomplete="current-password", required=True, autofocus=True, spellcheck="false", maxlength="200"),
                "satmeter token create --admin NAME makes one.",
            ),
            button["Sign in"],
        ],
    )  # fmt: skip


handlers: Final = (
    sign_in_page, sign_in, leave, open_one, recover_page, recover_one, operator_sign_in_page, operator_sign_in, operator_leave
)  # fmt: skip
