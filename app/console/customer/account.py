"""Account: another credit id, the way back, who is told what, what can be taken along, and how it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from htpy import (
    Element,
    a,
    button,
    dd,
    details,
    div,
    dl,
    dt,
    fieldset,
    legend,
    li,
    p,
    span,
    summary,
    table,
    tbody,
    td,
    th,
    thead,
    tr,
    ul,
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

from app.accounts.accounts import close, rotate_credit_id
from app.accounts.recovery import events, make_code, ways_back
from app.console.door import require_owner
from app.console.forms import Form
from app.console.session import Customer, Session, end_cookie, set_cookie
from app.console.shell import SAID, Frame, Page, card, empty, labelled, problem
from app.console.signing import download, secret
from app.console.words import dollars, moment
from app.kernel.db import Database, Row
from app.kernel.errors import AppError, InvalidCreditId, InvalidField
from app.kernel.ratelimit import count_or_refuse
from app.kernel.reading import read
from app.kernel.security import Kind
from app.kernel.settings import Settings
from app.keys.issue import Keyring
from app.keys.verify import hold_still
from app.notices import address, outbox
from app.notices.api import CHANGES_PER_HOUR, TESTS_PER_HOUR, NoticesRequest, TestNotice, send_one, wish_of
from app.notices.tell import EVENTS
from app.notices.ways import Messages, Webhooks

SAID.update(
    {
        "closed": "The account is closed. Its books are kept; nothing opens it any more.",
        "notices-kept": "That is where notices go from now on.",
        "notices-gone": "Nothing is told any more.",
        "test-sent": "A test is on its way; what became of it stands below.",
    }
)
_DELIVERIES: Final = 10
_EVENT_WORDS: Final = {
    "balance.low": "the balance is low", "balance.empty": "nothing is left", "topup.settled": "a top-up is paid",
    "topup.late": "a top-up is paid late", "topup.partial": "a top-up is paid in part",
    "autotopup.refused": "the wallet refused", "autotopup.paused": "auto top-up is paused",
    "key.limit_reached": "a key reached its limit", "key.expiring": "a key is about to expire",
    "key.revealed": "a key was shown", "account.rotated": "the credit id was changed", "notices.changed": "this was changed",
}  # fmt: skip


class Rotated(msgspec.Struct, frozen=True):
    """The new credit id, shown to its owner now."""

    credit_id: str


class Coded(msgspec.Struct, frozen=True):
    """The new recovery code, shown to its owner now."""

    recovery_code: str


class Told(msgspec.Struct, frozen=True):
    """The signing secret of a webhook that was not there before, shown to its owner now."""

    signing_secret: str | None


@dataclass(frozen=True, slots=True)
class Kept:
    """What the page shows of an account besides its money."""

    ways: Sequence[Row]
    log: Sequence[Row]
    address: Row | None
    deliveries: Sequence[Row]


@get("/console/account")
async def account(
    customer: NamedDependency[Customer], frame: NamedDependency[Frame], db: NamedDependency[Database],
    messages: NamedDependency[Messages],
) -> Page:  # fmt: skip
    if not customer.is_owner:
        return frame.answer("Account", card(empty("You are signed in with a key. The account itself needs the credit id: sign out, and in with it.")))  # fmt: skip
    return frame.answer("Account", *account_page(await _kept(db, customer), frame, messages))


@post("/console/account/rotate")
async def rotate(
    former: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    settings: NamedDependency[Settings], keyring: NamedDependency[Keyring],
) -> Page:  # fmt: skip
    """Another credit id; this session goes on with it. Sent twice, the answer comes again, though the old one is over."""

    async def admit() -> None:
        if former.caller.lasts == "over":
            raise InvalidCreditId
        require_owner(former)

    async def effect(session: AsyncSession) -> Rotated:
        await hold_still(session, former.caller)
        made = await rotate_credit_id(session, keyring, former.caller.account_id, Kind.CREDIT_ID.value)
        return Rotated(made.credit_id)

    rotated = await form.once.do(Rotated, effect, admit=admit)
    frame.cookies.append(set_cookie(settings, Session.begun("customer", rotated.credit_id)))
    return frame.answer("Keep this", _rotated(rotated))


@post("/console/account/recovery")
async def another_code(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    keyring: NamedDependency[Keyring],
) -> Page:  # fmt: skip
    require_owner(customer)

    async def effect(session: AsyncSession) -> Coded:
        await hold_still(session, customer.caller)
        return Coded(await make_code(session, keyring, customer.caller.account_id, None))

    made = await form.once.do(Coded, effect)
    return frame.answer("Keep this", _coded(made))


@post("/console/account/notices")
async def set_notices(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings], webhooks: NamedDependency[Webhooks],
    messages: NamedDependency[Messages],
) -> Page:  # fmt: skip
    """Set where notices go, or that they go nowhere. A new webhook's signing secret is shown once."""
    require_owner(customer)
    account_id = customer.caller.account_id
    if form.text("act") == "remove":
        await db.transaction(lambda session: address.remove(session, settings.sealer, account_id))
        return frame.see("/console/account", "notices-gone")

    async def admit() -> None:
        await count_or_refuse(db, f"notices/{account_id}", CHANGES_PER_HOUR)

    async def effect(session: AsyncSession) -> Told:
        await hold_still(session, customer.caller)
        return Told((await address.put(session, settings.sealer, account_id, wish))[1])

    try:
        wish = wish_of(_wanted(form), webhooks, messages)
        told = await form.once.do(Told, effect, admit=admit)
    except AppError as error:
        kept = await _kept(db, customer)
        return frame.answer("Account", problem(error), *account_page(kept, frame, messages), status=error.status)
    if told.signing_secret is None:
        return frame.see("/console/account", "notices-kept")
    return frame.answer("Keep this", _signing(told.signing_secret))


