"""The HTTP door: puts the routes of every room into one application."""

import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException
from prometheus_client import CONTENT_TYPE_LATEST

from app import console, docs
from app.accounts import api as accounts
from app.activity import api as activity
from app.admin import api as admin
from app.audit import api as audits
from app.audit.gauges import gauges
from app.autotopup.api import AutoTopupController
from app.kernel.db import Database, row
from app.kernel.errors import AppError, DatabaseUnavailable
from app.kernel.shards import unreachable
from app.kernel.standby import Standby
from app.keys.api import KeysController
from app.metering.api import ext_authz
from app.metering.api.calls import MeterController
from app.metering.api.hot import Door, in_front_of
from app.metering.api.reports import ReportsController
from app.migrations import head
from app.notices.api import NoticesController
from app.offers.api import AtTheDoor
from app.offers.mint import METHOD
from app.openrouter import api as openrouter
from app.pricing import api as pricing
from app.topups import api as topups
from app.topups.create import Wish
from app.topups.gateway import Gateways
from app.web.around import around_requests, heading, lines_of_every_answer, refusing
from app.web.bodies import MAX_BODY_BYTES, JsonRequest, read_json, refuse_large_body
from app.web.callers import Callers, giving_who_called, shown_service
from app.web.cors import Origins
from app.web.exposition import PATH as METRICS
from app.web.exposition import Exposition, nothing_else_at
from app.web.guards import one_after_the_other
from app.web.idempotency import provide_once, refuse_malformed_key
from app.web.limits import RequestLimits
from app.web.methods import tell_every_method
from app.web.metrics import account_for
from app.web.outgoing import heads_as_gets, well_ended
from app.web.processes import Processes
from app.web.queries import refuse_odd_query
from app.web.refusals import on_app_error, on_defect, on_http_error
from app.web.traced import traced
from app.wiring import House


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    """`degraded` says that calls are metered but top-ups cannot be made right now."""

    status: str
    database: str = ""
    migrations: str = ""
    payment_backend: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class Departure:
    """Whether this process is about to stop: it serves whoever comes, but nobody should be sent to it any more."""

    is_near: Callable[[], bool] = lambda: False


@get("/health/live", tags=["Operations"], summary="Is the process alive?", sync_to_thread=False)
def live() -> Health:
    """Touches nothing."""
    return Health("ok")


@get("/health/ready", tags=["Operations"], summary="Can it serve?")
async def ready(
    db: NamedDependency[Database], gateways: NamedDependency[Gateways], departure: NamedDependency[Departure]
) -> Response[Health]:
    """503 without the database, where that takes no writes, with another schema, or once it is asked to stop (`draining`);
    a dead payment backend is only `degraded`, and so is a server of several that accounts live on.

    `warnings`: what works, though less well than it is set up to, and what would help.
    """
    if departure.is_near():
        return Response(Health("draining"), status_code=503, headers={"Retry-After": "1"})
    try:
        found = await db.transaction(lambda session: row(session, "SELECT version_num FROM alembic_version"))
        if not await db.takes_writes():
            return Response(Health("down", database="read only"), status_code=503, headers={"Retry-After": "1"})
        away = await unreachable(db)
    except DatabaseUnavailable:
        return Response(Health("down", database="unreachable"), status_code=503, headers={"Retry-After": "1"})
    if found is None or found["version_num"] != head():
        return Response(Health("down", database="ok", migrations=f"not at {head()}"), status_code=503)
    payable = await gateways.are_healthy()
    troubles = [f"The accounts on {node} cannot be reached: who calls for them gets 503" for node in away]
    return Response(
        Health(
            "ok" if payable and not away else "degraded", "degraded" if away else "ok", "at head",
            "ok" if payable else "unavailable", (*troubles, *gateways.troubles()),
        ),
        status_code=200,
    )  # fmt: skip


