"""Notices against a real HTTP server that takes them, fails, stalls and lies."""

import asyncio
import base64
import hashlib
import hmac
import json
from datetime import timedelta

import pytest

from app.adapters.webhooks import HttpWebhooks, PostPatience
from app.notices.courier import Courier
from app.notices.outbox import BACK_OFF, KEPT_DAYS, forget_old, wait
from app.notices.ways import Outcome
from tests.notices.receiver import OK, Received, answer, receiving
from tests.notices.waiting import eventually
from tests.notices.words import deliver, deliveries, set_notices, spend
from tests.rig import Customer, Rig

MANY_BYTES = b"x" * 3_000_000


async def send_test(rig: Rig, customer: Customer) -> str:
    made = await rig.client.post("/notices/test", headers=customer.owner)
    assert made.status_code == 200, made.text
    return str(made.json()["id"])


def is_signed(received: Received, secret: str) -> bool:
    """By Standard Webhooks' text, written here once more."""
    content = f"{received.headers['webhook-id']}.{received.headers['webhook-timestamp']}.".encode() + received.body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    wanted = "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return wanted in received.headers["webhook-signature"].split(" ")


async def test_a_notice_is_posted_signed_with_its_id_and_its_data(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving() as receiver:
        secret = (await set_notices(rig, customer, webhook_url=receiver.url))["signing_secret"]
        notice_id = await send_test(rig, customer)
        assert await deliver(rig) == 1
        assert await deliver(rig, after=timedelta(days=4)) == 0
    [received] = receiver.received
    assert (received.headers["webhook-id"], received.path) == (notice_id, "/hooks/a-token-of-its-own")
    assert received.headers["content-type"] == "application/json"
    assert is_signed(received, secret)
    assert not is_signed(received, "whsec_" + base64.b64encode(b"another" * 4).decode())
    assert set(received.json) == {"type", "timestamp", "data"}
    [delivery] = await deliveries(rig, customer)
    assert (delivery["state"], delivery["attempts"], delivery["last_status"]) == ("delivered", 1, 200)


async def test_one_that_fails_is_sent_again_later_and_later_with_its_id_and_body_and_at_last_given_up(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving(answer("500 Oh")) as receiver:
        await set_notices(rig, customer, webhook_url=receiver.url)
        await send_test(rig, customer)
        passed = timedelta(0)
        assert await deliver(rig) == 1
        for pause in BACK_OFF:
            passed += pause
            assert await deliver(rig, after=passed - timedelta(seconds=2)) == 0
            assert await deliver(rig, after=passed + timedelta(seconds=5)) == 1
            rig.sql(
                "UPDATE notice SET next_at = next_at + %s WHERE state = 'pending'", passed
            )  # its clock is the real one
        assert await deliver(rig, after=timedelta(days=30)) == 0
    assert timedelta(days=3) <= passed <= timedelta(days=4)
    assert len(receiver.received) == len(BACK_OFF) + 1
    assert len({(each.headers["webhook-id"], each.body) for each in receiver.received}) == 1
    [dead] = await deliveries(rig, customer, status="dead")
    assert (dead["last_status"], dead["last_error"], dead["next_attempt_at"]) == (500, "status_500", None)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (answer("302 Found", "location: http://127.0.0.1:1/inside"), "status_302"),
        (answer("404 Not Found", body=MANY_BYTES), "status_404"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 300_000 + b"\r\n\r\n", "unreachable"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "unreachable"),
        (b"", "unreachable"),
        (None, "timeout"),
    ],
    ids=["redirect", "long body", "long head", "no http", "hang up", "stall"],
)
async def test_whatever_a_receiver_answers_but_2xx_is_a_failure(rig: Rig, said: bytes | None, error: str) -> None:
    patience = PostPatience(total_seconds=0.5 if said is None else 15)
    async with receiving(said) as receiver:
        webhooks = HttpWebhooks(allow_private=True, patience=patience)
        sent = await webhooks.post(receiver.url, b"{}", {"content-type": "application/json"})
    assert (sent.outcome, sent.error) == (Outcome.FAILED, error)
    assert len(receiver.received) == 1


