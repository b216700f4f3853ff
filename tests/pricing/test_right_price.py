"""Usages as providers really tell them, at prices as price files really have them: what is charged is what is right."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from app.pricing.importer import read_prices
from app.pricing.quote import Ask, Call, Catalogue, Quote
from app.pricing.rows import Dimension, Kind, PriceRow, Usage

D = Dimension
NOW = datetime(2026, 5, 1, tzinfo=UTC)


def sold(**prices: Any) -> Catalogue:
    """A catalogue of the one model `m`, by LiteLLM's field names: USD per million tokens, or for what else is counted."""
    entry = {"litellm_provider": prices.pop("provider", "p"), "mode": prices.pop("mode", "chat")}
    whole = ("max_output_tokens", "max_input_tokens")
    for name, value in prices.items():
        is_tokens = "token" in name and name not in whole and not isinstance(value, dict)
        entry[name] = Decimal(str(value)) / 10**6 if is_tokens else value
    draft = read_prices(json.dumps({"m": entry}, default=float).encode())
    return Catalogue(1, draft.prices, models=draft.models)


def cost(book: Catalogue, model: str = "m", made: Mapping[str, str] | None = None, **counts: Any) -> Decimal:
    return quoted(book, model, made, **counts).cost_nusd / Decimal(10**9)


def quoted(book: Catalogue, model: str = "m", made: Mapping[str, str] | None = None, **counts: Any) -> Quote:
    return book.price(Call(model, attributes=made or {}), Usage(**counts), NOW)


LONG = {
    "input_cost_per_token": 3, "output_cost_per_token": 15, "cache_read_input_token_cost": "0.3",
    "cache_creation_input_token_cost": "3.75", "input_cost_per_token_above_200k_tokens": 6,
    "output_cost_per_token_above_200k_tokens": "22.5", "input_cost_per_token_batches": "1.5",
    "output_cost_per_token_batches": "7.5",
}  # fmt: skip
BATCH, FLEX, PRIORITY = ({"service_tier": tier} for tier in ("batch", "flex", "priority"))


@pytest.mark.parametrize(
    ("made", "counts", "right"),
    [
        (BATCH, {"input_tokens": 300_000, "output_tokens": 1000}, "0.91125"),
        (BATCH, {"input_tokens": 200_000, "output_tokens": 1000}, "0.3075"),
        ({}, {"input_tokens": 300_000, "output_tokens": 1000}, "1.8225"),
        ({}, {"input_tokens": 300_000, "cache_read_tokens": 300_000}, "0.18"),
        ({}, {"input_tokens": 300_000, "cache_write_tokens": 300_000}, "2.25"),
        ({"service_tier": "default"}, {"input_tokens": 300_000, "output_tokens": 1000}, "1.8225"),
    ],
)
def test_a_price_that_a_file_leaves_out_is_the_long_one_as_the_service_tier_changes_the_short_one(
    made: dict[str, str], counts: dict[str, Any], right: str
) -> None:
    assert cost(sold(**LONG), made=made, **counts) == Decimal(right)


@pytest.mark.parametrize(("kilo", "tier", "factor"), [(128, "flex", 2), (200, "priority", 3), (272, "batches", 5)])
@pytest.mark.parametrize("part", ["input", "cache_read", "cache_write", "cache_write_1h"])
def test_a_long_call_in_a_service_tier_costs_as_much_more_as_a_short_one(
    kilo: int, tier: str, factor: int, part: str
) -> None:
    short = {
        "input_cost_per_token": 4, "cache_read_input_token_cost": 1, "cache_creation_input_token_cost": 5,
        "cache_creation_input_token_cost_above_1hr": 8,
    }  # fmt: skip
    prices: dict[str, Any] = dict(short)
    prices |= {f"{name}_above_{kilo}k_tokens": 2 * price for name, price in short.items()}
    prices |= {f"{name}_{tier}": factor * price for name, price in short.items()}
    made, n = {"service_tier": "batch" if tier == "batches" else tier}, kilo * 1000
    each = {"input": 4, "cache_read": 1, "cache_write": 5, "cache_write_1h": 8}[part]
    for tokens, twice in ((n, 1), (n + 1, 2)):
        counts: dict[str, Any] = {"input_tokens": tokens} | ({} if part == "input" else {f"{part}_tokens": tokens})
        assert cost(sold(**prices), made=made, **counts) == Decimal(tokens * each * factor * twice) / 10**6


