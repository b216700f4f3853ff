"""A pooler that is restarted, paused and reconnected under load: nothing acknowledged is lost, nothing is charged twice."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence, Sized
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from app.audit import audit
from app.kernel.db import Database
from app.metering.holds import Meter
from app.migrations import migrate
from tests.integration.test_failover import Callers
from tests.load import Load
from tests.pooler import Pooler, pooler_of, told
from tests.program import external_postgres, installation
from tests.test_batches import PEPPER, plant
from tests.test_crash import one_effect_each, tell_a_lease_later

pytestmark = pytest.mark.slow

More = Callable[[], Coroutine[Any, Any, None]]
Act = Callable[[Pooler, More], Awaitable[None]]


# --- what its operator does ---------------------------------------------------------------------------


async def reconnect(pooler: Pooler, more: More) -> None:
    """It makes its connections to PostgreSQL anew, each when it is free."""
    await asyncio.to_thread(pooler.command, "RECONNECT")


async def pause_and_resume(pooler: Pooler, more: More) -> None:
    """It lets transactions end, and whoever wants another one waits."""
    await asyncio.to_thread(pooler.command, "PAUSE")
    waiting = asyncio.create_task(more())
    await asyncio.wait([waiting], timeout=0.5)
    assert not waiting.done()
    await asyncio.to_thread(pooler.command, "RESUME")
    await waiting


async def restart_gently(pooler: Pooler, more: More) -> None:
    """As its systemd unit does: it ends when no transaction runs."""
    await asyncio.to_thread(pooler.stop, signal.SIGINT)
    await asyncio.to_thread(pooler.start)


async def terminate_and_start(pooler: Pooler, more: More) -> None:
    """Until 1.22 it ends at once; since then it goes on for who is there, until it is told again."""
    pooler.tell(signal.SIGTERM)
    if not await asyncio.to_thread(pooler.has_ended, within_seconds=1):
        await more()
    await asyncio.to_thread(pooler.stop, signal.SIGTERM)
    await asyncio.to_thread(pooler.start)


async def kill_and_start(pooler: Pooler, more: More) -> None:
    await asyncio.to_thread(pooler.stop, signal.SIGKILL)
    await asyncio.to_thread(pooler.start)


async def one_after_the_other(mode: str, pooler: Pooler, acts: Sequence[Act], answered: Callable[[], Sized]) -> None:
    """Under a load that goes on before, during and after each of them."""

    async def more() -> None:
        target = len(answered()) + 30
        async with asyncio.timeout(20):
            while len(answered()) < target:
                await asyncio.sleep(0.02)

    await more()
    for act in acts:
        await act(pooler, more)
        await more()
        print(f"\n{told()}, {mode}, {act.__name__}: {len(answered())} acknowledged", end="")


# --- the promises -------------------------------------------------------------------------------------


async def test_a_pooler_of_transactions_that_comes_and_goes_loses_nothing_and_doubles_nothing() -> None:
    acts: list[Act] = [reconnect, pause_and_resume, restart_gently, terminate_and_start, kill_and_start]
    with (
        external_postgres() as postgres,
        pooler_of(postgres.new_database("owner", "CREATEROLE"), "transaction") as pooler,
        installation(DATABASE_URL=pooler.url, DATABASE_POOLER="transaction") as program,
    ):
        await asyncio.to_thread(program.run)
        load, stop = Load(await asyncio.to_thread(program.answer, "demo"), seed=1), asyncio.Event()
        working = asyncio.create_task(load.work(stop))
        try:
            await one_after_the_other("transaction", pooler, acts, lambda: load.acknowledged)
        finally:
            stop.set()
            await working
        await tell_a_lease_later(program)
        await load.repeat_unknown()
        assert load.wrong == []
        await one_effect_each(program, load.demo, [load], Decimal(0))
        print(f"\n{load.unavailable} answers 503, 0 lost, 0 doubled", end="")
        assert "Traceback" not in program.printed + program.logged


async def test_a_pooler_of_sessions_that_comes_and_goes_loses_nothing_and_doubles_nothing() -> None:
    """One that is paused, or asked to end gently, waits until every session has: not for those who keep theirs."""
    with external_postgres() as postgres, pooler_of(postgres.new_database("owner", "CREATEROLE"), "session") as pooler:
        await asyncio.to_thread(migrate, pooler.url, "session")
        with psycopg.connect(pooler.url, autocommit=True) as conn:
            (owner,) = plant(conn, [10**12], [{}])
        db = Database(pooler.url, pool_size=4)
        await db.open()
        callers = Callers([Meter(db, PEPPER, hold_sync_commit=True, batch=batch) for batch in (True, False)], owner)
        running = asyncio.create_task(callers.run())
        try:
            acts: list[Act] = [reconnect, terminate_and_start, kill_and_start]
            await one_after_the_other("session", pooler, acts, lambda: callers.charged)
        finally:
            callers.is_over = True
            await running
        booked = postgres.sql("SELECT request_id, count(*), sum(cost_nusd) FROM usage GROUP BY 1", "satmeter")
        assert sorted(booked) == sorted((request_id, 1, 10) for request_id in callers.charged)
        assert callers.ends.keys() <= {"charged", "database_unavailable"}
        report = await audit(db)
        assert report.is_clean, report.findings
        print(f"\n{callers.ends['database_unavailable']} answers 503, 0 lost, 0 doubled", end="")
        await db.close()
