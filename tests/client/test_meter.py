"""The client's verbs against the real app: each effect once, whatever becomes of the answers."""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.client import (
    Allowed,
    Charged,
    Denied,
    Done,
    Estimate,
    Hold,
    Meter,
    Refunded,
    Refused,
    Unavailable,
    Usage,
    Verified,
)
from app.client.wire import Attributes, Extended
from tests.client.houses import (
    ASKED,
    COST_USD,
    MODEL,
    USD_PER_INPUT,
    USD_PER_OUTPUT,
    USED,
    Wire,
    a_meter,
    allowed,
    calls,
    eventually,
    holds,
    open_holds,
)
from tests.rig import Customer, Rig


async def test_a_call_is_held_for_and_charged_by_what_it_used(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        call = await allowed(meter, customer)
        assert call.granted_output_tokens == 1000
        assert call.hold_usd == await rig.held(customer) == 100 * USD_PER_INPUT + 1000 * USD_PER_OUTPUT
        meter.forwarded(call)
        charged = await meter.settle(call, Done(usage=USED))
    assert isinstance(charged, Charged)
    assert charged.cost.total_cost_usd == COST_USD
    assert charged.cost.input_cost_usd == 100 * USD_PER_INPUT
    assert await rig.balance(customer) == 10 - COST_USD
    assert open_holds(rig) == 0


async def test_a_denial_has_all_that_the_proxy_sends_its_caller(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    poor = await rig.customer()
    rig.house.mint.patience_seconds = 20  # this is not about how long an offer may take
    async with await a_meter(rig, tmp_path) as meter:
        for key, status, code in (
            (poor.api_key, 402, "insufficient_balance"), ("sk-nobody", 401, "invalid_api_key"), (None, 401, "invalid_api_key"),
            ("", 401, "invalid_api_key"), ("kéy\udcff", 401, "invalid_api_key"),
        ):  # fmt: skip
            denied = await meter.authorize(key, model=MODEL, estimate=ASKED)
            assert isinstance(denied, Denied)
            assert not isinstance(denied, Unavailable)
            assert (denied.status, denied.code) == (status, code)
            body = json.loads(denied.body())
            assert body["error"]["code"] == code
            assert (body["message"], body["statusCode"]) == (body["error"]["message"], status)
            scheme = "L402" if status == 402 else "Bearer"  # want of money bears an offer, which the proxy hands on
            assert denied.headers.get("www-authenticate", "").split(" ")[0] == scheme
            assert ("offer" in body["error"].get("metadata", {})) == (status == 402)
        not_sold = await meter.authorize(customer.api_key, model="no-such-model", estimate=ASKED)
        assert isinstance(not_sold, Denied)
        assert (not_sold.status, not_sold.code) == (422, "model_not_priced")
    assert b'"required_usd":0.000615' in (await _denied(rig, poor, tmp_path)).body(), "figures as Satmeter wrote them"


async def _denied(rig: Rig, customer: Customer, spool: Path) -> Denied:
    async with await a_meter(rig, spool) as meter:
        denied = await meter.authorize(customer.api_key, model=MODEL, estimate=ASKED)
    assert isinstance(denied, Denied)
    return denied


async def test_funds_held_by_other_calls_are_a_429_that_says_when(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        first = await meter.authorize(customer.api_key, max_cost_usd=Decimal("9.99"))
        assert isinstance(first, Allowed)
        denied = await meter.authorize(customer.api_key, max_cost_usd=Decimal(5))
        assert isinstance(denied, Denied)
        assert (denied.status, denied.code, denied.headers["retry-after"]) == (429, "funds_held", "2")
        await meter.release(first)
    assert await rig.held(customer) == 0


async def test_clamp_grants_what_there_is(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        wanted = Estimate(input_tokens=0, max_output_tokens=16384, n=128)
        call = await meter.authorize(
            customer.api_key, model=MODEL, estimate=wanted, mode="clamp", max_hold_usd=Decimal("0.01")
        )
        assert isinstance(call, Allowed)
        assert call.clamped
        assert call.granted_output_tokens == int(Decimal("0.01") / 128 / USD_PER_OUTPUT)
        await meter.release(call)


@pytest.mark.parametrize("verb", ["settle", "release"])
async def test_what_gets_no_answer_is_told_until_it_has_one_and_has_one_effect(
    rig: Rig, customer: Customer, tmp_path: Path, verb: str
) -> None:
    wire = Wire(rig)
    async with await a_meter(rig, tmp_path, wire) as meter:
        call = await allowed(meter, customer)
        wire.loses, wire.fails = 2, 1
        told = meter.settle(call, Done(usage=USED)) if verb == "settle" else meter.release(call)
        outcome = await asyncio.wait_for(told, 10)
        assert len([path for path in wire.paths() if "authorize" not in path]) == 4
    if verb == "settle":
        assert isinstance(outcome, Charged)
    assert await rig.balance(customer) == 10 - (COST_USD if verb == "settle" else 0)
    assert (len(calls(rig)), open_holds(rig)) == (int(verb == "settle"), 0)


@pytest.mark.parametrize("words", ["two\nlines\x00\x7f\u2028", "", "é" * 900], ids=["odd", "none", "long"])
async def test_whatever_words_an_upstream_refuses_with_give_back_what_was_held(
    rig: Rig, customer: Customer, tmp_path: Path, words: str
) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        assert await meter.release(await allowed(meter, customer), words) is None
        charged = await meter.settle(await allowed(meter, customer), Done(usage=USED, attributes=Attributes(size="")))
        assert isinstance(charged, Charged)
        assert isinstance(await meter.refund(charged.charge_id, reason=words), Refunded)
    assert (open_holds(rig), await rig.balance(customer)) == (0, Decimal(10))
    assert list(tmp_path.rglob("refused.jsonl")) == []


async def test_an_authorize_is_repeated_under_its_id_and_holds_once(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    wire = Wire(rig, loses=1, fails=1)
    async with await a_meter(rig, tmp_path, wire) as meter:
        call = await allowed(meter, customer)
        ids = [json.loads(body)["request_id"] for _, body in wire.asked]
        assert ids == [call.request_id] * 3
        assert await rig.held(customer) == call.hold_usd
        await meter.release(call)


async def test_satmeter_away_is_a_503_at_once_and_nothing_stays_held(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    wire = Wire(rig, is_cut=True)
    async with await a_meter(rig, tmp_path, wire) as meter:
        away = await asyncio.wait_for(meter.authorize(customer.api_key, model=MODEL, estimate=ASKED), 5)
        assert isinstance(away, Unavailable)
        assert (away.status, away.headers["retry-after"], away.code) == (503, "2", "billing_unavailable")
        assert meter.owed == 0, "nothing was sent, so that nothing is to be given back"
        assert isinstance(await meter.verify(customer.api_key), Unavailable)


async def test_what_an_authorize_without_an_answer_held_is_given_back(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    wire = Wire(rig, loses=3)
    async with await a_meter(rig, tmp_path, wire) as meter:
        assert isinstance(await meter.authorize(customer.api_key, model=MODEL, estimate=ASKED), Unavailable)
        assert await meter.drain(10) == 0
    assert list(holds(rig).values()) == ["released"]
    assert await rig.held(customer) == 0


async def test_a_caller_who_hangs_up_while_it_is_asked_leaves_nothing_held(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    class Slow(Wire):
        async def post(self, *asked: Any) -> Any:
            answer = await super().post(*asked)
            if len(self.asked) == 1:
                await asyncio.sleep(30)
            return answer

    async with await a_meter(rig, tmp_path, Slow(rig)) as meter:
        asking = asyncio.create_task(meter.authorize(customer.api_key, model=MODEL, estimate=ASKED))
        await eventually(lambda: open_holds(rig) == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await meter.drain(10) == 0
    assert open_holds(rig) == 0


async def test_settles_go_by_batches_each_with_its_own_verdict(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    wire = Wire(rig)
    async with await a_meter(rig, tmp_path, wire, settle_seconds=0.05) as meter:
        made = [await allowed(meter, customer) for _ in range(20)]
        told = [meter.settle(call, Done(usage=USED)) for call in made[:10]]
        bad = meter.settle(Hold("forged", "no-hold"), Done(usage=USED))
        told += [meter.settle(call, Done(usage=USED)) for call in made[10:]]
        assert await meter.drain(10) == 0
        assert wire.paths()[20:] == ["/v1/meter/settle/batch"]
        assert all(isinstance(each.result(), Charged) for each in told)
        refused = await bad
        assert isinstance(refused, Refused)
        assert refused.status == 404
    assert await rig.balance(customer) == 10 - 20 * COST_USD


async def test_a_call_settled_twice_is_charged_as_was_said_first(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        call = await allowed(meter, customer)
        first = meter.settle(call, Done(usage=USED))
        second = meter.settle(call, Done(usage=Usage(input_tokens=9, output_tokens=9)))
        assert await first == await second
        third = await meter.settle(call, Done(usage=Usage(input_tokens=9, output_tokens=9)))
        assert isinstance(third, Charged)
        assert third.cost.total_cost_usd == COST_USD
        assert await meter.release(call) is None, "there is nothing to give back any more"
    assert len(calls(rig)) == 1


async def test_odd_words_of_an_upstream_are_no_reason_not_to_be_paid(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    odd = Done(
        usage=Usage(input_tokens=100, output_tokens=50, reasoning_tokens=-3, audio_seconds=float("nan")),
        served_model=MODEL, upstream_id="x\n" * 300, provider="", latency_ms=1e18, ttft_ms=-1,
        provider_cost_usd=Decimal(1) / 3,
    )  # fmt: skip
    async with await a_meter(rig, tmp_path) as meter:
        charged = await meter.settle(await allowed(meter, customer), odd)
    assert isinstance(charged, Charged)
    assert charged.cost.total_cost_usd == COST_USD
    assert calls(rig)[0]["provider_cost_nusd"] == 333_333_333


async def test_what_a_stream_has_cost_so_far_is_captured_and_can_be_released_no_more(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    async with await a_meter(rig, tmp_path, capture_seconds=0.005) as meter:
        call = await allowed(meter, customer)
        produced = 0
        meter.forwarded(call, lambda: Usage(input_tokens=100, output_tokens=produced))
        produced = 40
        await eventually(lambda: _captured(rig) == int((100 * USD_PER_INPUT + 40 * USD_PER_OUTPUT) * 10**9))
        charged = await meter.release(call, "the client thinks that it was refused")
        assert isinstance(charged, Charged)
        assert charged.cost.total_cost_usd == 100 * USD_PER_INPUT + 40 * USD_PER_OUTPUT
    [row] = calls(rig)
    assert row["outcome"] == "partial"
    assert "usage_estimated" in row["flags"]


def _captured(rig: Rig) -> int:
    with psycopg.connect(rig.database_url) as conn:
        found = conn.execute("SELECT captured_nusd FROM hold").fetchone()
        assert found is not None
        return int(found[0])


async def test_extend_keeps_a_hold_and_says_what_is_left(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        call = await allowed(meter, customer)
        extended = await meter.extend(call, ttl_seconds=3600, captured_usd=Decimal("0.5"))
        assert isinstance(extended, Extended)
        assert (extended.hold_usd, extended.available_usd) == (Decimal("0.5"), Decimal("9.5"))
        await meter.settle(call, Done(cost_usd=Decimal("0.6")))
        closed = await meter.extend(call)
        assert isinstance(closed, Refused)
        assert closed.status == 409
    assert await rig.balance(customer) == Decimal("9.4")


async def test_a_charge_for_work_done_is_made_once_also_where_its_answer_is_lost(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    wire = Wire(rig)
    async with await a_meter(rig, tmp_path, wire) as meter:
        charged = await meter.charge(customer.api_key, Done(usage=USED), model=MODEL, request_id="job-1")
        again = await meter.charge(customer.api_key, Done(usage=USED), model=MODEL, request_id="job-1")
        assert isinstance(charged, Charged)
        assert isinstance(again, Charged)
        assert again.charge_id == charged.charge_id
    async with await a_meter(rig, tmp_path, wire, ask_seconds=0.1) as meter:
        wire.is_cut = True
        assert isinstance(await meter.charge(customer.api_key, Done(usage=USED), model=MODEL), Unavailable)
        wire.is_cut = False
        assert await meter.drain(20) == 0
    assert await rig.balance(customer) == 10 - 2 * COST_USD
    poor = await rig.customer()
    async with await a_meter(rig, tmp_path) as meter:
        denied = await meter.charge(poor.api_key, Done(cost_usd=Decimal(1)))
        assert isinstance(denied, Denied)
        assert (denied.status, denied.code) == (402, "insufficient_balance")


async def test_money_is_given_back_once_also_where_the_answer_is_lost(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    wire = Wire(rig)
    async with await a_meter(rig, tmp_path, wire) as meter:
        charged = await meter.charge(customer.api_key, Done(usage=USED), model=MODEL)
        assert isinstance(charged, Charged)
        wire.loses = 1
        part = COST_USD / 4
        given = await meter.refund(charged.charge_id, amount_usd=part, reason="it was slow")
        assert isinstance(given, Refunded)
        assert (given.refunded_usd, given.balance_usd) == (part, 10 - COST_USD + part)
        assert await meter.refund(charged.charge_id, amount_usd=part) == given
        other = await meter.refund(charged.charge_id)
        assert isinstance(other, Refused)
        assert (other.status, other.error["code"]) == (409, "already_refunded")
        nobodys = await meter.refund("nobody's")
        assert isinstance(nobodys, Refused)
        assert nobodys.status == 404
    assert await rig.balance(customer) == 10 - COST_USD + part
    await rig.audit()


async def test_a_refund_that_was_not_told_is_told_by_the_next_process(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    wire = Wire(rig)
    async with await a_meter(rig, tmp_path, wire) as meter:
        charged = await meter.charge(customer.api_key, Done(usage=USED), model=MODEL)
        assert isinstance(charged, Charged)
    async with await a_meter(rig, tmp_path, wire, ask_seconds=0.1, drain_seconds=0) as meter:
        wire.is_cut = True
        assert isinstance(await meter.refund(charged.charge_id), Unavailable)
    async with await a_meter(rig, tmp_path) as meter:
        assert await meter.drain(20) == 0
    assert await rig.balance(customer) == 10


async def test_who_cannot_wait_is_told_the_charge_at_once(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path, settle_seconds=3600, drain_seconds=20) as meter:
        patient, hurried = [await allowed(meter, customer) for _ in range(2)]
        waits = meter.settle(patient, Done(usage=USED))
        charged = await asyncio.wait_for(meter.settle(hurried, Done(usage=USED), at_once=True), 20)
        assert isinstance(charged, Charged)
        assert isinstance(await waits, Charged), "it goes along"
        late = meter.settle(await allowed(meter, customer), Done(usage=USED))
        await asyncio.sleep(0.05)
        assert not late.done(), "the hurry is over with what was in a hurry"
    assert await rig.balance(customer) == 10 - 3 * COST_USD


async def test_verify_says_whose_key_it_is(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        found = await meter.verify(customer.api_key, model=MODEL)
        assert isinstance(found, Verified)
        assert found.available_usd == 10
        denied = await meter.verify("sk-nobody")
        assert isinstance(denied, Denied)
        assert denied.status == 401


async def test_a_wrong_token_or_address_blames_no_customer_and_loses_no_settle(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        call = await allowed(meter, customer)
        meter.forwarded(call)

    @dataclass
    class Astray(Wire):
        path: str = "/v1/"
        token: dict[str, str] = field(default_factory=dict)

        async def post(self, url: str, headers: Any, body: bytes, timeout_seconds: float) -> Any:
            return await super().post(url.replace("/v1/", self.path), dict(headers) | self.token, body, timeout_seconds)

    for astray in (Astray(rig, token={"authorization": "Bearer svc-none"}), Astray(rig, path="/v9/")):
        async with await a_meter(rig, tmp_path, astray, drain_seconds=0.3) as meter:
            away = await meter.authorize(customer.api_key, model=MODEL, estimate=ASKED)
            assert isinstance(away, Unavailable)
            assert meter.owed == 1, "the call that the one before forwarded"
        assert calls(rig) == []
    async with await a_meter(rig, tmp_path) as meter:
        assert await meter.drain(10) == 0
    assert [row["outcome"] for row in calls(rig)] == ["partial"]


async def test_a_satmeter_that_hangs_or_is_not_there_is_given_up_in_time() -> None:
    taken: list[asyncio.StreamWriter] = []

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)
        with contextlib.suppress(OSError):
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while await reader.read(65536):
                pass

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Meter(url, "svc-x", spool=None, ask_seconds=2, drain_seconds=0) as meter:
            verdict = await asyncio.wait_for(meter.authorize("sk-x", max_cost_usd=Decimal(1)), 20)
            assert isinstance(verdict, Unavailable)
            assert meter.owed == 1, "it may have been held"
            assert 2 <= len(taken) <= 4
        for writer in taken:
            writer.close()
    async with Meter(url, "svc-x", spool=None, drain_seconds=0) as meter:
        began = time.monotonic()
        assert isinstance(await meter.authorize("sk-x", max_cost_usd=Decimal(1)), Unavailable)
        assert time.monotonic() - began < 2, "nobody listens: it takes no timeout to know that"
        assert meter.owed == 0


async def test_a_tick_that_fails_is_not_the_last_one(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path, capture_seconds=0.005) as meter:
        call = await allowed(meter, customer)
        used: list[Usage] = []

        def so_far() -> Usage:
            if not used:
                raise ValueError("a defect of the proxy's")
            return used[0]

        meter.forwarded(call, so_far)
        await asyncio.sleep(0.05)
        used.append(Usage(input_tokens=100, output_tokens=7))
        await eventually(lambda: _captured(rig) > 0)
        await meter.settle(call, Done(usage=USED))
