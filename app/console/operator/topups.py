"""*Top-ups*: what waits for a decision, the backend's word beside ours, and the buttons that are allowed."""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Final
from uuid import UUID

from htpy import Element, Node, a, code, dd, div, dl, dt, fieldset, label, legend, p, span
from htpy import input as input_
from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, QueryParameter
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin import topups
from app.admin.acts import clean_reason
from app.admin.topups import State
from app.console.forms import Form
from app.console.operator.accounts import Done
from app.console.operator.acting import READ, RECONCILE, RESOLVE, act, acting, because, line, may, more, pill, sheet
from app.console.operator.said import PAYMENT_STATES, topup_state
from app.console.session import Operator
from app.console.shell import HEADERS, SAID, Frame, Page, card, labelled, problem
from app.console.words import about, amount, coins, dollars, moment, shortened
from app.kernel.db import Database, Row
from app.kernel.errors import AppError, InvalidField, InvoiceNotFound
from app.kernel.money import parse_usd
from app.kernel.pages import from_cursor, to_cursor
from app.kernel.reading import uuid_in
from app.kernel.settings import Settings
from app.ledger.statement import balance
from app.topups.gateway import GatewayError, Gateways, Invoice
from app.topups.methods import METHODS
from app.topups.receipt import Receipt, rate_source, read_receipt, receipt_url, usd_rate
from app.topups.review import ref_of

SAID.update(
    {
        "reconciled": "The backend was asked, and what was paid is credited.",
        "resolved": "Decided. The same finding does not come back.",
    }
)
_AT_ONCE: Final = 50
InState = Annotated[str, QueryParameter(name="state")]
_STATES: Final[dict[State, str]] = {
    "review": "To decide", "unapplied": "Paid, not credited", "open": "Open", "settled": "Paid", "expired": "Expired",
    "invalid": "Invalid", "all": "All",
}  # fmt: skip
_WAITING: Final[State] = "review"
_NONE: Final[dict[State, str]] = {
    "review": "Nothing waits for a decision.",
    "unapplied": "Whatever was paid is credited.",
}


# --- doors ------------------------------------------------------------------------------------------


@get("/operator/topups")
async def queue(
    operator: NamedDependency[Operator], frame: NamedDependency[Frame], db: NamedDependency[Database],
    in_state: InState = "review", cursor: FromQuery[str | None] = None,
) -> Page:  # fmt: skip
    acting(operator, READ)
    chosen = next((each for each in topups.STATES if each == in_state), _WAITING)
    after = from_cursor(cursor, tuple[datetime, UUID])
    found = await db.transaction(lambda session: topups.list_by_state(session, chosen, _AT_ONCE + 1, after))
    return frame.answer("Top-ups", *queue_page(found, chosen), wide=True)


@get("/operator/topups/{topup_id:str}")
async def show(
    operator: NamedDependency[Operator], frame: NamedDependency[Frame], db: NamedDependency[Database],
    topup_id: FromPath[str],
) -> Page:  # fmt: skip
    acting(operator, READ)
    return await _shown(frame, operator, db, topup_id)


@get("/operator/topups/{topup_id:str}/backend")
async def ask_backend(
    request: Request[Any, Any, Any], operator: NamedDependency[Operator], frame: NamedDependency[Frame],
    db: NamedDependency[Database], gateways: NamedDependency[Gateways], topup_id: FromPath[str],
) -> Response[str]:  # fmt: skip
    """What the backend says now: a piece of the page, which need not wait for it. It is asked, and nothing is credited."""
    acting(operator, READ)
    found = await db.transaction(lambda session: _receipt(session, topup_id))
    gateway = gateways.named(found.topup["backend"])
    try:
        invoice = await gateway.fetch(found.topup["invoice_id"]) if gateway and found.topup["invoice_id"] else None
        said: Node = backend_table(invoice, found) if invoice else p["The backend does not know this invoice."]
    except GatewayError:
        said = p(class_="bad")["The backend does not answer now."]
    if "hx-request" not in request.headers:  # without scripts it is a page of its own
        back = p[a(href=f"/operator/topups/{found.topup['id']}")["Back to the top-up"]]
        return frame.answer("What the backend says now", card(said), back)
    return Response(str(div[said]), media_type="text/html", headers=dict(HEADERS))


@post("/operator/topups/{topup_id:str}/reconcile")
async def reconcile(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], gateways: NamedDependency[Gateways], settings: NamedDependency[Settings],
    topup_id: FromPath[str],
) -> Page:  # fmt: skip
    admin = acting(operator, RECONCILE)
    ref = await db.transaction(lambda session: ref_of(session, _topup_in(topup_id)))
    before: Row = {}

    async def admit() -> None:
        before.update(await topups.ask_backend(db, gateways, ref))

    async def effect(session: AsyncSession) -> Done:
        await topups.note_reconciled(session, settings.pepper, admin, ref, before)
        return Done()

    await form.once.do(Done, effect, admit=admit)
    return frame.see(f"/operator/topups/{ref.topup_id}", "reconciled")


