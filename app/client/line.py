"""The line before Satmeter: so many questions at once, the others in the order that they came, for as long as it moves.

A burst of callers is no reason to refuse any of them: each is answered as soon as it is its turn. That nobody at all is
answered is: then those who wait give up.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

LONGEST_SECONDS: Final = 30.0
"""Nobody stands in it for longer."""


class Stuck(Exception):
    """The line does not move, or is too long."""


class Line:
    """Whoever is within `turn` asks now, `at_once` of them at most."""

    def __init__(self, at_once: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._free, self._now = at_once, now
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._moved_at = now()

    @asynccontextmanager
    async def turn(self, seconds: float) -> AsyncIterator[None]:
        """Raises Stuck where nobody is answered for `seconds`; whoever leaves without an error was answered."""
        if self._free:
            self._free -= 1
        else:
            await self._stand(seconds)
        try:
            yield
            self._moved_at = self._now()
        finally:
            self._next()

    async def _stand(self, seconds: float) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        came_at = self._now()
        try:
            while not mine.done():
                left = min(max(came_at, self._moved_at) + seconds, came_at + LONGEST_SECONDS) - self._now()
                if left <= 0:
                    raise Stuck
                await asyncio.wait((mine,), timeout=left)
        except BaseException:
            if mine.done():
                self._next()
            mine.cancel()
            raise

    def _next(self) -> None:
        while self._waiting:
            first = self._waiting.popleft()
            if not first.done():
                first.set_result(None)
                return
        self._free += 1
