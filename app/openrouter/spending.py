"""What an account was credited and used, and what its keys spent in the UTC day, week and month that now is in.

Source: OpenRouter API, "Get current API key", "Get remaining credits" and "List API keys".
"""

import uuid
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import DAY
from app.activity.daily import Days, spent_by_key
from app.kernel.db import row


@dataclass(frozen=True, slots=True)
class Credits:
    """Nano-USD. The difference is the balance: whatever is no usage (or given back of it) counts as credit."""

    total_nusd: int
    used_nusd: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What a key spent in the UTC day, ISO week and month that now is in, nano-USD, less what was refunded."""

    day_nusd: int = 0
    week_nusd: int = 0
    month_nusd: int = 0


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


async def read_spent(
    session: AsyncSession, account_id: uuid.UUID, today: date, key_id: uuid.UUID | None = None
) -> Mapping[uuid.UUID, Spent]:
    """By key: of one, or of all of the account. A key that was not there spent nothing."""
    monday, first = today - today.weekday() * DAY, today.replace(day=1)
    found = await spent_by_key(session, account_id, Days(first=min(monday, first), key_id=key_id))
    return defaultdict(
        Spent,
        {
            key: Spent(*(sum(nusd for day, nusd in days.items() if day >= since) for since in (today, monday, first)))
            for key, days in found.items()
        },
    )


async def has_paid(session: AsyncSession, account_id: uuid.UUID) -> bool:
    """Whether a top-up of the account was ever credited."""
    found = await row(
        session,
        "SELECT EXISTS (SELECT FROM entry WHERE account_id = :id AND kind = 'topup') AS has_paid",
        id=account_id,
    )
    assert found is not None
    return bool(found["has_paid"])
