"""What OpenRouter's own dashboards ask: an account's credits, and a key with what it spent and may still spend.

Source: OpenRouter API, "Get current API key" and "Get remaining credits".
"""

import uuid
from dataclasses import dataclass
from datetime import date

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import DAY
from app.activity.daily import Days, spent_by_day
from app.kernel.db import Row, row
from app.keys.issue import read


@dataclass(frozen=True, slots=True)
class Credits:
    """Nano-USD. The difference is the balance: whatever is no usage (or given back of it) counts as credit."""

    total_nusd: int
    used_nusd: int


@dataclass(frozen=True, slots=True)
class Spending:
    """A key's row, and what it spent in the UTC day, ISO week and month that now is in, nano-USD."""

    key: Row
    day_nusd: int
    week_nusd: int
    month_nusd: int
    has_paid: bool


async def read_credits(session: AsyncSession, account_id: uuid.UUID) -> Credits:
    """From the keys' lifetimes, which are the sum of all usage, so that no entry needs to be added up."""
    found = await row(
        session,
        """SELECT a.posted_nusd, (SELECT coalesce(sum(lifetime_nusd), 0)::bigint FROM api_key WHERE account_id = a.id) AS used_nusd
           FROM account a WHERE a.id = :id""",
        id=account_id,
    )
    assert found is not None
    return Credits(found["posted_nusd"] + found["used_nusd"], found["used_nusd"])


async def read_spending(session: AsyncSession, account_id: uuid.UUID, key_id: uuid.UUID, today: date) -> Spending:
    monday, first = today - today.weekday() * DAY, today.replace(day=1)
    spent = await spent_by_day(session, account_id, Days(first=min(monday, first), key_id=key_id))
    paid = await row(
        session,
        "SELECT EXISTS (SELECT FROM entry WHERE account_id = :id AND kind = 'topup') AS has_paid",
        id=account_id,
    )
    assert paid is not None
    day, week, month = (sum(nusd for when, nusd in spent.items() if when >= since) for since in (today, monday, first))
    return Spending(await read(session, account_id, key_id), day, week, month, paid["has_paid"])
