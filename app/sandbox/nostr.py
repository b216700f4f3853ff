"""Nostr's events and the filters that choose among them, as NIP-01 writes, signs and reads them."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from pynostr.key import PrivateKey, PublicKey

Hex32 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Hex64 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{128}\Z")]
Kind = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[int, Meta(ge=0, le=2**53)]


class Event(Struct, frozen=True):
    """A signed event; `created_at` in unix seconds."""

    id: Hex32
    pubkey: Hex32
    created_at: Seconds
    kind: Kind
    tags: tuple[tuple[str, ...], ...]
    content: str
    sig: Hex64

    def tag(self, name: str) -> str | None:
        """The value of the first tag of this name, None if there is none."""
        return next((tag[1] for tag in self.tags if len(tag) > 1 and tag[0] == name), None)

    def tagged(self, name: str) -> set[str]:
        """The values of all tags of this name."""
        return {tag[1] for tag in self.tags if len(tag) > 1 and tag[0] == name}

    @property
    def expires_at(self) -> int | None:
        """What its `expiration` tag (NIP-40) says, in unix seconds; None for nothing, or nothing that is a number."""
        text = self.tag("expiration") or ""
        return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else None


class _Plain(Struct, frozen=True, forbid_unknown_fields=True):
    """A filter without its tag conditions, as it is written."""

    ids: tuple[Hex32, ...] | None = None
    authors: tuple[Hex32, ...] | None = None
    kinds: tuple[Kind, ...] | None = None
    since: Seconds | None = None
    until: Seconds | None = None
    limit: Annotated[int, Meta(ge=0)] | None = None


class Filter(Struct, frozen=True):
    """What a subscription asks for: every condition that is given must hold."""

    plain: _Plain
    tags: tuple[tuple[str, frozenset[str]], ...] = ()

    @property
    def limit(self) -> int | None:
        """How many stored events are wanted at most."""
        return self.plain.limit

    def matches(self, event: Event) -> bool:
        wanted = self.plain
        return (
            (wanted.ids is None or event.id in wanted.ids)
            and (wanted.authors is None or event.pubkey in wanted.authors)
            and (wanted.kinds is None or event.kind in wanted.kinds)
            and (wanted.since is None or event.created_at >= wanted.since)
            and (wanted.until is None or event.created_at <= wanted.until)
            and all(values & event.tagged(name) for name, values in self.tags)
        )


def read_event(raw: object) -> Event:
    """An event whose id and signature are right. Raises ValueError with what is wrong."""
    event = msgspec.convert(raw, Event)
    if event_id(event.pubkey, event.created_at, event.kind, event.tags, event.content) != event.id:
        raise ValueError("the id is not the hash of the event")
    try:
        is_signed = PublicKey.from_hex(event.pubkey).verify(bytes.fromhex(event.sig), bytes.fromhex(event.id))
    except ValueError:
        is_signed = False
    if not is_signed:
        raise ValueError("the signature is not the author's")
    return event


def read_filter(raw: object) -> Filter:
    """A filter. Raises ValueError for what is none, and for conditions that are not known here."""
    if not isinstance(raw, dict):
        raise ValueError("a filter is an object")
    plain = {name: value for name, value in raw.items() if not name.startswith("#")}
    tags = {name[1:]: value for name, value in raw.items() if name.startswith("#")}
    if not all(re.fullmatch("[a-zA-Z]", name) for name in tags):
        raise ValueError("a tag condition has one letter")
    read = ((name, frozenset(msgspec.convert(values, list[str]))) for name, values in tags.items())
    return Filter(msgspec.convert(plain, _Plain), tuple(read))


def sign(secret: str, kind: int, content: str, tags: Sequence[Sequence[str]], created_at: int) -> Event:
    """An event by the owner of `secret`, 32 bytes in hex."""
    key = PrivateKey(bytes.fromhex(secret))
    pubkey, frozen = key.public_key.hex(), tuple(tuple(tag) for tag in tags)
    id = event_id(pubkey, created_at, kind, frozen, content)
    return Event(id, pubkey, created_at, kind, frozen, content, bytes(key.sign(bytes.fromhex(id))).hex())


def event_id(pubkey: str, created_at: int, kind: int, tags: Sequence[Sequence[str]], content: str) -> str:
    """The hash that names an event."""
    parts: list[Any] = [0, pubkey, created_at, kind, tags, content]
    written = json.dumps(parts, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()


def public_key(secret: str) -> str:
    """The public key, x-only, of a secret; both 32 bytes in hex."""
    return str(PrivateKey(bytes.fromhex(secret)).public_key.hex())
