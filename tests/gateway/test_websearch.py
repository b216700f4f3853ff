"""The web plugin: results stand before the prompt, the fee is charged with the call, and a search that fails costs nothing."""

from decimal import Decimal
from typing import Any

import pytest

from tests.gateway.street import NUSD, Street, opened, pieces, sold
from tests.rig import Rig

ASKED: Any = {
    "model": "gpt-4o-mini", "messages": [{"role": "user", "content": "What is the weather in Omaha?"}],
    "plugins": [{"id": "web", "max_results": 3}],
}  # fmt: skip


async def test_results_stand_before_the_prompt_and_the_fee_is_charged(street: Street) -> None:
    answer = await street.post("/chat/completions", ASKED)
    assert answer.status_code == 200, answer.text
    search, chat = await street.log()
    assert search["asked"]["query"] == "What is the weather in Omaha?"
    assert search["asked"]["numResults"] == 3
    assert "[3]" in chat["asked"]["messages"][0]["content"]
    assert chat["asked"]["messages"][1:] == ASKED["messages"]
    assert "plugins" not in chat["asked"]
    told, charge = answer.json(), await street.only_charge()
    annotations = told["choices"][0]["message"]["annotations"]
    assert [each["url_citation"]["url"] for each in annotations] == [f"https://sandbox.invalid/{n}" for n in range(3)]
    tokens = told["usage"]["prompt_tokens"] * 150 + told["usage"]["completion_tokens"] * 600
    assert charge["cost_nusd"] == tokens + 20_000_000
    assert Decimal(str(told["usage"]["total_cost_usd"])) * NUSD == charge["cost_nusd"]


async def test_a_stream_names_its_sources_once(street: Street) -> None:
    asked = ASKED | {"stream_options": {"include_usage": True}}
    events = await pieces(await street.openai().chat.completions.create(**spoken(asked), stream=True))
    named = [event.choices[0].delta.annotations for event in events if "annotations" in str(event)]
    assert [len(each) for each in named] == [3]
    charge = await street.only_charge()
    assert Decimal(str(events[-1].usage.total_cost_usd)) * NUSD == charge["cost_nusd"] > 20_000_000


def spoken(asked: Any) -> Any:
    """As OpenAI's SDK takes what it does not know."""
    return {name: value for name, value in asked.items() if name != "plugins"} | {
        "extra_body": {"plugins": asked["plugins"]}
    }


OWN = """
[[upstream]]
name = "provider"
kind = "openai"
base_url = "${GATEWAY_MODELS_URL}"
web_search = "%s"
serves = ["chat", "responses", "messages"]
models = ["gpt-4o-search-preview", "gpt-4o-mini", "claude-sonnet-4-6"]
"""
PRICED = {
    "model": "gpt-4o-search-preview", "provider": "openai", "mode": "chat",
    "usd_per_million": {"input": "2.50", "output": "10"}, "usd_each": {"queries": "0.035"},
}  # fmt: skip


async def test_a_model_that_searches_by_itself_is_told_to_and_its_searches_are_charged(rig: Rig, tmp_path: Any) -> None:
    await sold(rig, PRICED)
    async with opened(rig, tmp_path, upstreams=OWN % "openai") as street:
        answer = await street.post("/chat/completions", ASKED | {"model": "gpt-4o-search-preview"})
        (chat,) = await street.log()
        assert chat["asked"]["web_search_options"] == {}
        told, charge = answer.json()["usage"], await street.only_charge()
        tokens = told["prompt_tokens"] * 2500 + told["completion_tokens"] * 10_000
        assert charge["cost_nusd"] == tokens + 35_000_000 == Decimal(str(told["total_cost_usd"])) * NUSD
        other = await street.post("/chat/completions", ASKED)
        assert other.json()["error"]["code"] == "plugin_unavailable", "OpenAI's other models take no search in a chat"


