"""The review queue: top-ups that a person should look at, and what that person decides."""

import uuid

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, new_id, row
from app.kernel.errors import InvoiceNotFound
from app.ledger.post import post
from app.ledger.tables import EntryKind
from app.topups.credit import TopupRef


async def ref_of(session: AsyncSession, topup_id: uuid.UUID) -> TopupRef:
    """Raises InvoiceNotFound."""
    found = await row(session, "SELECT account_id FROM topup WHERE id = :id", id=topup_id)
    if found is None:
        raise InvoiceNotFound
    return TopupRef(found["account_id"], topup_id)


async def resolve(session: AsyncSession, ref: TopupRef, adjust_nusd: int, finding_id: uuid.UUID | None = None) -> Row:
    """Take a top-up off the queue, and move `adjust_nusd` to its account (0: nothing; negative: from it), once.

    The same finding does not come back; one that is made anew after another is a finding of its own. Returns the
    top-up with the `finding_id` that was resolved. Raises InvoiceNotFound if nothing waits to be resolved, or not
    the finding that was named.
    """
    topup = await row(
        session, "SELECT review, finding_id FROM topup WHERE account_id = :account_id AND id = :id FOR UPDATE",
        account_id=ref.account_id, id=ref.topup_id,
    )  # fmt: skip
    if topup is None or topup["review"] is None:
        raise InvoiceNotFound("Nothing of this top-up waits for a review")
    if finding_id is not None and finding_id != topup["finding_id"]:
        raise InvoiceNotFound("That finding was resolved, or gave way to a newer one; look at the queue again")
    resolved_id = topup["finding_id"] or new_id()
    if adjust_nusd:
        reference = f"review/{ref.topup_id}/{resolved_id}"
        await post(session, ref.account_id, EntryKind.ADJUSTMENT, reference, "adjustment", adjust_nusd)
    resolved = await row(
        session,
        """UPDATE topup SET reviewed = review, review = NULL, finding_id = NULL
           WHERE account_id = :account_id AND id = :id RETURNING *""",
        account_id=ref.account_id, id=ref.topup_id,
    )  # fmt: skip
    assert resolved is not None
    return resolved | {"finding_id": resolved_id}
