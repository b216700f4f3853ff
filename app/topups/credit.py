"""Crediting: asks the backend what was paid, and books the difference to what was credited, once."""

import uuid
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, LiteralString

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row, rows
from app.kernel.errors import DatabaseUnavailable
from app.kernel.logs import log
from app.kernel.money import COIN_PLACES, CURRENCIES, number, share_nusd, units_of, usd
from app.kernel.shards import everywhere
from app.ledger.post import post
from app.ledger.tables import AccountStatus, EntryKind
from app.notices.marks import arm
from app.notices.tell import tell
from app.topups.create import LOST_AFTER, attach, coin_of, mark_failed, show
from app.topups.finding import note_finding
from app.topups.gateway import GatewayRefused, GatewayUnavailable, Invoice, InvoiceGateway, InvoiceStatus, PaymentStatus
from app.topups.methods import METHODS
from app.topups.owed import Owed, is_late, needs_rate_now, owed, settled_ids

_FELL_AWAY: Final = "a payment that was credited does not count any more: replaced, or the block it was in"
_OF_A_CLOSED: Final = "paid to an account that its owner has closed: nobody can spend it"


@dataclass(frozen=True, slots=True)
class TopupRef:
    """A top-up's primary key."""

    account_id: uuid.UUID
    topup_id: uuid.UUID


@dataclass(frozen=True, slots=True)
class Credited:
    """What one call of `credit_if_paid` moved, in nano-USD."""

    amount_nusd: int
    bonus_nusd: int


async def credit_if_paid(db: Database, gateway: InvoiceGateway, ref: TopupRef) -> Credited | None:
    """Credit what the backend says has been paid for this top-up and was not credited yet.

    Returns what was moved, None if nothing was due. Safe to call any number of times, from any number
    of processes, in any order. Raises GatewayUnavailable if the backend could not be asked; nothing has
    changed then. Source: BTCPay Greenfield API v1, "Get invoice", "Get invoice payment methods".
    """
    topup, worth = await db.transaction(lambda session: _read(session, ref))
    if topup["invoice_id"] is None:
        await _find_lost_invoice(db, gateway, ref, topup)
        return None
    invoice = await gateway.fetch(topup["invoice_id"])
    review = "the backend no longer knows the invoice" if invoice is None else _mismatch(topup, invoice)
    if invoice is None or review is not None:
        assert review is not None
        await db.transaction(lambda session: _flag(session, ref, review))
        return None
    rate_now = await _rate_now(gateway, invoice, worth)
    credited = await db.transaction(lambda session: _book(session, ref, invoice, rate_now, topup["asked_at"]))
    if credited is not None:
        log.info(
            "topup.credited", topup_id=str(ref.topup_id), account_id=str(ref.account_id),
            amount_nusd=credited.amount_nusd, bonus_nusd=credited.bonus_nusd,
        )  # fmt: skip
    return credited


async def check_due(db: Database, gateway: InvoiceGateway, limit: int = 50) -> int:
    """The poller: ask about every open top-up whose time has come. Returns how many were asked about."""
    due = await _claim_due(db, gateway.name, limit)
    defects: list[Exception] = []
    for topup in due:
        try:
            await credit_if_paid(db, gateway, TopupRef(topup["account_id"], topup["id"]))
        except (GatewayUnavailable, GatewayRefused) as error:
            # Its claim has moved next_check_at, so it comes again by itself.
            log.warning("topup.check_failed", topup_id=str(topup["id"]), backend=gateway.name, error=str(error))
        except DatabaseUnavailable:
            raise  # the others would fare no better; all of them come again
        except Exception as error:  # noqa: BLE001 - a defect in one must not keep the others waiting; raised below
            defects.append(error)
    if defects:
        raise ExceptionGroup("top-ups that could not be checked", defects)
    return len(due)


def next_check(now: datetime, topup: Mapping[str, datetime]) -> datetime | None:
    """When to ask again: often while it can be paid, slower with age, daily for a week after the watch, then never."""
    if now < topup["expires_at"] + timedelta(minutes=1):
        return now + timedelta(seconds=15)
    if now < topup["watch_until"]:
        age = now - topup["expires_at"]
        return now + min(max(age / 10, timedelta(minutes=1)), timedelta(hours=1))
    if now < topup["watch_until"] + timedelta(days=7):
        return now + timedelta(days=1)
    return None


async def _read(session: AsyncSession, ref: TopupRef) -> tuple[Row, dict[str, int]]:
    """The top-up, with the database's time before the backend is asked, and the payments valued so far."""
    topup = await row(
        session, "SELECT *, now() AS asked_at FROM topup WHERE account_id = :account_id AND id = :id",
        account_id=ref.account_id, id=ref.topup_id,
    )  # fmt: skip
    assert topup is not None
    return topup, await _worth_known(session, ref)


