"""The models that are sold, as OpenRouter tells them."""

from collections.abc import Mapping
from typing import Final

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery

from app.kernel.db import Database
from app.kernel.errors import InvalidField
from app.pricing.api import ModelView, model_named, models_of
from app.pricing.catalogue import Catalogues

_KIND_OF: Final = {"text": "chat", "image": "image", "video": "video", "audio": "audio", "embeddings": "embedding"}
"""By what a model puts out, in OpenRouter's word."""
_PUTS_OUT: Final = {kind: word for word, kind in _KIND_OF.items()}
_PRICES: Final[Mapping[str, str]] = {
    "prompt": "input", "completion": "output", "request": "requests", "image": "image_input", "audio": "audio_input",
    "audio_output": "audio_output", "image_output": "image_output", "internal_reasoning": "reasoning",
    "input_cache_read": "cache_read", "input_cache_write": "cache_write_5m", "input_cache_write_1h": "cache_write_1h",
    "input_audio_cache": "cache_read_audio",
}  # fmt: skip
"""Their word for a price, and ours."""


class Architecture(msgspec.Struct, frozen=True):
    modality: str
    input_modalities: list[str]
    output_modalities: list[str]
    tokenizer: str = "Other"
    instruct_type: None = None


class TopProvider(msgspec.Struct, frozen=True):
    context_length: int | None
    max_completion_tokens: int | None
    is_moderated: bool = False


class OpenRouterModel(msgspec.Struct, frozen=True):
    """A model in OpenRouter's words: `pricing` is USD a token, request or image, each as a text. `/v1/models` has every price."""

    id: str
    canonical_slug: str
    name: str
    created: int
    description: str
    context_length: int | None
    architecture: Architecture
    pricing: dict[str, str]
    top_provider: TopProvider
    owned_by: str
    per_request_limits: None = None
    supported_parameters: list[str] = []
    object: str = "model"

    @classmethod
    def of(cls, model: ModelView) -> "OpenRouterModel":
        out = _PUTS_OUT.get(model.type, model.type)
        read = "audio" if model.mode == "audio_transcription" else "text"
        written = "text" if model.mode == "audio_transcription" else out
        priced = {theirs: model.pricing[ours] for theirs, ours in _PRICES.items() if ours in model.pricing}
        return cls(
            id=model.id,
            canonical_slug=model.id,
            name=model.name,
            created=model.created,
            description="",
            context_length=model.context_length,
            architecture=Architecture(f"{read}->{written}", [read], [written]),
            pricing={"prompt": "0", "completion": "0"} | {name: bytes(usd).decode() for name, usd in priced.items()},
            top_provider=TopProvider(model.context_length, model.max_output_tokens),
            owned_by=model.owned_by,
        )


class OpenRouterModels(msgspec.Struct, frozen=True):
    data: list[OpenRouterModel]
    object: str = "list"


@get("/api/v1/models", tags=["OpenRouter"], summary="The models, as OpenRouter tells them")
async def list_openrouter_models(
    reads: NamedDependency[Database],
    read_catalogues: NamedDependency[Catalogues],
    output_modalities: FromQuery[str | None] = None,
) -> OpenRouterModels:
    """Those that put out text, or `output_modalities`: text, image, video, audio, embeddings, several with commas, or all."""
    found = await models_of(read_catalogues, reads, _kinds(output_modalities))
    return OpenRouterModels([OpenRouterModel.of(model) for model in found])


@get("/api/v1/models/{model_id:path}", tags=["OpenRouter"], summary="One model, as OpenRouter tells it")
async def read_openrouter_model(
    reads: NamedDependency[Database], read_catalogues: NamedDependency[Catalogues], model_id: FromPath[str]
) -> OpenRouterModel:
    """By the name that a call may have for it, for OpenAI's clients with this as their base URL."""
    return OpenRouterModel.of(await model_named(read_catalogues, reads, model_id))


def _kinds(text: str | None) -> frozenset[str] | None:
    """Raises InvalidField."""
    words = {"text"} if text is None else {word.strip().lower() for word in text.split(",")}
    if not words <= {*_KIND_OF, "all"}:
        raise InvalidField(
            f"output_modalities is one of {', '.join(_KIND_OF)} and all, or several with commas",
            param="output_modalities",
        )
    return None if "all" in words else frozenset(_KIND_OF[word] for word in words)
