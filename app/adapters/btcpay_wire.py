"""The words of BTCPay's Greenfield API v1: what its JSON must look like, and what it means in ours. Pure.

Whatever does not fit is refused as GatewayUnavailable("BTCPay answered rubbish: <field>"): nobody is credited
from an answer that was half understood. Read from BTCPay Server 2.4.1; the spellings of 1.x are understood too.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from app.adapters import reading
from app.adapters.reading import plain
from app.topups.gateway import (
    AdditionalStatus,
    GatewayRefused,
    GatewayUnavailable,
    Hint,
    Invoice,
    InvoiceStatus,
    NewInvoice,
    Payment,
    PaymentStatus,
)
from app.topups.methods import confirmations_asked
from app.topups.setup import Hook

METHOD_IDS: Final[Mapping[str, str]] = {
    "btc-lightning": "BTC-LN",
    "btc": "BTC-CHAIN",
    "ltc": "LTC-CHAIN",
    "lbtc": "LBTC-CHAIN",
    "xmr": "XMR-CHAIN",
}
RATED_COINS: Final = ("BTC", "LTC", "LBTC", "XMR")

_OUR_NAMES: Final = {method_id: name for name, method_id in METHOD_IDS.items()}
_CHAIN_WORDS: Final = frozenset({"", "CHAIN", "BTCLIKE", "ONCHAIN", "MONEROLIKE"})
_LIGHTNING_WORDS: Final = frozenset({"LN", "LIGHTNINGLIKE", "LIGHTNINGNETWORK", "OFFCHAIN"})

_RATE_MAX_USD: Final = Decimal(10) ** 9

_INVOICE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PERMISSION: Final = re.compile(r"[A-Za-z0-9.:_-]{1,200}")

_UnixSeconds = Annotated[int, Meta(ge=1, lt=2**32)]
# Control characters have no business in what we store and show; PostgreSQL refuses NUL outright.
_Line = Annotated[str, Meta(max_length=4096, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]
_Name = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]
_Id = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]

T = TypeVar("T")


class NotOurs(GatewayUnavailable):
    """An invoice without exactly one of our payment methods: somebody else made it in the same store."""


class _Wire(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A shape on the wire. Decimals stay Raw until `_decimal` has read their digits: never through a float."""


class _PaymentWire(_Wire, frozen=True, kw_only=True):
    id: _Name
    received_date: _UnixSeconds
    value: Raw
    fee: Raw
    status: PaymentStatus
    destination: _Line | None = None


class MethodWire(_Wire, frozen=True, kw_only=True):
    """One payment method of an invoice, with what was paid by it."""

    activated: bool
    rate: Raw
    amount: Raw
    due: Raw
    payment_method_paid: Raw
    payments: tuple[_PaymentWire, ...]
    destination: _Line | None = None
    payment_link: _Line | None = None
    payment_method_id: _Line = ""
    payment_method: _Line = ""  # the name of 1.x
    payment_method_fee: Raw = Raw()
    network_fee: Raw = Raw()  # the name of 1.x

    @property
    def our_name(self) -> str | None:
        return our_method(self.payment_method_id or self.payment_method)


class InvoiceWire(_Wire, frozen=True, kw_only=True):
    """An invoice; `payment_methods` only where the server was asked for them and knows how to."""

    id: _Id
    store_id: _Name
    currency: _Name
    amount: Raw
    status: InvoiceStatus
    additional_status: str
    created_time: _UnixSeconds
    expiration_time: _UnixSeconds
    monitoring_expiration: _UnixSeconds
    checkout_link: _Line
    metadata: dict[str, Any] | None = None
    payment_methods: tuple[MethodWire, ...] | UnsetType | None = UNSET

    @property
    def order_id(self) -> str | None:
        return _order_id(self.metadata)


class _EnvelopeWire(_Wire, frozen=True, kw_only=True):
    metadata: Any = None


class _RateWire(_Wire, frozen=True, kw_only=True):
    currency_pair: _Name
    rate: Raw = Raw(b"null")
    errors: tuple[str, ...] | None = None


class _HealthWire(_Wire, frozen=True, kw_only=True):
    synchronized: bool


class _KeyWire(_Wire, frozen=True, kw_only=True):
    permissions: tuple[str, ...]


class _SyncWire(_Wire, frozen=True, kw_only=True):
    payment_method_id: str | None = None
    available: bool = True


class ServerWire(_Wire, frozen=True, kw_only=True):
    version: _Line
    sync_status: tuple[_SyncWire, ...] | None = None

    @property
    def nodes(self) -> dict[str, bool]:
        """Ours that it tells about, and whether each is there; Lightning's it tells nothing about."""
        named = ((our_method(each.payment_method_id or ""), each.available) for each in self.sync_status or ())
        return {name: is_there for name, is_there in named if name is not None}


