"""The clock door: what happens by itself, and how often."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from apscheduler.executors.asyncio import AsyncIOExecutor
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from app.accounts.foretell import foretell
from app.accounts.reap import reap_empty
from app.activity.archive import make_partitions
from app.activity.rollup import keep_up, roll_up
from app.admin.figures import sum_up
from app.audit.continuous import look_at_new, look_on
from app.console.signed_out import forget_signed_out
from app.kernel.db import Database
from app.kernel.errors import DatabaseUnavailable
from app.kernel.figures import JOB, keep
from app.kernel.idempotency import forget_old_answers
from app.kernel.logs import log, where_it_broke
from app.kernel.pace import Pace
from app.kernel.ratelimit import forget_old_counts
from app.keys.expiring import tell_of_expiring
from app.metering.holds import expire_holds
from app.metering.retention import forget_closed_holds
from app.notices.outbox import forget_old
from app.offers.opening import forget_old_offers
from app.topups.credit import check_due
from app.topups.gateway import InvoiceGateway
from app.topups.health import look_at_backend
from app.topups.inbox import forget_old_bodies, process_waiting
from app.topups.sweep import CATCH_UP, REGULAR, sweep
from app.wiring import House, name_operators_address

Work = Callable[[House], Awaitable[Any]]
_WRITTEN_EVERY_SECONDS: Final = 15


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to do every so often. Each is safe to run in several processes at once."""

    name: str
    every_seconds: float
    work: Work
    is_done_at_start: bool = False
    """Also at once, where nobody should wait for it until its turn comes."""
    most_share: float = 1.0
    """Of the time that it may work: after a long turn it rests, however often it is due. One that is behind must not rest so: it
    has a Pace."""


async def for_each_gateway(house: House, work: Callable[[Database, InvoiceGateway], Awaitable[int]]) -> None:
    """One backend that is down does not keep the others waiting for the next round."""
    await asyncio.gather(*(work(house.db, gateway) for gateway in house.gateways))


async def sweep_back(house: House, back: timedelta) -> None:
    await for_each_gateway(house, lambda db, gateway: sweep(db, gateway, back, house.settings.pepper))


JOBS: Final = (
    Job("look into webhooks", 0.5, lambda house: for_each_gateway(house, process_waiting)),
    Job("check top-ups", 2, lambda house: for_each_gateway(house, check_due)),
    Job("sweep invoices", 600, lambda house: sweep_back(house, REGULAR)),
    Job("expire holds", 5, lambda house: expire_holds(house.db)),
    Job("drive auto top-ups", 3, lambda house: house.watcher.look_for_due()),
    Job("look for low balances", 30, lambda house: house.watcher.look_for_low()),
    Job("name the operator's address", 3600, name_operators_address, is_done_at_start=True),
    Job("deliver notices", 1, lambda house: house.courier.deliver()),
    Job("look at payment backends", 30, lambda house: for_each_gateway(house, look_at_backend)),
    Job("foretell empty balances", 600, lambda house: foretell(house.db, datetime.now(UTC))),
    Job("tell of expiring keys", 600, lambda house: tell_of_expiring(house.db, datetime.now(UTC))),
    Job("look at new entries", 10, lambda house: look_at_new(house.db, Pace().rest)),
    Job("audit in slices", 2, lambda house: look_on(house.db), most_share=0.05),
    Job("seal the books", 10, lambda house: house.notary.seal()),
    Job("sum days of many calls", 2, lambda house: keep_up(house.db, seconds=5, worth_entries=50, rest=Pace().rest)),
    Job("sum days of calls", 60, lambda house: keep_up(house.db, seconds=90, rest=Pace().rest)),
    Job("sum what is left of calls", 600, lambda house: roll_up(house.db, Pace().rest), is_done_at_start=True),
    Job("sum up the books", 300, lambda house: sum_up(house.db), is_done_at_start=True),
    Job(
        "make partitions",
        3600,
        lambda house: make_partitions(house.db, by_day=house.settings.usage_partitions == "day"),
        is_done_at_start=True,
    ),
    Job(
        "close empty accounts",
        21_600,
        lambda house: reap_empty(house.db, house.keyring, house.settings.reap_empty_days),
    ),
    Job("forget closed holds", 3600, lambda house: forget_closed_holds(house.db)),
    Job("forget old webhooks' bodies", 3600, lambda house: forget_old_bodies(house.db)),
    Job("forget old notices", 3600, lambda house: forget_old(house.db)),
    Job("forget old answers", 3600, lambda house: forget_old_answers(house.db)),
    Job("forget old offers", 3600, lambda house: forget_old_offers(house.db)),
    Job("forget who signed out", 3600, lambda house: forget_signed_out(house.db)),
    Job("forget old counts", 3600, lambda house: forget_old_counts(house.db)),
)


