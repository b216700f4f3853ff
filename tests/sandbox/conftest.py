"""A sandbox for each test: the application called in process, its webhooks going to a receiver that remembers."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from litestar import Litestar

from app.sandbox.btcpay import SandboxConfig, create_sandbox

STORE, KEY, SECRET = "TestStore", "test-key-0123456789", "whsec-test-0123456789"
INVOICES = f"/api/v1/stores/{STORE}/invoices"
HOOK_URL = "http://receiver.test/hook"


class Receiver:
    """The shop's side of the webhooks: keeps every request and answers as told, 200 by default."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answers: list[int | Exception] = []
        self.refuse: Callable[[httpx.Request], bool] = lambda _: False

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.refuse(request):
            return httpx.Response(500)
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]

    @property
    def types(self) -> list[str]:
        return [body["type"] for body in self.bodies]


class Shop:
    """What a test does with a sandbox: as the shop by Greenfield, as the world by the driver's routes."""

    def __init__(self, client: httpx.AsyncClient, receiver: Receiver) -> None:
        self.client = client
        self.receiver = receiver

    async def api(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"token {KEY}"}
        return await self.client.request(method, path, headers=headers, **more)

    async def create(self, method: str | None = "BTC-LN", amount: Any = "10.00", **more: Any) -> dict[str, Any]:
        checkout = {**({"paymentMethods": [method]} if method else {}), **more.pop("checkout", {})}
        body = {"amount": amount, "currency": "USD", "metadata": {"orderId": "order-1"}, "checkout": checkout, **more}
        answer = await self.api("POST", INVOICES, json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def get(self, id: str) -> dict[str, Any]:
        return dict((await self.api("GET", f"{INVOICES}/{id}")).json())

    async def methods(self, id: str) -> list[dict[str, Any]]:
        return list((await self.api("GET", f"{INVOICES}/{id}/payment-methods")).json())

    async def drive(self, id: str, act: str, **body: Any) -> dict[str, Any]:
        answer = await self.client.post(f"/sandbox/invoices/{id}/{act}", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def world(self, act: str, **body: Any) -> dict[str, Any]:
        answer = await self.client.post(f"/sandbox/{act}", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def all_told(self) -> list[str]:
        """Wait until no webhook event waits any more; returns the types received so far."""
        for _ in range(500):
            if (await self.client.get("/sandbox/")).json()["waitingEvents"] == 0:
                return self.receiver.types
            await asyncio.sleep(0.01)
        raise AssertionError(f"webhook events still wait after 5 s; received {self.receiver.types}")


Opener = Callable[..., Any]


def a_config(state: Path, **settings: Any) -> SandboxConfig:
    defaults = {
        "public_url": "http://127.0.0.1:8777", "webhook_url": HOOK_URL, "webhook_secret": SECRET, "time_scale": 0.0001,
    }  # fmt: skip
    return SandboxConfig(state_dir=state, store_id=STORE, api_key=KEY, **{**defaults, **settings})


def a_sandbox(state: Path, receiver: Receiver, **settings: Any) -> Litestar:
    return create_sandbox(a_config(state, **settings), webhook_transport=httpx.MockTransport(receiver.handle))


@asynccontextmanager
async def living(app: Litestar) -> AsyncIterator[None]:
    """Run the lifespan in a task of its own, for it must end in the task it began in and fixtures do not promise that."""
    began, may_end = asyncio.Event(), asyncio.Event()

    async def live() -> None:
        async with app.lifespan():
            began.set()
            await may_end.wait()

    life = asyncio.create_task(live())
    beginning = asyncio.create_task(began.wait())
    await asyncio.wait({life, beginning}, return_when=asyncio.FIRST_COMPLETED)
    try:
        yield
    finally:
        may_end.set()
        await life


@asynccontextmanager
async def on_a_port(state: Path, receiver: Receiver, **settings: Any) -> AsyncIterator[Shop]:
    """A sandbox that a real server serves on a real socket of its own, as WebSockets need it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = a_sandbox(state, receiver, public_url=url, **settings)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        try:
            async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
                yield Shop(client, receiver)
        finally:
            server.should_exit = True
            await serving


@pytest.fixture
async def port(tmp_path: Path, receiver: Receiver) -> AsyncIterator[Shop]:
    """A shop on a port."""
    async with on_a_port(tmp_path / "sandbox", receiver) as shop:
        yield shop


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def open_shop(tmp_path: Path, receiver: Receiver) -> Opener:
    """Open a shop on this test's state; opening it again after closing it is a restart."""

    @asynccontextmanager
    async def opened(**settings: Any) -> AsyncIterator[Shop]:
        app = a_sandbox(tmp_path / "sandbox", receiver, **settings)
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with living(app), httpx.AsyncClient(transport=transport, base_url="http://sandbox.test") as client:
            yield Shop(client, receiver)

    return opened


@pytest.fixture
async def shop(open_shop: Opener) -> AsyncIterator[Shop]:
    async with open_shop() as opened:
        assert isinstance(opened, Shop)
        yield opened
