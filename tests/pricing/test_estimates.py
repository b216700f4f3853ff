"""Estimates as proxies send them: what is told of a call is held for, and what is not told is never free."""

import json
import uuid
from decimal import Decimal
from typing import Any

import pytest

from app.kernel.db import Database
from app.pricing.catalogue import activate, store
from app.pricing.importer import read_prices
from app.pricing.starter import ensure_starter
from tests.rig import Rig, exact


@pytest.fixture
async def shop(rig: Rig) -> Rig:
    """The rig with the starter catalogue on sale."""
    await ensure_starter(rig.house.db)
    return rig


async def authorize(shop: Rig, key: str, model: str, estimate: dict[str, Any]) -> Any:
    return await shop.meter("authorize", request_id=uuid.uuid4().hex, api_key=key, model=model, estimate=estimate)


@pytest.mark.parametrize(
    ("model", "param"),
    [
        ("tts-1", "estimate.characters"),
        ("kling-2.1-pro", "estimate.video_seconds"),
        ("whisper-1", "estimate.audio_seconds"),
        ("text-embedding-3-small", "estimate.input_tokens"),
    ],
)
async def test_an_estimate_without_the_unit_that_is_sold_is_refused_by_its_name(
    shop: Rig, model: str, param: str
) -> None:
    customer = await shop.customer("10")
    response = await authorize(shop, customer.api_key, model, {})
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)
    assert await shop.held(customer) == 0


async def test_images_whose_number_is_not_told_stop_at_the_balance(shop: Rig) -> None:
    customer = await shop.customer("10")
    first = await authorize(shop, customer.api_key, "dall-e-3", {"n": 128})
    assert first.json()["hold_usd"] == 5.12
    second = await authorize(shop, customer.api_key, "openai/dall-e-3", {"n": 128})
    assert second.json()["error"]["code"] == "funds_held"


async def a_searching_model(db: Database) -> None:
    sizes = {"search_context_size_low": 0.025, "search_context_size_medium": 0.0275, "search_context_size_high": 0.03}
    entry = {
        "litellm_provider": "openai",
        "mode": "chat",
        "input_cost_per_token": 1e-06,
        "output_cost_per_token": 1e-06,
    }
    draft = read_prices(json.dumps({"searcher": entry | {"search_context_cost_per_query": sizes}}).encode())
    version_id = await db.transaction(lambda s: store(s, draft.prices, draft.models, source="test", source_hash="0"))
    await db.transaction(lambda session: activate(session, version_id))


@pytest.mark.parametrize(("said", "each_usd"), [({"search_context_size": "low"}, "0.025"), ({}, "0.03")])
async def test_a_search_is_held_for_and_charged_at_its_size_or_the_dearest(
    rig: Rig, said: dict[str, str], each_usd: str
) -> None:
    await a_searching_model(rig.house.db)
    customer = await rig.customer("10")
    estimate = {"input_tokens": 1000, "max_output_tokens": 1000, "queries": 2} | said
    held = exact(await authorize(rig, customer.api_key, "searcher", estimate))
    assert held["hold_usd"] == Decimal("0.002") + 2 * Decimal(each_usd)
    settled = await rig.meter("settle", hold_id=held["hold_id"], usage={"input_tokens": 1000, "queries": 1})
    done = exact(settled)
    assert (done["cost"]["total_cost_usd"], done["flags"]) == (Decimal("0.001") + Decimal(each_usd), [])


async def test_the_contract_tells_what_cache_writes_are_counted_as_and_held_for(rig: Rig) -> None:
    schemas = (await rig.client.get("/openapi.json")).json()["components"]["schemas"]
    used = schemas["UsageUnits"]["properties"]
    assert "for 5 minutes" in used["cache_write_tokens"]["description"]
    assert "not counted in `cache_write_tokens`" in used["cache_write_1h_tokens"]["description"]
    assert "held for as the dearest" in schemas["Estimate"]["description"]
