"""Signed HTTP requests of Nostr (NIP-98): from an Authorization header to what its event says. Pure."""

import base64
from typing import Final

from bech32 import bech32_encode, convertbits

from app.accounts.nostr import Signed
from app.adapters.nostr import read_event

KIND: Final = 27235
MAX_HEADER_CHARS: Final = 8192


class SignedRequests:
    """A reader of NIP-98's headers."""

    def signed(self, header: str) -> Signed | None:
        """See app.accounts.nostr.Nostr."""
        scheme, _, text = header.strip().partition(" ")
        if scheme.lower() != "nostr" or len(text) > MAX_HEADER_CHARS:
            return None
        try:
            event = read_event(base64.b64decode(text.strip(), validate=True), {"kinds": [KIND]})
        except ValueError:  # no base64, or no ASCII
            return None
        if event is None:
            return None
        urls, methods, payloads = (
            tuple(tag[0] if tag else "" for tag in event.tagged(name)) for name in ("u", "method", "payload")
        )
        return Signed(
            bytes.fromhex(event.id), event.pubkey, npub_of(event.pubkey), event.created_at, urls, methods, payloads
        )


def npub_of(pubkey: str) -> str:
    """A public key as people know it (NIP-19)."""
    words = convertbits(bytes.fromhex(pubkey), 8, 5)
    assert words is not None
    return str(bech32_encode("npub", words))
