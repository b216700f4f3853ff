"""Several windows of a key at once: all held and charged in the same call, and each shown with what is left of it."""

import asyncio
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from app.pricing.starter import ensure_starter
from tests.rig import Customer, Rig, exact

D = Decimal
THREE = [{"usd": 1, "period": "daily"}, {"usd": 10, "period": "monthly"}, {"usd": 50, "period": "total"}]


async def shown(rig: Rig, customer: Customer, key: Any) -> Any:
    return exact(await rig.client.get(f"/keys/{key['_id']}", headers=customer.owner))["data"]


async def patched(rig: Rig, customer: Customer, key: Any, **wanted: Any) -> Any:
    return await rig.client.patch(f"/keys/{key['_id']}", headers=customer.owner, json=wanted)


def lines(key: Any) -> list[tuple[Any, ...]]:
    return [(each["period"], each["usd"], each["spent_usd"], each["remaining_usd"]) for each in key["limits"]]


async def charge(rig: Rig, key: Any, usd: str) -> Any:
    return exact(await rig.meter("charge", request_id=uuid.uuid4().hex, api_key=key["api_key"], cost_usd=usd))


async def test_every_window_is_charged_and_the_first_that_is_used_up_refuses(rig: Rig) -> None:
    customer = await rig.customer("100")
    key = await rig.new_key(customer, limits=[*reversed(THREE)])
    hold = await rig.authorize(key["api_key"], "0.4")
    await rig.settle(hold["hold_id"], "0.25")
    found = await shown(rig, customer, key)
    assert lines(found) == [
        ("daily", 1, D("0.25"), D("0.75")), ("monthly", 10, D("0.25"), D("9.75")), ("total", 50, D("0.25"), D("49.75"))
    ]  # fmt: skip
    assert (found["usage_limit_usd"], found["reset_period"], found["current_period_usage_usd"]) == (
        1,
        "daily",
        D("0.25"),
    )
    ends = [each["reset_at"] for each in found["limits"]]
    assert ends[0] == found["reset_at"]
    assert ends[2] is None
    assert [datetime.fromisoformat(end) > datetime.now(UTC) for end in ends[:2]] == [True, True]
    denied = (await rig.authorize(key["api_key"], "0.8"))["error"]
    assert (denied["code"], denied["metadata"]["limit_source"]) == ("key_limit_exceeded", "key_limit:daily")
    # Another day begins: what is recorded moves a day back. The month may be another one too.
    for table in ("usage", "hold", "api_key"):
        rig.sql(f"UPDATE {table} SET window_start = window_start - interval '1 day'")
    rig.sql(
        """UPDATE api_key SET more_starts = ARRAY (SELECT start - interval '1 day' FROM unnest(more_starts) start)
           WHERE more_starts IS NOT NULL"""
    )
    assert lines(await shown(rig, customer, key))[0] == ("daily", 1, 0, 1)
    assert (await charge(rig, key, "0.9"))["decision"] == "allow"
    daily, _, total = lines(await shown(rig, customer, key))
    assert (daily[2], total[2]) == (D("0.9"), D("1.15"))


async def test_calls_at_once_never_pass_the_tightest_of_several_windows(rig: Rig) -> None:
    customer = await rig.customer("100")
    key = await rig.new_key(customer, limits=[{"usd": 2, "period": "weekly"}, {"usd": 1, "period": "total"}])

    async def call(number: int) -> None:
        if number % 2:
            await charge(rig, key, "0.09")
        else:
            hold = await rig.authorize(key["api_key"], "0.09")
            if hold["decision"] == "allow":
                await rig.settle(hold["hold_id"], "0.09")

    await asyncio.gather(*(call(number) for number in range(40)))
    assert lines(await shown(rig, customer, key)) == [
        ("weekly", 2, D("0.99"), D("1.01")),
        ("total", 1, D("0.99"), D("0.01")),
    ]


