"""What OpenRouter's bodies have in common: a key in its words, its days, and its hash."""

import re
from datetime import date, datetime
from typing import Any, Final, Literal

import msgspec

from app.kernel.db import Row
from app.kernel.errors import InvalidField
from app.kernel.money import JsonNumber, usd, usd_or_null
from app.openrouter.spending import Spent

Reset = Literal["daily", "weekly", "monthly"]
_RESETS: Final[dict[str, Reset]] = {"day": "daily", "week": "weekly", "month": "monthly"}
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_HASH: Final = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


class KeyWords(msgspec.Struct, frozen=True, kw_only=True):
    """What a key and its owner are told alike, USD. Nobody brings keys of their own here, so all of `byok` is 0."""

    label: str
    limit: JsonNumber
    limit_remaining: JsonNumber
    limit_reset: Reset | None
    usage: JsonNumber
    usage_daily: JsonNumber
    usage_weekly: JsonNumber
    usage_monthly: JsonNumber
    byok_usage: int = 0
    byok_usage_daily: int = 0
    byok_usage_weekly: int = 0
    byok_usage_monthly: int = 0
    include_byok_in_limit: bool = False
    creator_user_id: str | None = None
    expires_at: datetime | None


def key_words(key: Row, spent: Spent) -> dict[str, Any]:
    """The fields of KeyWords."""
    limit_nusd = key["limit_nusd"]
    return {
        "label": key["preview"],
        "limit": usd_or_null(limit_nusd),
        "limit_remaining": usd_or_null(spent.left_nusd),
        "limit_reset": _RESETS.get(key["reset_period"]),
        "usage": usd(key["total_nusd"]),
        "usage_daily": usd(spent.day_nusd),
        "usage_weekly": usd(spent.week_nusd),
        "usage_monthly": usd(spent.month_nusd),
        "expires_at": key["expire_at"],
    }


def read_day(text: str | None, param: str) -> date | None:
    """Raises InvalidField for what is no day like 2026-01-31."""
    if text is None:
        return None
    try:
        if not _DAY.fullmatch(text):  # fromisoformat takes weeks and other spellings too
            raise ValueError
        return date.fromisoformat(text)
    except ValueError:
        raise InvalidField(f"{param} must be a UTC day, such as 2026-01-31", param=param) from None


def read_hash(text: str) -> bytes | None:
    """The SHA-256 of an API key, which is its name here; None for what is none."""
    return bytes.fromhex(text) if _HASH.fullmatch(text) else None
