"""What the LNbits adapter promises, on a fake LNbits without a network."""

import json
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest

from app.adapters import lnbits
from app.adapters.asking import Patience
from app.adapters.lnbits import WEBHOOK_AGAIN_SECONDS
from app.adapters.lnbits_wire import sats_of
from app.adapters.rates import FixedRateSource
from app.kernel.errors import InvalidSignature
from app.topups.gateway import (
    AdditionalStatus,
    GatewayRefused,
    GatewayUnavailable,
    InvoiceGateway,
    InvoiceStatus,
    NewInvoice,
    PaymentStatus,
)
from app.topups.owed import owed
from tests.adapters.fake_greenfield import Clock
from tests.adapters.fake_lnbits import KEY, START, URL, FakeLnbits, a_bolt11, a_gateway, problem

FIVE_USD = NewInvoice("order-1", "btc-lightning", Decimal("5"), "USD", 15, 1440)
UNKNOWN = "0" * 64
ZERO = Decimal(0)


@pytest.fixture
def fake() -> FakeLnbits:
    return FakeLnbits()


async def test_it_is_an_invoice_gateway(fake: FakeLnbits) -> None:
    gateway: InvoiceGateway = a_gateway(fake)
    assert isinstance(gateway, InvoiceGateway)
    assert gateway.name == "lnbits"
    assert KEY not in repr(gateway)


# create


async def test_create_asks_for_sats_and_leaves_all_we_must_remember_with_lnbits(fake: FakeLnbits) -> None:
    invoice = await a_gateway(fake, webhook_url="https://shop.example/webhooks/lnbits").create(FIVE_USD)

    [post] = fake.requests
    asked = json.loads(post.content)
    assert (post.url.path, post.headers["x-api-key"]) == ("/api/v1/payments", KEY)
    assert len(asked["extra"].pop("hint_token")) == 32
    assert asked == {
        "out": False, "unit": "sat", "amount": 7813, "memo": "Satmeter: top-up of 5 USD", "expiry": 900, "external_id": "order-1",
        "webhook": "https://shop.example/webhooks/lnbits",
        "extra": {
            "tag": "satmeter", "order_id": "order-1", "currency": "USD", "amount": "5", "rate": "64000", "rate_source": "fixed",
            "rate_at": START.isoformat(), "expires_in_seconds": 900, "monitor_minutes": 1440,
        },
    }  # fmt: skip
    assert (invoice.status, invoice.additional_status) == (InvoiceStatus.NEW, AdditionalStatus.NONE)
    assert (invoice.order_id, invoice.currency) == ("order-1", "USD")
    assert (invoice.amount, invoice.rate) == (Decimal(5), Decimal(64_000))
    assert (invoice.total, invoice.due) == (Decimal("0.00007813"), invoice.total)
    assert (invoice.paid, invoice.fee) == (ZERO, ZERO)
    assert invoice.created_at == START
    assert invoice.expires_at == START + timedelta(minutes=15)
    assert invoice.watched_until == invoice.expires_at + timedelta(hours=24)
    assert invoice.payment_link == f"lightning:{invoice.destination}"
    assert invoice.payments == ()


@pytest.mark.parametrize(
    ("amount", "rate", "sats"),
    [
        ("5", "64000", 7813),
        ("6.4", "64000", 10_000),
        ("6.400000001", "64000", 10_001),
        ("0.000000001", "999999999", 1),
        ("1", "3", 33_333_334),
        ("1000", "64392.123456789012345678", 1_552_985),
    ],
)
def test_sats_are_rounded_up_once_and_exactly(amount: str, rate: str, sats: int) -> None:
    assert sats_of(Decimal(amount), Decimal(rate)) == sats


@pytest.mark.parametrize(
    ("amount", "currency", "sats", "rate"),
    [("2500", "SATS", 2500, 100_000_000), ("0.0001", "BTC", 10_000, 1), ("1E+3", "SATS", 1000, 100_000_000)],
)
async def test_prices_in_bitcoin_need_no_rate_source(
    fake: FakeLnbits, amount: str, currency: str, sats: int, rate: int
) -> None:
    gateway = a_gateway(fake, rates=FixedRateSource({}))
    invoice = await gateway.create(NewInvoice("o", "btc-lightning", Decimal(amount), currency, 15, 1440))
    assert (invoice.total, invoice.rate, invoice.amount) == (Decimal(sats).scaleb(-8), Decimal(rate), Decimal(amount))


