"""Flat memory: streams whose callers do not read are not kept in the gateway, and each is charged once they did."""

import asyncio
import json
import socket
from typing import Any

import pytest

from tests.client.houses import serving
from tests.program import eventually, installation

pytestmark = pytest.mark.slow
SAID = [{"role": "user", "content": "x"}]
STREAMS, EVENTS, EVENT_BYTES, MOST_MIB = 200, 128, 16 * 1024, 300
UPSTREAM = """
[[upstream]]
name = "long"
kind = "openai"
base_url = "%s"
models = ["gpt-4o-mini"]
"""


class Long:
    """An upstream whose every stream is two megabytes, sent as fast as it is taken once all have begun."""

    def __init__(self) -> None:
        self.sent, self.flood = 0, asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        text = "a" * EVENT_BYTES
        event = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()
        for _ in range(EVENTS):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            self.sent += 1
            await self.flood.wait()
        usage = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":%d}}\n\n' % EVENTS
        await send({"type": "http.response.body", "body": usage + b"data: [DONE]\n\n"})


class Caller:
    """A caller on a socket, who reads when told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def asking(cls, port: int, api_key: str) -> "Caller":
        wire = socket.socket()
        wire.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 8192
        )  # before it connects: the system takes megabytes else
        wire.setblocking(False)
        await asyncio.get_running_loop().sock_connect(wire, ("127.0.0.1", port))
        caller = cls(*await asyncio.open_connection(sock=wire, limit=4096))
        body = json.dumps({"model": "gpt-4o-mini", "stream": True, "max_tokens": 1000, "messages": SAID}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-api-key: {api_key}\r\n"
        caller._writer.write(
            f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )
        return caller

    async def status(self) -> bytes:
        return await self._reader.readline()

    async def end(self) -> bytes:
        """All that is left, and the last of it."""
        last = b""
        while part := await self._reader.read(65536):
            last = (last + part)[-200:]
        self._writer.close()
        return last


async def test_callers_who_do_not_read_cost_no_memory(tmp_path: Any) -> None:
    long = Long()
    async with serving(long) as url:
        path = tmp_path / "upstreams.toml"
        path.write_text(UPSTREAM % url)
        tmp_path.chmod(0o755)
        with installation(GATEWAY_UPSTREAMS=str(path)) as program:
            await asyncio.to_thread(program.run)
            demo = await asyncio.to_thread(program.answer, "demo")
            await asyncio.to_thread(eventually, lambda: program.children("gateway"), 30)
            (gateway,) = program.children("gateway")
            port = int(demo["gateway_url"].rpartition(":")[2])
            callers = await asyncio.gather(*(Caller.asking(port, demo["api_key"]) for _ in range(STREAMS)))
            statuses = await asyncio.gather(*(caller.status() for caller in callers))
            assert set(statuses) == {b"HTTP/1.1 200 OK\r\n"}, "a burst is answered whole"
            long.flood.set()
            before = -1
            while before != long.sent:  # until nothing more is taken of any of them
                before = long.sent
                await asyncio.sleep(1)
            assert gateway.memory_info().rss < MOST_MIB * 2**20
            ends = await asyncio.gather(*(caller.end() for caller in callers))
            assert all(b"[DONE]" in end for end in ends)
            assert gateway.memory_info().rss < MOST_MIB * 2**20
            charged = "SELECT count(*) FROM usage WHERE cost_nusd = 5 * 150 + 128 * 600"
            await asyncio.to_thread(eventually, lambda: program.sql(charged)[0][0] == STREAMS, 30)
