"""Any Python proxy, billed: an ASGI application in front of another one that asks Satmeter before, and tells it after."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any, Final, Literal

import msgspec

from app.client.asked import Asked, Reader, read_request
from app.client.meter import Meter
from app.client.shown import Shown, offer_in, proof_in
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


Finish = Callable[[Scope, Done], Awaitable[Done | None]]


class Metered:
    """`app`, to which no call comes that is not paid for. An ASGI application.

    Every path is billed but those in `free`, compared whole; a GET needs a key that may spend, and costs nothing. A call is
    a JSON body, or a form with a file to be transcribed, of which `read` makes an estimate; with `clamp` it asks for no
    longer an answer than can be paid. What was used is read from the answer, a JSON body or server-sent events. A call that
    reached `app` is charged for what came of it; it is released only where the answer's status says that it was refused. A
    client that leaves pays for what is produced: `app` is not told for `reads_on_seconds`, so that it reads on and the
    upstream's own count comes; then it is. The meter is opened and closed with the application (ASGI's lifespan).

    `hidden` are fields of a stream's usage that no caller is shown, such as what it cost the operator.
    `finish` is given each call's scope and what it came to, after its answer's end, and returns what is told: for what `app`
    knows better than its answer says. None: it was refused before it ran. The call that is made is the scope's `satmeter`: an Allowed.
    """

    def __init__(
        self,
        app: ASGIApp,
        meter: Meter,
        *,
        free: Collection[str] = (),
        read: Reader = read_request,
        mode: Literal["strict", "clamp"] = "clamp",
        count_tokens: CountTokens = bytes_by_four,
        reads_on_seconds: float = 30.0,
        max_body_bytes: int = 25 * 1024 * 1024,
        hidden: Collection[str] = (),
        finish: Finish | None = None,
    ) -> None:
        self._app, self._meter, self._free, self._read, self._mode = app, meter, free, read, mode
        self._count_tokens, self._reads_on_seconds, self._max_body_bytes = (
            count_tokens,
            reads_on_seconds,
            max_body_bytes,
        )
        self._hidden, self._finish = frozenset(hidden), finish
        self._finishing: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        match scope["type"]:
            case "lifespan":
                await _live(self._app, self, self._meter, scope, receive, send)
            case "http" if scope["method"] == "OPTIONS" or scope["path"] in self._free:
                await self._app(_cleaned(scope), receive, send)
            case "http":
                await self._answer(_cleaned(scope), receive, send)
            case _:  # what cannot be metered is not to be had
                await send({"type": "websocket.close", "code": 1008, "reason": "not metered here"})

    async def finished(self) -> None:
        """Wait until what is known of every answer that ended is owed."""
        await asyncio.gather(*self._finishing, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        key, path = shown_in(scope["headers"]), scope["path"]
        if scope["method"] in _UNTOUCHED:
            verified = await self._meter.verify(key)
            await (deny(verified, path, send) if isinstance(verified, Denied) else self._app(scope, receive, send))
            return
        raw = await self._body(receive)
        reading = self._read(path, _content_type(scope["headers"]), raw) if raw is not None else None
        if raw is None or reading is None:
            verdict = await self._meter.verify(key)  # who is calling is asked before what is asked
            fault = _TOO_LARGE if raw is None else _NOT_READ
            await deny(verdict if isinstance(verdict, Denied) else fault, path, send)
            return
        asked = reading.asked
        allowed = await self._meter.authorize(
            key, model=asked.model, endpoint=asked.endpoint, estimate=asked.estimate, mode=self._mode
        )
        if isinstance(allowed, Denied):
            await deny(allowed, path, send)
            return
        body = reading.sent_on(raw, allowed.granted_output_tokens if allowed.clamped else None)
        call = _Call(self._meter, allowed, asked, send, self._count_tokens, self._hidden)
        scope = _with_body(scope, body, allowed)
        try:
            await call.run(self._app, scope, body, receive, self._reads_on_seconds)
        finally:
            self._settle(scope, call)

    def _settle(self, scope: Scope, call: "_Call") -> None:
        """In the background, where more may be known of it than was seen."""
        done = call.done()
        if done is None:
            self._meter.release(call.allowed, f"the upstream answered {call.status}")
        elif self._finish is None:
            self._meter.settle(call.allowed, done)
        else:
            task = asyncio.create_task(self._finished(self._finish(scope, done), call.allowed, done))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)

    async def _finished(self, more: Awaitable[Done | None], allowed: Allowed, done: Done) -> None:
        told: Done | None = done
        try:
            told = await more
        finally:  # whatever becomes of that: it was used
            if told is None:
                self._meter.release(allowed, "refused before it ran")
            else:
                self._meter.settle(allowed, told)

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


metered = Metered
"""The same in lower case: `app = metered(app, meter)`."""


def key_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The API key of a request: `Authorization: Bearer | Token`, `x-api-key` or `api-key`."""
    found = {name.lower(): value.decode("latin-1").strip() for name, value in headers}
    scheme, _, token = found.get(b"authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "token") and token.strip():
        return token.strip()
    return found.get(b"x-api-key") or found.get(b"api-key") or None


def shown_in(headers: Iterable[tuple[bytes, bytes]]) -> Shown:
    """All that a request shows of who makes it: its key, and a proof of payment beside it or in its place."""
    lines = list(headers)
    found = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in lines}
    return Shown(key_of(lines), proof_in(found), offer_in(found))


