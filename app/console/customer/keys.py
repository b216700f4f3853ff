"""Keys: the tree of them with how much of their limits is used; each can be made, shown, changed, switched off and revoked."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import msgspec
from htpy import (
    Element,
    Node,
    a,
    button,
    code,
    dd,
    details,
    div,
    dl,
    dt,
    h3,
    header,
    li,
    p,
    progress,
    span,
    summary,
    ul,
)  # fmt: skip
from htpy import (
    form as form_,
)
from htpy import (
    input as input_,
)
from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import moment_of
from app.activity.history import Calls, calls
from app.console.door import require_key_manager
from app.console.forms import Form
from app.console.session import Customer
from app.console.shell import SAID, Frame, Page, card, empty, labelled, problem
from app.console.signing import download, secret
from app.console.words import dollars, moment
from app.kernel.db import Database, Row
from app.kernel.errors import AppError, KeyNotFound
from app.kernel.logs import log
from app.kernel.pages import from_cursor, to_cursor
from app.kernel.reading import read as read_json
from app.kernel.reading import uuid_in
from app.kernel.security import UnsealError
from app.keys.api import KeyRequest, new_key, wanted_changes, windows_of
from app.keys.issue import Keyring, change, issue, list_keys, read, revoke
from app.keys.tree import PERIOD_WORDS
from app.keys.verify import MANAGES_KEYS, SCOPES, hold_still

SAID.update(
    {
        "key-revoked": "The key is revoked: it is refused from now on.",
        "key-changed": "The key is changed.",
        "key-off": "The key is switched off. Switch it on again whenever you like.",
        "key-on": "The key is switched on.",
    }
)
_PAGE: Final = 25
_WINDOWS: Final = {
    "daily": ("a day", "today"), "weekly": ("a week", "this week"), "monthly": ("a month", "this month"), "total": ("in all", "in all"),
}  # fmt: skip
_MAY: Final = (*SCOPES, MANAGES_KEYS)
_SCOPE_WORDS: Final = {"spend": "spend", "balance": "see the balance", "topup": "top up", "activity": "see activity", "keys": "make keys"}  # fmt: skip


class Issued(msgspec.Struct, frozen=True):
    """A new key's secret, shown to its owner now."""

    key_id: UUID
    name: str
    secret: str


@get("/console/keys")
async def keys(
    customer: NamedDependency[Customer], frame: NamedDependency[Frame], db: NamedDependency[Database],
    cursor: FromQuery[str | None] = None, revoked: FromQuery[bool] = False,
) -> Page:  # fmt: skip
    if not customer.manages_keys:
        return frame.answer("Keys", _needs_the_credit_id())
    found, last_used, following = await _listed(db, customer, cursor, revoked=revoked)
    shown = list_page(found, last_used, revoked=revoked, cursor=following)
    return frame.answer("Keys", _with_a_key(customer), shown, _create_card(frame, customer))


@post("/console/keys")
async def create(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    keyring: NamedDependency[Keyring],
) -> Page:  # fmt: skip
    """Make a key and show it; below the key that was signed in with. Sent twice it is one."""
    require_key_manager(customer)

    async def effect(session: AsyncSession) -> Issued:
        await hold_still(session, customer.caller)
        made, shown = await issue(session, keyring, customer.caller.account_id, new)
        return Issued(made["id"], made["name"], shown)

    try:
        new = new_key(asked(form), customer.caller.key_id)
        issued = await form.once.do(Issued, effect)
    except AppError as error:
        return frame.answer("Keys", problem(error), _create_card(frame, customer, form), status=error.status)
    return frame.answer("Your new key", _issued(issued, keyring))


@get("/console/keys/{key_id:str}")
async def key(
    customer: NamedDependency[Customer], frame: NamedDependency[Frame], db: NamedDependency[Database],
    keyring: NamedDependency[Keyring], key_id: FromPath[str],
) -> Page:  # fmt: skip
    account_id, under = _managed(customer)
    found = await db.transaction(lambda session: read(session, account_id, _id(key_id), under))
    return frame.answer(found["name"], *key_page(frame, customer, found, keyring))


