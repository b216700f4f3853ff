"""How many rows the figures of pages and of the wire are read from: what is not summed yet, and never all calls of a day."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import first_id
from app.activity.daily import Days, daily, spent_by_key
from app.activity.rollup import roll_up
from app.admin.margins import margins
from app.admin.stats import stats
from app.console.customer.home import read_standing
from app.console.session import Customer, Session
from app.kernel.db import Database, row
from app.kernel.security import Caller, Kind
from app.openrouter.calls import activity
from app.openrouter.spending import read_spent
from tests.activity.conftest import Past

NOW: Final = datetime.now(UTC)
TODAY: Final = NOW.date()
CALLS: Final = 3000
BEHIND: Final = 20
MOST_ROWS: Final = 300
"""Of usage, entries and sums together: the calls that are not summed, each with its entry, a page of calls, a sum a day and model."""

Question = Callable[[AsyncSession, UUID], Awaitable[Any]]
QUESTIONS: Final[dict[str, Question]] = {
    "Home": lambda session, account: read_standing(
        session, Customer(Caller(Kind.CREDIT_ID, account, None), Session.begun("customer", "x")), NOW
    ),
    "Activity": lambda session, account: daily(session, account, Days(first=TODAY - timedelta(days=29)), limit=20_000),
    "GET /activity": lambda session, account: daily(session, account, Days(), limit=51),
    "GET /api/v1/activity": lambda session, account: activity(session, account, TODAY - timedelta(days=30), TODAY),
    "GET /api/v1/key": lambda session, account: read_spent(session, account, TODAY),
    "what keys spent": lambda session, account: spent_by_key(session, account, Days(first=TODAY)),
    "Today": lambda session, account: stats(session, TODAY - timedelta(days=13), TODAY),
    "Prices": lambda session, account: margins(session, NOW),
}
MANY_CALLS: Final = """
    WITH calls AS (
        SELECT array_agg(a.id) AS accounts, array_agg(k.id) AS keys, array_agg(gen_random_uuid()) AS holds,
               array_agg('proxy'::text) AS services, array_agg('many-' || n) AS requests,
               array_agg((%s || right(translate(gen_random_uuid()::text, '-', ''), 20))::uuid) AS ids, array_agg(10::bigint) AS costs,
               array_agg('completed'::text) AS outcomes, array_agg('m' || n %% 5) AS models, array_agg(''::text) AS flags
        FROM account a JOIN api_key k ON k.account_id = a.id, generate_series(1, %s) n)
    SELECT count(*) FROM calls c,
    meter_charge(ARRAY[c.accounts[1]], true, c.accounts, c.keys, c.holds, c.services, c.requests, NULL, NULL, NULL, NULL, c.ids, c.costs,
                 NULL, c.outcomes, c.models, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, c.flags)"""


@pytest.fixture
async def account(past: Past) -> UUID:
    """One whose many calls of today are summed, but for a few."""
    customer = await past.rig.customer("10")
    [(account_id,)] = past.rig.sql("SELECT id FROM account")
    long_ago = first_id(datetime.now(UTC) - timedelta(minutes=5)).hex[:12]
    past.rig.sql(MANY_CALLS, long_ago, CALLS)
    assert await roll_up(past.rig.house.db) >= CALLS
    for number in range(BEHIND):
        await past.charge(customer, "0.001", request_id=f"behind-{number}", model="m1")
    past.conn.execute("ANALYZE usage, entry, usage_day, account")
    return UUID(str(account_id))


async def test_no_question_about_days_reads_all_calls_of_the_day(past: Past, account: UUID) -> None:
    assert past.count_calls() == CALLS + BEHIND
    read = {name: await rows_read(past.rig.database_url, ask, account) for name, ask in QUESTIONS.items()}
    assert {name: count for name, count in read.items() if not 0 < count < MOST_ROWS} == {}


async def rows_read(url: str, ask: Question, account: UUID) -> int:
    """By this question alone: a connection counts since its beginning."""

    async def work(session: AsyncSession) -> int:
        await ask(session, account)
        found = await row(
            session,
            """SELECT sum(seq_tup_read + idx_tup_fetch)::bigint AS rows FROM pg_stat_xact_user_tables
               WHERE relname LIKE 'usage%' OR relname = 'entry'""",
        )
        assert found is not None
        return int(found["rows"])

    db = Database(url, pool_size=1)
    try:
        return await db.transaction(work)
    finally:
        await db.close()
