"""Completions of a text, without a chat: row 3."""

from typing import Any, Final

from app.gateway.answering import Wire
from app.gateway.call import Ask, Gateway
from app.gateway.chat import stream_options, wants_usage
from app.gateway.exchange import Body, Exchange
from app.gateway.fields import must_have, number_of, text_of
from app.gateway.inference import (
    counting,
    estimate_of,
    flag_of,
    infer,
    limit_of,
    sent_on,
    texts_of,
    word_of,
)
from app.gateway.models import refuse_incomplete
from app.gateway.upstreams import Target

DEFAULT_MAX_TOKENS: Final = 1024
_PROMPT: Final = ("prompt", "suffix")
_MOST_PROMPTS: Final = 128


async def completions(gateway: Gateway, exchange: Exchange) -> None:
    """POST /completions."""
    body = await exchange.json()
    ask = _ask(body)
    await refuse_incomplete(gateway, ask.model, lambda: must_have(body, "prompt"))
    await infer(gateway, exchange, ask, Wire.OPENAI, shows_usage=wants_usage(body))


def _ask(body: Body) -> Ask:
    """Raises InvalidField."""
    model, is_stream = text_of(body, "model"), flag_of(body, "stream")
    most = limit_of(body, ("max_tokens",)) or DEFAULT_MAX_TOKENS
    n = max(number_of(body, "n", 1, 1, 128), number_of(body, "best_of", 1, 1, 128))

    def sent(target: Target, granted: int | None) -> bytes:
        changed: dict[str, Any] = {"max_tokens": most if granted is None else min(most, granted)}
        if is_stream:
            changed["stream_options"] = stream_options(body) | {"include_usage": True}
        return sent_on(body, model=target.upstream_model, **changed)

    return Ask(
        model=model, row="completions", path="completions",
        estimate=estimate_of(body, _PROMPT, most, min(n * _prompts(body), _MOST_PROMPTS)), body=sent,
        prompt_tokens=counting(body, _PROMPT, model), fallbacks=texts_of(body, "fallbacks"),
        provider=word_of(body, "provider"), asks_output=most,
    )  # fmt: skip


def _prompts(body: Body) -> int:
    """How many texts are to be completed: each element of a list that is no list of tokens."""
    raw = bytes(body.get("prompt", b"")).lstrip()
    if raw[:1] != b"[":
        return 1
    return raw.count(b'","') + raw.count(b'", "') + raw.count(b"],") + 1
