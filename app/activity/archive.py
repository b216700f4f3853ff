"""Calls put away by month or by day: exported as gzipped CSV, then dropped, with all that balances and keys are audited by kept.

These are for the database's owner: the service's own role may not drop a table, nor write what is kept of a drop.
"""

import functools
import gzip
import hashlib
import io
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import CALL, DAY, Span, day_of, end_of, is_call_id, midnight
from app.activity.rollup import sum_all
from app.activity.spreadsheet import line_writer
from app.kernel.db import Database, Row, row, rows
from app.kernel.errors import InvalidField, NotFound
from app.kernel.progress import Told, nobody
from app.kernel.shards import beside, in_order, relation_size

MONTHS_AHEAD: Final = 3
DAYS_AHEAD: Final = 7
LEAST_AGE: Final = 60 * DAY
_ROWS_AT_ONCE: Final = 5_000
_NONE: Final = uuid.UUID(int=0)


@dataclass(frozen=True, slots=True)
class Exported:
    calls: int
    cost_nusd: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Dropped:
    calls: int
    cost_nusd: int
    freed_bytes: int


async def make_partitions(db: Database, *, by_day: bool = False, now: datetime | None = None) -> int:
    """Make the partitions of the months or days to come, so that no call waits for one. Returns how many were made.

    Raises DatabaseUnavailable where somebody reads for so long that calls would have had to wait, too.
    """
    found = await db.transaction(
        lambda session: row(
            session,
            "SELECT make_usage_partitions(:ahead, :by_day, coalesce(CAST(:now AS timestamptz), now())) AS made",
            ahead=DAYS_AHEAD if by_day else MONTHS_AHEAD, by_day=by_day, now=now,
        )
    )  # fmt: skip
    assert found is not None
    return int(found["made"])


async def months(db: Database) -> Sequence[Row]:
    """The months and days there are calls of or were, as they are kept: name, month (the first day of it; None for the default
    partition), calls, bytes, exported_at, dropped_at."""
    size = await relation_size(db)
    return await db.transaction(lambda session: _months(session, size))


async def exported(session: AsyncSession) -> Sequence[Row]:
    """The months and days that were written to a file, the latest first."""
    return await rows(
        session,
        "SELECT month, is_day, calls, cost_nusd, sha256, exported_at, dropped_at FROM usage_archive ORDER BY month DESC",
    )


async def _months(session: AsyncSession, size: str) -> Sequence[Row]:
    await row(session, "SET LOCAL statement_timeout = 0")
    parts = await rows(
        session,
        f"""SELECT c.relname AS name, {size}(c.oid) AS bytes,
                  CASE WHEN c.relname ~ '^usage_[0-9]{{4}}_[0-9]{{2}}$' THEN to_date(right(c.relname, 7), 'YYYY_MM')
                       WHEN c.relname ~ '^usage_[0-9]{{4}}_[0-9]{{2}}_[0-9]{{2}}$' THEN to_date(right(c.relname, 10), 'YYYY_MM_DD') END AS month
           FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'usage'::regclass ORDER BY 1""",
    )
    # A shard (Citus) has its number behind the partition's name.
    counted = await rows(
        session,
        "SELECT regexp_replace(tableoid::regclass::text, '_[0-9]{6,}$', '') AS name, count(*) AS calls FROM usage GROUP BY 1",
    )
    calls = {each["name"]: each["calls"] for each in counted}
    archived = await rows(session, "SELECT * FROM usage_archive")
    found = [each | {"calls": calls.get(each["name"], 0)} for each in parts]
    found += [
        {"name": _name(span), "month": span.first, "bytes": 0, "calls": 0}
        for span, each in ((Span(each["month"], each["is_day"]), each) for each in archived)
        if each["dropped_at"] is not None and _name(span) not in {part["name"] for part in parts}
    ]
    known = [each | _put_away(each, archived) for each in found]
    return sorted(known, key=lambda each: str(each["name"]))


def _name(span: Span) -> str:
    return f"usage_{span}".replace("-", "_")


def _put_away(part: Row, archived: Sequence[Row]) -> Row:
    """When a partition's calls were exported and dropped: as a month, also where it is a day of it; as a day, if it is that."""
    of_it = [
        each for each in archived
        if part["month"] is not None and Span(each["month"], each["is_day"]).has(part["month"])
        and (_is_day(part) or not each["is_day"])
    ]  # fmt: skip
    return {name: of_it[0][name] if of_it else None for name in ("exported_at", "dropped_at")}


