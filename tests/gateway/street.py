"""A street: Satmeter, the offline upstream and the gateway, each served on a loopback port, and SDKs that come by."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import psycopg
from sqlalchemy.ext.asyncio import AsyncSession

from app.gateway.app import RunningGateway, create_gateway
from app.gateway.settings import GatewaySettings
from app.gateway.upstreams import SHIPPED, read_upstreams
from app.main import create_app
from app.pricing.catalogue import activate, store
from app.pricing.importer import read_prices
from app.pricing.starter import STARTER, ensure_starter
from app.sandbox.models import create_models
from tests.client.houses import serving
from tests.rig import Rig

NUSD = Decimal(10**9)


@dataclass
class Street:
    """What a test holds: the gateway's address, a key with money, and the eyes to see the books and the upstream's log."""

    rig: Rig
    gateway: RunningGateway
    url: str
    models_url: str
    api_key: str
    http: httpx.AsyncClient
    _clients: list[Any] = field(default_factory=list)

    def openai(self, **options: Any) -> Any:
        given: Any = {"base_url": f"{self.url}/v1", "api_key": self.api_key, "max_retries": 0} | options
        client = openai.AsyncOpenAI(**given)
        self._clients.append(client)
        return client

    def anthropic(self, **options: Any) -> Any:
        given: Any = {"base_url": self.url, "api_key": self.api_key, "max_retries": 0} | options
        client = anthropic.AsyncAnthropic(**given)
        self._clients.append(client)
        return client

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named = named or {"authorization": f"Bearer {self.api_key}"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.http.post(self.url + path, content=content, headers={"content-type": "application/json"} | named)  # fmt: skip

    async def order(self, order: str, **about: Any) -> None:
        """How the upstream answers the next call."""
        done = await self.http.post(f"{self.models_url}/sandbox/orders", json={"order": order} | about)
        assert done.status_code == 200, done.text

    async def log(self) -> list[dict[str, Any]]:
        """What the upstream answered, oldest first."""
        rows = (await self.http.get(f"{self.models_url}/sandbox/log")).json()["rows"]
        return [row for row in rows if row["method"] == "POST"]

    async def told(self) -> None:
        """Satmeter knows all that the gateway owes it."""
        assert await self.gateway.meter.drain(15) == 0

    async def charges(self) -> list[dict[str, Any]]:
        """Every charge of the books, in order, once all is told."""
        await self.told()
        with psycopg.connect(self.rig.database_url, row_factory=psycopg.rows.dict_row) as conn:
            return conn.execute("SELECT * FROM usage ORDER BY created_at, id").fetchall()

    async def only_charge(self) -> dict[str, Any]:
        (charge,) = await self.charges()
        return charge

    async def holds(self) -> list[str]:
        """The states of all holds, in order."""
        await self.told()
        with psycopg.connect(self.rig.database_url) as conn:
            return [state for (state,) in conn.execute("SELECT state FROM hold ORDER BY created_at").fetchall()]

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


@asynccontextmanager
async def opened(
    rig: Rig,
    folder: Path,
    *,
    usd: str = "50",
    upstreams: str | None = None,
    secret: str = "sk-upstreams-own-secret",
    **changed: Any,
) -> AsyncIterator[Street]:
    """A street with a customer; `secret` is what the variable SECRET holds. At its end no hold is open, and the books are clean."""
    await ensure_starter(rig.house.db)
    customer = await rig.customer(usd)
    token = (await rig.service())["Authorization"].removeprefix("Bearer ")
    async with AsyncExitStack() as stack:
        house_url = await stack.enter_async_context(serving(create_app(rig.house)))
        models_url = await stack.enter_async_context(serving(create_models()))
        path = SHIPPED
        if upstreams is not None:
            path = folder / "upstreams.toml"
            path.write_text(upstreams)
        served = read_upstreams(path, {"GATEWAY_MODELS_URL": f"{models_url}/v1", "SECRET": secret})
        settings = GatewaySettings("127.0.0.1", 0, "http://gateway", folder, house_url, token, served, ask_seconds=20)
        gateway = create_gateway(replace(settings, **changed))
        url = await stack.enter_async_context(serving(gateway))
        http = await stack.enter_async_context(httpx.AsyncClient(timeout=30, trust_env=False))
        street = Street(rig, gateway, url, models_url, customer.api_key, http)
        stack.push_async_callback(street.close)
        yield street
        assert "open" not in await street.holds()
        await rig.audit()


async def sold(rig: Rig, *models: dict[str, Any]) -> None:
    """Models that are sold beside those of the starter catalogue, written as in a price file; before a street is opened."""
    written = json.loads(STARTER.read_bytes())
    draft = read_prices(json.dumps(written | {"models": [*written["models"], *models]}).encode())

    async def work(session: AsyncSession) -> None:
        version_id = await store(session, draft.prices, draft.models, source="test", source_hash=draft.source_hash)
        await activate(session, version_id)

    await rig.house.db.transaction(work)


async def pieces(stream: Any) -> list[Any]:
    return [piece async for piece in stream]


async def eventually(is_true: Any, seconds: float = 10) -> None:
    """Wait until it is; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not await is_true():
            await asyncio.sleep(0.02)
