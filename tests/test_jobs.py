"""The clock door: what is due happens, and what took long rests."""

import asyncio
from typing import Any

from app.jobs import JOBS, Job, schedule
from app.wiring import House


async def test_a_job_that_worked_for_long_rests_while_the_others_go_on_and_is_not_late(house: House) -> None:
    turns = {"rests": 0, "goes on": 0}
    enough = asyncio.Event()

    async def rests(_: Any) -> None:
        turns["rests"] += 1
        await asyncio.sleep(0.2)

    async def goes_on(_: Any) -> None:
        turns["goes on"] += 1
        if turns["rests"] and turns["goes on"] > 20:
            enough.set()

    scheduler = schedule(house, (Job("rests", 0.05, rests, most_share=0.001), Job("goes on", 0.05, goes_on)))
    try:
        await asyncio.wait_for(enough.wait(), 60)
    finally:
        scheduler.shutdown(wait=False)
    assert turns["rests"] == 1


def test_the_audit_that_never_ends_takes_a_twentieth_of_a_processor_at_most() -> None:
    [share] = [job.most_share for job in JOBS if job.name == "audit in slices"]
    assert share <= 0.05
