"""An answer leaves in one write, whole and in order, whatever a client asks of the connection."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from litestar.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app.serve import Connection, Connections, Limits


class Wire(asyncio.Transport):
    """A transport to nobody, which remembers each write."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.writes: list[bytes] = []
        self.is_closed = False

    def write(self, data: Any) -> None:
        assert not self.is_closed
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Says its path; /stream in three pieces, each in a turn of its own."""
    pieces = [b"one", b"two", b"three"] if scope["path"] == "/stream" else [scope["path"].encode()]
    await receive()
    length = b"%d" % sum(map(len, pieces))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    for left, piece in zip(range(len(pieces) - 1, -1, -1), pieces, strict=True):
        await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
        await asyncio.sleep(0.01 if left else 0)


@pytest.fixture
async def wire() -> Wire:
    return Wire()


@pytest.fixture
async def protocol(wire: Wire) -> AsyncIterator[Connection]:
    config = uvicorn.Config(answer, log_config=None, server_header=False, date_header=False)
    config.load()
    made = Connection(Connections(Limits()), config=config, server_state=ServerState(), app_state={})
    made.connection_made(wire)
    yield made
    made.connection_lost(None)


def request(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: here", *headers, "", ""]).encode()


async def turns() -> None:
    await asyncio.sleep(0.05)


async def test_head_and_body_leave_together(protocol: Connection, wire: Wire) -> None:
    protocol.data_received(request("/a"))
    await turns()
    assert wire.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n/a"]


async def test_a_connection_that_the_client_ends_gets_its_answer_first(protocol: Connection, wire: Wire) -> None:
    protocol.data_received(request("/a", "Connection: close"))
    await turns()
    assert [line[-2:] for line in wire.writes] == [b"/a"]
    assert wire.is_closed


async def test_requests_sent_at_once_are_answered_in_their_order(protocol: Connection, wire: Wire) -> None:
    protocol.data_received(request("/a") + request("/b") + request("/c"))
    await turns()
    assert [part[:2] for part in b"".join(wire.writes).split(b"\r\n\r\n")[1:]] == [b"/a", b"/b", b"/c"]


async def test_a_stream_is_not_held_back_until_its_end(protocol: Connection, wire: Wire) -> None:
    protocol.data_received(request("/stream"))
    await turns()
    assert len(wire.writes) == 3
    assert wire.writes[0].endswith(b"\r\n\r\none")
    assert wire.writes[1:] == [b"two", b"three"]


async def test_what_is_no_http_is_refused_and_the_connection_ends(protocol: Connection, wire: Wire) -> None:
    protocol.data_received(b"no http at all\r\n\r\n")
    await turns()
    assert len(wire.writes) == 1
    head, _, body = wire.writes[0].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "malformed_request"
    assert wire.is_closed


async def test_an_answer_to_a_connection_that_ended_in_the_same_turn_is_let_go(
    protocol: Connection, wire: Wire
) -> None:
    protocol.data_received(request("/a"))
    wire.is_closed = True  # as the loop does when the peer resets; a write would raise
    protocol.transport.write(b"too late")
    await turns()
    assert wire.writes == []