@post("/console/keys/{key_id:str}")
async def act(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], keyring: NamedDependency[Keyring], key_id: FromPath[str],
) -> Page:  # fmt: skip
    """Reveal, change, switch off or on, revoke: what the button says."""
    (account_id, under), wanted = _managed(customer), _id(key_id)
    require_key_manager(customer)

    async def changed(changes: dict[str, Any]) -> Row:
        return await db.transaction(lambda session: change(session, keyring, account_id, wanted, changes, under))

    match form.text("act"):
        case "reveal":
            found = await db.transaction(lambda session: _read_to_show(session, keyring, customer, wanted))
            return frame.answer(
                found["name"], _revealed(found, keyring, account_id), *key_page(frame, customer, found, keyring)
            )
        case "off" | "on" as act:
            await changed({"is_disabled": act == "off"})
            return frame.see(f"/console/keys/{wanted}", f"key-{act}")
        case "revoke":
            await db.transaction(lambda session: revoke(session, keyring, account_id, wanted, under))
            return frame.see("/console/keys", "key-revoked")
        case _:
            try:
                await changed(wanted_changes(asked(form)))
            except AppError as error:
                found = await db.transaction(lambda session: read(session, account_id, wanted, under))
                return frame.answer(
                    found["name"], problem(error), *key_page(frame, customer, found, keyring), status=error.status
                )
            return frame.see(f"/console/keys/{wanted}", "key-changed")


async def _read_to_show(session: AsyncSession, keyring: Keyring, customer: Customer, key_id: UUID) -> Row:
    """Before a kept secret is shown again, its owner's log tells of it."""
    account_id, under = _managed(customer)
    found = await read(session, account_id, key_id, under)
    if keyring.reveal and found["sealed_secret"] is not None:
        await keyring.note(session, account_id, "key_revealed", customer.caller.kind.value, str(key_id))
    return found


def asked(form: Form) -> KeyRequest:
    """The form as the API would have been asked. Raises InvalidField."""
    scopes = list(form.texts("scopes"))
    models = form.text("allowed_models").replace(",", " ").split()
    expires = form.text("expire_at")
    minute = form.text("requests_per_minute")
    wanted: dict[str, Any] = {
        "name": form.text("name"),
        "limits": [
            {"usd": form.number(f"limit_{period}"), "period": period}
            for period in _WINDOWS
            if form.has(f"limit_{period}")
        ],
        "expire_at": f"{expires}T23:59:59Z" if expires else None,
        "scopes": scopes if scopes and set(scopes) != set(SCOPES) else None,
        "allowed_models": models or None,
        "max_usd_per_call": form.number("max_usd_per_call"),
        "requests_per_minute": int(minute) if minute.isdecimal() and len(minute) < 12 else minute or None,
    }
    return read_json(msgspec.json.encode(wanted), KeyRequest)  # type: ignore[no-any-return]


async def _listed(
    db: Database, customer: Customer, cursor: str | None, *, revoked: bool
) -> tuple[list[Row], dict[UUID, datetime], str | None]:
    """When a key was used last is told to who may see activity."""
    (account_id, under), after = _managed(customer), from_cursor(cursor, tuple[UUID])

    async def work(session: AsyncSession) -> tuple[list[Row], dict[UUID, datetime]]:
        found = await list_keys(
            session, account_id, _PAGE + 1, after[0] if after else None, include_disabled=revoked, under=under
        )
        last = [
            await calls(session, account_id, Calls(key_id=each["id"]), limit=1)
            for each in found[:_PAGE]
            if each["lifetime_nusd"] and customer.may("activity")
        ]
        return found, {each[0]["key_id"]: moment_of(each[0]["id"]) for each in last if each}

    found, last_used = await db.transaction(work)
    return found[:_PAGE], last_used, to_cursor(found[_PAGE - 1]["id"]) if len(found) > _PAGE else None


def _managed(customer: Customer) -> tuple[UUID, UUID | None]:
    """The account whose keys may be managed, and the key that they stand below where a key manages them. Raises KeyNotFound."""
    if not customer.manages_keys:
        raise KeyNotFound("Keys are managed with the credit id, or with a key that may make keys: sign in with it.")
    return customer.caller.account_id, customer.caller.key_id


def _id(text: str) -> UUID:
    found = uuid_in(text)
    if found is None:
        raise KeyNotFound
    return found


# --- pages ------------------------------------------------------------------------------------------


