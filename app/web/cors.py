"""Which web pages of others may read our answers in a browser: by default all, of what customers ask; never of the rest.

Nobody is known to the API by a cookie, so a page can do no more with it than with the secrets that it was given. An
operator's routes, webhooks, pages, metrics and what gateways ask are not for pages of others at all.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from litestar import Litestar
from litestar.enums import ScopeType
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute
from litestar.types import ASGIApp, Receive, Scope, Send

from app.metering.api.ext_authz import PATH as SUBREQUESTS

Lines = Sequence[tuple[bytes, bytes]]

_NOT_CUSTOMERS: Final = frozenset({"Admin", "Operations"})
_SENT: Final = (
    "authorization", "x-api-key", "api-key", "x-credit-id", "idempotency-key", "content-type", "accept", "x-request-id", "traceparent",
)  # fmt: skip
_READ: Final = b"Retry-After, X-Request-Id, Idempotent-Replayed, X-Next-Cursor, X-Data-As-Of, WWW-Authenticate, Content-Disposition, ETag, Allow, RateLimit, RateLimit-Policy"
_METHODS: Final = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_HEADER_NAME: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,100}", re.ASCII)
_MOST_NAMES: Final = 50
_KEPT_SECONDS: Final = b"7200"
"""As long as browsers keep the answer to a preflight at most."""


class Origins:
    """`allowed` are the origins whose pages may ask, `*` for all of them; `app` tells which addresses customers have."""

    def __init__(self, allowed: Sequence[str], app: Litestar) -> None:
        self._all = "*" in allowed
        self._allowed = frozenset(origin.encode() for origin in allowed)
        self._segments = frozenset(_segments(app))

    def lines(self, path: str, headers: Mapping[bytes, bytes]) -> Lines:
        """What an answer bears to a request with these headers."""
        if not self._is_customers(path):
            return ()
        origin = headers.get(b"origin")
        told = [] if self._all or not self._allowed else [(b"vary", b"Origin")]
        if origin is None or not (self._all or origin in self._allowed):
            return told
        allowed = b"*" if self._all else origin
        return [*told, (b"access-control-allow-origin", allowed), (b"access-control-expose-headers", _READ)]

    def answering_preflights(self, app: ASGIApp) -> ASGIApp:
        """Answer what a browser asks before it sends a page's request; whose page may not ask is not answered."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != ScopeType.HTTP or scope["method"] != "OPTIONS":
                await app(scope, receive, send)
                return
            headers = dict(scope["headers"])
            if b"access-control-request-method" not in headers or not self._may_ask(scope["path"], headers):
                await app(scope, receive, send)
                return
            told = [
                (b"access-control-allow-methods", _METHODS),
                (b"access-control-allow-headers", _allowed_names(headers)),
                (b"access-control-max-age", _KEPT_SECONDS),
            ]
            await send({"type": "http.response.start", "status": 204, "headers": told})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        return wrapped

    def _may_ask(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        return any(name == b"access-control-allow-origin" for name, _ in self.lines(path, headers))

    def _is_customers(self, path: str) -> bool:
        # What a gateway passes on may be its client's preflight: answered with a yes it would be let through.
        segment = path[1:].partition("/")[0]
        return segment in self._segments and not path.startswith(SUBREQUESTS)


def _allowed_names(headers: Mapping[bytes, bytes]) -> bytes:
    """Ours, and what else the page's client sends: those of OpenAI's in a browser are many, and none does harm."""
    asked = headers.get(b"access-control-request-headers", b"").decode("latin-1").lower().split(",")
    more = [name for name in map(str.strip, asked[:_MOST_NAMES]) if _HEADER_NAME.fullmatch(name)]
    return ", ".join(dict.fromkeys((*_SENT, *more))).encode()


def _segments(app: Litestar) -> set[str]:
    """The first part of every address that answers customers with data."""
    return {
        route.path.split("/")[1]
        for route in app.routes
        if isinstance(route, HTTPRoute)
        if any(_is_for_customers(handler) for handler in route.route_handlers)
    } | {"openapi.json"}


def _is_for_customers(handler: HTTPRouteHandler) -> bool:
    tags = set(handler.resolve_tags())
    return bool(handler.resolve_include_in_schema() and tags and not tags & _NOT_CUSTOMERS and not _is_page(handler))


def _is_page(handler: HTTPRouteHandler) -> bool:
    kind: Any = handler.media_type
    return "html" in str(getattr(kind, "value", kind))
