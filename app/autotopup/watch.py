"""Noticing low balances: what charges tell is noted at once and acted on in the background; the clock is the safety net."""

import asyncio
import time
import uuid
from collections.abc import Coroutine
from typing import Any, Final

from app.autotopup.attempts import AttemptRef
from app.autotopup.run import AutoTopup
from app.kernel.errors import DatabaseUnavailable
from app.kernel.logs import log, where_it_broke

AT_ONCE: Final = 200
"""Attempts driven at the same time by one process; most of that time is waiting for wallets."""
QUIET_SECONDS: Final = 30.0
"""How long a process leaves an account alone that could not be topped up; the safety net looks as often."""
_REMEMBERED: Final = 10_000


class Watcher:
    """One process' background work on auto top-ups. Several processes may do it at once: attempts are claimed."""

    def __init__(self, autotopup: AutoTopup) -> None:
        self._autotopup = autotopup
        self._tasks: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._quiet_until: dict[uuid.UUID, float] = {}
        self._is_closed = False

    def notice(self, account_id: uuid.UUID) -> None:
        """A charge took this account's balance below its threshold. Takes microseconds, and never raises."""
        if self._autotopup.is_on and self._quiet_until.get(account_id, 0.0) <= time.monotonic():
            self._start(account_id, self._attend, account_id)

    def forget(self, account_id: uuid.UUID) -> None:
        """Its owner has changed something: what we found of it before no longer holds."""
        self._quiet_until.pop(account_id, None)

    async def look_for_low(self) -> None:
        """The clock's look at every account that a charge should have told of, and at what no driver comes back to."""
        # First, and so whatever becomes of the sweep. Whom that forgives is found the next time.
        for account_id in await self._autotopup.low():
            self._start(account_id, self._attend, account_id)
        await self._autotopup.sweep()

    async def look_for_due(self) -> None:
        """The clock's look at attempts that wait for their next step. Does not wait until they are done."""
        for ref in await self._autotopup.due():
            self._start(ref.account_id, self._go_on, ref)

    async def idle(self) -> None:
        """Wait until nothing is being done."""
        while self._tasks:
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def close(self) -> None:
        """Stop. What was sent stays written down as sent, and is looked into by the next process."""
        self._is_closed = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _start(self, account_id: uuid.UUID, work: Any, argument: uuid.UUID | AttemptRef) -> None:
        """Do it in the background, unless something is being done for this account, or too much is as it is."""
        if self._is_closed or account_id in self._tasks or len(self._tasks) >= AT_ONCE:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # no loop to do it in; the clock's process finds it
        task = loop.create_task(self._guarded(work(argument)))
        self._tasks[account_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(account_id, None))

    async def _go_on(self, ref: AttemptRef) -> None:
        if await self._autotopup.drive(ref):
            await self._attend(ref.account_id)

    async def _attend(self, account_id: uuid.UUID) -> None:
        """Begin an attempt if one may begin, and drive it as far as it goes now; the next, if one was not enough."""
        begun = await self._autotopup.begin(account_id)
        while begun.ref is not None:
            if not await self._autotopup.drive(begun.ref):
                return
            begun = await self._autotopup.begin(account_id)
        if begun.is_enough:
            return
        if len(self._quiet_until) >= _REMEMBERED:
            self._quiet_until.clear()
        self._quiet_until[account_id] = time.monotonic() + QUIET_SECONDS

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except DatabaseUnavailable:
            log.warning("job.waits_for_database", job="auto top-up")
        except Exception as error:  # noqa: BLE001 - a door: nobody else would hear of it
            log.error("job.failed", job="auto top-up", exc_type=type(error).__name__, where=where_it_broke(error))
