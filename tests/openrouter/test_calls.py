"""/api/v1/activity and /api/v1/generation: calls by day, and one by its id, as OpenRouter's clients ask."""

import hashlib
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.activity.conftest import Past
from tests.rig import Customer, exact

D = Decimal
ROW = {
    "date", "model", "model_permaslug", "endpoint_id", "provider_name", "usage", "byok_usage_inference", "requests", "prompt_tokens",
    "completion_tokens", "reasoning_tokens",
}  # fmt: skip


async def daily(past: Past, customer: Customer, headers: dict[str, str] | None = None, **query: Any) -> list[Any]:
    response = await past.rig.client.get("/api/v1/activity", headers=headers or customer.owner, params=query)
    assert response.status_code == 200, response.text
    return list(exact(response)["data"])


async def test_calls_are_summed_by_day_model_and_provider(past: Past) -> None:
    customer = await past.rig.customer("10")
    usage = {"input_tokens": 50, "output_tokens": 125, "reasoning_tokens": 25}
    await past.charge(customer, "0.01", model="a", served_model="a-2024", provider="openai", usage=usage)
    await past.back(2)
    made = await past.charge(customer, "0.3", model="a", provider="openai", usage=usage)
    await past.charge(customer, "0.05", model="a", provider="openai", usage=usage)
    await past.charge(customer, "0.02", model="a", provider="azure")
    await past.rig.meter("refund", charge_id=made["charge_id"], amount_usd="0.1")
    today = datetime.now(UTC).date()
    rows = await daily(past, customer)
    assert all(set(row) == ROW for row in rows)
    told = [(row["date"], row["model"], row["model_permaslug"], row["provider_name"], row["usage"], row["requests"]) for row in rows]  # fmt: skip
    assert told == [
        (str(today), "a", "a", "azure", D("0.02"), 1), (str(today), "a", "a", "openai", D("0.25"), 2),
        (str(today - timedelta(days=2)), "a", "a-2024", "openai", D("0.01"), 1),
    ]  # fmt: skip
    assert [rows[1][name] for name in ("prompt_tokens", "completion_tokens", "reasoning_tokens")] == [100, 250, 50]
    credits = (await past.ask("/api/v1/credits", customer))["data"]
    assert sum(row["usage"] for row in rows) == credits["total_usage"]
    assert len({row["endpoint_id"] for row in rows}) == 3
    assert rows == await daily(past, customer), "an endpoint has the same id every time"


async def test_days_are_narrowed_to_one_or_to_some_of_the_last_thirty(past: Past) -> None:
    customer = await past.rig.customer("10")
    today = datetime.now(UTC).date()
    for gap in (11, 19, 1, 0):
        await past.charge(customer, "0.01")
        await past.back(gap) if gap else None

    async def days(**query: Any) -> list[int]:
        return [(today - datetime.fromisoformat(row["date"]).date()).days for row in await daily(past, customer, **query)]  # fmt: skip

    def ago(number: int) -> str:
        return str(today - timedelta(days=number))

    assert await days() == [0, 1, 20], "of thirty-one days ago nothing is told"
    assert (await days(date=ago(1)), await days(date=ago(20)), await days(date=ago(5))) == ([1], [20], [])
    assert await days(date_from=ago(1)) == [0, 1]
    assert await days(date_to=ago(1)) == [1, 20]
    assert await days(date_from=ago(20), date_to=ago(20)) == [20]
    assert await days(date=str(today + timedelta(days=1))) == await days(date="9999-12-31") == []
    assert await days(date_from=ago(1), date_to="9999-12-31") == [0, 1]
    assert await days(date_from="9999-12-31") == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("date=yesterday", "date"), ("date=2026-02-30", "date"), ("date={old}", "date"), ("date_from={old}", "date_from"), ("date_to={old}", "date_to"),
        ("date_from={now}&date_to={before}", "date_to"), ("date={now}&date_from={before}", "date"), ("date=20260101", "date"),
        ("api_key_hash=x", "api_key_hash"), ("user_id=u", "user_id"), ("days=3", "days"),
    ],
)  # fmt: skip
async def test_days_that_make_no_sense_are_422_naming_what(past: Past, query: str, param: str) -> None:
    customer = await past.rig.customer()
    today = datetime.now(UTC).date()
    sent = query.format(old=today - timedelta(days=31), now=today, before=today - timedelta(days=1))
    response = await past.rig.client.get(f"/api/v1/activity?{sent}", headers=customer.owner)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param), response.text
    assert response.json()["error"]["code"] == 422


