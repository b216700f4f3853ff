"""The price list that one call sees: a price for a dimension, a context tier and attributes, and which held when.

A price is (pico-USD, units): so much for so many units. A cell that a price file leaves out is derived: what is known of
it, scaled as the prices that it goes with change from there to here. The short price never stands for the long one.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from math import gcd
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

from app.kernel.errors import ModelNotPriced
from app.pricing.rows import (
    ALWAYS,
    CACHE,
    INPUT_CELLS,
    OUTPUT_CELLS,
    PART_OF,
    Dimension,
    PriceRow,
    attributes_text,
    parse_attributes,
)

D = Dimension
T = TypeVar("T")
Price: TypeAlias = tuple[int, int]
"""Pico-USD, and for how many units."""
SERVICE: Final = "service_tier"
_SURE: Final = frozenset({SERVICE, "region", "speed"})
"""What a call that says nothing of it has none of. All else it may be served with, whatever it said."""


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


class Cell(NamedTuple):
    """A price as it stands in the sheet, and where."""

    price: Price
    tier_min: int
    attributes: Mapping[str, str]


class Variant:
    """The prices of one dimension under one set of attributes: its context tiers, highest first."""

    __slots__ = ("attributes", "text", "tiers")

    def __init__(self, text: str, rows: Iterable[PriceRow]) -> None:
        self.text = text
        self.attributes = parse_attributes(text)
        tiers: dict[int, list[tuple[datetime, datetime | None, Price]]] = defaultdict(list)
        for row in rows:
            tiers[row.tier_min].append((row.effective_from, row.effective_to, (row.price_pusd, row.per_units)))
        self.tiers = tuple((tier_min, Timeline(tiers[tier_min])) for tier_min in sorted(tiers, reverse=True))

    def cell(self, input_tokens: int, now: datetime) -> Cell | None:
        for tier_min, timeline in self.tiers:
            if tier_min <= input_tokens and (price := timeline.at(now)) is not None:
                return Cell(price, tier_min, self.attributes)
        return None


class Sheet:
    """All prices of one model at one provider, in one layer of the catalogue."""

    __slots__ = ("_flat", "_stacks", "is_timeless", "tiers", "variants")

    def __init__(self, rows: Iterable[PriceRow]) -> None:
        grouped: dict[tuple[Dimension, str], list[PriceRow]] = defaultdict(list)
        for row in rows:
            grouped[row.dimension, row.attributes].append(row)
        variants: dict[Dimension, list[Variant]] = defaultdict(list)
        for (dimension, text), group in grouped.items():
            variants[dimension].append(Variant(text, group))
        self.variants = {
            dimension: tuple(sorted(found, key=lambda variant: (-len(variant.attributes), variant.text)))
            for dimension, found in variants.items()
        }
        self._stacks = any(_is_claude(group[0]) for group in grouped.values())
        self.tiers = tuple(sorted({row.tier_min for group in grouped.values() for row in group if row.tier_min}))
        self.is_timeless = all(
            row.effective_from == ALWAYS and row.effective_to is None for group in grouped.values() for row in group
        )
        self._flat = {dimension: self._only(dimension) for dimension in self.variants}

    def find(
        self,
        dimension: Dimension,
        attributes: Mapping[str, str],
        input_tokens: int,
        now: datetime,
        *,
        most: bool = False,
    ) -> Price | None:
        """The price of the most attributes that all fit; between equally many, the dearer.

        With `most`, the dearest that a call may be served at that says so much of how it is made.
        """
        if dimension not in self.variants:
            return None
        flat = self._flat[dimension]
        if flat is not None:
            return flat.at(now)
        cell = self._cell(dimension, attributes, input_tokens, now, most)
        return cell and self._derived(dimension, cell, attributes, input_tokens, now, most)

    def asks(self, dimension: Dimension, now: datetime) -> bool:
        """Whether any of its prices at this moment is more than nothing."""
        tiers = (tier for variant in self.variants.get(dimension, ()) for tier in variant.tiers)
        return any((price := timeline.at(now)) is not None and price[0] > 0 for _, timeline in tiers)

    def _only(self, dimension: Dimension) -> Timeline[Price] | None:
        """The one price that a dimension has in whatever call, if neither it nor what it goes with has several."""
        of_all = [self.variants[each] for each in (dimension, *_leaders(dimension)) if each in self.variants]
        is_one = all(len(found) == 1 and not found[0].text and len(found[0].tiers) == 1 for found in of_all)
        tier_min, timeline = self.variants[dimension][0].tiers[0]
        return timeline if is_one and not tier_min else None

    def _cell(
        self, dimension: Dimension, attributes: Mapping[str, str], input_tokens: int, now: datetime, most: bool
    ) -> Cell | None:
        best: Cell | None = None
        best_count = -1
        for variant in self.variants[dimension]:
            count = _fit(variant.attributes, attributes, most)
            if count < best_count or count < 0:
                continue
            cell = variant.cell(input_tokens, now)
            if cell is not None and (best is None or count > best_count or _is_dearer(cell.price, best.price)):
                best, best_count = cell, count
        return best

    def _derived(
        self,
        dimension: Dimension,
        cell: Cell,
        attributes: Mapping[str, str],
        input_tokens: int,
        now: datetime,
        most: bool,
    ) -> Price:
        """The price of a call of so much input and these attributes, from a cell that may know less of it."""
        if cell.attributes:
            less = {name: value for name, value in attributes.items() if name not in cell.attributes}
            plain = self._cell(dimension, less, input_tokens, now, most)
            if plain is not None and plain.tier_min > cell.tier_min:
                short = self._cell(dimension, less, cell.tier_min, now, most)
                return scaled(cell.price, plain.price, short.price if short is not None else plain.price)
        leaders = (each for each in _leaders(dimension) if each in self.variants)
        # Where discounts multiply, they are those of plain input, which no price file has rounded.
        leader = D.INPUT if self._stacks and dimension in CACHE and D.INPUT in self.variants else next(leaders, None)
        if leader is None:
            return cell.price
        served = cell.attributes.get(SERVICE) if SERVICE in cell.attributes else None
        without = {name: value for name, value in attributes.items() if name != SERVICE}
        ours = attributes if served is not None else without
        there = self.find(leader, ours, cell.tier_min, now, most=most)
        here = self.find(leader, attributes, input_tokens, now, most=most)
        if (
            served is None
            and here is not None
            and not self._follows(dimension, here, leader, without, input_tokens, now)
        ):
            here = self.find(leader, without, input_tokens, now, most=most)
        return cell.price if here is None or there is None else scaled(cell.price, here, there)

    def _follows(
        self,
        dimension: Dimension,
        here: Price,
        leader: Dimension,
        without: Mapping[str, str],
        input_tokens: int,
        now: datetime,
    ) -> bool:
        """Whether a service tier does to a price what it does to that which it goes with.

        A part follows its whole, and one sort of cache write the other. What is cached follows plain input where that
        gets dearer, or where the provider says that its discounts multiply.
        """
        if leader is not D.INPUT or dimension not in CACHE or self._stacks:
            return True
        plain = self.find(leader, without, input_tokens, now)
        return plain is not None and _is_dearer(here, plain)


NO_PRICES: Final = Sheet(())


def _leaders(dimension: Dimension) -> Iterator[Dimension]:
    while (leader := PART_OF.get(dimension)) is not None:
        yield leader
        dimension = leader


def _fit(wanted: Mapping[str, str], said: Mapping[str, str], most: bool) -> int:
    """How many of a variant's attributes the call said, -1 if it is not for such a call."""
    if wanted.items() <= said.items():
        return len(wanted)
    if not most or any(
        said.get(name, value) != value or (name in _SURE and name not in said) for name, value in wanted.items()
    ):
        return -1
    return sum(name in said for name in wanted)


