"""How a call is read and an answer sent, and all the ways in which an answer can go wrong under way."""

import asyncio
import contextlib
import hashlib
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from .orders import Order
from .usage import Counts

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
_KEPT_OF_A_FILE: Final = 64 * 1024
_MOST_FIELD_BYTES: Final = 1024 * 1024
_MOST_JSON_BYTES: Final = 64 * 1024 * 1024
SSE: Final = "text/event-stream; charset=utf-8"


# --- what was asked -------------------------------------------------------------------------------


class Upload(NamedTuple):
    """A file of a form: its first bytes, and how many there were."""

    field: str
    name: str
    head: bytes
    size: int


@dataclass(slots=True)
class Call:
    """One request, read."""

    method: str
    path: str
    headers: Mapping[str, str]
    query: str
    root: str
    fields: dict[str, Any] = field(default_factory=dict)
    uploads: list[Upload] = field(default_factory=list)
    size: int = 0

    @property
    def model(self) -> str:
        return str(self.fields.get("model") or "")

    @property
    def key(self) -> str:
        """The credential, however it was sent; empty for none."""
        given = self.headers.get("x-api-key") or self.headers.get("api-key") or self.headers.get("authorization", "")
        return given.partition(" ")[2] if given.lower().startswith(("bearer ", "token ")) else given


class Unreadable(Exception):
    """The request's body is not what it says it is."""


async def read_call(scope: Scope, receive: Receive) -> Call:
    """Read a request to its end. Files are counted and thrown away but for their first bytes. Raises Unreadable."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    root = f"{scope.get('scheme', 'http')}://{headers.get('host', 'localhost')}"
    call = Call(scope["method"], scope["path"], headers, scope.get("query_string", b"").decode("latin-1"), root)
    kind, _, rest = headers.get("content-type", "").partition(";")
    if kind.strip().lower() == "multipart/form-data":
        await _read_form(call, rest, receive)
    else:
        await _read_json(call, receive)
    return call


async def _read_json(call: Call, receive: Receive) -> None:
    parts = []
    async for chunk in _body(receive):
        call.size += len(chunk)
        if call.size > _MOST_JSON_BYTES:
            raise Unreadable("the body is larger than 64 MiB")
        parts.append(chunk)
    raw = b"".join(parts)
    if not raw.strip():
        return
    try:
        read = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Unreadable(f"We could not parse the JSON body of your request: {error}") from error
    if not isinstance(read, dict):
        raise Unreadable("the JSON body of your request is not an object")
    call.fields = read


async def _read_form(call: Call, rest: str, receive: Receive) -> None:
    boundary = next(
        (part.strip()[9:].strip('"') for part in rest.split(";") if part.strip().startswith("boundary=")), ""
    )
    if not boundary:
        raise Unreadable("multipart/form-data without a boundary")
    form = _Form(call)
    try:
        with PushMultipartParser(boundary, max_segment_count=100) as parser:
            async for chunk in _body(receive):
                call.size += len(chunk)
                for event in parser.parse(chunk):
                    form.take(event)
    except MultipartError as error:
        raise Unreadable(f"the form could not be read: {error}") from error


class _Form:
    """Takes a form's parts as they come: fields whole, files by their first bytes."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.segment: MultipartSegment | None = None
        self.kept, self.size = bytearray(), 0

    def take(self, event: Any) -> None:
        if isinstance(event, MultipartSegment):
            self.segment, self.kept, self.size = event, bytearray(), 0
        elif event is not None:
            self.size += len(event)
            most = _KEPT_OF_A_FILE if self.segment is not None and self.segment.filename else _MOST_FIELD_BYTES
            self.kept += event[: most - len(self.kept)]
        elif self.segment is not None:
            self._end(self.segment)

    def _end(self, segment: MultipartSegment) -> None:
        if segment.filename is not None:
            self.call.uploads.append(Upload(segment.name, segment.filename, bytes(self.kept), self.size))
            return
        text, fields = self.kept.decode("utf-8", "replace"), self.call.fields
        if segment.name.endswith("[]"):
            fields.setdefault(segment.name[:-2], []).append(text)
        else:
            fields[segment.name] = text


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionAbortedError
        if chunk := message.get("body"):
            yield chunk
        if not message.get("more_body"):
            return


# --- what is answered -----------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of an answer, and how many tokens of output have been said when it is out."""

    data: bytes
    output_tokens: int = 0


@dataclass(slots=True)
class Answer:
    """What is to be sent, with what it costs its upstream. `usage` is what the answer says of it, None if nothing."""

    pieces: Iterable[Piece]
    content_type: str = "application/json"
    status: int = 200
    headers: Sequence[tuple[str, str]] = ()
    id: str = ""
    counts: Counts = field(default_factory=Counts)
    usage: Mapping[str, Any] | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    is_stream: bool = False
    length: int | None = None
    """Of an answer in several pieces, where it is known."""


def json_answer(body: Any, *, counts: Counts | None = None, status: int = 200, **more: Any) -> Answer:
    """An answer in one piece, of which all tokens are out when it is."""
    counts = counts or Counts()
    raw = msgspec.json.encode(body)
    usage = body.get("usage") if isinstance(body, dict) else None
    return Answer(
        [Piece(raw, counts.output_tokens)], counts=counts, status=status, usage=usage, length=len(raw), **more
    )


