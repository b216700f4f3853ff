"""The web plugin: results stand before the prompt, the fee is charged with the call, and a search that fails costs nothing."""

from decimal import Decimal
from typing import Any

from tests.gateway.street import NUSD, Street, opened
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
    assert len(told["annotations"]) == 3
    tokens = told["usage"]["prompt_tokens"] * 150 + told["usage"]["completion_tokens"] * 600
    assert charge["cost_nusd"] == tokens + 20_000_000
    assert Decimal(str(told["usage"]["total_cost_usd"])) * NUSD == charge["cost_nusd"]


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
