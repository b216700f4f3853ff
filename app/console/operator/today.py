"""*Today*: how the house stands, what came in and was earned, and whether everything runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from htpy import Node, a, div
from litestar import get
from litestar.di import NamedDependency

from app.admin.stats import Stats, stats
from app.admin.today import RECENT_DAYS, Job, Lately, lately
from app.audit.background import last_verdict
from app.audit.continuous import Figures
from app.audit.continuous import figures as continuous
from app.console.operator.acting import READ, acting, figures, line, pill, sheet
from app.console.operator.said import topup_state
from app.console.session import Operator
from app.console.shell import Frame, Page, card
from app.console.words import about, count, moment
from app.kernel.db import Database, Row
from app.kernel.errors import NotFound
from app.topups.gateway import Gateways
from app.topups.methods import METHODS

_DAYS = 14


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the payment backends answer, what works less well than it is set up to, and the audits' word on the books."""

    can_be_paid: bool
    troubles: Sequence[str]
    audit: Figures | None
    verdict: Row | None


@get("/operator")
async def today(
    operator: NamedDependency[Operator], frame: NamedDependency[Frame], db: NamedDependency[Database],
    gateways: NamedDependency[Gateways],
) -> Page:  # fmt: skip
    acting(operator, READ)
    now = datetime.now(UTC)
    found = await db.transaction(lambda session: stats(session, now.date() - timedelta(days=_DAYS - 1), now.date()))
    recent = await db.transaction(lambda session: lately(session, now))
    health = Health(
        await gateways.are_healthy(), gateways.troubles(), await db.transaction(continuous), await _verdict(db)
    )
    return frame.answer("Today", *today_page(found, recent, health), wide=True)


async def _verdict(db: Database) -> Row | None:
    try:
        return await db.transaction(last_verdict)
    except NotFound:
        return None


def today_page(found: Stats, recent: Lately, health: Health) -> Sequence[Node]:
    totals, last = found.totals, found.days[-1]
    return (
        *_alarms(recent, health),
        figures(
            "Since midnight, UTC",
            ("Received", about(last["received_nusd"]), "paid in by customers"),
            ("Revenue", about(last["charged_nusd"] - last["refunded_nusd"]), count(last["requests"], "call")),
            ("Calls now", f"{recent.calls_per_second:.1f} a second", "over the last minute"),
            ("Held", about(totals["held_nusd"]), f"{count(totals['holds_open'], 'open hold')}, {totals['holds_expired']:,} overdue"),
        ),
        figures(
            "What is owed, and what came in for it",
            ("Customers' balances", about(totals["liabilities_nusd"]), _covered(totals)),
            ("Received in all", about(totals["received_nusd"]), "top-ups, without bonuses"),
            ("Earned in all", about(totals["revenue_nusd"]), "calls less refunds"),
            ("Owed to you", about(totals["owed_nusd"]), "balances below zero"),
            ("Given", about(totals["bonus_nusd"] + totals["adjusted_nusd"]), "bonuses and adjustments"),
            ("Accounts", f"{totals['active']:,}", f"{totals['frozen']:,} frozen, {totals['closed']:,} closed"),
        ),
        div(class_="columns")[_topups(recent), _books(health)],
        card(_days(found.days), title="By day"),
        card(_jobs(recent.jobs), title="Jobs"),
    )  # fmt: skip


def _covered(totals: Row) -> str:
    """Liabilities against what was received."""
    if not totals["received_nusd"]:
        return "nothing was received yet"
    return f"{totals['liabilities_nusd'] * 1000 // totals['received_nusd'] / 10:.1f} % of what was received"


def _alarms(recent: Lately, health: Health) -> list[Node]:
    waiting = recent.to_review
    said: list[Node] = [
        waiting > 0 and div(class_="banner", role="status")[
            a(href="/operator/topups")[f"{count(waiting, 'top-up')} {'waits' if waiting == 1 else 'wait'} for your decision."]
        ],
        not health.can_be_paid and div(class_="problem", role="alert")[
            "A payment backend does not answer: top-ups cannot be made. Calls are metered all the same."
        ],
        health.audit is not None and health.audit.differences > 0 and div(class_="problem", role="alert")[
            a(href="/operator/audit")[f"The books differ in {count(health.audit.differences, 'place')}."]
        ],
        *(div(class_="banner")[trouble] for trouble in health.troubles),
    ]  # fmt: skip
    return said


def _topups(recent: Lately) -> Node:
    rows = [
        line(
            METHODS[each["method"]].display_name if each["method"] in METHODS else each["method"],
            topup_state(each | {"additional_status": "None"}), f"{each['count']:,}", about(each["credited_nusd"]), numbers="2 3",
        )
        for each in recent.topups
    ]  # fmt: skip
    none = f"No top-up was made in {RECENT_DAYS} days."
    return card(sheet("Method|State|#Top-ups|#Credited", rows, none), title=f"Top-ups of the last {RECENT_DAYS} days")


def _books(health: Health) -> Node:
    audit, verdict = health.audit, health.verdict
    rows = [
        line("Payment backends", pill("Answer", "good") if health.can_be_paid else pill("Do not answer", "bad")),
        line("Entries that are explained", _ratio(audit)),
        line("Differences found", _differences(audit)),
        line(
            "Last whole audit",
            "none yet" if verdict is None else [moment(verdict["finished_at"]), " ", _clean(verdict)],
        ),
    ]
    return card(sheet("What|How it stands", rows, ""), title="The books, and the backends")


def _ratio(audit: Figures | None) -> Node:
    if audit is None:
        return "not looked at yet"
    return pill(f"{audit.explained_ratio:.4%}", "good" if audit.explained_ratio == 1 else "bad")


def _differences(audit: Figures | None) -> Node:
    if audit is None:
        return "not looked at yet"
    return pill(f"{audit.differences:,}", "bad" if audit.differences else "good")


def _clean(verdict: Row) -> Node:
    return pill("Clean", "good") if verdict["report"]["is_clean"] else pill("Differs", "bad")


def _days(days: Sequence[Row]) -> Node:
    rows = [
        line(
            f"{day['day']:%a %d %b}", about(day["received_nusd"]), about(day["charged_nusd"] - day["refunded_nusd"]),
            about(day["bonus_nusd"] + day["adjusted_nusd"]), f"{day['requests']:,}", numbers="1 2 3 4",
        )
        for day in reversed(days)
    ]  # fmt: skip
    return sheet("Day, UTC|#Received|#Revenue|#Given|#Calls", rows, "")


def _jobs(jobs: Sequence[Job]) -> Node:
    rows = [
        line(
            job.name.capitalize(),
            _how(job),
            "–" if job.done_at is None else moment(job.done_at),
            _every(job.every_seconds),
        )
        for job in sorted(jobs, key=lambda job: (not job.is_failing, not job.is_late, job.name))
    ]
    return sheet("Job|How it goes|Done last|How often", rows, "No job has run yet: is `jobs` started?")


def _how(job: Job) -> Node:
    if job.is_failing:
        return pill("Failed last", "bad")
    return pill("Late", "wait") if job.is_late else pill("Runs", "good")


def _every(seconds: float) -> str:
    if not seconds:
        return "at start"
    if seconds < 60:
        return f"every {seconds:g} s"
    return f"every {seconds / 60:g} min" if seconds < 3600 else f"every {seconds / 3600:g} h"


handlers = (today,)
