"""Reads LiteLLM's map: {"model": {"litellm_provider": …, "mode": …, "input_cost_per_token": 1.5e-07, …}}, USD per unit.

Every field is a fact, a price of ours, the price of an extra that no usage counts, or unknown. A model with a price that
cannot be charged right is left out whole. Source: litellm 1.110, model_prices_and_context_window.json.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from app.pricing.drafts import Gathered, NotUnderstood, entry, tier_above, unfit, whole, with_attributes
from app.pricing.rows import CACHE, INPUT_CELLS, OUTPUT_CELLS, Dimension, ModelRow, PriceRow, attributes_text

D = Dimension
_FIELD = re.compile(
    r"(?P<base>.+?)(?P<hours>_above_(?:1|12)hr)?(?:_above_(?P<k>\d+)k_tokens)?"
    r"(?:_(?P<service>batches|priority|flex|balanced|ultrafast|decisions))?",
    re.ASCII,
)
_RESOLUTION = re.compile(
    r"output_cost_per(?:(?:_video_per)?_second_(?P<video>\d{3,4}p|\d+k)|_image_(?P<image>[\d.]+[Kk]|\d{3,4}))", re.ASCII
)
_NAME = re.compile(
    r"(?:(?!(?:low|medium|high|hd|standard)/)(?P<provider>[a-z0-9_]+)/)?(?:(?P<quality>low|medium|high|hd|standard)/)?"
    r"(?P<width>\d+)-x-(?P<height>\d+)/(?P<model>[^/]+)",
    re.ASCII,
)
_DIMENSIONS: Final[Mapping[str, Dimension]] = MappingProxyType(
    {
        "input_cost_per_token": D.INPUT,
        "output_cost_per_token": D.OUTPUT,
        "cache_read_input_token_cost": D.CACHE_READ,
        "input_cost_per_token_cache_hit": D.CACHE_READ,
        "cache_creation_input_token_cost": D.CACHE_WRITE_5M,
        "cache_read_input_audio_token_cost": D.CACHE_READ_AUDIO,
        "cache_read_input_image_token_cost": D.CACHE_READ_IMAGE,
        "cache_creation_input_audio_token_cost": D.CACHE_WRITE_5M_AUDIO,
        "output_cost_per_reasoning_token": D.REASONING,
        "input_cost_per_audio_token": D.AUDIO_INPUT,
        "output_cost_per_audio_token": D.AUDIO_OUTPUT,
        "input_cost_per_image_token": D.IMAGE_INPUT,
        "output_cost_per_image_token": D.IMAGE_OUTPUT,
        "input_cost_per_video_token": D.VIDEO_INPUT,
        "output_cost_per_video_token": D.VIDEO_OUTPUT,
        "output_cost_per_video_per_second": D.VIDEO_SECONDS,
        "input_cost_per_query": D.QUERIES,
        "input_cost_per_request": D.REQUESTS,
    }
)
_BY_MODE: Final[Mapping[tuple[str, str], Dimension]] = MappingProxyType(
    {
        ("image_generation", "output_cost_per_image"): D.IMAGES,
        ("image_edit", "output_cost_per_image"): D.IMAGES,
        ("chat", "output_cost_per_image"): D.IMAGES,
        ("image_generation", "input_cost_per_pixel"): D.PIXELS,
        ("image_generation", "output_cost_per_pixel"): D.PIXELS,
        ("audio_speech", "input_cost_per_character"): D.CHARACTERS,
        ("", "input_cost_per_character"): D.CHARACTERS,
        ("audio_speech", "output_cost_per_second"): D.AUDIO_SECONDS,
        ("audio_transcription", "input_cost_per_second"): D.AUDIO_SECONDS,
        ("audio_transcription", "output_cost_per_second"): D.AUDIO_SECONDS,
        ("realtime", "input_cost_per_second"): D.AUDIO_SECONDS,
        ("realtime", "input_cost_per_video_per_second"): D.VIDEO_SECONDS,
        ("video_generation", "output_cost_per_second"): D.VIDEO_SECONDS,
        ("video_generation", "input_cost_per_image"): D.IMAGES,
        ("chat", "input_cost_per_video_per_second"): D.VIDEO_SECONDS,
        ("embedding", "input_cost_per_character"): D.CHARACTERS,
        ("embedding", "input_cost_per_image"): D.IMAGES,
        ("embedding", "input_cost_per_audio_per_second"): D.AUDIO_SECONDS,
        ("embedding", "input_cost_per_video_per_second"): D.VIDEO_SECONDS,
    }
)
"""Fields that mean one thing for one sort of model and another, or nothing that we know, for another."""
_FACTS: Final = frozenset(
    {
        "litellm_provider", "mode", "max_tokens", "max_input_tokens", "max_output_tokens", "deprecation_date",
        "deprecation_source", "successor_model", "source", "metadata", "output_vector_size", "rpm", "tpm", "comment",
        "max_images_per_prompt", "max_videos_per_prompt", "max_video_length", "max_audio_length_hours",
        "max_audio_per_prompt", "max_pdf_size_mb", "tool_use_system_prompt_tokens", "max_query_tokens",
        "max_document_chunks_per_query", "max_tokens_per_document_chunk", "audio_transcription_config",
        "bedrock_converse_supports_strict_tools", "bedrock_output_config_effort_ceiling", "default_reasoning_effort",
        "gemini_audio_only_live", "gemini_native_audio", "prompt_cache_min_tokens", "reasoning_contexts",
        "reasoning_effort_levels", "reasoning_modes", "thinking_always_on", "thinking_on_by_default",
        "use_openai_responses_path", "uses_embed_content", "vertex_ai_audio_api", "web_search_billing_unit",
        "search_free_requests", "input_dbu_cost_per_token", "output_dbu_cost_per_token", "token_count_framing",
        "token_count_model", "token_count_responses_framing", "token_count_responses_tool_framing", "token_count_tokenizer",
        "token_count_tool_framing",
    }
)  # fmt: skip
"""What changes no price: what a model can, what the operator's own account is given free, the same price in another coin."""
_EXTRAS: Final = frozenset(
    {"google_maps_grounding_cost_per_query", "code_interpreter_cost_per_session", "file_search_cost_per_1k_calls",
     "file_search_cost_per_gb_per_day", "vector_store_cost_per_gb_per_day"}
)  # fmt: skip
_UPLIFTS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "regional_processing_uplift_multiplier_eu": {"region": "eu"},
        "regional_processing_uplift_multiplier_us": {"region": "us"},
        "regional_endpoint_uplift_multiplier": {"region": "regional"},
        "fedramp_uplift_multiplier": {"region": "fedramp"},
    }
)
_SPECIFIC: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {"us": {"region": "us"}, "fast": {"speed": "fast"}}
)
"""Multipliers for a call that is made in a region or at a speed, which its attributes say."""
_SPECIFIC_FACTS: Final = frozenset(
    {"realtime_ga_only", "dashscope_video_reference_input", "volcengine_video_frames", "bedrock_invocation_schema",
     "transcription_json_or_text_only", "transcription_usage_duration"}
)  # fmt: skip
_NEVER: Final[Mapping[str, str]] = MappingProxyType(
    {
        "off_peak_pricing": "its price depends on the time of day",
        "explicit_cache_read_input_token_cost": "its cached tokens cost more or less by how they came into the cache",
        "citation_cost_per_token": "it charges for citations",
        "cost_per_second": "it is sold by the time that it is reserved for",
        "input_cost_per_text_message": "it charges for messages",
        "ocr_cost_per_page": "it is sold by the page",
        "ocr_cost_per_page_batches": "it is sold by the page",
        "annotation_cost_per_page": "it is sold by the page",
        "annotation_cost_per_page_batches": "it is sold by the page",
        "ocr_cost_per_credit": "it is sold by the credit",
        "guardrail_cost_per_unit": "it is sold by a unit of its own",
    }
)
_PRICE_LIKE = re.compile(r"cost|price|pricing|multiplier|uplift|surcharge|_fee|discount", re.ASCII)
_TOKENS: Final = frozenset(INPUT_CELLS[0]) | CACHE | frozenset(OUTPUT_CELLS)


