"""Told to stop, nobody is cut off: who connects is served or refused, and what was asked is answered."""

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx

from app.main import Departure, create_app
from app.serve import Connections, Limits, http_server
from app.wiring import House

ASK = b"GET /a HTTP/1.1\r\nHost: here\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with its path; /slow after a while."""
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    body = scope["path"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


class Leaving:
    """A server of ours on loopback that can be told to stop."""

    def __init__(self, drain_seconds: float) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = self.listener.getsockname()[1]
        self.connections = Connections(Limits())
        self.server = http_server(app, self.connections, lifespan="off", timeout_graceful_shutdown=20)
        self.server.drain_seconds = drain_seconds
        self.serving: asyncio.Task[None] | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def until_closed(self) -> None:
        """Until nobody can connect any more."""
        async with asyncio.timeout(20):
            while self.listener.fileno() >= 0:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def leaving(drain_seconds: float = 0) -> AsyncIterator[Leaving]:
    made = Leaving(drain_seconds)
    async with made.connections.watched():
        made.serving = asyncio.create_task(made.server.serve(sockets=[made.listener]))
        try:
            while not made.server.started:
                await asyncio.sleep(0.01)
            yield made
        finally:
            made.server.leave_at_once()
            async with asyncio.timeout(20):
                await made.serving


async def one_answer(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(20):
        return await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2)


async def test_while_it_drains_everybody_is_served_and_connections_stay() -> None:
    async with leaving(drain_seconds=600) as served:
        reader, writer = await served.connect()
        served.server.handle_exit(15, None)
        assert served.server.is_draining
        for _ in range(3):
            writer.write(ASK)
            assert b"connection: close" not in await one_answer(reader)
        late, later = await served.connect()
        later.write(ASK)
        assert (await one_answer(late)).endswith(b"/a")
        for each in (writer, later):
            each.close()


async def test_a_second_sigterm_does_not_shorten_the_draining_and_a_second_ctrl_c_does() -> None:
    async with leaving(drain_seconds=600) as served:
        for _ in range(2):
            served.server.handle_exit(15, None)
        assert served.server.drain_seconds == 600
        served.server.handle_exit(2, None)
        await served.until_closed()
        assert not served.server.force_exit


async def test_a_connection_in_use_is_answered_with_close_once_the_door_is_shut() -> None:
    async with leaving() as served:
        pairs = [await served.connect() for _ in range(20)]
        for reader, writer in pairs:
            writer.write(ASK)
            await one_answer(reader)
        served.server.handle_exit(15, None)
        await served.until_closed()
        for _, writer in pairs:
            writer.write(ASK)
        for reader, writer in pairs:
            assert b"connection: close" in await one_answer(reader)
            assert await reader.read() == b""
            writer.close()


async def test_what_is_under_way_is_answered_and_then_the_connection_ends() -> None:
    async with leaving() as served:
        reader, writer = await served.connect()
        writer.write(ASK.replace(b"/a", b"/slow"))
        await asyncio.sleep(0.05)
        served.server.handle_exit(15, None)
        async with asyncio.timeout(20):
            answer = await reader.read()
        assert b"connection: close" in answer
        assert answer.endswith(b"/slow")
        writer.close()


async def test_an_idle_connection_is_closed_soon_and_a_request_that_has_arrived_by_then_is_answered() -> None:
    async with leaving() as served:
        idle, used = await served.connect(), await served.connect()
        for reader, writer in (idle, used):
            writer.write(ASK)
            await one_answer(reader)
        served.server.handle_exit(15, None)
        await served.until_closed()
        used[1].write(ASK)  # the sweep comes before the loop has read it, and finds both overdue
        served.connections.sweep(served.connections.now + 100)
        assert b"connection: close" in await one_answer(used[0])
        async with asyncio.timeout(20):
            assert await idle[0].read() == b""
        idle[1].close()
        used[1].close()


async def test_whoever_connects_while_it_stops_is_served_or_refused() -> None:
    """Hundreds a second, each on a connection of its own, over the moment in which the door is shut."""
    ends: Counter[str] = Counter()
    async with leaving() as served:

        async def call() -> None:
            try:
                async with asyncio.timeout(20):
                    reader, writer = await served.connect()
            except ConnectionRefusedError:
                ends["refused"] += 1
                await asyncio.sleep(0.05)
                return
            try:
                writer.write(ASK)
                ends["served" if (await one_answer(reader)).endswith(b"/a") else "odd"] += 1
            except (ConnectionError, asyncio.IncompleteReadError):
                ends["lost"] += 1
            finally:
                writer.close()

        async def caller() -> None:
            while ends["refused"] < 20:
                await call()

        callers = [asyncio.create_task(caller()) for _ in range(20)]
        while ends["served"] < 200:
            await asyncio.sleep(0.01)
        served.server.handle_exit(15, None)
        await asyncio.gather(*callers)
    print(dict(ends))
    assert (ends["lost"], ends["odd"]) == (0, 0)


async def test_ready_says_draining_once_it_is_to_stop(house: House) -> None:
    departure = Departure()
    transport = httpx.ASGITransport(create_app(house, departure))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
        assert (await client.get("/health/ready")).status_code == 200
        departure.is_near = lambda: True
        told = await client.get("/health/ready")
        assert (told.status_code, told.json(), told.headers["retry-after"]) == (503, {"status": "draining"}, "1")
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.post("/accounts/create")).status_code == 201