async def test_a_key_is_told_its_own_calls_and_the_owner_those_of_a_hash(past: Past) -> None:
    customer, stranger = await past.rig.customer("10"), await past.rig.customer("10")
    other = await past.rig.new_key(customer)
    await past.charge(customer, "0.01", model="mine")
    await past.charge(customer, "0.01", other["api_key"], model="others")
    await past.charge(stranger, "0.01", model="strangers")

    async def models(headers: dict[str, str], **query: str) -> set[str]:
        return {row["model"] for row in await daily(past, customer, headers, **query)}

    def hash_of(key: str) -> str:
        return hashlib.sha256(key.encode()).hexdigest()

    assert await models(customer.owner) == {"mine", "others"}
    assert await models(customer.key) == {"mine"} == await models(customer.key, api_key_hash=hash_of(customer.api_key))
    assert await models(customer.owner, api_key_hash=hash_of(other["api_key"])) == {"others"}
    assert await models(customer.key, api_key_hash=hash_of(other["api_key"])) == set()
    for foreign in (hash_of(stranger.api_key), "0" * 64):
        assert await models(customer.owner, api_key_hash=foreign) == set()
    narrow = await past.rig.new_key(customer, scopes=["spend"])
    for path in ("/api/v1/activity", "/api/v1/generation?id=x"):
        assert (await past.rig.client.get(path, headers={"x-api-key": narrow["api_key"]})).status_code == 403


async def test_a_generation_is_found_by_its_charge_or_by_the_id_of_the_models_own_answer(past: Past) -> None:
    customer = await past.rig.customer("10")
    made = await past.charge(
        customer, "0.0015", request_id="r-1", model="openai/gpt-4o", served_model="gpt-4o-2024", provider="openai", upstream_id="chatcmpl-1",
        usage={"input_tokens": 10, "output_tokens": 25, "reasoning_tokens": 5, "cache_read_tokens": 3}, latency_ms=1250, ttft_ms=250,
        outcome="client_disconnected", provider_cost_usd="0.0012",
    )  # fmt: skip
    [call] = (await past.ask("/queries/history", customer))["data"]
    for asked in (call["id"], made["charge_id"], "chatcmpl-1", call["id"].upper()):
        for headers in (customer.owner, customer.key):
            response = await past.rig.client.get("/api/v1/generation", headers=headers, params={"id": asked})
            assert response.status_code == 200, response.text
            data = exact(response)["data"]
            assert (data["id"], data["charge_id"], data["upstream_id"]) == (asked, made["charge_id"], "chatcmpl-1")
            assert (data["model"], data["provider_name"], data["cancelled"]) == ("gpt-4o-2024", "openai", True)
            assert data["total_cost"] == data["usage"] == D("0.0015")
            assert [data[f"tokens_{kind}"] for kind in ("prompt", "completion")] == [10, 25]
            assert [data[f"native_tokens_{kind}"] for kind in ("prompt", "completion", "reasoning", "cached")] == [10, 25, 5, 3]  # fmt: skip
            assert (data["latency"], data["generation_time"], data["created_at"]) == (1250, 1000, call["timestamp"])
            assert data["upstream_inference_cost"] is None, "what the operator pays is the operator's"


async def test_an_upstreams_id_that_looks_like_one_of_ours_is_found_too_and_the_newest_of_several(past: Past) -> None:
    customer = await past.rig.customer("10")
    upstream_id = str(uuid.uuid4())
    await past.charge(customer, "0.01", upstream_id=upstream_id)
    newest = await past.charge(customer, "0.02", upstream_id=upstream_id)
    data = (await past.ask("/api/v1/generation", customer, id=upstream_id))["data"]
    assert (data["charge_id"], data["total_cost"]) == (newest["charge_id"], D("0.02"))


async def test_another_accounts_generation_is_404_exactly_as_a_missing_one(past: Past) -> None:
    customer, stranger = await past.rig.customer("10"), await past.rig.customer("10")
    made = await past.charge(customer, "0.01", upstream_id="chatcmpl-mine")
    [call] = (await past.ask("/queries/history", customer))["data"]
    answers = [
        await past.rig.client.get("/api/v1/generation", headers=stranger.owner, params={"id": asked})
        for asked in (
            "missing",
            str(uuid.uuid4()),
            call["id"],
            made["charge_id"],
            "chatcmpl-mine",
            "a\x00b",
            "x" * 5000,
        )
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.content for answer in answers}) == 1
    assert (await past.rig.client.get("/api/v1/generation", headers=customer.owner)).json()["error"]["param"] == "id"


async def test_a_generation_is_looked_up_in_an_index_of_its_account(past: Past) -> None:
    customer = await past.rig.customer("10")
    await past.charge(customer, "0.01", upstream_id="chatcmpl-1")
    plan = past.conn.execute(
        b"""SET enable_seqscan = off; EXPLAIN SELECT id FROM usage
            WHERE account_id = '00000000-0000-0000-0000-000000000001' AND upstream_id = 'x'"""
    )
    while plan.nextset():
        pass
    text = "\n".join(line for (line,) in plan.fetchall())
    assert "upstream_id" in text
    assert "Seq Scan" not in text
    assert text.count("account_id_upstream_id") == text.count("Scan"), text
