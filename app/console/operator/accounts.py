"""*Accounts*: find whose something is, look at its books, stop it or let it go on, and credit or debit it with a reason."""

from collections.abc import Sequence
from typing import Final
from uuid import UUID

import msgspec
from htpy import Node, a, code, dd, div, dl, dt, fieldset, label, legend, p, section, span
from htpy import input as input_
from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin import accounts, keys
from app.admin.accounts import Adjusted, Shown
from app.admin.acts import clean_reason
from app.console.forms import Form
from app.console.operator.acting import (
    CLOSE,
    CREDIT,
    FREEZE,
    READ,
    ROTATE,
    SWITCH_KEY,
    act,
    acting,
    because,
    line,
    may,
    more,
    pill,
    sheet,
)
from app.console.operator.said import ENTRIES, MATCHES, account_state, topup_state
from app.console.session import Operator
from app.console.shell import SAID, Frame, Page, card, labelled, problem
from app.console.signing import secret
from app.console.words import about, amount, dollars, moment, shortened
from app.kernel.db import Database, Row
from app.kernel.errors import AppError, InvalidField, KeyNotFound, NotFound
from app.kernel.money import parse_usd
from app.kernel.reading import uuid_in
from app.kernel.settings import Settings
from app.keys.issue import Keyring
from app.ledger.statement import statement
from app.ledger.tables import AccountStatus
from app.topups.methods import METHODS

SAID.update(
    {
        "frozen": "The account is frozen: no call of it is allowed any more.",
        "unfrozen": "The account may call again.",
        "closed": "The account is closed for ever.",
        "adjusted": "Done, and written to the log.",
        "key-changed": "The key was changed, at once.",
    }
)
_AT_ONCE: Final = 50
_STATES: Final = ("active", "frozen", "closed")


class Done(msgspec.Struct, frozen=True):
    """An act that was done; it is kept, so that a form that is sent twice does it once."""

    told: str = ""


# --- doors ------------------------------------------------------------------------------------------


@get("/operator/accounts")
async def listing(
    operator: NamedDependency[Operator], frame: NamedDependency[Frame], db: NamedDependency[Database],
    status: FromQuery[str | None] = None, before: FromQuery[str | None] = None,
) -> Page:  # fmt: skip
    acting(operator, READ)
    chosen = status if status in _STATES else None
    wanted = None if chosen is None else AccountStatus(chosen)
    after = uuid_in(before) if before else None
    found = await db.transaction(lambda session: accounts.list_accounts(session, _AT_ONCE + 1, after, wanted))
    return frame.answer("Accounts", *accounts_page(frame, found, chosen), wide=True)


