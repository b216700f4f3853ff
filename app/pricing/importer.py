"""Reads price files that others keep into rows of ours: LiteLLM's map, genai-prices' data, and our own format.

Files are data: neither library is needed. Numbers are read from the raw text, never through a float. What is
not understood is counted and reported, never guessed. A price of nothing is not taken over: in such files it
often means "not known", and free of charge is for the operator to say, by an override.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from app.kernel.errors import InvalidField
from app.kernel.money import units_of
from app.pricing.rows import (
    ALWAYS,
    Dimension,
    FeeRow,
    ModelRow,
    PriceRow,
    attributes_text,
    parse_attributes,
)

D = Dimension
OWN_FORMAT: Final = "satmeter-prices-1"
_MILLION: Final = 10**6
_PUSD_PER_USD: Final = 10**12
_MAX_PUSD: Final = 10**18
_EXAMPLES: Final = 20
_MAX_TOKENS: Final = 10**12
_NAME_CHARS: Final = 500
Number: TypeAlias = Decimal | int
_Row: TypeAlias = tuple[str, str, Dimension, int, str, datetime]


@dataclass(slots=True)
class Report:
    """What an import did not take over as it stood."""

    unknown_fields: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    """Why, and how often, a price was left out."""
    rounded: list[str] = field(default_factory=list)
    """Prices finer than a pico-dollar, which were rounded up."""
    doubled: list[str] = field(default_factory=list)
    """Prices given twice, of which the dearer was taken."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A price file as rows of ours."""

    format: str
    source_hash: str
    prices: tuple[PriceRow, ...]
    models: tuple[ModelRow, ...]
    fees: tuple[FeeRow, ...]
    report: Report


def read_prices(raw: bytes) -> Draft:
    """Recognise the format of a file and read it. Raises InvalidField if it is none that we know, or naming a broken entry."""
    document = _parsed(raw)
    sheet = _Sheet()
    with _entry("its outermost level"):
        name = _read(document, sheet)
    return sheet.draft(name, hashlib.sha256(raw).hexdigest())


def _read(document: Any, sheet: "_Sheet") -> str:
    """The name of the format that it was read as."""
    if isinstance(document, dict) and document.get("format") == OWN_FORMAT:
        name = OWN_FORMAT
        _read_own(document, sheet)
    elif (providers := _genai_providers(document)) is not None:
        name = "genai-prices"
        _read_genai(providers, sheet)
    elif isinstance(document, dict) and any(_is_litellm(entry) for entry in document.values()):
        name = "litellm"
        _read_litellm(document, sheet)
    else:
        raise InvalidField("the file is neither LiteLLM's price map nor genai-prices' data nor our own format")
    return name


class _BrokenEntry(InvalidField):
    """An entry of the price file cannot be read."""


@contextmanager
def _entry(name: Any) -> Iterator[None]:
    """Whatever is wrong with an entry is the file's mistake, told with the entry's name."""
    try:
        yield
    except _BrokenEntry:
        raise
    except KeyError as error:
        raise _broken(name, f"it has no {str(error)[:50]}") from None
    except InvalidField as error:
        raise _broken(name, error.message) from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        raise _broken(name, f"{type(error).__name__}: {str(error)[:200]}") from None


def _broken(name: Any, what: str) -> _BrokenEntry:
    return _BrokenEntry(f"the price file cannot be read at {str(name)[:100]!r}: {what}", param="file")


