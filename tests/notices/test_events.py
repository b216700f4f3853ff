"""What else is told: keys at their limit and before they expire, wallets that refuse, and the operator's own."""

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from app.audit.background import note_verdict
from app.kernel.security import Sealer
from app.keys.expiring import tell_of_expiring
from app.notices.reseal import reseal_all
from app.notices.tell import HOUSE, tell
from app.topups.health import look_at_backend
from app.wiring import name_operators_address
from tests.notices.receiver import receiving
from tests.notices.words import deliver, deliveries, set_notices, told
from tests.rig import Rig

NOWHERE = "http://127.0.0.1:9/"
SECRET = "whsec_" + "c2F0bWV0ZXItc2F0bWV0ZXItc2F0bWV0ZXItc2F0bWV0ZXI="


async def test_a_key_at_its_limit_is_told_once_a_window_however_many_calls_are_refused(rig: Rig) -> None:
    customer = await rig.customer("10")
    await set_notices(rig, customer, webhook_url=NOWHERE)
    key = await rig.new_key(customer, usage_limit_usd=1, reset_period="daily")
    answers = await asyncio.gather(*(rig.authorize(key["api_key"], "2") for _ in range(10)))
    assert {each["decision"] for each in answers} == {"deny"}
    await rig.house.limits_reached.idle()
    [reached] = told(rig, "key.limit_reached")
    assert (reached["key_id"], reached["limit_usd"]) == (key["_id"], 1)
    assert key["api_key"] not in json.dumps(reached)


async def test_a_key_is_told_of_within_a_week_of_its_end_once_and_a_short_lived_one_never(rig: Rig) -> None:
    customer = await rig.customer()
    await set_notices(rig, customer, webhook_url=NOWHERE)
    now = datetime.now(UTC)
    soon, later, short = (now + timedelta(days=6), now + timedelta(days=8), now + timedelta(hours=2))
    keys = [await rig.new_key(customer, expire_at=at.isoformat()) for at in (soon, later, short)]
    for _ in range(2):
        await tell_of_expiring(rig.house.db, now)
    assert [each["key_id"] for each in told(rig, "key.expiring")] == [keys[0]["_id"]]
    await tell_of_expiring(rig.house.db, now + timedelta(days=2))
    assert {each["key_id"] for each in told(rig, "key.expiring")} == {keys[0]["_id"], keys[1]["_id"]}


async def test_the_operator_is_told_at_the_address_of_the_settings(rig: Rig) -> None:
    """Of a top-up that waits for a review, an audit's difference, and a backend that is away: each once."""
    house = rig.house
    async with receiving() as receiver:
        settings = replace(house.settings, notice_webhook_url=receiver.url, notice_webhook_secret=SECRET)
        await name_operators_address(replace(house, settings=settings))
        await name_operators_address(replace(house, settings=settings))
        customer = await rig.customer()
        invoice_id = await rig.topup(customer, "20")
        rig.btcpay.change(invoice_id, amount=Decimal(3))
        await rig.poll()
        await rig.poll()
        for _ in range(2):
            await house.db.transaction(lambda session: note_verdict(session, 4, "one-audit"))
        await house.db.transaction(lambda session: note_verdict(session, 0, "a-clean-one"))
        rig.btcpay.is_down = True
        for _ in range(4):
            await look_at_backend(house.db, rig.btcpay)
        rig.btcpay.is_down = False
        await look_at_backend(house.db, rig.btcpay)
        for _ in range(3):
            await deliver(rig)
    assert sorted(receiver.types) == ["audit.difference", "backend.down", "review.waiting"]
    await name_operators_address(
        replace(house, settings=replace(settings, notice_webhook_url="", notice_webhook_secret=""))
    )
    assert rig.sql("SELECT count(*) FROM notice_address") == [(0,)]


async def test_no_notice_is_left_of_what_was_rolled_back_and_the_same_cause_is_told_once(rig: Rig) -> None:
    customer = await rig.customer()
    await set_notices(rig, customer, webhook_url=NOWHERE)
    [(account_id,)] = rig.sql("SELECT id FROM account")
    for fails in (True, False, False):

        async def work(session, fails=fails):  # type: ignore[no-untyped-def]
            await tell(session, account_id, "balance.low", {"balance_usd": 1}, once="cause")
            if fails:
                raise ValueError

        try:
            await rig.house.db.transaction(work)
        except ValueError:
            assert told(rig, "balance.low") == []
    assert len(told(rig, "balance.low")) == 1


async def test_a_credit_id_that_is_changed_is_told(rig: Rig) -> None:
    customer = await rig.customer()
    await set_notices(rig, customer, webhook_url=NOWHERE)
    answer = await rig.client.post("/accounts/rotate", headers=customer.owner, json={})
    assert answer.status_code in (200, 201), answer.text
    assert len(told(rig, "account.rotated")) == 1
    assert answer.json()["credit_id"] not in json.dumps(told(rig, "account.rotated"))


async def test_what_is_sealed_is_sealed_anew_and_still_delivered(rig: Rig) -> None:
    customer, house = await rig.customer(), rig.house
    async with receiving() as old, receiving() as receiver:
        await set_notices(rig, customer, webhook_url=old.url)
        await set_notices(rig, customer, webhook_url=receiver.url)
        await rig.client.post("/notices/secret", headers=customer.owner)
        newer = Sealer([("newer", b"n" * 32), *house.settings.sealing_keys])
        assert (await reseal_all(house.db, newer)).done == 4
        assert (await reseal_all(house.db, newer)).done == 0
        sealed = rig.sql("SELECT sealed_url, sealed_secret, sealed_secret_before FROM notice_address")
        assert all(each.startswith("newer.") for each in sealed[0])
        assert (await reseal_all(house.db, house.settings.sealer)).unreadable == 4
        house.courier._sealer = newer  # the process that was started with it
        for _ in range(3):
            await deliver(rig)
    assert (len(old.received), len(receiver.received)) == (1, 2)
    rig.sql("DELETE FROM notice_address; UPDATE account SET notice_mark_nusd = NULL")
    assert HOUSE.int == 0
    assert {each["state"] for each in await deliveries(rig, customer)} == {"delivered"}
