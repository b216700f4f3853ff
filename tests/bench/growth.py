"""python -m tests.bench.growth: what a pair of calls leaves in the database, by table, and in its journal.

Beside the schema as it is, with the indexes of holds that were thought of instead: what each would take and save.
"""

import argparse
import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from app.kernel.db import Database
from app.metering.holds import Ask, Meter, Work
from tests import databases
from tests.test_batches import PEPPER, SERVICE, plant

_IN_FLIGHT: Final = 64
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    report(parser.parse_args().pairs)
