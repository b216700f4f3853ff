"""Sessions that were signed out, in whatever process: their cookies open nothing any more, whoever kept a copy.

A cookie proves itself, so that a session is in no table while it lasts; what is kept is the few that were ended before their time,
for as long as their cookies would have lasted. One more is read by its primary key beside the credential, at the same time.
"""

import uuid
from typing import Final

from app.console.session import SESSION_SECONDS, Session, SignedOut
from app.kernel.db import Database, in_portions

_OF_CLOCKS_SECONDS: Final = 3600
"""How far the clocks of those who make cookies and of the database may be apart."""
_AT_ONCE: Final = 5000


async def sign_out(db: Database, session: Session) -> None:
    """End this session. From the answer on nobody is let in with its cookie."""
    await db.one(
        "INSERT INTO session_over (id) VALUES (%(id)s) ON CONFLICT DO NOTHING RETURNING id", {"id": _id(session)}
    )


async def refuse_signed_out(db: Database, session: Session) -> None:
    """Raises SignedOut."""
    if await db.one("SELECT id FROM session_over WHERE id = %(id)s", {"id": _id(session)}) is not None:
        raise SignedOut(session.role, had_one=True)


async def forget_signed_out(db: Database) -> int:
    """Forget those whose cookies are over. Returns how many."""
    return await in_portions(
        db,
        f"""DELETE FROM session_over WHERE id IN (
                SELECT id FROM session_over WHERE over_at < now() - interval '{SESSION_SECONDS + _OF_CLOCKS_SECONDS} seconds' LIMIT :at_once)
            RETURNING id""",
        _AT_ONCE,
    )


def _id(session: Session) -> uuid.UUID:
    return uuid.UUID(hex=session.nonce)
