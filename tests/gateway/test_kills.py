"""kill -9 of the gateway, of Satmeter and of the upstream under load: nothing is lost, doubled or free.

GATEWAY_KILLS says how often each of them is killed; 20 times where nothing is said, which takes some minutes.
"""

import asyncio
import contextlib
import json
import os
import random
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tests.gateway.street import NUSD
from tests.program import Program, eventually, installation

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("GATEWAY_KILLS", "20"))
AT_ONCE = 6


class Load:
    """Callers who go on calling, whatever happens; what they were told in full is kept by the upstream's id of it."""

    def __init__(self, url: str, api_key: str) -> None:
        self._url, self._key = f"{url}/v1/chat/completions", {"x-api-key": api_key}
        self.told: dict[str, Decimal] = {}
        self.asked = 0

    async def work(self, stop: asyncio.Event, number: int) -> None:
        dice = random.Random(number)
        async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
            while not stop.is_set():
                self.asked += 1
                with contextlib.suppress(httpx.TransportError, ValueError, KeyError):
                    await self._call(client, dice)
                await asyncio.sleep(0.01)

    async def goes_on(self) -> None:
        """Two of each caller were answered in full, whatever was killed before."""
        seen = len(self.told)
        async with asyncio.timeout(60):
            while len(self.told) < seen + 2 * AT_ONCE:
                await asyncio.sleep(0.05)

    async def _call(self, client: httpx.AsyncClient, dice: random.Random) -> None:
        words = f"{dice.randrange(10**9)} [sandbox: pace=0.02, tokens=30, delay=0.05]"
        body: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": words}]}
        if dice.random() < 0.6:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = await client.post(self._url, json=body, headers=self._key)
        if answer.status_code != 200:
            return
        if not body.get("stream"):
            self._note(json.loads(answer.text, parse_float=Decimal))
        elif answer.text.rstrip().endswith("[DONE]"):
            self._note(json.loads(answer.text.rstrip().split("\n")[-3][6:], parse_float=Decimal))

    def _note(self, answer: dict[str, Any]) -> None:
        self.told[answer["id"]] = Decimal(answer["usage"]["total_cost_usd"])


async def kill(program: Program, role: str) -> None:
    """One process of this role, which the parent starts again."""
    before = await asyncio.to_thread(program.children, role)
    before[0].kill()
    await asyncio.to_thread(eventually, lambda: {each.pid for each in program.children(role)} - {before[0].pid}, 30)


async def test_nothing_is_lost_doubled_or_free_whoever_is_killed() -> None:
    with installation() as program:
        await asyncio.to_thread(program.run)
        demo = await asyncio.to_thread(program.answer, "demo")
        await asyncio.to_thread(eventually, lambda: program.children("gateway"), 30)
        load, stop, dice = Load(demo["gateway_url"], demo["api_key"]), asyncio.Event(), random.Random(7)
        working = asyncio.gather(*(load.work(stop, number) for number in range(AT_ONCE)))
        await load.goes_on()
        for _ in range(KILLS):
            for role in ("gateway", "http", "sandbox"):
                await kill(program, role)
                await load.goes_on()
                await asyncio.sleep(dice.uniform(0, 0.8))
        stop.set()
        await working
        with contextlib.suppress(AssertionError):
            await asyncio.to_thread(eventually, lambda: open_holds(program) == 0, 20)
        # What is left was asked for by a gateway that was killed before it heard the verdict, and answered when Satmeter was
        # back: nobody knows of it, nothing was forwarded for it (`check` would see that), and its time ends it.
        program.sql("UPDATE hold SET expires_at = now() WHERE state = 'open'")
        await asyncio.to_thread(eventually, lambda: open_holds(program) == 0, 40)
        check(program, load)
        assert (await asyncio.to_thread(program.answer, "audit"))["findings"] == []


def open_holds(program: Program) -> int:
    with contextlib.suppress(Exception):
        return int(program.sql("SELECT count(*) FROM hold WHERE state = 'open'")[0][0])
    return 1


def check(program: Program, load: Load) -> None:
    charges = program.sql("SELECT upstream_id, cost_nusd FROM usage")
    by_id = {id: nusd for id, nusd in charges if id is not None}
    named = [id for id, _ in charges if id is not None]
    assert len(named) == len(set(named)), "a call was charged twice"
    wrong = {id: (usd, by_id.get(id)) for id, usd in load.told.items() if by_id.get(id) != usd * NUSD}
    assert not wrong, "a caller was told another cost than was charged"
    log = (program.data_dir / "sandbox" / "models" / "models.jsonl").read_text().splitlines()
    rows = {(row := json.loads(line))["n"]: row for line in log}.values()
    made = {row["id"]: row for row in rows if row.get("outcome") == "completed" and row.get("status") == 200}
    free = [row for id, row in made.items() if by_id.get(id, 0) == 0]
    assert not [row for row in free if row.get("is_stream")], "a stream's id is on disk with its first event"
    unnamed = sum(id is None and nusd > 0 for id, nusd in charges)
    assert len(free) <= unnamed, "a call that was answered is free"
    doubled = [row for id, row in made.items() if by_id.get(id, 0) > owed_nusd(row)]
    assert not doubled, "more was charged than the upstream made"
    print(f"{load.asked} calls, {len(load.told)} told their cost, {len(charges)} charges, {unnamed} at what was sent")


def owed_nusd(row: dict[str, Any]) -> int:
    """What the upstream's own log says that a call of the starter catalogue's gpt-4o-mini comes to."""
    return int(row["counts"]["input_tokens"] * 150 + row["counts"]["output_tokens"] * 600)
