"""How HTTP asks for top-ups, and how the payment backend tells us that something happened."""

from datetime import datetime
from functools import partial
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, new_id
from app.kernel.errors import InvalidField, InvoiceNotFound, NotFound
from app.kernel.idempotency import Once
from app.kernel.logs import log
from app.kernel.money import COIN_PLACES, CURRENCIES, JsonNumber, number, usd
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.ratelimit import count_or_refuse
from app.kernel.security import Caller
from app.kernel.settings import Settings
from app.keys.verify import require_scope
from app.topups.admission import Caps
from app.topups.claim import Proof, ProofKind, claim
from app.topups.create import Wish, create_topup, list_topups, read_topup
from app.topups.gateway import Gateways
from app.topups.inbox import store, topup_of_invoice
from app.topups.methods import METHODS, Method, checked_amount, currency_named, method_named
from app.topups.receipt import Receipt, rate_source, read_receipt, receipt_url, usd_rate

CLAIMS_PER_HOUR = 60
ProofText = Annotated[str, msgspec.Meta(min_length=16, max_length=2000, pattern=r"^[0-9A-Za-z]+\Z")]


class TopupRequest(msgspec.Struct, frozen=True):
    """How much, and in what: USD or the method's own currencies, in capitals or not."""

    amount: JsonNumber
    currency: Annotated[str, msgspec.Meta(min_length=1, max_length=10)] = "USD"


class LimitsView(msgspec.Struct, frozen=True):
    min: JsonNumber
    max: JsonNumber


class MethodView(msgspec.Struct, frozen=True):
    method: str
    display_name: str
    supported_currencies: list[str]
    limits: dict[str, LimitsView]
    expiration_minutes: int
    bonus_percent: int

    @classmethod
    def of(cls, method: Method) -> "MethodView":
        limits = {
            code: LimitsView(number(limit.least, CURRENCIES[code].places), number(limit.most, CURRENCIES[code].places))
            for code, limit in method.limits.items()
        }
        return cls(
            method.id, method.display_name, list(method.limits), limits, method.expires_in_minutes, method.bonus_percent
        )


class MethodsAnswer(msgspec.Struct, frozen=True):
    supported_methods: list[MethodView]


_OURS_IN_THEIR_WORDS: dict[Any, str] = {"Creating": "New", "Failed": "Invalid"}


class TopupView(msgspec.Struct, frozen=True):
    """A top-up as its payer sees it: `created_at` and `expires_at` in Unix seconds, `status` in BTCPay's own words.

    `network_fee` (coin) is part of what is due; `rate_usd` is USD per coin, and who quoted it.
    """

    invoice_id: str
    status: str
    additional_status: str
    amount: JsonNumber
    currency: str
    created_at: int
    expires_at: int
    checkout_url: str
    payment_method: str
    crypto_currency: str
    crypto_amount_due: JsonNumber
    amount_paid: JsonNumber
    amount_due: JsonNumber
    network_fee: JsonNumber
    rate_usd: JsonNumber
    rate_source: str
    credited_usd: JsonNumber
    bonus_usd: JsonNumber
    bonus_percent: int
    receipt_url: str
    lightning_invoice: str | msgspec.UnsetType = msgspec.UNSET
    address: str | msgspec.UnsetType = msgspec.UNSET
    payment_uri: str | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, topup: Row, settings: Settings) -> "TopupView":
        method = METHODS[topup["method"]]
        places = COIN_PLACES[method.coin]
        where = (
            {"lightning_invoice": topup["destination"] or ""}
            if method.is_lightning
            else {"address": topup["destination"] or "", "payment_uri": topup["payment_link"] or ""}
        )
        page = receipt_url(settings, topup["account_id"], topup["id"])
        return cls(
            invoice_id=topup["invoice_id"] or "",
            status=str(_OURS_IN_THEIR_WORDS.get(topup["status"], topup["status"])),
            additional_status=topup["additional_status"],
            amount=number(topup["amount_units"], CURRENCIES[topup["currency"]].places),
            currency=topup["currency"],
            created_at=_epoch(topup["created_at"]),
            expires_at=_epoch(topup["expires_at"]),
            checkout_url=topup["checkout_url"] or page,  # LNbits has no page to pay on; ours has the QR code
            payment_method=method.display_name,
            crypto_currency=method.coin,
            crypto_amount_due=number(topup["total_coin_units"] or 0, places),
            amount_paid=number(topup["paid_coin_units"] or 0, places),
            amount_due=number(topup["due_coin_units"] or 0, places),
            network_fee=number(topup["fee_coin_units"] or 0, places),
            rate_usd=msgspec.Raw((usd_rate(topup) or "null").encode()),
            rate_source=rate_source(topup),
            credited_usd=usd(topup["credited_nusd"]),
            bonus_usd=usd(topup["bonus_nusd"]),
            bonus_percent=topup["bonus_percent"],
            receipt_url=page,
            **where,
        )


