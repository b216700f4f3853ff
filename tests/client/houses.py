"""A client's world: the real app behind a wire that can fail, and what tests ask of both."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import uvicorn

from app.client import Allowed, Answer, AnswerLost, Estimate, Meter, NotReached, Usage
from app.pricing.starter import ensure_starter
from tests.rig import Customer, Rig

MODEL = "gpt-4o-mini"
USD_PER_INPUT, USD_PER_OUTPUT = Decimal("0.15") / 10**6, Decimal("0.60") / 10**6
"""Of the starter catalogue."""
ASKED = Estimate(input_tokens=100, max_output_tokens=1000)
USED = Usage(input_tokens=100, output_tokens=50)
SENT_USD, COST_USD = 100 * USD_PER_INPUT, 100 * USD_PER_INPUT + 50 * USD_PER_OUTPUT


@dataclass
class Wire:
    """A Transport into the app of a rig. It can be cut, lose answers after they took effect, and answer something else."""

    rig: Rig
    is_cut: bool = False
    loses: int = 0
    """So many answers more are lost on their way back."""
    fails: int = 0
    """So many questions more are answered 503, and do not arrive."""
    asked: list[tuple[str, bytes]] = field(default_factory=list)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Answer:
        if self.is_cut:
            raise NotReached("cut")
        path = url.removeprefix("http://satmeter")
        self.asked.append((path, body))
        if self.fails:
            self.fails -= 1
            return Answer(503, {"retry-after": "1"}, b"{}")
        response = await self.rig.client.post(path, content=body, headers=dict(headers))
        if self.loses:
            self.loses -= 1
            raise AnswerLost("lost")
        return Answer(response.status_code, response.headers, response.content)

    async def close(self) -> None:
        """The rig's client goes on."""

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


async def sells(rig: Rig) -> None:
    await ensure_starter(rig.house.db)


async def a_meter(rig: Rig, spool: Path | None, wire: Wire | None = None, **options: Any) -> Meter:
    token = (await rig.service())["Authorization"].removeprefix("Bearer ")
    options = {"settle_seconds": 0, "capture_seconds": 0.02, "ask_seconds": 20} | options
    return Meter("http://satmeter", token, spool=spool, transport=wire or Wire(rig), **options)


async def allowed(meter: Meter, customer: Customer, estimate: Estimate = ASKED, **more: Any) -> Allowed:
    verdict = await meter.authorize(customer.api_key, model=MODEL, estimate=estimate, **more)
    assert isinstance(verdict, Allowed), verdict
    return verdict


def calls(rig: Rig) -> list[dict[str, Any]]:
    """Every charge of the books, in order."""
    with psycopg.connect(rig.database_url, row_factory=psycopg.rows.dict_row) as conn:
        return conn.execute("SELECT * FROM usage ORDER BY id").fetchall()


def open_holds(rig: Rig) -> int:
    with psycopg.connect(rig.database_url) as conn:
        found = conn.execute("SELECT count(*) FROM hold WHERE state = 'open'").fetchone()
        assert found is not None
        return int(found[0])


def holds(rig: Rig) -> dict[str, str]:
    """The state of each hold by its request_id."""
    with psycopg.connect(rig.database_url) as conn:
        return dict(conn.execute("SELECT request_id, state FROM hold").fetchall())


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """An ASGI application on a loopback port of its own; gives its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def eventually(is_true: Callable[[], object], seconds: float = 10) -> None:
    """Wait until it is; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.01)
