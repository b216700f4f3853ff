"""What a usage is charged for: its counts as units of what has a price, each counted once."""

from collections.abc import Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Final

import msgspec
from msgspec.structs import replace

from app.pricing.axes import by_reading, input_tokens, output_tokens, text_tokens
from app.pricing.rows import CACHE, COUNTED_IN, INPUT_CELLS, MEDIA, OUTPUT_CELLS, Dimension, Kind, Usage
from app.pricing.sheet import Price, Prices

D = Dimension
_MADE_OF: Final[Mapping[Dimension, tuple[Dimension, ...]]] = MappingProxyType(
    {D.IMAGES: (D.IMAGE_OUTPUT,), D.PIXELS: (D.IMAGE_OUTPUT,), D.AUDIO_SECONDS: (D.AUDIO_INPUT, D.AUDIO_OUTPUT)}
)
"""The same thing counted in another unit: it is charged once, in the unit that the model is priced by."""


class Used(msgspec.Struct):
    """What was used, in which units, at which price; what has no price; and what was assumed of it."""

    lines: list[tuple[Kind, Dimension, int, Price]] = []
    unpriced: list[Dimension] = []
    flags: list[str] = []
    answer_tokens: int = 0


def used_by(prices: Prices, usage: Usage) -> Used:
    """What a usage is charged for."""
    used = Used()
    if usage.is_text and prices.is_of_text:
        _text(prices, usage, used)
    else:
        covered = _media(prices, usage, used)
        # A model that is sold by the image or the second need have no price for the tokens it counts besides.
        is_sold_by_media = bool(used.lines)
        _input(prices, usage, covered, used, is_sold_by_media)
        _output(prices, usage, covered, used, is_sold_by_media)
    each(prices, usage, used)
    return used


def each(prices: Prices, usage: Usage, used: Used) -> None:
    if usage.queries:
        put(used, Kind.FEES, D.QUERIES, usage.queries, prices.find(D.QUERIES))
    if usage.requests and (price := prices.find(D.REQUESTS)) is not None:
        used.lines.append((Kind.FEES, D.REQUESTS, usage.requests, price))


def put(used: Used, kind: Kind, dimension: Dimension, units: int, price: Price | None) -> None:
    if price is None:
        used.unpriced.append(dimension)
    else:
        used.lines.append((kind, dimension, units, price))


def _media(prices: Prices, usage: Usage, used: Used) -> set[Dimension]:
    """Charge what is not counted in tokens; which tokens are the same thing counted again, and are charged so."""
    covered: set[Dimension] = set()
    counts = _media_of(usage)
    if not any(counts):
        return covered
    for dimension, units in zip(MEDIA, counts, strict=True):
        if not units:
            continue
        price = prices.find(dimension)
        if price is not None:
            used.lines.append((Kind.MEDIA, dimension, units, price))
            covered.update(_MADE_OF.get(dimension, ()))
        elif dimension is D.IMAGES and (each := by_pixels(prices, usage)) is not None:
            used.lines.append((Kind.MEDIA, D.PIXELS, units * each[0], each[1]))
            covered.update(_MADE_OF[D.PIXELS])
        elif not is_told_in_tokens(prices, usage, dimension):
            used.unpriced.append(dimension)
    return covered


_media_of: Final = attrgetter(*(COUNTED_IN[dimension] for dimension in MEDIA))


def by_pixels(prices: Prices, usage: Usage) -> tuple[int, Price] | None:
    """An image's pixels and their price, where images are sold by them."""
    price, pixels = prices.find(D.PIXELS), pixels_of_one(prices.attributes)
    return (pixels, price) if price is not None and pixels and not usage.pixels else None


def is_told_in_tokens(prices: Prices, usage: Usage, dimension: Dimension) -> bool:
    """Whether what is counted here is counted in tokens too, which pay for it."""
    for part in _MADE_OF.get(dimension, ()):
        if usage.of(part):
            return True
        if part in OUTPUT_CELLS and usage.output_tokens and prices.plain_output() is part:
            return True
        if part in INPUT_CELLS[0] and usage.input_tokens and prices.plain_input() is part:
            return True
    return False


