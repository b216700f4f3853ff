"""Making a top-up: our row first, then the invoice, then both tied together."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Final, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row, rows
from app.kernel.errors import InvoiceNotFound, PaymentBackendUnavailable, RateLimitExceeded
from app.kernel.logs import log
from app.kernel.money import COIN_PLACES, CURRENCIES, decimal_of, units_of
from app.kernel.ratelimit import count_or_refuse
from app.kernel.security import Caller
from app.topups.admission import Caps, lock_account, refuse_too_many, same_wish
from app.topups.gateway import (
    GatewayRefused,
    GatewayUnavailable,
    Invoice,
    InvoiceGateway,
    InvoiceStatus,
    NewInvoice,
    Rate,
)
from app.topups.methods import Method

T = TypeVar("T")
Receipts = Callable[[uuid.UUID, uuid.UUID], str]
"""The address of a top-up's receipt, by its account and its id."""
RETRY_AFTER_SECONDS: Final = 5
AT_ONCE: Final = 8
"""How many top-ups of one account are made at one moment, by one process."""
_TURN_SECONDS: Final = 5
LOST_AFTER: Final = timedelta(minutes=10)
"""An invoice that the backend does not know after this was never made."""
AGAIN_PER_HOUR: Final = 120
"""How often an account may ask for what it has: the backend is asked each time whether it was paid."""
_LOOKS: Final = 50
_LOOK_EVERY_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Wish:
    """What a customer wants to pay: `amount_units` in the currency's smallest unit."""

    method: Method
    currency: str
    amount_units: int


@dataclass(frozen=True, slots=True)
class _Place:
    """The top-up that serves a wish: a new one, one of an earlier try, or (`is_open`) one that somebody else may be paying."""

    topup_id: uuid.UUID
    is_new: bool = False
    is_open: bool = False


async def create_topup(
    db: Database,
    gateway: InvoiceGateway,
    caller: Caller,
    wish: Wish,
    topup_id: uuid.UUID,
    finish: Callable[[AsyncSession, Row], Awaitable[T]],
    caps: Caps | None = None,
    *,
    joins: bool = False,
    receipts: Receipts | None = None,
) -> T:
    """Make a top-up that is ready to be paid; `finish` gets its row in the transaction that completes it.

    A repeat comes with the same `topup_id`, which the invoice carries as its order id: so a repeat after
    a lost answer finds the invoice instead of making a second one. With `joins`, the same wish again within a
    minute is answered by the top-up that waits to be paid. `receipts` gives the page that the backend's sends its payer to.
    Raises PaymentBackendUnavailable; should the invoice have been made all the same, the poller ties it
    to its top-up, and a payment to it is credited. Raises RateLimitExceeded if the account makes too many at
    once, and past the `caps`, where they are given.
    """
    place, quote = None, None
    async with _turn_of(caller.account_id):
        if wish.currency != "USD":  # whoever is refused or answered here is so before the backend is asked for a rate
            place = await db.transaction(lambda session: _placed(session, caller, topup_id, wish, caps, joins))
        if place is None or not place.is_open:
            quote = await _quote(gateway, wish)
            place = await db.transaction(
                lambda session: _write(session, gateway.name, caller, topup_id, wish, quote, caps, joins)
            )
        if not place.is_open:
            return await _make(db, gateway, caller.account_id, wish, place, quote, finish, receipts)
    if await _waits(db, gateway, caller.account_id, place.topup_id):
        return await db.transaction(
            partial(_answer, account_id=caller.account_id, topup_id=place.topup_id, finish=finish)
        )
    return await create_topup(db, gateway, caller, wish, topup_id, finish, caps, receipts=receipts)


async def _make(
    db: Database,
    gateway: InvoiceGateway,
    account_id: uuid.UUID,
    wish: Wish,
    place: _Place,
    quote: Rate | None,
    finish: Callable[[AsyncSession, Row], Awaitable[T]],
    receipts: Receipts | None,
) -> T:
    topup_id = place.topup_id
    try:
        invoice = None if place.is_new else await _found(gateway, topup_id)
        if invoice is None:
            if not place.is_new:
                await db.transaction(lambda session: _renew(session, account_id, topup_id, quote))
            invoice = await gateway.create(_order(topup_id, wish, receipts(account_id, topup_id) if receipts else None))
    except GatewayRefused as error:
        await db.transaction(lambda session: mark_failed(session, account_id, topup_id))
        log.warning("topup.refused", topup_id=str(topup_id), backend=gateway.name, error=str(error))
        raise PaymentBackendUnavailable(
            f"{wish.method.display_name} cannot be paid right now; try another method, or again in a moment",
            retry_after_seconds=RETRY_AFTER_SECONDS,
        ) from error
    except GatewayUnavailable as error:
        await db.transaction(lambda session: _note_silence(session, account_id, topup_id))
        raise _unavailable(gateway, error) from error

    async def complete(session: AsyncSession) -> T:
        return await finish(session, await attach(session, gateway.name, account_id, topup_id, invoice))

    return await db.transaction(complete)


