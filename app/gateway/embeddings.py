"""Embeddings: row 5."""

from typing import Final

from app.client import Estimate
from app.gateway.answering import Wire
from app.gateway.call import Ask, Gateway
from app.gateway.count import most_tokens
from app.gateway.errors import InvalidField
from app.gateway.exchange import Exchange
from app.gateway.fields import must_have, text_of
from app.gateway.inference import counting, infer, sent_on, texts_of, word_of
from app.gateway.upstreams import Target

_PROMPT: Final = ("input",)


async def embeddings(gateway: Gateway, exchange: Exchange) -> None:
    """POST /embeddings."""
    body = await exchange.json()
    model, form = text_of(body, "model"), word_of(body, "encoding_format")
    if form not in (None, "float", "base64"):
        raise InvalidField("encoding_format is float or base64", param="encoding_format")
    must_have(body, "input")

    def sent(target: Target, granted: int | None) -> bytes:
        return sent_on(body, model=target.upstream_model)

    ask = Ask(
        model=model, row="embeddings", path="embeddings", body=sent,
        estimate=Estimate(input_tokens=_most(bytes(body["input"])), max_output_tokens=0, cache_read_tokens=0),
        prompt_tokens=counting(body, _PROMPT, model), fallbacks=texts_of(body, "fallbacks"),
        provider=word_of(body, "provider"),
    )  # fmt: skip
    await infer(gateway, exchange, ask, Wire.OPENAI)


def _most(raw: bytes) -> int:
    """Of tokens that were sent as numbers each is one."""
    return max(most_tokens(raw), raw.count(b",") + 1)
