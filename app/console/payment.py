"""A payment as every page draws it: what is asked, paid and to go, by whom, its fee, bonus and total, and the ways to pay it.

The receipt's page and the customer's own are this one drawing at two addresses; each has its picture and its stream beneath.
"""

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import segno
from htpy import (
    Element,
    Node,
    a,
    button,
    code,
    dd,
    div,
    dl,
    dt,
    img,
    p,
    section,
    small,
    span,
    table,
    tbody,
    td,
    tfoot,
    th,
    thead,
    tr,
)

from app.console.shell import card
from app.console.words import amount, coins, count, dollars, moment
from app.kernel.db import Row
from app.kernel.settings import Settings
from app.topups.receipt import Arrived, Receipt, Stage, rate_source, usd_rate

_LOOKS_SECONDS: Final = 1.0
_STREAM_SECONDS: Final = 300
"""How long one stream is open: a browser that still looks asks for the next one."""
_BEAT_SECONDS: Final = 15
"""A word that says nothing, so that no proxy takes the stream for dead."""
_ROUNDING_NUSD: Final = 10_000_000
"""A cent: rounding is always less."""
_BLOCK_MINUTES: Final = {"BTC": 10.0, "LTC": 2.5, "LBTC": 1.0, "XMR": 2.0}
_MONERO_CONFIRMATIONS: Final = 10
"""Before that no wallet can spend it, and its plugin waits as long where its store says so."""


def title(found: Receipt) -> str:
    return f"{found.method.display_name} top-up of {amount(found.topup['amount_units'], found.topup['currency'])}"


def payment_page(settings: Settings, found: Receipt, place: str) -> Sequence[Node]:
    """The whole of it at its address, `place`: what changes comes by a stream while somebody looks."""
    there = {"hx-sse:connect": f"{place}/live?seen={mark_of(found)}", "hx-sse:close": "over", "hx-swap": "innerHTML"}
    return (
        settings.uses_sandbox and div(class_="banner")["Sandbox: no real money. Do not send coins."],
        div(there if found.is_watched else {}, id="receipt", aria_live="polite")[as_it_stands(settings, found, place)],
        card(_facts(settings, found), title="About it"),
    )


def as_it_stands(settings: Settings, found: Receipt, place: str) -> Sequence[Node]:
    """The part that changes: how it stands, what is to be paid, what came, and the sum."""
    return (
        section(class_="card")[p(class_=f"stage {_look(found.stage)}", role="status")[headline(found)], (p(class_="quiet")[each] for each in _further(found))],
        found.is_open and _to_pay(settings, found, place),
        found.payments and card(_payments(found), title="Payments"),
        found.total_nusd > 0 and card(_sum(found), title="What was added to the balance"),
    )  # fmt: skip


def _look(stage: Stage) -> str:
    looks = {
        Stage.PAID: "good",
        Stage.EXPIRED: "bad",
        Stage.PARTLY_EXPIRED: "bad",
        Stage.INVALID: "bad",
        Stage.FAILED: "bad",
    }
    return looks.get(stage, "wait")


def headline(found: Receipt) -> str:
    """How it stands, in a sentence."""
    coin = found.method.coin
    match found.stage:
        case Stage.PREPARED:
            return "The invoice is being made."
        case Stage.OPEN:
            return "Waiting for your payment."
        case Stage.PARTLY:
            return f"Part of it has arrived: {_of(found)}; {coins(found.to_go_units, coin)} to go."
        case Stage.CONFIRMING:
            return f"{coins(found.received_units, coin)} has arrived, and waits for {confirmations(found)}."
        case Stage.PAID if found.topup["additional_status"] == "PaidOver":
            return "Paid. More came than was asked: all of it is credited."
        case Stage.PAID if found.credited_nusd:
            return "Paid late, and credited. Thank you." if _is_late(found) else "Paid. Thank you."
        case Stage.PAID:
            return "It was marked as paid. What really came is credited."
        case Stage.EXPIRED:
            return "Its time is over, and nothing has arrived."
        case Stage.PARTLY_EXPIRED if found.to_go_units:
            return f"Its time is over. Part of it has arrived: {_of(found)}."
        case Stage.PARTLY_EXPIRED:
            return "It was paid after its time was over."
        case Stage.INVALID:
            return "What was paid was not confirmed, and does not count."
        case Stage.FAILED:
            return "No invoice could be made: there is nothing to pay."


