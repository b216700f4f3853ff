"""The public catalogue over HTTP: the OpenAI list shape, exact numbers, and what a caller would really pay."""

import json
import re
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest
from litestar import Litestar
from litestar.di import Provide
from litestar.testing import AsyncTestClient

from app.pricing import rules
from app.pricing.api import handlers
from app.pricing.catalogue import Catalogues
from app.pricing.starter import ensure_starter
from app.wiring import House


@pytest.fixture
async def client(unpriced: House) -> AsyncIterator[AsyncTestClient[Litestar]]:
    catalogues = Catalogues()
    app = Litestar(
        handlers,
        dependencies={
            "db": Provide(lambda: unpriced.db, sync_to_thread=False),
            "reads": Provide(lambda: unpriced.reads, sync_to_thread=False),
            "catalogues": Provide(lambda: catalogues, sync_to_thread=False),
            "read_catalogues": Provide(lambda: catalogues, sync_to_thread=False),
        },
        openapi_config=None,
    )
    async with AsyncTestClient(app) as made:
        yield made


async def get(client: AsyncTestClient[Litestar], path: str) -> Any:
    response = await client.get(path)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_float=Decimal)


async def test_before_anything_is_sold_the_lists_are_empty(client: AsyncTestClient[Litestar]) -> None:
    for path in ("/v1/models", "/v1/media/models", "/v1/prices"):
        answer = await get(client, path)
        assert (answer["object"], answer["data"], answer["price_version"]) == ("list", [], None)


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/router/models"])
async def test_models_come_in_the_openai_shape_with_exact_prices(
    client: AsyncTestClient[Litestar], unpriced: House, path: str
) -> None:
    await ensure_starter(unpriced.db)
    answer = await get(client, path)
    assert (answer["object"], answer["price_version"]) == ("list", 1)
    models = {model["id"]: model for model in answer["data"]}
    mini = models["gpt-4o-mini"]
    assert (mini["object"], mini["owned_by"], mini["max_output_tokens"]) == ("model", "openai", 16384)
    assert mini["created"] > 1_700_000_000
    assert mini["pricing"] == {
        "input": Decimal("0.00000015"), "output": Decimal("0.0000006"), "cache_read": Decimal("0.000000075"),
        "input_per_1M_tokens": Decimal("0.15"), "output_per_1M_tokens": Decimal("0.6"),
    }  # fmt: skip
    raw = (await client.get(path)).text
    assert '"input":0.00000015' in raw
    assert not re.search(r":\d+(\.\d+)?[eE]", raw)


async def test_tiers_and_attributes_are_listed_as_variants(client: AsyncTestClient[Litestar], unpriced: House) -> None:
    await ensure_starter(unpriced.db)
    (sonnet,) = (await get(client, "/v1/models?model=anthropic/claude-sonnet-4-5"))["data"]
    assert sonnet["pricing"]["input"] == Decimal("0.000003")
    assert {(v["dimension"], v["min_input_tokens"]) for v in sonnet["pricing_variants"]} >= {("input", 200_001)}
    (image,) = (await get(client, "/v1/models?model=dall-e-3"))["data"]
    assert (image["pricing"], image["default_attributes"]) == (
        {"images": Decimal("0.04")}, {"quality": "standard", "size": "1024x1024"},
    )  # fmt: skip
    assert len(image["pricing_variants"]) == 5


async def test_media_models_are_those_sold_by_something_else_than_tokens(
    client: AsyncTestClient[Litestar], unpriced: House
) -> None:
    await ensure_starter(unpriced.db)
    names = {model["id"] for model in (await get(client, "/v1/media/models"))["data"]}
    assert {"gpt-image-1", "veo3", "tts-1", "nova-3", "kling-2.1-pro"} <= names
    assert "gpt-4o" not in names


async def test_prices_are_one_line_each_and_name_the_fees(client: AsyncTestClient[Litestar], unpriced: House) -> None:
    await ensure_starter(unpriced.db)
    answer = await get(client, "/v1/prices?model=whisper-1")
    assert answer["fees"] == {"web": Decimal("0.02")}
    assert answer["data"] == [
        {"model": "whisper-1", "provider": "openai", "dimension": "audio_seconds", "unit": "second",
         "price_usd": Decimal("0.0001"), "min_input_tokens": 0, "attributes": {}}
    ]  # fmt: skip
    assert (await get(client, "/v1/prices?model=nobody"))["data"] == []


async def test_what_is_listed_is_what_is_charged_markup_included(
    client: AsyncTestClient[Litestar], unpriced: House
) -> None:
    await ensure_starter(unpriced.db)
    await unpriced.db.transaction(
        lambda session: rules.set_markup(session, "default", multiplier_ppm=1_150_000, notice_seconds=0)
    )
    (mini,) = (await get(client, "/v1/models?model=gpt-4o-mini"))["data"]
    assert mini["pricing"]["input"] == Decimal("0.0000001725")
