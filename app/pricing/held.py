"""What a call is held for before it is made: the dearest that its estimate allows."""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

import msgspec
from msgspec.structs import replace

from app.kernel.errors import InvalidField
from app.pricing.axes import input_sums, input_tokens
from app.pricing.rows import CACHE, COUNTED_IN, INPUT_CELLS, MEDIA, OUTPUT_CELLS, Dimension, Kind, Usage
from app.pricing.sheet import Price, Prices, dearest
from app.pricing.used import (
    JOINT,
    Used,
    by_pixels,
    each,
    is_kind_told,
    is_reading_told,
    is_told_in_tokens,
    pixels_of_one,
    put,
)

D = Dimension


class Call(msgspec.Struct, frozen=True):
    """Which model is called, by whom, and how: `attributes` are quality, size, resolution, service_tier, …

    The account's id is written as text only where there are markups to be looked for."""

    model: str
    provider: str = ""
    account: UUID | str = ""
    attributes: Mapping[str, str] = MappingProxyType({})
    features: tuple[str, ...] = ()


class Ask(msgspec.Struct, frozen=True):
    """What a call will use at most: what is known of its input, and how long each of `n` answers may be."""

    call: Call
    usage: Usage = Usage()
    max_output_tokens: int | None = None
    n: int = 1


def held(prices: Prices, ask: Ask, tokens: int) -> Used:
    """What a call may be charged for whose answers have so many tokens each. Raises ModelNotPriced."""
    used = Used(answer_tokens=tokens)
    _held_media(prices, ask, tokens, used)
    is_sold_by_media = bool(used.lines)
    for cell, units in _held_input(prices, ask.usage):
        price = prices.charged(cell)
        if price is not None or not is_sold_by_media:
            put(used, Kind.CACHE_INPUT if cell in CACHE else Kind.INPUT, cell, units, price)
    for part, units in _held_output(prices, ask.usage, tokens * ask.n):
        price = prices.find(part)
        if price is not None or not is_sold_by_media:
            put(used, Kind.OUTPUT, part, units, price)
    each(prices, ask.usage, used)
    if used.unpriced:
        raise prices.missing(used.unpriced[0])
    return used


def _held_input(prices: Prices, usage: Usage) -> Iterator[tuple[Dimension, int]]:
    """The input by the dearest cells that it may turn out to be in. An axis that the estimate says nothing of is open."""
    knows_how, knows_what = is_reading_told(usage), is_kind_told(usage)
    if not knows_how and not knows_what:
        if usage.input_tokens:
            yield prices.dearest_input(), usage.input_tokens
        return
    apart = prices.kinds_apart()
    if knows_how and knows_what:
        yield from input_tokens(usage, apart, prices.charged, most=True).units.items()
        return
    rows, columns = input_sums(usage)
    if knows_how:
        for how, units in zip(INPUT_CELLS, rows, strict=True):
            if units:
                yield prices.dearest_of([how[what] for what in (0, *apart)]), units
        return
    hows = [how for how in INPUT_CELLS if how is INPUT_CELLS[0] or any(prices.find(cell) for cell in how)]
    for what, units in enumerate(columns):
        if units:
            yield prices.dearest_of([how[what if what in apart else 0] for how in hows]), units


def _held_output(prices: Prices, usage: Usage, total: int) -> Iterator[tuple[Dimension, int]]:
    """The output as the dearest that the model can answer in, but for what the estimate says of it."""
    text = D.OUTPUT if prices.find(D.OUTPUT) is not None else prices.plain_output()
    told = {part: usage.of(part) for part in OUTPUT_CELLS[2:] if getattr(usage, COUNTED_IN[part]) is not None}
    parts = sum(told.values())
    for part, units in told.items():
        if units:
            yield (part if prices.find(part) is not None else text), units
    rest = total - parts if parts <= total else total
    if rest:
        yield _dearest_part(prices, (text, D.REASONING) if told else (text, *OUTPUT_CELLS[1:])), rest


def _dearest_part(prices: Prices, parts: tuple[Dimension, ...]) -> Dimension:
    most = dearest(*(prices.find(part) for part in parts))
    return next((part for part in parts if most is not None and prices.find(part) == most), parts[0])


def _held_media(prices: Prices, ask: Ask, tokens: int, used: Used) -> None:
    for dimension in MEDIA[1:]:
        if units := ask.usage.of(dimension):
            price = prices.find(dimension)
            if price is not None or not is_told_in_tokens(prices, ask.usage, dimension):
                put(used, Kind.MEDIA, dimension, units, price)
    if images := _images(prices, ask, tokens):
        _held_images(prices, images, tokens, used)


