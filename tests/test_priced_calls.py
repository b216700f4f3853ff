"""Calls priced from the catalogue: held for what they may cost, charged for what they used, at the prices they began with."""

import asyncio
import hashlib
import json
import uuid
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.admin.tokens import create_token
from app.audit import audit
from app.keys.verify import KeyOwner
from app.metering.compared import compared, ratios
from app.metering.holds import Ask, expire_holds, hold_id_for
from app.metering.priced import lines_of
from app.pricing import rules
from app.pricing.catalogue import activate, store
from app.pricing.importer import read_prices
from app.pricing.quote import AUSD_PER_NUSD, Call, Catalogue
from app.pricing.rows import Dimension, FeeRow, Usage
from app.pricing.starter import ensure_starter, starter
from tests.rig import Customer, Rig, exact

D = Decimal
MINI = "gpt-4o-mini"
"""$0.15 per million tokens in, $0.60 out, $0.075 from the cache."""
ASKED = {"input_tokens": 1000, "max_output_tokens": 100}
ASKED_USD = D("0.00021")
NONE: list[str] = []


@pytest.fixture
async def shop(rig: Rig) -> Rig:
    """The rig with the starter catalogue on sale."""
    await ensure_starter(rig.house.db)
    return rig


async def ask(shop: Rig, key: str, model: str = MINI, **more: Any) -> Any:
    body = {"request_id": uuid.uuid4().hex, "api_key": key, "model": model, "estimate": ASKED} | more
    response = await shop.meter("authorize", **body)
    assert response.status_code == 200, response.text
    return exact(response)


async def with_one_dollar(shop: Rig) -> Customer:
    """A customer who has spent nine of ten."""
    customer = await shop.customer("10")
    await shop.meter("charge", request_id=uuid.uuid4().hex, api_key=customer.api_key, cost_usd="9")
    return customer


async def settle(shop: Rig, hold_id: str, usage: dict[str, Any], **more: Any) -> Any:
    response = await shop.meter("settle", hold_id=hold_id, usage=usage, **more)
    assert response.status_code == 200, response.text
    return exact(response)


async def dearer(shop: Rig, factor: int = 2) -> None:
    """From now on everything costs more; every process sees it."""
    await shop.house.db.transaction(
        lambda s: rules.set_markup(s, "default", multiplier_ppm=factor * 1_000_000, notice_seconds=0)
    )
    shop.house.catalogues._fresh_until = None


# --- authorize ----------------------------------------------------------------------------------------


async def test_an_estimate_is_held_for_at_the_catalogues_price(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = await ask(shop, customer.api_key)
    assert (held["decision"], held["hold_usd"], held["granted_output_tokens"], held["price_version"]) == (
        "allow", ASKED_USD, 100, 1
    )  # fmt: skip
    assert held["available_usd"] == 10 - ASKED_USD
    assert await shop.held(customer) == ASKED_USD


async def test_without_a_length_the_longest_answer_of_the_model_is_held_for(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = await ask(shop, customer.api_key, estimate={"input_tokens": 0})
    assert (held["granted_output_tokens"], held["hold_usd"]) == (16384, 16384 * D("0.0000006"))


async def test_media_is_held_for_by_its_size_and_quality(shop: Rig) -> None:
    customer = await shop.customer("10")
    estimate = {"images": 2, "size": "1024x1024", "quality": "hd"}
    held = await ask(shop, customer.api_key, "dall-e-3", estimate=estimate)
    assert (held["hold_usd"], held.get("granted_output_tokens")) == (D("0.16"), None)
    done = await settle(shop, held["hold_id"], {"images": 1})
    assert (done["cost"]["media_cost_usd"], done["cost"]["total_cost_usd"]) == (D("0.08"), D("0.08"))


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"max_cost_usd": "1"}, "max_cost_usd"),
        ({"estimate": None}, "max_cost_usd"),
        ({"model": None}, "model"),
        ({"estimate": None, "max_cost_usd": "1", "mode": "clamp"}, "mode"),
        ({"estimate": {"tokens": 5}}, "estimate.tokens"),
        ({"min_output_tokens": 0}, "min_output_tokens"),
        ({"mode": "loose"}, "mode"),
    ],
)
async def test_an_estimate_that_makes_no_sense_is_refused_by_name(shop: Rig, wrong: dict[str, Any], param: str) -> None:
    customer = await shop.customer("10")
    body = {"request_id": "r", "api_key": customer.api_key, "model": MINI, "estimate": ASKED} | wrong
    response = await shop.meter("authorize", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)
    assert await shop.held(customer) == 0


async def test_a_use_or_a_feature_without_a_price_is_refused_never_free(shop: Rig) -> None:
    customer = await shop.customer("10")
    for more in ({"estimate": {"video_seconds": 5}}, {"features": ["teleport"]}, {"model": "nobody/sells-this"}):
        denied = await ask(shop, customer.api_key, **more)
        assert (denied["decision"], denied["status"], denied["error"]["code"]) == ("deny", 422, "model_not_priced")


async def test_the_same_request_gets_the_same_hold_also_after_prices_changed(shop: Rig) -> None:
    customer = await shop.customer("10")
    first = await ask(shop, customer.api_key, request_id="same")
    await dearer(shop)
    again = await ask(shop, customer.api_key, request_id="same")
    assert {name: again[name] for name in ("hold_id", "hold_usd", "granted_output_tokens", "price_version")} == {
        name: first[name] for name in ("hold_id", "hold_usd", "granted_output_tokens", "price_version")
    }
    other = await shop.meter(
        "authorize", request_id="same", api_key=customer.api_key, model=MINI, estimate=ASKED | {"input_tokens": 1001}
    )
    assert other.json()["error"]["code"] == "request_id_reuse"
    assert await shop.held(customer) == ASKED_USD


# --- clamp --------------------------------------------------------------------------------------------


async def test_clamp_grants_what_the_balance_pays_for(shop: Rig) -> None:
    customer = await with_one_dollar(shop)
    wanted = {"input_tokens": 1000, "max_output_tokens": 16_000}
    for _ in range(7):
        await ask(shop, customer.api_key, "gpt-4o", estimate=wanted)  # $0.1625 each
    strict = await ask(shop, customer.api_key, "gpt-4o", estimate=wanted)
    assert strict["error"]["code"] == "funds_held"
    left = 1 - await shop.held(customer)
    clamped = await ask(shop, customer.api_key, "gpt-4o", estimate=wanted, mode="clamp", min_output_tokens=10)
    if clamped["decision"] == "deny":
        assert left < D("0.0026")
        return
    assert 10 <= clamped["granted_output_tokens"] < 16_000
    assert clamped["granted_output_tokens"] == (left - D("0.0025")) // D("0.00001")
    done = await settle(
        shop, clamped["hold_id"],
        {"input_tokens": 1000, "output_tokens": int(clamped["granted_output_tokens"])},
    )  # fmt: skip
    assert done["cost"]["total_cost_usd"] <= left


