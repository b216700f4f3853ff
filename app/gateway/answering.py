"""An upstream's answer on its way to the caller: whole or as a stream, read for its usage, with the cost fields put in.

Every other byte passes as it came. An answer is charged once, whatever becomes of it: by the upstream's own words where
it said them, else by what was counted.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any, Final

import aiohttp
import msgspec

from app.client import Usage
from app.client.usage import Answer, usage_of
from app.client.wire import Outcome
from app.gateway import asking, splice
from app.gateway.call import Call, Settled
from app.gateway.costs import Costs, operators_usd, usd_text
from app.gateway.count import counter
from app.gateway.errors import Refusal, anthropic_body, openai_body
from app.gateway.events import BadStream, Splitter
from app.gateway.exchange import Exchange, Interrupted
from app.gateway.streams import PING

_MOST_WHOLE_BYTES: Final = 1024 * 1024
"""A larger answer is sent on as it comes; its usage is looked for at its ends."""
_READ_BYTES: Final = 16 * 1024
"""Of a stream at once: what is taken of it is held until its caller has taken what came before."""
_LINGER_SECONDS: Final = 0.2
_ENDS_BYTES: Final = 64 * 1024
_BROKEN: Final = (aiohttp.ClientError, TimeoutError, OSError, BadStream)
_NO_BUFFER: Final = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Wire(Enum):
    """Whose shapes an answer has."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


class _Seen(msgspec.Struct):
    """What is read of a whole answer."""

    usage: msgspec.Raw = msgspec.Raw()
    id: str | None = None
    service_tier: str | None = None


async def send_on(call: Call, response: aiohttp.ClientResponse, wire: Wire, *, shows_usage: bool) -> str | None:
    """Send an answer on, and charge it. Returns the upstream's id of it, where it said one. Raises Refusal before anything was sent."""
    try:
        if response.content_type == "text/event-stream":
            stream = _Stream(call, response, wire, shows_usage)
            await stream.run()
            return stream.answer.upstream_id
        return await _send_whole(call, response, wire)
    finally:
        await _let_go(response)


async def _let_go(response: aiohttp.ClientResponse) -> None:
    """Give the connection back to be used again, if the answer ends by itself about now."""
    if not response.content.at_eof():
        with contextlib.suppress(*_BROKEN):
            async with asyncio.timeout(_LINGER_SECONDS):
                await response.content.readany()
    response.release()


# --- whole answers --------------------------------------------------------------------------------


async def _send_whole(call: Call, response: aiohttp.ClientResponse, wire: Wire) -> str | None:
    parts, size = [], 0
    try:
        async for chunk in response.content.iter_any():
            call.first_byte()
            parts.append(chunk)
            size += len(chunk)
            if size > _MOST_WHOLE_BYTES:
                await _send_long(call, response, b"".join(parts))
                return None
    except _BROKEN:
        call.unused("the upstream's answer broke off", may_have_run=True)
        raise asking.failed("The model's provider ended its answer before it was whole") from None
    body = b"".join(parts)
    try:
        seen = msgspec.json.decode(body, type=_Seen)
    except (msgspec.DecodeError, UnicodeDecodeError):
        seen = _Seen()
    usage, is_estimated = _used(call, seen.usage, body)
    is_gone = call.exchange.gone.is_set()
    settled = call.settle(
        usage, outcome="client_disconnected" if is_gone else "completed", is_estimated=is_estimated, upstream_id=seen.id,
        service_tier=seen.service_tier, operators_usd=operators_usd(bytes(seen.usage)), is_awaited=not is_gone,
    )  # fmt: skip
    if bytes(seen.usage).startswith(b"{"):
        body, shown = splice.without_operators(body, bytes(seen.usage))
        seen.usage = msgspec.Raw(shown)
    costs = None if is_gone else await settled.costs()
    if is_gone or call.exchange.gone.is_set():
        return seen.id
    if costs is not None:
        body = _with_costs(call, body, seen.usage, usage, costs, wire)
    body = _with_ours(call, body)
    cost = {} if costs is None else {"x-satmeter-cost-usd": usd_text(costs.total_nusd)}
    head = asking.answer_headers(response)
    kind = head.pop("content-type", "application/json")
    await call.exchange.answer(response.status, body, head | call.headers() | cost, kind)
    return seen.id


def _used(call: Call, raw: msgspec.Raw, body: bytes) -> tuple[Usage, bool]:
    """What a whole answer used, and whether that was counted here."""
    told = usage_of(msgspec.json.decode(raw)) if bytes(raw) else None
    if told is not None and call.ask.own_searches is None and (told.output_tokens or call.ask.row == "embeddings"):
        return told, False
    answer = Answer("application/json", count_tokens=counter(call.model))
    answer.feed(body)
    answer.end()
    told = answer.usage
    if told is not None and is_told(told, answer):
        return told, False
    return Usage(input_tokens=call.ask.prompt_tokens(), output_tokens=answer.produced_tokens), True