def _of(found: Receipt) -> str:
    """0.00015385 of 0.00038562 BTC"""
    received = coins(found.received_units, found.method.coin).partition(" ")[0]
    return f"{received} of {coins(found.asked_units, found.method.coin)}"


def _is_late(found: Receipt) -> bool:
    return any(each.is_late for each in found.arrived)


def _further(found: Receipt) -> list[Node]:
    """What follows from it, and what to do."""
    topup = found.topup
    said: list[Node] = []
    if found.total_nusd > 0:
        said.append(f"{dollars(found.total_nusd)} was added to the balance.")
    if found.stage in (Stage.PARTLY_EXPIRED, Stage.INVALID, Stage.PAID) and topup["review"] is not None:
        said.append("A person is looking at it.")
    if found.stage is Stage.PARTLY_EXPIRED and found.credited_nusd == 0:
        said.append(f"It is credited once it has {confirmations(found)}.")
    if found.stage is Stage.PARTLY_EXPIRED and _is_late(found):
        said.append(
            "A late payment is credited for what it is worth, at the lower of the rate then and the rate when it came."
        )
    if found.is_open and not found.method.is_lightning:
        said.append("A late payment is credited too, for what it is worth then. So is a part of it, or more.")
    if found.is_open and found.method.is_lightning:
        said.append("It is on your balance a second after you paid.")
    if found.stage is Stage.EXPIRED:
        late = (
            ""
            if found.method.is_lightning
            else " What was sent to its address all the same is credited when it arrives."
        )
        said.append([a(href="/console/topup")["Make a new top-up"], f" if you still want to pay.{late}"])
    return said


def confirmations(found: Receipt) -> str:
    """1 confirmation, which takes about 10 minutes"""
    if found.method.is_lightning:
        return "its confirmation"
    needed = _MONERO_CONFIRMATIONS if found.method.coin == "XMR" else found.confirmations
    minutes = needed * _BLOCK_MINUTES[found.method.coin]
    return f"{count(needed, 'confirmation')}, about {minutes:g} {'minute' if minutes == 1 else 'minutes'}"


def _to_pay(settings: Settings, found: Receipt, place: str) -> Node:
    """The code, the figures, and the ways to get them into a wallet."""
    topup, coin, link = found.topup, found.method.coin, link_of(found)
    what = "Lightning invoice" if found.method.is_lightning else f"{found.method.display_name} address"
    due = coins(found.to_go_units, coin)
    return section(class_="card pay")[
        img(src=f"{place}/qr.svg?of={mark_of(found)}", alt=f"QR code: pay {due}", class_="qr", width="320", height="320"),
        div[
            p(class_="quiet")["Send exactly"],
            p(class_="due")[due, _in_sats(found)],
            p(class_="quiet")["for ", amount(topup["amount_units"], topup["currency"]), topup["bonus_percent"] > 0 and f", and {topup['bonus_percent']} % on top"],
            div(class_="acts")[
                a(href=link, class_="button")["Open in a wallet"],
                _copy(due.partition(" ")[0], "Copy the amount"),
            ],
            p(class_="quiet")[f"{what}"],
            p[code(class_="where")[topup["destination"]]],
            div(class_="acts")[_copy(topup["destination"], f"Copy the {'invoice' if found.method.is_lightning else 'address'}")],
            (topup["fee_coin_units"] or 0) > 0 and p(class_="quiet")[f"Includes a network fee of {coins(topup['fee_coin_units'], coin)}."],
            p["Time left: ", moment(topup["expires_at"], counts_down=True)],
            _elsewhere(settings, found),
        ],
    ]  # fmt: skip


