"""Calls in flight at the same moment, decided together: while one batch is at the database, the next one fills.

A batch is of all verbs, and one transaction: what a commit costs is shared by as many calls as there are.
There is no timer: a call that finds nobody at the database goes at once, as a batch of one. It is the same function
that decides one call or many, so that a batch changes no answer. It never holds the same call of a verb twice: a
repeat goes with the next one, and so finds the first.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableSequence, Sequence
from functools import partial
from itertools import accumulate
from math import ceil
from typing import Any, Final, Generic, LiteralString, TypeAlias, TypeVar, cast

import msgspec
import psycopg
from msgspec.structs import astuple
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Params
from app.kernel.errors import DatabaseUnavailable
from app.kernel.shards import Shards
from app.metering.arrays import as_array
from app.metering.functions import OF_ACCOUNT, CallAnswer, CallParams, Function
from app.metering.gathered import gathered

_T = TypeVar("_T")
_A = TypeVar("_A", bound=CallAnswer)

Answer: TypeAlias = _A | BaseException | None
"""What the verb's function returns for a call, None where there is no such account; or what went wrong."""

_Whose: TypeAlias = uuid.UUID | int
"""Of an account, or of the accounts in a shard."""

_MOST_IN_A_BATCH: Final = 500
_MOST_WAITING: Final = 5_000
_WORTH_SPLITTING: Final = 24
_LONGEST_WAIT_SECONDS: Final = 5


