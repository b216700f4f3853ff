"""The LNbits adapter on a real LNbits 1.6.2, and a top-up through it to the books. `-s` shows what was seen."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import open_account
from app.adapters import lnbits_wire
from app.adapters.asking import Patience
from app.adapters.lnbits import LnbitsGateway
from app.adapters.rates import FixedRateSource
from app.audit import audit
from app.kernel.db import Database, Row, new_id, row
from app.kernel.money import CURRENCIES, units_of
from app.kernel.security import Caller, Kind
from app.kernel.settings import Settings
from app.topups.create import Wish, create_topup
from app.topups.credit import Credited, TopupRef, check_due, credit_if_paid
from app.topups.gateway import (
    AdditionalStatus,
    GatewayRefused,
    GatewayUnavailable,
    Invoice,
    InvoiceGateway,
    InvoiceStatus,
    NewInvoice,
)
from app.topups.inbox import process_waiting, store
from app.topups.methods import METHODS
from app.topups.owed import owed
from app.wiring import House, build
from tests.autotopup.test_lnbits import PayingWallets, topped_up_by_itself
from tests.integration.real_lnbits import RealLnbits, Receiver, installed, real_lnbits
from tests.program import free_ports

pytestmark = pytest.mark.slow

RATE = Decimal("64392.12")


@pytest.fixture(scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    await made.open()
    yield made
    await made.close()


@pytest.fixture(scope="module")
async def server(
    receiver: Receiver, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[RealLnbits]:
    # Shown although pytest keeps what tests print: the first run installs for a minute or two.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        venv = installed()
    with real_lnbits(venv, tmp_path_factory.mktemp("lnbits"), receiver.origin) as lnbits:
        yield lnbits


@pytest.fixture
async def gateway(server: RealLnbits, receiver: Receiver) -> AsyncIterator[LnbitsGateway]:
    made = a_gateway(server, webhook_url=f"{receiver.origin}/webhooks/lnbits")
    yield made
    await made.close()


def a_gateway(server: RealLnbits, **settings: Any) -> LnbitsGateway:
    values: dict[str, Any] = {
        "base_url": server.url,
        "invoice_key": server.shop.invoice_key,
        "rates": FixedRateSource({"BTC": RATE}),
        "patience": Patience(backoff_seconds=0.05),
    }
    return LnbitsGateway(**{**values, **settings})


@asynccontextmanager
async def closing(gateway: LnbitsGateway) -> AsyncIterator[LnbitsGateway]:
    try:
        yield gateway
    finally:
        await gateway.close()


def five_usd() -> NewInvoice:
    return NewInvoice(str(uuid.uuid4()), "btc-lightning", Decimal(5), "USD", 15, 1440)


async def fetched(gateway: InvoiceGateway, invoice_id: str) -> Invoice:
    invoice = await gateway.fetch(invoice_id)
    assert invoice is not None
    return invoice


async def a_short_invoice(server: RealLnbits, gateway: LnbitsGateway, seconds: int = 1) -> Invoice:
    """What the gateway would ask for, but with a life of seconds."""
    new = five_usd()
    body = lnbits_wire.new_invoice_body(
        new, await gateway.rate("BTC"), hint_token="x", webhook_url=None, expires_in_seconds=seconds
    )
    assert (await server.post(server.shop.invoice_key, body)).status_code == 201
    [invoice] = await gateway.find(new.order_id)
    return invoice


# The adapter


async def test_an_invoice_is_made_paid_and_settled(server: RealLnbits, gateway: LnbitsGateway) -> None:
    made = await gateway.create(five_usd())
    assert made.status is InvoiceStatus.NEW
    assert (made.total, made.rate) == (Decimal("0.00007765"), RATE)
    assert made.expires_at - made.created_at > timedelta(minutes=14, seconds=58)
    assert (await fetched(gateway, made.id)).status is InvoiceStatus.NEW

    assert (await server.pay(made.destination)).status_code == 201

    paid = await fetched(gateway, made.id)
    assert (paid.status, paid.additional_status) == (InvoiceStatus.SETTLED, AdditionalStatus.NONE)
    assert (paid.paid, paid.due, paid.rate) == (made.total, Decimal(0), RATE)
    [payment] = paid.payments
    assert made.created_at <= payment.received_at <= made.expires_at
    assert owed(paid, None, None, {}).credit_nusd == 5_000_000_000
    print(f"\nsettled: {paid.total} BTC for {paid.amount} USD at {paid.rate}, received {payment.received_at}")


async def test_paying_twice_is_refused_and_changes_nothing(server: RealLnbits, gateway: LnbitsGateway) -> None:
    made = await gateway.create(five_usd())
    await server.pay(made.destination)
    before = await fetched(gateway, made.id)
    again = await server.pay(made.destination)
    assert (again.status_code, again.json()["detail"]) == (520, "Internal invoice already paid.")
    assert await fetched(gateway, made.id) == before


async def test_after_a_lost_answer_the_invoice_is_found_by_its_order_id(
    server: RealLnbits, gateway: LnbitsGateway
) -> None:
    class Lossy(httpx.AsyncHTTPTransport):
        """LNbits gets the question, we never get the answer."""

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await super().handle_async_request(request)
            await response.aread()
            await response.aclose()
            raise httpx.ReadError("the line was cut")

    new = five_usd()
    async with httpx.AsyncClient(transport=Lossy()) as client:
        with pytest.raises(GatewayUnavailable, match="ReadError"):
            await a_gateway(server, client=client).create(new)

    [found] = await gateway.find(new.order_id)
    assert (found.order_id, found.amount, found.status) == (new.order_id, Decimal(5), InvoiceStatus.NEW)
    assert await gateway.find(str(uuid.uuid4())) == []
    assert await fetched(gateway, found.id) == found
    assert found.id in {one.id for one in await gateway.list_since(found.created_at - timedelta(seconds=1))}
    assert found.id not in {one.id for one in await gateway.list_since(found.created_at + timedelta(seconds=1))}


async def test_prices_in_sats_and_bitcoin_are_kept_to_the_unit(gateway: LnbitsGateway) -> None:
    for amount, currency, rate in ((Decimal(2500), "SATS", 10**8), (Decimal("0.000025"), "BTC", 1)):
        made = await gateway.create(replace(five_usd(), amount=amount, currency=currency))
        assert (made.amount, made.rate, made.total) == (amount, Decimal(rate), Decimal("0.000025"))


async def test_a_late_payment_is_seen_and_owed_though_we_asked_in_between(
    server: RealLnbits, gateway: LnbitsGateway
) -> None:
    made = await a_short_invoice(server, gateway)
    await asyncio.sleep(2.5)
    assert (await fetched(gateway, made.id)).status is InvoiceStatus.EXPIRED

    assert (await server.pay(made.destination)).status_code == 201

    late = await fetched(gateway, made.id)
    assert (late.status, late.additional_status) == (InvoiceStatus.EXPIRED, AdditionalStatus.PAID_LATE)
    [payment] = late.payments
    assert payment.received_at > late.expires_at
    assert owed(late, None, RATE, {}).credit_nusd >= 5_000_000_000
    print(f"\nlate: expired {late.expires_at}, received {payment.received_at}, {late.status} {late.additional_status}")


async def test_lnbits_own_look_after_expiry_would_have_closed_the_invoice(
    server: RealLnbits, gateway: LnbitsGateway
) -> None:
    """Why the adapter does not ask GET payment after expiry; if this fails, LNbits has changed its mind."""
    made = await a_short_invoice(server, gateway)
    await asyncio.sleep(2.5)
    async with httpx.AsyncClient(trust_env=False) as client:
        headers = {"X-Api-Key": server.shop.invoice_key}
        answer = await client.get(f"{server.url}/api/v1/payments/{made.id}", headers=headers)
    assert answer.json()["status"] == "failed"
    await server.pay(made.destination)
    assert (await fetched(gateway, made.id)).payments == ()


async def test_the_webhook_comes_unsigned_twice_and_encoded_twice_and_is_a_hint(
    server: RealLnbits, gateway: LnbitsGateway, receiver: Receiver
) -> None:
    made = await gateway.create(five_usd())
    await server.pay(made.destination)
    bodies = await receiver.about(made.id, 2)
    assert [type(json.loads(body)) for body in bodies] == [str, str]
    hints = {gateway.read_webhook(body, {}) for body in bodies}
    [hint] = hints
    assert hint is not None
    assert (hint.delivery_id, hint.type, hint.invoice_id) == (f"{made.id}:success", "lnbits", made.id)
    print(f"\nwebhook, {len(bodies)} times, as it came: {bodies[0][:160]!r}…\nheaders: {receiver.headers[-1][:300]!r}")


async def test_what_lnbits_refuses_is_refused(server: RealLnbits, gateway: LnbitsGateway) -> None:
    with pytest.raises(GatewayRefused, match="too high"):
        await gateway.create(replace(five_usd(), amount=Decimal(10**9), currency="SATS"))


async def test_a_webhook_that_its_rules_refuse_is_left_out_and_the_payment_is_found_by_asking(
    server: RealLnbits,
) -> None:
    async with closing(a_gateway(server, webhook_url="http://127.0.0.2/x")) as elsewhere:
        made = await elsewhere.create(five_usd())
        assert "http://127.0.0.2/x" in elsewhere.troubles()[0]
        assert (await server.pay(made.destination)).status_code == 201
        assert (await fetched(elsewhere, made.id)).status is InvoiceStatus.SETTLED
    async with closing(a_gateway(server, invoice_key="no-such-key")) as stranger:
        with pytest.raises(GatewayUnavailable, match="LNBITS_INVOICE_KEY"):
            await stranger.create(five_usd())
        assert not await stranger.is_healthy()


async def test_an_unreachable_server_is_unavailable_and_healthy_again_after_its_restart(
    server: RealLnbits, gateway: LnbitsGateway
) -> None:
    made = await gateway.create(five_usd())
    assert await gateway.is_healthy()
    server.stop()
    try:
        assert not await gateway.is_healthy()
        with pytest.raises(GatewayUnavailable, match="could not be reached"):
            await gateway.create(five_usd())
        with pytest.raises(GatewayUnavailable):
            await gateway.fetch(made.id)
    finally:
        server.start()
    assert await gateway.is_healthy()
    assert (await gateway.find(str(made.order_id)))[0].id == made.id


async def test_nobody_there_is_unavailable() -> None:
    nobody = LnbitsGateway(
        base_url=f"http://127.0.0.1:{free_ports(1)[0]}", invoice_key="k", rates=FixedRateSource({"BTC": RATE})
    )
    with pytest.raises(GatewayUnavailable, match="could not be reached"):
        await nobody.create(five_usd())
    assert not await nobody.is_healthy()
    await nobody.close()


# Through the books


@pytest.fixture
async def lightning_house(clean: str, settings: Settings, gateway: LnbitsGateway) -> AsyncIterator[House]:
    made = build(settings, clean, gateway=gateway)
    await made.db.open()
    yield made
    report = await audit(made.db)
    assert report.is_clean, report.findings
    await made.db.close()


async def a_topup(db: Database, gateway: InvoiceGateway, account_id: uuid.UUID, amount: str, currency: str) -> Row:
    async def finish(session: AsyncSession, topup: Row) -> Row:
        return topup

    caller = Caller(Kind.CREDIT_ID, account_id)
    wish = Wish(METHODS["btc-lightning"], currency, units_of(Decimal(amount), CURRENCIES[currency].places))
    return await create_topup(db, gateway, caller, wish, new_id(), finish)


async def an_account(house: House) -> uuid.UUID:
    return (await house.db.transaction(lambda session: open_account(session, house.keyring))).account_id


async def balance_nusd(db: Database, account_id: uuid.UUID) -> int:
    found = await db.transaction(
        lambda session: row(session, "SELECT posted_nusd FROM account WHERE id = :id", id=account_id)
    )
    assert found is not None
    return int(found["posted_nusd"])


async def test_an_automatic_top_up_is_paid_by_the_customers_wallet(
    server: RealLnbits, gateway: LnbitsGateway, clean: str, settings: Settings
) -> None:
    """Its FakeWallet leaves out of its invoices what BOLT11 lets it leave out."""

    async def pays(bolt11: str) -> None:
        assert (await server.pay(bolt11)).status_code == 201

    house = build(replace(settings, lightning_network="bc"), clean, gateway=gateway, wallets=PayingWallets(pays))
    await house.db.open()
    assert await topped_up_by_itself(house, await an_account(house)) == ["settled"]
    assert (await audit(house.db)).is_clean
    await house.watcher.close()
    await house.db.close()


async def test_a_top_up_paid_over_lightning_is_credited_once_with_its_bonus(
    server: RealLnbits, gateway: LnbitsGateway, lightning_house: House
) -> None:
    db, account_id = lightning_house.db, await an_account(lightning_house)
    topup = await a_topup(db, gateway, account_id, "5", "USD")
    ref = TopupRef(account_id, topup["id"])
    assert await credit_if_paid(db, gateway, ref) is None

    await server.pay(topup["destination"])
    credited = await asyncio.gather(*(credit_if_paid(db, gateway, ref) for _ in range(10)))

    assert [one for one in credited if one] == [Credited(5_000_000_000, 250_000_000)]
    assert await balance_nusd(db, account_id) == 5_250_000_000
    print(f"\nbooked: {await balance_nusd(db, account_id)} nano-USD, 5 USD and 5 % of it")


async def test_its_webhook_alone_credits_a_top_up_priced_in_sats(
    server: RealLnbits, gateway: LnbitsGateway, receiver: Receiver, lightning_house: House
) -> None:
    db, account_id = lightning_house.db, await an_account(lightning_house)
    topup = await a_topup(db, gateway, account_id, "10000", "SATS")
    await server.pay(topup["destination"])
    stored = []
    for body in await receiver.about(topup["invoice_id"], 2):
        hint = gateway.read_webhook(body, {})
        assert hint is not None
        stored.append(await store(db, gateway.name, hint, body))
    assert stored == [True, False]
    assert await process_waiting(db, gateway) == 1
    assert await balance_nusd(db, account_id) == 6_439_212_000 * 105 // 100


async def test_a_crash_between_lnbits_and_our_books_is_found_and_a_late_payment_credited(
    server: RealLnbits, gateway: LnbitsGateway, lightning_house: House
) -> None:
    """The row is there, the invoice is there, and nothing ties them together; then it is paid late."""
    db, account_id = lightning_house.db, await an_account(lightning_house)
    made = await a_short_invoice(server, gateway)
    await asyncio.sleep(2.5)
    assert made.order_id is not None

    async def forgotten(session: AsyncSession) -> None:
        await row(
            session,
            """INSERT INTO topup (account_id, id, backend, method, currency, amount_units, bonus_percent, expires_at,
                                  watch_until, next_check_at)
               VALUES (:account_id, :id, 'lnbits', 'btc-lightning', 'USD', 5000000000, 5, now(), now(), now())""",
            account_id=account_id, id=uuid.UUID(made.order_id),
        )  # fmt: skip

    await db.transaction(forgotten)
    assert await check_due(db, gateway) == 1
    assert await balance_nusd(db, account_id) == 0

    await server.pay(made.destination)
    credited = await credit_if_paid(db, gateway, TopupRef(account_id, uuid.UUID(made.order_id)))

    assert credited is not None
    # 7,765 sats at the rate of then, which is a little more than 5 USD, since sats are whole.
    assert credited == Credited(5_000_048_118, 250_002_405)
