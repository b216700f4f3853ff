"""One connection to a Nostr relay: opened safely, bounded in time and size, with one subscription and one event.

    open ── grammar ── resolve ── judge every address ── dial the judged one ── Relay
    Relay   subscribe ── publish ── next_event …          AUTH (NIP-42) whenever the relay says it is required

Nothing runs in the background: whoever waits for something reads the messages until it came. Whatever goes wrong is
RelayFailed, without a word on what it was.
Source: NIP-01, NIP-42.
"""

import asyncio
import logging
import secrets
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from app.adapters.addresses import (
    NotAllowed,
    RelayUrl,
    Resolve,
    allowed_addresses,
    read_relay_url,
    resolve_by_system,
)
from app.adapters.nostr import Event, read_event, sign_event

MAX_MESSAGE_BYTES: Final = 512 * 1024
MAX_MESSAGES: Final = 256  # of one connection; a call needs about five
MAX_TOTAL_BYTES: Final = 1024 * 1024
MAX_ADDRESSES_TRIED: Final = 3

_AUTH_KIND: Final = 22242
_AUTH_REQUIRED: Final = "auth-required:"
# A relay's words for an event that went no further. Whatever else it says, it may have passed the event on.
_REFUSALS: Final = (_AUTH_REQUIRED, "blocked:", "invalid:", "pow:", "rate-limited:", "restricted:")

# The library would log addresses, and at DEBUG every frame.
_SILENT: Final = logging.Logger("relay", level=logging.CRITICAL + 1)


class RelayFailed(Exception):
    """The relay cannot be used: every reason looks the same."""


class Published(StrEnum):
    """REFUSED: the relay said that it did not take the event. UNCONFIRMED: it said nothing, or nothing clear."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNCONFIRMED = "unconfirmed"


@dataclass(frozen=True, slots=True)
class RelayPatience:
    """How long a relay may take for each step."""

    connect_seconds: float = 10.0
    address_seconds: float = 5.0
    subscribe_seconds: float = 3.0  # a relay that never says EOSE may serve all the same
    publish_seconds: float = 5.0
    close_seconds: float = 1.0


Dial = Callable[[RelayUrl, str], Awaitable[ClientConnection]]
"""Opens a WebSocket to a relay at exactly this address."""


class Dialler:
    """Opens relays, judging where they are on each time anew."""

    def __init__(
        self,
        *,
        allow_private: bool,
        patience: RelayPatience | None = None,
        resolve: Resolve = resolve_by_system,
        dial: Dial | None = None,
    ) -> None:
        self._allow_private = allow_private
        self._patience = patience or RelayPatience()
        self._resolve = resolve
        self._dial = dial or dial_with(close_seconds=self._patience.close_seconds)

    @asynccontextmanager
    async def open(self, url: str, secret: str) -> AsyncIterator["Relay"]:
        """A connected relay, which is told who we are (the public key of `secret`) only if it wants to know.

        Raises RelayFailed.
        """
        socket = await self._connected(url)
        try:
            async with socket:
                yield Relay(socket, url, secret, self._patience)
        except (OSError, WebSocketException, RecursionError):  # RecursionError: no relay may choose how deep we go
            raise RelayFailed from None

    async def _connected(self, url: str) -> ClientConnection:
        try:
            async with asyncio.timeout(self._patience.connect_seconds):
                return await self._dialled(url)
        except (NotAllowed, OSError, TimeoutError, ValueError):  # ValueError: what the resolver says to odd names
            raise RelayFailed from None

    async def _dialled(self, text: str) -> ClientConnection:
        """Tries a few of the relay's addresses, one after the other."""
        url = read_relay_url(text, allow_private=self._allow_private)
        addresses = await allowed_addresses(url, self._resolve, allow_private=self._allow_private)
        for address in addresses[:MAX_ADDRESSES_TRIED]:
            try:
                async with asyncio.timeout(self._patience.address_seconds):
                    return await self._dial(url, address)
            except (OSError, TimeoutError, WebSocketException):
                continue
        raise RelayFailed


