"""What the BTCPay adapter promises, on a fake Greenfield server without a network."""

import asyncio
import hashlib
import hmac
import json
import logging
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.adapters import btcpay_wire
from app.adapters.asking import MAX_ANSWER_BYTES, Patience
from app.adapters.breaker import Breaker
from app.adapters.btcpay import BtcpayGateway
from app.adapters.btcpay_wire import our_method, speed_policy
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
from tests.adapters.fake_greenfield import (
    API_KEY,
    BASE_URL,
    CREATED,
    SECRET,
    STORE,
    Clock,
    FakeGreenfield,
    a_gateway,
    a_method,
    a_payment,
    an_invoice,
    problem,
)

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data" / "btcpay-webhook-samples.json"
LIGHTNING = NewInvoice("order-1", "btc-lightning", Decimal("5"), "USD", 15, 1440)


@pytest.fixture
def btcpay() -> FakeGreenfield:
    return FakeGreenfield()


def a_hint(**changes: Any) -> bytes:
    event = {
        "deliveryId": "delivery-2",
        "originalDeliveryId": "delivery-1",
        "type": "InvoiceSettled",
        "storeId": STORE,
        "invoiceId": "Inv1",
        **changes,
    }
    return json.dumps({key: value for key, value in event.items() if value is not ...}, indent=2).encode()


def signed(body: bytes, secret: str = SECRET) -> dict[str, str]:
    return {"btcpay-sig": "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}


async def test_it_is_an_invoice_gateway(btcpay: FakeGreenfield) -> None:
    gateway: InvoiceGateway = a_gateway(btcpay)
    assert isinstance(gateway, InvoiceGateway)
    assert gateway.name == "btcpay"


# create


async def test_create_says_every_checkout_field_and_gives_the_invoice_ready_to_be_paid(btcpay: FakeGreenfield) -> None:
    wanted = replace(LIGHTNING, receipt_url="https://us.example/receipts/r")
    invoice = await a_gateway(btcpay, service_name="Robot Juice").create(wanted)

    post, methods = btcpay.requests
    assert (post.method, post.url.path) == ("POST", f"/api/v1/stores/{STORE}/invoices")
    assert post.headers["authorization"] == f"token {API_KEY}"
    assert json.loads(post.content) == {
        "amount": "5",
        "currency": "USD",
        "metadata": {
            "orderId": "order-1",
            "orderUrl": "https://us.example/receipts/r",
            "itemDesc": "Robot Juice: top-up of 5 USD",
            "receiptData": {"Service": "Robot Juice", "Top-up": "5 USD", "Number": "order-1"},
        },
        "checkout": {
            "redirectURL": "https://us.example/receipts/r",
            "paymentMethods": ["BTC-LN"],
            "expirationMinutes": 15,
            "monitoringMinutes": 1440,
            "speedPolicy": "MediumSpeed",
            "paymentTolerance": 0,
            "lazyPaymentMethods": False,
        },
    }
    assert methods.url.path == f"/api/v1/stores/{STORE}/invoices/Inv1/payment-methods"
    assert (invoice.id, invoice.order_id, invoice.method) == ("Inv1", "order-1", "btc-lightning")
    assert invoice.status is InvoiceStatus.NEW
    assert invoice.destination == "lnbc50u1example"
    assert invoice.created_at == datetime.fromtimestamp(CREATED, UTC)
    assert invoice.rate == Decimal("100000.00")


@pytest.mark.parametrize("method", btcpay_wire.METHOD_IDS)
async def test_every_method_of_ours_is_asked_for_by_btcpays_name(btcpay: FakeGreenfield, method: str) -> None:
    invoice = await a_gateway(btcpay).create(NewInvoice("o", method, Decimal(20), "USD", 60, 10080))
    assert invoice.method == method
    asked = json.loads(btcpay.requests[0].content)["checkout"]["paymentMethods"]
    assert asked == [btcpay_wire.METHOD_IDS[method]]


async def test_amounts_are_sent_as_plain_decimals(btcpay: FakeGreenfield) -> None:
    await a_gateway(btcpay).create(NewInvoice("o", "btc-lightning", Decimal("1E+3"), "SATS", 15, 60))
    await a_gateway(btcpay).create(NewInvoice("o", "btc", Decimal("1E-8"), "BTC", 15, 60))
    amounts = [json.loads(one.content)["amount"] for one in btcpay.requests if one.method == "POST"]
    assert amounts == ["1000", "0.00000001"]


async def test_a_method_we_do_not_have_is_refused_unasked(btcpay: FakeGreenfield) -> None:
    with pytest.raises(GatewayRefused, match="doge"):
        await a_gateway(btcpay).create(NewInvoice("o", "doge", Decimal(1), "USD", 15, 60))
    assert btcpay.requests == []


@pytest.mark.parametrize(
    ("method", "amount", "currency", "policy"),
    [
        ("btc-lightning", "1000000", "USD", "MediumSpeed"),
        ("btc", "999.99", "USD", "MediumSpeed"),
        ("btc", "1000", "USD", "LowMediumSpeed"),
        ("btc", "0.00999999", "BTC", "MediumSpeed"),
        ("lbtc", "0.1", "LBTC", "LowMediumSpeed"),
        ("ltc", "100", "LTC", "LowMediumSpeed"),
        ("xmr", "0.01", "XMR", "MediumSpeed"),
        ("btc", "1", "JPY", "LowMediumSpeed"),
    ],
)
def test_larger_amounts_wait_for_two_confirmations(method: str, amount: str, currency: str, policy: str) -> None:
    assert speed_policy(method, Decimal(amount), currency) == policy


@pytest.mark.parametrize(
    ("made", "methods", "message"),
    [
        ({"metadata": {"orderId": "order-2"}}, [a_method()], "another order id"),
        ({"metadata": {}}, [a_method()], "another order id"),
        ({"currency": "EUR"}, [a_method()], "currency is EUR"),
        ({"amount": "500.00"}, [a_method()], "amount is 500.00, not 5 USD"),
        ({}, [], "payment methods are"),
        ({}, [a_method("BTC-CHAIN")], "BTC-CHAIN"),
        ({}, [a_method("BTC-LNURL")], "BTC-LNURL"),
        ({}, [a_method(), a_method("BTC-CHAIN")], "payment methods are"),
        ({}, [a_method(activated=False)], "not active"),
        ({}, [a_method(destination="")], "not active"),
        ({}, [a_method(destination=None)], "not active"),
    ],
)
async def test_an_invoice_that_is_not_what_was_asked_for_is_refused(
    btcpay: FakeGreenfield, made: dict[str, Any], methods: list[dict[str, Any]], message: str
) -> None:
    btcpay.next_answers += [httpx.Response(200, json=an_invoice(**made)), httpx.Response(200, json=methods)]
    with pytest.raises(GatewayRefused, match=message):
        await a_gateway(btcpay).create(LIGHTNING)


async def test_an_amount_that_btcpay_rounded_is_taken_as_it_is(btcpay: FakeGreenfield) -> None:
    btcpay.next_answers += [httpx.Response(200, json=an_invoice(amount="5.01"))]
    btcpay.add(an_invoice(), a_method())
    invoice = await a_gateway(btcpay).create(NewInvoice("order-1", "btc-lightning", Decimal("5.009"), "USD", 15, 60))
    assert invoice.amount == Decimal("5.01")


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
        httpx.Response(502),
        httpx.Response(503),
        httpx.Response(429),
        httpx.Response(500),
        httpx.Response(200, text="<html>"),
        httpx.Response(204),
    ],
)
async def test_a_post_is_never_repeated(btcpay: FakeGreenfield, answer: httpx.Response | Exception) -> None:
    btcpay.next_answers.append(answer)
    with pytest.raises(GatewayUnavailable):
        await a_gateway(btcpay).create(LIGHTNING)
    assert [one.method for one in btcpay.requests] == ["POST"]


