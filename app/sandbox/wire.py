"""Greenfield's JSON: how a request is read and checked, and how an invoice is shown.

Decimals are JSON strings without exponent, times are unix seconds.
Source: Controllers/GreenField/GreenfieldInvoiceController.cs of BTCPay Server v2.4.1, and its OpenAPI file.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec
from msgspec import Struct

from .errors import BadRequest, Invalid
from .invoices import SPEED_CONFIRMATIONS, Invoice, Payment, PaymentStatus, Prompt, asked, markable, totals
from .methods import METHODS, Method, find_method, payment_link
from .rates import decimals_of

MAX_AMOUNT = Decimal(2**64 - 1)
MINIMUM_EXPIRY_SECONDS = 30
_decoder = msgspec.json.Decoder(float_hook=Decimal)
_encoder = msgspec.json.Encoder(decimal_format="number")


class Order(Struct, frozen=True):
    """What a create request asks for, with the store's defaults filled in. `amount` None makes a top-up invoice."""

    amount: Decimal | None
    currency: str
    metadata: dict[str, Any]
    methods: tuple[Method, ...]
    expires_in_seconds: int
    watched_for_seconds: int
    speed: str
    tolerance: Decimal
    options: dict[str, Any]


# Reading


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request's body; an empty body is an empty object. Raises BadRequest."""
    try:
        body = _decoder.decode(raw) if raw.strip() else {}
    except (msgspec.DecodeError, ValueError) as error:
        raise BadRequest(f"The request body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("The request body must be a JSON object")
    return body


def read_decimal(value: Any, path: str) -> Decimal:
    """A decimal given as a JSON string or number. Raises Invalid."""
    text = format(value, "f") if isinstance(value, Decimal) else str(value)
    if isinstance(value, bool) or not re.fullmatch(r"-?[0-9]{1,28}(\.[0-9]{1,28})?", text):
        raise Invalid((path, f"Could not convert {value!r} to a decimal"))
    return Decimal(text)


def read_order(raw: bytes) -> Order:
    """A create request. Raises Invalid with every field that is wrong."""
    body = read_object(raw)
    checkout = body.get("checkout") or {}
    problems: list[tuple[str, str]] = []

    def checked(read: Any, *args: Any) -> Any:
        try:
            return read(*args)
        except Invalid as invalid:
            problems.extend(invalid.problems)
            return None

    amount = checked(_read_amount, body.get("amount"))
    methods = checked(_read_methods, checkout.get("paymentMethods"))
    expiry = checked(_read_minutes, checkout, "expirationMinutes", 15, MINIMUM_EXPIRY_SECONDS)
    monitoring = checked(_read_minutes, checkout, "monitoringMinutes", 1440, 0)
    tolerance = checked(_read_tolerance, checkout.get("paymentTolerance"))
    speed = checked(_read_speed, checkout.get("speedPolicy"))
    metadata = checked(_read_metadata, body.get("metadata"))
    if problems:
        raise Invalid(*problems)
    currency = str(body.get("currency") or "USD").strip().upper()
    return Order(amount, currency, metadata, methods, expiry, monitoring, speed, tolerance, checkout)


def _read_amount(value: Any) -> Decimal | None:
    if value is None:
        return None
    amount = read_decimal(value, "amount")
    if amount < 0:
        raise Invalid(("amount", "The amount should be 0 or more."))
    if amount > MAX_AMOUNT:
        raise Invalid(("amount", f"The amount should less than {MAX_AMOUNT}."))
    return amount


def _read_methods(value: Any) -> tuple[Method, ...]:
    spellings = value if isinstance(value, list) else []
    found = [find_method(spelling) if isinstance(spelling, str) else None for spelling in spellings]
    problems = [
        (f"checkout.paymentMethods[{place}]", "Invalid PaymentMethodId")
        for place, method in enumerate(found)
        if method is None
    ]
    if problems:
        raise Invalid(*problems)
    unique = {method.id: method for method in found if method is not None}
    return tuple((unique or METHODS).values())


def _read_minutes(checkout: Mapping[str, Any], field: str, default: int, minimum_seconds: int) -> int:
    """A span of minutes, in seconds."""
    path = f"checkout.{field}"
    value = checkout.get(field)
    seconds = int(read_decimal(default if value is None else value, path) * 60)
    if seconds < minimum_seconds:
        raise Invalid((path, f"Expiration time must be at least {minimum_seconds} seconds"))
    return seconds


def _read_tolerance(value: Any) -> Decimal:
    tolerance = read_decimal(0 if value is None else value, "checkout.paymentTolerance")
    if not 0 <= tolerance <= 100:
        raise Invalid(("checkout.paymentTolerance", "PaymentTolerance can only be between 0 and 100 percent"))
    return tolerance


def _read_speed(value: Any) -> str:
    speed = "MediumSpeed" if value is None else value
    if speed not in SPEED_CONFIRMATIONS:
        raise Invalid(("checkout.speedPolicy", f"{speed!r} is none of {', '.join(SPEED_CONFIRMATIONS)}"))
    return str(speed)


def _read_metadata(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Invalid(("metadata", "The metadata should be an object"))
    # Fractions were read as Decimal, for the amount's sake; metadata goes back out as the numbers they were.
    plain_numbers: dict[str, Any] = msgspec.json.decode(_encoder.encode(value))
    return plain_numbers


# Showing


def plain(amount: Decimal) -> str:
    """An exact decimal without exponent; zeros after the point are kept, minus zero is zero."""
    return format(abs(amount) if amount == 0 else amount, "f")


def payment_view(payment: Payment) -> dict[str, Any]:
    """A payment as the API and the webhooks show it, in whole coins."""
    return {
        "id": payment.id,
        "receivedDate": payment.received_at,
        "value": plain(payment.value),
        "fee": plain(payment.fee),
        "status": payment.status.value,
        "destination": payment.destination,
    }


def invoice_view(invoice: Invoice, public_url: str) -> dict[str, Any]:
    """InvoiceData; `paidAmount` counts unconfirmed payments and is rounded to the currency."""
    paid = totals(invoice).paid_net
    return {
        "id": invoice.id,
        "storeId": invoice.store_id,
        "amount": plain(invoice.price),
        "paidAmount": plain(round(paid, decimals_of(invoice.currency))),
        "currency": invoice.currency,
        "type": "TopUp" if invoice.is_topup else "Standard",
        "checkoutLink": f"{public_url.rstrip('/')}/i/{invoice.id}",
        "createdTime": invoice.created_at,
        "expirationTime": invoice.expires_at,
        "monitoringExpiration": invoice.watched_until,
        "status": invoice.status.value,
        "additionalStatus": invoice.additional.value,
        "availableStatusesForManualMarking": [status.value for status in markable(invoice)],
        "archived": False,
        "metadata": invoice.metadata,
        "checkout": _checkout_view(invoice),
        "receipt": {"enabled": True, "showQR": None, "showPayments": None},
    }


def _checkout_view(invoice: Invoice) -> dict[str, Any]:
    options = invoice.checkout
    return {
        "speedPolicy": invoice.speed,
        "paymentMethods": [prompt.method for prompt in invoice.prompts],
        "defaultPaymentMethod": options.get("defaultPaymentMethod"),
        "lazyPaymentMethods": options.get("lazyPaymentMethods"),
        "expirationMinutes": _minutes(invoice.expires_at - invoice.created_at),
        "monitoringMinutes": _minutes(invoice.watched_until - invoice.expires_at),
        "paymentTolerance": float(invoice.tolerance),
        "redirectURL": options.get("redirectURL"),
        "redirectAutomatically": bool(options.get("redirectAutomatically")),
        "defaultLanguage": options.get("defaultLanguage"),
    }


def _minutes(seconds: int) -> int | float:
    return seconds // 60 if seconds % 60 == 0 else seconds / 60


def methods_view(invoice: Invoice, only_accounted: bool = True) -> list[dict[str, Any]]:
    """InvoicePaymentMethodDataModel for every method of the invoice."""
    return [_method_view(invoice, prompt, only_accounted) for prompt in invoice.prompts]


def _method_view(invoice: Invoice, prompt: Prompt, only_accounted: bool) -> dict[str, Any]:
    figures = asked(invoice, prompt)
    payments = [
        payment_view(payment)
        for payment in invoice.payments
        if payment.method == prompt.method and not (only_accounted and payment.status is PaymentStatus.INVALID)
    ]
    return {
        "paymentMethodId": prompt.method,
        "currency": prompt.facts.coin,
        "destination": prompt.destination,
        "paymentLink": payment_link(prompt.facts, prompt.destination, figures.due),
        "rate": plain(prompt.rate),
        "paymentMethodPaid": plain(figures.method_paid),
        "totalPaid": plain(figures.total_paid),
        "due": plain(figures.due),
        "amount": plain(figures.amount),
        "paymentMethodFee": plain(figures.fee),
        "payments": payments,
        "activated": True,
        "additionalData": {},
    }
