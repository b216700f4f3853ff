"""Every refusal as the SDKs meet it: its status, its code, its words and Retry-After; nothing charged, no secret told."""

import asyncio
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest

from app.gateway.app import create_gateway
from app.gateway.asking import clean
from tests.client.houses import serving
from tests.gateway.street import Street, eventually, opened
from tests.rig import Rig

MINI = "gpt-4o-mini"
HELLO: Any = [{"role": "user", "content": "Hello!"}]


async def refused(street: Street, **asked: Any) -> Any:
    key = asked.pop("api_key", street.api_key)
    with pytest.raises(openai.APIStatusError) as found:
        await street.openai(api_key=key).chat.completions.create(**{"model": MINI, "messages": HELLO} | asked)
    return found.value


async def test_a_key_that_is_unknown_or_missing(street: Street) -> None:
    error = await refused(street, api_key="sk-nobody")
    assert (error.status_code, error.code) == (401, "invalid_api_key")
    assert isinstance(error, openai.AuthenticationError)
    bare = await street.post("/v1/chat/completions", {"model": MINI, "messages": HELLO}, x_nothing="1")
    assert bare.status_code == 401
    assert bare.json()["error"]["code"] == "invalid_api_key"
    assert bare.json()["message"] == bare.json()["error"]["message"]
    assert bare.headers["www-authenticate"] == "Bearer"


async def test_who_is_calling_is_asked_before_what_is_asked(street: Street) -> None:
    for body in (b"{", b"{}", b'{"model": "gpt-99"}'):
        answer = await street.post("/v1/chat/completions", body, x_api_key="sk-nobody")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_two_keys_that_differ_are_one_too_many(street: Street) -> None:
    answer = await street.post("/v1/chat/completions", {}, authorization="Bearer sk-a", x_api_key="sk-b")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_header")


@pytest.mark.parametrize("status", [402, 429])
async def test_an_empty_balance_is_402_or_as_the_operator_must(rig: Rig, tmp_path: Any, status: int) -> None:
    async with opened(rig, tmp_path, usd="0", low_balance_status=status) as street:
        error = await refused(street)
        assert (error.status_code, error.code) == (status, "insufficient_balance")
        assert ("retry-after" in error.response.headers) == (status == 429)
        assert await street.log() == []


async def test_what_a_key_may_not(street: Street) -> None:
    house = street.rig.client
    customer = await street.rig.customer("10")
    made = await house.post(
        "/keys", headers=customer.owner, json={"name": "narrow", "allowed_models": ["gpt-4o"], "usage_limit_usd": 0.01}
    )
    narrow = made.json()["data"]["api_key"]
    error = await refused(street, api_key=narrow)
    assert (error.status_code, error.code) == (403, "model_not_allowed")
    made = await house.post("/keys", headers=customer.owner, json={"name": "reads", "scopes": ["balance"]})
    error = await refused(street, api_key=made.json()["data"]["api_key"])
    assert (error.status_code, error.code) == (403, "missing_scope")


