"""A notice as a person reads it in a chat: one sentence, and its figures."""

from collections.abc import Mapping
from typing import Any, Final

_SENTENCES: Final[Mapping[str, str]] = {
    "balance.low": "Your balance is low.",
    "balance.empty": "Your balance is used up: calls are refused until you top up.",
    "topup.settled": "Your top-up has arrived.",
    "topup.late": "A payment of yours came late; it was credited at the lower of the two rates.",
    "topup.partial": "Your top-up was paid in part; what came was credited.",
    "autotopup.refused": "Your wallet refused an automatic top-up.",
    "autotopup.paused": "Automatic top-ups are paused.",
    "key.limit_reached": "An API key has reached its limit.",
    "key.expiring": "An API key expires soon.",
    "key.revealed": "An API key was shown in full. If that was not you, revoke it.",
    "account.rotated": "Your credit id was changed. If that was not you, use your recovery code.",
    "notices.changed": "Where your notices go was changed. If that was not you, change your credit id.",
    "notices.test": "A test: notices reach you here.",
    "review.waiting": "A top-up waits for your review.",
    "audit.difference": "The audit found a difference in the books.",
    "backend.down": "A payment backend cannot be reached.",
}


def sentence(type: str, data: Mapping[str, Any], message_id: str) -> str:
    """The sentence, then a line for each figure, then the id by which a repeat is known."""
    lines = [f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in data.items() if value not in (None, [])]
    return "\n".join([_SENTENCES[type], *lines, f"({type}, {message_id})"])


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
