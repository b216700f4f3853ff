"""Real coins from a payer's wallet to a customer's balance: litecoind and monerod, the sandbox, the service, the books.

Every test's street is closed with all webhooks delivered again, all jobs run again, balances and audit checked.
"""

from decimal import Decimal

import pytest

from app.topups.gateway import PaymentStatus
from tests.integration.nodes import say
from tests.integration.street import Street, webhook_types
from tests.rig import exact

pytestmark = pytest.mark.slow


async def test_a_litecoin_payment_is_credited_at_its_first_confirmation(street: Street) -> None:
    topup = await street.topup("ltc", "20")
    assert (topup.due, topup.address[:5]) == (Decimal("0.25"), "rltc1")
    assert topup.payment_uri == f"litecoin:{topup.address}?amount=0.25"

    await street.litecoin.pay(topup.address, topup.due)
    await topup.until("Processing", poller=False)
    await topup.stays("Processing", "Processing")
    await street.litecoin.mine()
    await topup.until("Settled", poller=False)
    await topup.until_credited("20")

    await street.all_told()
    received, settled = "InvoiceReceivedPayment", "InvoicePaymentSettled"
    assert webhook_types(street, topup.invoice_id) == [
        "InvoiceCreated", received, "InvoiceProcessing", settled, "InvoiceSettled",
    ]  # fmt: skip


async def test_a_large_litecoin_payment_waits_for_two_confirmations_and_needs_no_webhook(street: Street) -> None:
    await street.drive("lose-events", from_now_on=True)
    topup = await street.topup("ltc", "1000")
    txid = await street.litecoin.pay(topup.address, topup.due)
    await topup.until("Processing", webhooks=False)
    await street.litecoin.mine()
    say(f"confirmations: {await street.litecoin.confirmations(txid)}")
    await topup.stays("Processing", "Processing")
    await street.litecoin.mine()
    await topup.until("Settled", webhooks=False)
    await topup.until_credited("1000")
    assert webhook_types(street, topup.invoice_id) == []


async def test_litecoin_paid_in_two_parts_goes_to_one_address(street: Street) -> None:
    topup = await street.topup("ltc", "20")
    await street.litecoin.pay(topup.address, Decimal("0.1"))
    partial = await topup.until("New", "PaidPartial", paid=Decimal("0.1"))
    await street.litecoin.mine()
    await topup.until_payments("Settled")
    assert partial["address"] == topup.address
    assert partial["amount_due"] == Decimal("0.15001")  # the rest, and the fee that one more input costs
    assert partial["credited_usd"] == 0

    await street.litecoin.pay(topup.address, partial["amount_due"])
    await topup.until("Processing")
    await street.litecoin.mine()
    await topup.until("Settled")
    await topup.until_credited("20")


async def test_what_is_overpaid_in_litecoin_is_credited_too(street: Street) -> None:
    topup = await street.topup("ltc", "20")
    await street.litecoin.pay(topup.address, Decimal("0.31250001"))
    await topup.until("Processing", "PaidOver")
    await street.litecoin.mine()
    await topup.until("Settled", "PaidOver")
    await topup.until_credited("25.0000008")


async def test_of_a_bumped_litecoin_payment_only_the_replacement_counts(street: Street) -> None:
    topup = await street.topup("ltc", "20")
    first = await street.litecoin.pay(topup.address, topup.due, replaceable=True)
    await topup.until_payments("Processing")
    second = await street.litecoin.bump(first)
    await topup.until_payments("Invalid", "Processing")
    assert [payment["id"].partition("-")[0] for payment in await topup.payments()] == [first, second]
    await topup.until("Processing", paid=topup.due)
    await street.litecoin.mine()
    say(f"confirmations: {await street.litecoin.confirmations(first)}, {await street.litecoin.confirmations(second)}")
    await topup.until("Settled")
    await topup.until_credited("20")
    await topup.until_payments("Invalid", "Settled")
    invoice = await street.gateway.fetch(topup.invoice_id)
    assert invoice is not None
    assert [payment.status for payment in invoice.payments] == [PaymentStatus.INVALID, PaymentStatus.SETTLED]
    counted = street.sql("SELECT payment_id, worth_nusd FROM payment WHERE worth_nusd > 0")
    assert [(id.partition("-")[0], worth) for id, worth in counted] == [(second, 20 * 10**9)]


async def test_litecoin_that_a_miner_lets_its_payer_spend_twice_is_never_credited(street: Street) -> None:
    topup = await street.topup("ltc", "20")
    payment, theft = await street.litecoin.two_spends(topup.address, topup.due)
    await street.litecoin.payer.tell("sendrawtransaction", hexstring=payment)
    await topup.until("Processing")
    await street.litecoin.mine(transactions=[theft])
    await topup.until_payments("Invalid")
    await topup.until("New", paid=Decimal(0))
    await street.litecoin.mine(2)
    await topup.stays("New", "Invalid")


