"""A service with the real NIP-47 client, a sandbox on a port of its own, and its wallet: on its own relay or on another.

The jobs run in the background, in a loop for each process that the service is played by; time can be moved on, for
the service and the sandbox alike. When the street closes, the books and the sandbox must agree on every cent.
"""

import asyncio
import contextlib
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
import uvicorn
from litestar import Litestar

from app.admin.tokens import create_token
from app.audit import audit
from app.autotopup.run import AutoTopup
from app.autotopup.wallet import Wallets
from app.autotopup.watch import Watcher
from app.jobs import for_each_gateway
from app.kernel.settings import Settings, load
from app.main import create_app
from app.sandbox.btcpay import SandboxConfig, create_sandbox
from app.topups.credit import check_due
from app.topups.inbox import process_waiting
from app.topups.receipt import receipt_url
from app.wiring import House, build
from tests.rig import Customer, exact

SERVICE_URL = "http://service.test"
TOPUP_USD = Decimal(10)
CREDITED_USD = Decimal("10.5")
"""What a top-up by Lightning is worth: the bonus is 5 %."""


class Clock:
    """The machine's time and what it was moved on by."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@dataclass
class Street:
    """What a test holds in its hands."""

    service: httpx.AsyncClient
    sandbox: httpx.AsyncClient
    houses: list[House]
    clock: Clock
    database_url: str
    token: str
    spent_usd: Decimal = Decimal(0)
    rounds: list[int] = field(default_factory=list)
    """How many rounds of the clock's jobs each house has completed."""
    _known: dict[str, Any] = field(default_factory=dict)

    # --- the customer ---

    async def customer(self) -> Customer:
        """A new account with $5.25, a little more than its threshold."""
        made = (await self.service.post("/accounts/create")).json()
        customer = Customer(made["credit_id"], made["api_key"])
        topup = await self.service.post(
            "/topup/create/btc-lightning", headers=customer.key, json={"amount": "5", "currency": "USD"}
        )
        assert topup.status_code == 201, topup.text
        await self.drive(f"invoices/{topup.json()['invoice_id']}/pay")
        await self.until(lambda: self.balance(customer), Decimal("5.25"))
        return customer

    async def connect(self, customer: Customer, **more: Any) -> Any:
        body = {"nwc_url": (await self.wallet())["uri"], "threshold_usd": 5, "topup_amount_usd": int(TOPUP_USD), **more}
        answer = await self.service.post("/nwc-auto-topup/connect", headers=customer.owner, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    async def connected(self, **orders: Any) -> Customer:
        """A customer whose wallet is connected, and then told how to behave."""
        customer = await self.customer()
        await self.connect(customer)
        await self.wallet(**orders)
        return customer

    async def spend(self, customer: Customer, usd: str = "0.5") -> None:
        body = {"request_id": uuid.uuid4().hex, "api_key": customer.api_key, "model": "a/model", "cost_usd": usd}
        answer = await self.service.post(
            "/v1/meter/charge", headers={"Authorization": f"Bearer {self.token}"}, json=body
        )
        assert answer.json()["decision"] == "allow", answer.text
        self.spent_usd += Decimal(usd)

    async def balance(self, customer: Customer) -> Decimal:
        return Decimal(exact(await self.service.get("/credits/balance", headers=customer.owner))["balance"])

    async def connection(self, customer: Customer) -> Any:
        return (await self.service.get("/nwc-auto-topup", headers=customer.owner)).json()["data"]

    async def attempts(self, customer: Customer) -> list[Any]:
        """Newest first."""
        return list((await self.service.get("/nwc-auto-topup/attempts", headers=customer.owner)).json()["data"])

    async def state(self, customer: Customer) -> str | None:
        """The newest attempt's."""
        attempts = await self.attempts(customer)
        return attempts[0]["state"] if attempts else None

    # --- the world ---

    async def wallet(self, **orders: Any) -> Any:
        """The sandbox's wallet as it is, after it was told so."""
        answer = await (
            self.sandbox.post("/sandbox/wallet", json=orders) if orders else self.sandbox.get("/sandbox/wallet")
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def drive(self, path: str, **body: Any) -> Any:
        answer = await self.sandbox.post(f"/sandbox/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def later(self, **duration: float) -> None:
        """Let time pass for everybody."""
        self.clock.ahead += timedelta(**duration)
        await self.drive("clock", advance_seconds=int(timedelta(**duration).total_seconds()))

    async def settled_down(self, rounds: int = 2) -> None:
        """Wait until every house's jobs have run that often since now, and what they began is done."""
        wanted = [done + rounds + 1 for done in self.rounds]  # the one that is going may have begun before

        async def has_come() -> bool:
            return all(done >= least for done, least in zip(self.rounds, wanted, strict=True))

        await self.until(has_come, True)
        for house in self.houses:
            await house.watcher.idle()

    async def invoices(self) -> list[Any]:
        """What auto top-ups asked for, newest first; the customer's own first one is left out."""
        return list((await self.sandbox.get("/sandbox/invoices")).json())[:-1]

    async def asked_to_pay(self) -> int:
        """How many different requests to pay the wallet heard."""
        return sum(request["method"] == "pay_invoice" for request in (await self.wallet())["requests"])

    async def until(self, asked: Callable[[], Any], wanted: Any, seconds: float = 30) -> None:
        """Wait until it is so."""
        deadline = time.monotonic() + seconds
        while (found := await asked()) != wanted:
            assert time.monotonic() < deadline, f"{found} after {seconds} s, not {wanted}; {self.rows()}"
            await asyncio.sleep(0.05)

    async def until_state(self, customer: Customer, *states: str) -> None:
        async def is_one() -> bool:
            return await self.state(customer) in states

        await self.until(is_one, True)

    def rows(self) -> list[tuple[Any, ...]]:
        return self.sql(
            "SELECT state, code, reason, sends, next_at, claimed_until FROM nwc_attempt ORDER BY created_at"
        )

    def sql(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            cursor = conn.execute(statement.encode(), params)
            return cursor.fetchall() if cursor.description else []

    # --- the end ---

    async def check(self) -> None:
        """Nothing was paid twice, everything that settled was credited once, and the books add up."""
        report = await audit(self.houses[0].db)
        assert report.is_clean, report.findings
        everything = (await self.sandbox.get("/sandbox/invoices")).json()
        for invoice in everything:
            paid = [payment for method in invoice["paymentMethods"] for payment in method["payments"]]
            assert len(paid) <= 1, invoice
        settled_usd = sum(Decimal(each["amount"]) for each in everything if each["status"] == "Settled")
        [(balance_nusd,)] = self.sql("SELECT sum(posted_nusd) FROM account")
        assert Decimal(balance_nusd) / 10**9 == settled_usd * Decimal("1.05") - self.spent_usd


Made = Callable[[Settings], Wallets]


@contextlib.asynccontextmanager
async def opened(state: Path, database_url: str, wallets: Made, processes: int = 1) -> AsyncIterator[Street]:
    """A street with so many processes of the service, which share nothing but the database and the world."""
    clock = Clock()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        environ = {"DATA_DIR": str(state), "SANDBOX_PORT": str(port), "LOG_LEVEL": "ERROR", "DATABASE_POOL": "10"}
        settings = load(environ)
        houses = [_house(settings, database_url, wallets, clock) for _ in range(processes)]
        for house in houses:
            await house.db.open()
        app = httpx.ASGITransport(create_app(houses[0]), raise_app_exceptions=False)  # type: ignore[arg-type]
        token = await create_token(houses[0].db, settings.pepper, "service", "proxy")
        async with (
            _served(_sandbox(settings, app), listener),
            httpx.AsyncClient(transport=app, base_url=SERVICE_URL) as service,
            httpx.AsyncClient(base_url=settings.sandbox_url, trust_env=False, timeout=30) as sandbox,
        ):
            street = Street(service, sandbox, houses, clock, database_url, token)
            async with _jobs(street):
                yield street
            await street.check()
        for house in houses:
            await house.close()


def _house(settings: Settings, database_url: str, wallets: Made, clock: Clock) -> House:
    """A process' parts, with a clock that can be moved."""
    house = build(settings, database_url, wallets=wallets(settings))
    autotopup = AutoTopup(
        house.db, house.gateways, house.wallets, settings.sealer, network=settings.lightning_network, is_on=True,
        clock=clock, receipts=partial(receipt_url, settings),
    )  # fmt: skip
    house = replace(house, autotopup=autotopup, watcher=Watcher(autotopup))
    house.meter.on_low = house.watcher.notice
    return house


def _sandbox(settings: Settings, service: httpx.AsyncBaseTransport) -> Litestar:
    config = SandboxConfig(
        state_dir=settings.data_dir / "sandbox",
        public_url=settings.sandbox_url,
        store_id=settings.btcpay_store_id,
        api_key=settings.btcpay_api_key,
        webhook_url=f"{SERVICE_URL}/webhooks/btcpay",
        webhook_secret=settings.btcpay_webhook_secret,
        time_scale=0.01,
    )
    return create_sandbox(config, webhook_transport=service)


@contextlib.asynccontextmanager
async def _served(app: Litestar, listener: socket.socket) -> AsyncIterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def _jobs(street: Street) -> AsyncIterator[None]:
    """What the clock does, oftener: in tests nobody wants to wait."""

    street.rounds = [0] * len(street.houses)

    async def work(number: int, house: House) -> None:
        while True:
            await for_each_gateway(house, process_waiting)
            await for_each_gateway(house, check_due)
            await house.watcher.look_for_low()
            await house.watcher.look_for_due()
            street.rounds[number] += 1
            await asyncio.sleep(0.1)

    tasks = [asyncio.create_task(work(number, house)) for number, house in enumerate(street.houses)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        defects = [each for each in done if isinstance(each, Exception)]
        assert defects == []
