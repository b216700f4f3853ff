"""The pages: everything a payer needs, nothing from elsewhere, and buttons that work without JavaScript."""

import re
from html import escape
from typing import Any

import httpx
import pytest

from .conftest import Shop


async def page(shop: Shop, id: str, **query: str) -> str:
    answer = await shop.client.get(f"/i/{id}", params=query)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    return answer.text


async def press(shop: Shop, id: str, **form: Any) -> httpx.Response:
    return await shop.client.post(f"/i/{id}", data=form)


@pytest.mark.parametrize("method", ["BTC-LN", "BTC-CHAIN", "LTC-CHAIN", "LBTC-CHAIN", "XMR-CHAIN"])
async def test_the_page_has_all_it_takes_to_pay(shop: Shop, method: str) -> None:
    invoice = await shop.create(method)
    (prompt,) = await shop.methods(invoice["id"])
    html = await page(shop, invoice["id"])
    assert "no real money" in html
    for part in ("$10.00", prompt["destination"], "<svg", "data-left=", "Order order-1", "value=pay"):
        assert part in html


async def test_the_page_takes_nothing_from_elsewhere(shop: Shop) -> None:
    html = await page(shop, (await shop.create(None))["id"])
    assert re.findall(r"(?:src|href|action)=[\"']?https?://", html) == []
    assert "@import" not in html


async def test_what_the_shop_said_is_escaped(shop: Shop) -> None:
    evil = "<script>alert(1)</script>\"'"
    invoice = await shop.create(
        metadata={"orderId": evil}, checkout={"redirectURL": "javascript:alert(1)", "expirationMinutes": 15}
    )
    assert "<script>alert" not in await page(shop, invoice["id"])
    assert "<script>alert" not in (await shop.client.get("/")).text
    await shop.drive(invoice["id"], "pay")
    assert "javascript:" not in await page(shop, invoice["id"])


async def test_buttons_act_and_lead_back_to_the_page(shop: Shop) -> None:
    id = (await shop.create("LTC-CHAIN"))["id"]
    answer = await press(shop, id, method="LTC-CHAIN", act="pay")
    assert answer.status_code == 303
    assert answer.headers["location"] == f"{id}?method=LTC-CHAIN"
    assert "Waiting for confirmations" in await page(shop, id)
    await press(shop, id, method="LTC-CHAIN", act="confirm", blocks="1")
    assert "Paid, thank you" in await page(shop, id)


async def test_parts_can_be_paid_by_hand(shop: Shop) -> None:
    id = (await shop.create("BTC-LN"))["id"]
    await press(shop, id, method="BTC-LN", act="pay", amount=" 0.00005 ")
    html = await page(shop, id)
    assert "Waiting for payment, partly paid" in html
    assert "PaidPartial</" not in html
    assert "0.00005 BTC" in html


@pytest.mark.parametrize(
    ("form", "status", "words"),
    [
        ({"act": "expire"}, "Expired", "Expired"),
        ({"act": "mark", "status": "Settled"}, "Settled", "Paid, marked by hand"),
        ({"act": "mark", "status": "Invalid"}, "Invalid", "Invalid, marked by hand"),
    ],
)
async def test_the_other_controls(shop: Shop, form: dict[str, str], status: str, words: str) -> None:
    id = (await shop.create())["id"]
    assert (await press(shop, id, method="BTC-LN", **form)).status_code == 303
    assert (await shop.get(id))["status"] == status
    html = await page(shop, id)
    assert f"class='pill {status.lower()}'>{words}" in html
    assert f"class='verdict {status.lower()}'><svg" in html
    assert not re.search("[\u2190-\u2bff]|[\U0001f000-\U0001faff]", html), "an icon that a font must have"


@pytest.mark.parametrize(("form", "status"), [({"act": "double-spend"}, 409), ({"act": "pay", "amount": "lots"}, 422)])
async def test_what_cannot_be_done_is_said_on_the_page(shop: Shop, form: dict[str, str], status: int) -> None:
    id = (await shop.create())["id"]
    answer = await press(shop, id, method="BTC-LN", **form)
    assert answer.status_code == status
    assert "class=problem" in answer.text


async def test_the_mark_changes_when_a_payment_comes(shop: Shop) -> None:
    id = (await shop.create("BTC-CHAIN"))["id"]
    before = (await shop.client.get(f"/i/{id}/status")).json()
    await shop.drive(id, "pay", amount="0.0001")
    after = (await shop.client.get(f"/i/{id}/status")).json()
    assert before["mark"] != after["mark"]
    assert after["mark"] in await page(shop, id)


async def test_every_button_that_pretends_is_inside_the_sandboxs_controls(shop: Shop) -> None:
    id = (await shop.create("BTC-CHAIN"))["id"]
    for act in ("none yet", "pay"):
        await press(shop, id, method="BTC-CHAIN", act=act)
        before, controls = (await page(shop, id)).split("<details class=controls open>")
        assert "<button class=" not in before
        assert "Pretend to" in controls


async def test_the_pages_may_run_nothing_but_their_own(shop: Shop) -> None:
    for path in ("/", "/wallet", f"/i/{(await shop.create())['id']}"):
        answer = await shop.client.get(path)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert re.findall(r" (?:style|on\w+)=", answer.text) == []


async def test_the_wallet_has_a_page_that_connects_it_and_tells_it_how_to_behave(shop: Shop) -> None:
    wallet = (await shop.client.get("/sandbox/wallet")).json()
    html = (await shop.client.get("/wallet")).text
    for part in (escape(wallet["uri"]), "<svg", "2,000,000 sat", "Pays, as it should", "Nothing was paid yet"):
        assert part in html
    answer = await shop.client.post("/wallet", data={"behaviour": "refuses", "balance_sats": "12345"})
    assert (answer.status_code, answer.headers["location"]) == (303, "wallet")
    html = (await shop.client.get("/wallet")).text
    assert "12,345 sat" in html
    assert "<span class=quiet>Refuses, and says why</span>" in html


@pytest.mark.parametrize(
    "form", [{"behaviour": "flies", "balance_sats": "1"}, {"behaviour": "pays", "balance_sats": "x"}, {}]
)
async def test_what_the_wallet_cannot_be_is_said_on_its_page(shop: Shop, form: dict[str, str]) -> None:
    answer = await shop.client.post("/wallet", data=form)
    assert answer.status_code == 422
    assert "class=problem" in answer.text
    assert (await shop.client.get("/sandbox/wallet")).json()["balance_msat"] == 2_000_000_000


async def test_every_method_has_its_tab(shop: Shop) -> None:
    id = (await shop.create(None))["id"]
    for name in ("Bitcoin Lightning", "Bitcoin", "Litecoin", "Liquid Bitcoin", "Monero"):
        assert f">{name}</a>" in await page(shop, id)
    assert "Lightning invoice" in await page(shop, id)
    assert "Monero address" in await page(shop, id, method="XMR-CHAIN")


async def test_the_list_links_to_every_invoice(shop: Shop) -> None:
    assert "No invoice yet" in (await shop.client.get("/")).text
    ids = [(await shop.create())["id"] for _ in range(2)]
    html = (await shop.client.get("/")).text
    assert all(f"href='i/{id}'" in html for id in ids)


async def test_an_unknown_invoice_has_no_page(shop: Shop) -> None:
    assert (await shop.client.get("/i/nothing")).status_code == 404
    assert (await press(shop, "nothing", act="pay")).status_code == 404
