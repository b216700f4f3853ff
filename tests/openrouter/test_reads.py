"""What dashboards made for OpenRouter read: the same shapes, and figures that agree with ours."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from tests.activity.conftest import Past

D = Decimal
KEY_FIELDS = {
    "label", "limit", "limit_remaining", "limit_reset", "usage", "usage_daily", "usage_weekly", "usage_monthly", "byok_usage",
    "byok_usage_daily", "byok_usage_weekly", "byok_usage_monthly", "include_byok_in_limit", "is_free_tier", "is_management_key",
    "is_provisioning_key", "creator_user_id", "expires_at", "rate_limit",
}  # fmt: skip


async def test_credits_less_usage_is_the_balance_whatever_happened(past: Past) -> None:
    customer = await past.rig.customer("10")
    assert await past.ask("/api/v1/credits", customer) == {"data": {"total_credits": 10, "total_usage": 0}}
    await past.rig.fund(customer, "5", "btc-lightning")
    made = await past.charge(customer, "2.5")
    await past.rig.meter("refund", charge_id=made["charge_id"], amount_usd="0.5")
    credits = (await past.ask("/api/v1/credits", customer))["data"]
    assert credits == {"total_credits": D("15.25"), "total_usage": 2}
    assert credits["total_credits"] - credits["total_usage"] == await past.rig.balance(customer)
    by_key = await past.rig.client.get("/api/v1/credits", headers=customer.key)
    assert by_key.json()["data"] == {"total_credits": 15.25, "total_usage": 2}


async def test_a_key_reads_itself_as_openrouter_tells_it(past: Past) -> None:
    customer = await past.rig.customer("10")
    made = await past.rig.new_key(customer, usage_limit_usd=5, reset_period="monthly", expire_at="2999-01-01T00:00:00Z")
    headers = {"Authorization": f"Bearer {made['api_key']}"}
    await past.charge(customer, "0.75", made["api_key"])
    await past.charge(customer, "3")
    response = await past.rig.client.get("/api/v1/key", headers=headers)
    assert (await past.rig.client.get("/api/v1/auth/key", headers=headers)).json() == response.json()
    data = response.json()["data"]
    assert set(data) == KEY_FIELDS
    assert data["label"] == made["api_key_preview"]
    assert (data["limit"], data["limit_remaining"], data["limit_reset"]) == (5, 4.25, "monthly")
    assert [data[name] for name in ("usage", "usage_daily", "usage_weekly", "usage_monthly")] == [0.75] * 4
    assert (data["expires_at"], data["is_free_tier"]) == ("2999-01-01T00:00:00Z", False)
    assert data["rate_limit"] == {
        "requests": -1,
        "interval": "10s",
        "note": "This field is deprecated and safe to ignore.",
    }


async def test_a_keys_day_week_and_month_begin_at_midnight_utc(past: Past) -> None:
    customer = await past.rig.customer("10")
    now = datetime.now(UTC)
    monday, first = (now - timedelta(days=now.weekday())).date(), now.date().replace(day=1)
    spent = {}
    for days in (40, 8, 3, 1, 0):
        spent[(now - timedelta(days=days)).date()] = D(days + 1) / 100
    for days in (40, 8, 3, 1, 0):
        await past.charge(customer, str(D(days + 1) / 100))
        gap = {40: 32, 8: 5, 3: 2, 1: 1, 0: 0}[days]
        if gap:
            await past.back(gap)
    expected = {
        "usage": float(sum(spent.values())),
        "usage_daily": float(spent[now.date()]),
        "usage_weekly": float(sum(usd for day, usd in spent.items() if day >= monday)),
        "usage_monthly": float(sum(usd for day, usd in spent.items() if day >= first)),
    }
    for _ in range(2):  # before the days are summed, and after
        data = (await past.rig.client.get("/api/v1/key", headers=customer.key)).json()["data"]
        assert {name: data[name] for name in expected} == expected
        assert (data["limit"], data["limit_remaining"], data["limit_reset"]) == (None, None, None)
        await past.roll_up()


async def test_a_key_is_free_tier_until_something_was_paid(past: Past) -> None:
    customer = await past.rig.customer()
    assert (await past.rig.client.get("/api/v1/key", headers=customer.key)).json()["data"]["is_free_tier"] is True


async def test_the_key_read_needs_a_key_and_both_need_the_scope(past: Past) -> None:
    customer = await past.rig.customer("10")
    narrow = await past.rig.new_key(customer, scopes=["spend"])
    for path in ("/api/v1/key", "/api/v1/credits"):
        refused = await past.rig.client.get(path, headers={"x-api-key": narrow["api_key"]})
        assert (refused.status_code, refused.json()["error"]["metadata"]["error_code"]) == (403, "missing_scope")
        assert (await past.rig.client.get(path)).status_code == 401
        assert (await past.rig.client.get(path, headers={"api-key": customer.api_key})).status_code == 200
    refused = await past.rig.client.get("/api/v1/key", headers=customer.owner)
    assert (refused.status_code, refused.json()["error"]["metadata"]["error_code"]) == (401, "invalid_api_key")