def list_page(found: Sequence[Row], last_used: dict[UUID, datetime], *, revoked: bool, cursor: str | None) -> Element:
    return card(
        _branch(found, last_used, None) if found else empty("No key yet. Make one below, and call with it."),
        div(class_="acts")[
            cursor and a(href=f"/console/keys?cursor={cursor}{'&revoked=true' if revoked else ''}")["More keys"],
            a(href="/console/keys" if revoked else "/console/keys?revoked=true")["Hide revoked keys" if revoked else "Show revoked keys too"],
        ],
    )  # fmt: skip


def _branch(found: Sequence[Row], last_used: dict[UUID, datetime], parent: UUID | None) -> Element:
    """Keys below this one, each with its own below it; one whose parent is on another page stands at the root."""
    here = {each["id"] for each in found}
    mine = [each for each in found if (each.get("parent_id") if each.get("parent_id") in here else None) == parent]
    below = {each.get("parent_id") for each in found}
    return ul(class_="tree")[
        (li[_key(each, last_used.get(each["id"])), each["id"] in below and _branch(found, last_used, each["id"])] for each in mine)
    ]  # fmt: skip


def _key(each: Row, used_at: datetime | None) -> Element:
    return div(class_="key")[
        header[h3[a(href=f"/console/keys/{each['id']}")[each["name"]]], code[each["preview"]], state(each)],
        limit_bar(each),
        p(class_="quiet")[
            f"{dollars(each['lifetime_nusd'])} spent in all. ",
            ("Last used ", moment(used_at), ". ") if used_at else "Not used yet. ",
            each["expire_at"] and ("Expires ", moment(each["expire_at"]), "."),
        ],
    ]


def state(each: Row) -> Element:
    if each["deleted_at"] is not None:
        return span(class_="pill bad")["Revoked"]
    if each["expire_at"] is not None and each["expire_at"] <= datetime.now(UTC):
        return span(class_="pill bad")["Expired"]
    return span(class_="pill wait")["Off"] if each["disabled_at"] is not None else span(class_="pill good")["On"]


def limit_bar(each: Row) -> Node:
    """How much of each of its limits is used, and when that begins anew."""
    if each["limit_nusd"] is None:
        return p(class_="quiet")["No limit of its own: it may spend what is on the account."]
    return div[(_window_bar(*window) for window in windows_of(each))]


def _window_bar(period: str | None, limit: int, used: int, reset_at: datetime | None) -> Element:
    words = f"{dollars(used)} of {dollars(limit)} used {_WINDOWS[PERIOD_WORDS[period]][1]}"
    return div[
        progress(value=str(min(used, limit)), max=str(limit), aria_label=words),
        p(class_="quiet")[words, reset_at is not None and ("; begins anew in ", moment(reset_at, counts_down=True))],
    ]


def key_page(frame: Frame, customer: Customer, found: Row, keyring: Keyring) -> tuple[Element, ...]:
    told = card(
        dl(class_="facts")[
            dt["Key"], dd[code[found["preview"]], " ", state(found)],
            dt["Made"], dd[moment(found["created_at"])],
            dt["Spent in all"], dd[dollars(found["lifetime_nusd"])],
            dt["Held now"], dd[dollars(found["held_nusd"])],
            dt["May"], dd[", ".join(_SCOPE_WORDS.get(each, each) for each in _scopes(found)) or "nothing"],
            dt["Models"], dd[", ".join(found["allowed_models"] or ()) or "all"],
        ],
        limit_bar(found),
        customer.is_owner and p[a(href=f"/console/activity?key_id={found['id']}")["Its activity"]],
    )  # fmt: skip
    if found["deleted_at"] is not None:
        return (told,)
    return told, _change_card(frame, customer, found), _acts_card(frame, found, keyring)


def _acts_card(frame: Frame, found: Row, keyring: Keyring) -> Element:
    address, is_off = f"/console/keys/{found['id']}", found["disabled_at"] is not None

    def does(act: str, words: str, class_: str = "outline") -> Element:
        return form_(method="post", action=address)[
            frame.guard(), input_(type="hidden", name="act", value=act), button(class_=class_)[words]
        ]

    return card(
        div(class_="acts")[
            keyring.reveal and found["sealed_secret"] is not None and does("reveal", "Show the key"),
            does("on", "Switch on") if is_off else does("off", "Switch off"),
        ],
        details[summary["Revoke this key…"], p["It is refused at once, and this cannot be undone."], does("revoke", "Revoke it", "danger")],
    )  # fmt: skip


def _scopes(found: Row) -> Sequence[str]:
    """What a key may do; it was given all but one where it was told nothing."""
    return SCOPES if found["scopes"] is None else found["scopes"]


