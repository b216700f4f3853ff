"""Chat completions: rows 1 and 2, and every model that speaks OpenAI's chat."""

import re
from dataclasses import replace
from typing import Any, Final

import msgspec

from app.gateway.answering import Wire
from app.gateway.call import Ask, Gateway
from app.gateway.errors import InvalidField
from app.gateway.exchange import Body, Exchange
from app.gateway.fields import must_have_messages, number_of, text_of
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
from app.gateway.models import refuse_incomplete
from app.gateway.upstreams import Target
from app.gateway.websearch import (
    FEATURE,
    TOKENS_OF_A_RESULT,
    Found,
    is_native,
    is_searching_always,
    paying_for_own,
    results_asked,
    searches,
    searching,
    size_of,
)

LIMITS: Final = ("max_tokens", "max_completion_tokens")
PROMPT: Final = ("messages", "tools", "functions", "response_format")
_REASONS: Final = re.compile(r"(?:.*/)?(?:o\d|gpt-5)", re.IGNORECASE)
"""Models that know `max_completion_tokens` alone."""


async def chat(gateway: Gateway, exchange: Exchange) -> None:
    """POST /chat/completions."""
    body = await exchange.json()
    ask = await with_search(gateway, body)
    await refuse_incomplete(gateway, ask.model, lambda: must_have_messages(body))
    await infer(gateway, exchange, ask, Wire.OPENAI, shows_usage=wants_usage(body))


async def with_search(gateway: Gateway, body: Body) -> Ask:
    """The call, and where it asks for a search that: the model's own, if it has one, else what one found before the prompt.

    Raises InvalidField, PluginUnavailable.
    """
    count, plain = results_asked(body), ask_of(body)
    targets = gateway.settings.upstreams.targets(plain.model, "chat", plain.provider)
    options = bytes(body.get("web_search_options", b"null"))
    if targets and (options != b"null" or is_searching_always(targets[0]) or (count and is_native(targets[0]))):
        asked = body | {"web_search_options": msgspec.Raw(b"{}" if options == b"null" else options)}
        return await paying_for_own(gateway, ask_of(asked), 1, size_of(options), least=1)
    if not count or not targets:
        return plain
    found, query = Found(), last_words(body)
    search = searches(gateway, targets[0])
    input_tokens = (plain.estimate.input_tokens or 0) + count * TOKENS_OF_A_RESULT
    messages = msgspec.json.decode(body["messages"], type=list[msgspec.Raw])

    def sent(target: Target, granted: int | None) -> bytes:
        told = msgspec.json.encode([found.message(), *messages])
        return ask_of(body | {"messages": msgspec.Raw(told)}).body(target, granted)

    return replace(
        plain, body=sent, features=(FEATURE,), prepare=searching(gateway, search, query, count, found),
        annotations=found.annotations, estimate=msgspec.structs.replace(plain.estimate, input_tokens=input_tokens),
    )  # fmt: skip


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


def last_words(body: Body) -> str:
    """What the last message of a user says. Raises InvalidField."""
    try:
        messages = msgspec.json.decode(body.get("messages", b"null"), type=list[dict[str, Any]])
    except msgspec.DecodeError:
        raise InvalidField("messages is a list of messages", param="messages") from None
    if not messages:
        raise InvalidField("messages is empty", param="messages")
    said = next((each for each in reversed(messages) if each.get("role") == "user"), messages[-1]).get("content")
    parts = said if isinstance(said, list) else [{"text": said}]
    return "\n".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
