"""The offline upstream on a port of its own, as tests meet it: over a real socket, by uvicorn."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from app.sandbox.models import create_models


class Upstream:
    """Where it listens, and its driver."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url, self.client = url, client

    async def log(self, after: int = 0) -> list[dict[str, Any]]:
        """What was answered, oldest first, once all of it has ended."""
        rows: list[dict[str, Any]] = []
        for _ in range(200):
            rows = (await self.client.get(f"/sandbox/log?after={after}")).json()["rows"]
            if all("ended_at" in row for row in rows):
                return rows
            await asyncio.sleep(0.01)
        raise AssertionError(f"calls that never ended: {rows}")

    async def order(self, order: str, **of: Any) -> None:
        answer = await self.client.post("/sandbox/orders", json={"order": order, **of})
        assert answer.status_code == 200, answer.text


@asynccontextmanager
async def running_upstream(state_dir: Path | None = None) -> AsyncIterator[Upstream]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    config = uvicorn.Config(create_models(state_dir), log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, headers={"authorization": "Bearer sk-test"}, timeout=10) as client:
            yield Upstream(url, client)
    finally:
        server.should_exit = True
        server.force_exit = True
        await serving
        listener.close()
