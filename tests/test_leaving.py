"""A caller who leaves in the middle costs nobody a connection, and what it had sent is decided."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, row
from tests.rig import Rig

CALLERS = 500
_COUNT = """INSERT INTO rate_count (bucket, window_start, count)
            SELECT %(bucket)s, now(), 1 FROM pg_sleep(0.02) RETURNING 1 AS done"""
Call = Callable[[str], Coroutine[Any, Any, Any]]


@pytest.fixture
async def db(clean: str) -> AsyncIterator[Database]:
    made = Database(clean, pool_size=8)
    await made.open()
    yield made
    await made.close()


def door(db: Database, name: str) -> Call:
    """One of the ways to PostgreSQL on which callers wait themselves, asked to count one into a bucket."""

    async def by_session(bucket: str) -> Any:
        async def work(session: AsyncSession) -> Any:
            return await row(session, _COUNT.replace("%(bucket)s", ":bucket"), bucket=bucket)

        return await db.transaction(work)

    return {"one": lambda bucket: db.one(_COUNT, {"bucket": bucket}), "session": by_session}[name]


def connections(url: str) -> set[tuple[Any, ...]]:
    """The server's processes but our own, told apart by when they began. A pool may still grow; what it has, it keeps."""
    with psycopg.connect(url, autocommit=True) as conn:
        asked = """SELECT pid, backend_start FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""
        return set(conn.execute(asked))


def counted(url: str) -> set[str]:
    with psycopg.connect(url, autocommit=True) as conn:
        return {bucket for (bucket,) in conn.execute("SELECT bucket FROM rate_count WHERE bucket LIKE 'leaving/%'")}


async def until_quiet(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        asked = """SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'"""
        async with asyncio.timeout(10):
            while conn.execute(asked).fetchone() != (0,):
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("name", ["one", "session"])
async def test_500_callers_who_leave_cost_no_connection_and_what_was_sent_is_decided(
    name: str, db: Database, clean: str
) -> None:
    ask = door(db, name)
    await asyncio.gather(*(ask(f"leaving/first/{number}") for number in range(20)))
    before, sent = connections(clean), 0
    for number in range(0, CALLERS, 4):
        callers = [asyncio.create_task(ask(f"leaving/{number + more}")) for more in range(4)]
        await asyncio.sleep(0.01)  # at the database, in the middle of their statement
        for caller in callers:
            caller.cancel()
        ends = await asyncio.gather(*callers, return_exceptions=True)
        sent += sum(isinstance(end, asyncio.CancelledError) for end in ends)
        await asyncio.sleep(0.02)
    await until_quiet(clean)
    lost = before - connections(clean)
    decided = len(counted(clean)) - 20
    print(f"{name}: {len(lost)} of {len(before)} connections lost, {decided} of {sent} decided")
    assert sent > CALLERS * 0.9  # a machine that was busy elsewhere may have answered some before they left
    assert before
    assert not lost
    assert decided > CALLERS / 2  # the others were still waiting for a connection, and just left
    assert await ask("leaving/last")


async def test_who_waits_for_a_connection_and_leaves_sends_nothing(db: Database, clean: str) -> None:
    callers = [asyncio.create_task(db.one(_COUNT, {"bucket": f"leaving/{number}"})) for number in range(100)]
    await asyncio.sleep(0.01)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    await until_quiet(clean)
    assert len(counted(clean)) < 20
    assert await db.one(_COUNT, {"bucket": "leaving/last"})


async def test_closing_waits_for_what_was_sent(clean: str) -> None:
    db = Database(clean, pool_size=2)
    await db.open()
    caller = asyncio.create_task(db.one(_COUNT, {"bucket": "leaving/closing"}))
    while not caller.done() and not db._sent._running:
        await asyncio.sleep(0.001)
    caller.cancel()
    await db.close()
    assert counted(clean) == {"leaving/closing"}


async def test_a_sibling_that_raises_costs_nobody_a_connection(rig: Rig, clean: str) -> None:
    """A header that is refused at once, beside a credential that is being looked up; without any account."""
    headers = {"x-credit-id": str(uuid.uuid4()), "Idempotency-Key": "a b"}

    async def ask() -> int:
        return (await rig.client.post("/keys", headers=headers, json={"name": "a"})).status_code

    async def ask_500_times() -> None:
        for _ in range(25):
            assert set(await asyncio.gather(*(ask() for _ in range(20)))) <= {400, 401}

    await ask_500_times()
    await until_quiet(clean)
    before = connections(clean)
    await ask_500_times()
    await until_quiet(clean)
    lost = before - connections(clean)
    print(f"{len(lost)} of {len(before)} connections lost")
    assert before
    assert not lost
