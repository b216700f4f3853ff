"""The Greenfield routes as a client meets them, over HTTP."""

import asyncio
from decimal import Decimal
from typing import Any

import bolt11
import pytest

from app.sandbox.btcpay import LEAST_PERMISSIONS, SandboxConfig
from app.sandbox.methods import METHODS, find_method

from .conftest import INVOICES, KEY, STORE, Opener, Shop

# Who may ask


@pytest.mark.parametrize("header", [None, "token wrong", f"Bearer {KEY}", f"token {KEY}é"])
async def test_without_the_key_every_answer_is_401(shop: Shop, header: str | None) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    for path in (INVOICES, f"/api/v1/stores/{STORE}", "/api/v1/server/info", "/api/v1/api-keys/current"):
        answer = await shop.client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["code"] == "unauthenticated"


async def test_health_needs_no_key(shop: Shop) -> None:
    assert (await shop.client.get("/api/v1/health")).json() == {"synchronized": True}


async def test_another_store_is_forbidden(shop: Shop) -> None:
    answer = await shop.api("GET", "/api/v1/stores/AnotherStore/invoices")
    assert answer.status_code == 403
    body = answer.json()
    assert (body["code"], body["permission"]) == ("missing-permission", "btcpay.store.canviewinvoices")


async def test_a_key_with_the_least_permissions_cannot_mark_an_invoice_paid(open_shop: Opener) -> None:
    async with open_shop(permissions=LEAST_PERMISSIONS) as shop:
        invoice = await shop.create()
        answer = await shop.api("POST", f"{INVOICES}/{invoice['id']}/status", json={"status": "Settled"})
        assert answer.status_code == 403
        assert answer.json()["permission"] == "btcpay.store.canmodifyinvoices"


async def test_the_current_key_lists_its_permissions_for_the_store(shop: Shop) -> None:
    key = (await shop.api("GET", "/api/v1/api-keys/current")).json()
    assert key["apiKey"] == KEY
    assert f"btcpay.store.cancreateinvoice:{STORE}" in key["permissions"]


def test_secrets_do_not_show_in_the_configuration(tmp_path: Any) -> None:
    config = SandboxConfig(tmp_path, "http://127.0.0.1", STORE, "api-secret", "http://127.0.0.1/hook", "hook-secret")
    assert "api-secret" not in repr(config)
    assert "hook-secret" not in repr(config)


# Creating


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_can_be_paid_to(shop: Shop, method: str) -> None:
    invoice = await shop.create(method)
    (prompt,) = await shop.methods(invoice["id"])
    assert (prompt["paymentMethodId"], prompt["activated"]) == (method, True)
    assert prompt["destination"]
    assert prompt["destination"] in prompt["paymentLink"]
    assert prompt["paymentLink"].startswith(f"{METHODS[method].scheme}:")
    assert Decimal(prompt["due"]) == Decimal(prompt["amount"]) > 0
    assert prompt["payments"] == []


@pytest.mark.parametrize(
    ("method", "prefix", "length"),
    [("BTC-CHAIN", "bcrt1q", 44), ("LTC-CHAIN", "rltc1q", 44), ("LBTC-CHAIN", "ert1q", 43), ("XMR-CHAIN", "8", 95)],
)
async def test_addresses_look_like_their_chain(shop: Shop, method: str, prefix: str, length: int) -> None:
    (prompt,) = await shop.methods((await shop.create(method))["id"])
    assert prompt["destination"].startswith(prefix)
    assert len(prompt["destination"]) == length


async def test_payment_links_ask_for_what_is_due(shop: Shop) -> None:
    (bitcoin,) = await shop.methods((await shop.create("BTC-CHAIN"))["id"])
    assert bitcoin["paymentLink"] == f"bitcoin:{bitcoin['destination']}?amount=0.00015385"
    (monero,) = await shop.methods((await shop.create("XMR-CHAIN"))["id"])
    assert monero["paymentLink"] == f"monero:{monero['destination']}?tx_amount={Decimal(monero['due']).normalize():f}"


async def test_a_bolt11_is_signed_and_asks_for_the_amount_until_the_invoice_expires(shop: Shop) -> None:
    invoice = await shop.create("BTC-LN", "10.00", checkout={"expirationMinutes": 20})
    (prompt,) = await shop.methods(invoice["id"])
    decoded = bolt11.decode(prompt["destination"])
    assert decoded.is_regtest()
    assert decoded.amount_msat == Decimal(prompt["amount"]) * 100_000_000_000 == 15_384_616
    assert decoded.expiry_time == invoice["expirationTime"] == invoice["createdTime"] + 1200
    assert decoded.signature is not None


