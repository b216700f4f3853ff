"""The database and the transaction policy.

A function that takes `session` or `conn` runs inside its caller's transaction and talks only to
PostgreSQL. One that takes `db` opens its own transactions, and may talk to the world between them.
No commit stands anywhere but here.
"""

import asyncio
import functools
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, LiteralString, NoReturn, TypeAlias, TypeVar, cast

import msgspec
import psycopg
import uuid_utils
from psycopg.rows import AsyncRowFactory, dict_row, tuple_row
from psycopg.types.numeric import Int8Dumper
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import CursorResult, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from app.kernel.connection import POOLERS, as_begin, as_options, as_set, prove, session_of
from app.kernel.errors import DatabaseUnavailable, InvalidField

RUNTIME_ROLE: Final = "satmeter_runtime"
"""What the service runs as: it may insert and read ledger entries, and never change or delete one."""

T = TypeVar("T")
Row = dict[str, Any]
Params: TypeAlias = Mapping[str, Any]
_TRY_AGAIN: Final = frozenset({"40001", "40P01"})
"""Serialization failure and deadlock: the server has rolled the whole transaction back."""
_BUSY: Final = frozenset({"55P03", "57014", "25P03", "25P04"})
_BUSY_CLASSES: Final = ("08", "53", "57P", "58")
"""Lock and statement timeouts; a lost connection, no disk or memory or connection left, shutdown and start-up, a failing disk: our
trouble, not the caller's."""
_READ_ONLY: Final = "25006"
"""The server became a standby, or always was one: the connection is dropped, so that the next one finds the primary."""
_OUT_OF_RANGE: Final = "22003"
_INTERNAL: Final = "XX000"
_NODE_LOST: Final = re.compile(
    r"could not commit transaction for shard|server closed the connection|no connection to the server|connection not open"
    r"|could not (send|receive) data|SSL (connection|SYSCALL)|postmaster was shut down"
)
"""What Citus says under that number when a server was lost, be it in the middle of a commit; whether it was done is unknown then."""
COMMITTED_TOGETHER: Final = "by_account.committed_together"
"""The function of a sharded database that makes what is written on several servers one act; app/sharding.py makes it."""
IS_SHARDED: Final[LiteralString] = f"SELECT to_regproc('{COMMITTED_TOGETHER}') IS NOT NULL AS is_so"
_ATTEMPTS: Final = 6
_KEPT_SECONDS: Final = 300.0
_LEAVING_SECONDS: Final = 5.0
"""How long closing waits for what was sent and whose caller has gone; the server ends it by its time limit anyway."""


def new_id() -> uuid.UUID:
    """A UUIDv7 made by the app: sorts by time, which keeps index pages warm. Never a secret."""
    return msgspec.convert(uuid_utils.uuid7().bytes, uuid.UUID)  # half the time of uuid_utils.compat


