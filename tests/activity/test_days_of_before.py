"""Days that were summed before accounts had marks: migrated, every figure is as it was at once, and summed again by the job."""

import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import first_id
from app.activity.daily import Days, daily
from app.activity.rollup import rebuild, roll_up
from app.audit.days import DAYS
from app.kernel.db import Database, rows
from app.migrations import migrate
from tests.databases import at_revision

NOW: Final = datetime.now(UTC)
ACCOUNT, KEY = uuid.uuid4(), uuid.uuid4()
LONG_AGO: Final = (NOW - timedelta(days=200)).date().replace(day=1)
PRINTED_THEN: Final = """concat_ws('|', d.account_id, to_char(d.day, 'YYYY-MM-DD'), d.key_id, d.model, d.requests, d.input_tokens,
                                 d.output_tokens, d.cost_nusd, d.refunded_nusd)"""
"""A dropped month's rows as they were printed for its fingerprint, to the letter."""


@pytest.fixture
def before_marks(clean: str) -> Iterator[str]:
    """A database as it was: a month dropped, yesterday summed, and a call of today."""
    with at_revision(clean, "0005") as url:
        with psycopg.connect(url, autocommit=True) as then:
            lived(then)
        yield url


def lived(conn: psycopg.Connection[Any]) -> None:
    conn.execute("INSERT INTO account (id, posted_nusd, entry_count) VALUES (%s, 100, 4)", [ACCOUNT])
    day_before = NOW - timedelta(days=1)
    calls = [first_id(day_before), first_id(day_before + timedelta(milliseconds=5)), first_id(NOW)]
    for number, (call_id, model, cost) in enumerate(zip(calls, ("a", "a", "b"), (10, 20, 5), strict=True), 1):
        hold_id = uuid.uuid4()
        conn.execute(
            """INSERT INTO usage (account_id, id, hold_id, service, request_id, key_id, window_start, model, provider, outcome, cost_nusd,
                                  balance_after_nusd, held_after_nusd, units)
               VALUES (%s, %s, %s, 'proxy', %s, %s, now(), %s, 'p', 'completed', %s, 0, 0, '{"input_tokens": 3}')""",
            [ACCOUNT, call_id, hold_id, str(number), KEY, model, cost],
        )
        conn.execute(
            """INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd, usage_id)
               VALUES (%s, %s, 'usage', %s, 'revenue:usage', %s, 0, %s)""",
            [ACCOUNT, number, str(hold_id), -cost, call_id],
        )
    conn.execute(
        """INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd)
           VALUES (%s, 4, 'refund', %s, 'revenue:usage', 7, 0)""",
        [ACCOUNT, str(calls[1])],
    )
    day = "INSERT INTO usage_day VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)"
    conn.execute(day, [ACCOUNT, day_before.date(), KEY, "a", 2, 6, 0, 30, 0])  # the refund was not taken yet
    conn.execute(day, [ACCOUNT, LONG_AGO, KEY, "a", 9, 99, 9, 900, 90])
    conn.execute("INSERT INTO rollup_day (day) VALUES (%s)", [day_before.date()])
    conn.execute(
        f"""INSERT INTO usage_archive (month, calls, cost_nusd, sha256, dropped_at, fingerprint)
            SELECT d.day, 9, 900, 'x', now(), ('x' || left(md5({PRINTED_THEN}), 15))::bit(60)::bigint::text
            FROM usage_day d WHERE d.day = %s""".encode(),
        [LONG_AGO],
    )


@pytest.fixture
async def migrated(before_marks: str) -> AsyncIterator[Database]:
    assert migrate(before_marks)
    db = Database(before_marks, pool_size=2)
    await db.open()
    yield db
    await db.close()


async def test_days_of_before_are_told_as_they_were_and_summed_again(migrated: Database) -> None:
    async def told() -> list[tuple[Any, ...]]:
        found = await migrated.transaction(lambda session: daily(session, ACCOUNT, Days(), limit=9))
        return [
            tuple(line[name] for name in ("day", "model", "requests", "input_tokens", "cost_nusd", "refunded_nusd"))
            for line in found
        ]

    yesterday = (NOW - timedelta(days=1)).date()
    expected = [(NOW.date(), "b", 1, 3, 5, 0), (yesterday, "a", 2, 6, 30, 7), (LONG_AGO, "a", 9, 99, 900, 90)]
    for summed in (0, 4, 0):
        assert await told() == expected
        assert await differences(migrated) == []
        if summed:
            assert await roll_up(migrated) == summed
    assert await rebuild(migrated) == 0
    assert await told() == expected
    assert await differences(migrated) == []


async def differences(db: Database) -> list[Any]:
    """By the auditor's checks of days; what is kept of the dropped month's calls is left out of this story."""

    async def work(session: AsyncSession) -> list[Any]:
        checks = [check for check in DAYS if check.name != "dropped_calls_are_in_their_entries"]
        return [found for check in checks for found in await rows(session, check.sql)]

    return await db.transaction(work)
