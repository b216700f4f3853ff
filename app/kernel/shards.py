"""Questions to all accounts where those live on several servers: each server is asked by itself, and one that is down is passed by.

A statement over all shards would be refused as a whole while one server is down, and every job with it.
"""

import re
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, LiteralString

from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Params, Row, rows
from app.kernel.logs import log

ON_SHARDS_HERE: Final = "by_account.on_shards_here"
"""The function of a sharded database that asks a server about all accounts it has; app/sharding.py makes it."""
IN_SHARD: Final = "by_account.in_shard"
"""And the one that runs a statement over accounts of one shard where they are."""
_IS_SHARDED: Final[LiteralString] = f"SELECT to_regproc('{ON_SHARDS_HERE}') IS NOT NULL AS is_so"
_EVERYWHERE: Final[LiteralString] = """
SELECT w.nodename || ':' || w.nodeport AS node, w.success AS is_answered, q.*
FROM run_command_on_workers(%(command)s) w
LEFT JOIN LATERAL jsonb_to_recordset(CASE WHEN w.success THEN w.result::jsonb END) q ({columns}) ON true
"""
_SHARD_OF: Final[LiteralString] = (
    "SELECT get_shard_id_for_distribution_column('account', %(account_id)s::uuid) AS shard"
)
_KNOWN_AT_MOST: Final = 1_000_000
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
                found = await db.one(_IS_SHARDED, {})
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
    if not await is_sharded(db):
        return [list(found)]
    shards, by_shard = Shards(db), dict[int | uuid.UUID, list[Row]]()
    for each in found:
        by_shard.setdefault(await shards.of(each["account_id"]), []).append(each)
    return list(by_shard.values())


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
