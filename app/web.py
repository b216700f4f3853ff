"""What every request shares: who is calling, idempotency, how a body is read and how an error looks."""

import hashlib
import logging
import random
import re
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.di import NamedDependency
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from app.admin.tokens import ServiceTokens, verify_admin
from app.kernel.db import Database
from app.kernel.errors import (
    AppError,
    BodyTooLarge,
    InvalidApiKey,
    InvalidCreditId,
    InvalidField,
    InvalidToken,
    MalformedHeader,
    MalformedJson,
    NotFound,
    UnsupportedMediaType,
)
from app.kernel.idempotency import Once
from app.kernel.logs import is_told, log, where_it_broke
from app.kernel.reading import read
from app.kernel.security import Admin, Caller, Service
from app.kernel.settings import Settings
from app.keys.verify import Verifier, authenticate, key_in
from app.metering import reports
from app.metering.ext_authz import GATEWAY_HEADER

MAX_BODY_BYTES = 64 * 1024
_LARGER_BODIES = dict.fromkeys(reports.ROUTES, reports.MAX_BODY_BYTES)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,64}", re.ASCII)
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_VISIBLE = re.compile(r"[!#-~]{1,255}", re.ASCII)
"""Visible ASCII but the quote: a key is quoted as a whole or not at all."""
_LENGTH = re.compile(rb"\d{1,18}")
_DEFAULTS = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))
_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""What is counted by its own name; callers may invent others, and each would be a new time series."""

_BOUNDS_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(slots=True)
class _Tally:
    """What was answered alike: in how many seconds altogether, and how often within each bound and beyond the last."""

    seconds: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS_SECONDS) + 1))


class Answered(Collector):
    """Requests answered, and how fast: counted as they come, and put into the library's terms when it asks.

    Its own counters, made for threads, take seven times as long.
    """

    def __init__(self) -> None:
        self._tallies: defaultdict[tuple[str, str, int], _Tally] = defaultdict(_Tally)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        tally = self._tallies[method, route, status]
        tally.seconds += seconds
        tally.within[bisect_left(_BOUNDS_SECONDS, seconds)] += 1

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("satmeter_requests", "Requests answered", labels=["method", "route", "status"])
        of_route: defaultdict[str, _Tally] = defaultdict(_Tally)
        for (method, route, status), tally in self._tallies.items():
            requests.add_metric([method, route, str(status)], sum(tally.within))
            total = of_route[route]
            total.seconds += tally.seconds
            total.within = [before + more for before, more in zip(total.within, tally.within, strict=True)]
        seconds = HistogramMetricFamily("satmeter_request_seconds", "Time to answer", labels=["route"])
        bounds = [*map(str, _BOUNDS_SECONDS), "+Inf"]
        for route, total in of_route.items():
            up_to = zip(bounds, accumulate(total.within), strict=True)
            seconds.add_metric([route], list(up_to), sum_value=total.seconds)
        yield requests
        yield seconds


_answered = Answered()
REGISTRY.register(_answered)


class JsonRequest(Request[Any, Any, Any]):
    """A request whose JSON body is read straight into the handler's type, so that no number becomes a float."""

    async def json(self) -> Any:
        """Raises UnsupportedMediaType, MalformedJson or InvalidField."""
        field = self.route_handler.parsed_data_field
        assert field is not None
        return read_json(await self.body(), field.annotation, self.headers.get("content-type"))


