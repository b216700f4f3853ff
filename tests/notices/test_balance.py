"""Balances are told of when they pass their marks: once each, with the charge, and again after a top-up."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from app.accounts.foretell import foretell
from app.admin.tokens import create_token
from tests.notices.receiver import receiving
from tests.notices.words import deliver, deliveries, set_notices, spend, told
from tests.rig import Rig, exact

NOWHERE = "http://127.0.0.1:9/"


async def test_a_balance_is_told_at_50_20_and_5_percent_and_when_it_is_empty_once_each(rig: Rig) -> None:
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE)
    for usd in ("4.999999999", "0.000000001", "1", "2", "1.5", "0.25", "0.25"):
        await spend(rig, customer, usd)
    assert [(each["percent"], each["balance_usd"]) for each in told(rig, "balance.low")] == [(50, 5), (20, 2), (5, 0.5)]
    [empty] = told(rig, "balance.empty")
    assert (empty["balance_usd"], empty["reasons"]) == (0, ["empty"])


async def test_a_charge_that_passes_several_marks_tells_once_of_all_of_them(rig: Rig) -> None:
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE, low_balance_usd=3)
    await spend(rig, customer, "9")
    [low] = told(rig, "balance.low")
    assert low["reasons"] == ["50_percent", "low_balance", "20_percent"]
    assert (low["percent"], low["last_topup_usd"], low["low_balance_usd"]) == (20, 10, 3)


async def test_a_topup_arms_every_mark_again_by_its_own_size(rig: Rig) -> None:
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE)
    await spend(rig, customer, "9.8")
    await rig.fund(customer, "20")
    await spend(rig, customer, "10.1")
    await spend(rig, customer, "0.1")
    assert [each["last_topup_usd"] for each in told(rig, "balance.low")] == [10, 20]
    assert told(rig, "balance.low")[1]["percent"] == 50


async def test_what_passed_before_anybody_wanted_to_hear_of_it_is_not_told(rig: Rig) -> None:
    customer = await rig.customer("10")
    await spend(rig, customer, "6")
    await set_notices(rig, customer, webhook_url=NOWHERE)
    await spend(rig, customer, "1")
    assert told(rig, "balance.low") == []
    await spend(rig, customer, "1")
    assert [each["percent"] for each in told(rig, "balance.low")] == [20]


async def test_an_account_without_an_address_has_no_mark_and_no_row(rig: Rig) -> None:
    customer = await rig.customer("10")
    await spend(rig, customer, "10")
    assert rig.sql("SELECT notice_mark_nusd, (SELECT count(*) FROM notice) FROM account WHERE posted_nusd = 0") == [
        (None, 0)
    ]


async def test_a_refused_call_and_a_repeated_settle_tell_nothing_more(rig: Rig) -> None:
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE)
    held = await rig.authorize(customer.api_key, "6")
    await rig.settle(held["hold_id"], "6")
    await rig.settle(held["hold_id"], "6")
    assert (await rig.authorize(customer.api_key, "100"))["decision"] == "deny"
    assert len(told(rig, "balance.low")) == 1


async def test_a_batch_tells_once_and_lowers_the_mark_to_where_its_last_charge_left_it(rig: Rig) -> None:
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE)
    holds = [(await rig.authorize(customer.api_key, "3"))["hold_id"] for _ in range(3)]
    answer = await rig.meter("settle/batch", settles=[{"hold_id": hold, "cost_usd": "3"} for hold in holds])
    assert answer.status_code == 200, answer.text
    [low] = told(rig, "balance.low")
    assert (low["balance_usd"], low["reasons"]) == (1, ["50_percent", "20_percent"])
    assert rig.sql("SELECT notice_mark_nusd FROM account WHERE posted_nusd > 0") == [(500_000_001,)]


async def test_what_an_account_calls_low_needs_no_wallet(rig: Rig) -> None:
    customer = await rig.customer("10")
    assert (await rig.client.get("/credits/balance", headers=customer.key)).json()["low"] is None
    await set_notices(rig, customer, low_balance_usd="9.5")
    assert (await rig.client.get("/credits/balance", headers=customer.key)).json()["low"] is False
    await spend(rig, customer, "1")
    assert (await rig.client.get("/credits/balance", headers=customer.key)).json()["low"] is True
    assert exact(await rig.client.get("/notices", headers=customer.owner))["low_balance_usd"] == Decimal("9.5")


async def test_what_an_account_calls_low_is_told_also_where_it_was_low_when_it_was_set(rig: Rig) -> None:
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE, low_balance_usd=20)
    assert told(rig, "balance.low") == []
    await spend(rig, customer, "1")
    await spend(rig, customer, "1")
    assert [each["reasons"] for each in told(rig, "balance.low")] == [["low_balance"]]


@pytest.mark.parametrize("is_excluded", [False, True])
async def test_only_events_that_were_chosen_are_told(rig: Rig, is_excluded: bool) -> None:
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE, events=["balance.empty" if is_excluded else "balance.low"])
    await spend(rig, customer, "6")
    assert len(told(rig, "balance.low")) == (not is_excluded)
    await spend(rig, customer, "4")
    assert len(told(rig, "balance.empty")) == is_excluded


async def test_a_short_runway_is_told_once_for_a_topup(rig: Rig) -> None:
    customer = await rig.customer("100")
    await set_notices(rig, customer, webhook_url=NOWHERE)
    now = datetime.now(UTC)
    await spend(rig, customer, "20")
    assert await foretell(rig.house.db, now) == 0  # $80 at $20 a day
    await spend(rig, customer, "20")
    assert await foretell(rig.house.db, now) == 1
    assert await foretell(rig.house.db, now) == 0
    [short] = told(rig, "balance.low")
    assert (short["reasons"], short["runway_days"], short["burn_usd_per_day"]) == (["runway"], 1.5, 40)
    await rig.fund(customer, "10")
    assert await foretell(rig.house.db, now + timedelta(minutes=1)) == 1


async def test_the_notice_and_the_charge_are_one_transaction(rig: Rig) -> None:
    """The charge's entry and the notice have one time: that of their transaction."""
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE)
    await spend(rig, customer, "6")
    [(entry,)] = rig.sql("SELECT created_at FROM entry WHERE kind = 'usage'")
    [(notice,)] = rig.sql("SELECT created_at FROM notice WHERE type = 'balance.low'")
    assert entry == notice