async def test_a_lost_answer_to_create_is_found_again_by_order_id(btcpay: FakeGreenfield) -> None:
    gateway = a_gateway(btcpay)
    btcpay.next_answers += [httpx.Response(200, json=an_invoice()), *[httpx.ReadTimeout("slow")] * 3]
    btcpay.add(an_invoice(), a_method())
    with pytest.raises(GatewayUnavailable):
        await gateway.create(LIGHTNING)
    assert [one.id for one in await gateway.find("order-1")] == ["Inv1"]


async def test_a_validation_error_is_a_refusal_with_paths_and_messages(btcpay: FakeGreenfield) -> None:
    complaint = [{"path": "checkout.paymentMethods[0]", "message": "Invalid PaymentMethodId"}, {"path": "amount"}]
    btcpay.next_answers.append(httpx.Response(422, json=complaint))
    with pytest.raises(GatewayRefused, match=r"checkout\.paymentMethods\[0\]: Invalid PaymentMethodId; amount:"):
        await a_gateway(btcpay).create(LIGHTNING)


async def test_a_generic_error_is_a_refusal_on_one_line(btcpay: FakeGreenfield) -> None:
    btcpay.next_answers.append(problem(400, "generic-error", "Error retrieving a matching\n payment method or rate."))
    with pytest.raises(GatewayRefused, match=r"^BTCPay refused: Error retrieving a matching payment method or rate\.$"):
        await a_gateway(btcpay).create(LIGHTNING)


async def test_a_400_that_is_not_btcpays_own_is_no_refusal(btcpay: FakeGreenfield) -> None:
    btcpay.next_answers.append(httpx.Response(400, text="<h1>Bad Request</h1>"))
    with pytest.raises(GatewayUnavailable, match="HTTP 400"):
        await a_gateway(btcpay).create(LIGHTNING)


# fetch


async def test_fetch_tells_the_invoice_with_all_its_payments(btcpay: FakeGreenfield) -> None:
    replaced = a_payment("tx-0", status="Invalid")
    method = a_method(payments=[replaced, a_payment("tx-1", fee="0.00000001")], due="-0.00001", paymentMethodPaid="1.5")
    btcpay.add(an_invoice(status="Settled", additionalStatus="PaidOver"), method)

    invoice = await a_gateway(btcpay).fetch("Inv1")

    assert invoice is not None
    assert invoice.status is InvoiceStatus.SETTLED
    assert invoice.additional_status is AdditionalStatus.PAID_OVER
    assert invoice.due == Decimal("-0.00001")
    assert invoice.paid == Decimal("1.5")
    assert [(one.id, one.status) for one in invoice.payments] == [
        ("tx-0", PaymentStatus.INVALID),
        ("tx-1", PaymentStatus.SETTLED),
    ]
    assert invoice.payments[1].fee == Decimal("0.00000001")
    assert invoice.payments[1].received_at == datetime.fromtimestamp(CREATED + 10, UTC)
    assert [str(one.url) for one in btcpay.requests] == [
        f"{BASE_URL}/api/v1/stores/{STORE}/invoices/Inv1",
        f"{BASE_URL}/api/v1/stores/{STORE}/invoices/Inv1/payment-methods?onlyAccountedPayments=false",
    ]


