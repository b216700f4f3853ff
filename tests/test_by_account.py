"""METER_BATCH=account: each account's calls in flight take one trip by a function that has its id first, and no answer changes.

That is what a database sharded by account needs, where the function is delegated to the account's server; here on plain PostgreSQL.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from app.audit import audit
from app.kernel.db import Database
from app.metering.functions import BY_ACCOUNT, FUNCTIONS, OF_ACCOUNT
from app.metering.holds import Ask, Held, Meter, Work
from tests.test_batches import BALANCES, KEYS, PEPPER, SERVICE, Side, Stream, meter, outcome, plant, same_rows


class Noted(Database):
    """Knows which statements were asked alone, and of whom."""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_size=12)
        self.asked: list[tuple[str, Any]] = []

    async def many(self, statement: Any, params: Any) -> Any:
        if BY_ACCOUNT in statement and params:
            self.asked.append((statement, params))
        return await super().many(statement, params)


@pytest.fixture
async def db(clean: str) -> AsyncIterator[Noted]:
    made = Noted(clean)
    await made.open()
    yield made
    report = await audit(made)
    await made.close()
    assert report.is_clean, report.findings


def by_account(db: Database) -> Meter:
    return Meter(db, PEPPER, hold_sync_commit=True, batch=True, by_account=True)


@pytest.mark.parametrize("seed", range(50, 52))
async def test_a_random_stream_leaves_the_same_answers_and_rows(
    db: Noted, owner_conn: psycopg.Connection[Any], seed: int
) -> None:
    single = Side(meter(db, batch=False), plant(owner_conn, BALANCES, KEYS))
    grouped = Side(by_account(db), plant(owner_conn, BALANCES, KEYS))
    await Stream(seed, single, grouped, owner_conn, db).run(30)
    same_rows(owner_conn, single, grouped)
    assert single.low_counts() == grouped.low_counts()
    owner_conn.execute("UPDATE account SET low_nusd = NULL")  # nobody keeps these filled


async def test_the_calls_of_an_account_in_flight_are_one_trip_of_its_own(
    db: Noted, owner_conn: psycopg.Connection[Any]
) -> None:
    first, second = plant(owner_conn, [10_000, 10_000], [{}])
    metered = by_account(db)
    await metered.authorize(SERVICE, first, Ask("before", 100, None, None))  # by now it is known what lives where
    db.asked.clear()
    owners = [first, second] * 20
    held = await asyncio.gather(
        *(metered.authorize(SERVICE, owner, Ask(f"r{n}", 100, None, None)) for n, owner in enumerate(owners))
    )
    assert len({each.hold_id for each in held}) == 40
    assert Counter(params["3_account"] for _, params in db.asked) == {first.account_id: 1, second.account_id: 1}
    assert {statement.split("(")[0] for statement, _ in db.asked} == {f"SELECT * FROM {BY_ACCOUNT}.meter_authorize"}


async def test_two_hosts_at_once_never_pass_the_balance_and_repeats_have_one_effect(
    db: Noted, owner_conn: psycopg.Connection[Any]
) -> None:
    """One of them decides by account and one in batches, as while an operator changes the setting."""
    (owner,) = plant(owner_conn, [1_000], [{}])
    workers = [by_account(db), meter(db)]
    answers = await asyncio.gather(
        *(outcome(workers[n % 2].authorize(SERVICE, owner, Ask(f"r{n // 2}", 100, None, None))) for n in range(64))
    )
    held = {answer.hold_id for answer in answers if isinstance(answer, Held)}
    assert len(held) == 10
    settled = await asyncio.gather(
        *(workers[n % 2].settle(SERVICE, hold_id, Work(50)) for hold_id in held for n in range(4))
    )
    assert len({each.charge_id for each in settled}) == 10
    assert owner_conn.execute("SELECT count(*) FROM usage").fetchone() == (10,)


async def test_an_account_that_is_locked_holds_up_no_other(db: Noted, owner_conn: psycopg.Connection[Any]) -> None:
    locked, free = plant(owner_conn, [1_000, 1_000], [{}])
    metered = by_account(db)
    with owner_conn.transaction():
        owner_conn.execute("SELECT FROM account WHERE id = %s FOR UPDATE", [locked.account_id])
        waiting = asyncio.create_task(metered.authorize(SERVICE, locked, Ask("a", 100, None, None)))
        assert (await metered.authorize(SERVICE, free, Ask("b", 100, None, None))).amount_nusd == 100
        assert not waiting.done()
    assert (await waiting).amount_nusd == 100


def test_each_verb_has_its_wrapper_that_only_the_service_may_call(owner_conn: psycopg.Connection[Any]) -> None:
    verbs = {"meter_authorize", "meter_charge", "meter_release", "meter_extend", "meter_expire", "meter_verify"}
    assert verbs <= OF_ACCOUNT.keys() <= FUNCTIONS.keys()
    found = owner_conn.execute(
        """SELECT proname, prosrc, proargnames[1], has_function_privilege('satmeter_runtime', p.oid, 'EXECUTE'),
                  EXISTS (SELECT FROM aclexplode(proacl) WHERE grantee = 0)
           FROM pg_proc p WHERE pronamespace = %s::regnamespace ORDER BY 1""",
        [BY_ACCOUNT],
    ).fetchall()
    assert found == [(name, OF_ACCOUNT[name].body, "p_account", True, False) for name in sorted(OF_ACCOUNT)]