_CATCH_UP: Final = Job("catch up", 0, lambda house: sweep_back(house, CATCH_UP))
"""Once at start: payments that came while we were away, and invoices we never heard of."""


class _Executor(AsyncIOExecutor):  # type: ignore[misc]  # it has no types
    """Knows that a job which is cut off when we stop, before it began, did not fail."""

    def _run_job_error(self, job_id: str, exc: BaseException, traceback: Any = None) -> None:
        if not isinstance(exc, asyncio.CancelledError):
            super()._run_job_error(job_id, exc, traceback)


def schedule(house: House, jobs: Sequence[Job] = JOBS) -> AsyncIOScheduler:
    """Start these jobs in the running event loop; `shutdown()` on the result stops them."""
    scheduler = AsyncIOScheduler(timezone="UTC", executors={"default": _Executor()})
    diary = _Diary(house.db)
    for job in jobs:
        scheduler.add_job(
            _run, "interval", args=[job, house, diary], seconds=job.every_seconds, id=job.name, max_instances=1, coalesce=True,
            misfire_grace_time=None,
        )  # fmt: skip
        if job.is_done_at_start:
            scheduler.add_job(_run, args=[job, house, diary], id=f"{job.name}, at start")
    scheduler.add_job(_run, args=[_CATCH_UP, house, diary], id=_CATCH_UP.name)
    scheduler.start()
    return scheduler


async def _run(job: Job, house: House, diary: "_Diary") -> None:
    """A job that fails is logged and comes again; it never stops the others. The database remembers when it was done last."""
    began = time.monotonic()
    try:
        if not diary.is_resting(job):  # and if it is, it is not late
            await job.work(house)
            diary.rest(job, time.monotonic() - began)
        await diary.write(f"{JOB}{job.name}", job)
    except asyncio.CancelledError:
        return  # we are stopping; what it was doing is done by the next process
    except DatabaseUnavailable:
        log.warning("job.waits_for_database", job=job.name)
    except Exception as error:  # noqa: BLE001 - a door
        for defect in error.exceptions if isinstance(error, ExceptionGroup) else (error,):
            log.error("job.failed", job=job.name, exc_type=type(defect).__name__, where=where_it_broke(defect))
        with contextlib.suppress(DatabaseUnavailable):
            await diary.write(f"job_failed/{job.name}", job)


class _Diary:
    """Writes down what was done, or failed, and when; what is done twice a second need not be written as often.

    And knows which jobs have worked for so long that they rest.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._written: dict[str, float] = {}
        self._rests_until: dict[str, float] = {}

    def is_resting(self, job: Job) -> bool:
        return time.monotonic() < self._rests_until.get(job.name, -math.inf)

    def rest(self, job: Job, worked_seconds: float) -> None:
        self._rests_until[job.name] = time.monotonic() + worked_seconds * (1 / job.most_share - 1)

    async def write(self, name: str, job: Job) -> None:
        now = time.monotonic()
        if now - self._written.get(name, -math.inf) >= _WRITTEN_EVERY_SECONDS:
            self._written[name] = now
            interval_ms = round(job.every_seconds * 1000)
            await self._db.transaction(lambda session: keep(session, **{name: interval_ms}))
