"""The line before Satmeter: so many at once, in their order, for as long as it moves; a burst is answered whole."""

import asyncio
from collections.abc import Mapping
from decimal import Decimal

import pytest

from app.client import Answer, Meter, Unavailable
from app.client.line import Line, Stuck


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


async def test_so_many_are_asked_at_once_and_the_others_in_their_order() -> None:
    line, came, most, within = Line(2), list[int](), 0, 0

    async def ask(number: int) -> None:
        nonlocal most, within
        async with line.turn(20):
            within += 1
            most = max(most, within)
            came.append(number)
            await asyncio.sleep(0)
            within -= 1

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(ask(number))
    assert (came, most) == (list(range(20)), 2)


async def test_whoever_waits_goes_on_waiting_for_as_long_as_others_are_answered() -> None:
    clock, done = Clock(), list[int]()
    line = Line(1, now=clock)

    async def ask(number: int) -> None:
        async with line.turn(10):
            clock.seconds += 4  # so long takes each: the last one waits for longer than ten seconds
            await asyncio.sleep(0)
        done.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(ask(number))
    assert done == list(range(5))


async def test_a_line_that_does_not_move_is_left_and_who_left_takes_nobodys_turn() -> None:
    line, end = Line(1), asyncio.Event()

    async def ask() -> None:
        async with line.turn(20):
            await end.wait()
            raise ConnectionError

    first = asyncio.create_task(ask())
    await asyncio.sleep(0)
    with pytest.raises(Stuck):
        async with line.turn(0.01):
            raise AssertionError
    impatient = asyncio.create_task(ask())
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    waiting = asyncio.create_task(ask())
    await asyncio.sleep(0)
    end.set()
    for task in (first, waiting):
        with pytest.raises(ConnectionError):
            await task
    async with line.turn(0.01):
        pass


class Slow:
    """Answers a question after a moment, and counts how many it has at once."""

    def __init__(self) -> None:
        self.now = self.most = self.asked = 0

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Answer:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        denied = b'{"decision":"deny","status":402,"error":{"message":"no","code":"insufficient_balance"},"headers":{}}'
        return Answer(200, {}, denied)

    async def close(self) -> None:
        """There is nothing to close."""


async def test_a_burst_is_answered_whole_and_satmeter_is_not_asked_by_all_at_once() -> None:
    slow = Slow()
    async with Meter("http://satmeter", "svc-x", spool=None, transport=slow, ask_seconds=20) as meter:
        asking = [meter.authorize(f"sk-{number}", max_cost_usd=Decimal(1)) for number in range(1000)]
        verdicts = await asyncio.gather(*asking)
    assert not [verdict for verdict in verdicts if isinstance(verdict, Unavailable)]
    assert slow.asked == 1000
    assert slow.most <= 32