async def test_fetch_is_none_only_when_btcpay_says_that_the_invoice_is_unknown(btcpay: FakeGreenfield) -> None:
    gateway = a_gateway(btcpay)
    assert await gateway.fetch("Unknown") is None
    btcpay.next_answers.append(httpx.Response(404, text="nginx"))
    with pytest.raises(GatewayUnavailable, match="BTCPAY_URL and BTCPAY_STORE_ID"):
        await gateway.fetch("Inv1")
    with pytest.raises(GatewayUnavailable, match="BTCPAY_STORE_ID"):
        await a_gateway(btcpay, store_id="Other").fetch("Inv1")


@pytest.mark.parametrize("invoice_id", ["", "..", "../webhooks", "a/b", "a?b", "a" * 65, "é", "a\n"])
async def test_an_id_that_btcpay_cannot_have_made_is_not_asked_for(btcpay: FakeGreenfield, invoice_id: str) -> None:
    assert await a_gateway(btcpay).fetch(invoice_id) is None
    assert btcpay.requests == []


async def test_an_answer_of_btcpay_1_is_understood(btcpay: FakeGreenfield) -> None:
    old = a_method(paymentMethod="BTC-LightningNetwork", networkFee="0.00000007")
    del old["paymentMethodId"], old["paymentMethodFee"]
    btcpay.add(an_invoice(), old)
    invoice = await a_gateway(btcpay).fetch("Inv1")
    assert invoice is not None
    assert (invoice.method, invoice.fee) == ("btc-lightning", Decimal("0.00000007"))


@pytest.mark.parametrize(
    ("spelling", "ours"),
    [
        ("BTC-LN", "btc-lightning"),
        ("btc-ln", "btc-lightning"),
        ("BTC_LightningLike", "btc-lightning"),
        ("BTC-LightningNetwork", "btc-lightning"),
        ("BTC-LNURL", None),
        ("BTC", "btc"),
        ("BTC-CHAIN", "btc"),
        ("BTC_BTCLike", "btc"),
        ("LTC", "ltc"),
        ("LBTC-CHAIN", "lbtc"),
        ("XMR-MoneroLike", "xmr"),
        ("XMR_MoneroLike", "xmr"),
        ("XMR", "xmr"),
        ("LTC-LN", None),
        ("DOGE-CHAIN", None),
        ("", None),
    ],
)
def test_old_and_new_spellings_of_payment_methods_mean_the_same(spelling: str, ours: str | None) -> None:
    assert our_method(spelling) == ours


async def test_a_price_that_its_node_rounded_down_has_a_negative_fee_and_is_worth_the_price(
    btcpay: FakeGreenfield,
) -> None:
    payment = a_payment("hash", value="0.00015384", fee="-0.00000000616")
    method = a_method(amount="0.00015384", paymentMethodFee="-0.00000000616", rate="65000", payments=[payment])
    btcpay.add(an_invoice(status="Settled", amount="10.00"), method)
    invoice = await a_gateway(btcpay).fetch("Inv1")
    assert invoice is not None
    assert (invoice.total, invoice.fee) == (Decimal("0.00015384"), Decimal("-0.00000000616"))
    assert invoice.payments[0].fee == Decimal("-0.00000000616")
    assert owed(invoice, None, None, {}).credit_nusd == 10_000_000_000


async def test_the_additional_status_that_only_the_swagger_knows_is_none(btcpay: FakeGreenfield) -> None:
    btcpay.add(an_invoice(status="Invalid", additionalStatus="Invalid"), a_method())
    invoice = await a_gateway(btcpay).fetch("Inv1")
    assert invoice is not None
    assert (invoice.status, invoice.additional_status) == (InvoiceStatus.INVALID, AdditionalStatus.NONE)


async def test_decimals_are_read_digit_by_digit_from_strings_and_numbers(btcpay: FakeGreenfield) -> None:
    btcpay.add(an_invoice(amount="0.100000000000000001"), a_method(rate="80.1234567890123456789999999999"))
    text = json.dumps(btcpay.invoices[0]).replace('"0.100000000000000001"', "0.100000000000000001")
    btcpay.next_answers.append(httpx.Response(200, text=text))
    invoice = await a_gateway(btcpay).fetch("Inv1")
    assert invoice is not None
    assert invoice.amount == Decimal("0.100000000000000001")
    assert invoice.rate == Decimal("80.123456789012345678")  # .NET's 28 digits, cut to 18


RUBBISH_DECIMALS: list[Any] = [None, True, 1.5e300, "9" * 16, "", "NaN", "Infinity", "-1", "1e5", "1E-8"]
RUBBISH_DECIMALS += ["1_000", "1,5", " 1", "1.", ".5", "٣"]


@pytest.mark.parametrize("value", [*RUBBISH_DECIMALS, [], {}, "0." + "1" * 29])
@pytest.mark.parametrize("field", ["amount", "rate", "total", "paid", "fee", "value"])
async def test_a_decimal_that_is_none_is_rubbish(btcpay: FakeGreenfield, field: str, value: Any) -> None:
    names = {"total": "amount", "paid": "paymentMethodPaid", "fee": "paymentMethodFee", "rate": "rate"}
    invoice = an_invoice(amount=value) if field == "amount" else an_invoice()
    method = a_method(payments=[a_payment(value=value)]) if field == "value" else a_method()
    btcpay.add(invoice, method | ({names[field]: value} if field in names else {}))
    with pytest.raises(GatewayUnavailable, match=r"answered rubbish: (invoice|paymentMethods)\."):
        await a_gateway(btcpay).fetch("Inv1")


