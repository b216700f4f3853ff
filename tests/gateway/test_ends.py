"""However an answer ends, the call is charged once: for what was said or made, and never given back once it may have run."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.street import Street, eventually, opened, pieces
from tests.rig import Rig

MINI = "gpt-4o-mini"
HELLO: Any = [{"role": "user", "content": "Hello!"}]
ASKED: Any = {"model": MINI, "messages": HELLO}


async def test_a_stream_without_usage_is_counted_and_says_so(street: Street) -> None:
    await street.order("usage=none, tokens=40")
    await pieces(await street.openai().chat.completions.create(**ASKED, stream=True))
    charge = await street.only_charge()
    assert charge["flags"] == "usage_estimated"
    assert charge["units"]["output_tokens"] == 40
    assert charge["units"]["input_tokens"] > 0


async def test_an_answer_without_usage_is_counted_and_says_so(street: Street) -> None:
    await street.order("usage=none, tokens=40")
    answer = await street.openai().chat.completions.create(**ASKED)
    charge = await street.only_charge()
    assert charge["flags"] == "usage_estimated"
    assert charge["units"]["output_tokens"] == answer.usage.completion_tokens == 40


async def test_an_upstream_that_dies_in_a_stream_is_charged_for_what_came_and_the_caller_is_told(
    street: Street,
) -> None:
    await street.order("cut=9, tokens=40, pace=0.01")
    with pytest.raises(openai.APIError) as broken:
        await pieces(await street.openai().chat.completions.create(**ASKED, stream=True))
    assert broken.value.code == "upstream_error"
    charge = await street.only_charge()
    assert charge["outcome"] == "partial"
    assert charge["flags"] == "usage_estimated"
    assert charge["units"]["output_tokens"] in (8, 9)  # the first piece says who speaks


async def test_an_error_within_a_stream_ends_it_as_an_error(street: Street) -> None:
    await street.order("error_after=5, tokens=40")
    with pytest.raises(openai.APIError):
        await pieces(await street.openai().chat.completions.create(**ASKED, stream=True))
    charge = await street.only_charge()
    assert (charge["outcome"], charge["units"]["output_tokens"]) == ("partial", 4)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_nothing_is_charged_before_the_first_byte_and_nothing_given_back_that_may_have_run(
    street: Street, is_stream: bool
) -> None:
    await street.order("cut=0")
    with pytest.raises(openai.APIStatusError) as failed:
        await street.openai().chat.completions.create(**ASKED, stream=is_stream)
    assert failed.value.status_code == 502
    assert (await street.only_charge())["cost_nusd"] == 0
    assert await street.holds() == ["settled"]


async def test_an_upstream_that_says_nothing_is_502_after_its_time(rig: Rig, tmp_path: Any) -> None:
    slow = """
