"""The adapter and the sandbox BTCPay server, written apart from the same reference, understand each other."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from litestar import Litestar

from app.adapters.btcpay import BtcpayGateway
from app.adapters.btcpay_wire import METHOD_IDS
from app.sandbox.btcpay import SandboxConfig, create_sandbox
from app.topups.gateway import (
    AdditionalStatus,
    GatewayRefused,
    GatewayUnavailable,
    Invoice,
    InvoiceStatus,
    NewInvoice,
    PaymentStatus,
)

URL = "http://sandbox.example"
SECRET = "sandbox-webhook-secret"


class Mailbox:
    """Where the sandbox posts its webhooks."""

    def __init__(self) -> None:
        self.letters: list[tuple[bytes, dict[str, str]]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.letters.append((request.content, dict(request.headers)))
        return httpx.Response(200)


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture
async def client(tmp_path: Path, mailbox: Mailbox) -> AsyncIterator[httpx.AsyncClient]:
    config = SandboxConfig(
        state_dir=tmp_path,
        public_url=URL,
        store_id="SandboxStore",
        api_key="sandbox-key",
        webhook_url="http://receiver.example/webhooks/btcpay",
        webhook_secret=SECRET,
        time_scale=0.001,
    )
    sandbox = create_sandbox(config, webhook_transport=httpx.MockTransport(mailbox))
    transport = httpx.ASGITransport(app=cast(Any, sandbox))
    started, finished = asyncio.Event(), asyncio.Event()
    life = asyncio.create_task(live(sandbox, started, finished))
    await started.wait()
    async with httpx.AsyncClient(transport=transport) as client:
        yield client
    finished.set()
    await life


async def live(sandbox: Litestar, started: asyncio.Event, finished: asyncio.Event) -> None:
    """The sandbox's lifespan in one task: pytest sets a fixture up and tears it down in two, which anyio refuses."""
    try:
        async with sandbox.lifespan():
            started.set()
            await finished.wait()
    finally:
        started.set()


@pytest.fixture
def gateway(client: httpx.AsyncClient) -> BtcpayGateway:
    return a_gateway(client)


def a_gateway(client: httpx.AsyncClient, **changes: str) -> BtcpayGateway:
    settings: dict[str, Any] = {
        "base_url": URL,
        "api_key": "sandbox-key",
        "store_id": "SandboxStore",
        "webhook_secret": SECRET,
    }
    return BtcpayGateway(**{**settings, **changes}, client=client)


def an_order(method: str, order_id: str = "topup-1", amount: str = "20") -> NewInvoice:
    return NewInvoice(order_id, method, Decimal(amount), "USD", 60, 10080)