INVOICE_RUBBISH: list[tuple[dict[str, Any], str]] = [
    ({"id": "Inv2"}, "invoice.id"),
    ({"id": 5}, "invoice.id"),
    ({"storeId": "Other"}, "invoice.storeId"),
    ({"storeId": None}, "invoice.storeId"),
    ({"status": "Paid"}, "invoice.status"),
    ({"status": "settled"}, "invoice.status"),
    ({"status": None}, "invoice.status"),
    ({"additionalStatus": "Weird"}, "invoice.additionalStatus"),
    ({"additionalStatus": None}, "invoice.additionalStatus"),
    ({"createdTime": "2026-01-01"}, "invoice.createdTime"),
    ({"expirationTime": -1}, "invoice.expirationTime"),
    ({"monitoringExpiration": 10**12}, "invoice.monitoringExpiration"),
    ({"monitoringExpiration": 1.5}, "invoice.monitoringExpiration"),
    ({"amount": "0"}, "invoice.amount"),
    ({"currency": ""}, "invoice.currency"),
    ({"checkoutLink": "https://x/\x00"}, "invoice.checkoutLink"),
    ({"metadata": []}, "invoice.metadata"),
]


@pytest.mark.parametrize(("changes", "field"), INVOICE_RUBBISH)
async def test_a_wrong_field_of_an_invoice_is_rubbish_and_named(
    btcpay: FakeGreenfield, changes: dict[str, Any], field: str
) -> None:
    btcpay.next_answers.append(httpx.Response(200, json=an_invoice(**changes)))
    btcpay.add(an_invoice(), a_method())
    with pytest.raises(GatewayUnavailable, match=f"answered rubbish: {field}$"):
        await a_gateway(btcpay).fetch("Inv1")


METHOD_RUBBISH: list[tuple[Any, str]] = [
    ({}, "paymentMethods"),
    ([], "paymentMethods, which should be exactly one of ours"),
    ([a_method(), a_method("BTC-CHAIN")], "exactly one of ours"),
    ([a_method("DOGE-CHAIN")], "exactly one of ours"),
    ([a_method(payments=None)], "payments"),
    ([a_method(activated="yes")], "activated"),
    ([a_method(rate="0")], "paymentMethods.rate"),
    ([a_method(rate="0.0000000000000000001")], "paymentMethods.rate"),
    ([a_method(rate="-5")], "paymentMethods.rate"),
    ([a_method(due="x")], "paymentMethods.due"),
    ([a_method(destination=["lnbc"])], "destination"),
    ([a_method(payments=[a_payment(status="Complete")])], "status"),
    ([a_method(payments=[a_payment(receivedDate=None)])], "receivedDate"),
    ([a_method(payments=[a_payment("")])], "payments.*id"),
    ([a_method(payments=[a_payment(value="0.5", fee="-0.5")])], "payments.fee"),
    ([a_method(amount="0.5", paymentMethodFee="-0.5")], "paymentMethodFee"),
    ([a_method(payments=[a_payment("same"), a_payment("same")])], "payments.id"),
]


@pytest.mark.parametrize(("methods", "field"), METHOD_RUBBISH)
async def test_wrong_payment_methods_are_rubbish_and_named(btcpay: FakeGreenfield, methods: Any, field: str) -> None:
    btcpay.next_answers += [httpx.Response(200, json=an_invoice()), httpx.Response(200, json=methods)]
    with pytest.raises(GatewayUnavailable, match=f"answered rubbish: .*{field}"):
        await a_gateway(btcpay).fetch("Inv1")


@pytest.mark.parametrize(
    "field", sorted(set(an_invoice()) - {"paidAmount", "type", "archived", "metadata", "checkout"})
)
async def test_a_missing_field_is_rubbish_and_named(btcpay: FakeGreenfield, field: str) -> None:
    invoice = an_invoice()
    del invoice[field]
    btcpay.next_answers.append(httpx.Response(200, json=invoice))
    with pytest.raises(GatewayUnavailable, match=f"answered rubbish: invoice.{field}$"):
        await a_gateway(btcpay).fetch("Inv1")


NO_INVOICES = [b"", b"<html>", b"null", b"[]", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("body", [*NO_INVOICES, b'{"id": NaN}', b'{"id":"\xff"}', b'{"x":' + b"[" * 100_000])
async def test_an_answer_that_is_no_invoice_is_rubbish(btcpay: FakeGreenfield, body: bytes) -> None:
    btcpay.next_answers.append(httpx.Response(200, content=body))
    with pytest.raises(GatewayUnavailable, match="answered rubbish: invoice"):
        await a_gateway(btcpay).fetch("Inv1")


async def test_an_endless_answer_is_cut_off(btcpay: FakeGreenfield) -> None:
    btcpay.next_answers.append(httpx.Response(200, content=b" " * (MAX_ANSWER_BYTES + 1)))
    with pytest.raises(GatewayUnavailable, match="rubbish: more than"):
        await a_gateway(btcpay).fetch("Inv1")


# The network


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
        httpx.Response(502),
        httpx.Response(503),
        httpx.Response(504),
    ],
)
async def test_a_get_is_tried_three_times(btcpay: FakeGreenfield, failure: httpx.Response | Exception) -> None:
    btcpay.add(an_invoice(), a_method())
    btcpay.next_answers += [failure, failure]
    assert await a_gateway(btcpay).fetch("Inv1") is not None
    assert len(btcpay.requests) == 4

    btcpay.next_answers += [failure] * 3
    with pytest.raises(GatewayUnavailable):
        await a_gateway(btcpay).fetch("Inv1")
    assert len(btcpay.requests) == 7