async def _answer(
    session: AsyncSession,
    account_id: uuid.UUID,
    topup_id: uuid.UUID,
    finish: Callable[[AsyncSession, Row], Awaitable[T]],
) -> T:
    return await finish(session, await read_topup(session, account_id, topup_id))


async def _waits(db: Database, gateway: InvoiceGateway, account_id: uuid.UUID, topup_id: uuid.UUID) -> bool:
    """Whether an open top-up still waits to be paid. Raises PaymentBackendUnavailable if nobody could make its invoice.

    We may not have heard of a payment yet, and two payments for one wish are one too many: so the backend is asked.
    """
    topup = await db.transaction(lambda session: read_topup(session, account_id, topup_id))
    if topup["invoice_id"] is None:
        await _until_made(db, account_id, topup_id)
        return True
    await count_or_refuse(db, f"topup-again/{account_id}", AGAIN_PER_HOUR)
    try:
        async with _turn_of(account_id):
            invoice = await gateway.fetch(topup["invoice_id"])
    except GatewayUnavailable as error:
        raise _unavailable(gateway, error) from error
    return invoice is not None and invoice.status is InvoiceStatus.NEW and not invoice.payments


async def _until_made(db: Database, account_id: uuid.UUID, topup_id: uuid.UUID) -> None:
    """Wait for the request that asks the backend for this top-up's invoice just now."""
    for _ in range(_LOOKS):
        topup = await db.transaction(lambda session: read_topup(session, account_id, topup_id))
        if topup["invoice_id"] is not None:
            return
        if topup["status"] != "Creating" or topup["checked_at"] is not None:
            break
        await asyncio.sleep(_LOOK_EVERY_SECONDS)
    raise PaymentBackendUnavailable(retry_after_seconds=RETRY_AFTER_SECONDS)


@dataclass(slots=True)
class _Queue:
    """An account's creations: those whose turn it is, and all of them."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    length: int = 0


_queues: dict[uuid.UUID, _Queue] = {}


@asynccontextmanager
async def _turn_of(account_id: uuid.UUID) -> AsyncIterator[None]:
    """An account's own queue, so that one with many wishes does not take the backend from the others."""
    queue = _queues.setdefault(account_id, _Queue())
    queue.length += 1
    try:
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await queue.turns.acquire()
        except TimeoutError:
            raise RateLimitExceeded(
                f"At most {AT_ONCE} top-ups of an account are made at one moment", retry_after_seconds=1
            ) from None
        try:
            yield
        finally:
            queue.turns.release()
    finally:
        queue.length -= 1
        if not queue.length:
            del _queues[account_id]


async def _quote(gateway: InvoiceGateway, wish: Wish) -> Rate | None:
    """USD per coin, fixed now, for a top-up priced in a coin."""
    if wish.currency == "USD":
        return None
    try:
        return await gateway.rate(wish.method.coin)
    except (GatewayRefused, GatewayUnavailable) as error:
        raise _unavailable(gateway, error) from error


def _unavailable(gateway: InvoiceGateway, error: Exception) -> PaymentBackendUnavailable:
    log.warning("topup.backend_unavailable", backend=gateway.name, error=str(error))
    return PaymentBackendUnavailable(retry_after_seconds=RETRY_AFTER_SECONDS)


async def _placed(
    session: AsyncSession, caller: Caller, topup_id: uuid.UUID, wish: Wish, caps: Caps | None, joins: bool
) -> _Place | None:
    """The top-up that serves this wish already, None if one may be made. Raises RateLimitExceeded if it may not.

    Where there are caps the account stays locked, so that wishes of one moment are looked at one after the other.
    """
    if caps is None:
        return None
    await lock_account(session, caller.account_id)
    if await row(
        session, "SELECT 1 AS is_there FROM topup WHERE account_id = :account_id AND id = :id",
        account_id=caller.account_id, id=topup_id,
    ):  # fmt: skip
        return _Place(topup_id)
    same = None
    if joins:
        same = await same_wish(session, caller.account_id, wish.method.id, wish.currency, wish.amount_units)
    if same is None:
        await refuse_too_many(session, caller.account_id, caps)
        return None
    # One that the backend was silent about is ours to ask for again, and from here on nobody else's.
    is_ours = same["invoice_id"] is None and same["checked_at"] is not None
    return _Place(same["id"], is_open=not is_ours)


