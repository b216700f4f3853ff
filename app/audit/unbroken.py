"""Every seal looked at: of each chain the first place where what stands there is not what was sealed.

Nothing is blamed that no run has promised to have sealed: where the job never ran there is nothing to look at.
"""

import re
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import chain
from app.audit.chain import AT_ONCE, ENTRIES, HOUSE, KINDS, LINK_BYTES, NO_CALL, NO_LINK, PRICES, Kind
from app.audit.check import Finding
from app.audit.sealing import SAYS, Head, head_of, may_become, proven
from app.audit.usage import IS_OF_DROPPED_MONTH
from app.kernel.db import Row, row, rows
from app.kernel.errors import InvalidField
from app.kernel.security import Pepper

AS_SEALED: Final = (
    "runs_form_a_chain",
    "noted_head_still_stands",
    "entries_are_as_sealed",
    "prices_are_as_sealed",
    "settings_are_as_sealed",
    "nothing_old_is_unsealed",
)
"""What is looked at: runs, entries with their calls, prices, and whatever else has a chain: keys, credit ids, rules, tokens, acts."""
_RUNS, _NOTED, _ENTRIES, _PRICES, _SETTINGS, _UNSEALED = AS_SEALED
_HEAD: Final = re.compile(r"\d{1,18}:[0-9a-f]{32}", re.ASCII)
_ROWS_AT_ONCE: Final = 1000
_IMPORT_TIME: Final = timedelta(minutes=15)
"""Later than this after its beginning no import of prices is still under way."""


@dataclass(slots=True)
class Seals:
    """How far the seals go: the head of all runs, to be noted elsewhere, and what was written since and waits for its seal."""

    head: str
    until: datetime
    unsealed: int = 0
    unsealed_since: datetime | None = None

    def wait(self, since: datetime) -> None:
        self.unsealed += 1
        self.unsealed_since = min(since, self.unsealed_since or since)


@dataclass(slots=True)
class _Look:
    """One look at everything: what was found, and how far it goes."""

    session: AsyncSession
    pepper: Pepper
    head: Head
    seals: Seals
    found: list[Finding] = field(default_factory=list)

    def find(self, check: str, subject: str, recorded: str, recomputed: str) -> None:
        self.found.append(Finding(check, subject, recorded, recomputed))

    def unsealed(self, subject: str, since: datetime, grace: timedelta = timedelta()) -> bool:
        """What has no seal waits for it, or was left out; returns whether it was."""
        if since < self.head.until - grace:
            self.find(_UNSEALED, subject, "no seal", f"sealed before {self.head.until:%Y-%m-%d %H:%M:%S}Z")
            return True
        self.seals.wait(since)
        return False


async def look(session: AsyncSession, pepper: Pepper, noted: str | None = None) -> tuple[list[Finding], Seals | None]:
    """Look at every seal, in the caller's snapshot; None where there are none. `noted` is a head that somebody noted before.

    Raises InvalidField for a `noted` that is no head.
    """
    if noted is not None and not _HEAD.fullmatch(noted):
        raise InvalidField(f"{noted!r} is no head of seals, such as 12:0123…; `satmeter audit` prints it", param="head")
    head = await head_of(session)
    if head is None:
        left = await rows(session, "SELECT account_id, chain FROM seal LIMIT 1")
        finding = Finding(_RUNS, "all runs", "none", "the runs of the seals there are")
        lost = Finding(_NOTED, noted or "", "nothing is sealed", "the run that was noted")
        return [finding] * len(left) + [lost] * (noted is not None), None
    this = _Look(session, pepper, head, Seals(str(head), head.until))
    await _look_at_runs(this)
    if noted is not None:
        await _look_at_noted(this, noted)
    await _look_at_entries(this)
    await _look_at_prices(this)
    for kind in KINDS:
        await _look_at_rows(this, kind)
    return this.found, this.seals


# --- runs -------------------------------------------------------------------------------------------

