"""Entries of long ago put away: exported as gzipped CSV, then deleted, with closings kept by which the audit still adds up.

Only entries of usage are many, and only they go: those of calls that were dropped, were never refunded and have no hold any more. What is
left of each account's are its closings and its seals. These verbs are for the database's owner: the service's role may delete no entry.
"""

import functools
import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.archive import RowsFile
from app.activity.calendar import DAY, Span, is_call_id, midnight
from app.audit import chain
from app.audit.chain import AT_ONCE, ENTRIES, LINK_BYTES, NO_LINK
from app.audit.closing import Closing, Runs
from app.kernel.db import Database, Row, row, rows
from app.kernel.errors import InvalidField, NotFound
from app.kernel.progress import Told, nobody
from app.kernel.security import Pepper
from app.kernel.shards import apart, beside, in_order
from app.ledger.tables import EntryClosing
from app.metering.ticket import SETTLED_WITHIN

LEAST_AGE: Final = SETTLED_WITHIN + 35 * DAY
"""What guards a call from being charged twice: no ticket that could be settled again is as old as an entry that goes, give or take 35
days of clocks; and a hold of it would keep its entry here."""
_ROWS_AT_ONCE: Final = 5_000


@dataclass(frozen=True, slots=True)
class PutAway:
    """How many entries, their sum, and the exported file's SHA-256."""

    entries: int
    amount_nusd: int
    sha256: str


async def export(db: Database, span: Span, path: Path, told: Told = nobody, reads: Database | None = None) -> PutAway:
    """Write the entries of a dropped month's or day's calls to `path`, which must not be there yet, and remember what they were.

    Raises InvalidField for one whose calls were not dropped, or whose entries went before; NotFound where there are none.
    """
    await db.transaction(lambda session: _archive(session, span))
    total, runs, read = _Total(), Runs(span.first), reads or db
    with RowsFile(path, "amount_nusd") as file:
        async for some in in_order(read, read.transaction, functools.partial(_some, span=span), _ROWS_AT_ONCE):
            file.write([_as_told(each) for each in some])
            total.take(runs.take(some))
            told(file.count, None)
        total.take(runs.end())
        if not file.count:
            raise NotFound(f"There are no entries of {span} to put away")
        done = PutAway(file.count, file.amount_nusd, file.finish())
        await db.transaction(lambda session: _remember(session, span, done, total.digest()))
        file.keep()
    return done


async def drop(db: Database, pepper: Pepper, span: Span, now: datetime, told: Told = nobody) -> PutAway:
    """Delete the entries that were exported, in one transaction with the closings that stand for them.

    Each is first compared with its seal, and all together with what was exported. Raises InvalidField where one differs, is not
    sealed yet, or the span ended less than LEAST_AGE ago; nothing has changed then.
    """
    if now - midnight(span.end) < LEAST_AGE:
        raise InvalidField(
            f"{span} ended less than {LEAST_AGE.days} days ago: its calls might be settled again", param="month"
        )
    return await db.transaction(lambda session: _drop(session, db, pepper, span, told))


# --- which entries ----------------------------------------------------------------------------------


_HOLD_ID: Final = f"CASE WHEN {is_call_id('e.reference')} THEN e.reference::uuid END"
_SOME: Final = f"""
    SELECT e.account_id, e.id, e.kind, e.reference, e.contra, e.amount_nusd, e.balance_after_nusd, e.usage_id, e.created_at,
           {chain.ENTRY_DIGEST} AS content, {chain.ENTRY_TEXT_DIGEST} AS text
    FROM entry e
    WHERE (e.account_id, e.id) > (:account_id, :entry_id) AND e.kind = 'usage' AND e.usage_id >= :first_id AND e.usage_id < :end_id
      AND NOT EXISTS (SELECT 1 FROM usage u WHERE u.account_id = e.account_id AND u.id = e.usage_id)
      AND NOT EXISTS (SELECT 1 FROM hold h WHERE h.account_id = e.account_id AND h.id = {_HOLD_ID})
      AND NOT EXISTS (SELECT 1 FROM entry r WHERE r.account_id = e.account_id AND r.kind = 'refund' AND r.reference = e.usage_id::text)"""
"""A call that came when its month was dropped is still there, and so keeps its entry; a refund needs its charge beside it."""


