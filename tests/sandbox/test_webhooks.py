"""Webhooks: what is sent, in which order, how it is signed, what is retried and what is lost."""

import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.sandbox.webhooks import RETRY_AFTER_SECONDS, signature

from .conftest import HOOK_URL, SECRET, STORE, Opener, Receiver, Shop

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data" / "btcpay-webhook-samples.json"
WEBHOOKS = f"/api/v1/stores/{STORE}/webhooks"


async def deliveries(shop: Shop) -> list[dict[str, Any]]:
    (webhook,) = (await shop.api("GET", WEBHOOKS)).json()
    return list((await shop.api("GET", f"{WEBHOOKS}/{webhook['id']}/deliveries")).json())


# What is sent


async def test_a_lightning_payment_is_told_in_btcpays_order(shop: Shop) -> None:
    await shop.drive((await shop.create())["id"], "pay")
    assert await shop.all_told() == [
        "InvoiceCreated",
        "InvoicePaymentSettled",
        "InvoiceReceivedPayment",
        "InvoiceProcessing",
        "InvoiceSettled",
    ]


async def test_an_on_chain_payment_is_told_in_btcpays_order(shop: Shop) -> None:
    id = (await shop.create("BTC-CHAIN"))["id"]
    await shop.drive(id, "pay")
    await shop.drive(id, "confirm")
    assert await shop.all_told() == [
        "InvoiceCreated",
        "InvoiceReceivedPayment",
        "InvoiceProcessing",
        "InvoicePaymentSettled",
        "InvoiceSettled",
    ]


async def test_the_signature_is_over_the_exact_bytes_and_they_are_indented(shop: Shop) -> None:
    await shop.create(metadata={"orderId": "ü"})
    await shop.all_told()
    (request,) = shop.receiver.requests
    expected = hmac.new(SECRET.encode(), request.content, hashlib.sha256).hexdigest()
    assert request.headers["BTCPay-Sig"] == f"sha256={expected}"
    assert request.content.decode() == json.dumps(json.loads(request.content), indent=2, ensure_ascii=False)


async def test_a_first_delivery_is_its_own_original(shop: Shop) -> None:
    invoice = await shop.create()
    await shop.all_told()
    (body,) = shop.receiver.bodies
    assert body["originalDeliveryId"] == body["deliveryId"]
    assert body["isRedelivery"] is False
    assert (body["storeId"], body["invoiceId"], body["metadata"]) == (STORE, invoice["id"], invoice["metadata"])
    assert abs(body["timestamp"] - time.time()) < 5


@pytest.fixture(scope="module")
def samples() -> dict[str, Any]:
    if not SAMPLES.exists():
        pytest.skip("btcpay-webhook-samples.json is not beside this checkout")
    return dict(json.loads(SAMPLES.read_text()))


def test_our_signature_is_the_samples(samples: dict[str, Any]) -> None:
    for sample in samples["samples"].values():
        assert signature(samples["secret"], sample["body"].encode()) == sample["headers"]["BTCPay-Sig"]


async def test_every_body_has_the_keys_of_its_sample(shop: Shop, samples: dict[str, Any]) -> None:
    metadata = {"orderId": "topup_01HZX", "creditId": "c_123"}
    paid, late, part, marked, lost = [(await shop.create("XMR-CHAIN", metadata=metadata))["id"] for _ in range(5)]
    await shop.drive(paid, "pay")
    await shop.drive(paid, "confirm", blocks=10)
    await shop.drive(late, "pay", late=True)
    await shop.drive(part, "pay", amount="0.01")
    await shop.drive(part, "expire")
    await shop.drive(marked, "mark", status="Settled")
    await shop.drive(lost, "mark", status="Invalid")
    await shop.all_told()
    expected = {
        json.loads(sample["body"])["type"]: json.loads(sample["body"]) for sample in samples["samples"].values()
    }
    assert set(expected) - set(shop.receiver.types) == {"InvoiceRefund"}
    for body in shop.receiver.bodies:
        sample = expected[body["type"]]
        assert list(body) == list(sample)
        assert [type(value) for value in body.values()] == [type(value) for value in sample.values()]
        assert list(body.get("payment", {})) == list(sample.get("payment", {}))


# Order and retries


def test_the_waits_are_btcpays() -> None:
    assert RETRY_AFTER_SECONDS == (10, 60, 600, 600, 600, 600, 600, 600)


