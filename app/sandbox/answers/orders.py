"""Orders: how the offline upstream is told to answer otherwise than at once and in full.

An order is text, `cut=3, usage=deepseek`: names with values, or names alone for what is yes or no. Four places may
carry one, and a later one wins in what both say: the driver's queue (`POST /sandbox/orders`), the request's
`x-sandbox` header, the model's name behind a plus (`gpt-4o-mini+cut=3`), and the prompt itself (`[sandbox: cut=3]`),
which reaches an upstream through any proxy.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

_IN_PROMPT: Final = re.compile(r"\[sandbox:([^\]]{1,200})\]")
_SEPARATORS: Final = re.compile(r"[,;\s]+")
Count = Annotated[int, Meta(ge=0, le=100_000_000)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]


class BadOrder(Exception):
    """An order that says what there is not."""


class Order(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How to answer one call. Nothing said: at once, in full, as the model's own provider would.

    status        refuse with this HTTP status, in the words of the provider
    retry_after   of a 429 or 503, in seconds
    hang          take the request and never answer
    delay         seconds before the first byte
    pace          seconds before each later piece of a stream
    cut           close the connection after so many pieces: 0 is death before the first byte, 1 of an answer that
                  is no stream is half of its body
    stall         say nothing more after so many pieces, and keep the connection
    error_after   an error event after so many pieces of a stream, as providers send it
    split         send a stream in pieces of so many bytes, wherever that cuts
    crlf          end the lines of a stream with CR LF
    gzip          compress, if the request accepts that
    pings         a comment before each event of a stream
    usage         in whose shape: openai, deepseek, gemini, xai, groq, mistral, openrouter, vllm; none for a stream or
                  an answer without usage
    tokens        how long the answer is, in tokens
    reasoning, cached, cache_write, cache_write_1h, audio_in, audio_out, images_in
                  so many tokens of that sort, whatever the model and the prompt
    queries       so many searches done by the provider itself
    unicode       an answer whose characters take up to four bytes
    seconds       how long a transcribed recording was, or a video will be
    bytes         how large a recording or a video is that comes back
    polls         how often a video is asked for before it is done
    fail          the video job fails
    """

    status: Annotated[int, Meta(ge=400, le=599)] | None = None
    retry_after: Count | None = None
    hang: bool = False
    delay: Seconds = 0
    pace: Seconds = 0
    cut: Count | None = None
    stall: Count | None = None
    error_after: Count | None = None
    split: Annotated[int, Meta(ge=1)] | None = None
    crlf: bool = False
    gzip: bool = False
    pings: bool = False
    usage: str | None = None
    tokens: Count | None = None
    reasoning: Count | None = None
    cached: Count | None = None
    cache_write: Count | None = None
    cache_write_1h: Count | None = None
    audio_in: Count | None = None
    audio_out: Count | None = None
    images_in: Count | None = None
    queries: Count | None = None
    unicode: bool = False
    seconds: Seconds | None = None
    bytes: Count | None = None
    polls: Count = 2
    fail: bool = False


PLAIN: Final = Order()


def read(texts: Iterable[str]) -> Order:
    """One order of several, of which a later one wins. Raises BadOrder."""
    said: dict[str, str | bool] = {}
    for text in texts:
        for word in filter(None, _SEPARATORS.split(text)):
            name, has_value, value = word.partition("=")
            said[name.replace("-", "_")] = value if has_value else True
    try:
        return msgspec.convert(said, Order, strict=False) if said else PLAIN
    except msgspec.ValidationError as error:
        raise BadOrder(f"the sandbox does not understand this order: {error}") from error


def in_prompt(text: str) -> list[str]:
    """The orders that stand in a prompt."""
    return _IN_PROMPT.findall(text) if "[sandbox:" in text else []


def in_model(model: str) -> tuple[str, list[str]]:
    """A model's name, and the order behind its plus."""
    name, _, order = model.partition("+")
    return name, [order] if order else []
