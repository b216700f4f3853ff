"""What tests hold in their hands: a fake payment backend that behaves, and the app with short words for it."""

import asyncio
import hashlib
import hmac
import itertools
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
from httpx import AsyncClient, Response

from app.admin.tokens import create_token
from app.audit import Secrets, audit
from app.kernel.db import Database
from app.kernel.errors import AppError, InvalidSignature
from app.keys.verify import KeyOwner
from app.metering.holds import Ask, Charged, Meter, Work, hold_id_for
from app.metering.ticket import HoldTicket
from app.topups.credit import check_due
from app.topups.gateway import (
    AdditionalStatus,
    GatewayUnavailable,
    Hint,
    Invoice,
    InvoiceStatus,
    NewInvoice,
    Payment,
    PaymentStatus,
    Rate,
)
from app.topups.inbox import process_waiting
from app.wiring import House

WEBHOOK_SECRET = b"the fake backend's secret"
USD_PER_COIN = {"BTC": Decimal(65000), "LTC": Decimal(80), "LBTC": Decimal(65000), "XMR": Decimal(150)}
COIN_OF = {"btc-lightning": "BTC", "btc": "BTC", "ltc": "LTC", "lbtc": "LBTC", "xmr": "XMR"}


class FakeBtcpay:
    """An InvoiceGateway in memory. `is_down` makes every question fail; `loses_answers` acts and then fails.

    It takes `seconds` to make an invoice; `most_at_once` is how many it was making at one moment.
    """

    name = "btcpay"

    def __init__(self) -> None:
        self.invoices: dict[str, Invoice] = {}
        self.is_down = self.loses_answers = False
        self.created = self.making = self.most_at_once = 0
        self.seconds = 0.0
        self._numbers = itertools.count(1)

    async def create(self, new: NewInvoice) -> Invoice:
        self.making += 1
        self.most_at_once = max(self.most_at_once, self.making)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.making -= 1
        self._answer_or_fail()
        now = datetime.now(UTC).replace(microsecond=0)
        rate = (
            USD_PER_COIN[COIN_OF[new.method]]
            if new.currency == "USD"
            else Decimal(10**8 if new.currency == "SATS" else 1)
        )
        coins = (new.amount / rate).quantize(Decimal("1e-8"), rounding="ROUND_UP")
        invoice = Invoice(
            id=f"Inv{next(self._numbers)}{uuid.uuid4().hex[:12]}", order_id=new.order_id, currency=new.currency, amount=new.amount,
            status=InvoiceStatus.NEW, additional_status=AdditionalStatus.NONE, created_at=now,
            expires_at=now + timedelta(minutes=new.expires_in_minutes),
            watched_until=now + timedelta(minutes=new.expires_in_minutes + new.monitor_minutes),
            checkout_url="http://127.0.0.1/i/1", method=new.method, destination="lnbcrt1fake", payment_link="lightning:lnbcrt1fake",
            rate=rate, total=coins, due=coins, paid=Decimal(0), fee=Decimal(0), payments=(), order_url=new.receipt_url,
        )  # fmt: skip
        self.invoices[invoice.id] = invoice
        self.created += 1
        if self.loses_answers:
            raise GatewayUnavailable("the answer was lost")
        return invoice

    async def fetch(self, invoice_id: str) -> Invoice | None:
        self._answer_or_fail()
        return self.invoices.get(invoice_id)

    async def find(self, order_id: str) -> Sequence[Invoice]:
        self._answer_or_fail()
        return [invoice for invoice in self.invoices.values() if invoice.order_id == order_id]

    async def list_since(self, since: datetime) -> Sequence[Invoice]:
        self._answer_or_fail()
        return [invoice for invoice in self.invoices.values() if invoice.created_at >= since]

    async def rate(self, coin: str) -> Rate:
        self._answer_or_fail()
        return Rate(USD_PER_COIN[coin], "fake", datetime.now(UTC))

    def read_webhook(self, raw_body: bytes, headers: Mapping[str, str]) -> Hint | None:
        if not hmac.compare_digest(headers.get("btcpay-sig", ""), signature(raw_body)):
            raise InvalidSignature
        body = json.loads(raw_body)
        return Hint(body["originalDeliveryId"], body["type"], body.get("invoiceId"))

    async def is_healthy(self) -> bool:
        return not self.is_down

    async def close(self) -> None:
        """Nothing to give back."""

    def pay(self, invoice_id: str, *, share: Decimal = Decimal(1), settled: bool = True, late: bool = False) -> Payment:
        """Pay `share` of what the invoice asks for; states follow BTCPay's table for the simple cases."""
        invoice = self.invoices[invoice_id]
        at = invoice.expires_at + timedelta(minutes=5) if late else invoice.created_at + timedelta(seconds=1)
        status = PaymentStatus.SETTLED if settled else PaymentStatus.PROCESSING
        payment = Payment(uuid.uuid4().hex, invoice.total * share, Decimal(0), status, at, invoice.destination)
        paid = invoice.paid + payment.value
        self.invoices[invoice_id] = replace(
            invoice, payments=(*invoice.payments, payment), paid=paid, due=max(invoice.total - paid, Decimal(0)),
            **_state(invoice, paid, settled=settled, late=late),
        )  # fmt: skip
        return payment

    def change(self, invoice_id: str, **fields: Any) -> None:
        self.invoices[invoice_id] = replace(self.invoices[invoice_id], **fields)

    def _answer_or_fail(self) -> None:
        if self.is_down:
            raise GatewayUnavailable("the fake backend is down")