async def _some(
    session: AsyncSession, account_ids: Sequence[uuid.UUID] | None, after: Row | None, at_once: int, *, span: Span
) -> Sequence[Row]:
    await row(session, "SET LOCAL citus.propagate_set_commands = 'local'")  # what is said here goes for each server
    await row(session, "SET LOCAL statement_timeout = 0")
    # In the order of the key and from one place to the next; whatever the statistics say, no portion sorts the whole table.
    for plan in ("seqscan", "sort", "hashjoin", "mergejoin"):
        await row(session, f"SET LOCAL enable_{plan} = off")
    return await rows(
        session,
        f"""{_SOME} {"AND e.account_id = ANY (CAST(:account_ids AS uuid[]))" if account_ids else ""}
            ORDER BY e.account_id, e.id LIMIT :limit""",
        account_id=after["account_id"] if after else uuid.UUID(int=0), entry_id=after["id"] if after else 0, limit=at_once, **span.ids,
        **({"account_ids": account_ids} if account_ids else {}),
    )  # fmt: skip


def _as_told(entry: Row) -> Row:
    """An entry as the database has it."""
    return {name: value for name, value in entry.items() if name not in ("content", "text")}


@dataclass(slots=True)
class _Total:
    """What all closings together say."""

    entries: int = 0
    amount_nusd: int = 0
    _said: Any = field(default_factory=hashlib.sha256)

    def take(self, closings: Any) -> list[Closing]:
        found = list(closings)
        for each in found:
            self.entries += each.entries
            self.amount_nusd += each.amount_nusd
            self._said.update(each.said())
        return found

    def digest(self) -> bytes:
        return bytes(self._said.digest())


# --- exporting --------------------------------------------------------------------------------------


async def _archive(session: AsyncSession, span: Span) -> Row:
    """The dropped calls of a span, whose entries are still here."""
    found = await row(
        session,
        "SELECT * FROM usage_archive WHERE month = :month AND is_day = :is_day AND dropped_at IS NOT NULL FOR UPDATE",
        month=span.first, is_day=span.is_day,
    )  # fmt: skip
    if found is None:
        raise InvalidField(
            f"the calls of {span} were not dropped: `usage export` and `usage drop` first", param="month"
        )
    if found["entries_dropped_at"] is not None:
        raise InvalidField(f"the entries of {span} were dropped before", param="month")
    return found


async def _remember(session: AsyncSession, span: Span, done: PutAway, digest: bytes) -> None:
    await _archive(session, span)
    await row(
        session,
        """UPDATE usage_archive SET entries = :entries, entries_sha256 = :sha256, entries_digest = :digest, entries_exported_at = now()
           WHERE month = :month""",
        entries=done.entries, sha256=done.sha256, digest=digest, month=span.first,
    )  # fmt: skip


# --- dropping ---------------------------------------------------------------------------------------


async def _drop(session: AsyncSession, db: Database, pepper: Pepper, span: Span, told: Told) -> PutAway:
    archive = await _archive(session, span)
    if archive["entries_exported_at"] is None:
        raise InvalidField(f"the entries of {span} were not exported: `entries export` first", param="month")
    total, runs = _Total(), Runs(span.first)
    async for some in in_order(db, lambda work: work(session), functools.partial(_some, span=span), _ROWS_AT_ONCE):
        for of_shard in await apart(db, some):
            await _compare(session, db, pepper, of_shard)
        await _close(session, db, pepper, total.take(runs.take(some)))
        told(total.entries, archive["entries"])
    await _close(session, db, pepper, total.take(runs.end()))
    if (total.entries, total.digest()) != (archive["entries"], bytes(archive["entries_digest"])):
        raise InvalidField(f"the entries of {span} are not those that were exported: export again", param="month")
    await row(session, "UPDATE usage_archive SET entries_dropped_at = now() WHERE month = :month", month=span.first)
    return PutAway(total.entries, total.amount_nusd, archive["entries_sha256"])


async def _compare(session: AsyncSession, db: Database, pepper: Pepper, entries: Sequence[Row]) -> None:
    """Each entry with its own seal."""
    places = await _places(session, db, pepper, entries)
    for each in entries:
        name = each["account_id"], each["id"]
        place = places.get(name)
        if place is None:
            raise InvalidField(f"entry {name[0]}/{name[1]} is not sealed yet: let the jobs run", param="month")
        if not place.is_of(pepper, each):
            raise InvalidField(f"entry {name[0]}/{name[1]} is not as it was sealed: `audit` first", param="month")


