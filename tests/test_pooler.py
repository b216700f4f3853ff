"""Behind a pooler, a real PgBouncer, each connection is the service's own role with its time limits, or we do not start."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.connection import as_set
from app.kernel.db import RUNTIME_ROLE, Database, row
from app.kernel.errors import DatabaseUnavailable
from app.migrations import MigrationError, check, migrate
from tests.pooler import pooler, told
from tests.program import ExternalPostgres, external_postgres, installation
from tests.world import tell

WHO = """SELECT current_user::text AS who, current_setting('statement_timeout') AS statement,
                current_setting('lock_timeout') AS lock, current_setting('TimeZone') AS zone"""
OURS = {"who": RUNTIME_ROLE, "statement": "15s", "lock": "10s", "zone": "UTC"}


@pytest.fixture(scope="module")
def server(pytestconfig: pytest.Config) -> Iterator[tuple[ExternalPostgres, str]]:
    """A PostgreSQL of the machine's, migrated, and its owner's URL."""
    tell(pytestconfig, f"poolers: {told()}")
    with external_postgres() as made:
        url = made.new_database("owner", "CREATEROLE")
        migrate(url)
        yield made, url


async def through_every_door(db: Database) -> list[Any]:
    async def work(session: AsyncSession) -> Any:
        return await row(session, WHO)

    lane = db.lane()
    (of_lane,) = await lane.all(WHO, {})
    await lane.close()
    return [await db.one(WHO, {}), await db.transaction(work), dict(zip(OURS, of_lane, strict=True))]


async def test_in_session_pooling_every_connection_is_our_role_with_our_limits(
    server: tuple[ExternalPostgres, str],
) -> None:
    with pooler(server[1], "session") as url:
        assert migrate(url) is False
        check(url)
        for _ in range(2):  # the pooler's connections are clean again for whoever comes next
            db = Database(url, pool_size=3)
            await db.open()
            try:
                assert await through_every_door(db) == [OURS] * 3
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    await db.one("DELETE FROM entry RETURNING 1", {})
            finally:
                await db.close()
            with psycopg.connect(url, autocommit=True) as conn:
                assert conn.execute("SELECT current_user").fetchone() == ("owner",)


async def test_the_owner_s_connection_has_the_limits_too(server: tuple[ExternalPostgres, str]) -> None:
    with pooler(server[1], "session") as url:
        db = Database(url, pool_size=2, role=None)
        await db.open()
        try:
            assert await through_every_door(db) == [OURS | {"who": "owner"}] * 3
        finally:
            await db.close()


@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_other_pooling_is_refused_in_one_line(mode: str, server: tuple[ExternalPostgres, str]) -> None:
    with pooler(server[1], mode) as url, installation(DATABASE_URL=url) as program:
        for verb in (check, migrate):
            with pytest.raises(MigrationError, match="pool_mode = session"):
                verb(url)
        done = program.command("run")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "pool_mode = session" in done.stderr


def test_a_pooler_that_refuses_our_options_is_told_in_one_line(server: tuple[ExternalPostgres, str]) -> None:
    with pooler(server[1], "session", ignored="extra_float_digits") as url:
        for verb in (check, migrate):
            with pytest.raises(MigrationError, match="ignore_startup_parameters = options"):
                verb(url)


async def test_a_connection_that_does_not_become_ours_is_never_used(server: tuple[ExternalPostgres, str]) -> None:
    """Here for the want of a role, which the pooler hides from us when we connect."""
    with pooler(server[1], "session") as url:
        db = Database(url, pool_size=2, role="pg_monitor")
        await db.open()
        try:
            with pytest.raises(DatabaseUnavailable):
                await db.transaction(lambda session: row(session, WHO))
        finally:
            await db.close()


async def test_without_a_pooler_nothing_is_asked_twice(server: tuple[ExternalPostgres, str]) -> None:
    check(server[1])
    db = Database(server[1], pool_size=2)
    await db.open()
    try:
        assert await through_every_door(db) == [OURS] * 3
    finally:
        await db.close()


# --- transaction pooling, which has to be said --------------------------------------------------------


async def test_in_transaction_pooling_every_transaction_is_our_role_with_our_limits(
    server: tuple[ExternalPostgres, str],
) -> None:
    """Though each may be in another server process, and the pooler ignores nothing that a connection asks for at its start."""
    with pooler(server[1], "transaction", ignored="extra_float_digits") as url:
        assert migrate(url, "transaction") is False
        check(url, "transaction")
        db = Database(url, pool_size=3, pooler="transaction")
        await db.open()
        try:
            for _ in range(7):  # psycopg would prepare a statement the sixth time
                doors = await asyncio.gather(*(through_every_door(db) for _ in range(4)))
                assert doors == [[OURS] * 3] * 4
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await db.one("DELETE FROM entry RETURNING 1", {})
            with pytest.raises(ProgrammingError, match="permission denied"):
                await db.transaction(lambda session: row(session, "DELETE FROM entry RETURNING 1"))
            assert await db.one(WHO, {}) == OURS
        finally:
            await db.close()
        with psycopg.connect(url, autocommit=True) as conn:
            assert conn.execute("SELECT current_user").fetchone() == ("owner",)
            assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
            assert conn.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)


async def test_what_may_not_become_ours_is_not_run(server: tuple[ExternalPostgres, str]) -> None:
    with pooler(server[1], "transaction") as url:
        db = Database(url, pool_size=2, role="pg_monitor", pooler="transaction")
        await db.open()
        try:
            with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidParameterValue)):
                await db.one("INSERT INTO rate_count (bucket, window_start) VALUES ('x', now()) RETURNING 1", {})
            with pytest.raises(ProgrammingError):
                await db.transaction(lambda session: row(session, WHO))
        finally:
            await db.close()
        assert server[0].sql("SELECT count(*) FROM rate_count", "satmeter") == [(0,)]


async def sent_together(conn: psycopg.AsyncConnection[Any], *statements: str) -> None:
    async with conn.pipeline():
        for statement in statements:
            await conn.execute(statement.encode())


async def test_the_time_limit_of_what_is_sent_together_ends_the_statement(server: tuple[ExternalPostgres, str]) -> None:
    """A short one, so that nobody waits for it; the connection is as good as before."""
    with pooler(server[1], "transaction") as url:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=None) as conn:
            with pytest.raises(psycopg.errors.QueryCanceled):
                await sent_together(
                    conn, as_set({"statement_timeout": "200ms"}, of_transaction=True), "SELECT pg_sleep(60)"
                )
            shown = await (await conn.execute("SELECT current_setting('statement_timeout')")).fetchone()
            assert shown == ("0",)


def test_a_schema_is_made_through_transaction_pooling_by_two_at_once(server: tuple[ExternalPostgres, str]) -> None:
    server[0].sql("CREATE DATABASE fresh OWNER owner")
    with pooler(server[1], "transaction", database="fresh") as url, ThreadPoolExecutor(2) as two:
        changed = [two.submit(migrate, url, "transaction") for _ in range(2)]
        assert sorted(each.result() for each in changed) == [False, True]
        check(url, "transaction")
        with psycopg.connect(url, autocommit=True) as conn:
            assert conn.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)


def test_statement_pooling_is_refused_whatever_is_said(server: tuple[ExternalPostgres, str]) -> None:
    with pooler(server[1], "statement") as url:
        for verb in (check, migrate):
            with pytest.raises(MigrationError, match="knows no transactions"):
                verb(url, "transaction")


def test_session_pooling_that_is_none_is_refused(server: tuple[ExternalPostgres, str]) -> None:
    with pooler(server[1], "transaction") as url:
        for verb in (check, migrate):
            with pytest.raises(MigrationError, match="DATABASE_POOLER=transaction"):
                verb(url, "session")


async def test_without_a_pooler_the_setting_does_no_harm(server: tuple[ExternalPostgres, str]) -> None:
    check(server[1], "transaction")
    db = Database(server[1], pool_size=2, pooler="transaction")
    await db.open()
    try:
        assert await through_every_door(db) == [OURS] * 3
    finally:
        await db.close()