async def test_searches_without_a_price_cost_the_fee_and_only_where_there_was_one(rig: Rig, tmp_path: Any) -> None:
    async with opened(rig, tmp_path, upstreams=OWN % "perplexity") as street:
        answer = await street.post("/chat/completions", ASKED)
        assert (await street.only_charge())["cost_nusd"] == tokens_nusd(answer.json()) + 20_000_000
        asked: Any = {"model": "gpt-4o-mini", "input": "Hello", "tools": [{"type": "web_search"}]}
        for order, fee in (("queries=2", 20_000_000), ("queries=0", 0)):
            await street.order(order, path="/responses")
            told = (await street.openai().responses.create(**asked)).usage
            charge = (await street.charges())[-1]
            assert charge["cost_nusd"] == told.input_tokens * 150 + told.output_tokens * 600 + fee
            assert Decimal(str(told.total_cost_usd)) * NUSD == charge["cost_nusd"]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_each_search_of_a_response_is_charged_by_its_price(rig: Rig, tmp_path: Any, is_stream: bool) -> None:
    await sold(rig, PRICED)
    async with opened(rig, tmp_path, upstreams=OWN % "openai") as street:
        await street.order("queries=3")
        asked: Any = {"model": PRICED["model"], "input": "Hello", "tools": [{"type": "web_search"}]}
        answer = await street.openai().responses.create(**asked, stream=is_stream)
        told = (await pieces(answer))[-1].response.usage if is_stream else answer.usage
        charge = await street.only_charge()
        assert charge["units"]["queries"] == 3
        tokens = told.input_tokens * 2500 + told.output_tokens * 10_000
        assert charge["cost_nusd"] == tokens + 3 * 35_000_000 == Decimal(str(told.total_cost_usd)) * NUSD


MESSAGE = {"model": "claude-sonnet-4-6", "max_tokens": 50, "messages": ASKED["messages"], "plugins": ASKED["plugins"]}


async def test_messages_search_by_anthropics_own_tool(rig: Rig, tmp_path: Any) -> None:
    async with opened(rig, tmp_path, upstreams=OWN % "anthropic") as street:
        await street.order("queries=2")
        answer = await street.post("/v1/messages", MESSAGE)
        (row,) = await street.log()
        assert row["asked"]["tools"] == [{"type": "web_search_20250305", "name": "web_search"}]
        told, charge = answer.json()["usage"], await street.only_charge()
        tokens = told["input_tokens"] * 3000 + told["output_tokens"] * 15_000
        assert charge["cost_nusd"] == tokens + 20_000_000 == Decimal(str(told["total_cost_usd"])) * NUSD


async def test_messages_of_a_model_that_cannot_search_say_so(rig: Rig, tmp_path: Any) -> None:
    async with opened(rig, tmp_path, upstreams=OWN % "openai") as street:
        refused = await street.post("/v1/messages", MESSAGE)
        assert (refused.status_code, refused.json()["type"]) == (422, "error")


def tokens_nusd(answer: Any) -> int:
    """Of the starter catalogue's gpt-4o-mini."""
    return int(answer["usage"]["prompt_tokens"] * 150 + answer["usage"]["completion_tokens"] * 600)


async def test_a_search_that_fails_costs_nothing(street: Street) -> None:
    await street.order("status=500", path="/search")
    answer = await street.post("/chat/completions", ASKED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_error")
    assert await street.holds() == ["released"]
    assert len(await street.log()) == 1


async def test_where_there_is_no_search_it_is_said_and_nothing_is_charged(rig: Rig, tmp_path: Any) -> None:
    plain = """
[[upstream]]
name = "mine"
kind = "openai"
base_url = "${GATEWAY_MODELS_URL}"
models = ["gpt-4o-mini"]
"""
    async with opened(rig, tmp_path, upstreams=plain) as street:
        answer = await street.post("/chat/completions", ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "plugin_unavailable")
        other = await street.post("/chat/completions", ASKED | {"plugins": [{"id": "pdf"}]})
        assert other.json()["error"]["code"] == "plugin_unavailable"
        wrong = await street.post("/chat/completions", ASKED | {"plugins": [{"id": "web", "max_results": 0}]})
        assert wrong.json()["error"]["code"] == "invalid_field"
        assert await street.log() == []
        assert await street.charges() == []
