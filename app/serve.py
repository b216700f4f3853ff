"""The HTTP server of one process: its connections, what each may take of us, and when it is closed.

uvicorn's protocol has no bound on a head, waits for ever for the rest of one, and takes every connection there is.
Here a connection has a phase and the second that began in; one sweep a second looks for those that are overdue, so a
request itself costs a few comparisons of integers and no timer.
"""

import asyncio
import contextlib
import ctypes
import ipaddress
import random
import resource
import select
import signal
import socket
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeAlias, cast

import msgspec
import uvicorn
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app.kernel.errors import AppError
from app.kernel.logs import log
from app.kernel.ratelimit import blocks_of

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
App: TypeAlias = Callable[..., Any]

_PIECE_BYTES: Final = 8 * 1024
"""What the parser gets at once of a chunk that may be too much."""
_HEARD_OUT_BYTES: Final = 1024 * 1024
"""So much of a refused caller is read and thrown away, for it to come to our answer."""
_MOST_HEADERS: Final = 200
"""Also of trailers: in memory a short line is twenty times what it was on the wire."""
_MOST_QUEUED: Final = 20
"""Requests that were sent ahead, on one connection, without waiting for answers."""
_LEAVING_SECONDS: Final = 2
_STOPPING_SECONDS: Final = 1
"""For what is still being sent or read when we are asked to stop."""
_HANDSHAKE_SECONDS: Final = 0.2
"""How long who had begun to connect when we stopped listening has to arrive."""
_LAST_LOOKS: Final = 400
_TICK_SECONDS: Final = 0.1
_ATTACH_FILTER: Final = 26
"""SO_ATTACH_FILTER, on Linux; Python has no name for it."""
_NO_NEWCOMERS: Final = b"".join(
    struct.pack("HBBI", *step)
    for step in (
        (0x30, 0, 0, 13),  # a segment's flags,
        (0x54, 0, 0, 0x12),  # of them SYN and ACK:
        (0x15, 1, 0, 0x02),  # SYN alone is
        (0x06, 0, 0, 0xFFFF_FFFF),  # (anything else is let in)
        (0x06, 0, 0, 0),  # dropped
    )
)
"""A packet filter for a listening socket, in the kernel's steps of a code, two jumps and a value."""
_TOLD_EVERY_SECONDS: Final = 10
_OWN_DESCRIPTORS: Final = 192
"""For database, payment backends, wallets, files."""
_MOST_DESCRIPTORS: Final = 1 << 20