def is_told(usage: Usage | None, answer: Answer) -> bool:
    """Whether an upstream's word can be: servers that count nothing say zero of what they made."""
    if usage is None:
        return False
    return bool(usage.output_tokens) or not answer.produced_tokens


def _with_ours(call: Call, body: bytes) -> bytes:
    """With what we have to say beside the model's own words."""
    beside, annotations = call.ask.beside(), call.ask.annotations()
    if annotations:
        body = splice.put_into(body, b"message", annotations)
    return splice.put_first(body, beside) if beside and body.lstrip().startswith(b"{") else body


def _with_costs(call: Call, body: bytes, raw: msgspec.Raw, usage: Usage, costs: Costs, wire: Wire) -> bytes:
    fields = costs.fields(call.latency_ms, call.ttft_ms)
    if bytes(raw).startswith(b"{"):
        return splice.put_in(body, bytes(raw), fields)
    if wire is not Wire.OPENAI or bytes(raw) or not body.lstrip().startswith(b"{"):
        return body
    entered, answered = usage.input_tokens or 0, usage.output_tokens or 0
    counted = b'"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"usage_estimated":true' % (
        entered, answered, entered + answered,
    )  # fmt: skip
    return splice.put_first(body, b'"usage":{%b,%b}' % (counted, fields))


