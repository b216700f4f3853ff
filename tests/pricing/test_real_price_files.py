"""The price files that others keep, whole: nothing ignored silently, sixty-odd usages priced by hand, and what holds for all."""

import json
import random
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.kernel.errors import InvalidField, ModelNotPriced
from app.pricing.drafts import Draft
from app.pricing.importer import read_prices
from app.pricing.names import family_of
from app.pricing.quote import Ask, Call, Catalogue
from app.pricing.rows import Usage
from app.pricing.verify import shown, verified
from tests.pricing.wheels import genai_data, litellm_map

NOW = datetime(2026, 11, 1, tzinfo=UTC)
FILES = {"litellm": litellm_map, "genai-prices": genai_data}


@cache
def draft_of(name: str) -> Draft:
    return read_prices(FILES[name]())


@cache
def book_of(name: str) -> Catalogue:
    draft = draft_of(name)
    return Catalogue(1, draft.prices, models=draft.models)


@pytest.mark.parametrize(
    ("name", "least_models", "most_left_out"), [("litellm", 4400, 100), ("genai-prices", 2100, 20)]
)
def test_a_real_price_file_is_read_whole_and_what_is_not_sold_is_named_with_its_reason(
    name: str, least_models: int, most_left_out: int
) -> None:
    draft = draft_of(name)
    report = draft.report
    assert draft.format == name
    assert len(draft.models) >= least_models
    assert 0 < len(report.left_out) <= most_left_out
    assert all(reason for reason in report.left_out.values())
    assert (report.doubled, report.rounded) == ([], [])
    assert not {f"{row.provider}/{row.model}" for row in draft.models} & report.left_out.keys()


def test_no_field_of_litellms_map_is_ignored_without_a_word() -> None:
    """Each field of each model made dearer is a dearer draft, a reported field, a left out model, or a fact by its name."""
    document = json.loads(litellm_map())
    seen: dict[str, Any] = {}
    for key, entry in document.items():
        for field, value in entry.items():
            is_price = isinstance(value, float) and value > 0 and "litellm_provider" in entry and key != "sample_spec"
            if is_price and field not in seen:
                seen[field] = (key, entry)
    assert len(seen) > 150
    facts = {field for field, (key, entry) in seen.items() if not _is_noticed(field, key, entry)}
    assert facts == {
        "input_dbu_cost_per_token", "output_dbu_cost_per_token", "prompt_cache_min_tokens", "rpm", "tpm",
        "output_vector_size", "token_count_framing", "max_document_chunks_per_query", "max_query_tokens",
    } & facts, facts  # fmt: skip


def _is_noticed(field: str, key: str, entry: dict[str, Any]) -> bool:
    def said(fields: dict[str, Any]) -> Any:
        draft = read_prices(
            json.dumps({key: fields, "other": {"litellm_provider": "p", "input_cost_per_token": 1}}).encode()
        )
        return set(draft.prices), draft.report

    before, _ = said(entry)
    after, report = said(entry | {field: entry[field] * 7})
    return bool(before != after or report.unknown_fields[field] or report.extras[field] or report.left_out)


# --- usages priced by hand -------------------------------------------------------------------------------

