"""A database of the version before, with money in it, becomes one of this version, and nothing in it is lost."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from alembic.config import Config

from alembic import command
from app.audit import audit
from app.kernel.db import Database, new_id
from app.kernel.security import Pepper
from app.metering.holds import Meter, Work
from app.metering.ticket import HoldTicket
from app.migrations import head, migrate

PEPPER = Pepper(b"p" * 32)
ACCOUNT, KEY, SETTLED, OPEN = (uuid.UUID(int=number + 2**120) for number in range(4))
LONG_AGO = datetime(2025, 3, 31, 23, 59, 59, tzinfo=UTC)
BEFORE = f"""
    INSERT INTO account (id, posted_nusd, held_nusd, entry_count) VALUES ('{ACCOUNT}', 999955000, 100000, 3);
    INSERT INTO api_key (account_id, id, name, preview, window_start, held_nusd, window_usage_nusd, lifetime_nusd)
    VALUES ('{ACCOUNT}', '{KEY}', 'Default', 'sk-', '2025-01-01Z', 100000, 45000, 45000);
    INSERT INTO credential (secret_hash, kind, account_id, key_id)
    VALUES ('\\x01', 'credit_id', '{ACCOUNT}', NULL), ('\\x02', 'api_key', '{ACCOUNT}', '{KEY}');
    INSERT INTO hold (account_id, id, service, request_id, request_hash, key_id, window_start, amount_nusd, state, created_at, expires_at, closed_at)
    VALUES ('{ACCOUNT}', '{SETTLED}', 'proxy', 'r1', '', '{KEY}', '2025-01-01Z', 100000, 'settled', now(), now() + interval '1 day', now()),
           ('{ACCOUNT}', '{OPEN}', 'proxy', 'r2', '', '{KEY}', '2025-01-01Z', 100000, 'open', now(), now() + interval '1 day', NULL);
    INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd)
    VALUES ('{ACCOUNT}', 1, 'adjustment', 'opening', 'adjustment', 1000000000, 1000000000),
           ('{ACCOUNT}', 2, 'usage', '{SETTLED}', 'revenue:usage', -45000, 999955000),
           ('{ACCOUNT}', 3, 'usage', '{uuid.UUID(int=9)}', 'revenue:usage', 0, 999955000);
    INSERT INTO usage (account_id, id, hold_id, service, request_id, key_id, window_start, outcome, cost_nusd, balance_after_nusd, held_after_nusd, units)
    VALUES ('{ACCOUNT}', '{new_id()}', '{SETTLED}', 'proxy', 'r1', '{KEY}', '2025-01-01Z', 'completed', 45000, 999955000, 0, '{{"input_tokens": 5}}'),
           ('{ACCOUNT}', '{{of_march}}', '{uuid.UUID(int=9)}', 'proxy', 'r0', '{KEY}', '2025-01-01Z', 'completed', 0, 999955000, 0, NULL);
"""


def uuid7_of(moment: datetime) -> uuid.UUID:
    return uuid.UUID(int=int(moment.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | 5)


@pytest.fixture
def old_url(database_url: str) -> Iterator[str]:
    """A database at revision 0003, on the tests' server."""
    name = f"old_{uuid.uuid4().hex[:8]}"
    url = urlunsplit(urlsplit(database_url)._replace(path=f"/{name}"))
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name}".encode())
        config = Config()
        config.set_main_option("script_location", "alembic")
        config.attributes["connect"] = lambda: psycopg.connect(url)
        command.upgrade(config, "0003")
        yield url
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as conn:
        return conn.execute(statement.encode()).fetchall()


async def test_the_books_of_the_version_before_are_kept_linked_and_partitioned(old_url: str) -> None:
    with psycopg.connect(old_url) as conn:
        conn.execute(BEFORE.replace("{of_march}", str(uuid7_of(LONG_AGO))).encode())
    assert migrate(old_url)
    assert rows(old_url, "SELECT version_num FROM alembic_version") == [(head(),)]
    this_month = f"usage_{datetime.now(UTC):%Y_%m}"
    assert rows(old_url, "SELECT tableoid::regclass::text, request_id, cost_nusd FROM usage ORDER BY request_id") == [
        ("usage_2025_03", "r0", 0), (this_month, "r1", 45_000)
    ]  # fmt: skip
    assert rows(
        old_url, "SELECT count(*) FROM entry e JOIN usage u ON u.id = e.usage_id AND u.hold_id::text = e.reference"
    ) == [(2,)]
    db = Database(old_url)
    await db.open()
    try:
        assert (await audit(db)).findings == ()
        meter = Meter(db, PEPPER, hold_sync_commit=True, batch=True)
        now = datetime.now(UTC)
        again = await meter.settle("proxy", HoldTicket(ACCOUNT, KEY, SETTLED, "r1", now, now, None), Work(7))
        assert (again.cost_nusd, again.balance_nusd) == (45_000, 999_955_000), "it was charged before"
        charged = await meter.settle("proxy", HoldTicket(ACCOUNT, KEY, OPEN, "r2", now, now, None), Work(5_000))
        assert (charged.balance_nusd, charged.held_nusd, charged.flags) == (999_950_000, 0, "")
        assert (await audit(db)).findings == ()
    finally:
        await db.close()