class TopupsPage(msgspec.Struct, frozen=True):
    data: list[TopupView]
    next_cursor: str | None


class ClaimRequest(msgspec.Struct, frozen=True):
    """One of the three."""

    payment_hash: ProofText | None = None
    lightning_invoice: ProofText | None = None
    txid: ProofText | None = None


class PaymentView(msgspec.Struct, frozen=True):
    """One payment: amounts in the coin, its worth in USD once it settled."""

    id: str
    value: JsonNumber
    fee: JsonNumber
    status: str
    received_at: datetime
    late: bool
    worth_usd: JsonNumber


class ReceiptView(msgspec.Struct, frozen=True):
    topup: TopupView
    payments: list[PaymentView]

    @classmethod
    def of(cls, receipt: Receipt, settings: Settings) -> "ReceiptView":
        places = receipt.places
        return cls(
            TopupView.of(receipt.topup, settings),
            [
                PaymentView(
                    payment.id,
                    number(payment.value_units, places),
                    number(payment.fee_units, places),
                    payment.status,
                    payment.received_at,
                    payment.is_late,
                    usd(payment.worth_nusd),
                )
                for payment in receipt.arrived
                if payment.counts
            ],
        )


class Stored(msgspec.Struct, frozen=True):
    stored: bool


@get("/topup/payment-methods", tags=["Top-ups"], summary="Ways to pay", sync_to_thread=False)
def payment_methods(gateways: NamedDependency[Gateways]) -> MethodsAnswer:
    """Every method with its currencies and limits. Needs no credential."""
    return MethodsAnswer([MethodView.of(method) for method in METHODS.values() if method.id in gateways.methods])


@post("/topup/create/{method:str}", tags=["Top-ups"], summary="Make a top-up")
async def create(
    caller: NamedDependency[Caller],
    db: NamedDependency[Database],
    gateways: NamedDependency[Gateways],
    once: NamedDependency[Once],
    settings: NamedDependency[Settings],
    method: FromPath[str],
    data: JSONBody[TopupRequest],
) -> TopupView:
    """An invoice that is ready to be paid, with its Lightning invoice or address.

    The same request again within a minute gets the same invoice, while that waits to be paid. An account that never paid
    may have 10 top-ups waiting and make 30 in an hour, one that did 100.
    """
    require_scope(caller, "topup")
    chosen = method_named(method, gateways.methods)
    currency = currency_named(data.currency)
    wish = Wish(chosen, currency, checked_amount(chosen, currency, data.amount))
    if (earlier := await once.claim(TopupView)) is not None:
        return earlier

    async def finish(session: AsyncSession, topup: Row) -> TopupView:
        answer = TopupView.of(topup, settings)
        await once.save(session, answer)
        return answer

    try:
        # Who sends an Idempotency-Key says which requests are one; without it, the same wish within a minute is.
        named = once.derived_id()
        return await create_topup(
            db,
            gateways.of_method(chosen.id),
            caller,
            wish,
            named or new_id(),
            finish,
            caps_of(settings),
            joins=named is None,
            receipts=partial(receipt_url, settings),
        )
    except BaseException:
        await once.abandon()
        raise


def caps_of(settings: Settings) -> Caps:
    return Caps(settings.topups_waiting, settings.topups_per_hour, settings.topups_once_paid)


@get("/topup/status/{invoice_id:str}", tags=["Top-ups"], summary="Has it been paid?")
async def status(
    caller: NamedDependency[Caller],
    db: NamedDependency[Database],
    gateways: NamedDependency[Gateways],
    settings: NamedDependency[Settings],
    invoice_id: FromPath[str],
) -> TopupView:
    """Clients wait for `status == "Settled"`; `credited_usd` is what was added to the balance."""
    require_scope(caller, "topup")
    found = await db.transaction(lambda session: _own_topup(session, gateways, caller, invoice_id))
    return TopupView.of(found, settings)