def read_json(body: bytes, wanted: Any, content_type: str | None) -> Any:
    """Decode a JSON body strictly. Raises UnsupportedMediaType, MalformedJson or InvalidField."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(f"The body must be application/json, got {media_type[:100]!r}")
    if _ESCAPED_NUL.search(body):
        raise InvalidField("Text may not contain NUL characters")
    try:
        body.decode()  # msgspec looks into no text that it only skips or keeps raw
    except UnicodeDecodeError as error:
        raise MalformedJson(f"The body is not valid JSON: {error}") from None
    return read(body, wanted)


# --- who is calling -------------------------------------------------------------------------------


async def provide_caller(request: Request[Any, Any, Any], verifier: NamedDependency[Verifier]) -> Caller:
    """By credit id or API key."""
    return await authenticate(verifier, request.headers)


async def provide_owner(request: Request[Any, Any, Any], verifier: NamedDependency[Verifier]) -> Caller:
    """By credit id only: what an API key may not do."""
    if "x-credit-id" not in request.headers:
        raise InvalidCreditId("This needs the account's credit id, sent as 'x-credit-id'")
    return await verifier.credit_id(request.headers["x-credit-id"])


async def provide_key(request: Request[Any, Any, Any], verifier: NamedDependency[Verifier]) -> Caller:
    """By API key only: what is about the key itself."""
    secret = key_in(request.headers)
    if secret is None:
        raise InvalidApiKey("This is about the calling API key: send it as 'Authorization: Bearer sk-…'")
    return await verifier.api_key(secret)


def bearer(header: str) -> str:
    """The token in an Authorization header. Raises InvalidToken."""
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidToken
    return token.strip()


async def provide_service(request: Request[Any, Any, Any], services: NamedDependency[ServiceTokens]) -> Service:
    """By service token."""
    return await services.service(bearer(request.headers.get("authorization", "")))


async def provide_gateway(request: Request[Any, Any, Any], services: NamedDependency[ServiceTokens]) -> Service:
    """By service token in a header of its own: in Authorization a gateway passes on its client's key."""
    return await services.service(request.headers.get(GATEWAY_HEADER, "").partition(";")[0].strip())


async def provide_admin(
    request: Request[Any, Any, Any], db: NamedDependency[Database], settings: NamedDependency[Settings]
) -> Admin:
    """By admin token."""
    return await verify_admin(db, settings.pepper, bearer(request.headers.get("authorization", "")))


async def provide_once(
    request: Request[Any, Any, Any], db: NamedDependency[Database], settings: NamedDependency[Settings]
) -> Once:
    """The idempotency of this POST, scoped to whoever sends it: the same key of two callers is two keys."""
    headers = request.headers
    secrets = (headers.get(name, "") for name in ("authorization", "x-api-key", "api-key"))
    who = "\x00".join((headers.get("x-credit-id", "").lower(), *secrets))
    if not who.strip("\x00"):
        who = request.client.host if request.client else "unknown"
    body = await request.body()
    once = Once(
        db,
        settings.pepper,
        settings.sealer,
        scope=f"{request.method} {request.url.path}\x00{who}",
        key=_idempotency_key(headers.get("idempotency-key")),
        request_hash=hashlib.sha256(body).digest(),
    )
    request.state.once = once
    return once


def _idempotency_key(header: str | None) -> str | None:
    if header is None:
        return None
    key = header[1:-1] if len(header) >= 2 and header[0] == header[-1] == '"' else header
    if not _VISIBLE.fullmatch(key):
        raise MalformedHeader(
            f"Idempotency-Key must be 1-255 visible ASCII characters without quotes inside, got {len(key)} characters",
            param="Idempotency-Key",
        )
    return key


# --- how an error looks ---------------------------------------------------------------------------


def error_body(error: AppError) -> dict[str, Any]:
    """The one body of every refusal: OpenAI's clients read `error`, older ones `message`."""
    return {"error": error.wire(), "message": error.message, "statusCode": error.status}


def render(error: AppError) -> Response[Any]:
    headers = {"Cache-Control": "no-store"}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(error_body(error), status_code=error.status, headers=headers, media_type="application/json")


def on_app_error(request: Request[Any, Any, Any], error: AppError) -> Response[Any]:
    request.state.error_code = error.code
    if error.status >= 500:
        log.warning("request.unavailable", code=error.code, where=where_it_broke(error))
    return render(error)


class MethodNotAllowed(AppError):
    """This address does not take that method."""

    status, code, type = 405, "method_not_allowed", "invalid_request_error"


def on_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """Litestar's own refusals, in our words."""
    if error.status_code >= 500:
        return on_defect(request, error)
    answer = on_app_error(request, _ours(error))
    if error.status_code == 405:
        answer.headers["Allow"] = (error.headers or {}).get("allow", "")
    return answer


def _ours(error: HTTPException) -> AppError:
    if isinstance(error, ValidationException):
        return _invalid(error)
    by_status: dict[int, AppError] = {404: NotFound(), 405: MethodNotAllowed(), 413: BodyTooLarge()}
    # What is left of Litestar's 400s is a Host or Content-Length that makes no sense; it may hold anything.
    return by_status.get(error.status_code) or MalformedHeader("The Host or Content-Length header is malformed")