def _change_card(frame: Frame, customer: Customer, found: Row) -> Element:
    return card(
        details[
            summary["Change it"],
            form_(method="post", action=f"/console/keys/{found['id']}")[
                frame.guard(), input_(type="hidden", name="act", value="change"), *_fields(customer, _as_filled(found)), button["Save"]
            ],
        ]
    )  # fmt: skip


def _create_card(frame: Frame, customer: Customer, form: Form | None = None) -> Element:
    filled = {name: " ".join(form.texts(name)) for name in form.fields} if form is not None else {}
    return card(
        form_(method="post", action="/console/keys")[frame.guard(), *_fields(customer, filled), button["Make a key"]],
        title="A new key",
    )


def _as_filled(found: Row) -> dict[str, str]:
    return {
        "name": found["name"],
        **{f"limit_{PERIOD_WORDS[period]}": _plain(limit) for period, limit, *_ in windows_of(found)},
        "expire_at": found["expire_at"].strftime("%Y-%m-%d") if found["expire_at"] else "",
        "max_usd_per_call": _plain(found["call_limit_nusd"]),
        "requests_per_minute": str(found["requests_per_minute"] or ""),
        "allowed_models": " ".join(found["allowed_models"] or ()),
        "scopes": " ".join(_scopes(found)),
    }


def _plain(amount_nusd: int | None) -> str:
    return "" if amount_nusd is None else dollars(amount_nusd).removeprefix("$").replace(",", "")


def _fields(customer: Customer, filled: dict[str, str]) -> tuple[Element, ...]:
    """What a key may be; of what it may do, what may be given."""
    given = [scope for scope in _MAY if customer.is_owner or customer.may(scope)]

    def text(name: str, **more: Any) -> Node:
        return input_(name=name, value=filled.get(name, ""), autocomplete="off", **more)

    allowed = filled["scopes"].split() if "scopes" in filled else SCOPES
    return (
        labelled("Name", text("name", required=True, maxlength="60"), "1 to 25 characters, no other live key's"),
        div(class_="row")[
            (labelled(f"USD {words}", text(f"limit_{period}", inputmode="decimal")) for period, (words, _) in _WINDOWS.items())
        ],
        p(class_="quiet")["It may spend so much at most; what is empty does not bound it."],
        details[
            summary["More limits"],
            div(class_="row")[
                labelled("At most per call, in USD", text("max_usd_per_call", inputmode="decimal")),
                labelled("Requests a minute", text("requests_per_minute", inputmode="numeric")),
                labelled("Expires after (UTC day)", text("expire_at", type="date")),
            ],
            labelled("Only these models", text("allowed_models", maxlength="2000"), "names with spaces between; empty: all"),
            div(class_="acts", role="group", aria_label="It may")[
                (
                    labelled(_SCOPE_WORDS[scope], input_(type="checkbox", name="scopes", value=scope, checked=scope in allowed))
                    for scope in given
                )
            ],
        ],
    )  # fmt: skip


def _issued(issued: Issued, keyring: Keyring) -> Element:
    return card(
        p["Keep it: it is shown now", "." if not keyring.reveal else ", and whenever you ask for it."],
        secret(issued.name, issued.secret),
        div(class_="acts")[
            download("api-key.txt", f"{issued.secret}\n"), a(href="/console/keys", class_="button")["All keys"]
        ],
    )


def _revealed(found: Row, keyring: Keyring, account_id: UUID) -> Element:
    try:
        shown = keyring.open(found["sealed_secret"], account_id, found["id"])
    except UnsealError:
        log.error("key.secret_unreadable", account_id=str(account_id), key_id=str(found["id"]))
        shown = None
    if shown is None:
        return card(p["This key cannot be shown: it was kept nowhere that can be read. It works as before."])
    return card(secret(found["name"], shown))


def _with_a_key(customer: Customer) -> Element | None:
    if customer.is_owner:
        return None
    return card(p["You are signed in with a key. Here are the keys below it: they may do no more than it may, what they spend counts to it, and without it they stop."])  # fmt: skip


def _needs_the_credit_id() -> Element:
    return card(
        empty("You are signed in with a key. Keys are managed with the credit id, or with a key that may make keys: sign out, and in with it.")
    )  # fmt: skip


handlers: Final = (keys, create, key, act)
