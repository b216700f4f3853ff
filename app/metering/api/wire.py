"""What metering is asked and answers on the wire: every struct of `/v1/meter/*`, and no more than how each is read and written."""

import re
from datetime import datetime
from math import ceil
from typing import Annotated, Any, Final, Literal, TypeAlias
from uuid import UUID

import msgspec

from app.kernel.errors import AppError, InvalidField, PaymentPending
from app.kernel.money import JsonNumber, ReportedNumber, number, usd
from app.kernel.security import OnExpiry
from app.ledger.charge import ChargeId
from app.metering.holds import Charged
from app.pricing import quote
from app.pricing.rows import Usage

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._:-]+\Z")]
Sha256Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{64}\Z")]
PaymentProof: TypeAlias = str
"""As its caller sent it in Authorization: `L402 …` or `Payment …`."""
Word = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
CallersWord: TypeAlias = str
CallersCount: TypeAlias = int
"""What a proxy passes on as its caller wrote it. That it is no such value is for the caller to read: see `CallersMistake`."""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=10**12)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=2**31 - 1)]
"""As clocks measure them, with a fraction; kept whole. msgspec refuses what is not finite."""
Outcome = Literal["completed", "client_disconnected", "partial"]
NOT_GIVEN = msgspec.Raw(b"")


class UsageUnits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a call used; `input_tokens` includes the cached ones. Seconds may have a fraction; each begun second counts."""

    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_read_tokens: Count | None = None
    cache_write_tokens: Count | None = None
    cache_write_1h_tokens: Count | None = None
    reasoning_tokens: Count | None = None
    audio_input_tokens: Count | None = None
    audio_output_tokens: Count | None = None
    image_input_tokens: Count | None = None
    image_output_tokens: Count | None = None
    video_input_tokens: Count | None = None
    video_output_tokens: Count | None = None
    cache_write_12h_tokens: Count | None = None
    cache_read_audio_tokens: Count | None = None
    cache_read_image_tokens: Count | None = None
    cache_read_video_tokens: Count | None = None
    cache_write_audio_tokens: Count | None = None
    cache_write_image_tokens: Count | None = None
    cache_write_video_tokens: Count | None = None
    images: Count | None = None
    characters: Count | None = None
    audio_seconds: Seconds | None = None
    video_seconds: Seconds | None = None
    pixels: Count | None = None
    queries: Count | None = None

    def counts(self) -> dict[str, int]:
        """What was told, and nothing else: a zero that was said is a fact, one that was not is none."""
        told = msgspec.to_builtins(self)
        for name in ("audio_seconds", "video_seconds"):
            if name in told:
                told[name] = ceil(told[name])
        counts: dict[str, int] = told
        return counts


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a call about to be made is known to need, and how it is made. Without `max_output_tokens`, what the model can
    answer at most is held for, or 16,384 tokens. What is not said is held for as the dearest that it may be: tokens as
    audio, images or cache writes, where the model has prices for those. Of cached tokens, and of kinds of tokens, saying one
    (0 too) says them all."""

    input_tokens: Count | None = None
    max_output_tokens: CallersCount | None = None
    n: CallersCount = 1
    characters: Count | None = None
    audio_seconds: Seconds | None = None
    images: CallersCount | None = None
    size: CallersWord | None = None
    quality: CallersWord | None = None
    video_seconds: Seconds | None = None
    resolution: CallersWord | None = None
    service_tier: CallersWord | None = None
    search_context_size: CallersWord | None = None
    region: CallersWord | None = None
    speed: CallersWord | None = None
    queries: Count | None = None
    cache_read_tokens: Count | None = None
    cache_write_tokens: Count | None = None
    cache_write_1h_tokens: Count | None = None
    cache_write_12h_tokens: Count | None = None
    audio_input_tokens: Count | None = None
    image_input_tokens: Count | None = None
    video_input_tokens: Count | None = None
    audio_output_tokens: Count | None = None
    image_output_tokens: Count | None = None
    video_output_tokens: Count | None = None

    def check(self) -> None:
        """Raises CallersMistake."""
        for name, word in self.attributes().items():
            check_word(word, f"estimate.{name}")
        for name, count, least, most in (
            ("n", self.n, 1, 128), ("max_output_tokens", self.max_output_tokens or 0, 0, 10**12),
            ("images", self.images or 0, 0, 10**12),
        ):  # fmt: skip
            if not least <= count <= most:
                raise CallersMistake(f"{name} must be from {least} to {most}", param=f"estimate.{name}")

    def usage(self) -> Usage:
        counts = {name: ceil(getattr(self, name) or 0) for name in _ESTIMATED}
        return Usage(**counts, **{name: getattr(self, name) for name in _PARTS})

    def attributes(self) -> dict[str, str]:
        return {name: value for name in _ATTRIBUTES if (value := getattr(self, name)) is not None}


