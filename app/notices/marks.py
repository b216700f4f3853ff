"""The balances at which something is to be told: set when money comes in, passed by charges, looked at when they change.

Which they are, and what is told, functions.sql decides: the charges that pass them are decided there.
"""

import uuid

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import row
from app.notices.tell import tell

_ALL = 2**63 - 1


async def arm(session: AsyncSession, account_id: uuid.UUID, base_nusd: int | None = None) -> None:
    """Money came in: every mark stands again, those of shares by a top-up of `base_nusd`, else by the one before.

    A charge that leaves less than a mark then tells of it. There is none while nobody would be told.
    """
    await row(
        session,
        """UPDATE account a SET notice_base_nusd = coalesce(:base, a.notice_base_nusd), notice_mark_nusd =
               CASE WHEN EXISTS (SELECT 1 FROM notice_address n WHERE n.account_id = :account_id)
                    THEN meter_mark(coalesce(:base, a.notice_base_nusd), a.low_balance_nusd, a.floor_nusd, :all) END
           WHERE a.id = :account_id""",
        account_id=account_id, base=base_nusd, all=_ALL,
    )  # fmt: skip
    await row(
        session, "UPDATE notice_address SET runway_told_at = NULL WHERE account_id = :account_id AND runway_told_at IS NOT NULL",
        account_id=account_id,
    )  # fmt: skip


async def adjusted(session: AsyncSession, account_id: uuid.UUID, amount_nusd: int) -> None:
    """An operator moved money: out of the account is told as a charge is, into it the marks it rose above stand again."""
    if amount_nusd < 0:
        await look(session, account_id)
        return
    await row(
        session,
        """UPDATE account a SET notice_mark_nusd = greatest(
               a.notice_mark_nusd, meter_mark(a.notice_base_nusd, a.low_balance_nusd, a.floor_nusd, a.posted_nusd))
           WHERE a.id = :account_id AND EXISTS (SELECT 1 FROM notice_address n WHERE n.account_id = :account_id)""",
        account_id=account_id,
    )


async def look(session: AsyncSession, account_id: uuid.UUID) -> None:
    """Tell if the balance is below its mark now: what a charge does, for whoever else lowers the balance or raises a mark."""
    account = await row(
        session,
        """SELECT notice ->> 'type' AS type, CAST(notice -> 'data' AS text) AS data
           FROM (SELECT * FROM account WHERE id = :account_id AND posted_nusd < notice_mark_nusd FOR NO KEY UPDATE) a,
                meter_notice(a.notice_mark_nusd, a.notice_base_nusd, a.low_balance_nusd, a.floor_nusd, a.posted_nusd) AS notice""",
        account_id=account_id,
    )  # fmt: skip
    if account is None:
        return
    await tell(session, account_id, account["type"], msgspec.Raw(account["data"].encode()))
    await row(
        session,
        """UPDATE account SET notice_mark_nusd = meter_mark(notice_base_nusd, low_balance_nusd, floor_nusd, posted_nusd)
           WHERE id = :account_id""",
        account_id=account_id,
    )


async def last_topup_nusd(session: AsyncSession, account_id: uuid.UUID) -> int | None:
    """What the newest top-up was credited, for an account that was topped up before marks were kept."""
    found = await row(
        session,
        """SELECT credited_nusd FROM topup WHERE account_id = :account_id AND credited_nusd > 0
           ORDER BY settled_at DESC NULLS LAST LIMIT 1""",
        account_id=account_id,
    )  # fmt: skip
    return found["credited_nusd"] if found else None
