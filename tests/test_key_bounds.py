"""What bounds the single calls of a key: how many there may be in a minute, and how dear one may be."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from tests.rig import Customer, Rig, exact

D = Decimal


async def bounded(rig: Rig, customer: Customer, **bounds: Any) -> str:
    made = await rig.new_key(customer, **bounds)
    return str(made["api_key"])


def a_minute_later(rig: Rig) -> None:
    with psycopg.connect(rig.database_url, autocommit=True) as conn:
        conn.execute("UPDATE api_key SET minute_start = minute_start - interval '1 minute'")


async def in_one_minute(rig: Rig, do: Callable[[], Awaitable[list[Any]]]) -> list[Any]:
    """What was answered, all within one minute of the database's; done again where another one began meanwhile."""

    def minute() -> object:
        with psycopg.connect(rig.database_url) as conn:
            return conn.execute("SELECT date_trunc('minute', now())").fetchone()

    before, answers = minute(), await do()
    return answers if minute() == before else await do()


def verdicts(answers: list[Any]) -> Counter[str]:
    return Counter(each["error"]["code"] if each["decision"] == "deny" else "allow" for each in answers)


@pytest.mark.parametrize("is_at_once", [True, False])
@pytest.mark.parametrize("verb", ["authorize", "charge"])
async def test_a_key_makes_as_many_requests_a_minute_as_it_may(rig: Rig, verb: str, is_at_once: bool) -> None:
    customer = await rig.customer("10")

    async def ask(key: str) -> Any:
        if verb == "authorize":
            return await rig.authorize(key, "0.01")
        number = next(numbers)
        return exact(await rig.meter("charge", request_id=f"c{number}", api_key=key, cost_usd="0.01"))

    numbers = iter(range(1000))

    async def twelve() -> list[Any]:
        key = await bounded(rig, customer, name=f"k{next(numbers)}", requests_per_minute=5)
        if is_at_once:
            return list(await asyncio.gather(*(ask(key) for _ in range(12))))
        return [await ask(key) for _ in range(12)]

    answers = await in_one_minute(rig, twelve)
    assert verdicts(answers) == {"allow": 5, "rate_limit_exceeded": 7}
    denied = next(each for each in answers if each["decision"] == "deny")
    assert denied["status"] == 429
    assert denied["error"]["metadata"]["limit_source"] == "requests_per_minute"
    assert 1 <= denied["error"]["metadata"]["retry_after"] <= 60


async def test_the_next_minute_begins_at_nothing_and_other_keys_are_not_counted_together(rig: Rig) -> None:
    customer = await rig.customer("10")

    async def calls() -> list[Any]:
        key = await bounded(rig, customer, name="one", requests_per_minute=2)
        answers = [await rig.authorize(key, "0.01") for _ in range(3)]
        a_minute_later(rig)
        answers += [await rig.authorize(key, "0.01") for _ in range(3)]
        return [*answers, *[await rig.authorize(customer.api_key, "0.01") for _ in range(4)]]

    answers = await in_one_minute(rig, calls)
    assert [each["decision"] for each in answers] == ["allow", "allow", "deny"] * 2 + ["allow"] * 4


async def test_a_repeat_a_refusal_and_a_settle_are_no_requests(rig: Rig) -> None:
    customer = await rig.customer("10")

    async def calls() -> list[Any]:
        key = await bounded(rig, customer, name="one", requests_per_minute=2)
        first = await rig.authorize(key, "0.01", request_id="once")
        answers = [first, await rig.authorize(key, "0.01", request_id="once"), await rig.authorize(key, "50")]
        assert (await rig.meter("settle", hold_id=first["hold_id"], cost_usd="0.01")).status_code == 200
        return [*answers, await rig.authorize(key, "0.01"), await rig.authorize(key, "0.01")]

    answers = await in_one_minute(rig, calls)
    assert verdicts(answers) == {"allow": 3, "insufficient_balance": 1, "rate_limit_exceeded": 1}
    assert answers[-1]["decision"] == "deny"


async def test_a_call_that_may_cost_more_than_one_may_is_refused_and_a_clamped_one_made_smaller(rig: Rig) -> None:
    customer = await rig.customer("10")
    key = await bounded(rig, customer, max_usd_per_call="0.05")
    denied = await rig.authorize(key, "0.06")
    assert (denied["status"], denied["error"]["code"]) == (402, "key_limit_exceeded")
    told = denied["error"]["metadata"]
    assert (told["limit_source"], told["required_usd"], told["limit_usd"]) == ("max_usd_per_call", D("0.06"), D("0.05"))
    assert exact(await rig.meter("charge", request_id="dear", api_key=key, cost_usd="0.06"))["decision"] == "deny"
    held = await rig.authorize(key, "0.05")
    assert held["decision"] == "allow"
    await rig.settle(held["hold_id"], "0.07")  # it was used
    assert await rig.balance(customer) == D("9.93")


async def test_an_exhausted_minute_is_told_to_who_asks_without_a_hold(rig: Rig) -> None:
    customer = await rig.customer("10")

    async def calls() -> list[Any]:
        key = await bounded(rig, customer, name="one", requests_per_minute=1)
        before = exact(await rig.meter("verify", api_key=key))
        await rig.authorize(key, "0.01")
        return [before, exact(await rig.meter("verify", api_key=key))]

    before, after = await in_one_minute(rig, calls)
    assert before["decision"] == "allow"
    assert after["error"]["code"] == "rate_limit_exceeded"


async def test_both_are_shown_changed_and_taken_away(rig: Rig) -> None:
    customer = await rig.customer("10")
    made = await rig.new_key(customer, name="bounded", requests_per_minute=60, max_usd_per_call="0.5")
    assert (made["requests_per_minute"], made["max_usd_per_call"]) == (60, D("0.5"))

    async def patched(**wanted: Any) -> Any:
        return await rig.client.patch(f"/keys/{made['_id']}", headers=customer.owner, json=wanted)

    changed = exact(await patched(requests_per_minute=2))["data"]
    assert (changed["requests_per_minute"], changed["max_usd_per_call"]) == (2, D("0.5"))
    changed = exact(await patched(requests_per_minute=None, max_usd_per_call=None))["data"]
    assert (changed["requests_per_minute"], changed["max_usd_per_call"]) == (None, None)
    for name, value in (
        ("requests_per_minute", 0), ("requests_per_minute", -1), ("requests_per_minute", 1.5), ("requests_per_minute", "9"),
        ("max_usd_per_call", 0), ("max_usd_per_call", -1), ("max_usd_per_call", "1e3"),
    ):  # fmt: skip
        refused = await patched(**{name: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, name)