async def test_money_that_calls_in_flight_hold_is_waited_for(rig: Rig, tmp_path: Any) -> None:
    async with opened(rig, tmp_path, usd="10", clamp=False) as street:
        await street.order("delay=3")
        client, dear = street.openai(), {"model": "claude-opus-4-5", "messages": HELLO, "n": 6, "max_tokens": 60_000}
        first = asyncio.create_task(client.chat.completions.create(**dear))
        await eventually(street.log)  # the upstream has it, so it is held for
        error = await refused(street, model="gpt-4o", n=20)
        assert (error.status_code, error.code) == (429, "funds_held")
        assert int(error.response.headers["retry-after"]) == error.body["metadata"]["retry_after"] > 0
        assert (await first).choices


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "malformed_json", None),
        (b'"text"', 422, "invalid_field", None),
        (b"{}", 422, "invalid_field", "model"),
        (b'{"model": 5}', 422, "invalid_field", "model"),
        (b'{"model": "gpt-4o-mini", "messages": [], "stream": "yes"}', 422, "invalid_field", "stream"),
        (b'{"model": "gpt-4o-mini", "messages": [], "n": 1000}', 422, "invalid_field", "n"),
        (b'{"model": "gpt-4o-mini", "messages": [], "max_tokens": -5}', 422, "invalid_field", "max_tokens"),
        (b'{"model": "gpt-4o-mini", "messages": [], "fallbacks": "gpt-4o"}', 422, "invalid_field", "fallbacks"),
        (b'{"model": "gpt-4o-mini"}', 422, "invalid_field", "messages"),
        (b'{"model": "gpt-4o-mini", "messages": [ ]}', 422, "invalid_field", "messages"),
        (b'{"model": "gpt-4o-mini", "messages": "Hello"}', 422, "invalid_field", "messages"),
        (b'{"model": "gpt-4o-mini", "messages": ["Hello"]}', 422, "invalid_field", "messages"),
        (b'{"model": "gpt-99", "messages": []}', 404, "model_not_found", "model"),
    ],
)
async def test_what_cannot_be_read_or_is_not_sold(
    street: Street, body: bytes, status: int, code: str, param: Any
) -> None:
    answer = await street.post("/v1/chat/completions", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert await street.log() == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/completions", {"model": "gpt-4o-mini"}, "prompt"), ("/v1/completions", {"model": "gpt-4o-mini", "prompt": []}, "prompt"),
        ("/v1/embeddings", {"model": "text-embedding-3-small", "input": [ ]}, "input"),
    ],
)  # fmt: skip
async def test_a_call_without_what_it_is_about_is_refused_before_it_is_made(
    street: Street, path: str, body: Any, param: str
) -> None:
    answer = await street.post(path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    stranger = await street.post(path, body, authorization="Bearer sk-unknown")
    assert stranger.status_code == 401
    assert await street.log() == []


@pytest.mark.parametrize("missing", ["messages", "max_tokens"])
async def test_a_message_to_anthropic_needs_what_anthropic_needs(street: Street, missing: str) -> None:
    body: Any = {"model": "claude-sonnet-4-6", "max_tokens": 5, "messages": HELLO}
    answer = await street.post("/v1/messages", body | {missing: None}, x_api_key=street.api_key)
    told = answer.json()
    assert (answer.status_code, told["type"], missing in told["error"]["message"]) == (422, "error", True)
    assert await street.log() == []


async def test_nobody_provides_what_is_not_sold(street: Street) -> None:
    """Also where an upstream would take every name."""
    for model, status in (("gpt-4o-mini", 200), ("pureai/gemma-3-4b-it", 200), ("nobody-has-this", 404)):
        answer = await street.http.get(
            f"{street.url}/v1/providers", params={"model": model}, headers={"x-api-key": street.api_key}
        )
        assert answer.status_code == status, model


async def test_an_unknown_path_and_another_method(street: Street) -> None:
    missing = await street.post("/v1/nothing", {})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    other = await street.http.get(f"{street.url}/v1/chat/completions")
    assert (other.status_code, other.headers["allow"]) == (405, "POST")


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(street: Street) -> None:
    answer = await street.post("/v1/chat/completions", b" " * (27 * 1024 * 1024))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("order", "status", "code"),
    [
        ("status=400", 400, "upstream_refused"),
        ("status=401", 502, "upstream_error"),
        ("status=403", 502, "upstream_error"),
        ("status=429, retry_after=7", 429, "rate_limit_exceeded"),
        ("status=500", 502, "upstream_error"),
        ("status=503", 502, "upstream_error"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_an_upstream_refuses_is_given_back(
    street: Street, order: str, status: int, code: str, is_stream: bool
) -> None:
    await street.order(order)
    error = await refused(street, stream=is_stream)
    assert (error.status_code, error.code) == (status, code)
    assert error.body["metadata"]["upstream_status"] == int(order[7:10])
    if status == 429:
        assert error.response.headers["retry-after"] == "7"
        assert error.body["metadata"]["retry_after"] == 7
    if status == 502:
        assert error.response.json()["detail"] == error.body["message"]
    assert await street.holds() == ["released"]
    assert await street.charges() == []


async def test_an_upstream_that_cannot_be_reached_is_502_and_tells_nothing_of_itself(rig: Rig, tmp_path: Any) -> None:
    gone = """
[[upstream]]
name = "gone"
kind = "openai"
base_url = "http://127.0.0.1:9/secret-path"
key_env = "SECRET"
models = ["gpt-4o-mini"]
"""
    async with opened(rig, tmp_path, upstreams=gone) as street:
        error = await refused(street)
        assert (error.status_code, error.code) == (502, "upstream_error")
        assert "secret" not in error.response.text
        assert "127.0.0.1" not in error.response.text
        assert await street.holds() == ["released"]


async def test_what_an_upstream_says_of_its_key_and_address_is_not_passed_on(street: Street) -> None:
    said = "Incorrect key sk-upstreams-own-secret at https://internal.example/v1"
    (upstream,) = street.gateway.settings.upstreams.all
    assert clean(said, upstream) == "Incorrect key … at …"


async def test_anthropics_clients_get_anthropics_errors(street: Street) -> None:
    asked: Any = {"model": "claude-sonnet-4-6", "max_tokens": 10, "messages": HELLO}
    with pytest.raises(anthropic.AuthenticationError) as found:
        await street.anthropic(api_key="sk-nobody").messages.create(**asked)
    denied: Any = found
    assert denied.value.body == {
        "type": "error", "error": {"type": "authentication_error", "message": denied.value.body["error"]["message"]},
    }  # fmt: skip
    with pytest.raises(anthropic.NotFoundError):
        await street.anthropic().messages.create(**asked | {"model": "claude-99"})
    await street.order("status=529")
    with pytest.raises(anthropic.APIStatusError) as failed:
        await street.anthropic().messages.create(**asked)
    assert failed.value.status_code == 502
    await street.order("status=429, retry_after=3")
    with pytest.raises(anthropic.RateLimitError) as busy:
        await street.anthropic().messages.create(**asked)
    assert busy.value.response.headers["retry-after"] == "3"


async def test_a_model_on_the_wrong_path_says_which_is_right(rig: Rig, tmp_path: Any) -> None:
    claude = """
[[upstream]]
name = "anthropic"
kind = "anthropic"
base_url = "${GATEWAY_MODELS_URL}"
key_env = "SECRET"
models = ["claude-sonnet-4-6"]
"""
    async with opened(rig, tmp_path, upstreams=claude) as street:
        error = await refused(street, model="claude-sonnet-4-6")
        assert error.status_code == 422
        assert "/v1/messages" in str(error)
        answer = await street.anthropic().messages.create(model="claude-sonnet-4-6", max_tokens=9, messages=HELLO)
        assert answer.content
        (row,) = await street.log()
        assert "x-api-key" in row["header_names"]
        assert "authorization" not in row["header_names"]


async def test_satmeter_away_is_503_at_once_and_nothing_is_asked(street: Street) -> None:
    away = replace(
        street.gateway.settings, meter_url="http://127.0.0.1:9", data_dir=street.gateway.settings.data_dir / "x"
    )
    async with serving(create_gateway(away)) as url:
        answer = await street.http.post(
            f"{url}/v1/chat/completions", json={"model": MINI, "messages": HELLO}, headers={"x-api-key": street.api_key}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "billing_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert await street.log() == []