def pixels_of_one(attributes: Mapping[str, str]) -> int:
    """An image's pixels, where its size is said as `1024x1024`; else 0."""
    width, _, height = attributes.get("size", "").partition("x")
    is_size = width.isascii() and height.isascii() and width.isdigit() and height.isdigit()
    return int(width) * int(height) if is_size and len(width) < 7 and len(height) < 7 else 0


def _input(prices: Prices, usage: Usage, covered: set[Dimension], used: Used, is_sold_by_media: bool) -> None:
    plain = prices.plain_input()
    if plain is not D.INPUT and not is_kind_told(usage):
        usage = replace(usage, **{COUNTED_IN[plain]: usage.input_tokens})
    tokens = text_tokens(usage)
    if tokens is None:
        tokens = input_tokens(usage, _whats(prices, usage, covered), lambda cell: _unless(covered, prices, cell))
    if tokens.flags:
        used.flags.extend(tokens.flags)
    is_unsold = is_sold_by_media and prices.find(plain) is None
    for cell, units in tokens.units.items():
        if covered and _column(cell) in covered:
            continue
        price = prices.find(cell) if is_unsold else prices.charged(cell) or prices.charged(plain)
        if price is not None or not is_unsold:
            put(used, Kind.CACHE_INPUT if cell in CACHE else Kind.INPUT, cell, units, price)


JOINT: Final = tuple(cell for how in INPUT_CELLS[1:] for cell in how[1:] if cell in COUNTED_IN)
_kinds_of: Final = attrgetter(*(COUNTED_IN[kind] for kind in (*INPUT_CELLS[0][1:], *JOINT)))
_readings_of: Final = attrgetter(*(COUNTED_IN[cell] for cell in (*(how[0] for how in INPUT_CELLS[1:]), *JOINT)))
_answers_of: Final = attrgetter(*(COUNTED_IN[part] for part in OUTPUT_CELLS[2:]))
_NOTHING: Final = frozenset({None})


def is_kind_told(usage: Usage) -> bool:
    return not _NOTHING.issuperset(_kinds_of(usage))


def is_reading_told(usage: Usage) -> bool:
    return not _NOTHING.issuperset(_readings_of(usage))


def _unless(covered: set[Dimension], prices: Prices, cell: Dimension) -> Price | None:
    return (0, 1) if _column(cell) in covered else prices.charged(cell)


def _column(cell: Dimension) -> Dimension:
    return _COLUMNS[cell]


_COLUMNS: Final = {cell: INPUT_CELLS[0][what] for how in INPUT_CELLS for what, cell in enumerate(how)}


def _whats(prices: Prices, usage: Usage, covered: set[Dimension]) -> tuple[int, ...]:
    """Which kinds of input tokens there are that are priced apart, or were paid for otherwise."""
    if not is_kind_told(usage):
        return ()
    paid = (what for what, kind in enumerate(INPUT_CELLS[0]) if kind in covered)
    return tuple({*prices.kinds_apart(), *paid})


def _text(prices: Prices, usage: Usage, used: Used) -> None:
    """What most calls are: text read and written, by a model that is made for it."""
    tokens = by_reading(usage)
    if tokens.flags:
        used.flags.extend(tokens.flags)
    for cell, units in tokens.units.items():
        put(used, Kind.CACHE_INPUT if cell in CACHE else Kind.INPUT, cell, units, prices.charged(cell))
    if usage.output_tokens:
        put(used, Kind.OUTPUT, D.OUTPUT, usage.output_tokens, prices.find(D.OUTPUT))


def _output(prices: Prices, usage: Usage, covered: set[Dimension], used: Used, is_sold_by_media: bool) -> None:
    is_told = not _NOTHING.issuperset(_answers_of(usage))
    plain = prices.plain_output()
    text = D.OUTPUT if prices.find(D.OUTPUT) is not None else plain

    def stands_for(part: Dimension) -> Dimension:
        return part if part in covered or prices.find(part) is not None else text

    tokens = output_tokens(usage, text if is_told else plain, stands_for)
    if tokens.flags:
        used.flags.extend(flag for flag in tokens.flags if flag not in used.flags)
    is_unsold = is_sold_by_media and prices.find(text) is None
    for part, units in tokens.units.items():
        if part not in covered and (not is_unsold or prices.find(part) is not None):
            put(used, Kind.OUTPUT, part, units, prices.find(part))
