"""Activity: what was called, by day and model or key, as bars, as a table and as CSV; the question is in the address."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from htpy import Element, a, button, details, div, p, summary, table, tbody, td, tfoot, th, thead, tr
from htpy import form as form_
from htpy import input as input_
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.params import FromQuery
from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.daily import Days, daily
from app.activity.history import Calls, calls
from app.activity.spreadsheet import csv_text
from app.console.customer.home import call_table
from app.console.session import Customer
from app.console.shell import HEADERS, Frame, Page, card, choices, empty
from app.console.words import dollars
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField
from app.kernel.money import usd, usd_text
from app.kernel.pages import from_cursor, to_cursor
from app.keys.issue import list_keys
from app.keys.verify import require_scope

METRICS: Final = {"cost": "Cost", "calls": "Calls", "input": "Tokens in", "output": "Tokens out"}
GROUPS: Final = {"model": "Model", "key": "Key"}
PERIODS: Final = {"7": "7 days", "30": "30 days", "90": "90 days"}
_COLUMN: Final = {"calls": "requests", "input": "input_tokens", "output": "output_tokens"}
_MOST_LINES: Final = 20_000
_SHOWN_GROUPS: Final = 7
_CALLS: Final = 25
_OTHERS: Final = "others"


@dataclass(frozen=True, slots=True)
class Question:
    """What the page is asked for."""

    metric: str
    group: str
    days: int
    key_id: UUID | None = None

    @classmethod
    def of(cls, customer: Customer, metric: str, by: str, period: str, key_id: UUID | None) -> "Question":
        """Raises InvalidField for a word that is none of ours."""
        for name, word, known in (("metric", metric, METRICS), ("by", by, GROUPS), ("period", period, PERIODS)):
            if word not in known:
                raise InvalidField(f"{name} is one of {', '.join(known)}", param=name)
        return cls(metric, by, int(period), customer.caller.key_id or key_id)

    def address(self, path: str = "/console/activity", **more: str) -> str:
        asked = {"metric": self.metric, "by": self.group, "period": str(self.days)}
        return f"{path}?{urlencode(asked | ({'key': str(self.key_id)} if self.key_id else {}) | more)}"


@dataclass(frozen=True, slots=True)
class Sum:
    """The calls of one group."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_nusd: int = 0
    refunded_nusd: int = 0

    def and_(self, line: Row) -> "Sum":
        return Sum(
            self.calls + line["requests"], self.input_tokens + line["input_tokens"], self.output_tokens + line["output_tokens"],
            self.cost_nusd + line["cost_nusd"], self.refunded_nusd + line["refunded_nusd"],
        )  # fmt: skip


@get("/console/activity")
async def activity(
    customer: NamedDependency[Customer], frame: NamedDependency[Frame], db: NamedDependency[Database],
    metric: FromQuery[str] = "cost", by: FromQuery[str] = "model", period: FromQuery[str] = "30",
    key_id: FromQuery[UUID | None] = None, cursor: FromQuery[str | None] = None,
) -> Page:  # fmt: skip
    require_scope(customer.caller, "activity")
    question, after = Question.of(customer, metric, by, period, key_id), from_cursor(cursor, tuple[UUID])
    days = days_of(question, datetime.now(UTC).date())

    async def work(session: AsyncSession) -> tuple[Sequence[Row], Sequence[Row], Mapping[str, str]]:
        lines = await daily(session, customer.caller.account_id, _wanted(question, days), limit=_MOST_LINES)
        last = await calls(
            session,
            customer.caller.account_id,
            Calls(key_id=question.key_id),
            limit=_CALLS + 1,
            before=after[0] if after else None,
        )
        return lines, last, await _key_names(session, customer, question)

    lines, last, names = await db.transaction(work)
    following = to_cursor(last[_CALLS - 1]["id"]) if len(last) > _CALLS else None
    shown = () if after else (plot_card(lines, days, question, names), sums_card(lines, question, names))
    return frame.answer(
        "Activity", _asking(question, names), *shown, _calls_card(tuple(last[:_CALLS]), question, following),
        wide=True, scripts=("uplot.js",),
    )  # fmt: skip


