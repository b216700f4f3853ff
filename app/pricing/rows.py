"""The words of the price room: what is counted, what a call used, and the rows that prices are kept in."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType
from typing import Final

import msgspec
from msgspec.structs import astuple

from app.kernel.errors import InvalidField

PPM: Final = 1_000_000
ALWAYS: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""Since when a price holds that names no beginning."""


class Dimension(StrEnum):
    """What is counted and priced."""

    INPUT = "input"
    AUDIO_INPUT = "audio_input"
    IMAGE_INPUT = "image_input"
    VIDEO_INPUT = "video_input"
    CACHE_READ = "cache_read"
    CACHE_READ_AUDIO = "cache_read_audio"
    CACHE_READ_IMAGE = "cache_read_image"
    CACHE_READ_VIDEO = "cache_read_video"
    CACHE_WRITE_5M = "cache_write_5m"
    CACHE_WRITE_5M_AUDIO = "cache_write_5m_audio"
    CACHE_WRITE_5M_IMAGE = "cache_write_5m_image"
    CACHE_WRITE_5M_VIDEO = "cache_write_5m_video"
    CACHE_WRITE_1H = "cache_write_1h"
    CACHE_WRITE_1H_AUDIO = "cache_write_1h_audio"
    CACHE_WRITE_1H_IMAGE = "cache_write_1h_image"
    CACHE_WRITE_1H_VIDEO = "cache_write_1h_video"
    CACHE_WRITE_12H = "cache_write_12h"
    CACHE_WRITE_12H_AUDIO = "cache_write_12h_audio"
    CACHE_WRITE_12H_IMAGE = "cache_write_12h_image"
    CACHE_WRITE_12H_VIDEO = "cache_write_12h_video"
    OUTPUT = "output"
    REASONING = "reasoning"
    AUDIO_OUTPUT = "audio_output"
    IMAGE_OUTPUT = "image_output"
    VIDEO_OUTPUT = "video_output"
    IMAGES = "images"
    CHARACTERS = "characters"
    AUDIO_SECONDS = "audio_seconds"
    VIDEO_SECONDS = "video_seconds"
    PIXELS = "pixels"
    QUERIES = "queries"
    REQUESTS = "requests"


_READ: Final = {
    "input": "read afresh",
    "cache_read": "read from the prompt cache",
    "cache_write_5m": "written to the prompt cache for 5 minutes",
    "cache_write_1h": "written to the prompt cache for an hour",
    "cache_write_12h": "written to the prompt cache for 12 hours",
}
_OTHERS: Final = {
    "output": "a token of output: text, and whatever else has no price of its own",
    "reasoning": "a token of output that was thought and not shown",
    "audio_output": "a token of output, of audio",
    "image_output": "a token of output, of images",
    "video_output": "a token of output, of video",
    "images": "an image that was made",
    "characters": "a character of text that was spoken",
    "audio_seconds": "a second of audio, in or out",
    "video_seconds": "a second of video that was made",
    "pixels": "a pixel of an image that was made",
    "queries": "a search or a rerank query",
    "requests": "a call, whatever it used",
}


def explained(dimension: Dimension) -> str:
    """What one unit of it is, in a person's words."""
    if dimension in _OTHERS:
        return _OTHERS[dimension]
    for medium in ("audio", "image", "video"):
        if medium in dimension.split("_"):
            how = dimension.removeprefix(f"{medium}_").removesuffix(f"_{medium}")
            return f"a token of {medium} {_READ[how]}"
    return f"a token {_READ[dimension]}"


class Kind(StrEnum):
    """Which figure of the wire's cost a line belongs to."""

    INPUT = "input"
    OUTPUT = "output"
    CACHE_INPUT = "cache_input"
    MEDIA = "media"
    FEES = "fees"


D = Dimension
MEDIA: Final = (D.IMAGES, D.CHARACTERS, D.AUDIO_SECONDS, D.VIDEO_SECONDS, D.PIXELS)
INPUT_CELLS: Final = (
    (D.INPUT, D.AUDIO_INPUT, D.IMAGE_INPUT, D.VIDEO_INPUT),
    (D.CACHE_READ, D.CACHE_READ_AUDIO, D.CACHE_READ_IMAGE, D.CACHE_READ_VIDEO),
    (D.CACHE_WRITE_5M, D.CACHE_WRITE_5M_AUDIO, D.CACHE_WRITE_5M_IMAGE, D.CACHE_WRITE_5M_VIDEO),
    (D.CACHE_WRITE_1H, D.CACHE_WRITE_1H_AUDIO, D.CACHE_WRITE_1H_IMAGE, D.CACHE_WRITE_1H_VIDEO),
    (D.CACHE_WRITE_12H, D.CACHE_WRITE_12H_AUDIO, D.CACHE_WRITE_12H_IMAGE, D.CACHE_WRITE_12H_VIDEO),
)
"""A token of the input stands on two axes: how it was read (a row) and what it is (a column, text first)."""
OUTPUT_CELLS: Final = (D.OUTPUT, D.REASONING, D.AUDIO_OUTPUT, D.IMAGE_OUTPUT, D.VIDEO_OUTPUT)
"""A token of the output stands on one: plain text first."""
CACHE: Final = frozenset(cell for how in INPUT_CELLS[1:] for cell in how)
PART_OF: Final[Mapping[Dimension, Dimension]] = MappingProxyType(
    dict.fromkeys(INPUT_CELLS[0][1:], D.INPUT)
    | dict.fromkeys(OUTPUT_CELLS[1:], D.OUTPUT)
    | {what: how[0] for how in INPUT_CELLS[1:] for what in how[1:]}
    | {D.CACHE_READ: D.INPUT, D.CACHE_WRITE_5M: D.INPUT, D.CACHE_WRITE_1H: D.CACHE_WRITE_5M, D.CACHE_WRITE_12H: D.CACHE_WRITE_1H}
)  # fmt: skip
"""Whose prices a price goes with: what tokens are charged as that have no price, and how a missing cell is derived."""