async def test_clamp_minds_the_keys_limit_and_the_shortest_answer_of_use(shop: Rig) -> None:
    customer = await shop.customer("10")
    key = (await shop.new_key(customer, usage_limit_usd="0.01"))["api_key"]
    wanted = {"input_tokens": 0, "max_output_tokens": 16_000}
    refused = await ask(shop, key, "gpt-4o", estimate=wanted, mode="clamp", min_output_tokens=1001)
    assert (refused["status"], refused["error"]["code"]) == (402, "key_limit_exceeded")
    granted = await ask(shop, key, "gpt-4o", estimate=wanted, mode="clamp", min_output_tokens=1000)
    assert (granted["hold_usd"], granted["granted_output_tokens"]) == (D("0.01"), 1000)


async def test_fifty_clamped_calls_at_once_never_hold_more_than_there_is(shop: Rig) -> None:
    customer = await with_one_dollar(shop)
    wanted = {"input_tokens": 0, "max_output_tokens": 16_000}
    answers = await asyncio.gather(
        *(ask(shop, customer.api_key, "gpt-4o", estimate=wanted, mode="clamp") for _ in range(50))
    )
    allowed = [answer for answer in answers if answer["decision"] == "allow"]
    assert sum(answer["hold_usd"] for answer in allowed) == await shop.held(customer) == 1
    assert all(answer["granted_output_tokens"] * D("0.00001") <= answer["hold_usd"] for answer in allowed)


# --- settle -------------------------------------------------------------------------------------------


async def test_a_call_costs_what_it_used_line_by_line(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = await ask(shop, customer.api_key)
    usage = {"input_tokens": 1000, "cache_read_tokens": 400, "output_tokens": 50}
    done = await settle(shop, held["hold_id"], usage)
    assert done["cost"] == {
        "input_cost_usd": D("0.00009"), "cache_input_cost_usd": D("0.00003"), "output_cost_usd": D("0.00003"),
        "media_cost_usd": 0, "fees_usd": 0, "total_cost_usd": D("0.00015"),
    }  # fmt: skip
    assert (done["flags"], await shop.balance(customer), await shop.held(customer)) == (NONE, 10 - D("0.00015"), D(0))
    again = await settle(shop, held["hold_id"], {"input_tokens": 10**6})
    assert again == done


async def test_a_call_is_priced_by_what_held_when_it_was_authorized(shop: Rig) -> None:
    customer = await shop.customer("10")
    before = await ask(shop, customer.api_key)
    await dearer(shop)
    after = await ask(shop, customer.api_key)
    usage = {"input_tokens": 1000, "output_tokens": 100}
    costs = [(await settle(shop, held["hold_id"], usage))["cost"]["total_cost_usd"] for held in (before, after)]
    assert costs == [ASKED_USD, 2 * ASKED_USD]


async def test_the_model_that_served_is_paid_and_an_unknown_one_as_the_dearer_of_asked_and_held(shop: Rig) -> None:
    customer = await shop.customer("10")
    served, unknown, short = [await ask(shop, customer.api_key) for _ in range(3)]
    usage = {"input_tokens": 1000, "output_tokens": 100}
    dear = await settle(shop, served["hold_id"], usage, served_model="gpt-4o")
    assert (dear["cost"]["total_cost_usd"], dear["flags"]) == (D("0.0035"), ["above_hold"])
    more = {"input_tokens": 1000, "output_tokens": 1000}
    same = await settle(shop, unknown["hold_id"], more, served_model="home-made")
    assert (same["cost"]["total_cost_usd"], same["flags"]) == (D("0.00075"), ["above_hold", "served_not_priced"])
    less = await settle(shop, short["hold_id"], {"input_tokens": 10}, served_model="home-made")
    assert (less["cost"]["total_cost_usd"], less["flags"]) == (ASKED_USD, ["served_not_priced"])
    assert sum(less["cost"][f"{part}_usd"] for part in ("input_cost", "output_cost", "cache_input_cost", "media_cost", "fees")) == ASKED_USD  # fmt: skip
    why = exact(await shop.client.get(f"/activity/{less['charge_id']}/explain", headers=customer.owner))
    assert [line["name"] for line in why["lines"]] == ["input", "held"]
    assert sum(line["amount_usd"] for line in why["lines"]) + why["rounding_usd"] == ASKED_USD


@pytest.mark.parametrize(
    ("served", "provider", "cost", "flags"),
    [
        ("gpt-4o-mini-2024-07-18", None, "0.00021", []), ("openai/gpt-4o-mini", None, "0.00021", []),
        ("gpt-4o-2024-11-20", None, "0.0035", ["above_hold"]), ("openai/gpt-4o-2024-11-20", "openai", "0.0035", ["above_hold"]),
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", None, "0.0045", ["above_hold"]),
        ("claude-sonnet-4-5@20250929", "anthropic", "0.0045", ["above_hold"]),
        ("gpt-4o-mini", "aws", "0.00021", ["provider_assumed"]), ("gpt-4o-mini", "OpenAI", "0.00021", []),
    ],
)  # fmt: skip
async def test_a_model_is_known_by_the_names_that_providers_give_it(
    shop: Rig, served: str, provider: str | None, cost: str, flags: list[str]
) -> None:
    customer = await shop.customer("10")
    held = await ask(shop, customer.api_key)
    more = {"provider": provider} if provider else {}
    usage = {"input_tokens": 1000, "output_tokens": 100}
    done = await settle(shop, held["hold_id"], usage, served_model=served, **more)
    assert (done["cost"]["total_cost_usd"], done["flags"]) == (D(cost), flags)


async def test_another_providers_price_is_refused_where_the_operator_wants_that(shop: Rig) -> None:
    shop.house.pricer._is_strict = True
    customer = await shop.customer("10")
    held = await ask(shop, customer.api_key)
    usage = {"input_tokens": 1000, "output_tokens": 100}
    refused = await shop.meter("settle", hold_id=held["hold_id"], usage=usage, provider="aws")
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "provider")
    assert (await settle(shop, held["hold_id"], usage, provider="openai"))["flags"] == []


