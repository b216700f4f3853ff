"""Warning of balances that will not last: once for each top-up, where somebody wants to hear of it."""

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.runway import read_runway
from app.kernel.db import Database, row, rows
from app.kernel.money import number, usd, usd_or_null
from app.ledger.statement import balance
from app.notices.tell import tell

SHORT_DAYS: Final = 3
_AT_ONCE: Final = 200
_START: Final = uuid.UUID(int=0)


async def foretell(db: Database, now: datetime) -> int:
    """Tell every account that spent within the day, and whose balance lasts less than three days at that. Returns how many."""
    told, after = 0, _START
    while accounts := await db.transaction(lambda session, after=after: _spending(session, after, now)):  # type: ignore[misc]
        for account_id in accounts:
            told += await db.transaction(lambda session, each=account_id: _foretold(session, each, now))  # type: ignore[misc]
        after = accounts[-1]
    return told


async def _spending(session: AsyncSession, after: uuid.UUID, now: datetime) -> Sequence[uuid.UUID]:
    found = await rows(
        session,
        f"""SELECT n.account_id FROM notice_address n JOIN account a ON a.id = n.account_id
            WHERE n.account_id > :after AND n.runway_told_at IS NULL AND a.status = 'active' AND a.posted_nusd > a.floor_nusd
              AND a.updated_at > CAST(:now AS timestamptz) - interval '1 day'
            ORDER BY n.account_id LIMIT {_AT_ONCE}""",
        after=after, now=now,
    )  # fmt: skip
    return [each["account_id"] for each in found]


async def _foretold(session: AsyncSession, account_id: uuid.UUID, now: datetime) -> bool:
    found = await balance(session, account_id)
    lasts = await read_runway(session, account_id, found, now)
    tenths = lasts.tenths_of_days
    if tenths is None or tenths >= SHORT_DAYS * 10:
        return False
    taken = await row(
        session,
        """UPDATE notice_address SET runway_told_at = :now WHERE account_id = :account_id AND runway_told_at IS NULL
           RETURNING account_id""",
        now=now, account_id=account_id,
    )  # fmt: skip
    if taken is None:
        return False
    told = {
        "balance_usd": usd(found.posted_nusd), "burn_usd_per_day": usd_or_null(lasts.burn_nusd_per_day),
        "runway_days": number(tenths, 1), "percent": None, "reasons": ["runway"],
    }  # fmt: skip
    await tell(session, account_id, "balance.low", told)
    return True
