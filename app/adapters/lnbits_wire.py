"""The words of LNbits' payments API: what its JSON must look like, and what it means in ours. Pure.

What LNbits has no field for (currency, rate, how long the price holds) travels in the payment's `extra`, so
that it survives us; `external_id` carries our order id. Read from LNbits 1.6.2, and run against it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Annotated, Any, Final, Literal, TypeVar

import bolt11
import msgspec
from bolt11.exceptions import Bolt11Exception
from msgspec import Meta, Raw

from app.adapters import reading
from app.adapters.reading import plain
from app.topups.gateway import (
    AdditionalStatus,
    GatewayRefused,
    GatewayUnavailable,
    Invoice,
    InvoiceStatus,
    NewInvoice,
    Payment,
    PaymentStatus,
    Rate,
)

METHOD: Final = "btc-lightning"
TAG: Final = "satmeter"
"""`extra.tag` of our payments, by which LNbits can list them."""
FIXED_RATES: Final = {"SATS": Decimal(100_000_000), "BTC": Decimal(1)}
"""Units per whole BTC of the currencies that need no rate source; the same as BTCPay says."""

_ASK_MARGIN: Final = timedelta(seconds=30)
_SATS_PER_BTC: Final = 100_000_000
_MSAT_PLACES: Final = 11
_BOLT11_DEFAULT_EXPIRY_SECONDS: Final = 3600
# What the library lets through on texts that are no BOLT11; bitstring's errors are Value- or IndexErrors.
_NOT_BOLT11: Final = (Bolt11Exception, ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError)

_Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Line = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"\A[!-~]+\Z")]
_Utc = Annotated[datetime, Meta(tz=True)]

T = TypeVar("T")


class PaymentWire(msgspec.Struct, frozen=True, kw_only=True):
    """An incoming payment of ours, which is what an invoice is called here. Amounts are msat.

    `expiry` is not read: it is a naive local time in the answer to a POST and wrong on servers that do not
    live in UTC; the BOLT11 knows. `updated_at` of a success is when LNbits noted it, or later.
    """

    payment_hash: _Hash
    amount: Annotated[int, Meta(ge=1, le=21 * 10**17)]
    bolt11: _Line
    status: Literal["pending", "success", "failed"]
    time: _Utc
    updated_at: _Utc
    extra: "OursWire"


class OursWire(msgspec.Struct, frozen=True, kw_only=True):
    """What we put into `extra`. LNbits may add its own, such as the wallet's fiat amounts."""

    order_id: _Line
    currency: Literal["USD", "SATS", "BTC"]
    amount: Raw
    rate: Raw
    expires_in_seconds: Annotated[int, Meta(ge=1, le=10**8)]
    monitor_minutes: Annotated[int, Meta(ge=0, le=10**7)]
    order_url: str | None = None


class _EnvelopeWire(msgspec.Struct, frozen=True, kw_only=True):
    payment_hash: str
    amount: int
    external_id: str | None = None
    extra: Any = None

    @property
    def is_ours(self) -> bool:
        """Whether it is an invoice that we made: a payment that goes out may carry the same hash."""
        return self.amount > 0 and isinstance(self.extra, dict) and self.extra.get("tag") == TAG


class _PageWire(msgspec.Struct, frozen=True, kw_only=True):
    data: list[Raw]


class _DetailsWire(msgspec.Struct, frozen=True, kw_only=True):
    details: Raw


class _WalletWire(msgspec.Struct, frozen=True, kw_only=True):
    balance: int


class _FieldProblemWire(msgspec.Struct, frozen=True, kw_only=True):
    msg: str = ""
    loc: tuple[str | int, ...] = ()


class _ProblemWire(msgspec.Struct, frozen=True, kw_only=True):
    detail: str | tuple[_FieldProblemWire, ...] = ""
    status: str = ""


class _HintWire(msgspec.Struct, frozen=True, kw_only=True):
    payment_hash: _Hash
    status: Annotated[str, Meta(pattern=r"\A[a-z]{1,20}\Z")]
    extra: "_HintExtraWire"


class _HintExtraWire(msgspec.Struct, frozen=True, kw_only=True):
    order_id: _Line
    hint_token: _Line
    tag: Literal["satmeter"]


# Asking


def sats_of(amount: Decimal, rate: Decimal) -> int:
    """What `amount` costs at `rate` (per whole BTC), in sats rounded up: Lightning nodes take no less than one."""
    return ceil(Fraction(amount) * _SATS_PER_BTC / Fraction(rate))