async def test_one_count_without_a_price_costs_the_rest_of_the_hold_and_not_the_rest_of_the_call(shop: Rig) -> None:
    customer = await shop.customer("10")
    estimate = {"input_tokens": 10, "max_output_tokens": 10}
    small, large = [await ask(shop, customer.api_key, "claude-sonnet-4-5", estimate=each) for each in (estimate, {"input_tokens": 10_000, "max_output_tokens": 10_000})]  # fmt: skip
    usage = {"input_tokens": 1000, "output_tokens": 1000, "queries": 1}
    done = await settle(shop, small["hold_id"], usage)
    assert (done["cost"]["total_cost_usd"], done["flags"]) == (D("0.018"), ["above_hold", "not_priced:queries"])
    rest = await settle(shop, large["hold_id"], usage)
    assert (rest["cost"]["total_cost_usd"], rest["flags"]) == (large["hold_usd"], ["not_priced:queries"])
    assert rest["cost"]["fees_usd"] == large["hold_usd"] - D("0.018")


@pytest.mark.parametrize("way", ["settle", "batch", "event", "charge"])
async def test_what_was_served_counts_on_every_way_that_it_is_told(rig: Rig, way: str) -> None:
    entry = {
        "litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 1e-05, "input_cost_per_token_priority": 2e-05,
        "output_cost_per_token": 1e-05,
        "search_context_cost_per_query": {"search_context_size_low": 0.01, "search_context_size_high": 0.03},
    }  # fmt: skip
    await on_sale(rig, {"tiered": entry})
    customer = await rig.customer("10")
    estimate = {"input_tokens": 1000, "max_output_tokens": 0, "service_tier": "priority", "queries": 1}
    held = await ask(rig, customer.api_key, "tiered", estimate=estimate)
    assert held["hold_usd"] == D("0.02") + D("0.03")
    told = {
        "usage": {"input_tokens": 1000, "queries": 1},
        "attributes": {"service_tier": "default", "search_context_size": "low"},
    }
    if way == "settle":
        charge = exact(await rig.meter("settle", hold_id=held["hold_id"], **told))
    elif way == "batch":
        (found,) = exact(await rig.meter("settle/batch", settles=[told | {"hold_id": held["hold_id"]}]))["results"]
        charge = found["charge"]
    elif way == "event":
        (found,) = exact(await send(rig, event("1", told | {"hold_id": held["hold_id"]})))["results"]
        charge = found["charge"]
    else:
        charge = exact(await rig.meter("charge", request_id="c", api_key=customer.api_key, model="tiered", **told))
    assert (charge["cost"]["total_cost_usd"], charge["flags"]) == (D("0.02"), [])


async def on_sale(rig: Rig, document: Any) -> None:
    """A price file of others as the active version."""
    draft = read_prices(json.dumps(document).encode())
    db = rig.house.db
    version_id = await db.transaction(lambda s: store(s, draft.prices, draft.models, source="test", source_hash="0"))
    await db.transaction(lambda session: activate(session, version_id, allow_drops=True, allow_leaps=True))
    rig.house.catalogues._fresh_until = None