_ESTIMATED: Final = ("input_tokens", "characters", "audio_seconds", "images", "video_seconds", "queries")
_PARTS: Final = (
    "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens", "cache_write_12h_tokens", "audio_input_tokens",
    "image_input_tokens", "video_input_tokens", "audio_output_tokens", "image_output_tokens", "video_output_tokens",
)  # fmt: skip
_ATTRIBUTES: Final = ("quality", "region", "resolution", "search_context_size", "service_tier", "size", "speed")
_WORD: Final = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
Features = Annotated[list[Word], msgspec.Meta(max_length=16)]


class CallersMistake(InvalidField):
    """What the caller asked for is not valid, and the proxy could not know: it is told to its caller."""


def check_word(value: str | None, param: str) -> None:
    """Raises CallersMistake."""
    if value is not None and not _WORD.fullmatch(value):
        raise CallersMistake(f"{param} is 1 to 200 characters without control characters", param=param)


class AuthorizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """May this key make a call like this one, or one of up to `max_cost_usd`? Give one of the two."""

    request_id: RequestId
    api_key: str | None = None
    api_key_hash: Sha256Hex | None = None
    payment_proof: PaymentProof | None = None
    topup_offer: Literal["none"] | None = None
    endpoint: Word | None = None
    model: CallersWord | None = None
    estimate: Estimate | None = None
    max_cost_usd: ReportedNumber = NOT_GIVEN
    features: Features = msgspec.field(default_factory=list)
    mode: Literal["strict", "clamp"] = "strict"
    min_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=10**12)] | None = None
    max_hold_usd: ReportedNumber = NOT_GIVEN
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 900
    on_expiry: OnExpiry | None = None


class Attributes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a call was served, where its price depends on it: this counts, not what was asked for. Where it is not said, it
    was served as asked for, or as the model's prices take it to be."""

    quality: Word | None = None
    region: Word | None = None
    resolution: Word | None = None
    search_context_size: Word | None = None
    service_tier: Word | None = None
    size: Word | None = None
    speed: Word | None = None

    def said(self) -> dict[str, str]:
        """`auto` says nothing."""
        told: dict[str, str] = msgspec.to_builtins(self)
        return {name: value for name, value in told.items() if value.lower() != "auto"}


