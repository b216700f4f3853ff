"""Nostr direct messages that only their receiver can read, or know the sender of (NIP-17, NIP-59, NIP-44).

    rumor (kind 14, unsigned) ── sealed for the receiver (kind 13, by us) ── wrapped by a key used once (kind 1059)

The receiver's relays are those of its own list (kind 10050) where one is found at the relays that we know, else these.
Source: NIP-17, NIP-59.
"""

import asyncio
import hashlib
import json
import random
import secrets
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from bech32 import bech32_decode, bech32_encode, convertbits

from app.adapters import nip44
from app.adapters.nostr import Event, public_key, shared_x, sign_event
from app.adapters.relay import Dialler, Published, RelayFailed
from app.kernel.errors import InvalidField
from app.notices.ways import Outcome, Sent

_RUMOR: Final = 14
_SEAL: Final = 13
_WRAP: Final = 1059
_RELAY_LIST: Final = 10_050
_RELAYS: Final = 3
"""Of a receiver's list, which its owner keeps short."""
_TOTAL_SECONDS: Final = 40.0
_TWO_DAYS_SECONDS: Final = 172_800
_KEY_BYTES: Final = 32


class NostrMessages:
    """Messages from one key of ours, over relays that are dialled for each."""

    def __init__(self, dialler: Dialler, secret: str, relays: Sequence[str]) -> None:
        """`secret` is 64 hex digits; `relays` are asked for receivers' lists, and used where there is none."""
        self._dialler, self._secret, self._relays = dialler, secret, tuple(relays)

    @property
    def npub(self) -> str:
        return self.npub_of(public_key(self._secret))

    def npub_of(self, key: str) -> str:
        data = convertbits(bytes.fromhex(key), 8, 5)
        assert data is not None
        return bech32_encode("npub", data)

    def key_of(self, npub: str) -> str:
        """Also a key that is hex already. A secret key is refused as what it is, and not repeated."""
        text = npub.strip().lower()
        if text.startswith("nsec"):
            raise InvalidField(
                "npub is a public key: this is a secret one, which nobody should have seen", param="npub"
            )
        key = text
        if text.startswith("npub1"):
            prefix, data = bech32_decode(text)
            raw = convertbits(data, 5, 8, False) if prefix == "npub" and data is not None else None
            key = bytes(raw).hex() if raw is not None and len(raw) == _KEY_BYTES else ""
        try:
            shared_x(self._secret, key)
        except ValueError:
            raise InvalidField("npub is not a Nostr public key (npub1… or 64 hex digits)", param="npub") from None
        return key

    async def send(self, key: str, text: str, written_at: datetime) -> Sent:
        """Delivered once one relay has taken it."""
        try:
            async with asyncio.timeout(_TOTAL_SECONDS):
                relays = await self._relays_of(key)
                if not relays:
                    return Sent(Outcome.FAILED, error="no_relay")
                wrap = wrapped(self._secret, key, text, int(written_at.timestamp()))
                taken = await asyncio.gather(*(self._published(relay, wrap) for relay in relays))
        except TimeoutError:
            return Sent(Outcome.FAILED, error="timeout")
        return Sent(Outcome.DELIVERED) if any(taken) else Sent(Outcome.FAILED, error="no_relay_took_it")

    async def _relays_of(self, key: str) -> Sequence[str]:
        found = await asyncio.gather(*(self._listed(relay, key) for relay in self._relays))
        newest = max((event for events in found for event in events), key=lambda event: event.created_at, default=None)
        listed = [tag[0] for tag in newest.tagged("relay") if tag] if newest is not None else []
        return listed[:_RELAYS] or self._relays[:_RELAYS]

    async def _listed(self, relay: str, key: str) -> Sequence[Event]:
        try:
            async with self._dialler.open(relay, self._secret) as opened:
                await opened.subscribe({"kinds": [_RELAY_LIST], "authors": [key], "limit": 1})
                return opened.stored()
        except RelayFailed:
            return ()

    async def _published(self, relay: str, wrap: dict[str, Any]) -> bool:
        try:
            async with self._dialler.open(relay, self._secret) as opened:
                return await opened.publish(wrap) is Published.ACCEPTED
        except RelayFailed:
            return False


def wrapped(secret: str, key: str, text: str, written_at: int) -> dict[str, Any]:
    """A kind 1059 event for `key`, with the message of `secret`'s owner inside. `written_at` is in Unix seconds.

    The rumor is the same however often it is wrapped, so that a receiver knows a repeat; wrap and seal bear times of up to two
    days ago, which tell nobody when it was.
    """
    conversation = nip44.conversation_key(secret, key)
    rumor = _rumor(public_key(secret), key, text, written_at)
    seal = sign_event(
        secret, kind=_SEAL, content=nip44.encrypt(_as_json(rumor), conversation), tags=[], created_at=_some_time_ago()
    )
    once = secrets.token_hex(_KEY_BYTES)
    return sign_event(
        once, kind=_WRAP, content=nip44.encrypt(_as_json(seal), nip44.conversation_key(once, key)), tags=[["p", key]],
        created_at=_some_time_ago(),
    )  # fmt: skip


def _rumor(pubkey: str, key: str, text: str, written_at: int) -> dict[str, Any]:
    tags = [["p", key]]
    content = [0, pubkey, written_at, _RUMOR, tags, text]
    return {
        "id": hashlib.sha256(_as_json(content).encode()).hexdigest(), "pubkey": pubkey, "created_at": written_at,
        "kind": _RUMOR, "tags": tags, "content": text,
    }  # fmt: skip


def _as_json(value: Any) -> str:
    """As NIP-01 has ids made: no spaces, and no escapes that need not be."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _some_time_ago() -> int:
    return int(time.time()) - random.randrange(_TWO_DAYS_SECONDS)  # noqa: S311 - it hides when, and opens nothing