async def test_an_automatic_quality_that_was_answered_low_is_charged_as_low(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = await ask(shop, customer.api_key, "gpt-image-1", estimate={"images": 1, "quality": "auto"})
    done = await settle(shop, held["hold_id"], {"images": 1}, attributes={"quality": "low"})
    assert (held["hold_usd"], done["cost"]["total_cost_usd"]) == (D("0.25"), D("0.016"))


async def test_an_assumed_split_and_parts_beside_are_flagged_and_explained(rig: Rig) -> None:
    entry = {
        "litellm_provider": "openai", "mode": "realtime", "input_cost_per_token": 4e-06, "output_cost_per_token": 1.6e-05,
        "input_cost_per_audio_token": 3.2e-05, "output_cost_per_audio_token": 6.4e-05, "cache_read_input_token_cost": 4e-07,
        "cache_read_input_audio_token_cost": 4e-07, "max_output_tokens": 4096,
    }  # fmt: skip
    await on_sale(rig, {"speaker": entry})
    customer = await rig.customer("10")
    held = await ask(rig, customer.api_key, "speaker", estimate={"input_tokens": 500, "max_output_tokens": 116})
    assert held["hold_usd"] == D("0.023424")
    usage = {"input_tokens": 500, "audio_input_tokens": 300, "cache_read_tokens": 200, "output_tokens": 10, "audio_output_tokens": 5000}  # fmt: skip
    done = await settle(rig, held["hold_id"], usage)
    assert set(done["flags"]) == {"above_hold", "split_assumed", "parts_beside"}
    why = exact(await rig.client.get(f"/activity/{done['charge_id']}/explain", headers=customer.owner))
    lines = {line["name"]: line["units"] for line in why["lines"]}
    assert lines == {"input": 200, "audio_input": 100, "cache_read_audio": 200, "audio_output": 5000, "output": 10}
    beyond = await ask(rig, customer.api_key, "speaker", estimate={"input_tokens": 0, "max_output_tokens": 1_170_000})
    assert beyond["hold_usd"] == D("0.262144")
    long = await settle(rig, beyond["hold_id"], {"output_tokens": 1_170_000})
    assert (long["cost"]["total_cost_usd"], set(long["flags"])) == (D("18.72"), {"above_hold", "beyond_model"})


async def test_a_minute_is_explained_in_minutes_and_the_books_add_up(shop: Rig) -> None:
    customer = await shop.customer("10")
    body = {"api_key": customer.api_key, "model": "nova-3"}
    hour = exact(await shop.meter("charge", request_id="h", **body, usage={"audio_seconds": 3600}))
    second = exact(await shop.meter("charge", request_id="s", **body, usage={"audio_seconds": 1}))
    assert (hour["cost"]["total_cost_usd"], second["cost"]["total_cost_usd"]) == (D("0.258"), D("0.000071667"))
    why = exact(await shop.client.get(f"/activity/{hour['charge_id']}/explain", headers=customer.owner))
    (line,) = why["lines"]
    assert (line["unit_price_usd"], line["per_units"], line["amount_usd"]) == (D("0.0043"), 60, D("0.258"))


async def test_a_cost_that_is_told_is_kept_beside_what_the_catalogue_asks(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = await ask(shop, customer.api_key)
    usage = {"input_tokens": 1000, "output_tokens": 100}
    done = await settle(shop, held["hold_id"], usage, cost_usd="0.00042")
    assert (done["cost"]["total_cost_usd"], done["cost"]["input_cost_usd"]) == (D("0.00042"), None)
    (found,) = await shop.house.db.transaction(ratios)
    assert (found.model, found.calls, found.told_nusd, found.catalogue_nusd, found.permille) == (
        "gpt-4o-mini", 1, 420_000, 210_000, 2000
    )  # fmt: skip
    assert (await audit(shop.house.db)).told == (found,), "the audit tells both"
    why = exact(await shop.client.get(f"/activity/{done['charge_id']}/explain", headers=customer.owner))
    assert [line["name"] for line in why["lines"]] == ["given"]
    metrics = b"".join(part.encode() for part in [str(list(each.samples)) for each in compared.collect()])
    assert b"openai/gpt-4o-mini" in metrics
    again = await settle(shop, held["hold_id"], usage, cost_usd="0.00042")
    assert again["charge_id"] == done["charge_id"]


async def test_use_that_nobody_priced_costs_what_was_held(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = await ask(shop, customer.api_key)
    done = await settle(shop, held["hold_id"], {"video_seconds": 5})
    assert (done["cost"]["total_cost_usd"], done["flags"]) == (ASKED_USD, ["not_priced"])
    assert done["cost"]["input_cost_usd"] is None


@pytest.mark.parametrize(("told", "counted"), [(4.5, 5), (4, 4), (4.0, 4), (0.001, 1), (0, 0)])
async def test_each_second_that_was_begun_counts(shop: Rig, told: float, counted: int) -> None:
    customer = await shop.customer("10")
    call = {"api_key": customer.api_key, "model": "whisper-1"}
    done = exact(await shop.meter("charge", request_id="c", **call, usage={"audio_seconds": told}))
    whole = exact(await shop.meter("charge", request_id="d", **call, usage={"audio_seconds": counted}))
    assert done["cost"] == whole["cost"]
    assert shop.sql("SELECT units FROM usage") == [({"audio_seconds": counted},)] * 2
    assert exact(await shop.meter("charge", request_id="c", **call, usage={"audio_seconds": told})) == done
    held = await ask(shop, customer.api_key, "veo3", estimate={"video_seconds": 5})
    video = await settle(shop, held["hold_id"], {"video_seconds": told})
    assert video["cost"]["total_cost_usd"] == held["hold_usd"] / 5 * counted


@pytest.mark.parametrize("text", ["1e999", "-0.5", "1000000000000.5", '"4.5"'])
async def test_seconds_that_cannot_be_are_refused(shop: Rig, text: str) -> None:
    customer = await shop.customer("10")
    body = (
        f'{{"request_id": "c", "api_key": "{customer.api_key}", "model": "veo3", "usage": {{"video_seconds": {text}}}}}'
    )
    headers = await shop.service() | {"Content-Type": "application/json"}
    refused = await shop.client.post("/v1/meter/charge", headers=headers, content=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "usage.video_seconds")


async def test_a_completed_call_whose_usage_was_lost_costs_what_was_held(shop: Rig) -> None:
    customer = await shop.customer("10")
    lost: list[dict[str, Any]] = [{}, {"input_tokens": None}]
    for usage in lost:
        held = await ask(shop, customer.api_key)
        done = await settle(shop, held["hold_id"], usage)
        assert (done["cost"]["total_cost_usd"], done["flags"]) == (ASKED_USD, ["usage_missing"])
        assert await settle(shop, held["hold_id"], usage) == done
        why = await shop.client.get(f"/activity/{done['charge_id']}/explain", headers=customer.owner)
        assert [line["name"] for line in exact(why)["lines"]] == ["held"]
    assert (await shop.balance(customer), await shop.held(customer)) == (10 - 2 * ASKED_USD, D(0))


async def test_a_zero_that_is_said_is_a_fact_and_a_call_that_was_cut_short_may_have_used_nothing(shop: Rig) -> None:
    customer = await shop.customer("10")
    holds = [(await ask(shop, customer.api_key))["hold_id"] for _ in range(2)]
    said = await settle(shop, holds[0], {"input_tokens": 0})
    cut = await settle(shop, holds[1], {}, outcome="client_disconnected")
    assert (said["cost"]["total_cost_usd"], said["flags"]) == (0, NONE)
    assert (cut["cost"]["total_cost_usd"], cut["flags"]) == (0, ["usage_missing"])


async def test_usage_that_was_lost_and_that_nothing_was_held_for_is_refused_with_what_would_help(shop: Rig) -> None:
    customer = await shop.customer("10")
    call = {"request_id": "c", "api_key": customer.api_key, "model": MINI}
    refused = await shop.meter("charge", **call, usage={})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "usage")
    assert "cost_usd: 0" in refused.json()["message"]
    key_hash = hashlib.sha256(customer.api_key.encode()).hexdigest()
    told = await send(shop, event("1", {"model": MINI, "usage": {}}, subject=key_hash))
    assert (told.status_code, told.json()["error"]["param"]) == (422, "data.usage")
    free = exact(await shop.meter("charge", **call, usage={}, cost_usd=0))
    assert (free["cost"]["total_cost_usd"], free["flags"]) == (0, NONE)


async def test_where_nothing_is_sold_a_call_that_was_held_for_costs_its_hold(rig: Rig) -> None:
    customer = await rig.customer("10")
    held = await rig.authorize(customer.api_key, "0.5", model=MINI)
    done = await settle(rig, held["hold_id"], {"input_tokens": 1})
    assert (done["cost"]["total_cost_usd"], done["flags"]) == (D("0.5"), ["not_priced"])


async def test_a_declared_feature_is_held_for_and_charged_only_if_used(shop: Rig) -> None:
    customer = await shop.customer("10")
    holds = [await ask(shop, customer.api_key, features=["web"]) for _ in range(2)]
    assert {held["hold_usd"] for held in holds} == {D("0.02") + ASKED_USD}
    usage = {"input_tokens": 1000, "output_tokens": 100}
    used = await settle(shop, holds[0]["hold_id"], usage, features_used=["web"])
    unused = await settle(shop, holds[1]["hold_id"], usage)
    assert (used["cost"]["fees_usd"], used["cost"]["total_cost_usd"]) == (D("0.02"), D("0.02") + ASKED_USD)
    assert (unused["cost"]["fees_usd"], unused["cost"]["total_cost_usd"]) == (0, ASKED_USD)


async def test_a_hold_that_the_database_lost_is_still_priced_by_what_it_was_asked_for(shop: Rig) -> None:
    customer = await shop.customer("10")
    estimate = {"images": 1, "size": "1024x1024", "quality": "hd"}
    held = await ask(shop, customer.api_key, "dall-e-3", estimate=estimate)
    shop.sql("UPDATE account SET held_nusd = 0")
    shop.sql("UPDATE api_key SET held_nusd = 0")
    shop.sql("DELETE FROM hold")
    done = await settle(shop, held["hold_id"], {"images": 1})
    assert (done["cost"]["total_cost_usd"], done["flags"]) == (D("0.08"), ["hold_missing"])
    assert shop.sql("SELECT model FROM usage") == [("dall-e-3",)]


def test_a_request_always_has_the_same_hold_whatever_the_version() -> None:
    namespace = uuid.UUID("6f1f3c0e-0b53-4f9e-8f5f-5a7e3e7e2001")
    for service, request_id in (("proxy", "r"), ("", ""), ("Ünï", "a" * 64)):
        assert hold_id_for(service, request_id) == uuid.uuid5(namespace, f"{service}\x00{request_id}")


async def test_the_seeds_own_milliseconds_have_fractions_and_are_kept_whole(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = [(await ask(shop, customer.api_key))["hold_id"] for _ in range(2)]
    timed = {"cost_usd": "0.001", "latency_ms": 523.4, "ttft_ms": 215.2}
    assert (await shop.meter("settle", hold_id=held[0], **timed)).status_code == 200
    batch = exact(await shop.meter("settle/batch", settles=[timed | {"hold_id": held[1]}]))
    assert batch["charged"] == 1
    assert (await shop.meter("charge", request_id="c", api_key=customer.api_key, **timed)).status_code == 200
    key_hash = hashlib.sha256(customer.api_key.encode()).hexdigest()
    assert (await send(shop, event("1", timed, subject=key_hash))).status_code == 200
    assert shop.sql("SELECT latency_ms, ttft_ms FROM usage") == [(523, 215)] * 4


@pytest.mark.parametrize("text", ["1e999", "-0.5", "-1e999", "2147483647.5", '"523.4"', "true", "NaN", "Infinity"])
async def test_a_time_that_no_clock_shows_is_refused(shop: Rig, text: str) -> None:
    customer = await shop.customer("10")
    hold_id = (await ask(shop, customer.api_key))["hold_id"]
    body = f'{{"hold_id": "{hold_id}", "cost_usd": 1, "latency_ms": {text}}}'
    headers = await shop.service() | {"Content-Type": "application/json"}
    refused = await shop.client.post("/v1/meter/settle", headers=headers, content=body)
    code = "malformed_json" if text in ("NaN", "Infinity") else "invalid_field"
    assert (refused.status_code, refused.json()["error"]["code"]) == (400 if code == "malformed_json" else 422, code)
    assert await shop.balance(customer) == 10


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 300_000), min_size=4, max_size=4), st.sampled_from([MINI, "gpt-4o", "gpt-5"]), st.booleans()
)
def test_the_lines_of_any_call_add_up_to_what_it_took_from_the_balance(
    quotes: Any, counts: list[int], model: str, is_web: bool
) -> None:
    total, parts, cost_nusd = quotes(counts, model, is_web)
    assert sum(parts) == total == cost_nusd


