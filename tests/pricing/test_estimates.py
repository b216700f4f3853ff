"""Estimates as proxies send them: what is told of a call is held for, and what is not told is never free."""

import uuid
from typing import Any

import pytest

from app.pricing.starter import ensure_starter
from tests.rig import Rig


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
