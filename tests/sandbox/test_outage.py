"""The backend being down, as a client of a real server on a real socket sees it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from .conftest import INVOICES, KEY, Receiver, a_sandbox

HEADERS = {"Authorization": f"token {KEY}"}


@asynccontextmanager
async def served(state: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = a_sandbox(state, Receiver())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", ws="none"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=HEADERS, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        await serving


async def down(client: httpx.AsyncClient, mode: str, **more: Any) -> None:
    assert (await client.post("/sandbox/down", json={"mode": mode, **more})).status_code == 200


async def count(client: httpx.AsyncClient) -> int:
    return len((await client.get("/sandbox/invoices")).json())


async def test_refuse_cuts_the_connection_and_does_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as client:
        await down(client, "refuse")
        with pytest.raises(httpx.TransportError):
            await client.post(INVOICES, json={"amount": "5"})
        with pytest.raises(httpx.TransportError):
            await client.get("/api/v1/health")
        assert await count(client) == 0
        await down(client, "off")
        assert (await client.post(INVOICES, json={"amount": "5"})).status_code == 200


async def test_a_lost_answer_leaves_an_invoice_behind(tmp_path: Path) -> None:
    async with served(tmp_path) as client:
        await down(client, "lost", methods=["POST"])
        with pytest.raises(httpx.TransportError):
            await client.post(INVOICES, json={"amount": "5", "metadata": {"orderId": "lost"}})
        found = await client.get(INVOICES, params={"orderId": "lost"})
        assert len(found.json()) == 1


async def test_a_slow_answer_comes_after_the_deed(tmp_path: Path) -> None:
    async with served(tmp_path) as client:
        await down(client, "slow", seconds="0.3")
        began = time.monotonic()
        assert (await client.post(INVOICES, json={"amount": "5"})).status_code == 200
        assert time.monotonic() - began >= 0.3
        with pytest.raises(httpx.ReadTimeout):
            await client.post(INVOICES, json={"amount": "5"}, timeout=0.05)
        assert await count(client) == 2


async def test_errors_and_rubbish_do_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as client:
        await down(client, "error")
        answer = await client.post(INVOICES, json={"amount": "5"})
        assert (answer.status_code, answer.headers["content-type"]) == (503, "text/html")
        await down(client, "rubbish")
        answer = await client.post(INVOICES, json={"amount": "5"})
        assert answer.status_code == 200
        with pytest.raises(ValueError):
            answer.json()
        assert await count(client) == 0


async def test_the_pages_and_the_driver_stay_up(tmp_path: Path) -> None:
    async with served(tmp_path) as client:
        invoice = (await client.post(INVOICES, json={"amount": "5"})).json()
        await down(client, "error")
        assert (await client.get(f"/i/{invoice['id']}")).status_code == 200
        assert (await client.post(f"/sandbox/invoices/{invoice['id']}/pay")).json()["status"] == "Settled"
