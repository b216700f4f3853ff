"""What is asked of a request before its handler is, and in which order: 401, then 400, 413 and 422, then the body's own."""

from collections.abc import Awaitable, Callable
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], Awaitable[None]]


def one_after_the_other(*guards: Guard) -> Guard:
    """One guard of several: Litestar copies a handler for each that it asks, which costs more than most of them."""

    async def ask(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        for guard in guards:
            await guard(connection, handler)

    return ask
