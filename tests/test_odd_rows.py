"""What the functions decide where rows are not as they were left: lost, removed, of another key, or too large."""

import asyncio
import gc
import uuid
from collections.abc import Awaitable
from typing import Any

import msgspec
import psycopg
import pytest

from app.kernel.db import Database, Params, Row
from app.kernel.errors import AppError, DatabaseUnavailable, HoldClosed, InvalidApiKey, RequestIdReuse
from app.keys.verify import KeyOwner
from app.metering.batch import Batches
from app.metering.functions import FUNCTIONS, CallParams, ReleaseAnswer
from app.metering.holds import Ask, Charged, Held, Work, expire_holds
from tests.rig import reported
from tests.test_batches import ACTS, PEPPER, SERVICE, Number, Numbered, function, meter, plant

MOST_NUSD = 2**63 - 1


def lose_holds(conn: psycopg.Connection[Any]) -> None:
    """As a crash of the database may, where holds need not be durable."""
    conn.execute(ACTS["crash"].format(holds="true", account="true").encode())


def held_by(conn: psycopg.Connection[Any], *owners: KeyOwner) -> list[int]:
    found = [conn.execute("SELECT held_nusd FROM api_key WHERE id = %s", [owner.key_id]).fetchone() for owner in owners]
    return [row[0] for row in found if row is not None]


# --- holds --------------------------------------------------------------------------------------------