def _is_day(part: Row) -> bool:
    return len(part["name"]) == len("usage_2026_01_31")


async def export(
    db: Database, month: date | Span, path: Path, now: datetime, told: Told = nobody, reads: Database | None = None
) -> Exported:
    """Write every call of a month (by its first day), or of a span, that is over to `path`, which must not be there yet, and remember that it was done.

    The cells are as the database has them, so that the file can be loaded again. A call is never changed, and none is
    added when it is over; if one was all the same while this went on, or has not come to the standby that `reads` is,
    nothing is remembered.
    Raises InvalidField, also where some of it was dropped before; NotFound where there are no calls.
    """
    span = _span(month)
    _must_be_over(span, now)
    await sort_calls(db)
    read = reads or db
    with RowsFile(path, "cost_nusd") as file:
        async for some in in_order(read, read.transaction, functools.partial(_some_calls, span=span), _ROWS_AT_ONCE):
            file.write(some)
            told(file.count, None)
        done = Exported(file.count, file.amount_nusd, file.finish())
        await db.transaction(lambda session: _remember_export(session, span, done))
        file.keep()
    return done


async def drop(db: Database, month: date | Span, now: datetime, *, force: bool = False) -> Dropped:
    """Drop the calls of a month or span as it was exported. Balances, keys, entries and days stay, and are still audited.

    Raises InvalidField for one that is not over, not exported, or younger than LEAST_AGE unless `force`; and for a day of a month
    that is kept as one.
    Raises DatabaseUnavailable when somebody read those calls for too long; nothing has changed then.
    """
    span = _span(month)
    _must_be_over(span, now)
    if not force and now - midnight(span.end) < LEAST_AGE:
        raise InvalidField(f"{span} ended less than {LEAST_AGE.days} days ago: refunds may still come", param="month")
    return await db.transaction(lambda session: _drop(session, db, span))


async def sort_calls(db: Database) -> None:
    """What came before its partition was there moves to where it belongs."""
    await db.transaction(lambda session: row(session, "SELECT make_usage_partitions(0) AS made"))


def _span(month: date | Span) -> Span:
    return month if isinstance(month, Span) else Span(month)


def _must_be_over(span: Span, now: datetime) -> None:
    if midnight(span.end) > now:
        raise InvalidField(f"{span} is not over yet", param="month")


# --- exporting --------------------------------------------------------------------------------------


class RowsFile:
    """A gzipped CSV of rows being written, and the sum of their `amount`; it is gone again unless it was kept. Only its owner may read it."""

    def __init__(self, path: Path, amount: str) -> None:
        self._path, self._amount = path, amount
        self.count = self.amount_nusd = 0
        self._is_kept = False

    def __enter__(self) -> "RowsFile":
        try:
            self._file = self._path.open("xb")
        except OSError as error:
            raise InvalidField(f"{self._path} cannot be written: {error.strerror}", param="out") from error
        self._path.chmod(0o600)
        self._zip = gzip.GzipFile(filename="", fileobj=self._file, mode="wb", mtime=0)
        self._text = io.TextIOWrapper(self._zip, encoding="utf-8", newline="")
        self._write_line = line_writer(self._text)
        return self

    def write(self, some: Sequence[Row]) -> None:
        if not self.count:
            self._write_line(some[0])
        for each in some:
            self._write_line(_cell(value) for value in each.values())
        self.count += len(some)
        self.amount_nusd += sum(each[self._amount] for each in some)

    def finish(self) -> str:
        """Everything is in the file; returns its SHA-256 in hex."""
        self._text.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def keep(self) -> None:
        self._is_kept = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._text.close()
        self._file.close()
        if not self._is_kept:
            self._path.unlink(missing_ok=True)


def _cell(value: Any) -> str | int | None:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return msgspec.json.encode(value).decode()
    return value if value is None or type(value) is int else str(value)


