"""A load generator that costs little beside what it loads: wrk where it is installed, else raw sockets of our own."""

import asyncio
import itertools
import json
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Kind = Literal["pairs", "charges", "authorizes"]
CONNECTIONS: Final = 64

_LUA: Final = """
-- plain find and concatenation: what LuaJIT compiles, unlike format and match
local keys, pending, waiting, count = {}, {}, 0, 0
for line in io.lines("%(keys)s") do keys[#keys + 1] = line end
math.randomseed(%(seed)d)
local kind, prefix, random, find, sub = "%(kind)s", "%(prefix)s", math.random, string.find, string.sub
local rest = " HTTP/1.1\\r\\nHost: bench\\r\\nAuthorization: Bearer %(token)s\\r\\nContent-Type: application/json\\r\\nContent-Length: "
local settle, verb = "POST /v1/meter/settle" .. rest, "POST /v1/meter/" .. (kind == "charges" and "charge" or "authorize") .. rest
local used = '","cost_usd":0.000045,"usage":{"input_tokens":12,"output_tokens":9}}'
local asked = kind == "charges" and '","model":"m","cost_usd":0.000045}' or '","model":"m","max_cost_usd":0.0001,"ttl_seconds":86400}'
done_calls, failed = 0, 0
function request()
    if waiting > 0 then
        local body = '{"hold_id":"' .. pending[waiting] .. used
        waiting = waiting - 1
        return settle .. #body .. "\\r\\n\\r\\n" .. body
    end
    count = count + 1
    local body = '{"request_id":"' .. prefix .. count .. '","api_key":"' .. keys[random(#keys)] .. asked
    return verb .. #body .. "\\r\\n\\r\\n" .. body
end
function response(status, headers, body)
    local _, last = find(body, '"hold_id":"', 1, true)
    if status == 200 and last and kind == "pairs" then
        waiting = waiting + 1
        pending[waiting] = sub(body, last + 1, find(body, '"', last + 1, true) - 1)
    elseif status == 200 and (last or find(body, '"charge_id"', 1, true)) then done_calls = done_calls + 1
    else failed = failed + 1 end
end
local threads = {}
function setup(thread) threads[#threads + 1] = thread end
function done(summary, latency, requests)
    print(string.format('{"seconds":%%f,"calls":%%d,"failed":%%d,"p50_ms":%%f,"p99_ms":%%f}', summary.duration / 1e6,
        threads[1]:get("done_calls"), threads[1]:get("failed"), latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run did: whole pairs, charges or authorizes, and how long one request took."""

    seconds: float
    calls: int
    failed: int
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        return self.calls / self.seconds

    @classmethod
    def of(cls, seconds: float, calls: int, failed: int, took_seconds: list[float]) -> "Measured":
        """From the time that each request took, in any order."""
        took = sorted(took_seconds)
        return cls(seconds, calls, failed, took[len(took) // 2] * 1000, took[len(took) * 99 // 100] * 1000)


def client() -> str:
    """Which client will make the load."""
    return "wrk" if shutil.which("wrk") else "asyncio sockets (wrk is not installed)"


def load(
    folder: Path, port: int, token: str, keys: list[str], kind: Kind, seconds: int, connections: int = CONNECTIONS
) -> Measured:
    """Keep so many connections busy for a while, every one with one request at a time."""
    prefix = uuid.uuid4().hex[:12] + "-"
    if not shutil.which("wrk"):
        return asyncio.run(_Sockets(port, token, itertools.cycle(keys), kind, prefix, connections).run(seconds))
    (folder / "keys").write_text("\n".join(keys))
    given = {"keys": folder / "keys", "kind": kind, "token": token, "prefix": prefix, "seed": uuid.uuid4().int % 10**6}
    (folder / "load.lua").write_text(_LUA % given)
    said = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(folder / "load.lua"), f"http://127.0.0.1:{port}/"],
        capture_output=True, text=True, timeout=seconds + 30, check=True,
    ).stdout  # fmt: skip
    return Measured(**json.loads(said.splitlines()[-1]))


def warm(port: int, token: str, keys: list[str]) -> None:
    """Every key once, so that the worker knows whose it is, as it would after minutes of traffic."""
    asyncio.run(_Sockets(port, token, iter(keys), "authorizes", uuid.uuid4().hex + "-", CONNECTIONS).run(120))


class _Sockets:
    """The same load from plain asyncio streams. Costs several times what wrk does, so ratios come out lower."""

    def __init__(self, port: int, token: str, keys: Iterator[str], kind: Kind, prefix: str, connections: int) -> None:
        self._port, self._keys, self._kind, self._prefix, self._connections = port, keys, kind, prefix, connections
        self._head = f"Host: bench\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
        self._numbers = itertools.count()
        self._calls = self._failed = 0
        self._took: list[float] = []

    async def run(self, seconds: int) -> Measured:
        started = time.perf_counter()
        await asyncio.gather(*(self._connection(started + seconds) for _ in range(self._connections)))
        return Measured.of(time.perf_counter() - started, self._calls, self._failed, self._took)

    async def _connection(self, until: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        for key in self._keys:
            if time.perf_counter() >= until:
                break
            call: dict[str, object] = {
                "request_id": f"{self._prefix}{next(self._numbers)}",
                "api_key": key,
                "model": "m",
            }
            verb, cost = (
                ("charge", {"cost_usd": 0.000045})
                if self._kind == "charges"
                else ("authorize", {"max_cost_usd": 0.0001})
            )
            answer = await self._ask(reader, writer, verb, call | cost)
            if self._kind == "pairs" and "hold_id" in answer:
                answer = await self._ask(reader, writer, "settle", {"hold_id": answer["hold_id"], "cost_usd": 0.000045})
            is_done = "charge_id" in answer or (self._kind == "authorizes" and "hold_id" in answer)
            self._calls, self._failed = self._calls + is_done, self._failed + (not is_done)
        writer.close()
        await writer.wait_closed()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, verb: str, body: dict[str, object]
    ) -> dict[str, object]:
        text, started = json.dumps(body), time.perf_counter()
        writer.write(
            f"POST /v1/meter/{verb} HTTP/1.1\r\n{self._head}Content-Length: {len(text)}\r\n\r\n{text}".encode()
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        answer: dict[str, object] = json.loads(await reader.readexactly(length))
        self._took.append(time.perf_counter() - started)
        return answer
