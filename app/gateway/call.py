"""The money of one call of a model, from the authorize to the settle, over every upstream that may serve it.

authorize ─► forwarded ─► an upstream's answer ─► settle      what it said that it used, or what was counted
    │            ├─ refused by every upstream ───► release    it never ran
    │            └─ silent after it was asked ───► settle 0   it may have run: nothing came, so nothing is charged,
    └─ denied: the caller is told                             and nothing is given back as if it had not been asked
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

import aiohttp
import msgspec

from app.client import Allowed, Attributes, Denied, Done, Estimate, Usage
from app.client.telling import Outcome as ToldOutcome
from app.client.wire import Outcome
from app.gateway import asking
from app.gateway.billed import Billing, charge_of, first_answer, is_another_worth_asking, unused
from app.gateway.catalogue import Catalogue
from app.gateway.costs import Costs, told_by
from app.gateway.errors import InvalidField, Refusal, Told, UnknownModel
from app.gateway.exchange import CallerGone, Exchange
from app.gateway.owners import Owners
from app.gateway.streams import Streams
from app.gateway.upstreams import Target


class Gateway(Billing, Protocol):
    """What a row that is paid by tokens needs of the gateway that it stands in."""

    @property
    def catalogue(self) -> Catalogue: ...
    @property
    def streams(self) -> Streams: ...
    @property
    def owners(self) -> Owners: ...


@dataclass(frozen=True, slots=True)
class OwnSearches:
    """What a provider's own searches cost: each by its price, or all of a call by a fee where the catalogue has none."""

    fee: str | None
    least: int = 0
    """How many are made though nobody tells of them."""
    context_size: str | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """What a row makes of a request: what to hold money for, and what to send to an upstream.

    `row` is what an upstream must serve; `body` makes the upstream's body, whose answer may be so long (None: as asked).
    `prompt_tokens` counts what was sent, for a charge of a call whose upstream says nothing.
    """

    model: str
    row: str
    path: str
    estimate: Estimate
    body: Callable[[Target, int | None], bytes]
    prompt_tokens: Callable[[], int]
    fallbacks: tuple[str, ...] = ()
    provider: str | None = None
    features: tuple[str, ...] = ()
    asks_output: int | None = None
    beside: Callable[[], bytes] = lambda: b""
    """Fields of ours in front of those of an answer, or of the first event of a stream."""
    annotations: Callable[[], bytes] = lambda: b""
    """Fields of ours in front of those of its first message."""
    own_searches: OwnSearches | None = None
    """How what the model searches by itself is paid, if it may."""
    prepare: Callable[[], Awaitable[None]] | None = None
    """What is done once money is held, before an upstream is asked. Raises Refusal: then all is given back."""


class Call:
    """One call that money is held for. `target` is who serves it, once an upstream has answered."""

    def __init__(self, gateway: Gateway, exchange: Exchange, ask: Ask, model: str, allowed: Allowed) -> None:
        self.gateway, self.exchange, self.ask, self.model, self.allowed = gateway, exchange, ask, model, allowed
        self.target: Target | None = None
        self.first_at: float | None = None
        self.granted = self._granted()
        self._so_far: Callable[[], Usage | None] = lambda: None

    def so_far(self, used: Callable[[], Usage | None]) -> None:
        """From now on, this tells what was used by then."""
        self._so_far = used

    async def forward(self, targets: list[Target]) -> aiohttp.ClientResponse:
        """The first answer of an upstream that took the call. Close it.

        Raises Refusal, the hold being given back, or settled where an upstream may have run.
        """
        if self.ask.prepare is not None:
            try:
                await self.ask.prepare()
            except Refusal as refused:
                self.unused(refused.message, may_have_run=False)
                raise
        self.gateway.meter.forwarded(self.allowed, lambda: self._so_far())

        async def ask(target: Target) -> aiohttp.ClientResponse:
            body = self.ask.body(target, self.granted)
            return await asking.ask(self.gateway.session, target, self.ask.path, body, self.exchange.headers)

        self.target, response = await first_answer(self.gateway.meter, self.allowed, targets, ask)
        if self.target.upstream.provider or self.ask.features:
            self.known(None)
        return response

    def known(self, upstream_id: str | None) -> None:
        """What is charged if we die now is charged as this upstream's, under its own id of the call."""
        self.gateway.meter.known(self.allowed, self._served(upstream_id, self._fees(None)))

    def unused(self, reason: str, *, may_have_run: bool) -> None:
        unused(self.gateway.meter, self.allowed, reason, may_have_run=may_have_run)

    def settle(
        self,
        usage: Usage | None,
        *,
        outcome: Outcome = "completed",
        is_estimated: bool = False,
        upstream_id: str | None = None,
        service_tier: str | None = None,
        operators_usd: Decimal | None = None,
        is_awaited: bool = False,
    ) -> "Settled":
        """Charge what was used, in the background. `operators_usd` is what the upstream says that it costs us."""
        used, features = self._searched(usage), self._fees(usage)
        tier = service_tier if service_tier not in (None, "default", "standard", "auto") else None
        size = self.ask.own_searches.context_size if self.ask.own_searches is not None else None
        done = msgspec.structs.replace(
            self._served(upstream_id, features), usage=used, outcome=outcome, usage_estimated=is_estimated,
            attributes=Attributes(service_tier=tier, search_context_size=size) if tier or size else None,
            provider_cost_usd=operators_usd, latency_ms=self.latency_ms, ttft_ms=self.ttft_ms,
        )  # fmt: skip
        costs = None if tier is not None else self._costs(used, features)
        told = self.gateway.meter.settle(self.allowed, done, at_once=costs is None and is_awaited)
        return Settled(told, costs)

    def _served(self, upstream_id: str | None, features: tuple[str, ...]) -> Done:
        assert self.target is not None
        return Done(
            served_model=self.model, provider=self.target.upstream.provider, features_used=features,
            upstream_id=upstream_id, upstream_model=self.target.upstream_model,
        )  # fmt: skip

    def _searched(self, usage: Usage | None) -> Usage | None:
        """With the searches that the provider made and does not count; without those that a fee pays for."""
        own = self.ask.own_searches
        if usage is None or own is None:
            return usage
        return msgspec.structs.replace(usage, queries=None if own.fee else max(usage.queries or 0, own.least) or None)

    def _fees(self, usage: Usage | None) -> tuple[str, ...]:
        """The features that were used. Of a call whose usage is not known, all that are held for."""
        own = self.ask.own_searches
        if own is None or own.fee is None or usage is None or max(usage.queries or 0, own.least):
            return self.ask.features
        return tuple(each for each in self.ask.features if each != own.fee)

    def _costs(self, usage: Usage | None, features: tuple[str, ...]) -> Costs | None:
        """What the call costs by the prices that the authorize told; None where those are not all."""
        if usage is None or self.target is None or self.target.upstream.provider is not None:
            return None
        return told_by(self.allowed, usage, features, self.gateway.catalogue.facts(self.model))

    # --- times ---

    def first_byte(self) -> None:
        if self.first_at is None:
            self.first_at = time.perf_counter()

    @property
    def latency_ms(self) -> float:
        return (time.perf_counter() - self.exchange.began) * 1000

    @property
    def ttft_ms(self) -> float | None:
        return None if self.first_at is None else (self.first_at - self.exchange.began) * 1000

    def headers(self) -> dict[str, str]:
        """What a caller is told beside the answer."""
        granted = self.allowed.granted_output_tokens
        return {} if granted is None or not self.allowed.clamped else {"x-granted-output-tokens": str(granted)}

    def _granted(self) -> int | None:
        """How long an answer may be, where that is less than what was asked for."""
        granted, asked = self.allowed.granted_output_tokens, self.ask.asks_output
        if not granted or not (self.allowed.clamped or (asked is not None and asked > granted)):
            return None
        return granted


