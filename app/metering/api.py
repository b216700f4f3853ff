"""How a proxy asks for metering. A verdict against the caller is a 200 that says `deny`, so that a proxy
never blames its user for a failure of ours."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Controller, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from app.kernel.errors import AppError, InvalidApiKey, InvalidField, ModelNotPriced, RequestIdReuse
from app.kernel.money import JsonNumber, is_given, parse_usd, usd
from app.kernel.security import Service
from app.keys.verify import KeyOwner, Verifier
from app.metering.holds import Ask, Charged, Meter, Work

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._:-]+\Z")]
Sha256Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{64}\Z")]
Word = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Outcome = Literal["completed", "client_disconnected", "partial"]
NOT_GIVEN = msgspec.Raw(b"")


class UsageUnits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a call used; `input_tokens` includes the cached ones."""

    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_read_tokens: Count | None = None
    cache_write_tokens: Count | None = None
    reasoning_tokens: Count | None = None
    images: Count | None = None
    characters: Count | None = None
    audio_seconds: Count | None = None
    video_seconds: Count | None = None


class AuthorizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """May this key spend up to `max_cost_usd` on a call?"""

    request_id: RequestId
    api_key: str | None = None
    api_key_hash: Sha256Hex | None = None
    endpoint: Word | None = None
    model: Word | None = None
    max_cost_usd: JsonNumber = NOT_GIVEN
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 900


