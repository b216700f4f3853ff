"""What is said between a proxy and Satmeter about a call: the words of /v1/meter, typed, and nothing else."""

import re
from collections.abc import Mapping
from decimal import Decimal
from math import isfinite
from typing import Any, Final, Literal

import msgspec

OnExpiry = Literal["captured", "release", "hold"]
Outcome = Literal["completed", "client_disconnected", "partial"]
MOST_UNITS: Final = 10**12
"""What Satmeter takes for one count. An upstream that says more is not believed."""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a call used. `input_tokens` has the cached ones in it, as OpenAI counts; Anthropic's are added by usage.py."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    reasoning_tokens: int | None = None
    audio_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    image_input_tokens: int | None = None
    image_output_tokens: int | None = None
    video_input_tokens: int | None = None
    video_output_tokens: int | None = None
    cache_read_audio_tokens: int | None = None
    cache_read_image_tokens: int | None = None
    images: int | None = None
    characters: int | None = None
    audio_seconds: float | None = None
    video_seconds: float | None = None
    pixels: int | None = None
    queries: int | None = None

    def counts(self) -> dict[str, int | float]:
        """What is told: nothing below zero, nothing that is no number."""
        told: dict[str, int | float] = msgspec.to_builtins(self)
        return {name: min(max(count, 0), MOST_UNITS) for name, count in told.items() if isfinite(count)}


