"""The balance answer tells how fast money goes, and how long it lasts."""

from datetime import UTC, datetime
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from app.accounts.runway import runway
from tests.activity.conftest import Past

D = Decimal
DAY = 86_400


async def test_nothing_spent_has_no_runway(past: Past) -> None:
    customer = await past.rig.customer("10")
    answer = await past.ask("/credits/balance", customer)
    assert answer == {
        "balance": 10, "held": 0, "available": 10, "currency": "USD", "burn_usd_per_day": None, "runway_days": None, "low": None
    }  # fmt: skip


async def test_a_new_accounts_first_day_counts_as_a_whole_one(past: Past) -> None:
    customer = await past.rig.customer("10")
    await past.charge(customer, "3")
    answer = await past.ask("/credits/balance", customer)
    assert (answer["burn_usd_per_day"], answer["runway_days"]) == (3, D("2.3"))


async def test_seven_full_days_and_today_are_averaged_and_older_ones_are_not(past: Past) -> None:
    customer = await past.rig.customer("100")
    await past.charge(customer, "40")
    await past.back(20)
    made = await past.charge(customer, "6")
    await past.rig.meter("refund", charge_id=made["charge_id"], amount_usd="1")
    await past.back(7)
    await past.charge(customer, "3")
    await past.roll_up()
    now = datetime.now(UTC)
    seconds = 7 * DAY + now.hour * 3600 + now.minute * 60 + now.second
    answer = await past.ask("/credits/balance", customer)
    exact = D(8) * DAY / seconds
    assert exact - D("0.001") < answer["burn_usd_per_day"] < exact + D("0.001")
    assert answer["runway_days"] == (52 / exact).quantize(D("0.1"), "ROUND_DOWN")
    assert answer["balance"] == 52
    assert past.kept()


async def test_it_is_the_same_before_and_after_the_days_are_summed_and_dropped(past: Past) -> None:
    customer = await past.rig.customer("100")
    await past.charge(customer, "40")
    await past.back(95)
    await past.charge(customer, "8")
    await past.back(5)
    await past.roll_up()
    burn = (await past.ask("/credits/balance", customer))["burn_usd_per_day"]
    assert D("1") <= burn <= D("1.15")
    [(month,)] = past.rig.sql("SELECT date_trunc('month', min(day))::date FROM usage_day")
    await past.drop(month)
    after = (await past.ask("/credits/balance", customer))["burn_usd_per_day"]
    assert abs(after - burn) < D("0.001")


async def test_low_is_told_where_there_is_a_mark(past: Past) -> None:
    customer = await past.rig.customer("10")
    for mark, low in (("20000000000", True), ("10000000000", False), (None, None)):
        past.rig.sql("UPDATE account SET low_nusd = %s", mark)
        assert (await past.ask("/credits/balance", customer))["low"] is low


async def test_an_empty_account_lasts_no_day(past: Past) -> None:
    customer = await past.rig.customer("10")
    held = await past.rig.authorize(customer.api_key, "1")
    await past.rig.settle(held["hold_id"], "11")
    answer = await past.ask("/credits/balance", customer)
    assert (answer["balance"], answer["burn_usd_per_day"], answer["runway_days"]) == (-1, 11, 0)


@given(st.integers(-5, 10**18), st.integers(-1, 8 * DAY), st.integers(-(10**18), 10**18))
def test_the_runway_never_promises_too_much(spent: int, seconds: int, spendable: int) -> None:
    burn, tenths = runway(spent, seconds, spendable)
    if spent <= 0:
        assert (burn, tenths) == (None, None)
        return
    assert burn is not None
    assert tenths is not None
    assert burn * max(seconds, DAY) >= spent * DAY > (burn - 1) * max(seconds, DAY)
    assert tenths >= 0
    if spendable > 0:
        assert D(tenths) * spent * DAY <= D(spendable) * 10 * max(seconds, DAY) < D(tenths + 1) * spent * DAY
