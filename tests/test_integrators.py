"""What integrators stumbled over: how much a hold takes, what it tells, and whose mistake a bad value is."""

import asyncio
import uuid
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from app.pricing import rules
from app.pricing.starter import ensure_starter
from tests.rig import Rig, exact

D = Decimal
MINI = "gpt-4o-mini"
WANTED = {"input_tokens": 1000, "max_output_tokens": 16_000}
"""On gpt-4o-mini: $0.00015 to read, and $0.0096 for the longest answer."""


@pytest.fixture
async def shop(rig: Rig) -> Rig:
    """The rig with the starter catalogue on sale."""
    await ensure_starter(rig.house.db)
    return rig


async def ask(shop: Rig, key: str, **more: Any) -> Any:
    body = {"request_id": uuid.uuid4().hex, "api_key": key, "model": MINI, "estimate": WANTED} | more
    response = await shop.meter("authorize", **body)
    assert response.status_code == 200, response.text
    return exact(response)


# --- how much is held ---------------------------------------------------------------------------------


async def test_six_calls_at_once_fit_under_a_limit_of_a_cent_where_each_says_how_much_may_be_held(shop: Rig) -> None:
    customer = await shop.customer("10")
    key = (await shop.new_key(customer, usage_limit_usd="0.01"))["api_key"]
    greedy = await ask(shop, key, mode="clamp")
    assert (greedy["decision"], greedy["hold_usd"], greedy["clamped"]) == ("allow", D("0.00975"), False)
    await shop.meter("release", hold_id=greedy["hold_id"])
    answers = await asyncio.gather(*(ask(shop, key, mode="clamp", max_hold_usd=0.0015) for _ in range(6)))
    assert Counter(answer["decision"] for answer in answers) == {"allow": 6}
    assert {(answer["hold_usd"], answer["clamped"]) for answer in answers} == {(D("0.0015"), True)}
    assert {answer["granted_output_tokens"] for answer in answers} == {(D("0.0015") - D("0.00015")) // D("0.0000006")}
    seventh = await ask(shop, key, mode="clamp", max_hold_usd=0.0015)
    assert (seventh["decision"], seventh["hold_usd"], seventh["clamped"]) == ("allow", D("0.001"), True)


async def test_a_clamped_call_holds_what_it_can_cost_what_is_allowed_or_what_there_is_whichever_is_least(
    shop: Rig,
) -> None:
    customer = await shop.customer("10")
    key = (await shop.new_key(customer, usage_limit_usd="0.01"))["api_key"]
    short = {"estimate": {"input_tokens": 1000, "max_output_tokens": 100}}
    for more, hold_usd, clamped in (
        (short, "0.0035", False), (short | {"max_hold_usd": 1}, "0.0035", False), ({"max_hold_usd": "0.009"}, "0.009", True),
        ({}, "0.01", True), ({"max_hold_usd": "0.1"}, "0.01", True),
    ):  # fmt: skip
        held = await ask(shop, key, model="gpt-4o", mode="clamp", **more)
        assert (held["hold_usd"], held["clamped"]) == (D(hold_usd), clamped), more
        assert held["estimated_cost_usd"] == (D("0.0035") if "estimate" in more else D("0.1625"))
        await shop.meter("release", hold_id=held["hold_id"])


async def test_a_strict_call_may_be_held_for_by_less_too_and_all_of_that_must_be_there(shop: Rig) -> None:
    customer = await shop.customer("10")
    key = (await shop.new_key(customer, usage_limit_usd="0.01"))["api_key"]
    held = await ask(shop, key, model="gpt-4o", max_hold_usd="0.0075")
    assert (held["hold_usd"], held["clamped"], held["granted_output_tokens"]) == (D("0.0075"), True, 500)
    denied = await ask(shop, key, model="gpt-4o", max_hold_usd="0.0075")
    assert denied["error"]["code"] == "funds_held"
    usage = {"input_tokens": 1000, "output_tokens": 16_000}
    done = exact(await shop.meter("settle", hold_id=held["hold_id"], usage=usage))
    assert (done["cost"]["total_cost_usd"], done["flags"]) == (D("0.1625"), ["above_hold"])


async def test_a_call_whose_cost_is_told_is_held_for_by_no_more_than_is_allowed(shop: Rig) -> None:
    customer = await shop.customer("10")
    body = {"request_id": "a", "api_key": customer.api_key, "max_cost_usd": 0.5}
    held = exact(await shop.meter("authorize", **body, max_hold_usd=0.2))
    assert (held["hold_usd"], held["clamped"], held["estimated_cost_usd"], held["prices"]) == (
        D("0.2"),
        True,
        None,
        None,
    )
    other = await shop.meter("authorize", **body)
    assert other.json()["error"]["code"] == "request_id_reuse"


async def test_a_call_whose_shortest_answer_costs_more_than_may_be_held_is_its_callers_to_hear_of(shop: Rig) -> None:
    customer = await shop.customer("10")
    for more in ({"max_hold_usd": "0.0001"}, {"max_hold_usd": "0.0003", "mode": "clamp", "min_output_tokens": 1000}):
        denied = await ask(shop, customer.api_key, **more)
        assert (denied["decision"], denied["status"], denied["error"]["param"]) == ("deny", 422, "max_hold_usd")
        assert "costs at least $0.000" in denied["error"]["message"]
    assert await shop.held(customer) == 0


# --- what is told -------------------------------------------------------------------------------------


async def test_an_authorize_tells_what_the_call_may_cost_and_by_which_prices(shop: Rig) -> None:
    customer = await shop.customer("10")
    await shop.house.db.transaction(
        lambda s: rules.set_markup(s, "default", multiplier_ppm=1_500_000, fixed_per_request_nusd=7, notice_seconds=0)
    )
    shop.house.catalogues._fresh_until = None
    held = await ask(shop, customer.api_key, features=["web"])
    assert held["prices"] == [
        {"kind": "input", "name": "input", "price_usd": D("0.000000225"), "per_units": 1, "estimated_units": 1000},
        {"kind": "output", "name": "output", "price_usd": D("0.0000009"), "per_units": 1, "estimated_units": 16_000},
        {"kind": "fees", "name": "web", "price_usd": D("0.02"), "per_units": 1, "estimated_units": 1},
        {"kind": "fees", "name": "request", "price_usd": D("0.000000007"), "per_units": 1, "estimated_units": 1},
    ]
    total = sum(line["price_usd"] * line["estimated_units"] / line["per_units"] for line in held["prices"])
    assert held["estimated_cost_usd"] == held["hold_usd"] == total
    usage = {"input_tokens": 1000, "output_tokens": 16_000}
    done = exact(await shop.meter("settle", hold_id=held["hold_id"], usage=usage, features_used=["web"]))
    assert done["cost"]["total_cost_usd"] == total


async def test_a_repeat_tells_the_prices_of_its_first(shop: Rig) -> None:
    customer = await shop.customer("10")
    first = await ask(shop, customer.api_key, request_id="same")
    await shop.house.db.transaction(
        lambda s: rules.set_markup(s, "default", multiplier_ppm=2_000_000, notice_seconds=0)
    )
    shop.house.catalogues._fresh_until = None
    again = await ask(shop, customer.api_key, request_id="same")
    for name in ("hold_id", "hold_usd", "estimated_cost_usd", "prices", "clamped", "granted_output_tokens"):
        assert again[name] == first[name], name


@pytest.mark.parametrize(("told", "counted"), [(4.5, 5), (0.001, 1), (8, 8), (4.0, 4)])
async def test_seconds_of_an_estimate_may_have_a_fraction_and_each_begun_one_is_held_for(
    shop: Rig, told: float, counted: int
) -> None:
    customer = await shop.customer("10")
    for model, name in (("veo3", "video_seconds"), ("whisper-1", "audio_seconds")):
        held = await ask(shop, customer.api_key, model=model, estimate={name: told})
        whole = await ask(shop, customer.api_key, model=model, estimate={name: counted})
        assert held["hold_usd"] == whole["hold_usd"]
        done = exact(await shop.meter("settle", hold_id=held["hold_id"], usage={name: told}))
        assert done["cost"]["total_cost_usd"] == held["hold_usd"]


# --- whose mistake ------------------------------------------------------------------------------------

LONG = "x" * 201
CALLERS = [
    ({"model": LONG}, "model"), ({"model": ""}, "model"), ({"model": "a\nb"}, "model"), ({"estimate": {"size": LONG}}, "estimate.size"),
    ({"estimate": {"size": ""}}, "estimate.size"), ({"estimate": {"quality": "a\nb"}}, "estimate.quality"),
    ({"estimate": {"resolution": LONG}}, "estimate.resolution"), ({"estimate": {"service_tier": "\x7f"}}, "estimate.service_tier"),
    ({"estimate": {"search_context_size": LONG}}, "estimate.search_context_size"), ({"estimate": {"n": 129}}, "estimate.n"),
    ({"estimate": {"n": 0}}, "estimate.n"), ({"estimate": {"n": -1}}, "estimate.n"), ({"estimate": {"max_output_tokens": -1}}, "estimate.max_output_tokens"),
    ({"estimate": {"max_output_tokens": 10**30}}, "estimate.max_output_tokens"), ({"estimate": {"images": 10**13}}, "estimate.images"),
    ({"model": "dall-e-3", "estimate": {"images": 10**12}}, "estimate"),
]  # fmt: skip
PROXYS = [
    ({"request_id": "a b"}, "request_id"), ({"ttl_seconds": 0}, "ttl_seconds"), ({"mode": "loose"}, "mode"), ({"endpoint": LONG}, "endpoint"),
    ({"estimate": {"size": 5}}, "estimate.size"), ({"estimate": {"input_tokens": -1}}, "estimate.input_tokens"), ({"api_key_hash": "x"}, "api_key_hash"),
    ({"max_hold_usd": "-1"}, "max_hold_usd"), ({"min_output_tokens": 0}, "min_output_tokens"), ({"model": 5}, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "param"), CALLERS)
async def test_a_callers_bad_value_is_a_deny_that_the_proxy_passes_on(
    shop: Rig, wrong: dict[str, Any], param: str
) -> None:
    customer = await shop.customer("10")
    denied = await ask(shop, customer.api_key, **wrong)
    assert (denied["decision"], denied["status"]) == ("deny", 422)
    assert (denied["error"]["code"], denied["error"]["param"]) == ("invalid_field", param)
    assert len(denied["error"]["message"]) < 200
    assert await shop.held(customer) == 0


@pytest.mark.parametrize(("wrong", "param"), PROXYS)
async def test_a_proxys_bad_value_is_the_proxys_422(shop: Rig, wrong: dict[str, Any], param: str) -> None:
    customer = await shop.customer("10")
    body = {"request_id": "r", "api_key": customer.api_key, "model": MINI, "estimate": WANTED} | wrong
    refused = await shop.meter("authorize", **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)
    assert "decision" not in refused.json()


@pytest.mark.parametrize(
    ("wrong", "param"),
    [({"model": LONG}, "model"), ({"model": ""}, "model"), *(({"attributes": {name: LONG}}, f"attributes.{name}") for name in ("size", "quality", "resolution", "service_tier"))],
)  # fmt: skip
async def test_a_callers_bad_value_in_a_charge_is_a_deny_too(shop: Rig, wrong: dict[str, Any], param: str) -> None:
    customer = await shop.customer("10")
    body = {"request_id": "r", "api_key": customer.api_key, "model": MINI, "usage": {"input_tokens": 5}} | wrong
    denied = exact(await shop.meter("charge", **body))
    assert (denied["decision"], denied["status"], denied["error"]["param"]) == ("deny", 422, param)


async def test_who_is_calling_is_asked_before_what_was_asked_for(shop: Rig) -> None:
    denied = await ask(shop, "sk-nobody", model=LONG)
    assert denied["error"]["code"] == "invalid_api_key"
