"""The database: whether it can be reached, is ours, is safe, near, and in step with our clock."""

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row

from app.doctor.lines import Line, duration, fault, ok, warning
from app.kernel.db import RUNTIME_ROLE
from app.migrations import MigrationError, check
from app.wiring import House

FAR_MS: Final = 20
CLOCK_SECONDS: Final = 2
LATE_SECONDS: Final = 30
_CLOCK_FAULT_SECONDS: Final = 30
_ASKED: Final = 5
_KEPT_BESIDE: Final = 10
"""Connections for commands, migrations, people."""
_FACTS: Final = f"""
    SELECT current_setting('server_version') AS version, pg_is_in_recovery() AS is_standby,
           current_setting('default_transaction_read_only')::bool AS is_read_only,
           current_setting('fsync')::bool AS fsync, current_setting('full_page_writes')::bool AS full_pages,
           current_setting('synchronous_commit') AS commits, current_setting('archive_mode') AS archive,
           current_setting('max_connections')::int AS places,
           (SELECT rolsuper FROM pg_roles WHERE rolname = session_user) AS is_superuser,
           session_user::text AS who,
           EXISTS (SELECT FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl) AS is_encrypted,
           has_table_privilege('{RUNTIME_ROLE}', 'entry', 'INSERT') AS may_book,
           has_table_privilege('{RUNTIME_ROLE}', 'entry', 'UPDATE')
               OR has_table_privilege('{RUNTIME_ROLE}', 'entry', 'DELETE')
               OR has_table_privilege('{RUNTIME_ROLE}', 'entry', 'TRUNCATE') AS may_rewrite,
           pg_database_size(current_database()) AS bytes"""


async def look(house: House, url: str) -> list[Line]:
    try:
        await asyncio.to_thread(check, url)
    except MigrationError as error:
        return [fault("database", str(error))]
    async with await psycopg.AsyncConnection.connect(
        url, autocommit=True, connect_timeout=5, row_factory=dict_row
    ) as conn:
        facts = await _one(conn, _FACTS)
        return [
            ok("database", f"PostgreSQL {facts['version']}, {facts['bytes'] / 1e9:.2f} GB, at this code's migration"),
            *_role(facts, house),
            *_safety(facts, house),
            _places(facts, house),
            await _distance(conn),
            await _clock(conn),
            *await _standby(conn, house),
        ]


async def _one(conn: psycopg.AsyncConnection[dict[str, Any]], statement: str) -> dict[str, Any]:
    found = await (await conn.execute(statement.encode())).fetchone()
    assert found is not None
    return found


def _role(facts: dict[str, Any], house: House) -> Iterator[Line]:
    about = "database.role"
    if facts["may_rewrite"] or not facts["may_book"]:
        found = "may change or delete ledger entries" if facts["may_rewrite"] else "may not write ledger entries"
        yield fault(about, f"the service's role {RUNTIME_ROLE} {found}", "run `python -m app migrate` as the owner")
    elif facts["is_superuser"] and house.settings.database_url is not None:
        yield warning(
            about, f"DATABASE_URL's user {facts['who']} is a superuser", "give it CREATEROLE and its database"
        )
    else:
        yield ok(about, f"the service runs as {RUNTIME_ROLE}, which may add ledger entries and never change one")


def _safety(facts: dict[str, Any], house: House) -> Iterator[Line]:
    """What would lose an acknowledged charge, and what would keep a backup from being one to a moment."""
    unsafe = [name for name in ("fsync", "full_pages") if not facts[name]]
    unsafe += ["synchronous_commit"] if facts["commits"] == "off" else []
    if facts["is_standby"] or facts["is_read_only"]:
        yield fault("database.writes", "the server takes no writes: it is a standby, or set to read only", "point DATABASE_URL at the primary (target_session_attrs=read-write)")  # fmt: skip
    elif unsafe:
        yield fault("database.writes", f"{', '.join(unsafe)} off: a crash loses what was acknowledged", "turn on in postgresql.conf")  # fmt: skip
    else:
        yield ok("database.writes", "what is acknowledged survives a crash")
    if house.settings.is_production and facts["archive"] == "off":
        yield warning("database.backup", "archive_mode is off: no restore to a moment", "see deploy/PRODUCTION.md, Backup")  # fmt: skip
    if house.settings.is_production and not facts["is_encrypted"] and _is_elsewhere(house.settings.database_url or ""):
        yield warning("database.tls", "the connection to another machine is not encrypted", "add sslmode=verify-full to DATABASE_URL")  # fmt: skip


def _is_elsewhere(url: str) -> bool:
    hosts = str(psycopg.conninfo.conninfo_to_dict(url).get("host") or "").split(",")
    return any(host and not host.startswith("/") and host not in ("localhost", "127.0.0.1", "::1") for host in hosts)