class WorkDone(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is told of a call after it was made: what it used, or what it cost. A cost decides if both are given."""

    cost_usd: ReportedNumber = NOT_GIVEN
    outcome: Outcome = "completed"
    usage: UsageUnits | None = None
    usage_estimated: bool = False
    served_model: Word | None = None
    provider: Word | None = None
    features_used: Features = msgspec.field(default_factory=list)
    attributes: Attributes | None = None
    upstream_id: Word | None = None
    upstream_model: Word | None = None
    provider_cost_usd: ReportedNumber = NOT_GIVEN
    latency_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None


class SettleRequest(WorkDone, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a call that was held for has used or cost. Where the authorize's answer was lost: its request_id and key."""

    hold_id: str | None = None
    request_id: RequestId | None = None
    api_key: str | None = None
    api_key_hash: Sha256Hex | None = None


class ReleaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The call was not made, or failed before it cost anything. Where the authorize's answer was lost: its request_id and key."""

    hold_id: str | None = None
    request_id: RequestId | None = None
    api_key: str | None = None
    api_key_hash: Sha256Hex | None = None
    reason: Word | None = None


class ExtendRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The call takes longer; `captured_usd` is what it has cost so far."""

    hold_id: str
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 900
    captured_usd: ReportedNumber = NOT_GIVEN


class RefundRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Without `amount_usd`, all that was charged."""

    charge_id: str
    amount_usd: ReportedNumber = NOT_GIVEN
    reason: Word | None = None


class CallersAttributes(Attributes, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The same as a proxy passes them on from its caller."""

    quality: CallersWord | None = None
    region: CallersWord | None = None
    resolution: CallersWord | None = None
    search_context_size: CallersWord | None = None
    service_tier: CallersWord | None = None
    size: CallersWord | None = None
    speed: CallersWord | None = None

    def said(self) -> dict[str, str]:
        """Raises CallersMistake."""
        told: dict[str, str] = msgspec.to_builtins(self)
        for name, value in told.items():
            check_word(value, f"attributes.{name}")
        return {name: value for name, value in told.items() if value.lower() != "auto"}


class ChargeRequest(WorkDone, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A call that was made already; refused if it costs more than `max_cost_usd`, where that is given."""

    request_id: RequestId
    api_key: str | None = None
    api_key_hash: Sha256Hex | None = None
    payment_proof: PaymentProof | None = None
    topup_offer: Literal["none"] | None = None
    endpoint: Word | None = None
    model: CallersWord | None = None
    attributes: CallersAttributes | None = None
    max_cost_usd: ReportedNumber = NOT_GIVEN


class Denied(msgspec.Struct, frozen=True):
    """What the proxy should send its caller: `status`, `error` as the body's error, and `headers`, if there are any: a
    challenge that can be paid, or how long to wait."""

    status: int
    error: dict[str, Any]
    decision: Literal["deny"] = "deny"
    headers: dict[str, str] | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, error: AppError) -> "Denied":
        headers = dict(error.headers)
        if isinstance(error, PaymentPending):
            headers["Retry-After"] = str(error.retry_after_seconds)
        return cls(error.status, error.wire(), headers=headers or msgspec.UNSET)


class PriceOfCall(msgspec.Struct, frozen=True):
    """What `per_units` of something cost this caller, markup included: a line of what the call may cost."""

    kind: str
    name: str
    price_usd: JsonNumber
    per_units: int
    estimated_units: int

    @classmethod
    def of(cls, line: quote.Line) -> "PriceOfCall":
        price_usd = number(line.list_price_pusd * line.markup_ppm, _PLACES_OF_PRICES)
        return cls(line.kind.value, line.name, price_usd, line.per_units, line.units)


_PLACES_OF_PRICES: Final = 18
"""Pico-USD with a markup in parts per million."""


class Allowed(msgspec.Struct, frozen=True):
    """`clamped`: less is held than the call may cost. `prices` are what it will be charged by, as far as is foreseen."""

    hold_id: str
    account_id: UUID
    key_id: UUID
    hold_usd: JsonNumber
    available_usd: JsonNumber
    expires_at: datetime
    granted_output_tokens: int | None = None
    price_version: int | None = None
    clamped: bool = False
    estimated_cost_usd: JsonNumber = msgspec.Raw(b"null")
    prices: list[PriceOfCall] | None = None
    repeat: bool = False
    decision: Literal["allow"] = "allow"


class VerifyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose key is this, and may it spend, on this model if one is named?"""

    api_key: str | None = None
    api_key_hash: Sha256Hex | None = None
    payment_proof: PaymentProof | None = None
    topup_offer: Literal["none"] | None = None
    model: CallersWord | None = None


class VerifiedView(msgspec.Struct, frozen=True):
    """A key that may spend. `scopes` and `allowed_models` are null where it was not narrowed."""

    account_id: UUID
    key_id: UUID
    available_usd: JsonNumber
    scopes: list[str] | None
    allowed_models: list[str] | None
    decision: Literal["allow"] = "allow"


class CostView(msgspec.Struct, frozen=True):
    """The cost by line, which add up to the total; lines are null where the call came already priced."""

    total_cost_usd: JsonNumber
    input_cost_usd: JsonNumber = msgspec.Raw(b"null")
    output_cost_usd: JsonNumber = msgspec.Raw(b"null")
    cache_input_cost_usd: JsonNumber = msgspec.Raw(b"null")
    media_cost_usd: JsonNumber = msgspec.Raw(b"null")
    fees_usd: JsonNumber = msgspec.Raw(b"null")

    @classmethod
    def of(cls, charged: Charged) -> "CostView":
        parts = charged.lines.get("parts") if charged.lines else None
        if not parts:
            return cls(usd(charged.cost_nusd))
        if more := charged.cost_nusd - sum(parts):  # what has no price costs the rest of the hold, as a fee
            parts = [*parts[:-1], parts[-1] + more]
        return cls(usd(charged.cost_nusd), *map(usd, parts))


class ChargeView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A charge as it was recorded, also for every repeat."""

    charge_id: str
    cost: CostView
    balance_usd: JsonNumber
    held_usd: JsonNumber
    flags: list[str]
    decision: Literal["allow"] | msgspec.UnsetType = msgspec.UNSET
    account_id: UUID | msgspec.UnsetType = msgspec.UNSET
    key_id: UUID | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, charged: Charged, charged_account: UUID, **more: Any) -> "ChargeView":
        return cls(
            str(ChargeId(charged_account, charged.charge_id)),
            CostView.of(charged),
            usd(charged.balance_nusd),
            usd(charged.held_nusd),
            [flag for flag in charged.flags.split(",") if flag] if charged.flags else [],
            **more,
        )


class Released(msgspec.Struct, frozen=True):
    balance_usd: JsonNumber
    held_usd: JsonNumber
    status: str = "released"


class Extended(msgspec.Struct, frozen=True):
    hold_usd: JsonNumber
    expires_at: datetime
    balance_usd: JsonNumber
    held_usd: JsonNumber
    available_usd: JsonNumber
    status: str = "extended"


class RefundView(msgspec.Struct, frozen=True):
    charge_id: str
    refunded_usd: JsonNumber
    balance_usd: JsonNumber
    status: str = "refunded"