_RUNS_WITH_SEALS: Final = f"""
    SELECT r.id, s.run_id, r.made_at, r.until, r.seals, r.digest, r.mac, coalesce(s.count, 0) AS count,
           coalesce(s.digest, sha256('')) AS digest_now
    FROM seal_run r FULL JOIN (SELECT run_id, count(*) AS count,
                                      sha256(string_agg({chain.DIGEST_SQL}, ''::bytea ORDER BY {chain.IN_ORDER})) AS digest
                               FROM seal GROUP BY run_id) s ON s.run_id = r.id
    ORDER BY coalesce(r.id, s.run_id)"""


async def _look_at_runs(this: _Look) -> None:
    before, expected = NO_LINK, 1
    async for run in _stream(this.session, _RUNS_WITH_SEALS):
        if run.id is None:
            this.find(_RUNS, f"run {run.run_id}", "no run", f"the run of {run.count} seals")
            continue
        if run.id != expected:
            this.find(_RUNS, f"run {expected}", "no run", "a run, as there is one after it")
        mac = chain.run_mac(this.pepper, before, run.id, run.made_at, run.until, run.seals, bytes(run.digest))
        if mac != bytes(run.mac) and run.id == expected:
            this.find(_RUNS, f"run {run.id}", "not as it was made", "as it was made")
        if (run.count, bytes(run.digest_now)) != (run.seals, bytes(run.digest)):
            this.find(_RUNS, f"run {run.id}", f"{run.count} seals", f"{run.seals} seals, as they were made")
        before, expected = bytes(run.mac), run.id + 1


async def _look_at_noted(this: _Look, noted: str) -> None:
    number, _, mac = noted.partition(":")
    found = await row(this.session, "SELECT mac FROM seal_run WHERE id = :id", id=int(number))
    if found is None or bytes(found["mac"]).hex() != mac:
        this.find(
            _NOTED, noted, "no such run" if found is None else "another run of this number", "the run that was noted"
        )


# --- entries ----------------------------------------------------------------------------------------

_SEALS_OF_ENTRIES: Final = f"SELECT account_id, number, count, links, kept, form FROM seal WHERE chain = '{ENTRIES}' ORDER BY account_id, number"
_ENTRIES_WITH_CALLS: Final = f"""
    SELECT e.account_id, e.id, e.created_at, {chain.ENTRY_DIGEST} AS content, CASE WHEN u.id IS NOT NULL THEN {chain.CALL_DIGEST} END AS call,
           u.id IS NULL AND ({IS_OF_DROPPED_MONTH.format(call="e.usage_id")}) IS TRUE AS is_archived
    FROM entry e LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id ORDER BY e.account_id, e.id"""
_LINK_BY_LINK: Final = f"""
    SELECT e.id, {chain.ENTRY_TEXT_DIGEST} AS content, CASE WHEN u.id IS NOT NULL THEN {chain.CALL_TEXT_DIGEST} END AS call
    FROM entry e LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id
    WHERE e.account_id = :account_id AND e.id >= :first AND e.id < :end"""


_CLOSINGS: Final = "SELECT account_id, first_id, last_id FROM entry_closing ORDER BY account_id, first_id"


async def _look_at_entries(this: _Look) -> None:
    seals = await _Ahead.of(_stream(this.session, _SEALS_OF_ENTRIES))
    entries = await _Ahead.of(_stream(this.session, _ENTRIES_WITH_CALLS))
    closings = await _Ahead.of(_stream(this.session, _CLOSINGS))
    every = (seals, entries, closings)
    while any(ahead.next is not None for ahead in every):
        account_id = min(ahead.next.account_id for ahead in every if ahead.next is not None)
        await _look_at_account(this, account_id, *every)


