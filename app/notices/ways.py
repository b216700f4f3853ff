"""What delivering asks of the world: the Protocols that stand with their user; adapters bend to them.

A stranger names the address and answers what it likes, as slowly as it likes: nothing of it is believed but its status.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol, runtime_checkable


class Outcome(StrEnum):
    """GONE: whoever is there wants no more (410). FAILED: to be tried again."""

    DELIVERED = "delivered"
    FAILED = "failed"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of one attempt. `error` is a word of ours, `retry_after_seconds` what the receiver asked for."""

    outcome: Outcome
    status: int | None = None
    error: str | None = None
    retry_after_seconds: int | None = None


@runtime_checkable
class Webhooks(Protocol):
    """Posts to the URLs of strangers."""

    def shown(self, url: str, *, is_operators: bool = False) -> str:
        """What may be shown of a URL: its path may hold a token. Raises InvalidField (param `webhook_url`), with no part of it,
        where it may not be posted to."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, is_operators: bool = False) -> Sent:
        """Post once, to an address judged now; follows nothing. Never raises for what a stranger does.

        The operator's own URL may be in a private network.
        """


@runtime_checkable
class Messages(Protocol):
    """Sends Nostr direct messages."""

    @property
    def npub(self) -> str:
        """Who we are: the key that our messages come from."""

    def key_of(self, npub: str) -> str:
        """A public key as 64 hex digits. Raises InvalidField (param `npub`)."""

    def npub_of(self, key: str) -> str:
        """The other way."""

    async def send(self, key: str, text: str, written_at: datetime) -> Sent:
        """One message, the same each time it is sent again. Never raises for what a relay does."""
