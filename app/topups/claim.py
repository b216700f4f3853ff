"""A claim: "I paid, and it is not there". Asks the backend at once about whatever the payer can name."""

import uuid
from dataclasses import dataclass
from typing import Final, Literal

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row, rows
from app.kernel.errors import InvoiceNotFound, PaymentBackendUnavailable
from app.topups.credit import TopupRef, credit_if_paid
from app.topups.gateway import GatewayError, Gateways

_LOOK_AT_MOST: Final = 20


ProofKind = Literal["payment_hash", "lightning_invoice", "txid"]


@dataclass(frozen=True, slots=True)
class Proof:
    """What a payer has in hand: a Lightning payment hash or invoice, or a transaction id."""

    kind: ProofKind
    value: str


async def claim(db: Database, gateways: Gateways, account_id: uuid.UUID, proof: Proof) -> Row:
    """Reconcile the account's top-ups that the proof may belong to, and return the one it does.

    Only the account's own top-ups are looked at, the newest first. Raises InvoiceNotFound if none has
    such a payment, PaymentBackendUnavailable if that could not be found out.
    """
    unanswered = False
    for topup in await db.transaction(lambda session: _candidates(session, account_id, proof)):
        gateway = gateways.named(topup["backend"])
        if gateway is not None:
            try:
                await credit_if_paid(db, gateway, TopupRef(account_id, topup["id"]))
            except GatewayError:
                unanswered = True
    found = await db.transaction(lambda session: _topup_with(session, account_id, proof))
    if found is not None:
        return found
    if unanswered:
        raise PaymentBackendUnavailable(retry_after_seconds=5)
    raise InvoiceNotFound(
        f"No payment with this {proof.kind} was made to a top-up of this account; was it another account's?"
    )


async def _candidates(session: AsyncSession, account_id: uuid.UUID, proof: Proof) -> list[Row]:
    """The top-up that shows this Lightning invoice; else those that may still hide an unseen payment."""
    return await rows(
        session,
        """SELECT id, backend FROM topup
           WHERE account_id = :account_id AND invoice_id IS NOT NULL AND created_at > now() - interval '90 days'
             AND CASE WHEN :kind = 'txid' THEN method <> 'btc-lightning' ELSE method = 'btc-lightning' END
           ORDER BY (destination = :value) DESC, credited_nusd = 0 DESC, created_at DESC LIMIT :most""",
        account_id=account_id, kind=proof.kind, value=proof.value, most=_LOOK_AT_MOST,
    )  # fmt: skip


async def _topup_with(session: AsyncSession, account_id: uuid.UUID, proof: Proof) -> Row | None:
    if proof.kind == "lightning_invoice":
        return await row(
            session,
            "SELECT * FROM topup WHERE account_id = :account_id AND destination = :value ORDER BY created_at LIMIT 1",
            account_id=account_id, value=proof.value,
        )  # fmt: skip
    # BTCPay's payment ids: a Lightning payment hash; `txid-vout`; for Monero `txid#account#subaddress`.
    return await row(
        session,
        """SELECT t.* FROM payment p JOIN topup t ON t.account_id = p.account_id AND t.id = p.topup_id
           WHERE p.account_id = :account_id
             AND (p.payment_id = :value OR starts_with(p.payment_id, :value || '-') OR starts_with(p.payment_id, :value || '#'))
           ORDER BY p.received_at LIMIT 1""",
        account_id=account_id, value=proof.value,
    )  # fmt: skip
