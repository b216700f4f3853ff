"""The BTCPay Server adapter: asks one store over the Greenfield API, patiently but not for ever.

    create ─── POST invoices (never repeated) ─┬─ GET payment-methods ── checked ──► Invoice
    fetch ──── GET invoice ────────────────────┘
    each question goes through asking.py

BTCPay's words and what they mean stand in `btcpay_wire.py`.
"""

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

import httpx

from app.adapters import btcpay_wire as wire
from app.adapters.asking import Answer, Asker, Patience, checked_key, checked_url
from app.kernel.errors import InvalidSignature
from app.topups.gateway import (
    GatewayError,
    GatewayRefused,
    GatewayUnavailable,
    Hint,
    Invoice,
    NewInvoice,
    Rate,
)
from app.topups.setup import BackendSetup, Hook

PAGE_INVOICES: Final = 100
MAX_PAGES: Final = 1000

_SIGNATURE: Final = re.compile(r"sha256=([0-9a-fA-F]{64})")


class _InvoiceNotFound(GatewayUnavailable):
    """BTCPay has no such invoice."""


class BtcpayGateway:
    """An InvoiceGateway (app.topups.gateway) on one store of a BTCPay Server, 1.x or 2.x.

    The API key needs `btcpay.store.cancreateinvoice`, `canviewinvoices` and `canviewstoresettings`, and no more:
    with `canmodifyinvoices` a thief could mark invoices as paid. A `client` that is passed in stays its owner's to
    close. Source: BTCPay Greenfield API v1, in its store-scoped routes, which old and new servers have.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        store_id: str,
        webhook_secret: str,
        service_name: str = "Satmeter",
        client: httpx.AsyncClient | None = None,
        patience: Patience | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Raises ValueError, naming the setting, if one of them cannot be right."""
        self._base_url = checked_url(base_url, "BTCPAY_URL")
        self._api_key = checked_key(api_key, "BTCPAY_API_KEY")
        self._store_id = _checked_store_id(store_id)
        self._webhook_secret = _checked_secret(webhook_secret).encode()
        self._service_name = service_name
        self._store_path = f"/api/v1/stores/{store_id}"
        self._now = now
        self._asker = Asker(
            "BTCPay",
            self._base_url,
            {"Authorization": f"token {api_key}"},
            client=client,
            patience=patience,
            monotonic=monotonic,
        )

    @property
    def name(self) -> str:
        return "btcpay"

    def __repr__(self) -> str:
        return f"BtcpayGateway({self._base_url!r}, store_id={self._store_id!r})"

    async def create(self, new: NewInvoice) -> Invoice:
        """Make one invoice with exactly one payment method, ready to be paid.

        Greenfield has no idempotency key, so this POST is never repeated: after GatewayUnavailable the invoice
        may exist, and `find(new.order_id)` tells. Raises GatewayRefused if BTCPay said no, or made an
        invoice that is not what was asked for or cannot be paid.
        """
        body = await self._post("/invoices", wire.new_invoice_body(new, self._service_name))
        made = wire.read_invoice(body, store_id=self._store_id)
        methods = await self._methods_of(made.id)
        reason = wire.why_unpayable(new, made, methods)
        if reason is not None:
            raise GatewayRefused(f"BTCPay made invoice {made.id}, but {reason}")
        return wire.to_invoice(made, methods)

    async def fetch(self, invoice_id: str) -> Invoice | None:
        """The invoice as it stands now, None if this store has none of that id.

        Two questions, a moment apart: its payments may be newer than its status. Payments that no longer count
        (replaced, double spent) are listed as Invalid.
        """
        if not wire.is_invoice_id(invoice_id):
            return None
        try:
            body = await self._get(f"/invoices/{invoice_id}")
            invoice = wire.read_invoice(body, store_id=self._store_id, invoice_id=invoice_id)
            return wire.to_invoice(invoice, await self._methods_of(invoice_id))
        except _InvoiceNotFound:
            return None

    async def find(self, order_id: str) -> Sequence[Invoice]:
        """Every invoice with exactly this order id and one payment method of ours, archived ones too, oldest first."""
        if not order_id:
            return ()
        body = await self._get("/invoices", {"orderId": order_id, "includeArchived": "true"})
        _, listed = wire.read_page(body, store_id=self._store_id)
        ours = [one for one in listed if one.order_id == order_id]
        return await self._completed(_oldest_first(ours))

    async def list_since(self, since: datetime) -> Sequence[Invoice]:
        """Every invoice made at or after `since` that has an order id and one payment method of ours, oldest first.

        Archived ones are included. Payments that no longer count may be missing: `fetch` before crediting.
        """
        assert since.tzinfo is not None, "since must be aware"
        start = max(1, int(since.timestamp()))
        query = {"startDate": str(start), "includeArchived": "true", "includePaymentMethods": "true"}
        listed = [one for one in await self._listed(query) if one.created_time >= start]
        return await self._completed(_oldest_first(listed))

    async def rate(self, coin: str) -> Rate:
        """USD per whole `coin` now: BTCPay's bid, with the store's spread. Raises GatewayRefused if it has none."""
        if coin not in wire.RATED_COINS:
            raise GatewayRefused(f"no rate for {coin!r}; there are {', '.join(wire.RATED_COINS)}")
        pair = f"{coin}_USD"
        body = await self._get("/rates", {"currencyPair": pair}, may_refuse=True)
        return Rate(usd=wire.read_rate(body, pair), source=self.name, quoted_at=self._now())

    def read_webhook(self, raw_body: bytes, headers: Mapping[str, str]) -> Hint | None:
        """What an authentic webhook says, None if it is for another store or makes no sense.

        Raises InvalidSignature if it is not authentic. BTCPay signs the body alone, without a time, so an old
        delivery can be replayed: dedupe by `delivery_id` and ask for the invoice.
        """
        claimed = _SIGNATURE.fullmatch(headers.get("btcpay-sig", ""))
        expected = hmac.new(self._webhook_secret, raw_body, hashlib.sha256).hexdigest()
        if claimed is None or not hmac.compare_digest(claimed[1].lower(), expected):
            raise InvalidSignature
        return wire.read_hint(raw_body, self._store_id)

    async def is_healthy(self) -> bool:
        """Whether BTCPay answers, its nodes are in step, and our key may see our store; never raises.

        Past the breaker, so that asking neither opens nor closes it.
        """
        try:
            async with asyncio.timeout(self._asker.patience.health_seconds):
                health = await self._asker.exchange("GET", "/api/v1/health")
                store = await self._asker.exchange("GET", f"{self._store_path}/invoices", {"take": "1"})
            return health.status == store.status == 200 and wire.is_synchronized(health.body)
        except (GatewayError, httpx.HTTPError, TimeoutError, OSError, RuntimeError):
            return False  # RuntimeError is httpx's word for a client that was closed

    async def setup(self) -> BackendSetup:
        """How the store, its server and our key are set up. Raises GatewayUnavailable.

        A webhook's secret is never told; how its last delivery was answered is.
        Source: Greenfield "Get current API Key", "Get store's payment methods", "Get webhooks", "Get latest deliveries".
        """
        store_id, store = self._store_id, self._store_path
        key, server, health, methods = await asyncio.gather(
            self._told("/api/v1/api-keys/current"), self._told("/api/v1/server/info"), self._told("/api/v1/health"),
            self._told(f"{store}/payment-methods", {"onlyEnabled": "true"}, may_lack=True),
        )  # fmt: skip
        assert key is not None
        assert server is not None
        assert health is not None
        return BackendSetup(
            version=wire.read_server(server).version,
            is_synchronized=wire.is_synchronized(health),
            store_id=store_id,
            permissions=wire.read_permissions(key),
            methods=frozenset(wire.METHOD_IDS) if methods is None else wire.read_enabled(methods),
            nodes=wire.read_server(server).nodes,
            hooks=await self._hooks(),
        )

    async def _hooks(self) -> tuple[Hook, ...] | None:
        path = f"{self._store_path}/webhooks"
        body = await self._told(path, may_lack=True)
        if body is None:
            return None
        hooks = []
        for hook in wire.read_hooks(body):
            last = await self._told(f"{path}/{hook.id}/deliveries", {"count": "1"}, may_lack=True)
            hooks.append(wire.to_hook(hook, wire.read_deliveries(last or b"[]")))
        return tuple(hooks)

    async def _told(self, path: str, query: Mapping[str, str] | None = None, *, may_lack: bool = False) -> bytes | None:
        """The body of an answer; with `may_lack` None where our key may not ask."""
        answer = await self._asker.ask("GET", path, query)
        if may_lack and answer.status == 403:
            return None
        return self._wanted(answer, may_refuse=False)

    async def close(self) -> None:
        """Give back the connections, unless the client is somebody else's."""
        await self._asker.close()

    # Several invoices

    async def _methods_of(self, invoice_id: str) -> tuple[wire.MethodWire, ...]:
        body = await self._get(f"/invoices/{invoice_id}/payment-methods", {"onlyAccountedPayments": "false"})
        return wire.read_methods(body)

    async def _listed(self, query: Mapping[str, str]) -> list[wire.InvoiceWire]:
        """Every invoice of a listing that has an order id, newest first, page by page.

        BTCPay lists the newest first, so an invoice made meanwhile shifts the pages: some come twice, none is
        missed. A page ends the listing only when it is empty, lest a server that gives fewer than asked cuts it.
        """
        found: dict[str, wire.InvoiceWire] = {}
        skip = 0
        for _ in range(MAX_PAGES):
            body = await self._get("/invoices", {**query, "skip": str(skip), "take": str(PAGE_INVOICES)})
            count, page = wire.read_page(body, store_id=self._store_id)
            if count == 0:
                return list(found.values())
            found |= {one.id: one for one in page}
            skip += count
        raise GatewayUnavailable(f"BTCPay lists more than {skip} invoices; ask for a shorter period")

    async def _completed(self, listed: Sequence[wire.InvoiceWire]) -> list[Invoice]:
        """The listed invoices with their payment methods, without those that others made in the same store."""
        invoices = []
        for one in listed:
            methods = one.payment_methods
            with suppress(wire.NotOurs):
                invoice = wire.to_invoice(one, methods) if isinstance(methods, tuple) else await self.fetch(one.id)
                invoices += [invoice] if invoice is not None else []
        return invoices

    # One question

    async def _get(self, path: str, query: Mapping[str, str] | None = None, *, may_refuse: bool = False) -> bytes:
        answer = await self._asker.ask("GET", self._store_path + path, query)
        return self._wanted(answer, may_refuse=may_refuse)

    async def _post(self, path: str, content: bytes) -> bytes:
        return self._wanted(await self._asker.ask("POST", self._store_path + path, content=content), may_refuse=True)

    def _wanted(self, answer: Answer, *, may_refuse: bool) -> bytes:
        """The body of a 200; raises what any other status means."""
        if answer.status == 200:
            return answer.body
        refusal = _meaning(answer, may_refuse=may_refuse)
        # An error page may echo our request, header and all.
        raise type(refusal)(str(refusal).replace(self._api_key, "[api key]"))


