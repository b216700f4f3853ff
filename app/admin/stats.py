"""How the house stands: what it owes its customers, what came in and what was earned, in all and by day."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.summed import SUMS, lines
from app.kernel.db import Row, row, rows
from app.kernel.errors import InvalidField

MOST_DAYS: Final = 366
DEFAULT_DAYS: Final = 30


@dataclass(frozen=True, slots=True)
class Stats:
    """Nano-USD. `totals` are of all time, `days` those asked for, in order, none left out."""

    totals: Row
    days: Sequence[Row]


def days_asked(first: date | None, last: date | None, now: datetime) -> tuple[date, date]:
    """The UTC days from one to the other, both included; the last 30 where nothing is said. Raises InvalidField."""
    until = last or now.astimezone(UTC).date()
    since = first or until - timedelta(days=DEFAULT_DAYS - 1)
    if since > until:
        raise InvalidField("from must not be later than to", param="from")
    if (until - since).days >= MOST_DAYS:
        raise InvalidField(f"stats are of {MOST_DAYS} days at most", param="from")
    return since, until


async def stats(session: AsyncSession, first: date, last: date) -> Stats:
    """On one snapshot, from calls that are summed, and from those that are not yet."""
    await row(session, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
    totals = await row(session, _TOTALS)
    assert totals is not None
    return Stats(totals, await rows(session, _DAYS, first=first, last=last))


# What was earned needs no look at the calls, of which there may be millions: balances are all that came in less that.
_TOTALS: Final = """
    SELECT a.*, e.*, e.received_nusd + e.bonus_nusd + e.adjusted_nusd - a.liabilities_nusd + a.owed_nusd AS revenue_nusd, h.*
    FROM (SELECT coalesce(sum(posted_nusd) FILTER (WHERE posted_nusd > 0), 0)::bigint AS liabilities_nusd,
                 coalesce(-sum(posted_nusd) FILTER (WHERE posted_nusd < 0), 0)::bigint AS owed_nusd,
                 coalesce(sum(held_nusd), 0)::bigint AS held_nusd, count(*) FILTER (WHERE status = 'active') AS active,
                 count(*) FILTER (WHERE status = 'frozen') AS frozen, count(*) FILTER (WHERE status = 'closed') AS closed
          FROM account) a,
         (SELECT coalesce(sum(amount_nusd) FILTER (WHERE kind = 'topup'), 0)::bigint AS received_nusd,
                 coalesce(sum(amount_nusd) FILTER (WHERE kind = 'bonus'), 0)::bigint AS bonus_nusd,
                 coalesce(sum(amount_nusd) FILTER (WHERE kind = 'adjustment'), 0)::bigint AS adjusted_nusd
          FROM entry WHERE kind IN ('topup', 'bonus', 'adjustment')) e,
         (SELECT count(*) AS holds_open, count(*) FILTER (WHERE expires_at <= now()) AS holds_expired
          FROM hold WHERE state = 'open') h"""

_DAYS: Final = f"""
    SELECT d.day::date AS day, coalesce(e.received_nusd, 0) AS received_nusd, coalesce(e.bonus_nusd, 0) AS bonus_nusd,
           coalesce(e.adjusted_nusd, 0) AS adjusted_nusd, coalesce(s.requests, 0) AS requests,
           coalesce(s.cost_nusd, 0) AS charged_nusd, coalesce(s.refunded_nusd, 0) AS refunded_nusd
    FROM generate_series(CAST(:first AS date)::timestamp, CAST(:last AS date)::timestamp, interval '1 day') d (day)
    LEFT JOIN (SELECT (created_at AT TIME ZONE 'UTC')::date AS day,
                      sum(amount_nusd) FILTER (WHERE kind = 'topup')::bigint AS received_nusd,
                      sum(amount_nusd) FILTER (WHERE kind = 'bonus')::bigint AS bonus_nusd,
                      sum(amount_nusd) FILTER (WHERE kind = 'adjustment')::bigint AS adjusted_nusd
               FROM entry WHERE kind IN ('topup', 'bonus', 'adjustment')
                 AND created_at >= CAST(:first AS date)::timestamp AT TIME ZONE 'UTC'
                 AND created_at < (CAST(:last AS date) + 1)::timestamp AT TIME ZONE 'UTC' GROUP BY 1) e ON e.day = d.day::date
    LEFT JOIN (SELECT day, {SUMS} FROM ({lines("day >= :first AND day <= :last", of_all=True)}) calls GROUP BY day) s ON s.day = d.day::date
    ORDER BY 1"""
