"""What kind of model it is, and how long a text it takes: what a list of models tells besides prices."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

from app.kernel.errors import InvalidField
from app.pricing.quote import DEFAULT_OUTPUT_TOKENS, Catalogue
from app.pricing.rows import Dimension

KINDS: Final = ("chat", "image", "video", "audio", "embedding")
MEDIA_KINDS: Final = ("image", "video", "audio")
OTHER: Final = "other"
"""Neither of those, such as a reranker or a moderator: listed with `all` alone."""

_OF_MODE: Final[Mapping[str, str]] = MappingProxyType(
    dict.fromkeys(("chat", "completion", "responses", "realtime"), "chat")
    | dict.fromkeys(("image_generation", "image_edit"), "image")
    | {"video_generation": "video", "embedding": "embedding"}
    | dict.fromkeys(("audio_speech", "audio_transcription"), "audio")
)
"""The words of LiteLLM's map, in which price files say what a model is for."""

D = Dimension
_OF_PRICES: Final = (
    ("video", {D.VIDEO_SECONDS, D.VIDEO_OUTPUT}),
    ("image", {D.IMAGES, D.PIXELS}),
    ("audio", {D.CHARACTERS, D.AUDIO_SECONDS}),
    ("chat", {D.OUTPUT}),
    ("image", {D.IMAGE_OUTPUT}),
    ("audio", {D.AUDIO_OUTPUT}),
    ("embedding", {D.INPUT}),
)
"""What is sold tells it where a price file does not: the first that it has a price for."""


def kind_of(mode: str, priced: Collection[str]) -> str:
    """By the word of the price file, or by the dimensions that have a price."""
    if mode:
        return _OF_MODE.get(mode, OTHER)
    return next((kind for kind, dimensions in _OF_PRICES if dimensions & set(priced)), OTHER)


def kinds_asked(text: str | None, param: str = "type") -> frozenset[str] | None:
    """`chat`, or `image,video`, or `all`, which is None, as is nothing. Raises InvalidField."""
    if text is None:
        return None
    words = {word.strip().lower() for word in text.split(",")}
    if not words <= {*KINDS, "all"}:
        raise InvalidField(f"{param} is one of {', '.join(KINDS)} and all, or several with commas", param=param)
    return None if "all" in words else frozenset(words)


def context_tokens(catalogue: Catalogue, model: str, provider: str, kind: str) -> int | None:
    """How many tokens a call may have, its answer included; None where it is not told, but for a chat model never.

    Some price files know it of one provider and not of another that sells the same model: then the least that one of them
    takes. Of a model of which none knows it, the longest answer is what we know that it takes, and where that is not known
    either, as long an answer as a call of it is held for.
    """
    about = catalogue.about(model, provider)
    others = (catalogue.about(model, other).context_tokens for other in catalogue.providers_of(model))
    known = about.context_tokens or min(filter(None, others), default=None)
    if known is not None or kind != "chat":
        return known
    return about.max_output_tokens or DEFAULT_OUTPUT_TOKENS
