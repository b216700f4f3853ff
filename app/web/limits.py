"""How many requests a minute: of a neighbourhood without a credential, of a credit id, of a key, of a service or admin token.

A credential that proves nothing is a stranger's. Health, metrics, the pages' files and the backends' webhooks are not counted.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from app.kernel.db import Database
from app.kernel.errors import InvalidApiKey, InvalidCreditId, InvalidToken
from app.kernel.ratelimit import Allowances, Policy, blocks_of
from app.kernel.security import Admin, Caller, Kind, Service
from app.kernel.settings import Settings
from app.web.callers import Known
from app.web.guards import Guard

_NOT_COUNTED: Final = ("/health/", "/metrics", "/webhooks/", "/console/static/")
_MINUTE_SECONDS: Final = 60


class RequestLimits:
    """Counts requests in portions that all processes share (kernel/ratelimit.py)."""

    def __init__(self, db: Database, settings: Settings, now: Callable[[], float]) -> None:
        self._allowances = Allowances(db, now=now)
        self._per_block = settings.requests_per_minute_per_block
        self._credit_id = Policy("credit-id", settings.requests_per_minute_per_credit_id, _MINUTE_SECONDS)
        self._api_key = Policy("api-key", settings.requests_per_minute_per_key, _MINUTE_SECONDS)
        self._admin = Policy("admin-token", settings.requests_per_minute_per_admin, _MINUTE_SECONDS)
        self._service = Policy("service-token", settings.requests_per_minute_per_service, _MINUTE_SECONDS)

    def asking(self, ask: Guard) -> Guard:
        """A guard that asks who is calling, by `ask`, and counts the request on them. Raises RateLimitExceeded, after 401."""

        async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
            is_counted = not connection.scope["path"].startswith(_NOT_COUNTED)
            try:
                await ask(connection, handler)
            except (InvalidApiKey, InvalidCreditId, InvalidToken):
                if is_counted:
                    await self._stranger(connection)
                raise
            if is_counted:
                await self._count(connection, connection.state.known)

        return guard

    def serving(self, find: Callable[[str], Awaitable[Service]]) -> Callable[[str], Awaitable[Service]]:
        """The same for the hot routes: `find` knows a service by its Authorization header."""

        async def found(header: str) -> Service:
            service = await find(header)
            await self.service(service)
            return service

        return found

    async def service(self, service: Service) -> None:
        """No call of a model waits to be counted: up to a twentieth more than the limit is let through by each process."""
        await self._allowances.take_ahead(f"requests/service/{service.id}", self._service)

    async def _count(self, connection: ASGIConnection[Any, Any, Any, Any], known: Known | None) -> None:
        match known.who if known is not None else None:
            case Caller(kind, account_id, key_id):
                if kind is Kind.CREDIT_ID:
                    await self._allowances.take(f"requests/credit-id/{account_id}", self._credit_id)
                else:
                    await self._allowances.take(f"requests/key/{key_id}", self._api_key)
            case Service() as service:
                await self.service(service)
            case Admin(id=token_id):
                await self._allowances.take(f"requests/admin/{token_id}", self._admin)
            case None:
                await self._stranger(connection)

    async def _stranger(self, connection: ASGIConnection[Any, Any, Any, Any]) -> None:
        address = connection.client.host if connection.client else "unknown"
        for block, times in blocks_of(address):
            policy = Policy("address", times * self._per_block, _MINUTE_SECONDS)
            await self._allowances.take(f"requests/address/{block}", policy)
