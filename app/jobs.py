"""The clock door: what happens by itself, and how often."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from app.kernel.errors import DatabaseUnavailable
from app.kernel.idempotency import forget_old_answers
from app.kernel.logs import log, where_it_broke
from app.kernel.ratelimit import forget_old_counts
from app.metering.holds import expire_holds
from app.topups.credit import check_due
from app.topups.inbox import process_waiting
from app.wiring import House

Work = Callable[[House], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to do every so often. Each is safe to run in several processes at once."""

    name: str
    every_seconds: float
    work: Work


JOBS: Final = (
    Job("look into webhooks", 0.5, lambda house: process_waiting(house.db, house.gateway)),
    Job("check top-ups", 2, lambda house: check_due(house.db, house.gateway)),
    Job("expire holds", 5, lambda house: expire_holds(house.db)),
    Job("forget old answers", 3600, lambda house: forget_old_answers(house.db)),
    Job("forget old counts", 3600, lambda house: forget_old_counts(house.db)),
)


def schedule(house: House) -> AsyncIOScheduler:
    """Start every job in the running event loop; `shutdown()` on the result stops them."""
    scheduler = AsyncIOScheduler(timezone="UTC")
    for job in JOBS:
        scheduler.add_job(
            _run, "interval", args=[job, house], seconds=job.every_seconds, id=job.name, max_instances=1, coalesce=True,
            misfire_grace_time=None,
        )  # fmt: skip
    scheduler.start()
    return scheduler


async def _run(job: Job, house: House) -> None:
    """A job that fails is logged and comes again; it never stops the others."""
    try:
        await job.work(house)
    except DatabaseUnavailable:
        log.warning("job.waits_for_database", job=job.name)
    except Exception as error:  # noqa: BLE001 - a door
        log.error("job.failed", job=job.name, exc_type=type(error).__name__, where=where_it_broke(error))