VISION = {"input_cost_per_token": "1.5", "output_cost_per_token": 9, "cache_read_input_token_cost": "0.15", "input_cost_per_image_token": "1.5"}  # fmt: skip
REALTIME = {
    "mode": "realtime", "input_cost_per_token": 4, "output_cost_per_token": 16, "input_cost_per_audio_token": 32,
    "output_cost_per_audio_token": 64, "input_cost_per_image_token": 5, "cache_read_input_token_cost": "0.4",
    "cache_read_input_audio_token_cost": "0.4", "cache_read_input_image_token_cost": "0.5",
}  # fmt: skip


def test_cached_tokens_that_are_images_too_are_charged_once_by_the_cheapest_split() -> None:
    counts: dict[str, Any] = {
        "input_tokens": 24643,
        "output_tokens": 3110,
        "cache_read_tokens": 24503,
        "image_input_tokens": 22000,
    }
    quote = quoted(sold(**VISION), **counts)
    assert (quote.cost_nusd, quote.flags) == (31_875_450, ("split_assumed",))
    assert sum(line.units for line in quote.lines) == 24643 + 3110


@pytest.mark.parametrize(
    ("counts", "right", "flags"),
    [
        ({"input_tokens": 1000, "audio_input_tokens": 1000, "cache_read_tokens": 1000}, "0.0004", ()),
        ({"input_tokens": 1000, "audio_input_tokens": 1000, "cache_read_tokens": 1000, "cache_read_audio_tokens": 1000}, "0.0004", ()),
        ({"input_tokens": 1000, "audio_input_tokens": 600, "cache_read_tokens": 500, "cache_read_audio_tokens": 200}, "0.0134", ()),
        ({"input_tokens": 1000, "audio_input_tokens": 600, "cache_read_tokens": 500}, "0.005", ("split_assumed",)),
        ({"input_tokens": 1000, "image_input_tokens": 1000, "cache_read_tokens": 1000}, "0.0005", ()),
        ({"input_tokens": 1000, "audio_input_tokens": 300, "image_input_tokens": 300, "cache_read_tokens": 500, "cache_read_audio_tokens": 100, "cache_read_image_tokens": 0}, "0.0081", ()),
    ],
)  # fmt: skip
def test_how_a_token_was_read_and_what_it_is_are_two_axes(
    counts: dict[str, Any], right: str, flags: tuple[str, ...]
) -> None:
    quote = quoted(sold(**REALTIME), **counts)
    assert (Decimal(quote.cost_nusd) / 10**9, quote.flags) == (Decimal(right), flags)


def test_cached_audio_that_has_no_price_costs_as_much_less_as_cached_text() -> None:
    flash = sold(input_cost_per_token="0.3", cache_read_input_token_cost="0.03", input_cost_per_audio_token=1)
    assert cost(flash, input_tokens=1000, audio_input_tokens=1000, cache_read_tokens=1000) == Decimal("0.0001")


@pytest.mark.parametrize(
    ("counts", "tokens"),
    [
        ({"reasoning_tokens": 5000}, 5000),
        ({"output_tokens": 10, "reasoning_tokens": 5000}, 5010),
        ({"output_tokens": 5000, "reasoning_tokens": 5000}, 5000),
        ({"output_tokens": 10, "audio_output_tokens": 6, "reasoning_tokens": 5}, 21),
        ({"cache_read_tokens": 5000}, 5000),
        ({"input_tokens": 10, "cache_read_tokens": 3000, "cache_write_tokens": 2000}, 5010),
        ({"input_tokens": 10, "audio_input_tokens": 5000}, 5010),
        ({"input_tokens": 10, "audio_input_tokens": 5000, "cache_read_tokens": 6000}, 6010),
        ({"input_tokens": 9, "cache_read_audio_tokens": 10}, 19),
    ],
)
def test_parts_that_exceed_their_whole_were_counted_beside_it(counts: dict[str, Any], tokens: int) -> None:
    quote = quoted(sold(input_cost_per_token=1, output_cost_per_token=1), **counts)
    assert quote.cost_nusd == tokens * 1000
    whole = counts.get("input_tokens", 0) + counts.get("output_tokens", 0)
    assert ("parts_beside" in quote.flags) == (tokens != whole)


