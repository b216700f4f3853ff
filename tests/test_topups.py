"""Top-ups: who paid is credited exactly once and for what they paid, whatever happens on the way."""

import asyncio
import uuid
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from app.admin.tokens import create_token
from app.topups.gateway import AdditionalStatus, InvoiceStatus
from app.topups.sweep import sweep
from tests.rig import Customer, Rig, exact

D = Decimal
METHODS = [
    ("btc-lightning", "USD", "5"),
    ("btc", "USD", "20"),
    ("ltc", "LTC", "0.5"),
    ("lbtc", "USD", "3"),
    ("xmr", "XMR", "0.2"),
]
WORTH = {"btc-lightning": D("5.25"), "btc": D(20), "ltc": D(40), "lbtc": D(3), "xmr": D(30)}


async def status(rig: Rig, customer: Customer, invoice_id: str) -> Any:
    return exact(await rig.client.get(f"/topup/status/{invoice_id}", headers=customer.key))


@pytest.mark.parametrize(("method", "currency", "amount"), METHODS)
async def test_each_method_is_credited_for_what_was_paid(rig: Rig, method: str, currency: str, amount: str) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, amount, method, currency)
    rig.btcpay.pay(invoice_id)
    await rig.deliver(invoice_id)
    await rig.process()
    assert await rig.balance(customer) == WORTH[method]
    assert (await status(rig, customer, invoice_id))["status"] == "Settled"


async def test_what_works_less_well_than_set_up_is_told_by_the_readiness_check(rig: Rig) -> None:
    assert "warnings" not in (await rig.client.get("/health/ready")).json()
    rig.btcpay.troubles = lambda: ("LNbits takes no webhook to us",)  # type: ignore[attr-defined]
    health = (await rig.client.get("/health/ready")).json()
    assert (health["status"], health["warnings"]) == ("ok", ["LNbits takes no webhook to us"])


async def test_fifty_deliveries_of_one_webhook_at_once_credit_once(rig: Rig) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "5", "btc-lightning")
    rig.btcpay.pay(invoice_id)
    same = await asyncio.gather(*(rig.deliver(invoice_id, delivery_id="same") for _ in range(25)))
    other = await asyncio.gather(*(rig.deliver(invoice_id) for _ in range(25)))
    assert {response.status_code for response in (*same, *other)} == {200}
    assert sum(response.json()["stored"] for response in same) == 1
    await asyncio.gather(*(rig.process() for _ in range(5)), *(rig.poll() for _ in range(5)))
    assert await rig.balance(customer) == D("5.25")
    assert rig.sql("SELECT kind, count(*) FROM entry GROUP BY 1 ORDER BY 1") == [("bonus", 1), ("topup", 1)]


async def test_with_every_webhook_lost_the_poller_credits(rig: Rig) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "20")
    rig.btcpay.pay(invoice_id)
    await rig.poll()
    assert await rig.balance(customer) == 20


async def test_a_payment_in_parts_late_and_over_is_credited_for_what_it_is_worth(rig: Rig) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "100")
    rig.btcpay.pay(invoice_id, share=D("0.5"))
    await rig.poll()
    assert await rig.balance(customer) == 0  # a part is not credited while the rest may still come
    rig.btcpay.change(invoice_id, status=InvoiceStatus.EXPIRED, additional_status=AdditionalStatus.PAID_PARTIAL)
    await rig.poll()
    half = await rig.balance(customer)
    assert D("50") <= half < D("50.01")
    rig.btcpay.pay(invoice_id, share=D("0.5"), late=True)
    await rig.poll()
    await rig.poll()
    assert D("100") <= await rig.balance(customer) < D("100.01")


