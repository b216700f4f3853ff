"""A call that is told again is the same call in all that its price follows from; told otherwise it is another one."""

import hashlib
import json
from decimal import Decimal
from typing import Any

import pytest
from httpx import Response

from app.pricing.starter import ensure_starter
from tests.rig import Customer, Rig, exact

D = Decimal
WORK: dict[str, Any] = {
    "model": "gpt-4o-mini", "endpoint": "/chat", "usage": {"input_tokens": 1000, "output_tokens": 100}, "served_model": "gpt-4o-mini",
    "provider": "openai", "features_used": ["web"], "attributes": {"quality": "hd", "size": "1024x1024"}, "outcome": "completed",
}  # fmt: skip
OTHER: list[dict[str, Any]] = [
    {"served_model": "gpt-4o"}, {"served_model": None}, {"provider": "azure"}, {"provider": None}, {"features_used": []},
    {"attributes": {"quality": "standard", "size": "1024x1024"}}, {"attributes": {"quality": "hd"}}, {"attributes": None},
    {"attributes": {"quality": "hd", "size": "1024x1024", "service_tier": "flex"}}, {"usage": {"input_tokens": 1000, "output_tokens": 101}},
    {"usage": {"input_tokens": 1000, "output_tokens": 100, "cache_read_tokens": 0}}, {"cost_usd": "0.02021"}, {"cost_usd": 0},
    {"outcome": "partial"}, {"model": "gpt-4o"}, {"endpoint": "/other"},
]  # fmt: skip
SAME: list[dict[str, Any]] = [
    {}, {"latency_ms": 5}, {"ttft_ms": 2.5}, {"upstream_id": "another"}, {"features_used": ["web", "web"]},
    {"attributes": {"size": "1024x1024", "quality": "HD", "resolution": "auto"}}, {"usage": {"output_tokens": 100, "input_tokens": 1000, "images": None}},
]  # fmt: skip


@pytest.fixture
async def shop(rig: Rig) -> Rig:
    """The rig with the starter catalogue on sale."""
    await ensure_starter(rig.house.db)
    return rig


async def charge(shop: Rig, customer: Customer, work: dict[str, Any]) -> Response:
    return await shop.meter("charge", request_id="r", api_key=customer.api_key, **work)


async def report(shop: Rig, customer: Customer, work: dict[str, Any]) -> Response:
    """As an event of a call that nothing was held for."""
    body = {
        "specversion": "1.0", "id": "r", "source": "/g", "type": "t", "subject": hashlib.sha256(customer.api_key.encode()).hexdigest(),
        "data": work,
    }  # fmt: skip
    headers = await shop.service() | {"Content-Type": "application/json"}
    return await shop.client.post("/v1/meter/events", headers=headers, content=json.dumps(body))


@pytest.mark.parametrize("tell", [charge, report])
async def test_a_call_told_again_otherwise_is_refused_and_told_the_same_is_the_same_charge(
    shop: Rig, tell: Any
) -> None:
    customer = await shop.customer("10")
    first = await tell(shop, customer, WORK)
    assert first.status_code == 200, first.text
    balance = await shop.balance(customer)
    for more in OTHER:
        answer = await tell(shop, customer, WORK | more)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "request_id_reuse"), more
    for more in SAME:
        answer = await tell(shop, customer, WORK | more)
        assert exact(answer) == exact(first), more
    assert await shop.balance(customer) == balance


@pytest.mark.parametrize("tell", [charge, report])
async def test_a_call_that_came_priced_is_the_same_at_the_same_cost_however_that_is_written(
    shop: Rig, tell: Any
) -> None:
    customer = await shop.customer("10")
    first = await tell(shop, customer, {"cost_usd": 4.5e-05, "served_model": "x"})
    for same in ("0.000045", "4.5e-5", 0.000045):
        assert exact(await tell(shop, customer, {"cost_usd": same, "served_model": "x"})) == exact(first)
    for other in ({"cost_usd": "0.000046", "served_model": "x"}, {"cost_usd": "0.000045", "served_model": "y"}):
        answer = await tell(shop, customer, other)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "request_id_reuse")
    assert await shop.balance(customer) == 10 - D("0.000045")
