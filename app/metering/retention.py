"""How long holds are kept: a closed one moves no money, and is removed when nobody asks about it any more."""

from typing import Final

from app.kernel.db import Database, in_portions

KEPT_DAYS: Final = 35
"""Longer than a month, so that what a proxy reports late, or asks about again, still meets its hold."""


async def forget_closed_holds(db: Database, at_once: int = 5000) -> int:
    """Remove holds that were closed longer than `KEPT_DAYS` ago, in portions of a transaction each. Returns how many.

    A settled one stays guarded by its entry: whatever comes later under its request_id is a repeat, or refused as another
    request. After a released or expired one its request_id may be authorized anew.
    """
    return await in_portions(
        db,
        f"""WITH old AS MATERIALIZED (SELECT account_id, id FROM hold WHERE closed_at < now() - interval '{KEPT_DAYS} days'
                                    ORDER BY closed_at LIMIT :at_once)
            DELETE FROM hold h USING old o WHERE h.account_id = o.account_id AND h.id = o.id RETURNING 1 AS gone""",
        at_once,
    )
