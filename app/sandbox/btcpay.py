"""A sandbox that a Greenfield client cannot tell from BTCPay Server 2.4.1, but for the money: there is none.

`create_sandbox(config)` gives the application: the Greenfield routes below, the driver's (`driver.py`) that stand for
the payer and the chains, the pages (`checkout.py`, `purse.py`), and a Lightning wallet on a relay of its own (`wallet.py`,
`relay.py`). Serve it on a loopback port only: the driver asks nobody who they are.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import msgspec
from litestar import Litestar, Response, Router, delete, get, post, put
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency
from litestar.handlers import BaseRouteHandler
from msgspec.structs import replace

from . import checkout, driver, letters, purse, relay
from .backend import Backend, Clock
from .chain import Chain, simulated_chains
from .errors import BadRequest, Invalid, MissingPermission, NotFound, SandboxError, Unauthenticated
from .given import Call, Id, TheBackend, constant
from .ids import new_id
from .invoices import Invoice
from .lightning import LightningNode
from .litecoin import LitecoinChain
from .methods import METHODS, find_method
from .monero import MoneroChain
from .node import Node, Sightings
from .outage import Outage, OutageMiddleware
from .rates import DEFAULT_RATES, RateBook
from .relay import Relay
from .setup import Setup
from .store import Store
from .wallet import Wallet
from .webhooks import Delivery, Post, Webhook
from .wire import invoice_view, methods_view, plain, read_object, read_order

VIEW = "btcpay.store.canviewinvoices"
CREATE = "btcpay.store.cancreateinvoice"
MODIFY = "btcpay.store.canmodifyinvoices"
WEBHOOKS = "btcpay.store.webhooks.canmodifywebhooks"
SETTINGS = "btcpay.store.canviewstoresettings"
# What a top-up service should be given in production: everything but MODIFY, which can mark an unpaid invoice Settled.
LEAST_PERMISSIONS = (CREATE, VIEW, WEBHOOKS, SETTINGS)


@dataclass(frozen=True, slots=True)
class SandboxConfig:
    """`webhook_url` with its secret is registered at start, for everything. `rates` are by pair, such as `BTC_USD`.

    `time_scale` multiplies the waits between webhook retries (10 s, 1 min, 6 x 10 min). `litecoin_rpc` is a wallet of
    a litecoind (`http://user:password@127.0.0.1:19443/wallet/merchant`), `monero_wallet_rpc` a monero-wallet-rpc with
    its wallet open: LTC and XMR are then paid on those chains, and otherwise simulated.
    """

    state_dir: Path
    public_url: str
    store_id: str
    api_key: str = field(repr=False)
    webhook_url: str | None = None
    webhook_secret: str | None = field(default=None, repr=False)
    time_scale: float = 1.0
    rates: Mapping[str, Decimal] = field(default_factory=lambda: DEFAULT_RATES)
    permissions: tuple[str, ...] = (*LEAST_PERMISSIONS, MODIFY)
    litecoin_rpc: str | None = field(default=None, repr=False)
    monero_wallet_rpc: str | None = field(default=None, repr=False)


def create_sandbox(
    config: SandboxConfig,
    *,
    chains: Mapping[str, Chain] | None = None,
    webhook_transport: httpx.AsyncBaseTransport | None = None,
) -> Litestar:
    """The sandbox as an application. `chains` replaces simulated ones by method id, such as `LTC-CHAIN`."""
    backend, outage = _backend(config, chains or {}, webhook_transport), Outage()
    down = OutageMiddleware(lambda: outage)
    greenfield = Router("/", route_handlers=GREENFIELD, guards=[_key_check(config, backend.setup)], middleware=[down])
    health = Router("/", route_handlers=[get_health], middleware=[down])
    wallet = Wallet(backend.store, backend, Relay(), _relay_url(config))
    given = {
        "backend": backend,
        "outage": outage,
        "config": config,
        "wallet": wallet,
        "relay": wallet.relay,
        "letters": letters.Letters(),
    }
    return Litestar(
        [greenfield, health, driver.router, relay.router, checkout.router, purse.router, letters.router],
        dependencies={name: constant(part) for name, part in given.items()},
        exception_handlers={SandboxError: _show_error},
        lifespan=[_running(config, backend, wallet)],
        openapi_config=None,
        logging_config=None,
    )


def _backend(config: SandboxConfig, chains: Mapping[str, Chain], transport: httpx.AsyncBaseTransport | None) -> Backend:
    store = Store(config.state_dir)
    clock = Clock(store)
    return Backend(
        store_id=config.store_id,
        public_url=config.public_url,
        store=store,
        chains={**simulated_chains(store), **_real_chains(config, store, clock), **chains},
        node=LightningNode(store),
        post=Post(store, clock.now, config.time_scale, transport),
        rates=RateBook({**DEFAULT_RATES, **config.rates}),
        clock=clock,
        setup=Setup(config.permissions),
    )


def _real_chains(config: SandboxConfig, store: Store, clock: Clock) -> dict[str, Chain]:
    """The chains whose nodes are named. Raises ValueError for what is no address."""
    real: dict[str, Chain] = {}
    if config.litecoin_rpc is not None:
        litecoin = Sightings(METHODS["LTC-CHAIN"], store, clock.now)
        real["LTC-CHAIN"] = LitecoinChain(Node("litecoind", config.litecoin_rpc), litecoin)
    if config.monero_wallet_rpc is not None:
        url = config.monero_wallet_rpc.rstrip("/") + "/json_rpc"
        monero = Sightings(METHODS["XMR-CHAIN"], store, clock.now)
        real["XMR-CHAIN"] = MoneroChain(Node("monero-wallet-rpc", url, uses_digest=True), monero)
    return real


def _relay_url(config: SandboxConfig) -> str:
    """Where the relay is met: at the sandbox's own address."""
    return "ws" + config.public_url.rstrip("/").removeprefix("http") + "/relay"