def new_invoice_body(
    new: NewInvoice,
    rate: Rate,
    *,
    hint_token: str,
    webhook_url: str | None,
    service_name: str = "Satmeter",
    expires_in_seconds: int | None = None,
) -> bytes:
    """The JSON that asks for an invoice. `expires_in_seconds` is for tests that cannot wait for a minute."""
    assert new.amount.is_finite(), f"amount {new.amount}"
    assert new.amount > 0, f"amount {new.amount}"
    seconds = expires_in_seconds or new.expires_in_minutes * 60
    amount = format(new.amount, "f")
    body: dict[str, Any] = {
        "out": False,
        "unit": "sat",
        "amount": sats_of(new.amount, rate.usd),
        "memo": f"{service_name}: top-up of {new.price}",
        "expiry": seconds,
        "external_id": new.order_id,
        "extra": {
            "tag": TAG,
            "order_id": new.order_id,
            "currency": new.currency,
            "amount": amount,
            "rate": format(rate.usd, "f"),
            "rate_source": rate.source,
            "rate_at": rate.quoted_at.isoformat(),
            "expires_in_seconds": seconds,
            "monitor_minutes": new.monitor_minutes,
            "hint_token": hint_token,
            **({"order_url": new.receipt_url} if new.receipt_url else {}),
        },
    }
    return msgspec.json.encode(body | ({"webhook": webhook_url} if webhook_url else {}))


def is_payment_hash(text: str) -> bool:
    """Whether LNbits could have made this id; anything else could change the path we ask for."""
    return len(text) == 64 and all(char in "0123456789abcdef" for char in text)


def is_worth_rechecking(payment: PaymentWire, now: datetime) -> bool:
    """Whether LNbits should be told to ask its node about this payment.

    Never around expiry or after it: LNbits does not ask its node then but marks the payment as failed, and a
    payment that arrives late finds no invoice. Source: lnbits/core/services/payments.py, update_pending_payment.
    """
    return payment.status == "pending" and now < _expires_at(payment) - _ASK_MARGIN


# Answers


def read_payment(body: bytes) -> PaymentWire:
    """A payment of ours, as POST answers it."""
    return _ours(Raw(body), "payment")


def read_details(body: bytes) -> PaymentWire:
    """A payment of ours, as GET payment answers it to its owner."""
    return _ours(_decode(body, _DetailsWire, "payment").details, "payment.details")


def read_page(body: bytes, **asked: str) -> tuple[int, list[PaymentWire]]:
    """How many payments a listing holds, and those of them that are invoices of ours, in its order.

    `asked` are the fields it was filtered by. Raises GatewayUnavailable if a payment has others: LNbits
    leaves a filter that it does not know out, and answers with everything.
    """
    entries = _decode(body, _PageWire, "payments").data
    named = [(raw, _decode(bytes(raw), _EnvelopeWire, "payments.data")) for raw in entries]
    for _, envelope in named:
        for field, value in asked.items():
            if getattr(envelope, field) != value:
                raise GatewayUnavailable(f"LNbits ignores the filter {field}; it must be 1.6 or newer")
    return len(entries), [_ours(raw, "payments.data") for raw, envelope in named if envelope.is_ours]


def is_wallet(body: bytes) -> bool:
    _decode(body, _WalletWire, "wallet")
    return True


def why_unpayable(new: NewInvoice, rate: Rate, made: PaymentWire) -> str | None:
    """What is wrong with a fresh invoice, None if it is what was asked for."""
    if made.extra.order_id != new.order_id:
        return "it carries another order id"
    asked_msat = sats_of(new.amount, rate.usd) * 1000
    if made.amount != asked_msat:
        return f"it is over {made.amount} msat, not {asked_msat}"
    if made.status != "pending":
        return f"it is {made.status}"
    return None


def to_invoice(wire: PaymentWire, now: datetime) -> Invoice:
    """Our Invoice of LNbits' payment. The amount paid is always the amount asked: LNbits keeps no other."""
    expires_at = _expires_at(wire)
    status, additional_status = _state(wire, expires_at, now)
    total = _coins(wire.amount)
    paid = total if wire.status == "success" else total * 0
    return Invoice(
        id=wire.payment_hash,
        order_id=wire.extra.order_id,
        currency=wire.extra.currency,
        amount=_amount(wire.extra.amount),
        status=status,
        additional_status=additional_status,
        created_at=wire.time.astimezone(UTC),
        expires_at=expires_at,
        watched_until=expires_at + timedelta(minutes=wire.extra.monitor_minutes),
        checkout_url="",
        method=METHOD,
        destination=wire.bolt11,
        payment_link=f"lightning:{wire.bolt11}",
        rate=reading.rate("LNbits", wire.extra.rate, "payment.extra.rate"),
        total=total,
        due=total - paid,
        paid=paid,
        fee=total * 0,
        payments=(_payment(wire),) if wire.status == "success" else (),
        order_url=wire.extra.order_url,
    )


@dataclass(frozen=True, slots=True)
class Claim:
    """What a webhook claims. Nobody signed it; `token` is the one that our invoice of `order_id` carried, or a lie."""

    payment_hash: str
    status: str
    order_id: str
    token: str


