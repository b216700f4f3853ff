"""What a call used, and in how many shapes the providers say so."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from msgspec import Struct


class Counts(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a call used, in the words of a meter: `input_tokens` with all that was cached, `output_tokens` with reasoning.

    `cache_write_tokens` are those kept for five minutes. `audio_seconds` are as exact as the recording tells.
    """

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
    audio_seconds: float = 0
    video_seconds: int = 0
    queries: int = 0


Usage = dict[str, Any]


def openai(counts: Counts) -> Usage:
    """Source: OpenAI API reference, "The chat completion object"."""
    return {
        **_totals(counts),
        "prompt_tokens_details": {
            "cached_tokens": counts.cache_read_tokens,
            "audio_tokens": counts.audio_input_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": counts.reasoning_tokens,
            "audio_tokens": counts.audio_output_tokens,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def deepseek(counts: Counts) -> Usage:
    """Source: DeepSeek API docs, "Create chat completion": hits and misses beside OpenAI's details."""
    details = {"completion_tokens_details": {"reasoning_tokens": counts.reasoning_tokens}}
    return {
        **_totals(counts),
        "prompt_tokens_details": {"cached_tokens": counts.cache_read_tokens},
        **(details if counts.reasoning_tokens else {}),
        "prompt_cache_hit_tokens": counts.cache_read_tokens,
        "prompt_cache_miss_tokens": counts.input_tokens - counts.cache_read_tokens,
    }


def gemini(counts: Counts) -> Usage:
    """Gemini's OpenAI layer counts thinking in the total alone: output is at least total − prompt."""
    visible = counts.output_tokens - counts.reasoning_tokens
    usage: Usage = {
        "prompt_tokens": counts.input_tokens,
        "completion_tokens": visible,
        "total_tokens": counts.input_tokens + counts.output_tokens,
    }
    if counts.cache_read_tokens:
        usage["prompt_tokens_details"] = {"cached_tokens": counts.cache_read_tokens}
    return usage


def xai(counts: Counts) -> Usage:
    """xAI counts reasoning beside the completion, and both in the total. Source: xAI docs, "Chat completions"."""
    return {
        "prompt_tokens": counts.input_tokens,
        "completion_tokens": counts.output_tokens - counts.reasoning_tokens,
        "total_tokens": counts.input_tokens + counts.output_tokens,
        "prompt_tokens_details": {
            "text_tokens": counts.input_tokens - counts.image_input_tokens - counts.audio_input_tokens,
            "audio_tokens": counts.audio_input_tokens,
            "image_tokens": counts.image_input_tokens,
            "cached_tokens": counts.cache_read_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": counts.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "num_sources_used": counts.queries,
    }


def groq(counts: Counts) -> Usage:
    """Source: Groq API reference, "Create chat completion"."""
    times = {"queue_time": 0.0, "prompt_time": 0.0, "completion_time": 0.0, "total_time": 0.0}
    return {**times, **_totals(counts)}


def plain(counts: Counts) -> Usage:
    """Mistral, vLLM, Ollama and most others."""
    return _totals(counts)


def vllm(counts: Counts) -> Usage:
    details = {"cached_tokens": counts.cache_read_tokens} if counts.cache_read_tokens else None
    return {**_totals(counts), "prompt_tokens_details": details}


def openrouter(counts: Counts) -> Usage:
    """With what the call cost its operator, which is no client's business. Source: OpenRouter docs, "Usage accounting"."""
    return {**openai(counts), "cost": 0.000123, "is_byok": False, "cost_details": {"upstream_inference_cost": 0.0001}}


CHAT: Final[Mapping[str, Callable[[Counts], Usage]]] = {
    "openai": openai, "deepseek": deepseek, "gemini": gemini, "xai": xai, "groq": groq, "mistral": plain,
    "vllm": vllm, "openrouter": openrouter,
}  # fmt: skip
_BY_NAME: Final = (
    ("deepseek", "deepseek"), ("gemini", "gemini"), ("grok", "xai"), ("llama", "groq"), ("mistral", "mistral"),
    ("codestral", "mistral"), ("gemma", "vllm"),
)  # fmt: skip


def provider_of(model: str, asked: str | None) -> str:
    """Whose shape a model's usage has, `none` for no usage at all."""
    if asked is not None:
        return asked if asked in CHAT or asked == "none" else "openai"
    name = model.lower().rpartition("/")[2]
    return next((shape for start, shape in _BY_NAME if name.startswith(start)), "openai")


def anthropic(counts: Counts, output_tokens: int) -> Usage:
    """Anthropic counts what was cached beside the input. Source: Anthropic API reference, "Messages", Usage."""
    cached = counts.cache_read_tokens + counts.cache_write_tokens + counts.cache_write_1h_tokens
    usage: Usage = {
        "input_tokens": counts.input_tokens - cached,
        "cache_creation_input_tokens": counts.cache_write_tokens + counts.cache_write_1h_tokens,
        "cache_read_input_tokens": counts.cache_read_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": counts.cache_write_tokens,
            "ephemeral_1h_input_tokens": counts.cache_write_1h_tokens,
        },
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }
    return usage | ({"server_tool_use": {"web_search_requests": counts.queries}} if counts.queries else {})


def responses(counts: Counts) -> Usage:
    """Source: OpenAI API reference, "The response object"."""
    return {
        "input_tokens": counts.input_tokens,
        "input_tokens_details": {"cached_tokens": counts.cache_read_tokens},
        "output_tokens": counts.output_tokens,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
        "total_tokens": counts.input_tokens + counts.output_tokens,
    }


def image(counts: Counts) -> Usage:
    """Source: OpenAI API reference, "The image generation response", of GPT image models."""
    return {
        "total_tokens": counts.input_tokens + counts.output_tokens,
        "input_tokens": counts.input_tokens,
        "output_tokens": counts.output_tokens,
        "input_tokens_details": {
            "text_tokens": counts.input_tokens - counts.image_input_tokens,
            "image_tokens": counts.image_input_tokens,
        },
    }


def _totals(counts: Counts) -> Usage:
    return {
        "prompt_tokens": counts.input_tokens,
        "completion_tokens": counts.output_tokens,
        "total_tokens": counts.input_tokens + counts.output_tokens,
    }