def _running(config: SandboxConfig, backend: Backend, wallet: Wallet) -> Any:
    @asynccontextmanager
    async def running(_: Litestar) -> AsyncIterator[None]:
        if config.webhook_url is not None:
            backend.post.register(config.webhook_url, config.webhook_secret or new_id())
        backend.post.start()
        await wallet.start()
        ticking = asyncio.create_task(_tick(backend), name="sandbox ticks")
        yield
        await wallet.stop()
        ticking.cancel()
        with suppress(asyncio.CancelledError):
            await ticking
        await backend.post.stop()

    return running


async def _tick(backend: Backend) -> None:
    while True:
        await backend.tick()
        await asyncio.sleep(1)


def _show_error(_: Call, error: SandboxError) -> Response[Any]:
    return Response(error.body(), status_code=error.status)


# Who may ask


def _key_check(config: SandboxConfig, setup: Setup) -> Any:
    """A guard: the key must be ours, hold the permission the route names, and be of the store in the path."""
    expected = f"token {config.api_key}".encode()

    def check(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        given = connection.headers.get("authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, expected):
            raise Unauthenticated
        permission = handler.opt.get("permission")
        store_id = connection.path_params.get("store_id", config.store_id)
        if permission is not None and (store_id != config.store_id or not setup.allows(permission, store_id)):
            raise MissingPermission(permission)

    return check


# Invoices

STORE = "/api/v1/stores/{store_id:str}"
# Both forms are answered by every BTCPay since 2.4.0; before it knew the one with the store alone.
INVOICE = [f"{STORE}/invoices/{{invoice_id:str}}", "/api/v1/invoices/{invoice_id:str}"]


def _under(paths: list[str], rest: str) -> list[str]:
    return [path + rest for path in paths]


@post(f"{STORE}/invoices", permission=CREATE, status_code=200)
async def create_invoice(request: Call, backend: TheBackend) -> dict[str, Any]:
    """Create an invoice; the address or BOLT11 is told by its payment methods."""
    invoice = await backend.create(read_order(await request.body()))
    return invoice_view(invoice, backend.public_url)


@get(f"{STORE}/invoices", permission=VIEW)
async def list_invoices(request: Call, backend: TheBackend) -> list[dict[str, Any]]:
    """Invoices, newest first, filtered by order id, status and time of creation."""
    query = request.query_params
    start, end = _number(request, "startDate"), _number(request, "endDate")
    if start is not None and end is not None and start > end:
        raise Invalid(
            ("startDate", "startDate should not be above endDate"), ("endDate", "endDate should not be below startDate")
        )
    order_ids = set(query.getall("orderId", []) + query.getall("orderId[]", []))
    statuses = {status.lower() for status in query.getall("status", []) + query.getall("status[]", [])}
    found = [
        invoice
        for invoice in backend.newest_first()
        if (not order_ids or str(invoice.metadata.get("orderId")) in order_ids)
        and (not statuses or invoice.status.lower() in statuses)
        and (start is None or invoice.created_at >= start)
        and (end is None or invoice.created_at <= end)
    ]
    skip, take = _number(request, "skip") or 0, _number(request, "take")
    return [_with_methods(request, backend, invoice) for invoice in found[skip:][:take]]


@get(INVOICE, permission=VIEW)
async def get_invoice(request: Call, invoice_id: Id, backend: TheBackend) -> dict[str, Any]:
    return _with_methods(request, backend, backend.invoice(invoice_id))


@get(_under(INVOICE, "/payment-methods"), permission=VIEW)
async def get_invoice_methods(request: Call, invoice_id: Id, backend: TheBackend) -> list[dict[str, Any]]:
    """How to pay this invoice and what was paid; replaced payments only with onlyAccountedPayments=false."""
    return methods_view(backend.invoice(invoice_id), _flag(request, "onlyAccountedPayments", True))


@post(_under(INVOICE, "/status"), permission=MODIFY, status_code=200)
async def mark_invoice(request: Call, invoice_id: Id, backend: TheBackend) -> dict[str, Any]:
    backend.invoice(invoice_id)
    body = read_object(await request.body())
    return invoice_view(backend.mark(invoice_id, str(body.get("status"))), backend.public_url)


def _with_methods(request: Call, backend: Backend, invoice: Invoice) -> dict[str, Any]:
    view = invoice_view(invoice, backend.public_url)
    if _flag(request, "includePaymentMethods", False):
        view["paymentMethods"] = methods_view(invoice)
    return view


def _flag(request: Call, name: str, default: bool) -> bool:
    text = str(request.query_params.get(name, default)).lower()
    if text not in ("true", "false"):
        raise Invalid((name, f"The value '{text}' is not valid."))
    return text == "true"


def _number(request: Call, name: str) -> int | None:
    text = request.query_params.get(name)
    if not text:
        return None
    if not text.isdecimal() or len(text) > 12:
        raise Invalid((name, f"The value '{text}' is not valid."))
    return int(text)


# The store and the server


@get("/api/v1/stores", permission=SETTINGS)
async def list_stores(backend: TheBackend) -> list[dict[str, Any]]:
    return [_store_view(backend)]


@get(STORE, permission=SETTINGS)
async def get_store(backend: TheBackend) -> dict[str, Any]:
    return _store_view(backend)


def _store_view(backend: Backend) -> dict[str, Any]:
    """The store with BTCPay's defaults, which an invoice takes for what its request leaves out."""
    return {
        "id": backend.store_id,
        "name": "Sandbox store",
        "website": None,
        "defaultCurrency": "USD",
        "invoiceExpiration": 900,
        "monitoringExpiration": 86400,
        "speedPolicy": "MediumSpeed",
        "paymentTolerance": 0.0,
        "archived": False,
        "anyoneCanCreateInvoice": False,
        "lazyPaymentMethods": False,
        "networkFeeMode": "MultiplePaymentsOnly",
        "defaultLang": "en",
    }


@get(f"{STORE}/payment-methods", permission=SETTINGS)
async def list_store_methods(request: Call, backend: TheBackend) -> list[dict[str, Any]]:
    shown = _flag(request, "onlyEnabled", True)
    return [
        {"enabled": id not in backend.setup.disabled, "paymentMethodId": id}
        for id in METHODS
        if (id not in backend.setup.disabled) == shown
    ]


@get(f"{STORE}/payment-methods/{{method_id:str}}", permission=SETTINGS)
async def get_store_method(method_id: Id, backend: TheBackend) -> dict[str, Any]:
    method = find_method(method_id)
    if method is None:
        raise NotFound("paymentmethod")
    return {"enabled": method.id not in backend.setup.disabled, "paymentMethodId": method.id}


@get(f"{STORE}/rates", permission=SETTINGS)
async def get_rates(request: Call, backend: TheBackend) -> list[dict[str, Any]]:
    """The bid of each pair; null with the reason where there is none."""
    pairs = [pair.upper() for pair in request.query_params.getall("currencyPair", [])]
    wrong = [pair for pair in pairs if len(pair.split("_")) != 2]
    if wrong:
        raise Invalid(("currencyPair", f"Invalid currency pairs: {', '.join(wrong)}"))
    return [_rate_view(backend, *pair.split("_")) for pair in pairs or ["BTC_USD"]]


def _rate_view(backend: Backend, coin: str, currency: str) -> dict[str, Any]:
    rate = backend.rates.rate(coin, currency)
    errors = [] if rate is not None else [f"The rule for {coin}_{currency} could not be evaluated"]
    return {"currencyPair": f"{coin}_{currency}", "errors": errors, "rate": None if rate is None else plain(rate)}


@get("/api/v1/server/info")
async def get_server_info(backend: TheBackend) -> dict[str, Any]:
    chains = [method.id for method in METHODS.values() if not method.is_lightning]
    return {
        "version": backend.setup.version,
        "onion": None,
        "supportedPaymentMethods": list(METHODS),
        "fullySynched": backend.setup.synchronized,
        "syncStatus": [{"paymentMethodId": id, "available": id not in backend.setup.offline} for id in chains],
    }


@get("/api/v1/api-keys/current")
async def get_api_key(config: NamedDependency[SandboxConfig], backend: TheBackend) -> dict[str, Any]:
    """The key that asks, with its permissions."""
    permissions = backend.setup.told(config.store_id)
    return {"apiKey": config.api_key, "label": "Satmeter sandbox", "permissions": permissions}


@get("/api/v1/health")
async def get_health(backend: TheBackend) -> dict[str, bool]:
    return {"synchronized": backend.setup.synchronized}


# Webhooks

WEBHOOK = [f"{STORE}/webhooks/{{webhook_id:str}}", "/api/v1/webhooks/{webhook_id:str}"]
DELIVERY = _under(WEBHOOK, "/deliveries/{delivery_id:str}")


@get(f"{STORE}/webhooks", permission=WEBHOOKS)
async def list_webhooks(backend: TheBackend) -> list[dict[str, Any]]:
    return [_webhook_view(webhook) for webhook in backend.post.webhooks.values()]


@post(f"{STORE}/webhooks", permission=WEBHOOKS, status_code=200)
async def create_webhook(request: Call, backend: TheBackend) -> dict[str, Any]:
    """Register a receiver. The secret, given or made, is shown in this answer and never again."""
    webhook = backend.post.save(_read_webhook(await request.body(), Webhook(new_id(), "", new_id())))
    return {**_webhook_view(webhook), "secret": webhook.secret}


@get(WEBHOOK, permission=WEBHOOKS)
async def get_webhook(webhook_id: Id, backend: TheBackend) -> dict[str, Any]:
    return _webhook_view(backend.post.find(webhook_id))


@put(WEBHOOK, permission=WEBHOOKS)
async def update_webhook(request: Call, webhook_id: Id, backend: TheBackend) -> dict[str, Any]:
    """Change a receiver; without a secret the old one stays."""
    known = backend.post.find(webhook_id)
    return _webhook_view(backend.post.save(_read_webhook(await request.body(), known)))


@delete(WEBHOOK, permission=WEBHOOKS, status_code=200)
async def delete_webhook(webhook_id: Id, backend: TheBackend) -> None:
    await backend.post.remove(webhook_id)


@get(_under(WEBHOOK, "/deliveries"), permission=WEBHOOKS)
async def list_deliveries(request: Call, webhook_id: Id, backend: TheBackend) -> list[dict[str, Any]]:
    """Attempts made so far, newest first."""
    backend.post.find(webhook_id)
    rows = backend.post.deliveries[webhook_id][::-1]
    return [_delivery_view(row) for row in rows[: _number(request, "count")]]


@get(DELIVERY, permission=WEBHOOKS)
async def get_delivery(webhook_id: Id, delivery_id: Id, backend: TheBackend) -> dict[str, Any]:
    return _delivery_view(backend.post.delivery(webhook_id, delivery_id))


@get(_under(DELIVERY, "/request"), permission=WEBHOOKS)
async def get_delivery_request(webhook_id: Id, delivery_id: Id, backend: TheBackend) -> Response[bytes]:
    """The body as it was sent, to the byte."""
    raw = backend.post.delivery(webhook_id, delivery_id).request.encode()
    return Response(raw, media_type="application/json")


@post(_under(DELIVERY, "/redeliver"), permission=WEBHOOKS, status_code=200)
async def redeliver(webhook_id: Id, delivery_id: Id, backend: TheBackend) -> Response[str]:
    """Queue the event again; answers the new delivery's id as a JSON string."""
    id = backend.post.redeliver(backend.post.delivery(webhook_id, delivery_id))
    return Response(msgspec.json.encode(id).decode(), media_type="application/json")


def _read_webhook(raw: bytes, known: Webhook) -> Webhook:
    body = read_object(raw)
    url = body.get("url")
    if not isinstance(url, str) or not url.lower().startswith(("http://", "https://")):
        raise Invalid(("url", "Invalid URL"))
    events = body.get("authorizedEvents") or {}
    if not isinstance(events, dict):
        raise BadRequest("authorizedEvents must be an object")
    specific = None if events.get("everything", True) else tuple(map(str, events.get("specificEvents") or ()))
    return replace(
        known,
        url=url,
        secret=str(body.get("secret") or known.secret),
        enabled=body.get("enabled") is not False,
        automatic_redelivery=body.get("automaticRedelivery") is not False,
        events=specific,
    )


def _webhook_view(webhook: Webhook) -> dict[str, Any]:
    events = {"everything": webhook.events is None, "specificEvents": list(webhook.events or ())}
    return {
        "id": webhook.id,
        "enabled": webhook.enabled,
        "automaticRedelivery": webhook.automatic_redelivery,
        "url": webhook.url,
        "authorizedEvents": events,
    }


def _delivery_view(row: Delivery) -> dict[str, Any]:
    return {
        "id": row.id,
        "timestamp": row.timestamp,
        "deliveryTime": row.delivered_at,
        "httpCode": row.http_code,
        "errorMessage": row.error_message,
        "status": row.status,
    }


GREENFIELD = [
    create_invoice,
    list_invoices,
    get_invoice,
    get_invoice_methods,
    mark_invoice,
    list_stores,
    get_store,
    list_store_methods,
    get_store_method,
    get_rates,
    get_server_info,
    get_api_key,
    list_webhooks,
    create_webhook,
    get_webhook,
    update_webhook,
    delete_webhook,
    list_deliveries,
    get_delivery,
    get_delivery_request,
    redeliver,
]