def test_a_call_whose_cached_tokens_were_counted_beside_is_as_long_as_all_of_them() -> None:
    book = sold(**LONG)
    beside = cost(book, input_tokens=100_000, cache_read_tokens=150_000)
    assert beside == Decimal("0.6") + Decimal("0.09")


GPT_IMAGE_2 = {"mode": "image_generation", "input_cost_per_token": 5, "input_cost_per_image_token": 8, "output_cost_per_image_token": 30}  # fmt: skip


def test_the_output_of_an_image_model_is_images_unless_it_is_said_otherwise() -> None:
    assert cost(sold(**GPT_IMAGE_2), input_tokens=22, output_tokens=1372) == Decimal("0.04127")
    both = sold(**GPT_IMAGE_2, output_cost_per_token=10)
    assert cost(both, output_tokens=1000) == Decimal("0.03")
    assert cost(both, output_tokens=1000, image_output_tokens=600) == Decimal("0.022")
    assert cost(both, output_tokens=1000, image_output_tokens=0) == Decimal("0.01")
    assert cost(sold(**GPT_IMAGE_2), images=1, input_tokens=22, output_tokens=1372) == Decimal("0.04127")


def test_what_a_model_is_made_to_hear_or_to_say_is_audio_unless_it_is_said_otherwise() -> None:
    speaks = sold(mode="audio_speech", input_cost_per_token=1, output_cost_per_token=10, output_cost_per_audio_token=12)
    assert cost(speaks, input_tokens=10, output_tokens=100) == Decimal("0.00121")
    hears = sold(mode="audio_transcription", input_cost_per_token=1, input_cost_per_audio_token=6, output_cost_per_token=10)  # fmt: skip
    assert cost(hears, input_tokens=100, output_tokens=10) == Decimal("0.0007")
    assert cost(hears, input_tokens=100, audio_input_tokens=40) == Decimal("0.0003")


@pytest.mark.parametrize("provider", ["anthropic", "bedrock", "p"])
def test_a_cache_write_of_an_hour_is_discounted_in_a_batch_as_the_shorter_one_is(provider: str) -> None:
    book = sold(
        provider=provider, input_cost_per_token=3, input_cost_per_token_batches="1.5", cache_creation_input_token_cost="3.75",
        cache_creation_input_token_cost_batches="1.875", cache_creation_input_token_cost_above_1hr=6,
    )  # fmt: skip
    assert cost(book, made=BATCH, input_tokens=2000, cache_write_1h_tokens=2000) == Decimal("0.006")


def test_discounts_multiply_where_the_provider_says_so_and_nowhere_else() -> None:
    prices = {
        "input_cost_per_token": 3, "input_cost_per_token_batches": "1.5", "cache_read_input_token_cost": "0.3",
        "cache_creation_input_token_cost_above_1hr": 6,
    }  # fmt: skip
    halved, whole = sold(provider="anthropic", **prices), sold(provider="openai", **prices)
    assert cost(halved, made=BATCH, input_tokens=2000, cache_write_1h_tokens=2000) == Decimal("0.006")
    assert cost(halved, made=BATCH, input_tokens=1000, cache_read_tokens=1000) == Decimal("0.00015")
    assert cost(whole, made=BATCH, input_tokens=1000, cache_read_tokens=1000) == Decimal("0.0003")


