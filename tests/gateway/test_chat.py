"""Chat by the official SDK: answered in OpenAI's shape, charged by the upstream's own words, with what it cost."""

from decimal import Decimal
from typing import Any

import openai
import pytest

from tests.gateway.street import NUSD, Street, pieces

MINI = "gpt-4o-mini"
HELLO: Any = [{"role": "user", "content": "Hello!"}]
ADD: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]


def cost_nusd(usage: Any) -> int:
    """Of the starter catalogue's gpt-4o-mini."""
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return int((usage.prompt_tokens - cached) * 150 + cached * 75 + usage.completion_tokens * 600)


async def test_an_answer_tells_what_it_cost_and_that_is_what_is_charged(street: Street) -> None:
    raw = await street.openai().chat.completions.with_raw_response.create(model=MINI, messages=HELLO)
    answer = raw.parse()
    told = answer.usage
    assert answer.choices[0].message.content
    charge = await street.only_charge()
    assert charge["cost_nusd"] == cost_nusd(told) > 0
    assert Decimal(str(told.total_cost_usd)) * NUSD == charge["cost_nusd"]
    assert told.input_cost_usd + told.output_cost_usd == pytest.approx(told.total_cost_usd)
    assert told.cache_input_cost_usd == 0
    assert told.latency_ms >= told.ttft_ms > 0
    assert Decimal(raw.headers["x-satmeter-cost-usd"]) * NUSD == charge["cost_nusd"]
    assert not charge["flags"]
    assert await street.holds() == ["settled"]


@pytest.mark.parametrize("shape", ["openai", "deepseek", "gemini", "xai", "groq", "mistral", "vllm", "openrouter"])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_every_providers_words_are_charged_by_what_its_own_log_says(
    street: Street, shape: str, is_stream: bool
) -> None:
    says_little = shape in ("groq", "mistral")
    await street.order(f"usage={shape}" if says_little else f"usage={shape}, reasoning=7, cached=16")
    asked: Any = {"model": MINI, "messages": HELLO, "stream": is_stream}
    answer = await street.openai().chat.completions.create(**asked)
    if is_stream:
        await pieces(answer)
    else:
        assert not answer.usage.model_extra.keys() & {"cost", "cost_details", "is_byok"}
    (row,) = await street.log()
    counts = row["counts"]
    charge = await street.only_charge()
    assert charge["provider_cost_nusd"] == (123_000 if shape == "openrouter" else None)
    assert (charge["units"]["input_tokens"], charge["units"]["output_tokens"]) == (
        counts["input_tokens"], counts["output_tokens"],
    )  # fmt: skip
    assert charge["units"].get("cache_read_tokens", 0) == counts.get("cache_read_tokens", 0)
    assert "usage_estimated" not in (charge["flags"] or "")


async def test_a_stream_tells_its_cost_to_who_asked_for_usage_and_says_nothing_of_it_else(street: Street) -> None:
    client = street.openai()
    asked: Any = {"model": MINI, "messages": HELLO, "stream": True}
    first = await pieces(await client.chat.completions.create(**asked, stream_options={"include_usage": True}))
    second = await pieces(await client.chat.completions.create(**asked))
    assert first[0].choices[0].delta.role == "assistant"
    assert first[-2].choices[0].finish_reason == "stop"
    assert first[-1].choices == []
    charges = await street.charges()
    assert Decimal(str(first[-1].usage.total_cost_usd)) * NUSD == charges[0]["cost_nusd"]
    assert second[-1].choices[0].finish_reason == "stop"
    assert all(piece.usage is None for piece in second)
    assert charges[1]["cost_nusd"] == charges[0]["cost_nusd"]


async def test_a_stream_passes_byte_for_byte_but_for_its_costs(street: Street) -> None:
    asked = {"model": MINI, "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    await street.order("crlf, pings, split=7")
    answer = await street.post("/chat/completions", asked)
    lines = answer.text.split("\r\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-3] == "data: [DONE]"
    assert any(line.startswith(":") for line in lines)
    assert sum('"total_cost_usd"' in line for line in lines) == 1


async def test_tools_and_several_answers_pass(street: Street) -> None:
    client = street.openai()
    called = await client.chat.completions.create(model=MINI, messages=HELLO, tools=ADD)
    assert called.choices[0].message.tool_calls[0].function.name == "add"
    streamed = await pieces(await client.chat.completions.create(model=MINI, messages=HELLO, tools=ADD, stream=True))
    assert any(piece.choices and piece.choices[0].delta.tool_calls for piece in streamed)
    several = await client.chat.completions.create(model=MINI, messages=HELLO, n=3)
    assert len(several.choices) == 3
    assert (await street.charges())[-1]["units"]["output_tokens"] == several.usage.completion_tokens


async def test_cached_tokens_are_told_and_charged_at_their_own_price(street: Street) -> None:
    await street.order("cached=1024")
    answer = await street.openai().chat.completions.create(model=MINI, messages=HELLO)
    charge = await street.only_charge()
    assert Decimal(str(answer.usage.cache_input_cost_usd)) == Decimal("0.0000768")
    assert charge["cost_nusd"] == cost_nusd(answer.usage) == Decimal(str(answer.usage.total_cost_usd)) * NUSD


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions", "/api/v1/chat/completions"])
@pytest.mark.parametrize("how", ["Bearer", "Token", "x-api-key", "api-key"])
async def test_four_ways_to_send_a_key_on_every_path(street: Street, path: str, how: str) -> None:
    headers = {"authorization": f"{how} {street.api_key}"} if how[0].isupper() else {how: street.api_key}
    answer = await street.post(path, {"model": MINI, "messages": HELLO}, **headers)
    assert answer.status_code == 200, answer.text


async def test_a_provider_may_be_named_before_the_model_or_beside_it(street: Street) -> None:
    client = street.openai()
    await client.chat.completions.create(model="openai/gpt-4o-mini", messages=HELLO)
    await client.chat.completions.create(model=MINI, messages=HELLO, extra_body={"provider": "openai"})
    await client.chat.completions.create(model="pureai/gemma-3-4b-it", messages=HELLO)
    rows = await street.log()
    assert [row["model"] for row in rows] == [MINI, MINI, "gemma-3-4b-it"]
    assert all("provider" not in row["asked"] for row in rows)
    with pytest.raises(openai.NotFoundError) as refused:
        await client.chat.completions.create(model=MINI, messages=HELLO, extra_body={"provider": "nobody"})
    assert refused.value.code == "model_not_found"
