"""What is forgotten in time, and that nothing is spent, charged or explained otherwise for it."""

import hashlib
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from app.jobs import JOBS
from app.kernel.idempotency import forget_old_answers
from app.metering.retention import forget_closed_holds
from app.topups.inbox import forget_old_bodies
from tests.rig import Customer, Rig

D = Decimal


async def lived(rig: Rig) -> tuple[Customer, dict[str, Any]]:
    """A hold of each end and one that is open, all made 36 days ago."""
    customer = await rig.customer("20")
    held = {
        name: await rig.authorize(customer.api_key, "0.1", name) for name in ("settled", "released", "expired", "open")
    }
    await rig.settle(held["settled"]["hold_id"], "0.05")
    await rig.meter("release", hold_id=held["released"]["hold_id"])
    rig.sql("UPDATE hold SET expires_at = now() WHERE request_id = 'expired'")
    for job in JOBS:
        if job.name == "expire holds":
            await job.work(rig.house)
    rig.sql(
        """UPDATE hold SET created_at = created_at - interval '36 days', closed_at = closed_at - interval '36 days',
                           window_start = window_start - interval '36 days'"""
    )
    rig.sql(
        """UPDATE usage u SET window_start = h.window_start FROM hold h WHERE h.id = u.hold_id;
           UPDATE api_key k SET window_start = h.window_start FROM hold h WHERE h.key_id = k.id"""
    )
    return customer, held


def request_ids(rig: Rig) -> list[str]:
    return [request_id for (request_id,) in rig.sql("SELECT request_id FROM hold ORDER BY created_at")]


async def test_closed_holds_are_gone_after_35_days_and_the_open_ones_stay(rig: Rig) -> None:
    customer, _ = await lived(rig)
    young = await rig.authorize(customer.api_key, "0.1", "young")
    await rig.meter("release", hold_id=young["hold_id"])
    assert await forget_closed_holds(rig.house.db) == 3
    assert request_ids(rig) == ["open", "young"]
    assert await rig.held(customer) == D("0.1")
    assert await forget_closed_holds(rig.house.db) == 0


async def test_a_settled_call_stays_charged_once_when_its_hold_is_gone(rig: Rig) -> None:
    customer, held = await lived(rig)
    await forget_closed_holds(rig.house.db)
    balance = await rig.balance(customer)
    again = await rig.settle(held["settled"]["hold_id"], "5")
    assert again["cost"]["total_cost_usd"] == D("0.05")
    charge = await rig.meter("charge", request_id="settled", api_key=customer.api_key, cost_usd="5")
    assert charge.status_code == 409 or charge.json().get("cost", {}).get("total_cost_usd") == 0.05, charge.text
    renewed = await rig.meter("authorize", request_id="settled", api_key=customer.api_key, max_cost_usd="0.1")
    assert renewed.status_code == 409
    assert renewed.json()["error"]["code"] == "request_id_reuse"
    assert await rig.balance(customer) == balance
    assert request_ids(rig) == ["open"]


async def test_a_late_settle_of_an_expired_hold_that_is_gone_is_charged_all_the_same(rig: Rig) -> None:
    customer, held = await lived(rig)
    await forget_closed_holds(rig.house.db)
    balance = await rig.balance(customer)
    await rig.settle(held["expired"]["hold_id"], "0.02")
    await rig.settle(held["expired"]["hold_id"], "0.02")
    assert await rig.balance(customer) == balance - D("0.02")
    assert (await rig.authorize(customer.api_key, "0.1", "released"))["decision"] == "allow"  # may be asked for anew