def refusal(status: int, message: str, param: str | None = None, code: str | None = None) -> Answer:
    """A refusal as OpenAI words it."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return json_answer({"error": error}, status=status)


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + (data if isinstance(data, bytes) else msgspec.json.encode(data)) + b"\n\n"


DONE: Final = b"data: [DONE]\n\n"


class Row(msgspec.Struct, omit_defaults=True):
    """What was answered to one call: what a bill must agree with.

    `outcome` is running, completed, refused, cut, hung or client_gone. `counts` are those of the whole answer,
    `sent_output_tokens` those that were sent on; of a stream that broke off they are fewer.
    """

    n: int
    at: float
    method: str
    path: str
    request_id: str
    model: str = ""
    id: str = ""
    status: int = 0
    outcome: str = "running"
    counts: Counts = msgspec.field(default_factory=Counts)
    sent_output_tokens: int = 0
    usage: dict[str, Any] | None = None
    attributes: dict[str, str] = msgspec.field(default_factory=dict)
    is_stream: bool = False
    order: Order = msgspec.field(default_factory=Order)
    key_sha256: str = ""
    header_names: list[str] = msgspec.field(default_factory=list)
    bytes_in: int = 0
    asked: dict[str, Any] | None = None
    ended_at: float = 0


def key_digest(key: str) -> str:
    """What stands in the log for a credential, which itself never does."""
    return hashlib.sha256(key.encode()).hexdigest() if key else ""


# --- sending --------------------------------------------------------------------------------------


class Broken(Exception):
    """The answer ended before its end; the message is its outcome."""


@dataclass(slots=True)
class Delivery:
    """One answer on its way, as it was ordered."""

    answer: Answer
    order: Order
    row: Row
    receive: Receive
    send: Send
    accepts_gzip: bool = False

    async def run(self) -> None:
        """Send the answer. Whatever happens to it stands in the row afterwards."""
        gone = asyncio.create_task(_client_gone(self.receive)) if self._takes_time() else None
        try:
            await self._waited(self._send_all(), gone)
            self.row.outcome = "refused" if self.answer.status >= 400 else "completed"
        except Broken as broken:
            self.row.outcome = str(broken)
        finally:
            self.row.ended_at = time.time()
            if gone is not None:
                gone.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await gone

    def _takes_time(self) -> bool:
        order = self.order
        return self.answer.is_stream or order.hang or bool(order.delay) or order.stall is not None

    async def _waited(self, sending: Any, gone: "asyncio.Task[None] | None") -> None:
        """Send until that is done or the client has gone. Raises Broken."""
        if gone is None:
            await sending
            return
        sent = asyncio.ensure_future(sending)
        try:
            await asyncio.wait({sent, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sent.done():
                raise Broken("hung" if self.order.hang or self.order.stall is not None else "client_gone")
            await sent
        finally:
            if not sent.done():
                sent.cancel()
                with contextlib.suppress(asyncio.CancelledError, Broken):
                    await sent

    async def _send_all(self) -> None:
        order = self.order
        if order.delay:
            await asyncio.sleep(order.delay)
        if order.hang:
            await asyncio.Event().wait()
        if order.cut == 0:
            await self._abort()
        is_zipped = order.gzip and self.accepts_gzip
        pieces = _compressed(self.answer.pieces) if is_zipped else self.answer.pieces
        await self._begin(is_zipped)
        if order.cut is not None and not self.answer.is_stream:
            await self._half_of(pieces)
        for sent, piece in enumerate(pieces, 1):
            if sent > 1 and order.pace:
                await asyncio.sleep(order.pace)
            await self._send(piece)
            if sent == order.stall:
                await asyncio.Event().wait()
            if sent == order.cut:
                raise Broken("cut")
            if sent == order.error_after:
                await self._body(_error_event(self.row.path))
                raise Broken("cut")
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, is_zipped: bool) -> None:
        headers = [("content-type", self.answer.content_type), ("x-request-id", self.row.request_id)]
        headers += [("x-sandbox-upstream", "no model: the sandbox made this answer"), *self.answer.headers]
        if is_zipped:
            headers.append(("content-encoding", "gzip"))
        elif self.answer.length is not None:
            headers.append(("content-length", str(self.answer.length)))
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self.send({"type": "http.response.start", "status": self.answer.status, "headers": encoded})

    async def _send(self, piece: Piece) -> None:
        data = piece.data
        if self.answer.is_stream:
            if self.order.pings:
                data = b": SANDBOX PROCESSING\n\n" + data
            if self.order.crlf:
                data = data.replace(b"\n", b"\r\n")
        size = self.order.split or len(data) or 1
        for at in range(0, len(data), size):
            await self._body(data[at : at + size])
            if self.order.split:
                await asyncio.sleep(0)  # so that the pieces are not put together again on the way
        self.row.sent_output_tokens = piece.output_tokens

    async def _body(self, data: bytes) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def _half_of(self, pieces: Iterable[Piece]) -> None:
        """Half of a body that said how long it is, and then nothing more. Raises Broken."""
        data = next(iter(pieces)).data
        await self._body(data[: len(data) // 2])
        raise Broken("cut")

    async def _abort(self) -> None:
        """Close the connection before a byte was said, where the server lets us; else behind the headers. Raises Broken."""
        transport = getattr(getattr(self.send, "__self__", None), "transport", None)
        if transport is not None:
            transport.abort()
        else:
            start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}
            await self.send(start)
        raise Broken("cut")


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _compressed(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Each piece flushed, so that a reader of a stream need not wait for the next."""
    packer, tokens = zlib.compressobj(wbits=zlib.MAX_WBITS | 16), 0
    for piece in pieces:
        tokens = piece.output_tokens
        yield Piece(packer.compress(piece.data) + packer.flush(zlib.Z_SYNC_FLUSH), tokens)
    yield Piece(packer.flush(), tokens)


def _error_event(path: str) -> bytes:
    if path.endswith("/messages"):
        error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
        return event(error, "error")
    body = {"message": "The server had an error while processing your request.", "type": "server_error", "code": None}
    if path.endswith("/responses"):
        return event({"type": "error", **body, "sequence_number": 0}, "error")
    return event({"error": body | {"param": None}})