M = Fraction(1, 10**6)
BATCH, FLEX, PRIORITY = ({"service_tier": tier} for tier in ("batch", "flex", "priority"))
BY_HAND: list[tuple[str, dict[str, str], dict[str, int], str]] = [
    # chat
    ("gpt-4o-mini", {}, {"input_tokens": 1000, "output_tokens": 100}, "1000*.15 + 100*.60"),
    ("gpt-5", {}, {"input_tokens": 12345, "output_tokens": 678}, "12345*1.25 + 678*10"),
    ("claude-haiku-4-5", {}, {"input_tokens": 7, "output_tokens": 3}, "7*1 + 3*5"),
    ("mistral/mistral-large-latest", {}, {"input_tokens": 1000, "output_tokens": 1000}, "1000*.5 + 1000*1.5"),
    ("text-embedding-3-small", {}, {"input_tokens": 8191}, "8191*.02"),
    ("gpt-audio", {}, {"input_tokens": 100, "output_tokens": 10}, "100*2.5 + 10*10"),
    # cached
    ("gpt-4o-mini", {}, {"input_tokens": 2006, "output_tokens": 300, "cache_read_tokens": 1920}, "86*.15 + 1920*.075 + 300*.60"),
    ("gpt-5", {}, {"input_tokens": 10_000, "cache_read_tokens": 9_000}, "1000*1.25 + 9000*.125"),
    ("claude-opus-4-6", {}, {"input_tokens": 30_000, "cache_read_tokens": 25_000, "output_tokens": 10}, "5000*5 + 25000*.5 + 10*25"),
    ("claude-opus-4-6", {}, {"input_tokens": 5_000, "cache_read_tokens": 25_000, "output_tokens": 10}, "5000*5 + 25000*.5 + 10*25"),
    ("minimax/MiniMax-M3", {}, {"input_tokens": 1000, "cache_read_tokens": 500}, "500*.3 + 500*.06"),
    # cache writes
    ("claude-opus-4-6", {}, {"input_tokens": 3000, "cache_write_tokens": 2000}, "1000*5 + 2000*6.25"),
    ("claude-opus-4-6", {}, {"input_tokens": 3000, "cache_write_1h_tokens": 2000}, "1000*5 + 2000*10"),
    ("claude-opus-4-6", {}, {"input_tokens": 9000, "cache_write_tokens": 2000, "cache_write_1h_tokens": 3000, "cache_read_tokens": 1000}, "3000*5 + 2000*6.25 + 3000*10 + 1000*.5"),
    ("gpt-5.6-sol", {}, {"input_tokens": 3000, "cache_write_12h_tokens": 2000}, "1000*4 + 2000*10"),
    ("claude-opus-4-6", BATCH, {"input_tokens": 2000, "cache_write_1h_tokens": 2000}, "2000*5"),
    ("claude-opus-4-6", BATCH, {"input_tokens": 2000, "cache_write_tokens": 2000}, "2000*3.125"),
    ("vertex_ai/claude-sonnet-4-5", BATCH, {"input_tokens": 2000, "cache_write_1h_tokens": 2000}, "2000*3"),
    ("anthropic.claude-sonnet-4-5-20250929-v1:0", BATCH, {"input_tokens": 2000, "cache_write_tokens": 2000}, "2000*1.875"),
    # reasoning
    ("o3", {}, {"input_tokens": 100, "output_tokens": 900, "reasoning_tokens": 800}, "100*2 + 900*8"),
    ("gemini-2.5-flash", {}, {"input_tokens": 100, "output_tokens": 900, "reasoning_tokens": 800}, "100*.3 + 900*2.5"),
    ("gemini-2.5-flash", BATCH, {"output_tokens": 900, "reasoning_tokens": 800}, "900*1.25"),
    ("gemini-3-flash-preview", PRIORITY, {"output_tokens": 900, "reasoning_tokens": 800}, "900*5.4"),
    ("gpt-5", {}, {"output_tokens": 10, "reasoning_tokens": 5000}, "5010*10"),
    # audio
    ("gpt-realtime-2.1", {}, {"input_tokens": 500, "audio_input_tokens": 400, "output_tokens": 116, "audio_output_tokens": 100}, "100*4 + 400*32 + 16*24 + 100*64"),
    ("gpt-realtime-2.1", {}, {"input_tokens": 1000, "audio_input_tokens": 1000, "cache_read_tokens": 1000}, "1000*.4"),
    ("gpt-realtime-2.1", {}, {"input_tokens": 1000, "image_input_tokens": 600, "cache_read_tokens": 800, "cache_read_image_tokens": 500}, "100*4 + 100*5 + 300*.4 + 500*.5"),
    ("gpt-audio", {}, {"input_tokens": 100, "audio_input_tokens": 60, "output_tokens": 50, "audio_output_tokens": 40}, "40*2.5 + 60*32 + 10*10 + 40*64"),
    ("gemini-2.5-flash", {}, {"input_tokens": 1000, "audio_input_tokens": 600}, "400*.3 + 600*1"),
    ("gemini-2.5-flash", {}, {"input_tokens": 1000, "audio_input_tokens": 1000, "cache_read_tokens": 1000}, "1000*.1"),
    ("gemini-3.1-flash-lite", FLEX, {"input_tokens": 1000, "audio_input_tokens": 1000, "cache_read_tokens": 1000}, "1000*.025"),
    ("gpt-4o-mini-tts", {}, {"input_tokens": 20, "output_tokens": 300}, "20*.6 + 300*12"),
    ("gpt-4o-mini-transcribe", {}, {"input_tokens": 14, "audio_input_tokens": 14, "output_tokens": 45}, "14*1.25 + 45*5"),
    ("gemini-live-2.5-flash-native-audio", {}, {"input_tokens": 1000, "video_input_tokens": 258}, "742*.5 + 258*3"),
    # image tokens
    ("gpt-image-2", {}, {"input_tokens": 22, "output_tokens": 1372}, "22*5 + 1372*30"),
    ("gpt-image-1-mini", {}, {"input_tokens": 350, "image_input_tokens": 323, "output_tokens": 272, "image_output_tokens": 272}, "27*2 + 323*2.5 + 272*8"),
    ("gpt-image-1.5", {}, {"input_tokens": 22, "output_tokens": 1100, "image_output_tokens": 1056}, "22*5 + 44*10 + 1056*32"),
    ("gpt-image-1", BATCH, {"input_tokens": 100, "image_input_tokens": 60}, "40*2.5 + 60*5"),
    ("gemini-3-pro-image", {}, {"input_tokens": 100, "output_tokens": 1500, "image_output_tokens": 1120, "reasoning_tokens": 380}, "100*2 + 1120*120 + 380*12"),
    ("gpt-realtime", {}, {"input_tokens": 100, "image_input_tokens": 100}, "100*5"),
    # context tiers: below, at, above
    *((("empiriolabs/qwen3-5-122b-a10b", {}, {"input_tokens": n, "output_tokens": 10}, hand) for n, hand in ((127_999, "127999*.115 + 10*.917"), (128_000, "128000*.115 + 10*.917"), (128_001, "128001*.287 + 10*2.294")))),
    *((("gemini/gemini-2.5-pro", {}, {"input_tokens": n, "output_tokens": 10}, hand) for n, hand in ((199_999, "199999*1.25 + 10*10"), (200_000, "200000*1.25 + 10*10"), (200_001, "200001*2.5 + 10*15")))),
    *((("gpt-5.4", {}, {"input_tokens": n, "output_tokens": 10}, hand) for n, hand in ((271_999, "271999*2.5 + 10*15"), (272_000, "272000*2.5 + 10*15"), (272_001, "272001*5 + 10*22.5")))),
    *((("xai/grok-4.20-0309-reasoning", {}, {"input_tokens": n, "output_tokens": 10}, hand) for n, hand in ((199_999, "199999*1.25 + 10*2.5"), (200_000, "200000*2.5 + 10*5"), (200_001, "200001*2.5 + 10*5")))),
    ("claude-haiku-5-5", {}, {"input_tokens": 100_001, "cache_read_tokens": 100_000}, "1*.5 + 100000*.05"),
    ("claude-haiku-5-5", BATCH, {"input_tokens": 100_001, "cache_write_1h_tokens": 100_000}, "1*.25 + 100000*.5"),
    ("dashscope/qwen-flash", {}, {"input_tokens": 256_001, "output_tokens": 10}, "256001*.25 + 10*2"),
    ("minimax/MiniMax-M3", {}, {"input_tokens": 512_001, "cache_read_tokens": 1}, "512000*.6 + 1*.12"),
    # batch, flex, priority
    ("gpt-4o-mini", BATCH, {"input_tokens": 1000, "output_tokens": 100}, "1000*.075 + 100*.3"),
    ("gpt-5", FLEX, {"input_tokens": 1000, "cache_read_tokens": 900, "output_tokens": 100}, "100*.625 + 900*.0625 + 100*5"),
    ("gpt-5-mini", PRIORITY, {"input_tokens": 1000, "cache_read_tokens": 900}, "100*.45 + 900*.045"),
    ("o3", PRIORITY, {"input_tokens": 1000, "output_tokens": 100}, "1000*3.5 + 100*14"),
    ("o3", {"service_tier": "default"}, {"input_tokens": 1000, "output_tokens": 100}, "1000*2 + 100*8"),
    ("sail/moonshotai/Kimi-K3", {"service_tier": "balanced"}, {"input_tokens": 1000, "cache_read_tokens": 500}, "500*2 + 500*.2"),
    ("anthropic.claude-sonnet-4-5-20250929-v1:0", BATCH, {"input_tokens": 300_000, "output_tokens": 1000}, "300000*3 + 1000*11.25"),
    ("azure/us/gpt-5.4", PRIORITY, {"input_tokens": 272_001, "output_tokens": 1000}, "272001*11 + 1000*49.5"),
    ("gpt-5.4", PRIORITY, {"input_tokens": 300_000, "cache_read_tokens": 300_000}, "300000*1"),
    ("gpt-5.4", BATCH, {"input_tokens": 272_001, "output_tokens": 100}, "272001*2.5 + 100*11.25"),
    ("gpt-5.4", FLEX, {"input_tokens": 272_001, "cache_read_tokens": 272_000}, "1*2.5 + 272000*.25"),
    # regions and speeds
    ("claude-opus-4-8", {"region": "us"}, {"input_tokens": 1000, "output_tokens": 100}, "1000*5.5 + 100*27.5"),
    ("claude-opus-4-8", {"speed": "fast"}, {"input_tokens": 1000, "output_tokens": 100}, "1000*10 + 100*50"),
    ("gpt-5.4", {"region": "eu"}, {"input_tokens": 272_001}, "272001*5.5"),
    ("vertex_ai/claude-sonnet-4-5", {"region": "regional"}, {"input_tokens": 1000}, "1000*3.3"),
    # by the image, second, character, query
    ("black_forest_labs/flux-pro-1.1", {}, {"images": 3}, "3*40000"),
    ("gpt-image-1.5", {"quality": "medium", "size": "1024x1536"}, {"images": 2}, "2*50000"),
    ("fal_ai/fal-ai/nano-banana-2", {"resolution": "4K"}, {"images": 1}, "160000"),
    ("fal_ai/fal-ai/nano-banana-2", {}, {"images": 1}, "80000"),
    ("whisper-1", {}, {"audio_seconds": 61}, "61*100"),
    ("deepgram/nova-3", {}, {"audio_seconds": 3600}, "258000"),
    ("elevenlabs/scribe_v1", {}, {"audio_seconds": 5400}, "330000"),
    ("azure/gpt-realtime-translate-2026-05-06", {}, {"audio_seconds": 60}, "34000"),
    ("tts-1", {}, {"characters": 1234}, "1234*15"),
    ("openai/sora-2-pro", {}, {"video_seconds": 8}, "8*300000"),
    ("gemini/veo-3.1-generate-preview", {"resolution": "4k"}, {"video_seconds": 8}, "8*600000"),
    ("gemini/veo-3.1-fast-generate-preview", {"resolution": "1080p"}, {"video_seconds": 8}, "8*120000"),
    ("rerank-v3.5", {}, {"queries": 3, "input_tokens": 5000}, "3*2000"),
    ("amazon.rerank-v1:0", {}, {"queries": 2}, "2*1000"),
    ("perplexity/pplx-70b-online", {}, {"input_tokens": 1000, "output_tokens": 100}, "5000 + 100*2.8"),
    ("amazon.titan-embed-image-v1", {}, {"images": 2, "input_tokens": 10}, "2*60 + 10*.8"),
    # web search
    ("gpt-4o-mini", {"search_context_size": "low"}, {"input_tokens": 1000, "queries": 1}, "1000*.15 + 25000"),
    ("perplexity/sonar-pro", {"search_context_size": "low"}, {"queries": 2}, "2*6000"),
    ("perplexity/sonar-pro", {"search_context_size": "high"}, {"queries": 2}, "2*14000"),
    ("perplexity/sonar-pro", {}, {"queries": 2}, "2*14000"),
    ("claude-opus-4-6", {}, {"input_tokens": 100, "queries": 3}, "100*5 + 3*10000"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "made", "counts", "hand"), BY_HAND)