class _EnabledWire(_Wire, frozen=True, kw_only=True):
    payment_method_id: str | None = None
    payment_method: str | None = None
    enabled: bool = True


class _EventsWire(_Wire, frozen=True, kw_only=True):
    everything: bool = False
    specific_events: tuple[str, ...] = ()


class HookWire(_Wire, frozen=True, kw_only=True):
    id: _Id
    url: _Line
    enabled: bool = True
    automatic_redelivery: bool = True
    authorized_events: _EventsWire = _EventsWire(everything=True)


class _DeliveryWire(_Wire, frozen=True, kw_only=True):
    http_code: int | None = None
    timestamp: _UnixSeconds | None = None
    delivery_time: _UnixSeconds | None = None


class _FieldProblemWire(_Wire, frozen=True, kw_only=True):
    path: str = ""
    message: str = ""


class _ProblemWire(_Wire, frozen=True, kw_only=True):
    code: str = ""
    message: str = ""
    permission: str = ""


class _WebhookWire(_Wire, frozen=True, kw_only=True):
    type: _Name
    delivery_id: _Name
    original_delivery_id: _Line | None = None
    store_id: str | None = None
    invoice_id: _Id | None = None


# Asking


def speed_policy(method: str, amount: Decimal, currency: str) -> str:
    """How many confirmations to ask for, in BTCPay's words: one, or two.

    Lightning settles at once whatever is said; it says MediumSpeed, so that the store's default never decides.
    Source: BTCPayServer NBXplorerListener.cs (confirmations by speed policy).
    """
    return "MediumSpeed" if confirmations_asked(method, amount, currency) <= 1 else "LowMediumSpeed"


def new_invoice_body(new: NewInvoice, service_name: str) -> bytes:
    """The JSON that asks for an invoice. Raises GatewayRefused for a method BTCPay has no name for.

    Every checkout field is always said: an operator may have changed the store's defaults, and a tolerance of
    100 % in there settles every invoice unpaid. What it is for is told to its buyer: on the checkout page, on BTCPay's own
    receipt, and on the way back. Source: Greenfield "Create a new invoice", btcpayserver #6378.
    """
    assert new.amount.is_finite(), f"amount {new.amount}"
    assert new.amount > 0, f"amount {new.amount}"
    if new.method not in METHOD_IDS:
        raise GatewayRefused(f"BTCPay has no payment method {new.method!r}; there are {', '.join(METHOD_IDS)}")
    amount = format(new.amount, "f")
    bought = f"{service_name}: top-up of {new.price}"
    receipt = {"receiptData": {"Service": service_name, "Top-up": new.price, "Number": new.order_id}}
    return msgspec.json.encode(
        {
            "amount": amount,
            "currency": new.currency,
            "metadata": {"orderId": new.order_id, "itemDesc": bought}
            | receipt
            | ({"orderUrl": new.receipt_url} if new.receipt_url else {}),
            "checkout": {
                "paymentMethods": [METHOD_IDS[new.method]],
                "expirationMinutes": new.expires_in_minutes,
                "monitoringMinutes": new.monitor_minutes,
                "speedPolicy": speed_policy(new.method, new.amount, new.currency),
                "paymentTolerance": 0,
                "lazyPaymentMethods": False,
            }
            | ({"redirectURL": new.receipt_url} if new.receipt_url else {}),
        }
    )


def is_invoice_id(text: str) -> bool:
    """Whether BTCPay could have made this id; anything else could change the path we ask for."""
    return _INVOICE_ID.fullmatch(text) is not None


# Answers


def read_invoice(body: bytes, *, store_id: str, invoice_id: str | None = None) -> InvoiceWire:
    """An invoice of this store, and of this id if one was asked for."""
    invoice = _decode(body, InvoiceWire, "invoice")
    if invoice.store_id != store_id:
        raise rubbish("invoice.storeId")
    if invoice_id is not None and invoice.id != invoice_id:
        raise rubbish("invoice.id")
    return invoice


def read_methods(body: bytes) -> tuple[MethodWire, ...]:
    return _decode(body, tuple[MethodWire, ...], "paymentMethods")


def read_page(body: bytes, *, store_id: str) -> tuple[int, list[InvoiceWire]]:
    """How many invoices a listing holds, and those of them that carry an order id, in the listing's order.

    The others are somebody else's, and are not looked at closely enough to stumble over them.
    """
    entries = _decode(body, list[Raw], "invoices")
    named = [raw for raw in map(bytes, entries) if _order_id(_decode(raw, _EnvelopeWire, "invoices").metadata)]
    return len(entries), [read_invoice(raw, store_id=store_id) for raw in named]