class Usage(msgspec.Struct, frozen=True):
    """What a call used. `input_tokens` includes the cached, audio, image and video ones, `output_tokens` the reasoning ones.

    A part that was not told is None. `cache_read_audio_tokens` and its like stand on both axes of the input: they are
    counted among the cached tokens and among the audio ones.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    cache_write_12h_tokens: int | None = None
    reasoning_tokens: int | None = None
    audio_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    image_input_tokens: int | None = None
    image_output_tokens: int | None = None
    video_input_tokens: int | None = None
    video_output_tokens: int | None = None
    cache_read_audio_tokens: int | None = None
    cache_read_image_tokens: int | None = None
    cache_read_video_tokens: int | None = None
    cache_write_audio_tokens: int | None = None
    cache_write_image_tokens: int | None = None
    cache_write_video_tokens: int | None = None
    images: int = 0
    characters: int = 0
    audio_seconds: int = 0
    video_seconds: int = 0
    pixels: int = 0
    queries: int = 0
    requests: int = 1
    """Charged only by models that have a price for each request."""

    def __post_init__(self) -> None:
        assert min(filter(None, astuple(self)), default=0) >= 0, "a count is negative"

    @property
    def is_text(self) -> bool:
        """Whether nothing is told but tokens of text, read somehow and written."""
        return not any(astuple(self)[_BEYOND_TEXT])

    def of(self, dimension: Dimension) -> int:
        return getattr(self, COUNTED_IN[dimension]) or 0


COUNTED_IN: Final[Mapping[Dimension, str]] = MappingProxyType(
    {
        D.INPUT: "input_tokens", D.OUTPUT: "output_tokens", D.CACHE_READ: "cache_read_tokens",
        D.CACHE_WRITE_5M: "cache_write_tokens", D.CACHE_WRITE_1H: "cache_write_1h_tokens",
        D.CACHE_WRITE_12H: "cache_write_12h_tokens", D.REASONING: "reasoning_tokens",
        D.AUDIO_INPUT: "audio_input_tokens", D.AUDIO_OUTPUT: "audio_output_tokens",
        D.IMAGE_INPUT: "image_input_tokens", D.IMAGE_OUTPUT: "image_output_tokens",
        D.VIDEO_INPUT: "video_input_tokens", D.VIDEO_OUTPUT: "video_output_tokens",
        D.CACHE_READ_AUDIO: "cache_read_audio_tokens", D.CACHE_READ_IMAGE: "cache_read_image_tokens",
        D.CACHE_READ_VIDEO: "cache_read_video_tokens", D.CACHE_WRITE_5M_AUDIO: "cache_write_audio_tokens",
        D.CACHE_WRITE_5M_IMAGE: "cache_write_image_tokens", D.CACHE_WRITE_5M_VIDEO: "cache_write_video_tokens",
        D.IMAGES: "images", D.CHARACTERS: "characters", D.AUDIO_SECONDS: "audio_seconds",
        D.VIDEO_SECONDS: "video_seconds", D.PIXELS: "pixels", D.QUERIES: "queries", D.REQUESTS: "requests",
    }
)  # fmt: skip
"""Where a usage tells how many there were. What is not here cannot be told by itself."""
_BEYOND_TEXT: Final = slice(
    Usage.__struct_fields__.index("reasoning_tokens"), Usage.__struct_fields__.index("requests")
)


@dataclass(frozen=True, slots=True)
class PriceRow:
    """One price, imported or an override: `price_pusd` for `per_units` of a dimension, such as 60 seconds.

    A later `effective_from` wins while both hold.
    """

    model: str
    provider: str
    dimension: Dimension
    price_pusd: int
    tier_min: int = 0
    attributes: str = ""
    effective_from: datetime = ALWAYS
    effective_to: datetime | None = None
    per_units: int = 1


@dataclass(frozen=True, slots=True)
class ModelRow:
    """What a catalogue knows of a model besides its prices. `match` is JSON: which names of others mean it."""

    model: str
    provider: str
    mode: str = ""
    max_output_tokens: int | None = None
    context_tokens: int | None = None
    default_attributes: str = ""
    match: str = ""


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
