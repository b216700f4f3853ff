"""*Tokens and proxies*: who may ask, when they were last seen, and how the proxies settle."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from htpy import Node, a, div, fieldset, label, legend, option, p, select, span
from htpy import input as input_
from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin.acts import clean_reason
from app.admin.proxies import proxies
from app.admin.scopes import SCOPES
from app.admin.tokens import ADMIN_DAYS, NewToken, TokenKind, list_tokens, make_token, revoke_token
from app.console.forms import Form
from app.console.operator.accounts import Done
from app.console.operator.acting import MAKE_TOKEN, READ, REVOKE_TOKEN, act, acting, line, may, pill, sheet
from app.console.session import Operator
from app.console.shell import SAID, Frame, Page, card, labelled, problem
from app.console.signing import secret
from app.console.words import about, moment
from app.kernel.db import Database, Row
from app.kernel.errors import AppError, InvalidField, NameTaken
from app.kernel.security import OnExpiry
from app.kernel.settings import Settings

SAID.update({"revoked": "Revoked: an operator's is refused at once, a proxy's within a second."})
_AT_ONCE: Final = 100
_ON_EXPIRY: Final[dict[OnExpiry, str]] = {
    "captured": "What was captured is charged", "hold": "All that was held is charged", "release": "Nothing is charged",
}  # fmt: skip
_CAPTURED: Final[OnExpiry] = "captured"
_STATES: Final = {"live": "good", "expired": "wait", "revoked": "bad"}


# --- doors ------------------------------------------------------------------------------------------


@get("/operator/tokens")
async def tokens(
    operator: NamedDependency[Operator], frame: NamedDependency[Frame], db: NamedDependency[Database]
) -> Page:
    acting(operator, READ)
    return await _shown(frame, operator, db)


@post("/operator/tokens")
async def make(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    """The token is on the page that answers, and on no other."""
    admin = acting(operator, MAKE_TOKEN)
    try:
        new = _asked(form)

        async def effect(session: AsyncSession) -> Done:
            return Done((await make_token(session, settings.pepper, admin, new))[1])

        made = await form.once.do(Done, effect)
    except (InvalidField, NameTaken) as error:
        return await _shown(frame, operator, db, error)
    told = p["It is shown now and never again. Whoever has it may what it may."]
    back = a(href="/operator/tokens", class_="button")["I have kept it"]
    return frame.answer(f"The token of {new.name}", card(told, secret("Token", made.told), div(class_="acts")[back]))


def _asked(form: Form) -> NewToken:
    """Raises InvalidField."""
    kind: TokenKind = "admin" if form.text("kind") == "admin" else "service"
    scopes = [scope for scope in form.texts("scopes") if scope] or None
    on_expiry = next((each for each in _ON_EXPIRY if each == form.text("on_expiry")), _CAPTURED)
    days = form.text("days")
    if days and (not days.isascii() or not days.isdigit() or len(days) > 4 or int(days) == 0):
        raise InvalidField("It expires after a whole number of days, or never where nothing is said.", param="days")
    expires_at = datetime.now(UTC) + timedelta(days=int(days)) if days else None
    if kind == "admin":
        return NewToken("admin", form.text("name"), scopes=scopes, expires_at=expires_at)
    return NewToken("service", form.text("name"), on_expiry, expires_at=expires_at)


@post("/operator/tokens/{token_id:uuid}/revoke")
async def revoke(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    settings: NamedDependency[Settings], token_id: FromPath[UUID],
) -> Page:  # fmt: skip
    admin = acting(operator, REVOKE_TOKEN)
    reason = clean_reason(form.text("reason")) if form.has("reason") else None

    async def effect(session: AsyncSession) -> Done:
        await revoke_token(session, settings.pepper, admin, token_id, reason)
        return Done()

    await form.once.do(Done, effect)
    return frame.see("/operator/tokens", "revoked")


async def _shown(frame: Frame, operator: Operator, db: Database, error: AppError | None = None) -> Page:
    found = await db.transaction(lambda session: list_tokens(session, _AT_ONCE, None))
    asking = await db.transaction(proxies)
    page = tokens_page(frame, operator, found, asking, error)
    return frame.answer("Tokens and proxies", *page, wide=True, status=200 if error is None else error.status)


# --- pages ------------------------------------------------------------------------------------------


def tokens_page(
    frame: Frame, operator: Operator, found: Sequence[Row], asking: Sequence[Row], error: AppError | None
) -> Sequence[Node]:
    return (
        error is not None and problem(error),
        card(_proxies(asking), title="Proxies"),
        card(_tokens(frame, operator, found), title="Tokens"),
        may(operator, MAKE_TOKEN) and div(class_="columns")[
            card(_for_proxy(frame), title="A token for a proxy"), card(_for_operator(frame), title="A token for an operator")
        ],
    )  # fmt: skip


def _proxies(asking: Sequence[Row]) -> Node:
    rows: list[Node] = [
        line(
            each["service"], _seen(each["last_used_at"]), f"{each['open_holds']:,}", about(each["open_nusd"]),
            "–" if each["oldest_at"] is None else moment(each["oldest_at"]),
            pill(f"{each['overdue']:,}", "bad") if each["overdue"] else "0", f"{each['settled']:,}", _seconds(each["median_seconds"]),
            _seconds(each["slowest_seconds"]), numbers="2 3 5 6 7 8",
        )
        for each in asking
    ]  # fmt: skip
    none = "No proxy has a token yet. Make one below: your proxy sends it with each call to /v1/meter."
    columns = "Proxy|Last seen|#Open holds|#Held|Oldest since|#Overdue|#Settled, last hour|#To settle, median|#Slowest"
    return sheet(columns, rows, none, label="Proxies")


def _seen(at: datetime | None) -> Node:
    return "never" if at is None else moment(at)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _tokens(frame: Frame, operator: Operator, found: Sequence[Row]) -> Node:
    rows: list[Node] = [
        line(
            each["name"], "Operator" if each["kind"] == "admin" else "Proxy", pill(each["state"].capitalize(), _STATES[each["state"]]),
            _may(each), _seen(each["last_used_at"]), "never" if each["expires_at"] is None else moment(each["expires_at"]),
            each["state"] == "live" and may(operator, REVOKE_TOKEN)
            and act(frame, f"/operator/tokens/{each['id']}/revoke", "Revoke", look="danger"),
        )
        for each in found
    ]  # fmt: skip
    return sheet("Name|Whose|State|May|Last seen|Expires|", rows, "There is no token.", label="Tokens")


def _may(token: Row) -> str:
    if token["kind"] == "admin":
        return "everything" if token["scopes"] is None else ", ".join(token["scopes"])
    return f"holds that end: {_ON_EXPIRY[token['on_expiry']].lower()}"


def _name() -> Node:
    field = input_(name="name", required=True, maxlength="64", autocomplete="off", spellcheck="false")
    return labelled("Name", field, "Lower-case letters, digits, dots, dashes.")


def _for_proxy(frame: Frame) -> Node:
    ends = select(name="on_expiry")[(option(value=value)[words] for value, words in _ON_EXPIRY.items())]
    return act(
        frame,
        "/operator/tokens",
        "Make it",
        _name(),
        labelled("A hold that nobody settles", ends),
        look="",
        kind="service",
    )


def _for_operator(frame: Frame) -> Node:
    return act(
        frame, "/operator/tokens", "Make it", _name(),
        fieldset(class_="chips")[
            legend["What it may; nothing chosen is everything"],
            (label[input_(type="checkbox", name="scopes", value=scope), span[scope]] for scope in SCOPES),
        ],
        labelled("Expires after, days", input_(name="days", inputmode="numeric", value=str(ADMIN_DAYS), maxlength="4"), "Left out: never."),
        look="", kind="admin",
    )  # fmt: skip


handlers = (tokens, make, revoke)