async def _look_at_account(
    this: _Look, account_id: uuid.UUID, seals: "_Ahead", entries: "_Ahead", closings: "_Ahead"
) -> None:
    """An account's chain up to the first place that differs, and past the rest.

    Of entries that were put away their links are left: as the run's MAC says, they are those that were made.
    """
    number, before, is_whole = 1, NO_LINK, True
    while (seal := seals.of_account(account_id)) is not None:
        if is_whole and seal.number != number:
            this.find(_ENTRIES, f"{account_id}/{number}", "no seal", "a seal, as there is one after it")
            is_whole = False
        places = await _places_of(this, seal, before) if is_whole else None
        for place in range(seal.count if is_whole else 0):
            entry, closing = entries.of_account(account_id), closings.of_account(account_id)
            if closing is not None and closing.first_id <= number:
                if entry is not None and entry.id == number:
                    this.find(_ENTRIES, f"{account_id}/{number}", "an entry that was put away", "no entry")
                    is_whole = False
                    break
                if closing.last_id <= number:
                    await closings.go_on()
                number += 1
                continue
            assert places is not None
            differs = "no entry" if entry is None or entry.id != number else places.difference(place, entry)
            if differs:
                this.find(_ENTRIES, f"{account_id}/{number}", differs, "what was sealed")
                is_whole = False
                break
            number += 1
            await entries.go_on()
        if is_whole and places is not None and not places.is_ours:
            this.find(_ENTRIES, f"{account_id}/{seal.number}", "another seal", "what was sealed")
            is_whole = False
        before = bytes(seal.links[-LINK_BYTES:])
        await seals.go_on()
    while (entry := entries.of_account(account_id)) is not None:
        if is_whole:
            is_whole = not this.unsealed(f"{account_id}/{entry.id}", entry.created_at)
        await entries.go_on()
    while (closing := closings.of_account(account_id)) is not None:
        if is_whole:
            this.find(_ENTRIES, f"{account_id}/{closing.first_id}", "no seal", "a seal, as it was put away")
            is_whole = False
        await closings.go_on()


async def _places_of(this: _Look, seal: Any, before: bytes) -> "_Places":
    if seal.form == AT_ONCE:
        return _Places(this.pepper, seal, before)
    found = await rows(
        this.session, _LINK_BY_LINK, account_id=seal.account_id, first=seal.number, end=seal.number + seal.count
    )
    return _LinkedPlaces(this.pepper, seal, before, {each["id"]: each for each in found})


class _Places:
    """The places of a seal, beside what stands there now."""

    def __init__(self, pepper: Pepper, seal: Any, before: bytes) -> None:
        """`before` is the link that the chain had come to."""
        self._pepper, self._before, self._account_id, self._first = pepper, before, seal.account_id, seal.number
        self._links, self._kept = bytes(seal.links), bytes(seal.kept)

    @property
    def is_ours(self) -> bool:
        """Whether the seal itself was made by us, in this place of its chain."""
        digests, link = self._links[:-LINK_BYTES], self._links[-LINK_BYTES:]
        return (
            chain.link_at_once(self._pepper, self._before, self._account_id, self._first, digests, self._kept) == link
        )

    def difference(self, place: int, entry: Any) -> str:
        """What the row at a place tells that was not sealed there; empty if nothing."""
        kept = _at(self._kept, place)
        if kept != NO_CALL and not (entry.call is None and entry.is_archived):
            if entry.call is None:
                return "no call"
            if self._call(entry) != kept:
                return "another call"
        return "" if self._entry(place, entry, kept) == _at(self._links, place) else "another entry, or another's seal"

    def _call(self, entry: Any) -> bytes:
        return bytes(entry.call)

    def _entry(self, place: int, entry: Any, kept: bytes) -> bytes:
        return bytes(entry.content)


