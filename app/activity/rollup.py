"""Days of calls summed into usage_day: when they are over, and again when something came late.

A day is summed whole, in one statement and so on one snapshot, which makes it safe to repeat. It is first summed an hour
after it ended: by then every call of it is committed, since no charge takes that long. What comes later all the same
(a refund, a call from a machine whose clock was wrong) is found by summing again. Whoever sums a day holds its row of
rollup_day, so of several processes one does it; and who reads takes usage_day up to the last summed day and the calls
themselves after that, on one snapshot too, so that nothing is counted twice or left out.
"""

import functools
import uuid
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import CALL, DAY, IS_DROPPED, SUMS, day_of, first_id, is_call_id, midnight
from app.kernel.db import Database, row, rows
from app.kernel.progress import Told, nobody

GRACE: Final = timedelta(hours=1)
RECOUNTED_DAYS: Final = 3
_DAYS_AT_ONCE: Final = 31


async def roll_up(db: Database, now: datetime) -> int:
    """Sum every day that is over and not summed yet, and again what refunds changed since. Returns how many days."""
    total = 0
    while count := await db.transaction(lambda session: _close_days(session, now)):
        total += count
    await db.transaction(_take_refunds)
    return total


async def recount(db: Database) -> int:
    """Sum the last few days again, for calls that came late. Returns how many sums changed."""
    return await db.transaction(_recount)


async def rebuild(db: Database, told: Told = nobody) -> int:
    """Sum every day again whose calls are still there, also one from before we began. Returns how many sums changed."""
    await db.transaction(lambda session: rows(session, _FILL_GAPS))
    found = await db.transaction(lambda session: rows(session, "SELECT day FROM rollup_day ORDER BY day"))
    days = [each["day"] for each in found]
    changed = 0
    for start in range(0, len(days), _DAYS_AT_ONCE):
        told(start, len(days))
        some = days[start : start + _DAYS_AT_ONCE]
        changed += await db.transaction(functools.partial(_again, days=some))
    told(len(days), len(days))
    return changed


async def _close_days(session: AsyncSession, now: datetime) -> int:
    last = (now - GRACE).date() - DAY
    found = await row(
        session,
        f"""SELECT coalesce((SELECT max(day) + 1 FROM rollup_day), (SELECT {day_of("id")} FROM usage ORDER BY id LIMIT 1), :last) AS day""",
        last=last,
    )
    assert found is not None
    first: date = found["day"]
    if first > last:
        return 0
    # Another process that closes them at the same time is waited for here, and leaves nothing to do.
    claimed = await rows(
        session,
        """INSERT INTO rollup_day (day) SELECT CAST(:first AS date) + n FROM generate_series(0, :more) n
           ON CONFLICT DO NOTHING RETURNING day""",
        first=first, more=min((last - first).days, _DAYS_AT_ONCE - 1),
    )  # fmt: skip
    await sum_days(session, [each["day"] for each in claimed])
    return len(claimed)


async def _take_refunds(session: AsyncSession) -> None:
    stale = await rows(session, _STALE_BY_REFUNDS)
    for each in stale:
        await _again(session, [each["day"]], each["account_id"])


async def _recount(session: AsyncSession) -> int:
    found = await rows(session, "SELECT day FROM rollup_day ORDER BY day DESC LIMIT :count", count=RECOUNTED_DAYS)
    return await _again(session, [each["day"] for each in found])


async def _again(session: AsyncSession, days: Sequence[date], account_id: uuid.UUID | None = None) -> int:
    """Sum these days again, but for those that somebody else is summing now."""
    held = await rows(
        session,
        "SELECT day FROM rollup_day WHERE day = ANY (:days) ORDER BY day FOR UPDATE SKIP LOCKED",
        days=list(days),
    )
    return await sum_days(session, [each["day"] for each in held], account_id)