def is_litellm(entry: Any) -> bool:
    return isinstance(entry, dict) and "litellm_provider" in entry


@dataclass(frozen=True, slots=True)
class _Model:
    """What the reading of a field needs to know of the model around it."""

    row: PriceRow
    mode: str
    fields: Mapping[str, Any]


def read_litellm(document: Mapping[str, Any], gathered: Gathered) -> None:
    aliases: list[tuple[str, str]] = []
    for key, fields in document.items():
        if key in ("sample_spec", "fallback_generalizations"):
            continue
        if isinstance(fields, dict) and isinstance(fields.get("alias_of"), str):
            aliases.append((key, fields["alias_of"]))
        elif not is_litellm(fields):
            gathered.report.skipped["a model without litellm_provider"] += 1
        else:
            with entry(key):
                _read_model(key, fields, gathered)
    for alias, model in aliases:
        _read_alias(alias, model, document, gathered)


def _read_alias(alias: str, model: str, document: Mapping[str, Any], gathered: Gathered) -> None:
    target = document.get(model)
    provider = str(target["litellm_provider"]).lower() if is_litellm(target) and target is not None else ""
    if not gathered.copied(ModelRow(alias, provider), model):
        gathered.report.left_out[alias] = f"it stands for {model[:100]}, which is not sold"


