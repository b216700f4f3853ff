"""How a proxy asks for metering. A verdict against the caller is a 200 that says `deny`, so that a proxy
never blames its user for a failure of ours."""

from collections.abc import Mapping
from typing import Final
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
    InsufficientBalance,
    InvalidApiKey,
    InvalidField,
    KeyLimitExceeded,
    ModelNotPriced,
    PaymentPending,
    RequestIdReuse,
)
from app.kernel.logs import log
from app.kernel.money import is_given, reported_usd, usd, usd_or_null
from app.kernel.security import Service
from app.keys.verify import KeyOwner, Verifier
from app.metering.api.wire import (
    Allowed,
    AuthorizeRequest,
    CallersMistake,
    ChargeRequest,
    ChargeView,
    Denied,
    Extended,
    ExtendRequest,
    PriceOfCall,
    RefundRequest,
    RefundView,
    Released,
    ReleaseRequest,
    SettleRequest,
    VerifiedView,
    VerifyRequest,
    WorkDone,
    check_word,
)
from app.metering.holds import Ask, Held, Meter, Work
from app.metering.priced import Cost, Limits, Pricer
from app.metering.refund import refund
from app.metering.ticket import HoldTicket
from app.offers.mint import Mint
from app.offers.proofs import Proofs, Use
from app.pricing import quote
from app.pricing.rows import Usage


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
        proofs: NamedDependency[Proofs],
        mint: NamedDependency[Mint],
        offer_wanted: NamedDependency[bool],
        data: JSONBody[AuthorizeRequest],
    ) -> Allowed | Denied:
        """Holds what the call may cost: by the catalogue for an `estimate`, or `max_cost_usd`; not more than `max_hold_usd`.
        With `mode: clamp` it holds what there is of that, if it pays for an answer of `min_output_tokens`. The answer may be
        as long as what is held pays for: `granted_output_tokens`. A 402 in an estimate's place says what is affordable:
        `affordable_output_tokens`. What the caller asked for and cannot be is a `deny`.
        The same request_id again answers the same hold while it is open and its key may still spend, with `repeat`; of one
        that is not: 409 `hold_closed`."""
        _check_told(data)
        try:
            owner, use = await _payer(verifier, proofs, data)
            _check_asked(data)
            estimated = _estimated(data, owner.account_id)
            limits = await _limits_once(service, data, estimated, owner, pricer, meter)
            ask = _ask(data, limits, await pricer.names(data.model, limits.price_version), service)
            held = await _authorized(service, owner, ask, use, estimated, limits, meter, pricer)
            return await _allowed(estimated, limits, held, pricer)
        except AppError as error:
            return _verdict(await mint.cured(error, wanted=offer_wanted and data.topup_offer is None))

    @post("/verify", status_code=200, summary="Who is calling, and how much may they spend?")
    async def verify(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        pricer: NamedDependency[Pricer],
        proofs: NamedDependency[Proofs],
        mint: NamedDependency[Mint],
        offer_wanted: NamedDependency[bool],
        data: JSONBody[VerifyRequest],
    ) -> VerifiedView | Denied:
        """The verdict that an authorize for nothing would get, without a hold. What is allowed now may be refused then."""
        try:
            owner, _ = await _payer(verifier, proofs, data)
            check_word(data.model, "model")
            found = await meter.verify(owner, data.model, await pricer.names(data.model))
        except AppError as error:
            return _verdict(await mint.cured(error, wanted=offer_wanted and data.topup_offer is None))
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
        return Released(usd(found.posted_nusd), usd(found.held_nusd))

    @post("/extend", status_code=200, summary="The call takes longer")
    async def extend(
        self, service: NamedDependency[Service], meter: NamedDependency[Meter], data: JSONBody[ExtendRequest]
    ) -> Extended:
        """Keeps the hold for `ttl_seconds` from now at least. It grows to `captured_usd`, what the call has cost so far,
        also beyond the balance: see `available_usd` before going on. It is held, and charged when the hold expires without
        a settle. For a hold that is not open: 409 `hold_closed`."""
        captured_nusd = reported_usd(data.captured_usd, "captured_usd") if is_given(data.captured_usd) else 0
        found = await meter.extend(service.name, data.hold_id, data.ttl_seconds, captured_nusd)
        posted_nusd, held_nusd = found.posted_nusd, found.held_nusd
        available = max(0, posted_nusd - held_nusd - found.floor_nusd)
        return Extended(usd(found.amount_nusd), found.expires_at, usd(posted_nusd), usd(held_nusd), usd(available))

    @post("/charge", status_code=200, summary="Authorize and settle in one")
    async def charge(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        pricer: NamedDependency[Pricer],
        proofs: NamedDependency[Proofs],
        mint: NamedDependency[Mint],
        offer_wanted: NamedDependency[bool],
        data: JSONBody[ChargeRequest],
    ) -> ChargeView | Denied:
        """For work already done: what it used, by today's prices, or what it cost: `cost_usd: 0` if it was free. The same
        request_id again answers the same charge."""
        must_tell_what_it_cost(data)
        try:
            owner, use = await _payer(verifier, proofs, data)
            check_word(data.model, "model")
            attributes = data.attributes.said() if data.attributes else None
            work = await _work_once(service, data, attributes, owner, pricer, meter)
            amount_nusd = (
                reported_usd(data.max_cost_usd, "max_cost_usd") if is_given(data.max_cost_usd) else work.cost_nusd
            )
            names = await pricer.names(data.model)
            asked = told(data, work.units, attributes, said_nusd(data))
            ask = Ask(data.request_id, amount_nusd, data.model, data.endpoint, asked=asked, model_names=names)
            charged = await meter.charge(service.name, owner, ask, work, use)
        except AppError as error:
            return _verdict(await mint.cured(error, wanted=offer_wanted and data.topup_offer is None))
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
    owner = await _admitted(verifier, data.api_key, data.api_key_hash)
    return await meter.found(service.name, owner, data.request_id)


