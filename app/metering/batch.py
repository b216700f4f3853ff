"""Calls in flight at the same moment, decided together: while one batch is at the database, the next one fills.

A batch is of all verbs, and one transaction: what a commit costs is shared by as many calls as there are.
There is no timer: a call that finds nobody at the database goes at once and alone. A batch changes no answer that
single calls would have given. It never holds the same call of a verb twice (a repeat goes with the next one and so
finds the first), and where PostgreSQL refuses it as a whole, each of its calls is run alone and gets what is its own.
"""

import asyncio
import re
import sys
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from itertools import accumulate
from math import ceil
from operator import itemgetter
from types import NoneType
from typing import Any, Final, LiteralString, TypeAlias

import msgspec
import psycopg
from psycopg.types.json import Jsonb

from app.kernel.db import Database, Params, Row
from app.kernel.errors import DatabaseUnavailable

Decider: TypeAlias = Callable[[Params], Awaitable[Row | None]]
"""Decides one call: what its statement returns."""

_ATTEMPTS: Final = 4
_MOST_IN_A_BATCH: Final = 500
_MOST_WAITING: Final = 5_000
_WORTH_SPLITTING: Final = 24
_LONGEST_WAIT_SECONDS: Final = 5
_STUCK_AFTER_SECONDS: Final = 0.5
"""As long as a batch waits for a lock: afterwards its account's calls go their own way."""


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


class _Verb:
    """One verb's calls that wait, and how they are asked: with the statement `one`, or by the function `many`."""

    def __init__(self, number: int, one: LiteralString, many: LiteralString, returned: LiteralString) -> None:
        self.one = one
        self.many = many.replace("%(", f"%({number}_")  # statements of several verbs tell their parameters apart
        self.lock = f"{number}_lock"
        columns = [name for name in re.findall(r"%\((\w+)\)s::\w+\[\]", many) if name != "lock"]
        self._of = itemgetter(*columns)
        self._parameters = [f"{number}_{name}" for name in columns]
        self.returned = [(sys.intern(name), kind) for name, kind in map(str.split, returned.split(","))]
        self.waiting: deque[_Call] = deque()

    def next_batch(self, share: float) -> list[_Call]:
        """The calls that came first, leaving out those nobody waits for any more, and repeats for the next time.

        At most a `share` of those that wait.
        """
        batch: dict[tuple[int, int], _Call] = {}
        repeats: list[_Call] = []
        oldest = asyncio.get_running_loop().time() - _LONGEST_WAIT_SECONDS
        most = min(_MOST_IN_A_BATCH, ceil(len(self.waiting) * share))
        while self.waiting and len(batch) + len(repeats) < most:
            call = self.waiting.popleft()
            identity = call.params["account_id"].int, call.params["hold_id"].int  # hashed faster than UUIDs
            if call.since < oldest:
                _fail([call])
            elif identity in batch:
                repeats.append(call)
            elif not call.answer.done():
                batch[identity] = call
        self.waiting.extendleft(reversed(repeats))
        return list(batch.values())

    def asked(self, batch: list[_Call]) -> dict[str, str | None]:
        """The parameters of `many` for a batch."""
        values = zip(*[self._of(call.params) for call in batch], strict=True)
        return dict(zip(self._parameters, map(_array, values), strict=True))


