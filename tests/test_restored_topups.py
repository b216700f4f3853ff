"""After the books were restored to an earlier moment: what we made and forgot is written again, and nothing that we did not make."""

import uuid
from dataclasses import replace
from decimal import Decimal

from app.topups.receipt import receipt_url
from app.topups.sweep import CATCH_UP, sweep
from tests.rig import Customer, Rig

D = Decimal


async def looked(rig: Rig) -> int:
    return await sweep(rig.house.db, rig.btcpay, CATCH_UP, rig.house.settings.pepper)


async def forgotten(rig: Rig, customer: Customer, amount: str = "20", currency: str = "USD") -> str:
    """A top-up that was paid, and whose row is gone."""
    invoice_id = await rig.topup(customer, amount, "btc", currency)
    rig.btcpay.pay(invoice_id)
    rig.sql("DELETE FROM topup_invoice")
    rig.sql("DELETE FROM topup")
    return invoice_id


async def test_a_forgotten_top_up_is_credited_once_however_often_it_is_looked_for(rig: Rig) -> None:
    customer = await rig.customer()
    await forgotten(rig, customer)
    assert await sweep(rig.house.db, rig.btcpay) == 0, "without the pepper nobody knows whose it was"
    assert [await looked(rig) for _ in range(3)] == [1, 0, 0]
    assert await rig.balance(customer) == D(20)
    assert rig.sql("SELECT status, credited_nusd, review FROM topup") == [("Settled", 20 * 10**9, None)]


async def test_one_that_was_priced_in_a_coin_is_credited_at_today_s_rate_and_shown_to_a_person(rig: Rig) -> None:
    customer = await rig.customer()
    await forgotten(rig, customer, "0.001", "BTC")
    assert await looked(rig) == 1
    ((review, rate),) = rig.sql("SELECT review, usd_per_coin FROM topup")
    assert "lost in a restore" in review
    assert await rig.balance(customer) == D("0.001") * rate


async def test_an_invoice_that_we_did_not_make_is_nobody_s(rig: Rig) -> None:
    """Of another top-up's address, of one that a stranger made up, of another pepper, and of none."""
    customer = await rig.customer()
    invoice_id = await forgotten(rig, customer)
    invoice = rig.btcpay.invoices[invoice_id]
    other = rig.btcpay.invoices[await forgotten(rig, customer)]
    theirs = replace(rig.house.settings, secret_pepper="p" * 40)
    account = rig.sql("SELECT id FROM account")[0][0]

    assert invoice.order_id is not None
    for address in (
        other.order_url,
        None,
        "",
        "https://x/receipts/AAAA",
        receipt_url(theirs, account, uuid.UUID(invoice.order_id)),
    ):
        rig.btcpay.invoices = {invoice_id: replace(invoice, order_url=address)}
        assert await looked(rig) == 0
    assert rig.sql("SELECT count(*) FROM topup") == [(0,)]
    assert await rig.balance(customer) == 0


async def test_one_of_an_account_that_is_gone_too_is_told_and_left(rig: Rig) -> None:
    customer = await rig.customer()
    await forgotten(rig, customer)
    for table in ("credential", "api_key", "account"):
        rig.sql(f"DELETE FROM {table}")
    assert await looked(rig) == 0
    assert rig.sql("SELECT count(*) FROM topup") == [(0,)]