async def test_two_bolt11_come_from_one_node(shop: Shop) -> None:
    prompts = [(await shop.methods((await shop.create())["id"]))[0] for _ in range(2)]
    first, second = (bolt11.decode(prompt["destination"]) for prompt in prompts)
    assert first.payment_hash != second.payment_hash
    assert first.payee == second.payee


async def test_the_defaults_are_btcpays(shop: Shop) -> None:
    answer = await shop.api("POST", INVOICES, json={"amount": 5})
    invoice = answer.json()
    assert invoice["expirationTime"] - invoice["createdTime"] == 900
    assert invoice["monitoringExpiration"] - invoice["expirationTime"] == 86_400
    assert (invoice["currency"], invoice["type"], invoice["metadata"]) == ("USD", "Standard", {})
    assert invoice["checkout"]["paymentMethods"] == list(METHODS)
    assert invoice["checkout"]["speedPolicy"] == "MediumSpeed"


async def test_metadata_comes_back_as_it_was_given(shop: Shop) -> None:
    metadata = {"orderId": "ü-1", "price": 1.25, "deep": {"list": [1, None, "x"], "big": 10**15}}
    invoice = await shop.create(metadata=metadata)
    assert (await shop.get(invoice["id"]))["metadata"] == metadata


@pytest.mark.parametrize(
    ("currency", "given", "kept"),
    [
        ("USD", "12.345", "12.35"),
        ("USD", "5", "5"),
        ("USD", "0.0012", "0.0012"),
        ("SATS", "1000.4", "1000"),
        ("BTC", "0.000123456", "0.00012346"),
        ("XMR", "0.1234567890123", "0.123456789012"),
    ],
)
async def test_the_price_is_rounded_to_the_currency(shop: Shop, currency: str, given: str, kept: str) -> None:
    invoice = await shop.create("BTC-LN", given, currency=currency)
    assert Decimal(invoice["amount"]) == Decimal(kept)


@pytest.mark.parametrize(
    ("method", "currency", "rate"),
    [
        ("BTC-LN", "USD", "65000"),
        ("BTC-LN", "SATS", "100000000"),
        ("BTC-CHAIN", "BTC", "1"),
        ("LBTC-CHAIN", "BTC", "1"),
        ("LTC-CHAIN", "USD", "80"),
        ("XMR-CHAIN", "XMR", "1"),
    ],
)
async def test_the_rate_is_currency_per_coin(shop: Shop, method: str, currency: str, rate: str) -> None:
    (prompt,) = await shop.methods((await shop.create(method, "100", currency=currency))["id"])
    assert Decimal(prompt["rate"]) == Decimal(rate)


async def test_the_rate_stays_when_the_market_moves(shop: Shop) -> None:
    invoice = await shop.create()
    await shop.world("rates", BTC_USD="32500")
    assert (await shop.methods(invoice["id"]))[0]["rate"] == "65000"
    assert (await shop.methods((await shop.create())["id"]))[0]["rate"] == "32500"
    assert (await shop.methods((await shop.create("LBTC-CHAIN"))["id"]))[0]["rate"] == "32500"


async def test_monero_adds_a_network_fee(shop: Shop) -> None:
    (prompt,) = await shop.methods((await shop.create("XMR-CHAIN", "15.00"))["id"])
    assert Decimal(prompt["paymentMethodFee"]) == Decimal("0.000002")
    assert Decimal(prompt["amount"]) == Decimal("0.100002")


async def test_an_invoice_over_zero_offers_nothing_and_settles(shop: Shop) -> None:
    invoice = await shop.create(amount="0")
    assert invoice["status"] == "Settled"
    assert await shop.methods(invoice["id"]) == []


@pytest.mark.parametrize(
    ("spelling", "id"),
    [
        ("BTC", "BTC-CHAIN"),
        ("btc-ln", "BTC-LN"),
        ("BTC-LightningNetwork", "BTC-LN"),
        ("BTC_LightningLike", "BTC-LN"),
        ("BTC-OnChain", "BTC-CHAIN"),
        ("LTC_BTCLike", "LTC-CHAIN"),
        ("XMR-MoneroLike", "XMR-CHAIN"),
        ("lbtc", "LBTC-CHAIN"),
    ],
)
async def test_old_spellings_of_methods_are_understood(shop: Shop, spelling: str, id: str) -> None:
    invoice = await shop.create(spelling)
    assert invoice["checkout"]["paymentMethods"] == [id]


