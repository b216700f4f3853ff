"""Sealing what was written, by a job off the hot path: it reads what is new, takes no lock, and adds rows that none of it waits for.

A transaction of seals is a run: all of it is there or nothing, and its MAC chains it to the run before. So whoever dies
leaves no half of one, and two who seal at the same time meet on a key, where the later one gives way.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import chain
from app.audit.chain import ENTRIES, HOUSE, KINDS, NO_LINK, PRICES, Kind, Sealed
from app.audit.tables import Seal, SealRun
from app.kernel.db import Database, Row, row, rows
from app.kernel.lease import leads
from app.kernel.logs import log
from app.kernel.security import Pepper, equal
from app.keys.proof import PROVEN, key_proof

_ENTRIES_AT_ONCE: Final = 10_000
_ROWS_AT_ONCE: Final = 2_000
_LEASE_SECONDS: Final = 120
_WHOLE_EVERY_SECONDS: Final = 600.0
LAG: Final = "interval '90 seconds'"
"""So long may a transaction of ours take from its beginning, whose time its rows bear, until others see them."""
_BEAT: Final = "interval '1 minute'"
"""A run at least as often, be there something to seal or not: it says that nothing was left out."""
_NEVER: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Head:
    """The newest run: whoever notes it outside the database can tell later that nothing before it is gone."""

    run_id: int
    mac: bytes
    made_at: datetime
    until: datetime

    def __str__(self) -> str:
        return f"{self.run_id}:{self.mac.hex()}"


class Notary:
    """Seals every few seconds, in one process of all. Every ten minutes it looks at everything and not at what is new alone:
    a transaction may have taken longer than any should, and a clock may have gone back."""

    def __init__(self, db: Database, pepper: Pepper) -> None:
        self._db, self._pepper = db, pepper
        self._whole_at = 0.0
        self.head: Head | None = None

    async def seal(self) -> int:
        """Seal what is new. Returns how many seals were made; 0 where another process leads."""
        if not await leads(self._db, "seals", _LEASE_SECONDS):
            return 0
        await self._compare()
        is_whole = time.monotonic() >= self._whole_at
        try:
            made = await seal(self._db, self._pepper, whole=is_whole)
        except IntegrityError:  # somebody who led before us is still at it
            log.warning("seals.two_at_once")
            return 0
        if is_whole:
            self._whole_at = time.monotonic() + _WHOLE_EVERY_SECONDS
        self.head = await self._db.transaction(head_of)
        if made and self.head is not None:
            log.info("seals.made", count=made, head=str(self.head))
        return made

    async def _compare(self) -> None:
        """The log is outside the database: it tells if the seals are not those that we left there."""
        if self.head is not None and not await self._db.transaction(lambda session: has_run(session, self.head)):
            log.error("seals.rolled_back", head=str(self.head))
            self.head = None


async def seal(db: Database, pepper: Pepper, *, whole: bool = False) -> int:
    """Seal what was written since the last time, or whatever has no seal (`whole`). Returns how many seals were made.

    Raises IntegrityError if somebody else sealed at the same time; what we had sealed until then stands.
    """
    begun = await db.transaction(_begin)
    since = None if whole or begun["since"] is None else begun["since"]
    made = 0
    for source in (_Entries(pepper, since), _Prices(pepper), *(_Rows(pepper, kind, since) for kind in KINDS)):
        while not source.is_done:
            made += await db.transaction(lambda session, source=source: _run(session, pepper, source))  # type: ignore[misc]
    await db.transaction(lambda session: _promise(session, pepper, begun["until"], made))
    return made


async def _begin(session: AsyncSession) -> Row:
    found = await row(
        session,
        f"SELECT now() - {LAG} AS until, (SELECT until FROM seal_run ORDER BY id DESC LIMIT 1) AS since",
    )
    assert found is not None
    return found


async def _run(session: AsyncSession, pepper: Pepper, source: "_Source") -> int:
    """Some seals of one source, with the promise as it was."""
    await row(session, "SET LOCAL statement_timeout = 0")
    # Whatever the statistics say, what is new is a small part, and is found by its index.
    for plan in ("seqscan", "hashjoin", "mergejoin"):
        await row(session, f"SET LOCAL enable_{plan} = off")
    seals = await source.some(session)
    if seals:
        before = await head_of(session)
        await _record(session, pepper, before, seals, None if before is None else before.until)
    return len(seals)


async def _promise(session: AsyncSession, pepper: Pepper, until: datetime, made: int) -> None:
    """Say up to when nothing is left out: when something was sealed, and else now and then."""
    before = await head_of(session)
    if before is not None and not made:
        found = await row(session, f"SELECT now() - {_BEAT} < :made_at AS is_early", made_at=before.made_at)
        assert found is not None
        if found["is_early"]:
            return
    await _record(session, pepper, before, [], until)


async def _record(
    session: AsyncSession, pepper: Pepper, before: Head | None, seals: Sequence[Sealed], until: datetime | None
) -> None:
    now = await row(session, "SELECT now() AS now")
    assert now is not None
    run_id, made_at = 1 if before is None else before.run_id + 1, now["now"]
    digest, until = chain.digest_of_run(seals), until or _NEVER
    mac = chain.run_mac(pepper, NO_LINK if before is None else before.mac, run_id, made_at, until, len(seals), digest)
    await session.execute(
        insert(SealRun),
        [{"id": run_id, "made_at": made_at, "until": until, "seals": len(seals), "digest": digest, "mac": mac}],
    )
    if seals:
        await session.execute(insert(Seal), [_as_row(each, run_id) for each in seals])


def _as_row(each: Sealed, run_id: int) -> dict[str, object]:
    return {
        "account_id": each.account_id, "chain": each.chain, "number": each.number, "count": each.count, "links": each.links,
        "kept": each.kept, "run_id": run_id,
    }  # fmt: skip


async def head_of(session: AsyncSession) -> Head | None:
    """The newest run, None where nothing was sealed yet."""
    found = await row(session, "SELECT id, mac, made_at, until FROM seal_run ORDER BY id DESC LIMIT 1")
    return None if found is None else Head(found["id"], bytes(found["mac"]), found["made_at"], found["until"])


async def has_run(session: AsyncSession, head: Head | None) -> bool:
    """Whether this run still stands as it was."""
    assert head is not None
    found = await row(session, "SELECT mac FROM seal_run WHERE id = :id", id=head.run_id)
    return found is not None and equal(bytes(found["mac"]), head.mac)


# --- what there is to seal --------------------------------------------------------------------------


class _Source(ABC):
    """Something that is sealed portion by portion. `some` returns the seals of the next portion, and sets `is_done` at the last."""

    is_done = False

    @abstractmethod
    async def some(self, session: AsyncSession) -> list[Sealed]: ...


@dataclass(frozen=True, slots=True)
class _Range:
    account_id: uuid.UUID
    first: int
    last: int
    before: bytes


class _Entries(_Source):
    """Entries with their calls, account by account."""

    def __init__(self, pepper: Pepper, since: datetime | None) -> None:
        self._pepper, self._since, self._after = pepper, since, uuid.UUID(int=0)

    async def some(self, session: AsyncSession) -> list[Sealed]:
        due = await rows(
            session, _DUE_ENTRIES.format(fresh=_FRESH if self._since else _ALL),
            after=self._after, at_once=_ENTRIES_AT_ONCE, **({"since": self._since} if self._since else {}),
        )  # fmt: skip
        ranges = list(_within(due, _ENTRIES_AT_ONCE))
        self.is_done = sum(each.last - each.first + 1 for each in ranges) < _ENTRIES_AT_ONCE
        if not ranges:
            return []
        self._after = ranges[-1].account_id
        found = await rows(
            session, _ENTRIES_OF,
            accounts=[each.account_id for each in ranges], first=[each.first for each in ranges], last=[each.last for each in ranges],
        )  # fmt: skip
        seals = list(self._sealed(ranges, found))
        if sum(each.count for each in seals) < sum(each.last - each.first + 1 for each in ranges):
            self._after = uuid.UUID(int=min(self._after.int + 1, 2**128 - 1))  # behind a gap there is no going on
        return seals

    def _sealed(self, ranges: Sequence[_Range], found: Iterable[Row]) -> Iterator[Sealed]:
        by_account: dict[uuid.UUID, list[Row]] = {each.account_id: [] for each in ranges}
        for entry in found:
            by_account[entry["account_id"]].append(entry)
        for each in ranges:
            links, kept = bytearray(), bytearray()
            before = each.before
            for number, entry in enumerate(by_account[each.account_id], each.first):
                if entry["id"] != number:  # a gap: the audit names it, and behind it nothing is sealed
                    break
                call = chain.call_mac(self._pepper, each.account_id, entry["call"])
                before = chain.link(self._pepper, before, each.account_id, ENTRIES, number, entry["content"] + call)
                links += before
                kept += call
            if links:
                yield Sealed(each.account_id, ENTRIES, each.first, bytes(links), bytes(kept))


def _within(due: Iterable[Row], most: int) -> Iterator[_Range]:
    """The first ranges, of `most` entries at most; the last one is cut."""
    left = most
    for each in due:
        if left > 0:
            first = each["sealed"] + 1
            last = min(each["last"], each["sealed"] + left)
            left -= last - each["sealed"]
            yield _Range(each["account_id"], first, last, bytes(each["link"]) if each["link"] else NO_LINK)


class _Prices(_Source):
    """Versions of prices, each as a whole once it is there: an import is one transaction."""

    def __init__(self, pepper: Pepper) -> None:
        self._pepper = pepper

    async def some(self, session: AsyncSession) -> list[Sealed]:
        found = await row(session, _DUE_VERSION, house=HOUSE)
        if found is None:
            self.is_done = True
            return []
        name, links, kept, before = f"prices/{found['id']}", bytearray(), bytearray(), NO_LINK
        lines = await rows(session, PRICES, version_id=found["id"])
        for number, line in enumerate(lines, 1):
            before = chain.link(self._pepper, before, HOUSE, name, number, line["content"])
            links += before
        return [Sealed(HOUSE, name, 1, bytes(links), bytes(kept))]


class _Rows(_Source):
    """Rows of one kind that are new, or that changed in a way in which they may."""

    def __init__(self, pepper: Pepper, kind: Kind, since: datetime | None) -> None:
        self._pepper, self._kind, self._since = pepper, kind, since
        self._after = (uuid.UUID(int=0), "")
        self._newer = "since >= :since OR ends_at >= :since" if kind.may_end else "since >= :since"

    async def some(self, session: AsyncSession) -> list[Sealed]:
        due = await rows(
            session, _DUE_ROWS.format(rows=self._kind.rows(self._newer if self._since else "true")),
            after_account=self._after[0], after_chain=self._after[1], at_once=_ROWS_AT_ONCE,
            **({"since": self._since} if self._since else {}),
        )  # fmt: skip
        self.is_done = len(due) < _ROWS_AT_ONCE
        if due:
            self._after = due[-1]["account_id"], due[-1]["chain"]
        if self._kind.table == "api_key":
            due = await proven(session, self._pepper, due)
        return [self._sealed(each) for each in due if may_become(each)]

    def _sealed(self, each: Row) -> Sealed:
        before = bytes(each["link"]) if each["link"] else NO_LINK
        number = each["revision"] if each["revision"] > (each["number"] or 0) else each["number"] + 1
        made = chain.link(self._pepper, before, each["account_id"], each["chain"], number, bytes(each["says"]))
        return Sealed(each["account_id"], each["chain"], number, made, bytes(each["says"]))


def may_become(each: Row) -> bool:
    """Whether what was sealed as `kept` may say what it `says` now.

    What is new may. A later revision may, where whoever made it proved it. Else only an end may come, or come earlier.
    """
    if each["number"] is None or each["revision"] > each["number"]:
        return True
    kept, says = bytes(each["kept"]), bytes(each["says"])
    ended, ends = int.from_bytes(kept[32:]), int.from_bytes(says[32:])
    return kept[:32] == says[:32] and 0 < ends < (ended or ends + 1)


async def proven(session: AsyncSession, pepper: Pepper, due: Sequence[Row]) -> list[Row]:
    """Those keys whose setting we made ourselves."""
    found = await rows(
        session,
        f"""SELECT {", ".join(f"k.{name}" for name in PROVEN)}, k.proof
            FROM unnest(CAST(:accounts AS uuid[]), CAST(:ids AS uuid[])) u (account_id, id)
            JOIN api_key k ON k.account_id = u.account_id AND k.id = u.id""",
        accounts=[each["account_id"] for each in due], ids=[uuid.UUID(each["chain"].removeprefix("key/")) for each in due],
    )  # fmt: skip
    proven = {
        f"key/{key['id']}" for key in found if key["proof"] and equal(bytes(key["proof"]), key_proof(pepper, key))
    }
    return [each for each in due if each["chain"] in proven]


_LAST_SEAL: Final = """
    LEFT JOIN LATERAL (SELECT s.number, s.count, s.links, s.kept FROM seal s
                       WHERE s.account_id = {account_id} AND s.chain = {chain} ORDER BY s.number DESC LIMIT 1) s ON true"""
_FRESH: Final = "(SELECT account_id, max(id) AS last FROM entry WHERE created_at >= :since GROUP BY account_id)"
_ALL: Final = "(SELECT id AS account_id, entry_count AS last FROM account)"
_DUE_ENTRIES: Final = f"""
    SELECT f.account_id, f.last, coalesce(s.number + s.count - 1, 0) AS sealed, substr(s.links, length(s.links) - 15) AS link
    FROM {{fresh}} f {_LAST_SEAL.format(account_id="f.account_id", chain=f"'{ENTRIES}'")}
    WHERE f.account_id >= :after AND f.last > coalesce(s.number + s.count - 1, 0)
    ORDER BY f.account_id LIMIT :at_once"""
_ENTRIES_OF: Final = f"""
    SELECT e.account_id, e.id, {chain.ENTRY_DIGEST} AS content, CASE WHEN u.id IS NOT NULL THEN {chain.CALL_DIGEST} END AS call
    FROM unnest(CAST(:accounts AS uuid[]), CAST(:first AS bigint[]), CAST(:last AS bigint[])) r (account_id, first, last)
    JOIN entry e ON e.account_id = r.account_id AND e.id BETWEEN r.first AND r.last
    LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id
    ORDER BY e.account_id, e.id"""
_DUE_VERSION: Final = """
    SELECT v.id FROM price_version v LEFT JOIN seal s ON s.account_id = :house AND s.chain = 'prices/' || v.id AND s.number = 1
    WHERE s.number IS NULL ORDER BY v.id LIMIT 1"""
SAYS: Final = "x.content || int8send(coalesce((extract(epoch FROM x.ends_at) * 1000000)::bigint, 0))"
_DUE_ROWS: Final = f"""
    SELECT x.account_id, x.chain, x.revision, {SAYS} AS says, s.number, s.kept, s.links AS link
    FROM ({{rows}}) x {_LAST_SEAL.format(account_id="x.account_id", chain="x.chain")}
    WHERE (x.account_id, x.chain) > (:after_account, :after_chain)
      AND (s.number IS NULL OR x.revision > s.number OR s.kept <> {SAYS})
    ORDER BY x.account_id, x.chain LIMIT :at_once"""
