"""The rules of auto-topup, pure: states and their moves, what a wallet's reply means, caps, back-off, when to look again."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from app.autotopup.wallet import LightningInvoice, PayOutcome, PayReply


class State(StrEnum):
    """How far an attempt has come. SENT is written before the request is sent, and never sent again after a crash."""

    CREATED = "created"
    INVOICED = "invoiced"
    SENT = "sent"
    PAID_REPORTED = "paid_reported"
    UNKNOWN = "unknown"
    REJECTED = "rejected"
    SETTLED = "settled"
    EXPIRED = "expired"


OPEN: Final = frozenset({State.CREATED, State.INVOICED, State.SENT, State.PAID_REPORTED, State.UNKNOWN})
"""At most one of an account's attempts is in one of these: two invoices could both be paid."""
UNPAID: Final = frozenset({State.REJECTED, State.EXPIRED})
"""Closed as not paid, which a late payment may still change."""
HOLDS_CAP: Final = OPEN | {State.SETTLED}
"""What counts to the money of a day: all that was or may yet be paid."""
MOVES: Final[Mapping[State, frozenset[State]]] = {
    State.CREATED: frozenset({State.INVOICED, State.SETTLED, State.EXPIRED}),
    State.INVOICED: frozenset({State.SENT, State.REJECTED, State.SETTLED, State.EXPIRED}),
    # Back to INVOICED: the request surely reached no relay, or the one re-send that is allowed.
    State.SENT: frozenset({State.INVOICED, State.PAID_REPORTED, State.REJECTED, State.UNKNOWN, State.SETTLED}),
    State.UNKNOWN: frozenset({State.PAID_REPORTED, State.SETTLED, State.EXPIRED}),
    State.PAID_REPORTED: frozenset({State.SETTLED, State.EXPIRED}),
    State.REJECTED: frozenset({State.SETTLED}),
    State.EXPIRED: frozenset({State.SETTLED}),
    State.SETTLED: frozenset(),
}
"""What may follow what. SETTLED follows anything: the payment backend decides, and a payment may be late."""

MIN_INTERVAL: Final = timedelta(seconds=60)
"""Between an attempt that was not paid and the next; after a payment that was not enough, the next begins at once."""
DAY: Final = timedelta(hours=24)
MAX_ATTEMPTS_A_DAY: Final = 48
MIN_INVOICE_LEFT: Final = timedelta(seconds=120)
"""An invoice with less time than this is not sent: a wallet may take it up a little later."""
GRACE: Final = timedelta(minutes=10)
"""After an invoice expired, a payment that was under way may still be told."""
GIVE_UP: Final = timedelta(hours=24)
"""After the invoice expired: a backend that still calls it new has lost it; nobody can pay it any more."""
LATE_AT_MOST: Final = timedelta(days=9)
"""After an attempt was closed: the backend is asked about its invoice for a day and a week at most."""
RESEND_AFTER: Final = timedelta(seconds=30)
MAX_SENDS: Final = 2
BACK_OFF: Final = (timedelta(hours=1), timedelta(hours=2), timedelta(hours=4))
REFUSALS_TO_PAUSE: Final = 4
SILENCE_TO_PAUSE: Final = timedelta(hours=24)
OUR_TROUBLE: Final = timedelta(minutes=5)
INVOICE_WITHIN: Final = timedelta(hours=1)
"""How long to ask the backend for an invoice before the attempt is given up."""
LOOK_AFTER: Final = (timedelta(seconds=5), timedelta(seconds=15), timedelta(minutes=1), timedelta(minutes=5))
LEASE: Final = timedelta(minutes=3)
"""Longer than any one step takes (a wallet has 90 s to answer), so that a driver that lives keeps its attempt."""

DEFINITE: Final = frozenset(
    {
        "INSUFFICIENT_BALANCE", "QUOTA_EXCEEDED", "RATE_LIMITED", "NOT_IMPLEMENTED", "UNSUPPORTED_ENCRYPTION",
        "RESTRICTED", "UNAUTHORIZED", "EXPIRED", "BAD_REQUEST",
    }
)  # fmt: skip
"""Codes that surely mean no payment, as the first answer to the only send. Every other one may come of a payment."""
PAUSE_AT_ONCE: Final = frozenset({"UNAUTHORIZED", "RESTRICTED", "EXPIRED", "NOT_IMPLEMENTED"})

