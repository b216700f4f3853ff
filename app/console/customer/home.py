"""Home: what is there, how long it lasts, what a month burns, and what was charged last."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from htpy import Element, Node, a, dd, div, dl, dt, p, small, table, tbody, td, th, thead, tr
from litestar import get
from litestar.di import NamedDependency
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.runway import Runway, read_runway
from app.activity.calendar import moment_of
from app.activity.daily import Days, spent_by_key
from app.activity.history import Calls, calls
from app.console.customer.topup import amount_form, first_offered
from app.console.session import Customer
from app.console.shell import Frame, Page, card, empty
from app.console.words import about, count, dollars, moment
from app.kernel.db import Database, Row
from app.ledger.statement import Balance, balance
from app.topups.gateway import Gateways

BURN_DAYS: Final = 30
_LAST: Final = 8


@dataclass(frozen=True, slots=True)
class Standing:
    """What Home shows; None where the key that looks may not see it."""

    figures: Balance | None = None
    lasts: Runway | None = None
    burn_nusd: int | None = None
    last: tuple[Row, ...] | None = None


@get("/console")
async def home(
    customer: NamedDependency[Customer], frame: NamedDependency[Frame], db: NamedDependency[Database],
    gateways: NamedDependency[Gateways],
) -> Page:  # fmt: skip
    found = await db.transaction(lambda session: read_standing(session, customer, datetime.now(UTC)))
    return frame.answer("Home", *home_page(found, customer, frame, gateways))


async def read_standing(session: AsyncSession, customer: Customer, now: datetime) -> Standing:
    account_id, key_id = customer.caller.account_id, customer.caller.key_id
    figures = lasts = burn = last = None
    if customer.may("balance"):
        figures = await balance(session, account_id)
        lasts = await read_runway(session, account_id, figures, now)
    if customer.may("activity"):
        days = Days(first=now.date() - timedelta(days=BURN_DAYS - 1), key_id=key_id)
        spent = await spent_by_key(session, account_id, days)
        burn = sum(sum(each.values()) for each in spent.values())
        last = tuple(await calls(session, account_id, Calls(key_id=key_id), limit=_LAST))
    return Standing(figures, lasts, burn, last)


def home_page(found: Standing, customer: Customer, frame: Frame, gateways: Gateways) -> tuple[Element | None, ...]:
    return _low(found, customer, frame, gateways), _figures(found), _last_calls(found)


def _low(found: Standing, customer: Customer, frame: Frame, gateways: Gateways) -> Element | None:
    """What to do where a call may soon be refused."""
    if found.figures is None or found.lasts is None or not customer.may("topup"):
        return None
    tenths = found.lasts.tenths_of_days
    is_empty, is_low = (
        found.figures.available_nusd == 0,
        bool(found.lasts.is_low) or (tenths is not None and tenths < 20),
    )
    if not (is_empty or is_low):
        return None
    said = "There is nothing to spend: calls are refused until you top up." if is_empty else "The balance is low."
    return card(
        div(class_="banner")[p[said]],
        amount_form(frame, first_offered(gateways)),
        p[a(href="/console/topup")["Other ways to pay"]],
    )


def _figures(found: Standing) -> Element:
    shown: list[tuple[str, Node, Node]] = []
    if found.figures is not None:
        shown.append(("Balance", about(found.figures.posted_nusd), "on your account"))
        shown.append(("Held by calls in flight", about(found.figures.held_nusd), [about(found.figures.available_nusd), " may be spent now"]))  # fmt: skip
    if found.lasts is not None:
        shown.append(("Runway", _runway(found.lasts), "at the pace of the last 7 days"))
    if found.burn_nusd is not None:
        shown.append((f"Last {BURN_DAYS} days", about(found.burn_nusd), "spent, less refunds"))
    if not shown:
        return empty(
            "This key may see neither the balance nor activity: sign in with the credit id, or with another key."
        )
    return card(dl(class_="figures")[(div(class_="figure")[dt[name], dd[value, small[hint]]] for name, value, hint in shown)])  # fmt: skip


def _runway(lasts: Runway) -> str:
    if lasts.tenths_of_days is None:
        return "–"
    days = lasts.tenths_of_days // 10
    return count(days, "day") if days else "less than a day"


def _last_calls(found: Standing) -> Element | None:
    if found.last is None:
        return None
    if not found.last:
        return card(
            empty("No call yet. Make a key, call a model with it, and what it cost stands here.", a(href="/console/keys")["Keys"]),
            title="Last charges",
        )  # fmt: skip
    return card(
        div(class_="table", tabindex="0", role="region", aria_label="Last charges")[call_table(found.last)],
        p[a(href="/console/activity")["All activity"]],
        title="Last charges",
    )


def call_table(found: tuple[Row, ...]) -> Element:
    """Calls with what they used and cost; each leads to the page that explains its charge."""
    return table[
        thead[
            tr[
                th["When"],
                th["Model"],
                th(class_="n")["Tokens in"],
                th(class_="n")["Tokens out"],
                th(class_="n")["Cost"],
            ]
        ],
        tbody[(_call(call) for call in found)],
    ]


def _call(call: Row) -> Element:
    units = call["units"] or {}
    return tr[
        td[moment(moment_of(call["id"]))],
        td[call["model"] or "–"],
        td(class_="n")[f"{units.get('input_tokens') or 0:,}"],
        td(class_="n")[f"{units.get('output_tokens') or 0:,}"],
        td(class_="n")[a(href=f"/console/charges/{call['id']}")[dollars(call["cost_nusd"])]],
    ]


handlers: Final = (home,)