@post("/operator/accounts/search")
async def search(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    """In a body, since what is looked for may be a secret, which belongs into no address."""
    acting(operator, READ)
    asked = form.text("q")
    if not asked.isprintable() or not 0 < len(asked) <= 2000:
        raise InvalidField("Say what to look for, in a line of at most 2,000 characters.", param="q")
    found = await db.transaction(lambda session: accounts.search(session, settings.pepper, asked, settings.jwt_issuer))
    if len(found) == 1:
        return frame.see(f"/operator/accounts/{found[0]['id']}")
    return frame.answer("Accounts", *found_page(frame, found), wide=True)


@get("/operator/accounts/{account_id:str}")
async def show(
    operator: NamedDependency[Operator], frame: NamedDependency[Frame], db: NamedDependency[Database],
    account_id: FromPath[str], before: FromQuery[int | None] = None,
) -> Page:  # fmt: skip
    acting(operator, READ)
    return await _shown(frame, operator, db, _account_in(account_id), before)


@post("/operator/accounts/{account_id:str}/{what:str}")
async def change(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    settings: NamedDependency[Settings], keyring: NamedDependency[Keyring], account_id: FromPath[str], what: FromPath[str],
) -> Page:  # fmt: skip
    """Freeze, unfreeze, close: with a reason, if there is one to give."""
    if what not in _CHANGES:
        raise NotFound("There is no such page.")
    admin, account = acting(operator, _CHANGES[what][0]), _account_in(account_id)
    reason = clean_reason(form.text("reason")) if form.has("reason") else None

    async def effect(session: AsyncSession) -> Done:
        match what:
            case "freeze":
                await accounts.freeze(session, settings.pepper, admin, account, reason)
            case "unfreeze":
                await accounts.unfreeze(session, settings.pepper, admin, account, reason)
            case _:
                await accounts.close(session, keyring, settings.pepper, admin, account, reason)
        return Done()

    await form.once.do(Done, effect)
    return frame.see(f"/operator/accounts/{account}", _CHANGES[what][1])


_CHANGES: Final = {"freeze": (FREEZE, "frozen"), "unfreeze": (FREEZE, "unfrozen"), "close": (CLOSE, "closed")}


@post("/operator/accounts/{account_id:str}/rotate")
async def rotate(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    settings: NamedDependency[Settings], keyring: NamedDependency[Keyring], account_id: FromPath[str],
) -> Page:  # fmt: skip
    """The new credit id is on the page that answers, and on no other."""
    admin, account = acting(operator, ROTATE), _account_in(account_id)
    reason = clean_reason(form.text("reason")) if form.has("reason") else None

    async def effect(session: AsyncSession) -> Done:
        return Done(await accounts.rotate(session, keyring, settings.pepper, admin, account, reason))

    made = await form.once.do(Done, effect)
    told = p[
        "The old credit id is refused from now on; keys work as before. Give this one to the account's owner: it is shown now and never again."
    ]
    back = a(href=f"/operator/accounts/{account}", class_="button")["Back to the account"]
    return frame.answer("Another credit id", card(told, secret("Credit id", made.told), div(class_="acts")[back]))


@post("/operator/accounts/{account_id:str}/adjust")
async def adjust(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings], account_id: FromPath[str],
) -> Page:  # fmt: skip
    """First what it would do, before and after; then, confirmed, the entry."""
    admin, account = acting(operator, CREDIT), _account_in(account_id)
    try:
        amount_nusd = _signed(form)
        reason, below_floor = clean_reason(form.text("reason")), form.has("below_floor")
        told = settings.pepper, admin, account, amount_nusd, reason
        if not form.has("confirmed"):
            tried = await db.transaction(
                lambda session: accounts.adjust(session, *told, below_floor=below_floor, dry_run=True)
            )
            return frame.answer("Is this right?", confirm_page(frame, tried, reason, below_floor=below_floor))

        async def effect(session: AsyncSession) -> Done:
            return Done((await accounts.adjust(session, *told, below_floor=below_floor)).reference or "")

        await form.once.do(Done, effect)
    except AppError as error:
        if error.status in (409, 429, 503) or isinstance(error, NotFound):
            raise
        return await _shown(frame, operator, db, account, None, error)
    return frame.see(f"/operator/accounts/{account}", "adjusted")


def _signed(form: Form) -> int:
    amount_nusd = parse_usd(form.number("amount_usd"), "amount_usd")
    if form.text("direction") not in ("credit", "debit"):
        raise InvalidField("Say whether it is credited or debited.", param="direction")
    return amount_nusd if form.text("direction") == "credit" else -amount_nusd


@post("/operator/accounts/{account_id:str}/keys/{key_id:str}/{what:str}")
async def change_key(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    settings: NamedDependency[Settings], keyring: NamedDependency[Keyring], account_id: FromPath[str], key_id: FromPath[str],
    what: FromPath[str],
) -> Page:  # fmt: skip
    """Disable, enable, revoke."""
    admin, account, key = acting(operator, SWITCH_KEY), _account_in(account_id), uuid_in(key_id)
    if key is None or what not in ("disable", "enable", "revoke"):
        raise KeyNotFound

    async def effect(session: AsyncSession) -> Done:
        told = session, keyring, settings.pepper, admin, account, key
        if what == "revoke":
            await keys.revoke(*told)
        else:
            await keys.switch(*told, is_disabled=what == "disable")
        return Done()

    await form.once.do(Done, effect)
    return frame.see(f"/operator/accounts/{account}", "key-changed")


async def _shown(
    frame: Frame, operator: Operator, db: Database, account_id: UUID, before: int | None, error: AppError | None = None
) -> Page:
    found = await db.transaction(lambda session: accounts.show(session, account_id))
    entries = await db.transaction(lambda session: statement(session, account_id, limit=_AT_ONCE + 1, before_id=before))
    page = account_page(frame, operator, found, entries, error)
    return frame.answer("Account", *page, wide=True, status=200 if error is None else error.status)


def _account_in(text: str) -> UUID:
    """Raises NotFound."""
    found = uuid_in(text)
    if found is None:
        raise NotFound("No such account")
    return found


# --- pages ------------------------------------------------------------------------------------------


