"""Tells Satmeter, in the background, what calls came to: settles by batches, the rest one by one, each until it is answered.

Nothing that is owed is given up for want of an answer. What Satmeter refuses for good is kept for the operator.
"""

import asyncio
import logging
from typing import Final, TypeVar

import msgspec

from app.client.retry import Asking, Away, pause_seconds
from app.client.spool import Owed, Spool, SpoolFile, Told, Verb
from app.client.transport import Answer
from app.client.wire import Charged, Refunded, Refused

log = logging.getLogger("satmeter.client")

MOST_SETTLES: Final = 500
MOST_BYTES: Final = 900_000
"""A batch may have 1 MiB."""
_SECONDS: Final = 10.0
_SECOND_LOOK_SECONDS: Final = 5.0

Outcome = Charged | Refunded | Refused | None
"""None of what charges nothing: a release."""


class Settled(msgspec.Struct):
    status: int
    charge: Charged | None = None
    error: dict[str, object] | None = None


class Verdicts(msgspec.Struct):
    results: list[Settled]


class _Error(msgspec.Struct):
    error: dict[str, object]


class _Denied(msgspec.Struct):
    status: int = 200
    error: dict[str, object] | None = None


class Item(msgspec.Struct, eq=False):
    """Something owed, the file that has it, and who waits for the answer."""

    owed: Owed
    file: SpoolFile
    told: asyncio.Future[Outcome]
    looks: int = 0
    """How often a 404 is asked again: what it is about may be on its way yet."""


class Telling:
    """The queue of what is owed, and the task that empties it."""

    def __init__(self, asking: Asking, spool: Spool, *, every_seconds: float) -> None:
        self._asking, self._spool, self._every_seconds = asking, spool, every_seconds
        self._waiting: dict[str, Item] = {}
        self._later: set[asyncio.TimerHandle] = set()
        self._wake, self._hurry, self._is_empty = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._is_empty.set()
        self._draining = 0
        """How many wait for all of it."""
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    @property
    def left(self) -> int:
        """How many things are owed."""
        return len(self._waiting)

    def add(self, owed: Owed, file: SpoolFile, *, looks: int = 0, at_once: bool = False) -> asyncio.Future[Outcome]:
        """Tell it soon; `at_once`: without waiting for others to go with. It is in the file already. The future never fails:
        nobody need wait for it."""
        if at_once:
            self._hurry.set()
        if owed.id in self._waiting:
            return self._waiting[owed.id].told
        item = Item(owed, file, asyncio.get_running_loop().create_future(), looks)
        self._waiting[owed.id] = item
        self._is_empty.clear()
        self._wake.set()
        return item.told

    async def drain(self, seconds: float) -> int:
        """Wait until all is told, `seconds` at most; how much is left then."""
        self._draining += 1
        self._hurry.set()
        try:
            async with asyncio.timeout(seconds):
                await self._is_empty.wait()
        except TimeoutError:
            pass
        finally:
            self._draining -= 1
        return self.left

    async def close(self) -> None:
        for timer in self._later:
            timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for item in self._waiting.values():
            item.told.cancel()

    # --- the task ---

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await self._pause()
            self._wake.clear()
            if not self._draining:
                self._hurry.clear()
            due = list(self._waiting.values())
            settles = [item for item in due if item.owed.verb == "settle"]
            others = [item for item in due if item.owed.verb != "settle"][:_AT_ONCE]
            try:
                async with asyncio.TaskGroup() as group:
                    if settles:
                        group.create_task(self._settle(_batch(settles)))
                    for item in others:
                        group.create_task(self._tell(item))
                self._failures = 0
            except* Away as away:
                self._failed(away.exceptions[0])
            except* Exception as odd:  # noqa: BLE001 - what is owed outlives our own mistakes: they are told, and it is tried again
                self._failed(odd.exceptions[0])
            if self._waiting:
                self._wake.set()
            else:
                self._is_empty.set()

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures in (1, 10, 100, 1000):
            log.warning("satmeter.not_told reason=%r waiting=%d", error, self.left)

    async def _pause(self) -> None:
        """Let some gather; or wait for Satmeter to be back. Whoever is in a hurry does not wait for others to come."""
        if self._failures:
            await asyncio.sleep(pause_seconds(self._failures))
        elif self._every_seconds:
            try:
                async with asyncio.timeout(self._every_seconds):
                    await self._hurry.wait()
            except TimeoutError:
                pass

    async def _settle(self, items: list[Item]) -> None:
        """Raises Away. A batch that is refused whole is told one by one, so that one bad item keeps back no other."""
        body = b'{"settles":[' + b",".join(bytes(item.owed.body) for item in items) + b"]}"
        answer = await self._asking.once("/v1/meter/settle/batch", body, _SECONDS)
        if answer.status == 200:
            results = _read(answer, Verdicts).results
            for item, found in zip(items, results, strict=True):
                self._answered(item, found.charge or Refused(found.status, found.error or {}))
            return
        _about_the_item(answer)
        for item in items:
            await self._tell(item)

    async def _tell(self, item: Item) -> None:
        """Raises Away."""
        answer = await self._asking.once(f"/v1/meter/{item.owed.verb}", bytes(item.owed.body), _SECONDS)
        if answer.status != 200:
            self._answered(item, Refused(answer.status, _about_the_item(answer, item.owed.verb)))
        elif item.owed.verb == "release":
            self._answered(item, None)
        elif item.owed.verb == "refund":
            self._answered(item, _read(answer, Refunded))
        else:
            denied = _read(answer, _Denied)
            self._answered(item, Refused(denied.status, denied.error) if denied.error else _read(answer, Charged))

    def _answered(self, item: Item, outcome: Outcome) -> None:
        self._waiting.pop(item.owed.id, None)
        if isinstance(outcome, Refused):
            if outcome.status == 404 and item.looks:
                self._look_again(item)
                return
            if item.owed.verb == "release" and outcome.error.get("code") in _NOTHING_TO_GIVE_BACK:
                outcome = None  # there is nothing to give back
            else:
                self._spool.refuse(item.owed, outcome)
        item.file.append(Told(item.owed.id))
        if not item.told.done():
            item.told.set_result(outcome)

    def _look_again(self, item: Item) -> None:
        def again() -> None:
            self._later.discard(timer)
            item.looks -= 1
            self._waiting[item.owed.id] = item
            self._is_empty.clear()
            self._wake.set()

        timer = asyncio.get_running_loop().call_later(_SECOND_LOOK_SECONDS, again)
        self._later.add(timer)


