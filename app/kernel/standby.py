"""Where history and other reading may be done, a moment behind: a streaming standby, and the primary whenever that cannot."""

import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, LiteralString, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import RUNTIME_ROLE, Database, Lane, Params, Row, row
from app.kernel.errors import DatabaseUnavailable
from app.kernel.logs import log

T = TypeVar("T")
HEADER: Final = b"x-data-as-of"
_REST_SECONDS: Final = 5.0
"""How long a standby that could not be asked is left alone: who reads meanwhile waits for the primary only."""
_AS_OF: Final = """SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_xact_replay_timestamp() ELSE now() END AS as_of,
                          (SELECT system_identifier FROM pg_control_system()) AS cluster"""


@dataclass(slots=True)
class AsOf:
    """Until when everything is in what a request read: by its own reads, or else by an earlier one whose finds were kept."""

    kept: datetime | None = None
    read: datetime | None = None


_as_of: ContextVar[AsOf | None] = ContextVar("as_of", default=None)


class Standby(Database):
    """Reads on a standby. Whatever it cannot do, the primary does: a read that the recovery cancelled, one without an answer.

    A connection to it takes no writes, and only the primary's own standby is asked.
    """

    def __init__(self, url: str, primary: Database, *, pool_size: int, role: str | None = RUNTIME_ROLE) -> None:
        super().__init__(url, pool_size=pool_size, role=role, further={"default_transaction_read_only": "on"})
        self._primary = primary
        self._rests_until = 0.0
        self._known: datetime | None = None
        self._cluster: int | None = None

    async def open(self) -> None:
        """Connections are made as they are needed: the service starts without its standby, too."""

    async def transaction(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """Run `work`, which reads, on the standby; else on the primary. Raises DatabaseUnavailable if neither can."""
        if time.monotonic() >= self._rests_until:
            try:
                return await self._sent.to_its_end(self._read(work))
            except DatabaseUnavailable as error:
                self._rest(error)
        result = await self._primary.transaction(work)
        self._tell(datetime.now(UTC))
        return result

    async def many(self, statement: LiteralString, params: Params) -> list[Row]:
        """Single statements are calls: the primary's."""
        return await self._primary.many(statement, params)

    def lane(self) -> Lane:
        return self._primary.lane()

    def tell(self) -> None:
        """For an answer from what was kept of an earlier read."""
        if (told := _as_of.get()) is not None:
            told.kept = self._known

    async def _read(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """What was replayed is asked before: whatever was committed until then is in what `work` reads."""
        found = await self.once(lambda session: row(session, _AS_OF))
        assert found is not None
        if found["cluster"] != await self._own_cluster():
            raise DatabaseUnavailable(retry_after_seconds=1)
        result = await self.once(work)
        self._known = found["as_of"] or datetime.fromtimestamp(0, UTC)
        self._tell(self._known)
        return result

    async def _own_cluster(self) -> int:
        if self._cluster is None:
            found = await self._primary.transaction(lambda session: row(session, _AS_OF))
            assert found is not None
            self._cluster = found["cluster"]
        return self._cluster

    def _rest(self, error: DatabaseUnavailable) -> None:
        """A read that was cancelled says nothing of the next; a server that is away, or is no standby of ours, does."""
        cause = getattr(error.__cause__, "orig", error.__cause__)
        if getattr(cause, "sqlstate", None) in ("40001", "40P01", "57014"):
            log.info("standby.cancelled_a_read")
            return
        log.warning("standby.rests", seconds=_REST_SECONDS, exc_type=type(cause).__name__)
        self._rests_until = time.monotonic() + _REST_SECONDS

    def _tell(self, moment: datetime) -> None:
        if (told := _as_of.get()) is not None:
            told.read = moment if told.read is None else min(told.read, moment)


def begin() -> AsOf:
    """From now on this request's own; each read tells how old at most it was."""
    told = AsOf()
    _as_of.set(told)
    return told


def as_headers(told: AsOf) -> list[tuple[bytes, bytes]]:
    """The oldest of what an answer was read from."""
    moment = told.read or told.kept
    if moment is None:
        return []
    return [(HEADER, moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z").encode())]
