"""The whole path the product exists for."""

from decimal import Decimal

from tests.rig import Rig, exact


async def test_from_nothing_to_a_paid_metered_call(rig: Rig) -> None:
    customer = await rig.customer()
    assert await rig.balance(customer) == 0

    invoice_id = await rig.topup(customer, "1000", "btc-lightning", "SATS")
    rig.btcpay.pay(invoice_id)
    assert (await rig.deliver(invoice_id)).status_code == 200
    await rig.process()
    assert await rig.balance(customer) == Decimal("0.6825")  # 1000 sat at 65000, and 5 % on top

    status = exact(await rig.client.get(f"/topup/status/{invoice_id}", headers=customer.key))
    assert (status["status"], status["credited_usd"], status["bonus_usd"]) == (
        "Settled",
        Decimal("0.65"),
        Decimal("0.0325"),
    )

    key = await rig.new_key(customer, usage_limit_usd=0.5, reset_period="daily")
    allowed = await rig.authorize(key["api_key"], "0.1", model="openai/gpt-4o", endpoint="/chat/completions")
    assert allowed["decision"] == "allow"
    assert await rig.held(customer) == Decimal("0.1")

    charged = await rig.settle(allowed["hold_id"], "0.000045")
    assert charged["balance_usd"] == Decimal("0.682455")
    assert await rig.balance(customer) == Decimal("0.682455")
    assert await rig.held(customer) == 0

    shown = exact(await rig.client.get(f"/keys/{key['_id']}", headers=customer.owner))["data"]
    assert shown["current_period_usage_usd"] == Decimal("0.000045")
