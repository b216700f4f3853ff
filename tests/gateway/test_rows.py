"""The other rows of text, each by its SDK: completions, embeddings, Anthropic's messages; and the lists of models."""

from decimal import Decimal
from typing import Any

import anthropic
import pytest

from tests.gateway.street import NUSD, Street, opened, pieces
from tests.rig import Rig

MINI, CLAUDE = "gpt-4o-mini", "claude-sonnet-4-6"
HELLO: Any = [{"role": "user", "content": "Hello!"}]


async def test_completions_whole_and_streamed_default_to_1024_tokens(street: Street) -> None:
    client = street.openai()
    answer = await client.completions.create(model=MINI, prompt="The capital of France is")
    assert answer.object == "text_completion"
    assert answer.usage.total_cost_usd > 0
    streamed = await pieces(
        await client.completions.create(model=MINI, prompt="Hello", stream=True, stream_options={"include_usage": True})
    )
    first, second = await street.charges()
    assert Decimal(str(streamed[-1].usage.total_cost_usd)) * NUSD == second["cost_nusd"] > 0
    assert Decimal(str(answer.usage.total_cost_usd)) * NUSD == first["cost_nusd"]
    assert [row["asked"]["max_tokens"] for row in await street.log()] == [1024, 1024]


@pytest.mark.parametrize("asked", ["text", ["two", "texts"], [1, 2, 3], [[1, 2], [3]]])
@pytest.mark.parametrize("form", ["float", "base64"])
async def test_embeddings_of_texts_and_tokens_in_both_forms(street: Street, asked: Any, form: Any) -> None:
    answer = await street.openai().embeddings.create(model="text-embedding-3-small", input=asked, encoding_format=form)
    assert answer.data
    charge = await street.only_charge()
    assert charge["cost_nusd"] == answer.usage.prompt_tokens * 20
    assert Decimal(str(answer.usage.total_cost_usd)) * NUSD == charge["cost_nusd"]


async def test_messages_cost_what_their_tokens_and_caches_do(street: Street) -> None:
    await street.order("cached=100, cache_write=200, cache_write_1h=50")
    asked: Any = {"model": CLAUDE, "max_tokens": 50, "messages": HELLO}
    raw = await street.anthropic().messages.with_raw_response.create(**asked)
    told = (await raw.parse()).usage
    charge = await street.only_charge()
    expected = told.input_tokens * 3000 + 100 * 300 + 200 * 3750 + 50 * 6000 + told.output_tokens * 15_000
    assert charge["cost_nusd"] == expected
    assert Decimal(raw.headers["x-satmeter-cost-usd"]) * NUSD == expected
    assert Decimal(str(told.total_cost_usd)) * NUSD == expected


async def test_messages_streamed_tell_their_cost_at_the_end(street: Street) -> None:
    asked: Any = {"model": CLAUDE, "max_tokens": 50, "messages": HELLO}
    events = await pieces(await street.anthropic().messages.create(**asked, stream=True))
    (last,) = [event for event in events if event.type == "message_delta"]
    charge = await street.only_charge()
    assert Decimal(str(last.usage.total_cost_usd)) * NUSD == charge["cost_nusd"] > 0
    assert events[0].type == "message_start"
    assert events[-1].type == "message_stop"


async def test_messages_that_break_off_are_charged_for_what_came(street: Street) -> None:
    await street.order("cut=8, tokens=40, pace=0.01")
    asked: Any = {"model": CLAUDE, "max_tokens": 50, "messages": HELLO}
    with pytest.raises(anthropic.APIStatusError):
        await pieces(await street.anthropic().messages.create(**asked, stream=True))
    charge = await street.only_charge()
    assert (charge["outcome"], charge["flags"]) == ("partial", "usage_estimated")
    assert 0 < charge["units"]["output_tokens"] < 40


async def test_tokens_are_counted_for_nothing_by_a_key_with_money(street: Street) -> None:
    counted = await street.anthropic().messages.count_tokens(model=CLAUDE, messages=HELLO)
    assert counted.input_tokens > 0
    assert await street.charges() == []


async def test_tokens_are_not_counted_for_who_has_no_money(rig: Rig, tmp_path: Any) -> None:
    async with opened(rig, tmp_path, usd="0") as street:
        with pytest.raises(anthropic.APIStatusError) as refused:
            await street.anthropic().messages.count_tokens(model=CLAUDE, messages=HELLO)
        assert refused.value.status_code == 402


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/router/models", "/v1/media/models", "/api/v1/models"])
async def test_the_models_are_satmeters_that_can_be_had_here(rig: Rig, tmp_path: Any, path: str) -> None:
    two = """
[[upstream]]
name = "mine"
kind = "openai"
base_url = "${GATEWAY_MODELS_URL}"
models = ["gpt-4o-mini", "gpt-image-1", "not-priced"]
"""
    async with opened(rig, tmp_path, upstreams=two) as street:
        found = (await street.http.get(street.url + path)).json()
        assert {row["id"] for row in found["data"]} == {"gpt-image-1" if "media" in path else "gpt-4o-mini"}
        every = (await street.http.get(f"{street.url}{path}?type=all")).json()
        assert {row["id"] for row in every["data"]} == {"gpt-4o-mini", "gpt-image-1"}
        assert found["object"] == "list"
        one = await street.http.get(f"{street.url}/v1/models/gpt-4o-mini")
        assert one.json()["pricing"]["input"] == 1.5e-07
        assert (await street.http.get(f"{street.url}/v1/models/gpt-image-1")).json()["id"] == "gpt-image-1"
        assert (await street.http.get(f"{street.url}/v1/models/gpt-4o")).status_code == 404


async def test_what_a_caller_tells_a_proxy_is_not_sent_on(street: Street) -> None:
    headers = {"x-api-key": street.api_key, "x-account-id": "1", "x-billing-request-id": "2", "x-litellm-call-id": "3", "cookie": "a=b"}  # fmt: skip
    told = {"no-log": True, "timeout": 0.001, "api_base": "http://evil", "api_key": "x", "mock_response": "free", "metadata": {"a": "b"}}  # fmt: skip
    answer = await street.http.post(
        f"{street.url}/v1/chat/completions", json={"model": MINI, "messages": HELLO, "seed": 5} | told, headers=headers
    )
    assert answer.status_code == 200
    (row,) = await street.log()
    assert not {name for name in row["header_names"] if name.startswith(("x-", "cookie"))}
    assert set(row["asked"]) == {"model", "messages", "metadata", "seed"}
    shown = {name for name in answer.headers if name not in ("date", "server")}
    assert shown == {"content-type", "content-length", "x-request-id", "access-control-allow-origin", "x-satmeter-cost-usd"}  # fmt: skip


async def test_a_large_answer_streams_through_and_still_tells_its_cost(street: Street) -> None:
    many = ["text"] * 300
    raw = await street.openai().embeddings.with_raw_response.create(
        model="text-embedding-3-large", input=many, encoding_format="float"
    )
    assert len(raw.content) > 2_000_000
    assert len(raw.parse().data) == 300
    charge = await street.only_charge()
    assert not charge["flags"]
    assert Decimal(str(raw.parse().usage.total_cost_usd)) * NUSD == charge["cost_nusd"]
