"""What the driver's routes let happen: the payer, the miners, the clock, and the figures that follow."""

import hashlib
from decimal import Decimal
from typing import Any

import bolt11
import pytest

from .conftest import Opener, Shop


def status(invoice: dict[str, Any]) -> tuple[str, str]:
    return invoice["status"], invoice["additionalStatus"]


def paid(invoice: dict[str, Any]) -> list[tuple[str, str]]:
    (prompt,) = invoice["paymentMethods"]
    return [(payment["value"], payment["status"]) for payment in prompt["payments"]]


# Lightning


async def test_a_lightning_payment_settles_at_once(shop: Shop) -> None:
    invoice = await shop.create("BTC-LN")
    after = await shop.drive(invoice["id"], "pay")
    assert status(after) == ("Settled", "None")
    assert paid(after) == [("0.00015384616", "Settled")]  # to the msat, as BTCPay 2.x asks
    assert (after["paidAmount"], after["paymentMethods"][0]["due"]) == ("10.00", "0.00000000000")
    payment = after["paymentMethods"][0]["payments"][0]
    assert payment["id"] == bolt11.decode(payment["destination"]).payment_hash


async def test_a_partial_lightning_payment_is_followed_by_another_bolt11_over_the_rest(shop: Shop) -> None:
    invoice = await shop.create("BTC-LN")
    before = (await shop.methods(invoice["id"]))[0]
    after = await shop.drive(invoice["id"], "pay", amount="0.00005")
    (prompt,) = after["paymentMethods"]
    assert status(after) == ("New", "PaidPartial")
    assert prompt["destination"] != before["destination"]
    assert bolt11.decode(prompt["destination"]).amount_msat == Decimal(prompt["due"]) * 10**11 == 10_384_616
    done = await shop.drive(invoice["id"], "pay")
    assert status(done) == ("Settled", "None")
    assert [value for value, _ in paid(done)] == ["0.00005", "0.00010384616"]


@pytest.mark.parametrize(
    ("rounding", "asked", "fee"), [("down", "0.00015384", "-0.00000000616"), ("up", "0.00015385", "0.00000000384")]
)
async def test_a_node_of_whole_sats_makes_the_rest_a_fee_which_is_negative_where_it_rounds_down(
    shop: Shop, rounding: str, asked: str, fee: str
) -> None:
    assert (await shop.world("lightning/rounding", rounding=rounding))["rounding"] == rounding
    invoice = await shop.create("BTC-LN")
    (prompt,) = await shop.methods(invoice["id"])
    assert (Decimal(prompt["amount"]), Decimal(prompt["paymentMethodFee"])) == (Decimal(asked), Decimal(fee))
    assert bolt11.decode(prompt["destination"]).amount_msat == Decimal(asked) * 10**11
    after = await shop.drive(invoice["id"], "pay")
    assert status(after) == ("Settled", "None")
    (payment,) = after["paymentMethods"][0]["payments"]
    assert (Decimal(payment["value"]), Decimal(payment["fee"])) == (Decimal(asked), Decimal(fee))


async def test_a_node_of_whole_sats_rounds_each_further_bolt11_too_and_asks_for_one_sat_at_least(shop: Shop) -> None:
    await shop.world("lightning/rounding", rounding="down")
    invoice = await shop.create("BTC-LN")
    after = await shop.drive(invoice["id"], "pay", amount="0.00005")
    assert bolt11.decode(after["paymentMethods"][0]["destination"]).amount_msat == 10_384_000
    assert status(await shop.drive(invoice["id"], "pay")) == ("Settled", "None")
    (tiny,) = await shop.methods((await shop.create("BTC-LN", "0.0001"))["id"])
    assert bolt11.decode(tiny["destination"]).amount_msat == 1000
    answer = await shop.client.post("/sandbox/lightning/rounding", json={"rounding": "sideways"})
    assert answer.status_code == 422


async def test_paying_twice_is_two_payments(shop: Shop) -> None:
    invoice = await shop.create("BTC-LN")
    await shop.drive(invoice["id"], "pay")
    after = await shop.drive(invoice["id"], "pay")
    assert status(after) == ("Settled", "None")
    assert after["paidAmount"] == "20.00"
    assert len({payment["id"] for payment in after["paymentMethods"][0]["payments"]}) == 2


async def test_overpaying_shows_a_negative_due(shop: Shop) -> None:
    after = await shop.drive((await shop.create("BTC-LN"))["id"], "pay", amount="0.0002")
    assert status(after) == ("Settled", "PaidOver")
    assert Decimal(after["paymentMethods"][0]["due"]) < 0