async def test_a_window_that_stays_keeps_its_usage_and_a_new_one_starts_at_nothing_with_what_is_held(rig: Rig) -> None:
    customer = await rig.customer("100")
    key = await rig.new_key(customer, usage_limit_usd=10, reset_period="monthly")
    await charge(rig, key, "1")
    hold = await rig.authorize(key["api_key"], "0.6")
    changed = await patched(
        rig, customer, key, limits=[{"usd": 1, "period": "daily"}, {"usd": 20, "period": "monthly"}]
    )
    assert lines(exact(changed)["data"]) == [("daily", 1, 0, 1), ("monthly", 20, 1, 19)]
    assert (await rig.authorize(key["api_key"], "0.5"))["error"]["code"] == "funds_held"
    await rig.settle(hold["hold_id"], "0.6")
    assert lines(await shown(rig, customer, key)) == [
        ("daily", 1, D("0.6"), D("0.4")),
        ("monthly", 20, D("1.6"), D("18.4")),
    ]
    changed = await patched(rig, customer, key, limits=[{"usd": 5, "period": "monthly"}])
    assert lines(exact(changed)["data"]) == [("monthly", 5, D("1.6"), D("3.4"))]
    changed = await patched(rig, customer, key, usage_limit_usd=4)
    assert lines(exact(changed)["data"]) == [("monthly", 4, D("1.6"), D("2.4"))]
    await charge(rig, key, "0.4")
    nothing: tuple[dict[str, Any], ...] = ({"limits": None}, {"limits": []})
    for empty in nothing:
        assert exact(await patched(rig, customer, key, **empty))["data"]["limits"] == []
        await patched(rig, customer, key, limits=THREE)
    assert (await charge(rig, key, "0.1"))["decision"] == "allow"


async def test_the_short_form_is_of_the_shortest_window(rig: Rig) -> None:
    customer = await rig.customer()
    key = await rig.new_key(customer, limits=THREE)
    changed = exact(await patched(rig, customer, key, usage_limit_usd=2))["data"]
    assert [(each["period"], each["usd"]) for each in changed["limits"]] == [
        ("daily", 2),
        ("monthly", 10),
        ("total", 50),
    ]
    assert (await patched(rig, customer, key, reset_period="monthly")).json()["error"]["param"] == "reset_period"
    changed = exact(await patched(rig, customer, key, reset_period="weekly"))["data"]
    assert [(each["period"], each["usd"]) for each in changed["limits"]] == [
        ("weekly", 2),
        ("monthly", 10),
        ("total", 50),
    ]
    changed = exact(await patched(rig, customer, key, usage_limit_usd=None))["data"]
    assert [(each["period"], each["usd"]) for each in changed["limits"]] == [("monthly", 10), ("total", 50)]
    same = {name: changed[name] for name in ("usage_limit_usd", "reset_period")} | {"limits": changed["limits"]}
    same = {
        **same,
        "usage_limit_usd": str(same["usage_limit_usd"]),
        "limits": [{"usd": str(each["usd"]), "period": each["period"]} for each in same["limits"]],
    }
    assert (await patched(rig, customer, key, **same)).status_code == 200, "what was shown may be sent back"


