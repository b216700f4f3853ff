"""Metering: each money verb works, refuses, is repeated, and races."""

import asyncio
import hashlib
import uuid
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from app.admin.tokens import create_token
from app.kernel.errors import KeyLimitExceeded
from app.keys.verify import KeyOwner
from app.metering.holds import Ask, Meter, Work, expire_holds
from tests.databases import CITUS
from tests.rig import Rig, exact

D = Decimal


async def test_fifty_concurrent_authorizes_on_a_balance_for_ten_allow_exactly_ten(rig: Rig) -> None:
    customer = await rig.customer("10")
    answers = await asyncio.gather(*(rig.authorize(customer.api_key, "1") for _ in range(50)))
    assert Counter(answer["decision"] for answer in answers) == {"allow": 10, "deny": 40}
    refused = [answer for answer in answers if answer["decision"] == "deny"]
    assert {(r["status"], r["error"]["code"]) for r in refused} == {(429, "funds_held")}
    assert await rig.held(customer) == 10


async def test_an_empty_balance_is_402_with_the_numbers_that_explain_it(rig: Rig) -> None:
    customer = await rig.customer("10")
    denied = await rig.authorize(customer.api_key, "10.5")
    assert (denied["decision"], denied["status"], denied["error"]["code"]) == ("deny", 402, "insufficient_balance")
    assert denied["error"]["message"] == "Insufficient balance: needs $10.5, $10 available"
    assert denied["error"]["metadata"]["shortfall_usd"] == D("0.5")


async def test_parallel_charges_on_one_key_never_pass_its_limit(rig: Rig) -> None:
    customer = await rig.customer("100")
    key = await rig.new_key(customer, usage_limit_usd=1, reset_period="monthly")
    answers = await asyncio.gather(
        *(rig.meter("charge", request_id=f"c{i}", api_key=key["api_key"], cost_usd="0.03") for i in range(60))
    )
    decisions = Counter(answer.json()["decision"] for answer in answers)
    assert decisions == {"allow": 33, "deny": 27}
    assert await rig.balance(customer) == D("99.01")