@post("/console/account/notices/test")
async def test_notice(
    customer: NamedDependency[Customer],
    form: NamedDependency[Form],
    frame: NamedDependency[Frame],
    db: NamedDependency[Database],
) -> Page:
    require_owner(customer)
    account_id = customer.caller.account_id

    async def admit() -> None:
        await count_or_refuse(db, f"notices-test/{account_id}", TESTS_PER_HOUR)

    await form.once.do(TestNotice, lambda session: send_one(session, account_id), admit=admit)
    return frame.see("/console/account", "test-sent")


@post("/console/account/close")
async def close_account(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings], keyring: NamedDependency[Keyring],
    messages: NamedDependency[Messages],
) -> Page:  # fmt: skip
    require_owner(customer)

    async def work(session: AsyncSession) -> None:
        await hold_still(session, customer.caller)
        await close(session, keyring, customer.caller.account_id)
        await keyring.note(session, customer.caller.account_id, "closed", customer.caller.kind.value)

    try:
        if form.text("sure").lower() != "close":
            raise InvalidField("Type the word close to close the account.", param="sure")
        await db.transaction(work)
    except AppError as error:
        kept = await _kept(db, customer)
        return frame.answer("Account", problem(error), *account_page(kept, frame, messages), status=error.status)
    frame.cookies.append(end_cookie(settings, "customer"))
    return frame.see("/console/sign-in", "closed")


async def _kept(db: Database, customer: Customer) -> Kept:
    account_id = customer.caller.account_id

    async def work(session: AsyncSession) -> Kept:
        return Kept(
            await ways_back(session, account_id), await events(session, account_id, _DELIVERIES, None),
            await address.find(session, account_id), await outbox.list_deliveries(session, account_id, _DELIVERIES, None, None),
        )  # fmt: skip

    return await db.transaction(work)


def _wanted(form: Form) -> NoticesRequest:
    chosen = list(form.texts("events"))
    wanted = {
        "webhook_url": form.text("webhook_url") or None, "npub": form.text("npub") or None,
        "low_balance_usd": form.number("low_balance_usd"), "events": None if len(chosen) == len(EVENTS) else chosen,
    }  # fmt: skip
    return read(msgspec.json.encode(wanted), NoticesRequest)  # type: ignore[no-any-return]


# --- the page ---------------------------------------------------------------------------------------


def account_page(kept: Kept, frame: Frame, messages: Messages) -> tuple[Element | None, ...]:
    return (
        _rotate_card(frame), _recovery_card(kept.ways, frame), _notices_card(kept.address, frame, messages),
        _deliveries_card(kept.deliveries, frame) if kept.address is not None else None, _export_card(), _log_card(kept.log), _close_card(frame),
    )  # fmt: skip


def _rotate_card(frame: Frame) -> Element:
    return card(
        p["If somebody else may have seen your credit id, take another: the old one is refused from that moment. Keys go on working."],
        form_(method="post", action="/console/account/rotate")[frame.guard(), button(class_="outline")["Take another credit id"]],
        title="Credit id",
    )  # fmt: skip


def _rotated(rotated: Rotated) -> Element:
    return card(
        p[
            "This is your account's credit id from now on; the one before opens nothing. It is shown now and never again."
        ],
        secret("Credit id", rotated.credit_id),
        _kept_acts("credit-id.txt", f"Credit id: {rotated.credit_id}\n"),
    )


def _recovery_card(ways: Sequence[Row], frame: Frame) -> Element:
    return card(
        p["A recovery code gives another credit id should yours be lost or stolen. Keep it on paper, and not with the credit id."],
        ul[(li[_way(each)] for each in ways)] if ways else p[span(class_="pill wait")["No way back yet"]],
        form_(method="post", action="/console/account/recovery")[frame.guard(), button(class_="outline")["Make a new recovery code"]],
        title="Recovery",
    )  # fmt: skip


def _way(each: Row) -> tuple[Element | str, ...]:
    words = "A recovery code" if each["kind"] == Kind.RECOVERY_CODE else f"The Nostr key {each['label']}"
    made = (words, ", made ", moment(each["created_at"]))
    return (*made, "; it was replaced, and works until ", moment(each["ends_at"])) if each["ends_at"] else made


