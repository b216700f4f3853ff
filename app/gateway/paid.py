"""The money of one media call: held before it is forwarded, then charged or given back, once.

What cannot be counted while it comes (a picture, a recording) is charged as it was asked for as soon as an upstream has
answered; nothing is charged of what no upstream began to answer.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, Protocol

import aiohttp

from app.client import Allowed, Attributes, Charged, Denied, Done, Estimate, Meter, OnExpiry, Usage
from app.client.telling import Outcome
from app.client.wire import Outcome as CallOutcome
from app.gateway.asking import NotSent, Silent, failed, refusal_of
from app.gateway.call import is_another_worth_asking
from app.gateway.errors import Refusal, Told, UnknownModel
from app.gateway.exchange import Exchange
from app.gateway.fetching import Fetcher
from app.gateway.media import MediaStore
from app.gateway.settings import GatewaySettings
from app.gateway.upstreams import Target

_CHARGE_WAITED_SECONDS: Final = 2.0
_HOLD_SECONDS: Final = 900


class Gateway(Protocol):
    """What a media row needs of the gateway that it stands in."""

    @property
    def settings(self) -> GatewaySettings: ...
    @property
    def meter(self) -> Meter: ...
    @property
    def session(self) -> aiohttp.ClientSession: ...
    @property
    def media(self) -> MediaStore: ...
    @property
    def fetcher(self) -> Fetcher: ...


def targets_of(gateway: Gateway, model: str, row: str, provider: str | None = None) -> list[Target]:
    """Where a model can be had for this kind of call. Raises UnknownModel."""
    found = gateway.settings.upstreams.targets(model, row, provider)
    if not found:
        raise UnknownModel(f"{model[:200]!r} is not served here for {row}", param="model")
    return found


async def check_caller(gateway: Gateway, exchange: Exchange) -> None:
    """Before a stranger's file is taken, or one that they point to is fetched: may they spend at all? Raises Told."""
    verdict = await gateway.meter.verify(exchange.api_key())
    if isinstance(verdict, Denied):
        raise Told(verdict, gateway.settings.low_balance_status)


@dataclass(slots=True)
class Paid:
    """A call that money is held for. `target` is who serves it, once that is known."""

    gateway: Gateway
    allowed: Allowed
    target: Target
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    async def held(
        cls, gateway: Gateway, exchange: Exchange, target: Target, endpoint: str, estimate: Estimate,
        *, ttl_seconds: int = _HOLD_SECONDS, on_expiry: OnExpiry | None = None,
    ) -> "Paid":  # fmt: skip
        """Hold money for what the call may cost. Raises Told."""
        verdict = await gateway.meter.authorize(
            exchange.api_key(), model=target.model, endpoint=endpoint, estimate=estimate, ttl_seconds=ttl_seconds,
            on_expiry=on_expiry,
        )  # fmt: skip
        if isinstance(verdict, Denied):
            raise Told(verdict, gateway.settings.low_balance_status)
        return cls(gateway, verdict, target)

    @property
    def estimated_usd(self) -> Decimal:
        estimated = self.allowed.estimated_cost_usd
        return self.allowed.hold_usd if estimated is None else estimated

    async def answer(
        self, targets: list[Target], ask: Callable[[Target], Awaitable[aiohttp.ClientResponse]]
    ) -> aiohttp.ClientResponse:
        """The first answer of an upstream that took the call; close it. Nothing is left held when it raises.

        Raises what the upstreams refused it with, or UpstreamFailed.
        """
        self.gateway.meter.forwarded(self.allowed)
        refusal: Refusal = failed("No provider of this model can be reached")
        may_have_run = False
        for self.target in targets:
            try:
                response = await ask(self.target)
            except NotSent:
                continue
            except Silent:
                refusal, may_have_run = failed("The model's provider did not answer"), True
                continue
            if response.status < 400:
                return response
            refusal = await refusal_of(response, self.target.upstream)
            if not is_another_worth_asking(refusal):
                break
        self.unused(refusal.message, may_have_run=may_have_run)
        raise refusal

    def charge(
        self, usage: Usage, *, attributes: Attributes | None = None, upstream_id: str | None = None,
        outcome: CallOutcome = "completed", is_estimated: bool = False,
    ) -> "asyncio.Future[Outcome]":  # fmt: skip
        """Charge what was used, in the background; what is returned is told the charge."""
        done = Done(
            usage=usage, outcome=outcome, usage_estimated=is_estimated, served_model=self.target.model,
            provider=self.target.upstream.provider, attributes=attributes, upstream_id=upstream_id,
            upstream_model=self.target.upstream_model, latency_ms=(time.perf_counter() - self.began) * 1000,
        )  # fmt: skip
        return self.gateway.meter.settle(self.allowed, done)

    def unused(self, reason: str, *, may_have_run: bool) -> None:
        """Nothing came of it. What an upstream may have run is never given back as if it had not been asked."""
        if may_have_run:
            self.gateway.meter.settle(self.allowed, Done(cost_usd=Decimal(0), outcome="partial"))
        else:
            self.gateway.meter.release(self.allowed, reason[:200])

    async def cost_usd(self, charge: "asyncio.Future[Outcome]") -> Decimal | None:
        """What was charged; None where that is not known yet, because billing cannot be asked just now."""
        hurry = asyncio.create_task(self.gateway.meter.drain(_CHARGE_WAITED_SECONDS))
        try:
            with contextlib.suppress(TimeoutError):
                charged = await asyncio.wait_for(asyncio.shield(charge), _CHARGE_WAITED_SECONDS)
                return charged.cost.total_cost_usd if isinstance(charged, Charged) else None
        finally:
            hurry.cancel()
        return None
