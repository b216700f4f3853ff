"""The router decides by published figures and prices, says why, and its call is charged as any; providers in their order."""

import json
from decimal import Decimal
from typing import Any

import pytest

from app.gateway.profiles import Cluster, cluster_of
from tests.gateway.street import NUSD, Street, opened
from tests.rig import Rig

CODE = "Write Python code to sort a list"


def asked(words: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": words}]} | more


@pytest.mark.parametrize(
    ("words", "cluster"),
    [
        (CODE, Cluster.CODE), ("Solve 3 + 4 = x", Cluster.MATH), ("Write a haiku about autumn", Cluster.CREATIVE),
        ("What is the capital of Brazil?", Cluster.FACTUAL), ("Hello!", Cluster.OTHER), ("word " * 10_000, Cluster.LONG_CONTEXT),
    ],
)  # fmt: skip
def test_the_kind_of_a_prompt_follows_from_what_stands_in_it(words: str, cluster: Cluster) -> None:
    assert cluster_of(words) is cluster


async def test_a_decision_alone_is_free_and_explained(street: Street) -> None:
    answer = await street.post("/v1/router", asked(CODE, execute=False))
    told = answer.json()
    assert told["selected_model"] == "gpt-4.1"  # 94.5 % in HumanEval, the most of what is sold
    assert (told["expected_error"], told["confidence"], told["cluster_id"]) == (0.055, 0.945, 0)
    assert "HumanEval" in told["reasoning"]
    assert told["selected_provider"] == "offline"
    assert await street.log() == []
    assert await street.charges() == []


async def test_cost_counts_as_much_as_the_caller_says(street: Street) -> None:
    cheap = (await street.post("/v1/router", asked(CODE, execute=False, cost_weight=1))).json()
    assert cheap["selected_model"] in ("gpt-4o-mini", "gpt-4.1-mini")
    some = asked(CODE, execute=False, models=["gpt-4o-mini", "gpt-4o"])
    assert (await street.post("/v1/router", some)).json()["selected_model"] == "gpt-4o"


async def test_what_has_no_figure_is_not_judged(street: Street) -> None:
    one = asked(CODE, execute=False, models=["gpt-4o-mini", "codestral-latest"], cost_weight=0.5)
    assert (await street.post("/v1/router", one)).json()["selected_model"] == "gpt-4o-mini"
    none = asked(CODE, execute=False, models=["mistral-large-latest", "codestral-latest"])
    told = (await street.post("/v1/router", none)).json()
    assert (told["selected_model"], told["confidence"]) == ("codestral-latest", None)
    assert "expected_error" not in told


async def test_a_routed_call_is_answered_and_charged(street: Street) -> None:
    answer = (await street.post("/v1/router", asked(CODE, models=["gpt-4o-mini", "gpt-4o"], max_tokens=20))).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == answer["routing"]["selected_model"] == "gpt-4o"
    charge = await street.only_charge()
    assert Decimal(str(answer["usage"]["total_cost_usd"])) * NUSD == charge["cost_nusd"] > 0
    streamed = await street.post("/v1/router", asked(CODE, stream=True))
    assert streamed.text.rstrip().endswith("[DONE]")
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert events[0]["routing"]["selected_model"] == events[0]["model"]
    assert not any("routing" in event for event in events[1:])
    (first, second) = await street.log()
    assert not {"models", "cost_weight", "execute"} & (set(first["asked"]) | set(second["asked"]))


@pytest.mark.parametrize(
    ("more", "param"), [({"models": ["gpt-4o"]}, "models"), ({"cost_weight": 2}, "cost_weight"), ({"execute": "no"}, "execute")]
)  # fmt: skip
async def test_what_cannot_be_chosen_by_is_refused(street: Street, more: dict[str, Any], param: str) -> None:
    answer = await street.post("/v1/router", asked(CODE, **more))
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


async def test_profiles_and_providers(rig: Rig, tmp_path: Any) -> None:
    two = """
[[upstream]]
name = "first"
kind = "openai"
base_url = "${GATEWAY_MODELS_URL}"
models = ["gpt-4o-mini", "gpt-4o"]

[[upstream]]
name = "second"
kind = "openai"
base_url = "${GATEWAY_MODELS_URL}"
models = ["gpt-4o-mini"]
"""
    async with opened(rig, tmp_path, upstreams=two) as street:
        rows = (await street.http.get(f"{street.url}/v1/providers")).json()
        assert rows == [
            {"id": "first", "type": "primary", "enabled": True, "params": {}},
            {"id": "second", "type": "backup", "enabled": True, "params": {}},
        ]
        older = await street.http.get(f"{street.url}/v1/providers?model=gpt-4o&envelope=true")
        assert [row["id"] for row in older.json()["providers"]] == ["first"]
        assert (await street.http.get(f"{street.url}/v1/providers?model=none")).status_code == 404
        known = (await street.http.get(f"{street.url}/v1/router/profiles")).json()
        assert known == {"profiles": ["gpt-4o", "gpt-4o-mini"], "count": 2}
