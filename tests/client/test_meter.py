"""The client's verbs against the real app: each effect once, whatever becomes of the answers."""

from pathlib import Path

from app.client import Allowed, Charged, Done, Estimate, Usage
from tests.client.houses import (
    MODEL,
    USD_PER_INPUT,
    USD_PER_OUTPUT,
    a_meter,
    open_holds,
    sells,
)
from tests.rig import Rig

ASKED = Estimate(input_tokens=100, max_output_tokens=1000)
USED = Usage(input_tokens=100, output_tokens=50)
COST_USD = 100 * USD_PER_INPUT + 50 * USD_PER_OUTPUT


async def test_a_call_is_held_for_and_charged_by_what_it_used(rig: Rig, tmp_path: Path) -> None:
    await sells(rig)
    customer = await rig.customer("10")
    async with await a_meter(rig, tmp_path) as meter:
        verdict = await meter.authorize(customer.api_key, model=MODEL, estimate=ASKED)
        assert isinstance(verdict, Allowed)
        assert verdict.granted_output_tokens == 1000
        assert verdict.hold_usd == await rig.held(customer) == 100 * USD_PER_INPUT + 1000 * USD_PER_OUTPUT
        meter.forwarded(verdict)
        charged = await meter.settle(verdict, Done(usage=USED))
    assert isinstance(charged, Charged)
    assert charged.cost.total_cost_usd == COST_USD
    assert charged.cost.input_cost_usd == 100 * USD_PER_INPUT
    assert await rig.balance(customer) == 10 - COST_USD
    assert open_holds(rig) == 0
