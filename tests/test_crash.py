"""kill -9 in the middle of a load: whatever was acknowledged is there once, whatever is unknown converges to one effect."""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import httpx
import psutil
import pytest

from app.ledger.charge import ChargeId
from tests.load import Call, Load
from tests.program import Program, all_gone, eventually, installation

pytestmark = pytest.mark.long

Kill = Callable[[Program], None]


# --- ways to die --------------------------------------------------------------------------------------


def kill_parent(program: Program) -> None:
    """The parent alone: its children read the end of their pipe and leave."""
    children = program.children("http") + program.children("sandbox")
    program.parent.kill()
    program.wait()
    eventually(lambda: all_gone(children))


def kill_server(program: Program) -> None:
    """The parent and its children, not PostgreSQL."""
    _kill_at_once([program.parent, *program.children("http"), *program.children("sandbox")])
    program.wait()


def kill_everything(program: Program) -> None:
    """As a power cut does, but for the disk's cache."""
    _kill_at_once(program.processes())
    program.wait()


def kill_postgres(program: Program) -> None:
    """The postmaster and every backend; the server lives on and must heal by itself."""
    postmaster = program.postmaster()
    assert postmaster is not None
    _kill_at_once([postmaster, *postmaster.children(recursive=True)])


def kill_postmaster(program: Program) -> None:
    """The postmaster alone: its backends notice, and leave."""
    postmaster = program.postmaster()
    assert postmaster is not None
    _kill_at_once([postmaster])