def _places(facts: dict[str, Any], house: House) -> Line:
    """Three pools: single statements, twice as many sessions, two for batches; in every HTTP process and the jobs'."""
    wanted = (3 * house.settings.database_pool + 2) * (house.settings.workers + 1) + _KEPT_BESIDE
    found = f"max_connections is {facts['places']}; this host may take {wanted}"
    if wanted > facts["places"]:
        return warning("database.connections", found, "raise it, or lower DATABASE_POOL or WORKERS")
    return ok("database.connections", found)


async def _distance(conn: psycopg.AsyncConnection[dict[str, Any]]) -> Line:
    took = []
    for _ in range(_ASKED):
        began = time.perf_counter()
        await _one(conn, "SELECT 1 AS one")
        took.append((time.perf_counter() - began) * 1000)
    return latency_line(min(took))


def latency_line(fastest_ms: float) -> Line:
    found = f"the nearest of {_ASKED} answers took {fastest_ms:.1f} ms"
    if fastest_ms > FAR_MS:
        return warning("database.latency", found, "every call of a model waits for it; move nearer")
    return ok("database.latency", found)


async def _clock(conn: psycopg.AsyncConnection[dict[str, Any]]) -> Line:
    """Windows of limits and prices go by the database's clock, tokens and wallets by ours."""
    before = datetime.now(UTC)
    told = (await _one(conn, "SELECT clock_timestamp() AS at"))["at"]
    after = datetime.now(UTC)
    return clock_line(max((before - told).total_seconds(), (told - after).total_seconds(), 0))


def clock_line(apart_seconds: float) -> Line:
    found = f"its clock and ours are {duration(apart_seconds)} apart"
    if apart_seconds > _CLOCK_FAULT_SECONDS:
        return fault("database.clock", found, "run NTP on both (timedatectl set-ntp true)")
    if apart_seconds > CLOCK_SECONDS:
        return warning("database.clock", found, "run NTP on both (timedatectl set-ntp true)")
    return ok("database.clock", found)


# --- the standby that reads are done on ---------------------------------------------------------------

_WRITTEN: Final = """SELECT (SELECT system_identifier FROM pg_control_system()) AS cluster,
                            CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_flush_lsn()::text END AS written"""
_REPLAYED: Final = """
    SELECT pg_is_in_recovery() AS is_standby, (SELECT system_identifier FROM pg_control_system()) AS cluster,
           CASE WHEN pg_last_wal_replay_lsn() >= %s::pg_lsn THEN 0
                ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) END::float8 AS late_seconds"""
_LOOKS: Final = 10
_BETWEEN_LOOKS_SECONDS: Final = 0.2
"""What comes within two seconds is not late: the newest of the journal may have no time of its own to tell how old it is."""
_ELSEWHERE: Final = "reads are done on the primary meanwhile"


async def _standby(conn: psycopg.AsyncConnection[dict[str, Any]], house: House) -> list[Line]:
    """Whether DATABASE_READ_URL leads to a standby of ours, and how late that is: it lacks something that was written before it was asked."""
    url = house.settings.database_read_url
    if url is None:
        return []
    primary = await _one(conn, _WRITTEN)
    try:
        async with await psycopg.AsyncConnection.connect(
            url, autocommit=True, connect_timeout=5, row_factory=dict_row
        ) as standby:
            found = await _replayed(standby, primary["written"])
    except psycopg.Error as error:
        return [
            warning("database.standby", f"DATABASE_READ_URL cannot be asked ({type(error).__name__})", f"start it, or correct the setting; {_ELSEWHERE}")
        ]  # fmt: skip
    return [standby_line(found["is_standby"], found["cluster"] == primary["cluster"], found["late_seconds"])]


async def _replayed(standby: psycopg.AsyncConnection[dict[str, Any]], written: str | None) -> dict[str, Any]:
    for left in reversed(range(_LOOKS)):
        found = await (await standby.execute(_REPLAYED.encode(), [written])).fetchone()
        assert found is not None
        if found["late_seconds"] == 0 or not left:
            return found
        await asyncio.sleep(_BETWEEN_LOOKS_SECONDS)
    raise AssertionError("it is looked at least once")


def standby_line(is_standby: bool, is_ours: bool, late_seconds: float | None) -> Line:
    """`late_seconds` is None where it has replayed nothing yet."""
    about = "database.standby"
    if not is_ours:
        return fault(about, "DATABASE_READ_URL leads to another database, which is never asked", f"point it at a standby of DATABASE_URL's; {_ELSEWHERE}")  # fmt: skip
    if not is_standby:
        return warning(about, "DATABASE_READ_URL leads to no standby but to a server that takes writes", "reports and audits take its time from calls; point it at the standby")  # fmt: skip
    if late_seconds is None or late_seconds > LATE_SECONDS:
        late = "has replayed nothing yet" if late_seconds is None else f"is {duration(late_seconds)} late"
        return warning(about, f"the standby {late}", "see its log, and pg_stat_replication on the primary; X-Data-As-Of tells callers")  # fmt: skip
    return ok(about, f"a standby of this database, {duration(late_seconds)} late" if late_seconds else "a standby of this database, nothing behind")  # fmt: skip