async def test_a_settle_frees_and_counts_to_the_key_that_the_hold_is_of_though_its_ticket_is_anothers(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    first, second = plant(owner_conn, [1_000], [{}, {}])
    asking = meter(db)
    lost = await asking.authorize(SERVICE, first, Ask("r", 100, None, None))
    lose_holds(owner_conn)
    held = await asking.authorize(SERVICE, second, Ask("r", 70, None, None))
    charged = await asking.settle(SERVICE, lost.hold_id, Work(30))
    assert (charged.cost_nusd, charged.held_nusd) == (30, 0)
    assert held_by(owner_conn, first, second) == [0, 0]
    assert (await asking.settle(SERVICE, held.hold_id, Work(60))).charge_id == charged.charge_id


async def test_a_charge_whose_hold_was_removed_after_its_time_is_never_made_again(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    asking, ask = meter(db), Ask("r", 100, None, None)
    await asking.charge(SERVICE, owner, ask, Work(100))
    held = await asking.authorize(SERVICE, owner, Ask("h", 100, None, None))
    settled = await asking.settle(SERVICE, held.hold_id, Work(100))
    owner_conn.execute("DELETE FROM hold WHERE state <> 'open'")
    for again in (
        asking.charge(SERVICE, owner, ask, Work(100)), reported(asking, SERVICE, owner, ask, Work(100)),
        asking.authorize(SERVICE, owner, ask), asking.authorize(SERVICE, owner, Ask("h", 100, None, None)),
    ):  # fmt: skip
        with pytest.raises(RequestIdReuse):
            await again
    assert (await asking.settle(SERVICE, held.hold_id, Work(5))).charge_id == settled.charge_id
    assert owner_conn.execute("SELECT count(*) FROM usage").fetchone() == (2,)


async def test_a_settle_after_a_capture_was_charged_at_expiry_answers_that_charge(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    asking = meter(db)
    held = await asking.authorize(SERVICE, owner, Ask("r", 100, None, None))
    await asking.extend(SERVICE, held.hold_id, 60, 80)
    owner_conn.execute("UPDATE hold SET expires_at = now() - interval '1 second'")
    assert await expire_holds(db) == 1
    charged = await asking.settle(SERVICE, held.hold_id, Work(300))
    assert (charged.cost_nusd, charged.balance_nusd, charged.flags) == (80, 920, "captured")


async def test_a_hold_that_is_overdue_is_closed_to_its_request_until_it_is_extended(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    asking, ask = meter(db), Ask("r", 100, None, None)
    held = await asking.authorize(SERVICE, owner, ask)
    owner_conn.execute("UPDATE hold SET expires_at = now() - interval '1 second'")
    with pytest.raises(HoldClosed):
        await asking.authorize(SERVICE, owner, ask)
    await asking.extend(SERVICE, held.hold_id, 60, 0)
    assert await expire_holds(db) == 0
    assert (await asking.authorize(SERVICE, owner, ask)).is_repeat


async def test_a_call_counts_to_the_window_that_its_hold_was_made_in(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{"limit_nusd": 500, "reset_period": "day"}])
    asking = meter(db)
    held = await asking.authorize(SERVICE, owner, Ask("r", 400, None, None))
    owner_conn.execute(ACTS["yesterday"].format(holds=f"account_id = '{owner.account_id}'").encode())
    await asking.settle(SERVICE, held.hold_id, Work(400))
    assert (await asking.charge(SERVICE, owner, Ask("c", 500, None, None), Work(500))).cost_nusd == 500


async def test_a_key_is_nobodys_on_another_account(db: Database, owner_conn: psycopg.Connection[Any]) -> None:
    first, second = plant(owner_conn, [1_000, 1_000], [{}])
    crossed = KeyOwner(first.account_id, second.key_id)
    for call in (
        meter(db).authorize(SERVICE, crossed, Ask("r", 1, None, None)),
        meter(db).charge(SERVICE, crossed, Ask("c", 1, None, None), Work(1)),
    ):
        with pytest.raises(InvalidApiKey):
            await call


@pytest.mark.parametrize("batch", [True, False])
async def test_two_keys_of_one_account_share_its_balance_in_one_batch(
    db: Database, owner_conn: psycopg.Connection[Any], batch: bool
) -> None:
    owners = plant(owner_conn, [1_000], [{"limit_nusd": 800}, {"limit_nusd": 800}])
    asking = meter(db, batch=batch)
    calls = [asking.authorize(SERVICE, owners[n % 2], Ask(f"r{n}", 300, None, None)) for n in range(6)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, Held) for answer in answers) == 3
    assert sorted(held_by(owner_conn, *owners)) == [300, 600]


async def test_a_function_that_is_asked_nothing_answers_nothing(db: Database) -> None:
    for name, asked in FUNCTIONS.items():
        if name.startswith("meter_") and "lock" in asked.parameters and name not in ("meter_lock", "meter_expire"):
            params: dict[str, Any] = {each: [] for each in asked.parameters} | {"wait": True}
            assert await db.many(f"SELECT * FROM {asked.call()}", params | {"synchronous_commit": "on"}) == []


# --- figures that are too large -------------------------------------------------------------------------


async def test_a_hold_that_cannot_be_charged_keeps_nobody_elses_from_expiring(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    owners = plant(owner_conn, [1_000] * 20, [{}])
    asking = meter(db)
    held = [await asking.authorize(SERVICE, owner, Ask("r", 100, None, None)) for owner in owners]
    too_much = await asking.authorize(SERVICE, owners[7], Ask("r2", 100, None, None))
    await asking.extend(SERVICE, held[7].hold_id, 60, MOST_NUSD - 1_000)
    await asking.settle(SERVICE, too_much.hold_id, Work(MOST_NUSD))
    owner_conn.execute("UPDATE hold SET expires_at = now() - interval '1 second' WHERE state = 'open'")
    assert await expire_holds(db) == 19
    assert owner_conn.execute("SELECT account_id FROM hold WHERE state = 'open'").fetchall() == [
        (owners[7].account_id,)
    ]


async def test_an_impossible_call_does_not_let_others_wait_for_an_account_that_is_locked(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    locked, large, other = plant(owner_conn, [1_000] * 3, [{}])
    asking = meter(db)
    held = [await asking.authorize(SERVICE, large, Ask(f"r{n}", 10, None, None)) for n in range(2)]
    with owner_conn.transaction():
        owner_conn.execute("SELECT 1 FROM account WHERE id = %s FOR UPDATE", [locked.account_id])
        stuck = asyncio.create_task(asking.authorize(SERVICE, locked, Ask("r", 1, None, None)))
        settles = [asyncio.create_task(asking.settle(SERVICE, each.hold_id, Work(MOST_NUSD))) for each in held]
        await asyncio.wait(settles, timeout=5)
        assert [settle.done() for settle in settles] == [True, True]
        async with asyncio.timeout(2):
            await asking.authorize(SERVICE, other, Ask("r", 1, None, None))
        assert not stuck.done()
    assert (await stuck).amount_nusd == 1
    assert sorted(type(settle.exception()).__name__ for settle in settles) == ["InvalidField", "NoneType"]


# --- the way in which calls wait --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [True, False])
async def test_a_caller_who_leaves_while_an_account_is_locked_leaves_nothing_behind(
    db: Database, owner_conn: psycopg.Connection[Any], batch: bool
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    asking, complaints = meter(db, batch=batch), list[Any]()
    loop = asyncio.get_running_loop()
    gc.collect()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        with owner_conn.transaction():
            owner_conn.execute("SELECT 1 FROM account FOR UPDATE")
            calls = [
                asyncio.create_task(asking.charge(SERVICE, owner, Ask(f"r{n}", 1, None, None), Work(1)))
                for n in range(4)
            ]
            await asyncio.sleep(0.2)
            for left in calls[:3]:
                left.cancel()
            await asyncio.wait(calls[:3], timeout=5)
        assert isinstance(await calls[3], Charged)
        assert isinstance(await asking.charge(SERVICE, owner, Ask("r9", 1, None, None), Work(1)), Charged)
        del calls, left
        gc.collect()
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(None)
    assert complaints == []


class Refusing(Database):
    """A database that decides no two calls together, and none alone within the time that it is asked in."""

    def __init__(self, seconds: float) -> None:
        super().__init__("postgresql://nobody@127.0.0.1:1/none")
        self.seconds, self.asked = seconds, 0

    async def many(self, _: Any, params: Params) -> list[Row]:
        self.asked += 1
        if "," in params["0_number"]:
            raise psycopg.errors.CheckViolation
        await asyncio.sleep(self.seconds)
        raise DatabaseUnavailable(retry_after_seconds=1)


async def test_calls_that_are_tried_one_by_one_do_not_wait_for_each_other_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.metering.batch._LONGEST_WAIT_SECONDS", 0.25)
    db, account_id = Refusing(0.1), uuid.uuid4()

    class PassesBy:
        async def all(self, _: Any, __: Params) -> list[Any]:
            return []

        async def close(self) -> None:
            pass

    db.lane = PassesBy  # type: ignore[method-assign, assignment]
    batches = Batches(db)
    decide = batches.decider(function(), Numbered, Number)
    calls: list[Awaitable[Any]] = [decide(Numbered(account_id, uuid.uuid4(), number)) for number in range(40)]
    async with asyncio.timeout(2):
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(answer) for answer in answers} == {DatabaseUnavailable}
    assert db.asked < 10
    assert batches._apart == {}


async def test_an_account_is_not_taken_for_locked_when_its_waiting_calls_were_stopped(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    batches = Batches(db)
    decide = batches.decider(FUNCTIONS["meter_release"], CallParams, ReleaseAnswer)

    def params() -> CallParams:
        return CallParams(owner.account_id, uuid.uuid4())

    with owner_conn.transaction():
        owner_conn.execute("SELECT 1 FROM account FOR UPDATE")
        calls = [asyncio.ensure_future(decide(params())) for _ in range(5)]
        await asyncio.sleep(0.2)
        assert list(batches._apart) == [owner.account_id]
        for task in batches._deciding_apart:
            task.cancel()
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(answer) for answer in answers} == {DatabaseUnavailable}
    assert batches._apart == {}
    answer = await decide(params())
    assert answer is not None
    assert answer.state is None


async def test_each_refusal_of_the_functions_is_one_of_ours(db: Database, owner_conn: psycopg.Connection[Any]) -> None:
    """Amounts at the edge of what the books can hold: each verb decides, or refuses in words."""
    (owner,) = plant(owner_conn, [MOST_NUSD - 10], [{"limit_nusd": MOST_NUSD}])
    asking = meter(db)
    held = await asking.authorize(SERVICE, owner, Ask("r", 5, None, None))
    for call in (
        asking.authorize(SERVICE, owner, Ask("a", MOST_NUSD, None, None, min_nusd=0)),
        asking.authorize(SERVICE, owner, Ask("b", MOST_NUSD, None, None)),
        asking.charge(SERVICE, owner, Ask("c", MOST_NUSD, None, None), Work(MOST_NUSD)),
        asking.extend(SERVICE, held.hold_id, 60, MOST_NUSD),
        asking.authorize(SERVICE, owner, Ask("d", 1, None, None)),
        asking.settle(SERVICE, held.hold_id, Work(MOST_NUSD)),
        reported(asking, SERVICE, owner, Ask("e", 0, None, None), Work(MOST_NUSD)),
        reported(asking, SERVICE, owner, Ask("f", 0, None, None), Work(MOST_NUSD)),
        asking.authorize(SERVICE, owner, Ask("g", 0, None, None)),
    ):
        refused = (await asyncio.gather(call, return_exceptions=True))[0]
        assert not isinstance(refused, BaseException) or (isinstance(refused, AppError) and refused.status < 500)
    assert owner_conn.execute("SELECT posted_nusd FROM account").fetchone() == (-10,)
    owner_conn.execute("UPDATE hold SET expires_at = now() - interval '1 second' WHERE state = 'open'")
    await expire_holds(db)


async def test_a_hold_that_is_not_there_is_told_in_the_batch_that_asked_for_it(
    db: Database, owner_conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is locked waits apart: calls of the account that came later would overtake those that came first."""
    (owner,) = plant(owner_conn, [1_000], [{}])
    asking = meter(db)
    held = await asking.authorize(SERVICE, owner, Ask("r", 10, None, None))
    gone = msgspec.structs.replace(asking.opened(SERVICE, held.hold_id), hold_id=uuid.uuid4())
    monkeypatch.setattr(Database, "many", None)  # nothing is asked but in batches
    calls = [asking.release(SERVICE, gone), asking.extend(SERVICE, gone.sealed(PEPPER, SERVICE), 60, 0)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    monkeypatch.undo()
    assert [type(answer).__name__ for answer in answers] == ["HoldNotFound"] * 2
