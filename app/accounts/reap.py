"""The reaper: closes accounts that were opened long ago and that nothing was ever done with, as anybody can open many."""

import uuid
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import end_account
from app.kernel.db import Database, Row, row, rows
from app.keys.issue import Keyring

_NO_USE: Final = ("api_key", "credential", "seal", "audit_finding")
"""Tables that tell of every account, used or not. A row in any other one that names an account keeps it, so that whatever
comes to be remembered of accounts keeps them too."""
_UNTOUCHED: Final = """
    a.status = 'active' AND a.created_at < now() - make_interval(days => :days) AND a.posted_nusd = 0 AND a.held_nusd = 0
    AND a.floor_nusd = 0 AND a.entry_count = 0
    AND 1 >= (SELECT count(*) FROM api_key k WHERE k.account_id = a.id)
    AND NOT EXISTS (SELECT FROM api_key k WHERE k.account_id = a.id
                    AND (k.lifetime_nusd <> 0 OR k.held_nusd <> 0 OR k.deleted_at IS NOT NULL OR k.updated_at <> k.created_at
                         OR starts_with(k.preview, 'jwt-')))"""
"""With the one key it was opened with, as it was then. That of a JWT's subject is kept: nobody can open another for them."""


async def reap_empty(db: Database, keyring: Keyring, days: int, at_once: int = 1000) -> int:
    """Close every account that is older than `days` and has no entry, top-up, hold, call, wallet, second or touched key.

    `at_once` accounts are looked at in a transaction each. Rows of accounts are never deleted: a closed one has no
    credential that works. Returns how many were closed; 0 `days` is never.
    """
    if days == 0:
        return 0
    uses = await db.transaction(_tables_of_uses)
    total, after = 0, uuid.UUID(int=0)
    while True:
        closed, last = await db.transaction(
            partial(_reap_some, keyring=keyring, uses=uses, days=days, after=after, at_once=at_once)
        )
        total += closed
        if last is None:
            return total
        after = last


async def _tables_of_uses(session: AsyncSession) -> list[Row]:
    """`is_by_account`: its rows are where their account is; those of the others, which are look-ups, may be on another server."""
    return await rows(
        session,
        """SELECT c.relname AS name, EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary
                                             AND i.indkey[0] = a.attnum) AS is_by_account
           FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'account_id'
           WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
             AND c.relname <> ALL(:known)""",
        known=list(_NO_USE),
    )


async def _reap_some(
    session: AsyncSession, *, keyring: Keyring, uses: list[Row], days: int, after: uuid.UUID, at_once: int
) -> tuple[int, uuid.UUID | None]:
    """Of the next accounts behind `after` close those that are empty; returns the last one looked at, None at the end."""
    walked = await rows(
        session, "SELECT id FROM account WHERE id > :after ORDER BY id LIMIT :at_once", after=after, at_once=at_once
    )
    found = await _empty(session, uses, [each["id"] for each in walked], days)
    # Nobody spends from it or tops it up while we hold its row; who did a moment ago shows on the snapshot after the lock.
    lock = "SELECT id FROM account WHERE id = :id FOR UPDATE SKIP LOCKED"
    still = await _empty(session, uses, [each for each in found if await row(session, lock, id=each)], days)
    for account_id in still:
        await end_account(session, keyring, account_id)
    return len(still), walked[-1]["id"] if len(walked) == at_once else None


async def _empty(session: AsyncSession, uses: list[Row], ids: list[uuid.UUID], days: int) -> list[uuid.UUID]:
    """Those of these accounts that nothing was ever done with."""
    own = [each["name"] for each in uses if each["is_by_account"]]
    unused = " ".join(f"AND NOT EXISTS (SELECT FROM {name} x WHERE x.account_id = a.id)" for name in own)
    found = await rows(
        session, f"SELECT a.id FROM account a WHERE a.id = ANY(:ids) AND {_UNTOUCHED} {unused}", ids=ids, days=days
    )
    looked_up = set[uuid.UUID]()
    for each in uses if found else ():
        if not each["is_by_account"]:
            named = await rows(session, f"SELECT account_id FROM {each['name']} WHERE account_id = ANY(:ids)", ids=ids)
            looked_up |= {one["account_id"] for one in named}
    return [each["id"] for each in found if each["id"] not in looked_up]
