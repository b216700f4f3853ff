"""Findings: what a person should look at. Each is an identity of its own, also when the same is found again later."""

import uuid

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import new_id, row
from app.notices.tell import tell


async def note_finding(
    session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID, why: str, *, gives_way: bool = False
) -> None:
    """Put a top-up before a person, unless this is what waits already or what was dealt with last.

    A finding that waits is replaced by a newer one, but for one that `gives_way`.
    """
    found = await row(
        session,
        """UPDATE topup SET review = :why, finding_id = :finding_id
           WHERE account_id = :account_id AND id = :id AND review IS DISTINCT FROM :why AND reviewed IS DISTINCT FROM :why
             AND (review IS NULL OR NOT :gives_way)
           RETURNING invoice_id, finding_id""",
        why=why, gives_way=gives_way, finding_id=new_id(), account_id=account_id, id=topup_id,
    )  # fmt: skip
    if found is not None:
        await tell(
            session, None, "review.waiting", {**found, "topup_id": topup_id, "account_id": account_id, "reason": why}
        )
