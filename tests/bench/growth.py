"""python -m tests.bench.growth: what a pair of calls leaves in the database, by table, and in its journal.

Beside the schema as it is, what is left of the pairs when they were put away; and the indexes of holds that were thought of instead:
what each would take and save.
"""

import argparse
import asyncio
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import psycopg

from app.activity import archive
from app.activity.calendar import Span
from app.activity.rollup import roll_up
from app.audit import putting_away
from app.audit.sealing import seal
from app.kernel.db import Database
from app.metering.holds import Ask, Meter, Work
from app.metering.retention import forget_closed_holds
from tests import databases
from tests.past import move_back_and_sort
from tests.test_batches import PEPPER, SERVICE, plant

_IN_FLIGHT: Final = 64
_DAYS_AGO: Final = 500
_KEPT: Final = ("entry", "entry_closing", "seal", "usage_day", "usage_dropped")
"""What there is of calls that were put away; entries also of how each account came to its money."""
_ACCOUNTS: Final = 500
_SIZES: Final = """
    SELECT CASE WHEN starts_with(relname, 'usage_2') THEN 'usage' ELSE relname END AS name, sum(pg_table_size(oid))::bigint AS heap,
           sum(pg_indexes_size(oid))::bigint AS indexes
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' GROUP BY 1"""
_HOT: Final = "SELECT n_tup_hot_upd, n_tup_upd FROM pg_stat_user_tables WHERE relname = 'hold'"
VARIANTS: Final[Mapping[str, tuple[str, ...]]] = {
    "as it is": (),
    "hold_open without state": ("DROP INDEX hold_open", "CREATE INDEX hold_open ON hold (expires_at, account_id)"),
    "and no hold_closed": ("DROP INDEX hold_closed",),
    "and half of each page kept free": ("ALTER TABLE hold SET (fillfactor = 50)",),
}
"""Each after the one before."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes that one pair added, heap and indexes, by table; `wal` of the journal. `hot` is the share of holds' updates that
    touched no index."""

    pairs: int
    tables: Mapping[str, tuple[float, float]]
    wal: float
    hot: float

    def text(self) -> str:
        lines = [
            f"  {name:<8} {heap:7.0f} + {indexes:5.0f} bytes"
            for name, (heap, indexes) in self.tables.items()
            if heap + indexes >= 1
        ]
        total = sum(map(sum, self.tables.values()))
        return "\n".join([*lines, f"  in all   {total:7.0f} bytes a pair, journal {self.wal:,.0f}, HOT {self.hot:.0%}"])


def measure(conn: psycopg.Connection[Any], url: str, pairs: int) -> Growth:
    """Grow an empty database by so many pairs, from a moment at which each page written has its first image behind it."""
    databases.empty(url)
    owners = plant(conn, [10**15] * _ACCOUNTS, [{}])
    conn.execute("SELECT pg_stat_reset()")
    conn.execute("CHECKPOINT")
    before, began = _sizes(conn), _journal(conn)
    asyncio.run(_pairs(url, owners, pairs))
    wal, after = _journal(conn) - began, _sizes(conn)
    tables = {
        name: ((heap - before[name][0]) / pairs, (indexes - before[name][1]) / pairs)
        for name, (heap, indexes) in after.items()
    }
    return Growth(pairs, tables, wal / pairs, _hot(conn))


async def _pairs(url: str, owners: list[Any], count: int) -> None:
    db = Database(url, pool_size=8)
    await db.open()
    meter, numbers = Meter(db, PEPPER, hold_sync_commit=True, batch=True), iter(range(count))

    async def caller() -> None:
        for number in numbers:
            request_id = uuid.uuid4().hex
            ask = Ask(request_id, 20_000, "a/model", "/chat/completions", 900)
            held = await meter.authorize(SERVICE, owners[number % len(owners)], ask)
            await meter.settle(SERVICE, held.hold_id, Work(10_000, units={"input_tokens": 900, "output_tokens": 300}))

    try:
        await asyncio.gather(*(caller() for _ in range(_IN_FLIGHT)))
    finally:
        await db.close()


def put_away(conn: psycopg.Connection[Any], url: str, pairs: int) -> tuple[Growth, float]:
    """What is left of pairs that were measured just now when they are old, exported and dropped, calls and entries, and their space was
    given back; and how many entries a second went, with their seals compared."""
    seconds = asyncio.run(_put_away(conn, url))
    conn.execute("VACUUM FULL")
    left = {name: (heap / pairs, indexes / pairs) for name, (heap, indexes) in _sizes(conn).items() if name in _KEPT}
    return Growth(pairs, left, 0, 0), pairs / seconds


async def _put_away(conn: psycopg.Connection[Any], url: str) -> float:
    db, now = Database(url, pool_size=2, role=None), datetime.now(UTC)
    month = (now - timedelta(days=_DAYS_AGO)).date().replace(day=1)
    await db.open()
    try:
        await move_back_and_sort(db, conn, _DAYS_AGO)
        await forget_closed_holds(db)
        await roll_up(db)
        await seal(db, PEPPER)
        with tempfile.TemporaryDirectory() as folder:
            await archive.export(db, month, Path(folder) / "calls", now)
            await archive.drop(db, month, now)
            await putting_away.export(db, Span(month), Path(folder) / "entries")
        began = time.perf_counter()
        await putting_away.drop(db, PEPPER, Span(month), now)
        return time.perf_counter() - began
    finally:
        await db.close()


def _sizes(conn: psycopg.Connection[Any]) -> dict[str, tuple[int, int]]:
    return {name: (heap, indexes) for name, heap, indexes in conn.execute(_SIZES.encode()).fetchall()}


def _journal(conn: psycopg.Connection[Any]) -> int:
    found = conn.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
    assert found is not None
    return int(found[0])


def _hot(conn: psycopg.Connection[Any]) -> float:
    """The server's processes tell their counts when they end, at the latest."""
    for _ in range(100):
        found = conn.execute(_HOT).fetchone()
        if found is not None and found[1]:
            return float(found[0]) / float(found[1])
        time.sleep(0.1)
    return 0.0


def report(pairs: int) -> None:
    """Print the growth of each variant, on a PostgreSQL of its own."""
    with databases.migrated() as url, psycopg.connect(url, autocommit=True) as conn:
        for name, statements in VARIANTS.items():
            for statement in statements:
                conn.execute(statement.encode())
            print(f"growth, {name}, {pairs:,} pairs:\n{measure(conn, url, pairs).text()}", flush=True)
            if not statements:
                left, a_second = put_away(conn, url, pairs)
                print(
                    f"and what is left of them, put away, {a_second:,.0f} entries a second:\n{left.text()}", flush=True
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    report(parser.parse_args().pairs)