def _state(invoice: Invoice, paid: Decimal, *, settled: bool, late: bool) -> dict[str, Any]:
    is_full = paid >= invoice.total
    if late:
        status = InvoiceStatus.EXPIRED
        additional = AdditionalStatus.PAID_LATE if is_full else AdditionalStatus.PAID_PARTIAL
    else:
        full = InvoiceStatus.SETTLED if settled else InvoiceStatus.PROCESSING
        status = full if is_full else invoice.status
        over = AdditionalStatus.PAID_OVER if paid > invoice.total else AdditionalStatus.NONE
        additional = over if is_full else AdditionalStatus.PAID_PARTIAL
    return {"status": status, "additional_status": additional}


def signature(raw_body: bytes) -> str:
    return "sha256=" + hmac.new(WEBHOOK_SECRET, raw_body, hashlib.sha256).hexdigest()


def exact(response: Response) -> Any:
    """The body with its numbers exact."""
    return json.loads(response.text, parse_float=Decimal, parse_int=Decimal)


@dataclass(frozen=True, slots=True)
class Customer:
    """A new account and its first key."""

    credit_id: str
    api_key: str

    @property
    def owner(self) -> dict[str, str]:
        return {"x-credit-id": self.credit_id}

    @property
    def key(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}


@dataclass(slots=True)
class Rig:
    """The app over HTTP with a fake backend, and the database's owner for looking at the books."""

    client: AsyncClient
    house: House
    database_url: str
    auditor: Database | None = None
    """Whose connection audits, where it is not the house's: one that was kept knows the tables and the questions."""
    _service: dict[str, str] | None = None
    _one_token: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def btcpay(self) -> FakeBtcpay:
        gateway = self.house.gateways.named("btcpay")
        assert isinstance(gateway, FakeBtcpay)
        return gateway

    async def audit(self) -> None:
        report = await audit(self.auditor or self.house.db, Secrets.of(self.house.settings))
        assert report.is_clean, report.findings

    async def customer(self, usd: str = "0") -> Customer:
        """A new account, with `usd` paid in over btc (no bonus) if it is not 0."""
        answer = (await self.client.post("/accounts/create")).json()
        customer = Customer(answer["credit_id"], answer["api_key"])
        if Decimal(usd):
            await self.fund(customer, usd)
        return customer

    async def fund(self, customer: Customer, usd: str, method: str = "btc") -> str:
        invoice_id = await self.topup(customer, usd, method)
        self.btcpay.pay(invoice_id)
        await self.deliver(invoice_id)
        await self.process()
        return invoice_id

    async def topup(self, customer: Customer, amount: str, method: str = "btc", currency: str = "USD") -> str:
        response = await self.client.post(
            f"/topup/create/{method}", headers=customer.key, json={"amount": amount, "currency": currency}
        )
        assert response.status_code == 201, response.text
        return str(response.json()["invoice_id"])

    async def deliver(self, invoice_id: str, event: str = "InvoiceSettled", delivery_id: str | None = None) -> Response:
        body = json.dumps(
            {"originalDeliveryId": delivery_id or uuid.uuid4().hex, "type": event, "invoiceId": invoice_id}, indent=2
        ).encode()
        headers = {"BTCPay-Sig": signature(body), "Content-Type": "application/json"}
        return await self.client.post("/webhooks/btcpay", content=body, headers=headers)

    async def process(self) -> None:
        """What the jobs do: look into the inbox, and poll what is due."""
        await process_waiting(self.house.db, self.btcpay)

    async def poll(self) -> None:
        """Every open top-up becomes due, and is asked about."""
        self.sql("UPDATE topup SET next_check_at = now() WHERE next_check_at IS NOT NULL")
        await check_due(self.house.db, self.btcpay)

    async def balance(self, customer: Customer) -> Decimal:
        response = await self.client.get("/credits/balance", headers=customer.owner)
        return Decimal(exact(response)["balance"])

    async def held(self, customer: Customer) -> Decimal:
        return Decimal(exact(await self.client.get("/credits/balance", headers=customer.owner))["held"])

    async def service(self) -> dict[str, str]:
        """The headers of a proxy; however many calls are made at once, it has one token."""
        async with self._one_token:
            if self._service is None:
                token = await create_token(self.house.db, self.house.settings.pepper, "service", "proxy")
                self._service = {"Authorization": f"Bearer {token}"}
        return self._service

    async def meter(self, verb: str, **body: Any) -> Response:
        return await self.client.post(f"/v1/meter/{verb}", headers=await self.service(), json=body)

    async def authorize(self, key: str, max_cost_usd: str, request_id: str | None = None, **more: Any) -> Any:
        response = await self.meter(
            "authorize", request_id=request_id or uuid.uuid4().hex, api_key=key, max_cost_usd=max_cost_usd, **more
        )
        assert response.status_code == 200, response.text
        return exact(response)

    async def settle(self, hold_id: str, cost_usd: str, **more: Any) -> Any:
        response = await self.meter("settle", hold_id=hold_id, cost_usd=cost_usd, **more)
        assert response.status_code == 200, response.text
        return exact(response)

    async def new_key(self, customer: Customer, **wanted: Any) -> Any:
        response = await self.client.post(
            "/keys", headers=customer.owner, json={"name": uuid.uuid4().hex[:20], **wanted}
        )
        assert response.status_code == 201, response.text
        return response.json()["data"]

    def sql(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        """As the database's owner."""
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            cursor = conn.execute(statement.encode(), params)
            return cursor.fetchall() if cursor.description else []


async def reported(meter: Meter, service: str, owner: KeyOwner, ask: Ask, work: Work) -> Charged:
    """What an event does: charge a call that nothing was held for."""
    now, hold_id = datetime.now(UTC), hold_id_for(service, ask.request_id)
    ticket = HoldTicket(
        owner.account_id, owner.key_id, hold_id, ask.request_id, None, now, None, None, ask.model, ask.endpoint
    )
    [charged] = await meter.take([work.params(ticket, service, ask.fingerprint("report", owner, work))])
    if isinstance(charged, AppError):
        raise charged
    return charged