def _is_claude(row: PriceRow) -> bool:
    """Anthropic: "Prompt caching multipliers stack with the batch discount", wherever its models are sold."""
    return row.provider == "anthropic" or "claude" in row.model


def _is_dearer(one: Price, other: Price) -> bool:
    return one[0] * other[1] > other[0] * one[1]


def dearest(*prices: Price | None) -> Price | None:
    best: Price | None = None
    for price in prices:
        if price is not None and (best is None or _is_dearer(price, best)):
            best = price
    return best


def scaled(price: Price, here: Price, there: Price) -> Price:
    """`price` × `here` / `there`, exactly; as it is where one of them is nothing."""
    up, down = here[0] * there[1], here[1] * there[0]
    if up == down or not up or not down:
        return price
    return _reduced(price[0] * up, price[1] * down)


def _summed(one: Price, other: Price) -> Price:
    return _reduced(one[0] * other[1] + other[0] * one[1], one[1] * other[1])


def _reduced(price_pusd: int, per_units: int) -> Price:
    by = gcd(price_pusd, per_units)
    return price_pusd // by, per_units // by


class Prices:
    """The price list that one call sees: its model's layers at one moment, for its attributes and its context.

    With `most`, as a hold sees it: the dearest that the call may turn out to cost.
    """

    __slots__ = (
        "_charged", "_dearest_input", "_found", "_is_of_text", "_kinds_apart", "_plain_input", "_plain_output", "attributes", "input_tokens",
        "layers", "mode",
        "model", "most", "now", "provider",
    )  # fmt: skip

    def __init__(
        self,
        model: str,
        provider: str,
        layers: tuple[Sheet, ...],
        attributes: Mapping[str, str],
        input_tokens: int,
        now: datetime,
        *,
        mode: str = "",
        most: bool = False,
    ) -> None:
        self.model, self.provider, self.layers, self.attributes = model, provider, layers, attributes
        self.input_tokens, self.now, self.mode, self.most = input_tokens, now, mode, most
        self._found: dict[Dimension, Price | None] = {}
        self._charged: dict[Dimension, Price | None] = {}
        self._plain_input: Dimension | None = None
        self._plain_output: Dimension | None = None
        self._kinds_apart: tuple[int, ...] | None = None
        self._dearest_input: Dimension | None = None
        self._is_of_text: bool | None = None

    def at(self, input_tokens: int, now: datetime) -> "Prices":
        """The same for a call of another size, at another moment."""
        return Prices(
            self.model, self.provider, self.layers, self.attributes, input_tokens, now, mode=self.mode, most=self.most
        )

    def find(self, dimension: Dimension) -> Price | None:
        """What is asked for a dimension under its own name; an override before what was imported."""
        try:
            return self._found[dimension]
        except KeyError:
            price = self._found[dimension] = self._looked_up(dimension)
            return price

    def _looked_up(self, dimension: Dimension) -> Price | None:
        for layer in self.layers:
            price = layer.find(dimension, self.attributes, self.input_tokens, self.now, most=self.most)
            if price is not None:
                return price
        return None

    def sells(self, dimension: Dimension) -> bool:
        """Whether there is a price of more than nothing, perhaps for other attributes than those that are asked for."""
        price = self.find(dimension)
        return price[0] > 0 if price is not None else any(layer.asks(dimension, self.now) for layer in self.layers)

    def missing(self, dimension: Dimension) -> ModelNotPriced:
        asked = f" for {attributes_text(self.attributes)}" if self.attributes else ""
        return ModelNotPriced(f"{self.model[:200]!r} has no price for {dimension}{asked[:200]}", param="model")

    def charged(self, dimension: Dimension) -> Price | None:
        """What a unit is charged at: at its own price, at one that is made of its row's and its column's, or as what it
        is a part of. A cache price that is missing, or nothing, falls back to the input's: cached tokens are never free."""
        try:
            return self._charged[dimension]
        except KeyError:
            price = self._charged[dimension] = self._charge(dimension)
            return price

    def _charge(self, dimension: Dimension) -> Price | None:
        price = self.find(dimension)
        if dimension in CACHE:
            return price if price and price[0] else self._cached(dimension)
        if price is None and dimension in _PLACES and dimension is not D.INPUT:
            return self.find(D.INPUT)
        return price

    def _cached(self, dimension: Dimension) -> Price | None:
        how, what = _PLACES[dimension]
        if what == 0:
            return self.charged(PART_OF[dimension])
        fresh, text = self.find(INPUT_CELLS[0][what]), self.charged(INPUT_CELLS[how][0])
        if fresh is None or text is None:
            return fresh or text
        plain = self.find(D.INPUT)
        # Never more than a token of the row and one of the column together, or more tokens would cost less.
        if plain is None:
            return fresh
        together, product = _summed(fresh, text), scaled(fresh, text, plain)
        return together if _is_dearer(product, together) else product

    def kinds_apart(self) -> tuple[int, ...]:
        """Which kinds of input tokens have prices of their own, as columns of INPUT_CELLS."""
        if self._kinds_apart is None:
            columns = range(1, len(INPUT_CELLS[0]))
            self._kinds_apart = tuple(
                what for what in columns if any(self.find(how[what]) is not None for how in INPUT_CELLS)
            )
        return self._kinds_apart

    def dearest_input(self) -> Dimension:
        """The dearest that an input token of which nothing is known may turn out to be."""
        if self._dearest_input is None:
            hows = [how for how in INPUT_CELLS if how is INPUT_CELLS[0] or any(self.find(cell) for cell in how)]
            self._dearest_input = self.dearest_of([how[what] for how in hows for what in (0, *self.kinds_apart())])
        return self._dearest_input

    def dearest_of(self, cells: Sequence[Dimension]) -> Dimension:
        """The dearest of them, the first of several that are; the first of all where none has a price."""
        most = dearest(*(self.charged(cell) for cell in cells))
        return next((cell for cell in cells if most is not None and self.charged(cell) == most), cells[0])

    @property
    def is_of_text(self) -> bool:
        """Whether tokens of which nothing is said are text, read and written."""
        if self._is_of_text is None:
            self._is_of_text = self.plain_input() is D.INPUT and self.plain_output() is D.OUTPUT
        return self._is_of_text

    def plain_input(self) -> Dimension:
        """What an input token is of which nothing is said: what the model is made to read, or text."""
        if self._plain_input is None:
            self._plain_input = self._plain(INPUT_CELLS[0], _READS.get(self.mode))
        return self._plain_input

    def plain_output(self) -> Dimension:
        """What an output token is of which nothing is said: an image of a model that makes images, or text."""
        if self._plain_output is None:
            self._plain_output = self._plain(_ANSWERS, _MAKES.get(self.mode))
        return self._plain_output

    def _plain(self, cells: tuple[Dimension, ...], made_for: Dimension | None) -> Dimension:
        if made_for is not None and self.find(made_for) is not None:
            return made_for
        if self.find(cells[0]) is not None:
            return cells[0]
        most = dearest(*(self.find(cell) for cell in cells[1:]))
        return next((cell for cell in cells[1:] if most is not None and self.find(cell) == most), cells[0])


_ANSWERS: Final = (D.OUTPUT, *OUTPUT_CELLS[2:])
_PLACES: Final = {cell: (how, what) for how, row in enumerate(INPUT_CELLS) for what, cell in enumerate(row)}
_MAKES: Final[Mapping[str, Dimension]] = {
    "image_generation": D.IMAGE_OUTPUT, "image_edit": D.IMAGE_OUTPUT, "audio_speech": D.AUDIO_OUTPUT,
    "video_generation": D.VIDEO_OUTPUT,
}  # fmt: skip
_READS: Final[Mapping[str, Dimension]] = {"audio_transcription": D.AUDIO_INPUT}
"""What the models of a mode answer in, and are given, where a usage does not say."""
