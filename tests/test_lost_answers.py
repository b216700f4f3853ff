"""What a proxy does when an answer was lost, when it dies, or when it only wants to know: no call is free for it, none is charged twice."""

import hashlib
import uuid
from decimal import Decimal
from typing import Any

import pytest
from httpx import Response
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin.tokens import create_token
from app.metering.holds import expire_holds
from app.pricing.catalogue import activate, store
from app.pricing.rows import Dimension, PriceRow
from tests.rig import Customer, Rig, exact

D = Decimal


async def sell(rig: Rig, *rows: PriceRow) -> None:
    """Have a new version with these prices in effect."""

    async def work(session: AsyncSession) -> None:
        version_id = await store(session, rows, (), source="test", source_hash="0")
        await activate(session, version_id, allow_drops=True, notice_seconds=0)

    await rig.house.db.transaction(work)
    rig.house.catalogues._fresh_until = None


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def as_service(rig: Rig, token: str, verb: str, **body: Any) -> Response:
    return await rig.client.post(f"/v1/meter/{verb}", headers={"Authorization": f"Bearer {token}"}, json=body)


# --- by request_id ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["api_key", "api_key_hash"])
async def test_a_hold_whose_answer_was_lost_is_settled_or_released_by_its_request_id(rig: Rig, by: str) -> None:
    customer = await rig.customer("10")
    who = {by: customer.api_key if by == "api_key" else hashed(customer.api_key)}
    for request_id in ("a", "b", "c"):
        await rig.authorize(customer.api_key, "1", request_id)
    released = await rig.meter("release", request_id="a", **who)
    assert (released.status_code, await rig.held(customer)) == (200, D(2))
    settled = exact(await rig.meter("settle", request_id="b", cost_usd="0.25", **who))
    assert (settled["cost"]["total_cost_usd"], settled["flags"]) == (D("0.25"), [])
    assert exact(await rig.meter("settle", request_id="b", cost_usd="0.5", **who)) == settled
    item = {"request_id": "c", "cost_usd": "0.25", **who}
    batch = exact(await rig.meter("settle/batch", settles=[item, item, item | {"request_id": "d"}]))
    assert [each["status"] for each in batch["results"]] == [200, 200, 404]
    assert (await rig.balance(customer), await rig.held(customer)) == (D("9.5"), D(0))
    closed = await rig.meter("release", request_id="b", **who)
    assert (closed.status_code, closed.json()["error"]["metadata"]) == (409, {"state": "settled"})


async def test_a_hold_that_is_found_by_its_request_id_is_priced_as_its_ticket_would_have_been(rig: Rig) -> None:
    customer = await rig.customer("10")
    for price_pusd in (1000, 5000):
        small = PriceRow("m", "p", Dimension.IMAGES, price_pusd, attributes="size=s")
        large = PriceRow("m", "p", Dimension.IMAGES, price_pusd * 9, attributes="size=l")
        await sell(rig, small, large)
        if price_pusd == 1000:
            call = {"api_key": customer.api_key, "model": "m", "estimate": {"images": 2, "size": "l"}}
            await rig.meter("authorize", request_id="a", **call)
    done = exact(await rig.meter("settle", request_id="a", api_key=customer.api_key, usage={"images": 2}))
    assert done["cost"]["total_cost_usd"] == D("0.000000018")


async def test_a_request_id_finds_the_hold_of_its_own_key_and_proxy_alone(rig: Rig) -> None:
    customer, other = await rig.customer("10"), await rig.customer("10")
    key = (await rig.new_key(customer))["api_key"]
    await rig.authorize(customer.api_key, "1", "a")
    token = await create_token(rig.house.db, rig.house.settings.pepper, "service", "another")
    for who in (other.api_key, key):
        for verb, more in (("settle", {"cost_usd": 1}), ("release", {})):
            answer = await rig.meter(verb, request_id="a", api_key=who, **more)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "hold_not_found")
    theirs = await as_service(rig, token, "release", request_id="a", api_key=customer.api_key)
    nobody = await rig.meter("release", request_id="a", api_key="sk-nobody")
    assert (theirs.status_code, nobody.status_code) == (404, 401)
    assert await rig.held(customer) == 1


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({}, "hold_id"), ({"hold_id": "x", "request_id": "a"}, "hold_id"), ({"request_id": "a"}, "api_key"), ({"hold_id": "x", "api_key": "k"}, "api_key"),
        ({"request_id": "a", "api_key": "k", "api_key_hash": "0" * 64}, "api_key"), ({"request_id": "a b", "api_key": "k"}, "request_id"),
    ],
)  # fmt: skip
async def test_a_hold_is_named_in_one_way(rig: Rig, more: dict[str, Any], param: str) -> None:
    for verb, work in (("settle", {"cost_usd": 1}), ("release", {})):
        answer = await rig.meter(verb, **work, **more)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), verb


# --- repeats ------------------------------------------------------------------------------------------