def _meaning(answer: Answer, *, may_refuse: bool) -> GatewayError:
    """What a status other than 200 means.

    401 and 403 are the operator's fault, not the customer's, so they are GatewayUnavailable. A 404 means a
    wrong URL or store unless BTCPay itself says that it is the invoice.
    """
    problem = wire.read_problem(answer.body)
    if answer.status in (401, 403):
        permission = problem.permission if problem else ""
        why = f"missing permission {permission}" if permission else f"HTTP {answer.status}"
        return GatewayUnavailable(f"BTCPay refused our API key ({why}); see BTCPAY_API_KEY")
    if answer.status == 404 and problem and problem.code == "invoice-not-found":
        return _InvoiceNotFound("BTCPay has no such invoice in our store")
    if answer.status == 404:
        return GatewayUnavailable("BTCPay has no such store or route (HTTP 404); see BTCPAY_URL and BTCPAY_STORE_ID")
    if 300 <= answer.status < 400:
        return GatewayUnavailable(f"BTCPay redirected us (HTTP {answer.status}); BTCPAY_URL must be its final address")
    if answer.status in (400, 422) and may_refuse and problem:
        return GatewayRefused(f"BTCPay refused: {problem.text or problem.code or f'HTTP {answer.status}'}")
    return GatewayUnavailable(f"BTCPay answered HTTP {answer.status}")


def _oldest_first(listed: Sequence[wire.InvoiceWire]) -> list[wire.InvoiceWire]:
    """By creation; those of the same second in the reverse of BTCPay's order, which is newest first."""
    return sorted(listed, key=lambda one: one.created_time, reverse=True)[::-1]


# Settings


def _checked_store_id(store_id: str) -> str:
    if not wire.is_invoice_id(store_id):
        raise ValueError("BTCPAY_STORE_ID is empty or has characters that no store id has")
    return store_id


def _checked_secret(webhook_secret: str) -> str:
    # BTCPay signs with the empty text if it has no secret, and so could anybody else.
    if not webhook_secret.strip():
        raise ValueError("BTCPAY_WEBHOOK_SECRET is empty; anybody could sign webhooks then")
    return webhook_secret
