"""Any Python proxy, billed: an ASGI application in front of another one that asks Satmeter before, and tells it after."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, MutableMapping
from typing import Any, Final, Literal

import msgspec

from app.client.asked import Asked, Reader, asked_of, limited, telling_usage
from app.client.meter import Meter
from app.client.usage import Answer, CountTokens, bytes_by_four
from app.client.wire import Allowed, Denied, Done, Outcome

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_OURS: Final = (b"x-billing-", b"x-satmeter-", b"x-account-id", b"x-key-id", b"x-balance-usd")
"""Headers that say who pays: never a client's."""
_UNTOUCHED: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_RAN_OUT_OF_TIME: Final = frozenset({408, 499, 500, 504})
"""Error statuses after which the upstream may have run all the same. Every other error says that it refused, or failed
before its first byte: 502 and 503 too."""


def metered(
    app: ASGIApp,
    meter: Meter,
    *,
    free: Collection[str] = (),
    read: Reader = asked_of,
    mode: Literal["strict", "clamp"] = "clamp",
    count_tokens: CountTokens = bytes_by_four,
    reads_on_seconds: float = 30.0,
    max_body_bytes: int = 25 * 1024 * 1024,
) -> ASGIApp:
    """`app`, to which no call comes that is not paid for.

    Every path is billed but those in `free`, compared whole; a GET needs a key that may spend, and costs nothing. A call is
    a JSON body, of which `read` makes an estimate; with `clamp` it asks for no longer an answer than can be paid. What was
    used is read from the answer, a JSON body or server-sent events. A call that reached `app` is charged for what came of it;
    it is released only where the answer's status says that it was refused. A client that leaves pays for what is produced:
    `app` is not told for `reads_on_seconds`, so that it reads on and the upstream's own count comes; then it is.
    The meter is opened and closed with the application (ASGI's lifespan).
    """
    billing = _Billing(app, meter, read, mode, count_tokens, reads_on_seconds, max_body_bytes)

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await _live(app, meter, scope, receive, send)
            case "http" if scope["method"] == "OPTIONS" or scope["path"] in free:
                await app(_cleaned(scope), receive, send)
            case "http":
                await billing.answer(_cleaned(scope), receive, send)
            case _:  # what cannot be metered is not to be had
                await send({"type": "websocket.close", "code": 1008, "reason": "not metered here"})

    return asked