class _Call:
    """A call that is allowed, from the moment it reaches the application to its settlement."""

    def __init__(
        self,
        meter: Meter,
        allowed: Allowed,
        asked: Asked,
        send: Send,
        count_tokens: CountTokens,
        hidden: frozenset[str],
    ) -> None:
        self._hidden = hidden
        self._meter, self.allowed, self._asked, self._send, self._count = meter, allowed, asked, send, count_tokens
        self._began = time.monotonic()
        self._first_byte: float | None = None
        self.status = 0
        self._answer = Answer("", count_tokens=count_tokens)
        self._passing = _Passing(hides_usage=False, hidden=frozenset())
        self._is_gone = asyncio.Event()
        self._has_left = self._has_ended = self._is_known = False

    async def run(self, app: ASGIApp, scope: Scope, body: bytes, receive: Receive, reads_on_seconds: float) -> None:
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
            self._has_left = not self._has_ended  # servers say so too when an answer is at its end
            self._is_gone.set()

        watching = asyncio.create_task(watch())
        self._meter.forwarded(self.allowed, lambda: self._answer.so_far(self.allowed.sent))
        try:
            await app(scope, receiving, self._sending)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _sending(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = {name.lower(): value for name, value in message["headers"]}
            self._answer = Answer(headers.get(b"content-type", b"").decode("latin-1"), count_tokens=self._count)
            hides_usage = self._answer.is_stream and not self._asked.shows_usage
            hidden = self._hidden if self._answer.is_stream else frozenset[str]()
            self._passing = _Passing(hides_usage=hides_usage, hidden=hidden)
            told = [(b"x-billing-request-id", self.allowed.request_id.encode())]
            kept = [
                each for each in _without_ours(message["headers"]) if not ((hides_usage or hidden) and _is_length(each))
            ]
            message = dict(message) | {"headers": [*kept, *told]}
        elif message["type"] == "http.response.body":
            body, is_last = message.get("body", b""), not message.get("more_body", False)
            if body and self._first_byte is None:
                self._first_byte = time.monotonic()
            self._answer.feed(body)
            if self._answer.upstream_id is not None and not self._is_known and not is_last:
                self._is_known = True
                self._meter.known(
                    self.allowed, Done(served_model=self._answer.model, upstream_id=self._answer.upstream_id)
                )
            self._has_ended = is_last
            message = dict(message) | {"body": self._passing.through(body, is_last=is_last)}
        if self._is_gone.is_set():
            return
        try:
            await self._send(message)
        except OSError:  # some servers say so, others say nothing
            self._has_left = not self._has_ended
            self._is_gone.set()

    def done(self) -> Done | None:
        """What it came to; None where it was refused."""
        self._answer.end()
        if self.status >= 400 and self.status not in _RAN_OUT_OF_TIME:
            return None
        now = time.monotonic()
        first = None if self._first_byte is None else (self._first_byte - self._began) * 1000
        outcome: Outcome = "completed"
        if self._has_left and not (self._has_ended and self._answer.usage):
            outcome = "client_disconnected"
        elif not self._has_ended or self.status in _RAN_OUT_OF_TIME:
            outcome = "partial"
        timing = {"latency_ms": (now - self._began) * 1000, "ttft_ms": first if self._answer.is_stream else None}
        return self._answer.done(self.allowed.sent, outcome, **timing)


class _Passing:
    """A stream on its way to the caller, without the usage that only we asked for, and without what nobody is shown."""

    def __init__(self, *, hides_usage: bool, hidden: frozenset[str]) -> None:
        self._hides_usage, self._hidden, self._rest = hides_usage, hidden, b""

    def through(self, chunk: bytes, *, is_last: bool) -> bytes:
        if not (self._hides_usage or self._hidden):
            return chunk
        *events, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        passed = b"".join(map(self._shown, events))
        return passed + self._rest if is_last else passed

    def _shown(self, event: bytes) -> bytes:
        """An event as the caller sees it; nothing of one that says its usage alone."""
        if b'"usage"' not in event:
            return event + b"\n\n"
        before, data, after = event.partition(b"data:")
        read = _object(after)
        if read is None:
            return event + b"\n\n"
        if self._hides_usage and "usage" in read:
            usage = read.pop("usage")
            if read.get("choices") == [] and usage is not None:
                return b""
        for place in (read, read.get("response"), read.get("message")):
            if isinstance(place, dict) and isinstance(usage := place.get("usage"), dict):
                place["usage"] = {name: value for name, value in usage.items() if name not in self._hidden}
        return before + data + b" " + msgspec.json.encode(read) + b"\n\n"


async def _live(app: ASGIApp, metered: Metered, meter: Meter, scope: Scope, receive: Receive, send: Send) -> None:
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
        await metered.finished()
    if "lifespan.startup.failed" not in said and "lifespan.shutdown.failed" not in said:
        await send({"type": "lifespan.shutdown.complete"})


def _cleaned(scope: Scope) -> Scope:
    """Without headers that say who pays, and with answers that can be read."""
    headers = [(name, value) for name, value in _without_ours(scope["headers"]) if name.lower() != b"accept-encoding"]
    return {**scope, "headers": [*headers, (b"accept-encoding", b"identity")]}


def _without_ours(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return [(name, value) for name, value in headers if not name.lower().replace(b"_", b"-").startswith(_OURS)]


def _with_body(scope: Scope, body: bytes, allowed: Allowed) -> Scope:
    length = [(b"content-length", b"%d" % len(body)), (b"x-billing-request-id", allowed.request_id.encode())]
    kept = [each for each in scope["headers"] if not _is_length(each)]
    return {**scope, "headers": [*kept, *length], "satmeter": allowed}


def _is_length(header: tuple[bytes, bytes]) -> bool:
    return header[0].lower() in (b"content-length", b"transfer-encoding")


def _object(raw: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        read = msgspec.json.decode(raw)
        return read if isinstance(read, dict) else None
    return None


def _content_type(headers: Headers) -> str:
    return next((value.decode("latin-1") for name, value in headers if name.lower() == b"content-type"), "")


async def deny(denied: Denied, path: str, send: Send) -> None:
    """Answer a request with a refusal, in the words of the API that it is of."""
    is_anthropic = path.rstrip("/").endswith(("/messages", "/messages/count_tokens"))
    body = denied.anthropic_body() if is_anthropic else denied.body()
    headers = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in denied.headers.items()]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": denied.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def fault(status: int, code: str, message: str, **metadata: Any) -> Denied:
    """A refusal of the proxy's own."""
    error = {
        "message": message,
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "code": code,
        "param": None,
    }
    return Denied.of(status, msgspec.Raw(msgspec.json.encode(error | ({"metadata": metadata} if metadata else {}))), {})


_TOO_LARGE: Final = fault(413, "body_too_large", "The body is larger than is taken here")
_NOT_READ: Final = fault(400, "malformed_json", "The body is no JSON object, and no form with a model and a file")
