"""What stands around every request: its id, the headers of its answer, a limit to its size, its place in the metrics."""

import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.kernel import standby
from app.kernel.errors import AppError
from app.kernel.ratelimit import as_headers, begin, met
from app.web.bodies import Body, JsonRequest
from app.web.metrics import account_for
from app.web.outgoing import well_ended
from app.web.refusals import on_app_error, on_defect

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,64}", re.ASCII)
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_STAY_WITH_HTTPS = (b"strict-transport-security", b"max-age=31536000")
Lines = Sequence[tuple[bytes, bytes]]
OfOrigin = Callable[[str, Mapping[bytes, bytes]], Lines]
"""What an answer bears besides, from the request's path and headers: whose pages may read it."""


def lines_of_every_answer(public_url: str) -> Lines:
    """The headers that every answer bears, unless it says otherwise itself."""
    lines = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))
    return (*lines, _STAY_WITH_HTTPS) if public_url.startswith("https://") else lines


def around_requests(app: ASGIApp, every: Lines, of_origin: OfOrigin) -> ASGIApp:
    """Give every request an id, the lines of `every` answer and of its origin, one log line and its place in the metrics."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        headers = dict(scope["headers"])  # ASGI has the names in lower case
        request_id, state = request_id_of(headers), scope.setdefault("state", {})
        state["request_id"] = request_id
        started, status, body = state.setdefault("started", time.perf_counter()), 500, Body(receive, headers)
        structlog.contextvars.bind_contextvars(request_id=request_id)  # a request is a context of its own
        limits, reads = state.setdefault("limits", None) or begin(), standby.begin()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                is_over = status >= 400 and body.may_be_long and not body.is_whole  # nobody waits for the rest
                closing = [(b"connection", b"close")] if is_over else []
                ours = [*every, *of_origin(scope["path"], headers), *as_headers(limits), *standby.as_headers(reads)]
                message["headers"] = _with_ours(message.get("headers", ()), ours, scope, request_id) + closing
            await send(message)

        try:
            await app(scope, body.receive, sending)
        finally:
            account_for(scope, status, time.perf_counter() - started)

    return wrapped


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The caller's own id if it is a sane one, else the trace's, else a new one."""
    own, trace = headers.get(b"x-request-id"), headers.get(b"traceparent")
    if own is not None and _REQUEST_ID.fullmatch(text := own.decode("latin-1")):
        return text
    if trace is not None and (found := _TRACEPARENT.fullmatch(trace.decode("latin-1"))):
        return found[1]
    return f"{random.getrandbits(128):032x}"


def _with_ours(
    lines: Iterable[tuple[bytes, bytes]], every: Lines, scope: Scope, request_id: str
) -> list[tuple[bytes, bytes]]:
    """An answer's own headers, and ours."""
    theirs = [line for line in lines if line[0].lower() != b"x-request-id"]
    names = {name.lower() for name, _ in theirs}
    once = scope["state"].get("once")
    return [
        *theirs,
        *(line for line in every if line[0] not in names or line[0] == b"vary"),
        (b"x-request-id", request_id.encode()),
        *([(b"payment-receipt", receipt.encode())] if (receipt := scope["state"].get("payment_receipt")) else []),
        *([(b"idempotent-replayed", b"true")] if once is not None and once.replayed else []),
    ]


def heading(every: Lines, of_origin: OfOrigin) -> Callable[[Scope, Mapping[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """What an answer bears to a request with these headers, for a route that does without all this; its log line gets the id."""

    def lines(scope: Scope, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        request_id = scope["state"]["request_id"] = request_id_of(headers)
        return [*every, *of_origin(scope["path"], headers), *as_headers(met()), (b"x-request-id", request_id.encode())]

    return lines


def refusing(every: Lines, of_origin: OfOrigin) -> Callable[[Scope, Receive, Send, Exception], Awaitable[None]]:
    """Sends what Litestar would answer for an error, for a route that does without it."""

    async def send_refusal(scope: Scope, receive: Receive, send: Send, error: Exception) -> None:
        async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
            request = JsonRequest(scope, receive, send)
            answer = on_app_error(request, error) if isinstance(error, AppError) else on_defect(request, error)
            await answer.to_asgi_response(app=None, request=request)(scope, receive, send)

        scope["state"]["limits"] = met()  # those that it has met so far
        await around_requests(well_ended(refuse), every, of_origin)(scope, receive, send)

    return send_refusal
