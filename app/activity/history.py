"""The calls of an account, newest first."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, rows


@dataclass(frozen=True, slots=True)
class Calls:
    """Which calls are asked for; None is all of them. `first_id` is included, `end_id` is not."""

    key_id: uuid.UUID | None = None
    first_id: uuid.UUID | None = None
    end_id: uuid.UUID | None = None
    model: str | None = None
    endpoint: str | None = None
    outcome: str | None = None


async def calls(
    session: AsyncSession,
    account_id: uuid.UUID,
    wanted: Calls,
    *,
    limit: int,
    before: uuid.UUID | None = None,
    skipped: int = 0,
) -> Sequence[Row]:
    """A page of calls, newest first; `before` is the id that ended the page before, `skipped` how many come before it."""
    asked = {name: value for name in wanted.__slots__ if (value := getattr(wanted, name)) is not None}
    if before is not None:
        asked["before"] = before
    where = " AND ".join(("u.account_id = :account_id", *(_CONDITIONS[name] for name in asked)))
    if skipped:  # counted by their ids alone, which an index has
        where += f" AND u.id <= (SELECT u.id FROM usage u WHERE {where} ORDER BY u.id DESC OFFSET :skipped LIMIT 1)"
        asked["skipped"] = skipped
    return await rows(
        session,
        f"SELECT {_COLUMNS} FROM usage u WHERE {where} ORDER BY u.id DESC LIMIT :limit",
        account_id=account_id, limit=limit, **asked,
    )  # fmt: skip


# Only the conditions that are asked for: the planner then sees which index and which months they leave.
_CONDITIONS: Final[Mapping[str, str]] = {
    "key_id": "u.key_id = :key_id",
    "first_id": "u.id >= :first_id",
    "end_id": "u.id < :end_id",
    "before": "u.id < :before",
    "model": "coalesce(u.model, u.served_model) = :model",
    "endpoint": "u.endpoint = :endpoint",
    "outcome": "u.outcome = :outcome",
}
_COLUMNS: Final = """u.id, u.key_id, coalesce(u.model, u.served_model) AS model, coalesce(u.provider, u.lines->>'provider') AS provider,
    u.endpoint, u.units, u.cost_nusd, u.outcome, u.request_id"""

_MEDIA: Final = {
    "video": ("video_seconds",),
    "image": ("images", "pixels", "image_output_tokens"),
    "audio": ("audio_seconds", "characters", "audio_output_tokens"),
}


def query_type(units: Mapping[str, Any] | None, endpoint: str | None) -> str:
    """What kind of call it was, as far as can be seen from what it used: video, image, audio, embedding, chat or other."""
    used = {name for name, count in (units or {}).items() if count}
    for kind, names in _MEDIA.items():
        if used.intersection(names):
            return kind
    if "embedding" in (endpoint or ""):
        return "embedding"
    return "chat" if used & {"input_tokens", "output_tokens"} or "chat" in (endpoint or "") else "other"
