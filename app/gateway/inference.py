"""What the rows that are paid by tokens share: limits of an answer, what is never sent on, and the way through a call."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from app.client import Estimate
from app.gateway.answering import Wire, send_on
from app.gateway.call import Ask, Gateway, answered
from app.gateway.count import most_tokens, prompt_tokens
from app.gateway.errors import InvalidField
from app.gateway.exchange import Body, Exchange
from app.gateway.fields import number_of

_OURS: Final = frozenset({"provider", "fallbacks", "plugins"})
_OPERATORS: Final = frozenset({
    "api_base", "api_key", "api_version", "base_url", "custom_llm_provider", "fallback", "input_cost_per_token",
    "mock_response", "model_list", "no-log", "num_retries", "output_cost_per_token", "timeout", "user_config",
})  # fmt: skip
"""What a caller could tell a proxy behind us to do at its operator's expense."""
NOT_SENT_ON: Final = _OURS | _OPERATORS
_MOST_OUTPUT_TOKENS: Final = 10**9


def sent_on(body: Body, **changed: Any) -> bytes:
    """The body for an upstream: as it was written, but for what changed and what is for us alone."""
    rest: dict[str, Any] = {name: raw for name, raw in body.items() if name not in changed and name not in NOT_SENT_ON}
    return msgspec.json.encode(rest | {name: value for name, value in changed.items() if value is not None})


def flag_of(body: Body, name: str) -> bool:
    """True or false. Raises InvalidField."""
    raw = bytes(body.get(name, b"null"))
    if raw not in (b"true", b"false", b"null"):
        raise InvalidField(f"{name} is true or false", param=name)
    return raw == b"true"


def texts_of(body: Body, name: str) -> tuple[str, ...]:
    """A list of texts. Raises InvalidField."""
    try:
        return tuple(msgspec.json.decode(body.get(name, b"null"), type=list[str] | None) or ())
    except msgspec.DecodeError:
        raise InvalidField(f"{name} is a list of texts", param=name) from None


def word_of(body: Body, name: str) -> str | None:
    """A text, or None. Raises InvalidField."""
    try:
        return msgspec.json.decode(body.get(name, b"null"), type=str | None) or None
    except msgspec.DecodeError:
        raise InvalidField(f"{name} is a text", param=name) from None


def limit_of(body: Body, names: Sequence[str]) -> int | None:
    """How long the answer may be, by any of these fields. Raises InvalidField."""
    said = [number_of(body, name, 0, 1, _MOST_OUTPUT_TOKENS) for name in names if name in body]
    return max((each for each in said if each), default=None)


def limited(body: Body, names: Sequence[str], granted: int | None, default: str) -> dict[str, int]:
    """The fields that make an answer no longer than what is granted."""
    if granted is None:
        return {}
    asked = {name: number_of(body, name, granted, 1, _MOST_OUTPUT_TOKENS) for name in names if name in body}
    return {name: min(tokens, granted) for name, tokens in (asked or {default: granted}).items()}


def estimate_of(body: Body, prompt: Sequence[str], output_tokens: int | None, n: int = 1) -> Estimate:
    """What a call needs, by its size. What cannot be in it is said not to be, so that nobody holds money for it."""
    raws = [bytes(body[name]) for name in prompt if name in body]
    has_sound = any(b"audio" in raw for raw in raws)
    writes_cache = any(b"cache_control" in raw for raw in (*raws, bytes(body.get("cache_control", b""))))
    answers_in_sound = b"audio" in bytes(body.get("modalities", b""))
    return Estimate(
        input_tokens=most_tokens(*raws), max_output_tokens=output_tokens, n=n,
        audio_input_tokens=None if has_sound else 0, audio_output_tokens=None if answers_in_sound else 0,
        cache_read_tokens=None if writes_cache else 0,
    )  # fmt: skip


def counting(body: Body, prompt: Sequence[str], model: str) -> Any:
    """Counts what was sent, once somebody wants to know."""
    return lambda: prompt_tokens(model, *(bytes(body[name]) for name in prompt if name in body))


class Made(NamedTuple):
    """A call that was answered: for whom, by whom, and the upstream's id of it."""

    account_id: str
    upstream: str
    upstream_id: str | None


async def infer(gateway: Gateway, exchange: Exchange, ask: Ask, wire: Wire, *, shows_usage: bool = True) -> Made:
    """Make a call and send its answer on. Raises Refusal."""
    exchange.watch()
    call, response = await answered(gateway, exchange, ask)
    assert call.target is not None
    upstream_id = await send_on(call, response, wire, shows_usage=shows_usage)
    return Made(call.allowed.account_id, call.target.upstream.name, upstream_id)
