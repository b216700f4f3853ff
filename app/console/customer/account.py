"""Account: another credit id, what can be taken along, and how it ends."""

from typing import Final

import msgspec
from htpy import Element, a, button, details, div, p, summary
from htpy import form as form_
from htpy import input as input_
from litestar import get, post
from litestar.di import NamedDependency
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import close, rotate_credit_id
from app.console.forms import Form
from app.console.session import Customer, Session, end_cookie, set_cookie
from app.console.shell import SAID, Frame, Page, card, empty, labelled, problem
from app.console.signing import download, secret
from app.kernel.db import Database
from app.kernel.errors import AppError, InvalidField, MissingScope
from app.kernel.settings import Settings
from app.keys.issue import Keyring

SAID["closed"] = "The account is closed. Its books are kept; nothing opens it any more."


class Rotated(msgspec.Struct, frozen=True):
    """The new credit id, shown to its owner now."""

    credit_id: str


@get("/console/account", sync_to_thread=False)
def account(customer: NamedDependency[Customer], frame: NamedDependency[Frame]) -> Page:
    return frame.answer("Account", *account_page(customer, frame))


@post("/console/account/rotate")
async def rotate(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings], keyring: NamedDependency[Keyring],
) -> Page:  # fmt: skip
    """Another credit id; this session goes on with it."""
    _owners(customer)

    async def effect(session: AsyncSession) -> Rotated:
        return Rotated(await rotate_credit_id(session, keyring, customer.caller.account_id))

    rotated = await form.once.do(Rotated, effect)
    frame.cookies.append(set_cookie(settings, Session.begun("customer", rotated.credit_id)))
    return frame.answer("Keep this", _rotated(rotated))


@post("/console/account/close")
async def close_account(
    customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings], keyring: NamedDependency[Keyring],
) -> Page:  # fmt: skip
    _owners(customer)
    try:
        if form.text("sure").lower() != "close":
            raise InvalidField("Type the word close to close the account.", param="sure")
        await db.transaction(lambda session: close(session, keyring, customer.caller.account_id))
    except AppError as error:
        return frame.answer("Account", problem(error), *account_page(customer, frame), status=error.status)
    frame.cookies.append(end_cookie(settings, "customer"))
    return frame.see("/console/sign-in", "closed")


def _owners(customer: Customer) -> None:
    if not customer.is_owner:
        raise MissingScope("This needs the credit id: sign in with it.")


def account_page(customer: Customer, frame: Frame) -> tuple[Element, ...]:
    if not customer.is_owner:
        return (card(empty("You are signed in with a key. The account itself needs the credit id: sign out, and in with it.")),)  # fmt: skip
    return _rotate_card(frame), _export_card(), _close_card(frame)


def _rotate_card(frame: Frame) -> Element:
    return card(
        p["If somebody else may have seen your credit id, take another: the old one is refused from that moment. Keys go on working."],
        form_(method="post", action="/console/account/rotate")[frame.guard(), button(class_="outline")["Take another credit id"]],
        title="Credit id",
    )  # fmt: skip


def _rotated(rotated: Rotated) -> Element:
    return card(
        p["This is your account's credit id from now on; the one before opens nothing. It is shown now and never again."],
        secret("Credit id", rotated.credit_id),
        div(class_="acts")[
            download("credit-id.txt", f"Credit id: {rotated.credit_id}\n"), a(href="/console/account", class_="button")["I have kept it: go on"]
        ],
    )  # fmt: skip


def _export_card() -> Element:
    return card(
        p["What was called, by day, model and key, for your own books; top-ups have a receipt each."],
        div(class_="acts")[
            a(href="/console/activity.csv?period=90", class_="button outline", download="activity.csv")["Activity of 90 days, CSV"],
            a(href="/console/topup", class_="button outline")["Top-ups and receipts"],
        ],
        title="Take it along",
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


handlers: Final = (account, rotate, close_account)
