"""The crediting table: what should have been credited by now, as a pure function of what the backend says."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Final

from app.kernel.money import worth_nusd
from app.topups.gateway import AdditionalStatus, Invoice, InvoiceStatus, Payment, PaymentStatus

LATE_GRACE: Final = timedelta(seconds=60)
"""A payment made in the last second may be seen a little after expiry; it is still in time."""
_DUST_COIN: Final = Decimal("0.00000001")


@dataclass(frozen=True, slots=True)
class Owed:
    """What should have been credited in all, each settled payment's worth, and why a person should look."""

    credit_nusd: int
    worth_nusd: Mapping[str, int]
    review: str | None = None


def is_late(payment: Payment, invoice: Invoice) -> bool:
    """Whether it came after the price it was promised had run out."""
    return payment.received_at > invoice.expires_at + LATE_GRACE


def needs_rate_now(invoice: Invoice, known_worth_nusd: Mapping[str, int]) -> bool:
    """Whether a settled late payment has not been valued yet."""
    return any(is_late(payment, invoice) and payment.id not in known_worth_nusd for payment in _settled(invoice))


def settled_ids(invoice: Invoice) -> set[str]:
    """The payments that count."""
    return {payment.id for payment in _settled(invoice)}


def owed(
    invoice: Invoice, quote: Decimal | None, rate_now: Decimal | None, known_worth_nusd: Mapping[str, int]
) -> Owed:
    """What this invoice is worth to its account by now, in nano-USD.

    `quote` is our USD per coin for an invoice priced in a coin (USD-priced ones carry their own rate);
    `rate_now` values late payments at the lower of then and now, since their payer chose the moment;
    `known_worth_nusd` is what was found before and stays. Only settled payments ever count.
    Source: the table in our BTCPay notes, made from BTCPay's InvoiceWatcher.
    """
    rate = invoice.rate if invoice.currency == "USD" else quote
    assert rate is not None
    worth = {
        payment.id: known_worth_nusd[payment.id]
        if payment.id in known_worth_nusd
        else _worth(payment, invoice, rate, rate_now)
        for payment in _settled(invoice)
    }
    return _by_state(invoice, face_nusd(invoice, rate), worth, worth_nusd(_DUST_COIN, rate) + 1)


def face_nusd(invoice: Invoice, usd_per_coin: Decimal) -> int:
    """What the invoice asks for, in nano-USD."""
    if invoice.currency == "USD":
        return worth_nusd(invoice.amount, Decimal(1))
    coins = invoice.amount.scaleb(-8) if invoice.currency == "SATS" else invoice.amount
    return worth_nusd(coins, usd_per_coin)


def _by_state(invoice: Invoice, face: int, worth: Mapping[str, int], dust_nusd: int) -> Owed:
    """One row of the table for each (status, additional status)."""
    net = sum(worth.values())
    marked = invoice.additional_status is AdditionalStatus.MARKED
    match invoice.status:
        case InvoiceStatus.NEW | InvoiceStatus.PROCESSING:
            return Owed(0, {})
        case InvoiceStatus.SETTLED if marked:
            return Owed(net, worth, "marked settled by hand: credited what was really paid")
        case InvoiceStatus.SETTLED if abs(net - face) <= dust_nusd:
            return Owed(face, worth)  # coins cannot be split finely enough to pay the face to the nano-dollar
        case InvoiceStatus.SETTLED if net > face:
            return Owed(net, worth)
        case InvoiceStatus.SETTLED:
            return Owed(net, worth, "settled though less was paid than asked: credited what was paid")
        case InvoiceStatus.EXPIRED:
            return Owed(net, worth)
        case InvoiceStatus.INVALID if marked:
            return Owed(0, {}, "marked invalid by hand: nothing more is credited")
        case InvoiceStatus.INVALID:
            return Owed(
                net,
                worth,
                "invalid, though payments settled" if net else "invalid: payments were not confirmed in time",
            )


def _settled(invoice: Invoice) -> list[Payment]:
    return [payment for payment in invoice.payments if payment.status is PaymentStatus.SETTLED]


def _worth(payment: Payment, invoice: Invoice, rate: Decimal, rate_now: Decimal | None) -> int:
    if is_late(payment, invoice):
        assert rate_now is not None, "a late payment needs today's rate"
        rate = min(rate, rate_now)
    return max(0, worth_nusd(payment.value - payment.fee, rate))