def _in_sats(found: Receipt) -> Node:
    if not found.method.is_lightning:
        return None
    whole, rest = divmod(found.to_go_units, 1000)
    return small[f" {whole:,}{f'.{rest:03}' if rest else ''} sats"]


def _copy(text: str, words: str) -> Element:
    return button(type="button", class_="outline small", data_copy=text)[words]


def _elsewhere(settings: Settings, found: Receipt) -> Node:
    url = str(found.topup["checkout_url"] or "")
    if not url.startswith(("http://", "https://")):
        return None
    words = "Pretend to pay it, in the sandbox" if settings.uses_sandbox else "Pay at the payment backend's own page"
    return p(class_="noprint")[a(href=url, rel="noreferrer")[words]]


def _payments(found: Receipt) -> Node:
    coin = found.method.coin
    rows = [
        tr[
            td[code[each.id], p(class_="quiet")[moment(each.received_at), ", late" if each.is_late else ""]],
            td[_state(found, each)],
            td(class_="n")[coins(each.value_units, coin)],
        ]
        for each in found.arrived
    ]
    heads = ("Transaction" if not found.method.is_lightning else "Payment hash", "Confirmations", "Value")
    return div(class_="table stack", tabindex="0", role="region", aria_label="Payments")[
        table[
            thead[tr[(th(scope="col", class_="n" if name == "Value" else None)[name] for name in heads)]],
            tbody[rows],
            len(rows) > 1 and tfoot[tr[td(colspan="2")["Received"], td(class_="n")[coins(found.received_units, coin)]]],
        ]
    ]


def _state(found: Receipt, each: Arrived) -> str:
    match each.status:
        case "Settled":
            return "paid" if found.method.is_lightning else "confirmed"
        case "Processing":
            return f"waits for {confirmations(found)}"
        case _:
            return "did not confirm: it was replaced"


def _sum(found: Receipt) -> Node:
    """Payments less fees, rounding, bonus: down to the total, to the nano-dollar."""
    coin = found.method.coin
    lines: list[tuple[Node, int | None, int]] = [
        (["Payment ", code[each.id[:12]], "…", ", late, at the lower rate" if each.is_late else ""], each.value_units, each.gross_nusd)
        for each in found.arrived if each.worth_nusd
    ]  # fmt: skip
    fee_units = sum(each.fee_units for each in found.arrived if each.worth_nusd)
    if fee_units:
        lines.append(
            ("Network fee" if fee_units > 0 else "Rounding of the invoice, in your favour", -fee_units, -found.fee_nusd)
        )
    if found.rounding_nusd:
        lines.append((_beside(found.rounding_nusd), None, found.rounding_nusd))
    credited_units = sum(each.value_units - each.fee_units for each in found.arrived if each.worth_nusd)
    if len(lines) > 1 or found.bonus_nusd:
        lines.append(("Credited", credited_units, found.credited_nusd))
    if found.bonus_nusd:
        lines.append((f"Bonus, {found.topup['bonus_percent']} %", None, found.bonus_nusd))
    body = [
        tr[td[name], td(class_="n")["" if units is None else _signed(units, coin)], td(class_="n")[dollars(nusd)]]
        for name, units, nusd in lines
    ]
    return div(class_="table", tabindex="0", role="region", aria_label="What was added to the balance")[
        table[
            tbody[body],
            tfoot[tr[td(colspan="2")["Added to the balance"], td(class_="n total")[dollars(found.total_nusd)]]],
        ]
    ]


def _beside(nusd: int) -> str:
    """What was credited beside the payments' worth, in a word."""
    return "Rounding: a coin cannot be split finely enough" if abs(nusd) < _ROUNDING_NUSD else "Credited beside them"


def _signed(units: int, coin: str) -> str:
    return coins(units, coin) if units >= 0 else f"−{coins(-units, coin)}"


