"""Sealing what was written, by a job off the hot path: it reads what is new, takes no lock, and adds rows that none of it waits for.

A transaction of seals is a run: all of it is there or nothing, and its MAC chains it to the run before. So whoever dies
leaves no half of one, and two who seal at the same time meet on a key, where the later one gives way.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import chain
from app.audit.chain import AT_ONCE, ENTRIES, HOUSE, KINDS, NO_CALL, NO_LINK, PRICES, Kind, Sealed
from app.audit.tables import SealRun
from app.kernel.db import Database, Row, row, rows
from app.kernel.lease import leads
from app.kernel.logs import log
from app.kernel.pace import ON_ONE_CORE, Pace, Rest, without_rest
from app.kernel.security import Pepper, equal
from app.kernel.shards import is_sharded
from app.keys.proof import PROVEN, key_proof

_ENTRIES_AT_ONCE: Final = 5_000
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
            made = await seal(self._db, self._pepper, whole=is_whole, rest=self._led_on(Pace().rest))
        except IntegrityError:  # somebody who led before us is still at it
            log.warning("seals.two_at_once")
            return 0
        if is_whole:
            self._whole_at = time.monotonic() + _WHOLE_EVERY_SECONDS
        self.head = await self._db.transaction(head_of)
        if made and self.head is not None:
            log.info("seals.made", count=made, head=str(self.head))
        return made

    def _led_on(self, rest: Rest) -> Rest:
        """A rest after which we lead on, as there may be many portions."""

        async def rested(worked_seconds: float) -> None:
            await rest(worked_seconds)
            await leads(self._db, "seals", _LEASE_SECONDS)

        return rested

    async def _compare(self) -> None:
        """The log is outside the database: it tells if the seals are not those that we left there."""
        if self.head is not None and not await self._db.transaction(lambda session: has_run(session, self.head)):
            log.error("seals.rolled_back", head=str(self.head))
            self.head = None


async def seal(
    db: Database,
    pepper: Pepper,
    *,
    whole: bool = False,
    entries_at_once: int = _ENTRIES_AT_ONCE,
    rest: Rest = without_rest,
) -> int:
    """Seal what was written since the last time, or whatever has no seal (`whole`). Returns how many seals were made.
    `rest` is awaited after a portion behind which there are others.

    Raises IntegrityError if somebody else sealed at the same time; what we had sealed until then stands.
    """
    begun = await db.transaction(_begin)
    since = None if whole or begun["since"] is None else begun["since"]
    made, sharded = 0, await is_sharded(db)
    for source in (
        _Entries(pepper, since, entries_at_once),
        _Prices(pepper),
        *(_Rows(pepper, kind, since, sharded=sharded) for kind in KINDS),
    ):
        while not source.is_done:
            began = time.monotonic()
            made += await db.transaction(lambda session, source=source: _run(session, pepper, source))  # type: ignore[misc]
            source.go_on()
            if not source.is_done:
                await rest(time.monotonic() - began)
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
    await row(session, ON_ONE_CORE)
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
        await rows(
            session, _INSERT, run_id=run_id, accounts=_array(each.account_id for each in seals), chains=[each.chain for each in seals],
            numbers=[each.number for each in seals], counts=[each.count for each in seals],
            links=_array(f"\\\\x{each.links.hex()}" for each in seals), kept=_array(f"\\\\x{each.kept.hex()}" for each in seals),
            forms=[each.form for each in seals],
        )  # fmt: skip


def _array(values: Iterable[object]) -> str:
    """An array as text: psycopg writes one of ids or bytes a tenth as fast."""
    return f"{{{','.join(map(str, values))}}}"


# One statement for all: a row at a time, each would cost as much as its account's whole part of a seal.
_INSERT: Final = """
    INSERT INTO seal (account_id, chain, number, count, links, kept, form, run_id)
    SELECT u.*, :run_id FROM unnest(
        CAST(:accounts AS uuid[]), CAST(:chains AS text[]), CAST(:numbers AS bigint[]), CAST(:counts AS bigint[]),
        CAST(:links AS bytea[]), CAST(:kept AS bytea[]), CAST(:forms AS bigint[])) u"""


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
    """Something that is sealed portion by portion. `some` returns the seals of the next one, and again the same until `go_on`: what
    was rolled back, and a transaction may be tried twice, was not sealed. `is_done` behind the last."""

    is_done = False

    @abstractmethod
    async def some(self, session: AsyncSession) -> list[Sealed]: ...

    @abstractmethod
    def go_on(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Range:
    account_id: uuid.UUID
    first: int
    last: int
    before: bytes


@dataclass(frozen=True, slots=True)
class _Listed:
    """What is due of some accounts, and whether there are others behind them."""

    due: tuple[_Range, ...]
    after: uuid.UUID
    is_all: bool


class _Entries(_Source):
    """Entries with their calls, account by account. Whose they are is asked once for many portions."""

    def __init__(self, pepper: Pepper, since: datetime | None, at_once: int) -> None:
        self._pepper, self._since, self._at_once = pepper, since, at_once
        self._now = self._then = _Listed((), uuid.UUID(int=0), is_all=False)

    async def some(self, session: AsyncSession) -> list[Sealed]:
        listed = self._now if self._now.due else await self._list(session)
        ranges, rest = _portion(listed.due, self._at_once)
        seals: list[Sealed] = []
        if ranges:
            found = {each["account_id"]: each for each in await self._digests(session, ranges)}
            for each in ranges:
                sealed = await self._sealed(session, each, found.get(each.account_id))
                seals += [sealed] if sealed else []
        self._then = replace(listed, due=_behind(ranges, seals, rest))
        return seals

    def go_on(self) -> None:
        self._now = self._then
        self.is_done = self._now.is_all and not self._now.due

    async def _list(self, session: AsyncSession) -> _Listed:
        found = await rows(
            session, _DUE_ENTRIES.format(fresh=_FRESH if self._since else _ALL),
            after=self._now.after, at_once=self._at_once, **({"since": self._since} if self._since else {}),
        )  # fmt: skip
        due = tuple(
            _Range(
                each["account_id"], each["sealed"] + 1, each["last"], bytes(each["link"]) if each["link"] else NO_LINK
            )
            for each in found
        )
        return _Listed(due, due[-1].account_id if due else self._now.after, is_all=len(due) < self._at_once)

    async def _digests(self, session: AsyncSession, ranges: Sequence[_Range]) -> list[Row]:
        return await rows(
            session, _DIGESTS_OF,
            accounts=_array(each.account_id for each in ranges), first=[each.first for each in ranges], last=[each.last for each in ranges],
        )  # fmt: skip

    async def _sealed(self, session: AsyncSession, due: _Range, found: Row | None) -> Sealed | None:
        """Up to a gap: the audit names it, and behind it nothing is sealed."""
        if found is not None and found["last"] != due.first + found["count"] - 1:
            whole = await row(session, _BEFORE_GAP, account_id=due.account_id, first=due.first, last=due.last)
            assert whole is not None
            due = replace(due, last=due.first + whole["count"] - 1)
            found = next(iter(await self._digests(session, [due])), None)
        if found is None:
            return None
        digests, kept = bytes(found["digests"]), bytes(found["kept"])
        made = chain.link_at_once(self._pepper, due.before, due.account_id, due.first, digests, kept)
        return Sealed(due.account_id, ENTRIES, due.first, digests + made, kept, AT_ONCE)


def _portion(due: Sequence[_Range], most: int) -> tuple[list[_Range], tuple[_Range, ...]]:
    """The first ranges, of `most` entries at most, and the rest; the last of them is cut."""
    left = most
    for place, each in enumerate(due):
        if each.last - each.first + 1 >= left:
            cut = replace(each, last=each.first + left - 1)
            rest = (replace(each, first=cut.last + 1),) if cut.last < each.last else ()
            return [*due[:place], cut], (*rest, *due[place + 1 :])
        left -= each.last - each.first + 1
    return list(due), ()


def _behind(ranges: Sequence[_Range], seals: Sequence[Sealed], rest: tuple[_Range, ...]) -> tuple[_Range, ...]:
    """Where a range was cut its rest goes on behind the link that was made last. Behind a gap there is no going on."""
    if not ranges or not rest or rest[0].account_id != ranges[-1].account_id:
        return rest
    if seals and (seals[-1].account_id, seals[-1].number + seals[-1].count) == (rest[0].account_id, rest[0].first):
        return replace(rest[0], before=seals[-1].last_link), *rest[1:]
    return rest[1:]


class _Prices(_Source):
    """Versions of prices, each as a whole once it is there: an import is one transaction."""

    def __init__(self, pepper: Pepper) -> None:
        self._pepper, self._was_last = pepper, False

    def go_on(self) -> None:
        self.is_done = self._was_last

    async def some(self, session: AsyncSession) -> list[Sealed]:
        found = await row(session, _DUE_VERSION, house=HOUSE)
        self._was_last = found is None
        if found is None:
            return []
        name, links, kept, before = f"prices/{found['id']}", bytearray(), bytearray(), NO_LINK
        lines = await rows(session, PRICES, version_id=found["id"])
        for number, line in enumerate(lines, 1):
            before = chain.link(self._pepper, before, HOUSE, name, number, line["content"])
            links += before
        return [Sealed(HOUSE, name, 1, bytes(links), bytes(kept))]


class _Rows(_Source):
    """Rows of one kind that are new, or that changed in a way in which they may."""

    def __init__(self, pepper: Pepper, kind: Kind, since: datetime | None, *, sharded: bool) -> None:
        """`sharded`: seals live on several servers, and are looked up by themselves."""
        self._pepper, self._kind, self._since, self._sharded = pepper, kind, since, sharded
        self._looked_at: list[Row] = []
        self._after = (uuid.UUID(int=0), "")
        self._newer = "since >= :since OR ends_at >= :since" if kind.may_end else "since >= :since"

    async def some(self, session: AsyncSession) -> list[Sealed]:
        statement = _ROWS_BEHIND if self._sharded else _DUE_ROWS
        due = self._looked_at = await rows(
            session, statement.format(rows=self._kind.rows(self._newer if self._since else "true")),
            after_account=self._after[0], after_chain=self._after[1], at_once=_ROWS_AT_ONCE,
            **({"since": self._since} if self._since else {}),
        )  # fmt: skip
        if self._sharded:
            due = await _due_of(session, due)
        if self._kind.table == "api_key":
            due = await proven(session, self._pepper, due)
        return [self._sealed(each) for each in due if may_become(each)]

    def go_on(self) -> None:
        self.is_done = len(self._looked_at) < _ROWS_AT_ONCE
        if self._looked_at:
            self._after = self._looked_at[-1]["account_id"], self._looked_at[-1]["chain"]

    def _sealed(self, each: Row) -> Sealed:
        before = bytes(each["link"]) if each["link"] else NO_LINK
        number = each["revision"] if each["revision"] > (each["number"] or 0) else each["number"] + 1
        made = chain.link(self._pepper, before, each["account_id"], each["chain"], number, bytes(each["says"]))
        return Sealed(each["account_id"], each["chain"], number, made, bytes(each["says"]))


async def _due_of(session: AsyncSession, looked_at: Sequence[Row]) -> list[Row]:
    """Those that are not sealed as they are, with their last seals: what _DUE_ROWS asks in one."""
    found = await rows(
        session,
        _LAST_SEALS,
        accounts=[each["account_id"] for each in looked_at],
        chains=[each["chain"] for each in looked_at],
    )
    last = {(each["account_id"], each["chain"]): each for each in found}
    none = {"number": None, "kept": None, "link": None}
    beside = [each | last.get((each["account_id"], each["chain"]), none) for each in looked_at]
    return [
        each
        for each in beside
        if each["number"] is None or each["revision"] > each["number"] or bytes(each["kept"]) != bytes(each["says"])
    ]


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
    WHERE f.account_id > :after AND f.last > coalesce(s.number + s.count - 1, 0)
    ORDER BY f.account_id LIMIT :at_once"""
