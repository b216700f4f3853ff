"""*Audit*: whether the books add up, what operators did, and what was exported."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

import msgspec
from htpy import Node, a, button, code, dd, div, dl, dt, p, section
from htpy import form as form_
from htpy import input as input_
from litestar import Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery

from app.activity.archive import exported
from app.activity.spreadsheet import csv_text
from app.admin.acts import acts, changed_by
from app.audit.background import Audits, last_verdict, running_audit
from app.audit.continuous import Figures
from app.audit.continuous import figures as continuous
from app.console.forms import Form
from app.console.operator.acting import AUDIT, LOG, act, acting, line, more, pill, sheet
from app.console.session import Operator
from app.console.shell import HEADERS, SAID, Frame, Page, card, labelled
from app.console.words import count, dollars, moment
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField, NotFound
from app.kernel.money import usd_text
from app.kernel.reading import uuid_in

SAID.update({"audit-began": "The audit runs. Load this page again in a moment for its verdict."})
_AT_ONCE: Final = 50
_EXPORTED: Final = 10_000
_COLUMNS: Final = ("created_at", "actor", "act", "target", "reason", "amount_usd", "before", "after", "request_id")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which acts are asked for: of whom, what, to what."""

    admin: str | None = None
    act: str | None = None
    subject: str | None = None

    @property
    def query(self) -> str:
        asked = {"actor": self.admin, "what": self.act, "target": self.subject}
        return urlencode({name: value for name, value in asked.items() if value})

    def as_filters(self) -> dict[str, str | None]:
        return {"admin": self.admin, "act": self.act, "subject": self.subject}


# --- doors ------------------------------------------------------------------------------------------


@get("/operator/audit")
async def audit(
    operator: NamedDependency[Operator], frame: NamedDependency[Frame], db: NamedDependency[Database],
    actor: FromQuery[str] = "", what: FromQuery[str] = "", target: FromQuery[str] = "", before: FromQuery[str] = "",
) -> Page:  # fmt: skip
    acting(operator, LOG)
    wanted = _wanted(actor, what, target)
    found = await db.transaction(lambda session: acts(session, _AT_ONCE + 1, uuid_in(before), **wanted.as_filters()))
    verdict, figures = await _verdict(db), await db.transaction(continuous)
    running, exported_months = await db.transaction(running_audit), await db.transaction(exported)
    page = audit_page(frame, verdict, figures, running, found, wanted, exported_months)
    return frame.answer("Audit", *page, wide=True)


@post("/operator/audit/start")
async def start(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    audits: NamedDependency[Audits],
) -> Page:  # fmt: skip
    """In the background, unless one runs already. It changes nothing."""
    await audits.start(acting(operator, AUDIT))
    return frame.see("/operator/audit", "audit-began")


@get("/operator/audit/log.csv")
async def export(
    operator: NamedDependency[Operator], db: NamedDependency[Database], actor: FromQuery[str] = "",
    what: FromQuery[str] = "", target: FromQuery[str] = "",
) -> Response[str]:  # fmt: skip
    """What operators did, newest first, for a spreadsheet."""
    acting(operator, LOG)
    wanted = _wanted(actor, what, target)
    found = await db.transaction(lambda session: acts(session, _EXPORTED, None, **wanted.as_filters()))
    headers = HEADERS | {"Content-Disposition": 'attachment; filename="operators-log.csv"'}
    return Response(csv_text(_COLUMNS, map(_cells, found)), media_type="text/csv", headers=headers)


def _cells(each: Row) -> Sequence[str | None]:
    amount = None if each["amount_nusd"] is None else usd_text(each["amount_nusd"])
    when = each["created_at"].isoformat()
    return (
        when,
        each["admin"],
        each["act"],
        each["subject"],
        each["reason"],
        amount,
        each["before"],
        each["after"],
        each["request_id"],
    )


def _wanted(actor: str, what: str, target: str) -> Wanted:
    """Raises InvalidField."""
    for text in (actor, what, target):
        if not text.isprintable() or len(text) > 300:
            raise InvalidField("What is looked for is a line of at most 300 characters.", param="target")
    return Wanted(actor.strip() or None, what.strip() or None, target.strip() or None)


async def _verdict(db: Database) -> Row | None:
    try:
        return await db.transaction(last_verdict)
    except NotFound:
        return None


# --- pages ------------------------------------------------------------------------------------------


def audit_page(
    frame: Frame, verdict: Row | None, figures: Figures | None, running: Row | None, found: Sequence[Row], wanted: Wanted,
    exported_months: Sequence[Row],
) -> Sequence[Node]:  # fmt: skip
    last = found[_AT_ONCE - 1] if len(found) > _AT_ONCE else None
    return (
        div(class_="columns")[_whole(frame, verdict, running), _always(figures)],
        verdict is not None and verdict["report"]["findings"] and card(_findings(verdict), title="What differs"),
        card(_filters(wanted), _log(found[:_AT_ONCE]), title="What operators did"),
        last is not None and more(f"/operator/audit?{wanted.query}&before={last['id']}"),
        card(_months(exported_months), title="Exports"),
    )