def test_a_part_of_the_output_follows_it_into_a_service_tier() -> None:
    book = sold(output_cost_per_token=2, output_cost_per_reasoning_token=3, output_cost_per_token_flex=1, output_cost_per_token_priority=4, input_cost_per_token=1)  # fmt: skip
    assert cost(book, made=FLEX, output_tokens=1000, reasoning_tokens=1000) == Decimal("0.0015")
    assert cost(book, made=PRIORITY, output_tokens=1000, reasoning_tokens=1000) == Decimal("0.006")


@pytest.mark.parametrize(
    ("provider", "least"), [("xai", 200_000), ("x-ai", 200_000), ("gemini", 200_001), ("openai", 200_001)]
)
def test_a_context_tier_begins_where_its_provider_says(provider: str, least: int) -> None:
    book = sold(provider=provider, input_cost_per_token=1, input_cost_per_token_above_200k_tokens=2)
    assert cost(book, input_tokens=least - 1) == Decimal(least - 1) / 10**6
    assert cost(book, input_tokens=least) == Decimal(2 * least) / 10**6


def test_a_price_keeps_its_own_unit_and_the_cost_is_rounded_once() -> None:
    a_minute = PriceRow("m", "p", D.AUDIO_SECONDS, 4_300_000_000, per_units=60)
    book = Catalogue(1, [a_minute])
    assert cost(book, audio_seconds=3600) == Decimal("0.258")
    assert cost(book, audio_seconds=1) == Decimal("0.000071667")
    quote = quoted(book, audio_seconds=60)
    assert (quote.cost_nusd, quote.media_nusd) == (4_300_000, 4_300_000)
    (line,) = quote.lines
    assert (line.units, line.list_price_pusd, line.per_units) == (60, 4_300_000_000, 60)
    thirds = Catalogue(1, [PriceRow("m", "p", D.INPUT, 10, per_units=3), PriceRow("m", "p", D.OUTPUT, 10, per_units=7)])
    assert thirds.price(Call("m"), Usage(input_tokens=300, output_tokens=0), NOW).cost_nusd == 1
    assert thirds.price(Call("m"), Usage(input_tokens=150, output_tokens=350), NOW).cost_nusd == 1
    assert thirds.price(Call("m"), Usage(input_tokens=150, output_tokens=351), NOW).cost_nusd == 2


def test_what_has_a_price_is_charged_where_something_else_has_none() -> None:
    book = sold(input_cost_per_token=3, output_cost_per_token=15)
    quote = book.price_known(Call("m", features=("web",)), Usage(input_tokens=1000, output_tokens=1000, queries=1), NOW)
    assert (quote.cost_nusd, quote.unpriced) == (18_000_000, ("queries", "web"))


# --- what is held --------------------------------------------------------------------------------------


def held(
    book: Catalogue, most: int | None = None, made: Mapping[str, str] | None = None, n: int = 1, **counts: Any
) -> Decimal:
    ask = Ask(Call("m", attributes=made or {}), Usage(**counts), most, n)
    return Decimal(book.estimate(ask, NOW).cost_nusd) / 10**9


def test_a_call_is_held_for_in_what_is_dearest_of_all_it_can_be() -> None:
    book = sold(**REALTIME)
    assert held(book, 116, input_tokens=500) == Decimal("0.023424")
    spoken = cost(book, input_tokens=500, audio_input_tokens=500, output_tokens=116, audio_output_tokens=116)
    assert held(book, 116, input_tokens=500) >= spoken
    typed = held(book, 116, input_tokens=500, audio_input_tokens=0, audio_output_tokens=0)
    assert typed == Decimal("0.003856")
    partly = held(book, 116, input_tokens=500, audio_input_tokens=100, cache_read_tokens=0, audio_output_tokens=16)
    assert partly == Decimal("0.0048") + Decimal("0.002624")