@pytest.mark.parametrize("batch", [True, False])
async def test_a_call_for_nothing_does_not_pass_a_key_whose_limit_is_exhausted(rig: Rig, batch: bool) -> None:
    house = rig.house
    meter = Meter(house.db, house.settings.pepper, hold_sync_commit=True, batch=batch, by_account=bool(CITUS))
    customer = await rig.customer("10")
    key = (await rig.new_key(customer, usage_limit_usd="0.5"))["api_key"]
    [(account_id, key_id)] = rig.sql("SELECT account_id, id FROM api_key WHERE limit_nusd IS NOT NULL")
    owner = KeyOwner(account_id, key_id)
    assert (await rig.authorize(key, "0"))["decision"] == "allow"
    await rig.meter("charge", request_id=uuid.uuid4().hex, api_key=key, cost_usd="0.5")
    for verb in (
        lambda n: meter.authorize("proxy", owner, Ask(f"h{n}", 0, None, None)),
        lambda n: meter.charge("proxy", owner, Ask(f"c{n}", 0, None, None), Work(0)),
    ):
        answers = await asyncio.gather(*(verb(number) for number in range(5)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {KeyLimitExceeded}
    denied = await rig.authorize(key, "0")
    assert (denied["status"], denied["error"]["code"]) == (402, "key_limit_exceeded")
    charge = exact(await rig.meter("charge", request_id=uuid.uuid4().hex, api_key=key, cost_usd=0))
    assert (charge["decision"], charge["error"]["code"]) == ("deny", "key_limit_exceeded")


async def test_mixed_holds_and_charges_never_pass_a_limit_or_the_balance(rig: Rig) -> None:
    customer = await rig.customer("10")
    key = await rig.new_key(customer, usage_limit_usd=5)

    async def call(number: int) -> None:
        if number % 3 == 0:
            await rig.meter("charge", request_id=f"m{number}", api_key=key["api_key"], cost_usd="0.2")
            return
        held = await rig.authorize(key["api_key"], "0.4", f"m{number}")
        if held["decision"] == "allow":
            await (rig.settle(held["hold_id"], "0.3") if number % 2 else rig.meter("release", hold_id=held["hold_id"]))

    await asyncio.gather(*(call(number) for number in range(60)))
    assert D("5") <= await rig.balance(customer) < D("10")
    assert await rig.held(customer) == 0


async def test_revoke_then_a_hundred_authorizes_none_allowed(rig: Rig) -> None:
    customer = await rig.customer("10")
    key = await rig.new_key(customer)
    assert (await rig.authorize(key["api_key"], "0.01"))["decision"] == "allow"
    assert (await rig.client.delete(f"/keys/{key['_id']}", headers=customer.owner)).status_code == 200
    answers = await asyncio.gather(*(rig.authorize(key["api_key"], "0.01") for _ in range(100)))
    assert {(a["decision"], a["status"], a["error"]["code"]) for a in answers} == {("deny", 401, "invalid_api_key")}


async def test_authorizes_that_race_a_revoke_stop_for_good_when_it_is_answered(rig: Rig) -> None:
    customer = await rig.customer("10")
    key = await rig.new_key(customer)
    is_revoked = asyncio.Event()
    allowed_after = 0

    async def spend() -> None:
        nonlocal allowed_after
        for _ in range(15):
            began_after = is_revoked.is_set()
            answer = await rig.authorize(key["api_key"], "0.001")
            allowed_after += began_after and answer["decision"] == "allow"

    async def revoke() -> None:
        await asyncio.sleep(0.05)
        await rig.client.delete(f"/keys/{key['_id']}", headers=customer.owner)
        is_revoked.set()

    await asyncio.gather(revoke(), *(spend() for _ in range(8)))
    assert allowed_after == 0


async def test_the_same_authorize_again_answers_the_same_hold_while_it_is_open(rig: Rig) -> None:
    customer = await rig.customer("10")
    first = await rig.authorize(customer.api_key, "1", "same")
    again = await asyncio.gather(*(rig.authorize(customer.api_key, "1", "same") for _ in range(20)))
    assert {answer["hold_id"] for answer in again} == {first["hold_id"]}
    assert await rig.held(customer) == 1
    await rig.settle(first["hold_id"], "0.5")
    refused = await rig.meter("authorize", request_id="same", api_key=customer.api_key, max_cost_usd="1")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "hold_closed")
    assert refused.json()["error"]["metadata"] == {"state": "settled"}
    assert await rig.held(customer) == 0


@pytest.mark.parametrize("ended", ["settled", "released", "expired", "overdue"])
async def test_a_hold_that_is_closed_is_not_answered_again_though_all_is_spent(rig: Rig, ended: str) -> None:
    customer = await rig.customer("10")
    hold = await rig.authorize(customer.api_key, "9", "R")
    if ended == "settled":
        await rig.settle(hold["hold_id"], "0.1")
    elif ended == "released":
        await rig.meter("release", hold_id=hold["hold_id"])
    else:
        rig.sql("UPDATE hold SET expires_at = now() - interval '1 second'")
    if ended == "expired":
        assert await expire_holds(rig.house.db) == 1
    refused = await rig.meter("authorize", request_id="R", api_key=customer.api_key, max_cost_usd="9")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "hold_closed")
    assert refused.json()["error"]["metadata"] == {"state": "expired" if ended == "overdue" else ended}
    assert await rig.held(customer) == (9 if ended == "overdue" else 0)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        ("UPDATE api_key SET deleted_at = now()", "invalid_api_key"),
        ("UPDATE api_key SET disabled_at = now()", "invalid_api_key"),
        ("UPDATE api_key SET expire_at = now()", "invalid_api_key"),
        ("UPDATE api_key SET scopes = '{balance}'", "missing_scope"),
        ("UPDATE api_key SET allowed_models = '{other}'", "model_not_allowed"),
        ("UPDATE account SET status = 'frozen'", "account_frozen"),
    ],
)
async def test_an_open_hold_is_not_answered_again_to_a_key_that_may_spend_no_more(
    rig: Rig, act: str, code: str
) -> None:
    customer = await rig.customer("10")
    await rig.authorize(customer.api_key, "9", "R")
    rig.sql(act)
    denied = await rig.authorize(customer.api_key, "9", "R")
    assert (denied["decision"], denied["error"]["code"]) == ("deny", code)


async def test_twenty_first_authorizes_of_one_request_at_once_hold_once(rig: Rig) -> None:
    customer = await rig.customer("10")
    answers = await asyncio.gather(*(rig.authorize(customer.api_key, "1", "first") for _ in range(20)))
    assert len({answer["hold_id"] for answer in answers}) == 1
    assert await rig.held(customer) == 1


