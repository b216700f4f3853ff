"""Questions to all accounts where those live on several servers: each server is asked by itself, and one that is down is passed by.

A statement over all shards would be refused as a whole while one server is down, and every job with it.
"""

import re
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, LiteralString

from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import IS_SHARDED, Database, Params, Row, rows
from app.kernel.logs import log

ON_SHARDS_HERE: Final = "by_account.on_shards_here"
"""The function of a sharded database that asks a server about all accounts it has; app/sharding.py makes it."""
IN_SHARD: Final = "by_account.in_shard"
"""And the one that runs a statement over accounts of one shard where they are."""
_EVERYWHERE: Final[LiteralString] = """
SELECT w.nodename || ':' || w.nodeport AS node, w.success AS is_answered, q.*
FROM run_command_on_workers(%(command)s) w
LEFT JOIN LATERAL jsonb_to_recordset(CASE WHEN w.success THEN w.result::jsonb END) q ({columns}) ON true
"""
_SHARD_OF: Final[LiteralString] = (
    "SELECT get_shard_id_for_distribution_column('account', %(account_id)s::uuid) AS shard"
)
_SHARDS_OF: Final[LiteralString] = """
SELECT u.id, get_shard_id_for_distribution_column('account', u.id) AS shard FROM unnest(%(account_ids)s::uuid[]) u (id)
"""
_KNOWN_AT_MOST: Final = 1_000_000
_NEXT_ACCOUNTS: Final = "SELECT id FROM account WHERE id > :after ORDER BY id LIMIT :at_once"
_ACCOUNTS_AT_ONCE: Final = 500
_ROWS_OF_SHARD_AT_ONCE: Final = 250
"""Of each of its shards so many wait in memory until it is their account's turn."""
_UNREACHABLE: Final[LiteralString] = """
SELECT nodename || ':' || nodeport AS node FROM pg_dist_node
WHERE noderole = 'primary' AND isactive AND shouldhaveshards AND NOT coalesce(citus_check_connection_to_node(nodename, nodeport), false)
ORDER BY 1
"""


async def is_sharded(db: Database) -> bool:
    """Whether accounts live on several servers. Asked of the database once."""
    if db.is_sharded is None:
        async with db.finding_out:
            if db.is_sharded is None:
                found = await db.one(IS_SHARDED, {})
                assert found is not None
                db.is_sharded = bool(found["is_so"])
    return db.is_sharded


class Shards:
    """Which accounts are beside each other. A hint: the database refuses a question that takes some together wrongly."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._known: OrderedDict[uuid.UUID, int] = OrderedDict()

    async def of(self, account_id: uuid.UUID) -> int | uuid.UUID:
        """The number of an account's shard; where nothing is sharded, the account itself. Raises DatabaseUnavailable."""
        known = self._known.get(account_id)
        if known is not None:
            return known
        if not await is_sharded(self._db):
            return account_id
        found = await self._db.one(_SHARD_OF, {"account_id": account_id})
        assert found is not None
        self._known[account_id] = found["shard"]
        if len(self._known) > _KNOWN_AT_MOST:
            self._known.popitem(last=False)
        return int(found["shard"])


async def everywhere(
    db: Database, columns: Mapping[str, LiteralString], statement: LiteralString, params: Params
) -> list[Row]:
    """The rows of a SELECT over tables of accounts, with these columns and types; where it has a LIMIT, that many of each shard.

    A server that is down is passed by: what it has comes when it is back. Raises DatabaseUnavailable.
    """
    if not await is_sharded(db):
        return await db.many(statement, params)
    asked = statement % {name: _literal(value) for name, value in params.items()}
    declared = ", ".join(f"{name} {kind}" for name, kind in columns.items())
    found = await db.many(
        _EVERYWHERE.format(columns=declared), {"command": f"SELECT {ON_SHARDS_HERE}({_literal(asked)})"}
    )
    for node in sorted({each["node"] for each in found if not each["is_answered"]}):
        log.warning("shards.passed_by", node=node)
    first = next(iter(columns))
    return [{name: each[name] for name in columns} for each in found if each[first] is not None]


async def relation_size(db: Database) -> str:
    """The SQL function that says how many bytes a table has with its indexes, wherever they are."""
    return "citus_total_relation_size" if await is_sharded(db) else "pg_total_relation_size"