async def test_a_wallet_pays_a_bolt11_and_gets_its_preimage(shop: Shop) -> None:
    (prompt,) = await shop.methods((await shop.create("BTC-LN"))["id"])
    text = prompt["destination"]
    receipt = await shop.world("lightning/pay", bolt11=text.upper())
    assert hashlib.sha256(bytes.fromhex(receipt["preimage"])).hexdigest() == receipt["payment_hash"]
    assert receipt["invoice"]["status"] == "Settled"
    known = (await shop.client.get(f"/sandbox/lightning/{text}")).json()
    assert (known["paid_msat"], known["preimage"]) == (15_384_616, receipt["preimage"])
    again = await shop.client.post("/sandbox/lightning/pay", json={"bolt11": text})
    assert (again.status_code, again.json()["message"]) == (409, "invoice already paid")


async def test_a_wallet_cannot_pay_late_too_little_or_someone_else(shop: Shop) -> None:
    invoice = await shop.create("BTC-LN")
    text = (await shop.methods(invoice["id"]))[0]["destination"]
    less = await shop.client.post("/sandbox/lightning/pay", json={"bolt11": text, "amount_msat": 1000})
    assert less.status_code == 409
    stranger = await shop.client.post("/sandbox/lightning/pay", json={"bolt11": "lnbc1nothing"})
    assert (stranger.status_code, stranger.json()["code"]) == (404, "bolt11-not-found")
    await shop.world("clock", advance_seconds=900)
    late = await shop.client.post("/sandbox/lightning/pay", json={"bolt11": text})
    assert (late.status_code, late.json()["message"]) == (409, "invoice expired")


async def test_an_invoice_without_amount_has_an_amountless_bolt11(shop: Shop) -> None:
    invoice = await shop.create("BTC-LN", None)
    assert (invoice["type"], invoice["amount"]) == ("TopUp", "0")
    text = (await shop.methods(invoice["id"]))[0]["destination"]
    assert bolt11.decode(text).amount_msat is None
    receipt = await shop.world("lightning/pay", bolt11=text, amount_msat=1_000_000)
    assert status(receipt["invoice"]) == ("Settled", "None")
    assert Decimal(receipt["invoice"]["amount"]) == Decimal("0.65")


# Chains


@pytest.mark.parametrize(
    ("method", "blocks"), [("BTC-CHAIN", 1), ("LTC-CHAIN", 1), ("LBTC-CHAIN", 1), ("XMR-CHAIN", 10)]
)
async def test_an_on_chain_payment_is_processing_until_it_has_its_blocks(shop: Shop, method: str, blocks: int) -> None:
    id = (await shop.create(method))["id"]
    seen = await shop.drive(id, "pay")
    assert status(seen) == ("Processing", "None")
    if blocks > 1:
        assert status(await shop.drive(id, "confirm", blocks=blocks - 1)) == ("Processing", "None")
    settled = await shop.drive(id, "confirm")
    assert status(settled) == ("Settled", "None")
    assert settled["paidAmount"] == "10.00"


async def test_a_second_on_chain_payment_pays_for_its_input_and_keeps_the_address(shop: Shop) -> None:
    id = (await shop.create("BTC-CHAIN"))["id"]
    (before,) = await shop.methods(id)
    after = await shop.drive(id, "pay", amount="0.0001")
    (prompt,) = after["paymentMethods"]
    assert prompt["destination"] == before["destination"]
    assert Decimal(prompt["paymentMethodFee"]) == Decimal("0.000001")
    assert Decimal(prompt["due"]) == Decimal("0.00005485")
    done = await shop.drive(id, "pay")
    assert status(done) == ("Processing", "None")
    assert [payment["fee"] for payment in done["paymentMethods"][0]["payments"]] == ["0", "0.00000100"]


async def test_monero_payments_carry_their_fee_and_account(shop: Shop) -> None:
    after = await shop.drive((await shop.create("XMR-CHAIN"))["id"], "pay")
    (payment,) = after["paymentMethods"][0]["payments"]
    assert payment["fee"] == "0.000002"
    assert payment["id"].split("#")[1] == "0"


async def test_a_double_spend_puts_the_invoice_back_and_it_can_be_paid_again(shop: Shop) -> None:
    id = (await shop.create("LTC-CHAIN"))["id"]
    await shop.drive(id, "pay")
    assert status(await shop.drive(id, "double-spend")) == ("New", "None")
    await shop.drive(id, "pay")
    after = await shop.drive(id, "confirm")
    assert status(after) == ("Settled", "None")
    assert [state for _, state in paid(after)] == ["Invalid", "Settled"]