_DIGESTS_OF: Final = f"""
    SELECT e.account_id, count(*) AS count, max(e.id) AS last, string_agg({chain.ENTRY_DIGEST}, ''::bytea ORDER BY e.id) AS digests,
           string_agg(CASE WHEN u.id IS NULL THEN '\\x{NO_CALL.hex()}'::bytea ELSE {chain.CALL_DIGEST} END, ''::bytea ORDER BY e.id) AS kept
    FROM unnest(CAST(:accounts AS uuid[]), CAST(:first AS bigint[]), CAST(:last AS bigint[])) r (account_id, first, last)
    JOIN entry e ON e.account_id = r.account_id AND e.id BETWEEN r.first AND r.last
    LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id
    GROUP BY e.account_id"""
_BEFORE_GAP: Final = """
    SELECT count(*) AS count
    FROM (SELECT id, row_number() OVER (ORDER BY id) AS place FROM entry WHERE account_id = :account_id AND id BETWEEN :first AND :last) e
    WHERE id = :first + place - 1"""
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
_ROWS_BEHIND: Final = f"""
    SELECT x.account_id, x.chain, x.revision, {SAYS} AS says FROM ({{rows}}) x
    WHERE (x.account_id, x.chain) > (:after_account, :after_chain) ORDER BY x.account_id, x.chain LIMIT :at_once"""
_LAST_SEALS: Final = """
    SELECT DISTINCT ON (s.account_id, s.chain) s.account_id, s.chain, s.number, s.kept, s.links AS link
    FROM unnest(CAST(:accounts AS uuid[]), CAST(:chains AS text[])) u (account_id, chain)
    JOIN seal s ON s.account_id = u.account_id AND s.chain = u.chain ORDER BY s.account_id, s.chain, s.number DESC"""