@pytest.mark.parametrize("change", [{"max_cost_usd": "2"}, {"model": "other"}, {"ttl_seconds": 60}])
async def test_a_request_id_with_another_request_is_409(rig: Rig, change: dict[str, Any]) -> None:
    customer = await rig.customer("10")
    first = {"request_id": "r1", "api_key": customer.api_key, "max_cost_usd": "1", "model": "m"}
    assert (await rig.meter("authorize", **first)).status_code == 200
    refused = await rig.meter("authorize", **(first | change))
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "request_id_reuse")


async def test_settles_of_one_hold_at_once_charge_once_and_all_get_the_same_answer(rig: Rig) -> None:
    customer = await rig.customer("10")
    hold = await rig.authorize(customer.api_key, "1")
    answers = await asyncio.gather(*(rig.settle(hold["hold_id"], str(D("0.1") * (i + 1))) for i in range(20)))
    assert len({answer["charge_id"] for answer in answers}) == 1
    assert len({answer["cost"]["total_cost_usd"] for answer in answers}) == 1
    assert await rig.balance(customer) == 10 - answers[0]["cost"]["total_cost_usd"]
    assert await rig.held(customer) == 0


async def test_a_settle_above_its_hold_is_charged_in_full_below_zero_and_the_next_authorize_refuses(rig: Rig) -> None:
    customer = await rig.customer("10")
    hold = await rig.authorize(customer.api_key, "9")
    charged = await rig.settle(hold["hold_id"], "12.5")
    assert (charged["balance_usd"], charged["flags"]) == (D("-2.5"), ["above_hold"])
    denied = await rig.authorize(customer.api_key, "0")
    assert denied["error"]["code"] == "insufficient_balance"


async def test_an_expired_hold_frees_its_money_and_a_late_settle_still_charges(rig: Rig) -> None:
    customer = await rig.customer("10")
    hold = await rig.authorize(customer.api_key, "1", ttl_seconds=1)
    rig.sql("UPDATE hold SET expires_at = now() - interval '1 second'")
    counts = await asyncio.gather(*(expire_holds(rig.house.db) for _ in range(5)))
    assert sum(counts) == 1
    assert await rig.held(customer) == 0
    charged = await rig.settle(hold["hold_id"], "0.25")
    assert (charged["balance_usd"], charged["flags"]) == (D("9.75"), ["late"])


async def test_a_settle_whose_hold_is_gone_still_charges_and_says_so(rig: Rig) -> None:
    customer = await rig.customer("10")
    hold = await rig.authorize(customer.api_key, "1")
    # What a database crash with HOLD_SYNC_COMMIT=off leaves behind: no hold, nothing held.
    rig.sql("DELETE FROM hold")
    rig.sql("UPDATE account SET held_nusd = 0")
    rig.sql("UPDATE api_key SET held_nusd = 0")
    charged = await rig.settle(hold["hold_id"], "0.25")
    assert (charged["balance_usd"], charged["flags"]) == (D("9.75"), ["hold_missing"])
    again = await rig.settle(hold["hold_id"], "0.25")
    assert again == charged


