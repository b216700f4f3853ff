"""Warning of keys that expire within a week, once for each time they are set to."""

from datetime import datetime
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, rows
from app.notices.tell import tell

WARNED_DAYS: Final = 7
_SHORT_LIVED: Final = "interval '1 day'"
"""Keys that were made for less than this are made to expire, and nobody need be told."""


async def tell_of_expiring(db: Database, now: datetime) -> int:
    """Returns how many keys there are to be told of now; what was told is not told again."""
    return await db.transaction(lambda session: _tell(session, now))


async def _tell(session: AsyncSession, now: datetime) -> int:
    expiring = await rows(
        session,
        f"""SELECT k.account_id, k.id, k.name, k.preview, k.expire_at FROM notice_address n
            JOIN api_key k ON k.account_id = n.account_id
            WHERE k.expire_at > :now AND k.expire_at <= CAST(:now AS timestamptz) + interval '{WARNED_DAYS} days'
              AND k.expire_at > k.created_at + {_SHORT_LIVED} AND k.deleted_at IS NULL AND k.disabled_at IS NULL""",
        now=now,
    )
    for key in expiring:
        data = {"key_id": key["id"], "name": key["name"], "key": key["preview"], "expires_at": key["expire_at"]}
        await tell(session, key["account_id"], "key.expiring", data, once=f"{key['id']}/{key['expire_at'].isoformat()}")
    return len(expiring)
