"""The arithmetic of a quote: exact, rounded up once, nothing used is free, and no slower for a long history."""

import dataclasses
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.kernel.errors import InvalidField, ModelNotPriced
from app.pricing.quote import DEFAULT_OUTPUT_TOKENS, Ask, Call, Catalogue, Quote
from app.pricing.rows import (
    PPM,
    Dimension,
    FeeRow,
    Kind,
    MarkupRow,
    ModelRow,
    PriceRow,
    Usage,
    attributes_text,
    parse_attributes,
)
from app.pricing.sheet import Prices, Timeline

D = Dimension
NOW = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)
CALL = Call("m")
prices_pusd = st.integers(0, 10**9)
positive_pusd = st.integers(1, 10**9)
counts = st.integers(0, 10**7)
ppms = st.integers(0, 5 * PPM)


def row(dimension: Dimension, price_pusd: int, attributes: str = "", tier_min: int = 0, **more: Any) -> PriceRow:
    return PriceRow(
        more.pop("model", "m"), more.pop("provider", "p"), dimension, price_pusd, tier_min, attributes, **more
    )


def catalogue(*rows: PriceRow, **more: Any) -> Catalogue:
    return Catalogue(1, rows, **more)


TEXT = (row(D.INPUT, 150_000), row(D.OUTPUT, 600_000), row(D.CACHE_READ, 75_000))


def parts(quote: Quote) -> tuple[int, ...]:
    return quote.input_nusd, quote.output_nusd, quote.cache_input_nusd, quote.media_nusd, quote.fees_nusd


@st.composite
def token_usages(draw: st.DrawFn) -> Usage:
    names = (
        "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens",
        "reasoning_tokens", "audio_input_tokens", "image_output_tokens",
    )  # fmt: skip
    return Usage(**{name: draw(counts) for name in names})


@st.composite
def consistent_usages(draw: st.DrawFn) -> Usage:
    """As providers tell them that count the parts within their wholes."""
    usage = draw(token_usages())
    parts_in = max(
        sum(usage.of(each) for each in (D.CACHE_READ, D.CACHE_WRITE_5M, D.CACHE_WRITE_1H)), usage.of(D.AUDIO_INPUT)
    )
    parts_out = usage.of(D.REASONING) + usage.of(D.IMAGE_OUTPUT)
    return replace(usage, input_tokens=usage.input_tokens + parts_in, output_tokens=usage.output_tokens + parts_out)


@st.composite
def catalogues(draw: st.DrawFn) -> Catalogue:
    """Input and output always priced, everything else of tokens perhaps; markups and a fee."""
    apart = (D.CACHE_READ, D.CACHE_WRITE_5M, D.CACHE_WRITE_1H, D.REASONING, D.AUDIO_INPUT, D.IMAGE_OUTPUT, D.REQUESTS)
    rows = [row(dimension, draw(positive_pusd)) for dimension in (D.INPUT, D.OUTPUT)]
    rows += [row(dimension, draw(prices_pusd)) for dimension in apart if draw(st.booleans())]
    markup = MarkupRow("default", "", draw(ppms), draw(st.integers(0, 10**6)))
    return Catalogue(1, rows, markups=[markup], fees=[FeeRow("web", draw(st.integers(0, 10**8)))])


@given(
    usage=st.one_of(
        st.builds(Usage, counts, counts, *[st.none() | counts] * 4, requests=st.integers(0, 2)),
        st.builds(Usage, counts, counts, reasoning_tokens=st.none() | counts, images=st.integers(0, 2)),
    ),
    prices=st.dictionaries(
        st.sampled_from((D.INPUT, D.OUTPUT, D.REASONING, D.CACHE_READ, D.CACHE_WRITE_5M, D.CACHE_WRITE_1H, D.AUDIO_INPUT, D.IMAGE_OUTPUT, D.IMAGES, D.REQUESTS)),
        prices_pusd, min_size=1,
    ),
    mode=st.sampled_from(("", "chat", "image_generation", "audio_transcription")),
)  # fmt: skip
def test_a_call_of_text_alone_costs_what_it_would_where_there_might_be_more(
    usage: Usage, prices: dict[Dimension, int], mode: str
) -> None:
    """Most calls are priced by the short way, and by the long one they are the same."""

    def quoted() -> Quote:
        rows = (row(dimension, price) for dimension, price in prices.items())
        return catalogue(*rows, models=[ModelRow("m", "p", mode=mode)]).price_known(CALL, usage, NOW)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prices, "is_of_text", False)
        the_long_way = quoted()
    assert quoted() == the_long_way