async def _write(
    session: AsyncSession,
    backend: str,
    caller: Caller,
    topup_id: uuid.UUID,
    wish: Wish,
    quote: Rate | None,
    caps: Caps | None,
    joins: bool,
) -> _Place:
    """The row, before the world is asked; or the one that is there."""
    place = await _placed(session, caller, topup_id, wish, caps, joins)
    if place is not None:
        await _note_asking(session, caller.account_id, place.topup_id)
        return place
    made = await row(
        session,
        """INSERT INTO topup (account_id, id, key_id, backend, method, currency, amount_units, bonus_percent, usd_per_coin,
                              rate_source, rate_at, expires_at, watch_until, next_check_at)
           VALUES (:account_id, :id, :key_id, :backend, :method, :currency, :amount, :bonus_percent, :usd_per_coin,
                   :rate_source, :rate_at, now() + make_interval(mins => :expires), now() + make_interval(mins => :watch),
                   now() + interval '1 minute')
           ON CONFLICT (account_id, id) DO NOTHING RETURNING id""",
        account_id=caller.account_id, id=topup_id, key_id=caller.key_id, backend=backend, method=wish.method.id,
        currency=wish.currency, amount=wish.amount_units, bonus_percent=wish.method.bonus_percent,
        usd_per_coin=quote.usd if quote else None, rate_source=quote.source if quote else None,
        rate_at=quote.quoted_at if quote else None, expires=wish.method.expires_in_minutes,
        watch=wish.method.expires_in_minutes + wish.method.monitor_minutes,
    )  # fmt: skip
    return _Place(topup_id, is_new=made is not None)


async def _found(gateway: InvoiceGateway, topup_id: uuid.UUID) -> Invoice | None:
    """The invoice that an earlier try made, though its answer was lost."""
    found = await gateway.find(str(topup_id))
    return found[0] if found else None


async def _renew(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID, quote: Rate | None) -> None:
    """A repeat is about to make the invoice: at today's rate, however old its row is, and watched like a new one."""
    await row(
        session,
        """UPDATE topup SET usd_per_coin = :usd_per_coin, rate_source = :rate_source, rate_at = :rate_at,
                  status = 'Creating', next_check_at = now() + interval '1 minute'
           WHERE account_id = :account_id AND id = :id AND invoice_id IS NULL""",
        usd_per_coin=quote.usd if quote else None, rate_source=quote.source if quote else None,
        rate_at=quote.quoted_at if quote else None, account_id=account_id, id=topup_id,
    )  # fmt: skip


def _order(topup_id: uuid.UUID, wish: Wish, receipt_url: str | None) -> NewInvoice:
    return NewInvoice(
        order_id=str(topup_id),
        method=wish.method.id,
        amount=decimal_of(wish.amount_units, CURRENCIES[wish.currency].places),
        currency=wish.currency,
        expires_in_minutes=wish.method.expires_in_minutes,
        monitor_minutes=wish.method.monitor_minutes,
        receipt_url=receipt_url,
    )


async def attach(
    session: AsyncSession, backend: str, account_id: uuid.UUID, topup_id: uuid.UUID, invoice: Invoice
) -> Row:
    """Tie an invoice to its top-up, once: whoever comes second finds the first one's."""
    await row(
        session,
        """INSERT INTO topup_invoice (backend, invoice_id, account_id, topup_id)
           VALUES (:backend, :invoice_id, :account_id, :topup_id) ON CONFLICT DO NOTHING""",
        backend=backend, invoice_id=invoice.id, account_id=account_id, topup_id=topup_id,
    )  # fmt: skip
    await row(
        session,
        """UPDATE topup SET invoice_id = :invoice_id, amount_units = :amount, rate = :rate, expires_at = :expires_at,
                  watch_until = :watch_until, next_check_at = now() + interval '15 seconds'
           WHERE account_id = :account_id AND id = :id AND invoice_id IS NULL""",
        invoice_id=invoice.id, amount=units_of(invoice.amount, CURRENCIES[invoice.currency].places), rate=invoice.rate,
        expires_at=invoice.expires_at, watch_until=invoice.watched_until, account_id=account_id, id=topup_id,
    )  # fmt: skip
    await show(session, account_id, topup_id, invoice)
    return await read_topup(session, account_id, topup_id)


