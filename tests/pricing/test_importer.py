"""Price files of others: exact, dearer when in doubt, and what is not understood is said."""

import argparse
import contextlib
import json
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.kernel.errors import AppError, InvalidField
from app.pricing.commands import Answer, add_arguments, run
from app.pricing.drafts import Draft
from app.pricing.importer import read_prices
from app.pricing.quote import Call, Catalogue
from app.pricing.rows import Dimension, PriceRow, Usage
from app.wiring import House

D = Dimension
NOW = datetime(2026, 5, 1, tzinfo=UTC)

LITELLM = r"""
{
  "sample_spec": {"litellm_provider": "one of …", "input_cost_per_token": 0.0, "mode": "one of: chat"},
  "gpt-4o-mini": {
    "litellm_provider": "openai", "mode": "chat", "max_input_tokens": 128000, "max_output_tokens": 16384, "max_tokens": 16384,
    "input_cost_per_token": 1.5e-07, "output_cost_per_token": 6e-07, "cache_read_input_token_cost": 7.5e-08,
    "input_cost_per_token_batches": 7.5e-08, "input_cost_per_token_priority": 2.5e-07, "supports_vision": true,
    "search_context_cost_per_query": {"search_context_size_low": 0.025, "search_context_size_high": 0.03}
  },
  "claude-sonnet-4-5": {
    "litellm_provider": "anthropic", "mode": "chat",
    "input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05,
    "input_cost_per_token_above_200k_tokens": 6e-06, "output_cost_per_token_above_200k_tokens": 2.25e-05,
    "cache_creation_input_token_cost": 3.75e-06, "cache_creation_input_token_cost_above_1hr": 6e-06,
    "cache_creation_input_token_cost_above_1hr_above_200k_tokens": 1.2e-05,
    "cache_read_input_token_cost_above_200k_tokens": 6e-07
  },
  "made-up": {"litellm_provider": "p", "mode": "chat", "input_cost_per_token": 1e-06, "made_up_cost_per_thing": 1},
  "new-fact": {"litellm_provider": "p", "mode": "chat", "input_cost_per_token": 1e-06, "likes_cats": true},
  "hd/1024-x-1792/dall-e-3": {"litellm_provider": "openai", "mode": "image_generation", "output_cost_per_image": 0.12},
  "256-x-256/dall-e-2": {
    "litellm_provider": "openai", "mode": "image_generation", "input_cost_per_pixel": 2.4414e-07, "output_cost_per_pixel": 0.0
  },
  "whisper-1": {
    "litellm_provider": "openai", "mode": "audio_transcription", "input_cost_per_second": 0.0001, "output_cost_per_second": 0.0001
  },
  "tts-1": {"litellm_provider": "openai", "mode": "audio_speech", "input_cost_per_character": 1.5e-05},
  "sora-2-pro": {
    "litellm_provider": "openai", "mode": "video_generation", "output_cost_per_video_per_second": 0.3,
    "output_cost_per_video_per_second_1080p": 0.5
  },
  "dashscope/qwen": {
    "litellm_provider": "dashscope", "mode": "chat",
    "tiered_pricing": [
      {"range": [0, 32000], "input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06},
      {"range": [32000, 128000], "input_cost_per_token": 3e-06, "output_cost_per_token": 4e-06}
    ]
  },
  "free-looking": {"litellm_provider": "deepseek", "mode": "chat", "input_cost_per_token": 0.0, "output_cost_per_token": 0},
  "vision-chat": {"litellm_provider": "google", "mode": "chat", "input_cost_per_image": 0.001, "input_cost_per_token": 3.3333333333333e-08},
  "odd": {"litellm_provider": "x", "input_cost_per_token": "0.1", "output_cost_per_token": -1, "input_cost_per_request": 1e400},
  "no-provider": {"input_cost_per_token": 1}
}
"""

