"""Auto top-up: a wallet of the customer's own that refills the balance, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec
from htpy import (
    Element,
    button,
    dd,
    details,
    div,
    dl,
    dt,
    p,
    span,
    summary,
    table,
    tbody,
    td,
    textarea,
    th,
    thead,
    tr,
)  # fmt: skip
from htpy import (
    form as form_,
)
from htpy import (
    input as input_,
)
from litestar import get, post
from litestar.di import NamedDependency
from sqlalchemy.ext.asyncio import AsyncSession

from app.autotopup import connect as connections
from app.autotopup.api import CONNECTS_PER_HOUR, SWITCHED_OFF, ConnectRequest, wish_of
from app.autotopup.attempts import list_attempts, standing
from app.autotopup.rules import PAUSES, REASONS, next_attempt_at
from app.autotopup.run import LIGHTNING
from app.autotopup.wallet import Wallets, hosts
from app.autotopup.watch import Watcher
from app.console.door import require_owner
from app.console.forms import Form
from app.console.session import Customer
from app.console.shell import SAID, Frame, Page, card, empty, labelled, problem
from app.console.words import dollars, moment, shortened
from app.kernel.db import Database, Row
from app.kernel.errors import AppError
from app.kernel.ratelimit import count_or_refuse
from app.kernel.reading import read as read_json
from app.kernel.settings import Settings
from app.topups.gateway import Gateways
from app.topups.methods import method_named

SAID.update(
    {
        "wallet-connected": "The wallet is connected. It refills the balance whenever that falls below your threshold.",
        "wallet-gone": "The wallet is disconnected, and its secret forgotten.",
    }
)
_ATTEMPTS: Final = 20
_STATES: Final = {
    "created": ("Beginning", "wait"), "invoiced": ("About to ask", "wait"), "sent": ("Asked", "wait"),
    "paid_reported": ("The wallet says it paid", "wait"), "unknown": ("No clear answer yet", "wait"),
    "rejected": ("Refused", "bad"), "settled": ("Paid", "good"), "expired": ("Not paid", "bad"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shown:
    """A connection, if there is one, and its attempts."""

    connection: Row | None
    attempts: Sequence[Row]
    next_at: datetime | None


class Connected(msgspec.Struct, frozen=True):
    """That a form connected a wallet; nothing of it."""

    done: bool = True


@get("/console/autotopup")
async def show(
    customer: NamedDependency[Customer], frame: NamedDependency[Frame], db: NamedDependency[Database],
    settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    if not customer.is_owner:
        return frame.answer("Auto top-up", card(empty("This needs the credit id: sign out, and in with it.")))
    found = await db.transaction(lambda session: read_shown(session, customer))
    return frame.answer("Auto top-up", *autotopup_page(found, frame, settings))


@post("/console/autotopup")
async def connect(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], wallets: NamedDependency[Wallets], gateways: NamedDependency[Gateways],
    watcher: NamedDependency[Watcher], settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    """Ask the wallet what it is, and keep it. Sent twice it is asked once."""
    require_owner(customer)
    account_id = customer.caller.account_id
    try:
        method_named(LIGHTNING.id, gateways.methods)
        asked = _asked(form)
        wish, uri = wish_of(asked), wallets.parse(asked.nwc_url)
        if await form.once.claim(Connected) is None:
            try:
                await count_or_refuse(db, f"nwc/{account_id}", CONNECTS_PER_HOUR)
                with connections.alone(account_id):
                    probed = await connections.probe(wallets, uri)

                async def store(session: AsyncSession) -> None:
                    await connections.connect(
                        session, settings.sealer, account_id, uri, probed, wish, datetime.now(UTC)
                    )
                    await form.once.save(session, Connected())

                await db.transaction(store)
            except BaseException:
                await form.once.abandon()
                raise
    except AppError as error:
        found = await db.transaction(lambda session: read_shown(session, customer))
        return frame.answer("Auto top-up", problem(error), *autotopup_page(found, frame, settings, form), status=error.status)  # fmt: skip
    watcher.forget(account_id)
    watcher.notice(account_id)  # the balance may be low already
    return frame.see("/console/autotopup", "wallet-connected")


@post("/console/autotopup/disconnect")
async def disconnect(
    customer: NamedDependency[Customer],
    form: NamedDependency[Form],
    frame: NamedDependency[Frame],
    db: NamedDependency[Database],
) -> Page:
    require_owner(customer)
    await db.transaction(lambda session: connections.disconnect(session, customer.caller.account_id))
    return frame.see("/console/autotopup", "wallet-gone")


async def read_shown(session: AsyncSession, customer: Customer) -> Shown:
    account_id, now = customer.caller.account_id, datetime.now(UTC)
    connection = await connections.find(session, account_id)
    attempts = await list_attempts(session, account_id, _ATTEMPTS, None)
    next_at = next_attempt_at(connection, await standing(session, account_id, now), now) if connection else None
    return Shown(connection, attempts, next_at)


def _asked(form: Form) -> ConnectRequest:
    wanted = {
        "nwc_url": form.text("nwc_url"),
        **{name: form.number(name) for name in ("threshold_usd", "topup_amount_usd", "max_per_day_usd")},
    }
    return read_json(msgspec.json.encode(wanted), ConnectRequest)  # type: ignore[no-any-return]


# --- the page ---------------------------------------------------------------------------------------


def autotopup_page(
    found: Shown, frame: Frame, settings: Settings, form: Form | None = None
) -> tuple[Element | None, ...]:
    if found.connection is None:
        return _connect_card(frame, form, is_first=True), _attempts_card(found.attempts)
    return (
        _connection_card(found.connection, found.next_at, frame, settings),
        _attempts_card(found.attempts),
        _connect_card(frame, form, is_first=False),
    )


def _connection_card(one: Row, next_at: datetime | None, frame: Frame, settings: Settings) -> Element:
    pause = PAUSES.get(one["pause"] or "") or (None if settings.nwc_auto_topup else SWITCHED_OFF)
    told: list[tuple[str, Element | str]] = [
        ("State", span(class_="pill wait")["Paused"] if pause else span(class_="pill good")["Active"]),
        ("Tops up", f"{dollars(one['topup_amount_nusd'])} whenever the balance is below {dollars(one['threshold_nusd'])}"),
        ("At most in 24 hours", dollars(one["max_per_day_nusd"]) if one["max_per_day_nusd"] is not None else "no cap of yours"),
        ("Next attempt", moment(next_at) if next_at and not pause else "as soon as the balance is low"),
        ("Wallet", one["lud16"] or shortened(one["wallet_pubkey"])),
        ("Over", ", ".join(hosts(one["relays"]))),
        ("Connected", moment(one["created_at"])),
    ]  # fmt: skip
    return card(
        pause and div(class_="banner")[p[pause]],
        dl(class_="facts")[((dt[name], dd[value]) for name, value in told if not (pause and name == "Next attempt"))],
        details[
            summary["Disconnect…"],
            p["The wallet is asked for nothing any more. What it was asked to pay already is still credited."],
            form_(method="post", action="/console/autotopup/disconnect")[frame.guard(), button(class_="danger")["Disconnect"]],
        ],
    )  # fmt: skip


def _connect_card(frame: Frame, form: Form | None, *, is_first: bool) -> Element:
    def kept(name: str, default: str) -> str:
        return form.text(name) if form is not None else default

    fields = form_(method="post", action="/console/autotopup")[
        frame.guard(),
        labelled(
            "Wallet connection",
            textarea(name="nwc_url", rows="3", required=True, autocomplete="off", spellcheck="false", maxlength="4000", placeholder="nostr+walletconnect://…", class_="mono"),
            "In your wallet: Nostr Wallet Connect, a new connection that may pay invoices and look them up, with a budget.",
        ),
        div(class_="acts")[input_(type="file", accept="image/*", capture="environment", data_scan="nwc_url", hidden=True, aria_label="A picture of the connection's QR code")],
        div(class_="row")[
            labelled("Top up below, in USD", input_(name="threshold_usd", value=kept("threshold_usd", "10"), inputmode="decimal", required=True), "5 at least"),
            labelled("By, in USD", input_(name="topup_amount_usd", value=kept("topup_amount_usd", "10"), inputmode="decimal", required=True)),
            labelled("At most in 24 hours, in USD", input_(name="max_per_day_usd", value=kept("max_per_day_usd", ""), inputmode="decimal"), "empty: no cap of yours"),
        ],
        button["Connect"],
    ]  # fmt: skip
    if is_first:
        return card(p["Connect a Lightning wallet, and the balance refills itself before it runs out."], fields)
    return card(details(open=form is not None)[summary["Connect another wallet, or with other figures"], fields])


def _attempts_card(found: Sequence[Row]) -> Element | None:
    if not found:
        return card(
            empty("No attempt yet. The first is made when the balance is below your threshold."), title="Attempts"
        )
    return card(
        div(class_="table", tabindex="0", role="region", aria_label="Attempts")[
            table[
                thead[tr[th["When"], th(class_="n")["Amount"], th["State"], th["Why"], th(class_="n")["Credited"]]],
                tbody[(_attempt(one) for one in found)],
            ]
        ],
        title="Attempts",
    )


def _attempt(one: Row) -> Element:
    words, kind = _STATES[one["state"]]
    return tr[
        td[moment(one["created_at"])],
        td(class_="n")[dollars(one["amount_nusd"])],
        td[span(class_=f"pill {kind}")[words]],
        td[REASONS.get(one["reason"] or "", ""), f" ({one['code']})" if one["code"] else ""],
        td(class_="n")[dollars(one["credited_nusd"]) if one["credited_nusd"] else "–"],
    ]


handlers: Final = (show, connect, disconnect)