def read_rate(body: bytes, pair: str) -> Decimal:
    """The rate of this pair, cut to 18 decimals. Raises GatewayRefused with BTCPay's reasons if it has none."""
    results = _decode(body, tuple[_RateWire, ...], "rates")
    result = next((one for one in results if one.currency_pair.upper() == pair), None)
    if result is None:
        raise rubbish(f"rates.{pair}")
    if bytes(result.rate) == b"null":
        reasons = plain("; ".join(result.errors or ())) or "it gave no reason"
        raise GatewayRefused(f"BTCPay has no rate for {pair}: {reasons}")
    rate = _rate(result.rate, f"rates.{pair}.rate")
    if rate >= _RATE_MAX_USD:
        raise rubbish(f"rates.{pair}.rate")
    return rate


def read_permissions(body: bytes) -> tuple[str, ...]:
    """Of the key that asks, as Greenfield spells them: `permission`, or `permission:store`."""
    return tuple(plain(each) for each in _decode(body, _KeyWire, "apiKey").permissions)


def read_server(body: bytes) -> ServerWire:
    return _decode(body, ServerWire, "serverInfo")


def read_enabled(body: bytes) -> frozenset[str]:
    """Our names of the methods that the store takes."""
    listed = _decode(body, tuple[_EnabledWire, ...], "paymentMethods")
    named = (our_method(each.payment_method_id or each.payment_method or "") for each in listed if each.enabled)
    return frozenset(name for name in named if name is not None)


def read_hooks(body: bytes) -> tuple[HookWire, ...]:
    return _decode(body, tuple[HookWire, ...], "webhooks")


def read_deliveries(body: bytes) -> tuple[_DeliveryWire, ...]:
    return _decode(body, tuple[_DeliveryWire, ...], "deliveries")


def to_hook(hook: HookWire, deliveries: Sequence[_DeliveryWire]) -> Hook:
    """`deliveries` newest first."""
    last, events = next(iter(deliveries), None), hook.authorized_events
    at = (last.delivery_time or last.timestamp) if last else None
    return Hook(
        url=hook.url,
        is_enabled=hook.enabled,
        is_repeated=hook.automatic_redelivery,
        events=None if events.everything else frozenset(events.specific_events),
        last_code=last.http_code if last else None,
        last_at=_utc(at) if at is not None else None,
    )


def is_synchronized(body: bytes) -> bool:
    return _decode(body, _HealthWire, "health").synchronized


def read_hint(body: bytes, store_id: str) -> Hint | None:
    """What an authentic webhook says; None if it is not for this store or makes no sense."""
    try:
        event = msgspec.json.decode(body, type=_WebhookWire)
    except (ValueError, RecursionError):
        return None
    if event.store_id is not None and event.store_id != store_id:
        return None
    # A redelivery has a new id of its own, but tells of the same event as the original.
    return Hint(event.original_delivery_id or event.delivery_id, event.type, event.invoice_id)


def why_unpayable(new: NewInvoice, made: InvoiceWire, methods: Sequence[MethodWire]) -> str | None:
    """What is wrong with a fresh invoice, None if it is what was asked for and can be paid.

    BTCPay silently leaves out a payment method that fails, and rounds the amount to the currency's decimals.
    Source: BTCPayServer UIInvoiceController.cs, BTCPayServer.Rating/Extensions.cs.
    """
    if made.order_id != new.order_id:
        return "it carries another order id"
    if made.currency.upper() != new.currency.upper():
        return f"its currency is {plain(made.currency)}, not {new.currency}"
    amount = _amount(made.amount, "invoice.amount")
    if abs(amount - new.amount) * 100 > new.amount:
        return f"its amount is {amount}, not {new.amount} {new.currency}"
    if [method.our_name for method in methods] != [new.method]:
        listed = ", ".join(plain(method.payment_method_id or method.payment_method) for method in methods)
        return f"its payment methods are [{listed}], not [{METHOD_IDS[new.method]}]"
    if not methods[0].activated or not methods[0].destination:
        return f"{METHOD_IDS[new.method]} is not active: there is nowhere to pay to"
    return None


def to_invoice(wire: InvoiceWire, methods: Sequence[MethodWire]) -> Invoice:
    """Our Invoice of BTCPay's. Raises NotOurs unless it has exactly one payment method, which is one of ours."""
    if len(methods) != 1 or (our_name := methods[0].our_name) is None:
        raise NotOurs("BTCPay answered rubbish: paymentMethods, which should be exactly one of ours")
    method = methods[0]
    fee = method.payment_method_fee if bytes(method.payment_method_fee) else method.network_fee
    total = _amount(method.amount, "paymentMethods.amount")
    return Invoice(
        id=wire.id,
        order_id=wire.order_id,
        currency=wire.currency,
        amount=_positive(wire.amount, "invoice.amount"),
        status=wire.status,
        additional_status=_additional_status(wire.additional_status),
        created_at=_utc(wire.created_time),
        expires_at=_utc(wire.expiration_time),
        watched_until=_utc(wire.monitoring_expiration),
        checkout_url=wire.checkout_link,
        method=our_name,
        destination=method.destination or "",
        payment_link=method.payment_link or "",
        rate=_rate(method.rate, "paymentMethods.rate"),
        total=total,
        due=_decimal(method.due, "paymentMethods.due"),
        paid=_amount(method.payment_method_paid, "paymentMethods.paymentMethodPaid"),
        fee=_fee(fee, total, "paymentMethods.paymentMethodFee"),
        payments=_payments(method.payments),
        order_url=_text(wire.metadata, "orderUrl"),
    )