@pytest.mark.parametrize(("method", "currency"), [("btc", "USD"), ("xmr", "XMR"), ("btc-lightning", "EUR")])
async def test_what_lightning_cannot_take_is_refused_unasked(fake: FakeLnbits, method: str, currency: str) -> None:
    with pytest.raises(GatewayRefused):
        await a_gateway(fake).create(NewInvoice("o", method, Decimal(1), currency, 15, 60))
    assert fake.requests == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"status": "success"}, GatewayRefused, "it is success"),
        ({"amount": 8_000_000}, GatewayUnavailable, "bolt11"),
        ({"payment_hash": UNKNOWN}, GatewayUnavailable, "bolt11"),
        ({"bolt11": a_bolt11(7_813_000, START, 900, b"another")[1]}, GatewayUnavailable, "bolt11"),
        ({"bolt11": "lnbc1"}, GatewayUnavailable, "bolt11"),
    ],
)
async def test_an_invoice_that_is_not_what_was_asked_for_is_not_shown(
    fake: FakeLnbits, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    fake.changes = change
    with pytest.raises(error, match=message):
        await a_gateway(fake).create(FIVE_USD)


async def test_an_invoice_over_another_amount_is_refused(fake: FakeLnbits) -> None:
    payment_hash, text = a_bolt11(1_000, START, 900)
    fake.changes = {"amount": 1_000, "bolt11": text, "payment_hash": payment_hash}
    with pytest.raises(GatewayRefused, match="over 1000 msat, not 7813000"):
        await a_gateway(fake).create(FIVE_USD)


async def test_a_lost_answer_is_found_by_order_id_and_the_post_is_not_repeated(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    fake.next_answers.append(httpx.ReadTimeout("slow"))
    with pytest.raises(GatewayUnavailable):
        await gateway.create(FIVE_USD)
    assert [request.method for request in fake.requests] == ["POST", "POST"]
    assert await gateway.find("order-1") == [made]
    assert await gateway.find("order-2") == []
    assert await gateway.find("") == ()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (problem(520, "Invoice amount 99 sats is too high.", status="failed"), GatewayRefused, "too high"),
        (problem(520, "node is away", status="pending"), GatewayUnavailable, "HTTP 520: node is away"),
        (httpx.Response(520, text="<html>"), GatewayUnavailable, "HTTP 520"),
        (problem(400, "Callback URL is not allowed."), GatewayRefused, "Callback URL"),
        (problem(400, [{"loc": ["body", "amount"], "msg": "no"}]), GatewayRefused, "body.amount: no"),
        (httpx.Response(400, text="Bad Request"), GatewayUnavailable, "HTTP 400"),
        (problem(401, f"No such key {KEY}"), GatewayUnavailable, "LNBITS_INVOICE_KEY"),
        (problem(403, "no"), GatewayUnavailable, "LNBITS_INVOICE_KEY"),
        (problem(404, "Wallet not found."), GatewayUnavailable, "LNBITS_INVOICE_KEY"),
        (httpx.Response(404, text="nginx"), GatewayUnavailable, "LNBITS_URL"),
        (httpx.Response(307, headers={"location": "/first_install"}), GatewayUnavailable, "not installed"),
        (problem(418, f"tea {KEY}"), GatewayUnavailable, r"tea \[invoice key\]"),
        (problem(500, "Unexpected error!"), GatewayUnavailable, "HTTP 500"),
        (problem(429, "slow down"), GatewayUnavailable, "HTTP 429"),
        (httpx.ConnectError("refused"), GatewayUnavailable, "could not be reached"),
        (httpx.Response(201, text="hello"), GatewayUnavailable, "rubbish"),
    ],
)
async def test_every_no_is_a_refusal_or_a_doubt(
    fake: FakeLnbits, answer: httpx.Response | Exception, error: type[Exception], message: str
) -> None:
    fake.next_answers.append(answer)
    with pytest.raises(error, match=message) as caught:
        await a_gateway(fake).create(FIVE_USD)
    assert type(caught.value) is error
    assert KEY not in str(caught.value)
    assert len(fake.requests) == 1


