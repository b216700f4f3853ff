"""What operators did: written in the act's own transaction, provable as written by us, and read newest first."""

import uuid
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, new_id, row, rows
from app.kernel.errors import InvalidField
from app.kernel.security import Admin, Pepper

_SAID: Final = ("id", "admin", "act", "subject", "reason", "amount_nusd", "before", "after", "request_id")
"""Whatever an act says."""
LEAST_REASON: Final = 3
MOST_REASON: Final = 500


async def write_act(
    session: AsyncSession,
    pepper: Pepper,
    admin: Admin,
    act: str,
    subject: str,
    reason: str | None = None,
    amount_nusd: int | None = None,
    *,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> uuid.UUID:
    """Write an act down; returns its id, which an adjustment's reference may name as `act/<id>`.

    `subject` is what it was done to, the account's id first where it is an account's. `before` and `after` are what it
    changed, in JSON's own types, never a secret.
    """
    written = {
        "id": new_id(), "admin": admin.name, "act": act, "subject": subject, "reason": reason, "amount_nusd": amount_nusd,
        "before": _text(before), "after": _text(after), "request_id": admin.request_id,
    }  # fmt: skip
    await row(
        session,
        """INSERT INTO admin_log (id, admin, act, subject, reason, amount_nusd, before, after, request_id, proof)
           VALUES (:id, :admin, :act, :subject, :reason, :amount_nusd, :before, :after, :request_id, :proof)""",
        **written, proof=proof_of(pepper, written),
    )  # fmt: skip
    return written["id"]  # type: ignore[return-value]


def proof_of(pepper: Pepper, act: Mapping[str, Any]) -> bytes:
    """The MAC over everything an act says."""
    return pepper.tag(b"act", *(b"" if act[name] is None else str(act[name]).encode() for name in _SAID))


def _text(changed: Mapping[str, Any] | None) -> str | None:
    """As text, which comes back as it was written: the database's own JSON would be spelled another way."""
    return None if changed is None else msgspec.json.encode(changed, order="sorted").decode()


async def acts(
    session: AsyncSession,
    limit: int,
    before_id: uuid.UUID | None,
    *,
    admin: str | None = None,
    act: str | None = None,
    subject: str | None = None,
) -> list[Row]:
    """A page of the log, newest first: of one operator, of one kind of act, about a subject and what belongs to it."""
    return await rows(
        session,
        """SELECT id, admin, act, subject, reason, amount_nusd, before, after, request_id, created_at FROM admin_log
           WHERE (CAST(:before_id AS uuid) IS NULL OR id < :before_id)
             AND (CAST(:admin AS text) IS NULL OR admin = :admin) AND (CAST(:act AS text) IS NULL OR act = :act)
             AND (CAST(:subject AS text) IS NULL OR subject = :subject OR starts_with(subject, :subject || '/'))
           ORDER BY id DESC LIMIT :limit""",
        before_id=before_id, admin=admin, act=act, subject=subject, limit=limit,
    )  # fmt: skip


def changed_by(act: Row) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What an act says was there before it and after it."""
    before, after = (None if act[name] is None else msgspec.json.decode(act[name]) for name in ("before", "after"))
    return before, after


def clean_reason(text: str) -> str:
    """Raises InvalidField for one that says nothing, or is no line of text."""
    if not LEAST_REASON <= len(text) <= MOST_REASON or not text.isprintable() or not text.strip():
        raise InvalidField(
            f"a reason is one line of {LEAST_REASON} to {MOST_REASON} characters, got {len(text)}", param="reason"
        )
    return text
