"""Charge: why a call cost what it did, line by line to the nano-dollar."""

from fractions import Fraction
from typing import Final

from htpy import Element, a, code, dd, div, dl, dt, p, table, tbody, td, tfoot, th, thead, tr
from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromPath

from app.activity.calendar import moment_of
from app.activity.explain import PPM, Explained, Line, explain
from app.console.session import Customer
from app.console.shell import Frame, Page, card
from app.console.words import dollars, moment
from app.kernel.db import Database
from app.kernel.money import decimal_text
from app.keys.verify import require_scope

_NAMES: Final = {
    "input": "Tokens in", "input_tokens": "Tokens in", "output": "Tokens out", "output_tokens": "Tokens out",
    "cache_read": "Tokens read from the cache", "cache_write": "Tokens written to the cache", "reasoning": "Reasoning tokens",
    "given": "The whole call, as its proxy priced it", "held": "What was held, since no usage was told", "images": "Images",
    "audio_seconds": "Seconds of audio", "video_seconds": "Seconds of video", "characters": "Characters",
}  # fmt: skip


@get("/console/charges/{charge_id:str}")
async def charge(
    customer: NamedDependency[Customer],
    frame: NamedDependency[Frame],
    db: NamedDependency[Database],
    charge_id: FromPath[str],
) -> Page:
    require_scope(customer.caller, "activity")
    found = await db.transaction(lambda session: explain(session, customer.caller.account_id, charge_id))
    return frame.answer("A charge", *charge_page(found))


def charge_page(found: Explained) -> tuple[Element, ...]:
    one = found.charge
    told = [
        ("When", moment(moment_of(one["id"]))),
        ("Model", one["model"] or "–"),
        ("Served by", " · ".join(filter(None, (one["provider"], one["served_model"]))) or "–"),
        (
            "Price list",
            f"version {one['price_version']}" if one["price_version"] is not None else "none: it came priced",
        ),
        ("Id", code[str(one["id"])]),
    ]
    return (
        card(dl(class_="facts")[((dt[name], dd[value]) for name, value in told)]),
        _lines_card(found),
        _books_card(found),
    )


def _lines_card(found: Explained) -> Element:
    return card(
        div(class_="table", tabindex="0", role="region", aria_label="Price lines")[
            table[
                thead[tr[th["For"], th(class_="n")["Quantity"], th(class_="n")["Price"], th(class_="n")["Markup"], th(class_="n")["Amount"]]],
                tbody[(_line(line) for line in found.lines)],
                tfoot[
                    _sum("Exactly", found.exact_ausd),
                    _sum("Rounded up once, to the nano-dollar", found.rounding_ausd),
                    tr[td(colspan="4")["Charged"], td(class_="n")[dollars(found.charge["cost_nusd"])]],
                ],
            ]
        ],
        title="Price lines",
    )  # fmt: skip


def _line(line: Line) -> Element:
    per = f" / {line.per_units:,}" if line.per_units != 1 else ""
    return tr[
        td[_NAMES.get(line.name, line.name.replace("_", " "))],
        td(class_="n")[f"{line.units:,}"],
        td(class_="n")[f"${decimal_text(line.price_pusd, 12)}{per}"],
        td(class_="n")["–" if line.markup_ppm == PPM else f"× {decimal_text(line.markup_ppm, 6)}"],
        td(class_="n")[_exact(line.amount_ausd)],
    ]


def _sum(words: str, amount_ausd: Fraction) -> Element:
    return tr[td(colspan="4")[words], td(class_="n")[_exact(amount_ausd)]]


def _exact(amount_ausd: Fraction) -> str:
    return f"${decimal_text(round(amount_ausd), 18)}"


def _books_card(found: Explained) -> Element:
    one = found.charge
    told = [("Held", dollars(one["held_nusd"]))] if one["held_nusd"] else []
    told.append(("Charged", dollars(one["cost_nusd"])))
    if one["refunded_nusd"]:
        told += [
            ("Refunded", dollars(one["refunded_nusd"])),
            ("It cost you", dollars(one["cost_nusd"] - one["refunded_nusd"])),
        ]
    flags = [flag.replace("_", " ") for flag in one["flags"].split(",") if flag]
    if flags:
        told.append(("Assumed", ", ".join(flags)))
    return card(
        dl(class_="facts")[((dt[name], dd[value]) for name, value in told)],
        p(class_="quiet")["While a call runs, the most that it may cost is held; when it is done, what it used is charged and the rest let go."],
        p[a(href="/console/activity")["All activity"]],
        title="In the books",
    )  # fmt: skip


handlers: Final = (charge,)