def accounts_page(frame: Frame, found: Sequence[Row], status: str | None) -> Sequence[Node]:
    ways = (("Every account", None), *((each.capitalize(), each) for each in _STATES))
    chosen = [
        a(href="/operator/accounts" + (f"?status={each}" if each else ""), aria_current="page" if each == status else None)[words]
        for words, each in ways
    ]  # fmt: skip
    further = f"&status={status}" if status else ""
    return (
        _search(frame),
        div(class_="tabs")[chosen],
        card(_table(found[:_AT_ONCE], "No account yet. The first customer opens one at /console, or with POST /accounts/create.")),
        len(found) > _AT_ONCE and more(f"/operator/accounts?before={found[_AT_ONCE - 1]['id']}{further}"),
    )  # fmt: skip


def found_page(frame: Frame, found: Sequence[Row]) -> Sequence[Node]:
    none = "Nothing here is that: neither an account, a key, a top-up, a payment nor an address. Was it pasted whole?"
    return _search(frame), card(_table(found, none))


def _search(frame: Frame) -> Node:
    hint = "An account, a credit id, a key (whole or sk-abc…wxyz), an invoice, an address, a transaction or a payment hash."
    field = input_(name="q", type="search", required=True, maxlength="2000", autocomplete="off", spellcheck="false")
    return card(act(frame, "/operator/accounts/search", "Find", labelled("Whose is this?", field, hint), look=""))


def _table(found: Sequence[Row], none: str) -> Node:
    rows: list[Node] = [
        line(
            a(href=f"/operator/accounts/{each['id']}", class_="mono")[str(each["id"])],
            account_state(each["status"]), about(each["posted_nusd"]), about(each["held_nusd"]), f"{each['keys']:,}",
            moment(each["created_at"]), ", ".join(MATCHES.get(name, name) for name in each.get("matched", ())),
            numbers="2 3 4",
        )
        for each in found
    ]  # fmt: skip
    return sheet("Account|State|#Balance|#Held|#Keys|Opened|Found by", rows, none)


def account_page(
    frame: Frame, operator: Operator, found: Shown, entries: Sequence[Row], error: AppError | None
) -> Sequence[Node]:
    account = found.account
    return (
        error is not None and problem(error),
        _facts(account),
        div(class_="columns")[
            may(operator, CREDIT) and _adjusting(frame, account),
            may(operator, FREEZE) and _stopping(frame, account),
        ],
        card(_keys(frame, found, is_changing=may(operator, SWITCH_KEY)), title="Keys"),
        card(_holds(found.holds), title="Open holds"),
        card(_topups(found.topups), title="Top-ups"),
        card(_ledger(entries), title="Ledger"),
        len(entries) > _AT_ONCE and more(f"/operator/accounts/{account['id']}?before={entries[_AT_ONCE - 1]['id']}"),
        p[a(href=f"/operator/audit?target={account['id']}")["What operators did to it"]],
    )  # fmt: skip


def _facts(account: Row) -> Node:
    available = max(0, account["posted_nusd"] - account["held_nusd"] - account["floor_nusd"])
    facts = (
        ("Id", code[str(account["id"])]), ("State", account_state(account["status"])), ("Balance", dollars(account["posted_nusd"])),
        ("Held", dollars(account["held_nusd"])), ("May be spent", dollars(available)), ("Opened", moment(account["created_at"])),
    )  # fmt: skip
    return section(class_="card")[dl(class_="facts")[((dt[name], dd[value]) for name, value in facts)]]


def _adjusting(frame: Frame, account: Row) -> Node:
    return card(
        act(
            frame, f"/operator/accounts/{account['id']}/adjust", "See what it does",
            fieldset(class_="chips")[
                legend["Direction"],
                label[input_(type="radio", name="direction", value="credit", checked=True), span["Credit"]],
                label[input_(type="radio", name="direction", value="debit"), span["Debit"]],
            ],
            labelled("Amount, USD", input_(name="amount_usd", inputmode="decimal", required=True, maxlength="22"), "Such as 5 or 0.25."),
            because(),
            label[input_(type="checkbox", name="below_floor", value="yes"), " Also below zero, and what is held"],
            look="",
        ),
        title="Credit or debit",
    )  # fmt: skip


def _stopping(frame: Frame, account: Row) -> Node:
    there, reason = f"/operator/accounts/{account['id']}", because(is_needed=False)
    if account["status"] == "closed":
        return card(p["It is closed: its credit id and keys are refused. Its books stay."], title="Stop it")
    freezing = (
        act(frame, f"{there}/unfreeze", "Let it call again", reason)
        if account["status"] == "frozen"
        else act(frame, f"{there}/freeze", "Freeze: allow no call any more", reason)
    )
    return card(
        freezing,
        section[p(class_="quiet")["For a credit id that leaked: the old one is refused, keys work as before."],
                act(frame, f"{there}/rotate", "Give it another credit id", because(is_needed=False))],
        account["posted_nusd"] == 0 and act(frame, f"{there}/close", "Close for ever", because(is_needed=False), look="danger"),
        title="Stop it",
    )  # fmt: skip