@pytest.mark.parametrize("status", [500, 429, 400, 422, 301, 302, 307, 204, 409, 418])
async def test_other_statuses_are_not_retried_and_mean_unavailable(btcpay: FakeGreenfield, status: int) -> None:
    btcpay.next_answers.append(
        httpx.Response(status, json={"code": "x"}, headers={"location": "https://evil.example/"})
    )
    with pytest.raises(GatewayUnavailable, match=f"HTTP {status}"):
        await a_gateway(btcpay).fetch("Inv1")
    assert len(btcpay.requests) == 1


async def test_a_redirect_is_never_followed_even_by_a_client_that_would(btcpay: FakeGreenfield) -> None:
    client = httpx.AsyncClient(transport=httpx.MockTransport(btcpay), follow_redirects=True)
    btcpay.next_answers.append(httpx.Response(302, headers={"location": "https://evil.example/"}))
    with pytest.raises(GatewayUnavailable, match="BTCPAY_URL must be its final address"):
        await a_gateway(btcpay, client=client).fetch("Inv1")
    assert len(btcpay.requests) == 1


async def test_a_client_with_habits_of_its_own_still_sends_our_key(btcpay: FakeGreenfield) -> None:
    client = httpx.AsyncClient(transport=httpx.MockTransport(btcpay), auth=("user", "password"))
    await a_gateway(btcpay, client=client).rate("BTC")
    assert btcpay.requests[0].headers["authorization"] == f"token {API_KEY}"


async def test_a_question_ends_at_its_deadline(btcpay: FakeGreenfield) -> None:
    btcpay.next_answers.append(30.0)
    gateway = a_gateway(btcpay, patience=Patience(deadline_seconds=0.05))
    with pytest.raises(GatewayUnavailable, match=r"did not answer within 0\.05 s"):
        await gateway.fetch("Inv1")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (problem(401, "unauthenticated"), "BTCPay refused our API key (HTTP 401); see BTCPAY_API_KEY"),
        (httpx.Response(403, text=""), "BTCPay refused our API key (HTTP 403); see BTCPAY_API_KEY"),
        (
            problem(403, "missing-permission", permission="btcpay.store.canviewinvoices"),
            "BTCPay refused our API key (missing permission btcpay.store.canviewinvoices); see BTCPAY_API_KEY",
        ),
    ],
)
async def test_a_refused_api_key_is_the_operators_fault(
    btcpay: FakeGreenfield, answer: httpx.Response, message: str
) -> None:
    gateway = a_gateway(btcpay)
    for ask in (gateway.create(LIGHTNING), gateway.fetch("Inv1"), gateway.rate("BTC")):
        btcpay.next_answers.append(answer)
        with pytest.raises(GatewayUnavailable) as refusal:
            await ask
        assert str(refusal.value) == message


# The breaker


async def break_it(gateway: BtcpayGateway, btcpay: FakeGreenfield, times: int = 5, status: int = 500) -> None:
    for _ in range(times):
        btcpay.next_answers.append(httpx.Response(status))
        with pytest.raises(GatewayUnavailable, match=f"HTTP {status}"):
            await gateway.fetch("Inv1")


async def test_after_five_failures_in_a_row_it_fails_fast_and_heals_by_itself(btcpay: FakeGreenfield) -> None:
    clock = Clock()
    gateway = a_gateway(btcpay, clock)
    btcpay.add(an_invoice(), a_method())

    await break_it(gateway, btcpay)
    clock.seconds += 2.5
    with pytest.raises(GatewayUnavailable, match="retry in 8 s"):
        await gateway.create(LIGHTNING)
    assert len(btcpay.requests) == 5

    clock.seconds += 7.5
    assert await gateway.fetch("Inv1") is not None
    btcpay.next_answers.append(0.01)
    assert None not in await asyncio.gather(*(gateway.fetch("Inv1") for _ in range(3)))


async def test_a_backend_that_asks_for_mercy_gets_it(btcpay: FakeGreenfield) -> None:
    gateway = a_gateway(btcpay)
    await break_it(gateway, btcpay, status=429)
    with pytest.raises(GatewayUnavailable, match="retry in 10 s"):
        await gateway.fetch("Inv1")


def fail_after(clock: Clock, seconds: float) -> None:
    clock.seconds += seconds
    raise GatewayUnavailable("slow")


def test_a_question_from_before_the_breaker_opened_does_not_prolong_the_cool_down() -> None:
    clock = Clock()
    breaker = Breaker("BTCPay", after=2, window_seconds=60, cooldown_seconds=10, monotonic=clock)
    with ExitStack() as under_way:
        for _ in range(3):
            under_way.enter_context(suppress(GatewayUnavailable))
            under_way.enter_context(breaker.watch())
            under_way.callback(fail_after, clock, seconds=7)
    with pytest.raises(GatewayUnavailable, match="retry in 3 s"), breaker.watch():
        pass


async def test_a_failed_probe_starts_the_next_cool_down(btcpay: FakeGreenfield) -> None:
    clock = Clock()
    gateway = a_gateway(btcpay, clock)
    await break_it(gateway, btcpay)
    clock.seconds += 10
    await break_it(gateway, btcpay, times=1)
    with pytest.raises(GatewayUnavailable, match="retry in 10 s"):
        await gateway.fetch("Inv1")