_AT_ONCE: Final = 16
_NOTHING_TO_GIVE_BACK: Final = ("hold_not_found", "hold_closed", "invalid_api_key")
_NOT_ABOUT_THE_ITEM: Final = frozenset(
    {None, "invalid_token", "rate_limit_exceeded", "not_found", "method_not_allowed"}
)
"""Our token, our address, or how busy Satmeter is; and words that are none of Satmeter's. Another time it may be taken."""


def _batch(items: list[Item]) -> list[Item]:
    """As many of the first as a request takes."""
    size, found = 0, list[Item]()
    for item in items[:MOST_SETTLES]:
        size += len(bytes(item.owed.body)) + 1
        if size > MOST_BYTES and found:
            break
        found.append(item)
    return found


_T = TypeVar("_T")


def _read(answer: Answer, wanted: type[_T]) -> _T:
    """Raises Away for words that are none of Satmeter's."""
    try:
        return msgspec.json.decode(answer.body, type=wanted)
    except msgspec.DecodeError as error:
        raise Away(f"an answer that is none of Satmeter's: {error}", may_have_happened=True) from error


def _about_the_item(answer: Answer, verb: Verb = "settle") -> dict[str, object]:
    """The error of a refusal, where it is one of what was told. Raises Away."""
    error = error_of(answer)
    is_no_such_charge = verb == "refund" and error.get("code") == "not_found"
    if error.get("code") in _NOT_ABOUT_THE_ITEM and not is_no_such_charge:
        raise Away(f"Satmeter answered {answer.status} {error.get('code')}", may_have_happened=False)
    return error


def error_of(answer: Answer) -> dict[str, object]:
    """The error of a refusal, whatever it was written by."""
    try:
        return msgspec.json.decode(answer.body, type=_Error).error
    except msgspec.DecodeError:
        return {"message": f"an answer {answer.status} that is none of Satmeter's"}