class _Asked:
    """Calls that were asked about at once, by one who waits until each of them has its answer."""

    __slots__ = ("answered", "answers", "missing", "since")

    def __init__(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        self.answers: list[Answer[CallAnswer]] = [None] * count
        self.answered: asyncio.Future[None] = loop.create_future()
        self.missing, self.since = count, loop.time()


class _Call(msgspec.Struct, eq=False):
    """A call that waits for its answer."""

    params: CallParams
    asked: _Asked
    place: int
    is_answered: bool = False

    @property
    def is_over(self) -> bool:
        """It has its answer, or nobody waits for it any more."""
        return self.is_answered or self.asked.answered.done()

    def answer(self, answer: Answer[CallAnswer]) -> None:
        """The first answer stays."""
        if self.is_answered:
            return
        asked, self.is_answered = self.asked, True
        asked.answers[self.place] = answer
        asked.missing -= 1
        if asked.missing == 0 and not asked.answered.done():  # its caller may have gone
            asked.answered.set_result(None)

    @property
    def is_late(self) -> bool:
        """Whether it has waited for so long that its caller had better ask again."""
        return self.asked.since < _late()


def _late() -> float:
    """Whoever has waited since before this moment of the loop had better ask again."""
    return asyncio.get_running_loop().time() - _LONGEST_WAIT_SECONDS


class _Verb:
    """One verb's calls that wait, and how its function is asked about many: each parameter is an array of theirs.

    But `lock`, the accounts; `wait`, whether for those that are locked; and what is alike for all calls.
    """

    def __init__(
        self,
        number: int,
        function: Function,
        told: type[CallParams],
        answered: type[CallAnswer],
        of_account: Function | None = None,
    ) -> None:
        """`told`: what a call's parameters are in, and `answered`: what its columns. `of_account`: how the calls of one account
        are asked about, where they are not asked about together with others'."""
        self._prefix = f"{number}_"  # statements of several verbs tell their parameters apart
        self.call = (of_account or function).call(self._prefix)
        self.alone: LiteralString = f"SELECT * FROM {self.call}"
        kinds = {name: kind for name, kind in function.parameters.items() if name not in ("lock", "wait")}
        assert kinds.keys() == set(told.__struct_fields__), f"{function.name} and {told.__name__}"
        assert [*function.columns] == ["item", *answered.__struct_fields__], f"{function.name} and {answered.__name__}"
        self._columns = [(self._prefix + name, kinds[name].endswith("[]")) for name in told.__struct_fields__]
        self._account = [f"{self._prefix}account"] if of_account is not None else []
        self.returned, self.answered = list(function.columns.items()), answered
        self.waiting: deque[_Call] = deque()
        self.ready: tuple[list[_Call], dict[str, Any]] | None = None

    @property
    def left(self) -> int:
        """How many calls are yet to be sent."""
        return len(self.waiting) + (len(self.ready[0]) if self.ready is not None else 0)

    def make_ready(self, share: float) -> None:
        """The next batch of it, of at most a `share` of those that wait. What goes wrong in that is answered."""
        if batch := _next_batch(self.waiting, share):
            try:
                self.ready = batch, self.asked(batch, wait=False)
            except Exception as error:  # noqa: BLE001 - it is the callers' to see, and the next batch is not to blame
                for call in batch:
                    call.answer(error)

    def take(self, share: float) -> tuple[list[_Call], dict[str, Any]]:
        """The batch that is ready, else one that is made so; with its parameters, and empty if there is none. One that was
        ready for so long that its first call is late is made anew."""
        if self.ready is not None and self.ready[0][0].is_late:
            self.waiting.extendleft(reversed(self.ready[0]))
            self.ready = None
        if self.ready is None:
            self.make_ready(share)
        taken, self.ready = self.ready or ([], {}), None
        return taken

    def without(self, is_meant: Callable[[_Call], bool]) -> list[_Call]:
        """The calls that are meant, in their order; they wait here no more."""
        if self.ready is not None:
            self.waiting.extendleft(reversed(self.ready[0]))
            self.ready = None
        return _taken_out(self.waiting, is_meant)

    def fail(self) -> None:
        """Whoever waits is to ask again."""
        _fail([*(self.ready[0] if self.ready is not None else ()), *self.waiting])
        self.ready = None
        self.waiting.clear()

    def asked(self, batch: Sequence[_Call], *, wait: bool) -> dict[str, Any]:
        """The parameters of the function for a batch."""
        params: dict[str, Any] = {
            name: as_array(values) if is_array else values[0]
            for (name, is_array), values in zip(
                self._columns, zip(*[astuple(call.params) for call in batch], strict=True), strict=True
            )
        }
        params |= dict.fromkeys(self._account, batch[0].params.account_id)
        params[self._prefix + "lock"] = as_array(list({call.params.account_id for call in batch}))
        params[self._prefix + "wait"] = wait
        return params


class Batches:
    """The verbs' calls, one batch at a time. Not `together`, each is decided by itself.

    Two batches at once would cost two commits, and miss each other's accounts, where these are busy. A batch passes
    by an account that somebody keeps locked, so that it holds up no other: that account's calls then wait for it in a
    batch of their own, as do those that wait already or come meanwhile. So do the accounts of a batch that cannot be decided together.
    With `by_account` a batch is of one account, or of those beside each other where accounts live on several servers, and of one
    verb: a function that takes an account's id first is asked where that account is.
    """

    def __init__(self, db: Database, *, together: bool = True, by_account: bool = False) -> None:
        self._db, self._together, self._by_account = db, together, by_account
        self._lane = db.lane()
        self._verbs: list[_Verb] = []
        self._statements: dict[tuple[_Verb, ...], LiteralString] = {}
        self._deciding: asyncio.Task[None] | None = None
        self._shards = Shards(db)
        self._apart: dict[_Whose, deque[tuple[_Verb, _Call]]] = {}
        self._deciding_apart: set[asyncio.Task[None]] = set()

    def decider(self, function: Function, told: type[CallParams], answered: type[_A]) -> "Decider[_A]":
        """Decides the calls of a verb by its function. In a batch the verbs follow each other as they came to be known."""
        of_account = OF_ACCOUNT[function.name] if self._by_account else None
        verb = _Verb(len(self._verbs), function, told, answered, of_account)
        self._verbs.append(verb)
        return Decider(partial(self._decide, verb), verb)

    async def _decide(self, verb: _Verb, params: Sequence[CallParams]) -> list[Answer[CallAnswer]]:
        asked = _Asked(len(params))
        calls = [_Call(each, asked, place) for place, each in enumerate(params)]
        if self._by_account:
            for call in calls:
                self._wait_apart(verb, call, await self._shards.of(call.params.account_id))
        elif not self._together:
            await asyncio.gather(*(self._ask(verb, [call], wait=True) for call in calls))
        else:
            self._let_wait(verb, calls)
        await asked.answered
        return asked.answers

    def _let_wait(self, verb: _Verb, calls: list[_Call]) -> None:
        """Raises DatabaseUnavailable where too many do already; none of these waits then."""
        free = [call for call in calls if not self._waits_apart(call)]
        if free:
            if verb.left + len(free) > _MOST_WAITING:
                raise DatabaseUnavailable(retry_after_seconds=1)
            verb.waiting.extend(free)
            if self._deciding is None or self._deciding.done():
                self._deciding = asyncio.create_task(self._decide_all())
        if len(free) < len(calls):
            for call in calls:
                if self._waits_apart(call):
                    self._wait_apart(verb, call)

    async def _decide_all(self) -> None:
        try:
            await asyncio.sleep(0)  # requests that have arrived but were not read yet come along
            while any(verb.left for verb in self._verbs):  # also those that came while the lane was closed
                try:
                    await self._decide_waiting()
                finally:
                    await self._lane.close()
        finally:  # cancelled; otherwise none is left
            for verb in self._verbs:
                verb.fail()

    async def _decide_waiting(self) -> None:
        size = 0
        while left := sum(verb.left for verb in self._verbs):
            share, params = _share(left, size), dict[str, Any]()
            batches: list[tuple[_Verb, list[_Call]]] = []
            for verb in self._verbs:
                batch, asked = verb.take(share)
                if batch:
                    batches.append((verb, batch))
                    params |= asked
            size = sum(len(batch) for _, batch in batches)
            try:
                if batches:
                    await self._decide_batches(batches, params)
            except DatabaseUnavailable:
                _fail(_calls(batches))
            except asyncio.CancelledError:
                _fail(_calls(batches))
                raise
            except Exception as error:  # noqa: BLE001 - it is the callers' to see, and the next batch is not to blame
                for call in _calls(batches):
                    call.answer(error)

    def _make_ready(self) -> None:
        """Make the next batch ready while this one is decided, for the database not to wait for that; but only of a verb of
        which so many wait that it would be no larger later. What comes alone meanwhile, of another verb, goes along with it."""
        for verb in self._verbs:
            if verb.ready is None and len(verb.waiting) >= 2 * _MOST_IN_A_BATCH:
                verb.make_ready(1)

    async def _decide_batches(self, batches: list[tuple[_Verb, list[_Call]]], params: Params) -> None:
        loop, first = asyncio.get_running_loop(), min(batch[0].asked.since for _, batch in batches)
        gathered.count(sum(len(batch) for _, batch in batches), loop.time() - first)
        loop.call_soon(self._make_ready)  # as soon as this one was sent
        try:
            found = await self._lane.all(self._statement(tuple(verb for verb, _ in batches)), params)
        except psycopg.Error:  # one of them is the reason; alone it hurts nobody else
            for verb, batch in batches:
                for call in batch:
                    self._wait_apart(verb, call)
            self._let_none_overtake()
            return
        # Their callers go on when the next batch is under way: the database need not wait for them.
        loop.call_soon(self._answer, batches, found)

    def _statement(self, verbs: tuple[_Verb, ...]) -> LiteralString:
        if verbs not in self._statements:
            self._statements[verbs] = _statement(verbs)
        return self._statements[verbs]

    def _answer(self, batches: list[tuple[_Verb, list[_Call]]], found: list[tuple[Any, ...]]) -> None:
        """Give each call its row. One that got none was passed by, or there is nothing to be found."""
        starts = list(accumulate((len(verb.returned) for verb, _ in batches), initial=1))
        answered = [0] * len(batches)
        for row in found:
            place = row[0]
            verb, batch = batches[place]
            start = starts[place]
            batch[row[start] - 1].answer(verb.answered(*row[start + 1 : starts[place + 1]]))
            answered[place] += 1
        if all(count == len(batch) for (_, batch), count in zip(batches, answered, strict=True)):
            return
        for verb, batch in batches:
            for call in batch:
                if not call.is_over:
                    self._wait_apart(verb, call)
        self._let_none_overtake()

    # --- accounts apart: those that are locked, or whose calls could not be decided with the others' ----

    async def _ask(self, verb: _Verb, batch: list[_Call], *, wait: bool) -> None:
        """Decide a batch of one verb: together, else one by one. If it waits for what is locked each call has its answer then,
        otherwise those without one wait with their account."""
        try:
            found = await self._db.many(verb.alone, verb.asked(batch, wait=wait))
        except DatabaseUnavailable:
            _fail(batch)
        except Exception as error:  # noqa: BLE001 - it is its caller's
            await self._ask_apart(verb, batch, error, wait=wait)
        else:
            for row in found:
                batch[row.pop("item") - 1].answer(verb.answered(**row))
            for call in batch:
                if wait:
                    call.answer(None)
                elif not call.is_over:
                    self._wait_apart(verb, call)
        finally:
            if wait:
                _fail(batch)  # late or cancelled; otherwise each has its answer

    async def _ask_apart(self, verb: _Verb, batch: list[_Call], error: Exception, *, wait: bool) -> None:
        """One of a batch is the reason for this error; alone it hurts nobody else."""
        if not wait:
            for call in batch:
                self._wait_apart(verb, call)
        elif len(batch) == 1:
            batch[0].answer(error)
        else:
            for call in batch:
                if not call.is_late:
                    await self._ask(verb, [call], wait=True)

    def _wait_apart(self, verb: _Verb, call: _Call, beside: _Whose | None = None) -> None:
        """With its account's, or those of the accounts beside it, unless its own wait already."""
        account_id = call.params.account_id
        whose = account_id if beside is None or account_id in self._apart else beside
        if whose not in self._apart:
            self._apart[whose] = deque()
            task = asyncio.create_task(self._decide_apart(whose))
            self._deciding_apart.add(task)
            task.add_done_callback(self._deciding_apart.discard)
        queue = self._apart[whose]
        if len(queue) >= _MOST_WAITING:
            _fail([call])
        else:
            queue.append((verb, call))

    def _let_none_overtake(self) -> None:
        """Those that wait together go behind the calls of their account that have come to wait apart."""
        for verb in self._verbs:
            for call in verb.without(self._waits_apart):
                self._wait_apart(verb, call)

    def _waits_apart(self, call: _Call) -> bool:
        return call.params.account_id in self._apart

    async def _decide_apart(self, whose: _Whose) -> None:
        """Their calls until none is left, in rounds: verb by verb, as a batch decides them. Repeats wait for the next.

        Where they are of several accounts, an account's calls follow those of it that have come to wait by themselves.
        """
        queue, batches = self._apart[whose], list[tuple[_Verb, list[_Call]]]()
        try:
            await asyncio.sleep(0)  # those that have arrived but were not read yet come along
            while queue:
                round_ = list(queue)
                queue.clear()
                batches.clear()
                for verb in self._verbs:
                    waiting = deque(call for each, call in round_ if each is verb)
                    batches.append((verb, _next_batch(waiting, 1)))
                    queue.extend((verb, call) for call in waiting)
                for verb, batch in batches:
                    if isinstance(whose, int):
                        for call in _taken_out(batch, self._waits_apart):
                            self._wait_apart(verb, call)
                    if batch:
                        await self._ask(verb, batch, wait=not isinstance(whose, int))
                        batch.clear()  # those without an answer wait elsewhere
                if isinstance(whose, int):
                    for verb, call in _taken_out(queue, lambda each: self._waits_apart(each[1])):
                        self._wait_apart(verb, call)
        finally:
            del self._apart[whose]
            _fail(_calls(batches))
            _fail(call for _, call in queue)


class Decider(Generic[_A]):
    """Decides the calls of one verb."""

    def __init__(
        self, decide: Callable[[Sequence[CallParams]], Awaitable[list[Answer[CallAnswer]]]], verb: _Verb
    ) -> None:
        self._decide, self._verb = decide, verb

    async def __call__(self, params: CallParams) -> _A | None:
        """Raises what went wrong: DatabaseUnavailable also for a call that could not be sent within seconds."""
        [answer] = await self.many([params])
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def within(self, session: AsyncSession, params: CallParams) -> _A | None:
        """Alone, in its caller's transaction, which may take it back; it waits for what is locked."""
        call = _Call(params, _Asked(1), 0)
        conn = await session.connection()
        result = await conn.exec_driver_sql(self._verb.alone, self._verb.asked([call], wait=True))
        found = result.first()
        return None if found is None else cast("_A", self._verb.answered(*found[1:]))

    async def many(self, params: Sequence[CallParams]) -> list[Answer[_A]]:
        """Of one caller, at the price of one wait for all; none is touched by what goes wrong with another.

        Raises DatabaseUnavailable where too many wait already, for any of them to be decided.
        """
        return cast("list[Answer[_A]]", await self._decide(params)) if params else []


def _next_batch(waiting: deque[_Call], share: float) -> list[_Call]:
    """The calls that came first, leaving out those nobody waits for any more, and repeats for the next time.

    At most a `share` of those that wait.
    """
    batch: dict[tuple[int, int], _Call] = {}
    repeats: list[_Call] = []
    most, late = min(_MOST_IN_A_BATCH, ceil(len(waiting) * share)), _late()
    while waiting and len(batch) + len(repeats) < most:
        call = waiting.popleft()
        asked, params = call.asked, call.params
        if asked.since < late:
            _fail([call])
        elif (identity := (params.account_id.int, params.hold_id.int)) in batch:  # hashed faster than UUIDs
            repeats.append(call)
        elif not call.is_over:
            batch[identity] = call
    waiting.extendleft(reversed(repeats))
    return list(batch.values())


def _taken_out(queue: MutableSequence[_T], is_meant: Callable[[_T], bool]) -> list[_T]:
    """Those that are meant; the others stay in their order."""
    taken, kept = list[_T](), list[_T]()
    for each in queue:
        (taken if is_meant(each) else kept).append(each)
    if taken:
        queue.clear()
        queue.extend(kept)
    return taken


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
        branches.append(f"SELECT {place}, {columns} FROM {verb.call} f")
    return " UNION ALL ".join(branches)


def _fail(calls: Iterable[_Call]) -> None:
    for call in calls:
        if not call.is_answered:
            call.answer(DatabaseUnavailable(retry_after_seconds=1))