@pytest.mark.parametrize("spelling", ["DOGE", "BTC-LNURL", "LTC-LN", "", "BTC-CHAIN-X", "BTC CHAIN"])
def test_what_is_no_method_is_none(spelling: str) -> None:
    assert find_method(spelling) is None


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"amount": "-1"}, "amount"),
        ({"amount": "1e3"}, "amount"),
        ({"amount": "NaN"}, "amount"),
        ({"amount": True}, "amount"),
        ({"amount": "99999999999999999999"}, "amount"),
        ({"metadata": "text"}, "metadata"),
        ({"checkout": {"paymentMethods": ["BTC-LN", "DOGE"]}}, "checkout.paymentMethods[1]"),
        ({"checkout": {"expirationMinutes": 0.49}}, "checkout.expirationMinutes"),
        ({"checkout": {"paymentTolerance": 101}}, "checkout.paymentTolerance"),
        ({"checkout": {"speedPolicy": "Ludicrous"}}, "checkout.speedPolicy"),
    ],
)
async def test_a_wrong_field_is_422_with_its_path(shop: Shop, change: dict[str, Any], path: str) -> None:
    answer = await shop.api("POST", INVOICES, json={"amount": "5.00", "currency": "USD", **change})
    assert answer.status_code == 422
    assert [problem["path"] for problem in answer.json()] == [path]
    assert all(problem["message"] for problem in answer.json())


async def test_thirty_seconds_is_the_shortest_life(shop: Shop) -> None:
    invoice = await shop.create(checkout={"expirationMinutes": 0.5})
    assert invoice["expirationTime"] - invoice["createdTime"] == 30
    assert invoice["checkout"]["expirationMinutes"] == 0.5


async def test_no_rate_is_a_generic_error(shop: Shop) -> None:
    await shop.world("rates", LTC_USD=None)
    answer = await shop.api("POST", INVOICES, json={"amount": "5", "checkout": {"paymentMethods": ["LTC-CHAIN"]}})
    assert answer.status_code == 400
    assert answer.json()["code"] == "generic-error"
    assert answer.json()["message"].startswith("Error retrieving a matching payment method or rate.")


async def test_a_method_that_fails_beside_others_is_silently_left_out(shop: Shop) -> None:
    await shop.world("rates", LTC_USD=None)
    invoice = await shop.create(None, checkout={"paymentMethods": ["LTC-CHAIN", "BTC-LN"]})
    assert invoice["checkout"]["paymentMethods"] == ["BTC-LN"]


async def test_dust_is_refused_on_chain_and_not_on_lightning(shop: Shop) -> None:
    request = {"amount": "0.10", "checkout": {"paymentMethods": ["BTC-CHAIN"]}}
    assert (await shop.api("POST", INVOICES, json=request)).status_code == 400
    assert (await shop.create("BTC-LN", "0.10"))["status"] == "New"


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"\xff"])
async def test_what_is_no_object_is_400(shop: Shop, body: bytes) -> None:
    answer = await shop.api("POST", INVOICES, content=body)
    assert answer.status_code == 400
    assert answer.json()["code"] == "generic-error"


# Reading


async def test_an_unknown_invoice_is_404_everywhere(shop: Shop) -> None:
    for path in ("", "/payment-methods"):
        for base in (INVOICES, "/api/v1/invoices"):
            answer = await shop.api("GET", f"{base}/nothing{path}")
            assert (answer.status_code, answer.json()["code"]) == (404, "invoice-not-found")
    answer = await shop.api("POST", f"{INVOICES}/nothing/status", json={"status": "Settled"})
    assert answer.status_code == 404


async def test_both_forms_of_the_path_answer_alike(shop: Shop) -> None:
    id = (await shop.create())["id"]
    for path in (f"/{id}", f"/{id}?includePaymentMethods=true", f"/{id}/payment-methods"):
        nested = await shop.api("GET", f"{INVOICES}{path}")
        assert nested.status_code == 200
        assert nested.json() == (await shop.api("GET", f"/api/v1/invoices{path}")).json()