def _whole(frame: Frame, verdict: Row | None, running: Row | None) -> Node:
    start = act(frame, "/operator/audit/start", "Audit the books now")
    if verdict is None:
        told: Node = p["No audit has come to its end yet."]
    else:
        report = verdict["report"]
        told = p[
            pill("Clean", "good") if report["is_clean"] else pill(count(len(report["findings"]), "difference"), "bad"),
            f" {report['checks']:,} checks over {count(report['accounts'], 'account')} and {report['entries']:,} entries, ended ",
            moment(verdict["finished_at"]), f", asked for by {verdict['admin']}.",
        ]  # fmt: skip
    runs = running is not None and p(class_="wait")["One runs since ", moment(running["started_at"]), "."]
    return card(told, runs or start, title="The last whole audit")


def _always(figures: Figures | None) -> Node:
    if figures is None:
        return card(p["It has not looked yet."], title="The audit that never ends")
    facts: tuple[tuple[str, Node], ...] = (
        ("Entries that are explained", pill(f"{figures.explained_ratio:.4%}", "good" if figures.explained_ratio == 1 else "bad")),
        ("Differences", pill(f"{figures.differences:,}", "bad" if figures.differences else "good")),
        ("Oldest that is not explained", f"{figures.oldest_unexplained_seconds:,.0f} s"),
    )  # fmt: skip
    return card(dl(class_="facts")[((dt[name], dd[value]) for name, value in facts)], title="The audit that never ends")


def _findings(verdict: Row) -> Node:
    rows: list[Node] = [
        line(
            each["check"].replace("_", " "), code[each["subject"]], each["recorded"], each["recomputed"], numbers="2 3"
        )
        for each in verdict["report"]["findings"]
    ]
    return sheet("Check|Of|#The books say|#It should be", rows, "")


def _filters(wanted: Wanted) -> Node:
    def field(name: str, value: str | None) -> Node:
        return input_(name=name, value=value or "", maxlength="300", autocomplete="off", spellcheck="false")

    return form_(method="get", action="/operator/audit")[
        div(class_="row")[
            labelled("Who", field("actor", wanted.admin)), labelled("Act", field("what", wanted.act), "Such as account.credit."),
            labelled("To what", field("target", wanted.subject), "An account's id, and what belongs to it."),
        ],
        div(class_="acts")[
            button(class_="outline small")["Show"],
            a(href=f"/operator/audit/log.csv?{wanted.query}", class_="button outline small")["As CSV"],
        ],
    ]  # fmt: skip


def _log(found: Sequence[Row]) -> Node:
    rows: list[Node] = [
        line(
            moment(each["created_at"]), each["admin"], each["act"], _target(each["subject"]), each["reason"] or "–",
            "–" if each["amount_nusd"] is None else dollars(each["amount_nusd"]), _changed(each), numbers="5",
        )
        for each in found
    ]  # fmt: skip
    return sheet(
        "When|Who|Act|To what|Reason|#Amount|What it changed", rows, "Nobody did that.", label="What operators did"
    )


def _target(subject: str) -> Node:
    account = uuid_in(subject[:36])
    return a(href=f"/operator/accounts/{account}", class_="mono")[subject] if account else code[subject]


def _changed(each: Row) -> Node:
    before, after = changed_by(each)
    names = [*(before or {}), *(name for name in after or {} if name not in (before or {}))]
    return section[
        (
            p(class_="quiet")[
                f"{name.replace('_', ' ')}: {_said((before or {}).get(name))} → {_said((after or {}).get(name))}"
            ]
            for name in names
        )
    ]


def _said(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _span(exported: Row) -> str:
    first = exported["month"]
    return f"{first.day} {first:%B %Y}" if exported["is_day"] else f"{first:%B %Y}"


def _months(exported_months: Sequence[Row]) -> Node:
    rows: list[Node] = [
        line(
            _span(each), f"{each['calls']:,}", dollars(each["cost_nusd"]), moment(each["exported_at"]),
            "kept" if each["dropped_at"] is None else moment(each["dropped_at"]), code[each["sha256"][:16]], numbers="1 2",
        )
        for each in exported_months
    ]  # fmt: skip
    none = (
        "No month was exported yet. `satmeter usage export --month MONTH --out FILE` writes a month's calls to a file."
    )
    return sheet("Month|#Calls|#Cost|Exported|Dropped|SHA-256 of the file", rows, none)


handlers = (audit, start, export)
