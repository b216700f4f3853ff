"""Calls summed into usage_day, by a job that is always close behind them; and summed again from the beginning.

Whoever sums an account's calls holds its row of usage_summed, so of several processes one does it; the account itself is locked by
nobody, and no call waits. What is summed is what the account's next entries tell (summed.py), calls and refunds alike: nothing
comes late. Who reads adds the entries that are behind the mark, on the same snapshot, and is never wrong, however long the job
was away.
"""

import functools
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import IS_DROPPED
from app.activity.summed import FIGURES, KEY, SUMMED, SUMS, told_by
from app.kernel.db import Database, Row, row, rows
from app.kernel.pace import ON_ONE_CORE, Rest, without_rest
from app.kernel.progress import Told, nobody
from app.kernel.shards import apart, beside

_ENTRIES_AT_ONCE: Final = 5_000
_ACCOUNTS_AT_ONCE: Final = 500
_LISTED_AT_ONCE: Final = 10_000
_NOBODY: Final = uuid.UUID(int=0)


async def keep_up(db: Database, *, seconds: int = 30, worth_entries: int = 1, rest: Rest = without_rest) -> int:
    """Sum the calls of the accounts that called in the last `seconds`, of whose entries so many are not summed yet. Returns how
    many entries that were.

    An account's sums cost as much for one call as for many: who has few can wait for more, as whoever reads looks at those few.
    Whom this misses, after a stop, a refund or a transaction that took longer, `roll_up` finds.
    """
    return await _sum_due(db, _DUE_LATELY, rest, seconds=seconds, worth_entries=worth_entries)


async def roll_up(db: Database, rest: Rest = without_rest) -> int:
    """Sum the calls of every account that are not summed yet. Returns how many entries that were."""
    return await _sum_due(db, _DUE, rest)


async def rebuild(db: Database, told: Told = nobody) -> int:
    """Sum again, of every account, what usage_day tells. Returns how many sums changed; those of dropped months stay as they are."""
    found = await db.transaction(lambda session: rows(session, "SELECT account_id FROM usage_summed ORDER BY 1"))
    changed = 0
    for start in range(0, len(found), _ACCOUNTS_AT_ONCE):
        told(start, len(found))
        for some in await apart(db, found[start : start + _ACCOUNTS_AT_ONCE]):
            account_ids = [each["account_id"] for each in some]
            changed += await db.transaction(functools.partial(_again, db=db, account_ids=account_ids))
    told(len(found), len(found))
    return changed


async def sum_all(session: AsyncSession, db: Database) -> list[list[uuid.UUID]]:
    """The same as `roll_up` for who may not let go between: waits for others who sum, and holds every account's mark after it.

    Returns the accounts, those that are beside each other together.
    """
    due = await rows(session, "SELECT id AS account_id FROM account WHERE entry_count > 0")
    groups = [[each["account_id"] for each in some] for some in await apart(db, due)]
    for account_ids in groups:
        await _begin(session, db, account_ids)
        await beside(db, session, account_ids, _HOLD, account_ids=account_ids)
        await _sum(session, db, account_ids, None)
    return groups


async def _sum_due(db: Database, due: str, rest: Rest, **given: int) -> int:
    """Portion by portion: a portion is as many entries as a transaction is short with, or so many of one account at a time."""
    total, after = 0, _NOBODY
    while some := await db.transaction(functools.partial(_next, due=due, after=after, given=given)):
        for portion in [portion for each in await apart(db, some) for portion in _portions(each)]:
            account_ids = [each["account_id"] for each in portion]
            for _ in range(0, sum(each["entries"] for each in portion), _ENTRIES_AT_ONCE):
                began = time.monotonic()
                total += await db.transaction(functools.partial(_sum_some, db=db, account_ids=account_ids))
                await rest(time.monotonic() - began)
        if len(some) < _LISTED_AT_ONCE:
            break
        after = some[-1]["account_id"]
    return total


async def _next(session: AsyncSession, due: str, after: uuid.UUID, given: Mapping[str, int]) -> list[Row]:
    """The next accounts that have something to sum, by id. Who they are is asked once for many portions: it may be a look at every
    call of the last seconds."""
    await row(session, "SET LOCAL enable_seqscan = off")
    await row(session, ON_ONE_CORE)
    return await rows(session, due, after=after, at_once=_LISTED_AT_ONCE, **given)


def _portions(due: Sequence[Row]) -> Iterator[list[Row]]:
    """So many accounts that they have not too many entries together, or one alone."""
    some, entries = list[Row](), 0
    for each in due:
        if some and (entries + each["entries"] > _ENTRIES_AT_ONCE or len(some) == _ACCOUNTS_AT_ONCE):
            yield some
            some, entries = [], 0
        some.append(each)
        entries += each["entries"]
    if some:
        yield some


async def _sum_some(session: AsyncSession, db: Database, account_ids: Sequence[uuid.UUID]) -> int:
    """Of these accounts, but for those that somebody else is summing now. Returns how many entries were looked at."""
    await _begin(session, db, account_ids)
    held = await beside(db, session, account_ids, f"{_HOLD} SKIP LOCKED", account_ids=list(account_ids))
    return await _sum(session, db, [_id(each["account_id"]) for each in held], _ENTRIES_AT_ONCE)


