"""A small Nostr relay in memory: it checks what it is told, keeps it for a while, and tells whoever subscribed.

NIP-01 (EVENT, REQ, CLOSE; OK, EOSE, CLOSED, NOTICE), NIP-11 (what a relay says of itself), NIP-40 (expiration).
Served at /relay beside the rest of the sandbox; a restart forgets everything, as relays may.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from litestar import Response, Router, WebSocket, get, websocket
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect
from msgspec import Struct

from .nostr import Event, Filter, read_event, read_filter

MAX_MESSAGE_CHARS = 131_072
MAX_SUBSCRIPTIONS = 20
MAX_FILTERS = 10
MAX_KEPT = 5_000
MAX_WAITING = 1_000
EPHEMERAL_SECONDS = 60
AHEAD_SECONDS = 900
"""How far a creation time may lie in the future."""
FOREVER = 2**53


class Refused(Exception):
    """An event that is not taken; the text is what OK says, with NIP-01's prefix."""


class _Kept(Struct, frozen=True):
    event: Event
    forget_at: float


class Subscription(Struct, frozen=True, eq=False):
    """Filters, and who is told of what passes one of them."""

    filters: tuple[Filter, ...]
    tell: Callable[[Event], None]


class Relay:
    """Every event that is kept now, oldest first, and every subscription."""

    def __init__(self, now: Callable[[], float] = time.time, max_kept: int = MAX_KEPT) -> None:
        self.now = now
        self._max_kept = max_kept
        self._kept: dict[str, _Kept] = {}
        self._subscriptions: dict[Subscription, None] = {}

    def take(self, event: Event) -> str:
        """Keep an event and tell the subscribers; answers an empty text, or that it is known. Raises Refused."""
        self._check_times(event)
        self._forget()
        if event.id in self._kept:
            return "duplicate: it is known"
        older = self._replaced_by(event)
        if older is not None and (older.created_at, event.id) > (event.created_at, older.id):
            return "duplicate: a newer one is kept"
        if older is not None:
            del self._kept[older.id]
        self._kept[event.id] = _Kept(event, self._forget_at(event))
        if len(self._kept) > self._max_kept:
            del self._kept[next(iter(self._kept))]
        for subscription in list(self._subscriptions):
            if any(each.matches(event) for each in subscription.filters):
                subscription.tell(event)
        return ""

    def stored(self, filters: Sequence[Filter]) -> list[Event]:
        """What is kept and passes a filter, newest first, as many of each filter as it wants."""
        self._forget()
        newest = sorted((kept.event for kept in self._kept.values()), key=lambda event: (-event.created_at, event.id))
        found = {event.id for each in filters for event in [e for e in newest if each.matches(e)][: each.limit]}
        return [event for event in newest if event.id in found]

    def subscribe(self, filters: Sequence[Filter], tell: Callable[[Event], None]) -> Subscription:
        """Be told of every event from now on that passes one of the filters."""
        subscription = Subscription(tuple(filters), tell)
        self._subscriptions[subscription] = None
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Be told no more; nothing happens the second time."""
        self._subscriptions.pop(subscription, None)

    def _check_times(self, event: Event) -> None:
        if event.created_at > self.now() + AHEAD_SECONDS:
            raise Refused("invalid: it was created in the future")
        if event.expires_at is not None and event.expires_at <= self.now():
            raise Refused("invalid: it has expired")

    def _replaced_by(self, event: Event) -> Event | None:
        """The kept event that this one stands in the place of."""
        if not is_replaceable(event.kind):
            return None
        same = (kept.event for kept in self._kept.values() if _place(kept.event) == _place(event))
        return next(same, None)

    def _forget_at(self, event: Event) -> float:
        ephemeral = 20_000 <= event.kind < 30_000
        return min(event.expires_at or FOREVER, self.now() + EPHEMERAL_SECONDS if ephemeral else FOREVER)

    def _forget(self) -> None:
        now = self.now()
        for id in [id for id, kept in self._kept.items() if kept.forget_at <= now]:
            del self._kept[id]


def is_replaceable(kind: int) -> bool:
    """Whether of such events only the newest in its place counts."""
    return kind in (0, 3) or 10_000 <= kind < 20_000 or 30_000 <= kind < 40_000


def _place(event: Event) -> tuple[int, str, str]:
    """Of two events in one place the newer is kept; addressable kinds have a place for each `d` tag."""
    return event.kind, event.pubkey, (event.tag("d") or "") if event.kind >= 30_000 else ""


class Visitor:
    """One client's side of the talk: hears its messages, and says the relay's."""

    def __init__(self, relay: Relay, say: Callable[[str], None]) -> None:
        self.relay = relay
        self._say = say
        self._subscriptions: dict[str, Subscription] = {}

    def hear(self, text: str) -> None:
        """Answer one message; whatever it is, the talk goes on."""
        try:
            verb, *rest = self._read(text)
        except ValueError as error:
            return self._tell("NOTICE", f"invalid: {error}")
        if verb == "EVENT" and len(rest) == 1:
            self._event(rest[0])
        elif verb == "REQ" and rest and isinstance(rest[0], str):
            self._request(rest[0], rest[1:])
        elif verb == "CLOSE" and len(rest) == 1:
            self._close(str(rest[0]))
        else:
            self._tell("NOTICE", "unsupported: this relay knows EVENT, REQ and CLOSE")

    def leave(self) -> None:
        """End every subscription."""
        for id in list(self._subscriptions):
            self._close(id)

    def _read(self, text: str) -> list[Any]:
        if len(text) > MAX_MESSAGE_CHARS:
            raise ValueError(f"a message has at most {MAX_MESSAGE_CHARS} characters")
        message = msgspec.json.decode(text.encode("utf-8", "replace"))
        if not isinstance(message, list) or not message:
            raise ValueError("a message is an array")
        return message

    def _event(self, raw: Any) -> None:
        id = raw.get("id") if isinstance(raw, dict) else None
        try:
            self._tell("OK", id, True, self.relay.take(read_event(raw)))
        except Refused as refused:
            self._tell("OK", id, False, str(refused))
        except ValueError as error:
            self._tell("OK", id if isinstance(id, str) else "", False, f"invalid: {error}")

    def _request(self, id: str, raw: list[Any]) -> None:
        self._close(id)
        try:
            if not 1 <= len(id) <= 64 or not 1 <= len(raw) <= MAX_FILTERS:
                raise ValueError(f"a subscription has an id of 1 to 64 characters and 1 to {MAX_FILTERS} filters")
            if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
                raise ValueError(f"one connection has at most {MAX_SUBSCRIPTIONS} subscriptions")
            filters = [read_filter(each) for each in raw]
        except ValueError as error:
            return self._tell("CLOSED", id[:64], f"invalid: {error}")
        for event in self.relay.stored(filters):
            self._tell("EVENT", id, event)
        self._tell("EOSE", id)
        self._subscriptions[id] = self.relay.subscribe(filters, lambda event: self._tell("EVENT", id, event))

    def _close(self, id: str) -> None:
        subscription = self._subscriptions.pop(id, None)
        if subscription is not None:
            self.relay.unsubscribe(subscription)

    def _tell(self, *message: Any) -> None:
        self._say(msgspec.json.encode(message).decode())


Socket = WebSocket[Any, Any, Any]


@websocket("/relay")
async def talk(socket: Socket, relay: NamedDependency[Relay]) -> None:
    """One connection. A reader who lets a thousand messages wait misses the next ones."""
    waiting: asyncio.Queue[str] = asyncio.Queue(MAX_WAITING)

    def say(text: str) -> None:
        with suppress(asyncio.QueueFull):
            waiting.put_nowait(text)

    await socket.accept()
    visitor, writing = Visitor(relay, say), asyncio.create_task(_write(socket, waiting))
    try:
        while True:
            visitor.hear(await socket.receive_data("text"))
    except WebSocketDisconnect:
        pass
    finally:
        visitor.leave()
        writing.cancel()
        await asyncio.wait([writing])


async def _write(socket: Socket, waiting: asyncio.Queue[str]) -> None:
    with suppress(WebSocketDisconnect, OSError):
        while True:
            await socket.send_text(await waiting.get())


@get("/relay")
async def describe() -> Response[bytes]:
    """NIP-11: what this relay is, for whoever asks over HTTP."""
    said = {
        "name": "Satmeter's sandbox relay",
        "description": "In memory, for development, no real money.",
        "supported_nips": [1, 11, 40],
        "software": "satmeter",
        "limitation": {
            "max_message_length": MAX_MESSAGE_CHARS,
            "max_subscriptions": MAX_SUBSCRIPTIONS,
            "max_filters": MAX_FILTERS,
        },
    }
    return Response(msgspec.json.encode(said), media_type="application/nostr+json")


router = Router("/", route_handlers=[talk, describe])