async def test_a_bad_signature_is_401_and_stores_nothing(rig: Rig) -> None:
    for headers in ({}, {"BTCPay-Sig": "sha256=00"}, {"BTCPay-Sig": "nonsense"}):
        response = await rig.client.post("/webhooks/btcpay", content=b"{}", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_signature")
    assert rig.sql("SELECT count(*) FROM webhook_delivery") == [(0,)]


async def test_unknown_types_and_invoices_are_stored_and_harm_nothing(rig: Rig) -> None:
    assert (await rig.deliver("NobodyKnows", event="InvoiceRefund")).status_code == 200
    await rig.process()
    assert rig.sql("SELECT processed_at IS NULL FROM webhook_delivery") == [
        (True,)
    ]  # comes again, in case it was early
    rig.sql("UPDATE webhook_delivery SET attempts = 20, next_try_at = now()")
    await rig.process()
    assert rig.sql("SELECT processed_at IS NULL FROM webhook_delivery") == [(False,)]


async def test_a_backend_that_is_down_is_503_and_what_was_paid_is_credited_when_it_is_back(rig: Rig) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "20")
    rig.btcpay.pay(invoice_id)
    rig.btcpay.is_down = True
    refused = await rig.client.post("/topup/create/btc", headers=customer.key, json={"amount": 20, "currency": "USD"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "payment_backend_unavailable")
    assert int(refused.headers["retry-after"]) > 0
    assert (await rig.client.get("/health/ready")).json()["status"] == "degraded"
    assert (await rig.deliver(invoice_id)).status_code == 200
    await rig.process()
    await rig.poll()
    assert await rig.balance(customer) == 0
    rig.btcpay.is_down = False
    rig.sql("UPDATE webhook_delivery SET next_try_at = now()")
    await rig.process()
    assert await rig.balance(customer) == 20
    assert (await rig.client.get("/health/ready")).json()["status"] == "ok"


async def test_a_lost_answer_to_create_leaves_one_invoice_found_again_by_the_same_key(rig: Rig) -> None:
    customer = await rig.customer()
    headers = customer.key | {"Idempotency-Key": uuid.uuid4().hex}
    body = {"amount": 20, "currency": "USD"}
    rig.btcpay.loses_answers = True
    assert (await rig.client.post("/topup/create/btc", headers=headers, json=body)).status_code == 503
    rig.btcpay.loses_answers = False
    again = await rig.client.post("/topup/create/btc", headers=headers, json=body)
    assert again.status_code == 201
    assert rig.btcpay.created == 1
    assert again.json()["invoice_id"] in rig.btcpay.invoices


async def test_a_lost_answer_without_a_key_is_found_by_the_poller_and_by_the_sweep(rig: Rig) -> None:
    customer = await rig.customer()
    for find in (rig.poll, lambda: sweep(rig.house.db, rig.btcpay)):
        rig.btcpay.loses_answers = True
        await rig.client.post("/topup/create/btc", headers=customer.key, json={"amount": 20, "currency": "USD"})
        rig.btcpay.loses_answers = False
        invoice_id = list(rig.btcpay.invoices)[-1]
        rig.btcpay.pay(invoice_id)
        before = await rig.balance(customer)
        await find()
        assert await rig.balance(customer) == before + 20
        assert (await status(rig, customer, invoice_id))["credited_usd"] == 20


async def test_an_invoice_that_was_never_made_is_given_up(rig: Rig) -> None:
    customer = await rig.customer()
    rig.btcpay.is_down = True
    await rig.client.post("/topup/create/btc", headers=customer.key, json={"amount": 20, "currency": "USD"})
    rig.btcpay.is_down = False
    await rig.poll()
    assert rig.sql("SELECT status FROM topup") == [("Creating",)]
    rig.sql("UPDATE topup SET created_at = now() - interval '11 minutes'")
    await rig.poll()
    assert rig.sql("SELECT status, next_check_at FROM topup") == [("Failed", None)]


async def test_an_answer_about_another_invoice_is_shown_to_a_person_and_not_credited(rig: Rig) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "20")
    rig.btcpay.pay(invoice_id)
    for wrong in ({"order_id": "other"}, {"currency": "BTC"}, {"amount": D(2000)}, {"method": "xmr"}):
        right = rig.btcpay.invoices[invoice_id]
        rig.btcpay.invoices[invoice_id] = replace(right, **wrong)
        await rig.poll()
        assert await rig.balance(customer) == 0
        rig.btcpay.invoices[invoice_id] = right
    assert rig.sql("SELECT review IS NOT NULL FROM topup") == [(True,)]


async def test_top_ups_are_listed_newest_first_in_pages(rig: Rig) -> None:
    customer = await rig.customer()
    made = [await rig.topup(customer, str(amount)) for amount in range(20, 25)]
    await rig.topup(await rig.customer(), "20")
    seen: list[str] = []
    cursor = ""
    for _ in range(3):
        page = (await rig.client.get(f"/topups?limit=2{cursor}", headers=customer.owner)).json()
        seen += [topup["invoice_id"] for topup in page["data"]]
        cursor = f"&cursor={page['next_cursor']}"
    assert seen == made[::-1]
    assert page["next_cursor"] is None
    for bad in ("limit=0", "limit=101", "cursor=x", "cursor=W10"):
        assert (await rig.client.get(f"/topups?{bad}", headers=customer.owner)).status_code == 422