def test_a_call_costs_its_tokens_at_their_prices() -> None:
    quote = catalogue(*TEXT).price(CALL, Usage(input_tokens=12, output_tokens=9), NOW)
    assert quote.cost_nusd == 1_800 + 5_400
    assert [(line.kind, line.units, line.price_pusd) for line in quote.lines] == [
        (Kind.INPUT, 12, "150000"),
        (Kind.OUTPUT, 9, "600000"),
    ]


@given(catalogues(), token_usages(), st.booleans())
def test_the_total_is_the_exact_sum_of_the_lines_rounded_up_once(book: Catalogue, usage: Usage, web: bool) -> None:
    quote = book.price(replace(CALL, features=("web",) if web else ()), usage, NOW)
    exact_nusd = sum(Fraction(line.amount_pusd) for line in quote.lines) / 1000
    assert exact_nusd <= quote.cost_nusd < exact_nusd + 1


@given(catalogues(), token_usages())
def test_the_parts_add_up_to_the_total_and_each_is_within_a_nano_dollar_of_exact(book: Catalogue, usage: Usage) -> None:
    quote = book.price(CALL, usage, NOW)
    assert sum(parts(quote)) == quote.cost_nusd
    for rounded, exact_pusd in zip(parts(quote), quote.exact_pusd().values(), strict=True):
        assert abs(rounded - Fraction(exact_pusd) / 1000) < 1
        assert rounded == 0 or Fraction(exact_pusd) > 0


@given(catalogues(), consistent_usages(), st.sampled_from(["input_tokens", "output_tokens"]), counts)
def test_more_units_never_cost_less(book: Catalogue, usage: Usage, name: str, more: int) -> None:
    larger = replace(usage, **{name: getattr(usage, name) + more})
    assert book.price(CALL, larger, NOW).cost_nusd >= book.price(CALL, usage, NOW).cost_nusd


