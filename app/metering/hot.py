"""authorize and settle with nothing between ASGI and their handlers: these two are asked on every call of every model.

What is ordinary is answered here, in front of Litestar's router; everything else about their requests goes on to
Litestar. Both ways run the same handlers of api.py, read bodies and render refusals with the same functions, so
that an answer never tells which way it came.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Final, get_type_hints

import msgspec
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from app.kernel.errors import AppError
from app.kernel.security import Service
from app.metering.api import MeterController

_HOT: Final = (MeterController.authorize, MeterController.settle)
_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Door:
    """What the HTTP door does alike for every route."""

    read_json: Callable[[bytes, Any, str | None], Any]
    service_of: Callable[[str], Awaitable[Service]]
    """From the Authorization header."""
    refuse: Callable[[Scope, Receive, Send, Exception], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Route:
    wanted: Any
    handler: Callable[..., Awaitable[msgspec.Struct]]

    @classmethod
    def of(cls, handler: HTTPRouteHandler, parts: Mapping[str, object]) -> "_Route":
        """The typed handler with the parts it depends on; only the caller and the body are a request's own."""
        names = [name for name in signature(handler.fn).parameters if name not in ("self", "service", "data")]
        bound = partial(handler.fn, None, **{name: parts[name] for name in names})  # a controller keeps nothing in self
        return cls(get_type_hints(handler.fn)["data"], bound)


def in_front_of(app: ASGIApp, parts: Mapping[str, object], door: Door) -> ASGIApp:
    """An application that answers the two hot routes, and asks `app` for the rest."""
    routes = {MeterController.path + path: _Route.of(handler, parts) for handler in _HOT for path in handler.paths}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        route = routes.get(scope["path"])
        if route is None or scope.get("method") != "POST":
            await app(scope, receive, send)
            return
        lines = list(scope["headers"])
        headers = dict(lines)
        try:
            message: Any = await receive()
        except AppError as error:
            await door.refuse(scope, receive, send, error)
            return
        body = message.get("body", b"")
        is_whole = not message.get("more_body", False) and headers.get(b"content-length") == b"%d" % len(body)
        if not is_whole or len(headers) != len(lines):
            await app(scope, _again(message, receive), send)
            return
        scope["path_template"] = scope["path"]
        await _answer(route, door, headers, body, (scope, receive, send))

    return answer


async def _answer(
    route: _Route, door: Door, headers: dict[bytes, bytes], body: bytes, asgi: tuple[Scope, Receive, Send]
) -> None:
    try:
        data = door.read_json(body, route.wanted, headers.get(b"content-type", b"").decode("latin-1"))
        service = await door.service_of(headers.get(b"authorization", b"").decode("latin-1"))
        answer = _encode(await route.handler(service=service, data=data))
    except Exception as error:  # noqa: BLE001 - this is a door: what is no refusal is rendered as our defect
        await door.refuse(*asgi, error)
        return
    send = asgi[2]
    lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": lines})
    await send({"type": "http.response.body", "body": answer, "more_body": False})


def _again(first: Any, receive: Receive) -> Receive:
    """The request from its beginning, for somebody else to read."""
    messages = [first]

    async def receiving() -> Any:
        return messages.pop() if messages else await receive()

    return receiving
