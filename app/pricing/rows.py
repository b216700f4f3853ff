"""The words of the price room: what is counted, what a call used, and the rows that prices are kept in."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from app.kernel.errors import InvalidField

PPM: Final = 1_000_000
ALWAYS: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""Since when a price holds that names no beginning."""


class Dimension(StrEnum):
    """What is counted and priced."""

    INPUT = "input"
    OUTPUT = "output"
    CACHE_READ = "cache_read"
    CACHE_WRITE_5M = "cache_write_5m"
    CACHE_WRITE_1H = "cache_write_1h"
    REASONING = "reasoning"
    AUDIO_INPUT = "audio_input"
    AUDIO_OUTPUT = "audio_output"
    IMAGE_INPUT = "image_input"
    IMAGE_OUTPUT = "image_output"
    IMAGES = "images"
    CHARACTERS = "characters"
    AUDIO_SECONDS = "audio_seconds"
    VIDEO_SECONDS = "video_seconds"
    PIXELS = "pixels"
    QUERIES = "queries"
    REQUESTS = "requests"


class Kind(StrEnum):
    """Which figure of the wire's cost a line belongs to."""

    INPUT = "input"
    OUTPUT = "output"
    CACHE_INPUT = "cache_input"
    MEDIA = "media"
    FEES = "fees"


D = Dimension
MEDIA: Final = (D.IMAGES, D.CHARACTERS, D.AUDIO_SECONDS, D.VIDEO_SECONDS, D.PIXELS)
CACHE: Final = frozenset({D.CACHE_READ, D.CACHE_WRITE_5M, D.CACHE_WRITE_1H})
PART_OF: Final[Mapping[Dimension, tuple[Dimension, ...]]] = MappingProxyType(
    {
        D.CACHE_READ: (D.INPUT,), D.CACHE_WRITE_5M: (D.INPUT,), D.CACHE_WRITE_1H: (D.CACHE_WRITE_5M, D.INPUT),
        D.AUDIO_INPUT: (D.INPUT,), D.IMAGE_INPUT: (D.INPUT,), D.REASONING: (D.OUTPUT,), D.AUDIO_OUTPUT: (D.OUTPUT,),
        D.IMAGE_OUTPUT: (D.OUTPUT,),
    }
)  # fmt: skip
"""What tokens are charged as, first that there is a price of, where they have none of their own."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call used. `input_tokens` includes the cached, audio and image ones, `output_tokens` the reasoning ones."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    image_input_tokens: int = 0
    image_output_tokens: int = 0
    images: int = 0
    characters: int = 0
    audio_seconds: int = 0
    video_seconds: int = 0
    pixels: int = 0
    queries: int = 0
    requests: int = 1
    """Charged only by models that have a price for each request."""

    def __post_init__(self) -> None:
        for name in _USAGE_FIELDS:
            assert getattr(self, name) >= 0, f"{name} is negative"

    def of(self, dimension: Dimension) -> int:
        return int(getattr(self, _COUNTED_IN[dimension]))


_COUNTED_IN: Final[Mapping[Dimension, str]] = MappingProxyType(
    {
        D.INPUT: "input_tokens", D.OUTPUT: "output_tokens", D.CACHE_READ: "cache_read_tokens",
        D.CACHE_WRITE_5M: "cache_write_tokens", D.CACHE_WRITE_1H: "cache_write_1h_tokens",
        D.REASONING: "reasoning_tokens", D.AUDIO_INPUT: "audio_input_tokens", D.AUDIO_OUTPUT: "audio_output_tokens",
        D.IMAGE_INPUT: "image_input_tokens", D.IMAGE_OUTPUT: "image_output_tokens", D.IMAGES: "images",
        D.CHARACTERS: "characters", D.AUDIO_SECONDS: "audio_seconds", D.VIDEO_SECONDS: "video_seconds",
        D.PIXELS: "pixels", D.QUERIES: "queries", D.REQUESTS: "requests",
    }
)  # fmt: skip
_USAGE_FIELDS: Final = tuple(field.name for field in fields(Usage))


@dataclass(frozen=True, slots=True)
class PriceRow:
    """One price, imported or an override. A later `effective_from` wins while both hold."""

    model: str
    provider: str
    dimension: Dimension
    price_pusd: int
    tier_min: int = 0
    attributes: str = ""
    effective_from: datetime = ALWAYS
    effective_to: datetime | None = None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """What a catalogue knows of a model besides its prices."""

    model: str
    provider: str
    mode: str = ""
    max_output_tokens: int | None = None
    context_tokens: int | None = None
    default_attributes: str = ""


@dataclass(frozen=True, slots=True)
class MarkupRow:
    """`scope` is account, model, provider or default: the first of them that has one decides alone."""

    scope: str
    subject: str
    multiplier_ppm: int = PPM
    fixed_per_request_nusd: int = 0
    effective_from: datetime = ALWAYS
    effective_to: datetime | None = None


@dataclass(frozen=True, slots=True)
class FeeRow:
    feature: str
    price_nusd: int
    effective_from: datetime = ALWAYS
    effective_to: datetime | None = None


def parse_attributes(text: str) -> dict[str, str]:
    """`quality=hd;size=1024x1024` as a dict, in small letters. Raises InvalidField for what is not in canonical form."""
    if not text:
        return {}
    pairs = [(name, value) for name, _, value in (pair.partition("=") for pair in text.lower().split(";"))]
    names = [name for name, _ in pairs]
    if any(not name or not value for name, value in pairs) or any(a >= b for a, b in pairwise(names)):
        raise InvalidField(f"attributes are name=value pairs sorted by name, got {text[:100]!r}", param="attributes")
    return dict(pairs)


def attributes_text(attributes: Mapping[str, str]) -> str:
    """The canonical text: names sorted, `;` between them, all in small letters, as calls are matched."""
    return ";".join(f"{name}={attributes[name]}" for name in sorted(attributes)).lower()
