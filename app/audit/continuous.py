"""The audit that never ends: new entries within seconds, and all accounts in slices, round after round, by the audit's own checks.

What it finds stands in a table, so that every process tells it. It reads on snapshots of their own and locks nothing.
"""

import functools
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.chain import HOUSE
from app.audit.check import Check
from app.audit.explained import unexplained
from app.audit.run import CHECKS
from app.audit.schema import SCHEMA
from app.audit.sealing import LAG
from app.kernel.db import Database, Row, row, rows
from app.kernel.lease import leads
from app.kernel.logs import log
from app.kernel.pace import ON_ONE_CORE, Rest, without_rest
from app.notices.tell import tell

_ACCOUNTS_AT_ONCE: Final = 2_500
_ENTRIES_AT_ONCE: Final = 20_000
_WINDOW_SECONDS: Final = 2.0
_MOST_WINDOWS: Final = 50
"""In which new entries are looked at one after the other, and then there is a rest."""
_ROUND_SECONDS: Final = 60
"""A round begins no sooner after the one before: small books need not be read all day."""
_LEASE_SECONDS: Final = 120

_OF_ACCOUNTS: Final = (
    "entry", "entry_closing", "usage", "hold", "api_key", "credential", "topup", "payment", "topup_invoice", "topup_address", "usage_day",
    "usage_summed", "usage_dropped", "nwc_connection", "nwc_attempt", "notice", "notice_address", "credential_event", "nostr_event", "offer", "proof_ref",
)  # fmt: skip
_OF_ALL: Final = frozenset({"days_of_dropped_months_stay", "put_away_entries_are_those_of_their_archive"})
"""What is true of all accounts together, and so not of a slice of them."""
SLICED: Final[tuple[Check, ...]] = tuple(check for check in CHECKS if check not in SCHEMA and check.name not in _OF_ALL)


@dataclass(frozen=True, slots=True)
class Figures:
    """What monitoring is told: the share of entries that are explained, the age of the oldest that is not, or of the oldest
    difference since it was found, and how many differences there are."""

    explained_ratio: float
    oldest_unexplained_seconds: float
    differences: int


async def look_on(db: Database) -> int:
    """A turn: the next slice, where a round is under way or due. Returns how many accounts were looked at; 0 where another process leads."""
    if not await _leads(db) or not await _may_walk(db):
        return 0
    return await walk(db)


async def _leads(db: Database) -> bool:
    return await leads(db, "continuous audit", _LEASE_SECONDS)


# --- what is new ------------------------------------------------------------------------------------


async def look_at_new(db: Database, rest: Rest = without_rest) -> int:
    """Whether new entries are explained. Returns how many accounts have one that is not; 0 where another process leads.

    Each turn looks at what came since the one before, and every 90 seconds one looks also at what may have been committed late.
    """
    if not await _leads(db):
        return 0
    since = await db.transaction(lambda session: row(session, _SINCE))
    account_ids = set[uuid.UUID]()
    if since is not None:  # else the first round looks at everything
        for window in _windows(since["since"], since["now"]):
            began = time.monotonic()
            account_ids |= await db.transaction(functools.partial(_unexplained_in, window=window))
            await rest(time.monotonic() - began)
    await db.transaction(lambda session: _keep_new(session, since, sorted(account_ids)))
    return len(account_ids)


def _windows(since: datetime, now: datetime) -> Iterator[tuple[datetime, datetime]]:
    """What follows `since`, window by window. The last one is open: a clock may have gone back."""
    step = max(timedelta(seconds=_WINDOW_SECONDS), (now - since) / _MOST_WINDOWS)
    while since + step < now:
        yield since, since + step
        since += step
    yield since, datetime.max.replace(tzinfo=UTC)


async def _unexplained_in(session: AsyncSession, window: tuple[datetime, datetime]) -> set[uuid.UUID]:
    await row(session, "SET TRANSACTION READ ONLY")
    await row(session, "SET LOCAL statement_timeout = 0")
    await row(session, "SET LOCAL enable_seqscan = off")  # what is new is a small part, whatever the statistics say
    await row(session, ON_ONE_CORE)
    of_new = unexplained("e.created_at >= :since AND e.created_at < :until")
    since, until = window
    found = await rows(session, f"SELECT DISTINCT account_id FROM ({of_new}) x LIMIT 1000", since=since, until=until)
    return {each["account_id"] for each in found}


_SINCE: Final = f"""
    SELECT now() AS now, is_whole, CASE WHEN is_whole THEN seen_until ELSE looked_until - interval '5 seconds' END AS since
    FROM (SELECT w.seen_until, n.seen_until AS looked_until,
                 coalesce(w.seen_until < now() - 2 * {LAG} OR n.seen_until < w.seen_until, true) AS is_whole
          FROM audit_walk w LEFT JOIN audit_walk n ON n.name = 'new' WHERE w.name = 'walk' AND w.seen_until IS NOT NULL) x"""
