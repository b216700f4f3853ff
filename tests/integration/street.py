"""A service and its sandbox on real chains, each served on a port of its own, as `run` serves them."""

import asyncio
import contextlib
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psycopg
import uvicorn
from litestar.types import ASGIApp
from uvicorn.config import WSProtocolType

from app.adapters.btcpay import BtcpayGateway
from app.audit import audit
from app.kernel.settings import Settings, load
from app.main import create_app
from app.run import _sandbox
from app.topups.credit import check_due
from app.topups.inbox import process_waiting
from app.wiring import House, btcpay, build
from tests.integration.nodes import Litecoin, Monero, say
from tests.program import free_ports
from tests.rig import Customer, exact


@dataclass(slots=True)
class Street:
    """The service over HTTP, the sandbox's driver, the chains, and a house that does the jobs like `run`'s parent.

    `expected` is what each customer should own in the end; it is checked, with the books, when the street closes.
    """

    service: httpx.AsyncClient
    sandbox: httpx.AsyncClient
    house: House
    database_url: str
    litecoin: Litecoin
    monero: Monero
    expected: dict[Customer, Decimal] = field(default_factory=dict)

    async def customer(self) -> Customer:
        answer = (await self.service.post("/accounts/create")).json()
        customer = Customer(answer["credit_id"], answer["api_key"])
        self.expected[customer] = Decimal(0)
        return customer

    async def ask(self, customer: Customer, method: str, usd: str) -> httpx.Response:
        headers = {**customer.key, "Idempotency-Key": uuid.uuid4().hex}
        return await self.service.post(f"/topup/create/{method}", headers=headers, json={"amount": usd})

    async def topup(self, method: str, usd: str) -> "Topup":
        """A new customer's top-up, ready to be paid."""
        customer = await self.customer()
        response = await self.ask(customer, method, usd)
        assert response.status_code == 201, response.text
        made = exact(response)
        say(f"{method}: {usd} USD = {made['crypto_amount_due']:f} {made['crypto_currency']} to {made['address'][:16]}…")
        return Topup(
            self, customer, made["invoice_id"], made["address"], made["crypto_amount_due"], made["payment_uri"]
        )

    async def drive(self, path: str, **body: Any) -> Any:
        """What the sandbox's driver is told to do."""
        answer = await self.sandbox.post(f"/sandbox/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return exact(answer)

    async def look(self, *, webhooks: bool = True, poller: bool = True) -> None:
        """Every job at once, and twice, so that they race for the same payment."""
        if poller:
            self.sql("UPDATE topup SET next_check_at = now() WHERE next_check_at IS NOT NULL")
        jobs = (process_waiting,) * 2 * webhooks + (check_due,) * 2 * poller
        await asyncio.gather(*(job(self.house.db, self.gateway) for job in jobs))

    @property
    def gateway(self) -> BtcpayGateway:
        gateway = self.house.gateways.named("btcpay")
        assert isinstance(gateway, BtcpayGateway)
        return gateway

    def sql(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            cursor = conn.execute(statement.encode(), params)
            return cursor.fetchall() if cursor.description else []

    async def close_the_books(self) -> None:
        """Tell and look again and again: nobody gets more, nobody less, and the books are in order."""
        for (invoice_id,) in self.sql("SELECT invoice_id FROM topup WHERE invoice_id IS NOT NULL"):
            await self.drive(f"invoices/{invoice_id}/redeliver", times=3)
        for _ in range(3):
            await self.all_told()
            await self.look()
        for customer, usd in self.expected.items():
            answer = exact(await self.service.get("/credits/balance", headers=customer.owner))
            assert Decimal(answer["balance"]) == usd
        report = await audit(self.house.db)
        assert report.is_clean, report.findings
        say(
            f"audit clean: {report.checks} checks, {report.entries} entries; balances {list(map(str, self.expected.values()))}"
        )

    async def all_told(self) -> None:
        """Wait until the sandbox has delivered every webhook."""
        async with asyncio.timeout(15):
            while exact(await self.sandbox.get("/sandbox/"))["waitingEvents"]:
                await asyncio.sleep(0.05)


@dataclass(slots=True)
class Topup:
    """A top-up in the hands of its payer."""

    street: Street
    customer: Customer
    invoice_id: str
    address: str
    due: Decimal
    payment_uri: str
    told: str = ""

    async def status(self) -> Any:
        answer = await self.street.service.get(f"/topup/status/{self.invoice_id}", headers=self.customer.key)
        assert answer.status_code == 200, answer.text
        return exact(answer)

    async def until(
        self,
        status: str,
        additional: str = "None",
        *,
        paid: Decimal | None = None,
        webhooks: bool = True,
        poller: bool = True,
    ) -> Any:
        """Look until the customer sees this status; tells every change on the way. Returns what they see."""
        deadline = time.monotonic() + 30
        while True:
            await self.street.look(webhooks=webhooks, poller=poller)
            seen = await self.status()
            line = f"{seen['status']}/{seen['additional_status']}, paid {seen['amount_paid']:f}, credited {seen['credited_usd']:f} USD"
            if line != self.told:
                self.told = line
                say(line)
            if (seen["status"], seen["additional_status"]) == (status, additional) and paid in (
                None,
                seen["amount_paid"],
            ):
                return seen
            assert time.monotonic() < deadline, f"not {status}/{additional} within 30 s but {line}"
            await asyncio.sleep(0.2)

    async def until_credited(self, usd: str) -> None:
        """Look until this much was credited in all, and expect it to stay so."""
        self.street.expected[self.customer] = Decimal(usd)
        async with asyncio.timeout(30):
            while (await self.status())["credited_usd"] != Decimal(usd):
                await self.street.look()
                await asyncio.sleep(0.2)
        say(f"credited {usd} USD")

    async def stays(self, status: str, *payments: str) -> None:
        """Have the sandbox ask its nodes, everything told and looked into: it is as it was, and nothing is credited."""
        await self.street.drive("clock", advance_seconds=0)
        assert [payment["status"] for payment in await self.payments()] == list(payments)
        await self.street.all_told()
        await self.street.look()
        seen = await self.status()
        assert (seen["status"], seen["credited_usd"]) == (status, 0)
        say(f"still {status}, payments {', '.join(payments)}, credited 0 USD")

    async def payments(self) -> list[Any]:
        """As the sandbox keeps them, replaced ones too, in the order they were seen."""
        invoice = exact(await self.street.sandbox.get(f"/sandbox/invoices/{self.invoice_id}"))
        return list(invoice["paymentMethods"][0]["payments"])

    async def until_payments(self, *statuses: str) -> None:
        """Wait until the sandbox's payments have these statuses."""
        async with asyncio.timeout(30):
            while [payment["status"] for payment in await self.payments()] != list(statuses):
                await asyncio.sleep(0.1)
        say(f"payments: {', '.join(statuses)}")


@contextlib.asynccontextmanager
async def opened(folder: Path, database_url: str, litecoin: Litecoin, monero: Monero) -> AsyncIterator[Street]:
    """Everything served, for as long as the block runs; its books are closed at the end, unless it failed."""
    http_port, sandbox_port = free_ports(2)
    settings = load(
        {
            "DATA_DIR": str(folder), "PORT": str(http_port), "SANDBOX_PORT": str(sandbox_port), "LOG_LEVEL": "ERROR",
            "DATABASE_POOL": "8", "SANDBOX_LITECOIN_RPC": litecoin.merchant_url,
            "SANDBOX_MONERO_WALLET_RPC": monero.merchant_url,
        }
    )  # fmt: skip
    assert "p%40ss" not in repr(settings)
    service = create_app(build(settings, database_url, gateway=btcpay(settings)))
    with _served(service, http_port), _served(_sandbox(settings), sandbox_port):
        async with _on(settings, database_url, litecoin, monero) as street:
            yield street
            await street.close_the_books()


@contextlib.asynccontextmanager
async def _on(settings: Settings, database_url: str, litecoin: Litecoin, monero: Monero) -> AsyncIterator[Street]:
    house = build(settings, database_url, gateway=btcpay(settings))
    await house.db.open()
    try:
        async with (
            httpx.AsyncClient(base_url=settings.public_url, timeout=30, trust_env=False) as service,
            httpx.AsyncClient(base_url=settings.sandbox_url, timeout=30, trust_env=False) as sandbox,
        ):
            yield Street(service, sandbox, house, database_url, litecoin, monero)
    finally:
        await house.close()


@contextlib.contextmanager
def _served(app: ASGIApp, port: int, ws: WSProtocolType = "none") -> Iterator[None]:
    """An application on a loopback port, in a thread with a loop of its own."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, access_log=False, ws=ws, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name=f"port {port}")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), f"nothing could be served on port {port}"
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive(), f"port {port} is still served"


def webhook_types(street: Street, invoice_id: str) -> list[str]:
    """The types of the webhooks that the service kept for an invoice, in the order they came."""
    found = street.sql("SELECT raw_body FROM webhook_delivery WHERE invoice_id = %s ORDER BY received_at", invoice_id)
    return [json.loads(bytes(body))["type"] for (body,) in found]
