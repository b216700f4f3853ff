"""Accounts that nothing was ever done with are closed after 90 days, and no other one is."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from app.accounts.reap import reap_empty
from app.audit.continuous import look_on
from app.jobs import JOBS
from app.topups.admission import lock_account
from tests.rig import Customer, Rig
from tests.wallets import NWC_URL

Use = Callable[[Rig, Customer], Awaitable[object]]


async def _reap(rig: Rig, days: int = 90) -> int:
    return await reap_empty(rig.house.db, rig.house.keyring, days, at_once=3)


def _age(rig: Rig, days: int = 91) -> None:
    rig.sql("UPDATE account SET created_at = now() - make_interval(days => %s)", days)


async def _status(rig: Rig, customer: Customer) -> tuple[int, int]:
    by_key = await rig.client.get("/credits/balance", headers=customer.key)
    by_id = await rig.client.get("/credits/balance", headers=customer.owner)
    return by_key.status_code, by_id.status_code


async def _has_a_hold(rig: Rig, customer: Customer) -> None:
    await rig.fund(customer, "20")
    await rig.authorize(customer.api_key, "0.5")


async def _connected_a_wallet(rig: Rig, customer: Customer) -> None:
    answer = await rig.client.post("/nwc-auto-topup/connect", headers=customer.owner, json={"nwc_url": NWC_URL})
    assert answer.status_code == 200, answer.text


async def _renamed_its_key(rig: Rig, customer: Customer) -> None:
    [key] = (await rig.client.get("/keys", headers=customer.owner)).json()["data"]
    answer = await rig.client.patch(f"/keys/{key['_id']}", headers=customer.owner, json={"name": "mine"})
    assert answer.status_code == 200, answer.text


async def _revoked_its_key(rig: Rig, customer: Customer) -> None:
    [key] = (await rig.client.get("/keys", headers=customer.owner)).json()["data"]
    await rig.client.delete(f"/keys/{key['_id']}", headers=customer.owner)


async def _is_frozen(rig: Rig, customer: Customer) -> None:
    rig.sql("UPDATE account SET status = 'frozen'")


async def _may_go_below_zero(rig: Rig, customer: Customer) -> None:
    rig.sql("UPDATE account SET floor_nusd = -1")


USES: list[Use] = [
    lambda rig, customer: rig.fund(customer, "20"),
    lambda rig, customer: rig.topup(customer, "20"),
    lambda rig, customer: rig.new_key(customer),
    _has_a_hold, _connected_a_wallet, _renamed_its_key, _revoked_its_key, _is_frozen, _may_go_below_zero,
]  # fmt: skip


async def test_an_empty_account_is_closed_after_its_days_and_its_secrets_work_no_more(rig: Rig) -> None:
    customers = [await rig.customer() for _ in range(8)]  # more than are looked at in one transaction
    _age(rig, 89)
    assert await _reap(rig) == 0
    _age(rig)
    assert await _reap(rig, days=0) == 0, "0 is never"
    assert [await _status(rig, each) for each in customers] == [(200, 200)] * 8
    assert await _reap(rig) == 8
    assert [await _status(rig, each) for each in customers] == [(401, 401)] * 8
    assert rig.sql("SELECT status, count(*) FROM account GROUP BY 1") == [("closed", 8)]
    assert rig.sql("SELECT count(*) FROM api_key WHERE sealed_secret IS NOT NULL OR deleted_at IS NULL") == [(0,)]
    assert await _reap(rig) == 0, "once"


async def test_what_was_sealed_of_an_account_does_not_keep_it_and_its_seals_hold_when_it_is_closed(rig: Rig) -> None:
    await rig.customer()
    await rig.house.notary.seal()
    await look_on(rig.house.db)
    _age(rig)
    assert await _reap(rig) == 1
    await rig.house.notary.seal()
    await rig.audit()


@pytest.mark.parametrize("use", USES)
async def test_an_account_that_anything_was_done_with_stays(rig: Rig, use: Use) -> None:
    customer = await rig.customer()
    await use(rig, customer)
    _age(rig, 4000)
    before = await _status(rig, customer)
    assert await _reap(rig) == 0
    assert await _status(rig, customer) == before
    rig.sql("UPDATE account SET floor_nusd = 0")


async def test_what_is_new_in_the_database_and_names_an_account_keeps_it(rig: Rig) -> None:
    """A room that comes later need not be known to the reaper."""
    await rig.customer()
    _age(rig)
    rig.sql("CREATE TABLE a_later_room AS SELECT id AS account_id FROM account")
    rig.sql("GRANT SELECT ON a_later_room TO satmeter_runtime")
    try:
        assert await _reap(rig) == 0
    finally:
        rig.sql("DROP TABLE a_later_room")
    assert await _reap(rig) == 1


async def test_a_first_top_up_and_the_reaper_at_one_moment_leave_no_top_up_that_nobody_could_spend(rig: Rig) -> None:
    """Whoever has the account's row first: either it is kept, or the top-up is refused."""
    for _ in range(6):
        customer = await rig.customer()
        _age(rig)
        asked = rig.client.post("/topup/create/btc", headers=customer.key, json={"amount": "20", "currency": "USD"})
        answer, _ = await asyncio.gather(asked, _reap(rig))
        topups = rig.sql("SELECT count(*) FROM topup t JOIN account a ON a.id = t.account_id WHERE a.status = 'closed'")
        assert topups == [(0,)]
        assert answer.status_code in (201, 401), answer.text


async def test_who_was_let_in_before_the_reaper_came_makes_no_top_up_behind_it(rig: Rig) -> None:
    await rig.customer()
    _age(rig)
    [(account_id,)] = rig.sql("SELECT id FROM account")
    await _reap(rig)
    with pytest.raises(Exception, match="Invalid credit id"):
        await rig.house.db.transaction(lambda session: lock_account(session, account_id))


def test_the_clock_does_it() -> None:
    assert "close empty accounts" in {job.name for job in JOBS}
