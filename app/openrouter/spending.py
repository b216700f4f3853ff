"""What an account was credited and used, and what its keys spent in the UTC day, week and month that now is in.

Source: OpenRouter API, "Get current API key", "Get remaining credits" and "List API keys".
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import DAY
from app.activity.daily import Days, spent_by_key
from app.kernel.db import row, rows


@dataclass(frozen=True, slots=True)
class Credits:
    """Nano-USD. The difference is the balance: whatever is no usage (or given back of it) counts as credit."""

    total_nusd: int
    used_nusd: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What a key and those below it spent in the UTC day, ISO week and month that now is in, nano-USD, less what was refunded.

    `left_nusd` is the least that any window of it and of the keys above it leaves; None where there is no limit.
    """

    day_nusd: int = 0
    week_nusd: int = 0
    month_nusd: int = 0
    left_nusd: int | None = None


async def read_credits(session: AsyncSession, account_id: uuid.UUID) -> Credits:
    """From the keys' lifetimes, which are the sum of all usage, so that no entry needs to be added up."""
    found = await row(
        session,
        """SELECT a.posted_nusd, (SELECT coalesce(sum(lifetime_nusd), 0)::bigint FROM api_key WHERE account_id = :id) AS used_nusd
           FROM account a WHERE a.id = :id""",
        id=account_id,
    )
    assert found is not None
    return Credits(found["posted_nusd"] + found["used_nusd"], found["used_nusd"])


async def read_spent(
    session: AsyncSession, account_id: uuid.UUID, today: date, key_id: uuid.UUID | None = None
) -> Mapping[uuid.UUID, Spent]:
    """By key: of one, or of all of the account."""
    monday, first = today - today.weekday() * DAY, today.replace(day=1)
    keys = await rows(session, _KEYS, account_id=account_id, key_id=key_id)
    above = {key["id"]: key["ancestor_ids"] or [] for key in keys}
    only = key_id if len(keys) == 1 else None
    found = await spent_by_key(session, account_id, Days(first=min(monday, first), key_id=only))
    spent = {key: [0, 0, 0] for key in above}
    for key, days in found.items():
        sums = [sum(nusd for day, nusd in days.items() if day >= since) for since in (today, monday, first)]
        for counted in (key, *above.get(key, ())):
            if counted in spent:
                spent[counted] = [before + more for before, more in zip(spent[counted], sums, strict=True)]
    left = {key["id"]: key["left_nusd"] for key in keys}
    return {key: Spent(sums[0], sums[1], sums[2], left[key]) for key, sums in spent.items()}


_KEYS = """
SELECT k.id, k.ancestor_ids, CASE WHEN b.limit_nusd IS NOT NULL THEN greatest(0, b.limit_nusd - b.spent_nusd) END AS left_nusd
FROM api_key k LEFT JOIN LATERAL (
    SELECT w.limit_nusd, w.spent_nusd FROM unnest(array_append(k.ancestor_ids, k.id)) up (id)
    CROSS JOIN LATERAL (SELECT * FROM api_key x WHERE x.account_id = :account_id AND x.id = up.id LIMIT 1) x
    CROSS JOIN LATERAL unnest(
        array_prepend(x.limit_nusd, x.more_limits_nusd),
        array_prepend(meter_used(x.window_start, x.reset_period, x.window_usage_nusd, now()),
                      meter_more_used(x.more_starts, x.more_periods, x.more_usage_nusd, now()))
    ) w (limit_nusd, spent_nusd)
    WHERE w.limit_nusd IS NOT NULL
    ORDER BY w.limit_nusd - w.spent_nusd LIMIT 1
) b ON true
WHERE k.account_id = :account_id
  AND (CAST(:key_id AS uuid) IS NULL OR k.id = CAST(:key_id AS uuid) OR CAST(:key_id AS uuid) = ANY (k.ancestor_ids))
"""
"""A key with those below it, or all: with what the windows of it and of those above it leave."""