_HEAD, _BODY, _ANSWER, _IDLE, _CLOSING, _LEAVING, _GONE = range(7)
"""We wait for a head; for the rest of a body; they wait for us; for another request; the last answer is under way;
refused, and nothing is read any more; it is not ours any more."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What connections may take: bytes of a head or of trailers, seconds of a phase, places."""

    head_bytes: int = 64 * 1024
    head_seconds: int = 10
    body_seconds: int = 30
    idle_seconds: int = 65  # more than the 60 s after which proxies close theirs, so that they never meet a closed one
    write_seconds: int = 60
    connections: int = 10_000
    per_address: int = 1_000
    kept_for: tuple[Network, ...] = ()

    def within(self, descriptors: int) -> "Limits":
        """The same with no more connections than that many descriptors allow, half of them for one address."""
        places = min(self.connections, max(descriptors - _OWN_DESCRIPTORS, descriptors // 4))
        return replace(self, connections=places, per_address=min(self.per_address, max(1, places // 2)))


class HeadTooLarge(AppError):
    """The request's headers, or its trailers, are larger than 64 KiB."""

    status, code, type = 431, "head_too_large", "invalid_request_error"


class RequestTimeout(AppError):
    """The request did not arrive whole in time."""

    status, code, type = 408, "request_timeout", "invalid_request_error"


class MalformedRequest(AppError):
    """This is no HTTP/1.1 request."""

    status, code, type = 400, "malformed_request", "invalid_request_error"


class TooManyConnections(AppError):
    """There are too many connections, in all or from your address; ask again shortly."""

    status, code, type = 503, "too_many_connections", "server_error"


# --- all connections ------------------------------------------------------------------------------


class Connections(Collector):
    """The connections of a process: who gets a place, who is overdue, and what is told about it.

    A newcomer that finds no place gets that of whoever has kept us waiting longest. Addresses that places are kept for
    are not counted by address, do not make room for others, and have an eighth of all places to themselves.
    """

    def __init__(self, limits: Limits, now: int = 0) -> None:
        self.limits, self.now = limits, now
        self._all: set[Connection] = set()
        self._of: defaultdict[str, set[Connection]] = defaultdict(set)
        self._ended: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._tell_at = 0
        self._crowded = ""
        self.is_stopping = False

    def is_kept_for(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self.limits.kept_for)

    def enter(self, connection: "Connection") -> bool:
        """Give it a place, if there is one or one can be made."""
        theirs = self._of[connection.address]
        if not connection.is_kept and len(theirs) >= self.limits.per_address and not self._make_room(theirs, "address"):
            self._crowded = connection.address
            return self._refused("refused_address")
        places = self.limits.connections - (0 if connection.is_kept else self.limits.connections // 8)
        if len(self._all) >= places and not self._make_room(self._all, "room"):
            return self._refused("refused")
        self._all.add(connection)
        theirs.add(connection)
        return True

    def leave(self, connection: "Connection") -> None:
        self._all.discard(connection)
        theirs = self._of.get(connection.address)
        if theirs is not None:
            theirs.discard(connection)
            if not theirs:
                del self._of[connection.address]

    def count(self, reason: str) -> None:
        self._ended[reason] += 1

    def stop(self) -> None:
        """From now on nobody is waited for any longer, and every answer is its connection's last."""
        if self.is_stopping:
            return
        self.is_stopping = True
        soon = min(self.limits.body_seconds, _STOPPING_SECONDS)
        self.limits = replace(self.limits, head_seconds=soon, body_seconds=soon, idle_seconds=soon, write_seconds=soon)

    def sweep(self, now: int) -> None:
        """Close what is overdue at this second, and tell about it."""
        self.now = now
        for connection in list(self._all):
            connection.look(now)
        if now >= self._tell_at and self._ended != self._told:
            self._tell_at = now + _TOLD_EVERY_SECONDS
            for reason in self._ended.keys() - {"idle"}:
                if count := self._ended[reason] - self._told[reason]:
                    where = {"address": self._crowded} if reason == "refused_address" else {}
                    log.warning("connections.ended", code=reason, count=count, **where)
            self._told = self._ended.copy()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Swept once a second while the block runs."""
        loop = asyncio.get_running_loop()
        self.now = int(loop.time())

        async def watch() -> None:
            while True:
                await asyncio.sleep(1)
                self.sweep(int(loop.time()))

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("satmeter_connections", "Connections of callers", value=len(self._all))
        ended = CounterMetricFamily("satmeter_connections_ended", "Connections that we ended", labels=["reason"])
        for reason, count in self._ended.items():
            ended.add_metric([reason], count)
        yield ended

    def _refused(self, reason: str) -> bool:
        self.count(reason)
        return False

    def _make_room(self, among: "set[Connection]", reason: str) -> bool:
        """Close some of those that have kept us waiting longest; false if we wait for none.

        A sixteenth at once, so that a flood of newcomers does not have all of them compared for each.
        """
        waiting = sorted((one for one in among if one.keeps_us_waiting), key=lambda one: one.dispensable)
        leaving = waiting[: max(1, len(among) // 16)]
        for connection in leaving:
            connection.make_room(reason)
        return bool(leaving)


# --- one connection -------------------------------------------------------------------------------


class Connection(HttpToolsProtocol):
    """uvicorn's protocol within limits; the head and the body of an answer leave together.

    It writes them one after the other, and each is a system call and a packet: a quarter of what a request costs it.
    """

    def __init__(
        self,
        connections: Connections,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._among, self._head_bytes = connections, connections.limits.head_bytes
        self.phase, self.since, self._stalled = _HEAD, connections.now, 0
        self._unparsed = 0
        """Bytes since the last head, or part of a body, was whole: they belong to a head or to trailers."""
        self.headers: list[tuple[bytes, bytes]] = []
        self.address, self.is_kept = "", False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", Gathering(transport, self.loop)))
        host = self.client[0] if self.client else ""
        self.is_kept = self._among.is_kept_for(host)
        self.address = blocks_of(host)[-1][0] if ":" in host else host
        if not self._among.enter(self):
            self._refuse(TooManyConnections(retry_after_seconds=1))

    def connection_lost(self, exc: Exception | None) -> None:
        self._among.leave(self)
        self.phase = _GONE
        super().connection_lost(exc)

    # --- what it sends ---

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        if self._unparsed <= self._head_bytes:
            super().data_received(data)
            if self._unparsed and len(self.headers) > _MOST_HEADERS and self.phase < _CLOSING:
                self._refuse_head()
        else:
            self._read_in_pieces(data)

    def _read_in_pieces(self, data: bytes) -> None:
        """A large chunk, of a body perhaps, or more of a head than there may be."""
        if self.phase == _LEAVING:
            if self._unparsed > self._head_bytes + _HEARD_OUT_BYTES:
                self._abort()
            return
        self._unparsed -= len(data)
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            self._unparsed += len(piece)
            super().data_received(piece)
            if self.phase >= _CLOSING or self.transport.is_closing():
                return
            if self._unparsed > self._head_bytes or len(self.headers) > _MOST_HEADERS:
                self._refuse_head()
                return

    def _refuse_head(self) -> None:
        self._among.count("head_too_large")
        self._refuse(HeadTooLarge(), hear_out=True)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.phase, self.since = _HEAD, self._among.now

    def on_headers_complete(self) -> None:
        if len(self.headers) > _MOST_HEADERS:
            raise ValueError("too many headers")  # ends the parsing; `send_400_response` is asked for
        super().on_headers_complete()
        if self._among.is_stopping and self.cycle is not None:  # it is None before the upgrade to a websocket
            self.cycle.keep_alive = False
        self.phase, self.since, self._unparsed = _BODY, self._among.now, 0
        self.headers = self.headers[:]  # trailers are no headers: those that come are not added to the request's
        if len(self.pipeline) > _MOST_QUEUED:
            raise ValueError("too many requests sent ahead")

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._unparsed = 0
        if self.cycle is not None and self.cycle.response_complete:
            self.phase, self.since = _IDLE, self._among.now
        else:
            self.phase = _ANSWER

    def on_response_complete(self) -> None:
        """As uvicorn's, without a timer for each answer: the sweep sees who idles."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self.phase, self.since = _CLOSING, self._among.now
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self.phase == _ANSWER:
            self.phase, self.since = _IDLE, self._among.now

    def handle_websocket_upgrade(self) -> None:
        self._among.leave(self)
        self.phase = _GONE
        super().handle_websocket_upgrade()

    def _unsupported_upgrade_warning(self) -> None:
        """Anybody may ask for what we do not have."""

    def send_400_response(self, msg: str) -> None:
        if len(self.headers) > _MOST_HEADERS:
            self._refuse_head()
        else:
            self._refuse(MalformedRequest())

    # --- what is sent to it ---

    def pause_writing(self) -> None:
        self._stalled = self._among.now or 1
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled = 0
        super().resume_writing()

    # --- its end ---

    @property
    def dispensable(self) -> tuple[int, int]:
        """Which should make room first: unfinished requests, then idle ones, then newcomers; the longest waiting first."""
        is_new = self.phase == _HEAD and self._among.now - self.since < 1
        return (2 if is_new else 1 if self.phase == _IDLE else 0), self.since

    @property
    def keeps_us_waiting(self) -> bool:
        """Whether it owes us something, or nothing is under way, and no place is kept for it."""
        is_owing = self.phase == _BODY and self._among.now - self.since >= _LEAVING_SECONDS
        return not self.is_kept and (is_owing or self.phase == _IDLE or (self.phase == _HEAD and not self._is_asked))

    @property
    def _is_asked(self) -> bool:
        """Whether an answer is under way."""
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    @property
    def _may_be_sending(self) -> bool:
        is_read = self.phase == _IDLE or (self._among.is_stopping and self.phase in (_HEAD, _BODY))
        return is_read and not self.flow.read_paused and not self.transport.is_closing()

    @property
    def _is_sending(self) -> bool:
        """Whether something of theirs has arrived that we did not read yet: who closes now cuts it off unanswered."""
        arrived = select.poll()
        arrived.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(arrived.poll(0))

    def look(self, now: int) -> None:
        """End it if it is overdue at this second."""
        limits, waited = self._among.limits, now - self.since
        if self._may_be_sending and self._is_sending:
            return
        if self.phase == _HEAD and waited > limits.head_seconds and not self._is_asked:
            self.end("head")
        elif self.phase == _BODY and waited > limits.body_seconds:
            if self.flow.read_paused:
                self.since = now  # it is us who do not read
            else:
                self.end("body")
        elif self.phase == _IDLE and waited > limits.idle_seconds:
            self.end("idle")
        elif (self.phase == _LEAVING and waited > _LEAVING_SECONDS) or (
            (self.phase == _CLOSING and waited > limits.write_seconds)
            or (self._stalled and now - self._stalled > limits.write_seconds)
        ):
            self._abort()

    def end(self, reason: str) -> None:
        """Close it: with an answer if half a request has come."""
        self._among.count(reason)
        is_half = self.phase == _BODY or (self.phase == _HEAD and self._unparsed > 0)
        self._refuse(RequestTimeout() if is_half else None)

    def make_room(self, reason: str) -> None:
        """Give its place away at once."""
        self.end(reason)
        self._among.leave(self)
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def shutdown(self) -> None:
        """Asked to stop: what is under way is finished, and the next answer is the last.

        One that idles is not closed at once, when its next request may be under way, but by a sweep a second later: who
        asks often has been told by then, and who does not is unlikely to ask in that very moment. HTTP allows no more.
        """
        self._among.stop()
        if self._is_asked:
            self.cycle.keep_alive = False
        elif self.phase in (_HEAD, _IDLE):
            self.since = self._among.now

    def _refuse(self, error: AppError | None, *, hear_out: bool = False) -> None:
        """Say why, where nothing was answered yet, and close."""
        may_answer = not self._is_asked or (
            self.phase == _BODY and not self.pipeline and not self.cycle.response_started
        )
        is_answered = self.phase == _BODY and self.cycle is not None and self.cycle.response_complete
        self.phase, self.since, self._unparsed = _LEAVING, self._among.now, self._head_bytes
        self.pipeline.clear()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if error is not None and may_answer and not is_answered:
            self.transport.write(_rendered(error, self.server_state.default_headers))
        if hear_out and self.transport.can_write_eof():
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()

    def _abort(self) -> None:
        self._among.count("stalled")
        self.transport.abort()


def _rendered(error: AppError, defaults: list[tuple[bytes, bytes]]) -> bytes:
    """The one body of every refusal, and its head."""
    body = msgspec.json.encode({"error": error.wire(), "message": error.message, "statusCode": error.status}) + b"\n"
    lines = [
        *defaults,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        (b"x-request-id", b"%032x" % random.getrandbits(128)),
        (b"connection", b"close"),
    ]
    if error.retry_after_seconds is not None:
        lines.append((b"retry-after", b"%d" % error.retry_after_seconds))
    head = STATUS_LINE[error.status] + b"".join(b"%b: %b\r\n" % line for line in lines)
    return head + b"\r\n" + body


class Gathering:
    """A transport that writes at once what was written to it in one turn of the loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []
        self.is_closing = transport.is_closing  # asked for each request; the rest goes through __getattr__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def _flush(self) -> None:
        if self._parts:
            gathered = b"".join(self._parts)
            self._parts.clear()
            if not self.is_closing():  # its caller may have gone in the same turn
                self._transport.write(gathered)

    def write_eof(self) -> None:
        self._flush()
        if not self.is_closing():
            self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()


# --- the process ----------------------------------------------------------------------------------


def raise_descriptor_limit() -> int:
    """Let this process, and those it starts, open as many files and sockets as it may; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit below the one it tells
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft


def networks(text: str) -> tuple[Network, ...]:
    """Addresses and networks, comma-separated, as the settings have checked them."""
    return tuple(ipaddress.ip_network(item.strip()) for item in text.split(",") if item.strip())


class Server(uvicorn.Server):
    """uvicorn's, that leaves without cutting anybody off.

    It says that it is leaving, to who asks whether it is ready, and goes on for `drain_seconds`, for load balancers to
    send their callers elsewhere; then it lets nobody new in; then it finishes what is under way.
    """

    drain_seconds: float = 0

    @property
    def is_draining(self) -> bool:
        return self.should_exit

    def leave_at_once(self) -> None:
        self.drain_seconds, self.should_exit = 0, True

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A second Ctrl-C ends the draining, and a third the waiting; another SIGTERM, as systemd may send, does not."""
        if sig == signal.SIGINT and self.should_exit:
            self.force_exit, self.drain_seconds = self.drain_seconds == 0, 0
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ticks = 0
        while ticks * _TICK_SECONDS < self.drain_seconds:
            await self.on_tick(ticks := ticks + 1)  # which tells the time to our answers
            await asyncio.sleep(_TICK_SECONDS)
        await _let_the_last_in(sockets or [])
        await super().shutdown(sockets)


async def _let_the_last_in(listeners: Sequence[socket.socket]) -> None:
    """To close a listener is to reset whoever waits in its queue: so nobody new may join it, and it is emptied first.

    Who tries to connect meanwhile is not answered, tries again a second later, and is refused by then. Where there is no
    such filter somebody may still come in the last moment.
    """
    for listener in listeners:
        with contextlib.suppress(OSError):
            _keep_newcomers_out(listener)
    await asyncio.sleep(_HANDSHAKE_SECONDS)
    waiting = select.poll()
    for listener in listeners:
        waiting.register(listener.fileno(), select.POLLIN)
    for _ in range(_LAST_LOOKS):  # whatever else keeps us busy, the loop lets them in between
        if not waiting.poll(0):
            return
        await asyncio.sleep(0.005)


def _keep_newcomers_out(listener: socket.socket) -> None:
    """Raises OSError where it cannot be done."""
    if not sys.platform.startswith("linux"):
        return
    steps = ctypes.create_string_buffer(_NO_NEWCOMERS, len(_NO_NEWCOMERS))
    program = struct.pack("HP", len(_NO_NEWCOMERS) // 8, ctypes.addressof(steps))
    listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


def http_server(app: App, connections: Connections, **options: Any) -> Server:
    """uvicorn's, with our connections."""
    protocol = cast("type[asyncio.Protocol]", partial(Connection, connections))
    return Server(uvicorn.Config(app, http=protocol, log_config=None, access_log=False, server_header=False, **options))
