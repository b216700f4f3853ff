"""Accounts over several servers (Citus): each is decided where it is, one server that dies takes no other with it, shards move.

CITUS_URL is a coordinator with two workers or more, as its superuser; what is in that database is lost. The other files of `make
citus` run the ordinary acceptance there. CITUS_DOWN and CITUS_UP are commands that stop and start one of the workers; CITUS_FAILOVER
kills one, promotes its synchronous standby and says so to the coordinator (citus_update_node).
"""

import asyncio
import csv
import gzip
import os
import subprocess
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.activity.archive import DAYS_AHEAD, drop, export, make_partitions, months
from app.activity.calendar import Span
from app.activity.rollup import keep_up, rebuild, roll_up
from app.admin.accounts import adjust
from app.audit import audit
from app.audit.putting_away import drop as drop_entries
from app.audit.putting_away import export as export_entries
from app.audit.sealing import seal
from app.kernel.db import Database
from app.kernel.errors import DatabaseUnavailable
from app.kernel.security import Admin
from app.kernel.shards import Shards, everywhere, unreachable
from app.keys.verify import KeyOwner
from app.metering.functions import OF_ACCOUNT
from app.metering.holds import Ask, Meter, Work, expire_holds
from app.metering.retention import forget_closed_holds
from app.migrations import MigrationError, check, migrate
from tests.databases import CITUS, empty
from tests.past import move_back
from tests.rig import Customer, Rig, exact
from tests.test_batches import PEPPER, SERVICE, plant

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CITUS, reason="CITUS_URL is not set")]
_DOWN, _UP = os.environ.get("CITUS_DOWN", ""), os.environ.get("CITUS_UP", "")
_FAILOVER = os.environ.get("CITUS_FAILOVER", "")
_SHARDS = """SELECT s.shardid, n.nodename, n.nodeport FROM pg_dist_shard s JOIN pg_dist_placement USING (shardid)
             JOIN pg_dist_node n USING (groupid) WHERE s.logicalrelid = 'account'::regclass ORDER BY 1"""


def metered(db: Database) -> Meter:
    return Meter(db, PEPPER, hold_sync_commit=True, batch=True, by_account=True)


async def test_every_server_with_accounts_has_the_functions_beside_each_shard(clean: str, db: Database) -> None:
    with psycopg.connect(clean, autocommit=True) as conn:
        shard, host, port = conn.execute(_SHARDS).fetchall()[0]
        command = f"SET citus.enable_ddl_propagation = off; DROP SCHEMA shard_{shard} CASCADE"
        conn.execute(
            "SELECT master_run_on_worker(ARRAY[%s::text], ARRAY[%s::int], ARRAY[%s], false)", [host, port, command]
        )
    with pytest.raises(MigrationError, match=f"1 shards do not have this code's functions .*shard_{shard}.*migrate"):
        check(clean)
    assert migrate(clean)
    check(clean)
    assert not migrate(clean)