def read_claim(body: bytes) -> Claim | None:
    """A webhook's payment, None if it makes no sense or is not of an invoice of ours.

    The payment is a JSON text within a JSON text, since LNbits encodes it twice; once would be understood too.
    Source: lnbits/core/services/notifications.py, _post_webhook.
    """
    try:
        inner = msgspec.json.decode(body, type=str).encode() if body.lstrip()[:1] == b'"' else body
        hint = msgspec.json.decode(inner, type=_HintWire)
    except (ValueError, RecursionError):
        return None
    return Claim(hint.payment_hash, hint.status, hint.extra.order_id, hint.extra.hint_token)


# Refusals


@dataclass(frozen=True, slots=True)
class Problem:
    """What an error says, on one line. `is_final` if LNbits is sure that nothing was made."""

    text: str
    is_final: bool


def read_problem(body: bytes) -> Problem | None:
    """LNbits' error body, None if it is somebody else's."""
    try:
        problem = msgspec.json.decode(body, type=_ProblemWire)
    except (ValueError, RecursionError):
        return None
    if not isinstance(problem.detail, str):
        text = "; ".join(f"{'.'.join(map(str, one.loc))}: {one.msg}" for one in problem.detail[:5])
        return Problem(plain(text), problem.status == "failed")
    return Problem(plain(problem.detail), problem.status == "failed")


def is_about_callback(text: str) -> bool:
    """Whether a refusal is about the webhook's address, which LNbits' rules may not allow."""
    return "callback" in text.lower()


def refusal(problem: Problem | None, status: int) -> GatewayRefused:
    return GatewayRefused(f"LNbits refused: {problem.text if problem and problem.text else f'HTTP {status}'}")


# Reading values


def _decode(body: bytes, shape: type[T], what: str) -> T:
    return reading.decode("LNbits", body, shape, what)


def _ours(raw: Raw, what: str) -> PaymentWire:
    """A payment whose BOLT11 says the same as the rest of it."""
    wire = _decode(bytes(raw), PaymentWire, what)
    signed = _signed(wire.bolt11)
    if signed.payment_hash != wire.payment_hash or signed.amount_msat != wire.amount:
        raise reading.rubbish("LNbits", f"{what}.bolt11")
    return wire


@dataclass(frozen=True, slots=True)
class _Signed:
    """What a BOLT11 says of itself."""

    payment_hash: str
    amount_msat: int | None
    expires_at: datetime


@lru_cache(maxsize=1024)  # it takes 2 ms to read one, which the poller asks about again and again
def _signed(text: str) -> _Signed:
    try:
        read = bolt11.decode(text)
        seconds = read.expiry if read.expiry is not None else _BOLT11_DEFAULT_EXPIRY_SECONDS
        return _Signed(read.payment_hash, read.amount_msat, datetime.fromtimestamp(read.date + seconds, UTC))
    except _NOT_BOLT11:
        raise reading.rubbish("LNbits", "payment.bolt11") from None


def _expires_at(wire: PaymentWire) -> datetime:
    """When the price ends: with the BOLT11, or as we asked where the node gave it a longer life."""
    ours = wire.time + timedelta(seconds=wire.extra.expires_in_seconds)
    return min(_signed(wire.bolt11).expires_at, ours.astimezone(UTC))


def _state(wire: PaymentWire, expires_at: datetime, now: datetime) -> tuple[InvoiceStatus, AdditionalStatus]:
    """BTCPay's words for it. A failed payment is an expired invoice, or one that its node gave up."""
    if wire.status == "success":
        if _received_at(wire) > expires_at:
            return InvoiceStatus.EXPIRED, AdditionalStatus.PAID_LATE
        return InvoiceStatus.SETTLED, AdditionalStatus.NONE
    if wire.status == "pending" and now < expires_at:
        return InvoiceStatus.NEW, AdditionalStatus.NONE
    return InvoiceStatus.EXPIRED, AdditionalStatus.NONE


def _payment(wire: PaymentWire) -> Payment:
    """The one payment. LNbits' `fee` is between it and its operator: the payer paid the whole amount."""
    return Payment(
        id=wire.payment_hash,
        value=_coins(wire.amount),
        fee=_coins(0),
        status=PaymentStatus.SETTLED,
        received_at=_received_at(wire),
        destination=wire.bolt11,
    )


def _received_at(wire: PaymentWire) -> datetime:
    """When LNbits noted the payment, by its own clock. An operator who edits the payment later moves it, so
    it can look late afterwards; what was credited stays."""
    return wire.updated_at.astimezone(UTC)


def _coins(amount_msat: int) -> Decimal:
    return Decimal(amount_msat).scaleb(-_MSAT_PLACES)


def _amount(raw: Raw) -> Decimal:
    value = reading.decimal("LNbits", raw, "payment.extra.amount")
    if value <= 0:
        raise reading.rubbish("LNbits", "payment.extra.amount")
    return value
