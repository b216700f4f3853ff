"""A call reads its own rows, however many its account has beside them, and whatever the planner was told when it planned.

The hot functions keep a generic plan. Where a row is found by two columns and the planner may look by one of them, it does so
as soon as its statistics say that both find one row: an account of a thousand keys then read all of them for each of its calls.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final

import psycopg
import pytest

from app.kernel.db import Database, new_id
from app.keys.verify import KeyOwner, Verifier
from app.metering.functions import ChargeParams
from app.metering.holds import Ask, Held, Work, hold_id_for
from tests.databases import CITUS
from tests.test_batches import PEPPER, SERVICE, plant
from tests.test_batches import meter as metering

pytestmark = pytest.mark.skipif(bool(CITUS), reason="what a worker of Citus read is not counted by its coordinator")

KEYS: Final = 600
ASKED: Final = 8
"""Times that a statement is asked whose plan is its parameters' own the first times."""
MOST: Final = 100
"""Rows of one table that are read for so many calls: of a key and of one above it, some of them in several statements."""
_OTHERS: Final = (
    "CREATE TEMP TABLE other AS SELECT gen_random_uuid() AS account_id, gen_random_uuid() AS key_id FROM generate_series(1, 6000)",
    "INSERT INTO account (id) SELECT account_id FROM other",
    """INSERT INTO api_key (account_id, id, name, preview, window_start) SELECT account_id, key_id, 'only', 'sk-', now() FROM other""",
    """INSERT INTO credential (secret_hash, kind, account_id, key_id) SELECT uuid_send(key_id), 'api_key', account_id, key_id FROM other""",
    "INSERT INTO credential (secret_hash, kind, account_id) SELECT uuid_send(account_id), 'credit_id', account_id FROM other",
    "DROP TABLE other",
)
"""Accounts with one key each."""
_READ: Final = "SELECT relname, seq_tup_read + coalesce(idx_tup_fetch, 0) AS rows FROM pg_stat_user_tables"


def _ask() -> Ask:
    return Ask(str(uuid.uuid4()), 1_000, "a/model", "/chat/completions", 900)


async def _authorize(db: Database, owner: KeyOwner, held: list[Held]) -> None:
    await metering(db).authorize(SERVICE, owner, _ask())


async def _charge(db: Database, owner: KeyOwner, held: list[Held]) -> None:
    await metering(db).charge(SERVICE, owner, _ask(), Work(1_000))


async def _event(db: Database, owner: KeyOwner, held: list[Held]) -> None:
    ask = _ask()
    used = ChargeParams(
        owner.account_id, hold_id_for(SERVICE, ask.request_id), owner.key_id, SERVICE, ask.request_id, b"x" * 32, None, None,
        "a/model", None, None, new_id(), 1_000, False, "completed", *[None] * 11,
    )  # fmt: skip
    await metering(db).take([used])


async def _verify(db: Database, owner: KeyOwner, held: list[Held]) -> None:
    for _ in range(ASKED):
        await metering(db).verify(owner, "a/model", ())


async def _settle(db: Database, owner: KeyOwner, held: list[Held]) -> None:
    await metering(db).settle(SERVICE, held[0].hold_id, Work(1_000))


async def _release(db: Database, owner: KeyOwner, held: list[Held]) -> None:
    await metering(db).release(SERVICE, held[1].hold_id)


async def _extend(db: Database, owner: KeyOwner, held: list[Held]) -> None:
    await metering(db).extend(SERVICE, held[2].hold_id, 1_000, 0)


async def _works(db: Database, owner: KeyOwner, held: list[Held]) -> None:
    for _ in range(ASKED):
        await Verifier(db, PEPPER)._live(owner)


_VERBS: Final[dict[str, Callable[[Database, KeyOwner, list[Held]], Awaitable[None]]]] = {
    "authorize": _authorize, "charge": _charge, "event": _event, "verify": _verify, "settle": _settle, "release": _release,
    "extend": _extend, "works": _works,
}  # fmt: skip


@pytest.mark.parametrize("analyzed", ["never", "before its keys", "with its keys"])
async def test_a_call_of_an_account_with_many_keys_reads_its_own_rows(
    clean: str, db: Database, owner_conn: psycopg.Connection[Any], analyzed: str
) -> None:
    for statement in _OTHERS:
        owner_conn.execute(statement.encode())
    if analyzed == "before its keys":
        owner_conn.execute("ANALYZE account, api_key, hold, entry, usage")
    with owner_conn.transaction():
        owners = plant(owner_conn, [10**12], [{}] * KEYS)
    root, child = owners[0], owners[1]
    owner_conn.execute(
        "UPDATE api_key SET parent_id = %s, ancestor_ids = %s WHERE id = %s", [root.key_id, [root.key_id], child.key_id]
    )
    if analyzed == "with its keys":
        owner_conn.execute("ANALYZE account, api_key, hold, entry, usage")
    meter = metering(db)
    for number, owner in enumerate(owners):  # holds of every key, and calls
        one = await meter.authorize(SERVICE, owner, _ask())
        if number % 2:
            await meter.settle(SERVICE, one.hold_id, Work(1_000))

    for whose, owner in (("a key alone", owners[2]), ("a key below another", child)):
        held = [await meter.authorize(SERVICE, owner, _ask()) for _ in range(3)]
        for verb, called in _VERBS.items():
            before, there, own = _rows(owner_conn), _backends(owner_conn), Database(clean, pool_size=1)
            await own.open()
            await called(own, owner, held)
            await own.close()
            await _ended(owner_conn, there)
            read = {name: rows - before[name] for name, rows in _rows(owner_conn).items()}
            assert read["api_key"] > 0
            many = {name: rows for name, rows in read.items() if rows > MOST}
            assert not many, f"{verb} of {whose}, analyzed {analyzed}, reads {many}"


def _backends(conn: psycopg.Connection[Any]) -> set[int]:
    asked = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
    found = conn.execute(asked).fetchall()
    return {pid for (pid,) in found}


async def _ended(conn: psycopg.Connection[Any], there: set[int]) -> None:
    """Until there are only those of before: what a backend read is told when it ends."""
    async with asyncio.timeout(10):
        while _backends(conn) - there:
            await asyncio.sleep(0.01)


def _rows(conn: psycopg.Connection[Any]) -> dict[str, int]:
    conn.execute("SELECT pg_stat_clear_snapshot()")
    return dict(conn.execute(_READ).fetchall())