[[upstream]]
name = "slow"
kind = "openai"
base_url = "${GATEWAY_MODELS_URL}"
timeout_seconds = 2
models = ["gpt-4o-mini"]
"""
    async with opened(rig, tmp_path, upstreams=slow) as street:
        await street.order("hang")
        with pytest.raises(openai.APIStatusError) as failed:
            await street.openai().chat.completions.create(**ASKED)
        assert failed.value.status_code == 502
        assert (await street.only_charge())["cost_nusd"] == 0


async def leaving(street: Street, after: int, **asked: Any) -> None:
    """Ask for a stream, and hang up after so many bytes."""
    headers, seen = {"authorization": f"Bearer {street.api_key}"}, 0
    async with (
        httpx.AsyncClient(trust_env=False, timeout=10) as client,
        client.stream("POST", f"{street.url}/v1/chat/completions", json=ASKED | asked, headers=headers) as answer,
    ):
        async for chunk in answer.aiter_raw():
            seen += len(chunk)
            if seen >= after:
                return


async def charged(street: Street) -> bool:
    return len(await street.charges()) > 0


async def test_a_caller_who_leaves_a_stream_pays_what_the_upstream_made(street: Street) -> None:
    await street.order("tokens=60, pace=0.005")
    await leaving(street, 500, stream=True)
    await eventually(lambda: charged(street))
    charge = await street.only_charge()
    assert (charge["outcome"], charge["units"]["output_tokens"]) == ("client_disconnected", 60)
    assert not charge["flags"]


async def test_where_the_operator_says_so_the_upstream_is_cancelled_and_what_came_is_charged(
    rig: Rig, tmp_path: Any
) -> None:
    async with opened(rig, tmp_path, client_gone_seconds=0) as street:
        await street.order("tokens=4000, pace=0.01")
        await leaving(street, 500, stream=True)
        await eventually(lambda: charged(street))
        charge = await street.only_charge()
        assert charge["outcome"] == "client_disconnected"
        assert charge["flags"] == "usage_estimated"
        assert 0 < charge["units"]["output_tokens"] < 1000


async def test_a_caller_who_leaves_before_the_answer_pays_for_all_of_it(street: Street) -> None:
    await street.order("delay=0.5, tokens=30")
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(trust_env=False, timeout=0.2) as client:
            await client.post(f"{street.url}/v1/chat/completions", json=ASKED, headers={"x-api-key": street.api_key})
    await eventually(lambda: charged(street))
    charge = await street.only_charge()
    assert (charge["outcome"], charge["units"]["output_tokens"]) == ("client_disconnected", 30)


async def test_another_serves_what_the_first_cannot_and_is_charged_at_its_own_price(street: Street) -> None:
    await street.order("status=503", model=MINI)
    client = street.openai()
    answer = await client.chat.completions.create(**ASKED, extra_body={"fallbacks": ["gpt-4o"]})
    assert answer.model == "gpt-4o"
    charge = await street.only_charge()
    assert charge["cost_nusd"] == answer.usage.prompt_tokens * 2500 + answer.usage.completion_tokens * 10_000
    assert await street.holds() == ["released", "settled"]


async def test_a_backup_serves_the_same_model_under_the_same_hold(rig: Rig, tmp_path: Any) -> None:
    two = """
[[upstream]]
name = "gone"
kind = "openai"
base_url = "http://127.0.0.1:9"
models = ["gpt-4o-mini"]

[[upstream]]
name = "there"
kind = "openai"
base_url = "${GATEWAY_MODELS_URL}"
models = { "gpt-4o-mini" = "gpt-4o-mini-2024-07-18" }
"""
    async with opened(rig, tmp_path, upstreams=two) as street:
        await street.openai().chat.completions.create(**ASKED)
        assert await street.holds() == ["settled"]
        (row,) = await street.log()
        assert row["model"] == "gpt-4o-mini-2024-07-18"


async def test_an_answer_is_clamped_to_what_there_is_money_for(rig: Rig, tmp_path: Any) -> None:
    async with opened(rig, tmp_path, usd="0") as street:
        customer = await rig.customer("10")
        made = await rig.client.post("/keys", headers=customer.owner, json={"name": "small", "usage_limit_usd": 0.01})
        small = made.json()["data"]["api_key"]
        raw = await street.openai(api_key=small).chat.completions.with_raw_response.create(
            model="gpt-4o", messages=HELLO, max_tokens=16_000
        )
        granted = int(raw.headers["x-granted-output-tokens"])
        assert 0 < granted < 1000
        (row,) = await street.log()
        assert row["asked"]["max_tokens"] == granted


async def test_slow_callers_hold_nobody_up(street: Street) -> None:
    await street.order("bytes=1", times=1) if False else None
    await street.order("tokens=20000", times=4)
    headers = {"authorization": f"Bearer {street.api_key}"}
    async with (
        httpx.AsyncClient(trust_env=False, timeout=20) as client,
        client.stream(
            "POST", f"{street.url}/v1/chat/completions", json=ASKED | {"stream": True}, headers=headers
        ) as slow,
    ):
        lines = slow.aiter_raw()
        await anext(lines)
        async with asyncio.timeout(5):
            answer = await client.post(f"{street.url}/v1/chat/completions", json=ASKED, headers=headers)
        assert answer.status_code == 200
        async for _ in lines:
            pass
