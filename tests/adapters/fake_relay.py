"""A Nostr relay of a few lines on loopback that behaves, counts, and can be told to misbehave.

It hands every event to whoever subscribed to it, as often as it comes: it removes no duplicates, as some relays do not.
"""

import asyncio
import json
import secrets
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import nostr_sdk
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

Json = dict[str, Any]


@dataclass(eq=False)
class _Client:
    socket: ServerConnection
    challenge: str
    is_authenticated: bool = False
    queries: dict[str, Json] = field(default_factory=dict)

    async def say(self, *message: Any) -> None:
        with suppress(ConnectionClosed):
            await self.socket.send(json.dumps(message))


@dataclass
class FakeRelay:
    """What it does stands in its fields, which may be changed while it runs."""

    wants_auth: bool = False  # of those who connect from now on
    is_open_to_readers: bool = False  # wants it of those who write alone
    is_mute: bool = False  # takes connections and says nothing, ever
    sends_eose: bool = True
    confirms: bool = True  # says OK to events
    refuses: str | None = None  # its words when it takes no event
    is_lying: bool = False  # says that it refuses, and takes it
    passes_on: bool = True  # hands events to subscribers
    closes_subscriptions: str | None = None  # its words when it serves no subscription
    closes_times: int = 1  # how often it says so of each
    stores: bool = False  # keeps events of every kind and gives them to later subscribers
    drops_on: Callable[[Json], bool] = field(default=lambda event: False)  # breaks the connection after such an event
    redirects_to: str | None = None
    flood: tuple[str, ...] = ()  # what it sends before anything else, raw
    tls: ssl.SSLContext | None = None

    published: list[Json] = field(default_factory=list)
    requests: list[Json] = field(default_factory=list)  # the filters of every REQ
    order: list[str] = field(default_factory=list)  # REQ and EVENT as they came
    authenticated: list[str] = field(default_factory=list)  # the public keys that did
    hosts: list[str] = field(default_factory=list)  # the Host headers that clients sent
    connections: int = 0
    port: int = 0
    _server: Server | None = None
    _clients: set[_Client] = field(default_factory=set)
    _stored: list[Json] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://127.0.0.1:{self.port}/"

    async def __aenter__(self) -> "FakeRelay":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = await serve(
            self._serve,
            "127.0.0.1",
            self.port,
            process_request=self._process,
            ssl=self.tls,
            close_timeout=0.2,
            compression=None,
            max_size=None,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    def drop(self, having: str = "#e") -> None:
        """Break the connections whose filter has this name: `#e` for who waits for an answer, `#p` for the wallet's."""
        for client in list(self._clients):
            if any(having in query for query in client.queries.values()):
                client.socket.transport.abort()

    def count(self, event_id: str) -> int:
        """How often clients sent this event."""
        return sum(event["id"] == event_id for event in self.published)

    def _process(self, _: ServerConnection, request: Request) -> Response | None:
        self.connections += 1
        self.hosts.append(request.headers["Host"])
        if self.redirects_to is None:
            return None
        return Response(HTTPStatus.FOUND, "Found", Headers(Location=self.redirects_to))

    async def _serve(self, socket: ServerConnection) -> None:
        client = _Client(socket, secrets.token_hex(8), is_authenticated=not self.wants_auth)
        self._clients.add(client)
        try:
            for words in self.flood:
                await socket.send(words)
            if self.wants_auth:
                await client.say("AUTH", client.challenge)
            async for text in socket:
                if not self.is_mute:
                    await self._take(client, json.loads(text))
        except ConnectionClosed:
            pass
        finally:
            self._clients.discard(client)

    async def _take(self, client: _Client, message: list[Any]) -> None:
        match message:
            case ["REQ", str(name), dict(query)]:
                await self._subscribe(client, name, query)
            case ["EVENT", dict(event)]:
                await self._publish(client, event)
            case ["AUTH", dict(event)]:
                await self._authenticate(client, event)

    async def _subscribe(self, client: _Client, name: str, query: Json) -> None:
        self.order.append("REQ")
        self.requests.append(query)
        if not client.is_authenticated and not self.is_open_to_readers:
            return await client.say("CLOSED", name, "auth-required: say who you are")
        if self.closes_subscriptions is not None:
            for _ in range(self.closes_times):
                await client.say("CLOSED", name, self.closes_subscriptions)
            return None
        client.queries[name] = query
        for event in self._stored:
            if _fits(event, query):
                await client.say("EVENT", name, event)
        if self.sends_eose:
            await client.say("EOSE", name)
        return None

    async def _publish(self, client: _Client, event: Json) -> None:
        self.order.append("EVENT")
        if not client.is_authenticated:
            return await client.say("OK", event["id"], False, "auth-required: say who you are")
        self.published.append(event)
        if self.refuses is not None:
            await client.say("OK", event["id"], False, self.refuses)
        elif self.confirms:
            await client.say("OK", event["id"], True, "")
        if self.refuses is not None and not self.is_lying:
            return None
        if self.stores or not 20000 <= event["kind"] < 30000:
            self._stored.append(event)
        if self.passes_on:
            await self.hand_out(event)
        if self.drops_on(event):
            client.socket.transport.abort()
        return None

    async def hand_out(self, event: Json) -> None:
        for client in list(self._clients):
            for name, query in list(client.queries.items()):
                if _fits(event, query):
                    await client.say("EVENT", name, event)

    async def send_to_all(self, event: Json) -> None:
        """Give an event to every subscription, whatever it asked for."""
        for client in list(self._clients):
            for name in list(client.queries):
                await client.say("EVENT", name, event)

    async def _authenticate(self, client: _Client, event: Json) -> None:
        tags = dict(tag[:2] for tag in event["tags"])
        is_right = (
            event["kind"] == 22242
            and nostr_sdk.Event.from_json(json.dumps(event)).verify()
            and tags == {"relay": self.url, "challenge": client.challenge}
        )
        client.is_authenticated = is_right
        self.authenticated += [event["pubkey"]] if is_right else []
        await client.say("OK", event["id"], is_right, "" if is_right else "restricted: no")

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something to become true of it."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)


def _fits(event: Json, query: Json) -> bool:
    wanted = {"kinds": event["kind"], "authors": event["pubkey"], "ids": event["id"]}
    if any(name in query and value not in query[name] for name, value in wanted.items()):
        return False
    tagged = {name: {tag[1] for tag in event["tags"] if tag[0] == name[1]} for name in query if name.startswith("#")}
    return all(values & set(query[name]) for name, values in tagged.items())