def _facts(settings: Settings, found: Receipt) -> Node:
    topup, coin, rate = found.topup, found.method.coin, usd_rate(found.topup)
    by: Node = a(href=settings.service_url)[settings.service_name] if settings.service_url else settings.service_name
    facts: tuple[tuple[str, Node], ...] = (
        ("Paid to", by),
        ("For", "calls to models, prepaid"),
        ("Asked", amount(topup["amount_units"], topup["currency"])),
        ("That is", coins(found.asked_units, coin) if found.asked_units else "not known yet"),
        ("Rate", "not known yet" if rate is None else f"1 {coin} = ${rate}, by {rate_source(topup)}"),
        ("Number", code[topup["invoice_id"] or str(topup["id"])]),
        ("Made", moment(topup["created_at"])),
    )
    return dl(class_="facts")[((dt[name], dd[value]) for name, value in facts)]


# --- what comes live --------------------------------------------------------------------------------


async def changes(
    read: Callable[[], Awaitable[Receipt]], settings: Settings, departure: Any, place: str, seen: str
) -> AsyncIterator[str]:
    """The page's middle, again whenever it is another than `seen`, until nothing can happen any more. `read` may end it by raising."""
    for turn in range(int(_STREAM_SECONDS / _LOOKS_SECONDS)):
        found = await read()
        if (mark := mark_of(found)) != seen:
            seen = mark
            yield _event(str(div[as_it_stands(settings, found, place)]), id=mark)
        if not found.is_watched:
            yield _event("over", event="over")
            return
        if departure.is_near():
            return
        if turn and turn % _BEAT_SECONDS == 0:
            yield ": still here\n\n"
        await asyncio.sleep(_LOOKS_SECONDS)


def _event(data: str, **fields: str) -> str:
    """Source: HTML Standard, "Server-sent events": a line of data begins with its name, and an empty line ends it."""
    lines = [*(f"{name}: {value}" for name, value in fields.items()), *(f"data: {line}" for line in data.split("\n"))]
    return "\n".join(lines) + "\n\n"


def mark_of(found: Receipt) -> str:
    """Another one whenever the page would look otherwise."""
    payments = [(each.id, each.status, each.value_units, each.worth_nusd) for each in found.arrived]
    told = (found.stage, found.topup["destination"], found.to_go_units, found.credited_nusd, found.bonus_nusd, payments)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


# --- the picture ------------------------------------------------------------------------------------


def link_of(found: Receipt) -> str:
    """What a wallet opens: a BIP 321 address with its amount, or a Lightning invoice."""
    return str(found.topup["payment_link"] or found.topup["destination"] or "")


def qr_svg(found: Receipt) -> bytes:
    """The QR code as an SVG file, black on white also at night, when cameras are no better.

    Lightning is said as BIP 321 says it, in upper case, which takes half the space and means the same.
    """
    is_lightning = found.method.is_lightning
    text = f"BITCOIN:?LIGHTNING={str(found.topup['destination']).upper()}" if is_lightning else link_of(found)
    made = io.BytesIO()
    drawn = segno.make(text, error="m", micro=False)
    drawn.save(made, kind="svg", border=2, omitsize=True, dark="#12161c", light="#fff", xmldecl=False, nl=False)
    return made.getvalue()


# --- in a line of a list ----------------------------------------------------------------------------


def pill(topup: Row) -> Element:
    """Where it stands, in a few words."""
    paid, status = topup["paid_coin_units"] or 0, topup["status"]
    is_late = topup["additional_status"] == "PaidLate"
    if status == "Settled":
        return _pill("Paid", "good")
    if status == "Processing":
        return _pill("Seen, not yet confirmed", "wait")
    if topup["credited_nusd"]:
        return _pill("Paid late" if is_late else "Partly paid, credited", "good")
    if paid:
        return _pill("Paid late" if is_late else "Partly paid", "wait")
    if status in ("New", "Creating"):
        return _pill("Waiting for payment", "wait")
    return _pill("Not paid in time", "") if status == "Expired" else _pill("Not completed", "bad")


def _pill(words: str, look: str) -> Element:
    return span(class_=f"pill {look}".strip())[words]
