"""Work that nobody waits for gives way to calls: portion by portion, with a rest after each."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, LiteralString, TypeAlias

Rest: TypeAlias = Callable[[float], Awaitable[None]]
"""Is awaited after a portion of a work, with the seconds that it took."""

MOST_SHARE: Final = 0.25
"""Of the time, for who is behind: it seals and sums more than a busy service writes."""
_USUAL_SHARE: Final = 0.05
_ON_TIME_SECONDS: Final = 20.0

ON_ONE_CORE: Final[LiteralString] = "SET LOCAL max_parallel_workers_per_gather = 0"
"""A share of the time is one core's."""


async def without_rest(worked_seconds: float) -> None:
    """For who waits for the work."""


class Pace:
    """Of one turn of a work: at first it takes a twentieth of the time, so that a burst of calls hardly meets it, and
    once it goes on for seconds `most_share`, so that it keeps up with calls that go on, too."""

    def __init__(self, most_share: float = MOST_SHARE) -> None:
        self._most_share, self._began = most_share, time.monotonic()

    async def rest(self, worked_seconds: float) -> None:
        is_on_time = time.monotonic() - self._began < _ON_TIME_SECONDS
        share = min(_USUAL_SHARE, self._most_share) if is_on_time else self._most_share
        await asyncio.sleep(worked_seconds * (1 / share - 1))
