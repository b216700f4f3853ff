"""Signing in and out, for customers and operators; and how a newcomer opens an account."""

from typing import Any, Final
from urllib.parse import quote

import msgspec
from htpy import Element, a, button, code, div, p
from htpy import form as form_
from htpy import input as input_
from litestar import Request, get, post
from litestar.di import NamedDependency

from app.accounts.accounts import open_account
from app.admin.tokens import ServiceTokens
from app.console.door import customer_of, operator_of
from app.console.forms import Form
from app.console.session import Customer, Operator, Session, SignedOut, end_cookie, set_cookie
from app.console.shell import SAID, Frame, Page, card, labelled, problem
from app.kernel.db import Database
from app.kernel.errors import InvalidCreditId, InvalidToken
from app.kernel.ratelimit import count_or_refuse, shares_of
from app.kernel.security import canonical_credit_id
from app.kernel.settings import Settings
from app.keys.issue import Keyring
from app.keys.verify import Verifier

SAID["welcome"] = "Your account is open. Top it up, and call."


class Opened(msgspec.Struct, frozen=True):
    """A new account's secrets, shown to its owner now."""

    credit_id: str
    api_key: str
    recovery_code: str | None = None


# --- customers --------------------------------------------------------------------------------------


@get("/console/sign-in", sync_to_thread=False)
def sign_in_page(frame: NamedDependency[Frame]) -> Page:
    return frame.answer("Sign in", _sign_in(frame), _newcomer(frame))


@post("/console/sign-in")
async def sign_in(
    form: NamedDependency[Form], frame: NamedDependency[Frame], settings: NamedDependency[Settings],
    verifier: NamedDependency[Verifier],
) -> Page:  # fmt: skip
    """With a credit id, or an API key, which then sees what its scopes allow."""
    session = Session.begun("customer", _spelled(form.text("credential")))
    try:
        await customer_of(verifier, session)
    except SignedOut:
        error = InvalidCreditId("No account has this credit id, and no live key is this one. Was it pasted whole?")
        return frame.answer("Sign in", _sign_in(frame, problem(error)), _newcomer(frame), status=401)
    frame.cookies.append(set_cookie(settings, session))
    return frame.see("/console")


@post("/console/sign-out")
async def sign_out(customer: NamedDependency[Customer], form: NamedDependency[Form], frame: NamedDependency[Frame], settings: NamedDependency[Settings]) -> Page:  # fmt: skip
    frame.cookies.append(end_cookie(settings, "customer"))
    return frame.see("/console/sign-in", "signed-out")


@post("/console/open")
async def open_one(
    request: Request[Any, Any, Any], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings], keyring: NamedDependency[Keyring],
) -> Page:  # fmt: skip
    """Open an account, sign in with it, and show its secrets this once. Sent twice it is one account."""
    address = request.client.host if request.client else "unknown"

    async def admit() -> None:
        in_all = settings.accounts_per_hour
        for block, share in shares_of(address, settings.accounts_per_hour_per_block, in_all):
            await count_or_refuse(db, f"account/{block}", share, policy="accounts")
        await count_or_refuse(db, "account", in_all, policy="accounts-in-all", is_told=False)

    async def effect(session: Any) -> Opened:
        made = await open_account(session, keyring)
        return Opened(made.credit_id, made.api_key)

    opened = await form.once.do(Opened, effect, admit=admit)
    frame.cookies.append(set_cookie(settings, Session.begun("customer", opened.credit_id)))
    return frame.answer("Keep this", _kept(opened))


def _sign_in(frame: Frame, refusal: Element | None = None) -> Element:
    return card(
        refusal,
        form_(method="post", action="/console/sign-in")[
            frame.guard(),
            labelled(
                "Credit id or API key",
                input_(name="credential", type="password", autocomplete="current-password", required=True, autofocus=True, spellcheck="false", maxlength="200"),
                "A credit id may do everything on its account; a key sees what its scopes allow.",
            ),
            button["Sign in"],
        ],
    )  # fmt: skip


def _newcomer(frame: Frame) -> Element:
    return card(
        p["No name, no e-mail, no password: an account is a credit id, which only you have."],
        form_(method="post", action="/console/open")[frame.guard(), button(class_="outline")["Open an account"]],
        title="New here?",
    )


def _kept(opened: Opened) -> Element:
    kept = [("Credit id", opened.credit_id), ("First API key", opened.api_key)]
    if opened.recovery_code:
        kept.insert(1, ("Recovery code", opened.recovery_code))
    return card(
        p[
            "The credit id is the account: whoever has it spends its money, and without it nobody can give it back. ",
            "It is shown now and never again.",
        ],
        (secret(name, value) for name, value in kept),
        div(class_="acts")[
            download("credit-id.txt", "".join(f"{name}: {value}\n" for name, value in kept)),
            a(href="/console?said=welcome", class_="button")["I have kept it: go on"],
        ],
    )


def secret(name: str, value: str) -> Element:
    """A secret that is shown, with a button that copies it."""
    return div(class_="secret")[
        p[name], code[value], button(type="button", class_="outline small", data_copy=value)["Copy"]
    ]


def download(file_name: str, text: str) -> Element:
    """A file made of what the page shows; it is saved by the browser alone."""
    return a(href=f"data:text/plain;charset=utf-8,{quote(text)}", download=file_name, class_="button outline")[
        "Download"
    ]


def _spelled(text: str) -> str:
    return canonical_credit_id(text) or text


# --- operators --------------------------------------------------------------------------------------


@get("/operator/sign-in", sync_to_thread=False)
def operator_sign_in_page(frame: NamedDependency[Frame]) -> Page:
    return frame.answer("Operator", _operator_sign_in(frame))


@post("/operator/sign-in")
async def operator_sign_in(
    form: NamedDependency[Form], frame: NamedDependency[Frame], settings: NamedDependency[Settings],
    services: NamedDependency[ServiceTokens],
) -> Page:  # fmt: skip
    session = Session.begun("operator", form.text("token"))
    try:
        await operator_of(services, session)
    except SignedOut:
        return frame.answer("Operator", _operator_sign_in(frame, problem(InvalidToken("No live admin token is this one."))), status=401)  # fmt: skip
    frame.cookies.append(set_cookie(settings, session))
    return frame.see("/operator")


@post("/operator/sign-out")
async def operator_sign_out(operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame], settings: NamedDependency[Settings]) -> Page:  # fmt: skip
    frame.cookies.append(end_cookie(settings, "operator"))
    return frame.see("/operator/sign-in", "signed-out")


def _operator_sign_in(frame: Frame, refusal: Element | None = None) -> Element:
    return card(
        refusal,
        form_(method="post", action="/operator/sign-in")[
            frame.guard(),
            labelled(
                "Admin token",
                input_(name="token", type="password", autocomplete="current-password", required=True, autofocus=True, spellcheck="false", maxlength="200"),
                "satmeter token create --admin NAME makes one.",
            ),
            button["Sign in"],
        ],
    )  # fmt: skip


handlers: Final = (
    sign_in_page, sign_in, sign_out, open_one, operator_sign_in_page, operator_sign_in, operator_sign_out
)  # fmt: skip