class Attributes(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a call is, or was, served, where its price depends on it."""

    service_tier: str | None = None
    quality: str | None = None
    size: str | None = None
    resolution: str | None = None
    search_context_size: str | None = None
    region: str | None = None
    speed: str | None = None


class Estimate(Attributes, frozen=True, omit_defaults=True, kw_only=True):
    """What a call about to be made is known to need. What is not said is held for as the dearest that it may be.

    `max_output_tokens` is for each of the `n` answers; without it what the model can answer at most is held for.
    """

    input_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int = 1
    characters: int | None = None
    audio_seconds: float | None = None
    images: int | None = None
    video_seconds: float | None = None
    queries: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    audio_input_tokens: int | None = None
    image_input_tokens: int | None = None
    video_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    image_output_tokens: int | None = None
    video_output_tokens: int | None = None

    def sent(self) -> Usage | None:
        """What is used the moment the upstream has the request, whatever comes of it; None where that is not known."""
        told = (self.input_tokens, self.characters, self.audio_seconds)
        if all(each is None for each in told):
            return None
        output_tokens = 0 if self.input_tokens is not None else None
        return Usage(self.input_tokens, output_tokens, characters=self.characters, audio_seconds=self.audio_seconds)


class Done(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a call turned out to be: what it used, by the upstream's own words where there are any, or what it cost.

    Where neither is known it costs what is held, whatever its outcome: never nothing for want of a word. That nothing was
    used is said by a zero. `usage_estimated`: it was counted here. `provider_cost_usd` is kept, and never charged.
    """

    usage: Usage | None = None
    cost_usd: Decimal | None = None
    outcome: Outcome = "completed"
    usage_estimated: bool = False
    served_model: str | None = None
    provider: str | None = None
    features_used: tuple[str, ...] = ()
    attributes: Attributes | None = None
    upstream_id: str | None = None
    upstream_model: str | None = None
    provider_cost_usd: Decimal | None = None
    latency_ms: float | None = None
    ttft_ms: float | None = None

    def body(self) -> dict[str, Any]:
        """As `settle` takes it. An upstream's odd words are cut to what Satmeter takes: they are no reason not to be paid."""
        told: dict[str, Any] = {name: getattr(self, name) for name in self.__struct_fields__}
        told = {name: value for name, value in told.items() if value is not None and value != () and value is not False}
        for name in ("served_model", "provider", "upstream_id", "upstream_model"):
            if name in told:
                told[name] = word(told[name])
        for name in ("latency_ms", "ttft_ms"):
            if name in told:
                told[name] = min(max(told[name], 0), 2**31 - 1)
        for name in ("cost_usd", "provider_cost_usd"):
            if name in told:
                told[name] = amount(told[name])
        if self.cost_usd is None or self.usage is not None:
            told["usage"] = (self.usage or Usage()).counts()
            if self.cost_usd is None and not told["usage"]:
                told["outcome"] = "completed"
        if self.attributes is not None:
            said: dict[str, str] = msgspec.to_builtins(self.attributes)
            told["attributes"] = {name: word(value) for name, value in said.items() if value}
        return {name: value for name, value in told.items() if value != ""}


def amount(usd: Decimal) -> str:
    """An amount as Satmeter reads it exactly: up to 40 characters, of which it keeps nano-dollars."""
    return f"{max(usd, Decimal(0)).quantize(_PICO):f}" if usd.is_finite() else "0"


_PICO: Final = Decimal("1e-12")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def word(text: str) -> str:
    """As a word of the wire: up to 200 characters, none of them a control character."""
    return _CONTROL.sub(" ", text)[:200]


class Hold(msgspec.Struct, frozen=True):
    """A call that Satmeter holds money for: its id here, and the hold's there. Enough to settle, extend or release it."""

    request_id: str
    hold_id: str


class PriceOfCall(msgspec.Struct, frozen=True):
    """A line of what a call may cost: `price_usd` for each `per_units` of `name`, markup included."""

    kind: str
    name: str
    price_usd: Decimal
    per_units: int
    estimated_units: int

    def cost_usd(self, units: float) -> Decimal:
        return self.price_usd * Decimal(str(units)) / self.per_units


class Allowed(Hold, frozen=True, kw_only=True):
    """The call may be made. What is held, for how long an answer, and the prices that it will be charged by."""

    account_id: str
    key_id: str
    hold_usd: Decimal
    available_usd: Decimal
    expires_at: str
    granted_output_tokens: int | None = None
    price_version: int | None = None
    clamped: bool = False
    estimated_cost_usd: Decimal | None = None
    prices: tuple[PriceOfCall, ...] | None = None
    sent: Usage | None = None
    """What is used as soon as it is forwarded, by its estimate."""

    def spent_usd(self, used: Usage) -> Decimal:
        """What the call has cost so far, at least: tokens at the cheapest way they may have been read or made. 0 where the
        answer had no prices. For captures; what it costs in the end is for Satmeter to say."""
        lines = {line.name: line for line in self.prices or ()}
        inputs = [line for line in lines.values() if line.name == "input" or line.name.startswith("cache_read")]
        spent = Decimal(0)
        if used.input_tokens and inputs:
            spent += min(line.cost_usd(used.input_tokens) for line in inputs)
        for name, units in (("output", used.output_tokens), ("characters", used.characters), ("images", used.images),
                            ("audio_seconds", used.audio_seconds), ("video_seconds", used.video_seconds)):  # fmt: skip
            if units and name in lines:
                spent += lines[name].cost_usd(units)
        return spent


class Denied(msgspec.Struct, frozen=True):
    """The call may not be made. What the proxy sends its caller: this status, `body()`, and these headers."""

    status: int
    error: msgspec.Raw
    """The `error` object as Satmeter wrote it, so that its figures stay exact."""
    headers: Mapping[str, str]

    @property
    def details(self) -> Mapping[str, Any]:
        """The error read: `message`, `type`, `code`, `param`, `metadata`."""
        read: dict[str, Any] = _EXACT.decode(self.error)
        return read

    @property
    def code(self) -> str:
        return str(self.details.get("code"))

    @property
    def message(self) -> str:
        return str(self.details.get("message", ""))

    def body(self) -> bytes:
        """The error's whole body: `error` for OpenAI's SDKs, `message` and `statusCode` for older clients."""
        beside = b'"message":%b,"statusCode":%d' % (msgspec.json.encode(self.message), self.status)
        return b'{"error":%b,%b}' % (bytes(self.error), beside)

    def anthropic_body(self) -> bytes:
        """The same as Anthropic's SDKs read it."""
        error = msgspec.json.encode({"type": _ANTHROPIC.get(self.status, "api_error"), "message": self.message})
        return b'{"type":"error","error":%b}' % error

    @classmethod
    def of(cls, status: int, error: msgspec.Raw, headers: Mapping[str, str]) -> "Denied":
        """With the headers that belong to such a refusal where Satmeter named none."""
        made = cls(status, error, headers)
        more = {"content-type": "application/json"}
        retry_after = (made.details.get("metadata") or {}).get("retry_after")
        if retry_after is not None:
            more["retry-after"] = str(retry_after)
        if status == 401:
            more["www-authenticate"] = "Bearer"
        given = {name.lower(): value for name, value in headers.items()}
        return cls(status, error, more | given)


class Unavailable(Denied, frozen=True):
    """Satmeter could not be asked, so that nobody knows whether the call would be paid: 503 with Retry-After."""

    @classmethod
    def now(cls, message: str, *, code: str = "billing_unavailable", retry_after_seconds: int = 2) -> "Unavailable":
        error = {
            "message": message, "type": "server_error", "code": code, "param": None,
            "metadata": {"retry_after": retry_after_seconds},
        }  # fmt: skip
        headers = {"content-type": "application/json", "retry-after": str(retry_after_seconds)}
        return cls(503, msgspec.Raw(msgspec.json.encode(error)), headers)


class Verified(msgspec.Struct, frozen=True):
    """A key that may spend. `scopes` and `allowed_models` are None where it was not narrowed."""

    account_id: str
    key_id: str
    available_usd: Decimal
    scopes: tuple[str, ...] | None = None
    allowed_models: tuple[str, ...] | None = None


class Extended(msgspec.Struct, frozen=True):
    """A hold that goes on. `available_usd` is what is left beside it."""

    hold_usd: Decimal
    expires_at: str
    balance_usd: Decimal
    held_usd: Decimal
    available_usd: Decimal


class Cost(msgspec.Struct, frozen=True):
    """What a call cost, by line; lines are None where it came already priced."""

    total_cost_usd: Decimal
    input_cost_usd: Decimal | None = None
    output_cost_usd: Decimal | None = None
    cache_input_cost_usd: Decimal | None = None
    media_cost_usd: Decimal | None = None
    fees_usd: Decimal | None = None


class Charged(msgspec.Struct, frozen=True):
    """A recorded charge; the same for every repeat."""

    charge_id: str
    cost: Cost
    balance_usd: Decimal
    held_usd: Decimal
    flags: tuple[str, ...] = ()


class Refunded(msgspec.Struct, frozen=True):
    """Money given back of a charge; the same for every repeat."""

    charge_id: str
    refunded_usd: Decimal
    balance_usd: Decimal


class Refused(msgspec.Struct, frozen=True):
    """A settlement that Satmeter does not take, whenever it is told. It is kept for the operator: see report.py."""

    status: int
    error: Mapping[str, Any]


_EXACT: Final = msgspec.json.Decoder(float_hook=Decimal)
_ANTHROPIC: Final = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 422: "invalid_request_error", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip
"""Source: Anthropic's API reference, "Errors"."""
