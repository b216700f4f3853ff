"""Calls in flight at the same moment, decided together: while one batch is at the database, the next one fills.

There is no timer: a call that finds nobody at the database goes at once and alone. A batch changes no answer that
single calls would have given. It never holds the same call twice (a repeat goes with the next one and so finds the
first), and where PostgreSQL refuses it as a whole, each of its calls is run alone and gets what is its own.
"""

import asyncio
import re
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import NoneType
from typing import Any, Final, LiteralString, TypeAlias

import msgspec
import psycopg
from psycopg.types.json import Jsonb

from app.kernel.db import Database, Row
from app.kernel.errors import DatabaseUnavailable

Params: TypeAlias = Mapping[str, Any]
Decider: TypeAlias = Callable[[Params], Awaitable[Row | None]]
"""Decides one call: what its statement returns."""

_ATTEMPTS: Final = 4
_MOST_IN_A_BATCH: Final = 500
_MOST_WAITING: Final = 5_000
_LONGEST_WAIT_SECONDS: Final = 5
_STUCK_AFTER_SECONDS: Final = 0.5
"""As long as a batch waits for a lock: afterwards its account's calls go their own way."""


def decider(db: Database, one: LiteralString, many: LiteralString | None, turn: asyncio.Lock) -> Decider:
    """Decide calls with the statement `one`, those in flight together with `many`, if that is given, in its `turn`."""
    return partial(decide_one, db, one) if many is None else Batcher(db, one, many, turn).decide


