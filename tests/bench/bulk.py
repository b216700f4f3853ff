"""The routes that take many calls at a time, and calls of one connection alone: loads that wrk cannot make."""

import asyncio
import hashlib
import itertools
import json
import socket
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Final

from tests.bench.load import Measured

ITEMS: Final = 500
"""As many as one request may have."""
_BATCHES: Final = 80
CONNECTIONS: Final = 4
_USED: Final = '"cost_usd":0.000045,"usage":{"input_tokens":12,"output_tokens":9}'
_SOLD: Final = "gpt-4o-mini"
"""A model that the starter catalogue has; "m" is nobody's."""


def _used(number: int, *, is_priced: bool) -> str:
    """With its cost, or for the catalogue to price, each call another usage."""
    tokens = f'"input_tokens":{1000 + number % 997},"output_tokens":{100 + number % 401},"cache_read_tokens":{1 + number % 503}'
    return f'"usage":{{{tokens}}}' if is_priced else _USED


def settles(port: int, token: str, keys: list[str], *, is_priced: bool = False) -> Callable[[], Measured]:
    """Makes holds, and settles them in batches when it is called. Counts items."""
    most = (
        f'"model":"{_SOLD}","estimate":{{"input_tokens":2000,"max_output_tokens":500}}'
        if is_priced
        else '"model":"m","max_cost_usd":0.0001'
    )
    held = asyncio.run(_held(port, token, keys, ITEMS * _BATCHES, most))
    items = [f'{{"hold_id":"{hold_id}",{_used(number, is_priced=is_priced)}}}' for number, hold_id in enumerate(held)]
    bodies = [f'{{"settles":[{",".join(some)}]}}'.encode() for some in _portions(items)]
    return lambda: asyncio.run(_sent(port, token, "/v1/meter/settle/batch", bodies))


def events(port: int, token: str, keys: list[str], *, is_priced: bool = False) -> Callable[[], Measured]:
    """Usage of keys that nothing was held for, as CloudEvents, sent when it is called. Counts items."""
    model = _SOLD if is_priced else "m"
    hashes, run = [hashlib.sha256(key.encode()).hexdigest() for key in keys[: ITEMS * _BATCHES]], uuid.uuid4().hex
    items = [
        f'{{"specversion":"1.0","id":"{number}","source":"bench/{run}","type":"call","subject":"{hashes[number % len(hashes)]}",'
        f'"data":{{"model":"{model}",{_used(number, is_priced=is_priced)}}}}}'
        for number in range(ITEMS * _BATCHES)
    ]
    bodies = [f"[{','.join(some)}]".encode() for some in _portions(items)]
    return lambda: asyncio.run(_sent(port, token, "/v1/meter/events", bodies))


def _portions(items: list[str]) -> Iterable[list[str]]:
    return (items[start : start + ITEMS] for start in range(0, len(items), ITEMS))


async def _held(port: int, token: str, keys: list[str], count: int, most: str) -> list[str]:
    """So many holds, made over 64 connections, each of what it is told to cost at `most`."""
    prefix, numbers, held = uuid.uuid4().hex, iter(range(count)), list[str]()

    async def connection() -> None:
        async with _Connection(port, token) as asked:
            for number in numbers:
                body = f'{{"request_id":"{prefix}-{number}","api_key":"{keys[number % len(keys)]}","ttl_seconds":86400,{most}}}'
                answer = json.loads(await asked.post("/v1/meter/authorize", body.encode()))
                held.append(answer["hold_id"])

    await asyncio.gather(*(connection() for _ in range(64)))
    return held


async def _sent(port: int, token: str, path: str, bodies: list[bytes]) -> Measured:
    """All of them, over four connections; no item may be refused."""
    waiting, took, refused = iter(bodies), list[float](), 0

    async def connection() -> None:
        nonlocal refused
        async with _Connection(port, token) as asked:
            for body in waiting:
                began = time.perf_counter()
                answer = await asked.post(path, body)
                took.append(time.perf_counter() - began)
                refused += ITEMS if not answer.rstrip().endswith(f'"charged":{ITEMS},"refused":0}}'.encode()) else 0

    started = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
    return Measured.of(time.perf_counter() - started, len(bodies) * ITEMS, refused, took)


class _Connection:
    """A connection that is kept, for one request at a time."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._head = f"Host: bench\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"

    async def __aenter__(self) -> "_Connection":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def post(self, path: str, body: bytes) -> bytes:
        self._writer.write(f"POST {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return await self._reader.readexactly(_length(await self._reader.readuntil(b"\r\n\r\n")))


# --- a call alone -------------------------------------------------------------------------------------


def alone(port: int, token: str, keys: list[str], seconds: float) -> dict[str, Measured]:
    """authorize, settle and charge in turn on one connection: what a call takes when there is no other, by verb."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        return _Alone(line, token).run(keys, seconds)


class _Alone:
    """Sends and waits, with as little of the client's own time between as there can be."""

    def __init__(self, line: socket.socket, token: str) -> None:
        self._line, self._prefix = line, uuid.uuid4().hex
        self._head = f"Host: bench\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
        self._took: dict[str, list[float]] = defaultdict(list)
        self._failed: Counter[str] = Counter()

    def run(self, keys: list[str], seconds: float) -> dict[str, Measured]:
        until, numbers = time.perf_counter() + seconds, itertools.count()
        while time.perf_counter() < until:
            number = next(numbers)
            of = f'{{"request_id":"{self._prefix}-%s{number}","api_key":"{keys[number % len(keys)]}","model":"m",'
            held = self._ask("authorize", of % "a" + '"max_cost_usd":0.0001}')
            self._ask("settle", f'{{"hold_id":"{held.get("hold_id")}",{_USED}}}')
            self._ask("charge", of % "c" + '"cost_usd":0.000045}')
        return {verb: Measured.of(sum(took), len(took), self._failed[verb], took) for verb, took in self._took.items()}

    def _ask(self, verb: str, body: str) -> dict[str, object]:
        request = f"POST /v1/meter/{verb} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
        began = time.perf_counter()
        self._line.sendall(request)
        text = self._answer()
        self._took[verb].append(time.perf_counter() - began)
        answer: dict[str, object] = json.loads(text)
        self._failed[verb] += "hold_id" not in answer and "charge_id" not in answer
        return answer

    def _answer(self) -> bytes:
        said = self._line.recv(65_536)
        while b"\r\n\r\n" not in said:
            said += self._line.recv(65_536)
        head, _, body = said.partition(b"\r\n\r\n")
        while len(body) < _length(head):
            body += self._line.recv(65_536)
        return body


def _length(head: bytes) -> int:
    """Of the body that comes after this head."""
    return int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