async def _begin(session: AsyncSession, db: Database, account_ids: Sequence[uuid.UUID]) -> None:
    """A mark for each account that has none."""
    await row(session, "SET LOCAL statement_timeout = 0")
    await beside(
        db, session, account_ids,
        """INSERT INTO usage_summed (account_id) SELECT u.id FROM unnest(CAST(:account_ids AS uuid[])) u (id)
           WHERE NOT EXISTS (SELECT FROM usage_summed s WHERE s.account_id = u.id) ORDER BY 1 ON CONFLICT DO NOTHING
           RETURNING account_id""",
        account_ids=list(account_ids),
    )  # fmt: skip


async def _sum(session: AsyncSession, db: Database, account_ids: Sequence[uuid.UUID], at_once: int | None) -> int:
    """Take the next entries, `at_once` of each account at most, into the days that they tell of. The marks must be held."""
    if not account_ids:
        return 0
    await row(session, "SET LOCAL enable_memoize = off")  # each call is looked up once
    [found] = await beside(db, session, account_ids, _SUM, account_ids=list(account_ids), at_once=at_once)
    return int(found["entries"])


def _id(value: uuid.UUID | str) -> uuid.UUID:
    return value if isinstance(value, uuid.UUID) else uuid.UUID(value)


async def _again(session: AsyncSession, db: Database, account_ids: Sequence[uuid.UUID]) -> int:
    await row(session, "SET LOCAL statement_timeout = 0")
    held = await beside(db, session, account_ids, _HOLD, account_ids=list(account_ids))
    [found] = await beside(db, session, account_ids, _AGAIN, account_ids=[_id(each["account_id"]) for each in held])
    return int(found["changed"])


_HOLD: Final = (
    "SELECT account_id FROM usage_summed WHERE account_id = ANY (:account_ids) ORDER BY account_id FOR UPDATE"
)
# A call that is over closes its hold, and holds are known by when they were closed.
_DUE_LATELY: Final = """
    WITH called AS MATERIALIZED (SELECT DISTINCT account_id FROM hold WHERE closed_at > now() - make_interval(secs => :seconds))
    SELECT a.id AS account_id, a.entry_count - coalesce(s.entries, 0) AS entries
    FROM called c JOIN account a ON a.id = c.account_id LEFT JOIN usage_summed s ON s.account_id = a.id
    WHERE a.id > :after AND a.entry_count >= coalesce(s.entries, 0) + CAST(:worth_entries AS bigint) ORDER BY a.id LIMIT :at_once"""
_DUE: Final = """
    SELECT a.id AS account_id, a.entry_count - coalesce(s.entries, 0) AS entries
    FROM account a LEFT JOIN usage_summed s ON s.account_id = a.id
    WHERE a.id > :after AND a.entry_count > coalesce(s.entries, 0) ORDER BY a.id LIMIT :at_once"""


def _named(names: Sequence[str], table: str) -> str:
    return ", ".join(f"{table}.{name}" for name in names)


def _fresh(calls: str) -> str:
    """What calls add up to; the days of a dropped month stay as they are."""
    key = ", ".join(KEY)
    return f"SELECT * FROM (SELECT {key}, {SUMS} FROM ({calls}) calls GROUP BY {key}) f WHERE NOT {IS_DROPPED.format(day='f.day')}"


_COLUMNS: Final = ", ".join((*KEY, *FIGURES))
_SAME: Final = f"({_named(KEY, 'd')}) = ({_named(KEY, 'f')})"
_MORE: Final = ", ".join(
    f"least(d.{name}::numeric + f.{name}, {2**63 - 1})::bigint" if name.endswith("_tokens") else f"d.{name} + f.{name}"
    for name in FIGURES
)
_NEXT: Final = """
    SELECT a.id AS account_id, s.entries AS after, least(a.entry_count, s.entries + CAST(:at_once AS bigint)) AS until
    FROM account a JOIN usage_summed s ON s.account_id = a.id WHERE a.id = ANY (:account_ids)"""
_SUM: Final = f"""
WITH next AS MATERIALIZED ({_NEXT}),
fresh AS MATERIALIZED ({_fresh(told_by("SELECT * FROM next", few=True))}),
grown AS (
    UPDATE usage_day d SET ({", ".join(FIGURES)}) = ROW ({_MORE}) FROM fresh f WHERE {_SAME}
),
begun AS (
    INSERT INTO usage_day ({_COLUMNS}) SELECT {_COLUMNS} FROM fresh f
    WHERE NOT EXISTS (SELECT FROM usage_day d WHERE {_SAME})
),
marked AS (
    UPDATE usage_summed s SET entries = n.until FROM next n WHERE s.account_id = n.account_id
)
SELECT coalesce(sum(until - after), 0)::bigint AS entries FROM next
"""

_AGAIN: Final = f"""
WITH fresh AS MATERIALIZED ({_fresh(told_by(f"{SUMMED} WHERE account_id = ANY (:account_ids)"))}),
gone AS (
    DELETE FROM usage_day d WHERE d.account_id = ANY (:account_ids) AND NOT {IS_DROPPED.format(day="d.day")}
      AND NOT EXISTS (SELECT FROM fresh f WHERE {_SAME})
    RETURNING 1
),
summed AS (
    INSERT INTO usage_day AS d ({_COLUMNS}) SELECT {_COLUMNS} FROM fresh
    ON CONFLICT ({", ".join(KEY)}) DO UPDATE SET ({", ".join(FIGURES)}) = ROW ({_named(FIGURES, "excluded")})
    WHERE ({_named(FIGURES, "d")}) IS DISTINCT FROM ({_named(FIGURES, "excluded")})
    RETURNING 1
)
SELECT (SELECT count(*) FROM gone) + (SELECT count(*) FROM summed) AS changed
"""
