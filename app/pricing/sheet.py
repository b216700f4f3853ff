"""The price list that one call sees: variants by attributes, context tiers, and which of them held when."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, TypeVar

from app.kernel.errors import ModelNotPriced
from app.pricing.rows import Dimension, PriceRow, attributes_text, parse_attributes

D = Dimension
T = TypeVar("T")


class Timeline(Generic[T]):
    """Which value holds when, found by bisection. Where periods overlap, the one that began last holds."""

    __slots__ = ("_starts", "_values")

    def __init__(self, periods: Iterable[tuple[datetime, datetime | None, T]]) -> None:
        flat = list(_flattened(sorted(periods, key=lambda period: period[0])))
        self._starts = tuple(start for start, _ in flat)
        self._values = tuple(value for _, value in flat)

    def at(self, now: datetime) -> T | None:
        place = bisect_right(self._starts, now) - 1
        return self._values[place] if place >= 0 else None

    def values(self) -> Iterator[T]:
        """Every value that ever holds."""
        return (value for value in self._values if value is not None)


def _flattened(ordered: list[tuple[datetime, datetime | None, T]]) -> Iterator[tuple[datetime, T | None]]:
    """Overlapping periods as steps: a stack has the one that began last on top, and ended ones fall off it."""
    marks = sorted({start for start, _, _ in ordered} | {end for _, end, _ in ordered if end is not None})
    running: list[tuple[datetime, datetime | None, T]] = []
    coming = iter([*ordered, None])
    upcoming = next(coming)
    for mark in marks:
        while upcoming is not None and upcoming[0] <= mark:
            running.append(upcoming)
            upcoming = next(coming)
        while running and (end := running[-1][1]) is not None and end <= mark:
            running.pop()
        yield mark, running[-1][2] if running else None


class Variant:
    """The prices of one dimension under one set of attributes: its context tiers, highest first."""

    __slots__ = ("attributes", "text", "tiers")

    def __init__(self, text: str, rows: Iterable[PriceRow]) -> None:
        self.text = text
        self.attributes = parse_attributes(text)
        tiers: dict[int, list[tuple[datetime, datetime | None, int]]] = defaultdict(list)
        for row in rows:
            tiers[row.tier_min].append((row.effective_from, row.effective_to, row.price_pusd))
        self.tiers = tuple((tier_min, Timeline(tiers[tier_min])) for tier_min in sorted(tiers, reverse=True))

    def price_pusd(self, input_tokens: int, now: datetime) -> int | None:
        for tier_min, timeline in self.tiers:
            if tier_min <= input_tokens and (price_pusd := timeline.at(now)) is not None:
                return price_pusd
        return None


class Sheet:
    """All prices of one model at one provider, in one layer of the catalogue."""

    __slots__ = ("variants",)

    def __init__(self, rows: Iterable[PriceRow]) -> None:
        grouped: dict[tuple[Dimension, str], list[PriceRow]] = defaultdict(list)
        for row in rows:
            grouped[row.dimension, row.attributes].append(row)
        variants: dict[Dimension, list[Variant]] = defaultdict(list)
        for (dimension, text), group in grouped.items():
            variants[dimension].append(Variant(text, group))
        self.variants = {
            dimension: tuple(sorted(found, key=lambda variant: -len(variant.attributes)))
            for dimension, found in variants.items()
        }

    def find(self, dimension: Dimension, attributes: Mapping[str, str], input_tokens: int, now: datetime) -> int | None:
        """The price of the most attributes that all fit; between equally many, the dearer."""
        best: tuple[int, int] | None = None
        for variant in self.variants.get(dimension, ()):
            count = len(variant.attributes)
            if best is not None and count < best[0]:
                break
            if variant.attributes.items() <= attributes.items():
                price_pusd = variant.price_pusd(input_tokens, now)
                if price_pusd is not None and (best is None or price_pusd > best[1]):
                    best = (count, price_pusd)
        return None if best is None else best[1]

    def asks(self, dimension: Dimension, now: datetime) -> bool:
        """Whether any of its prices at this moment is more than nothing."""
        tiers = (tier for variant in self.variants.get(dimension, ()) for tier in variant.tiers)
        return any(timeline.at(now) for _, timeline in tiers)


NO_PRICES: Final = Sheet(())


@dataclass(frozen=True, slots=True)
class Prices:
    """The price list that one call sees: its model's layers at one moment, for its attributes and its context."""

    model: str
    provider: str
    layers: tuple[Sheet, ...]
    attributes: Mapping[str, str]
    input_tokens: int
    now: datetime

    def find(self, dimension: Dimension) -> int | None:
        """Pico-USD per unit; an override before what was imported."""
        for layer in self.layers:
            price_pusd = layer.find(dimension, self.attributes, self.input_tokens, self.now)
            if price_pusd is not None:
                return price_pusd
        return None

    def sells(self, dimension: Dimension) -> bool:
        """Whether there is a price of more than nothing, perhaps for other attributes than those that are asked for."""
        price_pusd = self.find(dimension)
        return (
            price_pusd > 0 if price_pusd is not None else any(layer.asks(dimension, self.now) for layer in self.layers)
        )

    def must(self, dimension: Dimension) -> int:
        """Raises ModelNotPriced: what is used and has no price is never given away."""
        price_pusd = self.find(dimension)
        if price_pusd is None:
            raise self.missing(dimension)
        return price_pusd

    def missing(self, dimension: Dimension) -> ModelNotPriced:
        asked = f" for {attributes_text(self.attributes)}" if self.attributes else ""
        return ModelNotPriced(f"{self.model[:200]!r} has no price for {dimension}{asked[:200]}", param="model")

    def cached(self, dimension: Dimension) -> int:
        """A cache price that is missing, or nothing, falls back to the input's: cached tokens are never free."""
        price_pusd = self.find(dimension)
        if not price_pusd and dimension is D.CACHE_WRITE_1H:
            price_pusd = self.find(D.CACHE_WRITE_5M)
        return price_pusd or self.must(D.INPUT)