async def test_accounts_of_two_shards_are_never_decided_by_one(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    owners = plant(owner_conn, [1_000] * 20, [{}])
    first, other = await _of_two_shards(db, owners)
    asked = OF_ACCOUNT["meter_expire"].call()
    accounts = [first.account_id, other.account_id]
    with pytest.raises(psycopg.DataError, match="not all in one shard"):
        await db.one(
            f"SELECT * FROM {asked}", {"account": accounts[0], "lock": accounts, "wait": False, "charge_id": []}
        )


async def test_what_is_written_on_two_servers_is_prepared_on_both_before_it_is_committed(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    """An operator's act is the coordinator's, its entry the worker's; a charge is the worker's alone."""
    [owner] = plant(owner_conn, [1_000], [{}])

    def prepared() -> set[str]:
        return {name for (name,) in owner_conn.execute("SELECT gid FROM pg_dist_transaction").fetchall()}

    before, admin = prepared(), Admin(uuid.uuid4(), "test")
    await metered(db).charge(SERVICE, owner, Ask(uuid.uuid4().hex, 100, None, None), Work(50))
    assert not prepared() - before
    await db.transaction(lambda session: adjust(session, PEPPER, admin, owner.account_id, 1_000, "for a test"))
    assert len(prepared() - before) == 1


async def test_the_role_of_the_service_rewrites_no_entry_on_any_server(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    plant(owner_conn, [1_000] * 20, [{}])
    for shard, host, port in owner_conn.execute(_SHARDS).fetchall():
        told = {"host": host, "port": port, "user": "satmeter_runtime", "dbname": owner_conn.info.dbname}
        with psycopg.connect(**told, autocommit=True) as conn:
            for forged in (
                "UPDATE {}.entry SET amount_nusd = 1",
                "UPDATE {}.account SET floor_nusd = -1",
                "UPDATE {}.usage SET cost_nusd = 0",
                "DELETE FROM {}.entry",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    conn.execute(forged.format(f"shard_{shard}").encode())


async def test_calls_are_summed_by_day_beside_their_accounts(db: Database, owner_conn: psycopg.Connection[Any]) -> None:
    owners = plant(owner_conn, [10**9] * 20, [{}])
    meter = metered(db)
    for owner in owners:
        for _ in range(3):
            await meter.charge(SERVICE, owner, Ask(uuid.uuid4().hex, 100, None, None), Work(50))
    assert await keep_up(db) == 60 + 20  # the calls, and the entry that each account began with
    days = owner_conn.execute("SELECT requests, cost_nusd FROM usage_day").fetchall()
    assert days == [(3, 150)] * 20
    assert await roll_up(db) == 0
    owner_conn.execute("UPDATE usage_day SET requests = 4")
    assert await rebuild(db) == 20
    assert owner_conn.execute("SELECT sum(requests) FROM usage_day").fetchone() == (60,)


async def test_a_month_of_calls_is_exported_and_dropped(
    db: Database, owner_conn: psycopg.Connection[Any], tmp_path: Path
) -> None:
    owners = plant(owner_conn, [10**9] * 20, [{}])
    meter, month = metered(db), datetime.now(UTC).date().replace(day=1)
    for owner in owners:
        await meter.charge(SERVICE, owner, Ask(uuid.uuid4().hex, 100, None, None), Work(50))
    later = datetime.now(UTC) + timedelta(days=120)
    owning = Database(CITUS, pool_size=2, role=None)
    await owning.open()
    try:
        assert (await export(owning, month, tmp_path / "calls.csv.gz", later)).calls == 20
        [kept] = [each for each in await months(owning) if each["month"] == month]
        assert kept["calls"] == 20
        assert kept["bytes"] > 500_000  # of all shards, where the coordinator's own table is empty
        assert (await drop(owning, month, later)).calls == 20
        assert owner_conn.execute("SELECT count(*) FROM usage").fetchone() == (0,)
        assert owner_conn.execute("SELECT sum(calls), sum(cost_nusd) FROM usage_dropped").fetchone() == (20, 1000)
        assert (await audit(db)).is_clean
    finally:
        await owning.close()
        await make_partitions(db)


@pytest.mark.parametrize("by_day", [False, True])
async def test_calls_that_came_before_their_partition_move_into_it_while_more_come(
    db: Database, owner_conn: psycopg.Connection[Any], by_day: bool
) -> None:
    owners = plant(owner_conn, [10**9] * 20, [{}])
    meter, charged, is_over, today = metered(db), Counter[uuid.UUID](), asyncio.Event(), datetime.now(UTC)
    month, day = f"usage_{today:%Y_%m}", f"usage_{today:%Y_%m_%d}"
    await make_partitions(db)  # those to come are there, whichever tests came before
    owner_conn.execute(f"DROP TABLE {month}".encode())

    async def call(number: int) -> None:
        while not is_over.is_set():
            owner, ask = owners[number % len(owners)], Ask(uuid.uuid4().hex, 100, None, None)
            await _until_answered(lambda: meter.charge(SERVICE, owner, ask, Work(50)))  # noqa: B023 - called at once
            charged[owner.account_id] += 1
            number += 7

    calls = [asyncio.create_task(call(number)) for number in range(8)]
    try:
        await asyncio.sleep(1)
        late = owner_conn.execute("SELECT count(*) FROM usage_default").fetchone()
        made = await _until_answered(lambda: make_partitions(db, by_day=by_day))
        before = charged.total()
        await asyncio.sleep(1)
        assert charged.total() > before
    finally:
        is_over.set()
        await asyncio.gather(*calls)
    try:
        assert late is not None
        assert late[0] > 20
        assert made == (DAYS_AHEAD + 1 if by_day else 1)
        assert owner_conn.execute("SELECT count(*) FROM usage_default").fetchone() == (0,)
        found = owner_conn.execute(
            f"SELECT account_id, count(*) FROM {day if by_day else month} GROUP BY 1".encode()
        ).fetchall()
        assert dict(found) == charged
        assert (await audit(db)).is_clean
        print(f"{late[0]} calls were there before their partition: {charged.total()} in it, none lost, none twice")
    finally:
        empty(CITUS)
        for (name,) in owner_conn.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'usage'::regclass"
        ).fetchall():
            if len(name) == len(day):
                owner_conn.execute(f"DROP TABLE {name}".encode())
        await make_partitions(db)


async def test_entries_of_calls_long_dropped_are_exported_and_dropped(
    rig: Rig, owner_conn: psycopg.Connection[Any], tmp_path: Path
) -> None:
    customers = [await rig.customer("10") for _ in range(12)]
    for customer in customers:
        await rig.settle((await rig.authorize(customer.api_key, "1"))["hold_id"], "0.25")
        made = exact(await rig.meter("charge", api_key=customer.api_key, cost_usd="0.5", request_id=uuid.uuid4().hex))
        for _ in range(2):
            await rig.meter("charge", api_key=customer.api_key, cost_usd="0.01", request_id=uuid.uuid4().hex)
    await rig.meter("refund", charge_id=made["charge_id"], amount_usd="0.2")
    _move_back(owner_conn, 500)
    house, month = rig.house, (datetime.now(UTC) - timedelta(days=500)).date().replace(day=1)
    await make_partitions(house.db)
    assert owner_conn.execute("SELECT count(*) FROM usage_default").fetchone() == (0,)
    await roll_up(house.db)
    owning = Database(CITUS, pool_size=2, role=None)
    await owning.open()
    try:
        await export(owning, month, tmp_path / "calls.csv.gz", datetime.now(UTC))
        await drop(owning, month, datetime.now(UTC))
        await forget_closed_holds(house.db)
        await seal(house.db, house.settings.pepper)
        balances = [await rig.balance(each) for each in customers]
        assert (await export_entries(owning, Span(month), tmp_path / "entries.csv.gz")).entries == 47
        await rig.audit()
        assert (await drop_entries(owning, house.settings.pepper, Span(month), datetime.now(UTC))).entries == 47
        assert owner_conn.execute("SELECT count(*) FROM entry WHERE kind = 'usage'").fetchone() == (1,)
        assert owner_conn.execute("SELECT sum(last_id - first_id + 1) FROM entry_closing").fetchone() == (47,)
        assert [await rig.balance(each) for each in customers] == balances
        with gzip.open(tmp_path / "entries.csv.gz", "rt", newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == 47
        assert lines == sorted(lines, key=lambda line: (line["account_id"], int(line["id"])))
    finally:
        await owning.close()


def _move_back(conn: psycopg.Connection[Any], days: int) -> None:
    """As tests/past.py does, beside each shard: a time that is computed from a column is refused by Citus."""
    for shard, host, port in conn.execute(_SHARDS).fetchall():
        told = {"host": host, "port": port, "user": conn.info.user, "dbname": conn.info.dbname}
        with psycopg.connect(**told, options=f"-c search_path=shard_{shard}") as beside:
            move_back(beside, days)


async def test_a_shard_that_moves_under_load_loses_no_call(db: Database, owner_conn: psycopg.Connection[Any]) -> None:
    """What is asked between the move and the next `migrate` is answered 503, and may be asked again."""
    owners = plant(owner_conn, [10**9] * 40, [{}])
    meter, charged, is_over = metered(db), Counter[uuid.UUID](), asyncio.Event()

    async def call(number: int) -> None:
        while not is_over.is_set():
            owner, ask = owners[number % len(owners)], Ask(uuid.uuid4().hex, 100, None, None)
            held = await _until_answered(lambda: meter.authorize(SERVICE, owner, ask))  # noqa: B023 - called at once
            await _until_answered(lambda: meter.settle(SERVICE, held.hold_id, Work(50)))  # noqa: B023
            charged[owner.account_id] += 1
            number += 7

    def move() -> None:
        places = owner_conn.execute(_SHARDS).fetchall()
        shard, *source = places[0]
        target = next(place[1:] for place in places if place[1:] != tuple(source))
        owner_conn.execute(
            "SELECT citus_move_shard_placement(%s, %s, %s, %s, %s, 'block_writes')", [shard, *source, *target]
        )
        migrate(CITUS)

    calls = [asyncio.create_task(call(number)) for number in range(16)]
    await asyncio.sleep(1)
    await asyncio.to_thread(move)
    await asyncio.sleep(1)
    is_over.set()
    await asyncio.gather(*calls)
    found = owner_conn.execute("SELECT account_id, count(*) FROM usage GROUP BY 1").fetchall()
    assert dict(found) == charged
    print(f"a shard moved under load: {charged.total()} pairs, none lost, none twice")


@pytest.mark.skipif(not (_DOWN and _UP), reason="CITUS_DOWN and CITUS_UP are not set")
async def test_a_server_that_dies_takes_only_its_own_accounts_with_it(rig: Rig) -> None:
    customers = [await rig.customer("10") for _ in range(16)]
    late = [await rig.topup(each, "10", "btc") for each in customers]
    holds = [await rig.authorize(each.api_key, "0.1", ttl_seconds=60) for each in customers]
    rig.sql("UPDATE hold SET expires_at = created_at")
    subprocess.run(_DOWN, shell=True, check=True)
    try:
        [away] = await unreachable(rig.house.db)
        ready = await rig.client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"], ready.json()["database"]) == (200, "degraded", "degraded")
        assert away in ready.json()["warnings"][0]
        answers = [await _tried(rig, each) for each in customers]
        assert set(answers) == {200, 503}
        living = [each for each, answer in zip(customers, answers, strict=True) if answer == 200]
        seen = await everywhere(rig.house.db, {"id": "uuid"}, "SELECT id FROM account", {})
        assert len(seen) == len(living)
        assert await expire_holds(rig.house.db) == len(living)
        for invoice_id in late:
            rig.btcpay.pay(invoice_id)
            assert (await rig.deliver(invoice_id)).status_code == 200
        await rig.process()
        assert [await rig.balance(each) for each in living] == [Decimal(20)] * len(living)
    finally:
        subprocess.run(_UP, shell=True, check=True)
    await _until_answered(lambda: _all_reachable(rig.house.db))
    assert [await _tried(rig, each) for each in customers] == [200] * len(customers)
    rig.sql("UPDATE webhook_delivery SET next_try_at = received_at")
    await rig.process()
    assert [await rig.balance(each) for each in customers] == [Decimal(20)] * len(customers)
    assert len(holds) == len(customers)
    print(
        f"{away} down: {len(living)} of {len(customers)} accounts went on, the others 503, all credited once when it was back"
    )


@pytest.mark.skipif(not _FAILOVER, reason="CITUS_FAILOVER is not set")
async def test_a_worker_whose_standby_takes_its_place_loses_nothing_and_doubles_nothing(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    """Calls, which are a worker's alone and are said again until they are answered; and acts of two servers, which are not."""
    owners, admin, is_over = plant(owner_conn, [10**12] * 40, [{}]), Admin(uuid.uuid4(), "test"), asyncio.Event()
    meter, ends = metered(db), Counter[str]()
    charged, acts = set[str](), set[str]()

    async def call(number: int) -> None:
        while not is_over.is_set():
            number += 7
            owner, ask = owners[number % len(owners)], Ask(uuid.uuid4().hex, 10, None, None)
            await _until_answered(lambda: meter.charge(SERVICE, owner, ask, Work(10)))  # noqa: B023 - called at once
            charged.add(ask.request_id)

    def credit(account_id: uuid.UUID) -> Any:
        return lambda session: adjust(session, PEPPER, admin, account_id, 10, "for a test")

    async def act(number: int) -> None:
        while not is_over.is_set():
            number += 7
            try:
                done = await db.transaction(credit(owners[number % len(owners)].account_id))
                acts.add(str(done.reference))
            except DatabaseUnavailable:
                ends["503"] += 1
                await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(call(number)) for number in range(12)]
    tasks += [asyncio.create_task(act(number)) for number in range(4)]
    await asyncio.sleep(2)
    await asyncio.to_thread(subprocess.run, _FAILOVER, shell=True, check=True)
    before = len(charged)
    await asyncio.sleep(3)
    is_over.set()
    await asyncio.gather(*tasks)
    assert len(charged) > before
    found = owner_conn.execute("SELECT request_id, count(*), sum(cost_nusd) FROM usage GROUP BY 1").fetchall()
    assert {name: (count, cost) for name, count, cost in found} == dict.fromkeys(charged, (1, 10))
    references = {
        name
        for (name,) in owner_conn.execute("SELECT reference FROM entry WHERE kind = 'adjustment' AND id > 1").fetchall()
    }
    assert acts <= references
    print(
        f"a worker's standby took its place: {len(charged)} calls and {len(acts)} acts, {ends['503']} acts 503, none lost, none twice"
    )


async def _tried(rig: Rig, customer: Customer) -> int:
    answer = await rig.meter("authorize", api_key=customer.api_key, request_id=uuid.uuid4().hex, max_cost_usd="0.01")
    return answer.status_code


async def _all_reachable(db: Database) -> None:
    if await unreachable(db):
        raise DatabaseUnavailable(retry_after_seconds=1)


async def _until_answered(ask: Any) -> Any:
    for _ in range(600):
        try:
            return await ask()
        except DatabaseUnavailable:
            await asyncio.sleep(0.05)
    raise AssertionError("not answered within 30 seconds")


async def _of_two_shards(db: Database, owners: list[KeyOwner]) -> tuple[KeyOwner, KeyOwner]:
    shards = Shards(db)
    first = owners[0]
    for other in owners:
        if await shards.of(other.account_id) != await shards.of(first.account_id):
            return first, other
    raise AssertionError("all of these accounts are in one shard")
