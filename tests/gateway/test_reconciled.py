"""A thousand calls of every kind with faults among them: the books say to the nano-dollar what the upstream's own log does."""

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.gateway.street import Street, opened
from tests.rig import Rig

pytestmark = pytest.mark.slow
CALLS, AT_ONCE = 1_000, 16
PRICES = {
    "gpt-4o-mini": (150, 75, 0, 0, 600), "gpt-4o": (2500, 1250, 0, 0, 10_000), "gemini-2.5-flash": (300, 30, 0, 0, 2500),
    "claude-sonnet-4-6": (3000, 300, 3750, 6000, 15_000), "text-embedding-3-small": (20, 20, 0, 0, 0),
}  # fmt: skip
"""Of the starter catalogue, in nano-USD: input, cache read, cache write for five minutes, for an hour, output."""
FAULTS = (
    "", "", "", "", "cached=64", "reasoning=5", "usage=deepseek", "usage=xai", "usage=none", "cut=7", "cut=0", "error_after=8",
    "status=500", "status=429", "split=11", "crlf", "pings", "delay=0.02", "tokens=200",
)  # fmt: skip


def a_call(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body; what the upstream does with it stands in the prompt, and the log tells what it did."""
    kind = dice.choice(("chat", "chat", "chat", "completions", "messages", "embeddings"))
    fault, is_stream = dice.choice(FAULTS), dice.random() < 0.5
    words = (
        f"call {dice.randrange(10**9)} " + "word " * dice.randrange(1, 40) + (f"[sandbox: {fault}]" if fault else "")
    )
    messages = [{"role": "user", "content": words}]
    if kind == "embeddings":
        return "/v1/embeddings", {"model": "text-embedding-3-small", "input": words}
    if kind == "completions":
        return "/v1/completions", {"model": "gpt-4o-mini", "prompt": words, "stream": is_stream}
    if kind == "messages":
        words = words.replace("cached=64", "cached=64, cache_write=32, cache_write_1h=16")
        messages = [{"role": "user", "content": words}]
        return "/v1/messages", {"model": "claude-sonnet-4-6", "max_tokens": 300, "messages": messages, "stream": is_stream}  # fmt: skip
    model = dice.choice(("gpt-4o-mini", "gpt-4o"))
    return "/v1/chat/completions", {"model": model, "messages": messages, "stream": is_stream}


async def make(street: Street, client: httpx.AsyncClient, dice: random.Random, seen: Counter[str]) -> None:
    """Make a call; one in ten hangs up under way."""
    path, body = a_call(dice)
    leaves = dice.random() < 0.1
    try:
        async with client.stream("POST", street.url + path, json=body, headers={"x-api-key": street.api_key}) as answer:
            seen[str(answer.status_code)] += 1
            async for _ in answer.aiter_raw():
                if leaves:
                    seen["left"] += 1
                    return
    except httpx.TransportError:
        seen["broken"] += 1


def owed_nusd(row: dict[str, Any]) -> int:
    """What a call costs by the upstream's own log."""
    if row.get("status") != 200 or row.get("order", {}).get("cut") == 0:
        return 0
    fresh, read, written, for_an_hour, answered = PRICES[row["model"]]
    counts, is_whole = row.get("counts", {}), row.get("outcome") == "completed"
    if not is_whole and not row.get("is_stream"):
        return 0
    says_itself = is_whole and row.get("order", {}).get("usage") != "none"
    if row.get("order", {}).get("usage") == "none" or (not is_whole and "/messages" not in row["path"]):
        return int(counted_tokens(row["asked"]) * fresh + sent(row) * answered)
    cached, cheap = counts.get("cache_read_tokens", 0), counts.get("cache_write_tokens", 0)
    dear = counts.get("cache_write_1h_tokens", 0)
    entered = counts.get("input_tokens", 0) - cached - cheap - dear
    output = counts.get("output_tokens", 0) if says_itself else sent(row)
    return int(entered * fresh + cached * read + cheap * written + dear * for_an_hour + output * answered)


def sent(row: dict[str, Any]) -> int:
    return int(row.get("sent_output_tokens", 0))


def counted_tokens(asked: dict[str, Any]) -> int:
    """Of the texts, as the gateway says that it counts where nobody tells: a quarter of the bytes of each, rounded up."""
    texts = [each["content"] for each in asked["messages"]] if "messages" in asked else [asked.get("prompt") or asked["input"]]  # fmt: skip
    return sum(-(-len(text.encode()) // 4) for text in texts)


async def test_a_thousand_calls_cost_what_the_upstreams_log_says(rig: Rig, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    async with opened(rig, tmp_path, usd="500") as street:
        waiting = iter(range(CALLS))

        async def work(number: int) -> None:
            dice = random.Random(number)
            async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
                for _ in waiting:
                    await make(street, client, dice, seen)

        await asyncio.gather(*(work(number) for number in range(AT_ONCE)))
        async with asyncio.timeout(40):
            while len(street.gateway.streams):
                await asyncio.sleep(0.1)
        charges = {charge["upstream_id"]: charge["cost_nusd"] for charge in await street.charges()}
        rows = await street.log()
        owed = [(row.get("id"), owed_nusd(row), row) for row in rows]
        wrong = [(charges.get(id), nusd, row) for id, nusd, row in owed if id and nusd and charges.get(id) != nusd]
        assert not wrong, [(charged, nusd, {**row, "asked": None}) for charged, nusd, row in wrong[:3]]
        assert sum(charge["cost_nusd"] for charge in await street.charges()) == sum(nusd for _, nusd, _ in owed) > 0
        assert seen["200"] > CALLS / 2
        with psycopg.connect(rig.database_url) as conn:
            (held,) = conn.execute("SELECT sum(held_nusd) FROM account").fetchone() or (None,)
        assert held == 0
