"""Which models a key may call: names are compared as the catalogue resolves them, and nothing near is taken for one."""

import uuid
from typing import Any

import pytest

from app.pricing.catalogue import activate, store
from app.pricing.rows import Dimension, PriceRow
from app.pricing.starter import ensure_starter
from tests.rig import Rig, exact

MINI = "gpt-4o-mini"
LONG = "openai/gpt-4o-mini"
NEAR = [
    "GPT-4o-mini", "gpt-4o-Mini", "OpenAI/gpt-4o-mini", "openai/GPT-4O-MINI", "azure/gpt-4o-mini", "openai//gpt-4o-mini", "openai/gpt-4o-mini/",
    "/gpt-4o-mini", "gpt-4o-mini ", " gpt-4o-mini", "gpt-4o", "gpt-4o-mini-2024-07-18", "openai/openai/gpt-4o-mini", "gpt-4o-mini:free", "openai",
    "gpt-4o-min", "gpt-4o-mini,gpt-4o", "*", "gpt\u20114o\u2011mini", "ｇpt-4o-mini", "gpt-4o-mini\u200b", "%67pt-4o-mini",
]  # fmt: skip


@pytest.fixture
async def shop(rig: Rig) -> Rig:
    """The rig with the starter catalogue on sale."""
    await ensure_starter(rig.house.db)
    return rig


async def every_way(shop: Rig, key: str, model: str | None) -> dict[str, Any]:
    """What each place that looks at the model says of it: its error's code, or `allow`."""
    who = {"api_key": key} | ({"model": model} if model is not None else {})
    answers = {
        "estimate": await shop.meter(
            "authorize", **who, request_id=uuid.uuid4().hex, **({"estimate": {"input_tokens": 1}} if model else {"max_cost_usd": 0})
        ),
        "authorize": await shop.meter("authorize", **who, request_id=uuid.uuid4().hex, max_cost_usd=0.001),
        "charge": await shop.meter("charge", **who, request_id=uuid.uuid4().hex, cost_usd=0.000001),
    }  # fmt: skip
    found = {}
    for place, answer in answers.items():
        told = exact(answer)
        found[place] = told["error"]["code"] if told["decision"] == "deny" else "allow"
    if model is None or (model.isascii() and " " not in model and "," not in model):
        token = (await shop.service())["Authorization"].split()[1]
        said = f"; model={model}" if model is not None else ""
        headers = {"Authorization": f"Bearer {key}", "X-Service-Token": token + said}
        answer = await shop.client.get("/v1/meter/ext-authz", headers=headers)
        found["ext-authz"] = "allow" if answer.status_code == 200 else answer.json()["error"]["code"]
    return found


@pytest.mark.parametrize("allowed", [MINI, LONG])
@pytest.mark.parametrize("asked", [MINI, LONG])
async def test_a_model_may_be_called_by_the_name_it_is_allowed_under_and_by_its_other_one(
    shop: Rig, allowed: str, asked: str
) -> None:
    customer = await shop.customer("10")
    key = (await shop.new_key(customer, allowed_models=["o3", allowed]))["api_key"]
    assert set((await every_way(shop, key, asked)).values()) == {"allow"}


@pytest.mark.parametrize("allowed", [MINI, LONG])
async def test_nothing_near_an_allowed_model_is_taken_for_it(shop: Rig, allowed: str) -> None:
    customer = await shop.customer("10")
    key = (await shop.new_key(customer, allowed_models=[allowed]))["api_key"]
    for asked in (*NEAR, None):
        for place, code in (await every_way(shop, key, asked)).items():
            refused = {"model_not_allowed", "model_not_priced"} if place == "estimate" else {"model_not_allowed"}
            assert code in refused, (place, asked, code)


async def test_a_seller_that_is_named_is_that_seller_alone(rig: Rig) -> None:
    rows = [PriceRow("m", seller, Dimension.INPUT, price) for seller, price in (("dear", 2), ("cheap", 1))]
    db = rig.house.db
    version = await db.transaction(lambda s: store(s, rows, (), source="test", source_hash="0"))
    await db.transaction(lambda s: activate(s, version))
    customer = await rig.customer("10")
    for allowed, asked, verdict in (
        ("m", "m", "allow"), ("m", "dear/m", "allow"), ("dear/m", "m", "allow"), ("m", "cheap/m", "model_not_allowed"),
        ("cheap/m", "m", "model_not_allowed"), ("cheap/m", "dear/m", "model_not_allowed"), ("cheap/m", "cheap/m", "allow"),
    ):  # fmt: skip
        key = (await rig.new_key(customer, allowed_models=[allowed]))["api_key"]
        assert set((await every_way(rig, key, asked)).values()) == {verdict}, (allowed, asked)


async def test_where_nothing_is_sold_names_are_compared_as_they_are(rig: Rig) -> None:
    customer = await rig.customer("10")
    key = (await rig.new_key(customer, allowed_models=["a/m"]))["api_key"]
    assert (await rig.authorize(key, "0.1", model="a/m"))["decision"] == "allow"
    assert (await rig.authorize(key, "0.1", model="m"))["error"]["code"] == "model_not_allowed"