@get("/console/activity.csv")
async def activity_csv(
    customer: NamedDependency[Customer], db: NamedDependency[Database], metric: FromQuery[str] = "cost",
    by: FromQuery[str] = "model", period: FromQuery[str] = "30", key_id: FromQuery[UUID | None] = None,
) -> Response[str]:  # fmt: skip
    """Every line of the table's days, exact."""
    require_scope(customer.caller, "activity")
    question = Question.of(customer, metric, by, period, key_id)
    wanted = _wanted(question, days_of(question, datetime.now(UTC).date()))
    lines = await db.transaction(lambda session: daily(session, customer.caller.account_id, wanted, limit=_MOST_LINES))
    names = ("day", "model", "api_key_id", "requests", "input_tokens", "output_tokens", "cost_usd", "refunded_usd")
    text = csv_text(names, ([
        str(line["day"]), line["model"], str(line["key_id"]), str(line["requests"]), str(line["input_tokens"]),
        str(line["output_tokens"]), usd_text(line["cost_nusd"]), usd_text(line["refunded_nusd"]),
    ] for line in lines))  # fmt: skip
    headers = HEADERS | {"Content-Disposition": 'attachment; filename="activity.csv"'}
    return Response(text, media_type="text/csv", headers=headers)


def days_of(question: Question, today: date) -> list[date]:
    return [today - timedelta(days=question.days - 1 - number) for number in range(question.days)]


def _wanted(question: Question, days: Sequence[date]) -> Days:
    return Days(first=days[0], last=days[-1], key_id=question.key_id)


async def _key_names(session: AsyncSession, customer: Customer, question: Question) -> Mapping[str, str]:
    """The names of keys by their ids, as far as the first hundred go; a key that looks sees its own calls alone."""
    if not customer.is_owner or (question.group != "key" and question.key_id is None):
        return {}
    found = await list_keys(session, customer.caller.account_id, 100, None, include_disabled=True)
    return {str(each["id"]): each["name"] for each in found}


def group_of(line: Row, question: Question, names: Mapping[str, str]) -> str:
    if question.group == "model":
        return line["model"] or "no model named"
    return names.get(str(line["key_id"]), str(line["key_id"])[:8])


def figure(sums: Sum, metric: str) -> int:
    """In nano-USD where it is money."""
    return {"cost": sums.cost_nusd, "calls": sums.calls, "input": sums.input_tokens, "output": sums.output_tokens}[
        metric
    ]


# --- the page ---------------------------------------------------------------------------------------


def _asking(question: Question, names: Mapping[str, str]) -> Element:
    return card(
        form_(method="get", action="/console/activity", data_submits=True)[
            div(class_="columns")[
                choices("Show", "metric", list(METRICS.items()), question.metric),
                choices("By", "by", list(GROUPS.items()), question.group),
                choices("Of the last", "period", list(PERIODS.items()), str(question.days)),
            ],
            question.key_id is not None and input_(type="hidden", name="key_id", value=str(question.key_id)),
            div(class_="acts")[
                button(class_="outline")["Show"],
                a(href=question.address("/console/activity.csv"), class_="button outline", download="activity.csv")["CSV"],
                question.key_id is not None and p(class_="quiet")[f"Of the key {names.get(str(question.key_id), str(question.key_id)[:8])} alone."],
            ],
        ]
    )  # fmt: skip


def plot_card(lines: Sequence[Row], days: Sequence[date], question: Question, names: Mapping[str, str]) -> Element:
    if not lines:
        return card(empty("No call in these days. What is called shows here within a moment.", a(href="/console/keys")["Make a key"]))  # fmt: skip
    plotted, called = plot_of(lines, days, question, names), {line["day"] for line in lines}
    return card(
        div(
            class_="plot", data_plot=msgspec.json.encode(plotted).decode(), role="img",
            aria_label=f"{METRICS[question.metric]} a day by {GROUPS[question.group].lower()}; the table below has the sums",
        ),
        p(class_="quiet")["Days are UTC days. A refund counts to the day of its call."],
        day_table(plotted, [number for number, day in enumerate(days) if day in called]),
    )  # fmt: skip