@get(METRICS, include_in_schema=False, media_type="text/plain")
async def metrics(request: Request[Any, Any, Any], exposition: NamedDependency[Exposition]) -> Response[bytes]:
    """Prometheus."""
    exposition.admit(request)
    return Response(await exposition.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def create_app(house: House, departure: Departure | None = None, *, now: Callable[[], float] = time.time) -> Litestar:
    """The application over a house of parts. By `now` the minutes of requests are told apart."""
    parts: dict[str, object] = {
        "db": house.db, "settings": house.settings, "gateways": house.gateways, "verifier": house.verifier,
        "keyring": house.keyring, "meter": house.meter, "services": house.services, "nostr": house.nostr,
        "catalogues": house.catalogues, "read_catalogues": house.read_catalogues, "pricer": house.pricer,
        "mint": house.mint, "proofs": house.proofs, "buying": AtTheDoor(house.openings), "payable": _payable(house),
        "wallets": house.wallets, "watcher": house.watcher, "audits": house.audits, "webhooks": house.webhooks, "messages": house.messages,
    }  # fmt: skip
    processes = Processes.of()
    parts["exposition"] = Exposition(house.db, house.settings, processes, gauges)
    callers = Callers(house.verifier, house.services)
    limits = RequestLimits(house.db, house.settings, now)
    contract = docs.Contract(house.settings.public_url)
    app = Litestar(
        route_handlers=[
            live, ready, metrics, *accounts.handlers, KeysController, *topups.handlers,
            *activity.handlers, *openrouter.handlers,
            AutoTopupController, NoticesController,
            MeterController, ReportsController, ext_authz.door(on_app_error),
            *admin.handlers, *audits.handlers, *pricing.handlers, *docs.handlers, console.router,
        ],
        dependencies={name: Provide(_giving(part), sync_to_thread=False) for name, part in parts.items()}
        | {name: Provide(giving_who_called(), sync_to_thread=False) for name in callers.names}
        | {"reads": Provide(_giving_reads(house.reads), sync_to_thread=False)}
        | {"once": Provide(provide_once), "offer_wanted": Provide(ext_authz.offer_wanted, sync_to_thread=False)}
        | {"departure": Provide(_giving(departure or Departure()), sync_to_thread=False)},
        guards=[one_after_the_other(limits.asking(callers.ask), refuse_malformed_key, refuse_large_body, refuse_odd_query)],
        request_class=JsonRequest,
        request_max_body_size=MAX_BODY_BYTES,
        exception_handlers={AppError: on_app_error, HTTPException: on_http_error, Exception: on_defect},
        openapi_config=contract,
        state=State({"settings": house.settings, "db": house.db, "verifier": house.verifier, "services": house.services}),
        plugins=[contract.structs],
        lifespan=[_open(house, processes)],
        logging_config=None,
        debug=False,
    )  # fmt: skip
    tell_every_method(app)
    # Around the router too: Litestar's own middleware would not see a path or a method that we do not have.
    every, origins = lines_of_every_answer(house.settings.public_url), Origins(house.settings.cors_origins, app)
    door = Door(
        MAX_BODY_BYTES, read_json, limits.serving(shown_service(house.services.service)), heading(every, origins.lines),
        account_for, refusing(every, origins.lines),
    )  # fmt: skip
    inner = origins.answering_preflights(heads_as_gets(well_ended(app.asgi_handler)))
    outer = in_front_of(around_requests(inner, every, origins.lines), parts | {"offer_wanted": True}, door)
    app.asgi_handler = traced(nothing_else_at(house.settings.metrics_port, outer, door.refuse))
    return app


def _payable(house: House) -> ext_authz.Payable:
    keyless_nusd = house.settings.keyless_offer_nusd
    keyless = None if keyless_nusd is None else Wish(METHOD, "USD", keyless_nusd)
    return ext_authz.Payable(house.mint, house.proofs, house.openings, keyless)


def _giving(part: Any) -> Callable[[], Any]:
    def give() -> Any:
        return part

    return give


def _giving_reads(reads: Database) -> Any:
    """What is told of a standby's lag is told even where what was read before is enough."""

    def give() -> Database:
        if isinstance(reads, Standby):
            reads.tell()
        return reads

    return give


def _open(house: House, processes: Processes) -> Any:
    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        await house.db.open()
        gc.collect()
        gc.freeze()  # what lives as long as the process need not be looked at by every collection
        gc.set_threshold(20_000, 20, 50)  # a worker under load passes the default, 700 new objects, again and again
        try:
            async with processes.written():
                yield
        finally:
            await house.close()

    return lifespan
