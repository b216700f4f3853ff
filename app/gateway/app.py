"""The gateway's door: an ASGI application that finds the row of a request, and renders whatever refuses it."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import aiohttp

from app.client import Denied, Meter
from app.gateway import asking
from app.gateway.catalogue import Catalogue
from app.gateway.chat import chat
from app.gateway.completions import completions
from app.gateway.embeddings import embeddings
from app.gateway.errors import (
    MethodNotAllowed,
    Refusal,
    Told,
    UnknownPath,
    UpstreamRefused,
    anthropic_body,
    openai_body,
)
from app.gateway.exchange import CallerGone, Exchange, Interrupted, Receive, Scope, Send
from app.gateway.messages import count_tokens, messages
from app.gateway.models import model, models
from app.gateway.owners import Owners
from app.gateway.paths import Route, Routes
from app.gateway.providers import providers
from app.gateway.responses import response, responses
from app.gateway.router import profiles, router
from app.gateway.settings import GatewaySettings
from app.gateway.streams import Streams
from app.gateway.studio import MEDIA_ROUTES, Studio
from app.gateway.transport import AiohttpTransport

log = logging.getLogger("satmeter.gateway")


async def live(gateway: "RunningGateway", exchange: Exchange) -> None:
    """GET /health/live: touches nothing."""
    await exchange.answer(200, b'{"status":"ok"}')


ROUTES: Final = (
    Route("POST", "/chat/completions", chat),
    Route("POST", "/completions", completions),
    Route("POST", "/embeddings", embeddings),
    Route("POST", "/messages", messages),
    Route("POST", "/messages/count_tokens", count_tokens),
    Route("POST", "/responses", responses),
    Route("GET", "/responses/{id}", response),
    *MEDIA_ROUTES,
    Route("POST", "/router", router),
    Route("GET", "/router/profiles", profiles, needs_key=False),
    Route("GET", "/providers", providers, needs_key=False),
    Route("GET", "/models", models, needs_key=False),
    Route("GET", "/router/models", models, needs_key=False),
    Route("GET", "/media/models", models, needs_key=False),
    Route("GET", "/models/{id*}", model, needs_key=False),
    Route("GET", "/health/live", live, needs_key=False),
)


class RunningGateway:
    """The parts of a gateway that is open, and the application over them, which a server serves."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.routes = Routes(ROUTES)
        self.streams = Streams(settings.client_gone_seconds)
        self.meter: Meter
        self.session: aiohttp.ClientSession
        self.catalogue: Catalogue
        self.owners: Owners
        self.studio: Studio

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(Exchange(scope, receive, send))
        elif scope["type"] == "lifespan":
            await self._live(receive, send)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open for as long as the block runs; what is owed to Satmeter is told at the end, or kept in the spool."""
        settings = self.settings
        async with contextlib.AsyncExitStack() as stack:
            self.owners = Owners(settings.folder)
            self.session = await stack.enter_async_context(asking.new_session())
            self.catalogue = Catalogue(self.session, settings.meter_url)
            stack.push_async_callback(self.catalogue.close)
            self.meter = await stack.enter_async_context(
                Meter(
                    settings.meter_url, settings.service_token, spool=settings.folder / "spool",
                    transport=AiohttpTransport(), ask_seconds=settings.ask_seconds,
                )
            )  # fmt: skip
            await stack.enter_async_context(self.streams.watched())
            self.studio = await stack.enter_async_context(Studio(settings, self.meter, self.session).opened())
            yield

    async def _answer(self, exchange: Exchange) -> None:
        try:
            rows = self.routes.at(exchange.path)
            if not rows:
                raise UnknownPath
            if exchange.method == "OPTIONS":
                await exchange.start(204, _PREFLIGHT)
                await exchange.end()
                return
            route = rows.get("GET" if exchange.method == "HEAD" else exchange.method)
            if route is None:
                raise MethodNotAllowed(headers={"allow": ", ".join(rows)})
            if route.needs_key:
                exchange.shown()
            await self._row(route, exchange)
        except Refusal as refusal:
            await _refuse(exchange, refusal)
        except (CallerGone, Interrupted):
            pass  # there is nobody to tell, or no way to
        except Exception as error:
            log.error("gateway.defect kind=%s", type(error).__name__, exc_info=error)
            await _refuse(exchange, Refusal("The gateway failed; this is a defect of ours"))
        finally:
            await exchange.close()

    async def _row(self, route: Route, exchange: Exchange) -> None:
        """Who is calling is asked before what is asked: a stranger is told that, and nothing else. Raises Refusal."""
        try:
            await route.row(self, exchange)
        except Refusal as refusal:
            if (
                route.needs_key
                and refusal.status in (400, 404, 413, 422)
                and not isinstance(refusal, Told | UpstreamRefused)
            ):
                verdict = await self.meter.verify(exchange.shown())
                if isinstance(verdict, Denied) and verdict.status == 401:
                    raise Told(verdict, self.settings.low_balance_status) from None
            raise

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.running())
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def _refuse(exchange: Exchange, refusal: Refusal) -> None:
    if exchange.has_begun:
        return
    body = anthropic_body(refusal) if exchange.is_anthropics else openai_body(refusal)
    own = {name: value for name, value in refusal.headers.items() if name not in ("content-type", "content-length")}
    await exchange.answer(refusal.status, body, {"cache-control": "no-store", **own})


_PREFLIGHT: Final[dict[str, Any]] = {
    "access-control-allow-methods": "GET, POST, OPTIONS", "access-control-allow-headers": "*",
    "access-control-max-age": "86400", "content-length": "0",
}  # fmt: skip


def create_gateway(settings: GatewaySettings) -> RunningGateway:
    """A gateway, to be served."""
    return RunningGateway(settings)
