"""What `/metrics` answers, and to whom: what processes count, and the books' figures, which are the database's."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from litestar import Request
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send
from prometheus_client import Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily

from app.admin.figures import Family, books
from app.kernel.db import Database
from app.kernel.errors import AppError, DatabaseUnavailable, InvalidToken, NotFound
from app.kernel.settings import Settings
from app.metering.gathered import gathered
from app.web.processes import Joined, Processes

PATH: Final = "/metrics"
COUNTED: Final = (gathered,)
"""What is told though this process may not have done anything of it yet."""
_GOOD_FOR_SECONDS: Final = 5
"""However many ask, the books are asked once in so many seconds by each process."""


class Exposition:
    """Prometheus' text. The books' figures bear no label of a process: whoever is asked, they are the same."""

    def __init__(
        self,
        db: Database,
        settings: Settings,
        processes: Processes,
        audited: Callable[[Database], Awaitable[Sequence[Metric]]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`audited` are the continuous audit's figures. They may raise DatabaseUnavailable."""
        self._audited = audited
        self._db, self._processes, self._monotonic = db, processes, monotonic
        self._token, self._port = settings.metrics_token, settings.metrics_port
        self._is_closed = settings.is_production and not self._token and self._port is None
        self._books: asyncio.Task[list[Metric] | None] | None = None
        self._good_until = 0.0

    def admit(self, request: Request[Any, Any, Any]) -> None:
        """Raises NotFound where metrics are not told at this door, and InvalidToken."""
        if self._is_closed:
            raise NotFound("Metrics are told to nobody: METRICS_TOKEN or METRICS_PORT opens them")
        if self._port is not None and port_of(request.scope) != self._port:
            raise NotFound("Metrics are told at METRICS_PORT")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if self._token and not (scheme.lower() == "bearer" and same(token.strip(), self._token)):
            raise InvalidToken

    async def text(self) -> bytes:
        found = await self._figures()
        is_up = GaugeMetricFamily("satmeter_database_up", "1 if the books could be asked")
        is_up.add_metric([], 0 if found is None else 1)
        return generate_latest(Joined(self._processes.collect(), found or (), [is_up]))

    async def _figures(self) -> list[Metric] | None:
        """None while the database is away."""
        if self._books is None or (self._books.done() and self._monotonic() >= self._good_until):
            self._books = asyncio.create_task(self._ask())
        return await asyncio.shield(self._books)

    async def _ask(self) -> list[Metric] | None:
        try:
            told = map(_as_metric, await books(self._db, datetime.now(UTC)))
            return [*told, *await self._audited(self._db)]
        except DatabaseUnavailable:
            return None
        finally:
            self._good_until = self._monotonic() + _GOOD_FOR_SECONDS


def _as_metric(family: Family) -> Metric:
    metric = GaugeMetricFamily(family.name, family.words, labels=family.labels)
    for labels, value in family.values:
        metric.add_metric(labels, value)
    return metric


def nothing_else_at(port: int | None, app: ASGIApp, refuse: Callable[[Scope, Receive, Send, AppError], Any]) -> ASGIApp:
    """At the port for metrics nothing else is told: it may be open to others than customers."""
    if port is None:
        return app

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP and port_of(scope) == port and scope["path"] != PATH:
            scope.setdefault("state", {})
            await refuse(scope, receive, send, NotFound())
        else:
            await app(scope, receive, send)

    return wrapped


def port_of(scope: Any) -> int | None:
    """Of the socket that the request came in at."""
    server = scope.get("server")
    return server[1] if server else None


def same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
