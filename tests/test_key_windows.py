"""Key windows: UTC days, weeks and months, rolled by the charge itself; money already held stays counted."""

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.rig import Customer, Rig, exact

D = Decimal


async def shown(rig: Rig, customer: Customer, key: Any) -> Any:
    return exact(await rig.client.get(f"/keys/{key['_id']}", headers=customer.owner))["data"]


async def test_a_new_day_starts_a_new_window_with_the_first_charge(rig: Rig) -> None:
    customer = await rig.customer("100")
    key = await rig.new_key(customer, usage_limit_usd=1, reset_period="daily")
    await rig.meter("charge", request_id="a", api_key=key["api_key"], cost_usd="1")
    assert (await rig.authorize(key["api_key"], "0.1"))["error"]["code"] == "key_limit_exceeded"
    rig.sql("UPDATE api_key SET window_start = window_start - interval '1 day'")
    rig.sql("UPDATE usage SET window_start = window_start - interval '1 day'")
    rig.sql("UPDATE hold SET window_start = window_start - interval '1 day'")
    assert (await shown(rig, customer, key))["current_period_usage_usd"] == 0  # seen at once, before any charge
    assert (await rig.authorize(key["api_key"], "0.1"))["decision"] == "allow"


@pytest.mark.parametrize(("period", "unit"), [("daily", "day"), ("weekly", "week"), ("monthly", "month")])
async def test_reset_at_is_the_next_utc_boundary(rig: Rig, period: str, unit: str) -> None:
    customer = await rig.customer()
    key = await rig.new_key(customer, usage_limit_usd=1, reset_period=period)
    expected = rig.sql(f"SELECT date_trunc('{unit}', now(), 'UTC') + interval '1 {unit}'")[0][0]
    assert datetime.fromisoformat(key["reset_at"]) == expected
    assert expected > datetime.now(UTC)


async def test_charges_at_the_boundary_count_in_exactly_one_window(rig: Rig) -> None:
    customer = await rig.customer("100")
    key = await rig.new_key(customer, usage_limit_usd=1, reset_period="daily")
    body = {"api_key": key["api_key"], "cost_usd": "0.25"}
    await asyncio.gather(*(rig.meter("charge", request_id=f"before{i}", **body) for i in range(10)))
    assert (await shown(rig, customer, key))["current_period_usage_usd"] == 1
    # The boundary passes: what is recorded moves a day back, and the same ten arrive together.
    rig.sql("UPDATE api_key SET window_start = window_start - interval '1 day'")
    rig.sql("UPDATE usage SET window_start = window_start - interval '1 day'")
    rig.sql("UPDATE hold SET window_start = window_start - interval '1 day'")
    answers = await asyncio.gather(*(rig.meter("charge", request_id=f"after{i}", **body) for i in range(10)))
    assert sum(answer.json()["decision"] == "allow" for answer in answers) == 4
    after = await shown(rig, customer, key)
    assert (after["current_period_usage_usd"], after["total_usage_all_time_usd"]) == (1, 2)


async def test_a_hold_from_yesterday_counts_to_yesterday_when_it_is_settled_today(rig: Rig) -> None:
    customer = await rig.customer("100")
    key = await rig.new_key(customer, usage_limit_usd=1, reset_period="daily")
    hold = await rig.authorize(key["api_key"], "0.6")
    rig.sql("UPDATE api_key SET window_start = window_start - interval '1 day'")
    rig.sql("UPDATE hold SET window_start = window_start - interval '1 day'")
    assert (await rig.authorize(key["api_key"], "0.5"))["error"]["code"] == "funds_held"  # still held, so still counted
    await rig.settle(hold["hold_id"], "0.6")
    after = await shown(rig, customer, key)
    assert (after["current_period_usage_usd"], after["total_usage_all_time_usd"]) == (0, D("0.6"))
    assert (await rig.authorize(key["api_key"], "1"))["decision"] == "allow"


async def test_another_period_starts_at_zero_but_money_already_held_stays_counted(rig: Rig) -> None:
    customer = await rig.customer("100")
    key = await rig.new_key(customer, usage_limit_usd=1, reset_period="daily")
    await rig.meter("charge", request_id="a", api_key=key["api_key"], cost_usd="0.3")
    hold = await rig.authorize(key["api_key"], "0.6")
    changed = await rig.client.patch(f"/keys/{key['_id']}", headers=customer.owner, json={"reset_period": "monthly"})
    assert exact(changed)["data"]["current_period_usage_usd"] == 0
    assert (await rig.authorize(key["api_key"], "0.5"))["error"]["code"] == "funds_held"
    await rig.settle(hold["hold_id"], "0.6")
    assert (await shown(rig, customer, key))["current_period_usage_usd"] == D("0.6")
    assert (await rig.authorize(key["api_key"], "0.5"))["error"]["code"] == "key_limit_exceeded"


async def test_holds_settles_and_period_changes_at_once_leave_the_books_right(rig: Rig) -> None:
    customer = await rig.customer("100")
    key = await rig.new_key(customer, usage_limit_usd=50, reset_period="daily")

    async def call(number: int) -> None:
        hold = await rig.authorize(key["api_key"], "0.5", f"r{number}")
        if hold["decision"] == "allow":
            await rig.settle(hold["hold_id"], "0.4")

    async def change(period: str) -> None:
        await rig.client.patch(f"/keys/{key['_id']}", headers=customer.owner, json={"reset_period": period})

    periods = ["weekly", "monthly", "daily", "monthly"]
    await asyncio.gather(*(call(number) for number in range(40)), *(change(period) for period in periods))
    assert await rig.balance(customer) == 84


async def test_expiry_and_disabling_refuse_and_enabling_allows_again(rig: Rig) -> None:
    customer = await rig.customer("10")
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    key = await rig.new_key(customer, expire_at=soon)
    assert (await rig.authorize(key["api_key"], "0.1"))["decision"] == "allow"
    for changes, decision in (({"disabled": True}, "deny"), ({"disabled": False}, "allow")):
        await rig.client.patch(f"/keys/{key['_id']}", headers=customer.owner, json=changes)
        assert (await rig.authorize(key["api_key"], "0.1"))["decision"] == decision
    rig.sql("UPDATE api_key SET expire_at = now() WHERE expire_at IS NOT NULL")
    assert (await rig.authorize(key["api_key"], "0.1"))["error"]["code"] == "invalid_api_key"
    assert (await rig.client.get("/credits/balance", headers={"x-api-key": key["api_key"]})).status_code == 401
