"""Webhooks as BTCPay sends them: one queue each, in order, signed, retried for an hour, and forgotten at a restart.

Source: Plugins/Webhooks/WebhookSender.cs, WebhookProviderHostedService.cs, TriggerProviders/InvoiceTriggerProvider.cs
and BTCPayServer.Common/MultiProcessingQueue.cs of BTCPay Server v2.4.1.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from msgspec import Struct

from .errors import NotFound
from .ids import new_id
from .invoices import Event, Invoice, Payment
from .store import Store
from .wire import payment_view

RETRY_AFTER_SECONDS = (10, 60, *[600] * 6)
TIMEOUT_SECONDS = 100  # .NET's default, which BTCPay leaves alone


class Webhook(Struct, frozen=True):
    """Who is told, and of what; `events` is None for everything."""

    id: str
    url: str
    secret: str
    enabled: bool = True
    automatic_redelivery: bool = True
    events: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return f"Webhook(id={self.id!r}, url={self.url!r}, enabled={self.enabled})"

    def wants(self, type: str) -> bool:
        return self.enabled and (self.events is None or type in self.events)


class Delivery(Struct, frozen=True):
    """One attempt, written down after it was made. Times in unix seconds; `request` is the exact body sent."""

    id: str
    original_id: str
    webhook_id: str
    invoice_id: str
    type: str
    timestamp: int
    delivered_at: int
    status: str
    http_code: int | None
    error_message: str | None
    request: str

    @property
    def may_be_retried(self) -> bool:
        """No answer, a server's own fault, or a request to come again; any other refusal is final."""
        return self.http_code is None or self.http_code >= 500 or self.http_code in (408, 429)


