"""What an operator looks at first: how the house stands, what was topped up lately, how many calls come, which jobs are late."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, row, rows
from app.kernel.figures import Figure, kept

RECENT_DAYS: Final = 7
_LATE_INTERVALS: Final = 3
_LATE_SECONDS: Final = 60
"""A job is late when its last success is older than three of its intervals and a minute."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job of the house, and how it goes. `failed_at` is of its last failure."""

    name: str
    every_seconds: float
    done_at: datetime | None
    failed_at: datetime | None
    is_late: bool

    @property
    def is_failing(self) -> bool:
        """Whether its last try failed."""
        return self.failed_at is not None and (self.done_at is None or self.failed_at > self.done_at)


@dataclass(frozen=True, slots=True)
class Lately:
    """`topups` are rows of method, status and count, of the last days; `calls_per_second` is of the last minute, or of the
    last few thousand calls where those are less than a minute's."""

    topups: Sequence[Row]
    to_review: int
    calls_per_second: float
    jobs: Sequence[Job]


async def lately(session: AsyncSession, now: datetime) -> Lately:
    """Read from indexes alone, however many calls there are."""
    topups = await rows(
        session,
        """SELECT method, status, count(*) AS count, coalesce(sum(credited_nusd), 0)::bigint AS credited_nusd FROM topup
           WHERE created_at >= :since GROUP BY 1, 2 ORDER BY 1, 2""",
        since=now - timedelta(days=RECENT_DAYS),
    )
    waiting = await row(session, "SELECT count(*) AS count FROM topup WHERE review IS NOT NULL")
    calls = await row(session, _CALLS, most=_MOST_CALLS)
    assert waiting is not None
    assert calls is not None
    return Lately(topups, waiting["count"], calls["per_second"], _jobs(await kept(session), now))


_MOST_CALLS: Final = 5000
# A call that is over closes its hold, and holds are known by when they were closed.
_CALLS: Final = """
    SELECT (count(*) FILTER (WHERE state = 'settled')
            / CASE WHEN count(*) = :most THEN greatest(extract(epoch FROM now() - min(closed_at)), 1) ELSE 60 END)::float8 AS per_second
    FROM (SELECT state, closed_at FROM hold WHERE closed_at > now() - interval '1 minute' ORDER BY closed_at DESC LIMIT :most) h"""


def _jobs(figures: dict[str, Figure], now: datetime) -> list[Job]:
    names = sorted({name.partition("/")[2] for name in figures if name.startswith(("job/", "job_failed/"))})
    return [_job(name, figures.get(f"job/{name}"), figures.get(f"job_failed/{name}"), now) for name in names]


def _job(name: str, done: Figure | None, failed: Figure | None, now: datetime) -> Job:
    every_seconds = (done or failed or Figure(0, now)).value / 1000
    allowed = timedelta(seconds=_LATE_INTERVALS * every_seconds + _LATE_SECONDS)
    is_late = every_seconds > 0 and (done is None or now - done.found_at > allowed)
    return Job(name, every_seconds, done and done.found_at, failed and failed.found_at, is_late)