def day_table(plotted: Mapping[str, Any], called: Sequence[int]) -> Element:
    """What the plot shows where the mouse is, for whoever has none: the days that had calls, by number, the newest first."""
    series, unit = plotted["series"], plotted["unit"]
    return details[
        summary["Day by day"],
        div(class_="table", tabindex="0", role="region", aria_label="Day by day")[
            table[
                thead[tr[th["Day"], (th(class_="n")[each["name"]] for each in series)]],
                tbody[
                    (tr[td[plotted["labels"][number]], (td(class_="n")[_figure(each["values"][number], unit)] for each in series)]
                     for number in reversed(called))
                ],
            ]
        ],
    ]  # fmt: skip


def _figure(value: Any, unit: str) -> str:
    return f"{unit}{bytes(value).decode()}" if isinstance(value, msgspec.Raw) else f"{value:,}"


def plot_of(lines: Sequence[Row], days: Sequence[date], question: Question, names: Mapping[str, str]) -> dict[str, Any]:
    """The largest groups by day, and what the others have together; dollars as exact numbers."""
    per: defaultdict[str, dict[date, Sum]] = defaultdict(dict)
    for line in lines:
        per_day = per[group_of(line, question, names)]
        per_day[line["day"]] = per_day.get(line["day"], Sum()).and_(line)
    weight = {name: sum(figure(each, question.metric) for each in per_day.values()) for name, per_day in per.items()}
    ranked = sorted(per, key=lambda name: (-weight[name], name))
    shown = [(name, [name]) for name in ranked[:_SHOWN_GROUPS]]
    if len(ranked) > _SHOWN_GROUPS:
        shown.append((_OTHERS, ranked[_SHOWN_GROUPS:]))
    is_money = question.metric == "cost"

    def value(names: list[str], day: date) -> Any:
        total = sum(figure(per[name].get(day, Sum()), question.metric) for name in names)
        return usd(total) if is_money else total

    series = [{"name": name, "values": [value(members, day) for day in days]} for name, members in shown]
    return {"labels": [day.strftime("%d %b") for day in days], "unit": "$" if is_money else "", "series": series}


def sums_card(lines: Sequence[Row], question: Question, names: Mapping[str, str]) -> Element | None:
    if not lines:
        return None
    sums: dict[str, Sum] = {}
    for line in lines:
        name = group_of(line, question, names)
        sums[name] = sums.get(name, Sum()).and_(line)
    total = Sum()
    for line in lines:
        total = total.and_(line)
    ranked = sorted(sums, key=lambda name: (-figure(sums[name], question.metric), name))
    return card(
        div(class_="table", tabindex="0", role="region", aria_label="Sums")[
            table[
                thead[tr[th[GROUPS[question.group]], (th(class_="n")[words] for words in ("Calls", "Tokens in", "Tokens out", "Refunded", "Cost"))]],
                tbody[(tr[td[name], _cells(sums[name])] for name in ranked)],
                tfoot[tr[td["Together"], _cells(total)]],
            ]
        ],
        title=f"The last {PERIODS[str(question.days)]}",
    )  # fmt: skip


def _cells(sums: Sum) -> tuple[Element, ...]:
    texts = (
        f"{sums.calls:,}", f"{sums.input_tokens:,}", f"{sums.output_tokens:,}",
        dollars(sums.refunded_nusd) if sums.refunded_nusd else "–", dollars(sums.cost_nusd),
    )  # fmt: skip
    return tuple(td(class_="n")[text] for text in texts)


def _calls_card(found: tuple[Row, ...], question: Question, cursor: str | None) -> Element | None:
    if not found:
        return None
    return card(
        div(class_="table", tabindex="0", role="region", aria_label="Calls")[call_table(found)],
        cursor and p[a(href=question.address(cursor=cursor))["Older calls"]],
        title="Calls, newest first",
    )


handlers: Final = (activity, activity_csv)
