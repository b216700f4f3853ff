"""What a key was set to, proven: a MAC that only we can make, so that a limit raised in the database is found."""

import uuid
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from app.kernel.security import Pepper

PROVEN: Final = (
    "account_id", "id", "revision", "name", "preview", "masked_hash", "limit_nusd", "reset_period", "scopes", "allowed_models",
    "call_limit_nusd", "requests_per_minute", "expire_at", "disabled_at", "deleted_at", "parent_id", "ancestor_ids", "more_periods",
    "more_limits_nusd",
)  # fmt: skip
"""What a person set, or what a key is known by; `revision` counts its changes, so that none of them comes back."""

_SINCE_TREES: Final = PROVEN[PROVEN.index("parent_id") :]
"""What was not there when the first keys were proven: a key that has nothing of it is proven as they were."""

MOVING: Final = (
    "window_start", "window_usage_nusd", "held_nusd", "lifetime_nusd", "minute_start", "minute_calls", "created_at", "updated_at", "sealed_secret", "proof",
    "more_starts", "more_usage_nusd",
)  # fmt: skip
"""What calls change, or what is bound in another way: the sealed secret by its row's name."""


_SAID: Final = ("account_id", "id", "act", "shown_by", "subject")


def key_proof(pepper: Pepper, key: Mapping[str, Any]) -> bytes:
    """The MAC over what a key was set to; `key` is its row, or the part of it that is proven."""
    is_plain = all(key[name] is None for name in _SINCE_TREES)
    said = [name for name in PROVEN if not (is_plain and name in _SINCE_TREES)]
    return pepper.tag(b"api_key", msgspec.json.encode([_plain(key[name]) for name in said]))


def event_proof(pepper: Pepper, event: Mapping[str, Any]) -> bytes:
    """The MAC over what an event of credentials says."""
    return pepper.tag(b"credential_event", *(str(event[name] or "").encode() for name in _SAID))


def _plain(value: Any) -> Any:
    if isinstance(value, memoryview | bytes):
        return bytes(value).hex()
    return str(value) if isinstance(value, uuid.UUID) else value
