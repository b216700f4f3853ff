"""Which moment, day and month a call belongs to: its id says so, a UUIDv7, which begins with milliseconds since 1970.

The id decides for history, days and months alike, so that no call is in one month's partition and another month's sums.
"""

import contextlib
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final

from app.kernel.errors import InvalidField

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
DAY: Final = timedelta(days=1)
_MILLISECOND: Final = timedelta(milliseconds=1)
_MONTH: Final = re.compile(r"([12]\d{3})-(0[1-9]|1[0-2])", re.ASCII)
_DATE: Final = re.compile(r"[12]\d{3}-\d{2}-\d{2}", re.ASCII)


def moment_of(call_id: uuid.UUID) -> datetime:
    return EPOCH + (call_id.int >> 80) * _MILLISECOND


def first_id(moment: datetime) -> uuid.UUID:
    """The smallest id that a call of this moment or later can have; the smallest of all for what is before 1970."""
    return uuid.UUID(int=max(0, -((EPOCH - moment) // _MILLISECOND)) << 80)


def midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def read_month(text: str) -> date:
    """`2026-01` as its first day. Raises InvalidField."""
    match = _MONTH.fullmatch(text)
    if match is None:
        raise InvalidField(f"a month is given like 2026-01, got {text[:20]!r}", param="month")
    return date(int(match[1]), int(match[2]), 1)


def read_day(text: str) -> date:
    """`2026-01-31`. Raises InvalidField."""
    with contextlib.suppress(ValueError):
        if _DATE.fullmatch(text):
            return date.fromisoformat(text)
    raise InvalidField(f"a day is given like 2026-01-31, got {text[:20]!r}", param="day")


def month_after(month: date) -> date:
    return (month + 31 * DAY).replace(day=1)


@dataclass(frozen=True, slots=True)
class Span:
    """What is put away at once: a month of calls, or a day of them."""

    first: date
    is_day: bool = False

    def __str__(self) -> str:
        return f"{self.first:%Y-%m-%d}" if self.is_day else f"{self.first:%Y-%m}"

    @property
    def end(self) -> date:
        """The first day after it."""
        return self.first + DAY if self.is_day else month_after(self.first)

    def has(self, day: date) -> bool:
        return self.first <= day < self.end

    @property
    def ids(self) -> dict[str, uuid.UUID]:
        """The bounds of its calls' ids, as parameters."""
        return {"first_id": first_id(midnight(self.first)), "end_id": first_id(midnight(self.end))}


# --- the same in SQL ------------------------------------------------------------------------------


def day_of(call_id: str) -> str:
    """The UTC day of a call, from an expression that is its id (uuid or text)."""
    return f"(date '1970-01-01' + (('x' || translate(left({call_id}::text, 13), '-', ''))::bit(48)::bigint / 86400000)::int)"


def first_id_of(day: str) -> str:
    """The smallest id of a day, from an expression that is a date since 1970."""
    return f"rpad(lpad(to_hex(({day} - date '1970-01-01')::bigint * 86400000), 12, '0'), 32, '0')::uuid"


def is_call_id(text: str) -> str:
    """Whether an expression of type text looks like a call's id, so that day_of may read it."""
    return f"{text} ~ '^[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}$'"


def end_of(archive: str) -> str:
    """The first day after what an archive, an alias of usage_archive, has calls of."""
    return (
        f"(CASE WHEN {archive}.is_day THEN {archive}.month + 1 ELSE ({archive}.month + interval '1 month')::date END)"
    )


CALL: Final = """
    u.account_id, u.id, u.key_id, u.window_start, u.cost_nusd, coalesce(r.amount_nusd, 0) AS refunded_nusd
    FROM usage u LEFT JOIN entry r ON r.account_id = u.account_id AND r.kind = 'refund' AND r.reference = u.id::text
                                  AND r.contra = 'revenue:usage'"""
"""A call, and what was given back of its cost."""

MOST: Final = 2**63 - 1
"""What a column can hold."""
IS_DROPPED: Final = (
    "EXISTS (SELECT FROM usage_archive x WHERE x.dropped_at IS NOT NULL AND {day} >= x.month AND {day} < "
    + end_of("x")
    + ")"
)