async def sum_days(session: AsyncSession, days: Sequence[date], account_id: uuid.UUID | None = None) -> int:
    """Make usage_day what the calls of these days say, for one account or all. Returns how many sums changed.

    The days' rows of rollup_day must be held. A dropped month's days stay as they are: their calls are gone.
    """
    if not days:
        return 0
    await row(session, "SET LOCAL statement_timeout = 0")
    bounds: dict[str, Any] = {"first_id": first_id(midnight(min(days))), "end_id": first_id(midnight(max(days)) + DAY)}
    found = await row(session, _SUM_DAYS, days=list(days), account_id=account_id, **bounds)
    assert found is not None
    return int(found["changed"])


_FIGURES: Final = "requests, input_tokens, output_tokens, cost_nusd, refunded_nusd"
_SUM_DAYS: Final = f"""
WITH days AS MATERIALIZED (
    SELECT day FROM unnest(CAST(:days AS date[])) d (day) WHERE NOT {IS_DROPPED.format(day="d.day")}
),
fresh AS MATERIALIZED (
    SELECT account_id, day, key_id, model, {SUMS}
    FROM (SELECT {day_of("u.id")} AS day, {CALL}
          WHERE u.id >= :first_id AND u.id < :end_id
            AND (CAST(:account_id AS uuid) IS NULL OR u.account_id = :account_id)) calls
    JOIN days USING (day) GROUP BY 1, 2, 3, 4
),
gone AS (
    DELETE FROM usage_day d USING days
    WHERE d.day = days.day AND (CAST(:account_id AS uuid) IS NULL OR d.account_id = :account_id)
      AND NOT EXISTS (SELECT FROM fresh f
                      WHERE (f.account_id, f.day, f.key_id, f.model) = (d.account_id, d.day, d.key_id, d.model))
    RETURNING 1
),
summed AS (
    INSERT INTO usage_day AS d (account_id, day, key_id, model, {_FIGURES})
    SELECT account_id, day, key_id, model, {_FIGURES} FROM fresh
    ON CONFLICT (account_id, day, key_id, model) DO UPDATE SET ({_FIGURES}) = ROW (excluded.requests, excluded.input_tokens,
        excluded.output_tokens, excluded.cost_nusd, excluded.refunded_nusd)
    WHERE (d.requests, d.input_tokens, d.output_tokens, d.cost_nusd, d.refunded_nusd) IS DISTINCT FROM
          (excluded.requests, excluded.input_tokens, excluded.output_tokens, excluded.cost_nusd, excluded.refunded_nusd)
    RETURNING 1
),
stamped AS (
    UPDATE rollup_day SET rolled_at = now() FROM days WHERE rollup_day.day = days.day
)
SELECT (SELECT count(*) FROM gone) + (SELECT count(*) FROM summed) AS changed
"""

_FILL_GAPS: Final = f"""
INSERT INTO rollup_day (day)
SELECT u.day + n FROM (SELECT {day_of("id")} AS day FROM usage ORDER BY id LIMIT 1) u,
              LATERAL generate_series(0, (SELECT max(day) FROM rollup_day) - u.day) n
ON CONFLICT DO NOTHING
"""

# A refund of more than a week ago was taken long since, or never will be but by `rebuild`.
_STALE_BY_REFUNDS: Final = f"""
SELECT account_id, day FROM (
    SELECT DISTINCT account_id, CASE WHEN {is_call_id("reference")} THEN {day_of("reference")} END AS day
    FROM entry WHERE kind = 'refund' AND contra = 'revenue:usage' AND created_at > now() - interval '7 days') r
JOIN rollup_day USING (day)
WHERE (SELECT coalesce(sum(d.refunded_nusd), 0) FROM usage_day d WHERE d.account_id = r.account_id AND d.day = r.day)
   <> (SELECT coalesce(sum(e.amount_nusd), 0) FROM entry e
       WHERE e.account_id = r.account_id AND e.kind = 'refund' AND e.contra = 'revenue:usage'
         AND CASE WHEN {is_call_id("e.reference")} THEN {day_of("e.reference")} END = r.day)
ORDER BY day, account_id
"""