async def _admitted(verifier: Verifier, secret: str | None, sha256_hex: str | None) -> KeyOwner:
    """Whose a call is that was admitted: here the hash may be that of the payment which its proof was of."""
    if secret is not None or sha256_hex is None:
        return await owner_of(verifier, secret, sha256_hex)
    owner = await verifier.asked_of(bytes.fromhex(sha256_hex))
    if owner is None:
        raise InvalidApiKey
    return owner


async def priced_work(pricer: Pricer, ticket: HoldTicket, data: WorkDone) -> Work:
    """What was done, with what it cost by the prices of the ticket's moment. Raises InvalidField and ModelNotPriced."""
    must_tell_what_it_cost(data)
    counts = _counts(data)
    cost = await _cost(data, counts, pricer, ticket.model, ticket.account_id, ticket.attributes, ticket)
    return _work(data, counts, cost)


def _verdict(error: AppError) -> Denied:
    """A refusal of the customer is an answer; a fault of the proxy's request, or of ours, is not."""
    is_proxys = isinstance(error, RequestIdReuse | HoldClosed | InvalidField) and not isinstance(error, CallersMistake)
    if (error.status >= 500 and not isinstance(error, PaymentPending)) or is_proxys:
        raise error
    return Denied.of(error)


_PROOF_PATIENCE_SECONDS: Final = 1.5
"""A proxy waits two seconds for a verdict; its caller sends the proof again."""


async def _payer(
    verifier: Verifier, proofs: Proofs, data: AuthorizeRequest | VerifyRequest | ChargeRequest
) -> tuple[KeyOwner, Use | None]:
    """Whose call it is: the key's, or the proof of payment's where no key is told; and what of the proof is to be consumed.

    A proof beside another key only brings its own account its money. Raises InvalidApiKey, and PaymentPending.
    """
    if data.payment_proof is None:
        return await owner_of(verifier, data.api_key, data.api_key_hash), None
    proven = await proofs.proven(data.payment_proof, patience_seconds=_PROOF_PATIENCE_SECONDS)
    if data.api_key is None and data.api_key_hash is None:
        return proven.owner, proven.use
    owner = await owner_of(verifier, data.api_key, data.api_key_hash)
    return owner, proven.use if owner == proven.owner else None


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
    call = quote.Call(data.model or "", account=account_id, attributes=how, features=features)
    return quote.Ask(call, data.estimate.usage(), data.estimate.max_output_tokens, data.estimate.n)


def _check_asked(data: AuthorizeRequest) -> None:
    """Raises CallersMistake."""
    check_word(data.model, "model")
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


async def _authorized(
    service: Service,
    owner: KeyOwner,
    ask: Ask,
    use: Use | None,
    estimated: quote.Ask | None,
    limits: Limits,
    meter: Meter,
    pricer: Pricer,
) -> Held:
    """Raises what an authorize does; where money is short for an answer of that length, it says how long one may be."""
    try:
        return await meter.authorize(service.name, owner, ask, use)
    except (InsufficientBalance, KeyLimitExceeded) as error:
        quoted, version, left = limits.quote, limits.price_version, error.spendable_nusd
        if estimated is not None and quoted is not None and version is not None and left is not None:
            tokens = await pricer.granted_output_tokens(estimated, quoted, version, left, limits.made_at)
            if tokens is not None:
                error.metadata = {**(error.metadata or {}), "affordable_output_tokens": tokens}
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
        cost = await _cost(data, _counts(data), pricer, data.model, owner.account_id, attributes, None)
        work = _work(data, _counts(data), cost)
        if is_given(data.max_cost_usd) and work.cost_nusd > reported_usd(data.max_cost_usd, "max_cost_usd"):
            raise InvalidField("the call cost more than max_cost_usd", param="max_cost_usd")
    except (InvalidField, ModelNotPriced) as error:
        try:
            await meter.found(service.name, owner, data.request_id)
        except HoldNotFound:
            raise error from None
        return _work(data, _counts(data), Cost(0))
    return work