def test_a_usage_of_a_model_in_litellms_map_costs_what_it_does_by_hand(
    model: str, made: dict[str, str], counts: dict[str, int], hand: str
) -> None:
    """By hand: units times USD per million of them, added up, as the providers' price pages have it."""
    terms = [[Fraction(factor) for factor in term.split("*")] for term in hand.split(" + ")]
    right = sum((term[0] * (term[1] if len(term) > 1 else 1) for term in terms), Fraction(0)) * M
    quote = book_of("litellm").price(Call(model, attributes=made), Usage(**counts), NOW)
    assert quote.cost_nusd == -(-right * 10**9 // 1), (quote.lines, float(right))


def test_there_are_sixty_usages_at_least_priced_by_hand() -> None:
    assert len(BY_HAND) >= 80


def test_the_usages_of_real_answers_cost_what_genai_prices_says_at_the_same_provider() -> None:
    """One for each provider, model and set of counts in genai-prices' own dataset of real answers (tests/dataset, MIT).

    Left out of the file are those whose price has changed since the dataset was made, and those of models that are left
    out here. A model that its provider does not sell there is another provider's here, and flagged.
    """
    raw = (Path(__file__).parent / "real_usages.jsonl").read_bytes()
    found = verified(book_of("genai-prices"), raw)
    assert found.lines > 300
    assert (found.agreed, list(shown(found))[1:]) == (found.lines, [])


# --- what holds for every model ---------------------------------------------------------------------------

KINDS = ("audio_input_tokens", "image_input_tokens", "video_input_tokens")
READS = ("cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens", "cache_write_12h_tokens")
SAYS = ("reasoning_tokens", "audio_output_tokens", "image_output_tokens", "video_output_tokens")
TIERS: tuple[dict[str, str], ...] = (
    {},
    BATCH,
    FLEX,
    PRIORITY,
    {"region": "us"},
    {"quality": "high", "size": "1024x1024"},
)
models = st.tuples(st.sampled_from(sorted(FILES)), st.randoms(use_true_random=False))
sizes = st.one_of(
    st.integers(0, 3000), st.sampled_from([99_999, 100_001, 127_999, 128_001, 200_000, 200_001, 272_001, 600_000])
)


def a_model(file: str, dice: random.Random) -> tuple[Catalogue, str, str]:
    book = book_of(file)
    model = dice.choice(book.models())
    return book, model, dice.choice(book.providers_of(model))


def parts(dice: random.Random, names: tuple[str, ...], total: int) -> dict[str, int]:
    """Counts that together are no more than the whole."""
    told, left = {}, total
    for name in dice.sample(names, dice.randint(0, len(names))):
        told[name] = dice.randint(0, left)
        left -= told[name]
    return told


@settings(max_examples=400, deadline=None)
@given(models, sizes, sizes, st.sampled_from(TIERS), st.integers(1, 3))
def test_every_hold_covers_every_charge_that_its_estimate_allows(
    which: tuple[str, random.Random], most_in: int, most_out: int, made: dict[str, str], n: int
) -> None:
    file, dice = which
    book, model, provider = a_model(file, dice)
    call = Call(model, provider, attributes=made)
    told = {
        **(parts(dice, KINDS, most_in) if dice.random() < 0.3 else {}),
        **(parts(dice, READS, most_in) if dice.random() < 0.3 else {}),
    }
    try:
        ask = Ask(call, Usage(input_tokens=most_in, **told), most_out, n)
        held = book.estimate(ask, NOW).cost_nusd
    except (InvalidField, ModelNotPriced):
        return
    used_in = most_in if told else dice.choice([most_in, dice.randint(0, most_in)])
    used_out = dice.randint(0, book.answer_tokens(ask, NOW) * n)
    counts = {
        **(parts(dice, READS, used_in) if not told.keys() & set(READS) else {}),
        **(parts(dice, KINDS, used_in) if not told.keys() & set(KINDS) else {}), **told, **parts(dice, SAYS, used_out),
    }  # fmt: skip
    charged = book.price_known(call, Usage(input_tokens=used_in, output_tokens=used_out, **counts), NOW)
    assert charged.cost_nusd <= held, (model, provider, counts)


@settings(max_examples=300, deadline=None)
@given(models, sizes, sizes, st.sampled_from(TIERS), st.integers(1, 1000))
def test_more_of_anything_never_costs_less(
    which: tuple[str, random.Random], tokens_in: int, tokens_out: int, made: dict[str, str], more: int
) -> None:
    """Within a context tier, of which some are cheaper than the one below; a part grows with its whole. Of kinds that are
    told and cached tokens that are not told apart the cheapest split is taken, so that more of those may cost less."""
    file, dice = which
    book, model, provider = a_model(file, dice)
    call = Call(model, provider, attributes=made)
    counts = {**parts(dice, KINDS, tokens_in), **parts(dice, READS, tokens_in), **parts(dice, SAYS, tokens_out)}
    usage = {"input_tokens": tokens_in, "output_tokens": tokens_out, **counts}
    grown = dict(usage)
    grows = [each for each in counts if each not in READS or not counts.keys() & set(KINDS)]
    name = dice.choice(["input_tokens", "output_tokens", *grows])
    whole = "output_tokens" if name in SAYS or name == "output_tokens" else "input_tokens"
    for each in {name, whole}:
        grown[each] += more
    tiers = {row.tier_min for row in draft_of(file).prices if row.model == model and row.provider == provider}
    if sum(tier <= usage["input_tokens"] for tier in tiers) == sum(tier <= grown["input_tokens"] for tier in tiers):
        before, after = (book.price_known(call, Usage(**each), NOW).cost_nusd for each in (usage, grown))
        assert after >= before, (model, provider, name)


@settings(max_examples=300, deadline=None)
@given(models, st.integers(0, 2000), st.integers(0, 2000))
def test_two_calls_never_cost_less_than_the_one_that_they_are_together(
    which: tuple[str, random.Random], tokens_in: int, tokens_out: int
) -> None:
    file, dice = which
    book, model, provider = a_model(file, dice)
    halves = []
    for _ in range(2):
        counts = {**parts(dice, KINDS, tokens_in), **parts(dice, READS, tokens_in), **parts(dice, SAYS, tokens_out)}
        halves.append({"input_tokens": tokens_in, "output_tokens": tokens_out, **counts})
    names = halves[0].keys() | halves[1].keys()
    together = {name: sum(half.get(name, 0) for half in halves) for name in names}
    halves = [{name: half.get(name, 0) for name in names} for half in halves]
    call = Call(model, provider)
    apart = sum(book.price_known(call, Usage(**half), NOW).cost_nusd for half in halves)
    assert apart >= book.price_known(call, Usage(**together), NOW).cost_nusd, (model, provider, halves)


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_order_of_a_files_entries_changes_no_price(name: str) -> None:
    def shuffled(value: Any, dice: random.Random) -> Any:
        if isinstance(value, dict):
            return {key: shuffled(value[key], dice) for key in dice.sample(list(value), len(value))}
        return value

    document = json.loads(FILES[name](), parse_float=Decimal)
    dice = random.Random(7)
    if name == "litellm":
        other = shuffled(document, dice)
    else:
        providers = [
            {**each, "models": dice.sample(each["models"], len(each["models"]))} for each in document["providers"]
        ]
        other = {"units": {}, "providers": dice.sample(providers, len(providers))}
    draft = read_prices(json.dumps(other, default=_number).encode())
    assert set(draft.prices) == set(draft_of(name).prices)
    mixed = list(draft.prices)
    dice.shuffle(mixed)
    book, again = book_of(name), Catalogue(1, mixed, models=draft.models)
    for model in dice.sample(book.models(), 200):
        for provider in book.providers_of(model):
            assert list(book.listed(model, provider, NOW)) == list(again.listed(model, provider, NOW))


def _number(value: Decimal) -> float:
    return float(value)


def test_a_model_of_either_file_is_found_under_the_names_that_others_give_it() -> None:
    book, genai = book_of("litellm"), book_of("genai-prices")
    for name, model in (
        ("gpt-4o-mini-2024-07-18", "gpt-4o-mini"), ("openai/gpt-4o-mini", "gpt-4o-mini"), ("gpt-4o-2024-11-20", "gpt-4o"),
        ("GPT-4o-mini", "gpt-4o-mini"), ("claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
    ):  # fmt: skip
        assert book.resolved(name, "openai" if "gpt" in name.lower() else "anthropic")[0] in (model, name)
        assert genai.resolved(name, "openai" if "gpt" in name.lower() else "anthropic")[0] in (model, name)
    assert genai.resolved("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "aws")[1] == "aws"
    assert family_of(book.resolved("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "aws")[1]) == "aws"