async def test_a_repeat_says_that_it_is_one_and_of_a_closed_hold_there_is_none(rig: Rig) -> None:
    customer = await rig.customer("10")
    first = await rig.authorize(customer.api_key, "0.9", "r")
    again = await rig.authorize(customer.api_key, "0.9", "r")
    assert (first["repeat"], again["repeat"], again["hold_id"]) == (False, True, first["hold_id"])
    await rig.meter("release", hold_id=first["hold_id"])
    closed = await rig.meter("authorize", request_id="r", api_key=customer.api_key, max_cost_usd="0.9")
    assert (closed.status_code, closed.json()["error"]["code"]) == (409, "hold_closed")
    assert closed.json()["error"]["metadata"] == {"state": "released"}


async def test_a_repeat_is_one_also_when_its_model_is_sold_no_more(rig: Rig) -> None:
    customer = await rig.customer("10")
    call = {"request_id": "r", "api_key": customer.api_key, "model": "m", "estimate": {"input_tokens": 1000}}
    charge = {
        "request_id": "c",
        "api_key": customer.api_key,
        "model": "m",
        "usage": {"input_tokens": 1000},
        "max_cost_usd": "0.000001",
    }
    for model, price_pusd in (("m", 1000), ("m", 2000), ("other", 1000)):
        await sell(rig, PriceRow(model, "p", Dimension.INPUT, price_pusd))
        held, charged = exact(await rig.meter("authorize", **call)), exact(await rig.meter("charge", **charge))
        if (model, price_pusd) == ("m", 1000):
            first = held, charged
        assert (held["hold_id"], held["estimated_cost_usd"]) == (first[0]["hold_id"], D("0.000001"))
        assert charged == first[1]
    denied = exact(await rig.meter("authorize", **call | {"request_id": "new"}))
    assert denied["error"]["code"] == "model_not_priced"
    assert exact(await rig.meter("charge", **charge | {"request_id": "new"}))["error"]["code"] == "model_not_priced"
    other = await rig.meter("charge", **charge | {"usage": {"input_tokens": 1}})
    assert other.json()["error"]["code"] == "request_id_reuse"
    held_for = await rig.meter("charge", **charge | {"request_id": "r"})
    assert held_for.json()["error"]["code"] == "request_id_reuse"
    assert await rig.balance(customer) == 10 - D("0.000001")


# --- a proxy that dies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "of_token", "captured", "costs", "flags"),
    [
        (None, "captured", None, "0", None), (None, "captured", "0.2", "0.2", "captured"), (None, "hold", None, "0.5", "hold_expired"),
        (None, "hold", "0.7", "0.7", "hold_expired"), (None, "release", "0.2", "0", None), ("release", "hold", None, "0", None),
        ("hold", "release", None, "0.5", "hold_expired"), ("captured", "hold", "0.2", "0.2", "captured"),
    ],
)  # fmt: skip
async def test_a_hold_that_nobody_settles_ends_as_its_proxy_said(
    rig: Rig, asked: str | None, of_token: Any, captured: str | None, costs: str, flags: str | None
) -> None:
    customer = await rig.customer("10")
    token = await create_token(rig.house.db, rig.house.settings.pepper, "service", "dying", of_token)
    more = {"on_expiry": asked} if asked else {}
    held = exact(
        await as_service(
            rig, token, "authorize", request_id="a", api_key=customer.api_key, max_cost_usd="0.5", ttl_seconds=1, **more
        )
    )
    if captured:
        await as_service(rig, token, "extend", hold_id=held["hold_id"], captured_usd=captured, ttl_seconds=1)
    rig.sql("UPDATE hold SET expires_at = now() - interval '1 second'")
    await expire_holds(rig.house.db)
    assert (await rig.balance(customer), await rig.held(customer)) == (10 - D(costs), D(0))
    assert [found for (found,) in rig.sql("SELECT flags FROM usage")] == ([flags] if flags else [])


async def test_a_hold_by_subrequest_ends_as_its_gateways_token_says(rig: Rig) -> None:
    customer = await rig.customer("10")
    token = await create_token(rig.house.db, rig.house.settings.pepper, "service", "gate", "hold")
    await rig.client.get("/v1/meter/ext-authz", headers=customer.key | {"X-Service-Token": token})
    assert rig.sql("SELECT on_expiry FROM hold") == [("hold",)]


async def test_an_expiry_that_is_none_of_the_three_is_422(rig: Rig) -> None:
    answer = await rig.meter("authorize", request_id="a", api_key="k", max_cost_usd=1, on_expiry="forget")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "on_expiry")


# --- what the provider says ---------------------------------------------------------------------------


