"""The pages: everything a payer needs, nothing from elsewhere, and buttons that work without JavaScript."""

import re
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
    assert "paid partial" in html
    assert "0.00005 BTC" in html


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"act": "expire"}, "Expired"),
        ({"act": "mark", "status": "Settled"}, "Settled"),
        ({"act": "mark", "status": "Invalid"}, "Invalid"),
    ],
)
async def test_the_other_controls(shop: Shop, form: dict[str, str], status: str) -> None:
    id = (await shop.create())["id"]
    assert (await press(shop, id, method="BTC-LN", **form)).status_code == 303
    assert (await shop.get(id))["status"] == status
    assert status in await page(shop, id)


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


async def test_every_method_has_its_tab(shop: Shop) -> None:
    id = (await shop.create(None))["id"]
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