def key_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The API key of a request: `Authorization: Bearer | Token`, `x-api-key` or `api-key`."""
    found = {name.lower(): value.decode("latin-1").strip() for name, value in headers}
    scheme, _, token = found.get(b"authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "token") and token.strip():
        return token.strip()
    return found.get(b"x-api-key") or found.get(b"api-key") or None


class _Billing:
    """What every request of one application is billed by."""

    def __init__(
        self,
        app: ASGIApp,
        meter: Meter,
        read: Reader,
        mode: Literal["strict", "clamp"],
        count_tokens: CountTokens,
        reads_on_seconds: float,
        max_body_bytes: int,
    ) -> None:
        self._app, self._meter, self._read, self._mode = app, meter, read, mode
        self._count_tokens, self._reads_on_seconds, self._max_body_bytes = (
            count_tokens,
            reads_on_seconds,
            max_body_bytes,
        )

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = key_of(scope["headers"])
        if scope["method"] in _UNTOUCHED:
            verified = await self._meter.verify(key)
            await (_deny(verified, send) if isinstance(verified, Denied) else self._app(scope, receive, send))
            return
        raw = await self._body(receive)
        body = _object(raw) if raw is not None else None
        if raw is None or body is None:
            verdict = await self._meter.verify(key)  # who is calling is asked before what is asked
            fault = _TOO_LARGE if raw is None else _NOT_JSON
            await _deny(verdict if isinstance(verdict, Denied) else fault, send)
            return
        asked = self._read(scope["path"], body)
        verdict_of_call = await self._meter.authorize(
            key, model=asked.model, endpoint=asked.endpoint, estimate=asked.estimate, mode=self._mode
        )
        if isinstance(verdict_of_call, Denied):
            await _deny(verdict_of_call, send)
            return
        granted = verdict_of_call.granted_output_tokens if verdict_of_call.clamped else None
        changed = telling_usage(limited(body, asked, granted), asked)
        call = _Call(self._meter, verdict_of_call, asked, send, self._count_tokens)
        await call.run(self._app, scope, raw if changed == body else _encoded(changed), receive, self._reads_on_seconds)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, None where it is too large."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                return None
        return bytes(body)


class _Call:
    """A call that is allowed, from the moment it reaches the application to its settlement."""

    def __init__(self, meter: Meter, allowed: Allowed, asked: Asked, send: Send, count_tokens: CountTokens) -> None:
        self._meter, self._allowed, self._asked, self._send, self._count = meter, allowed, asked, send, count_tokens
        self._began = time.monotonic()
        self._first_byte: float | None = None
        self._status = 0
        self._answer = Answer("", count_tokens=count_tokens)
        self._passing = _Passing(hides_usage=False)
        self._is_gone = asyncio.Event()
        self._has_ended = False

    async def run(self, app: ASGIApp, scope: Scope, body: bytes, receive: Receive, reads_on_seconds: float) -> None:
        scope = _with_body(scope, body, self._allowed.request_id)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receiving() -> Message:
            if messages:
                return messages.pop()
            await self._is_gone.wait()
            await asyncio.sleep(0 if self._has_ended else reads_on_seconds)
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._is_gone.set()

        watching = asyncio.create_task(watch())
        self._meter.forwarded(self._allowed, lambda: self._answer.so_far(self._allowed.sent))
        try:
            await app(scope, receiving, self._sending)
        finally:
            watching.cancel()
            self._settle()
            await asyncio.gather(watching, return_exceptions=True)

    async def _sending(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = {name.lower(): value for name, value in message["headers"]}
            self._answer = Answer(headers.get(b"content-type", b"").decode("latin-1"), count_tokens=self._count)
            hides_usage = self._answer.is_stream and not self._asked.shows_usage
            self._passing = _Passing(hides_usage=hides_usage)
            told = [(b"x-billing-request-id", self._allowed.request_id.encode())]
            kept = [each for each in _without_ours(message["headers"]) if not (hides_usage and _is_length(each))]
            message = dict(message) | {"headers": [*kept, *told]}
        elif message["type"] == "http.response.body":
            body, is_last = message.get("body", b""), not message.get("more_body", False)
            if body and self._first_byte is None:
                self._first_byte = time.monotonic()
            self._answer.feed(body)
            self._has_ended = is_last
            message = dict(message) | {"body": self._passing.through(body, is_last=is_last)}
        if self._is_gone.is_set():
            return
        try:
            await self._send(message)
        except OSError:  # some servers say so, others say nothing
            self._is_gone.set()

    def _settle(self) -> None:
        self._answer.end()
        is_refused = self._status >= 400 and self._status not in _RAN_OUT_OF_TIME
        if is_refused:
            self._meter.release(self._allowed, f"the upstream answered {self._status}")
            return
        self._meter.settle(self._allowed, self._done())

    def _done(self) -> Done:
        now = time.monotonic()
        first = None if self._first_byte is None else (self._first_byte - self._began) * 1000
        outcome: Outcome = "completed"
        if self._is_gone.is_set() and not (self._has_ended and self._answer.usage):
            outcome = "client_disconnected"
        elif not self._has_ended or self._status in _RAN_OUT_OF_TIME:
            outcome = "partial"
        timing = {"latency_ms": (now - self._began) * 1000, "ttft_ms": first if self._answer.is_stream else None}
        return self._answer.done(self._allowed.sent, outcome, **timing)


class _Passing:
    """A stream on its way to the caller, without the usage that only we asked for."""

    def __init__(self, *, hides_usage: bool) -> None:
        self._hides_usage, self._rest = hides_usage, b""

    def through(self, chunk: bytes, *, is_last: bool) -> bytes:
        if not self._hides_usage:
            return chunk
        *events, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        passed = b"".join(event + b"\n\n" for event in events if not _is_usage_alone(event))
        return passed + self._rest if is_last else passed


def _is_usage_alone(event: bytes) -> bool:
    if b'"usage"' not in event:
        return False
    read = _object(event.partition(b"data:")[2])
    return read is not None and read.get("choices") == [] and isinstance(read.get("usage"), dict)


async def _live(app: ASGIApp, meter: Meter, scope: Scope, receive: Receive, send: Send) -> None:
    """The meter is there before the application begins, and ends after it; also where that has no lifespan of its own."""
    heard, said = list[str](), list[str]()

    async def receiving() -> Message:
        message = await receive()
        heard.append(message["type"])
        return message

    async def sending(message: Message) -> None:
        said.append(message["type"])
        if message["type"] != "lifespan.shutdown.complete":  # there is something to tell Satmeter before that
            await send(message)

    async with meter:
        try:
            await app(scope, receiving, sending)
        except Exception:
            if said:
                raise
        if not any(kind.startswith("lifespan.startup.") for kind in said):
            if "lifespan.startup" not in heard:
                await receive()
            await send({"type": "lifespan.startup.complete"})
            while (await receive())["type"] != "lifespan.shutdown":
                pass
    if "lifespan.startup.failed" not in said and "lifespan.shutdown.failed" not in said:
        await send({"type": "lifespan.shutdown.complete"})


def _cleaned(scope: Scope) -> Scope:
    """Without headers that say who pays, and with answers that can be read."""
    headers = [(name, value) for name, value in _without_ours(scope["headers"]) if name.lower() != b"accept-encoding"]
    return {**scope, "headers": [*headers, (b"accept-encoding", b"identity")]}


def _without_ours(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return [(name, value) for name, value in headers if not name.lower().replace(b"_", b"-").startswith(_OURS)]


def _with_body(scope: Scope, body: bytes, request_id: str) -> Scope:
    length = [(b"content-length", b"%d" % len(body)), (b"x-billing-request-id", request_id.encode())]
    kept = [each for each in scope["headers"] if not _is_length(each)]
    return {**scope, "headers": [*kept, *length]}


def _is_length(header: tuple[bytes, bytes]) -> bool:
    return header[0].lower() in (b"content-length", b"transfer-encoding")


def _object(raw: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        read = msgspec.json.decode(raw)
        return read if isinstance(read, dict) else None
    return None


def _encoded(body: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(body)


async def _deny(denied: Denied, send: Send) -> None:
    body = denied.body()
    headers = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in denied.headers.items()]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": denied.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _fault(status: int, code: str, message: str) -> Denied:
    error = {"message": message, "type": "invalid_request_error", "code": code, "param": None}
    return Denied.of(status, msgspec.Raw(msgspec.json.encode(error)), {})


_TOO_LARGE: Final = _fault(413, "body_too_large", "The body is larger than is taken here")
_NOT_JSON: Final = _fault(400, "malformed_json", "The body is not a JSON object")