def our_method(method_id: str) -> str | None:
    """Our name of a payment method id in any of BTCPay's spellings, None if it is not one of our five.

    `BTC`, `BTC_LightningLike`, `BTC-LightningNetwork`, `XMR-MoneroLike` are how 1.x says it.
    Source: BTCPayServer/Payments/PaymentMethodId.cs.
    """
    coin, _, kind = method_id.upper().replace("_", "-").partition("-")
    if kind in _CHAIN_WORDS:
        return _OUR_NAMES.get(f"{coin}-CHAIN")
    return _OUR_NAMES.get(f"{coin}-LN") if kind in _LIGHTNING_WORDS else None


# Refusals


@dataclass(frozen=True, slots=True)
class Problem:
    """What a 4xx says. `text` is one line of BTCPay's own words; `code` and `permission` may be empty."""

    code: str
    text: str
    permission: str


def read_problem(body: bytes) -> Problem | None:
    """Both of Greenfield's error bodies, None if it is neither.

    Validation errors are a list of path and message, all others an object with code and message.
    """
    try:
        problem = msgspec.json.decode(body, type=tuple[_FieldProblemWire, ...] | _ProblemWire)
    except (ValueError, RecursionError):
        return None
    if isinstance(problem, _ProblemWire):
        permission = problem.permission if _PERMISSION.fullmatch(problem.permission) else ""
        return Problem(plain(problem.code), plain(problem.message), permission)
    return Problem("validation", plain("; ".join(f"{one.path}: {one.message}" for one in problem[:5])), "")


def rubbish(field: str) -> GatewayUnavailable:
    return reading.rubbish("BTCPay", field)


# Reading values


def _decode(body: bytes, shape: type[T], what: str) -> T:
    return reading.decode("BTCPay", body, shape, what)


def _decimal(raw: Raw, field: str) -> Decimal:
    return reading.decimal("BTCPay", raw, field)


def _amount(raw: Raw, field: str) -> Decimal:
    value = _decimal(raw, field)
    if value < 0:
        raise rubbish(field)
    return value


def _positive(raw: Raw, field: str) -> Decimal:
    value = _decimal(raw, field)
    if value <= 0:
        raise rubbish(field)
    return value


def _fee(raw: Raw, within: Decimal, field: str) -> Decimal:
    """The fee within a sum; negative where a node that takes whole sats only had the price rounded down.

    It is then what the payer was spared, and counts as paid: value - fee is the price. One that is more than the sum
    itself is no rounding. Source: BTCPayServer LightningLikePaymentHandler.cs (the tweak fee).
    """
    value = _decimal(raw, field)
    if value < 0 and -value >= within:
        raise rubbish(field)
    return value


def _rate(raw: Raw, field: str) -> Decimal:
    return reading.rate("BTCPay", raw, field)


def _payments(wires: Sequence[_PaymentWire]) -> tuple[Payment, ...]:
    """The payments; the same id twice is refused, since it would be credited twice."""
    if len({wire.id for wire in wires}) != len(wires):
        raise rubbish("paymentMethods.payments.id")
    return tuple(map(_payment, wires))


def _payment(wire: _PaymentWire) -> Payment:
    value = _amount(wire.value, "paymentMethods.payments.value")
    return Payment(
        id=wire.id,
        value=value,
        fee=_fee(wire.fee, value, "paymentMethods.payments.fee"),
        status=wire.status,
        received_at=_utc(wire.received_date),
        destination=wire.destination or "",
    )


def _additional_status(word: str) -> AdditionalStatus:
    # The swagger lists `Invalid`, which the code's enum does not have; `status` already says what it would.
    if word == "Invalid":
        return AdditionalStatus.NONE
    try:
        return AdditionalStatus(word)
    except ValueError:
        raise rubbish("invoice.additionalStatus") from None


def _order_id(metadata: Any) -> str | None:
    return _text(metadata, "orderId")


def _text(metadata: Any, name: str) -> str | None:
    """A member of the metadata, None where it is absent or not a text: metadata is free JSON."""
    found = metadata.get(name) if isinstance(metadata, dict) else None
    return found if isinstance(found, str) and found else None


def _utc(unix_seconds: int) -> datetime:
    return datetime.fromtimestamp(unix_seconds, UTC)
