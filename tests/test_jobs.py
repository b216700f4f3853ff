"""The clock door: what is due happens, and what took long rests."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from app.audit.continuous import look_at_new
from app.jobs import JOBS, Job, schedule
from app.kernel import pace
from app.kernel.pace import Pace
from app.wiring import House
from tests.rig import Rig


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


async def test_work_takes_a_twentieth_of_the_time_at_first_and_a_quarter_when_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long its portions are."""
    now = [1000.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(pace, "asyncio", SimpleNamespace(sleep=sleep))

    async def share_until(end: float, turn: Pace, portion: float) -> float:
        began, worked = now[0], 0.0
        while now[0] < end:
            now[0] += portion
            worked += portion
            await turn.rest(portion)
        return worked / (now[0] - began)

    for portion in (0.001, 0.03, 0.2):
        turn, began = Pace(), now[0]
        assert await share_until(began + 19, turn, portion) == pytest.approx(0.05)
        now[0] = max(now[0], began + 20)
        assert await share_until(began + 100, turn, portion) == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["look at new entries", "sum days of calls", "sum what is left of calls"])
async def test_what_grows_with_the_calls_rests_between(rig: Rig, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    customer = await rig.customer("10")
    held = await rig.authorize(customer.api_key, "0.25")
    await rig.settle(held["hold_id"], "0.25")
    await look_at_new(rig.house.db)  # the first time it just begins
    rested = list[float]()

    async def rest(_: Pace, worked_seconds: float) -> None:
        rested.append(worked_seconds)

    monkeypatch.setattr(Pace, "rest", rest)
    [job] = [job for job in JOBS if job.name == name]
    await job.work(rig.house)
    assert rested
    assert min(rested) > 0
