"""What operators do with top-ups: list them by state, ask the backend now, decide what waits for a person."""

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Literal, get_args

from sqlalchemy.ext.asyncio import AsyncSession

from app.admin.acts import write_act
from app.kernel.db import Database, Row, rows
from app.kernel.errors import InvalidField, PaymentBackendUnavailable
from app.kernel.money import usd_text
from app.kernel.security import Admin, Pepper
from app.topups.create import read_topup
from app.topups.credit import TopupRef, credit_if_paid
from app.topups.gateway import GatewayError, Gateways
from app.topups.review import ref_of, resolve

State = Literal["review", "unapplied", "open", "new", "processing", "settled", "expired", "invalid", "failed", "all"]
STATES: Final[tuple[State, ...]] = get_args(State)
Action = Literal["dismiss", "credit", "debit"]
ACTIONS: Final[tuple[Action, ...]] = get_args(Action)
Position = tuple[datetime, uuid.UUID]

_UNAPPLIED: Final = """
    reviewed IS NULL AND (
        (credited_nusd = 0 AND paid_coin_units > 0)
        OR EXISTS (SELECT FROM payment p WHERE p.account_id = t.account_id AND p.topup_id = t.id
                                           AND p.status = 'Settled' AND p.worth_nusd = 0 AND p.value_coin_units > p.fee_coin_units))"""
_WHICH: Final[dict[State, str]] = {
    "review": "review IS NOT NULL",
    "unapplied": _UNAPPLIED,
    "open": "status IN ('Creating', 'New', 'Processing')",
    "new": "status IN ('Creating', 'New')",
    "processing": "status = 'Processing'",
    "settled": "status = 'Settled'",
    "expired": "status = 'Expired'",
    "invalid": "status = 'Invalid'",
    "failed": "status = 'Failed'",
    "all": "true",
}
_OLDEST_FIRST: Final = ("review", "unapplied")
"""What waits for a person, longest first."""


async def list_by_state(
    session: AsyncSession, state: State, limit: int, after: Position | None, account_id: uuid.UUID | None = None
) -> Sequence[Row]:
    """A page of top-ups: what waits oldest first, the others newest first; `after` is where the page before ended.

    `unapplied` was paid, as the backend told us, and is not credited: it may still be on its way, or a person has to look.
    """
    further, order = (">", "ASC") if state in _OLDEST_FIRST else ("<", "DESC")
    return await rows(
        session,
        f"""SELECT * FROM topup t WHERE {_WHICH[state]}
              AND (CAST(:account_id AS uuid) IS NULL OR account_id = :account_id)
              AND (CAST(:at AS timestamptz) IS NULL OR (created_at, id) {further} (:at, CAST(:id AS uuid)))
            ORDER BY created_at {order}, id {order} LIMIT :limit""",
        at=after[0] if after else None, id=after[1] if after else None, account_id=account_id, limit=limit,
    )  # fmt: skip


async def position_of(session: AsyncSession, topup_id: uuid.UUID) -> Position:
    """Where a top-up stands in a list. Raises InvoiceNotFound."""
    ref = await ref_of(session, topup_id)
    return (await read_topup(session, ref.account_id, topup_id))["created_at"], topup_id


async def ask_backend(db: Database, gateways: Gateways, ref: TopupRef) -> Row:
    """Credit what was paid and is not credited yet; returns the top-up as it was before.

    Raises PaymentBackendUnavailable.
    """
    before = await db.transaction(lambda session: read_topup(session, ref.account_id, ref.topup_id))
    gateway = gateways.named(before["backend"])
    if gateway is None:
        raise PaymentBackendUnavailable(f"No backend named {before['backend']} is configured", retry_after_seconds=60)
    try:
        await credit_if_paid(db, gateway, ref)
    except GatewayError as error:
        raise PaymentBackendUnavailable(retry_after_seconds=5) from error
    return before


async def note_reconciled(session: AsyncSession, pepper: Pepper, admin: Admin, ref: TopupRef, before: Row) -> Row:
    """Write down that the backend was asked, and what that changed; returns the top-up as it is now."""
    after = await read_topup(session, ref.account_id, ref.topup_id)
    await write_act(
        session, pepper, admin, "topup.reconcile", f"{ref.account_id}/{ref.topup_id}",
        before=_said(before), after=_said(after),
    )  # fmt: skip
    return after


async def decide(
    session: AsyncSession,
    pepper: Pepper,
    admin: Admin,
    ref: TopupRef,
    action: Action,
    amount_nusd: int | None,
    reason: str,
    finding_id: uuid.UUID | None = None,
) -> Row:
    """Take a finding off the queue; `credit` and `debit` move `amount_nusd` as well. The same finding does not come back.

    Raises InvalidField for an amount that is missing, nothing or too much to say; InvoiceNotFound if nothing waits.
    """
    adjust_nusd = _adjustment(action, amount_nusd)
    before = await read_topup(session, ref.account_id, ref.topup_id)
    resolved = await resolve(session, ref, adjust_nusd, finding_id)
    subject = f"{ref.account_id}/{ref.topup_id}/{resolved['finding_id']}"
    await write_act(
        session, pepper, admin, f"topup.{action}", subject, reason, adjust_nusd,
        before={"review": before["review"]}, after={"review": None},
    )  # fmt: skip
    return resolved


def refuse_odd(action: Action, amount_nusd: int | None) -> None:
    """Raises InvalidField for an amount that does not go with the action, before anything is done."""
    _adjustment(action, amount_nusd)


def _adjustment(action: Action, amount_nusd: int | None) -> int:
    if action == "dismiss":
        if amount_nusd is not None:
            raise InvalidField("amount_usd goes with credit or debit", param="amount_usd")
        return 0
    if not amount_nusd:
        raise InvalidField("amount_usd must be more than 0", param="amount_usd")
    return amount_nusd if action == "credit" else -amount_nusd


def _said(topup: Row) -> dict[str, Any]:
    return {"status": topup["status"], "credited_usd": usd_text(topup["credited_nusd"]), "review": topup["review"]}
