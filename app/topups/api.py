"""How HTTP asks for top-ups, and how the payment backend tells us that something happened."""

from datetime import datetime
from typing import Annotated, Any

import msgspec
from litestar import Request, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, new_id
from app.kernel.errors import InvoiceNotFound, NotFound
from app.kernel.idempotency import Once
from app.kernel.logs import log
from app.kernel.money import COIN_PLACES, CURRENCIES, JsonNumber, number, usd
from app.kernel.security import Caller
from app.keys.verify import require_scope
from app.topups.create import Wish, create_topup, read_topup
from app.topups.gateway import Gateways
from app.topups.inbox import store, topup_of_invoice
from app.topups.methods import METHODS, Method, checked_amount, method_named


class TopupRequest(msgspec.Struct, frozen=True):
    """How much, and in what: USD or the method's own currencies."""

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


class TopupView(msgspec.Struct, frozen=True):
    """A top-up as its payer sees it. `created_at` and `expires_at` are Unix seconds; `status` is BTCPay's own word."""

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
    credited_usd: JsonNumber
    bonus_usd: JsonNumber
    lightning_invoice: str | msgspec.UnsetType = msgspec.UNSET
    address: str | msgspec.UnsetType = msgspec.UNSET
    payment_uri: str | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, topup: Row) -> "TopupView":
        method = METHODS[topup["method"]]
        places = COIN_PLACES[method.coin]
        where = (
            {"lightning_invoice": topup["destination"]}
            if method.is_lightning
            else {"address": topup["destination"], "payment_uri": topup["payment_link"]}
        )
        return cls(
            invoice_id=topup["invoice_id"],
            status=topup["status"],
            additional_status=topup["additional_status"],
            amount=number(topup["amount_units"], CURRENCIES[topup["currency"]].places),
            currency=topup["currency"],
            created_at=_epoch(topup["created_at"]),
            expires_at=_epoch(topup["expires_at"]),
            checkout_url=topup["checkout_url"],
            payment_method=method.display_name,
            crypto_currency=method.coin,
            crypto_amount_due=number(topup["total_coin_units"], places),
            amount_paid=number(topup["paid_coin_units"], places),
            amount_due=number(topup["due_coin_units"], places),
            credited_usd=usd(topup["credited_nusd"]),
            bonus_usd=usd(topup["bonus_nusd"]),
            **where,
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
    method: FromPath[str],
    data: JSONBody[TopupRequest],
) -> TopupView:
    """An invoice that is ready to be paid, with its Lightning invoice or address."""
    require_scope(caller, "topup")
    chosen = method_named(method, gateways.methods)
    wish = Wish(chosen, data.currency, checked_amount(chosen, data.currency, data.amount))
    if (earlier := await once.claim(TopupView)) is not None:
        return earlier

    async def finish(session: AsyncSession, topup: Row) -> TopupView:
        answer = TopupView.of(topup)
        await once.save(session, answer)
        return answer

    try:
        return await create_topup(
            db, gateways.of_method(chosen.id), caller, wish, once.derived_id() or new_id(), finish
        )
    except BaseException:
        await once.abandon()
        raise


@get("/topup/status/{invoice_id:str}", tags=["Top-ups"], summary="Has it been paid?")
async def status(
    caller: NamedDependency[Caller],
    db: NamedDependency[Database],
    gateways: NamedDependency[Gateways],
    invoice_id: FromPath[str],
) -> TopupView:
    """Clients wait for `status == "Settled"`; `credited_usd` is what was added to the balance."""
    require_scope(caller, "topup")
    return TopupView.of(await db.transaction(lambda session: _own_topup(session, gateways, caller, invoice_id)))


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


handlers = (payment_methods, create, status, webhook)