async def test_a_call_that_nothing_was_held_for_stays_charged_once_beside_others(rig: Rig) -> None:
    customer, other = await rig.customer("20"), await rig.customer("20")

    async def reported(*calls: tuple[str, Customer]) -> list[dict[str, Any]]:
        """In one batch: what each was answered."""
        answer = await rig.client.post("/v1/meter/events", headers=await rig.service(), json=[
            {"specversion": "1.0", "id": name, "source": "proxy", "type": "call", "data": {
                "cost_usd": "0.05", "api_key_hash": hashlib.sha256(whose.api_key.encode()).hexdigest()}}
            for name, whose in calls
        ])  # fmt: skip
        return list(answer.json()["results"])

    assert [each["status"] for each in await reported(("old", customer))] == [200]
    await rig.meter("charge", request_id="old-charge", api_key=customer.api_key, cost_usd="0.05")
    rig.sql("UPDATE hold SET closed_at = closed_at - interval '36 days'")
    assert await forget_closed_holds(rig.house.db) == 2
    answers = await reported(("new", customer), ("old", customer), ("new", other), ("newer", customer))
    assert [each["status"] for each in answers] == [200, 409, 200, 200]
    assert answers[1]["error"]["code"] == "request_id_reuse"
    charge = await rig.meter("charge", request_id="old-charge", api_key=customer.api_key, cost_usd="0.05")
    assert charge.status_code == 409
    assert [each["status"] for each in await reported(("new", customer), ("newer", customer))] == [200, 200]
    assert (await rig.balance(customer), await rig.balance(other)) == (D("19.8"), D("19.95"))


async def test_many_are_forgotten_in_portions_from_an_index(rig: Rig, owner_conn: psycopg.Connection[Any]) -> None:
    customer, _ = await lived(rig)
    rig.sql(
        """INSERT INTO hold (account_id, id, service, request_id, request_hash, key_id, amount_nusd, state, created_at, expires_at, closed_at)
           SELECT h.account_id, gen_random_uuid(), 'proxy', 'x' || n, '', h.key_id, 1, 'released', h.created_at, h.created_at, h.created_at
           FROM hold h, generate_series(1, 60) n WHERE h.request_id = 'open'"""
    )
    assert await forget_closed_holds(rig.house.db, at_once=7) == 63
    assert request_ids(rig) == ["open"]
    owner_conn.execute("SET enable_seqscan = off")  # the table is small here
    plan = owner_conn.execute(
        "EXPLAIN SELECT 1 FROM hold WHERE closed_at < now() - interval '35 days' ORDER BY closed_at LIMIT 5000"
    ).fetchall()
    assert "hold_closed" in str(plan)
    assert await rig.held(customer) == D("0.1")


async def test_a_webhook_s_body_is_emptied_after_90_days_and_its_redelivery_is_still_one(rig: Rig) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "20")
    for delivery_id in ("old", "young"):
        assert (await rig.deliver(invoice_id, delivery_id=delivery_id)).json() == {"stored": True}
    await rig.process()
    rig.sql("UPDATE webhook_delivery SET received_at = now() - interval '91 days' WHERE delivery_id = 'old'")
    assert await forget_old_bodies(rig.house.db) == 1
    assert rig.sql("SELECT delivery_id, octet_length(raw_body) > 0 FROM webhook_delivery ORDER BY 1") == [
        ("old", False), ("young", True)
    ]  # fmt: skip
    assert await forget_old_bodies(rig.house.db) == 0
    assert (await rig.deliver(invoice_id, delivery_id="old")).json() == {"stored": False}


async def test_saved_answers_are_forgotten_in_portions_after_two_days(rig: Rig) -> None:
    customer = await rig.customer()
    for n in range(5):
        headers = customer.owner | {"Idempotency-Key": f"key-{n}"}
        assert (await rig.client.post("/keys", headers=headers, json={"name": f"k{n}"})).status_code == 201
    rig.sql(
        "UPDATE idempotency SET created_at = now() - interval '49 hours' WHERE scope_key <> (SELECT max(scope_key) FROM idempotency)"
    )
    assert await forget_old_answers(rig.house.db, at_once=2) == 4
    assert rig.sql("SELECT count(*) FROM idempotency") == [(1,)]


@pytest.mark.parametrize("name", ["forget closed holds", "forget old webhooks' bodies", "forget old answers"])
async def test_the_clock_forgets_with_the_service_s_own_rights(rig: Rig, name: str) -> None:
    await lived(rig)
    [job] = [job for job in JOBS if job.name == name]
    await job.work(rig.house)