@dataclass(frozen=True, slots=True)
class _Place:
    """What was sealed at an entry's place: its digest, None where the seal is not ours; or, link by link, its link, the one
    before it, and what is kept beside it."""

    digest: bytes | None
    link: bytes = b""
    before: bytes = NO_LINK
    kept: bytes = b""

    def is_of(self, pepper: Pepper, entry: Row) -> bool:
        if not self.link:
            return self.digest == bytes(entry["content"])
        said = bytes(entry["text"]) + self.kept
        return chain.link(pepper, self.before, entry["account_id"], ENTRIES, entry["id"], said) == self.link


async def _places(
    session: AsyncSession, db: Database, pepper: Pepper, entries: Sequence[Row]
) -> dict[tuple[uuid.UUID, int], _Place]:
    """The places of these entries, and others that are sealed with them."""
    first: dict[uuid.UUID, int] = {}
    last: dict[uuid.UUID, int] = {}
    for each in entries:
        first.setdefault(each["account_id"], each["id"])
        last[each["account_id"]] = each["id"]
    accounts = list(first)
    found = await beside(
        db, session, accounts,
        f"""SELECT s.account_id::text AS account_id, s.number, s.count, s.form, encode(s.links, 'hex') AS links, encode(s.kept, 'hex') AS kept,
                   (SELECT encode(substr(b.links, length(b.links) - {LINK_BYTES - 1}), 'hex') FROM seal b
                    WHERE b.account_id = s.account_id AND b.chain = s.chain AND b.number < s.number ORDER BY b.number DESC LIMIT 1) AS before
            FROM unnest(CAST(:accounts AS uuid[]), CAST(:first AS bigint[]), CAST(:last AS bigint[])) r (account_id, first, last)
            JOIN seal s ON s.account_id = r.account_id AND s.chain = '{ENTRIES}' AND s.number <= r.last AND s.number + s.count > r.first""",
        accounts=accounts, first=list(first.values()), last=[last[each] for each in accounts],
    )  # fmt: skip
    places = {}
    for seal in found:
        account_id, number = uuid.UUID(seal["account_id"]), seal["number"]
        links, kept = bytes.fromhex(seal["links"]), bytes.fromhex(seal["kept"])
        before = bytes.fromhex(seal["before"]) if seal["before"] else NO_LINK
        is_at_once = seal["form"] == AT_ONCE
        made = chain.link_at_once(pepper, before, account_id, number, links[:-LINK_BYTES], kept) if is_at_once else b""
        is_ours = made == links[-LINK_BYTES:]
        begin, end = max(number, first[account_id]), min(number + seal["count"] - 1, last[account_id])
        for entry_id in range(begin, end + 1):
            cut = slice((entry_id - number) * LINK_BYTES, (entry_id - number + 1) * LINK_BYTES)
            if is_at_once:
                places[account_id, entry_id] = _Place(links[cut] if is_ours else None)
            else:
                earlier = links[cut.start - LINK_BYTES : cut.start] if entry_id > number else before
                places[account_id, entry_id] = _Place(None, links[cut], earlier, kept[cut])
    return places


async def _close(session: AsyncSession, db: Database, pepper: Pepper, closings: Sequence[Closing]) -> None:
    """Put closings in the place of their entries."""
    if not closings:
        return
    await session.execute(insert(EntryClosing), [each.as_row(pepper) for each in closings])
    for some in await apart(db, [{"account_id": each.account_id, "closing": each} for each in closings]):
        ended = [each["closing"] for each in some]
        await beside(
            db, session, [each.account_id for each in ended],
            """WITH gone AS (
                   DELETE FROM entry e
                   USING unnest(CAST(:accounts AS uuid[]), CAST(:first AS bigint[]), CAST(:last AS bigint[])) r (account_id, first, last)
                   WHERE e.account_id = r.account_id AND e.id BETWEEN r.first AND r.last RETURNING 1
               ) SELECT count(*) AS gone FROM gone""",
            accounts=[each.account_id for each in ended], first=[each.first_id for each in ended],
            last=[each.last_id for each in ended],
        )  # fmt: skip