GENAI = r"""
[
  {"id": "anthropic", "name": "Anthropic", "api_pattern": "x", "models": [
    {"id": "claude-sonnet-4-6", "match": {"starts_with": "claude"}, "context_window": 1000000, "prices": [
      {"prices": {"input_mtok": {"base": 3, "tiers": [{"start": 200000, "price": 6}]}, "output_mtok": 15}},
      {"constraint": {"start_date": "2026-03-13"}, "prices": {"input_mtok": 3, "cache_read_mtok": 0.3, "output_mtok": 15}},
      {"constraint": {"start_date": "2026-04-13"}, "prices": {"input_mtok": 3, "cache_read_mtok": 0.3, "output_mtok": 15}}
    ], "price_variants": [
      {"when": {"processing": "batch"}, "prices": {"input_mtok": 1.5}},
      {"when": {"speed": "fast"}, "prices": {"input_mtok": 16}}
    ]},
    {"id": "by-night", "match": {"equals": "by-night"}, "prices": [
      {"prices": {"input_mtok": 3}},
      {"constraint": {"start_time": "16:30:00Z", "end_time": "00:30:00Z"}, "prices": {"input_mtok": 0.1}}
    ]},
    {"id": "by-weather", "match": {"equals": "by-weather"}, "prices": {"input_mtok": 3}, "price_variants": [
      {"when": {"weather": "fine"}, "prices": {"input_mtok": 1}}
    ]}
  ]},
  {"id": "openai", "name": "OpenAI", "api_pattern": "y", "models": [
    {"id": "whisper-1", "match": {"equals": "whisper-1"}, "prices": {"audio_hours": 0.36, "input_audio_hours": 0.36}},
    {"id": "rare", "match": {"equals": "rare"}, "prices": {"input_mtok": 0.0000001, "requests_kcount": 5}},
    {"id": "pages", "match": {"equals": "pages"}, "prices": {"input_mtok": 1, "input_document_kpages": 1}}
  ]}
]
"""


def found(draft: Draft, model: str, dimension: Dimension) -> dict[tuple[int, str], int]:
    return {
        (row.tier_min, row.attributes): row.price_pusd
        for row in draft.prices
        if (row.model, row.dimension) == (model, dimension)
    }


@pytest.mark.parametrize(
    ("model", "dimension", "expected"),
    [
        ("gpt-4o-mini", D.INPUT, {(0, ""): 150_000, (0, "service_tier=batch"): 75_000, (0, "service_tier=priority"): 250_000}),
        ("gpt-4o-mini", D.OUTPUT, {(0, ""): 600_000}),
        ("gpt-4o-mini", D.CACHE_READ, {(0, ""): 75_000}),
        ("gpt-4o-mini", D.QUERIES, {(0, ""): 30 * 10**9, (0, "search_context_size=low"): 25 * 10**9, (0, "search_context_size=high"): 30 * 10**9}),
        ("claude-sonnet-4-5", D.INPUT, {(0, ""): 3_000_000, (200_001, ""): 6_000_000}),
        ("claude-sonnet-4-5", D.CACHE_WRITE_5M, {(0, ""): 3_750_000}),
        ("claude-sonnet-4-5", D.CACHE_WRITE_1H, {(0, ""): 6_000_000, (200_001, ""): 12_000_000}),
        ("claude-sonnet-4-5", D.CACHE_READ, {(200_001, ""): 600_000}),
        ("dall-e-3", D.IMAGES, {(0, "quality=hd;size=1024x1792"): 120 * 10**9}),
        ("dall-e-2", D.PIXELS, {(0, "size=256x256"): 244_140}),
        ("whisper-1", D.AUDIO_SECONDS, {(0, ""): 10**8}),
        ("tts-1", D.CHARACTERS, {(0, ""): 15_000_000}),
        ("sora-2-pro", D.VIDEO_SECONDS, {(0, ""): 3 * 10**11, (0, "resolution=1080p"): 5 * 10**11}),
        ("dashscope/qwen", D.INPUT, {(0, ""): 1_000_000, (32_001, ""): 3_000_000}),
        ("vision-chat", D.INPUT, {(0, ""): 2_000_000}),
        ("made-up", D.INPUT, {}),
        ("new-fact", D.INPUT, {(0, ""): 1_000_000}),
        ("free-looking", D.INPUT, {}),
        ("odd", D.INPUT, {}),
    ],
)  # fmt: skip
def test_litellm_fields_become_exact_prices(
    model: str, dimension: Dimension, expected: dict[tuple[int, str], int]
) -> None:
    assert found(read_prices(LITELLM.encode()), model, dimension) == expected


