"""Posting: the one way money enters or leaves an account outside the hot path's own statements."""

import uuid
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import row
from app.kernel.errors import NotFound
from app.ledger.tables import EntryKind


@dataclass(frozen=True, slots=True)
class Posted:
    """What a posting did: the balance after it, and whether it was this call that moved the money."""

    balance_after_nusd: int
    is_new: bool


class PostingMismatch(AssertionError):
    """The same reference was posted before with another amount: a defect, never a caller's fault."""


async def post(
    session: AsyncSession, account_id: uuid.UUID, kind: EntryKind, reference: str, contra: str, amount_nusd: int
) -> Posted:
    """Move `amount_nusd` from the house account `contra` to the account (negative: the other way), once.

    Idempotent on (account_id, kind, reference): a repeat changes nothing and says so. The account's row
    stays locked until the caller's transaction ends, which puts its entries in one order.
    Raises NotFound without such an account, PostingMismatch if a repeat asks for another amount.
    """
    account = await row(
        session, "SELECT posted_nusd, entry_count FROM account WHERE id = :id FOR NO KEY UPDATE", id=account_id
    )
    if account is None:
        raise NotFound("No such account")
    made = await row(
        session,
        """INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd)
           VALUES (:account_id, :id, :kind, :reference, :contra, :amount, :balance)
           ON CONFLICT (account_id, kind, reference) DO NOTHING RETURNING balance_after_nusd""",
        account_id=account_id, id=account["entry_count"] + 1, kind=kind.value, reference=reference, contra=contra,
        amount=amount_nusd, balance=account["posted_nusd"] + amount_nusd,
    )  # fmt: skip
    if made is None:
        return await _posted_before(session, account_id, kind, reference, amount_nusd)
    await row(
        session,
        """UPDATE account SET posted_nusd = posted_nusd + :amount, entry_count = entry_count + 1, updated_at = now()
           WHERE id = :id""",
        amount=amount_nusd, id=account_id,
    )  # fmt: skip
    return Posted(made["balance_after_nusd"], is_new=True)


async def _posted_before(
    session: AsyncSession, account_id: uuid.UUID, kind: EntryKind, reference: str, amount_nusd: int
) -> Posted:
    entry = await row(
        session,
        """SELECT amount_nusd, balance_after_nusd FROM entry
           WHERE account_id = :account_id AND kind = :kind AND reference = :reference""",
        account_id=account_id, kind=kind.value, reference=reference,
    )  # fmt: skip
    assert entry is not None
    if entry["amount_nusd"] != amount_nusd:
        raise PostingMismatch(
            f"{kind} {reference}: posted {entry['amount_nusd']} nano-USD before, asked for {amount_nusd}"
        )
    return Posted(entry["balance_after_nusd"], is_new=False)