async def test_what_cannot_be_double_spent_is_said(shop: Shop) -> None:
    lightning, chain = (await shop.create("BTC-LN"))["id"], (await shop.create("BTC-CHAIN"))["id"]
    await shop.drive(lightning, "pay")
    for id in (lightning, chain):
        answer = await shop.client.post(f"/sandbox/invoices/{id}/double-spend")
        assert (answer.status_code, answer.json()["code"]) == (409, "impossible")


async def test_one_of_several_methods_pays_the_whole_invoice(shop: Shop) -> None:
    id = (await shop.create(None))["id"]
    after = await shop.drive(id, "pay", paymentMethodId="LTC")
    by_method = {prompt["paymentMethodId"]: prompt for prompt in after["paymentMethods"]}
    assert by_method["LTC-CHAIN"]["paymentMethodPaid"] == "0.12500000"
    assert by_method["BTC-LN"]["paymentMethodPaid"] == "0.00000000000"
    assert Decimal(by_method["BTC-LN"]["totalPaid"]) == Decimal("0.00015384616")
    assert by_method["BTC-LN"]["payments"] == []


@pytest.mark.parametrize("amount", ["0", "-1", "x", "1e-3"])
async def test_a_wrong_amount_is_refused(shop: Shop, amount: str) -> None:
    id = (await shop.create())["id"]
    answer = await shop.client.post(f"/sandbox/invoices/{id}/pay", json={"amount": amount})
    assert (answer.status_code, answer.json()[0]["path"]) == (422, "amount")


# Time


async def test_late_payments_are_paid_late_and_never_settle(shop: Shop) -> None:
    id = (await shop.create("BTC-CHAIN"))["id"]
    late = await shop.drive(id, "pay", late=True)
    assert status(late) == ("Expired", "PaidLate")
    confirmed = await shop.drive(id, "confirm", blocks=6)
    assert status(confirmed) == ("Expired", "PaidLate")
    assert [state for _, state in paid(confirmed)] == ["Settled"]
    received = confirmed["paymentMethods"][0]["payments"][0]["receivedDate"]
    assert received >= confirmed["expirationTime"]


async def test_the_clock_expires_what_is_open(shop: Shop) -> None:
    id = (await shop.create())["id"]
    await shop.world("clock", advance_seconds=899)
    assert (await shop.get(id))["status"] == "New"
    await shop.world("clock", advance_seconds=2)
    assert (await shop.get(id))["status"] == "Expired"


async def test_expiring_one_invoice_leaves_the_others_open(shop: Shop) -> None:
    first, second = (await shop.create())["id"], (await shop.create())["id"]
    assert (await shop.drive(first, "expire"))["status"] == "Expired"
    assert (await shop.get(second))["status"] == "New"


async def test_an_unconfirmed_payment_is_invalid_when_monitoring_ends(shop: Shop) -> None:
    id = (await shop.create("BTC-CHAIN"))["id"]
    await shop.drive(id, "pay")
    assert status(await shop.drive(id, "expire")) == ("Processing", "None")
    assert status(await shop.drive(id, "expire", monitoring=True)) == ("Invalid", "None")


async def test_invoices_expire_by_themselves(open_shop: Opener) -> None:
    async with open_shop() as shop:
        id = (await shop.create(checkout={"expirationMinutes": 0.5}))["id"]
        await shop.drive(id, "expire")
        assert "InvoiceExpired" in await shop.all_told()


# The rest


async def test_everything_is_listed_newest_first(shop: Shop) -> None:
    ids = [(await shop.create())["id"] for _ in range(3)]
    listed = (await shop.client.get("/sandbox/invoices")).json()
    assert [invoice["id"] for invoice in listed] == ids[::-1]
    assert listed[0] == (await shop.client.get(f"/sandbox/invoices/{ids[2]}")).json()


async def test_marking_answers_the_invoice(shop: Shop) -> None:
    id = (await shop.create())["id"]
    assert status(await shop.drive(id, "mark", status="Settled")) == ("Settled", "Marked")
    assert status(await shop.drive(id, "mark", status="Invalid")) == ("Invalid", "Marked")


@pytest.mark.parametrize(
    ("act", "body"),
    [
        ("rates", {"BTC_USD": "-1"}),
        ("rates", {"BTC_USD": "much"}),
        ("clock", {"advance_seconds": "soon"}),
        ("down", {"mode": "sideways"}),
    ],
)
async def test_a_wrong_order_to_the_world_is_422(shop: Shop, act: str, body: dict[str, Any]) -> None:
    assert (await shop.client.post(f"/sandbox/{act}", json=body)).status_code == 422