async def test_only_one_probe_goes_through(btcpay: FakeGreenfield) -> None:
    clock = Clock()
    gateway = a_gateway(btcpay, clock)
    await break_it(gateway, btcpay)
    clock.seconds += 10
    asked = len(btcpay.requests)
    btcpay.next_answers.append(0.05)
    answers = await asyncio.gather(*(gateway.rate("BTC") for _ in range(10)), return_exceptions=True)
    assert len(btcpay.requests) == asked + 1
    assert sum(isinstance(one, GatewayUnavailable) for one in answers) == 9


async def test_a_cancelled_probe_lets_the_next_one_through(btcpay: FakeGreenfield) -> None:
    clock = Clock()
    gateway = a_gateway(btcpay, clock)
    await break_it(gateway, btcpay)
    clock.seconds += 10
    btcpay.next_answers.append(30.0)
    probe = asyncio.create_task(gateway.rate("BTC"))
    await asyncio.sleep(0.01)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert (await gateway.rate("BTC")).usd == Decimal("64392.23")


async def test_failures_far_apart_or_with_an_answer_between_do_not_break_it(btcpay: FakeGreenfield) -> None:
    clock = Clock()
    gateway = a_gateway(btcpay, clock)
    for _ in range(3):
        await break_it(gateway, btcpay, times=4)
        await gateway.rate("BTC")
    for _ in range(3):
        await break_it(gateway, btcpay, times=4)
        clock.seconds += 61
    await gateway.rate("BTC")


async def test_answers_that_are_merely_wrong_do_not_break_it(btcpay: FakeGreenfield) -> None:
    gateway = a_gateway(btcpay)
    btcpay.add(an_invoice(amount="NaN"), a_method())
    for _ in range(10):
        with pytest.raises(GatewayUnavailable, match="rubbish"):
            await gateway.fetch("Inv1")
    assert (await gateway.rate("BTC")).usd == Decimal("64392.23")


# find, list_since


async def test_find_gives_exactly_the_orders_invoices_oldest_first(btcpay: FakeGreenfield) -> None:
    btcpay.add(an_invoice("Inv1"), a_method(payments=[a_payment()]))
    btcpay.add(an_invoice("Inv2", createdTime=CREATED + 5), a_method())
    btcpay.add(an_invoice("Inv3", metadata={"orderId": "order-10"}), a_method())
    listed = [{**one} for one in reversed(btcpay.invoices)]  # a server that filters by prefix
    btcpay.next_answers.append(httpx.Response(200, json=listed))

    found = await a_gateway(btcpay).find("order-1")

    assert [one.id for one in found] == ["Inv1", "Inv2"]
    assert found[0].payments[0].id == "hash-1"
    assert dict(btcpay.requests[0].url.params) == {"orderId": "order-1", "includeArchived": "true"}


async def test_find_of_nothing_is_empty(btcpay: FakeGreenfield) -> None:
    btcpay.add(an_invoice(metadata={}), a_method())
    assert list(await a_gateway(btcpay).find("")) == []
    assert btcpay.requests == []
    assert list(await a_gateway(btcpay).find("order-2")) == []