async def test_a_claim_finds_the_payment_and_credits_it_at_once(rig: Rig) -> None:
    customer, stranger = await rig.customer(), await rig.customer()
    invoice_id = await rig.topup(customer, "5", "btc-lightning")
    payment = rig.btcpay.pay(invoice_id)
    claim = {"payment_hash": payment.id}
    missed = await rig.client.post("/topup/claim", headers=stranger.key, json=claim)
    assert (missed.status_code, missed.json()["error"]["code"]) == (404, "invoice_not_found")
    found = await rig.client.post("/topup/claim", headers=customer.key, json=claim)
    assert (found.status_code, exact(found)["credited_usd"]) == (200, 5)
    by_invoice = await rig.client.post(
        "/topup/claim", headers=customer.key, json={"lightning_invoice": "lnbcrt1fakeinvoice"}
    )
    assert by_invoice.status_code == 404
    chain_id = await rig.topup(customer, "20")
    on_chain = rig.btcpay.pay(chain_id)
    rig.btcpay.change(chain_id, payments=(replace(on_chain, id="ab" * 32 + "-1"),))
    found = await rig.client.post("/topup/claim", headers=customer.key, json={"txid": "AB" * 32})
    assert found.json()["invoice_id"] == chain_id
    assert await rig.balance(customer) == D("25.25")
    for bad in ({}, {"txid": "short"}, {"txid": "ab" * 32, "payment_hash": "cd" * 32}):
        assert (await rig.client.post("/topup/claim", headers=customer.key, json=bad)).status_code == 422


async def test_a_receipt_is_data_for_its_owner_and_a_page_for_who_has_the_address(rig: Rig) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "5", "btc-lightning")
    url = (await status(rig, customer, invoice_id))["receipt_url"]
    path = "/receipts/" + url.rpartition("/")[2]
    page = await rig.client.get(path)
    assert page.headers["content-type"].startswith("text/html")
    assert f'src="{path}/qr.svg' in page.text
    payment = rig.btcpay.pay(invoice_id)
    await rig.poll()
    page = await rig.client.get(path)
    assert "qr.svg" not in page.text
    assert payment.id in page.text
    assert "Bonus, 5 %" in page.text
    data = exact(await rig.client.get(f"/topup/receipt/{invoice_id}", headers=customer.key))
    assert [p["worth_usd"] > 5 for p in data["payments"]] == [True]
    assert (data["topup"]["bonus_percent"], data["topup"]["rate_usd"], data["topup"]["rate_source"]) == (
        5,
        65000,
        "btcpay",
    )
    for wrong in (path[:-1] + ("A" if path[-1] != "A" else "B"), "/receipts/x", "/receipts/" + "A" * 64):
        assert (await rig.client.get(wrong)).status_code == 404


async def test_an_operator_decides_what_a_person_must_look_at_once(rig: Rig) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "20")
    rig.btcpay.change(invoice_id, status=InvoiceStatus.SETTLED, additional_status=AdditionalStatus.MARKED)
    await rig.poll()
    assert await rig.balance(customer) == 0  # marked by hand, nothing paid
    token = await create_token(rig.house.db, rig.house.settings.pepper, "admin", "ops")
    admin = {"Authorization": f"Bearer {token}"}
    [waiting] = (await rig.client.get("/admin/topups", headers=admin)).json()["data"]
    assert waiting["review"].startswith("marked settled by hand")
    path = f"/admin/topups/{waiting['id']}"
    decision = {"action": "credit", "amount_usd": "20", "reason": "paid in cash"}
    answers = await asyncio.gather(
        *(rig.client.post(f"{path}/resolve", headers=admin, json=decision) for _ in range(5))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 404, 404, 404, 404]
    assert await rig.balance(customer) == 20
    await rig.poll()
    assert (await rig.client.get("/admin/topups", headers=admin)).json()["data"] == []
    assert rig.sql("SELECT admin, act, reason FROM admin_log") == [("ops", "topup.credit", "paid in cash")]
    assert (await rig.client.post(f"{path}/reconcile", headers=admin)).status_code == 200
    assert (await rig.client.get("/admin/topups", headers=customer.key)).status_code == 401