async def _some_calls(
    session: AsyncSession, account_ids: Sequence[uuid.UUID] | None, after: Row | None, at_once: int, *, span: Span
) -> Sequence[Row]:
    return await rows(
        session,
        f"""SELECT * FROM usage WHERE id >= :first_id AND id < :end_id AND (account_id, id) > (:account_id, :call_id)
            {"AND account_id = ANY (CAST(:account_ids AS uuid[]))" if account_ids else ""}
            ORDER BY account_id, id LIMIT :limit""",
        account_id=after["account_id"] if after else _NONE, call_id=after["id"] if after else _NONE, limit=at_once, **span.ids,
        **({"account_ids": account_ids} if account_ids else {}),
    )  # fmt: skip


async def _remember_export(session: AsyncSession, span: Span, done: Exported) -> None:
    if not done.calls:
        raise NotFound(f"There are no calls of {span}")
    if await _counted(session, span) != (done.calls, done.cost_nusd):
        raise InvalidField("calls were added while they were exported: export again", param="month")
    await row(session, "LOCK TABLE usage_archive IN SHARE ROW EXCLUSIVE MODE")
    of_it = await rows(
        session,
        f"SELECT * FROM usage_archive x WHERE month < :end AND {end_of('x')} > :first AND (month, is_day) <> (:first, :is_day)",
        first=span.first, end=span.end, is_day=span.is_day,
    )  # fmt: skip
    if gone := [str(Span(each["month"], each["is_day"])) for each in of_it if each["dropped_at"] is not None]:
        raise InvalidField(f"{', '.join(sorted(gone))} was dropped before: export what is left by day", param="month")
    await row(
        session,
        "DELETE FROM usage_archive WHERE month = ANY (CAST(:months AS date[]))",
        months=[each["month"] for each in of_it],
    )
    await row(
        session,
        """INSERT INTO usage_archive (month, is_day, calls, cost_nusd, sha256, exported_at)
           VALUES (:month, :is_day, :calls, :cost_nusd, :sha256, now())
           ON CONFLICT (month) DO UPDATE SET calls = excluded.calls, cost_nusd = excluded.cost_nusd, sha256 = excluded.sha256,
                                             exported_at = excluded.exported_at""",
        month=span.first, is_day=span.is_day, calls=done.calls, cost_nusd=done.cost_nusd, sha256=done.sha256,
    )  # fmt: skip


async def _counted(session: AsyncSession, span: Span) -> tuple[int, int]:
    await row(session, "SET LOCAL statement_timeout = 0")
    found = await row(
        session,
        """SELECT count(*) AS calls, coalesce(sum(cost_nusd), 0)::bigint AS cost_nusd FROM usage
           WHERE id >= :first_id AND id < :end_id""",
        **span.ids,
    )
    assert found is not None
    return found["calls"], found["cost_nusd"]


# --- dropping ---------------------------------------------------------------------------------------