async def test_what_the_provider_asks_for_is_kept_and_never_charged(rig: Rig) -> None:
    customer = await rig.customer("10")
    told = {"cost_usd": "0.1", "provider_cost_usd": 4.5e-05, "upstream_model": "gpt-4o-2024-11-20"}
    holds = [(await rig.authorize(customer.api_key, "1"))["hold_id"] for _ in range(3)]
    event = {"specversion": "1.0", "id": "1", "source": "s", "type": "t", "data": told | {"hold_id": holds[2]}}
    unheld = event | {"id": "2", "subject": hashed(customer.api_key), "data": told}
    answers = [
        await rig.meter("settle", hold_id=holds[0], **told),
        await rig.meter("settle/batch", settles=[told | {"hold_id": holds[1]}]),
        await rig.meter("charge", request_id="c", api_key=customer.api_key, **told),
        await rig.meter("events", **event),
        await rig.meter("events", **unheld),
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert (
        rig.sql("SELECT provider_cost_nusd, upstream_model, cost_nusd FROM usage")
        == [(45_000, "gpt-4o-2024-11-20", 100_000_000)] * 5
    )
    again = await rig.meter("charge", request_id="c", api_key=customer.api_key, **told | {"provider_cost_usd": 9})
    assert exact(again) == exact(answers[2])
    wrong = await rig.meter("charge", request_id="d", api_key=customer.api_key, **told | {"provider_cost_usd": "-1"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "provider_cost_usd")
    assert await rig.balance(customer) == D("9.5")


# --- verify -------------------------------------------------------------------------------------------


async def verify(rig: Rig, key: str, **more: Any) -> Any:
    before = rig.sql("SELECT count(*), coalesce(sum(held_nusd), 0) FROM hold, account")
    answer = await rig.meter("verify", api_key=key, **more)
    assert answer.status_code == 200, answer.text
    assert rig.sql("SELECT count(*), coalesce(sum(held_nusd), 0) FROM hold, account") == before
    return exact(answer)


async def ids(rig: Rig, customer: Customer) -> tuple[str, str]:
    held = await rig.authorize(customer.api_key, "0", uuid.uuid4().hex)
    return held["account_id"], held["key_id"]


async def test_verify_tells_who_and_how_much_and_holds_nothing(rig: Rig) -> None:
    customer = await rig.customer("10")
    account_id, key_id = await ids(rig, customer)
    await rig.authorize(customer.api_key, "4")
    assert await verify(rig, customer.api_key) == {
        "decision": "allow", "account_id": account_id, "key_id": key_id, "available_usd": 6, "scopes": None, "allowed_models": None,
    }  # fmt: skip
    by_hash = exact(await rig.meter("verify", api_key_hash=hashed(customer.api_key)))
    assert (by_hash["decision"], by_hash["available_usd"]) == ("allow", 6)
    narrow = (await rig.new_key(customer, usage_limit_usd="2", scopes=["spend"], allowed_models=["a/m", "n"]))[
        "api_key"
    ]
    await rig.authorize(narrow, "0.5", model="n")
    found = await verify(rig, narrow)
    assert (found["available_usd"], found["scopes"], found["allowed_models"]) == (D("1.5"), ["spend"], ["a/m", "n"])
    assert (await verify(rig, narrow, model="n"))["decision"] == "allow"


async def test_verify_refuses_whom_an_authorize_would_refuse(rig: Rig) -> None:
    customer, empty = await rig.customer("10"), await rig.customer()
    narrow = await rig.new_key(customer, allowed_models=["n"], scopes=["spend"])
    reader = await rig.new_key(customer, scopes=["balance"])
    spent = await rig.new_key(customer, usage_limit_usd="0.5")
    await rig.meter("charge", request_id="c", api_key=spent["api_key"], cost_usd="0.5")
    revoked = await rig.new_key(customer)
    await verify(rig, revoked["api_key"])
    await rig.client.delete(f"/keys/{revoked['_id']}", headers=customer.owner)
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        (narrow["api_key"], {"model": "m"}, 403, "model_not_allowed"), (reader["api_key"], {}, 403, "missing_scope"),
        (spent["api_key"], {}, 402, "key_limit_exceeded"), (empty.api_key, {}, 402, "insufficient_balance"),
        (revoked["api_key"], {}, 401, "invalid_api_key"), ("sk-nobody", {}, 401, "invalid_api_key"), (customer.api_key, {"model": "x" * 201}, 422, "invalid_field"),
    ]  # fmt: skip
    for key, more, status, code in cases:
        denied = await verify(rig, key, **more)
        assert (denied["decision"], denied["status"], denied["error"]["code"]) == ("deny", status, code)
        if status != 422:
            same = exact(
                await rig.meter("authorize", request_id=uuid.uuid4().hex, api_key=key, max_cost_usd="0", **more)
            )
            assert same["error"] == denied["error"]
    rig.sql("UPDATE account SET status = 'frozen'")
    assert (await verify(rig, customer.api_key))["error"]["code"] == "account_frozen"
    for wrong in ({}, {"api_key": "a", "api_key_hash": "0" * 64}):
        answer = await rig.meter("verify", **wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "api_key")
