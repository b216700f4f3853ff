"""How a proxy asks for metering. A verdict against the caller is a 200 that says `deny`, so that a proxy
never blames its user for a failure of ours."""

import re
from collections.abc import Mapping
from datetime import datetime
from math import ceil
from typing import Annotated, Any, Final, Literal, TypeAlias
from uuid import UUID

import msgspec
from litestar import Controller, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from app.kernel.db import Database
from app.kernel.errors import (
    AppError,
    HoldClosed,
    HoldNotFound,
    InvalidApiKey,
    InvalidField,
    ModelNotPriced,
    RequestIdReuse,
)
from app.kernel.logs import log
from app.kernel.money import JsonNumber, ReportedNumber, is_given, number, reported_usd, usd, usd_or_null
from app.kernel.security import OnExpiry, Service
from app.keys.verify import KeyOwner, Verifier
from app.ledger.charge import ChargeId
from app.metering.holds import Ask, Charged, Held, Meter, Work
from app.metering.priced import Cost, Limits, Pricer
from app.metering.refund import refund
from app.metering.ticket import HoldTicket
from app.pricing import quote
from app.pricing.rows import Usage

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._:-]+\Z")]
Sha256Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{64}\Z")]
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
            _check_word(word, f"estimate.{name}")
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


def _check_word(value: str | None, param: str) -> None:
    """Raises CallersMistake."""
    if value is not None and not _WORD.fullmatch(value):
        raise CallersMistake(f"{param} is 1 to 200 characters without control characters", param=param)


class AuthorizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """May this key make a call like this one, or one of up to `max_cost_usd`? Give one of the two."""

    request_id: RequestId
    api_key: str | None = None
    api_key_hash: Sha256Hex | None = None
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
            _check_word(value, f"attributes.{name}")
        return {name: value for name, value in told.items() if value.lower() != "auto"}