def _coded(made: Coded) -> Element:
    return card(
        p["The code before this one goes on to work for 7 days, so that a thief could not lock you out. This one is shown now and never again."],
        secret("Recovery code", made.recovery_code),
        _kept_acts("recovery-code.txt", f"Recovery code: {made.recovery_code}\n"),
    )  # fmt: skip


def _kept_acts(file_name: str, text: str) -> Element:
    return div(class_="acts")[
        download(file_name, text), a(href="/console/account", class_="button")["I have kept it: go on"]
    ]


def _notices_card(one: Row | None, frame: Frame, messages: Messages) -> Element:
    is_set = one is not None and (one["url_shown"] is not None or one["npub"] is not None)
    chosen = EVENTS if one is None or one["events"] is None else one["events"]
    low = (
        "" if one is None or one["low_balance_nusd"] is None else dollars(one["low_balance_nusd"])[1:].replace(",", "")
    )
    npub = messages.npub_of(one["npub"]) if one is not None and one["npub"] is not None else ""
    return card(
        p["Be told by a signed webhook, by a Nostr message, or both."],
        is_set and one is not None and _where(one, npub),
        form_(method="post", action="/console/account/notices")[
            frame.guard(),
            div(class_="row")[
                labelled("Webhook", input_(name="webhook_url", type="url", maxlength="512", autocomplete="off", placeholder="https://"), "to keep one, type it again: only its host is shown"),
                labelled("Nostr public key", input_(name="npub", value=npub, maxlength="128", autocomplete="off", placeholder="npub1…"), "messages come from " + messages.npub[:16] + "…"),
                labelled("The balance is low below, in USD", input_(name="low_balance_usd", value=low, inputmode="decimal", autocomplete="off")),
            ],
            details[
                summary["Of what"],
                fieldset[
                    legend["Tell me when"],
                    (labelled(_EVENT_WORDS.get(each, each), input_(type="checkbox", name="events", value=each, checked=each in chosen)) for each in EVENTS),
                ],
            ],
            button(name="act", value="set")["Save"],
        ],
        title="Notices",
    )  # fmt: skip


def _where(one: Row, npub: str) -> Element:
    gone = one["webhook_off_at"] is not None
    told = [("Webhook", f"{one['url_shown']}{' (it wants no more)' if gone else ''}")] if one["url_shown"] else []
    told += [("Nostr", npub)] if npub else []
    return dl(class_="facts")[((dt[name], dd[value]) for name, value in told)]


def _deliveries_card(found: Sequence[Row], frame: Frame) -> Element:
    words = {"pending": ("On its way", "wait"), "delivered": ("Delivered", "good"), "dead": ("Given up", "bad")}
    return card(
        div(class_="table", tabindex="0", role="region", aria_label="Notices sent")[
            table[
                thead[tr[th["When"], th["What"], th["By"], th["State"]]],
                tbody[
                    (
                        tr[
                            td[moment(each["created_at"])],
                            td[_EVENT_WORDS.get(each["type"], "a test")],
                            td[each["channel"]],
                            td[span(class_=f"pill {words[each['state']][1]}")[words[each["state"]][0]], f" {each['error'] or ''}"],
                        ]
                        for each in found
                    )
                ],
            ]
        ] if found else empty("Nothing was sent yet: send a test."),
        div(class_="acts")[
            form_(method="post", action="/console/account/notices/test")[frame.guard(), button(class_="outline")["Send a test"]],
            form_(method="post", action="/console/account/notices")[frame.guard(), button(class_="outline", name="act", value="remove")["Tell nothing any more"]],
        ],
        title="Notices sent",
    )  # fmt: skip


def _signing(shown: str) -> Element:
    return card(
        p[
            "Every webhook is signed with this secret, so that you can tell ours from others'. It is shown now and never again."
        ],
        secret("Signing secret", shown),
        _kept_acts("webhook-secret.txt", f"Signing secret: {shown}\n"),
    )


def _export_card() -> Element:
    return card(
        p["What was called, by day, model and key, for your own books; top-ups have a receipt each."],
        div(class_="acts")[
            a(href="/console/activity.csv?period=90", class_="button outline", download="activity.csv")["Activity of 90 days, CSV"],
            a(href="/console/topup", class_="button outline")["Top-ups and receipts"],
        ],
        title="Take it along",
    )  # fmt: skip


def _log_card(found: Sequence[Row]) -> Element | None:
    if not found:
        return None
    return card(
        ul[(li[moment(each["created_at"]), f": {each['act'].replace('_', ' ')}", each["subject"] and f" ({each['subject']})"] for each in found)],
        title="What was done with its secrets",
    )  # fmt: skip


def _close_card(frame: Frame) -> Element:
    return card(
        details[
            summary["Close the account…"],
            p["Only with nothing on it. Its keys and its credit id are refused from then on, for ever."],
            form_(method="post", action="/console/account/close")[
                frame.guard(),
                labelled("Type close", input_(name="sure", autocomplete="off", required=True, maxlength="20")),
                button(class_="danger")["Close it for ever"],
            ],
        ]
    )  # fmt: skip


handlers: Final = (account, rotate, another_code, set_notices, test_notice, close_account)
