"""authorize, settle and charge with nothing between ASGI and their handlers: they are asked on every call of every model.

What is ordinary is answered here, in front of everything else; whatever else there is about a request goes on to where
all requests go. Both ways run the same handlers of calls.py, read bodies and render refusals with the same functions, so
that an answer never tells which way it came.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Final, get_type_hints

import msgspec
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from app.kernel.security import Service
from app.metering.api.calls import MeterController

_HOT: Final = (MeterController.authorize, MeterController.settle, MeterController.charge)
_UNWANTED: Final = b"x-topup-offer"
"""Who wants no offer says so on the call; that is read where all headers are."""
_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Door:
    """What the HTTP door does alike for every route."""

    max_body_bytes: int
    read_json: Callable[[bytes, Any, str | None], Any]
    service_of: Callable[[str], Awaitable[Service]]
    """From the Authorization header."""
    headers: Callable[[Scope, Mapping[bytes, bytes]], list[tuple[bytes, bytes]]]
    """What every answer bears, to a request with these."""
    answered: Callable[[Scope, int, float], None]
    """Counts a request by its status and seconds."""
    refuse: Callable[[Scope, Receive, Send, Exception], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Route:
    wanted: Any
    decode: Callable[[bytes], Any]
    handler: Callable[..., Awaitable[msgspec.Struct]]

    @classmethod
    def of(cls, handler: HTTPRouteHandler, parts: Mapping[str, object]) -> "_Route":
        """The typed handler with the parts it depends on; only the caller and the body are a request's own."""
        names = [name for name in signature(handler.fn).parameters if name not in ("self", "service", "data")]
        bound = partial(handler.fn, None, **{name: parts[name] for name in names})  # a controller keeps nothing in self
        wanted = get_type_hints(handler.fn)["data"]
        return cls(wanted, msgspec.json.Decoder(wanted).decode, bound)


def in_front_of(app: ASGIApp, parts: Mapping[str, object], door: Door) -> ASGIApp:
    """An application that answers the hot routes, and asks `app` for the rest."""
    routes = {MeterController.path + path: _Route.of(handler, parts) for handler in _HOT for path in handler.paths}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        route = routes.get(scope.get("path", ""))
        if route is None or scope.get("method") != "POST":
            await app(scope, receive, send)
            return
        started, lines = time.perf_counter(), list(scope["headers"])
        scope.setdefault("state", {})["started"] = started  # whoever answers: it is one request
        headers = dict(lines)
        message: Any = await receive()
        body = message.get("body", b"")
        is_whole = not message.get("more_body", False) and headers.get(b"content-length") == b"%d" % len(body)
        is_plain = len(headers) == len(lines) and not scope.get("query_string") and _UNWANTED not in headers
        if not is_whole or not is_plain or len(body) > door.max_body_bytes:
            await app(scope, _again(message, receive), send)
            return
        scope["path_template"] = scope["path"]
        try:
            service = await door.service_of(headers.get(b"authorization", b"").decode("latin-1"))
            data = _read(route, door, headers, body)
            answered = _encode(await route.handler(service=service, data=data)) + b"\n"
        except Exception as error:  # noqa: BLE001 - this is a door: what is no refusal is rendered as our defect
            await door.refuse(scope, receive, send, error)
            return
        own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answered))]
        await send({"type": "http.response.start", "status": 200, "headers": own + door.headers(scope, headers)})
        await send({"type": "http.response.body", "body": answered, "more_body": False})
        door.answered(scope, 200, time.perf_counter() - started)

    return answer


def _read(route: _Route, door: Door, headers: Mapping[bytes, bytes], body: bytes) -> Any:
    """What `read_json` reads. What it would look for and refuse is not in such a body, so that it need not be asked."""
    content_type = headers.get(b"content-type", b"")
    if content_type == b"application/json" and body.isascii() and b"\\u0000" not in body:
        try:
            return route.decode(body)
        except msgspec.MsgspecError:
            pass  # it says what is wrong
    return door.read_json(body, route.wanted, content_type.decode("latin-1"))


def _again(first: Any, receive: Receive) -> Receive:
    """The request from its beginning, for somebody else to read."""
    messages = [first]

    async def receiving() -> Any:
        return messages.pop() if messages else await receive()

    return receiving
