"""Nostr's keys, signed events and old encryption (NIP-01, NIP-04), on pynostr with every guard it lacks. Pure.

A key's text is 64 lower-case hex digits. pynostr takes shorter ones and then reads past their end, shows a secret
key in its `str`, ignores the id a relay sent, and raises whatever it likes: nothing of it leaves this file.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
from pynostr.event import Event as _PynostrEvent
from pynostr.key import PrivateKey

MAX_EVENT_BYTES: Final = 128 * 1024  # an answer has a few hundred; NIP-44's old limit of 64 KiB makes 88,000
MAX_TAGS: Final = 64
MAX_TAG_FIELDS: Final = 16
MAX_TAG_CHARS: Final = 1024
MAX_TAGS_BYTES: Final = 16 * 1024  # of all tags as they came

_KEY: Final = re.compile(r"[0-9a-f]{64}")
_NIP04: Final = re.compile(r"[A-Za-z0-9+/]+={0,2}\?iv=[A-Za-z0-9+/]{22}==")

_Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Hex64 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]
_Word = Annotated[str, msgspec.Meta(max_length=MAX_TAG_CHARS)]
_Tag = Annotated[list[_Word], msgspec.Meta(max_length=MAX_TAG_FIELDS)]
_Tags = Annotated[list[_Tag], msgspec.Meta(max_length=MAX_TAGS)]


class CannotDecrypt(ValueError):
    """The text was not encrypted for this key by that one."""


class Event(msgspec.Struct, frozen=True):
    """An event whose shape is right; `read_event` gives only those whose id and signature are right as well."""

    id: _Hex32
    pubkey: _Hex32
    created_at: int
    kind: int
    tags: _Tags
    content: str
    sig: _Hex64

    def tagged(self, name: str) -> list[list[str]]:
        """What stands behind `name` in each tag of that name."""
        return [tag[1:] for tag in self.tags if tag and tag[0] == name]


def is_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None


def public_key(secret: str) -> str:
    """Raises ValueError if the secret is no key of the curve."""
    return str(_private_key(secret).public_key.hex())


def shared_x(secret: str, pubkey: str) -> bytes:
    """The X coordinate of the shared point, unhashed: what NIP-04 and NIP-44 start from.

    Raises ValueError if either is no key of the curve.
    """
    if not is_key(pubkey):
        raise ValueError("a public key is 64 hex digits")
    return bytes(_private_key(secret).ecdh(pubkey))


def sign_event(
    secret: str, *, kind: int, content: str, tags: Sequence[Sequence[str]], created_at: int | None = None
) -> dict[str, Any]:
    """An event as it goes to a relay. `created_at` is in Unix seconds, now unless told otherwise."""
    event = _PynostrEvent(
        content=content,
        pubkey=public_key(secret),
        created_at=int(time.time()) if created_at is None else created_at,
        kind=kind,
        tags=[list(tag) for tag in tags],
    )
    event.sign(secret)
    return dict(event.to_dict())


def read_event(text: bytes, query: Mapping[str, Any]) -> Event | None:
    """The event, None unless its shape, id and signature are all right.

    Whoever signed it, a relay can send anything at any length: what is too large, or not of the kinds and authors of
    `query`, is not taken apart, let alone hashed.
    """
    try:
        if not _is_worth_reading(text, query):
            return None
        event = msgspec.json.decode(text, type=Event)
        ours = _PynostrEvent.from_dict(msgspec.to_builtins(event))
        return event if ours.id == event.id and ours.verify() else None
    except ValueError:  # a shape, a surrogate, or a public key that is not on the curve
        return None


class _Claim(msgspec.Struct, frozen=True):
    """What an event says that it is. The rest is passed over, and costs next to nothing."""

    kind: int
    pubkey: str
    tags: msgspec.Raw


def _is_worth_reading(text: bytes, query: Mapping[str, Any]) -> bool:
    """Raises ValueError for what is no event at all."""
    if len(text) > MAX_EVENT_BYTES:
        return False
    claim = msgspec.json.decode(text, type=_Claim)
    return (
        claim.kind in query.get("kinds", [claim.kind])
        and claim.pubkey in query.get("authors", [claim.pubkey])
        and len(bytes(claim.tags)) <= MAX_TAGS_BYTES
    )


def encrypt_nip04(secret: str, pubkey: str, plaintext: str) -> str:
    shared_x(secret, pubkey)
    return str(_private_key(secret).encrypt_message(plaintext, pubkey))


def decrypt_nip04(secret: str, pubkey: str, payload: str) -> str:
    """Raises CannotDecrypt. NIP-04 has no MAC: only the signature of the event around it says that it is whole."""
    try:
        if not _NIP04.fullmatch(payload):
            raise ValueError
        shared_x(secret, pubkey)
        return str(_private_key(secret).decrypt_message(payload, pubkey))
    except ValueError:
        raise CannotDecrypt("not a NIP-04 text between these keys") from None


def is_nip04(payload: str) -> bool:
    """Whether a text is encrypted in NIP-04's way: wallets answer in the other way than they were asked in, at times."""
    return "?iv=" in payload


def _private_key(secret: str) -> PrivateKey:
    """Never to be printed: its `str` is the secret."""
    if not is_key(secret):
        raise ValueError("a secret key is 64 hex digits")
    try:
        return PrivateKey.from_hex(secret)
    except ValueError:
        raise ValueError("a secret key is a number from 1 up to the curve's order") from None