def said_nusd(data: WorkDone) -> int | None:
    """What the call cost as its proxy tells it, None where the catalogue is to tell. Raises InvalidField."""
    return reported_usd(data.cost_usd, "cost_usd") if is_given(data.cost_usd) else None


def told(
    data: WorkDone, counts: Mapping[str, int] | None, attributes: Mapping[str, str] | None, cost_nusd: int | None
) -> bytes:
    """All that the price of a call follows from, or that is recorded of what it was: told again otherwise, it is another one.
    `counts` are its usage's, and `cost_nusd` is `said_nusd`.

    Not how long it took, and not the provider's own figures. How a call was made is spelled as prices are looked up.
    """
    made = {name: value.lower() for name, value in attributes.items() if value.lower() != "auto"} if attributes else {}
    features = sorted(set(data.features_used)) if data.features_used else []
    return _sorted((cost_nusd, data.outcome, counts, data.served_model, data.provider, features, made))


_sorted: Final = msgspec.json.Encoder(order="sorted").encode


def must_tell_what_it_cost(data: WorkDone) -> None:
    """Raises InvalidField."""
    if data.usage is None and not is_given(data.cost_usd):
        raise InvalidField("give usage, to be priced from the catalogue, or cost_usd", param="usage")


def _counts(data: WorkDone) -> dict[str, int] | None:
    return None if data.usage is None else data.usage.counts()


async def _cost(
    data: WorkDone,
    counts: Mapping[str, int] | None,
    pricer: Pricer,
    model: str | None,
    account_id: UUID,
    attributes: Mapping[str, str] | None,
    ticket: HoldTicket | None,
) -> Cost:
    """As the proxy tells it, or by the catalogue, `model` being what was asked for, and `attributes` how.

    A usage without any count was lost on its way. A completed call then costs what was held for it, never nothing.
    """
    counts, held_nusd = counts or {}, ticket.amount_nusd if ticket else None
    version, made_at = (ticket.price_version, ticket.made_at) if ticket else (None, None)
    cost_nusd = said_nusd(data)
    if cost_nusd is not None:
        name = data.served_model or model
        if not counts or not name:
            return Cost(cost_nusd)

        def was_made() -> tuple[quote.Call, Usage]:
            return _made(data, model, account_id, attributes)[1], Usage(**counts)

        return await pricer.told(cost_nusd, version, made_at, (name, data.provider or ""), was_made)
    asked, served = _made(data, model, account_id, attributes)
    if not counts:
        if held_nusd is None:
            raise InvalidField("usage has no count: say what was used, or cost_usd: 0 if it was free", param="usage")
        if data.outcome == "completed":
            return Cost(held_nusd, version, flags=("usage_missing",), is_the_hold=True)
    if not served.model:
        raise InvalidField("a call without a model has no price: give served_model, or cost_usd", param="served_model")
    cost = await pricer.cost(version, asked, served, Usage(**counts), made_at, held_nusd)
    return cost if counts else msgspec.structs.replace(cost, flags=(*cost.flags, "usage_missing"))


def _made(
    data: WorkDone, model: str | None, account_id: UUID, attributes: Mapping[str, str] | None
) -> tuple[quote.Call, quote.Call]:
    """The call as it was asked for, and as it was served."""
    how = {**(attributes or {}), **(data.attributes.said() if data.attributes else {})}
    asked = quote.Call(model or "", account=account_id, attributes=how)
    if data.served_model is None and data.provider is None and not data.features_used:  # nearly every call
        return asked, asked
    features = tuple(data.features_used)
    return asked, quote.Call(data.served_model or asked.model, data.provider or "", account_id, how, features)


def _work(data: WorkDone, counts: dict[str, int] | None, cost: Cost) -> Work:
    """What was done, with its cost."""
    flags = (*cost.flags, "usage_estimated") if data.usage_estimated else cost.flags
    latency_ms = None if data.latency_ms is None else round(data.latency_ms)
    ttft_ms = None if data.ttft_ms is None else round(data.ttft_ms)
    provider_cost_nusd = None
    if is_given(data.provider_cost_usd):
        provider_cost_nusd = reported_usd(data.provider_cost_usd, "provider_cost_usd")
    return Work(
        cost.cost_nusd, data.outcome, data.served_model, data.provider, data.upstream_id, latency_ms, ttft_ms,
        counts, cost.price_version, cost.lines, ",".join(flags) or None,
        cost.is_the_hold, provider_cost_nusd, data.upstream_model,
    )  # fmt: skip
