"""Media as a customer meets them: Satmeter, the offline upstream and the gateway, each on a port, and a wire that can be cut."""

import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx

from app.gateway.app import RunningGateway, create_gateway
from app.gateway.settings import GatewaySettings
from app.gateway.studio import Studio
from app.gateway.upstreams import Upstream, Upstreams
from app.main import create_app
from app.sandbox.answers.pictures import png
from tests.client.houses import calls, eventually, open_holds, sells, serving
from tests.rig import Customer, Rig
from tests.sandbox.upstream import Upstream as Offline

PICTURE = png("a picture", 16, 16)
DATA_URL = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
ROWS = frozenset({"speech", "transcriptions", "images", "edits", "videos"})


@dataclass
class Wire:
    """The app behind a proxy that may be broken."""

    app: Any
    is_cut: bool = False
    paths: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "the house is open already, and outlives this"
        self.paths.append(scope["path"])
        if self.is_cut:
            await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, send)


@dataclass
class Media:
    """What a test does with them: as a customer over HTTP, and as who looks into the books and the upstream's log."""

    rig: Rig
    customer: Customer
    offline: Offline
    client: httpx.AsyncClient
    gateway: RunningGateway
    wire: Wire
    url: str

    @property
    def studio(self) -> Studio:
        return self.gateway.studio

    async def ask(self, path: str, body: Any = None, method: str = "POST", **more: Any) -> httpx.Response:
        return await self.client.request(method, path, json=body, **more)

    def reached(self, url: str) -> str:
        """A URL of the gateway's, at the port that it has here."""
        assert url.startswith("http://gateway/v1/media/gen_")
        return url.replace("http://gateway", self.url)

    async def charged(self, expected: int = 1) -> list[dict[str, Any]]:
        """Every charge of the books, once so many are there and no hold is open."""
        await eventually(lambda: len(calls(self.rig)) >= expected and not open_holds(self.rig))
        found = calls(self.rig)
        assert len(found) == expected
        return found

    async def nothing_charged(self) -> None:
        """No hold is open, and none was settled for more than nothing."""
        await eventually(lambda: not open_holds(self.rig))
        assert [call for call in calls(self.rig) if call["cost_nusd"]] == []
        assert await self.rig.balance(self.customer) == 10

    async def spent_usd(self) -> Decimal:
        return 10 - await self.rig.balance(self.customer)


def settings_of(folder: Path, offline_url: str, house_url: str, token: str, interval_seconds: float) -> GatewaySettings:
    offline = Upstream(
        "offline", "openai", f"{offline_url}/v1", key="sk-upstreams-own", serves=ROWS, models={}, any_model=True,
        timeout_seconds=5,
    )  # fmt: skip
    return GatewaySettings(
        "127.0.0.1", 0, "http://gateway", folder, house_url, token, Upstreams((offline,), {}),
        ask_seconds=20, films_looked_for_every_seconds=interval_seconds,
    )  # fmt: skip


@asynccontextmanager
async def media_house(
    rig: Rig, offline: Offline, folder: Path, *, customer: Customer | None = None, interval_seconds: float = 0.02
) -> AsyncIterator[Media]:
    await sells(rig)
    customer = customer or await rig.customer("10")
    token = (await rig.service())["Authorization"].removeprefix("Bearer ")
    async with AsyncExitStack() as stack:
        wire = Wire(create_app(rig.house))
        house_url = await stack.enter_async_context(serving(wire))
        gateway = create_gateway(settings_of(folder, offline.url, house_url, token, interval_seconds))
        url = await stack.enter_async_context(serving(gateway))
        headers = {"authorization": f"Bearer {customer.api_key}"}
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, headers=headers, timeout=30))
        yield Media(rig, customer, offline, client, gateway, wire, url)
        wire.is_cut = False