def test_what_litellm_says_and_we_do_not_understand_is_counted_and_never_becomes_a_price() -> None:
    draft = read_prices(LITELLM.encode())
    assert draft.format == "litellm"
    assert dict(draft.report.unknown_fields) == {"made_up_cost_per_thing": 1, "likes_cats": 1}
    assert draft.report.left_out == {"p/made-up": "made_up_cost_per_thing is not understood"}
    assert dict(draft.report.skipped) == {
        "a price of nothing": 3, "not a number": 1, "negative": 1, "beyond what a price can be": 1,
        "a model without litellm_provider": 1,
    }  # fmt: skip
    about = {row.model: row for row in draft.models}
    assert (about["gpt-4o-mini"].max_output_tokens, about["gpt-4o-mini"].mode) == (16384, "chat")
    assert not about.keys() & {"free-looking", "made-up"}


def test_genai_prices_are_dated_tiered_and_by_service_tier() -> None:
    draft = read_prices(GENAI.encode())
    assert draft.format == "genai-prices"
    book = Catalogue(1, draft.prices, models=draft.models)

    def cost_nusd(when: datetime, tokens: int, **attributes: str) -> int:
        call = Call("claude-sonnet-4-6", attributes=attributes)
        return book.price(call, Usage(input_tokens=tokens), when).cost_nusd

    before, after = datetime(2026, 3, 12, 23, 59, tzinfo=UTC), datetime(2026, 3, 13, tzinfo=UTC)
    assert (cost_nusd(before, 200_000), cost_nusd(before, 200_001)) == (600_000_000, 1_200_006_000)
    assert cost_nusd(after, 200_001) == 600_003_000
    assert cost_nusd(after, 1000, service_tier="batch") == 1_500_000
    assert cost_nusd(after, 1000, speed="fast") == 16_000_000
    assert found(draft, "whisper-1", D.AUDIO_SECONDS) == {(0, ""): 10**8}
    assert found(draft, "rare", D.REQUESTS) == {(0, ""): 5 * 10**9}


def test_what_genai_prices_says_and_we_do_not_understand_leaves_its_model_out() -> None:
    draft = read_prices(GENAI.encode())
    assert dict(draft.report.unknown_fields) == {"input_document_kpages": 1}
    assert draft.report.left_out == {
        "anthropic/by-night": "its price depends on the time of day",
        "anthropic/by-weather": "a price depends on weather",
        "openai/pages": "it has a price for input_document_kpages, which no usage counts",
    }
    assert {row.model for row in draft.prices} == {"claude-sonnet-4-6", "whisper-1", "rare"}
    assert [
        (row.price_pusd, row.per_units) for row in draft.prices if (row.model, row.dimension) == ("rare", D.INPUT)
    ] == [(100_000, 1_000_000)]


def test_a_price_without_tiers_is_the_same_in_every_tier_of_its_model() -> None:
    prices = {"input_mtok": {"base": 3, "tiers": [{"start": 200000, "price": 6}]}, "cache_read_mtok": 0.3}
    document = [{"id": "p", "models": [{"id": "m", "prices": prices}]}]
    draft = read_prices(json.dumps(document).encode())
    assert found(draft, "m", D.CACHE_READ) == {(0, ""): 300_000, (200_001, ""): 300_000}


def test_the_newer_shape_of_genai_prices_is_the_same_data() -> None:
    newer = json.dumps({"units": {}, "providers": json.loads(GENAI)}).encode()
    assert set(read_prices(newer).prices) == set(read_prices(GENAI.encode()).prices)


@example(Decimal("1.000000000000000007"))
@given(st.decimals("1e-18", "1e5", allow_nan=False, allow_infinity=False, places=18))
def test_a_price_is_taken_from_its_text_exactly(price_usd: Decimal) -> None:
    raw = f'{{"m": {{"litellm_provider": "p", "input_cost_per_token": {price_usd:e}}}}}'
    draft = read_prices(raw.encode())
    if not price_usd:
        assert draft.prices == ()
        return
    (row,) = draft.prices
    exact = Fraction(price_usd) * 10**12
    kept = Fraction(row.price_pusd, row.per_units)
    digits = len(price_usd.normalize().as_tuple().digits)
    if (
        draft.report.rounded
    ):  # $1.000000000000000007 a token is more than a row has digits for: told, and never too little
        assert digits >= 16
        assert exact < kept < exact + 1
    else:
        assert kept == exact or (digits >= 10 and abs(kept - exact) * 10 ** (digits - 1) <= exact)


