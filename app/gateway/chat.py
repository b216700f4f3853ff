"""Chat completions: rows 1 and 2, and every model that speaks OpenAI's chat."""

import re
from typing import Any, Final

import msgspec

from app.gateway.answering import Wire
from app.gateway.call import Ask, Gateway
from app.gateway.exchange import Body, Exchange
from app.gateway.fields import number_of, text_of
from app.gateway.inference import (
    counting,
    estimate_of,
    flag_of,
    infer,
    limit_of,
    limited,
    sent_on,
    texts_of,
    word_of,
)
from app.gateway.upstreams import Target

LIMITS: Final = ("max_tokens", "max_completion_tokens")
PROMPT: Final = ("messages", "tools", "functions", "response_format")
_REASONS: Final = re.compile(r"(?:.*/)?(?:o\d|gpt-5)", re.IGNORECASE)
"""Models that know `max_completion_tokens` alone."""


async def chat(gateway: Gateway, exchange: Exchange) -> None:
    """POST /chat/completions."""
    body = await exchange.json()
    await infer(gateway, exchange, ask_of(body), Wire.OPENAI, shows_usage=wants_usage(body))


def ask_of(body: Body) -> Ask:
    """Raises InvalidField."""
    model, is_stream = text_of(body, "model"), flag_of(body, "stream")
    most, n = limit_of(body, LIMITS), number_of(body, "n", 1, 1, 128)

    def sent(target: Target, granted: int | None) -> bytes:
        name = "max_completion_tokens" if _REASONS.match(target.upstream_model) else "max_tokens"
        changed: dict[str, Any] = limited(body, LIMITS, granted, name)
        if is_stream:
            changed["stream_options"] = stream_options(body) | {"include_usage": True}
        return sent_on(body, model=target.upstream_model, **changed)

    return Ask(
        model=model, row="chat", path="chat/completions", estimate=estimate_of(body, PROMPT, most, n), body=sent,
        prompt_tokens=counting(body, PROMPT, model), fallbacks=texts_of(body, "fallbacks"),
        provider=word_of(body, "provider"), asks_output=most,
    )  # fmt: skip


def stream_options(body: Body) -> dict[str, Any]:
    """As the caller wrote them; nothing where they are no object, for the upstream would judge that."""
    try:
        read = msgspec.json.decode(body.get("stream_options", b"null"))
    except msgspec.DecodeError:
        return {}
    return read if isinstance(read, dict) else {}


def wants_usage(body: Body) -> bool:
    return stream_options(body).get("include_usage") is True