class _LinkedPlaces(_Places):
    """Those of a seal that was made link by link: each link says that the one before it is ours."""

    def __init__(self, pepper: Pepper, seal: Any, before: bytes, texts: Mapping[int, Row]) -> None:
        """`texts` has the digests that it was made of, by the entries' numbers."""
        super().__init__(pepper, seal, before)
        self._texts = texts

    @property
    def is_ours(self) -> bool:
        return True

    def _call(self, entry: Any) -> bytes:
        return chain.call_mac(self._pepper, self._account_id, bytes(self._texts[entry.id]["call"]))

    def _entry(self, place: int, entry: Any, kept: bytes) -> bytes:
        before = _at(self._links, place - 1) if place else self._before
        content = bytes(self._texts[entry.id]["content"]) + kept
        return chain.link(self._pepper, before, self._account_id, ENTRIES, entry.id, content)


def _at(each: bytes, place: int) -> bytes:
    return each[place * LINK_BYTES : (place + 1) * LINK_BYTES]


# --- prices -----------------------------------------------------------------------------------------


async def _look_at_prices(this: _Look) -> None:
    found = await rows(
        this.session,
        """SELECT v.id, v.created_at, s.chain, s.number, s.links
           FROM price_version v FULL JOIN (SELECT * FROM seal WHERE account_id = :house AND starts_with(chain, 'prices/')) s
                                       ON s.chain = 'prices/' || v.id
           ORDER BY v.id, s.chain""",
        house=HOUSE,
    )
    for version in found:
        if version["id"] is None:
            this.find(_PRICES, version["chain"], "no such version", "what was sealed")
        elif version["chain"] is None:
            this.unsealed(f"prices/{version['id']}", version["created_at"], _IMPORT_TIME)
        else:
            await _look_at_version(this, version)


async def _look_at_version(this: _Look, version: Row) -> None:
    links, number, before = bytes(version["links"]), 0, NO_LINK
    differs = ""
    async for line in _stream(this.session, PRICES, version_id=version["id"]):
        number += 1
        before = chain.link(this.pepper, before, HOUSE, version["chain"], number, line.content)
        if not differs and before != links[(number - 1) * LINK_BYTES : number * LINK_BYTES]:
            differs = line.subject
    if differs:
        this.find(_PRICES, differs, "another line", "what was sealed")
    elif number != len(links) // LINK_BYTES:
        this.find(_PRICES, version["chain"], f"{number} lines", f"{len(links) // LINK_BYTES} lines")


# --- keys, credit ids, rules, tokens, acts ------------------------------------------------------------


async def _look_at_rows(this: _Look, kind: Kind) -> None:
    order = 'account_id, chain COLLATE "C"'
    of_kind = f"account_id {'=' if _is_of_house(kind) else '<>'} '{HOUSE}' AND starts_with(chain, '{kind.name}/')"
    seals = await _Ahead.of(
        _stream(
            this.session,
            f"SELECT account_id, chain, number, links, kept, run_id FROM seal WHERE {of_kind} ORDER BY {order}, number",
        )
    )
    live = await _Ahead.of(
        _stream(
            this.session,
            f"SELECT account_id, chain, revision, since, {SAYS} AS says FROM ({kind.sql}) x ORDER BY {order}",
        )
    )
    changed: list[Row] = []
    newest = _Newest(this, kind)
    while seals.next is not None or live.next is not None:
        name = min(_named(ahead.next) for ahead in (seals, live) if ahead.next is not None)
        last = await _last_of_chain(this, kind, name, seals)
        stands = live.next if live.next is not None and _named(live.next) == name else None
        if stands is not None:
            await live.go_on()
        if kind.may_go:
            newest.of(name, last, stands)
        if last is None and stands is not None:
            this.unsealed(_shown(kind, name), stands.since)
        elif last is not None and stands is None and not kind.may_go:
            this.find(_SETTINGS, _shown(kind, name), "gone", "what was sealed")
        elif last is not None and stands is not None and bytes(stands.says) != bytes(last["kept"]):
            changed.append(
                last | {"revision": stands.revision, "says": bytes(stands.says), "subject": _shown(kind, name)}
            )
    newest.tell()
    await _judge(this, kind, changed)


