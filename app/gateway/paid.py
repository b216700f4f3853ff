"""The money of one media call: held before it is forwarded, then charged or given back, once.

What cannot be counted while it comes (a picture, a recording) is charged as it was asked for as soon as an upstream has
answered; nothing is charged of what no upstream began to answer.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, Protocol

import aiohttp

from app.client import Allowed, Attributes, Denied, Done, Estimate, OnExpiry, Usage
from app.client.telling import Outcome
from app.client.wire import Outcome as CallOutcome
from app.gateway.billed import Billing, charge_of, first_answer, unused
from app.gateway.errors import Told, UnknownModel
from app.gateway.exchange import Exchange
from app.gateway.fetching import Fetcher
from app.gateway.media import MediaStore
from app.gateway.upstreams import Target

_HOLD_SECONDS: Final = 900


class Gateway(Billing, Protocol):
    """What a media row needs of the gateway that it stands in."""

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
    verdict = await gateway.meter.verify(exchange.shown())
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
            exchange.shown(), model=target.model, endpoint=endpoint, estimate=estimate, ttl_seconds=ttl_seconds,
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
        self.target, response = await first_answer(self.gateway.meter, self.allowed, targets, ask)
        return response

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
        return self.gateway.meter.settle(self.allowed, done, at_once=True)

    def unused(self, reason: str, *, may_have_run: bool) -> None:
        unused(self.gateway.meter, self.allowed, reason, may_have_run=may_have_run)

    async def cost_usd(self, charge: "asyncio.Future[Outcome]") -> Decimal | None:
        """What was charged; None where that is not known yet, because billing cannot be asked just now."""
        charged = await charge_of(charge)
        return None if charged is None else charged.cost.total_cost_usd