class WorkDone(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is told of a call after it was made."""

    cost_usd: JsonNumber = NOT_GIVEN
    outcome: Outcome = "completed"
    usage: UsageUnits | None = None
    usage_estimated: bool = False
    served_model: Word | None = None
    provider: Word | None = None
    upstream_id: Word | None = None
    latency_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None


class SettleRequest(WorkDone, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a call that was held for has cost."""

    hold_id: str


class ReleaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The call was not made, or failed before it cost anything."""

    hold_id: str
    reason: Word | None = None


class ChargeRequest(WorkDone, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Work already priced; refused above `max_cost_usd`, if that is given."""

    request_id: RequestId
    api_key: str | None = None
    api_key_hash: Sha256Hex | None = None
    endpoint: Word | None = None
    model: Word | None = None
    max_cost_usd: JsonNumber = NOT_GIVEN


class Denied(msgspec.Struct, frozen=True):
    """What the proxy should send its caller: `status`, and `error` as the body's error."""

    status: int
    error: dict[str, Any]
    decision: Literal["deny"] = "deny"

    @classmethod
    def of(cls, error: AppError) -> "Denied":
        return cls(error.status, error.wire())


class Allowed(msgspec.Struct, frozen=True):
    hold_id: str
    account_id: UUID
    key_id: UUID
    hold_usd: JsonNumber
    available_usd: JsonNumber
    expires_at: datetime
    granted_output_tokens: int | None = None
    price_version: int | None = None
    decision: Literal["allow"] = "allow"


class CostView(msgspec.Struct, frozen=True):
    """The cost by line; lines are null where the call came already priced."""

    total_cost_usd: JsonNumber
    input_cost_usd: JsonNumber = msgspec.Raw(b"null")
    output_cost_usd: JsonNumber = msgspec.Raw(b"null")
    cache_input_cost_usd: JsonNumber = msgspec.Raw(b"null")
    media_cost_usd: JsonNumber = msgspec.Raw(b"null")
    fees_usd: JsonNumber = msgspec.Raw(b"null")


class ChargeView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A charge as it was recorded, also for every repeat."""

    charge_id: UUID
    cost: CostView
    balance_usd: JsonNumber
    held_usd: JsonNumber
    flags: list[str]
    decision: Literal["allow"] | msgspec.UnsetType = msgspec.UNSET
    account_id: UUID | msgspec.UnsetType = msgspec.UNSET
    key_id: UUID | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, charged: Charged, **more: Any) -> "ChargeView":
        return cls(
            charged.charge_id,
            CostView(usd(charged.cost_nusd)),
            usd(charged.balance_nusd),
            usd(charged.held_nusd),
            [flag for flag in charged.flags.split(",") if flag],
            **more,
        )


class Released(msgspec.Struct, frozen=True):
    balance_usd: JsonNumber
    held_usd: JsonNumber
    status: str = "released"


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
        data: JSONBody[AuthorizeRequest],
    ) -> Allowed | Denied:
        """Holds `max_cost_usd`. The same request_id again answers the same hold, also after it was settled."""
        try:
            if not is_given(data.max_cost_usd):
                raise ModelNotPriced(
                    "max_cost_usd is required: calls are not priced from the catalogue yet; send the most this one may cost",
                    param="max_cost_usd",
                )
            amount_nusd = parse_usd(data.max_cost_usd, "max_cost_usd")
            owner = await _owner(verifier, data.api_key, data.api_key_hash)
            ask = Ask(data.request_id, amount_nusd, data.model, data.endpoint, data.ttl_seconds)
            held = await meter.authorize(service.name, owner, ask)
        except AppError as error:
            return _verdict(error)
        return Allowed(
            held.hold_id, held.account_id, held.key_id, usd(held.amount_nusd), usd(held.available_nusd), held.expires_at
        )

    @post("/settle", status_code=200, summary="What the call cost")
    async def settle(
        self, service: NamedDependency[Service], meter: NamedDependency[Meter], data: JSONBody[SettleRequest]
    ) -> ChargeView:
        """Always charges what was used. The first settle wins; a repeat gets the same answer."""
        return ChargeView.of(await meter.settle(service.name, data.hold_id, _work(data)))

    @post("/release", status_code=200, summary="The call was not made")
    async def release(
        self, service: NamedDependency[Service], meter: NamedDependency[Meter], data: JSONBody[ReleaseRequest]
    ) -> Released:
        """Frees the hold. After a settle: 409 `hold_closed`."""
        found = await meter.release(service.name, data.hold_id)
        return Released(usd(found["posted_nusd"]), usd(found["held_nusd"]))

    @post("/charge", status_code=200, summary="Authorize and settle in one")
    async def charge(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        data: JSONBody[ChargeRequest],
    ) -> ChargeView | Denied:
        """For work already priced. The same request_id again answers the same charge."""
        work = _work(data)
        amount_nusd = parse_usd(data.max_cost_usd, "max_cost_usd") if is_given(data.max_cost_usd) else work.cost_nusd
        if work.cost_nusd > amount_nusd:
            raise InvalidField("cost_usd is above max_cost_usd", param="cost_usd")
        try:
            owner = await _owner(verifier, data.api_key, data.api_key_hash)
            ask = Ask(data.request_id, amount_nusd, data.model, data.endpoint)
            charged = await meter.charge(service.name, owner, ask, work)
        except AppError as error:
            return _verdict(error)
        return ChargeView.of(charged, decision="allow", account_id=owner.account_id, key_id=owner.key_id)


def _verdict(error: AppError) -> Denied:
    """A refusal of the customer is an answer; a fault of the proxy's request, or of ours, is not."""
    if error.status >= 500 or isinstance(error, RequestIdReuse | InvalidField):
        raise error
    return Denied.of(error)


async def _owner(verifier: Verifier, secret: str | None, sha256_hex: str | None) -> KeyOwner:
    if (secret is None) == (sha256_hex is None):
        raise InvalidField("give either api_key or api_key_hash", param="api_key")
    sha256 = bytes.fromhex(sha256_hex) if sha256_hex is not None else None
    owner = await verifier.owner_of(secret=secret, sha256=sha256)
    if owner is None:
        raise InvalidApiKey
    return owner


def _work(data: WorkDone) -> Work:
    if not is_given(data.cost_usd):
        raise InvalidField(
            "cost_usd is required: calls are not priced from the catalogue yet; send what this one cost",
            param="cost_usd",
        )
    return Work(
        cost_nusd=parse_usd(data.cost_usd, "cost_usd"),
        outcome=data.outcome,
        served_model=data.served_model,
        provider=data.provider,
        upstream_id=data.upstream_id,
        latency_ms=data.latency_ms,
        ttft_ms=data.ttft_ms,
        units=msgspec.to_builtins(data.usage) if data.usage else None,
        flags="usage_estimated" if data.usage_estimated else None,
    )