def test_cache_writes_are_held_for_unless_the_estimate_says_that_there_are_none() -> None:
    book = sold(input_cost_per_token=3, output_cost_per_token=15, cache_read_input_token_cost="0.3", cache_creation_input_token_cost="3.75", cache_creation_input_token_cost_above_1hr=6)  # fmt: skip
    assert held(book, 10, input_tokens=10) == Decimal("0.00021")
    assert held(book, 10, input_tokens=10, cache_write_tokens=0) == Decimal("0.00018")
    assert held(book, 0, input_tokens=1000, cache_read_tokens=1000) == Decimal("0.0003")


@pytest.mark.parametrize(
    ("made", "counts", "at_least"),
    [
        ({}, {"images": 1}, 6240), ({"quality": "low"}, {"images": 1}, 408), ({"quality": "low", "size": "1024x1024"}, {"images": 1}, 272),
        ({"quality": "medium", "size": "1024x1536"}, {"images": 2}, 2 * 1584), ({}, {"input_tokens": 22}, 6240),
        ({"quality": "auto"}, {"input_tokens": 22}, 6240), ({"quality": "high", "size": "1024x1024"}, {}, 4160),
    ],
)  # fmt: skip
def test_images_that_are_sold_by_the_token_are_held_for_by_their_size_and_quality(
    made: dict[str, str], counts: dict[str, Any], at_least: int
) -> None:
    text = Decimal(counts.get("input_tokens", 0) * 8) / 10**6
    assert held(sold(**GPT_IMAGE_2), made=made, **counts) == Decimal(at_least * 30) / 10**6 + text


def test_an_image_whose_quality_is_not_said_is_held_for_as_the_dearest() -> None:
    low = {"litellm_provider": "openai", "mode": "image_generation", "output_cost_per_image": 0.011}
    document = {"low/1024-x-1024/m": low, "high/1024-x-1536/m": low | {"output_cost_per_image": 0.25}}
    draft = read_prices(json.dumps(document).encode())
    book = Catalogue(1, draft.prices, models=draft.models)
    assert held(book, images=1) == Decimal("0.25")
    assert held(book, images=1, made={"quality": "low"}) == Decimal("0.011")
    assert held(book, n=2) == Decimal("0.5")


def test_an_answer_beyond_what_the_model_can_is_held_for_as_its_longest_and_flagged() -> None:
    book = sold(input_cost_per_token=1, output_cost_per_token=10, max_output_tokens=128_000)
    assert held(book, 1_170_000) == Decimal("1.28")
    usage = Usage(output_tokens=1_170_000)
    quote = book.price(Call("m"), usage, NOW)
    assert (quote.cost_nusd, book.is_beyond(quote, usage)) == (11_700_000_000, True)


def test_a_longer_call_is_held_for_no_less_than_a_shorter_one_that_is_dearer() -> None:
    book = sold(input_cost_per_token=2, input_cost_per_token_above_200k_tokens=1, output_cost_per_token=1)
    assert held(book, 0, input_tokens=300_000) == Decimal("0.4")


@pytest.mark.parametrize(("said", "each"), [({"search_context_size": "low"}, "0.025"), ({"search_context_size": "HIGH"}, "0.03"), ({}, "0.03")])  # fmt: skip
def test_a_search_costs_what_its_size_does(said: dict[str, str], each: str) -> None:
    sizes = {"search_context_size_low": 0.025, "search_context_size_medium": 0.0275, "search_context_size_high": 0.03}
    book = sold(input_cost_per_token=1, search_context_cost_per_query=sizes)
    assert cost(book, made=said, queries=2) == 2 * Decimal(each)


def test_every_line_says_how_a_token_was_read_and_what_it_is() -> None:
    counts: dict[str, Any] = {
        "input_tokens": 1000,
        "audio_input_tokens": 600,
        "cache_read_tokens": 500,
        "cache_read_audio_tokens": 200,
    }
    lines = {(line.kind, line.name): line.units for line in quoted(sold(**REALTIME), **counts).lines}
    assert lines == {
        (Kind.INPUT, "input"): 100, (Kind.INPUT, "audio_input"): 400,
        (Kind.CACHE_INPUT, "cache_read"): 300, (Kind.CACHE_INPUT, "cache_read_audio"): 200,
    }  # fmt: skip