class _ConnectOnce(connect):
    """Follows no redirect: it could lead where the URL itself may not."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


def dial_with(ssl_context: ssl.SSLContext | None = None, *, close_seconds: float = 1.0) -> Dial:
    """The real thing, over TLS as the system trusts it unless told otherwise."""

    async def dial(url: RelayUrl, address: str) -> ClientConnection:
        # TLS and the Host header keep the name; only the TCP connection goes to the address.
        tls: dict[str, Any] = {"ssl": ssl_context or True} if url.is_secure else {}
        return await _ConnectOnce(
            url.text,
            host=address,
            port=url.port,
            proxy=None,
            compression=None,
            max_size=MAX_MESSAGE_BYTES,
            max_queue=4,
            open_timeout=None,  # ours is around it
            close_timeout=close_seconds,
            user_agent_header="satmeter",
            logger=_SILENT,
            **tls,
        )

    return dial


class Relay:
    """An open connection. Every verb raises RelayFailed once the relay closed it, broke a bound, or will not serve."""

    def __init__(self, socket: ClientConnection, url: str, secret: str, patience: RelayPatience) -> None:
        self._socket = socket
        self._url = url
        self._secret = secret
        self._patience = patience
        self._messages_left = MAX_MESSAGES
        self._bytes_left = MAX_TOTAL_BYTES
        self._subscription = secrets.token_hex(8)
        self._query: Mapping[str, Any] = {}
        self._events: deque[Event] = deque()
        self._is_open = False
        self._is_live = False  # everything stored was sent (EOSE)
        self._closed: str | None = None  # why the relay ended our subscription
        self._verdicts: dict[str, tuple[bool, str]] = {}
        self._challenge: str | None = None
        self._is_authenticated = False
        self._is_authenticating = False

    async def subscribe(self, query: Mapping[str, Any]) -> bool:
        """Ask for events; they are kept for `next_event` and `stored`. Says whether the relay has sent all it had."""
        self._query = query
        await self._request()
        try:
            async with asyncio.timeout(self._patience.subscribe_seconds):
                while not self._is_live:
                    await self._read()
        except TimeoutError:
            self._must_be_open()
        return self._is_live

    async def publish(self, event: Mapping[str, Any]) -> Published:
        """Send an event once; a second time only if the relay refused it for want of AUTH."""
        verdict = await self._sent(event)
        if verdict is not None and _wants_auth(verdict):
            await self._authenticate()
            verdict = await self._sent(event)
        if verdict is None:
            return Published.UNCONFIRMED
        is_accepted, words = verdict
        if is_accepted:
            return Published.ACCEPTED
        return Published.REFUSED if words.startswith(_REFUSALS) else Published.UNCONFIRMED

    async def next_event(self) -> Event:
        """The next authentic event, however long it takes."""
        while not self._events:
            self._must_be_open()
            await self._read()
        return self._events.popleft()

    def stored(self) -> list[Event]:
        """The authentic events that came so far."""
        return list(self._events)

    async def _sent(self, event: Mapping[str, Any]) -> tuple[bool, str] | None:
        """What the relay says to an event, None if nothing in time, or if the answer was there before its OK."""
        event_id = str(event["id"])
        self._verdicts.pop(event_id, None)
        await self._send("EVENT", event)
        try:
            async with asyncio.timeout(self._patience.publish_seconds):
                while event_id not in self._verdicts and not self._events:
                    await self._read()
        except TimeoutError:
            pass
        return self._verdicts.get(event_id)

    # NIP-42

    async def _authenticate(self) -> None:
        """Say who we are, if we did not yet; and open the subscription again if the relay closed it for want of that."""
        if self._is_authenticated:
            return
        self._is_authenticating = True
        try:
            async with asyncio.timeout(self._patience.publish_seconds):
                self._is_authenticated = await self._is_believed()
        except TimeoutError:
            raise RelayFailed from None
        finally:
            self._is_authenticating = False
        if not self._is_authenticated:
            raise RelayFailed
        if not self._is_open:
            await self._request()

    async def _is_believed(self) -> bool:
        while self._challenge is None:
            await self._read()
        tags = [["relay", self._url], ["challenge", self._challenge]]
        event = sign_event(self._secret, kind=_AUTH_KIND, content="", tags=tags)
        await self._send("AUTH", event)
        while event["id"] not in self._verdicts:
            await self._read()
        return self._verdicts[event["id"]][0]

    # The subscription

    async def _request(self) -> None:
        await self._send("REQ", self._subscription, self._query)
        self._is_open = True

    async def _renew(self, reason: str) -> None:
        """The relay closed our subscription: open it again if it was for want of AUTH, else there is no use in it.

        A relay may say so while we authenticate, as often as it likes: one authentication runs, and it alone opens it.
        """
        if not reason.startswith(_AUTH_REQUIRED) or self._is_authenticated:
            raise RelayFailed
        if not self._is_authenticating:
            await self._authenticate()

    def _must_be_open(self) -> None:
        """Time may have run out while the subscription was being renewed; nothing would come then."""
        if not self._is_open:
            raise RelayFailed

    # One message

    async def _send(self, *message: Any) -> None:
        try:
            await self._socket.send(msgspec.json.encode(message).decode())
        except WebSocketException:
            raise RelayFailed from None

    async def _read(self) -> None:
        """Take in one message, and renew the subscription if it closed that."""
        try:
            data = await self._socket.recv(decode=False)
        except WebSocketException:
            raise RelayFailed from None
        self._messages_left -= 1
        self._bytes_left -= len(data)
        if min(self._messages_left, self._bytes_left) < 0:
            raise RelayFailed
        if (message := _message(data)) is not None:
            self._take_in(message)
        # What has arrived is given to us without a pause: without this, a relay that talks on has the loop to itself.
        await asyncio.sleep(0)
        if self._closed is not None:
            reason, self._closed = self._closed, None
            self._is_open = False
            await self._renew(reason)

    def _take_in(self, message: "_Message") -> None:
        """Keep what a message says; what makes no sense is as if it had not come."""
        about = _text(message.first)
        match message.name:
            case "EVENT" if about == self._subscription:
                event = read_event(bytes(message.second), self._query)
                self._events.extend([] if event is None else [event])
            case "OK" if about is not None and bytes(message.second) in (b"true", b"false"):
                self._verdicts[about] = (bytes(message.second) == b"true", _text(message.third) or "")
            case "EOSE" if about == self._subscription:
                self._is_live = True
            case "CLOSED" if about == self._subscription:
                self._closed = _text(message.second) or ""
            case "AUTH" if about is not None:
                self._challenge = about


def _wants_auth(verdict: tuple[bool, str]) -> bool:
    is_accepted, words = verdict
    return not is_accepted and words.startswith(_AUTH_REQUIRED)


class _Message(msgspec.Struct, array_like=True, frozen=True):
    """A relay's message, taken apart no further than this: its parts may be large, and not for us."""

    name: str
    first: msgspec.Raw = msgspec.Raw(b"")
    second: msgspec.Raw = msgspec.Raw(b"")
    third: msgspec.Raw = msgspec.Raw(b"")


def _message(data: bytes) -> _Message | None:
    """A message, None for what is none."""
    try:
        return msgspec.json.decode(data, type=_Message)
    except (ValueError, RecursionError):
        return None


def _text(raw: msgspec.Raw) -> str | None:
    """A part of a message that is a text, None for what is none."""
    try:
        return msgspec.json.decode(raw, type=str)
    except (ValueError, RecursionError):
        return None