async def test_payment_methods_come_along_when_asked_for(shop: Shop) -> None:
    id = (await shop.create())["id"]
    assert "paymentMethods" not in await shop.get(id)
    single = (await shop.api("GET", f"{INVOICES}/{id}?includePaymentMethods=true")).json()
    listed = (await shop.api("GET", f"{INVOICES}?includePaymentMethods=true")).json()
    assert single["paymentMethods"] == listed[0]["paymentMethods"] == await shop.methods(id)


async def test_invoices_are_listed_newest_first_and_filtered(shop: Shop) -> None:
    ids = [(await shop.create(metadata={"orderId": f"order-{n}"}))["id"] for n in range(4)]
    await shop.drive(ids[0], "pay")

    async def listed(query: str) -> list[str]:
        return [invoice["id"] for invoice in (await shop.api("GET", f"{INVOICES}?{query}")).json()]

    assert await listed("") == ids[::-1]
    assert await listed("orderId=order-1&orderId=order-3") == [ids[3], ids[1]]
    assert await listed("orderId=order-9") == []
    assert await listed("status=Settled") == [ids[0]]
    assert await listed("status=New&status=Settled&take=2&skip=1") == [ids[2], ids[1]]


async def test_invoices_are_filtered_by_their_time(shop: Shop) -> None:
    old = await shop.create()
    await shop.world("clock", advance_seconds=100)
    new = await shop.create()

    async def listed(query: str) -> list[str]:
        return [invoice["id"] for invoice in (await shop.api("GET", f"{INVOICES}?{query}")).json()]

    assert await listed(f"startDate={new['createdTime']}") == [new["id"]]
    assert await listed(f"endDate={old['createdTime']}") == [old["id"]]
    wrong = await shop.api("GET", f"{INVOICES}?startDate=2&endDate=1")
    assert [problem["path"] for problem in wrong.json()] == ["startDate", "endDate"]


async def test_replaced_payments_show_only_when_asked_for(shop: Shop) -> None:
    id = (await shop.create("BTC-CHAIN"))["id"]
    await shop.drive(id, "pay")
    await shop.drive(id, "double-spend")
    assert (await shop.methods(id))[0]["payments"] == []
    everything = await shop.api("GET", f"{INVOICES}/{id}/payment-methods?onlyAccountedPayments=false")
    assert [payment["status"] for payment in everything.json()[0]["payments"]] == ["Invalid"]


async def test_the_operator_marks_by_the_api(shop: Shop) -> None:
    id = (await shop.create())["id"]
    path = f"{INVOICES}/{id}/status"
    invalid = (await shop.api("POST", path, json={"status": "Invalid"})).json()
    assert (invalid["status"], invalid["additionalStatus"]) == ("Invalid", "Marked")
    settled = (await shop.api("POST", path, json={"status": "Settled"})).json()
    assert (settled["status"], settled["availableStatusesForManualMarking"]) == ("Settled", ["Invalid"])
    for wrong in ("New", "Settled", None):
        answer = await shop.api("POST", path, json={"status": wrong})
        assert (answer.status_code, answer.json()[0]["path"]) == (422, "status")


async def test_rates_are_strings_or_null_with_a_reason(shop: Shop) -> None:
    query = "currencyPair=BTC_USD&currencyPair=LTC_USD&currencyPair=LBTC_BTC&currencyPair=BTC_SATS&currencyPair=NO_USD"
    rates = (await shop.api("GET", f"/api/v1/stores/{STORE}/rates?{query}")).json()
    assert [rate["rate"] for rate in rates] == ["65000", "80", "1", "100000000", None]
    assert [bool(rate["errors"]) for rate in rates] == [False, False, False, False, True]


async def test_the_store_and_the_server_tell_the_methods(shop: Shop) -> None:
    listed = (await shop.api("GET", f"/api/v1/stores/{STORE}/payment-methods?onlyEnabled=true")).json()
    assert [method["paymentMethodId"] for method in listed] == list(METHODS)
    info = (await shop.api("GET", "/api/v1/server/info")).json()
    assert (info["version"], info["supportedPaymentMethods"]) == ("2.4.1", list(METHODS))
    assert (await shop.api("GET", f"/api/v1/stores/{STORE}")).json()["id"] == STORE


async def test_many_create_at_once_without_sharing_an_address(shop: Shop) -> None:
    invoices = await asyncio.gather(*(shop.create("LTC-CHAIN") for _ in range(20)))
    prompts = [(await shop.methods(invoice["id"]))[0] for invoice in invoices]
    assert len({prompt["destination"] for prompt in prompts}) == 20
