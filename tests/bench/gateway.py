"""python -m tests.bench.gateway: the gateway in turn with the bare upstream and with LiteLLM under our plug-in: what it adds
to a call, how many it serves, and what memory open streams take. Every call is authorized durably and settled; the books are
audited at the end."""

import argparse
import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median
from typing import Any, Final

import aiohttp

from tests.integration.real_litellm import litellm
from tests.program import Program, eventually, installation

BODY: Final = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 20}
STREAM: Final = {
    "model": "gpt-4o-mini", "stream": True, "max_tokens": 200,
    "messages": [{"role": "user", "content": "[sandbox: pace=0.5, tokens=60]"}],
}  # fmt: skip


class Side:
    """One of the two: where it is, and with which key."""

    def __init__(self, name: str, url: str, key: str) -> None:
        self.name, self.url, self.headers = name, url, {"Authorization": f"Bearer {key}"}
        self.p50_ms: list[float] = []
        self.first_ms: list[float] = []
        self.per_second: list[float] = []


@asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as made:
        yield made


async def one(client: aiohttp.ClientSession, side: Side, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds until the first byte, and in all."""
    began = time.perf_counter()
    async with client.post(side.url, json=body, headers=side.headers) as answer:
        await answer.content.readany()
        first = time.perf_counter()
        await answer.read()
        assert answer.status == 200, await answer.text()
    return first - began, time.perf_counter() - began


async def alone(side: Side, calls: int) -> None:
    """One connection: the median of a call, and of a stream's first byte."""
    async with session() as client:
        for _ in range(10):
            await one(client, side, BODY)
        side.p50_ms.append(median([(await one(client, side, BODY))[1] for _ in range(calls)]) * 1000)
        stream = BODY | {"stream": True}
        side.first_ms.append(median([(await one(client, side, stream))[0] for _ in range(calls // 2)]) * 1000)


async def together(side: Side, seconds: float, connections: int = 16) -> None:
    """So many connections: calls a second."""
    done, stop = 0, time.perf_counter() + seconds
    async with session() as client:

        async def work() -> None:
            nonlocal done
            while time.perf_counter() < stop:
                await one(client, side, BODY)
                done += 1

        await asyncio.gather(*(work() for _ in range(connections)))
    side.per_second.append(done / seconds)


async def streams(program: Program, side: Side, count: int) -> tuple[float, float]:
    """Megabytes of the gateway before, and with so many streams open."""
    (gateway,) = program.children("gateway")
    before, most = gateway.memory_info().rss, 0
    async with session() as client:
        working = []
        for _ in range(count):  # a hundred a second: so many at once would be a test of how fast calls begin
            working.append(asyncio.create_task(one(client, side, STREAM)))
            await asyncio.sleep(0.01)
        while not all(task.done() for task in working):
            most = max(most, gateway.memory_info().rss)
            await asyncio.sleep(0.5)
        await asyncio.gather(*working)
    return before / 2**20, most / 2**20


async def measure(program: Program, demo: dict[str, Any], options: argparse.Namespace) -> None:
    """The three in turn, and what was found."""
    upstream = f"http://127.0.0.1:{program.sandbox_port}/models"
    bare = Side("bare upstream", f"{upstream}/v1/chat/completions", "any")
    gate = Side("gateway", f"{demo['gateway_url']}/v1/chat/completions", demo["api_key"])
    (folder := program.folder / "litellm").mkdir()
    with litellm(folder, upstream, demo["base_url"], demo["service_token"], "ERROR") as theirs:
        await theirs.start()
        other = Side("LiteLLM with the plug-in", f"{theirs.url}/v1/chat/completions", demo["api_key"])
        for turn in range(options.rounds):
            for side in (bare, gate, other) if turn % 2 == 0 else (other, gate, bare):
                await alone(side, options.calls)
                await together(side, options.seconds)
        await theirs.stop(signal.SIGTERM)
    for side in (bare, gate, other):
        print(
            f"{side.name}: p50 {median(side.p50_ms):.1f} ms, first byte of a stream {median(side.first_ms):.1f} ms at 1"
            f" connection; {median(side.per_second):.0f}/s at 16"
        )
    added, first = median(gate.p50_ms) - median(bare.p50_ms), median(gate.first_ms) - median(bare.first_ms)
    print(f"added: {added:.1f} ms, {first:.1f} ms to the first byte")
    for side in (bare, other):
        print(f"at 16 connections: {median(gate.per_second) / median(side.per_second):.2f} of {side.name}")
    if options.streams:
        before, most = await streams(program, gate, options.streams)
        print(f"{options.streams} open streams: {most:.0f} MiB, {before:.0f} before")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--streams", type=int, default=1000)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, shared with the load")
    with installation() as program:
        program.run()
        demo = program.answer("demo")
        eventually(lambda: program.children("gateway"))
        asyncio.run(measure(program, demo, options))
        eventually(lambda: program.sql("SELECT count(*) FROM hold WHERE state = 'open'")[0][0] == 0, 60)
        report = program.answer("audit")
        assert report["findings"] == [], report
        print(f"audit clean: {report['checks']} checks over {report['entries']} entries")


if __name__ == "__main__":
    main()