async def _send_long(call: Call, response: aiohttp.ClientResponse, begun: bytes) -> None:
    """Send a large answer on as it comes, and keep its ends: its usage is in one of them."""
    exchange, size = call.exchange, 0
    await exchange.start(response.status, asking.answer_headers(response) | call.headers())
    head, tail, is_whole = begun[:_ENDS_BYTES], begun, True
    try:
        async for chunk in _then(begun, response):
            size += len(chunk)
            tail = chunk if chunk is begun else tail + chunk
            if len(tail) > 2 * _ENDS_BYTES:
                await exchange.write(tail[:-_ENDS_BYTES])
                tail = tail[-_ENDS_BYTES:]
    except _BROKEN:
        is_whole = False
    raw = _usage_in(tail) or _usage_in(head)
    told = usage_of(msgspec.json.decode(raw)) if raw is not None else None
    usage = told or Usage(input_tokens=call.ask.prompt_tokens(), output_tokens=-(-size // 4))
    settled = call.settle(
        usage, outcome="completed" if is_whole else "partial", is_estimated=told is None,
        operators_usd=operators_usd(raw or b""), is_awaited=True,
    )  # fmt: skip
    costs = await settled.costs()
    if raw is not None and raw in tail:
        begin = tail.rindex(raw)
        shown, kept = splice.without_operators(b'"usage"' + raw, raw)
        if costs is not None:
            shown = splice.put_in(shown, kept, costs.fields(call.latency_ms, call.ttft_ms))
        tail = tail[:begin] + shown[7:] + tail[begin + len(raw) :]
    await exchange.write(tail)
    if not is_whole:
        raise Interrupted
    await exchange.end()


async def _then(begun: bytes, response: aiohttp.ClientResponse) -> Any:
    yield begun
    async for chunk in response.content.iter_any():
        yield chunk


def _usage_in(part: bytes) -> bytes | None:
    """The last usage object in a piece of JSON."""
    at = part.rfind(b'"usage"')
    begin = part.find(b"{", at) if at >= 0 else -1
    end = part.find(b"}", begin)
    while begin >= 0 and end >= 0:
        try:
            msgspec.json.decode(part[begin : end + 1])
        except msgspec.DecodeError:
            end = part.find(b"}", end + 1)
        else:
            return part[begin : end + 1]
    return None


# --- streams --------------------------------------------------------------------------------------


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    delta: Any = None

    @property
    def says_nothing(self) -> bool:
        said = any(self.delta.values()) if isinstance(self.delta, dict) else self.delta
        return not self.finish_reason and not said


class _Response(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw()


class _Event(msgspec.Struct):
    """What is read of an event that speaks of its usage, or of an error."""

    type: str | None = None
    usage: msgspec.Raw = msgspec.Raw()
    choices: list[_Choice] | None = None
    response: _Response | None = None
    message: msgspec.Raw = msgspec.Raw()
    error: Any = None

    @property
    def told(self) -> bytes:
        """The usage object, as it stands there; empty if there is none."""
        inner = self.response
        if bytes(self.message).startswith(b"{"):
            inner = msgspec.json.decode(self.message, type=_Response)
        raw = bytes(inner.usage if inner is not None else self.usage)
        return raw if raw.startswith(b"{") else b""


@dataclass(slots=True)
class _Held:
    """An event with the last usage that was told: it waits for what the call cost."""

    event: bytes
    usage: bytes
    is_nothing_else: bool
    """Whether it says nothing besides, so that a caller who did not ask for it misses nothing."""


class _Stream:
    """A stream of server-sent events from an upstream to a caller."""

    def __init__(self, call: Call, response: aiohttp.ClientResponse, wire: Wire, shows_usage: bool) -> None:
        self._call, self._response, self._wire, self._shows_usage = call, response, wire, shows_usage
        self._exchange: Exchange = call.exchange
        self.answer = Answer("text/event-stream", count_tokens=counter(call.model))
        self._held: _Held | None = None
        self._after = b""
        """The event that ends the stream, for as long as one is held back before it."""
        self._settled: Settled | None = None
        self._operators_usd: Decimal | None = None
        self._beside, self._annotations = call.ask.beside(), call.ask.annotations()
        self._error: Refusal | None = None
        self._is_over = self._has_ended = self._is_known = False
        self.last_sent_at, self.is_sending = time.monotonic(), False

    async def run(self) -> None:
        """Raises Refusal if nothing came, and nothing was sent."""
        self._call.so_far(lambda: self.answer.so_far(self._call.allowed.sent) if self.answer.bytes else None)
        with self._call.gateway.streams.opened(self):
            try:
                await self._pump()
            except _BROKEN:
                if not self._exchange.gone.is_set():
                    self._error = self._error or asking.failed("The model's provider broke off its answer")
            finally:
                if self.answer.bytes:
                    self._settle()
            await self._finish()

    async def _pump(self) -> None:
        splitter = Splitter()
        while chunk := await self._response.content.read(_READ_BYTES):
            self._call.first_byte()
            passing = self._passing(splitter.feed(chunk))
            if self._is_over:
                await self._end(passing)
                return
            await self._send(passing)
            if self._error is not None:
                return

    def _passing(self, events: list[bytes]) -> bytes:
        passing: list[bytes] = []
        for event in events:
            passing += self._read(event)
            if self._is_over or self._error is not None:
                break
        return b"".join(passing)

    def _read(self, event: bytes) -> Iterator[bytes]:
        """Which events pass now."""
        is_last = self._is_last(event)
        if b'"usage"' in event or b'"error"' in event:
            read = _read_event(event)
            if read is not None and self._is_error(read, event):
                return
            held, told = None, read.told if read is not None else b""
            if read is not None and told:
                self._operators_usd = operators_usd(told) or self._operators_usd
                event, usage = splice.without_operators(event, told)
                held = self._with_usage(read, event, usage)
            self.answer.feed(event)
            if held is not None:
                if self._held is not None:
                    yield self._held.event
                self._held, self._is_over = held, is_last
                self._has_ended = True
                return
        else:
            self.answer.feed(event)
        if not self._is_known and self.answer.upstream_id is not None:
            self._is_known = True
            self._call.known(self.answer.upstream_id)
        self._is_over = is_last
        if b'"finish_reason":"' in event or b'"finish_reason": "' in event:
            self._has_ended = True
        if self._is_over and self._held is not None:
            self._after = event
            return
        yield self._with_ours(event) if self._beside or self._annotations else event

    def _with_ours(self, event: bytes) -> bytes:
        """With what we have to say, in the first event that has a place for it."""
        if self._beside and b"{" in event:
            event, self._beside = splice.put_first(event, self._beside), b""
        if self._annotations:
            told = splice.put_into(event, b"delta", self._annotations)
            event, self._annotations = told, b"" if told is not event else self._annotations
        return event

    def _is_last(self, event: bytes) -> bool:
        if self._wire is Wire.OPENAI:
            return event.lstrip().startswith((b"data: [DONE]", b"data:[DONE]"))
        if self._wire is Wire.ANTHROPIC:
            return b'"type":"message_stop"' in event or b'"type": "message_stop"' in event
        return any(word in event for word in _LAST_RESPONSES)

    def _is_error(self, read: _Event, event: bytes) -> bool:
        """Note an error that the upstream tells within its stream, in its own words without its secrets."""
        if read.type != "error" and (self._wire is not Wire.OPENAI or not read.error):
            return False
        said = read.error if isinstance(read.error, dict) else {}
        assert self._call.target is not None
        words = asking.clean(str(said.get("message") or ""), self._call.target.upstream)
        self._error = asking.failed(f"The model's provider broke off its answer{': ' if words else ''}{words}")
        return True

    def _with_usage(self, read: _Event, event: bytes, usage: bytes) -> _Held | None:
        """The event as one to hold back, if what it says of the usage may be the last word."""
        if self._wire is Wire.ANTHROPIC and read.type != "message_delta":
            return None
        choices = read.choices or []
        is_nothing_else = all(each.says_nothing for each in choices)
        is_last = not choices or any(each.finish_reason for each in choices) or (self._has_ended and is_nothing_else)
        if self._wire is Wire.OPENAI and not is_last:
            return None
        return _Held(event, usage, self._wire is Wire.OPENAI and is_nothing_else)

    # --- sending ---

    async def _send(self, passing: bytes) -> None:
        if not passing or self._exchange.gone.is_set():
            return
        if not self._exchange.has_begun:
            head = asking.answer_headers(self._response) | _NO_BUFFER | self._call.headers()
            await self._exchange.start(self._response.status, head)
        self.is_sending = True
        try:
            await self._exchange.write(passing)
        finally:
            self.is_sending, self.last_sent_at = False, time.monotonic()

    async def _end(self, passing: bytes) -> None:
        """What came last, with what it cost."""
        self._has_ended = True
        settled = self._settle()
        held, fields = self._held, b""
        if held is not None:
            if self._shows_usage and not self._exchange.gone.is_set():
                costs = await settled.costs()
                fields = b"" if costs is None else costs.fields(self._call.latency_ms, self._call.ttft_ms)
            passing += _shown(held, fields, self._shows_usage) + self._after
        await self._send(passing)

    async def _finish(self) -> None:
        """The end that a caller sees."""
        if self._exchange.gone.is_set():
            return
        if self._error is None and not self._has_ended:
            self._error = asking.failed("The model's provider broke off its answer")
        if not self._exchange.has_begun and not self.answer.bytes:
            self._call.unused("nothing came", may_have_run=True)
            raise self._error or asking.failed("The model's provider sent an empty answer")
        if self._held is not None and not self._is_over:
            await self._end(b"")
        if self._error is not None:
            await self._send(error_event(self._error, self._wire))
        await self._exchange.end()

    def _settle(self) -> Settled:
        """Charge it, once."""
        if self._settled is not None:
            return self._settled
        usage, is_gone = self.answer.usage, self._exchange.gone.is_set()
        is_whole = self._has_ended and self._error is None and is_told(usage, self.answer)
        if not is_whole:
            usage = self._with_counted(Usage(input_tokens=self._call.ask.prompt_tokens()))
        outcome: Outcome = "completed" if self._has_ended and self._error is None else "partial"
        self._settled = self._call.settle(
            usage, outcome="client_disconnected" if is_gone else outcome, is_estimated=not is_whole,
            upstream_id=self.answer.upstream_id, service_tier=self.answer.service_tier, operators_usd=self._operators_usd,
            is_awaited=self._held is not None and self._shows_usage and not is_gone,
        )  # fmt: skip
        return self._settled

    def _with_counted(self, sent: Usage) -> Usage:
        """What was used by now: what the upstream said of it, and what was counted where that is more."""
        told = self.answer.usage
        base = told if told is not None and told.input_tokens else sent
        answered = max(base.output_tokens or 0, self.answer.produced_tokens)
        return msgspec.structs.replace(base, output_tokens=answered)

    # --- as streams.py looks at it ---

    @property
    def is_gone(self) -> bool:
        return self._exchange.gone.is_set()

    async def ping(self) -> None:
        if self._exchange.has_begun:
            await self._send(PING)

    def cut(self) -> None:
        self._response.close()


_LAST_RESPONSES: Final = tuple(
    b'"type":%b"response.%b"' % (space, word)
    for space in (b"", b" ")
    for word in (b"completed", b"incomplete", b"failed")
)


def _shown(held: _Held, fields: bytes, shows_usage: bool) -> bytes:
    if not shows_usage:
        return b"" if held.is_nothing_else else splice.put_null(held.event, held.usage)
    return splice.put_in(held.event, held.usage, fields) if fields else held.event


def _read_event(event: bytes) -> _Event | None:
    begin = event.find(b"{")
    try:
        return msgspec.json.decode(event[begin:], type=_Event) if begin >= 0 else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def error_event(refusal: Refusal, wire: Wire) -> bytes:
    """An error within a stream, as the SDKs of this wire read it."""
    if wire is Wire.OPENAI:
        return b"data: %b\n\n" % openai_body(refusal)
    if wire is Wire.ANTHROPIC:
        return b"event: error\ndata: %b\n\n" % anthropic_body(refusal)
    said = {"type": "error", "code": refusal.code, "message": refusal.message, "param": None, "sequence_number": 0}
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(said)