async def test_each_finding_is_resolved_by_itself_also_when_it_comes_again(rig: Rig) -> None:
    """The invoice is gone, then back as another one's, then gone again: three decisions, with whatever amounts."""
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "20")
    invoice = rig.btcpay.invoices[invoice_id]
    token = await create_token(rig.house.db, rig.house.settings.pepper, "admin", "ops")
    admin = {"Authorization": f"Bearer {token}"}
    seen: list[str] = []

    async def find_and_decide(is_gone: bool, amount_usd: str) -> None:
        rig.btcpay.invoices.pop(invoice_id, None)
        if not is_gone:
            rig.btcpay.invoices[invoice_id] = replace(invoice, method="xmr")
        await rig.poll()
        [waiting] = (await rig.client.get("/admin/topups", headers=admin)).json()["data"]
        decision = {"action": "credit", "amount_usd": amount_usd, "reason": "as agreed"}
        path = f"/admin/topups/{waiting['id']}/resolve"
        stale = await rig.client.post(
            path, headers=admin, json=decision | {"finding_id": seen[-1] if seen else waiting["id"]}
        )
        assert stale.status_code == 404
        answer = await rig.client.post(path, headers=admin, json=decision | {"finding_id": waiting["finding_id"]})
        assert answer.status_code == 200, answer.text
        seen.append(waiting["finding_id"])
        await rig.poll()
        assert (await rig.client.get("/admin/topups", headers=admin)).json()["data"] == []  # it does not come back

    for is_gone, amount_usd in ((True, "1"), (False, "2"), (True, "3"), (False, "2"), (True, "1")):
        await find_and_decide(is_gone, amount_usd)
    assert await rig.balance(customer) == 9
    assert len(set(seen)) == 5
    assert rig.sql("SELECT count(DISTINCT subject), sum(amount_nusd) FROM admin_log") == [(5, 9 * 10**9)]


async def test_a_key_without_the_topup_scope_may_not_make_or_see_them(rig: Rig) -> None:
    customer = await rig.customer()
    key = await rig.new_key(customer, scopes=["spend"])
    headers = {"Authorization": f"Bearer {key['api_key']}"}
    asked = [
        await rig.client.post("/topup/create/btc", headers=headers, json={"amount": 20}),
        await rig.client.get("/topups", headers=headers),
        await rig.client.post("/topup/claim", headers=headers, json={"txid": "ab" * 32}),
    ]
    assert {(r.status_code, r.json()["error"]["code"]) for r in asked} == {(403, "missing_scope")}


@pytest.mark.parametrize(
    ("method", "currency", "amount", "code"),
    [
        ("btc-lightning", "USD", "0.09", "amount_out_of_range"),
        ("btc-lightning", "USD", "1000.01", "amount_out_of_range"),
        ("btc-lightning", "SATS", "99", "amount_out_of_range"),
        ("btc-lightning", "SATS", "100.5", "invalid_field"),
        ("btc-lightning", "LTC", "1", "unsupported_currency"),
        ("btc", "USD", "9.99", "amount_out_of_range"),
        ("xmr", "XMR", "0.000000001", "invalid_field"),
        ("doge", "USD", "5", "unknown_method"),
    ],
)
async def test_amounts_outside_the_limits_are_refused_with_the_limits(
    rig: Rig, method: str, currency: str, amount: str, code: str
) -> None:
    customer = await rig.customer()
    response = await rig.client.post(
        f"/topup/create/{method}", headers=customer.key, json={"amount": amount, "currency": currency}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (422, code)
    if code == "amount_out_of_range":
        assert set(response.json()["error"]["metadata"]) == {"min", "max", "currency"}
    assert rig.btcpay.created == 0


async def test_a_top_up_that_breaks_us_does_not_keep_the_others_waiting(rig: Rig) -> None:
    customer = await rig.customer()
    broken, whole = await rig.topup(customer, "20"), await rig.topup(customer, "30")
    for invoice_id in (broken, whole):
        rig.btcpay.pay(invoice_id)
        await rig.deliver(invoice_id)
    rig.btcpay.change(broken, rate=None)  # what no adapter lets through
    with pytest.raises(ExceptionGroup, match="looked into"):
        await rig.process()
    assert await rig.balance(customer) == 30
    with pytest.raises(ExceptionGroup, match="checked"):
        await rig.poll()
    rig.btcpay.change(broken, rate=D(65000))
    await rig.poll()
    assert await rig.balance(customer) == 50