@pytest.mark.parametrize("includes_methods", [True, False])
@pytest.mark.parametrize("page_limit", [1000, 7])
async def test_list_since_pages_through_everything_oldest_first(
    btcpay: FakeGreenfield, includes_methods: bool, page_limit: int
) -> None:
    btcpay.includes_methods, btcpay.page_limit = includes_methods, page_limit
    count = 230 if includes_methods else 30
    for number in range(count):
        btcpay.add(an_invoice(f"Inv{number}", createdTime=CREATED + number // 3), a_method())

    found = await a_gateway(btcpay).list_since(datetime.fromtimestamp(CREATED + 1, UTC) + timedelta(seconds=0.5))

    assert [one.id for one in found] == [f"Inv{number}" for number in range(3, count)]
    first = btcpay.requests[0].url.params
    assert (first["startDate"], first["take"], first["skip"]) == (str(CREATED + 1), "100", "0")
    assert len(btcpay.requests) < 2 * count + 10


async def test_list_since_skips_what_others_made_in_the_same_store(btcpay: FakeGreenfield) -> None:
    btcpay.add(an_invoice("Pos1", metadata={"orderId": 7}, amount="NaN"), a_method())
    btcpay.add(an_invoice("Pos2", metadata={}, status="Strange"), a_method())
    btcpay.add(an_invoice("Pos3", amount="0"), a_method(), a_method("BTC-CHAIN"))
    btcpay.add(an_invoice("Pos4", amount="0"))
    btcpay.add(an_invoice("Inv1"), a_method())
    for includes_methods in (True, False):
        btcpay.includes_methods = includes_methods
        found = await a_gateway(btcpay).list_since(datetime.fromtimestamp(1, UTC))
        assert [one.id for one in found] == ["Inv1"]


async def test_an_invoice_made_while_paging_neither_hides_nor_doubles_another(btcpay: FakeGreenfield) -> None:
    for number in range(3):
        btcpay.add(an_invoice(f"Inv{number}"), a_method())
    pages = [["Inv2", "Inv1"], ["Inv1", "Inv0"], []]
    btcpay.next_answers += [
        httpx.Response(200, json=[an_invoice(one, paymentMethods=[a_method()]) for one in page]) for page in pages
    ]
    found = await a_gateway(btcpay).list_since(datetime.fromtimestamp(1, UTC))
    assert [one.id for one in found] == ["Inv0", "Inv1", "Inv2"]


async def test_list_since_keeps_to_its_date_even_where_the_server_does_not(btcpay: FakeGreenfield) -> None:
    page = [an_invoice(paymentMethods=[a_method()])]
    btcpay.next_answers += [httpx.Response(200, json=page), httpx.Response(200, json=[])]
    assert list(await a_gateway(btcpay).list_since(datetime.fromtimestamp(CREATED + 1, UTC))) == []


@pytest.mark.parametrize("body", [b"{}", b"null", b"[1]", b'[{"metadata":{"orderId":"o"}}]'])
async def test_a_rubbish_listing_is_unavailable(btcpay: FakeGreenfield, body: bytes) -> None:
    gateway = a_gateway(btcpay)
    for ask in (gateway.find("o"), gateway.list_since(datetime.now(UTC))):
        btcpay.next_answers.append(httpx.Response(200, content=body))
        with pytest.raises(GatewayUnavailable, match="rubbish: invoice"):
            await ask


# rate


async def test_rate_is_btcpays_with_source_and_time(btcpay: FakeGreenfield) -> None:
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    rate = await a_gateway(btcpay, now=lambda: noon).rate("BTC")
    assert (rate.usd, rate.source, rate.quoted_at) == (Decimal("64392.23"), "btcpay", noon)
    assert str(btcpay.requests[0].url) == f"{BASE_URL}/api/v1/stores/{STORE}/rates?currencyPair=BTC_USD"


async def test_liquid_bitcoin_has_a_rate_of_its_own(btcpay: FakeGreenfield) -> None:
    btcpay.rates = [{"currencyPair": "LBTC_USD", "rate": "64000"}]
    assert (await a_gateway(btcpay).rate("LBTC")).usd == Decimal(64000)
    assert btcpay.requests[0].url.params["currencyPair"] == "LBTC_USD"


async def test_no_rate_is_a_refusal_with_btcpays_reasons(btcpay: FakeGreenfield) -> None:
    btcpay.rates = [{"currencyPair": "BTC_USD", "errors": ["RateUnavailable", "kraken down"], "rate": None}]
    with pytest.raises(GatewayRefused, match="RateUnavailable; kraken down"):
        await a_gateway(btcpay).rate("BTC")
    btcpay.next_answers.append(httpx.Response(422, json=[{"path": "currencyPair", "message": "unknown"}]))
    with pytest.raises(GatewayRefused, match="currencyPair: unknown"):
        await a_gateway(btcpay).rate("BTC")
    with pytest.raises(GatewayRefused, match="DOGE"):
        await a_gateway(btcpay).rate("DOGE")


RATE_RUBBISH = [*[one for one in RUBBISH_DECIMALS if one is not None], "0", "0.0", "1000000000", "999999999999999"]


@pytest.mark.parametrize("rate", RATE_RUBBISH)
async def test_a_rate_that_cannot_be_is_rubbish(btcpay: FakeGreenfield, rate: Any) -> None:
    btcpay.rates = [{"currencyPair": "BTC_USD", "rate": rate}]
    with pytest.raises(GatewayUnavailable, match="answered rubbish: rates"):
        await a_gateway(btcpay).rate("BTC")


@pytest.mark.parametrize("rates", [[], {}, None, [{"currencyPair": "LTC_USD", "rate": "80"}], [{"rate": "80"}]])
async def test_an_answer_about_another_pair_is_rubbish(btcpay: FakeGreenfield, rates: Any) -> None:
    btcpay.rates = rates
    with pytest.raises(GatewayUnavailable, match="answered rubbish: rates"):
        await a_gateway(btcpay).rate("BTC")


# Webhooks


async def test_an_authentic_webhook_is_a_hint_under_its_original_delivery(btcpay: FakeGreenfield) -> None:
    body = a_hint()
    hint = a_gateway(btcpay).read_webhook(body, signed(body))
    assert hint is not None
    assert (hint.delivery_id, hint.type, hint.invoice_id) == ("delivery-1", "InvoiceSettled", "Inv1")


async def test_a_webhook_without_original_delivery_has_its_own(btcpay: FakeGreenfield) -> None:
    for missing in (..., None, ""):
        body = a_hint(originalDeliveryId=missing)
        hint = a_gateway(btcpay).read_webhook(body, signed(body))
        assert hint is not None
        assert hint.delivery_id == "delivery-2"


GOOD = signed(a_hint())["btcpay-sig"]


@pytest.mark.parametrize(
    "signature",
    [
        None,
        "",
        "sha256=",
        GOOD.removeprefix("sha256="),
        GOOD[:-1],
        GOOD + "0",
        GOOD + "\n",
        " " + GOOD,
        GOOD.replace("sha256", "sha1"),
        "sha256=" + "0" * 64,
        "sha256=" + "٣" * 64,
        "sha256=" + "é" * 64,
        signed(a_hint(), "another secret")["btcpay-sig"],
        signed(a_hint(), "")["btcpay-sig"],
        signed(a_hint() + b" ")["btcpay-sig"],
    ],
)
async def test_a_webhook_with_a_wrong_signature_is_not_authentic(btcpay: FakeGreenfield, signature: str | None) -> None:
    headers = {} if signature is None else {"btcpay-sig": signature}
    with pytest.raises(InvalidSignature):
        a_gateway(btcpay).read_webhook(a_hint(), headers)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b"\xff",
        b'{"x":' + b"[" * 100_000,
        a_hint(type=...),
        a_hint(deliveryId=...),
        a_hint(type=5),
        a_hint(deliveryId=""),
        a_hint(storeId="AnotherStore"),
        a_hint(invoiceId="../escape"),
        a_hint(deliveryId="nul\x00"),
    ],
)
async def test_an_authentic_webhook_that_makes_no_sense_is_none(btcpay: FakeGreenfield, body: bytes) -> None:
    assert a_gateway(btcpay).read_webhook(body, signed(body)) is None


