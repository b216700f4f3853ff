"""Top up: which way and how much; then a page to pay at, that tells live what has come."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final
from uuid import UUID

import msgspec
from htpy import (
    Element,
    a,
    button,
    details,
    div,
    nav,
    option,
    p,
    select,
    small,
    span,
    summary,
    table,
    tbody,
    td,
    th,
    thead,
    tr,
)  # fmt: skip
from htpy import (
    form as form_,
)
from htpy import (
    input as input_,
)
from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from litestar.response import Stream
from sqlalchemy.ext.asyncio import AsyncSession

from app.console.door import still_here
from app.console.forms import Form
from app.console.payment import changes, payment_page, pill, title
from app.console.receipt import qr_answer, seen_by
from app.console.session import Customer, SignedOut
from app.console.shell import HEADERS, SAID, Frame, Page, card, choices, empty, labelled, problem
from app.console.words import amount, dollars, moment
from app.kernel.db import Database, Row, new_id
from app.kernel.errors import AppError, InvoiceNotFound, MissingScope
from app.kernel.money import CURRENCIES, parse_amount
from app.kernel.pages import from_cursor, to_cursor
from app.kernel.ratelimit import count_or_refuse
from app.kernel.reading import read, uuid_in
from app.kernel.settings import Settings
from app.keys.verify import Verifier, require_scope
from app.topups.api import CLAIMS_PER_HOUR, ClaimRequest, caps_of, proof_of
from app.topups.claim import claim
from app.topups.create import Wish, create_topup, list_topups, own_topup
from app.topups.gateway import Gateways
from app.topups.methods import METHODS, Method, checked_amount, currency_named, method_named
from app.topups.receipt import Receipt, read_receipt, receipt_url

SAID["claimed"] = "Found: this is the top-up that your payment belongs to."
CHIPS: Final = {
    "USD": ("5", "10", "25", "50", "100"), "SATS": ("5000", "20000", "50000", "100000"), "BTC": ("0.0005", "0.001", "0.005"),
    "LTC": ("0.1", "0.5", "1"), "LBTC": ("0.0001", "0.0005", "0.001"), "XMR": ("0.05", "0.1", "0.5"),
}  # fmt: skip
_PAGE: Final = 10


class Made(msgspec.Struct, frozen=True):
    """The top-up that a form made."""

    topup_id: UUID


# --- choose -----------------------------------------------------------------------------------------


@get("/console/topup")
async def choose(
    customer: NamedDependency[Customer], frame: NamedDependency[Frame], db: NamedDependency[Database],
    gateways: NamedDependency[Gateways], method: FromQuery[str | None] = None, cursor: FromQuery[str | None] = None,
) -> Page:  # fmt: skip
    require_scope(customer.caller, "topup")
    chosen = method_named(method or _offered(gateways)[0].id, gateways.methods)
    earlier = await _earlier(db, customer, cursor)
    return frame.answer("Top up", choose_page(frame, gateways, chosen), _earlier_card(*earlier), _claim_card(frame))


@post("/console/topup")
async def create(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], gateways: NamedDependency[Gateways], settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    """Make one, or join the same that waits to be paid; sent twice it is one."""
    require_scope(customer.caller, "topup")
    chosen = method_named(form.text("method"), gateways.methods)
    try:
        made = await _made(customer, form, db, gateways, settings, chosen)
    except AppError as error:
        if error.status == 409:
            raise
        return frame.answer("Top up", problem(error), choose_page(frame, gateways, chosen), status=error.status)
    return frame.see(f"/console/topups/{made.topup_id}")


async def _made(
    customer: Customer, form: Form, db: Database, gateways: Gateways, settings: Settings, chosen: Method
) -> Made:
    currency, text = _wished(form)
    wish = Wish(chosen, currency, checked_amount(chosen, currency, msgspec.Raw(msgspec.json.encode(text))))
    if (earlier := await form.once.claim(Made)) is not None:
        return earlier

    async def finish(session: AsyncSession, topup: Row) -> Made:
        made = Made(topup["id"])
        await form.once.save(session, made)
        return made

    try:
        return await create_topup(
            db, gateways.of_method(chosen.id), customer.caller, wish, form.once.derived_id() or new_id(), finish,
            caps_of(settings), receipts=partial(receipt_url, settings),
        )  # fmt: skip
    except BaseException:
        await form.once.abandon()
        raise


def _wished(form: Form) -> tuple[str, str]:
    """Currency and amount: what was typed, else the chip that was chosen."""
    if form.has("amount"):
        return currency_named(form.text("currency") or "USD"), form.text("amount").replace(",", "")
    currency, _, text = form.text("pick").partition(":")
    return currency_named(currency or "USD"), text


def choose_page(frame: Frame, gateways: Gateways, chosen: Method) -> Element:
    return card(
        nav(class_="chips", aria_label="Ways to pay")[
            (
                a(href=f"/console/topup?method={each.id}", class_="pick", aria_current="true" if each is chosen else None)[
                    span[each.display_name, each.bonus_percent > 0 and small[f"{each.bonus_percent} % on top"]]
                ]
                for each in _offered(gateways)
            )
        ],
        amount_form(frame, chosen),
    )  # fmt: skip


def amount_form(frame: Frame, method: Method) -> Element:
    """How much, as chips or typed, with what this method takes and gives on top."""
    chips = [
        (f"{currency}:{text}", _chip(currency, text))
        for currency in _chip_currencies(method)
        for text in _fitting(method, currency)
    ]
    usual = chips[min(1, len(chips) - 1)][0] if chips else None
    limits = "; ".join(
        f"{amount(limit.least, code)} to {amount(limit.most, code)}"
        for code, limit in method.limits.items()
        if code in _chip_currencies(method)
    )
    return form_(method="post", action="/console/topup")[
        frame.guard(),
        input_(type="hidden", name="method", value=method.id),
        choices("How much", "pick", chips, usual),
        details[
            summary["Another amount"],
            div(class_="row")[
                labelled("Amount", input_(name="amount", inputmode="decimal", autocomplete="off", maxlength="24")),
                labelled("In", select(name="currency")[(option(value=code)[_named(code)] for code in method.limits)]),
            ],
        ],
        p(class_="quiet")[
            f"{method.display_name} takes {limits}. Valid for {method.expires_in_minutes} minutes, and credited also when it comes late.",
            method.bonus_percent > 0 and f" {method.bonus_percent} % is given on top.",
        ],
        button[f"Pay with {method.display_name}"],
    ]  # fmt: skip


def _offered(gateways: Gateways) -> list[Method]:
    return [method for method in METHODS.values() if method.id in gateways.methods]


def first_offered(gateways: Gateways) -> Method:
    """The method that a form without a choice is of."""
    return _offered(gateways)[0]


def _chip_currencies(method: Method) -> list[str]:
    """Bitcoin is told in sats where the method takes them."""
    return [code for code in method.limits if not (code == "BTC" and "SATS" in method.limits)]


def _fitting(method: Method, currency: str) -> list[str]:
    limit, money = method.limits[currency], CURRENCIES[currency]
    return [text for text in CHIPS[currency] if limit.least <= parse_amount(text.encode(), money, "pick") <= limit.most]


def _chip(currency: str, text: str) -> str:
    if currency == "USD":
        return f"${text}"
    return f"{int(text):,} sats" if currency == "SATS" else f"{text} {_named(currency)}"


def _named(currency: str) -> str:
    return {"SATS": "sats", "LBTC": "L-BTC"}.get(currency, currency)


# --- pay --------------------------------------------------------------------------------------------


@get("/console/topups/{topup_id:str}")
async def pay(
    customer: NamedDependency[Customer], frame: NamedDependency[Frame], db: NamedDependency[Database],
    settings: NamedDependency[Settings], topup_id: FromPath[str],
) -> Page:  # fmt: skip
    """The receipt's page, in the customer's frame."""
    require_scope(customer.caller, "topup")
    found = await _own_receipt(db, customer, topup_id)
    return frame.answer(
        title(found),
        *payment_page(settings, found, f"/console/topups/{found.topup['id']}"),
        div(class_="acts noprint")[
            a(href="/console", class_="button outline")["Home"],
            a(href="/console/topup", class_="button outline")["Another top-up"],
            a(href=receipt_url(settings, found.topup["account_id"], found.topup["id"]), class_="button outline")["Receipt to share"],
        ],
        refresh=10 if found.is_watched else 0,
    )  # fmt: skip


@get("/console/topups/{topup_id:str}/qr.svg")
async def qr(
    customer: NamedDependency[Customer], db: NamedDependency[Database], topup_id: FromPath[str]
) -> Response[bytes]:
    require_scope(customer.caller, "topup")
    return qr_answer(await _own_receipt(db, customer, topup_id))


@get("/console/topups/{topup_id:str}/live")
async def live(
    request: Request[Any, Any, Any], customer: NamedDependency[Customer], db: NamedDependency[Database],
    settings: NamedDependency[Settings], verifier: NamedDependency[Verifier], departure: NamedDependency[Any],
    topup_id: FromPath[str],
) -> Stream:  # fmt: skip
    """What has come, as it comes, until it is over or the session is."""
    require_scope(customer.caller, "topup")
    first = await _own_receipt(db, customer, topup_id)

    async def read_again() -> Receipt:
        require_scope((await still_here(db, verifier, customer.session)).caller, "topup")
        return await _own_receipt(db, customer, topup_id)

    async def telling() -> AsyncIterator[str]:
        place = f"/console/topups/{first.topup['id']}"
        with contextlib.suppress(SignedOut, MissingScope):
            async for each in changes(read_again, settings, departure, place, seen_by(request)):
                yield each

    return Stream(telling(), media_type="text/event-stream", headers=dict(HEADERS))


async def _own_receipt(db: Database, customer: Customer, text: str) -> Receipt:
    """Raises InvoiceNotFound."""
    topup_id, account_id = uuid_in(text), customer.caller.account_id
    if topup_id is None:
        raise InvoiceNotFound

    async def work(session: AsyncSession) -> Receipt:
        await own_topup(session, account_id, topup_id)
        return await read_receipt(session, account_id, topup_id)

    return await db.transaction(work)


# --- what was made before ---------------------------------------------------------------------------


async def _earlier(db: Database, customer: Customer, cursor: str | None) -> tuple[Sequence[Row], str | None]:
    after = from_cursor(cursor, tuple[datetime, UUID])
    found = await db.transaction(lambda session: list_topups(session, customer.caller.account_id, _PAGE + 1, after))
    last = found[_PAGE - 1] if len(found) > _PAGE else None
    return found[:_PAGE], to_cursor(last["created_at"], last["id"]) if last else None


def _earlier_card(found: Sequence[Row], cursor: str | None) -> Element:
    if not found:
        return card(empty("No top-up yet. The first one is made above."), title="Your top-ups")
    return card(
        div(class_="table", tabindex="0", role="region", aria_label="Your top-ups")[
            table[
                thead[tr[th["Made"], th["Asked for"], th["By"], th["State"], th(class_="n")["Credited"]]],
                tbody[(_line(topup) for topup in found)],
            ]
        ],
        cursor and p[a(href=f"/console/topup?cursor={cursor}")["Older ones"]],
        title="Your top-ups",
    )


def _line(topup: Row) -> Element:
    credited = topup["credited_nusd"] + topup["bonus_nusd"]
    return tr[
        td[a(href=f"/console/topups/{topup['id']}")[moment(topup["created_at"])]],
        td[amount(topup["amount_units"], topup["currency"])],
        td[METHODS[topup["method"]].display_name],
        td[pill(topup)],
        td(class_="n")[dollars(credited) if credited else "–"],
    ]


# --- paid, and not here -----------------------------------------------------------------------------


@post("/console/topup/claim")
async def claim_payment(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], gateways: NamedDependency[Gateways],
) -> Page:  # fmt: skip
    require_scope(customer.caller, "topup")
    kind = form.text("kind")
    try:
        proof = proof_of(read(msgspec.json.encode({kind: form.text("proof")}), ClaimRequest))
        await count_or_refuse(db, f"claim/{customer.caller.account_id}", CLAIMS_PER_HOUR)
        found = await claim(db, gateways, customer.caller.account_id, proof)
    except AppError as error:
        return frame.answer("Top up", problem(error), _claim_card(frame, is_open=True), status=error.status)
    return frame.see(f"/console/topups/{found['id']}", "claimed")


def _claim_card(frame: Frame, *, is_open: bool = False) -> Element:
    kinds = (("lightning_invoice", "Lightning invoice"), ("payment_hash", "Payment hash"), ("txid", "Transaction id"))
    return card(
        details(open=is_open)[
            summary["Paid, and it is not here?"],
            form_(method="post", action="/console/topup/claim")[
                frame.guard(),
                labelled("What you have of the payment", select(name="kind")[(option(value=value)[words] for value, words in kinds)]),
                labelled("It says", input_(name="proof", required=True, minlength="16", maxlength="2000", autocomplete="off", spellcheck="false")),
                button(class_="outline")["Look for it"],
            ],
        ]
    )  # fmt: skip


handlers: Final = (choose, create, pay, qr, live, claim_payment)