PAUSES: Final[Mapping[str, str]] = {
    "UNAUTHORIZED": "The wallet does not know this connection any more. Connect it again.",
    "RESTRICTED": "The wallet does not let this connection pay invoices. Connect again with one that may.",
    "EXPIRED": "The connection has expired in the wallet. Connect again with a new one.",
    "NOT_IMPLEMENTED": "The wallet cannot pay invoices over this connection. Connect another one.",
    "refusals": (
        "The wallet refused four times in a row; see the attempts for why."
        " Top up once by hand, or connect again, and it goes on."
    ),
    "silence": "Nothing was heard from the wallet for 24 hours. Top up once by hand, or connect again, and it goes on.",
    "unconfirmed": "The wallet proved a payment that has not arrived here. The operator was told. Connect again to go on.",
    "unreadable": "The wallet's secret cannot be read any more. Connect it again.",
}
"""Why no more attempts are made, as its owner reads it."""
LIFTED_BY_A_TOPUP: Final = frozenset({"refusals", "silence"})
"""Any settled top-up lifts these; the others need a new connection, or a payment by this very wallet."""
REASONS: Final[Mapping[str, str]] = {
    "refused": "The wallet refused to pay.",
    "silence": "The wallet did not answer, and the invoice was not paid.",
    "not_taken": "The wallet's relays did not take the request, and the invoice was not paid.",
    "unreached": "None of the wallet's relays could be reached.",
    "unpaid": "The wallet's answer left it open, and the invoice was not paid.",
    "unconfirmed": "The wallet said that it paid, and the payment did not arrive.",
    "not_needed": "The balance was above the threshold again.",
    "disconnected": "The wallet was disconnected or connected anew before it was asked.",
    "paused": "Auto top-up was paused before the wallet was asked.",
    "off": "Auto top-up was switched off by the operator before the wallet was asked.",
    "frozen": "The account was frozen before the wallet was asked.",
    "backend": "No invoice could be made.",
    "unreadable": "The invoice could not be read as a Lightning invoice (BOLT11), so it was not sent to the wallet.",
    "network": "The invoice was for another Lightning network than this service's, so it was not sent to the wallet.",
    "amount": "The invoice was not for exactly the amount that had been asked for, so it was not sent to the wallet.",
    "used": "The invoice had the payment hash of an earlier one, so it was not sent to the wallet.",
    "too_late": "There was too little time left to pay the invoice.",
    "taken": "The invoice was paid, or closed, before the wallet was asked.",
}
"""Why an attempt ended without its wallet's payment, as its owner reads it."""
WRONG_INVOICE: Final = frozenset({"unreadable", "network", "amount", "used"})
"""The backend's invoice failed this check: ours, or the operator's, to look into."""
_CODE: Final = re.compile(r"[A-Z][A-Z0-9_]{0,39}", re.ASCII)


# --- may an attempt begin? --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an account stands: its balance, and its attempts of the last 24 hours."""

    balance_nusd: int
    is_active: bool
    has_open: bool
    unpaid_at: datetime | None
    """When the last attempt began that was not paid."""
    oldest_at: datetime | None
    attempts: int
    spent_nusd: int


def is_wanted(connection: Mapping[str, Any], standing: Standing) -> bool:
    """Whether this account should be topped up at all, sooner or later."""
    return (
        connection["pause"] is None
        and standing.is_active
        and not standing.has_open
        and standing.balance_nusd < connection["threshold_nusd"]
    )


def earliest(connection: Mapping[str, Any], standing: Standing, now: datetime) -> datetime:
    """When the next attempt may begin, by back-off, interval and the caps of a day; not after `now` if it may now."""
    moments = [now]
    if connection["not_before"] is not None:
        moments.append(connection["not_before"])
    if standing.unpaid_at is not None:
        moments.append(standing.unpaid_at + MIN_INTERVAL)
    cap_nusd = connection["max_per_day_nusd"]
    is_over = cap_nusd is not None and standing.spent_nusd + connection["topup_amount_nusd"] > cap_nusd
    if is_over or standing.attempts >= MAX_ATTEMPTS_A_DAY:
        moments.append((standing.oldest_at or now) + DAY)
    return max(moments)