@get("/topups", tags=["Top-ups"], summary="List top-ups")
async def list_all(
    caller: NamedDependency[Caller],
    db: NamedDependency[Database],
    settings: NamedDependency[Settings],
    limit: FromQuery[int] = DEFAULT_LIMIT,
    cursor: FromQuery[str | None] = None,
) -> TopupsPage:
    """The account's top-ups, newest first."""
    require_scope(caller, "topup")
    size, after = page_size(limit), from_cursor(cursor, tuple[datetime, UUID])
    found = await db.transaction(lambda session: list_topups(session, caller.account_id, size + 1, after))
    last = found[size - 1] if len(found) > size else None
    return TopupsPage(
        [TopupView.of(topup, settings) for topup in found[:size]],
        to_cursor(last["created_at"], last["id"]) if last else None,
    )


@post("/topup/claim", status_code=200, tags=["Top-ups"], summary="Find a payment that is not credited")
async def claim_payment(
    caller: NamedDependency[Caller],
    db: NamedDependency[Database],
    gateways: NamedDependency[Gateways],
    once: NamedDependency[Once],
    settings: NamedDependency[Settings],
    data: JSONBody[ClaimRequest],
) -> TopupView:
    """Asks the payment backend at once about the payment with this hash, Lightning invoice or transaction id."""
    require_scope(caller, "topup")
    proof = proof_of(data)
    if (earlier := await once.claim(TopupView)) is not None:
        return earlier
    try:
        await count_or_refuse(db, f"claim/{caller.account_id}", CLAIMS_PER_HOUR)
        answer = TopupView.of(await claim(db, gateways, caller.account_id, proof), settings)
        await db.transaction(lambda session: once.save(session, answer))
    except BaseException:
        await once.abandon()
        raise
    return answer


def proof_of(data: ClaimRequest) -> Proof:
    given: list[tuple[ProofKind, str | None]] = [
        ("payment_hash", data.payment_hash), ("lightning_invoice", data.lightning_invoice), ("txid", data.txid)
    ]  # fmt: skip
    proofs = [Proof(kind, value.lower()) for kind, value in given if value is not None]
    if len(proofs) != 1:
        raise InvalidField("give one of payment_hash, lightning_invoice, txid", param="payment_hash")
    return proofs[0]


@get("/topup/receipt/{invoice_id:str}", tags=["Top-ups"], summary="The receipt as data")
async def receipt(
    caller: NamedDependency[Caller],
    db: NamedDependency[Database],
    gateways: NamedDependency[Gateways],
    settings: NamedDependency[Settings],
    invoice_id: FromPath[str],
) -> ReceiptView:
    """The top-up with its payments. `receipt_url` is the same as a page to print."""
    require_scope(caller, "topup")

    async def work(session: AsyncSession) -> Receipt:
        found = await _own_topup(session, gateways, caller, invoice_id)
        return await read_receipt(session, found["account_id"], found["id"])

    return ReceiptView.of(await db.transaction(work), settings)


async def _own_topup(session: AsyncSession, gateways: Gateways, caller: Caller, invoice_id: str) -> Row:
    """Raises InvoiceNotFound, alike for a missing one and another account's."""
    if not (invoice_id.isascii() and invoice_id.isprintable() and len(invoice_id) <= 100):
        raise InvoiceNotFound
    for gateway in gateways:
        found = await topup_of_invoice(session, gateway.name, invoice_id)
        if found is not None and found.account_id == caller.account_id:
            return await read_topup(session, found.account_id, found.topup_id)
    raise InvoiceNotFound


@post("/webhooks/{backend:str}", status_code=200, tags=["Operations"], summary="A payment backend's webhook")
async def webhook(
    request: Request[Any, Any, Any],
    db: NamedDependency[Database],
    gateways: NamedDependency[Gateways],
    backend: FromPath[str],
) -> Stored:
    """BTCPay signs the raw body. Stored and answered; what it hints at is looked into afterwards."""
    gateway = gateways.named(backend)
    if gateway is None:
        raise NotFound(f"No payment backend is named {backend[:40]!r} here")
    raw_body = await request.body()
    hint = gateway.read_webhook(raw_body, dict(request.headers))
    if hint is None:
        log.warning("webhook.not_understood", backend=gateway.name)
        return Stored(False)
    return Stored(await store(db, gateway.name, hint, raw_body))


def _epoch(when: datetime) -> int:
    return int(when.timestamp())


handlers = (payment_methods, create, status, list_all, claim_payment, receipt, webhook)