def confirm_page(frame: Frame, tried: Adjusted, reason: str, *, below_floor: bool) -> Node:
    """What an adjustment would do: nothing has happened yet."""
    is_credit = tried.amount_nusd > 0
    facts = (
        ("Account", code[str(tried.account_id)]), ("Credit" if is_credit else "Debit", dollars(abs(tried.amount_nusd))),
        ("Balance before", dollars(tried.before_nusd)), ("Balance after", dollars(tried.after_nusd)),
        ("May be spent after", dollars(tried.available_nusd)), ("Reason", reason),
    )  # fmt: skip
    hidden = {
        "direction": "credit" if is_credit else "debit",
        "amount_usd": _plain(abs(tried.amount_nusd)),
        "reason": reason,
    }
    hidden |= {"confirmed": "yes"} | ({"below_floor": "yes"} if below_floor else {})
    there = f"/operator/accounts/{tried.account_id}"
    return card(
        dl(class_="facts")[((dt[name], dd[value]) for name, value in facts)],
        div(class_="acts")[
            act(frame, f"{there}/adjust", "Credit it" if is_credit else "Debit it", look="" if is_credit else "danger", **hidden),
            a(href=there, class_="button outline small")["Leave it"],
        ],
    )  # fmt: skip


def _plain(amount_nusd: int) -> str:
    return dollars(amount_nusd).replace("$", "").replace(",", "")


def _keys(frame: Frame, found: Shown, *, is_changing: bool) -> Node:
    rows: list[Node] = [
        line(
            key["name"], code[key["preview"]], _key_state(key), about(key["lifetime_nusd"]),
            "none" if key["limit_nusd"] is None else [about(key["limit_nusd"]), f" {key['reset_period'] or 'in all'}"],
            is_changing and _key_acts(frame, found.account["id"], key), numbers="3",
        )
        for key in found.keys
    ]  # fmt: skip
    return sheet("Name|Key|State|#Spent|Limit|", rows, "It has no key: nobody can call with it.", label="Keys")


def _key_state(key: Row) -> Node:
    return pill("Disabled", "wait") if key["disabled_at"] is not None else pill("Live", "good")


def _key_acts(frame: Frame, account_id: UUID, key: Row) -> Node:
    there = f"/operator/accounts/{account_id}/keys/{key['id']}"
    switch = "enable" if key["disabled_at"] is not None else "disable"
    return div(class_="acts")[
        act(frame, f"{there}/{switch}", switch.capitalize()), act(frame, f"{there}/revoke", "Revoke", look="danger")
    ]


def _holds(holds: Sequence[Row]) -> Node:
    rows: list[Node] = [
        line(
            each["service"], code[shortened(each["request_id"], 12)], each["model"] or "–", about(each["amount_nusd"]),
            about(each["captured_nusd"]), moment(each["created_at"]), moment(each["expires_at"]), numbers="3 4",
        )
        for each in holds
    ]  # fmt: skip
    return sheet("Proxy|Request|Model|#Held|#Captured|Since|Ends", rows, "No call is in flight.")


def _topups(topups: Sequence[Row]) -> Node:
    rows: list[Node] = [
        line(
            a(href=f"/operator/topups/{each['id']}")[METHODS[each["method"]].display_name], amount(each["amount_units"], each["currency"]),
            topup_state(each), about(each["credited_nusd"]), about(each["bonus_nusd"]), moment(each["created_at"]), numbers="1 3 4",
        )
        for each in topups
    ]  # fmt: skip
    return sheet("Method|#Asked|State|#Credited|#Bonus|Made", rows, "It was never topped up.")


def _ledger(entries: Sequence[Row]) -> Node:
    rows: list[Node] = [
        line(
            f"{each['id']:,}", ENTRIES[each["kind"]], dollars(each["amount_nusd"]), dollars(each["balance_after_nusd"]),
            code[shortened(each["reference"], 16)], each["contra"], moment(each["created_at"]), numbers="2 3",
        )
        for each in entries[:_AT_ONCE]
    ]  # fmt: skip
    return sheet("No.|What|#Amount|#Balance after|Reference|From or to|When", rows, "Nothing has moved on it yet.")


handlers = (listing, search, show, rotate, adjust, change, change_key)
