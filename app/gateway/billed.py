"""What every call that money is held for has in common: who is asked, what becomes of one that came to nothing, and what it cost.

A call that an upstream refused is given back: it never ran. One that went silent may have run: it is settled at nothing,
and never given back as if it had not been asked.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from decimal import Decimal
from typing import Final, Protocol

import aiohttp

from app.client import Allowed, Charged, Done, Meter
from app.client.telling import Outcome
from app.gateway.asking import NotSent, Silent, failed, refusal_of
from app.gateway.errors import Refusal, UpstreamFailed
from app.gateway.settings import GatewaySettings
from app.gateway.upstreams import Target

CHARGE_WAITED_SECONDS: Final = 2.0
"""For how long a caller waits to be told what a call cost."""


class Billing(Protocol):
    """What any paid row needs of the gateway that it stands in."""

    @property
    def settings(self) -> GatewaySettings: ...
    @property
    def meter(self) -> Meter: ...
    @property
    def session(self) -> aiohttp.ClientSession: ...


async def first_answer(
    meter: Meter,
    allowed: Allowed,
    targets: Iterable[Target],
    ask: Callable[[Target], Awaitable[aiohttp.ClientResponse]],
) -> tuple[Target, aiohttp.ClientResponse]:
    """The first upstream that took the call, and its answer; close it. The call was noted as forwarded.

    Raises what the upstreams refused it with, or UpstreamFailed: then nothing is left held.
    """
    refusal: Refusal = failed("No provider of this model can be reached")
    may_have_run = False
    for target in targets:
        try:
            response = await ask(target)
        except NotSent:
            continue
        except Silent:
            refusal, may_have_run = failed("The model's provider did not answer"), True
            continue
        if response.status < 400:
            return target, response
        refusal = await refusal_of(response, target.upstream)
        if not is_another_worth_asking(refusal):
            break
    unused(meter, allowed, refusal.message, may_have_run=may_have_run)
    raise refusal


def is_another_worth_asking(refusal: Refusal) -> bool:
    """Whether somebody else may serve what one upstream refused: it was busy, broken, or does not have the model."""
    return isinstance(refusal, UpstreamFailed) or refusal.status in (404, 429)


def unused(meter: Meter, allowed: Allowed, reason: str, *, may_have_run: bool) -> None:
    """Nothing came of it. What an upstream may have run is never given back as if it had not been asked."""
    if may_have_run:
        meter.settle(allowed, Done(cost_usd=Decimal(0), outcome="partial"))
    else:
        meter.release(allowed, reason)


async def charge_of(told: "asyncio.Future[Outcome]") -> Charged | None:
    """What Satmeter charged; None where it could not be asked in time."""
    with contextlib.suppress(TimeoutError):
        outcome = await asyncio.wait_for(asyncio.shield(told), CHARGE_WAITED_SECONDS)
        return outcome if isinstance(outcome, Charged) else None
    return None