@pytest.mark.parametrize(
    ("text", "price_pusd", "per_units"),
    [
        ("0.0005666666666666667", 34 * 10**9, 60), ("3.3333333333333e-08", 2_000_000, 60), ("1.5e-07", 150_000, 1),
        ("0.0002777777777777778", 10**12, 3600), ("1.234567890123e-07", 1_234_567_890_123, 10**7), ("7.5e-13", 3, 4),
    ],
)  # fmt: skip
def test_a_price_that_was_divided_is_kept_in_the_unit_that_it_was_divided_by(
    text: str, price_pusd: int, per_units: int
) -> None:
    (row,) = read_prices(f'{{"m": {{"litellm_provider": "p", "input_cost_per_token": {text}}}}}'.encode()).prices
    assert (row.price_pusd, row.per_units) == (price_pusd, per_units)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))  # fmt: skip
def test_no_entry_of_a_map_breaks_the_reader(value: Any) -> None:
    document = {
        "m": {"litellm_provider": "p", "input_cost_per_token": 1, "tiered_pricing": value, "x": value, "mode": value}
    }
    draft = read_prices(json.dumps(document).encode())
    assert PriceRow("m", "p", D.INPUT, 10**12) in draft.prices or "p/m" in draft.report.left_out


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b"1", b'{"a": 1}', b"\xff", b'{"m": {"litellm_provider": "p", "x": NaN}}', b"[" * 100_000],
)
def test_a_file_that_is_no_price_list_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidField):
        read_prices(raw)


def own(**model: Any) -> Any:
    return {"format": "satmeter-prices-1", "models": [{"model": "good", "provider": "p"}, {"model": "bad"} | model]}


def test_attributes_are_kept_in_small_letters() -> None:
    draft = read_prices(json.dumps(own(provider="p", usd_each={"images": {"quality=HD": "1"}})).encode())
    assert found(draft, "bad", D.IMAGES) == {(0, "quality=hd"): 10**12}
    searcher = {"litellm_provider": "p", "search_context_cost_per_query": {"search_context_size_LOW": 1}}
    assert (0, "search_context_size=low") in found(read_prices(json.dumps({"m": searcher}).encode()), "m", D.QUERIES)


def genai(**model: Any) -> Any:
    return [{"id": "p", "models": [{"id": "bad"} | model]}]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (own(), "'bad': it has no 'provider'"),
        (own(provider="p", usd_each={"images": "cheap"}), "'bad usd_each images'"),
        (own(provider="p", usd_each={"images": None}), "'bad usd_each images'"),
        (own(provider="p", usd_each={"images": "NaN"}), "'bad usd_each images'"),
        (own(provider="p", usd_each={"images": {"hd": "1"}}), "attributes are name=value pairs"),
        (own(provider="p", usd_each={"pictures": "1"}), "there is no dimension 'pictures'"),
        (own(provider="p", usd_each=["images"]), "'bad'"),
        (own(provider="p\0"), "printable"),
        ({"format": "satmeter-prices-1", "models": ["m"]}, "outermost"),
        ({"format": "satmeter-prices-1"}, "it has no 'models'"),
        ({"format": "satmeter-prices-1", "fees": {"web": "free"}, "models": []}, "'fees, web'"),
        (genai(id="odd", prices=[1]), "'odd'"),
        (genai(prices={"input_mtok": {"base": 1, "tiers": [{"price": 1}]}}), "'bad': it has no 'start'"),
        (genai(prices={"input_mtok": {"base": 1, "tiers": [{"start": "x", "price": 1}]}}), "'bad'"),
        (
            genai(
                prices={"input_mtok": 1},
                price_variants=[{"when": {"processing": "a;size=b"}, "prices": {"input_mtok": 1}}],
            ),
            "cannot be an attribute",
        ),
        (own(provider="p", usd_per_million={"input": {"9" * 30: "1"}}), "a tier begins at"),
        ({"m": {"litellm_provider": "p", "search_context_cost_per_query": {"": 1}}}, "'m'"),
    ],
)
def test_a_broken_entry_is_told_by_its_name_and_is_no_defect_of_ours(document: Any, said: str) -> None:
    with pytest.raises(InvalidField) as refused:
        read_prices(json.dumps(document).encode())
    assert said in refused.value.message


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["1", "NaN", "1e999", "model", "id"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=5) | st.sampled_from(["models", "prices", "base", "tiers", "start", "when", "images", "0"]), inner, max_size=3
    ),
    max_leaves=10,
)  # fmt: skip