@given(positive_pusd, ppms, counts)
def test_a_markup_is_in_the_numerator_and_not_rounded_by_itself(price_pusd: int, ppm: int, units: int) -> None:
    book = catalogue(row(D.INPUT, price_pusd), markups=[MarkupRow("default", "", ppm)])
    cost_nusd = book.price(CALL, Usage(input_tokens=units), NOW).cost_nusd
    assert cost_nusd == -(-units * price_pusd * ppm // (PPM * 1000))


def test_the_nearest_markup_decides_alone_and_adds_its_fixed_part_once() -> None:
    rules = [
        MarkupRow("default", "", 2 * PPM), MarkupRow("provider", "p", 3 * PPM),
        MarkupRow("model", "m", 4 * PPM), MarkupRow("account", "a", 5 * PPM, fixed_per_request_nusd=7),
    ]  # fmt: skip
    usage = Usage(input_tokens=1000)
    bare = [row(D.INPUT, 1000)]
    found = [Catalogue(1, bare, markups=rules[:n]).price(CALL, usage, NOW).cost_nusd for n in (0, 1, 2, 3, 4)]
    assert found == [1000, 2000, 3000, 4000, 4000]
    mine = Catalogue(1, bare, markups=rules).price(replace(CALL, account="a"), usage, NOW)
    assert (mine.cost_nusd, mine.fees_nusd) == (5007, 7)


def test_a_fee_of_a_feature_is_added_without_markup_and_an_unknown_feature_is_refused() -> None:
    book = catalogue(*TEXT, fees=[FeeRow("web", 20_000_000)], markups=[MarkupRow("default", "", 3 * PPM)])
    assert book.price(replace(CALL, features=("web",)), Usage(), NOW).cost_nusd == 20_000_000
    with pytest.raises(ModelNotPriced, match="magic"):
        book.price(replace(CALL, features=("magic",)), Usage(), NOW)


def test_a_feature_named_twice_is_held_for_and_charged_once() -> None:
    book = catalogue(*TEXT, fees=[FeeRow("web", 20_000_000), FeeRow("files", 1_000_000)])
    call = replace(CALL, features=("web", "files", "web"))
    quote = book.price(call, Usage(), NOW)
    assert (quote.fees_nusd, [line.name for line in quote.lines]) == (21_000_000, ["web", "files"])
    assert book.estimate(Ask(call, Usage(input_tokens=1), 1), NOW).fees_nusd == 21_000_000


@given(st.integers(0, 400_000))
def test_the_context_tier_is_chosen_by_all_input_tokens_for_the_whole_call(tokens: int) -> None:
    tiers = [row(d, p, tier_min=t) for d in (D.INPUT, D.OUTPUT) for t, p in ((0, 1000), (200_001, 2000))]
    quote = catalogue(*tiers).price(
        CALL, Usage(input_tokens=tokens, cache_read_tokens=tokens // 2, output_tokens=5), NOW
    )
    each = 2000 if tokens > 200_000 else 1000
    assert {line.list_price_pusd for line in quote.lines} == {each}
    assert quote.cost_nusd == (tokens + 5) * each // 1000


@pytest.mark.parametrize(("tokens", "cost_nusd"), [(200_000, 200_000), (200_001, 400_002)])
def test_a_tier_begins_exactly_at_its_boundary(tokens: int, cost_nusd: int) -> None:
    book = catalogue(row(D.INPUT, 1000), row(D.INPUT, 2000, tier_min=200_001))
    assert book.price(CALL, Usage(input_tokens=tokens), NOW).cost_nusd == cost_nusd


@given(token_usages())
def test_input_tokens_include_the_cached_ones_unless_there_were_more_of_those(usage: Usage) -> None:
    usage = replace(usage, audio_input_tokens=None)
    cached = sum(usage.of(each) for each in (D.CACHE_READ, D.CACHE_WRITE_5M, D.CACHE_WRITE_1H))
    book = catalogue(row(D.INPUT, 1000), row(D.OUTPUT, 1), row(D.CACHE_READ, 100))
    lines = {line.name: line.units for line in book.price(CALL, usage, NOW).lines}
    is_beside = cached > usage.input_tokens
    assert lines.get("input", 0) == usage.input_tokens - (0 if is_beside else cached)
    assert lines.get("cache_read", 0) == usage.of(D.CACHE_READ)


@pytest.mark.parametrize("price", [None, 0])
@pytest.mark.parametrize("name", ["cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens"])
def test_cached_tokens_without_a_price_cost_what_input_costs(name: str, price: int | None) -> None:
    dimension = {"cache_read_tokens": D.CACHE_READ, "cache_write_tokens": D.CACHE_WRITE_5M}.get(name, D.CACHE_WRITE_1H)
    rows = [row(D.INPUT, 1000), *([row(dimension, price)] if price is not None else [])]
    quote = catalogue(*rows).price(CALL, Usage(**{"input_tokens": 10, name: 10}), NOW)
    assert (quote.cost_nusd, quote.cache_input_nusd, quote.input_nusd) == (10, 10, 0)


def test_a_cache_write_for_an_hour_falls_back_to_the_shorter_one_first() -> None:
    book = catalogue(row(D.INPUT, 1000), row(D.CACHE_WRITE_5M, 1250))
    assert book.price(CALL, Usage(cache_write_1h_tokens=100), NOW).cost_nusd == 125


def test_reasoning_is_part_of_the_output_unless_it_is_priced_apart() -> None:
    usage = Usage(output_tokens=100, reasoning_tokens=40)
    together = catalogue(row(D.INPUT, 1), row(D.OUTPUT, 1000))
    apart = catalogue(row(D.INPUT, 1), row(D.OUTPUT, 1000), row(D.REASONING, 2000))
    assert together.price(CALL, usage, NOW).cost_nusd == 100
    assert apart.price(CALL, usage, NOW).cost_nusd == 60 + 80


@pytest.mark.parametrize(
    "name",
    ["output_tokens", "images", "characters", "audio_seconds", "video_seconds", "pixels", "queries"],
)
def test_what_is_used_and_has_no_price_is_refused_and_never_free(name: str) -> None:
    with pytest.raises(ModelNotPriced):
        catalogue(row(D.INPUT, 1)).price(CALL, Usage(**{name: 1}), NOW)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelNotPriced, match="nobody"):
        catalogue(*TEXT).price(Call("nobody"), Usage(), NOW)


IMAGES = [
    row(D.IMAGES, 40, "quality=standard;size=1024x1024"), row(D.IMAGES, 80, "quality=standard;size=1024x1792"),
    row(D.IMAGES, 120, "quality=hd;size=1024x1792"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "price_pusd"),
    [
        ({}, 40), ({"size": "1024x1792"}, 80), ({"quality": "hd", "size": "1024x1792"}, 120),
        ({"quality": "HD", "size": "1024x1792", "style": "vivid"}, 120), ({"quality": "auto", "size": "auto"}, 40),
    ],
)  # fmt: skip
def test_attributes_match_exactly_and_defaults_stand_in_for_what_is_not_said(
    asked: dict[str, str], price_pusd: int
) -> None:
    about = ModelRow("m", "p", default_attributes="quality=standard;size=1024x1024")
    quote = catalogue(*IMAGES, models=[about]).price(replace(CALL, attributes=asked), Usage(images=1), NOW)
    assert quote.lines[0].list_price_pusd == price_pusd


def test_defaults_never_stand_in_for_what_was_said() -> None:
    about = ModelRow("m", "p", default_attributes="quality=standard;size=1024x1024")
    book = catalogue(*IMAGES, models=[about])
    with pytest.raises(ModelNotPriced, match="quality=ultra"):
        book.price(replace(CALL, attributes={"quality": "ultra"}), Usage(images=1), NOW)


def test_of_equally_close_prices_the_dearer_is_taken() -> None:
    book = catalogue(row(D.VIDEO_SECONDS, 3, "resolution=720p"), row(D.VIDEO_SECONDS, 5, "quality=1080p"))
    asked = replace(CALL, attributes={"quality": "1080p", "resolution": "720p"})
    assert book.price(asked, Usage(video_seconds=1), NOW).lines[0].list_price_pusd == 5


def test_images_of_a_model_that_is_priced_by_the_pixel_are_counted_by_their_size() -> None:
    book = catalogue(row(D.PIXELS, 1000, "size=256x256"))
    quote = book.price(replace(CALL, attributes={"size": "256x256"}), Usage(images=2), NOW)
    assert quote.cost_nusd == 2 * 256 * 256


def test_a_size_that_is_said_makes_no_pixels_of_images_that_are_priced_otherwise() -> None:
    sized = replace(CALL, attributes={"size": "1024x1024"})
    by_token = catalogue(row(D.IMAGE_OUTPUT, 1000), row(D.OUTPUT, 1))
    assert by_token.price(sized, Usage(images=1, output_tokens=7, image_output_tokens=7), NOW).cost_nusd == 7
    with pytest.raises(ModelNotPriced, match="no price for images"):
        by_token.price(sized, Usage(images=1), NOW)


def test_what_is_counted_twice_is_charged_once() -> None:
    both = catalogue(row(D.IMAGES, 5000), row(D.IMAGE_OUTPUT, 40), row(D.INPUT, 5))
    usage = Usage(input_tokens=1000, images=1, output_tokens=1056, image_output_tokens=1056)
    assert {line.name for line in both.price(CALL, usage, NOW).lines} == {"images", "input"}
    by_token = catalogue(row(D.IMAGE_OUTPUT, 40), row(D.INPUT, 5), row(D.OUTPUT, 10))
    assert {line.name for line in by_token.price(CALL, usage, NOW).lines} == {"image_output", "input"}


def test_a_model_sold_by_media_needs_no_price_for_the_tokens_it_counts_besides() -> None:
    quote = catalogue(row(D.AUDIO_SECONDS, 1000)).price(
        CALL, Usage(audio_seconds=3, input_tokens=9, output_tokens=9), NOW
    )
    assert quote.cost_nusd == 3


def test_an_override_wins_over_what_was_imported_in_every_tier() -> None:
    imported = [row(D.INPUT, 1000), row(D.INPUT, 2000, tier_min=200_001)]
    anywhere = row(D.INPUT, 7000, provider="")
    book = Catalogue(1, imported, overrides=[anywhere])
    assert book.price(CALL, Usage(input_tokens=300_000), NOW).cost_nusd == 2_100_000
    here = dataclasses.replace(anywhere, provider="p", price_pusd=8000)
    assert Catalogue(1, imported, overrides=[anywhere, here]).price(CALL, Usage(input_tokens=1), NOW).cost_nusd == 8


def test_an_override_can_sell_a_model_that_was_never_imported_or_make_one_free() -> None:
    book = Catalogue(
        1, (), overrides=[row(D.INPUT, 0, provider="", model="mine"), row(D.OUTPUT, 0, provider="", model="mine")]
    )
    assert book.price(Call("mine", "anybody"), Usage(input_tokens=9, output_tokens=9), NOW).cost_nusd == 0


def test_a_provider_in_the_name_or_beside_it_means_the_same_and_none_means_the_dearest() -> None:
    book = catalogue(row(D.INPUT, 1000), row(D.INPUT, 3000, provider="q"), row(D.INPUT, 500, model="z/m", provider="z"))

    def cost_nusd(model: str, provider: str = "") -> int:
        return book.price(Call(model, provider), Usage(input_tokens=10), NOW).cost_nusd

    assert (cost_nusd("p/m"), cost_nusd("m", "P"), cost_nusd("p/m", "p")) == (10, 10, 10)
    assert (cost_nusd("m"), cost_nusd("m", "unheard-of"), cost_nusd("q/m")) == (30, 30, 30)
    assert (cost_nusd("z/m"), cost_nusd("m", "z")) == (5, 5)


def test_a_price_holds_from_its_beginning_until_its_end_and_the_one_before_comes_back() -> None:
    book = catalogue(row(D.INPUT, 1000), row(D.INPUT, 500, effective_from=NOW, effective_to=NOW + DAY))
    moments = (NOW - DAY, NOW, NOW + DAY - timedelta(microseconds=1), NOW + DAY)
    assert [book.price(CALL, Usage(input_tokens=2), at).cost_nusd for at in moments] == [2, 1, 1, 2]


def test_a_tier_that_has_ended_is_not_listed() -> None:
    ended = row(D.INPUT, 2000, tier_min=200_001, effective_to=NOW)
    assert list(catalogue(row(D.INPUT, 1000), ended).listed("m", "p", NOW)) == [(D.INPUT, 0, "", Fraction(1000 * PPM))]


@given(st.lists(st.tuples(st.integers(0, 50), st.one_of(st.none(), st.integers(0, 50)))), st.integers(0, 60))
def test_a_timeline_answers_as_a_search_through_all_periods_would(
    spans: list[tuple[int, int | None]], day: int
) -> None:
    periods = [(NOW + DAY * a, None if b is None else NOW + DAY * b, i) for i, (a, b) in enumerate(spans)]
    moment = NOW + DAY * day
    holding = [(start, i) for start, end, i in periods if start <= moment and (end is None or moment < end)]
    assert Timeline(periods).at(moment) == (max(holding)[1] if holding else None)


@pytest.mark.parametrize(
    ("asked", "most", "tokens"),
    [
        (None, None, DEFAULT_OUTPUT_TOKENS),
        (None, 4096, 4096),
        (100, 4096, 100),
        (100_000, None, 100_000),
        (100_000, 8192, 8192),
    ],
)
def test_an_answer_is_estimated_by_what_was_asked_or_the_default_within_what_the_model_can(
    asked: int | None, most: int | None, tokens: int
) -> None:
    book = catalogue(row(D.INPUT, 0), row(D.OUTPUT, 1000), models=[ModelRow("m", "p", max_output_tokens=most)])
    assert book.estimate(Ask(CALL, Usage(input_tokens=1), asked, n=2), NOW).cost_nusd == 2 * tokens


def test_an_estimate_of_a_model_without_answers_in_tokens_has_none() -> None:
    speech = catalogue(row(D.CHARACTERS, 15_000_000))
    assert speech.estimate(Ask(CALL, Usage(characters=100)), NOW).cost_nusd == 1_500_000
    embedding = catalogue(row(D.INPUT, 1000))
    assert embedding.estimate(Ask(CALL, Usage(input_tokens=7)), NOW).cost_nusd == 7
    assert embedding.affordable_output_tokens(7, Ask(CALL, Usage(input_tokens=7)), NOW) == 0


@pytest.mark.parametrize(
    ("sold", "attributes", "images", "cost_nusd"),
    [
        ([row(D.IMAGES, 40_000_000)], {}, 0, 2 * 40_000),
        ([row(D.IMAGES, 40_000_000)], {}, 3, 3 * 40_000),
        ([row(D.IMAGES, 40_000_000), row(D.INPUT, 1000)], {}, 0, 2 * 40_000),
        ([row(D.IMAGES, 80_000_000, "quality=hd")], {"quality": "hd"}, 0, 2 * 80_000),
        ([row(D.PIXELS, 1000)], {"size": "256x256"}, 0, 2 * 256 * 256),
        ([row(D.IMAGES, 0)], {}, 0, 0),
        ([row(D.OUTPUT, 1000), row(D.IMAGES, 40_000_000)], {}, 0, 2 * DEFAULT_OUTPUT_TOKENS),
    ],
)
def test_an_image_model_is_held_for_as_many_images_as_answers_are_asked_for(
    sold: list[PriceRow], attributes: dict[str, str], images: int, cost_nusd: int
) -> None:
    ask = Ask(replace(CALL, attributes=attributes), Usage(images=images), n=2)
    assert catalogue(*sold).estimate(ask, NOW).cost_nusd == cost_nusd


@pytest.mark.parametrize(
    ("sold", "param"),
    [
        ([row(D.CHARACTERS, 1)], "estimate.characters"),
        ([row(D.VIDEO_SECONDS, 1)], "estimate.video_seconds"),
        ([row(D.VIDEO_SECONDS, 1, "resolution=1080p")], "estimate.video_seconds"),
        ([row(D.AUDIO_SECONDS, 1)], "estimate.audio_seconds"),
        ([row(D.INPUT, 1)], "estimate.input_tokens"),
        ([row(D.QUERIES, 1)], "estimate.queries"),
        ([row(D.PIXELS, 1, "size=256x256")], "estimate.size"),
        ([row(D.IMAGE_OUTPUT, 1)], "max_cost_usd"),
    ],
)
def test_an_estimate_that_tells_nothing_that_has_a_price_is_refused_and_never_free(
    sold: list[PriceRow], param: str
) -> None:
    book = catalogue(*sold, fees=[FeeRow("web", 1000)], markups=[MarkupRow("default", "", PPM, 5)])
    for features in ((), ("web",)):
        with pytest.raises(InvalidField) as refused:
            book.estimate(Ask(replace(CALL, features=features), n=2), NOW)
        assert refused.value.param == param


def test_a_model_that_is_free_on_purpose_or_paid_by_the_request_needs_no_units() -> None:
    free = catalogue(row(D.INPUT, 1000), row(D.CHARACTERS, 7), overrides=[row(D.INPUT, 0), row(D.CHARACTERS, 0)])
    assert free.estimate(Ask(CALL), NOW).cost_nusd == 0
    each = catalogue(row(D.INPUT, 1000), row(D.REQUESTS, 5_000_000))
    assert each.estimate(Ask(CALL), NOW).cost_nusd == 5000


@given(catalogues(), token_usages(), st.integers(0, 50_000), st.integers(1, 4), st.data())
def test_an_estimate_covers_every_call_that_stays_within_it(
    book: Catalogue, usage: Usage, most: int, n: int, data: st.DataObject
) -> None:
    known = replace(usage, output_tokens=0, reasoning_tokens=0, image_output_tokens=0)
    assume(known.input_tokens or most)
    held = book.estimate(Ask(CALL, known, most, n), NOW).cost_nusd
    output = data.draw(st.integers(0, most * n))
    used = replace(known, output_tokens=output, reasoning_tokens=data.draw(st.integers(0, output)))
    assert book.price(CALL, used, NOW).cost_nusd <= held


@given(catalogues(), counts, st.integers(0, 20_000), st.integers(1, 4), st.integers(0, 10**12))
def test_affordable_output_tokens_are_as_many_as_the_money_pays_for_and_not_one_more(
    book: Catalogue, tokens: int, most: int, n: int, available_nusd: int
) -> None:
    def cost_nusd(output_tokens: int) -> int:
        return book.estimate(Ask(CALL, Usage(input_tokens=tokens), output_tokens, n), NOW).cost_nusd

    granted = book.affordable_output_tokens(available_nusd, Ask(CALL, Usage(input_tokens=tokens), most, n), NOW)
    assert 0 <= granted <= most
    assert granted == 0 or cost_nusd(granted) <= available_nusd
    assert granted == most or cost_nusd(granted + 1) > available_nusd


def test_a_cost_beyond_what_the_books_can_hold_is_refused() -> None:
    with pytest.raises(InvalidField, match="more than the books can hold"):
        catalogue(row(D.IMAGES, 10**12)).price(CALL, Usage(images=10**12), NOW)


@pytest.mark.parametrize("stored", ["quality=hd", "quality=HD", "Quality=Hd"])
@pytest.mark.parametrize(("asked", "cost_nusd"), [("HD", 80_000), ("hd", 80_000), ("", 80_000), ("low", 40_000)])
def test_attributes_are_compared_without_regard_to_capitals(stored: str, asked: str, cost_nusd: int) -> None:
    about = ModelRow("m", "p", default_attributes=stored)
    book = catalogue(row(D.IMAGES, 40_000_000), row(D.IMAGES, 80_000_000, stored), models=[about])
    assert book.price(replace(CALL, attributes={"quality": asked}), Usage(images=1), NOW).cost_nusd == cost_nusd
    assert attributes_text({"size": "1K", "Quality": "HD"}) == "quality=hd;size=1k"


@pytest.mark.parametrize("text", ["b=1;a=2", "a=1;a=2", "a", "a=", "=1", ";"])
def test_attributes_have_one_canonical_text(text: str) -> None:
    assert attributes_text(parse_attributes("a=1;b=2")) == "a=1;b=2"
    with pytest.raises(InvalidField):
        parse_attributes(text)


def _steps_of_a_quote(rows: Iterable[PriceRow]) -> int:
    """How many comparisons of moments one quote makes: the only work that could grow with a history."""
    book, steps = Catalogue(1, rows), 0

    class Counting(datetime):
        def __lt__(self, other: datetime) -> bool:  # type: ignore[override]
            nonlocal steps
            steps += 1
            return datetime.__lt__(self, other)

    moment = Counting.fromtimestamp(NOW.timestamp(), UTC)
    assert book.price(CALL, Usage(input_tokens=1000, output_tokens=10), moment).cost_nusd > 0
    return steps


def test_a_quarter_of_a_million_lines_of_history_cost_a_quote_a_few_comparisons() -> None:
    changes = 100_000
    history = [
        row(dimension, 1000 + place, effective_from=NOW - timedelta(minutes=changes - place))
        for dimension in (D.INPUT, D.OUTPUT)
        for place in range(changes)
    ]
    others = [row(D.INPUT, 1000, model=f"other-{place}") for place in range(50_000)]
    short = _steps_of_a_quote(TEXT)
    long = _steps_of_a_quote([*history, *others])
    assert len(history) + len(others) == 250_000
    assert 0 < long <= short + 2 * 17
