"""How operators ask what was done, and how the house stands."""

import re
from datetime import UTC, date, datetime
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromQuery, QueryParameter

from app.admin.acts import acts, changed_by
from app.admin.stats import Stats, days_asked, stats
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField
from app.kernel.money import JsonNumber, usd, usd_or_null
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.security import Admin

_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
Since = Annotated[str | None, QueryParameter(name="from")]


class ActView(msgspec.Struct, frozen=True):
    """One act of an operator: who, what, to what, why, and what it changed. `cli:NAME` used the command line."""

    id: UUID
    created_at: datetime
    actor: str
    act: str
    target: str
    reason: str | None
    amount_usd: JsonNumber
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    request_id: str | None

    @classmethod
    def of(cls, act: Row) -> "ActView":
        before, after = changed_by(act)
        return cls(
            act["id"], act["created_at"], act["admin"], act["act"], act["subject"], act["reason"],
            usd_or_null(act["amount_nusd"]), before, after, act["request_id"],
        )  # fmt: skip


class ActsPage(msgspec.Struct, frozen=True):
    data: list[ActView]
    next_cursor: str | None


class DayStats(msgspec.Struct, frozen=True):
    """One UTC day, USD."""

    day: date
    received_usd: JsonNumber
    bonus_usd: JsonNumber
    adjusted_usd: JsonNumber
    revenue_usd: JsonNumber
    refunded_usd: JsonNumber
    requests: int


class StatsView(msgspec.Struct, frozen=True):
    """How the house stands, USD, and what each day brought."""

    liabilities_usd: JsonNumber
    owed_usd: JsonNumber
    held_usd: JsonNumber
    holds_open: int
    holds_expired: int
    received_usd: JsonNumber
    bonus_usd: JsonNumber
    adjusted_usd: JsonNumber
    revenue_usd: JsonNumber
    accounts: dict[str, int]
    days: list[DayStats]

    @classmethod
    def of(cls, found: Stats) -> "StatsView":
        money = ("liabilities", "owed", "held", "received", "bonus", "adjusted", "revenue")
        figures: dict[str, Any] = {f"{name}_usd": usd(found.totals[f"{name}_nusd"]) for name in money}
        counts = {name: found.totals[name] for name in ("holds_open", "holds_expired")}
        return cls(
            **figures,
            **counts,
            accounts={name: found.totals[name] for name in ("active", "frozen", "closed")},
            days=[_day(each) for each in found.days],
        )


def _day(each: Row) -> DayStats:
    earned = each["charged_nusd"] - each["refunded_nusd"]
    return DayStats(
        each["day"], usd(each["received_nusd"]), usd(each["bonus_nusd"]), usd(each["adjusted_nusd"]), usd(earned),
        usd(each["refunded_nusd"]), each["requests"],
    )  # fmt: skip


@get("/admin/audit-log", tags=["Admin"], summary="What operators did")
async def read_admin_log(
    admin: NamedDependency[Admin],
    db: NamedDependency[Database],
    actor: FromQuery[str | None] = None,
    act: FromQuery[str | None] = None,
    target: FromQuery[str | None] = None,
    limit: FromQuery[int] = DEFAULT_LIMIT,
    cursor: FromQuery[str | None] = None,
) -> ActsPage:
    """Newest first. `target` is an account's id, for everything that was done to it and what belongs to it, or another id
    as it stands in the log."""
    size, after = page_size(limit), from_cursor(cursor, tuple[UUID])
    wanted = {"admin": _line(actor, "actor"), "act": _line(act, "act"), "subject": _line(target, "target")}
    found = await db.transaction(lambda session: acts(session, size + 1, after[0] if after else None, **wanted))
    ended = to_cursor(found[size - 1]["id"]) if len(found) > size else None
    return ActsPage([ActView.of(each) for each in found[:size]], ended)


@get("/admin/stats", tags=["Admin"], summary="How the house stands")
async def read_stats(
    admin: NamedDependency[Admin],
    db: NamedDependency[Database],
    since: Since = None,
    to: FromQuery[str | None] = None,
) -> StatsView:
    """What is owed to customers, held, received and earned; and by UTC day, the last 30 if no days are asked for."""
    first, last = days_asked(_date(since, "from"), _date(to, "to"), datetime.now(UTC))
    return StatsView.of(await db.transaction(lambda session: stats(session, first, last)))


def _line(text: str | None, param: str) -> str | None:
    if text is not None and not (text.isprintable() and len(text) <= 300):
        raise InvalidField(f"{param} is a line of at most 300 characters", param=param)
    return text


def _date(text: str | None, param: str) -> date | None:
    try:
        if text is not None and not _DAY.fullmatch(text):  # ISO has other ways to name a day
            raise ValueError
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise InvalidField(f"{param} is a UTC day such as 2026-01-31", param=param) from None
