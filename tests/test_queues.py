"""Our own queueing is ours: it is never held against the payment backend, nor against other customers."""

import asyncio
import time
from collections import Counter

import httpx
import pytest

from app.adapters.asking import Asker, Patience
from app.topups.create import AT_ONCE
from app.topups.gateway import GatewayBusy, Gateways, GatewayUnavailable
from tests.rig import FakeBtcpay, Rig


class SlowBackend:
    """Answers after a while, and counts how many questions it has at one moment."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.most = seconds, 0, 0
        self.has_no_connection = False

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.has_no_connection:
            raise httpx.PoolTimeout("none was free", request=request)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        return httpx.Response(200, json={})


def asker(backend: SlowBackend, **patience: float) -> Asker:
    client = httpx.AsyncClient(transport=httpx.MockTransport(backend))
    return Asker("BTCPay", "http://btcpay.test", {}, client=client, patience=Patience(**patience))  # type: ignore[arg-type]


async def test_150_questions_at_once_to_a_slow_backend_do_not_open_its_breaker() -> None:
    backend = SlowBackend(0.2)
    ask = asker(backend, at_once=10, turn_seconds=0.1, deadline_seconds=1)
    ends = await asyncio.gather(*(ask.ask("POST", "/") for _ in range(150)), return_exceptions=True)
    assert Counter(type(end).__name__ for end in ends) == {"Answer": 10, "GatewayBusy": 140}
    assert backend.most == 10
    assert (await ask.ask("GET", "/")).status == 200


async def test_the_deadline_counts_from_a_question_s_turn() -> None:
    ask = asker(SlowBackend(0.1), at_once=1, turn_seconds=5, deadline_seconds=0.15)
    answers = await asyncio.gather(*(ask.ask("POST", "/") for _ in range(5)))
    assert [answer.status for answer in answers] == [200] * 5


async def test_a_pool_without_a_free_connection_does_not_open_the_breaker() -> None:
    backend = SlowBackend(0)
    ask = asker(backend, break_after=3)
    backend.has_no_connection = True
    for _ in range(10):
        with pytest.raises(GatewayBusy):
            await ask.ask("GET", "/")
    backend.has_no_connection = False
    assert (await ask.ask("GET", "/")).status == 200


async def test_a_backend_that_does_not_answer_in_time_still_opens_it() -> None:
    backend = SlowBackend(10)
    ask = asker(backend, break_after=3, deadline_seconds=0.02)
    for _ in range(3):
        with pytest.raises(GatewayUnavailable, match="did not answer within"):
            await ask.ask("POST", "/")
    with pytest.raises(GatewayUnavailable, match="is not answering"):
        await ask.ask("POST", "/")


async def test_a_caller_who_leaves_gives_the_turn_back() -> None:
    backend = SlowBackend(0.05)
    ask = asker(backend, at_once=1, turn_seconds=1)
    for _ in range(5):
        callers = [asyncio.create_task(ask.ask("GET", "/")) for _ in range(3)]
        await asyncio.sleep(0.01)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    assert (await ask.ask("GET", "/")).status == 200


async def test_150_topups_of_one_customer_at_once_keep_no_other_waiting(rig: Rig) -> None:
    many, other = await rig.customer(), await rig.customer()
    rig.btcpay.seconds = 0.5

    async def make(headers: dict[str, str], amount: int = 20) -> httpx.Response:
        body = {"amount": amount, "currency": "USD"}  # the same wish again would be answered by the first one's invoice
        return await rig.client.post("/topup/create/btc", headers=headers, json=body)

    crowd = [asyncio.create_task(make(many.key, 20 + number)) for number in range(150)]
    await asyncio.sleep(0.2)
    began = time.monotonic()
    assert (await make(other.key)).status_code == 201
    waited = time.monotonic() - began
    answers = Counter(answer.status_code for answer in await asyncio.gather(*crowd))
    assert waited < 2
    assert rig.btcpay.most_at_once <= AT_ONCE + 1
    assert set(answers) == {201, 429}
    rig.btcpay.seconds = 0
    assert (await make(many.key)).status_code in (201, 429)  # nothing is stuck


async def test_however_many_ask_whether_we_are_ready_the_backend_is_asked_once_in_some_seconds() -> None:
    class Counting(FakeBtcpay):
        asked = 0

        async def is_healthy(self) -> bool:
            self.asked += 1
            await asyncio.sleep(0.01)
            return not self.is_down

    backend, now = Counting(), [0.0]
    gateways = Gateways({"btc": backend}, monotonic=lambda: now[0])
    assert await asyncio.gather(*(gateways.are_healthy() for _ in range(100))) == [True] * 100
    backend.is_down = True
    now[0] = 4.9
    assert await gateways.are_healthy()
    assert backend.asked == 1
    now[0] = 5.0
    assert await asyncio.gather(*(gateways.are_healthy() for _ in range(100))) == [False] * 100
    assert backend.asked == 2
    leaving = asyncio.create_task(gateways.are_healthy())
    leaving.cancel()
    assert not await gateways.are_healthy()