async def test_a_webhook_that_is_about_no_invoice_is_a_hint_without_one(btcpay: FakeGreenfield) -> None:
    body = a_hint(invoiceId=..., storeId=...)
    hint = a_gateway(btcpay).read_webhook(body, signed(body))
    assert hint is not None
    assert hint.invoice_id is None


def test_every_webhook_of_the_samples_is_understood(btcpay: FakeGreenfield) -> None:
    if not SAMPLES.exists():
        pytest.skip(f"the webhook samples are not beside this checkout ({SAMPLES.name})")
    samples = json.loads(SAMPLES.read_text())
    for sample in samples["samples"].values():
        event, body = json.loads(sample["body"]), sample["body"].encode()
        gateway = a_gateway(btcpay, webhook_secret=samples["secret"], store_id=event["storeId"])
        headers = {name.lower(): value for name, value in sample["headers"].items()}
        hint = gateway.read_webhook(body, headers)
        assert hint is not None
        assert hint.type == event["type"]
        assert hint.delivery_id == event["originalDeliveryId"]
        assert hint.invoice_id == event["invoiceId"]
        with pytest.raises(InvalidSignature):
            gateway.read_webhook(json.dumps(event).encode(), headers)


# Health


async def test_it_is_healthy_when_btcpay_is_in_step_and_knows_our_key(btcpay: FakeGreenfield) -> None:
    assert await a_gateway(btcpay).is_healthy()
    assert not await a_gateway(btcpay, api_key="wrong").is_healthy()
    assert not await a_gateway(btcpay, store_id="Other").is_healthy()
    btcpay.synchronized = False
    assert not await a_gateway(btcpay).is_healthy()


@pytest.mark.parametrize(
    "answer",
    [httpx.ConnectError("down"), httpx.Response(500), httpx.Response(200, text="<html>"), httpx.Response(302), 30.0],
)
async def test_asking_for_health_never_raises(
    btcpay: FakeGreenfield, answer: httpx.Response | Exception | float
) -> None:
    btcpay.next_answers.append(answer)
    assert not await a_gateway(btcpay, patience=Patience(health_seconds=0.05)).is_healthy()


async def test_a_closed_gateway_is_not_healthy() -> None:
    gateway = BtcpayGateway(base_url=BASE_URL, api_key=API_KEY, store_id=STORE, webhook_secret=SECRET)
    await gateway.close()
    assert not await gateway.is_healthy()


async def test_close_leaves_a_borrowed_client_open(btcpay: FakeGreenfield) -> None:
    client = httpx.AsyncClient(transport=httpx.MockTransport(btcpay))
    await a_gateway(btcpay, client=client).close()
    assert not client.is_closed


# Settings and secrets


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("webhook_secret", ""),
        ("webhook_secret", "  "),
        ("api_key", ""),
        ("api_key", "secret\n"),
        ("api_key", "sécret"),
        ("store_id", ""),
        ("store_id", "../other"),
        ("base_url", ""),
        ("base_url", "btcpay.example"),
        ("base_url", "ftp://btcpay.example"),
        ("base_url", "https://user:secret@btcpay.example"),
        ("base_url", "https://btcpay.example/?secret"),
        ("base_url", "https://btcpay.example:secret"),
    ],
)
def test_a_setting_that_cannot_be_right_is_named_and_not_quoted(
    btcpay: FakeGreenfield, setting: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"BTCPAY_{'URL' if setting == 'base_url' else setting.upper()}") as refusal:
        a_gateway(btcpay, **{setting: value})
    assert "secret" not in str(refusal.value)


async def test_btcpay_may_live_under_a_path(btcpay: FakeGreenfield) -> None:
    with pytest.raises(GatewayUnavailable):
        await a_gateway(btcpay, base_url="https://example.com/pay/").fetch("Inv1")
    assert str(btcpay.requests[0].url) == f"https://example.com/pay/api/v1/stores/{STORE}/invoices/Inv1"


async def test_an_api_key_that_happens_to_stand_in_an_answer_does_not_change_it(btcpay: FakeGreenfield) -> None:
    btcpay.next_answers += [httpx.Response(200, json=an_invoice()), httpx.Response(200, json=[a_method()])]
    invoice = await a_gateway(btcpay, api_key="Inv1").fetch("Inv1")
    assert invoice is not None
    assert invoice.id == "Inv1"


async def test_secrets_are_in_no_repr_no_error_and_no_log(
    btcpay: FakeGreenfield, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = a_gateway(btcpay)
    said = [repr(gateway), str(gateway)]
    echo = f"cannot read Authorization: token {API_KEY}"
    btcpay.next_answers += [
        problem(400, "generic-error", echo),
        problem(403, echo, echo, permission=API_KEY + "x"),
        problem(400, API_KEY, ""),
        httpx.Response(500),
        httpx.ConnectError("down"),
    ]
    while btcpay.next_answers:
        with pytest.raises((GatewayRefused, GatewayUnavailable)) as refusal:
            await gateway.create(LIGHTNING)
        said += [repr(refusal.value), str(refusal.value)]
    with pytest.raises(InvalidSignature) as forged:
        gateway.read_webhook(a_hint(), {})
    said += [repr(forged.value), caplog.text]
    assert not [text for text in said if API_KEY in text or SECRET in text]