def _held_images(prices: Prices, images: int, tokens: int, used: Used) -> None:
    """By the image or by the tokens that it is made of, whatever is dearer."""
    offers: list[tuple[Kind, Dimension, int, Price]] = []
    if (price := prices.find(D.IMAGES)) is not None:
        offers.append((Kind.MEDIA, D.IMAGES, images, price))
    elif (each := by_pixels(prices, Usage())) is not None:
        offers.append((Kind.MEDIA, D.PIXELS, images * each[0], each[1]))
    by_token = prices.find(D.IMAGE_OUTPUT)
    if by_token is not None and not tokens:
        offers.append((Kind.OUTPUT, D.IMAGE_OUTPUT, images * _tokens_of_one(prices.attributes), by_token))
    if offers:
        used.lines.append(max(offers, key=lambda offer: Fraction(offer[2] * offer[3][0], offer[3][1])))
    elif by_token is None:
        used.unpriced.append(D.IMAGES)


def _images(prices: Prices, ask: Ask, tokens: int) -> int:
    """How many images will be made: as many as it is said, or one for each of the answers of a model that makes images.

    Raises InvalidField where they are sold by the pixel and it is not said how large they are.
    """
    if any(ask.usage.of(dimension) for dimension in MEDIA) or tokens:
        return ask.usage.images
    if prices.find(D.OUTPUT) is not None and prices.plain_output() is not D.IMAGE_OUTPUT:
        return 0
    if prices.sells(D.IMAGES):
        return ask.n
    if prices.sells(D.PIXELS):
        if not pixels_of_one(prices.attributes):
            raise InvalidField(
                f"{prices.model[:200]!r} is sold by the pixel: say size as 1024x1024", param="estimate.size"
            )
        return ask.n
    is_said = ask.usage.input_tokens or ask.call.attributes
    return ask.n if is_said and prices.sells(D.IMAGE_OUTPUT) else 0


_TOKENS_OF_A_SQUARE: Final[Mapping[str, int]] = MappingProxyType({"low": 272, "medium": 1056})
"""Of 1024x1024, as OpenAI's image models count them; as many more as an image is larger. Source: OpenAI, "Image generation"."""
_MOST_TOKENS_OF_A_SQUARE: Final = 4160
_MOST_PIXELS: Final = 1024 * 1536


def _tokens_of_one(attributes: Mapping[str, str]) -> int:
    """How many tokens an image is made of at most; what is not said is taken to be the most."""
    square = _TOKENS_OF_A_SQUARE.get(attributes.get("quality", ""), _MOST_TOKENS_OF_A_SQUARE)
    return -(-square * (pixels_of_one(attributes) or _MOST_PIXELS) // 1024**2)


def answers_in_no_tokens(prices: Prices, most_tokens: int | None) -> bool:
    """Whether an answer has no text, or is an image whose tokens are counted by its size."""
    return prices.find(D.OUTPUT) is None or (most_tokens is None and prices.plain_output() is D.IMAGE_OUTPUT)


def with_input(ask: Ask, tokens: int) -> Ask:
    """The same call with so much input; what its parts are is open where they do not fit any more."""
    rows, columns = input_sums(ask.usage)
    parts = (*(how[0] for how in INPUT_CELLS[1:]), *INPUT_CELLS[0][1:], *JOINT)
    is_fit = max(sum(rows[1:]), sum(columns[1:])) <= tokens
    open_parts: dict[str, Any] = {} if is_fit else {COUNTED_IN[part]: None for part in parts}
    return replace(ask, usage=replace(ask.usage, input_tokens=tokens, **open_parts))


_TOLD_IN: Final[Mapping[Dimension, str]] = MappingProxyType(
    {
        D.CHARACTERS: "characters", D.VIDEO_SECONDS: "video_seconds", D.AUDIO_SECONDS: "audio_seconds",
        D.INPUT: "input_tokens", D.IMAGES: "images", D.QUERIES: "queries",
    }
)  # fmt: skip
"""Where an estimate tells how much of something there will be."""


def must_be_free(prices: Prices) -> None:
    """Raises InvalidField if a model of which no use is foreseen has a price for any: that is not told, not free."""
    sold = [dimension for dimension in Dimension if prices.sells(dimension)]
    for dimension, name in _TOLD_IN.items():
        if dimension in sold:
            raise InvalidField(
                f"{prices.model[:200]!r} is priced by {dimension}: say how many in estimate.{name}",
                param=f"estimate.{name}",
            )
    if sold:
        raise InvalidField(
            f"{prices.model[:200]!r} is priced by {', '.join(sold)}, which an estimate cannot tell: give max_cost_usd",
            param="max_cost_usd",
        )
