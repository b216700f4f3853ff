"""A top-up in a person's words: what to pay and how, what has come, what was credited for it. Shared by every page that shows one."""

import io
from datetime import UTC, datetime
from typing import Final

import segno
from htpy import Element, a, button, code, dd, div, dl, dt, img, p, small, span

from app.console.words import amount, coins, dollars, moment
from app.kernel.db import Row
from app.kernel.money import decimal_text
from app.topups.methods import METHODS
from app.topups.receipt import Receipt

OVER: Final = frozenset({"Settled", "Expired", "Invalid", "Failed"})
"""The backend's words after which nothing is waited for, though a late payment is credited."""


def is_over(topup: Row) -> bool:
    """Whether there is nothing to wait for: settled and credited, or run out."""
    return topup["status"] in OVER and (topup["status"] != "Settled" or topup["credited_nusd"] > 0)


def is_payable(topup: Row, now: datetime | None = None) -> bool:
    return bool(topup["status"] == "New" and topup["destination"] and topup["expires_at"] > (now or datetime.now(UTC)))


def coin_of(topup: Row) -> str:
    return METHODS[topup["method"]].coin


def state_of(topup: Row) -> tuple[str, str]:
    """Where it stands, in a few words, and whether that is good, waited for or bad."""
    paid, status, extra = topup["paid_coin_units"] or 0, topup["status"], topup["additional_status"]
    if status == "Settled":
        return "Paid", "good"
    if status == "Processing":
        return "Seen, not yet confirmed", "wait"
    if status in ("New", "Creating"):
        if paid:
            return "Partly paid", "wait"
        return ("Waiting for payment", "wait") if topup["expires_at"] > datetime.now(UTC) else ("Time is up", "")
    if topup["credited_nusd"]:
        return ("Paid late" if extra == "PaidLate" else "Partly paid, credited"), "good"
    if paid:
        return "Paid late" if extra == "PaidLate" else "Partly paid", "wait"
    return ("Not paid in time", "") if status == "Expired" else ("Not completed", "bad")


def pill(topup: Row) -> Element:
    words, kind = state_of(topup)
    return span(class_=f"pill {kind}".strip())[words]


def story(topup: Row) -> str:
    """What happened, and what comes next, as a sentence or two."""
    coin, paid = coin_of(topup), topup["paid_coin_units"] or 0
    due, total = topup["due_coin_units"] or 0, topup["total_coin_units"] or 0
    credited = dollars(topup["credited_nusd"] + topup["bonus_nusd"])
    if topup["credited_nusd"]:
        return f"{credited} was added to your balance."
    if topup["status"] == "Settled":
        return "Paid. It is being credited now."
    if topup["status"] == "Processing":
        return f"{coins(paid or total, coin)} has been seen. It is credited once the network has confirmed it."
    if paid and due > 0 and topup["status"] == "New":
        return f"Part of it has arrived: {coins(paid, coin)} of {coins(total, coin)}; {coins(due, coin)} to go."
    if paid:
        return (
            f"{coins(paid, coin)} of {coins(total, coin)} has arrived. What arrives is credited once it is confirmed."
        )
    if is_payable(topup):
        return "Nothing has arrived yet. This page notices by itself when it does."
    if topup["status"] == "Creating":
        return "The payment backend is being asked for an invoice."
    return "Nothing arrived in time. Make a new one; if you paid all the same, it is credited when it arrives."


def pay_link(topup: Row) -> str:
    """What opens a wallet."""
    return str(topup["payment_link"] or topup["destination"])


def bip321(topup: Row) -> str:
    """What the QR code says: one `bitcoin:` address for Lightning too (BIP-321), the other coins' own addresses as they are."""
    if METHODS[topup["method"]].is_lightning:
        return f"BITCOIN:?LIGHTNING={str(topup['destination']).upper()}"  # capitals take half the space
    return pay_link(topup)


def qr_svg(topup: Row) -> bytes:
    """The QR code as a file: black on white also at night, when cameras are no better."""
    out = io.BytesIO()
    made = segno.make(bip321(topup), error="m", micro=False)
    made.save(out, kind="svg", scale=4, border=2, light="#fff", xmldecl=False, nl=False)
    return out.getvalue()


def to_pay(topup: Row, qr_url: str) -> Element:
    """The QR code, and the same for whoever cannot scan it."""
    method, coin = METHODS[topup["method"]], coin_of(topup)
    what = "Lightning invoice" if method.is_lightning else "address"
    units = topup["due_coin_units"] or topup["total_coin_units"] or 0
    due = coins(units, coin)
    return div(class_="pay")[
        img(src=qr_url, class_="qr", width="320", height="320", alt=f"QR code: pay {due} with {method.display_name}"),
        div[
            p(class_="quiet")["Pay exactly"],
            p(class_="due")[due, method.is_lightning and small[f"{decimal_text(units, 3)} sats"]],
            p(class_="quiet")[f"for {amount(topup['amount_units'], topup['currency'])}", _bonus(topup)],
            p["Time left: ", moment(topup["expires_at"], counts_down=True)],
            div(class_="acts")[
                a(href=pay_link(topup), class_="button")["Open in wallet"],
                button(type="button", class_="outline", data_copy=topup["destination"])[f"Copy {what}"],
                not method.is_lightning and button(type="button", class_="outline", data_copy=due.split()[0])["Copy amount"],
            ],
            p[code[topup["destination"]]],
            p(class_="quiet")["A late payment is credited too, and so is a part of it."],
        ],
    ]  # fmt: skip


def facts(receipt: Receipt) -> Element:
    """What was asked, what came, and what it became, in lines."""
    topup, coin = receipt.topup, coin_of(receipt.topup)
    lines: list[tuple[str, Element | str | tuple[Element | str, ...]]] = [
        (
            "Asked for",
            f"{amount(topup['amount_units'], topup['currency'])} with {METHODS[topup['method']].display_name}",
        ),
        ("Made", moment(topup["created_at"])),
    ]
    for each in receipt.payments:
        words = "confirmed" if each["status"] == "Settled" else "not yet confirmed"
        lines.append(("Payment", (f"{coins(each['value_coin_units'], coin)}, {words}, ", moment(each["received_at"]))))
    if topup["credited_nusd"]:
        lines.append(("Credited", dollars(topup["credited_nusd"])))
    if topup["bonus_nusd"]:
        lines.append((f"Bonus, {topup['bonus_percent']} %", dollars(topup["bonus_nusd"])))
    return dl(class_="facts")[((dt[name], dd[value]) for name, value in lines)]


def _bonus(topup: Row) -> Element | str:
    return small[f", and {topup['bonus_percent']} % on top"] if topup["bonus_percent"] else ""
