"""Reading the books: an account's figures, and its entries newest first."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, row, rows
from app.kernel.errors import NotFound


@dataclass(frozen=True, slots=True)
class Balance:
    """An account's figures in nano-USD; `available` may be spent now, and is never shown below zero."""

    posted_nusd: int
    held_nusd: int
    floor_nusd: int
    status: str

    @property
    def available_nusd(self) -> int:
        return max(0, self.posted_nusd - self.held_nusd - self.floor_nusd)


async def balance(session: AsyncSession, account_id: uuid.UUID) -> Balance:
    """Raises NotFound without such an account."""
    found = await row(
        session, "SELECT posted_nusd, held_nusd, floor_nusd, status FROM account WHERE id = :id", id=account_id
    )
    if found is None:
        raise NotFound("No such account")
    return Balance(**found)


async def statement(
    session: AsyncSession, account_id: uuid.UUID, *, limit: int = 50, before_id: int | None = None
) -> Sequence[Row]:
    """A page of entries, newest first; `before_id` is the id that ended the page before. What was put away is one line for as many
    entries as its reference names, so that each balance is the one below it and the amount."""
    return await rows(
        session,
        """SELECT * FROM (
               (SELECT id, kind, reference, contra, amount_nusd, balance_after_nusd, created_at FROM entry
                WHERE account_id = :account_id AND (CAST(:before_id AS bigint) IS NULL OR id < :before_id) ORDER BY id DESC LIMIT :limit)
               UNION ALL
               (SELECT last_id, 'usage', concat('put away/', first_id, '-', last_id), 'revenue:usage', amount_nusd, balance_after_nusd, ended_at
                FROM entry_closing
                WHERE account_id = :account_id AND (CAST(:before_id AS bigint) IS NULL OR last_id < :before_id)
                ORDER BY first_id DESC LIMIT :limit)) lines
           ORDER BY id DESC LIMIT :limit""",
        account_id=account_id, before_id=before_id, limit=limit,
    )  # fmt: skip