async def _worth_known(session: AsyncSession, ref: TopupRef) -> dict[str, int]:
    found = await rows(
        session,
        """SELECT payment_id, worth_nusd FROM payment
           WHERE account_id = :account_id AND topup_id = :topup_id AND worth_nusd > 0""",
        account_id=ref.account_id, topup_id=ref.topup_id,
    )  # fmt: skip
    return {payment["payment_id"]: payment["worth_nusd"] for payment in found}


def _mismatch(topup: Row, invoice: Invoice) -> str | None:
    """Why this invoice is not what we asked for; it is then shown to a person and not credited."""
    expected = {
        "order id": (str(topup["id"]), invoice.order_id),
        "currency": (topup["currency"], invoice.currency),
        "method": (topup["method"], invoice.method),
        "amount": (topup["amount_units"], units_of(invoice.amount, CURRENCIES[topup["currency"]].places)),
    }
    for name, (ours, theirs) in expected.items():
        if ours != theirs:
            return f"the backend's invoice has another {name}"
    return None


async def _rate_now(gateway: InvoiceGateway, invoice: Invoice, worth: Mapping[str, int]) -> Decimal | None:
    """Today's rate, asked only when a late payment waits to be valued."""
    if not needs_rate_now(invoice, worth):
        return None
    try:
        return (await gateway.rate(coin_of(invoice))).usd
    except GatewayRefused as error:
        raise GatewayUnavailable(f"no rate for a late payment: {error}") from error


async def _book(
    session: AsyncSession, ref: TopupRef, invoice: Invoice, rate_now: Decimal | None, asked_at: datetime
) -> Credited | None:
    """Compare with what was credited, under the top-up's lock, and post the difference."""
    topup = await row(
        session, "SELECT *, now() AS now FROM topup WHERE account_id = :account_id AND id = :id FOR UPDATE",
        account_id=ref.account_id, id=ref.topup_id,
    )  # fmt: skip
    assert topup is not None
    known = await _worth_known(session, ref)
    due = owed(invoice, topup["usd_per_coin"], rate_now, known)
    if topup["checked_at"] is None or topup["checked_at"] <= asked_at:
        await show(session, ref.account_id, ref.topup_id, invoice)
        await _remember_payments(session, ref, invoice, due)
        review = due.review or (_FELL_AWAY if known.keys() - settled_ids(invoice) else None)
        await _checked(session, ref, asked_at, review, next_check(topup["now"], topup))
    if due.credit_nusd <= topup["credited_nusd"]:
        return None
    # Also when we asked before another check did: what we credit must be explained by payments we remember.
    await _remember_payments(session, ref, invoice, due)
    credited = await _post(session, ref, topup, invoice, due.credit_nusd, known.keys())
    await _note_if_closed(session, ref)
    return credited


async def _note_if_closed(session: AsyncSession, ref: TopupRef) -> None:
    """It is credited all the same, as the books say what was paid; but nobody can spend it, so a person should look."""
    found = await row(session, "SELECT status FROM account WHERE id = :id", id=ref.account_id)
    if found is not None and found["status"] == AccountStatus.CLOSED:
        await note_finding(session, ref.account_id, ref.topup_id, _OF_A_CLOSED)


async def _post(
    session: AsyncSession, ref: TopupRef, topup: Row, invoice: Invoice, credit_nusd: int, known: Set[str]
) -> Credited:
    """Post credit and bonus up to the new totals, and tell of it. The reference names the total before, so that two
    that saw the same total collide on it."""
    method, before, bonus_before = METHODS[topup["method"]], topup["credited_nusd"], topup["bonus_nusd"]
    bonus_nusd = share_nusd(credit_nusd, topup["bonus_percent"])
    posted = await post(
        session, ref.account_id, EntryKind.TOPUP, f"{ref.topup_id}/{before}", f"{topup['backend']}:{method.id}",
        credit_nusd - before,
    )  # fmt: skip
    if bonus_nusd > bonus_before:
        posted = await post(
            session, ref.account_id, EntryKind.BONUS, f"{ref.topup_id}/{bonus_before}", "bonus:lightning",
            bonus_nusd - bonus_before,
        )  # fmt: skip
    await row(
        session,
        "UPDATE topup SET credited_nusd = :credited, bonus_nusd = :bonus WHERE account_id = :account_id AND id = :id",
        credited=credit_nusd, bonus=bonus_nusd, account_id=ref.account_id, id=ref.topup_id,
    )  # fmt: skip
    credited = Credited(credit_nusd - before, bonus_nusd - bonus_before)
    await arm(session, ref.account_id, credit_nusd)
    await tell(
        session, ref.account_id, _told_as(invoice, known), _told(topup, invoice, credited, posted.balance_after_nusd),
        once=f"{ref.topup_id}/{before}",
    )  # fmt: skip
    return credited