def _read_model(key: str, fields: Mapping[str, Any], gathered: Gathered) -> None:
    provider = str(fields["litellm_provider"]).lower()
    name, attributes = _named(key)
    mode = found if isinstance(found := fields.get("mode"), str) and found.isprintable() else ""
    most = whole(fields.get("max_output_tokens"))
    reads = whole(fields.get("max_input_tokens")) or whole(
        fields.get("max_tokens")
    )  # the map says: "default to max_tokens"
    about = ModelRow(name, provider, mode, most or None, reads or None)
    row = PriceRow(name, provider, D.INPUT, 0, attributes=attributes_text(attributes))
    with gathered.model(about):
        model = _Model(row, mode, fields)
        for field, value in fields.items():
            _read_field(model, field, value, gathered)
        for field, made in _UPLIFTS.items():
            if field in fields:
                _uplift(row, fields[field], made, gathered)
        _read_specific(row, fields.get("provider_specific_entry"), gathered)


def _named(key: str) -> tuple[str, dict[str, str]]:
    """`hd/1024-x-1792/dall-e-3` is the model dall-e-3 with a quality and a size."""
    found = _NAME.fullmatch(key)
    if found is None:
        return key, {}
    model = f"{found['provider']}/{found['model']}" if found["provider"] else found["model"]
    attributes = {"size": f"{int(found['width'])}x{int(found['height'])}"}
    return model, attributes | ({"quality": found["quality"]} if found["quality"] else {})


def _read_field(model: _Model, name: str, value: Any, gathered: Gathered) -> None:
    """Raises NotUnderstood for what may be a price, and is none that we know."""
    if (
        name in _FACTS
        or name in _UPLIFTS
        or name == "provider_specific_entry"
        or name.startswith(("supports_", "supported_"))
    ):
        return
    if name == "tiered_pricing" and isinstance(value, list):
        _read_ranges(model, value, gathered)
    elif name == "search_context_cost_per_query" and isinstance(value, dict):
        _read_searches(replace(model.row, dimension=D.QUERIES), value, gathered)
    elif name in _EXTRAS:
        gathered.report.extras[name] += 1
    elif (meant := _meaning(model, name)) is not None:
        _read_prices(model, meant, value, gathered)
    elif not _is_nothing(value) and not _is_said_elsewhere(model, name):
        _refuse(name, gathered)


def _refuse(name: str, gathered: Gathered) -> None:
    if name in _NEVER:
        raise NotUnderstood(_NEVER[name])
    gathered.report.unknown_fields[name] += 1
    if _PRICE_LIKE.search(name):
        raise NotUnderstood(f"{name[:100]} is not understood")


def _is_nothing(value: Any) -> bool:
    return value is None or (unfit(value) == "a price of nothing")


def _is_said_elsewhere(model: _Model, name: str) -> bool:
    """Whether a price is for what the model's tokens are charged for anyway, counted in another unit."""
    tokens = {"input_cost_per_image": "input_cost_per_token", "input_cost_per_character": "input_cost_per_token"}
    return name in tokens and unfit(model.fields.get(tokens[name])) is None


def _read_prices(model: _Model, meant: tuple[PriceRow, ...], value: Any, gathered: Gathered) -> None:
    by_the_piece = ("input_cost_per_query", "input_cost_per_request")
    is_free_told = any(unfit(model.fields.get(name)) is None for name in by_the_piece)
    for row in meant:
        if row.dimension is D.AUDIO_SECONDS and (original := _original(model, value)) is not None:
            gathered.add(row, *original)
            continue
        gathered.add(row, value, is_free_told=is_free_told and row.dimension in (D.INPUT, D.OUTPUT))