async def _judge(this: _Look, kind: Kind, changed: Sequence[Row]) -> None:
    """Changes that no seal tells of yet: those that may be wait for theirs, and a key's must be proven."""
    allowed = [each for each in changed if may_become(each)]
    if kind.table == "api_key":
        allowed = await proven(this.session, this.pepper, allowed)
    names = {(each["account_id"], each["chain"]) for each in allowed}
    for each in changed:
        if (each["account_id"], each["chain"]) not in names:
            this.find(_SETTINGS, each["subject"], "not as it was set", "what was sealed")


class _Newest:
    """Of rows that may go, an account's newest that was sealed stands, or one that waits for its seal: an older one does not
    come back in its place."""

    def __init__(self, this: _Look, kind: Kind) -> None:
        self._this, self._kind = this, kind
        self._account_id: uuid.UUID | None = None
        self._run_id, self._stands, self._gone = 0, True, ""

    def of(self, name: tuple[uuid.UUID, bytes], last: Row | None, stands: Any) -> None:
        if name[0] != self._account_id:
            self.tell()
            self._account_id, self._run_id, self._stands, self._gone = name[0], 0, False, ""
        if last is None:
            self._stands, self._run_id = True, 2**63  # newer than any seal
        elif last["run_id"] > self._run_id:
            self._run_id, self._stands, self._gone = last["run_id"], stands is not None, _shown(self._kind, name)
        elif last["run_id"] == self._run_id:
            self._stands = self._stands or stands is not None

    def tell(self) -> None:
        if not self._stands:
            self._this.find(_SETTINGS, self._gone, "gone, and none came after it", "what was sealed last")
            self._stands = True


async def _last_of_chain(this: _Look, kind: Kind, name: tuple[uuid.UUID, bytes], seals: "_Ahead") -> Row | None:
    """The last seal of a chain whose links were looked at."""
    last: Row | None = None
    is_whole = True
    while seals.next is not None and _named(seals.next) == name:
        seal = seals.next
        account_id, chain_name = seal.account_id, seal.chain
        before = NO_LINK if last is None else last["links"]
        made = chain.link(this.pepper, before, account_id, chain_name, seal.number, bytes(seal.kept))
        if is_whole and made != bytes(seal.links):
            this.find(_SETTINGS, _shown(kind, name), f"another seal {seal.number}", "what was sealed")
            is_whole = False
        last = {
            "account_id": account_id, "chain": chain_name, "number": seal.number, "links": bytes(seal.links), "kept": bytes(seal.kept),
            "run_id": seal.run_id,
        }  # fmt: skip
        await seals.go_on()
    return last


def _named(each: Any) -> tuple[uuid.UUID, bytes]:
    return each.account_id, each.chain.encode()


def _shown(kind: Kind, name: tuple[uuid.UUID, bytes]) -> str:
    account_id, row_id = name[0], name[1].decode().partition("/")[2]
    return f"{kind.table} {row_id}" if account_id == HOUSE else f"{kind.table} {account_id}/{row_id}"


def _is_of_house(kind: Kind) -> bool:
    return kind.table not in ("api_key", "credential")


# --- rows as they come ------------------------------------------------------------------------------


async def _stream(session: AsyncSession, statement: str, **params: Any) -> AsyncIterator[Any]:
    found = await session.stream(text(statement), params, execution_options={"yield_per": _ROWS_AT_ONCE})
    async for some in found.partitions():  # row by row each would cost a change of greenlets
        for each in some:
            yield each


class _Ahead:
    """Rows in their order, with the next one in sight; None after the last."""

    def __init__(self, found: AsyncIterator[Any]) -> None:
        self._found = found
        self.next: Any = None

    @classmethod
    async def of(cls, found: AsyncIterator[Any]) -> "_Ahead":
        ahead = cls(found)
        await ahead.go_on()
        return ahead

    async def go_on(self) -> None:
        self.next = await anext(self._found, None)

    def of_account(self, account_id: uuid.UUID) -> Any:
        return self.next if self.next is not None and self.next.account_id == account_id else None