async def test_a_success_with_an_endless_answer_is_a_success(rig: Rig) -> None:
    async with receiving(answer("200 OK", body=MANY_BYTES)) as receiver:
        sent = await HttpWebhooks(allow_private=True).post(receiver.url, b"{}", {})
    assert (sent.outcome, sent.status) == (Outcome.DELIVERED, 200)


async def test_410_switches_the_webhook_off_until_it_is_set_again(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving(answer("410 Gone"), OK) as receiver:
        await set_notices(rig, customer, webhook_url=receiver.url)
        await send_test(rig, customer)
        await deliver(rig)
        assert (await rig.client.get("/notices", headers=customer.owner)).json()["webhook_state"] == "gone"
        assert [each["state"] for each in await deliveries(rig, customer)] == ["dead"]
        refused = await rig.client.post("/notices/test", headers=customer.owner)
        assert refused.status_code == 422
        again = await set_notices(rig, customer, webhook_url=receiver.url)
        assert again["webhook_state"] == "active"
        await send_test(rig, customer)
        await deliver(rig)
    assert [each["state"] for each in await deliveries(rig, customer)] == ["delivered", "dead"]


async def test_a_receiver_may_ask_for_more_time_than_the_schedule_gives(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving(answer("429 Slow", "retry-after: 3600"), OK) as receiver:
        await set_notices(rig, customer, webhook_url=receiver.url)
        await send_test(rig, customer)
        await deliver(rig)
        assert await deliver(rig, after=timedelta(minutes=50)) == 0
        assert await deliver(rig, after=timedelta(minutes=61)) == 1
    assert wait(1, 10**9) == BACK_OFF[-1]


async def test_a_receiver_that_stalls_keeps_nobody_else_waiting(rig: Rig) -> None:
    """As many of one account's notices as there can be at once stall, and another account's arrives all the same."""
    staller, other = await rig.customer(), await rig.customer()
    async with receiving(None) as stalling, receiving() as receiver:
        await set_notices(rig, staller, webhook_url=stalling.url)
        await set_notices(rig, other, webhook_url=receiver.url)
        for _ in range(5):
            await send_test(rig, staller)
        assert await rig.house.courier.deliver() == 2
        await send_test(rig, other)
        await eventually(lambda: len(stalling.received) == 2)
        assert await rig.house.courier.deliver() == 1
        await eventually(lambda: len(receiver.received) == 1)
        assert len(stalling.received) == 2
        await rig.house.courier.close()


async def test_a_notice_whose_courier_died_is_taken_by_another_once_its_lease_has_ended(rig: Rig) -> None:
    customer, house = await rig.customer(), rig.house
    async with receiving(None, OK) as receiver:
        await set_notices(rig, customer, webhook_url=receiver.url)
        await send_test(rig, customer)
        dying = Courier(house.db, house.settings.sealer, house.webhooks, house.messages)
        await dying.deliver()
        await eventually(lambda: len(receiver.received) == 1)
        await dying.close()
        assert await deliver(rig) == 0
        assert await deliver(rig, after=timedelta(minutes=3)) == 1
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]


async def test_two_couriers_send_each_notice_once(rig: Rig) -> None:
    customer, house = await rig.customer(), rig.house
    couriers = [Courier(house.db, house.settings.sealer, house.webhooks, house.messages) for _ in range(4)]
    async with receiving() as receiver:
        await set_notices(rig, customer, webhook_url=receiver.url)
        ids = {await send_test(rig, customer) for _ in range(8)}
        for _ in range(8):
            await asyncio.gather(*(courier.deliver() for courier in couriers))
            await asyncio.gather(*(courier.idle() for courier in couriers))
    assert sorted(each.headers["webhook-id"] for each in receiver.received) == sorted(ids)


async def test_a_notice_can_be_sent_again_with_its_id_also_a_dead_one(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving(answer("410 Gone"), OK) as receiver:
        await set_notices(rig, customer, webhook_url=receiver.url)
        notice_id = await send_test(rig, customer)
        await deliver(rig)
        await set_notices(rig, customer, webhook_url=receiver.url)
        replayed = await rig.client.post(f"/notices/deliveries/{notice_id}/replay", headers=customer.owner)
        assert (replayed.status_code, replayed.json()) == (200, {"id": notice_id, "deliveries": 1})
        await deliver(rig)
        stranger = await rig.customer()
        for path in (notice_id, "msg_0", "nothing"):
            missing = await rig.client.post(f"/notices/deliveries/{path}/replay", headers=stranger.owner)
            assert missing.status_code == 404
    assert [each.headers["webhook-id"] for each in receiver.received] == [notice_id] * 2
    assert [each["state"] for each in await deliveries(rig, customer)] == ["delivered"]


async def test_while_a_secret_gives_way_to_another_both_sign(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving() as receiver:
        old = (await set_notices(rig, customer, webhook_url=receiver.url))["signing_secret"]
        new = (await rig.client.post("/notices/secret", headers=customer.owner)).json()["signing_secret"]
        await deliver(rig)
        rig.sql("UPDATE notice_address SET secret_before_until = now() - interval '1 second'")
        await send_test(rig, customer)
        await deliver(rig)
    during, after = receiver.received
    assert (is_signed(during, old), is_signed(during, new)) == (True, True)
    assert (is_signed(after, old), is_signed(after, new)) == (False, True)
    assert during.json["data"]["changed"] == "signing_secret"


async def test_a_secret_that_changes_while_notices_are_under_way_signs_each_by_the_old_or_the_new(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving() as receiver:
        old = (await set_notices(rig, customer, webhook_url=receiver.url))["signing_secret"]
        for _ in range(20):
            await send_test(rig, customer)
        changing = rig.client.post("/notices/secret", headers=customer.owner)
        answer, *_ = await asyncio.gather(changing, deliver(rig), deliver(rig))
        new = answer.json()["signing_secret"]
        while await deliver(rig):
            """Two of an account's at once."""
    assert len({each.headers["webhook-id"] for each in receiver.received}) == 21  # and that it was changed
    assert all(is_signed(each, old) or is_signed(each, new) for each in receiver.received)


async def test_a_change_is_told_to_the_address_that_was_there_before(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving() as old, receiving() as new:
        secret = (await set_notices(rig, customer, webhook_url=old.url))["signing_secret"]
        await set_notices(rig, customer, webhook_url=new.url, events=[])
        assert (await rig.client.delete("/notices", headers=customer.owner)).status_code == 204
        for _ in range(3):
            await deliver(rig)
    [told_old] = old.received
    assert (told_old.json["type"], told_old.json["data"]) == (
        "notices.changed",
        {"changed": "address", "is_last": True},
    )
    assert is_signed(told_old, secret)
    assert set(new.types) == {"notices.changed"}
    assert new.url not in told_old.body.decode()


async def test_what_was_delivered_a_month_ago_is_forgotten_and_what_waits_is_kept(rig: Rig) -> None:
    customer = await rig.customer()
    async with receiving() as receiver:
        await set_notices(rig, customer, webhook_url=receiver.url)
        await send_test(rig, customer)
        await deliver(rig)
        await send_test(rig, customer)
    rig.sql(
        "UPDATE notice SET closed_at = now() - make_interval(days => %s) WHERE closed_at IS NOT NULL", KEPT_DAYS + 1
    )
    assert await forget_old(rig.house.db) == 1
    assert [each["state"] for each in await deliveries(rig, customer)] == ["pending"]


async def test_the_same_bytes_are_sent_whatever_is_in_them(rig: Rig) -> None:
    customer = await rig.customer("10")
    async with receiving() as receiver:
        await set_notices(rig, customer, webhook_url=receiver.url)
        await spend(rig, customer, "9.999999955")
        await deliver(rig)
    [received] = receiver.received
    assert b'"balance_usd": 0.000000045' in received.body or b'"balance_usd":0.000000045' in received.body
    assert json.loads(received.body)["data"]["percent"] == 5