"""Up to `seen_until` of the walk nothing is left out; `new` is when the last turn looked. Short transactions take no five seconds."""


async def _keep_new(session: AsyncSession, since: Row | None, account_ids: Sequence[uuid.UUID]) -> None:
    await row(
        session,
        f"""INSERT INTO audit_walk (name, after, seen_until)
            SELECT u.name, :start, u.seen_until
            FROM (SELECT coalesce(CAST(:looked_at AS timestamptz), now()) AS looked_at) x,
                 LATERAL (VALUES ('walk', x.looked_at - {LAG}), ('new', x.looked_at)) u (name, seen_until)
            ON CONFLICT (name) DO UPDATE SET seen_until = EXCLUDED.seen_until WHERE EXCLUDED.name = 'new' OR :is_whole""",
        start=HOUSE, looked_at=since and since["now"], is_whole=since is None or since["is_whole"],
    )  # fmt: skip
    if account_ids:
        for found in (await _unexplained(session, account_ids)).values():
            await row(session, _KEEP, differences=None, **found)


# --- everything, in slices --------------------------------------------------------------------------


async def _may_walk(db: Database) -> bool:
    """Whether a round is under way, or none was there yet, or the last one is over for long enough."""
    found = await db.transaction(lambda session: row(session, _MAY_WALK, start=HOUSE, wait=_ROUND_SECONDS))
    return found is None or bool(found["may"])


_MAY_WALK: Final = """
    SELECT after <> :start OR rounds = 0 OR looked_at < now() - make_interval(secs => :wait) AS may
    FROM audit_walk WHERE name = 'walk'"""


async def walk(db: Database, accounts_at_once: int = _ACCOUNTS_AT_ONCE) -> int:
    """Look at the next slice of accounts. Returns how many they were; at the end of a round the next one begins."""
    slice_ids, entries = await db.transaction(lambda session: _next_slice(session, accounts_at_once))
    differences = await db.transaction(lambda session: _differences(session, slice_ids))
    entries_found = await db.transaction(lambda session: _unexplained(session, slice_ids))
    await db.transaction(lambda session: _keep(session, entries_found, differences, slice_ids))
    await db.transaction(lambda session: _go_on(session, slice_ids, entries))
    return len(slice_ids)


async def _next_slice(session: AsyncSession, accounts_at_once: int) -> tuple[list[uuid.UUID], int]:
    """The next accounts, so many that they have not too many entries together, or one alone; and the entries they have."""
    found = await rows(
        session,
        """SELECT id, entry_count FROM account
           WHERE id > coalesce((SELECT after FROM audit_walk WHERE name = 'walk'), :start) ORDER BY id LIMIT :at_once""",
        start=HOUSE, at_once=accounts_at_once,
    )  # fmt: skip
    some: list[uuid.UUID] = []
    entries = 0
    for each in found:
        if some and entries + each["entry_count"] > _ENTRIES_AT_ONCE:
            break
        some.append(each["id"])
        entries += each["entry_count"]
    return some, entries


async def _differences(session: AsyncSession, slice_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, int]:
    """How many differences the audit's checks find in these accounts; what names no account of them counts for the house's."""
    # Each check is one statement, and true of one moment. A snapshot for all would keep every version of the rows that calls change
    # meanwhile, and a busy account's has hundreds in a second.
    await row(session, "SET TRANSACTION READ ONLY")
    await row(session, "SET LOCAL statement_timeout = 0")
    await row(session, ON_ONE_CORE)
    # Tables are compared by hashes: row by row, or account by account, a slice would take longer than the whole audit. And what is
    # of the slice is looked up by its accounts: read whole, tables would be read as often as there are slices.
    for plan in ("nestloop", "mergejoin", "seqscan"):
        await row(session, f"SET LOCAL enable_{plan} = off")
    count: dict[uuid.UUID, int] = {}
    checks = SLICED if slice_ids else SCHEMA
    ends = {"first": slice_ids[0], "last": slice_ids[-1]} if slice_ids else {}
    for check in checks:
        hiding = only_of(check.sql) if slice_ids else ""  # of the catalogs nothing is an account's
        statement = f"{hiding} SELECT subject FROM ({check.sql}) differing LIMIT 1000"
        for each in await rows(session, statement, **(ends if hiding else {})):
            account_id = _account_in(each["subject"], slice_ids)
            count[account_id] = count.get(account_id, 0) + 1
    if count:
        log.error("audit.differences", account_id=str(min(count)), count=sum(count.values()))
    return count


