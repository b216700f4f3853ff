"""What a connection may take of us: bytes, seconds and places; and that it takes nothing from others."""

import asyncio
import contextlib
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from app.kernel import logs
from app.serve import Connections, Limits, http_server

HEAD = b"GET /a HTTP/1.1\r\nHost: here\r\n"
POST = b"POST /body HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n"
CHUNKED = b"POST /body HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
MUCH = 48 * 1024 * 1024
LIMITS = Limits(connections=64, per_address=1000)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with its path; /body when the body is whole; /slow never; /large with much; /named with its headers."""
    if scope["type"] != "http":
        return
    if scope["path"] in ("/body", "/slow", "/named"):
        while (message := await receive()).get("more_body"):
            pass
        if message["type"] == "http.disconnect":
            return
    if scope["path"] == "/slow":
        await asyncio.sleep(30)
    names = b",".join(name for name, _ in scope["headers"])
    body = {"/large": b"x" * MUCH, "/named": names}.get(scope["path"], scope["path"].encode())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Served:
    """A server of ours on loopback, whose clock is moved by the test."""

    connections: Connections
    server: Any
    port: int
    callers: list["Caller"]

    async def connect(self, sent: bytes = b"", host: str = "127.0.0.1") -> "Caller":
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(host, 0))
        caller = Caller(reader, writer)
        caller.send(sent)
        self.callers.append(caller)
        return caller

    async def later(self, seconds: int) -> None:
        await asyncio.sleep(0.05)  # what was sent has arrived
        self.connections.sweep(self.connections.now + seconds)
        await asyncio.sleep(0.05)

    async def is_served(self, host: str = "127.0.0.1") -> float:
        """Asked on a new connection; how many seconds the answer took."""
        began = time.monotonic()
        caller = await self.connect(HEAD + b"Connection: close\r\n\r\n", host)
        assert (await caller.answer()).endswith(b"/a")
        return time.monotonic() - began


@dataclass
class Caller:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> bytes:
        """All that it was told, once the connection is closed."""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read()
        return b""

    async def one(self) -> bytes:
        """One answer, with a short body."""
        async with asyncio.timeout(10):
            return await self.reader.readuntil(b"\r\n\r\n") + await self.reader.read(1000)

    async def is_open(self) -> bool:
        try:
            async with asyncio.timeout(0.05):
                return await self.reader.read(1) != b""
        except TimeoutError:
            return True
        except ConnectionError:
            return False

    def close(self) -> None:
        self.writer.close()


@contextlib.asynccontextmanager
async def serving(limits: Limits, app: Any = app) -> AsyncIterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    connections = Connections(limits, now=1000)
    server = http_server(app, connections, lifespan="off", timeout_graceful_shutdown=1)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    callers: list[Caller] = []
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield Served(connections, server, listener.getsockname()[1], callers)
    finally:
        for caller in callers:
            caller.close()
        server.should_exit = True
        await task


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(LIMITS) as made:
        yield made


def refusal(answer: bytes) -> tuple[int, str]:
    """Status and code of an answer in the one form that every refusal has."""
    head, _, body = answer.partition(b"\r\n\r\n")
    told = json.loads(body)
    status = int(head.split()[1])
    assert told["statusCode"] == status
    assert told["message"] == told["error"]["message"]
    assert b"connection: close" in head
    assert b"x-request-id: " in head
    assert body.endswith(b"}\n")
    assert b"content-length: %d\r\n" % len(body) in head + b"\r\n"
    return status, told["error"]["code"]


def rss() -> int:
    return int(psutil.Process().memory_info().rss)


# --- bytes ------------------------------------------------------------------------------------------


def lines() -> bytes:
    return b"".join(b"a%d: %s\r\n" % (number, b"x" * 1000) for number in range(60))


ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "header lines": (HEAD, lines()),
    "short header lines": (HEAD, b"a:\r\n" * 10_000),
    "one header": (HEAD + b"a: ", b"x" * 60_000),
    "one name": (HEAD, b"x" * 60_000),
    "the address": (b"GET /", b"x" * 60_000),
    "trailers": (CHUNKED, lines()),
    "one trailer": (CHUNKED + b"a: ", b"x" * 60_000),
    "an extension of a chunk": (CHUNKED[:-3] + b"1;a=", b"x" * 60_000),
}


@pytest.mark.parametrize("of", ENDLESS)
async def test_what_does_not_end_is_431_and_takes_no_memory_and_no_time_of_others(of: str, served: Served) -> None:
    begin, more = ENDLESS[of]
    before = rss()
    caller = await served.connect(begin)
    told, sent = asyncio.create_task(caller.reader.read(4096)), 0
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20):
            while sent < MUCH and not told.done():
                caller.send(more)
                sent += len(more)
                await caller.writer.drain()
                await asyncio.sleep(0)
    grown, waited = rss() - before, await served.is_served()
    assert refusal(await told) == (431, "head_too_large")
    assert sent < 8 * 1024 * 1024
    assert grown < 16 * 1024 * 1024
    assert waited < 1
    caller.close()
    await served.later(5)
    assert not served.connections._all


@pytest.mark.parametrize("count", [201, 5_000])
async def test_more_header_lines_than_anybody_needs_are_431_though_they_are_short(count: int, served: Served) -> None:
    caller = await served.connect(HEAD + b"a:b\r\n" * count + b"\r\n")
    assert refusal(await caller.answer()) == (431, "head_too_large")


async def test_a_large_head_within_the_bound_is_read_and_so_are_those_after_it(served: Served) -> None:
    caller = await served.connect(HEAD + b"a: " + b"x" * 60_000 + b"\r\n\r\n")
    assert (await caller.one()).endswith(b"/a")
    for _ in range(3):
        caller.send(POST + b"x" * 1000)
        assert (await caller.one()).endswith(b"/body")


async def test_a_large_body_is_no_head(served: Served) -> None:
    size = 5 * 1024 * 1024
    caller = await served.connect(b"POST /body HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
    assert (await caller.one()).endswith(b"/body")
    caller.send(CHUNKED + b"a: b\r\n\r\n" + HEAD + b"\r\n")
    assert b"/body" in await caller.one()


async def test_a_trailer_does_not_become_a_header(served: Served) -> None:
    caller = await served.connect(CHUNKED.replace(b"/body", b"/named") + b"x-credit-id: me\r\n\r\n")
    assert (await caller.one()).endswith(b"host,transfer-encoding")


async def test_requests_sent_ahead_without_end_are_refused_and_take_no_memory(served: Served) -> None:
    before = rss()
    callers = [await served.connect((HEAD + b"\r\n") * 20_000) for _ in range(10)]
    await asyncio.gather(*(caller.answer() for caller in callers))
    assert rss() - before < 32 * 1024 * 1024
    few = await served.connect((HEAD + b"\r\n") * 9 + HEAD + b"Connection: close\r\n\r\n")
    assert (await few.answer()).count(b"200 OK") == 10


async def test_who_does_not_read_the_answer_is_not_waited_for(served: Served) -> None:
    await served.connect(HEAD.replace(b"/a", b"/large") + b"\r\n")
    await served.later(1)
    await served.later(LIMITS.write_seconds + 1)
    assert not served.connections._all


# --- seconds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "after", "status"),
    [
        (b"", LIMITS.head_seconds, None),
        (b"\r\n\r\n", LIMITS.head_seconds, 408),
        (HEAD, LIMITS.head_seconds, 408),
        (HEAD + b"\r\n" + HEAD, LIMITS.head_seconds, 200),
        (POST, LIMITS.body_seconds, 408),
        (POST + b"half", LIMITS.body_seconds, 408),
        (CHUNKED, LIMITS.body_seconds, 408),
        (HEAD + b"\r\n", LIMITS.idle_seconds, 200),
    ],
)  # fmt: skip
async def test_who_keeps_us_waiting_is_waited_for_so_long(
    sent: bytes, after: int, status: int | None, served: Served
) -> None:
    caller = await served.connect(sent)
    await served.later(after)
    assert len(served.connections._all) == 1
    assert await served.is_served() < 1
    await served.later(1)
    told = await caller.answer()
    assert (int(told.split()[1]) if told else None) == status
    assert not served.connections._all


@pytest.mark.parametrize("trickle", [HEAD, POST])
async def test_a_trickle_does_not_buy_time(trickle: bytes, served: Served) -> None:
    caller = await served.connect(trickle)
    told = asyncio.create_task(caller.reader.read(4096))
    for _ in range(40):
        caller.send(b"x" if trickle is POST else b"a: b\r\n")
        await asyncio.sleep(0.01)
        served.connections.sweep(served.connections.now + 1)
    assert refusal(await told) == (408, "request_timeout")


async def test_an_answer_that_takes_long_is_not_cut_off(served: Served) -> None:
    caller = await served.connect(HEAD.replace(b"/a", b"/slow") + b"\r\n")
    await served.later(10_000)
    assert await caller.is_open()


async def test_stopping_does_not_wait_for_silent_or_slow_callers() -> None:
    async with serving(replace(LIMITS, per_address=64)) as served, served.connections.watched():
        callers = [await served.connect(sent) for sent in (b"", HEAD, POST, POST + b"x", HEAD + b"\r\n") * 5]
        await asyncio.sleep(0.1)
        served.server.config.timeout_graceful_shutdown = 20
        began = time.monotonic()
        served.server.should_exit = True
        for caller in callers:
            await caller.answer()
        while served.server.server_state.connections:
            await asyncio.sleep(0.01)
        assert time.monotonic() - began < 4


# --- places -----------------------------------------------------------------------------------------


async def test_1100_silent_connections_keep_nobody_out(served: Served) -> None:
    for _ in range(1100):
        await served.connect()
    for _ in range(20):
        assert await served.is_served() < 1
    assert len(served.connections._all) <= LIMITS.connections


async def test_one_address_gets_its_share_and_the_others_keep_theirs() -> None:
    async with serving(replace(LIMITS, per_address=8)) as served:
        crowd = [await served.connect(HEAD.replace(b"/a", b"/slow") + b"\r\n", "127.0.0.2") for _ in range(8)]
        await asyncio.sleep(0.1)
        refused = await served.connect(HEAD + b"\r\n", "127.0.0.2")
        answer = await refused.answer()
        assert refusal(answer) == (503, "too_many_connections")
        assert b"retry-after: 1" in answer
        assert await served.is_served("127.0.0.3") < 1
        assert all([await caller.is_open() for caller in crowd])
        for caller in crowd:
            caller.close()
        await asyncio.sleep(0.1)
        assert await served.is_served("127.0.0.2") < 1


async def test_an_address_that_is_full_of_silence_makes_room_for_itself_only() -> None:
    async with serving(replace(LIMITS, per_address=8)) as served:
        other = await served.connect(HEAD + b"\r\n", "127.0.0.3")
        await other.one()
        for _ in range(30):
            await served.connect(b"", "127.0.0.2")
        assert await served.is_served("127.0.0.2") < 1
        assert await other.is_open()


async def test_places_are_kept_for_the_operators_proxy_when_all_others_are_taken() -> None:
    limits = replace(LIMITS, per_address=1000, kept_for=(ip_network("127.0.0.8/29"),))
    async with serving(limits) as served:
        kept = await served.connect(HEAD + b"\r\n", "127.0.0.9")
        await kept.one()
        for _ in range(80):
            await served.connect(HEAD.replace(b"/a", b"/slow") + b"\r\n")
        await asyncio.sleep(0.2)
        refused = await served.connect(HEAD + b"\r\n")
        assert refusal(await refused.answer()) == (503, "too_many_connections")
        for host in ("127.0.0.9", "127.0.0.10"):
            assert await served.is_served(host) < 1
        assert await kept.is_open()


async def test_a_proxy_is_not_counted_by_address() -> None:
    async with serving(replace(LIMITS, per_address=2, kept_for=(ip_network("127.0.0.9/32"),))) as served:
        for _ in range(20):
            await served.connect(HEAD.replace(b"/a", b"/slow") + b"\r\n", "127.0.0.9")
        assert await served.is_served("127.0.0.9") < 1


async def test_what_was_ended_is_told_in_metrics_and_log(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO")
    registry = CollectorRegistry()
    registry.register(served.connections)
    await served.connect(HEAD)
    await served.connect(POST)
    await served.later(100)
    told = generate_latest(registry).decode()
    assert 'satmeter_connections_ended_total{reason="head"} 1.0' in told
    assert 'satmeter_connections_ended_total{reason="body"} 1.0' in told
    assert "satmeter_connections 0.0" in told
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told_of = {(one["code"], one["count"]) for one in events if one["event"] == "connections.ended"}
    assert told_of == {("head", 1), ("body", 1)}


@pytest.mark.parametrize(
    ("descriptors", "places", "of_one"), [(1024, 832, 416), (256, 64, 32), (1 << 20, 10_000, 1_000)]
)
def test_there_are_no_more_places_than_descriptors(descriptors: int, places: int, of_one: int) -> None:
    limits = Limits().within(descriptors)
    assert (limits.connections, limits.per_address) == (places, of_one)


def test_the_descriptor_limit_is_raised_to_what_is_allowed() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = subprocess.run(
        [sys.executable, "-c", "import app.serve, resource as r\nprint(app.serve.raise_descriptor_limit(), r.getrlimit(r.RLIMIT_NOFILE))"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, min(hard, 4096))),
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    most = min(hard, 4096)
    assert said.split() == [str(most), f"({most},", f"{most})"]