class Database:
    """Two doors to one PostgreSQL: SQLAlchemy sessions for the ordinary, a plain psycopg pool for the hot path."""

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 8,
        role: str | None = RUNTIME_ROLE,
        pooler: str = POOLERS[0],
        further: Mapping[str, str] | None = None,
    ) -> None:
        """`further` settings of each connection, as PostgreSQL shows them. Behind a `pooler` that knows transactions alone, each of them begins by becoming what a connection of ours is."""
        self._url = url
        self.is_sharded: bool | None = None
        self.finding_out = asyncio.Lock()
        """Whether accounts live on several servers; kernel/shards.py finds out, once."""
        self._session = dict(further or {}) | session_of(role)
        self._is_pooled = pooler == "transaction"
        self._asker = _Asker(as_set(self._session, of_transaction=True).encode() if self._is_pooled else None)
        self._engine: AsyncEngine = create_async_engine(
            "postgresql+psycopg://",
            async_creator=self._connect,
            pool_size=2 * pool_size,
            max_overflow=0,  # what overflows is closed when it comes back: a burst would make connections anew
            pool_timeout=5,
        )
        event.listen(self._engine.sync_engine, "handle_error", _drop_read_only)
        if self._is_pooled:
            begin = as_begin(self._session)
            event.listen(self._engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        self._sent = Sent()
        self._hot = self._pool(min_size=1, max_size=pool_size)
        # One batch at a time keeps to one connection: a pool would hand out its connections in turn, and each of their
        # server processes would find its caches cold. A second one is for batches that may not share a transaction.
        self._batches = self._pool(min_size=0, max_size=2)

    def _pool(self, *, min_size: int, max_size: int) -> AsyncConnectionPool[psycopg.AsyncConnection[Row]]:
        return AsyncConnectionPool(
            self._url,
            min_size=min_size,
            max_size=max_size,
            timeout=5,
            max_waiting=2000,
            open=False,
            configure=self._configure,
            connection_class=psycopg.AsyncConnection[Row],
            kwargs={
                "autocommit": True,
                "row_factory": cast("AsyncRowFactory[Row]", dict_row),
                "connect_timeout": 5,
                **self._started_with(prepare_threshold=0),
            },
        )

    async def open(self) -> None:
        await self._hot.open()
        await self._batches.open()

    async def close(self) -> None:
        await self._sent.wait(_LEAVING_SECONDS)
        await self._hot.close()
        await self._batches.close()
        await self._engine.dispose()

    async def transaction(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """Run `work` in one transaction and commit it, or leave no trace of it.

        Tried again when the server rolled it back for a race, or when the connection broke before the
        commit was asked for; so `work` may run more than once and must only talk to PostgreSQL.
        It runs to its end though its caller is cancelled.
        Raises DatabaseUnavailable; only then is it unknown whether the commit took effect.
        """
        return await self._sent.to_its_end(self._transaction(work))

    async def _transaction(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        for attempt in range(1, _ATTEMPTS + 1):
            committing = False
            try:
                async with AsyncSession(self._engine, expire_on_commit=False) as session:
                    result = await work(session)
                    await self._commit_together(session)
                    committing = True
                    await session.commit()
                    return result
            except (DBAPIError, PoolExhausted, psycopg.OperationalError) as error:
                if not _may_retry(error, committing):
                    _raise(error)
                await _pause_or_raise(error, attempt)
        raise AssertionError("unreachable")

    async def _commit_together(self, session: AsyncSession) -> None:
        """Where accounts live on several servers: what was written here and at an account's server is committed at both or at none."""
        if self.is_sharded is None:
            found = await row(session, IS_SHARDED)
            self.is_sharded = found is not None and bool(found["is_so"])
        if self.is_sharded:
            await row(session, f"SELECT {COMMITTED_TOGETHER}()")

    async def once(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """One transaction that only reads, and is not tried again. Raises DatabaseUnavailable."""
        try:
            async with AsyncSession(self._engine, expire_on_commit=False) as session:
                return await work(session)
        except (DBAPIError, PoolExhausted, psycopg.OperationalError) as error:
            _raise(error)

    async def one(self, statement: LiteralString, params: Params) -> Row | None:
        """One prepared statement, one round trip, its own durable transaction: its row.

        Once it was sent it runs to its end though its caller is cancelled; who still waits for a connection just leaves.
        Raises DatabaseUnavailable.
        """
        found = await self.many(statement, params)
        return found[0] if found else None

    async def many(self, statement: LiteralString, params: Params) -> list[Row]:
        """The same for a statement of several rows."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                conn = await self._hot.getconn()
                return await self._sent.to_its_end(self._many(conn, statement, params))
            except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected) as error:
                if attempt == _ATTEMPTS:
                    _raise(error)
            except psycopg.errors.ReadOnlySqlTransaction as error:
                await _pause_or_raise(error, attempt)
            except (
                psycopg.OperationalError,
                psycopg.InterfaceError,
                psycopg.InternalError,
                psycopg.errors.NumericValueOutOfRange,
            ) as error:
                _raise(error)
        raise AssertionError("unreachable")

    async def _many(self, conn: psycopg.AsyncConnection[Row], statement: LiteralString, params: Params) -> list[Row]:
        try:
            return await self._asker.all(conn.cursor(), statement, params)
        except psycopg.errors.ReadOnlySqlTransaction:
            await self._hot.drain()  # all of them lead to the server that was demoted; this one goes when it comes back
            raise
        finally:
            await self._hot.putconn(conn)

    def lane(self) -> "Lane":
        """A connection for statements that follow each other closely. Its user closes it."""
        return Lane(self._batches, self._asker)

    async def takes_writes(self) -> bool:
        """Whether the server may be written to; every connection to one that may not is dropped. Raises DatabaseUnavailable."""
        found = await self.transaction(
            lambda session: row(session, "SELECT current_setting('transaction_read_only')::bool AS is_read_only")
        )
        assert found is not None
        if found["is_read_only"]:
            await self._engine.dispose()
            await self._hot.drain()
            await self._batches.drain()
        return not found["is_read_only"]

    async def is_ready(self) -> bool:
        """Whether a statement gets through now; never raises."""
        try:
            async with asyncio.timeout(2):
                return await self.one("SELECT 1 AS ok", {}) is not None
        except (DatabaseUnavailable, TimeoutError):
            return False

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        """For SQLAlchemy, whose transactions psycopg begins, or else we.

        Nothing is prepared: a plan made while a table was empty would be kept while it grows, and a job that joins thousands of
        entries with their calls would read all calls for each of them.
        """
        conn = await psycopg.AsyncConnection.connect(
            self._url, connect_timeout=5, autocommit=True, **self._started_with(prepare_threshold=None)
        )
        try:
            await self._become_ours(conn)
            await conn.set_autocommit(self._is_pooled)
        except BaseException:
            await conn.close()
            raise
        return conn

    def _started_with(self, prepare_threshold: int | None) -> dict[str, Any]:
        """A pooler refuses options at the start, and its server processes do not know each other's prepared statements."""
        started = {"client_encoding": "UTF8"}  # what is sealed is so, whatever PGCLIENTENCODING says
        if self._is_pooled:
            return {**started, "prepare_threshold": None}
        return {**started, "prepare_threshold": prepare_threshold, "options": as_options(self._session)}

    async def _become_ours(self, conn: psycopg.AsyncConnection[Any]) -> None:
        if self._is_pooled:
            await conn.execute("SET TimeZone = 'UTC'")  # PgBouncer keeps this one; by it psycopg reads times
        else:
            await prove(conn, self._session)

    async def _configure(self, conn: psycopg.AsyncConnection[Row]) -> None:
        await self._become_ours(conn)
        # One parameter type whatever the number's size, so that a statement is prepared once and not four times.
        conn.adapters.register_dumper(int, Int8Dumper)


class Sent:
    """What was sent to the database, and is decided there whether or not its caller still waits.

    A cancelled statement would cost its pool the connection: 500 callers that hang up, 500 connections made anew. So
    each runs in a task of its own, and the server's time limits bound it.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; when the caller is cancelled meanwhile, only its waiting ends."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def wait(self, seconds: float) -> None:
        """Until nothing is running any more, or that long."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)


class Lane:
    """One connection, taken at the first statement and kept from one to the next: the pool's care for each would cost
    half as much as what the driver does for it. It goes back every few minutes, for the pool to renew. Its user is a task
    of ours that no caller cancels.
    """

    def __init__(self, pool: AsyncConnectionPool[psycopg.AsyncConnection[Row]], asker: "_Asker | None" = None) -> None:
        self._pool, self._asker = pool, asker or _Asker()
        self._cursor: psycopg.AsyncCursor[tuple[Any, ...]] | None = None
        self._until = 0.0

    async def all(self, statement: LiteralString, params: Params) -> list[tuple[Any, ...]]:
        """One prepared statement, one round trip, its own durable transaction; its rows.

        Any refusal of PostgreSQL is for the caller to read: psycopg.Error. Raises DatabaseUnavailable when the
        connection broke or could not be had.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if self._cursor is not None and time.monotonic() > self._until:
                    await self.close()
                if self._cursor is None:
                    self._cursor = (await self._pool.getconn()).cursor(row_factory=tuple_row)
                    self._until = time.monotonic() + _KEPT_SECONDS
                return await self._asker.all(self._cursor, statement, params)
            except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
                if attempt == _ATTEMPTS:
                    raise
            except psycopg.errors.ReadOnlySqlTransaction as error:
                await self._pool.drain()
                await self.close()
                await _pause_or_raise(error, attempt)
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                await self.close()
                _raise(error)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Give the connection back, whatever became of it; the next statement takes another."""
        if self._cursor is not None:
            cursor, self._cursor = self._cursor, None
            await self._pool.putconn(cast("psycopg.AsyncConnection[Row]", cursor.connection))


class _Asker:
    """Asks one statement in one round trip and one transaction of its own; behind a pooler that begins by becoming ours, sent
    along with it: where that is refused, the statement is not run."""

    def __init__(self, becoming: bytes | None = None) -> None:
        self._becoming = becoming

    async def all(self, cursor: psycopg.AsyncCursor[T], statement: LiteralString, params: Params) -> list[T]:
        if self._becoming is None:
            await cursor.execute(statement, params)
        else:
            async with cursor.connection.pipeline():
                await cursor.connection.execute(self._becoming)
                await cursor.execute(statement, params)
        return await cursor.fetchall()


async def _pause_or_raise(error: Exception, attempt: int) -> None:
    """Before another attempt; the last one's error is the caller's."""
    if attempt == _ATTEMPTS:
        _raise(error)
    await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311 - jitter, not a secret


def _drop_read_only(context: ExceptionContext) -> None:
    """For SQLAlchemy, which then renews its pool, and runs the transaction again."""
    if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
        context.is_disconnect = True


def _may_retry(error: Exception, committing: bool) -> bool:
    if not isinstance(error, DBAPIError):
        return False
    if getattr(error.orig, "sqlstate", None) in _TRY_AGAIN:
        return True
    return error.connection_invalidated and not committing


def _raise(error: Exception) -> NoReturn:
    """Our own faults become 503; a broken promise of ours (a bad statement) stays what it is.

    A sum beyond BIGINT comes of amounts that were asked for, and is refused like them.
    """
    original = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(original, "sqlstate", None)
    lost = isinstance(
        error, OperationalError | InterfaceError | PoolExhausted | psycopg.OperationalError | psycopg.InterfaceError
    )
    lost = lost or (state == _INTERNAL and _NODE_LOST.search(str(original)) is not None)
    if lost or state in _BUSY | _TRY_AGAIN or state == _READ_ONLY or (state or "").startswith(_BUSY_CLASSES):
        raise DatabaseUnavailable(retry_after_seconds=1) from error
    if state == _OUT_OF_RANGE:
        raise InvalidField("The amount would take the account past what the books can hold") from error
    raise error


_text: Final = functools.lru_cache(1024)(text)
"""SQLAlchemy looks for names in a text whenever it is given it: of a long one that takes as long as an answer."""


async def rows(session: AsyncSession, statement: str, **params: Any) -> list[Row]:
    """Run one SQL text and return its rows as dicts."""
    result = cast("CursorResult[Any]", await session.execute(_text(statement), params))
    if not result.returns_rows:
        return []
    names = tuple(result.keys())
    return [dict(zip(names, found, strict=True)) for found in result]  # half the time of `mappings`


async def row(session: AsyncSession, statement: str, **params: Any) -> Row | None:
    found = await rows(session, statement, **params)
    assert len(found) <= 1
    return found[0] if found else None


async def in_portions(db: Database, statement: str, at_once: int) -> int:
    """Run a statement that returns a row for each of `:at_once` rows at most, until it finds fewer, a transaction each time.

    Returns how many in all.
    """
    total, count = 0, at_once
    while count == at_once:
        count = len(await db.transaction(lambda session: rows(session, statement, at_once=at_once)))
        total += count
    return total