async def act(client: httpx.AsyncClient, invoice: Invoice, what: str, **body: Any) -> None:
    answer = await client.post(f"{URL}/sandbox/invoices/{invoice.id}/{what}", json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("method", METHOD_IDS)
async def test_an_invoice_is_made_paid_and_settled_by_every_method(
    client: httpx.AsyncClient, gateway: BtcpayGateway, method: str
) -> None:
    made = await gateway.create(an_order(method))
    assert (made.method, made.order_id, made.currency, made.amount) == (method, "topup-1", "USD", Decimal(20))
    assert made.status is InvoiceStatus.NEW
    assert made.due == made.total > 0
    assert made.destination in made.payment_link
    assert made.expires_at - made.created_at == timedelta(minutes=60)
    assert made.watched_until - made.expires_at == timedelta(minutes=10080)

    await act(client, made, "pay")
    await act(client, made, "confirm", blocks=10)

    paid = await gateway.fetch(made.id)
    assert paid is not None
    assert paid.status is InvoiceStatus.SETTLED
    assert paid.additional_status is AdditionalStatus.NONE
    assert [one.status for one in paid.payments] == [PaymentStatus.SETTLED]
    assert paid.payments[0].value == made.due
    assert (paid.payments[0].value - paid.payments[0].fee) * paid.rate >= made.amount
    assert list(await gateway.find("topup-1")) == [paid]
    assert list(await gateway.list_since(made.created_at)) == [paid]


async def test_a_partial_and_a_late_payment_are_told_with_their_figures(
    client: httpx.AsyncClient, gateway: BtcpayGateway
) -> None:
    made = await gateway.create(an_order("ltc"))
    await act(client, made, "pay", amount="0.1")
    partial = await gateway.fetch(made.id)
    assert partial is not None
    assert (partial.status, partial.additional_status) == (InvoiceStatus.NEW, AdditionalStatus.PAID_PARTIAL)
    assert partial.paid == Decimal("0.1")
    assert partial.payments[0].status is PaymentStatus.PROCESSING

    await act(client, made, "expire")
    await act(client, made, "pay")
    late = await gateway.fetch(made.id)
    assert late is not None
    assert (late.status, late.additional_status) == (InvoiceStatus.EXPIRED, AdditionalStatus.PAID_LATE)
    assert len(late.payments) == 2


async def test_a_payment_that_was_double_spent_is_listed_as_invalid(
    client: httpx.AsyncClient, gateway: BtcpayGateway
) -> None:
    made = await gateway.create(an_order("btc"))
    await act(client, made, "pay", replaceable=True)
    await act(client, made, "double-spend")
    fetched = await gateway.fetch(made.id)
    assert fetched is not None
    assert fetched.status is InvoiceStatus.NEW
    assert [one.status for one in fetched.payments] == [PaymentStatus.INVALID]


async def test_lists_are_oldest_first_and_by_order(client: httpx.AsyncClient, gateway: BtcpayGateway) -> None:
    made = [await gateway.create(an_order("btc-lightning", f"topup-{number}")) for number in (1, 2, 1)]
    assert [one.id for one in await gateway.find("topup-1")] == [made[0].id, made[2].id]
    assert [one.id for one in await gateway.list_since(made[0].created_at)] == [one.id for one in made]
    assert list(await gateway.find("topup-3")) == []
    assert list(await gateway.list_since(datetime.now(UTC) + timedelta(hours=1))) == []


@pytest.mark.parametrize("coin", ["BTC", "LTC", "LBTC", "XMR"])
async def test_every_coin_has_a_rate(gateway: BtcpayGateway, coin: str) -> None:
    rate = await gateway.rate(coin)
    assert rate.usd > 0
    assert rate.source == "btcpay"


async def test_what_btcpay_does_not_do_is_refused(gateway: BtcpayGateway) -> None:
    with pytest.raises(GatewayRefused, match="dust"):
        await gateway.create(an_order("btc", amount="0.01"))
    with pytest.raises(GatewayRefused, match="Expiration"):
        await gateway.create(NewInvoice("o", "btc", Decimal(20), "USD", 0, 60))


async def test_an_unknown_invoice_is_none_and_a_wrong_key_the_operators_fault(
    client: httpx.AsyncClient, gateway: BtcpayGateway
) -> None:
    assert await gateway.fetch("Unknown") is None
    for wrong in ({"api_key": "another"}, {"store_id": "Another"}):
        with pytest.raises(GatewayUnavailable, match="BTCPAY_API_KEY"):
            await a_gateway(client, **wrong).fetch("Unknown")


async def test_health_tells_a_working_store_from_a_wrong_key(client: httpx.AsyncClient, gateway: BtcpayGateway) -> None:
    assert await gateway.is_healthy()
    assert not await a_gateway(client, api_key="another").is_healthy()


async def test_its_webhooks_are_authentic_hints(
    client: httpx.AsyncClient, gateway: BtcpayGateway, mailbox: Mailbox
) -> None:
    made = await gateway.create(an_order("btc-lightning"))
    await act(client, made, "pay")
    types = await hints_until("InvoiceSettled", gateway, mailbox, made.id)
    words = "InvoiceCreated InvoicePaymentSettled InvoiceReceivedPayment InvoiceProcessing InvoiceSettled"
    assert types == words.split()


async def hints_until(last: str, gateway: BtcpayGateway, mailbox: Mailbox, invoice_id: str) -> list[str]:
    """The types of the hints that came, once the last one has; gives up after two seconds."""
    types: list[str] = []
    deadline = asyncio.get_running_loop().time() + 2
    while last not in types and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
        hints = [gateway.read_webhook(body, headers) for body, headers in mailbox.letters]
        types = [hint.type for hint in hints if hint is not None and hint.invoice_id == invoice_id]
    return types