def _invalid(error: ValidationException) -> AppError:
    first = error.extra[0] if isinstance(error.extra, list) and error.extra else {}
    param, message = first.get("key"), first.get("message", "is not valid")
    if param == "data":
        return MalformedJson("This needs a JSON body")
    return InvalidField(f"{param}: {message}" if param else str(message), param=param)


def on_defect(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """A defect of ours: say so, log where, and nothing of what was in it."""
    request.state.error_code = "internal_error"
    log.error("request.defect", exc_type=type(error).__name__, where=where_it_broke(error))
    return render(AppError("Something of ours broke; it is logged under this request's X-Request-Id"))


async def send_refusal(scope: Scope, receive: Receive, send: Send, error: Exception) -> None:
    """What Litestar would answer for this error, for a route that does without it."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        request = JsonRequest(scope, receive, send)
        answer = on_app_error(request, error) if isinstance(error, AppError) else on_defect(request, error)
        await answer.to_asgi_response(app=None, request=request)(scope, receive, send)

    await around_requests(refuse)(scope, receive, send)


# --- around every request ---------------------------------------------------------------------------


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The caller's own id if it is a sane one, else the trace's, else a new one."""
    own, trace = headers.get(b"x-request-id"), headers.get(b"traceparent")
    if own is not None and _REQUEST_ID.fullmatch(text := own.decode("latin-1")):
        return text
    if trace is not None and (found := _TRACEPARENT.fullmatch(trace.decode("latin-1"))):
        return found[1]
    return f"{random.getrandbits(128):032x}"


def around_requests(app: ASGIApp) -> ASGIApp:
    """Give every request an id, a size limit, one log line and its place in the metrics."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        headers = dict(scope["headers"])  # ASGI has the names in lower case
        request_id = request_id_of(headers)
        scope.setdefault("state", {})
        structlog.contextvars.bind_contextvars(request_id=request_id)  # a request is a context of its own
        started, status = time.perf_counter(), 500
        length = headers.get(b"content-length", b"0")

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _with_ours(message.get("headers", ()), scope, request_id)
            await send(message)

        try:
            if _LENGTH.fullmatch(length) and int(length) > _LARGER_BODIES.get(scope["path"], MAX_BODY_BYTES):
                await _too_large(sending)
            else:
                await app(scope, _whole(receive), sending)
        finally:
            account_for(scope, status, time.perf_counter() - started)

    return wrapped


def _with_ours(lines: Iterable[tuple[bytes, bytes]], scope: Scope, request_id: str) -> list[tuple[bytes, bytes]]:
    """The headers every answer bears, added to an answer's own."""
    theirs = [line for line in lines if line[0].lower() != b"x-request-id"]
    names = {name.lower() for name, _ in theirs}
    once = scope["state"].get("once")
    return [
        *theirs,
        *(line for line in _DEFAULTS if line[0] not in names),
        (b"x-request-id", request_id.encode()),
        *([(b"idempotent-replayed", b"true")] if once is not None and once.replayed else []),
    ]


def _whole(receive: Receive) -> Receive:
    """A body that breaks off is the caller's trouble: without this, Litestar takes it for a defect of ours."""
    is_complete = False

    async def receiving() -> Any:
        nonlocal is_complete
        message = await receive()
        if message["type"] == "http.disconnect" and not is_complete:
            raise MalformedJson("The connection was closed before the whole body had come")
        is_complete = is_complete or not message.get("more_body", False)
        return message

    return receiving


def headers_of_ours(headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """The headers every answer bears, to a request with these `headers`."""
    return [*_DEFAULTS, (b"x-request-id", request_id_of(headers).encode())]


async def _too_large(send: Send) -> None:
    body = msgspec.json.encode(error_body(BodyTooLarge()))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def account_for(scope: Scope, status: int, seconds: float) -> None:
    """One request's place in the metrics, and its log line."""
    route, method = scope.get("path_template") or "unmatched", str(scope.get("method", ""))
    method = method if method in _METHODS else "other"
    _answered.count(method, route, status, seconds)
    if is_told(logging.INFO):
        log.info(
            "request",
            method=method, path=route, status=status, duration_ms=round(seconds * 1000, 2),
            code=scope["state"].get("error_code"),
        )  # fmt: skip