def _parsed(raw: bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise InvalidField(f"the price file has {constant} for a number")

    try:
        return json.loads(raw, parse_float=Decimal, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidField(f"the price file is not JSON: {str(error)[:200]}") from None


class _Sheet:
    """Rows while they are being gathered, and what happened to them."""

    def __init__(self) -> None:
        self.report = Report()
        self.fees: list[FeeRow] = []
        self._prices: dict[_Row, PriceRow] = {}
        self._models: dict[tuple[str, str], ModelRow] = {}

    def add_model(self, row: ModelRow) -> None:
        """Raises InvalidField for a name that no database keeps."""
        for name in (row.model, row.provider, row.mode):
            if not name.isprintable() or len(name) > _NAME_CHARS:
                raise InvalidField(f"a name is at most {_NAME_CHARS} printable characters", param="file")
        self._models.setdefault((row.model, row.provider), row)

    def add(
        self,
        row: PriceRow,
        price_usd: Any,
        per: int = 1,
    ) -> None:
        """Add `price_usd` for `per` units under the name that `row` gives, or report why not."""
        if not 0 <= row.tier_min <= _MAX_TOKENS:
            raise InvalidField(f"a tier begins at 0 to {_MAX_TOKENS} tokens, got {row.tier_min}", param="file")
        reason = _unfit(price_usd)
        if reason is None:
            price_pusd, is_exact = _pusd(price_usd, per)
            reason = "beyond what a price can be" if price_pusd > _MAX_PUSD else None
        if reason is not None:
            self.report.skipped[reason] += 1
            return
        named = f"{row.model} {row.dimension} {price_usd}/{per}"
        if not is_exact:
            self.report.rounded.append(named)
        self._put(replace(row, price_pusd=price_pusd), named)

    def draft(self, name: str, source_hash: str) -> Draft:
        sold = {(row.model, row.provider) for row in self._prices.values()}
        models = tuple(row for key, row in self._models.items() if key in sold)
        return Draft(name, source_hash, tuple(self._prices.values()), models, tuple(self.fees), self.report)

    def _put(self, row: PriceRow, named: str) -> None:
        key = (row.model, row.provider, row.dimension, row.tier_min, row.attributes, row.effective_from)
        before = self._prices.get(key)
        if before is not None and before.price_pusd != row.price_pusd:
            self.report.doubled.append(named)
        if before is None or before.price_pusd < row.price_pusd:
            self._prices[key] = row


def _unfit(price_usd: Any) -> str | None:
    """Why a value can be no price of ours, None if it can."""
    if isinstance(price_usd, bool) or not isinstance(price_usd, Decimal | int):
        return "not a number"
    if price_usd < 0:
        return "negative"
    if price_usd == 0:
        return "a price of nothing"
    return "beyond what a price can be" if abs(Decimal(price_usd).adjusted()) > 30 else None


def _pusd(price_usd: Number, per: int) -> tuple[int, bool]:
    """Pico-USD for one unit, rounded up, and whether that is exact."""
    exact = Fraction(price_usd) * _PUSD_PER_USD / per
    return -(-exact.numerator // exact.denominator), exact.denominator == 1


# LiteLLM's map: {"model": {"litellm_provider": …, "mode": …, "input_cost_per_token": 1.5e-07, …}}, USD per unit.

_LITELLM_FIELD = re.compile(
    r"(?P<base>.+?)(?P<hour>_above_1hr)?(?:_above_(?P<k>\d+)k_tokens)?(?:_(?P<service>batches|priority|flex))?",
    re.ASCII,
)
_LITELLM_RESOLUTION = re.compile(r"output_cost_per(?:_video_per)?_second_(?P<resolution>\d{3,4}p)", re.ASCII)
_LITELLM_NAME = re.compile(
    r"(?:(?!(?:low|medium|high|hd|standard)/)(?P<provider>[a-z0-9_]+)/)?(?:(?P<quality>low|medium|high|hd|standard)/)?"
    r"(?P<width>\d+)-x-(?P<height>\d+)/(?P<model>[^/]+)",
    re.ASCII,
)
_LITELLM_DIMENSIONS: Final[Mapping[str, Dimension]] = MappingProxyType(
    {
        "input_cost_per_token": D.INPUT,
        "output_cost_per_token": D.OUTPUT,
        "cache_read_input_token_cost": D.CACHE_READ,
        "cache_creation_input_token_cost": D.CACHE_WRITE_5M,
        "output_cost_per_reasoning_token": D.REASONING,
        "input_cost_per_audio_token": D.AUDIO_INPUT,
        "output_cost_per_audio_token": D.AUDIO_OUTPUT,
        "input_cost_per_image_token": D.IMAGE_INPUT,
        "output_cost_per_image_token": D.IMAGE_OUTPUT,
        "output_cost_per_image": D.IMAGES,
        "output_cost_per_video_per_second": D.VIDEO_SECONDS,
        "input_cost_per_query": D.QUERIES,
        "input_cost_per_request": D.REQUESTS,
    }
)
_LITELLM_BY_MODE: Final[Mapping[tuple[str, str], Dimension]] = MappingProxyType(
    {
        ("image_generation", "input_cost_per_image"): D.IMAGES,
        ("image_generation", "input_cost_per_pixel"): D.PIXELS,
        ("image_generation", "output_cost_per_pixel"): D.PIXELS,
        ("audio_speech", "input_cost_per_character"): D.CHARACTERS,
        ("audio_speech", "output_cost_per_second"): D.AUDIO_SECONDS,
        ("audio_transcription", "input_cost_per_second"): D.AUDIO_SECONDS,
        ("audio_transcription", "output_cost_per_second"): D.AUDIO_SECONDS,
        ("video_generation", "output_cost_per_second"): D.VIDEO_SECONDS,
    }
)
"""Fields that mean one thing for one sort of model and another for another."""
_LITELLM_FACTS: Final = frozenset(
    {
        "litellm_provider", "mode", "max_tokens", "max_input_tokens", "max_output_tokens", "deprecation_date", "source",
        "metadata", "output_vector_size", "rpm", "tpm", "comment", "max_images_per_prompt", "max_videos_per_prompt",
        "max_video_length", "max_audio_length_hours", "max_audio_per_prompt", "max_pdf_size_mb", "tool_use_system_prompt_tokens",
        "provider_specific_entry", "max_query_tokens", "max_document_chunks_per_query", "max_tokens_per_document_chunk",
    }
)  # fmt: skip


def _is_litellm(entry: Any) -> bool:
    return isinstance(entry, dict) and "litellm_provider" in entry


def _read_litellm(document: Mapping[str, Any], sheet: _Sheet) -> None:
    for key, entry in document.items():
        if key == "sample_spec":
            continue
        if not _is_litellm(entry):
            sheet.report.skipped["a model without litellm_provider"] += 1
            continue
        with _entry(key):
            _read_litellm_model(key, entry, sheet)


def _read_litellm_model(key: str, entry: Mapping[str, Any], sheet: _Sheet) -> None:
    provider = str(entry["litellm_provider"]).lower()
    model, attributes = _litellm_name(key)
    mode = found if isinstance(found := entry.get("mode"), str) and found.isprintable() else ""
    most = _whole(entry.get("max_output_tokens"))
    sheet.add_model(ModelRow(model, provider, mode, most, _whole(entry.get("max_input_tokens"))))
    row = PriceRow(model, provider, D.INPUT, 0, attributes=attributes_text(attributes))
    for name, value in entry.items():
        _read_litellm_field(row, mode, name, value, sheet)


def _litellm_name(key: str) -> tuple[str, dict[str, str]]:
    """`hd/1024-x-1792/dall-e-3` is the model dall-e-3 with a quality and a size."""
    found = _LITELLM_NAME.fullmatch(key)
    if found is None:
        return key, {}
    model = f"{found['provider']}/{found['model']}" if found["provider"] else found["model"]
    attributes = {"size": f"{int(found['width'])}x{int(found['height'])}"}
    return model, attributes | ({"quality": found["quality"]} if found["quality"] else {})


def _read_litellm_field(row: PriceRow, mode: str, name: str, value: Any, sheet: _Sheet) -> None:
    if name in _LITELLM_FACTS or name.startswith(("supports_", "supported_")):
        return
    if name == "tiered_pricing" and isinstance(value, list):
        _read_litellm_ranges(row, mode, value, sheet)
    elif name == "search_context_cost_per_query" and isinstance(value, dict):
        _read_litellm_searches(replace(row, dimension=D.QUERIES), value, sheet)
    elif (meant := _litellm_meaning(row, mode, name)) is not None:
        sheet.add(meant, value)
    else:
        sheet.report.unknown_fields[name] += 1


def _read_litellm_searches(row: PriceRow, sizes: Mapping[str, Any], sheet: _Sheet) -> None:
    """{"search_context_size_low": 0.03, …}: a call that does not say how much it searches pays for the dearest."""
    for size, price_usd in sizes.items():
        sheet.add(_with(row, search_context_size=size.removeprefix("search_context_size_")), price_usd)
    fit = [price_usd for price_usd in sizes.values() if _unfit(price_usd) is None]
    if fit:
        sheet.add(row, max(fit))


def _litellm_meaning(row: PriceRow, mode: str, name: str) -> PriceRow | None:
    """Which price of ours a field is, None if we do not know."""
    if (by_resolution := _LITELLM_RESOLUTION.fullmatch(name)) is not None:
        return replace(_with(row, resolution=by_resolution["resolution"]), dimension=D.VIDEO_SECONDS)
    found = _LITELLM_FIELD.fullmatch(name)
    assert found is not None
    dimension = _LITELLM_DIMENSIONS.get(found["base"]) or _LITELLM_BY_MODE.get((mode, found["base"]))
    if dimension is None or (found["hour"] and dimension is not D.CACHE_WRITE_5M):
        return None
    if found["hour"]:
        dimension = D.CACHE_WRITE_1H
    if found["service"]:
        row = _with(row, service_tier="batch" if found["service"] == "batches" else found["service"])
    tier_min = int(found["k"]) * 1000 + 1 if found["k"] else row.tier_min
    return replace(row, dimension=dimension, tier_min=tier_min)


def _read_litellm_ranges(row: PriceRow, mode: str, ranges: list[Any], sheet: _Sheet) -> None:
    """[{"range": [0, 32000], "input_cost_per_token": …}, …]: a range begins above its lower bound."""
    for entry in ranges:
        bounds = entry.get("range") if isinstance(entry, dict) else None
        least = _whole(bounds[0]) if isinstance(bounds, list) and bounds else None
        if least is None:
            sheet.report.skipped["a range without bounds"] += 1
            continue
        for name, value in entry.items():
            if name != "range":
                _read_litellm_field(replace(row, tier_min=least + 1 if least else 0), mode, name, value, sheet)


# genai-prices' data: [{"id": provider, "models": [{"id", "prices": {"input_mtok": 0.15, …}}]}], USD per a multiple.

_GENAI_DIMENSIONS: Final[Mapping[str, tuple[Dimension, int]]] = MappingProxyType(
    {
        "input_mtok": (D.INPUT, _MILLION),
        "output_mtok": (D.OUTPUT, _MILLION),
        "cache_read_mtok": (D.CACHE_READ, _MILLION),
        "cache_write_mtok": (D.CACHE_WRITE_5M, _MILLION),
        "cache_write_5m_mtok": (D.CACHE_WRITE_5M, _MILLION),
        "cache_write_1h_mtok": (D.CACHE_WRITE_1H, _MILLION),
        "output_reasoning_mtok": (D.REASONING, _MILLION),
        "input_audio_mtok": (D.AUDIO_INPUT, _MILLION),
        "output_audio_mtok": (D.AUDIO_OUTPUT, _MILLION),
        "input_image_mtok": (D.IMAGE_INPUT, _MILLION),
        "output_image_mtok": (D.IMAGE_OUTPUT, _MILLION),
        "input_mchars": (D.CHARACTERS, _MILLION),
        "audio_hours": (D.AUDIO_SECONDS, 3600),
        "input_audio_hours": (D.AUDIO_SECONDS, 3600),
        "input_gpixels": (D.PIXELS, 10**9),
        "web_searches_kcount": (D.QUERIES, 1000),
        "rerank_searches_kcount": (D.QUERIES, 1000),
        "requests_kcount": (D.REQUESTS, 1000),
    }
)
_GENAI_CONTEXTS: Final[Mapping[str, str]] = MappingProxyType(
    {"service_tier": "service_tier", "processing": "service_tier"}
)


def _genai_providers(document: Any) -> list[Any] | None:
    """The providers of any of its versions: a list, or an object that has one beside its units."""
    found = document.get("providers") if isinstance(document, dict) and "units" in document else document
    is_genai = isinstance(found, list) and found and all(isinstance(each, dict) and "models" in each for each in found)
    return found if is_genai else None


def _read_genai(providers: Iterable[Mapping[str, Any]], sheet: _Sheet) -> None:
    for provider in providers:
        name = str(provider.get("id", "")).lower()
        with _entry(name):
            for place, model in enumerate(provider["models"]):
                with _entry(model.get("id", f"{name}, model {place}")):
                    _read_genai_model(name, model, sheet)


def _read_genai_model(provider: str, model: Mapping[str, Any], sheet: _Sheet) -> None:
    row = PriceRow(str(model["id"]), provider, D.INPUT, 0)
    sheet.add_model(ModelRow(row.model, provider, context_tokens=_whole(model.get("context_window"))))
    for since, until, prices in _genai_periods(model.get("prices"), sheet):
        _read_genai_prices(replace(row, effective_from=since, effective_to=until), prices, sheet)
    for variant in model.get("price_variants") or ():
        _read_genai_variant(row, variant, sheet)


def _genai_periods(prices: Any, sheet: _Sheet) -> Iterator[tuple[datetime, datetime | None, Mapping[str, Any]]]:
    """Dated prices as periods: each holds until the next begins. Times of day are not taken over."""
    if isinstance(prices, dict):
        yield ALWAYS, None, prices
        return
    dated: list[tuple[datetime, Mapping[str, Any]]] = []
    for conditional in prices or ():
        since = _genai_start(conditional.get("constraint"))
        if since is None or (dated and since <= dated[-1][0]):
            sheet.report.skipped["a price at some times of the day, or out of order"] += 1
            continue
        dated.append((since if dated else ALWAYS, conditional["prices"]))
    for place, (since, each) in enumerate(dated):
        yield since, dated[place + 1][0] if place + 1 < len(dated) else None, each


def _genai_start(constraint: Any) -> datetime | None:
    if constraint is None:
        return ALWAYS
    try:
        return datetime.fromisoformat(constraint["start_date"]).replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError):
        return None


def _read_genai_variant(row: PriceRow, variant: Mapping[str, Any], sheet: _Sheet) -> None:
    """A price for a service tier. Raises nothing: what else it may depend on is reported."""
    wanted = variant.get("when") or {}
    since = _genai_start(variant.get("constraint"))
    if since is None or len(wanted) != 1 or not set(wanted) <= set(_GENAI_CONTEXTS):
        sheet.report.skipped[f"a price that depends on {', '.join(sorted(wanted)) or 'nothing'}"[:80]] += 1
        return
    ((name, value),) = wanted.items()
    named = _with(replace(row, effective_from=since), **{_GENAI_CONTEXTS[name]: str(value).lower()})
    _read_genai_prices(named, variant.get("prices") or {}, sheet)


def _read_genai_prices(row: PriceRow, prices: Mapping[str, Any], sheet: _Sheet) -> None:
    for name, value in prices.items():
        if name not in _GENAI_DIMENSIONS:
            sheet.report.unknown_fields[name] += 1
            continue
        dimension, per = _GENAI_DIMENSIONS[name]
        named = replace(row, dimension=dimension)
        if isinstance(value, dict):
            sheet.add(named, value.get("base"), per)
            for tier in value.get("tiers") or ():
                sheet.add(replace(named, tier_min=int(tier["start"]) + 1), tier.get("price"), per)
        elif value is not None:
            sheet.add(named, value, per)


# Our own format, also of the starter catalogue: prices as decimal text, in USD.


def _read_own(document: Mapping[str, Any], sheet: _Sheet) -> None:
    for feature, price_usd in (document.get("fees") or {}).items():
        with _entry(f"fees, {feature}"):
            sheet.fees.append(FeeRow(str(feature), units_of(Decimal(str(price_usd)), 9, up=True)))
    for place, model in enumerate(document["models"]):
        with _entry(model.get("model", f"model {place}")):
            _read_own_model(model, sheet)


def _read_own_model(model: Mapping[str, Any], sheet: _Sheet) -> None:
    row = PriceRow(str(model["model"]), str(model["provider"]).lower(), D.INPUT, 0)
    defaults = attributes_text(parse_attributes(model.get("default_attributes", "")))
    sheet.add_model(
        ModelRow(
            row.model, row.provider, str(model.get("mode", "")), _whole(model.get("max_output_tokens")),
            _whole(model.get("context_tokens")), defaults,
        )
    )  # fmt: skip
    for unit, per in (("usd_per_million", _MILLION), ("usd_per_minute", 60), ("usd_each", 1)):
        for name, value in (model.get(unit) or {}).items():
            with _entry(f"{row.model} {unit} {name}"):
                _read_own_price(replace(row, dimension=_own_dimension(name)), value, per, sheet)


def _own_dimension(name: str) -> Dimension:
    try:
        return Dimension(name)
    except ValueError:
        raise InvalidField(f"there is no dimension {name[:50]!r}; there are {', '.join(Dimension)}") from None


def _read_own_price(row: PriceRow, value: Any, per: int, sheet: _Sheet) -> None:
    """A text, or a text for each context tier (`"200001": …`) or set of attributes (`"quality=hd": …`)."""
    if not isinstance(value, dict):
        sheet.add(row, Decimal(str(value)), per)
        return
    for name, price_usd in value.items():
        named = (
            replace(row, tier_min=int(name))
            if name.isdigit()
            else replace(row, attributes=attributes_text(parse_attributes(name)))
        )
        sheet.add(named, Decimal(str(price_usd)), per)


def _with(row: PriceRow, **attributes: str) -> PriceRow:
    """Raises InvalidField for a value that has no canonical text, which no catalogue could load."""
    wanted = parse_attributes(row.attributes) | {name: value.lower() for name, value in attributes.items()}
    text = attributes_text(wanted)
    if parse_attributes(text) != wanted:
        raise InvalidField(f"{text[:100]!r} cannot be an attribute", param="attributes")
    return replace(row, attributes=text)


def _whole(value: Any) -> int | None:
    is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    return int(value) if is_number and 0 <= value <= _MAX_TOKENS else None


def shortened(names: list[str]) -> list[str]:
    """The first few of a list that may be long."""
    return [*names[:_EXAMPLES], f"… and {len(names) - _EXAMPLES} more"] if len(names) > _EXAMPLES else names