@functools.cache
def only_of(sql: str) -> str:
    """What stands before a check's text for it to see the rows of a slice alone: tables of the same names, which hide the real ones.

    A slice is accounts that follow each other: from one to another is one look into an index, and a list of them thousands.
    """
    hidden = [
        f"{table} AS NOT MATERIALIZED (SELECT * FROM public.{table} WHERE {key} BETWEEN CAST(:first AS uuid) AND CAST(:last AS uuid))"
        for table, key in (("account", "id"), *((table, "account_id") for table in _OF_ACCOUNTS))
        if re.search(rf"\b{table}\b", sql)
    ]
    return f"WITH {', '.join(hidden)}" if hidden else ""


def _account_in(subject: str, slice_ids: Sequence[uuid.UUID]) -> uuid.UUID:
    """The account of a slice that a finding names, or none's."""
    named = set(re.findall(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", subject or ""))
    return next((each for each in slice_ids if str(each) in named), slice_ids[0] if slice_ids else HOUSE)


async def _unexplained(session: AsyncSession, slice_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Row]:
    of_slice = unexplained("e.account_id = ANY (CAST(:slice AS uuid[]))")
    found = await rows(
        session,
        f"SELECT account_id, count(*) AS unexplained, min(created_at) AS oldest_at FROM ({of_slice}) x GROUP BY 1",
        slice=list(slice_ids),
    )
    return {each["account_id"]: each for each in found}


async def _keep(
    session: AsyncSession,
    entries: dict[uuid.UUID, Row],
    differences: dict[uuid.UUID, int],
    slice_ids: Sequence[uuid.UUID],
) -> None:
    """Keep what was found of these accounts, and forget what is found no more."""
    found = sorted({*entries, *differences})
    await row(
        session,
        "DELETE FROM audit_finding WHERE account_id = ANY (CAST(:looked AS uuid[])) AND account_id <> ALL (CAST(:found AS uuid[]))",
        looked=list(slice_ids) or [HOUSE], found=found,
    )  # fmt: skip
    for account_id in found:
        none = {"account_id": account_id, "unexplained": 0, "oldest_at": None}
        await row(session, _KEEP, differences=differences.get(account_id, 0), **entries.get(account_id, none))
    if differing := sorted(str(account_id) for account_id, count in differences.items() if count):
        told = {"differences": sum(differences.values()), "accounts": len(differing), "found_by": "continuous audit"}
        await tell(session, None, "audit.difference", told, once=",".join(differing))


_KEEP: Final = """
    INSERT INTO audit_finding (account_id, differences, unexplained, oldest_at)
    VALUES (:account_id, coalesce(CAST(:differences AS bigint), 0), :unexplained, :oldest_at)
    ON CONFLICT (account_id) DO UPDATE SET differences = coalesce(CAST(:differences AS bigint), audit_finding.differences),
                                           unexplained = EXCLUDED.unexplained, oldest_at = EXCLUDED.oldest_at"""
"""Without `differences` those stay that were found before."""


async def _go_on(session: AsyncSession, slice_ids: Sequence[uuid.UUID], entries: int) -> None:
    if slice_ids:
        await row(
            session,
            """INSERT INTO audit_walk (name, after, entries) VALUES ('walk', :after, :entries)
               ON CONFLICT (name) DO UPDATE SET after = EXCLUDED.after, entries = audit_walk.entries + EXCLUDED.entries, looked_at = now()""",
            after=slice_ids[-1], entries=entries,
        )  # fmt: skip
        return
    await row(
        session,
        """INSERT INTO audit_walk (name, after, rounds) VALUES ('walk', :start, 1)
           ON CONFLICT (name) DO UPDATE SET after = EXCLUDED.after, entries_before = audit_walk.entries, entries = 0,
                                            rounds = audit_walk.rounds + 1, looked_at = now()""",
        start=HOUSE,
    )


# --- what is told -----------------------------------------------------------------------------------


async def figures(session: AsyncSession) -> Figures | None:
    """What the rounds have found until now; None where none has begun."""
    found = await row(session, FIGURES)
    if found is None:
        return None
    return Figures(found["ratio"], found["oldest_seconds"], found["differences"])


FIGURES: Final = """
    SELECT (1 - least(f.unexplained / greatest(w.entries, w.entries_before, f.unexplained, 1)::numeric, 1))::float8 AS ratio,
           coalesce(greatest(extract(epoch FROM now() - f.oldest_at), 0), 0)::float8 AS oldest_seconds, f.differences
    FROM audit_walk w,
         (SELECT coalesce(sum(unexplained), 0)::bigint AS unexplained, coalesce(sum(differences), 0)::bigint AS differences,
                 min(coalesce(oldest_at, found_at)) AS oldest_at FROM audit_finding) f
    WHERE w.name = 'walk'"""