@post("/operator/topups/{topup_id:str}/resolve")
async def resolve(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings], topup_id: FromPath[str],
) -> Page:  # fmt: skip
    """Dismiss at once; money is moved after its page of before and after."""
    admin = acting(operator, RESOLVE)
    try:
        action = next((each for each in topups.ACTIONS if each == form.text("action")), None)
        if action is None:
            raise InvalidField("Say what is to be done.", param="action")
        amount_nusd = (
            parse_usd(form.number("amount_usd"), "amount_usd")
            if form.has("amount_usd") and action != "dismiss"
            else None
        )
        reason, finding = clean_reason(form.text("reason")), uuid_in(form.text("finding_id"))
        if action != "dismiss" and not form.has("confirmed"):
            topups.refuse_odd(action, amount_nusd)
            receipt = await db.transaction(lambda session: _receipt(session, topup_id))
            stands = await db.transaction(lambda session: balance(session, receipt.topup["account_id"]))
            asked = {
                "action": action,
                "amount_usd": form.text("amount_usd"),
                "reason": reason,
                "finding_id": form.text("finding_id"),
            }
            moved_nusd = (amount_nusd or 0) * (1 if action == "credit" else -1)
            return frame.answer("Is this right?", confirm_page(frame, receipt, stands.posted_nusd, moved_nusd, asked))

        async def effect(session: AsyncSession) -> Done:
            ref = await ref_of(session, _topup_in(topup_id))
            await topups.decide(session, settings.pepper, admin, ref, action, amount_nusd, reason, finding)
            return Done()

        await form.once.do(Done, effect)
    except InvalidField as error:
        return await _shown(frame, operator, db, topup_id, error)
    return frame.see(f"/operator/topups/{_topup_in(topup_id)}", "resolved")


async def _shown(frame: Frame, operator: Operator, db: Database, text: str, error: AppError | None = None) -> Page:
    found = await db.transaction(lambda session: _receipt(session, text))
    page = topup_page(frame, operator, found, error)
    return frame.answer("Top-up", *page, wide=True, status=200 if error is None else error.status)


async def _receipt(session: AsyncSession, text: str) -> Receipt:
    """Raises InvoiceNotFound."""
    ref = await ref_of(session, _topup_in(text))
    return await read_receipt(session, ref.account_id, ref.topup_id)


def _topup_in(text: str) -> UUID:
    found = uuid_in(text)
    if found is None:
        raise InvoiceNotFound
    return found


# --- pages ------------------------------------------------------------------------------------------


def queue_page(found: Sequence[Row], state: State) -> Sequence[Node]:
    tabs = [
        a(href=f"/operator/topups?state={each}", aria_current="page" if each == state else None)[words]
        for each, words in _STATES.items()
    ]
    rows: list[Node] = [
        line(
            a(href=f"/operator/topups/{each['id']}")[METHODS[each["method"]].display_name], amount(each["amount_units"], each["currency"]),
            topup_state(each), about(each["credited_nusd"]), each["review"] or "–",
            a(href=f"/operator/accounts/{each['account_id']}", class_="mono")[shortened(str(each["account_id"]), 6)],
            moment(each["created_at"]), numbers="1 3",
        )
        for each in found[:_AT_ONCE]
    ]  # fmt: skip
    last = found[_AT_ONCE - 1] if len(found) > _AT_ONCE else None
    return (
        div(class_="tabs")[tabs],
        card(sheet("Method|#Asked|State|#Credited|Why it waits|Account|Made", rows, _NONE.get(state, "There is none."))),
        last is not None and more(f"/operator/topups?state={state}&cursor={to_cursor(last['created_at'], last['id'])}", "Further"),
    )  # fmt: skip


def topup_page(frame: Frame, operator: Operator, found: Receipt, error: AppError | None) -> Sequence[Node]:
    topup = found.topup
    there = f"/operator/topups/{topup['id']}"
    return (
        error is not None and problem(error),
        topup["review"] is not None and div(class_="banner", role="status")[p["It waits for your decision: ", topup["review"], "."]],
        div(class_="columns")[
            card(_quote(frame, found), title="Our quote and our books"),
            card(
                div(hx_get=f"{there}/backend", hx_trigger="load", hx_swap="innerHTML")[
                    p["What we heard last, ", "never" if topup["checked_at"] is None else moment(topup["checked_at"]), ": ", topup_state(topup)],
                    a(href=f"{there}/backend")["What does it say now?"],
                ],
                title="The backend's invoice, now",
            ),
        ],
        card(_payments(found), title="Payments"),
        div(class_="columns")[
            may(operator, RESOLVE) and topup["review"] is not None and _deciding(frame, there, topup),
            may(operator, RECONCILE) and card(
                p(class_="quiet")["Asks the backend, and credits what was paid and is not credited yet."],
                act(frame, f"{there}/reconcile", "Ask the backend now"),
                title="Ask again",
            ),
        ],
        p[a(href=f"/operator/audit?target={topup['account_id']}/{topup['id']}")["What operators did to it"]],
    )  # fmt: skip


