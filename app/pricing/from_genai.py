"""Reads genai-prices' data: [{"id": provider, "models": [{"id", "match", "prices": {"input_mtok": 0.15, …}}]}], USD per a
multiple. A price for some times of the day, or of what no usage counts, leaves its model out. Source: genai-prices 0.2.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

import msgspec

from app.pricing.drafts import MILLION, Gathered, NotUnderstood, entry, tier_above, whole, with_attributes
from app.pricing.rows import ALWAYS, INPUT_CELLS, Dimension, ModelRow, PriceRow

D = Dimension
_KINDS: Final = ("text", "audio", "image", "video")
_HOWS: Final = (("read",), ("write", "write_5m"), ("write_1h",), ("write_12h",))


def _of_tokens() -> Iterator[tuple[str, tuple[Dimension, int]]]:
    """`input_mtok`, `cache_audio_read_mtok`, `cache_write_1h_mtok`, … by the two axes."""
    for what, kind in enumerate(_KINDS):
        yield f"input_{kind}_mtok", (INPUT_CELLS[0][what], MILLION)
        for how, words in enumerate(_HOWS, 1):
            for word in words:
                yield f"cache_{kind}_{word}_mtok", (INPUT_CELLS[how][what], MILLION)
                if not what:
                    yield f"cache_{word}_mtok", (INPUT_CELLS[how][0], MILLION)


_DIMENSIONS: Final[Mapping[str, tuple[Dimension, int]]] = MappingProxyType(
    dict(_of_tokens())
    | {
        "input_mtok": (D.INPUT, MILLION),
        "output_mtok": (D.OUTPUT, MILLION),
        "output_text_mtok": (D.OUTPUT, MILLION),
        "output_reasoning_mtok": (D.REASONING, MILLION),
        "output_audio_mtok": (D.AUDIO_OUTPUT, MILLION),
        "output_image_mtok": (D.IMAGE_OUTPUT, MILLION),
        "output_video_mtok": (D.VIDEO_OUTPUT, MILLION),
        "input_mchars": (D.CHARACTERS, MILLION),
        "audio_hours": (D.AUDIO_SECONDS, 3600),
        "input_audio_hours": (D.AUDIO_SECONDS, 3600),
        "output_audio_hours": (D.AUDIO_SECONDS, 3600),
        "input_gpixels": (D.PIXELS, 10**9),
        "web_searches_kcount": (D.QUERIES, 1000),
        "rerank_searches_kcount": (D.QUERIES, 1000),
        "requests_kcount": (D.REQUESTS, 1000),
    }
)
_EXTRAS: Final = frozenset({"storage_searches_kcount", "social_searches_kcount", "code_executions_kcount"})
_CONTEXTS: Final[Mapping[str, str]] = MappingProxyType({"processing": "service_tier"})
"""What a price may depend on, as an attribute of ours; what is not here has the same name."""
_KNOWN_CONTEXTS: Final = frozenset({"service_tier", "processing", "speed", "search_type", "route"})
_MODEL_FACTS: Final = frozenset(
    {"id", "match", "name", "description", "context_window", "price_comments", "deprecated", "prices", "price_variants",
     "prices_checked", "price_discrepancies", "collapse"}
)  # fmt: skip


def genai_providers(document: Any) -> list[Any] | None:
    """The providers of any of its versions: a list, or an object that has one beside its units."""
    found = document.get("providers") if isinstance(document, dict) and "units" in document else document
    is_genai = isinstance(found, list) and found and all(isinstance(each, dict) and "models" in each for each in found)
    return found if is_genai else None


def read_genai(providers: Iterable[Mapping[str, Any]], gathered: Gathered) -> None:
    for provider in providers:
        name = str(provider.get("id", "")).lower()
        with entry(name):
            for place, model in enumerate(provider["models"]):
                with entry(model.get("id", f"{name}, model {place}")):
                    _read_model(name, model, gathered)


def _read_model(provider: str, model: Mapping[str, Any], gathered: Gathered) -> None:
    row = PriceRow(str(model["id"]), provider, D.INPUT, 0)
    match = model.get("match")
    about = ModelRow(
        row.model, provider, context_tokens=whole(model.get("context_window")),
        match=msgspec.json.encode(match, order="sorted").decode() if isinstance(match, dict) else "",
    )  # fmt: skip
    with gathered.model(about):
        for field in model.keys() - _MODEL_FACTS:
            gathered.report.unknown_fields[field] += 1
            if "price" in field or "cost" in field:
                raise NotUnderstood(f"{field[:100]} is not understood")
        for since, until, prices in _periods(model.get("prices")):
            _read_prices(replace(row, effective_from=since, effective_to=until), prices, gathered)
        for variant in model.get("price_variants") or ():
            _read_variant(row, variant, gathered)


def _periods(prices: Any) -> Iterator[tuple[datetime, datetime | None, Mapping[str, Any]]]:
    """Dated prices as periods: each holds until the next begins."""
    if isinstance(prices, dict):
        yield ALWAYS, None, prices
        return
    dated: list[tuple[datetime, Mapping[str, Any]]] = []
    for conditional in prices or ():
        since = _start(conditional.get("constraint"))
        if dated and since <= dated[-1][0]:
            raise NotUnderstood("its prices are out of order")
        dated.append((since if dated else ALWAYS, conditional["prices"]))
    for place, (since, each) in enumerate(dated):
        yield since, dated[place + 1][0] if place + 1 < len(dated) else None, each


def _start(constraint: Any) -> datetime:
    """Raises NotUnderstood for a price that does not hold all day."""
    if constraint is None:
        return ALWAYS
    try:
        return datetime.fromisoformat(constraint["start_date"]).replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError):
        raise NotUnderstood("its price depends on the time of day") from None


def _read_variant(row: PriceRow, variant: Mapping[str, Any], gathered: Gathered) -> None:
    """A price for a service tier, or for another way of asking, as attributes."""
    wanted = variant.get("when") or {}
    prices = variant.get("prices") or {}
    if not prices:
        return
    if not wanted or not set(wanted) <= _KNOWN_CONTEXTS:
        raise NotUnderstood(f"a price depends on {', '.join(sorted(wanted)) or 'nothing'}"[:100])
    attributes = {_CONTEXTS.get(name, name): str(value) for name, value in wanted.items()}
    since = _start(variant.get("constraint"))
    _read_prices(with_attributes(replace(row, effective_from=since), **attributes), prices, gathered)


def _read_prices(row: PriceRow, prices: Mapping[str, Any], gathered: Gathered) -> None:
    starts = _starts(prices.values())
    for name, value in prices.items():
        if value is None:
            continue
        if name in _EXTRAS:
            gathered.report.extras[name] += 1
        elif name not in _DIMENSIONS:
            gathered.report.unknown_fields[name] += 1
            raise NotUnderstood(f"it has a price for {name[:100]}, which no usage counts")
        else:
            dimension, per = _DIMENSIONS[name]
            _read_price(replace(row, dimension=dimension), value, per, starts if per == MILLION else (), gathered)


def _starts(values: Iterable[Any]) -> tuple[int, ...]:
    """Above how much input the prices change. One that says no tiers is the same in all of them."""
    tiers = (tier for value in values if isinstance(value, dict) for tier in value.get("tiers") or ())
    return tuple(sorted({int(tier["start"]) for tier in tiers}))


def _read_price(row: PriceRow, value: Any, per: int, starts: Sequence[int], gathered: Gathered) -> None:
    price, tiers = (value.get("base"), value.get("tiers") or ()) if isinstance(value, dict) else (value, ())
    steps = {0: price} | {int(tier["start"]): tier.get("price") for tier in tiers}
    gathered.add(row, price, per)
    for start in starts:
        price = steps.get(start, price)
        gathered.add(replace(row, tier_min=tier_above(start, row.provider)), price, per)