async def apart(db: Database, found: Iterable[Row]) -> list[list[Row]]:
    """Rows with an `account_id`, those whose accounts are in one shard together; all of them, where nothing is sharded."""
    found = list(found)
    if not await is_sharded(db):
        return [found]
    asked = await db.many(_SHARDS_OF, {"account_ids": list({each["account_id"] for each in found})})
    shards, by_shard = {each["id"]: each["shard"] for each in asked}, dict[int, list[Row]]()
    for each in found:
        by_shard.setdefault(shards[each["account_id"]], []).append(each)
    return list(by_shard.values())


InTransaction = Callable[[Callable[[AsyncSession], Awaitable[Any]]], Awaitable[Any]]
"""Runs work in a transaction: Database.transaction, or one that is open."""
Some = Callable[[AsyncSession, Sequence[uuid.UUID] | None, Row | None, int], Awaitable[Sequence[Row]]]
"""The next rows of these accounts, or of all, by account_id and then by whatever it pages by; after a row, and so many at most."""


async def in_order(
    db: Database, in_transaction: InTransaction, some: Some, at_once: int
) -> AsyncIterator[Sequence[Row]]:
    """All rows of all accounts, portion by portion, in the same order wherever they live.

    Where they are sharded each shard is asked for its own: asked of all at once, each would send as many as the portion has, and
    nearly all of them again with the next one.
    """
    if not await is_sharded(db):
        after: Row | None = None
        while found := await in_transaction(lambda session: some(session, None, after, at_once)):  # noqa: B023 - the same
            yield found
            after = found[-1]
            if len(found) < at_once:
                break
        return
    portion: list[Row] = []
    async for account_ids in _all_accounts(in_transaction):
        groups = await apart(db, [{"account_id": each} for each in account_ids])
        shards = [_Shard(in_transaction, some, [each["account_id"] for each in group]) for group in groups]
        by_account = {account_id: shard for shard in shards for account_id in shard.account_ids}
        for account_id in account_ids:
            while (each := await by_account[account_id].next_of(account_id)) is not None:
                portion.append(each)
                if len(portion) == at_once:
                    yield portion
                    portion = []
    if portion:
        yield portion


async def _all_accounts(in_transaction: InTransaction) -> AsyncIterator[list[uuid.UUID]]:
    after = uuid.UUID(int=0)
    while found := await in_transaction(
        lambda session: rows(session, _NEXT_ACCOUNTS, after=after, at_once=_ACCOUNTS_AT_ONCE)  # noqa: B023 - called at once
    ):
        yield [each["id"] for each in found]
        after = found[-1]["id"]


class _Shard:
    """Rows of some accounts of one shard, asked for when the last are used up."""

    def __init__(self, in_transaction: InTransaction, some: Some, account_ids: Sequence[uuid.UUID]) -> None:
        self.account_ids = account_ids
        self._in_transaction, self._some = in_transaction, some
        self._rows: deque[Row] = deque()
        self._last: Row | None = None
        self._is_over = False

    async def next_of(self, account_id: uuid.UUID) -> Row | None:
        """The next row, if it is this account's."""
        if not self._rows and not self._is_over:
            found = await self._in_transaction(
                lambda session: self._some(session, self.account_ids, self._last, _ROWS_OF_SHARD_AT_ONCE)
            )
            self._rows.extend(found)
            self._is_over = len(found) < _ROWS_OF_SHARD_AT_ONCE
            self._last = found[-1] if found else None
        if self._rows and self._rows[0]["account_id"] == account_id:
            return self._rows.popleft()
        return None


async def beside(
    db: Database, session: AsyncSession, account_ids: Sequence[uuid.UUID], statement: str, /, **params: Any
) -> list[Row]:
    """The rows of a statement over accounts of one shard, in whatever form: it is run where they are, over plain tables. There they
    come as JSON has them."""
    if not await is_sharded(db):
        return await rows(session, statement, **params)
    asked = _NAMED.sub(lambda found: _literal(params[found[1]]) if found[1] in params else found[0], statement)
    found = await rows(session, _BESIDE, account=account_ids[0], accounts=list(account_ids), asked=asked)
    return [dict(each["found"]) for each in found]


_NAMED: Final = re.compile(r"(?<![:\w]):(\w+)")
_BESIDE: Final = (
    f"SELECT found FROM {IN_SHARD}(CAST(:account AS uuid), CAST(:accounts AS uuid[]), CAST(:asked AS text)) found"
)


async def unreachable(db: Database) -> list[str]:
    """The servers with accounts, as host:port, that cannot be reached now. Raises DatabaseUnavailable."""
    return [each["node"] for each in await db.many(_UNREACHABLE, {})] if await is_sharded(db) else []


def _literal(value: Any) -> str:
    return sql.Literal(value).as_string(None)