class Post:
    """The webhooks of the store, their queues and their deliveries.

    `time_scale` multiplies the waits between retries; `clock` gives the sandbox's time in unix seconds.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], int],
        time_scale: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.store = store
        self.clock = clock
        self.time_scale = time_scale
        self.transport = transport
        self.is_losing_everything = False
        self.webhooks = {hook.id: hook for hook in store.every("webhooks", Webhook)}
        self.deliveries = {id: store.journal("deliveries", id, Delivery) for id in self.webhooks}
        self._queues: dict[str, asyncio.Queue[dict[str, Any]]] = {}
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._in_flight: set[str] = set()
        self._client: httpx.AsyncClient | None = None

    # Life

    def start(self) -> None:
        """Begin to send; needs a running loop."""
        # BTCPay does not verify TLS towards loopback, and a proxy of the environment has no business with it.
        self._client = httpx.AsyncClient(
            timeout=TIMEOUT_SECONDS,
            transport=self.transport,
            verify=False,  # noqa: S501
            trust_env=False,
        )
        for id in self.webhooks:
            self._employ(id)

    async def stop(self) -> None:
        """Stop sending. What was queued is lost, as in BTCPay."""
        await self._dismiss(*self._workers)
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def lose_events(self) -> int:
        """Drop all queued events and pending retries, as a restart of BTCPay does. Returns how many there were."""
        lost = self.waiting
        ids = list(self._workers)
        await self._dismiss(*ids)
        self._queues.clear()
        for id in ids:
            self._employ(id)
        return lost

    @property
    def waiting(self) -> int:
        """Events that were not delivered or given up yet, those being sent or retried included."""
        return sum(queue.qsize() for queue in self._queues.values()) + len(self._in_flight)

    def _employ(self, id: str) -> None:
        self._workers[id] = asyncio.get_running_loop().create_task(self._work(id), name=f"webhook {id}")

    async def _dismiss(self, *ids: str) -> None:
        workers = [self._workers.pop(id) for id in ids if id in self._workers]
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    # Webhooks

    def find(self, id: str) -> Webhook:
        """Raises NotFound."""
        if id not in self.webhooks:
            raise NotFound("webhook")
        return self.webhooks[id]

    def save(self, webhook: Webhook) -> Webhook:
        """Create or change a webhook."""
        is_new = webhook.id not in self.webhooks
        self.webhooks[webhook.id] = webhook
        self.store.put("webhooks", webhook.id, webhook)
        if is_new:
            self.deliveries[webhook.id] = []
            if self._client is not None:
                self._employ(webhook.id)
        return webhook

    async def remove(self, id: str) -> None:
        """Forget a webhook with all that waits for it."""
        self.find(id)
        await self._dismiss(id)
        self._queues.pop(id, None)
        del self.webhooks[id], self.deliveries[id]
        self.store.remove("webhooks", id)

    def register(self, url: str, secret: str) -> Webhook:
        """Have exactly one webhook for this URL, with this secret and everything told."""
        known = next((hook for hook in self.webhooks.values() if hook.url == url), None)
        return self.save(Webhook(known.id if known else new_id(), url, secret))

    # Deliveries

    def publish(self, invoice: Invoice, event: Event) -> None:
        """Queue an event for every webhook that wants it, frozen as the invoice stands now."""
        for webhook in self.webhooks.values():
            if webhook.wants(event.type) and not self.is_losing_everything:
                self._enqueue(webhook.id, body_of(webhook.id, invoice, event, self.clock()))

    def delivery(self, webhook_id: str, id: str) -> Delivery:
        """Raises NotFound."""
        self.find(webhook_id)
        found = next((row for row in self.deliveries[webhook_id] if row.id == id), None)
        if found is None:
            raise NotFound("webhookdelivery")
        return found

    def redeliver(self, delivery: Delivery) -> str:
        """Queue the same event again under a new delivery id, which is returned."""
        body = _again(json.loads(delivery.request))
        self._enqueue(delivery.webhook_id, body)
        return str(body["deliveryId"])

    def _enqueue(self, webhook_id: str, body: dict[str, Any]) -> None:
        self._queues.setdefault(webhook_id, asyncio.Queue()).put_nowait(body)

    async def _work(self, id: str) -> None:
        """Deliver this webhook's events one after the other; a stubborn one keeps the later ones waiting."""
        queue = self._queues.setdefault(id, asyncio.Queue())
        while True:
            body = await queue.get()
            self._in_flight.add(id)
            try:
                await self._deliver(id, body)
            finally:
                self._in_flight.discard(id)

    async def _deliver(self, webhook_id: str, body: dict[str, Any]) -> None:
        delivery = await self._attempt(self.webhooks[webhook_id], body)
        for wait_seconds in RETRY_AFTER_SECONDS:
            if not delivery.may_be_retried or not self.webhooks[webhook_id].automatic_redelivery:
                return
            await asyncio.sleep(wait_seconds * self.time_scale)
            body = _again(body)
            delivery = await self._attempt(self.webhooks[webhook_id], body)

    async def _attempt(self, webhook: Webhook, body: dict[str, Any]) -> Delivery:
        """Send once, and only then write the delivery down."""
        raw = json.dumps(body, indent=2, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json", "BTCPay-Sig": signature(webhook.secret, raw)}
        assert self._client is not None, "workers live between start and stop"
        code: int | None = None
        status, problem = "HttpSuccess", None
        try:
            response = await self._client.post(webhook.url, content=raw, headers=headers)
            code = response.status_code
            if not response.is_success:
                status, problem = "HttpError", f"HTTP Error Code {code}"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            status, problem = "Failed", f"{type(error).__name__}: {error}"
        delivery = _row(webhook.id, body, raw, self.clock(), status, code, problem)
        self.deliveries[webhook.id].append(delivery)
        self.store.append("deliveries", webhook.id, delivery)
        return delivery


def signature(secret: str, raw: bytes) -> str:
    """The BTCPay-Sig header over the exact bytes of the body."""
    return "sha256=" + hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()


def body_of(webhook_id: str, invoice: Invoice, event: Event, now: int) -> dict[str, Any]:
    """A webhook's body as BTCPay writes it, in its order of keys."""
    id = new_id()
    return {
        "deliveryId": id,
        "webhookId": webhook_id,
        "originalDeliveryId": id,
        "isRedelivery": False,
        "type": event.type.value,
        "timestamp": now,
        **event.facts,
        **(_payment_of(event.payment) if event.payment else {}),
        "storeId": invoice.store_id,
        "invoiceId": invoice.id,
        "metadata": invoice.metadata,
    }


def _payment_of(payment: Payment) -> Mapping[str, Any]:
    return {"paymentMethodId": payment.method, "payment": payment_view(payment)}


def _again(body: dict[str, Any]) -> dict[str, Any]:
    """The same event, frozen with its timestamp, under a new delivery id."""
    return {**body, "deliveryId": new_id(), "isRedelivery": True}


def _row(
    webhook_id: str, body: dict[str, Any], raw: bytes, now: int, status: str, code: int | None, problem: str | None
) -> Delivery:
    return Delivery(
        id=body["deliveryId"],
        original_id=body["originalDeliveryId"],
        webhook_id=webhook_id,
        invoice_id=body["invoiceId"],
        type=body["type"],
        timestamp=body["timestamp"],
        delivered_at=now,
        status=status,
        http_code=code,
        error_message=problem,
        request=raw.decode(),
    )