# fetch


async def test_a_payment_in_time_settles_the_invoice(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    fake.wait(minutes=10)
    fake.pay(made.id)

    invoice = await gateway.fetch(made.id)

    assert invoice is not None
    assert (invoice.status, invoice.additional_status) == (InvoiceStatus.SETTLED, AdditionalStatus.NONE)
    assert (invoice.due, invoice.paid) == (ZERO, Decimal("0.00007813"))
    [payment] = invoice.payments
    assert (payment.id, payment.value, payment.fee) == (made.id, Decimal("0.00007813"), ZERO)
    assert (payment.status, payment.received_at) == (PaymentStatus.SETTLED, fake.now)
    assert owed(invoice, None, None, {}).credit_nusd == 5_000_000_000


async def test_a_late_payment_is_credited_at_the_lower_rate(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    fake.wait(minutes=20)
    assert await gateway.fetch(made.id) is not None
    fake.pay(made.id)

    invoice = await gateway.fetch(made.id)

    assert invoice is not None
    assert (invoice.status, invoice.additional_status) == (InvoiceStatus.EXPIRED, AdditionalStatus.PAID_LATE)
    assert len(invoice.payments) == 1
    assert owed(invoice, None, Decimal(32_000), {}).credit_nusd == 2_500_160_000
    assert owed(invoice, None, Decimal(90_000), {}).credit_nusd == 5_000_320_000


async def test_the_rate_is_the_one_at_creation_whatever_happens_since(fake: FakeLnbits) -> None:
    made = await a_gateway(fake).create(FIVE_USD)
    later = a_gateway(fake, rates=FixedRateSource({"BTC": Decimal(1)}))
    invoice = await later.fetch(made.id)
    assert invoice is not None
    assert (invoice.rate, invoice.total) == (Decimal(64_000), made.total)


async def test_lnbits_is_asked_to_ask_its_node_only_while_that_can_do_no_harm(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)

    async def asked_of(**time: float) -> list[str]:
        fake.requests.clear()
        fake.wait(**time)
        await gateway.fetch(made.id)
        return [request.url.path.rpartition("/")[2] for request in fake.requests]

    assert await asked_of(minutes=1) == ["paginated", made.id]
    assert await asked_of(minutes=13, seconds=40) == ["paginated"]
    assert await asked_of(minutes=30) == ["paginated"]
    assert fake.payments[0]["status"] == "pending"
    fake.pay(made.id)
    assert await asked_of() == ["paginated"]


async def test_an_invoice_that_nobody_paid_expires(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    fake.wait(minutes=15)
    for status in ("pending", "failed"):
        fake.payments[0]["status"] = status
        invoice = await gateway.fetch(made.id)
        assert invoice is not None
        assert (invoice.status, invoice.additional_status) == (InvoiceStatus.EXPIRED, AdditionalStatus.NONE)
        assert owed(invoice, None, None, {}).credit_nusd == 0


async def test_a_node_that_gives_longer_life_does_not_prolong_our_price(fake: FakeLnbits) -> None:
    payment_hash, text = a_bolt11(7_813_000, START, None)
    fake.changes = {"bolt11": text, "payment_hash": payment_hash}
    invoice = await a_gateway(fake).create(FIVE_USD)
    assert invoice.expires_at == START + timedelta(minutes=15)


@pytest.mark.parametrize("invoice_id", ["", "..", "paginated", "a" * 63, "A" * 64, "٣" * 64, "a" * 63 + "\n"])
async def test_an_id_that_is_no_payment_hash_is_not_asked_for(fake: FakeLnbits, invoice_id: str) -> None:
    assert await a_gateway(fake).fetch(invoice_id) is None
    assert fake.requests == []


async def test_what_we_did_not_make_is_unknown(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    fake.payments[0]["extra"] = {"tag": "lnurlp"}
    assert await gateway.fetch(UNKNOWN) is None
    assert await gateway.fetch(made.id) is None
    assert await gateway.find("order-1") == []


async def test_the_payers_side_in_the_same_wallet_is_not_the_invoice(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    fake.pay(made.id)
    fake.payments.insert(0, fake.payments[0] | {"amount": -7_813_000})
    invoice = await gateway.fetch(made.id)
    assert invoice is not None
    assert invoice.paid == Decimal("0.00007813")


async def test_a_server_that_ignores_our_filter_is_not_believed(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    await gateway.create(FIVE_USD)
    fake.ignored_filters = frozenset({"external_id", "payment_hash"})
    with pytest.raises(GatewayUnavailable, match=r"ignores the filter external_id; it must be 1\.6"):
        await gateway.find("order-2")
    with pytest.raises(GatewayUnavailable, match="ignores the filter payment_hash"):
        await gateway.fetch(UNKNOWN)


RUBBISH: dict[str, list[Any]] = {
    "amount": [None, "1", 1.5, True, [], 10**19],
    "status": [None, "", "paid", "SUCCESS", 1],
    "bolt11": [None, "", "lnbc", "l" * 5000, "lnbc1\n", 7],
    "time": [None, 0, "2026-11-20T12:00:00", "yesterday"],
    "updated_at": [None, 0, "2026-11-20T12:00:00", "yesterday"],
    "payment_hash": [None],
    "extra.currency": [None, "EUR", "usd", 1],
    "extra.amount": [None, "", "0", "-5", "NaN", "1e3", "٣", []],
    "extra.rate": [None, "", "0", "-1", "Infinity", "6,4", {}],
    "extra.expires_in_seconds": [None, 0, -1, "900", 10**12],
    "extra.monitor_minutes": [None, -1, 10**12],
    "extra.order_id": [None, "", 1, "a b"],
}


@pytest.mark.parametrize(("field", "value"), [(field, one) for field, ones in RUBBISH.items() for one in ones])
async def test_an_answer_that_was_half_understood_is_no_answer(fake: FakeLnbits, field: str, value: Any) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    fake.pay(made.id)
    payment = fake.payments[0]
    target, _, inner = field.partition(".")
    if inner:
        payment["extra"][inner] = value
    else:
        payment[target] = value
    fake.next_answers.append(httpx.Response(200, json={"data": [payment], "total": 1}))
    with pytest.raises(GatewayUnavailable, match="LNbits"):
        await gateway.fetch(made.id)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"data":null}', '{"data":[7]}', '{"data":{}}', "\ud800", "[" * 9999, "<html>"]
)
async def test_a_page_that_is_none_is_rubbish(fake: FakeLnbits, text: str) -> None:
    gateway = a_gateway(fake)
    body = text.encode("utf-8", "surrogatepass")
    for question in (gateway.fetch(UNKNOWN), gateway.find("o"), gateway.list_since(START)):
        fake.next_answers.append(httpx.Response(200, content=body))
        with pytest.raises(GatewayUnavailable, match="rubbish"):
            await question


@pytest.mark.parametrize("body", [{"paid": True}, {"details": None}, {"details": {}}, [], "x"])
async def test_the_nodes_answer_is_read_as_strictly(fake: FakeLnbits, body: Any) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    page = httpx.Response(200, json={"data": fake.payments, "total": 1})
    fake.next_answers += [page, httpx.Response(200, json=body)]
    with pytest.raises(GatewayUnavailable, match="rubbish"):
        await gateway.fetch(made.id)


async def test_the_nodes_answer_must_be_about_the_same_payment(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made, other = await gateway.create(FIVE_USD), await gateway.create(FIVE_USD)
    fake.pay(other.id)
    page = httpx.Response(200, json={"data": [fake.payments[0]], "total": 1})
    fake.next_answers += [page, httpx.Response(200, json={"paid": True, "details": fake.payments[1]})]
    with pytest.raises(GatewayUnavailable, match="payment_hash"):
        await gateway.fetch(made.id)


# list_since


async def test_a_listing_is_read_page_by_page_even_where_times_are_equal(
    fake: FakeLnbits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lnbits, "PAGE_PAYMENTS", 3)
    gateway = a_gateway(fake)
    made = []
    for number in range(8):
        made.append(await gateway.create(NewInvoice(f"o{number}", "btc-lightning", Decimal(500), "SATS", 15, 1440)))
        fake.wait(seconds=number % 2)
    fake.payments.insert(0, fake.payments[0] | {"tag": None, "extra": None, "payment_hash": UNKNOWN})

    listed = await gateway.list_since(START)

    assert [one.id for one in listed] == [one.id for one in made]
    assert [one.id for one in await gateway.list_since(made[4].created_at)] == [one.id for one in made[3:]][1:]


async def test_a_listing_that_cannot_go_on_says_so(fake: FakeLnbits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lnbits, "PAGE_PAYMENTS", 3)
    gateway = a_gateway(fake)
    for _ in range(4):
        await gateway.create(FIVE_USD)
    with pytest.raises(GatewayUnavailable, match="no further than 3 payments"):
        await gateway.list_since(START)


# Webhooks


CALLBACK_REFUSED = {
    "detail": "Callback URL origin 'http://127.0.0.1:8080' is not allowed. Please check your admin settings."
}
OWN_ADDRESS = "http://127.0.0.1:8080/webhooks/lnbits"


@pytest.mark.parametrize("status", [400, 520])
async def test_an_invoice_is_made_without_the_webhook_that_lnbits_refuses_and_the_operator_is_told(
    fake: FakeLnbits, status: int
) -> None:
    clock = Clock()
    gateway = a_gateway(fake, webhook_url=OWN_ADDRESS, monotonic=clock)
    fake.next_answers.append(httpx.Response(status, json={**CALLBACK_REFUSED, "status": "failed"}))
    assert gateway.troubles() == ()
    await gateway.create(FIVE_USD)
    sent = [json.loads(request.content) for request in fake.requests if request.method == "POST"]
    assert ["webhook" in body for body in sent] == [True, False]
    [trouble] = gateway.troubles()
    assert OWN_ADDRESS in trouble
    assert "LNBITS_WEBHOOK=off" in trouble

    await gateway.create(replace(FIVE_USD, order_id="order-2"))  # it is not asked again for a while
    assert len(fake.payments) == 2
    assert "webhook" not in json.loads(fake.requests[-1].content)
    clock.seconds += WEBHOOK_AGAIN_SECONDS
    await gateway.create(replace(FIVE_USD, order_id="order-3"))
    assert json.loads(fake.requests[-1].content)["webhook"] == OWN_ADDRESS
    assert gateway.troubles() == ()


async def test_a_refusal_without_a_webhook_is_asked_once_only(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake, webhook_url=OWN_ADDRESS)
    fake.next_answers += [httpx.Response(400, json=CALLBACK_REFUSED)] * 2
    with pytest.raises(GatewayRefused, match="Callback URL"):
        await gateway.create(FIVE_USD)
    assert fake.payments == []
    assert gateway.troubles() == ()
    fake.next_answers.append(httpx.Response(400, json={"detail": "amount too high"}))
    with pytest.raises(GatewayRefused, match="too high"):
        await gateway.create(FIVE_USD)
    assert len(fake.requests) == 3


async def test_a_webhook_is_a_hint_and_both_deliveries_are_the_same_one(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    fake.pay(made.id)
    body = fake.webhook(made.id)
    first, second = gateway.read_webhook(body, {}), gateway.read_webhook(body, {})
    assert first == second
    assert first is not None
    assert (first.delivery_id, first.type, first.invoice_id) == (f"{made.id}:success", "lnbits", made.id)
    assert gateway.read_webhook(json.loads(body).encode(), {}) == first


async def test_a_webhook_without_our_token_is_not_let_in(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    made = await gateway.create(FIVE_USD)
    body = fake.webhook(made.id)
    token = fake.payments[0]["extra"]["hint_token"].encode()
    with pytest.raises(InvalidSignature):
        gateway.read_webhook(body.replace(token, b"0" * 32), {})
    with pytest.raises(InvalidSignature):
        gateway.read_webhook(body.replace(b"order-1", b"order-2"), {})
    with pytest.raises(InvalidSignature):
        a_gateway(fake, invoice_key="another-key").read_webhook(body, {})


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"{}", b'"', b'"{"', b'"\\"\\""', b"\xff", b'"\xff"', b"[" * 9999, b'"' + b"[" * 9999 + b'"', b"7"],
)
async def test_junk_is_no_hint(fake: FakeLnbits, body: bytes) -> None:
    assert a_gateway(fake).read_webhook(body, {}) is None


@pytest.mark.parametrize(
    "change", [{"payment_hash": "../x"}, {"extra": None}, {"extra": {"tag": "lnurlp"}}, {"status": 1}, {"status": "\n"}]
)
async def test_a_webhook_about_something_else_is_no_hint(fake: FakeLnbits, change: dict[str, Any]) -> None:
    gateway = a_gateway(fake)
    await gateway.create(FIVE_USD)
    body = json.dumps(json.dumps(fake.payments[0] | change)).encode()
    assert gateway.read_webhook(body, {}) is None


# Rates, health, patience, settings


async def test_the_rate_is_our_own_sources(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    rate = await gateway.rate("BTC")
    assert (rate.usd, rate.source, rate.quoted_at) == (Decimal(64_000), "fixed", START)
    with pytest.raises(GatewayRefused, match="LTC"):
        await gateway.rate("LTC")


async def test_it_is_healthy_with_an_answer_a_known_key_and_a_rate(fake: FakeLnbits) -> None:
    assert await a_gateway(fake).is_healthy()
    assert not await a_gateway(fake, invoice_key="another").is_healthy()
    assert not await a_gateway(fake, rates=FixedRateSource({})).is_healthy()
    for answer in (httpx.ConnectError("no"), httpx.Response(200, text="hello"), httpx.Response(503), OSError()):
        fake.next_answers.append(answer)
        assert not await a_gateway(fake).is_healthy()
    fake.next_answers.append(60)
    assert not await a_gateway(fake, patience=Patience(health_seconds=0.01)).is_healthy()


async def test_get_is_asked_again_and_the_breaker_gives_lnbits_a_rest(fake: FakeLnbits) -> None:
    clock = Clock()
    gateway = a_gateway(fake, clock, patience=Patience(backoff_seconds=0, break_after=2))
    fake.next_answers += [httpx.Response(503), httpx.ReadTimeout("slow")]
    assert await gateway.fetch(UNKNOWN) is None
    fake.next_answers += [httpx.ConnectError("no")] * 6
    for _ in range(2):
        with pytest.raises(GatewayUnavailable, match="could not be reached"):
            await gateway.fetch(UNKNOWN)
    count = len(fake.requests)
    with pytest.raises(GatewayUnavailable, match="LNbits is not answering"):
        await gateway.fetch(UNKNOWN)
    assert len(fake.requests) == count
    clock.seconds += 10
    assert await gateway.fetch(UNKNOWN) is None


async def test_refusals_do_not_open_the_breaker(fake: FakeLnbits) -> None:
    gateway = a_gateway(fake)
    fake.next_answers += [problem(520, "too high", status="failed")] * 9
    for _ in range(9):
        with pytest.raises(GatewayRefused):
            await gateway.create(FIVE_USD)
    assert await gateway.create(FIVE_USD)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"base_url": "lnbits.example"}, "LNBITS_URL"),
        ({"base_url": f"{URL}/?usr=1"}, "LNBITS_URL"),
        ({"invoice_key": ""}, "LNBITS_INVOICE_KEY"),
        ({"invoice_key": "a\nb"}, "LNBITS_INVOICE_KEY"),
        ({"webhook_url": "/webhooks/lnbits"}, "webhook URL"),
    ],
)
def test_a_setting_that_cannot_be_right_is_named(fake: FakeLnbits, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        a_gateway(fake, **settings)