async def test_release_frees_the_hold_is_repeatable_and_refused_after_a_settle(rig: Rig) -> None:
    customer = await rig.customer("10")
    hold = await rig.authorize(customer.api_key, "1")
    answers = await asyncio.gather(*(rig.meter("release", hold_id=hold["hold_id"]) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert await rig.held(customer) == 0
    settled = await rig.authorize(customer.api_key, "1")
    await rig.settle(settled["hold_id"], "1")
    refused = await rig.meter("release", hold_id=settled["hold_id"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "hold_closed")


async def test_settle_and_release_at_once_end_in_one_of_the_two(rig: Rig) -> None:
    customer = await rig.customer("50")
    for _ in range(10):
        hold = await rig.authorize(customer.api_key, "1")
        settled, released = await asyncio.gather(
            rig.meter("settle", hold_id=hold["hold_id"], cost_usd="1"), rig.meter("release", hold_id=hold["hold_id"])
        )
        assert settled.status_code == 200  # what was used is always charged
        assert released.status_code in (200, 409)
    assert await rig.balance(customer) == 40
    assert await rig.held(customer) == 0


async def test_charge_works_is_repeated_and_races_to_one_effect(rig: Rig) -> None:
    customer = await rig.customer("10")
    body = {"request_id": "once", "api_key": customer.api_key, "cost_usd": "0.5", "model": "m"}
    answers = [response.json() for response in await asyncio.gather(*(rig.meter("charge", **body) for _ in range(20)))]
    assert len({answer["charge_id"] for answer in answers}) == 1
    assert await rig.balance(customer) == D("9.5")
    other = await rig.meter("charge", **(body | {"cost_usd": "0.6"}))
    assert (other.status_code, other.json()["error"]["code"]) == (409, "request_id_reuse")


async def test_one_request_id_is_either_held_or_charged_never_both(rig: Rig) -> None:
    customer = await rig.customer("10")
    await rig.meter("charge", request_id="x", api_key=customer.api_key, cost_usd="1")
    held = await rig.meter("authorize", request_id="x", api_key=customer.api_key, max_cost_usd="1")
    assert held.status_code == 409
    await rig.authorize(customer.api_key, "1", "y")
    charged = await rig.meter("charge", request_id="y", api_key=customer.api_key, cost_usd="1")
    assert charged.status_code == 409
    charges = [rig.meter("charge", request_id="z", api_key=customer.api_key, cost_usd="1") for _ in range(5)]
    holds = [rig.meter("authorize", request_id="z", api_key=customer.api_key, max_cost_usd="1") for _ in range(5)]
    racing = await asyncio.gather(*charges, *holds)
    assert {r.status_code for r in racing} == {200, 409}


async def test_two_proxies_may_use_the_same_request_id(rig: Rig) -> None:
    customer = await rig.customer("10")
    token = await create_token(rig.house.db, rig.house.settings.pepper, "service", "second")
    body = {"request_id": "same", "api_key": customer.api_key, "max_cost_usd": "1"}
    first = await rig.meter("authorize", **body)
    second = await rig.client.post("/v1/meter/authorize", headers={"Authorization": f"Bearer {token}"}, json=body)
    assert first.json()["hold_id"] != second.json()["hold_id"]
    assert await rig.held(customer) == 2
    foreign = await rig.meter("settle", hold_id=second.json()["hold_id"], cost_usd="1")
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "hold_not_found")


async def test_a_hash_of_the_key_is_enough_to_authorize(rig: Rig) -> None:
    customer = await rig.customer("10")
    digest = hashlib.sha256(customer.api_key.encode()).hexdigest()
    response = await rig.meter("authorize", request_id="h", api_key_hash=digest, max_cost_usd="1")
    assert response.json()["decision"] == "allow"


async def test_a_key_is_refused_for_what_it_was_not_made_for(rig: Rig) -> None:
    customer = await rig.customer("10")
    narrow = await rig.new_key(customer, allowed_models=["gpt-4o"], scopes=["spend"])
    assert (await rig.authorize(narrow["api_key"], "1", model="gpt-4o"))["decision"] == "allow"
    for model in ({"model": "o3"}, {}):
        denied = await rig.authorize(narrow["api_key"], "1", **model)
        assert (denied["status"], denied["error"]["code"]) == (403, "model_not_allowed")
    reader = await rig.new_key(customer, scopes=["balance"])
    denied = await rig.authorize(reader["api_key"], "1")
    assert (denied["status"], denied["error"]["code"]) == (403, "missing_scope")


async def test_a_frozen_account_may_not_spend_but_what_it_used_is_charged(rig: Rig) -> None:
    customer = await rig.customer("10")
    hold = await rig.authorize(customer.api_key, "1")
    rig.sql("UPDATE account SET status = 'frozen'")
    denied = await rig.authorize(customer.api_key, "1")
    assert (denied["status"], denied["error"]["code"]) == (403, "account_frozen")
    assert (await rig.settle(hold["hold_id"], "1"))["balance_usd"] == 9


async def test_service_tokens_are_needed_and_refused_within_a_second_of_being_revoked(rig: Rig) -> None:
    customer = await rig.customer("10")
    for headers in ({}, customer.key, {"Authorization": "Bearer svc-nonsense"}):
        response = await rig.client.post("/v1/meter/authorize", headers=headers, json={"request_id": "r"})
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_token")
    await rig.service()
    rig.sql("UPDATE service_token SET revoked_at = now()")
    await asyncio.sleep(1)
    assert (await rig.meter("authorize", request_id="r", api_key=customer.api_key, max_cost_usd="1")).status_code == 401


async def test_an_estimate_without_a_price_is_refused_never_free(rig: Rig) -> None:
    customer = await rig.customer("10")
    response = await rig.meter(
        "authorize", request_id=uuid.uuid4().hex, api_key=customer.api_key, model="nobody/sells-this",
        estimate={"input_tokens": 10},
    )  # fmt: skip
    denied = exact(response)
    assert (denied["decision"], denied["status"], denied["error"]["code"]) == ("deny", 422, "model_not_priced")