async def test_topups_are_told_as_what_they_are_with_their_credit(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving() as receiver:
        await set_notices(rig, customer, webhook_url=receiver.url)
        await rig.fund(customer, "10", "btc-lightning")
        late, part = await rig.topup(customer, "20"), await rig.topup(customer, "40")
        rig.btcpay.pay(late, late=True)
        rig.btcpay.pay(part, share=Decimal("0.5"))
        await rig.poll()
        await rig.poll()
        await deliver(rig)
        await deliver(rig)
    assert sorted(receiver.types)[:2] == ["topup.late", "topup.settled"]
    [settled] = [each.json["data"] for each in receiver.received if each.json["type"] == "topup.settled"]
    assert (settled["credited_usd"], settled["bonus_usd"], settled["balance_usd"]) == (10, 0.5, 10.5)
    assert {each["state"] for each in await deliveries(rig, customer)} == {"delivered"}


async def test_an_operator_s_debit_is_told_as_a_charge_is_and_a_credit_arms_what_it_rises_above(rig: Rig) -> None:
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE)
    token = await create_token(rig.house.db, rig.house.settings.pepper, "admin", "operator")
    [(account_id,)] = rig.sql("SELECT id FROM account")
    for verb, usd in (("debit", "6"), ("credit", "4"), ("debit", "4")):
        answer = await rig.client.post(
            f"/admin/accounts/{account_id}/{verb}", headers={"Authorization": f"Bearer {token}"},
            json={"amount_usd": usd, "reason": "a test of notices"},
        )  # fmt: skip
        assert answer.status_code in (200, 201), answer.text
    assert [(each["percent"], each["balance_usd"]) for each in told(rig, "balance.low")] == [(50, 4), (50, 4)]