async def decide_one(db: Database, statement: LiteralString, params: Params) -> Row | None:
    """Run again when a UNIQUE key shows that a racing call was recorded after our snapshot."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return await db.one(statement, params)
        except psycopg.errors.UniqueViolation:
            if attempt == _ATTEMPTS:
                raise
    raise AssertionError("unreachable")


class _Call(msgspec.Struct, frozen=True, eq=False):
    """A call that waits for its answer."""

    params: Params
    answer: asyncio.Future[Row | None]
    since: float

    def succeed(self, found: Row | None) -> None:
        if not self.answer.done():  # its caller may have gone
            self.answer.set_result(found)

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Batcher:
    """One operation's calls, one batch at a time; those that share a `turn` have one batch at a time together.

    Two batches at once would wait for each other's accounts, where these are busy, and the worker for both.
    An account that somebody keeps locked must not hold up the others: a call that is stuck goes on alone, and
    while it does, further calls of its account do not join a batch.
    """

    def __init__(self, db: Database, one: LiteralString, many: LiteralString, turn: asyncio.Lock) -> None:
        self._db, self._one, self._many, self._turn = db, one, many, turn
        self._columns = re.findall(r"%\((\w+)\)s::\w+\[\]", many)
        self._waiting: deque[_Call] = deque()
        self._deciding: asyncio.Task[None] | None = None
        self._alone: set[asyncio.Task[None]] = set()
        self._apart: Counter[uuid.UUID] = Counter()

    async def decide(self, params: Params) -> Row | None:
        """The call's row, as the single statement would have returned it; raises what that would have raised.

        Raises DatabaseUnavailable also for a call that could not be sent within seconds.
        """
        if params["account_id"] in self._apart:
            return await decide_one(self._db, self._one, params)
        if len(self._waiting) >= _MOST_WAITING:
            raise DatabaseUnavailable(retry_after_seconds=1)
        loop = asyncio.get_running_loop()
        call = _Call(params, loop.create_future(), loop.time())
        self._waiting.append(call)
        if self._deciding is None or self._deciding.done():
            self._deciding = asyncio.create_task(self._decide_all())
        return await call.answer

    async def _decide_all(self) -> None:
        await asyncio.sleep(0)  # requests that have arrived but were not read yet come along
        while self._waiting:
            batch: list[_Call] = []
            try:
                async with self._turn:
                    batch = self._next_batch()
                    await (self._decide_batch(batch) if len(batch) > 1 else self._decide_alone(batch))
            except DatabaseUnavailable:
                _fail(batch)
            except asyncio.CancelledError:
                _fail((*batch, *self._waiting))
                raise
            except Exception as error:  # noqa: BLE001 - it is the callers' to see, and the next batch is not to blame
                for call in batch:
                    call.fail(error)

    def _next_batch(self) -> list[_Call]:
        """The calls that came first, leaving out those nobody waits for any more, and repeats for the next time."""
        batch: dict[tuple[int, int], _Call] = {}
        repeats: list[_Call] = []
        oldest = asyncio.get_running_loop().time() - _LONGEST_WAIT_SECONDS
        while self._waiting and len(batch) + len(repeats) < _MOST_IN_A_BATCH:
            call = self._waiting.popleft()
            identity = call.params["account_id"].int, call.params["hold_id"].int  # hashed faster than UUIDs
            if call.since < oldest:
                _fail([call])
            elif identity in batch:
                repeats.append(call)
            elif not call.answer.done():
                batch[identity] = call
        self._waiting.extendleft(reversed(repeats))
        return list(batch.values())

    async def _decide_batch(self, batch: list[_Call]) -> None:
        asked = [call.params for call in batch]
        params = {name: _array([each[name] for each in asked]) for name in self._columns}
        try:
            found = await self._db.many(self._many, {**batch[0].params, **params})
        except psycopg.Error:  # one of them is the reason, or somebody else's lock; alone it hurts nobody else
            await self._decide_alone(batch)
            return
        # Their callers go on when the next batch is under way: the database need not wait for them.
        asyncio.get_running_loop().call_soon(_answer, batch, found)

    async def _decide_alone(self, calls: list[_Call]) -> None:
        """Each with the single statement, all at once; returns when they are done, or when some are stuck."""
        tasks = {asyncio.create_task(self._run_alone(call)) for call in calls}
        if not tasks:
            return
        self._alone |= tasks
        for task in tasks:
            task.add_done_callback(self._alone.discard)
        await asyncio.wait(tasks, timeout=_STUCK_AFTER_SECONDS)

    async def _run_alone(self, call: _Call) -> None:
        account_id = call.params["account_id"]
        self._apart[account_id] += 1
        try:
            call.succeed(await decide_one(self._db, self._one, call.params))
        except DatabaseUnavailable:
            _fail([call])
        except Exception as error:  # noqa: BLE001 - it is its caller's
            call.fail(error)
        finally:
            _fail([call])  # cancelled; otherwise it has its answer
            self._apart[account_id] -= 1
            if not self._apart[account_id]:
                del self._apart[account_id]


def _answer(batch: list[_Call], found: list[Row]) -> None:
    rows = {row["item"]: row for row in found}
    for item, call in enumerate(batch, start=1):
        call.succeed(rows.get(item))


def _fail(calls: Iterable[_Call]) -> None:
    for call in calls:
        call.fail(DatabaseUnavailable(retry_after_seconds=1))


# --- parameters ---------------------------------------------------------------------------------------


def _array(values: Sequence[Any]) -> str:
    """A PostgreSQL array as text, sent as one parameter: much cheaper than psycopg's own adaptation.

    A column is mostly of one type, and then written at once.
    """
    kinds = set(map(type, values))
    write = _COLUMN[kinds.pop()] if len(kinds) == 1 else _mixed
    return write(values)


def _mixed(values: Sequence[Any]) -> str:
    return "{" + ",".join([_COLUMN[type(value)]((value,))[1:-1] for value in values]) + "}"


def _quoted(texts: Iterable[str]) -> str:
    return '{"' + '","'.join(texts) + '"}'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


_json: Final = msgspec.json.Encoder().encode
_COLUMN: Final[Mapping[type, Callable[[Sequence[Any]], str]]] = {
    NoneType: lambda values: "{" + ",".join(["NULL"] * len(values)) + "}",
    int: lambda values: "{" + ",".join(map(str, values)) + "}",
    uuid.UUID: lambda values: "{" + ",".join([value.hex for value in values]) + "}",
    str: lambda values: _quoted(map(_escaped, values)),
    bytes: lambda values: _quoted(["\\\\x" + value.hex() for value in values]),
    datetime: lambda values: _quoted([value.isoformat() for value in values]),
    Jsonb: lambda values: _quoted([_escaped(_json(value.obj).decode()) for value in values]),
}