@dataclass(frozen=True, slots=True)
class Settled:
    """A call that is charged: what it costs, as far as that is known here, and who will be told."""

    told: "asyncio.Future[ToldOutcome]"
    known: Costs | None

    async def costs(self) -> Costs | None:
        """By our own arithmetic, or as Satmeter says; None where it could not be asked in time."""
        if self.known is not None:
            return self.known
        charge = await charge_of(self.told)
        return None if charge is None else Costs.charged(charge.cost)


async def answered(gateway: Gateway, exchange: Exchange, ask: Ask) -> tuple[Call, aiohttp.ClientResponse]:
    """The call that an upstream answers: the model asked for, or the first of its fallbacks that serves.

    Each model has a hold of its own, at its own price and with the key's own permission. Raises Refusal.
    """
    upstreams, first = gateway.settings.upstreams, None
    fallbacks = ask.fallbacks or upstreams.fallbacks.get(ask.model, ())
    for model in dict.fromkeys((ask.model, *fallbacks)):
        is_first = model == ask.model
        try:
            targets = _targets(gateway, model, ask.row, ask.provider if is_first else None)
            call = await _held(gateway, exchange, ask, model)
            if exchange.gone.is_set():
                call.unused("the caller left before it was forwarded", may_have_run=False)
                raise CallerGone
            return call, await call.forward(targets)
        except Refusal as refusal:
            first = first or refusal
            if is_first and not is_another_worth_asking(refusal):
                raise
            if exchange.gone.is_set():
                break
    assert first is not None
    raise first


def _targets(gateway: Gateway, model: str, row: str, provider: str | None) -> list[Target]:
    upstreams = gateway.settings.upstreams
    found = upstreams.targets(model, row, provider)
    if found:
        return found
    if upstreams.serve(model) and provider is None:
        rows = "/v1/messages" if upstreams.targets(model, "messages") else "another path"
        raise InvalidField(f"{model[:200]!r} is served on {rows} here, not on this one", param="model")
    raise unknown(model, provider)


def unknown(model: str, provider: str | None = None) -> UnknownModel:
    named = "" if provider is None else f" by the provider {provider[:100]!r}"
    return UnknownModel(f"The model {model[:200]!r} is not served here{named}; see /v1/models", param="model")


async def _held(gateway: Gateway, exchange: Exchange, ask: Ask, model: str) -> Call:
    """Raises Told."""
    verdict = await gateway.meter.authorize(
        exchange.shown(), model=model, endpoint=exchange.path, estimate=ask.estimate, features=ask.features,
        mode="clamp" if gateway.settings.clamp and ask.row != "embeddings" else "strict",
    )  # fmt: skip
    if isinstance(verdict, Denied):
        if verdict.code == "model_not_priced" and not gateway.settings.upstreams.name(model):
            raise unknown(model)
        raise Told(verdict, gateway.settings.low_balance_status)
    return Call(gateway, exchange, ask, model, verdict)