def next_attempt_at(connection: Mapping[str, Any], standing: Standing, now: datetime) -> datetime | None:
    """When the next attempt may begin, whatever the balance is; None if nothing but the balance, or an open one, is waited for."""
    if standing.has_open or not standing.is_active:
        return None
    at = earliest(connection, standing, now)
    return at if at > now else None


# --- may the wallet be asked? -----------------------------------------------------------------------


def invoice_fault(invoice: LightningInvoice, due_msat: int, network: str, now: datetime) -> str | None:
    """Why this invoice must not be paid, one of REASONS; None if it asks for exactly what was asked for."""
    if invoice.network != network:
        return "network"
    if invoice.amount_msat != due_msat or due_msat <= 0:
        return "amount"
    return "too_late" if invoice.expires_at - now < MIN_INVOICE_LEFT else None


# --- what a reply means -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Meaning:
    """What follows from a reply: the next state, and what it says about the wallet.

    `again_in` is how long to wait before the next step; `was_sent` False takes the send back.
    """

    state: State
    code: str | None = None
    reason: str | None = None
    again_in: timedelta = LOOK_AFTER[0]
    pause: str | None = None
    was_sent: bool = True


def meaning_of(reply: PayReply, sends: int) -> Meaning:
    """Read a reply to the `sends`-th request for one invoice. Whatever is not surely a refusal may be a payment."""
    code = clean_code(reply.code)
    if reply.outcome is PayOutcome.PAID:
        return Meaning(State.PAID_REPORTED, again_in=timedelta(0))  # the backend may well have seen it already
    if not reply.was_published and not reply.was_answered:
        return Meaning(State.INVOICED, reason="unreached", again_in=RESEND_AFTER, was_sent=False)
    pause = code if code in PAUSE_AT_ONCE else None
    if reply.outcome is PayOutcome.UNKNOWN or code not in DEFINITE or sends > 1:
        reason = None if reply.was_taken or reply.was_answered else "not_taken"
        return Meaning(State.UNKNOWN, code or ("OTHER" if reply.was_answered else None), reason, pause=pause)
    if code == "RATE_LIMITED":
        return Meaning(State.INVOICED, code, again_in=RESEND_AFTER)
    if code == "UNSUPPORTED_ENCRYPTION":
        return Meaning(State.INVOICED, code, again_in=timedelta(0))
    return Meaning(State.REJECTED, code, "refused", pause=pause)


def clean_code(code: str | None) -> str | None:
    """A wallet's error code if it is one, OTHER for a text that is none: it comes from a stranger, and is shown."""
    if code is None:
        return None
    return code if _CODE.fullmatch(code) else "OTHER"


# --- when to try again ------------------------------------------------------------------------------


def back_off(refusals: int) -> timedelta:
    """How long to leave a wallet alone after so many refusals in a row."""
    return BACK_OFF[min(refusals, len(BACK_OFF)) - 1]


def after_silence(silent_for: timedelta) -> timedelta:
    """How long to leave a wallet alone that has not answered for so long: seldomer the longer it lasts."""
    return min(max(silent_for / 2, OUR_TROUBLE), timedelta(hours=1))


def look_again_at(looks: int, invoice_expires_at: datetime | None, now: datetime) -> datetime:
    """When to look again after the `looks`-th look: ever later, but not missing the moment when it is over."""
    again_at = now + LOOK_AFTER[min(looks, len(LOOK_AFTER) - 1)]
    if invoice_expires_at is not None and now < invoice_expires_at + GRACE < again_at:
        return invoice_expires_at + GRACE
    return again_at


def is_over(status: str, invoice_expires_at: datetime, now: datetime) -> bool:
    """Whether an unpaid invoice will stay unpaid: the backend says so, and the grace has passed."""
    if now >= invoice_expires_at + GIVE_UP:
        return True
    return status not in ("New", "Processing", "Creating") and now >= invoice_expires_at + GRACE