class ChargeRequest(WorkDone, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A call that was made already; refused if it costs more than `max_cost_usd`, where that is given."""

    request_id: RequestId
    api_key: str | None = None
    api_key_hash: Sha256Hex | None = None
    endpoint: Word | None = None
    model: CallersWord | None = None
    attributes: CallersAttributes | None = None
    max_cost_usd: ReportedNumber = NOT_GIVEN


class Denied(msgspec.Struct, frozen=True):
    """What the proxy should send its caller: `status`, and `error` as the body's error."""

    status: int
    error: dict[str, Any]
    decision: Literal["deny"] = "deny"

    @classmethod
    def of(cls, error: AppError) -> "Denied":
        return cls(error.status, error.wire())


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
        parts = list(charged.lines.get("parts", ())) if charged.lines else []
        if parts:  # what has no price costs the rest of the hold, as a fee
            parts[-1] += charged.cost_nusd - sum(parts)
        return cls(usd(charged.cost_nusd), *(usd(part_nusd) for part_nusd in parts))


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


class MeterController(Controller):
    """The hook that an inference proxy calls before and after each call. Needs a service token."""

    path = "/v1/meter"
    tags = ("Metering",)

    @post("/authorize", status_code=200, summary="May this key make this call?")
    async def authorize(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        pricer: NamedDependency[Pricer],
        data: JSONBody[AuthorizeRequest],
    ) -> Allowed | Denied:
        """Holds what the call may cost: by the catalogue for an `estimate`, or `max_cost_usd`; not more than `max_hold_usd`.
        With `mode: clamp` it holds what there is of that, if it pays for an answer of `min_output_tokens`. The answer may be
        as long as what is held pays for: `granted_output_tokens`. What the caller asked for and cannot be is a `deny`.
        The same request_id again answers the same hold while it is open and its key may still spend, with `repeat`; of one
        that is not: 409 `hold_closed`."""
        _check_told(data)
        try:
            owner = await owner_of(verifier, data.api_key, data.api_key_hash)
            _check_asked(data)
            estimated = _estimated(data, owner.account_id)
            limits = await _limits_once(service, data, estimated, owner, pricer, meter)
            ask = _ask(data, limits, await pricer.names(data.model, limits.price_version), service)
            held = await meter.authorize(service.name, owner, ask)
            return await _allowed(estimated, limits, held, pricer)
        except AppError as error:
            return _verdict(error)

    @post("/verify", status_code=200, summary="Who is calling, and how much may they spend?")
    async def verify(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        pricer: NamedDependency[Pricer],
        data: JSONBody[VerifyRequest],
    ) -> VerifiedView | Denied:
        """The verdict that an authorize for nothing would get, without a hold. What is allowed now may be refused then."""
        try:
            owner = await owner_of(verifier, data.api_key, data.api_key_hash)
            _check_word(data.model, "model")
            found = await meter.verify(owner, data.model, await pricer.names(data.model))
        except AppError as error:
            return _verdict(error)
        return VerifiedView(
            owner.account_id, owner.key_id, usd(found.available_nusd), found.scopes, found.allowed_models
        )

    @post("/settle", status_code=200, summary="What the call used or cost")
    async def settle(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        pricer: NamedDependency[Pricer],
        data: JSONBody[SettleRequest],
    ) -> ChargeView:
        """Always charges what was used. The first settle wins; a repeat gets the same answer. A completed call whose
        `usage` has no count costs what was held for it, flagged `usage_missing`; `release` what was not made."""
        return await settled(service, verifier, meter, pricer, data)

    @post("/release", status_code=200, summary="The call was not made")
    async def release(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        data: JSONBody[ReleaseRequest],
    ) -> Released:
        """Frees the hold; a repeat frees nothing more. After a settle: 409 `hold_closed`; after a capture: 409
        `hold_captured`."""
        found = await meter.release(service.name, await ticket_of(service, verifier, meter, data))
        return Released(usd(found["posted_nusd"]), usd(found["held_nusd"]))

    @post("/extend", status_code=200, summary="The call takes longer")
    async def extend(
        self, service: NamedDependency[Service], meter: NamedDependency[Meter], data: JSONBody[ExtendRequest]
    ) -> Extended:
        """Keeps the hold for `ttl_seconds` from now at least. It grows to `captured_usd`, what the call has cost so far,
        also beyond the balance: see `available_usd` before going on. It is held, and charged when the hold expires without
        a settle. For a hold that is not open: 409 `hold_closed`."""
        captured_nusd = reported_usd(data.captured_usd, "captured_usd") if is_given(data.captured_usd) else 0
        found = await meter.extend(service.name, data.hold_id, data.ttl_seconds, captured_nusd)
        posted_nusd, held_nusd = found["posted_nusd"], found["held_nusd"]
        available = max(0, posted_nusd - held_nusd - found["floor_nusd"])
        return Extended(
            usd(found["amount_nusd"]), found["expires_at"], usd(posted_nusd), usd(held_nusd), usd(available)
        )

    @post("/charge", status_code=200, summary="Authorize and settle in one")
    async def charge(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        pricer: NamedDependency[Pricer],
        data: JSONBody[ChargeRequest],
    ) -> ChargeView | Denied:
        """For work already done: what it used, by today's prices, or what it cost: `cost_usd: 0` if it was free. The same
        request_id again answers the same charge."""
        must_tell_what_it_cost(data)
        try:
            owner = await owner_of(verifier, data.api_key, data.api_key_hash)
            _check_word(data.model, "model")
            attributes = data.attributes.said() if data.attributes else None
            work = await _work_once(service, data, attributes, owner, pricer, meter)
            amount_nusd = (
                reported_usd(data.max_cost_usd, "max_cost_usd") if is_given(data.max_cost_usd) else work.cost_nusd
            )
            names = await pricer.names(data.model)
            asked = told(data, attributes)
            ask = Ask(data.request_id, amount_nusd, data.model, data.endpoint, asked=asked, model_names=names)
            charged = await meter.charge(service.name, owner, ask, work)
        except AppError as error:
            return _verdict(error)
        return ChargeView.of(
            charged, owner.account_id, decision="allow", account_id=owner.account_id, key_id=owner.key_id
        )

    @post("/refund", status_code=200, summary="Money back for a charge")
    async def refund(
        self, service: NamedDependency[Service], db: NamedDependency[Database], data: JSONBody[RefundRequest]
    ) -> RefundView:
        """Once for each charge: a repeat gets the first answer, another amount 409 `already_refunded`. The key's limit is
        given back too."""
        amount_nusd = least_nusd = None
        if is_given(data.amount_usd):
            amount_nusd = reported_usd(data.amount_usd, "amount_usd")
            least_nusd = reported_usd(data.amount_usd, "amount_usd", down=True)
        done = await refund(db, service.name, data.charge_id, amount_nusd, least_nusd)
        log.info("meter.refunded", charge_id=data.charge_id, amount_nusd=done.amount_nusd)
        return RefundView(data.charge_id, usd(done.amount_nusd), usd(done.balance_nusd))


async def settled(
    service: Service, verifier: Verifier, meter: Meter, pricer: Pricer, data: SettleRequest
) -> ChargeView:
    """Settle one call. Raises HoldNotFound, and InvalidField for work that cannot be told the price of."""
    ticket = await ticket_of(service, verifier, meter, data)
    work = await priced_work(pricer, ticket, data)
    return ChargeView.of(await meter.settle(service.name, ticket, work), ticket.account_id)


async def ticket_of(
    service: Service, verifier: Verifier, meter: Meter, data: SettleRequest | ReleaseRequest
) -> HoldTicket:
    """The hold that is meant. Raises HoldNotFound, InvalidApiKey, and InvalidField where it is told in no way or in two."""
    if (data.hold_id is None) == (data.request_id is None):
        raise InvalidField("give either hold_id, or request_id with api_key or api_key_hash", param="hold_id")
    if data.hold_id is not None:
        if data.api_key is not None or data.api_key_hash is not None:
            raise InvalidField("hold_id says whose hold it is: give no key with it", param="api_key")
        return meter.opened(service.name, data.hold_id)
    assert data.request_id is not None
    owner = await owner_of(verifier, data.api_key, data.api_key_hash)
    return await meter.found(service.name, owner, data.request_id)


async def priced_work(pricer: Pricer, ticket: HoldTicket, data: WorkDone) -> Work:
    """What was done, with what it cost by the prices of the ticket's moment. Raises InvalidField and ModelNotPriced."""
    must_tell_what_it_cost(data)
    return _work(data, await _cost(data, pricer, ticket.model, ticket.account_id, ticket.attributes, ticket))


def _verdict(error: AppError) -> Denied:
    """A refusal of the customer is an answer; a fault of the proxy's request, or of ours, is not."""
    is_proxys = isinstance(error, RequestIdReuse | HoldClosed | InvalidField) and not isinstance(error, CallersMistake)
    if error.status >= 500 or is_proxys:
        raise error
    return Denied.of(error)


async def owner_of(verifier: Verifier, secret: str | None, sha256_hex: str | None) -> KeyOwner:
    if (secret is None) == (sha256_hex is None):
        raise InvalidField("give either api_key or api_key_hash", param="api_key")
    sha256 = bytes.fromhex(sha256_hex) if sha256_hex is not None else None
    owner = await verifier.owner_of(secret=secret, sha256=sha256)
    if owner is None:
        raise InvalidApiKey
    return owner


def _check_told(data: AuthorizeRequest) -> None:
    """Raises InvalidField unless it is told in one way what the call may cost."""
    if is_given(data.max_cost_usd) == (data.estimate is not None):
        raise InvalidField("give either estimate or max_cost_usd", param="max_cost_usd")
    if data.estimate is None and data.mode == "clamp":
        raise InvalidField("mode clamp needs an estimate, to know what a token costs", param="mode")
    if data.estimate is not None and data.model is None:
        raise InvalidField("model is required to price an estimate", param="model")


def _estimated(data: AuthorizeRequest, account_id: UUID) -> quote.Ask | None:
    """What the catalogue is asked, None where the proxy says itself what the call may cost."""
    if data.estimate is None:
        return None
    how, features = data.estimate.attributes(), tuple(data.features)
    call = quote.Call(data.model or "", account=str(account_id), attributes=how, features=features)
    return quote.Ask(call, data.estimate.usage(), data.estimate.max_output_tokens, data.estimate.n)


def _check_asked(data: AuthorizeRequest) -> None:
    """Raises CallersMistake."""
    _check_word(data.model, "model")
    if data.estimate is not None:
        data.estimate.check()


async def _limits_once(
    service: Service, data: AuthorizeRequest, estimated: quote.Ask | None, owner: KeyOwner, pricer: Pricer, meter: Meter
) -> Limits:
    """What is to be held. Prices may have changed since a call was held for, so that it could not be again: it is a repeat,
    and has its hold. Raises ModelNotPriced, and CallersMistake for a call that is dearer than any may be."""
    try:
        return await _limits(data, estimated, pricer)
    except (ModelNotPriced, CallersMistake) as error:
        try:
            before = await meter.found(service.name, owner, data.request_id)
        except HoldNotFound:
            raise error from None
        held_nusd = before.amount_nusd or 0
        return Limits(held_nusd, held_nusd, before.price_version, before.made_at, asked_nusd=held_nusd)


async def _limits(data: AuthorizeRequest, estimated: quote.Ask | None, pricer: Pricer) -> Limits:
    max_hold_nusd = reported_usd(data.max_hold_usd, "max_hold_usd") if is_given(data.max_hold_usd) else None
    if estimated is None:
        asked_nusd = reported_usd(data.max_cost_usd, "max_cost_usd")
        amount_nusd = asked_nusd if max_hold_nusd is None else min(asked_nusd, max_hold_nusd)
        return Limits(amount_nusd, amount_nusd, *await pricer.moment(), asked_nusd=asked_nusd)
    least_tokens = (data.min_output_tokens or 1) if data.mode == "clamp" else None
    try:
        return await pricer.limits(estimated, least_tokens, max_hold_nusd)
    except InvalidField as error:
        if error.param in ("estimate", "estimate.size", "max_hold_usd"):  # for what was asked for, and how
            raise CallersMistake(error.message, param=error.param) from None
        raise


async def _allowed(estimated: quote.Ask | None, limits: Limits, held: Held, pricer: Pricer) -> Allowed:
    """A repeat is told what its first was: all by the prices of the moment when that was made."""
    priced, granted = limits.quote, None
    if estimated is None or held.price_version is None:
        most_nusd = limits.asked_nusd if estimated is None else held.amount_nusd
    else:
        if priced is None or held.made_at != limits.made_at:
            priced = await pricer.quoted(estimated, held.price_version, held.made_at)
        granted = await pricer.granted_output_tokens(
            estimated, priced, held.price_version, held.amount_nusd, held.made_at
        )
        most_nusd = priced.cost_nusd
    return Allowed(
        held.hold_id, held.account_id, held.key_id, usd(held.amount_nusd), usd(held.available_nusd), held.expires_at,
        granted, held.price_version, held.amount_nusd < most_nusd,
        usd_or_null(None if priced is None else priced.cost_nusd),
        None if priced is None else [PriceOfCall.of(line) for line in priced.lines],
        held.is_repeat,
    )  # fmt: skip


def _ask(data: AuthorizeRequest, limits: Limits, names: tuple[str, ...], service: Service) -> Ask:
    asked = None
    if data.estimate is not None:
        most = bytes(data.max_hold_usd) if is_given(data.max_hold_usd) else None
        asked = msgspec.json.encode((data.estimate, data.features, data.mode, data.min_output_tokens, most))
    return Ask(
        data.request_id, limits.amount_nusd, data.model, data.endpoint, data.ttl_seconds, limits.min_nusd,
        limits.price_version, asked, data.estimate.attributes() if data.estimate else None, limits.made_at, names,
        data.on_expiry or service.on_expiry,
    )  # fmt: skip


async def _work_once(
    service: Service,
    data: ChargeRequest,
    attributes: Mapping[str, str] | None,
    owner: KeyOwner,
    pricer: Pricer,
    meter: Meter,
) -> Work:
    """What was done, with its cost by today's prices. They may have changed since it was charged, so that it could not be
    again: it is a repeat then, and its cost is not looked at. Raises InvalidField and ModelNotPriced."""
    try:
        work = _work(data, await _cost(data, pricer, data.model, owner.account_id, attributes, None))
        if is_given(data.max_cost_usd) and work.cost_nusd > reported_usd(data.max_cost_usd, "max_cost_usd"):
            raise InvalidField("the call cost more than max_cost_usd", param="max_cost_usd")
    except (InvalidField, ModelNotPriced) as error:
        try:
            await meter.found(service.name, owner, data.request_id)
        except HoldNotFound:
            raise error from None
        return _work(data, Cost(0))
    return work


def told(data: WorkDone, attributes: Mapping[str, str] | None) -> bytes:
    """All that the price of a call follows from, or that is recorded of what it was: told again otherwise, it is another one.

    Not how long it took, and not the provider's own figures. How a call was made is spelled as prices are looked up.
    """
    cost_nusd = reported_usd(data.cost_usd, "cost_usd") if is_given(data.cost_usd) else None
    made = {name: value.lower() for name, value in (attributes or {}).items() if value.lower() != "auto"}
    counts = data.usage.counts() if data.usage is not None else None
    return msgspec.json.encode(
        (cost_nusd, data.outcome, counts, data.served_model, data.provider, sorted(set(data.features_used)), made),
        order="sorted",
    )


def must_tell_what_it_cost(data: WorkDone) -> None:
    """Raises InvalidField."""
    if not is_given(data.cost_usd) and data.usage is None:
        raise InvalidField("give usage, to be priced from the catalogue, or cost_usd", param="usage")


async def _cost(
    data: WorkDone,
    pricer: Pricer,
    model: str | None,
    account_id: UUID,
    attributes: Mapping[str, str] | None,
    ticket: HoldTicket | None,
) -> Cost:
    """As the proxy tells it, or by the catalogue, `model` being what was asked for, and `attributes` how.

    A usage without any count was lost on its way. A completed call then costs what was held for it, never nothing.
    """
    counts, held_nusd = data.usage.counts() if data.usage else {}, ticket.amount_nusd if ticket else None
    version, made_at = (ticket.price_version, ticket.made_at) if ticket else (None, None)
    account, attributes = str(account_id), {**(attributes or {}), **(data.attributes.said() if data.attributes else {})}
    asked = quote.Call(model or "", account=account, attributes=attributes)
    served = quote.Call(
        data.served_model or asked.model, data.provider or "", account, attributes, tuple(data.features_used)
    )
    if is_given(data.cost_usd):
        used = Usage(**counts) if counts else None
        return await pricer.told(reported_usd(data.cost_usd, "cost_usd"), version, served, used, made_at)
    if not counts:
        if held_nusd is None:
            raise InvalidField("usage has no count: say what was used, or cost_usd: 0 if it was free", param="usage")
        if data.outcome == "completed":
            return Cost(held_nusd, version, flags=("usage_missing",), is_the_hold=True)
    if not served.model:
        raise InvalidField("a call without a model has no price: give served_model, or cost_usd", param="served_model")
    cost = await pricer.cost(version, asked, served, Usage(**counts), made_at, held_nusd)
    return cost if counts else msgspec.structs.replace(cost, flags=(*cost.flags, "usage_missing"))


def _work(data: WorkDone, cost: Cost) -> Work:
    """What was done, with its cost."""
    flags = (*cost.flags, "usage_estimated") if data.usage_estimated else cost.flags
    latency_ms = None if data.latency_ms is None else round(data.latency_ms)
    ttft_ms = None if data.ttft_ms is None else round(data.ttft_ms)
    provider_cost_nusd = None
    if is_given(data.provider_cost_usd):
        provider_cost_nusd = reported_usd(data.provider_cost_usd, "provider_cost_usd")
    return Work(
        cost.cost_nusd, data.outcome, data.served_model, data.provider, data.upstream_id, latency_ms, ttft_ms,
        data.usage.counts() if data.usage else None, cost.price_version, cost.lines, ",".join(flags) or None,
        cost.is_the_hold, provider_cost_nusd, data.upstream_model,
    )  # fmt: skip
