"""Ways for a backend to be down: what Greenfield's callers see while the driver says so.

refuse   the connection is cut before any answer; nothing was done
lost     the request is carried out, then the connection is cut: the answer that a client must not take for a no
slow     the request is carried out, its answer held back for `seconds`
error    503 with a proxy's HTML page; nothing was done
rubbish  200 with JSON that breaks off; nothing was done
"""

import asyncio
from collections.abc import Callable
from enum import StrEnum

from litestar.enums import ScopeType
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Message, Receive, Scope, Send


class Mode(StrEnum):
    OFF = "off"
    REFUSE = "refuse"
    LOST = "lost"
    SLOW = "slow"
    ERROR = "error"
    RUBBISH = "rubbish"


class Outage:
    """How the backend is down now. `methods` are HTTP verbs, empty for all; `seconds` is slow's delay."""

    def __init__(self) -> None:
        self.mode = Mode.OFF
        self.methods: frozenset[str] = frozenset()
        self.seconds = 30.0

    def hits(self, http_method: str) -> bool:
        return self.mode is not Mode.OFF and (not self.methods or http_method in self.methods)


class OutageMiddleware(ASGIMiddleware):
    """Stands before the Greenfield routes only, so that the driver can end what it began.

    Takes a function, for Litestar deep-copies a router's middleware, and a copied Outage would never go down.
    """

    scopes = (ScopeType.HTTP,)

    def __init__(self, current: Callable[[], Outage]) -> None:
        self.current = current

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        outage = self.current()
        if not outage.hits(scope["method"]):  # type: ignore[typeddict-item]
            await next_app(scope, receive, send)
        elif outage.mode is Mode.SLOW:
            await _answer_late(scope, receive, send, next_app, outage.seconds)
        elif outage.mode is Mode.LOST:
            await next_app(scope, receive, _swallow)
            await _cut(send)
        elif outage.mode is Mode.ERROR:
            await _answer(send, 503, b"text/html", b"<html><h1>503 Service Temporarily Unavailable</h1></html>")
        elif outage.mode is Mode.RUBBISH:
            await _answer(send, 200, b"application/json", b'{"id": "')
        else:
            await _cut(send)


async def _answer_late(scope: Scope, receive: Receive, send: Send, next_app: ASGIApp, seconds: float) -> None:
    messages: list[Message] = []

    async def keep(message: Message) -> None:
        messages.append(message)

    await next_app(scope, receive, keep)
    await asyncio.sleep(seconds)
    for message in messages:
        await send(message)


async def _swallow(message: Message) -> None:
    """Let an answer vanish."""


async def _answer(send: Send, status: int, content_type: bytes, body: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _cut(send: Send) -> None:
    """Promise a body and send none: the server closes the connection, and the client finds it broken."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
