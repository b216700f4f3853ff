"""How a body goes out: its text ends in a newline, and what is public and long is compressed and can be asked for again.

HEAD is answered here too: as GET, without the body.
"""

import gzip
import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

PUBLISHED: Final = frozenset({"/docs", "/openapi.json", "/llms.txt"})
"""What is the same until we are updated: it bears an ETag, and may be kept by who asks whether it still holds. Not the front
page: its form has a token of the visitor's own, which is for nobody to keep, nor to be told by how long a body is."""

COMPRESSED: Final = PUBLISHED | {
    "/v1/models", "/models", "/router/models", "/v1/media/models", "/v1/prices", "/api/v1/models", "/topup/payment-methods",
    "/metrics", "/queries/history", "/activity", "/api/v1/activity",
}  # fmt: skip
"""What holds no secret: what anybody may read, and the figures of calls, in which ids and names stand but nothing that
opens anything. How long a compressed answer is tells what it repeats (BREACH), so no answer with a key, a credit id, an
invoice or a receipt's address is compressed, however it is asked for; nor verdicts of the meter, which must be quick."""

_LEAST_BYTES: Final = 1024
_TEXT: Final = re.compile(rb"text/(?!event-stream)|application/([a-z.-]+\+)?json\b")
_LEVEL: Final = 6
Headers = list[tuple[bytes, bytes]]


def heads_as_gets(app: ASGIApp) -> ASGIApp:
    """HEAD as GET: the same headers, Content-Length among them, and nothing after them."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or scope["method"] != "HEAD":
            await app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.body":
                message["body"] = b""
            await send(message)

        as_get: Any = {**scope, "method": "GET"}  # the server's own still says HEAD: it counts no bytes of a body
        try:
            await app(as_get, receive, sending)
        finally:
            if "path_template" in as_get:
                scope["path_template"] = as_get["path_template"]

    return wrapped


def well_ended(app: ASGIApp) -> ASGIApp:
    """Bodies as they go out. One that comes in pieces goes out as it comes."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        start: Message | None = None

        async def sending(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                if not message.get("more_body", False):
                    start, message = _ended(scope, start, message)
                await send(start)
                start = None
            await send(message)

        await app(scope, receive, sending)

    return wrapped


def _ended(scope: Scope, start: Any, message: Any) -> tuple[Any, Any]:
    """An answer that is there as a whole."""
    headers: Headers = [(name.lower(), value) for name, value in start["headers"]]
    body, kind = message.get("body", b""), dict(headers).get(b"content-type", b"")
    if not body or not _TEXT.match(kind) or b"content-encoding" in dict(headers):
        return start, message
    if not body.endswith(b"\n"):
        body += b"\n"
    status, asked, route = start["status"], dict(scope["headers"]), scope.get("path_template", "")
    if status == 200 and route in PUBLISHED:
        tag = _tag_of(body)
        headers = [*_without(headers, b"cache-control"), (b"etag", tag), (b"cache-control", b"no-cache")]
        if _is_kept(asked, tag):
            status, body, headers = 304, b"", _without(headers, b"content-type", b"content-length")
    if route in COMPRESSED and status in (200, 304):
        headers.append((b"vary", b"Accept-Encoding"))
        if len(body) > _LEAST_BYTES and _takes_gzip(asked.get(b"accept-encoding", b"")):
            body = _squeezed_once(body) if route in PUBLISHED else gzip.compress(body, _LEVEL, mtime=0)
            headers.append((b"content-encoding", b"gzip"))
    if status != 304:
        headers = [*_without(headers, b"content-length"), (b"content-length", b"%d" % len(body))]
    return {**start, "status": status, "headers": headers}, {**message, "body": body}


def _without(headers: Headers, *names: bytes) -> Headers:
    return [line for line in headers if line[0] not in names]


@lru_cache(maxsize=8)
def _tag_of(body: bytes) -> bytes:
    """Weak, since it is the same whether it goes out compressed or not."""
    return b'W/"%s"' % hashlib.sha256(body).hexdigest()[:32].encode()


@lru_cache(maxsize=8)
def _squeezed_once(body: bytes) -> bytes:
    return gzip.compress(body, _LEVEL, mtime=0)


def _is_kept(asked: Mapping[bytes, bytes], tag: bytes) -> bool:
    """Whether who asks has what we would send. Tags are compared as weak ones: RFC 9110, section 13.1.2."""
    told = [each.strip().removeprefix(b"W/") for each in asked.get(b"if-none-match", b"").split(b",")]
    return told == [b"*"] or tag.removeprefix(b"W/") in told


@lru_cache(maxsize=64)
def _takes_gzip(accept_encoding: bytes) -> bool:
    """Whether gzip was named, or `*`, with a weight above nothing: RFC 9110, section 12.5.3."""
    weights = {}
    for each in accept_encoding.decode("latin-1").lower().split(","):
        name, *more = (part.strip() for part in each.split(";"))
        weights[name] = next((part[2:].strip() for part in more if part.startswith("q=")), "1")
    weight = weights.get("gzip", weights.get("x-gzip", weights.get("*", "0")))
    return re.fullmatch(r"0?\.?0*", weight) is None and re.fullmatch(r"[01](\.\d{0,3})?", weight) is not None