def _kill_at_once(processes: list[Any]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a backend that ended by itself
            process.kill()
    eventually(lambda: all_gone(processes))


# --- a round: load, kill, heal, repeat, look ------------------------------------------------------------


async def a_round(program: Program, demo: dict[str, str], kill: Kill, seed: int) -> tuple[Load, Counter[str]]:
    """One kill in the middle of a load. Returns the load, every call of it acknowledged, and what was counted."""
    load, stop = Load(demo, seed), asyncio.Event()
    working = asyncio.create_task(load.work(stop))
    async with asyncio.timeout(30):
        while len(load.acknowledged) < 40:
            await asyncio.sleep(0.02)
    await asyncio.sleep(random.Random(seed).uniform(0, 0.3))
    await asyncio.to_thread(kill, program)
    killed_at = time.monotonic()
    if program.is_alive:
        await asyncio.to_thread(program.wait_until_ready)
        seconds_down = time.monotonic() - killed_at
        await asyncio.sleep(0.3)  # healed under the load
        stop.set()
        await working
    else:
        stop.set()
        await working
        await asyncio.to_thread(program.run)
        seconds_down = time.monotonic() - killed_at
    counted = Counter(acked=len(load.acknowledged), unknown=len(load.unknown), unavailable=load.unavailable)
    counted["committed"] = len([call for call in load.unknown if is_there(program, call)])
    counted["lost"] = len([call for call in load.acknowledged if not is_there(program, call)])
    counted["ms_down"] = int(seconds_down * 1000)
    assert load.wrong == []
    return load, counted


def is_there(program: Program, call: Call) -> bool:
    """Whether a call's effect is in the books, whatever its caller was told."""
    match call.kind:
        case "charge" | "settle":
            found = program.sql("SELECT account_id, id FROM usage WHERE request_id = %s", call.id)
            assert len(found) <= 1, "charged twice"
            if found and call.answer:
                assert str(ChargeId(*found[0])) == call.answer["charge_id"]
        case "authorize":
            found = program.sql("SELECT id FROM hold WHERE request_id = %s", call.id)
        case "release":
            found = program.sql("SELECT id FROM hold WHERE request_id = %s AND state = 'released'", call.id)
        case "capture":
            found = program.sql("SELECT id FROM hold WHERE request_id = %s AND captured_nusd = 20000000", call.id)
        case "key":
            found = program.sql("SELECT id FROM api_key WHERE name = %s", call.body["name"])
            if found and call.answer:
                assert str(found[0][0]) == call.answer["data"]["_id"]
        case _:
            if call.answer is None:
                return False  # its id is the server's; `one_effect_each` counts them
            found = program.sql("SELECT id FROM topup WHERE invoice_id = %s", call.answer["invoice_id"])
    return len(found) == 1


async def one_effect_each(program: Program, demo: dict[str, str], loads: list[Load], paid_usd: Decimal) -> None:
    """After every unknown call was repeated: each call is in the books once, and nothing else is."""
    calls = [call for load in loads for call in load.calls]
    assert all(call.answer is not None and is_there(program, call) for call in calls)

    charges = [call for call in calls if call.kind in ("charge", "settle")]
    assert len({call.answer["charge_id"] for call in charges}) == len(charges)
    spent = sum((call.cost_usd for call in charges), Decimal(0))
    ((count, total_nusd),) = program.sql("SELECT count(*), coalesce(sum(cost_nusd), 0) FROM usage")
    assert (count, Decimal(total_nusd) / 10**9) == (len(charges), spent)

    topups = [call for call in calls if call.kind == "topup"]
    assert len({call.answer["invoice_id"] for call in topups}) == len(topups)
    assert program.sql("SELECT count(*) FROM topup") == [(len(topups) + 1,)]  # and the demo's
    keys = [call for call in calls if call.kind == "key"]
    assert program.sql("SELECT count(*) FROM api_key") == [(len(keys) + 1,)]

    eventually(lambda: balance(demo) == Decimal("5.25") + paid_usd - spent, 30)
    report = await asyncio.to_thread(program.answer, "audit")
    assert report["findings"] == []


def balance(demo: dict[str, str]) -> Decimal:
    response = httpx.get(
        f"{demo['base_url']}/credits/balance", headers={"x-credit-id": demo["credit_id"]}, timeout=15, trust_env=False
    )
    assert response.status_code == 200, response.text
    return Decimal(str(json.loads(response.text, parse_float=Decimal)["balance"]))


async def pay_some(demo: dict[str, str], load: Load, count: int) -> Decimal:
    """Pay a few of the acknowledged Lightning top-ups in the sandbox; returns what they are worth, bonus included."""
    lightning = [call for call in load.acknowledged if call.path.endswith("btc-lightning")][:count]
    async with httpx.AsyncClient(base_url=demo["sandbox_url"], timeout=15, trust_env=False) as client:
        for call in lightning:
            response = await client.post(f"/sandbox/invoices/{call.answer['invoice_id']}/pay", json={})
            assert response.status_code == 200, response.text
    return Decimal("12.50") * Decimal("1.05") * len(lightning)


async def tell_a_lease_later(program: Program) -> None:
    """A first request that died holding its Idempotency-Key is known to be dead after seconds: let that be now."""
    program.sql("UPDATE idempotency SET claimed_until = now() WHERE answer IS NULL")


# --- the promises -----------------------------------------------------------------------------------------


async def test_one_kill_of_the_server_and_one_of_postgresql_lose_nothing_and_double_nothing() -> None:
    with installation() as program:
        await asyncio.to_thread(program.run)
        demo = await asyncio.to_thread(program.answer, "demo")
        loads, paid_usd = [], Decimal(0)
        for seed, kill in enumerate((kill_postgres, kill_everything)):
            load, counted = await a_round(program, demo, kill, seed)
            print(f"\n{kill.__name__}: {dict(counted)}", end="")
            assert counted["acked"] >= 40
            assert counted["lost"] == 0
            await tell_a_lease_later(program)
            await load.repeat_unknown()
            assert load.wrong == []
            paid_usd += await pay_some(demo, load, 2)
            loads.append(load)
        await one_effect_each(program, demo, loads, paid_usd)
        assert "Traceback" not in program.printed + program.logged
        assert program.interrupt() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([kill_parent, kill_server, kill_everything] * 2, id="server"),
        pytest.param([kill_postgres, kill_postgres, kill_postmaster] * 2, id="postgresql"),
    ],
)
async def test_many_kills_lose_nothing_and_double_nothing(kills: list[Kill]) -> None:
    total: Counter[str] = Counter()
    with installation() as program:
        await asyncio.to_thread(program.run)
        demo = await asyncio.to_thread(program.answer, "demo")
        loads, paid_usd = [], Decimal(0)
        for seed, kill in enumerate(kills):
            load, counted = await a_round(program, demo, kill, seed)
            print(f"\n  {kill.__name__}: {dict(counted)}", end="", flush=True)
            total += counted
            paid_usd += await pay_some(demo, load, 3)
            loads.append(load)
        for load in loads:
            await load.repeat_unknown(90)  # a claim of the dead is waited for, a minute at most
            assert load.wrong == []
        await one_effect_each(program, demo, loads, paid_usd)
        assert "Traceback" not in program.printed + program.logged
        assert program.interrupt() == 0
    print(
        f"\n{len(kills)} kills: {total['acked']} acknowledged, {total['unknown']} unknown of which {total['committed']} had"
        f" committed, {total['unavailable']} answers 503, {total['lost']} lost"
    )
    assert total["lost"] == 0
    assert total["unknown"] > 0
