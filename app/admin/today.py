"""What an operator looks at first: how the house stands, what was topped up lately, how many calls come, which jobs are late."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import first_id
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
    """`topups` are rows of method, status and count, of the last days; `calls_per_second` is of the last minute."""

    topups: Sequence[Row]
    to_review: int
    calls_last_minute: int
    jobs: Sequence[Job]

    @property
    def calls_per_second(self) -> float:
        return self.calls_last_minute / 60


async def lately(session: AsyncSession, now: datetime) -> Lately:
    """Read from indexes alone, however many calls there are."""
    topups = await rows(
        session,
        """SELECT method, status, count(*) AS count, coalesce(sum(credited_nusd), 0)::bigint AS credited_nusd FROM topup
           WHERE created_at >= :since GROUP BY 1, 2 ORDER BY 1, 2""",
        since=now - timedelta(days=RECENT_DAYS),
    )
    waiting = await row(session, "SELECT count(*) AS count FROM topup WHERE review IS NOT NULL")
    calls = await row(
        session, "SELECT count(*) AS count FROM usage WHERE id >= :since", since=first_id(now - timedelta(minutes=1))
    )
    assert waiting is not None
    assert calls is not None
    return Lately(topups, waiting["count"], calls["count"], _jobs(await kept(session), now))


def _jobs(figures: dict[str, Figure], now: datetime) -> list[Job]:
    names = sorted({name.partition("/")[2] for name in figures if name.startswith(("job/", "job_failed/"))})
    return [_job(name, figures.get(f"job/{name}"), figures.get(f"job_failed/{name}"), now) for name in names]


def _job(name: str, done: Figure | None, failed: Figure | None, now: datetime) -> Job:
    every_seconds = (done or failed or Figure(0, now)).value / 1000
    allowed = timedelta(seconds=_LATE_INTERVALS * every_seconds + _LATE_SECONDS)
    is_late = every_seconds > 0 and (done is None or now - done.found_at > allowed)
    return Job(name, every_seconds, done and done.found_at, failed and failed.found_at, is_late)