@pytest.mark.parametrize("failure", [500, 503, 408, 429, httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
async def test_a_failure_of_the_receiver_is_retried_and_later_events_wait(shop: Shop, failure: int | Exception) -> None:
    shop.receiver.answers = [failure, failure]
    await shop.drive((await shop.create())["id"], "mark", status="Invalid")
    assert await shop.all_told() == ["InvoiceCreated"] * 3 + ["InvoiceInvalid"]
    first, second, third, _ = shop.receiver.bodies
    assert [body["isRedelivery"] for body in (first, second, third)] == [False, True, True]
    assert len({body["deliveryId"] for body in (first, second, third)}) == 3
    assert {body["originalDeliveryId"] for body in (first, second, third)} == {first["deliveryId"]}
    assert {body["timestamp"] for body in (first, second, third)} == {first["timestamp"]}


@pytest.mark.parametrize("refusal", [400, 401, 403, 404, 410, 422, 301])
async def test_any_other_refusal_is_final(shop: Shop, refusal: int) -> None:
    shop.receiver.answers = [refusal]
    await shop.drive((await shop.create())["id"], "mark", status="Invalid")
    assert await shop.all_told() == ["InvoiceCreated", "InvoiceInvalid"]


async def test_it_gives_up_after_eight_retries_and_goes_on(shop: Shop) -> None:
    shop.receiver.answers = [500] * 9
    await shop.drive((await shop.create())["id"], "mark", status="Invalid")
    assert await shop.all_told() == ["InvoiceCreated"] * 9 + ["InvoiceInvalid"]


async def test_no_retries_where_automatic_redelivery_is_off(shop: Shop) -> None:
    (webhook,) = (await shop.api("GET", WEBHOOKS)).json()
    await shop.api("PUT", f"{WEBHOOKS}/{webhook['id']}", json={"url": HOOK_URL, "automaticRedelivery": False})
    shop.receiver.answers = [500]
    await shop.create()
    assert await shop.all_told() == ["InvoiceCreated"]


async def test_a_stubborn_receiver_does_not_hold_up_another(shop: Shop) -> None:
    await shop.api("POST", WEBHOOKS, json={"url": "http://other.test/hook"})

    def stubborn(request: httpx.Request) -> bool:
        return request.url.host == "receiver.test"

    shop.receiver.refuse = stubborn
    await shop.drive((await shop.create())["id"], "pay")
    await shop.all_told()
    other = [json.loads(request.content)["type"] for request in shop.receiver.requests if not stubborn(request)]
    assert other[-1] == "InvoiceSettled"
    assert len(other) == 5


# Deliveries


async def test_deliveries_are_written_down_with_what_came_of_them(shop: Shop) -> None:
    shop.receiver.answers = [httpx.ConnectError("refused"), 404]
    await shop.create()
    await shop.all_told()
    rows = await deliveries(shop)
    assert [(row["status"], row["httpCode"]) for row in rows] == [("HttpError", 404), ("Failed", None)]
    assert all(row["errorMessage"] for row in rows)
    assert [row["id"] for row in rows] == [body["deliveryId"] for body in shop.receiver.bodies[::-1]]


async def test_a_redelivery_is_the_same_event_under_a_new_id(shop: Shop) -> None:
    await shop.create()
    await shop.all_told()
    (row,) = await deliveries(shop)
    (webhook,) = (await shop.api("GET", WEBHOOKS)).json()
    path = f"{WEBHOOKS}/{webhook['id']}/deliveries/{row['id']}"
    new_id = (await shop.api("POST", f"{path}/redeliver")).json()
    await shop.all_told()
    first, second = shop.receiver.bodies
    assert second == {**first, "deliveryId": new_id, "isRedelivery": True}
    assert (await shop.api("GET", f"{path}/request")).content == shop.receiver.requests[0].content
    assert (await shop.api("GET", path)).json() == row


async def test_the_driver_redelivers_as_often_as_it_is_told(shop: Shop) -> None:
    id = (await shop.create())["id"]
    await shop.drive(id, "pay")
    await shop.all_told()
    await shop.drive(id, "redeliver", type="InvoiceSettled", times=20)
    assert (await shop.all_told())[5:] == ["InvoiceSettled"] * 20


# What is lost


async def test_dropped_events_never_come(shop: Shop) -> None:
    await shop.world("lose-events", from_now_on=True)
    await shop.drive((await shop.create())["id"], "pay")
    assert await shop.all_told() == []
    await shop.world("lose-events")
    await shop.create()
    assert await shop.all_told() == ["InvoiceCreated"]


async def test_losing_events_ends_a_pending_retry_without_a_trace(open_shop: Opener) -> None:
    async with open_shop(time_scale=1.0) as shop:
        shop.receiver.answers = [500]
        await shop.drive((await shop.create())["id"], "pay")
        while len(shop.receiver.requests) < 1:
            await shop.client.get("/sandbox/")
        assert (await shop.world("lose-events"))["lost"] == 5
        assert await shop.all_told() == ["InvoiceCreated"]
        assert len(await deliveries(shop)) == 1
        await shop.create()
        assert await shop.all_told() == ["InvoiceCreated", "InvoiceCreated"]


async def test_a_restart_loses_the_queue_and_keeps_the_deliveries(open_shop: Opener, receiver: Receiver) -> None:
    async with open_shop(time_scale=1.0) as shop:
        receiver.answers = [500]
        await shop.drive((await shop.create())["id"], "pay")
        while len(receiver.requests) < 1:
            await shop.client.get("/sandbox/")
    async with open_shop() as shop:
        assert await shop.all_told() == ["InvoiceCreated"]
        assert [row["httpCode"] for row in await deliveries(shop)] == [500]


# The webhooks themselves


async def test_the_configured_webhook_is_there_once_however_often_it_starts(open_shop: Opener) -> None:
    for secret in (SECRET, SECRET, "whsec-new"):
        async with open_shop(webhook_secret=secret) as shop:
            (webhook,) = (await shop.api("GET", WEBHOOKS)).json()
            assert (webhook["url"], webhook["authorizedEvents"]["everything"]) == (HOOK_URL, True)
            await shop.create()
            await shop.all_told()
            request = shop.receiver.requests[-1]
            assert request.headers["BTCPay-Sig"] == signature(secret, request.content)


async def test_no_webhook_is_there_without_a_url(open_shop: Opener) -> None:
    async with open_shop(webhook_url=None, webhook_secret=None) as shop:
        assert (await shop.api("GET", WEBHOOKS)).json() == []


async def test_a_secret_is_shown_once_and_kept_by_an_update_without_one(shop: Shop) -> None:
    url = "http://second.test/hook"
    created = (await shop.api("POST", WEBHOOKS, json={"url": url})).json()
    assert len(created["secret"]) >= 20
    path = f"{WEBHOOKS}/{created['id']}"
    assert "secret" not in (await shop.api("GET", path)).json()
    updated = await shop.api("PUT", path, json={"url": url, "enabled": True})
    assert "secret" not in updated.json()
    await shop.create()
    await shop.all_told()
    (request,) = [request for request in shop.receiver.requests if request.url.host == "second.test"]
    assert request.headers["BTCPay-Sig"] == signature(created["secret"], request.content)


async def test_a_webhook_gets_only_the_events_it_wants(shop: Shop) -> None:
    wanted = {"everything": False, "specificEvents": ["InvoiceSettled"]}
    await shop.api("POST", WEBHOOKS, json={"url": "http://some.test/hook", "authorizedEvents": wanted})
    await shop.api("POST", WEBHOOKS, json={"url": "http://none.test/hook", "enabled": False})
    await shop.drive((await shop.create())["id"], "pay")
    await shop.all_told()
    hosts = [request.url.host for request in shop.receiver.requests]
    assert (hosts.count("receiver.test"), hosts.count("some.test"), hosts.count("none.test")) == (5, 1, 0)


async def test_a_deleted_webhook_is_gone(shop: Shop) -> None:
    (webhook,) = (await shop.api("GET", WEBHOOKS)).json()
    path = f"/api/v1/webhooks/{webhook['id']}"
    assert (await shop.api("DELETE", path)).status_code == 200
    assert (await shop.api("GET", path)).json()["code"] == "webhook-not-found"
    await shop.create()
    assert await shop.all_told() == []


async def test_what_is_not_there_is_404(shop: Shop) -> None:
    (webhook,) = (await shop.api("GET", WEBHOOKS)).json()
    for path in ("nothing", "nothing/deliveries"):
        assert (await shop.api("GET", f"{WEBHOOKS}/{path}")).json()["code"] == "webhook-not-found"
    for path in ("nothing", "nothing/request"):
        answer = await shop.api("GET", f"{WEBHOOKS}/{webhook['id']}/deliveries/{path}")
        assert answer.json()["code"] == "webhookdelivery-not-found"


async def test_a_webhook_wants_a_url(shop: Shop) -> None:
    answer = await shop.api("POST", WEBHOOKS, json={"url": "ftp://x"})
    assert (answer.status_code, answer.json()[0]["path"]) == (422, "url")