@pytest.mark.parametrize(
    ("wanted", "shown_as"),
    [
        ({"usage_limit_usd": 2, "limits": None}, [("total", 2)]),
        ({"usage_limit_usd": 2, "reset_period": "daily", "limits": None}, [("daily", 2)]),
        ({"usage_limit_usd": 2, "reset_period": None, "limits": None}, [("total", 2)]),
        ({"usage_limit_usd": None, "reset_period": None, "limits": [{"usd": 3, "period": "weekly"}]}, [("weekly", 3)]),
        ({"usage_limit_usd": 3, "reset_period": None, "limits": [{"usd": 3, "period": "weekly"}]}, [("weekly", 3)]),
        ({"usage_limit_usd": None, "reset_period": None, "limits": None}, []),
    ],
)
async def test_a_null_beside_a_limit_says_nothing(rig: Rig, wanted: Any, shown_as: list[tuple[str, int]]) -> None:
    """Clients that send every field send null for what they mean nothing by: when a key is made, and when it is changed."""
    customer = await rig.customer()
    made = await rig.new_key(customer, **wanted)
    changed = exact(await patched(rig, customer, await rig.new_key(customer), **wanted))["data"]
    for key in (made, changed):
        assert [(each["period"], each["usd"]) for each in key["limits"]] == shown_as


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"limits": [THREE[0], {"usd": 2, "period": "daily"}]}, "limits"),
        ({"limits": [{"usd": 2, "period": "total"}, {"usd": 2, "period": "total"}]}, "limits"),
        ({"limits": THREE, "usage_limit_usd": 2}, "usage_limit_usd"),
        ({"limits": THREE, "reset_period": "monthly"}, "reset_period"),
        ({"limits": [], "usage_limit_usd": 2}, "usage_limit_usd"),
        ({"limits": [{"usd": "0.009", "period": "daily"}]}, "limits"),
        ({"limits": [{"usd": -1, "period": "daily"}]}, "limits"),
        ({"limits": [{"usd": 1, "period": "hourly"}]}, "limits"),
        ({"limits": [{"usd": 1}]}, "limits"),
        ({"limits": [{"period": "daily"}]}, "limits"),
        ({"limits": [{"usd": None, "period": "daily"}]}, "limits"),
        ({"limits": {"usd": 1, "period": "daily"}}, "limits"),
    ],
)
async def test_limits_that_say_two_things_or_nothing_are_refused_and_change_nothing(
    rig: Rig, wanted: Any, param: str
) -> None:
    customer = await rig.customer()
    key = await rig.new_key(customer, limits=THREE)
    before = await shown(rig, customer, key)
    made = await rig.client.post("/keys", headers=customer.owner, json={"name": "new", **wanted})
    for answer in (made, await patched(rig, customer, key, **wanted)):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (422, "invalid_field"), answer.text
        assert error["param"].startswith(param)
    assert await shown(rig, customer, key) == before


# --- what a client may try again with -------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["balance", "key", "call", "parent"])
async def test_a_402_says_how_long_an_answer_may_be_and_so_long_a_one_is_allowed(rig: Rig, bound: str) -> None:
    await ensure_starter(rig.house.db)
    customer = await rig.customer("10")
    wanted: dict[str, Any] = {
        "balance": {},
        "key": {"limits": THREE},
        "call": {"max_usd_per_call": 1},
        "parent": {"scopes": ["spend", "keys"], "usage_limit_usd": 1},
    }
    key = await rig.new_key(customer, **wanted[bound])
    if bound == "balance":
        await charge(rig, key, "9")
    if bound == "parent":
        headers = {"Authorization": f"Bearer {key['api_key']}"}
        key = (await rig.client.post("/keys", headers=headers, json={"name": "child"})).json()["data"]
    estimate = {"input_tokens": 1_000, "max_output_tokens": 16_384, "n": 128}

    async def ask(tokens: int, **more: Any) -> Any:
        body = {"request_id": uuid.uuid4().hex, "api_key": key["api_key"], "model": "gpt-4o-mini", **more}
        return exact(await rig.meter("authorize", **body, estimate=estimate | {"max_output_tokens": tokens}))

    denied = await ask(16_384)
    assert denied["status"] == 402
    tokens = int(denied["error"]["metadata"]["affordable_output_tokens"])
    assert 0 < tokens < 16_384
    assert (await ask(tokens + 1))["decision"] == "deny", "not one more"
    allowed = await ask(tokens)
    assert (allowed["decision"], allowed["granted_output_tokens"], allowed["clamped"]) == ("allow", tokens, False)


async def test_a_402_of_what_is_not_counted_in_tokens_says_none(rig: Rig) -> None:
    customer = await rig.customer("10")
    denied = await rig.authorize(customer.api_key, "11")
    assert "affordable_output_tokens" not in denied["error"]["metadata"]


# --- installations that were there before ---------------------------------------------------------------------------