def _original(model: _Model, a_second: Any) -> tuple[Any, int] | None:
    """The price for a minute or an hour that a rounded one for a second was made of, where the map tells it."""
    told = model.fields.get("metadata")
    if not isinstance(told, dict) or unfit(a_second) is not None:
        return None
    for name, seconds in (("original_pricing_per_minute", 60), ("original_pricing_per_hour", 3600)):
        price_usd = told.get(name)
        if unfit(price_usd) is None and abs(price_usd - a_second * seconds) * 100 <= price_usd:
            return price_usd, seconds
    return None


def _read_searches(row: PriceRow, sizes: Mapping[str, Any], gathered: Gathered) -> None:
    """{"search_context_size_low": 0.03, …}: a call that does not say how much it searches pays for the dearest."""
    for size, price_usd in sizes.items():
        gathered.add(with_attributes(row, search_context_size=size.removeprefix("search_context_size_")), price_usd)
    fit = [price_usd for price_usd in sizes.values() if unfit(price_usd) is None]
    if fit:
        gathered.add(row, max(fit))


def _meaning(model: _Model, name: str) -> tuple[PriceRow, ...] | None:
    """Which prices of ours a field is, None if we do not know."""
    row = model.row
    if (sized := _RESOLUTION.fullmatch(name)) is not None:
        if sized["video"]:
            return (replace(with_attributes(row, resolution=sized["video"]), dimension=D.VIDEO_SECONDS),)
        said = [with_attributes(row, **{how: sized["image"]}) for how in ("quality", "resolution", "size")]
        return tuple(replace(each, dimension=D.IMAGES) for each in said)
    found = _FIELD.fullmatch(name)
    assert found is not None
    dimension = _DIMENSIONS.get(found["base"]) or _of_mode(model, found["base"])
    if dimension is None or (found["hours"] and dimension is not D.CACHE_WRITE_5M):
        return None
    if found["hours"]:
        dimension = D.CACHE_WRITE_1H if found["hours"] == "_above_1hr" else D.CACHE_WRITE_12H
    if found["service"]:
        row = with_attributes(row, service_tier="batch" if found["service"] == "batches" else found["service"])
    tier_min = tier_above(int(found["k"]) * 1000, row.provider) if found["k"] else row.tier_min
    return (replace(row, dimension=dimension, tier_min=tier_min),)


def _of_mode(model: _Model, base: str) -> Dimension | None:
    """An image that is made has its price among the input's where there is none among the output's."""
    is_made = model.mode in ("image_generation", "image_edit")
    if is_made and base == "input_cost_per_image":
        of_output = ("output_cost_per_image", "output_cost_per_image_token", "output_cost_per_token")
        return None if any(unfit(model.fields.get(name)) is None for name in of_output) else D.IMAGES
    if base == "output_cost_per_image" and not model.mode:
        return D.IMAGES
    return _BY_MODE.get((model.mode, base))


def _read_ranges(model: _Model, ranges: list[Any], gathered: Gathered) -> None:
    """[{"range": [0, 32000], "input_cost_per_token": …}, …]: a range begins above its lower bound."""
    for each in ranges:
        bounds = each.get("range") if isinstance(each, dict) else None
        least = whole(bounds[0]) if isinstance(bounds, list) and bounds else None
        if least is None:
            raise NotUnderstood("its price depends on something else than how many tokens there are")
        tier_min = tier_above(least, model.row.provider) if least else 0
        for name, value in each.items():
            if name != "range":
                _read_field(replace(model, row=replace(model.row, tier_min=tier_min)), name, value, gathered)


def _uplift(row: PriceRow, by: Any, attributes: Mapping[str, str], gathered: Gathered) -> None:
    if unfit(by) is not None:
        raise NotUnderstood(f"its uplift for {', '.join(attributes.values())} is no number")
    gathered.multiplied(row.model, row.provider, by, _TOKENS, **attributes)


def _read_specific(row: PriceRow, specific: Any, gathered: Gathered) -> None:
    for name, value in (specific or {}).items():
        if name in _SPECIFIC:
            _uplift(row, value, _SPECIFIC[name], gathered)
        elif name not in _SPECIFIC_FACTS:
            gathered.report.unknown_fields[f"provider_specific_entry.{name}"] += 1
            raise NotUnderstood(f"provider_specific_entry.{name[:80]} is not understood")