@pytest.fixture
def quotes() -> Any:
    """Quotes of the starter catalogue, without a database."""
    draft = starter()
    fees = [FeeRow(fee.feature, fee.price_nusd) for fee in draft.fees]
    catalogue = Catalogue(1, draft.prices, models=draft.models, fees=fees)

    def quoted(counts: list[int], model: str, is_web: bool) -> tuple[int, list[int], int]:
        read, write, answer, fresh = counts
        usage = Usage(
            input_tokens=read + write + fresh, cache_read_tokens=read, cache_write_tokens=write, output_tokens=answer
        )
        quote = catalogue.price(Call(model, features=("web",) if is_web else ()), usage, datetime.now(UTC))
        kept = json.loads(json.dumps(lines_of(quote)))
        exact_ausd = sum(units * price * ppm for _, _, units, price, ppm in kept["lines"])
        return -(-exact_ausd // AUSD_PER_NUSD), kept["parts"], quote.cost_nusd

    return quoted


async def test_a_charge_is_priced_too_and_its_repeat_is_the_same_after_prices_changed(shop: Rig) -> None:
    customer = await shop.customer("10")
    body = {
        "request_id": "c1", "api_key": customer.api_key, "model": MINI, "usage": {"input_tokens": 1000, "output_tokens": 100},
    }  # fmt: skip
    first = exact(await shop.meter("charge", **body))
    assert (first["decision"], first["cost"]["total_cost_usd"]) == ("allow", ASKED_USD)
    await dearer(shop)
    assert exact(await shop.meter("charge", **body)) == first
    other = await shop.meter("charge", **body | {"usage": {"input_tokens": 1}})
    assert other.json()["error"]["code"] == "request_id_reuse"
    refused = await shop.meter("charge", **body | {"request_id": "c2", "max_cost_usd": "0.0001"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "max_cost_usd")
    assert await shop.balance(customer) == 10 - ASKED_USD


async def test_a_charge_says_how_the_call_was_made_and_another_way_is_another_charge(shop: Rig) -> None:
    customer = await shop.customer("10")
    body = {"request_id": "c1", "api_key": customer.api_key, "model": "dall-e-3", "usage": {"images": 1}}
    plain = exact(await shop.meter("charge", **body))
    fine = {"attributes": {"quality": "hd", "size": "1024x1024"}}
    dear = exact(await shop.meter("charge", **body | fine | {"request_id": "c2"}))
    assert (plain["cost"]["total_cost_usd"], dear["cost"]["total_cost_usd"]) == (D("0.04"), D("0.08"))
    for other in (body | fine, body | {"request_id": "c2"}, body | {"attributes": {"quality": "standard"}}):
        refused = await shop.meter("charge", **other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "request_id_reuse")
    assert exact(await shop.meter("charge", **body)) == plain
    same = exact(await shop.meter("charge", **body | {"attributes": {"quality": "auto"}}))
    assert same == plain, "it says nothing"
    await dearer(shop)
    assert exact(await shop.meter("charge", **body | fine | {"request_id": "c2"})) == dear
    unknown = await shop.meter("charge", **body | {"request_id": "c3", "attributes": {"style": "vivid"}})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (422, "attributes.style")
    assert await shop.balance(customer) == 10 - D("0.12")


async def test_an_event_says_how_the_call_was_made(shop: Rig) -> None:
    customer = await shop.customer("10")
    key_hash = hashlib.sha256(customer.api_key.encode()).hexdigest()
    held = await ask(shop, customer.api_key, "dall-e-3", estimate={"images": 1, "size": "1024x1024"})
    made = {"usage": {"images": 1}, "attributes": {"quality": "hd", "size": "1024x1024"}}
    events = [
        event("1", made | {"model": "dall-e-3"}, subject=key_hash), event("2", made | {"hold_id": held["hold_id"]}),
        event("3", {"model": "dall-e-3", "usage": {"images": 1}}, subject=key_hash),
        event("4", made | {"model": "dall-e-3", "attributes": {"style": "vivid"}}, subject=key_hash),
    ]  # fmt: skip
    answer = exact(await send(shop, events))
    assert [each["status"] for each in answer["results"]] == [200, 200, 200, 422]
    costs = [each["charge"]["cost"]["total_cost_usd"] for each in answer["results"][:3]]
    assert costs == [D("0.08"), D("0.08"), D("0.04")]


async def test_an_account_may_have_prices_of_its_own(shop: Rig) -> None:
    mine, theirs = await with_one_dollar(shop), await with_one_dollar(shop)
    account_id = shop.sql("SELECT account_id FROM topup ORDER BY created_at, id LIMIT 1")[0][0]
    await shop.house.db.transaction(
        lambda s: rules.set_markup(
            s, "account", str(account_id), multiplier_ppm=500_000, fixed_per_request_nusd=7, notice_seconds=0
        )
    )
    shop.house.catalogues._fresh_until = None
    costs = {(await ask(shop, each.api_key))["hold_usd"] for each in (mine, theirs)}
    assert costs == {ASKED_USD, ASKED_USD / 2 + D("0.000000007")}


async def test_a_dimension_can_be_overridden_while_it_is_sold(shop: Rig) -> None:
    customer = await with_one_dollar(shop)
    await shop.house.db.transaction(
        lambda s: rules.set_override(s, MINI, Dimension.OUTPUT, 1_000_000, notice_seconds=0)
    )
    shop.house.catalogues._fresh_until = None
    assert (await ask(shop, customer.api_key))["hold_usd"] == D("0.00025")


# --- extend, refund -----------------------------------------------------------------------------------


async def test_a_long_call_keeps_its_hold_and_grows_with_what_it_cost(shop: Rig) -> None:
    customer = await with_one_dollar(shop)
    held = await shop.authorize(customer.api_key, "0.5", ttl_seconds=1)
    longer = exact(await shop.meter("extend", hold_id=held["hold_id"], ttl_seconds=3600))
    assert longer["expires_at"] > held["expires_at"]
    assert (longer["hold_usd"], longer["available_usd"]) == (D("0.5"), D("0.5"))
    grown = exact(await shop.meter("extend", hold_id=held["hold_id"], captured_usd="1.25"))
    assert (grown["hold_usd"], grown["held_usd"], grown["available_usd"]) == (D("1.25"), D("1.25"), 0)
    assert grown["expires_at"] == longer["expires_at"], "a hold is never shortened"
    assert exact(await shop.meter("extend", hold_id=held["hold_id"], captured_usd="1.25")) == grown
    await shop.settle(held["hold_id"], "1.25")
    closed = await shop.meter("extend", hold_id=held["hold_id"])
    assert (closed.status_code, closed.json()["error"]["code"]) == (409, "hold_closed")
    assert (await shop.balance(customer), await shop.held(customer)) == (D("-0.25"), D(0))


@pytest.mark.parametrize(("usage", "flag"), [({"video_seconds": 5}, "not_priced"), ({}, "usage_missing")])
async def test_a_call_that_costs_its_hold_costs_what_it_has_grown_to(
    shop: Rig, usage: dict[str, int], flag: str
) -> None:
    customer = await shop.customer("10")
    held = await shop.authorize(customer.api_key, "0.01", model=MINI)
    await shop.meter("extend", hold_id=held["hold_id"], captured_usd="0.05")
    done = await settle(shop, held["hold_id"], usage)
    assert (done["cost"]["total_cost_usd"], done["flags"]) == (D("0.05"), [flag])
    assert (await shop.balance(customer), await shop.held(customer)) == (D("9.95"), D(0))
    assert await settle(shop, held["hold_id"], usage) == done


async def test_a_call_that_costs_its_hold_costs_what_was_held_at_first_if_the_hold_is_lost(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = await shop.authorize(customer.api_key, "0.01", model=MINI)
    shop.sql("UPDATE account SET held_nusd = 0")
    shop.sql("UPDATE api_key SET held_nusd = 0")
    shop.sql("DELETE FROM hold")
    done = await settle(shop, held["hold_id"], {"video_seconds": 5})
    assert done["cost"]["total_cost_usd"] == D("0.01")
    assert set(done["flags"]) == {"hold_missing", "not_priced"}


async def test_what_was_captured_is_held_and_charged_when_the_hold_expires(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = await shop.authorize(customer.api_key, "0.01", ttl_seconds=1)
    free = await shop.authorize(customer.api_key, "0.02", ttl_seconds=1)
    await shop.meter("extend", hold_id=held["hold_id"], ttl_seconds=1, captured_usd="0.05")
    refused = await shop.meter("release", hold_id=held["hold_id"])
    assert (refused.status_code, exact(refused)["error"]["code"]) == (409, "hold_captured")
    assert exact(refused)["error"]["metadata"] == {"captured_usd": D("0.05")}
    assert await shop.held(customer) == D("0.07")
    shop.sql("UPDATE hold SET expires_at = now() - interval '1 second'")
    assert sum(await asyncio.gather(*(expire_holds(shop.house.db) for _ in range(5)))) == 2
    assert (await shop.balance(customer), await shop.held(customer)) == (D("9.95"), D(0))
    assert shop.sql("SELECT cost_nusd, flags, outcome FROM usage") == [(50_000_000, "captured", "partial")]
    late = await shop.settle(held["hold_id"], "0.04")
    assert (late["cost"]["total_cost_usd"], late["flags"]) == (D("0.05"), ["captured"]), "it was charged already"
    assert (await shop.meter("release", hold_id=free["hold_id"])).status_code == 200
    assert await shop.balance(customer) == D("9.95")


@pytest.mark.parametrize(
    ("on_expiry", "captured_usd", "charged_usd", "flags"),
    [
        ("captured", "0", "0", None), ("captured", "0.003", "0.003", "captured"), ("hold", "0", "0.01", "hold_expired"),
        ("hold", "0.003", "0.01", "hold_expired"), ("release", "0", "0", None), ("release", "0.003", "0", None),
    ],
)  # fmt: skip
async def test_an_expiry_charges_what_its_proxy_wanted(
    shop: Rig, on_expiry: Any, captured_usd: str, charged_usd: str, flags: str | None
) -> None:
    customer = await shop.customer("10")
    [(account_id, key_id)] = shop.sql("SELECT account_id, id FROM api_key")
    owner, meter = KeyOwner(account_id, key_id), shop.house.meter
    held = await meter.authorize("proxy", owner, Ask("r", 10_000_000, None, None, on_expiry=on_expiry))
    await shop.meter("extend", hold_id=held.hold_id, captured_usd=captured_usd)
    shop.sql("UPDATE hold SET expires_at = now() - interval '1 second'")
    assert await expire_holds(shop.house.db) == 1
    assert (await shop.balance(customer), await shop.held(customer)) == (10 - D(charged_usd), D(0))
    assert shop.sql("SELECT flags FROM usage") == ([(flags,)] if flags else [])


async def test_more_captures_than_a_round_has_ids_for_are_all_charged_when_they_expire(shop: Rig) -> None:
    customer = await shop.customer("10")
    [(account_id, key_id)] = shop.sql("SELECT account_id, id FROM api_key")
    meter = shop.house.meter
    held = await asyncio.gather(
        *(meter.authorize("proxy", KeyOwner(account_id, key_id), Ask(f"r{n}", 1_000, None, None)) for n in range(450))
    )
    await asyncio.gather(*(meter.extend("proxy", each.hold_id, 1, 2_000) for each in held))
    shop.sql("UPDATE hold SET expires_at = now() - interval '1 second'")
    assert await expire_holds(shop.house.db) == 450
    assert (await shop.balance(customer), await shop.held(customer)) == (D("9.9991"), D(0))


async def test_the_expirer_goes_on_until_nothing_is_due_and_passes_by_what_is_locked(shop: Rig) -> None:
    customers = [await shop.customer("10") for _ in range(3)]
    for customer in customers:
        await shop.authorize(customer.api_key, "0.5")
    [(locked,)] = shop.sql("SELECT account_id FROM hold ORDER BY account_id LIMIT 1")
    shop.sql(
        """WITH a AS (INSERT INTO account (id, held_nusd) SELECT gen_random_uuid(), 5 FROM generate_series(1, 6000) RETURNING id),
                k AS (INSERT INTO api_key (account_id, id, name, preview, held_nusd) SELECT id, id, 'k', 'sk-', 5 FROM a),
                c AS (INSERT INTO credential (secret_hash, kind, account_id, key_id)
                      SELECT uuid_send(id), 'credit_id', id, NULL::uuid FROM a
                      UNION ALL SELECT uuid_send(id) || '\\x01'::bytea, 'api_key', id, id FROM a)
           INSERT INTO hold (account_id, id, service, request_id, request_hash, key_id, amount_nusd)
           SELECT id, id, 'proxy', id::text, '', id, 5 FROM a"""
    )
    shop.sql("UPDATE hold SET expires_at = now() - interval '1 second'")
    with psycopg.connect(shop.database_url) as other:
        other.execute("SELECT FROM account WHERE id = %s FOR UPDATE", [locked])
        assert await expire_holds(shop.house.db) == 6_002
        assert shop.sql("SELECT account_id FROM hold WHERE state = 'open'") == [(locked,)]
    assert await expire_holds(shop.house.db) == 1
    # Those planted go again: nobody who knows the pepper made them, and the audit would say so.
    shop.sql("DELETE FROM hold WHERE account_id = key_id")
    shop.sql("DELETE FROM credential c USING api_key k WHERE k.id = k.account_id AND c.account_id = k.account_id")
    shop.sql("DELETE FROM api_key WHERE account_id = id")
    shop.sql("DELETE FROM account a WHERE NOT EXISTS (SELECT FROM credential c WHERE c.account_id = a.id)")


async def test_a_charge_is_refunded_once_however_often_it_is_asked(shop: Rig) -> None:
    customer = await with_one_dollar(shop)
    key = (await shop.new_key(customer, usage_limit_usd="0.5", reset_period="daily"))["api_key"]
    charge = exact(await shop.meter("charge", request_id="v", api_key=key, cost_usd="0.5"))["charge_id"]
    assert exact(await shop.meter("charge", request_id="w", api_key=key, cost_usd="0.1"))["decision"] == "deny"
    answers = await asyncio.gather(
        *(shop.meter("refund", charge_id=charge, amount_usd="0.4", reason="the video failed") for _ in range(20))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert {exact(answer)["refunded_usd"] for answer in answers} == {D("0.4")}
    assert await shop.balance(customer) == D("0.9")
    assert shop.sql("SELECT count(*) FROM entry WHERE kind = 'refund'") == [(1,)]
    other = await shop.meter("refund", charge_id=charge, amount_usd="0.1")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "already_refunded")
    assert exact(await shop.meter("charge", request_id="x", api_key=key, cost_usd="0.4"))["decision"] == "allow"


async def test_a_refund_is_of_ones_own_charge_and_of_no_more_than_it_cost(shop: Rig) -> None:
    customer = await with_one_dollar(shop)
    charge = exact(await shop.meter("charge", request_id="v", api_key=customer.api_key, cost_usd="0.5"))["charge_id"]
    for amount in ("0.500000001", "0"):
        refused = await shop.meter("refund", charge_id=charge, amount_usd=amount)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "amount_usd")
    for unknown in ("", "x", charge[:-1], charge + "A", "A" * 43, str(uuid.uuid4())):
        assert (await shop.meter("refund", charge_id=unknown)).status_code == 404
    token = await create_token(shop.house.db, shop.house.settings.pepper, "service", "another")
    theirs = await shop.client.post(
        "/v1/meter/refund", headers={"Authorization": f"Bearer {token}"}, json={"charge_id": charge}
    )
    assert theirs.status_code == 404
    assert await shop.balance(customer) == D("0.5")
    whole = exact(await shop.meter("refund", charge_id=charge))
    assert (whole["refunded_usd"], whole["balance_usd"]) == (D("0.5"), 1)


# --- many at a time -----------------------------------------------------------------------------------


async def test_a_batch_gives_each_settlement_its_own_verdict(shop: Rig) -> None:
    customer = await shop.customer("10")
    holds = [(await ask(shop, customer.api_key))["hold_id"] for _ in range(3)]
    usage = {"input_tokens": 1000, "output_tokens": 100}
    settles: list[Any] = [
        {"hold_id": holds[0], "usage": usage}, {"hold_id": "no-such-hold", "usage": usage}, {"hold_id": holds[1]},
        {"hold_id": holds[2], "cost_usd": "0.5", "unknown": 1}, {"hold_id": holds[0], "usage": usage}, 5,
        {"hold_id": holds[2], "cost_usd": "0.5"},
    ]  # fmt: skip
    answer = exact(await shop.meter("settle/batch", settles=settles))
    assert [each["status"] for each in answer["results"]] == [200, 404, 422, 422, 200, 422, 200]
    assert (answer["charged"], answer["refused"]) == (3, 4)
    assert answer["results"][0]["charge"] == answer["results"][4]["charge"]
    assert answer["results"][1]["error"]["code"] == "hold_not_found"
    assert await shop.balance(customer) == 10 - ASKED_USD - D("0.5")
    assert exact(await shop.meter("settle/batch", settles=settles)) == answer


async def test_five_hundred_fit_into_a_batch_and_one_more_does_not(shop: Rig) -> None:
    customer = await shop.customer("10")
    holds = await asyncio.gather(*(shop.authorize(customer.api_key, "0.001") for _ in range(500)))
    settles = [
        {"hold_id": held["hold_id"], "cost_usd": "0.001", "upstream_id": "u" * 100, "usage": {"input_tokens": 5}}
        for held in holds
    ]
    assert len(json.dumps(settles)) > 64 * 1024
    answer = exact(await shop.meter("settle/batch", settles=settles))
    assert Counter(each["status"] for each in answer["results"]) == {200: 500}
    assert (await shop.balance(customer), await shop.held(customer)) == (D("9.5"), D(0))
    for wrong in ([*settles, settles[0]], []):
        refused = await shop.meter("settle/batch", settles=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "settles")
    too_large = await shop.client.post(
        "/v1/meter/settle/batch", headers=await shop.service(), content=b" " * (1024 * 1024 + 1)
    )
    assert too_large.status_code == 413


def event(event_id: str, data: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "specversion": "1.0", "id": event_id, "source": "/gateway/1", "type": "ai.usage", "time": "2026-11-21T10:00:00Z",
        "data": data,
    } | more  # fmt: skip


async def send(shop: Rig, events: Any) -> Any:
    kind = "application/cloudevents-batch+json" if isinstance(events, list) else "application/cloudevents+json"
    response = await shop.client.post(
        "/v1/meter/events", headers=await shop.service() | {"Content-Type": kind}, content=json.dumps(events)
    )
    return response


async def test_usage_comes_as_cloudevents_once_for_each_source_and_id(shop: Rig) -> None:
    customer = await shop.customer("10")
    held = await ask(shop, customer.api_key)
    usage = {"input_tokens": 1000, "output_tokens": 100}
    key_hash = hashlib.sha256(customer.api_key.encode()).hexdigest()
    events = [
        event("1", {"hold_id": held["hold_id"], "usage": usage}),
        event("2", {"api_key_hash": key_hash, "model": MINI, "usage": usage}),
        event("3", {"model": MINI, "usage": usage}, subject=key_hash),
        event("2", {"api_key_hash": key_hash, "model": MINI, "usage": usage}, source="/gateway/2"),
    ]
    answer = exact(await send(shop, events))
    assert [each["status"] for each in answer["results"]] == [200] * 4
    assert [each["charge"]["flags"] for each in answer["results"]] == [[], *[["no_hold"]] * 3]
    assert await shop.balance(customer) == 10 - 4 * ASKED_USD
    again = exact(await send(shop, events))
    assert [each["charge"]["charge_id"] for each in again["results"]] == [
        each["charge"]["charge_id"] for each in answer["results"]
    ]
    single = exact(await send(shop, events[1]))
    assert single["results"][0]["charge"] == answer["results"][1]["charge"]
    assert await shop.balance(customer) == 10 - 4 * ASKED_USD
    assert shop.sql("SELECT window_usage_nusd FROM api_key") == [(840_000,)]


async def test_an_event_that_makes_no_sense_is_refused_alone(shop: Rig) -> None:
    customer = await shop.customer("10")
    key_hash = hashlib.sha256(customer.api_key.encode()).hexdigest()
    usage = {"input_tokens": 1000, "output_tokens": 100}
    good = event("good", {"model": MINI, "usage": usage}, subject=key_hash)
    bad = [
        event("a", {"model": MINI, "usage": usage}, subject="0" * 64), event("b", {"model": MINI, "usage": usage}),
        event("c", {"model": "nobody/sells-this", "usage": usage}, subject=key_hash), event("d", {"usage": usage}, subject=key_hash),
        good | {"specversion": "0.3"}, event("f", {}, subject=key_hash), {},
        event("g", {"model": MINI, "usage": {"input_tokens": -1}}, subject=key_hash),
    ]  # fmt: skip
    answer = exact(await send(shop, [*bad, good]))
    assert [each["status"] for each in answer["results"]] == [401, 422, 422, 422, 422, 422, 422, 422, 200]
    assert await shop.balance(customer) == 10 - ASKED_USD
    for wrong in ([], [good] * 501):
        assert (await send(shop, wrong)).status_code == 422


async def test_a_low_balance_is_told_by_the_charge_that_made_it_so(shop: Rig) -> None:
    told: list[uuid.UUID] = []
    shop.house.meter.on_low = told.append
    customer: Customer = await shop.customer("10")
    shop.sql("UPDATE account SET low_nusd = 9000000000")
    held = await shop.authorize(customer.api_key, "1")
    await shop.settle(held["hold_id"], "1")
    assert told == [], "nine dollars are not below nine dollars"
    await shop.meter("charge", request_id="c", api_key=customer.api_key, cost_usd="0.000000001")
    await shop.meter("charge", request_id="c", api_key=customer.api_key, cost_usd="0.000000001")
    assert len(told) == 1, "a repeat is no charge"
    shop.sql("UPDATE account SET low_nusd = NULL")
