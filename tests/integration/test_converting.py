"""Models that are asked for in another shape than they are served in: LiteLLM converts behind the gateway, and each call costs
what the upstream's own log says, to the nano-dollar."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest

from tests.gateway.street import NUSD, Street, opened, pieces
from tests.integration.real_litellm import converting
from tests.rig import Rig
from tests.sandbox.upstream import Upstream, running_upstream

pytestmark = pytest.mark.slow
CLAUDE, GPT = "claude-haiku-4-5", "gpt-4o-mini"
PRICES = {CLAUDE: (1000, 100, 1250, 2000, 5000), GPT: (150, 75, 0, 0, 600)}
"""Of the starter catalogue, nano-dollars a token: fresh, read, written, written for an hour, answered."""
UPSTREAMS = """
[[upstream]]
name = "claude-as-openai"
kind = "openai"
base_url = "{url}/v1"
key_env = "SECRET"
serves = ["chat"]
models = ["claude-haiku-4-5"]

[[upstream]]
name = "gpt-as-anthropic"
kind = "openai"
base_url = "{url}/v1"
key_env = "SECRET"
serves = ["messages"]
models = ["gpt-4o-mini"]
"""
TOOL = {"name": "weather", "description": "The weather somewhere", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}  # fmt: skip


@dataclass
class Converted:
    street: Street
    upstream: Upstream
    seen: int = 0

    async def owed_nusd(self) -> int:
        """What the one call since this was asked last costs by the log of who served it."""
        (row,) = await self.upstream.log(self.seen)
        self.seen = row["n"]
        fresh, read, written, for_an_hour, answered = PRICES[row["model"]]
        counts = row["counts"]
        cached, cheap = counts.get("cache_read_tokens", 0), counts.get("cache_write_tokens", 0)
        dear = counts.get("cache_write_1h_tokens", 0)
        entered = counts["input_tokens"] - cached - cheap - dear
        return int(
            entered * fresh + cached * read + cheap * written + dear * for_an_hour + counts["output_tokens"] * answered
        )


@pytest.fixture
async def converted(rig: Rig, tmp_path: Path) -> AsyncIterator[Converted]:
    (folder := tmp_path / "litellm").mkdir()
    async with running_upstream() as upstream:
        with converting(folder, upstream.url) as litellm:
            await litellm.start()
            async with opened(
                rig, tmp_path, upstreams=UPSTREAMS.format(url=litellm.url), secret=litellm.master_key
            ) as street:
                yield Converted(street, upstream)
            await litellm.stop(SIGTERM)


async def test_what_is_converted_costs_what_its_upstream_counted(converted: Converted) -> None:
    """One LiteLLM for all: it starts for twenty seconds."""
    every = (_chat, _chat_stream, _cached, _tools, _messages, _messages_stream, _messages_cached)
    for number, ask in enumerate(every, 1):
        told_usd = await ask(converted.street)
        owed = await converted.owed_nusd()
        charges = await converted.street.charges()
        assert len(charges) == number, ask.__name__
        assert charges[-1]["cost_nusd"] == owed, (ask.__name__, charges[-1])
        assert Decimal(str(told_usd)) * NUSD == owed, ask.__name__
    await _refused(converted)


def _chatting(**more: Any) -> dict[str, Any]:
    return {"model": CLAUDE, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 60} | more


async def _chat(street: Street) -> Any:
    answer = await street.openai().chat.completions.create(**_chatting())
    assert answer.choices[0].message.content
    return answer.usage.total_cost_usd


async def _chat_stream(street: Street) -> Any:
    asked = _chatting(stream=True, stream_options={"include_usage": True})
    got = await pieces(await street.openai().chat.completions.create(**asked))
    assert "".join(each.choices[0].delta.content or "" for each in got if each.choices)
    assert not hasattr(got[-1].usage, "cost"), "LiteLLM says what the call costs the operator"
    return got[-1].usage.total_cost_usd


async def _cached(street: Street) -> Any:
    said = [{"role": "user", "content": "Hello! [sandbox: cached=600, cache_write=300]"}]
    answer = await street.openai().chat.completions.create(**_chatting(messages=said))
    return answer.usage.total_cost_usd


async def _tools(street: Street) -> Any:
    function = {"name": TOOL["name"], "description": TOOL["description"], "parameters": TOOL["input_schema"]}
    answer = await street.openai().chat.completions.create(
        **_chatting(tools=[{"type": "function", "function": function}])
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    return answer.usage.total_cost_usd


def _messaging(**more: Any) -> dict[str, Any]:
    return {"model": GPT, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 60} | more


async def _messages(street: Street) -> Any:
    raw = await street.anthropic().messages.with_raw_response.create(**_messaging())
    assert (await raw.parse()).content[0].text
    return raw.headers["x-satmeter-cost-usd"]


async def _messages_stream(street: Street) -> Any:
    got = await pieces(await street.anthropic().messages.create(**_messaging(stream=True)))
    assert any(each.type == "content_block_delta" for each in got)
    (last,) = [each for each in got if each.type == "message_delta"]
    return last.usage.total_cost_usd


async def _messages_cached(street: Street) -> Any:
    said = [{"role": "user", "content": "Hello! [sandbox: cached=600]"}]
    raw = await street.anthropic().messages.with_raw_response.create(**_messaging(messages=said))
    return raw.headers["x-satmeter-cost-usd"]


async def _refused(converted: Converted) -> None:
    """What the model's provider refuses is refused in the asker's shape, and free."""
    before = len(await converted.street.charges())
    refused = await converted.street.post(
        "/v1/chat/completions", _chatting(messages=[{"role": "user", "content": "[sandbox: status=400]"}])
    )
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["message"]
    assert len(await converted.street.charges()) == before