async def _drop(session: AsyncSession, db: Database, span: Span) -> Dropped:
    await row(session, "SET LOCAL statement_timeout = 0")
    await row(session, "SET LOCAL lock_timeout = '3s'")  # whoever waits for us would make others' calls wait, too
    archive = await row(
        session,
        "SELECT * FROM usage_archive WHERE month = :month AND is_day = :is_day FOR UPDATE",
        month=span.first, is_day=span.is_day,
    )  # fmt: skip
    if archive is not None and archive["dropped_at"] is not None:
        raise InvalidField(f"{span} was dropped before", param="month")
    if archive is None:
        raise InvalidField(f"{span} was not exported: `usage export` first", param="month")
    parts = await _partitions(session, span, await relation_size(db))
    names = ", ".join(each["name"] for each in parts)
    if not parts:
        raise InvalidField(f"{span} is in its month's partition: export and drop the month", param="month")
    await row(session, f"LOCK TABLE {names} IN SHARE MODE")
    counted = await _counted(session, span)
    if counted != (archive["calls"], archive["cost_nusd"]) or counted[0] != await _count_in(session, parts):
        raise InvalidField(f"calls of {span} were added since it was exported: export again", param="month")
    await _sum_for_good(session, db, span)
    # A refund that has read its call already is waited for here; one that comes later finds no call. Where accounts are sharded only
    # DROP waits for it, so it is looked for afterwards.
    await row(session, f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")
    await row(session, f"DROP TABLE {names}")
    await _refuse_late_refund(session, span)
    days = await row(
        session,
        f"SELECT {FINGERPRINT} AS now FROM usage_day d WHERE d.day >= :month AND d.day < :end",
        month=span.first, end=span.end,
    )  # fmt: skip
    assert days is not None
    await row(
        session,
        "UPDATE usage_archive SET dropped_at = now(), fingerprint = :fingerprint WHERE month = :month",
        month=span.first, fingerprint=days["now"],
    )  # fmt: skip
    return Dropped(archive["calls"], archive["cost_nusd"], sum(each["bytes"] for each in parts))


async def _partitions(session: AsyncSession, span: Span, size: str) -> Sequence[Row]:
    """Those that have calls of this span alone: the month's, or the days'."""
    name = _name(span)
    return await rows(
        session,
        f"""SELECT c.relname AS name, {size}(c.oid) AS bytes
           FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
           WHERE i.inhparent = 'usage'::regclass AND (c.relname = :name OR starts_with(c.relname, :days)) ORDER BY 1""",
        name=name, days=f"{name}_",
    )  # fmt: skip


async def _count_in(session: AsyncSession, parts: Sequence[Row]) -> int:
    counts = [await row(session, f"SELECT count(*) AS calls FROM {each['name']}") for each in parts]
    return sum(each["calls"] for each in counts if each is not None)


async def _sum_for_good(session: AsyncSession, db: Database, span: Span) -> None:
    for account_ids in await sum_all(session, db):
        await beside(db, session, account_ids, _KEEP, month=span.first, **span.ids)


# What is kept tells every window there is, of the key and of those above it, which calls count to it; windows that come
# begin later. A call below another key says when it began itself, so that one row of each would be as many as there were calls.
_KEEP: Final = f"""
    INSERT INTO usage_dropped (account_id, month, key_id, window_start, calls, cost_nusd, refunded_nusd)
    SELECT account_id, :month, key_id, min(window_start), sum(calls)::bigint, sum(cost_nusd)::bigint, sum(refunded_nusd)::bigint
    FROM (SELECT account_id, key_id, window_start, count(*) AS calls, sum(cost_nusd) AS cost_nusd, sum(refunded_nusd) AS refunded_nusd
          FROM (SELECT {CALL} WHERE u.id >= :first_id AND u.id < :end_id) calls GROUP BY account_id, key_id, window_start) c
    CROSS JOIN LATERAL (
        SELECT max(w.start) AS begun FROM api_key k
        JOIN api_key x ON x.account_id = k.account_id AND x.id = ANY (array_append(k.ancestor_ids, k.id)),
             unnest(array_append(x.more_starts, x.window_start)) w (start)
        WHERE k.account_id = c.account_id AND k.id = c.key_id AND w.start <= c.window_start
    ) last
    GROUP BY account_id, key_id, last.begun RETURNING 1 AS kept"""


async def _refuse_late_refund(session: AsyncSession, span: Span) -> None:
    found = await row(
        session,
        f"""SELECT (SELECT coalesce(sum(refunded_nusd), 0) FROM usage_dropped WHERE month = :month) AS kept,
                   (SELECT coalesce(sum(amount_nusd), 0) FROM entry
                    WHERE kind = 'refund' AND contra = 'revenue:usage' AND created_at >= :month
                      AND CASE WHEN {is_call_id("reference")} THEN {day_of("reference")} END BETWEEN :month AND :last) AS refunded""",
        month=span.first, last=span.end - DAY,
    )  # fmt: skip
    assert found is not None
    if found["kept"] != found["refunded"]:
        raise InvalidField(f"a call of {span} was refunded just now: drop it again", param="month")


_FURTHER: Final = "d.served_model, d.provider, d.reasoning_tokens, d.known_requests, d.known_nusd, d.provider_nusd"
# A line that says nothing in the further columns is printed as it was before there were any: months were dropped then, too.
_PRINTED: Final = f"""concat_ws('|', d.account_id, to_char(d.day, 'YYYY-MM-DD'), d.key_id, d.model, d.requests, d.input_tokens,
                                 d.output_tokens, d.cost_nusd, d.refunded_nusd,
                                 CASE WHEN ({_FURTHER}) <> ('', '', 0, 0, 0, 0) THEN concat_ws('|', {_FURTHER}) END)"""
FINGERPRINT: Final = f"coalesce(sum(('x' || left(md5({_PRINTED}), 15))::bit(60)::bigint), 0)::text"
"""SQL: a number that is another one if any of these rows `d` of usage_day is; in any order, so that it needs no memory."""
