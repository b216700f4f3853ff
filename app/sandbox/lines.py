"""A wallet's lines to relays: to the sandbox's own it speaks directly, to any other over a WebSocket that comes back."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidURI, WebSocketException
from websockets.uri import parse_uri

from .nostr import Event, read_event, read_filter
from .relay import Refused, Relay, is_replaceable

AGAIN_AFTER_SECONDS = 0.3
SUBSCRIPTION = "requests"
Hear = Callable[[Event, "Line"], None]


class Line(Protocol):
    """A way to one relay, over which events of interest are heard and ours are said."""

    def say(self, event: Event) -> None:
        """Publish, sooner or later."""

    async def hang_up(self) -> None:
        """Hear nothing more."""


class OwnLine:
    """The line to a relay in this process."""

    def __init__(self, relay: Relay, wanted: dict[str, Any], hear: Hear) -> None:
        self._relay = relay
        self._subscription = relay.subscribe([read_filter(wanted)], lambda event: hear(event, self))

    def say(self, event: Event) -> None:
        # What our own relay refuses, such as an answer that expired, any other relay would refuse as well.
        with suppress(Refused):
            self._relay.take(event)

    async def hang_up(self) -> None:
        self._relay.unsubscribe(self._subscription)


class FarLine:
    """The line to a relay elsewhere.

    After every interruption the newest replaceable event is said again, for the relay may have forgotten it, and so is
    what was not confirmed yet.
    """

    def __init__(self, url: str, wanted: dict[str, Any], hear: Hear) -> None:
        self._url, self._wanted, self._hear = url, wanted, hear
        self._standing: Event | None = None
        self._unconfirmed: dict[str, Event] = {}
        self._outgoing: asyncio.Queue[Event] = asyncio.Queue()
        self._living = asyncio.create_task(self._live(), name=f"line to {url}")

    def say(self, event: Event) -> None:
        self._unconfirmed[event.id] = event
        self._standing = event if is_replaceable(event.kind) else self._standing
        self._outgoing.put_nowait(event)

    async def hang_up(self) -> None:
        self._living.cancel()
        await asyncio.wait([self._living])

    async def _live(self) -> None:
        while True:
            with suppress(OSError, TimeoutError, WebSocketException):
                async with connect(self._url, proxy=None, open_timeout=5, close_timeout=1) as socket:
                    await self._talk(socket)
            await asyncio.sleep(AGAIN_AFTER_SECONDS)

    async def _talk(self, socket: ClientConnection) -> None:
        self._outgoing = asyncio.Queue()
        if self._standing is not None:
            self._unconfirmed[self._standing.id] = self._standing
        for event in self._unconfirmed.values():
            self._outgoing.put_nowait(event)
        await _send(socket, "REQ", SUBSCRIPTION, self._wanted)
        writing = asyncio.create_task(self._write(socket))
        try:
            async for text in socket:
                self._read(text)
        finally:
            writing.cancel()
            await asyncio.wait([writing])

    async def _write(self, socket: ClientConnection) -> None:
        with suppress(WebSocketException):
            while True:
                await _send(socket, "EVENT", await self._outgoing.get())

    def _read(self, text: str | bytes) -> None:
        """One message of the relay; what is not understood is passed over."""
        with suppress(ValueError, IndexError, TypeError):
            message = msgspec.json.decode(text)
            if message[0] == "EVENT" and message[1] == SUBSCRIPTION:
                self._hear(read_event(message[2]), self)
            elif message[0] == "OK":
                self._unconfirmed.pop(message[1], None)


def open_line(url: str, own_url: str, relay: Relay, wanted: dict[str, Any], hear: Hear) -> Line:
    """The line to a relay by its address."""
    return OwnLine(relay, wanted, hear) if url == own_url else FarLine(url, wanted, hear)


def is_relay_address(url: str) -> bool:
    """Whether this could be one."""
    try:
        return bool(parse_uri(url).host)
    except (InvalidURI, ValueError):
        return False


async def _send(socket: ClientConnection, *message: Any) -> None:
    await socket.send(msgspec.json.encode(message).decode())