def _told_as(invoice: Invoice, known: Set[str]) -> str:
    """Late: something that was credited now came after its price had run out. Partial: less came than was asked for."""
    if any(
        is_late(payment, invoice)
        for payment in invoice.payments
        if payment.id in settled_ids(invoice).difference(known)
    ):
        return "topup.late"
    return "topup.settled" if invoice.status is InvoiceStatus.SETTLED else "topup.partial"


def _told(topup: Row, invoice: Invoice, credited: Credited, balance_nusd: int) -> dict[str, Any]:
    return {
        "topup_id": topup["id"], "invoice_id": invoice.id, "method": topup["method"], "currency": topup["currency"],
        "amount": number(topup["amount_units"], CURRENCIES[topup["currency"]].places), "credited_usd": usd(credited.amount_nusd),
        "bonus_usd": usd(credited.bonus_nusd), "balance_usd": usd(balance_nusd), "status": invoice.status.value,
        "additional_status": invoice.additional_status.value,
    }  # fmt: skip


async def _remember_payments(session: AsyncSession, ref: TopupRef, invoice: Invoice, due: Owed) -> None:
    """Keep each payment as it was told last. A worth once found stays: it is what was credited."""
    places = COIN_PLACES[coin_of(invoice)]
    for payment in invoice.payments:
        await row(
            session,
            """INSERT INTO payment AS p (account_id, topup_id, payment_id, value_coin_units, fee_coin_units, status,
                                         received_at, late, worth_nusd)
               VALUES (:account_id, :topup_id, :payment_id, :value, :fee, :status, :received_at, :late, :worth)
               ON CONFLICT (account_id, topup_id, payment_id) DO UPDATE SET status = EXCLUDED.status,
                   value_coin_units = EXCLUDED.value_coin_units, fee_coin_units = EXCLUDED.fee_coin_units,
                   worth_nusd = greatest(p.worth_nusd, EXCLUDED.worth_nusd)""",
            account_id=ref.account_id, topup_id=ref.topup_id, payment_id=payment.id,
            value=units_of(payment.value, places), fee=units_of(payment.fee, places, up=True), status=payment.status.value,
            received_at=payment.received_at, late=is_late(payment, invoice),
            worth=due.worth_nusd.get(payment.id, 0) if payment.status is PaymentStatus.SETTLED else 0,
        )  # fmt: skip


async def _checked(
    session: AsyncSession, ref: TopupRef, asked_at: datetime, review: str | None, again_at: datetime | None
) -> None:
    await row(
        session,
        """UPDATE topup SET checked_at = :asked_at, next_check_at = :again_at
           WHERE account_id = :account_id AND id = :id""",
        asked_at=asked_at, again_at=again_at, account_id=ref.account_id, id=ref.topup_id,
    )  # fmt: skip
    if review is not None:
        await note_finding(session, ref.account_id, ref.topup_id, review)


async def _flag(session: AsyncSession, ref: TopupRef, review: str) -> None:
    await row(
        session,
        "UPDATE topup SET next_check_at = now() + interval '1 hour' WHERE account_id = :account_id AND id = :id",
        account_id=ref.account_id, id=ref.topup_id,
    )  # fmt: skip
    await note_finding(session, ref.account_id, ref.topup_id, review)
    log.error("topup.needs_review", topup_id=str(ref.topup_id), error=review)


async def _find_lost_invoice(db: Database, gateway: InvoiceGateway, ref: TopupRef, topup: Row) -> None:
    """We crashed, or the backend's answer was lost, between our row and its invoice: look it up by our id."""
    found = await gateway.find(str(ref.topup_id))
    if found:
        await db.transaction(lambda session: attach(session, gateway.name, ref.account_id, ref.topup_id, found[0]))
        await credit_if_paid(db, gateway, ref)
    elif topup["asked_at"] > topup["created_at"] + LOST_AFTER:
        await db.transaction(lambda session: mark_failed(session, ref.account_id, ref.topup_id))


async def _claim_due(db: Database, backend: str, limit: int) -> list[Row]:
    """Take the rows that are due, by moving their time on: a second poller then sees none of them."""
    due = await everywhere(db, {"account_id": "uuid", "id": "uuid"}, _DUE, {"backend": backend, "limit": limit})
    return await db.transaction(lambda session: _claim(session, due[:limit])) if due else []


async def _claim(session: AsyncSession, due: Sequence[Row]) -> list[Row]:
    claimed = [await row(session, _CLAIM, **each) for each in due]
    return [each for each in claimed if each is not None]


_DUE: Final[LiteralString] = """
SELECT account_id, id FROM topup WHERE next_check_at <= now() AND backend = %(backend)s ORDER BY next_check_at LIMIT %(limit)s
"""
_CLAIM: Final = """
UPDATE topup SET next_check_at = now() + interval '1 minute'
WHERE account_id = :account_id AND id = :id AND next_check_at <= now() RETURNING account_id, id
"""