def _quote(frame: Frame, found: Receipt) -> Node:
    topup, coin, rate = found.topup, found.method.coin, usd_rate(found.topup)
    facts: tuple[tuple[str, Node], ...] = (
        ("Asked", f"{amount(topup['amount_units'], topup['currency'])} by {found.method.display_name}"),
        ("That is", coins(found.asked_units, coin)),
        ("Rate", "none" if rate is None else f"1 {coin} = ${rate}, by {rate_source(topup)}"),
        ("Received", coins(found.received_units, coin)),
        ("Credited", dollars(found.credited_nusd)),
        ("Bonus", dollars(found.bonus_nusd)),
        ("Decided before", topup["reviewed"] or "nothing"),
        ("Account", a(href=f"/operator/accounts/{topup['account_id']}", class_="mono")[str(topup["account_id"])]),
        ("Made", moment(topup["created_at"])),
        ("Ends", moment(topup["expires_at"])),
        ("Receipt", a(href=receipt_url(frame.settings, topup["account_id"], topup["id"]))["as its payer sees it"]),
    )
    return dl(class_="facts")[((dt[name], dd[value]) for name, value in facts)]


def backend_table(invoice: Invoice, found: Receipt) -> Element:
    """The backend's word, and where it differs from what we asked for."""
    topup, coin = found.topup, found.method.coin
    state = topup_state({"status": invoice.status.value, "additional_status": invoice.additional_status.value})
    asked = f"{_plain(invoice.amount)} {invoice.currency}"
    facts: tuple[tuple[str, Node], ...] = (
        ("State", state),
        ("Invoice", code[invoice.id]),
        ("Asked", asked),
        ("That is", f"{_plain(invoice.total)} {coin}"),
        ("Rate", f"1 {coin} = {_plain(invoice.rate)} {invoice.currency}"),
        ("Paid, confirmed or not", f"{_plain(invoice.paid)} {coin}"),
        ("Still due", f"{_plain(max(invoice.due, Decimal(0)))} {coin}"),
        ("Network fee", f"{_plain(invoice.fee)} {coin}"),
        ("Payments", f"{len(invoice.payments)}"),
        ("Order", pill("Ours", "good") if invoice.order_id == str(topup["id"]) else pill("Another's", "bad")),
        ("Ends", moment(invoice.expires_at)),
        ("Its page", a(href=invoice.checkout_url, rel="noreferrer")["at the backend"] if invoice.checkout_url.startswith(("http://", "https://")) else "none"),
    )  # fmt: skip
    return dl(class_="facts")[((dt[name], dd[value]) for name, value in facts)]


def _plain(figure: Decimal) -> str:
    return f"{figure.normalize():f}" if figure else "0"


def _payments(found: Receipt) -> Node:
    coin = found.method.coin
    rows: list[Node] = [
        line(
            code[each.id], pill(*PAYMENT_STATES[each.status]), coins(each.value_units, coin), coins(each.fee_units, coin),
            dollars(each.worth_nusd) if each.worth_nusd else "–", "late" if each.is_late else "in time", moment(each.received_at),
            numbers="2 3 4",
        )
        for each in found.arrived
    ]  # fmt: skip
    return sheet("Payment|State|#Value|#Fee|#Worth|Came|When", rows, "Nothing was paid, as far as we heard.")


def _deciding(frame: Frame, there: str, topup: Row) -> Node:
    choices = (("dismiss", "What was credited is right"), ("credit", "Credit more"), ("debit", "Take back"))
    return card(
        act(
            frame, f"{there}/resolve", "Decide",
            fieldset(class_="chips")[
                legend["What is right?"],
                (label[input_(type="radio", name="action", value=value, checked=value == "dismiss"), span[words]] for value, words in choices),
            ],
            labelled("Amount, USD", input_(name="amount_usd", inputmode="decimal", maxlength="22"), "To credit or to take back; nothing otherwise."),
            because(),
            look="", finding_id=str(topup["finding_id"] or ""),
        ),
        title="Decide",
    )  # fmt: skip


def confirm_page(frame: Frame, found: Receipt, balance_nusd: int, moved_nusd: int, asked: dict[str, str]) -> Node:
    """What a decision would move: nothing has happened yet."""
    there = f"/operator/topups/{found.topup['id']}"
    facts: tuple[tuple[str, Node], ...] = (
        ("Finding", found.topup["review"] or "none"),
        ("Credit" if moved_nusd > 0 else "Take back", dollars(abs(moved_nusd))),
        ("Balance before", dollars(balance_nusd)),
        ("Balance after", dollars(balance_nusd + moved_nusd)),
        ("Reason", asked["reason"]),
    )
    return card(
        dl(class_="facts")[((dt[name], dd[value]) for name, value in facts)],
        div(class_="acts")[
            act(frame, f"{there}/resolve", "Do it", look="" if moved_nusd > 0 else "danger", confirmed="yes", **asked),
            a(href=there, class_="button outline small")["Leave it"],
        ],
    )


handlers = (queue, show, ask_backend, reconcile, resolve)