async def show(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID, invoice: Invoice) -> None:
    """Remember what the backend said last, for showing; no money depends on it, but for the address that is paid to."""
    places = COIN_PLACES[coin_of(invoice)]
    shown = await row(
        session,
        """UPDATE topup SET status = :status, additional_status = :additional_status, checkout_url = :checkout_url,
                  destination = :destination, payment_link = :payment_link, total_coin_units = :total,
                  due_coin_units = :due, paid_coin_units = :paid, fee_coin_units = :fee,
                  settled_at = CASE WHEN :status = 'Settled' THEN settled_at END
           WHERE account_id = :account_id AND id = :id AND invoice_id = :invoice_id RETURNING 1 AS done""",
        status=invoice.status.value, additional_status=invoice.additional_status.value, checkout_url=invoice.checkout_url,
        destination=invoice.destination, payment_link=invoice.payment_link, total=units_of(invoice.total, places, up=True),
        due=units_of(max(invoice.due, invoice.due * 0), places, up=True), paid=units_of(invoice.paid, places),
        fee=units_of(invoice.fee, places, up=True), account_id=account_id, id=topup_id, invoice_id=invoice.id,
    )  # fmt: skip
    if shown is not None and invoice.status is InvoiceStatus.SETTLED:
        await row(
            session,
            "UPDATE topup SET settled_at = now() WHERE account_id = :account_id AND id = :id AND settled_at IS NULL",
            account_id=account_id, id=topup_id,
        )  # fmt: skip
    if shown is not None and invoice.destination:
        await row(
            session,
            """INSERT INTO topup_address (account_id, topup_id, destination) VALUES (:account_id, :topup_id, :destination)
               ON CONFLICT DO NOTHING""",
            account_id=account_id, topup_id=topup_id, destination=invoice.destination,
        )  # fmt: skip


def coin_of(invoice: Invoice) -> str:
    return {"btc-lightning": "BTC", "btc": "BTC", "ltc": "LTC", "lbtc": "LBTC", "xmr": "XMR"}[invoice.method]


async def _note_asking(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID) -> None:
    await row(
        session,
        "UPDATE topup SET checked_at = NULL WHERE account_id = :account_id AND id = :id AND invoice_id IS NULL",
        account_id=account_id, id=topup_id,
    )  # fmt: skip


async def _note_silence(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID) -> None:
    """The backend was asked for the invoice and did not answer: nobody is waiting for it any more."""
    await row(
        session,
        "UPDATE topup SET checked_at = now() WHERE account_id = :account_id AND id = :id AND invoice_id IS NULL",
        account_id=account_id, id=topup_id,
    )  # fmt: skip


async def mark_failed(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID) -> None:
    """The backend made no invoice: nothing can be paid, nothing is watched."""
    await row(
        session,
        """UPDATE topup SET status = 'Failed', next_check_at = NULL
           WHERE account_id = :account_id AND id = :id AND invoice_id IS NULL""",
        account_id=account_id, id=topup_id,
    )  # fmt: skip


async def read_topup(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID) -> Row:
    found = await row(
        session, "SELECT * FROM topup WHERE account_id = :account_id AND id = :id", account_id=account_id, id=topup_id
    )
    assert found is not None
    return found


async def own_topup(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID) -> Row:
    """The same for an id that somebody typed. Raises InvoiceNotFound, alike for a missing one and another account's."""
    found = await row(
        session, "SELECT * FROM topup WHERE account_id = :account_id AND id = :id", account_id=account_id, id=topup_id
    )
    if found is None:
        raise InvoiceNotFound
    return found


async def list_topups(
    session: AsyncSession, account_id: uuid.UUID, limit: int, before: tuple[datetime, uuid.UUID] | None
) -> list[Row]:
    """The account's top-ups that have an invoice, newest first; `before` is where the page before ended."""
    return await rows(
        session,
        """SELECT * FROM topup WHERE account_id = :account_id AND invoice_id IS NOT NULL
             AND (CAST(:at AS timestamptz) IS NULL OR (created_at, id) < (:at, CAST(:id AS uuid)))
           ORDER BY created_at DESC, id DESC LIMIT :limit""",
        account_id=account_id, at=before[0] if before else None, id=before[1] if before else None, limit=limit,
    )  # fmt: skip