class Batches:
    """The verbs' calls, one batch at a time.

    Two batches at once would wait for each other's accounts, where these are busy, and cost two commits.
    An account that somebody keeps locked must not hold up the others: a call that is stuck goes on alone, and
    while it does, further calls of its account do not join a batch.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._lane = db.lane()
        self._verbs: list[_Verb] = []
        self._statements: dict[tuple[_Verb, ...], LiteralString] = {}
        self._deciding: asyncio.Task[None] | None = None
        self._alone: set[asyncio.Task[None]] = set()
        self._apart: Counter[uuid.UUID] = Counter()

    def decider(self, one: LiteralString, many: LiteralString, returned: LiteralString) -> Decider:
        """Decides the calls of a verb: alone with the statement `one`, those in flight together by the function `many`.

        `many` is how the function is called, each parameter an array; `returned` its columns with their types, `item`
        (which call, from 1) first. In a batch the verbs follow each other in the order in which they came to be known.
        """
        verb = _Verb(len(self._verbs), one, many, returned)
        self._verbs.append(verb)
        return partial(self._decide, verb)

    async def _decide(self, verb: _Verb, params: Params) -> Row | None:
        """The call's row, as the single statement would have returned it; raises what that would have raised.

        Raises DatabaseUnavailable also for a call that could not be sent within seconds.
        """
        if params["account_id"] in self._apart:
            return await decide_one(self._db, verb.one, params)
        if len(verb.waiting) >= _MOST_WAITING:
            raise DatabaseUnavailable(retry_after_seconds=1)
        loop = asyncio.get_running_loop()
        call = _Call(params, loop.create_future(), loop.time())
        verb.waiting.append(call)
        if self._deciding is None or self._deciding.done():
            self._deciding = asyncio.create_task(self._decide_all())
        return await call.answer

    async def _decide_all(self) -> None:
        try:
            await asyncio.sleep(0)  # requests that have arrived but were not read yet come along
            while any(verb.waiting for verb in self._verbs):  # also those that came while the lane was closed
                try:
                    await self._decide_waiting()
                finally:
                    await self._lane.close()
        finally:  # cancelled; otherwise none is left
            for verb in self._verbs:
                _fail(verb.waiting)
                verb.waiting.clear()

    async def _decide_waiting(self) -> None:
        size = 0
        while waiting := sum(len(verb.waiting) for verb in self._verbs):
            share = _share(waiting, size)
            batches: list[tuple[_Verb, list[_Call]]] = []
            try:
                batches = [(verb, batch) for verb in self._verbs if (batch := verb.next_batch(share))]
                size = sum(len(batch) for _, batch in batches)
                if size > 1:
                    await self._decide_together(batches)
                else:
                    await self._decide_alone(batches)
            except DatabaseUnavailable:
                _fail(_calls(batches))
            except asyncio.CancelledError:
                _fail(_calls(batches))
                raise
            except Exception as error:  # noqa: BLE001 - it is the callers' to see, and the next batch is not to blame
                for call in _calls(batches):
                    call.fail(error)

    async def _decide_together(self, batches: list[tuple[_Verb, list[_Call]]]) -> None:
        params: dict[str, str | None] = {}
        for verb, batch in batches:
            params |= verb.asked(batch)
            params[verb.lock] = None
        # The first function locks the accounts of all: those of the others are locked when their turn comes.
        params[batches[0][0].lock] = _array(list({call.params["account_id"] for call in _calls(batches)}))
        try:
            found = await self._lane.all(self._statement(tuple(verb for verb, _ in batches)), params)
        except psycopg.Error:  # one of them is the reason, or somebody else's lock; alone it hurts nobody else
            await self._decide_alone(batches)
            return
        # Their callers go on when the next batch is under way: the database need not wait for them.
        asyncio.get_running_loop().call_soon(_answer, batches, found)

    def _statement(self, verbs: tuple[_Verb, ...]) -> LiteralString:
        if verbs not in self._statements:
            self._statements[verbs] = _statement(verbs)
        return self._statements[verbs]

    async def _decide_alone(self, batches: list[tuple[_Verb, list[_Call]]]) -> None:
        """Each with its single statement, all at once; returns when they are done, or when some are stuck."""
        tasks = {
            asyncio.create_task(self._run_alone(verb, call)): call.params["account_id"]
            for verb, batch in batches
            for call in batch
        }
        if not tasks:
            return
        self._alone |= tasks.keys()
        for task in tasks:
            task.add_done_callback(self._alone.discard)
        _, stuck = await asyncio.wait(tasks, timeout=_STUCK_AFTER_SECONDS)
        for task in stuck:
            self._apart[tasks[task]] += 1
            task.add_done_callback(partial(self._join_again, tasks[task]))

    async def _run_alone(self, verb: _Verb, call: _Call) -> None:
        try:
            call.succeed(await decide_one(self._db, verb.one, call.params))
        except DatabaseUnavailable:
            _fail([call])
        except Exception as error:  # noqa: BLE001 - it is its caller's
            call.fail(error)
        finally:
            _fail([call])  # cancelled; otherwise it has its answer

    def _join_again(self, account_id: uuid.UUID, _: asyncio.Task[None]) -> None:
        self._apart[account_id] -= 1
        if not self._apart[account_id]:
            del self._apart[account_id]


def _share(waiting: int, before: int) -> float:
    """How much of those that wait the next batch takes: half of them and the batch before together, when they are more.

    Else large and small batches take turns: the worker is idle while a large one is decided, and the database while the
    many callers of that one are answered and call again.
    """
    if waiting < _WORTH_SPLITTING or before == 0:
        return 1
    return min(1, (waiting + before) / (2 * waiting))


def _calls(batches: Iterable[tuple[_Verb, list[_Call]]]) -> list[_Call]:
    return [call for _, batch in batches for call in batch]


def _statement(verbs: Sequence[_Verb]) -> LiteralString:
    """Asks these verbs' functions, one after the other. Each has columns of its own, after the verb's place here."""
    branches = []
    for place, verb in enumerate(verbs):
        columns = ", ".join(
            f"f.{name}" if other is verb else f"NULL::{kind}" for other in verbs for name, kind in other.returned
        )
        branches.append(f"SELECT {place}, {columns} FROM {verb.many} f")
    return " UNION ALL ".join(branches)


def _answer(batches: list[tuple[_Verb, list[_Call]]], found: list[tuple[Any, ...]]) -> None:
    """Give each call its row; a call without one gets None."""
    starts = list(accumulate((len(verb.returned) for verb, _ in batches), initial=1))
    names = [[name for name, _ in verb.returned] for verb, _ in batches]
    for row in found:
        place = row[0]
        answer = dict(zip(names[place], row[starts[place] :], strict=False))
        batches[place][1][answer["item"] - 1].succeed(answer)
    for call in _calls(batches):
        call.succeed(None)


def _fail(calls: Iterable[_Call]) -> None:
    for call in calls:
        call.fail(DatabaseUnavailable(retry_after_seconds=1))


# --- parameters ---------------------------------------------------------------------------------------


def _array(values: Sequence[Any]) -> str:
    """A PostgreSQL array as text, sent as one parameter: much cheaper than psycopg's own adaptation.

    What JSON writes as PostgreSQL reads it is written at once: null, numbers, quoted ids and times, and text without
    control characters; with them, or with what else is escaped, it is written by hand.
    """
    kinds = set(map(type, values))
    if kinds <= _ALIKE_IN_JSON:
        text = _json(values)
        if b"\\" not in text:
            return f"{{{text[1:-1].decode()}}}"
    elif kinds <= _JSONB:  # has no control characters
        text = _json([None if value is None else _json(value.obj).decode() for value in values])
        return f"{{{text[1:-1].decode()}}}"
    return "{" + ",".join(map(_element, values)) + "}"


def _element(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f'"\\\\x{value.hex()}"'
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


_json: Final = msgspec.json.Encoder().encode
_ALIKE_IN_JSON: Final = frozenset({NoneType, int, uuid.UUID, str, datetime})
_JSONB: Final = frozenset({NoneType, Jsonb})
