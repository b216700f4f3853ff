"""What a top-up asks of a payment backend: the Protocol that stands with its user; adapters bend to it.

A backend's answer to our own question is the fact, its webhook only a hint. All amounts are exact
Decimals in the unit that stands in the name or the docstring; all times are aware UTC datetimes.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Protocol, runtime_checkable


class InvoiceStatus(StrEnum):
    """BTCPay's own words, which existing clients compare with."""

    NEW = "New"
    PROCESSING = "Processing"
    SETTLED = "Settled"
    EXPIRED = "Expired"
    INVALID = "Invalid"


class AdditionalStatus(StrEnum):
    NONE = "None"
    PAID_PARTIAL = "PaidPartial"
    PAID_LATE = "PaidLate"
    PAID_OVER = "PaidOver"
    MARKED = "Marked"


class PaymentStatus(StrEnum):
    PROCESSING = "Processing"
    SETTLED = "Settled"
    INVALID = "Invalid"


@dataclass(frozen=True, slots=True)
class Payment:
    """One payment that the backend saw: `value` and `fee` in whole coins (1 BTC, 1 XMR).

    Its worth is value - fee. A negative fee is what rounding the invoice down to whole sats spared the payer.
    """

    id: str
    value: Decimal
    fee: Decimal
    status: PaymentStatus
    received_at: datetime
    destination: str


@dataclass(frozen=True, slots=True)
class Invoice:
    """An invoice with its one payment method, as the backend tells it now.

    `amount` is in `currency` (as the backend rounded it). `rate` is `currency` per whole coin, fixed at
    creation. `total`, `due`, `paid` and `fee` are whole coins; `due` may be negative when overpaid; `paid`
    counts unconfirmed payments too and is for showing only. `destination` (address or BOLT11) and
    `payment_link` can change after a partial payment. `order_url` is the page we gave its payer to come back to.
    """

    id: str
    order_id: str | None
    currency: str
    amount: Decimal
    status: InvoiceStatus
    additional_status: AdditionalStatus
    created_at: datetime
    expires_at: datetime
    watched_until: datetime
    checkout_url: str
    method: str
    destination: str
    payment_link: str
    rate: Decimal
    total: Decimal
    due: Decimal
    paid: Decimal
    fee: Decimal
    payments: tuple[Payment, ...]
    order_url: str | None = None


@dataclass(frozen=True, slots=True)
class NewInvoice:
    """What to ask for. `order_id` is our top-up id, by which a lost answer is found again; `receipt_url` is the page
    that a payer comes back to.

    `method` is ours (btc-lightning, btc, ltc, lbtc, xmr); `currency` USD, BTC, SATS, LTC, LBTC or XMR.
    """

    order_id: str
    method: str
    amount: Decimal
    currency: str
    expires_in_minutes: int
    monitor_minutes: int
    receipt_url: str | None = None

    @property
    def price(self) -> str:
        """As people write it: `10 USD`, `0.015 BTC`."""
        return f"{self.amount.normalize():f} {self.currency}"


@dataclass(frozen=True, slots=True)
class Rate:
    """USD per whole coin, who said so and when."""

    usd: Decimal
    source: str
    quoted_at: datetime


@dataclass(frozen=True, slots=True)
class Hint:
    """What a webhook claims: enough to dedupe it and to know which invoice to ask about."""

    delivery_id: str
    type: str
    invoice_id: str | None


class GatewayError(Exception):
    """The backend could not do what was asked."""


class GatewayUnavailable(GatewayError):
    """No usable answer: unreachable, slow, 5xx, or rubbish. Whether the request took effect is unknown."""


class GatewayBusy(GatewayUnavailable):
    """Our own questions stand in a queue, and this one's turn did not come: the backend was not asked."""


class GatewayRefused(GatewayError):
    """The backend understood and said no; nothing was made."""


@runtime_checkable
class InvoiceGateway(Protocol):
    """A payment backend. Every method may raise GatewayUnavailable; only `create` and `rate` GatewayRefused."""

    @property
    def name(self) -> str:
        """The backend's name in the books' contra accounts, such as `btcpay`."""

    async def create(self, new: NewInvoice) -> Invoice:
        """Make one invoice with exactly one payment method, ready to be paid. Never retried here."""

    async def fetch(self, invoice_id: str) -> Invoice | None:
        """The invoice as it stands now, None if the backend does not know it."""

    async def find(self, order_id: str) -> Sequence[Invoice]:
        """Every invoice that carries this order id, oldest first."""

    async def list_since(self, since: datetime) -> Sequence[Invoice]:
        """Every invoice made at or after `since` that has an order id, oldest first."""

    async def rate(self, coin: str) -> Rate:
        """USD per whole `coin` (BTC, LTC, LBTC, XMR) now."""

    def read_webhook(self, raw_body: bytes, headers: Mapping[str, str]) -> Hint | None:
        """What an authentic webhook says; None where the body makes no sense to us though it is authentic.

        Raises app.kernel.errors.InvalidSignature if it is not authentic. `headers` has lower-case names.
        """

    async def is_healthy(self) -> bool:
        """Whether the backend answers and can take payments; never raises."""

    async def close(self) -> None:
        """Give back the connections."""


@runtime_checkable
class Troubled(Protocol):
    """A backend that may work less well than it is set up to."""

    def troubles(self) -> Sequence[str]:
        """In what, as sentences for the operator; empty if in nothing."""


class Gateways:
    """The backends there are: which one makes a method's invoices, and which one made an invoice of old."""

    def __init__(
        self,
        by_method: Mapping[str, InvoiceGateway],
        *,
        health_seconds: float = 5,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`health_seconds` is how long an answer about the backends' health is good for."""
        self._by_method = dict(by_method)
        self._by_name = {gateway.name: gateway for gateway in by_method.values()}
        self._health_seconds, self._monotonic = health_seconds, monotonic
        self._health: asyncio.Task[bool] | None = None
        self._health_until = 0.0

    @property
    def methods(self) -> frozenset[str]:
        """The ids of the methods that can be paid with."""
        return frozenset(self._by_method)

    def of_method(self, method_id: str) -> InvoiceGateway:
        """Raises KeyError for a method that nobody takes."""
        return self._by_method[method_id]

    def named(self, name: str) -> InvoiceGateway | None:
        return self._by_name.get(name)

    def troubles(self) -> list[str]:
        """What works less well than it is set up to, as this process has met it."""
        return [trouble for gateway in self if isinstance(gateway, Troubled) for trouble in gateway.troubles()]

    async def are_healthy(self) -> bool:
        """Whether every backend is; never raises. However many want to know, they are asked once in some seconds."""
        if self._health is None or (self._health.done() and self._monotonic() >= self._health_until):
            self._health = asyncio.create_task(self._ask_all())
        return await asyncio.shield(self._health)

    async def _ask_all(self) -> bool:
        healthy = await asyncio.gather(*(gateway.is_healthy() for gateway in self))
        self._health_until = self._monotonic() + self._health_seconds
        return all(healthy)

    def __iter__(self) -> Iterator[InvoiceGateway]:
        return iter(self._by_name.values())
