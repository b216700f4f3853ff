"""One request of a caller and its answer, over ASGI: what rows read, and how they answer."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl

import msgspec

from app.client import Shown
from app.client.shown import offer_in, proof_in
from app.gateway.errors import BodyTooLarge, InvalidField, MalformedHeader, MalformedJson, NoApiKey

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Body: TypeAlias = dict[str, msgspec.Raw]
"""A JSON object by its fields, each as it was written."""

MOST_BODY_BYTES: Final = 26 * 1024 * 1024
"""25 MB of a file, and what surrounds it."""
_OBJECT: Final = msgspec.json.Decoder(Body)


class CallerGone(Exception):
    """Whoever asked hung up before all was read."""


class Interrupted(Exception):
    """An answer that is under way ends here, unfinished: its connection is closed, so that nobody takes it for whole."""


class Exchange:
    """A request and its answer. `gone` is set once the caller has hung up, as soon as `watch` was called."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._query, self._receive, self._send = scope.get("query_string", b""), receive, send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.id = uuid.uuid4().hex
        self.began = time.perf_counter()
        self.gone = asyncio.Event()
        self.has_begun = False
        """Whether an answer is under way, so that no other can be given."""
        self._watching: asyncio.Task[None] | None = None

    # --- what was asked ---

    @property
    def is_anthropics(self) -> bool:
        return "/messages" in self.path

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self._query.decode("latin-1"), keep_blank_values=True))

    def shown(self) -> Shown:
        """The API key, whichever way it was sent, and a proof of payment beside it or in its place.

        Raises NoApiKey, and MalformedHeader for two keys that differ.
        """
        found = {self.headers[name].strip() for name in ("x-api-key", "api-key") if self.headers.get(name, "").strip()}
        scheme, _, token = self.headers.get("authorization", "").strip().partition(" ")
        if token.strip() and scheme.lower() in ("bearer", "token"):
            found.add(token.strip())
        if len(found) > 1:
            raise MalformedHeader("two different API keys were sent: send one")
        shown = Shown(found.pop() if found else None, proof_in(self.headers), offer_in(self.headers))
        if not shown:
            raise NoApiKey
        return shown

    async def chunks(self, most_bytes: int = MOST_BODY_BYTES) -> AsyncIterator[bytes]:
        """The body as it comes. Raises BodyTooLarge, CallerGone."""
        length = self.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:12]) > most_bytes:
            raise BodyTooLarge
        size, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise CallerGone
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > most_bytes:
                raise BodyTooLarge
            if chunk:
                yield chunk

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def json(self) -> Body:
        """A JSON object. Raises MalformedJson, InvalidField."""
        raw = await self.body()
        try:
            return _OBJECT.decode(raw)
        except msgspec.ValidationError:
            raise InvalidField("the body must be a JSON object") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedJson(f"the body is not valid JSON: {error}") from None

    def watch(self) -> None:
        """From now on, the body being read, notice when the caller hangs up."""

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.gone.set()

        if self._watching is None:
            self._watching = asyncio.create_task(watch())

    # --- what is answered ---

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self.has_begun = True
        own = {"x-request-id": self.id, "access-control-allow-origin": "*", **headers}
        lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in own.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})

    async def write(self, chunk: bytes) -> None:
        """Waits while a slow caller has not read what was sent before. Nothing happens once they are gone."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self, chunk: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})

    async def answer(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, content_type: str = "application/json"
    ) -> None:
        """A whole answer at once."""
        length = {"content-type": content_type, "content-length": str(len(body))}
        await self.start(status, length | dict(headers or {}))
        await self.end(b"" if self.method == "HEAD" else body)

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
