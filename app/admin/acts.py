"""What operators did: written in the act's own transaction, and provable as written by us."""

import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import new_id, row
from app.kernel.security import Admin, Pepper


async def write_act(
    session: AsyncSession,
    pepper: Pepper,
    admin: Admin,
    act: str,
    subject: str,
    reason: str | None = None,
    amount_nusd: int | None = None,
) -> uuid.UUID:
    """Write an act down; returns its id, which an adjustment's reference may name as `act/<id>`."""
    written = {
        "id": new_id(), "admin": admin.name, "act": act, "subject": subject, "reason": reason, "amount_nusd": amount_nusd
    }  # fmt: skip
    await row(
        session,
        """INSERT INTO admin_log (id, admin, act, subject, reason, amount_nusd, proof)
           VALUES (:id, :admin, :act, :subject, :reason, :amount_nusd, :proof)""",
        **written, proof=proof_of(pepper, written),
    )  # fmt: skip
    return written["id"]  # type: ignore[return-value]


def proof_of(pepper: Pepper, act: Mapping[str, Any]) -> bytes:
    """The MAC over everything an act says."""
    parts = (act[name] for name in ("id", "admin", "act", "subject", "reason", "amount_nusd"))
    return pepper.tag(b"act", *(b"" if part is None else str(part).encode() for part in parts))