@given(ANYTHING, st.sampled_from(["prices", "price_variants", "context_window", "id", "provider", "usd_each", "mode"]))
def test_whatever_a_file_has_in_an_entry_it_is_read_or_refused(value: Any, name: str) -> None:
    for document in (own(provider="p") | {"fees": value}, own(**{"provider": "p", name: value}), genai(**{name: value}), [{"id": value, "models": value}]):  # fmt: skip
        with contextlib.suppress(InvalidField):
            assert read_prices(json.dumps(document).encode()).format


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    add_arguments(lambda verb, says: verbs.add_parser(verb, help=says))
    return parser.parse_args(words)


async def command(house: House, *words: str) -> Answer:
    args = parsed(*words)
    answer = await run(house.db, args.verb, args)
    json.dumps(answer.data)
    return answer


async def test_an_import_is_a_draft_until_it_is_activated(unpriced: House, tmp_path: Path) -> None:
    first, second = tmp_path / "litellm.json", tmp_path / "genai.json"
    first.write_text(LITELLM)
    second.write_text(GENAI)
    imported = await command(unpriced, "import", str(first))
    assert imported.data["version"] == 1
    assert "not understood: made_up_cost_per_thing (1)" in imported.text
    assert "not sold: p/made-up: made_up_cost_per_thing is not understood" in imported.text
    assert (await command(unpriced, "list")).data["versions"][0]["state"] == "draft"
    await command(unpriced, "activate", "1")
    shown = await command(unpriced, "show", "openai/gpt-4o-mini")
    assert {"provider": "openai", "dimension": "input", "min_input_tokens": 0, "attributes": "", "price_usd": "0.00000015"} in shown.data["prices"]  # fmt: skip
    await command(unpriced, "import", str(second))
    compared = await command(unpriced, "diff", "2")
    assert compared.data["against"] == 1
    assert {change["model"] for change in compared.data["removed"]} >= {"gpt-4o-mini"}
    with pytest.raises(AppError, match="models are gone"):
        await command(unpriced, "activate", "2")
    assert (await command(unpriced, "activate", "2", "--allow-drops")).data["active"] == 2


async def test_a_diff_shows_what_falls_back_what_is_new_and_what_is_gone(unpriced: House, tmp_path: Path) -> None:
    def write(name: str, output: Any, *models: str) -> str:
        path = tmp_path / name
        prices = [{"model": "m-tier", "provider": "p", "usd_per_million": {"input": "1", "output": output}}]
        prices += [{"model": each, "provider": "p", "usd_each": {"images": "0.5"}} for each in models]
        path.write_text(json.dumps({"format": "satmeter-prices-1", "models": prices}))
        return str(path)

    await command(unpriced, "import", write("1.json", {"0": "1", "100001": "100"}, *(f"old-{n}" for n in range(50))))
    await command(unpriced, "activate", "1")
    imported = await command(unpriced, "import", write("2.json", "1", *(f"new-{n}" for n in range(45))))
    lines = imported.text.splitlines()
    assert "45 prices new, 50 gone, 1 changed." in lines
    assert "  p/m-tier output from 100001 tokens: 0.0001 -> 0.000001 (-99 %)" in lines
    assert "  p/old-0 images: 0.5 (gone)" in lines
    assert "  p/new-0 images: 0.5 (new)" in lines
    assert "  … and 10 more gone" in lines
    assert "  … and 5 more new" in lines


@pytest.mark.parametrize("words", [("import", "/nowhere/at/all.json"), ("show", "x"), ("diff", "7"), ("activate", "7")])
async def test_a_command_that_cannot_be_done_says_why(unpriced: House, words: tuple[str, ...]) -> None:
    with pytest.raises(AppError) as refused:
        await command(unpriced, *words)
    assert refused.value.message