async def test_a_reorganisation_takes_confirmations_back_and_credits_nothing_early(street: Street) -> None:
    topup = await street.topup("ltc", "1000")
    txid = await street.litecoin.pay(topup.address, topup.due)
    (block,) = await street.litecoin.mine()
    before = await street.litecoin.confirmations(txid)
    await topup.until("Processing")
    await street.litecoin.node.tell("invalidateblock", blockhash=block)
    after = await street.litecoin.confirmations(txid)
    say(f"confirmations: {before}, then {after} after its block was given up")
    assert (before, after) == (1, 0)
    await topup.stays("Processing", "Processing")
    await street.litecoin.mine()
    await topup.stays("Processing", "Processing")
    await street.litecoin.mine()
    say(f"confirmations: {await street.litecoin.confirmations(txid)} on the other branch")
    await topup.until("Settled")
    await topup.until_credited("1000")


async def test_a_confirmed_litecoin_payment_that_a_reorganisation_loses_to_a_double_spend_counts_no_more(
    street: Street,
) -> None:
    topup = await street.topup("ltc", "1000")
    payment, theft = await street.litecoin.two_spends(topup.address, topup.due)
    await street.litecoin.payer.tell("sendrawtransaction", hexstring=payment)
    (block,) = await street.litecoin.mine()
    await topup.until("Processing")
    await street.litecoin.node.tell("invalidateblock", blockhash=block)
    await street.litecoin.mine(transactions=[theft])
    await topup.until_payments("Invalid")
    await topup.until("New", paid=Decimal(0))
    await street.litecoin.mine(2)
    await topup.stays("New", "Invalid")


async def test_late_litecoin_is_credited_at_the_lower_rate(street: Street) -> None:
    topup = await street.topup("ltc", "20")
    await street.drive("clock", advance_seconds=61 * 60 + 5)
    await topup.until("Expired")
    await street.drive("rates", LTC_USD="40")
    await street.litecoin.pay(topup.address, topup.due)
    await topup.until("Expired", "PaidLate")
    await topup.stays("Expired", "Processing")
    await street.litecoin.mine()
    await topup.until_credited("10")
    assert (await topup.status())["status"] == "Expired"


async def test_a_litecoin_node_that_is_away_refuses_topups_and_loses_no_payment(street: Street) -> None:
    topup = await street.topup("ltc", "20")
    await street.litecoin.pay(topup.address, topup.due)
    await topup.until("Processing")
    street.litecoin.end()
    try:
        refused = await street.ask(await street.customer(), "ltc", "20")
        body = exact(refused)
        say(f"while away: HTTP {refused.status_code}, {body['message']}")
        assert (refused.status_code, body["error"]["code"]) == (503, "payment_backend_unavailable")
        other = await street.ask(await street.customer(), "btc-lightning", "20")
        assert other.status_code == 201
        await topup.stays("Processing", "Processing")
    finally:
        await street.litecoin.start()
    await street.litecoin.mine()
    await topup.until("Settled")
    await topup.until_credited("20")


async def test_monero_is_seen_in_the_pool_and_credited_at_ten_confirmations(street: Street) -> None:
    topup = await street.topup("xmr", "15")
    assert (topup.due, topup.address[0]) == (Decimal("0.100002"), "8")
    txid = await street.monero.pay(topup.address, topup.due)
    await topup.until("Processing")
    say(f"confirmations: {await street.monero.confirmations(txid)}, in the pool")
    await street.monero.mine(9)
    say(f"confirmations: {await street.monero.confirmations(txid)}")
    await topup.stays("Processing", "Processing")
    await street.monero.mine()
    say(f"confirmations: {await street.monero.confirmations(txid)}")
    await topup.until("Settled")
    await topup.until_credited("15")
    (payment,) = await topup.payments()
    assert payment["id"].partition("#")[0] == txid
    assert payment["id"].partition("#")[2].startswith("0#")
    assert Decimal(payment["value"]) == topup.due


async def test_monero_paid_in_two_parts_goes_to_one_address(street: Street) -> None:
    topup = await street.topup("xmr", "15")
    await street.monero.pay(topup.address, Decimal("0.040000000001"))
    partial = await topup.until("New", "PaidPartial", paid=Decimal("0.040000000001"))
    assert partial["address"] == topup.address
    await street.monero.pay(topup.address, partial["amount_due"])
    await topup.until("Processing")
    await street.monero.mine(10)
    await topup.until("Settled")
    await topup.until_credited("15")
    await topup.until_payments("Settled", "Settled")


async def test_monero_that_its_sender_locked_for_longer_waits_until_it_can_be_spent(street: Street) -> None:
    topup = await street.topup("xmr", "15")
    txid = await street.monero.pay(topup.address, topup.due, locked_for_blocks=14)
    await topup.until("Processing")
    await street.monero.mine(11)
    say(f"confirmations: {await street.monero.confirmations(txid)}, locked")
    await topup.stays("Processing", "Processing")
    await street.monero.mine(5)
    await topup.until("Settled")
    await topup.until_credited("15")
