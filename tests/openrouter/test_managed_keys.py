"""/api/v1/keys: an account's keys as OpenRouter's clients manage them, by hash, with the credit id as the management key."""

import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.kernel.settings import Settings
from tests.door import JSON, Answer, Door, opened, refusal_faults
from tests.rig import Customer

VIEW = {
    "hash", "name", "label", "disabled", "limit", "limit_remaining", "limit_reset", "include_byok_in_limit", "usage", "usage_daily",
    "usage_weekly", "usage_monthly", "byok_usage", "byok_usage_daily", "byok_usage_weekly", "byok_usage_monthly", "created_at",
    "updated_at", "expires_at", "creator_user_id", "workspace_id",
}  # fmt: skip


@pytest.fixture
async def door(clean: str, settings: Settings) -> AsyncIterator[Door]:
    async with opened(clean, settings) as door:
        yield door


def managing(customer: Customer) -> dict[str, str]:
    """As OpenRouter's clients send their management key."""
    return {"Authorization": f"Bearer {customer.credit_id}"}


async def ask(door: Door, customer: Customer, method: str, path: str = "", **body: Any) -> Answer:
    sent = json.dumps(body).encode() if method in ("POST", "PATCH") else None
    return await door.ask(method, f"/api/v1/keys{path}", managing(customer) | JSON, sent)


async def made(door: Door, customer: Customer, **body: Any) -> Any:
    answer = await ask(door, customer, "POST", **{"name": uuid.uuid4().hex[:20], **body})
    assert answer.status == 201, answer.body
    return answer.json


async def test_a_key_is_made_shown_once_changed_and_deleted_by_the_hash_of_it(door: Door) -> None:
    customer = await door.customer("10")
    new = await made(door, customer, name="Production", limit=50, limit_reset="monthly", expires_at="2999-01-01T00:00:00Z", include_byok_in_limit=True)  # fmt: skip
    assert set(new) == {"data", "key"}
    data, secret = new["data"], new["key"]
    assert (set(data), data["hash"]) == (VIEW, hashlib.sha256(secret.encode()).hexdigest())
    assert [data[name] for name in ("name", "limit", "limit_remaining", "limit_reset", "usage", "disabled")] == [
        "Production", 50, 50, "monthly", 0, False
    ]  # fmt: skip
    assert (data["label"], data["expires_at"]) == (f"{secret[:6]}…{secret[-4:]}", "2999-01-01T00:00:00Z")
    charged = await door.rig.meter("charge", request_id="c", api_key=secret, cost_usd="1.25")
    assert charged.json()["decision"] == "allow"
    shown = await ask(door, customer, "GET", f"/{data['hash']}")
    assert secret.encode() not in shown.body
    found = shown.json["data"]
    assert [found[name] for name in ("usage", "usage_daily", "usage_weekly", "usage_monthly", "limit_remaining")] == [1.25, 1.25, 1.25, 1.25, 48.75]  # fmt: skip
    changed = await ask(door, customer, "PATCH", f"/{data['hash'].upper()}", name="Other", limit=75, limit_reset="daily", disabled=True)  # fmt: skip
    assert [changed.json["data"][name] for name in ("name", "limit", "limit_reset", "disabled", "limit_remaining")] == [
        "Other", 75, "daily", True, 75
    ]  # fmt: skip
    denied = await door.rig.meter("authorize", request_id="d", api_key=secret, max_cost_usd="1")
    assert denied.json()["status"] == 401
    assert (await ask(door, customer, "PATCH", f"/{data['hash']}", limit=None, disabled=False)).json["data"]["limit"] is None  # fmt: skip
    assert (await ask(door, customer, "DELETE", f"/{data['hash']}")).json == {"deleted": True}
    for method in ("GET", "PATCH", "DELETE"):
        gone = await ask(door, customer, method, f"/{data['hash']}")
        assert not refusal_faults(gone, 404, "key_not_found", door.secrets)


async def test_keys_are_listed_newest_first_by_hundreds_and_those_switched_off_on_request(door: Door) -> None:
    customer = await door.customer()
    hashes = [(await made(door, customer))["data"]["hash"] for _ in range(103)]
    first, second, third = [
        [key["hash"] for key in (await ask(door, customer, "GET", query)).json["data"]]
        for query in ("", "?offset=100", "?offset=1000")
    ]
    assert first + second[:3] == hashes[::-1]
    assert (len(first), len(second), third) == (100, 4, []), "the fourth is the account's first, Default"
    await ask(door, customer, "PATCH", f"/{hashes[-1]}", disabled=True)
    await ask(door, customer, "DELETE", f"/{hashes[-2]}")
    for query, newest in (("", hashes[-3]), ("?include_disabled=false", hashes[-3]), ("?include_disabled=true", hashes[-1])):  # fmt: skip
        assert (await ask(door, customer, "GET", query)).json["data"][0]["hash"] == newest


async def test_a_listed_key_has_spent_what_it_says_of_itself(door: Door) -> None:
    customer = await door.customer("10")
    one, other = await made(door, customer, limit=5), await made(door, customer)
    for key, usd in ((one, "0.5"), (other, "0.25"), (one, "1")):
        await door.rig.meter("charge", request_id=uuid.uuid4().hex, api_key=key["key"], cost_usd=usd)
    listed = {key["hash"]: key for key in (await ask(door, customer, "GET")).json["data"]}
    for key in (one, other):
        itself = await door.ask("GET", "/api/v1/key", {"Authorization": f"Bearer {key['key']}"})
        mine = listed[key["data"]["hash"]]
        assert {name: mine[name] for name in mine if name in itself.json["data"]} == {
            name: value for name, value in itself.json["data"].items() if name in mine
        }
    assert [listed[key["data"]["hash"]]["usage_daily"] for key in (one, other)] == [1.5, 0.25]


async def test_an_idempotency_key_makes_one_key_and_tells_it_again(door: Door) -> None:
    customer = await door.customer()
    headers = managing(customer) | JSON | {"Idempotency-Key": "once"}
    first, second = [await door.ask("POST", "/api/v1/keys", headers, b'{"name": "once"}') for _ in range(2)]
    assert (first.status, second.body, second.headers["idempotent-replayed"]) == (201, first.body, "true")
    assert first.json["key"].startswith("sk-")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "name", "invalid_field"), ({"name": ""}, "name", "invalid_field"), ({"name": "x" * 26}, "name", "invalid_field"),
        ({"name": "a", "limit": 0}, "limit", "invalid_field"), ({"name": "a", "limit": -1}, "limit", "invalid_field"),
        ({"name": "a", "limit": "x"}, "limit", "invalid_field"), ({"name": "a", "limit_reset": "monthly"}, "limit_reset", "invalid_field"),
        ({"name": "a", "limit": 1, "limit_reset": "yearly"}, "limit_reset", "invalid_field"),
        ({"name": "a", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at", "invalid_field"),
        ({"name": "a", "expires_at": "2999-01-01"}, "expires_at", "invalid_field"), ({"name": "Default"}, "name", "name_taken"),
    ],
)  # fmt: skip
async def test_a_key_that_cannot_be_is_refused_in_the_words_that_were_sent(
    door: Door, body: dict[str, Any], param: str, code: str
) -> None:
    customer = await door.customer()
    answer = await ask(door, customer, "POST", **body)
    assert not refusal_faults(answer, 409 if code == "name_taken" else 422, code, door.secrets)
    assert answer.json["error"]["param"] == param
    assert not any(word in answer.json["message"] for word in ("usage_limit_usd", "reset_period", "expire_at "))
    existing = await made(door, customer)
    if body:
        answer = await ask(door, customer, "PATCH", f"/{existing['data']['hash']}", **body)
        assert (answer.status, answer.json["error"]["param"]) == (409 if code == "name_taken" else 422, param)


async def test_only_the_accounts_own_credit_id_manages_its_keys(door: Door) -> None:
    customer, stranger = await door.customer(), await door.customer()
    mine = (await made(door, customer))["data"]["hash"]
    for method, path in (("GET", f"/{mine}"), ("PATCH", f"/{mine}"), ("DELETE", f"/{mine}"), ("GET", "/none"), ("GET", f"/{'0' * 64}")):  # fmt: skip
        assert not refusal_faults(await ask(door, stranger, method, path), 404, "key_not_found", door.secrets)
    for headers in ({}, customer.key, {"Authorization": f"Bearer {uuid.uuid4()}"}, {"Authorization": "Bearer x"}):
        for method, path in (("GET", ""), ("POST", ""), ("GET", f"/{mine}"), ("DELETE", f"/{mine}")):
            answer = await door.ask(method, f"/api/v1/keys{path}", headers | JSON, b'{"name": "a"}')
            assert not refusal_faults(answer, 401, "invalid_credit_id", door.secrets), (headers, method, path)
    assert (await door.ask("GET", f"/api/v1/keys/{mine}", customer.owner)).status == 200
    both = [("x-credit-id", customer.credit_id), ("authorization", f"Bearer {stranger.credit_id}")]
    assert (await door.ask("GET", "/api/v1/keys", both)).code == "malformed_header"
    assert (await door.ask("GET", "/keys", managing(customer))).status == 401, "only below /api/v1 is it sent so"


async def test_every_route_below_api_v1_takes_the_management_key_and_tells_errors_by_number(door: Door) -> None:
    customer = await door.customer("10")
    await door.rig.meter("charge", request_id="c", api_key=customer.api_key, cost_usd="1", upstream_id="gen-1")
    for path in ("/api/v1/credits", "/api/v1/activity", "/api/v1/generation?id=gen-1", "/api/v1/keys"):
        assert (await door.ask("GET", path, managing(customer))).status == 200, path
    for method, path, status, code in (
        ("GET", "/api/v1/credits", 401, "invalid_api_key"), ("GET", "/api/v1/nope", 404, "not_found"), ("PUT", "/api/v1/keys", 405, "method_not_allowed"),
        ("GET", "/api/v1/models?nope=1", 422, "invalid_field"), ("GET", "/api/v1/models/nope", 404, "not_found"), ("GET", "/api/v1/generation", 401, "invalid_api_key"),
    ):  # fmt: skip
        answer = await door.ask(method, path)
        assert not refusal_faults(answer, status, code, ())
        assert answer.json["error"]["code"] == status
        assert answer.json["error"]["metadata"]["error_code"] == code
    assert (await door.ask("GET", "/keys")).json["error"]["code"] == "invalid_credit_id", "elsewhere it is a word"


async def test_the_database_alone_does_not_tell_a_keys_hash(door: Door) -> None:
    """To the meter it is a credential."""
    customer = await door.customer()
    key = await made(door, customer)
    [(row,)] = door.rig.sql("SELECT k::text FROM api_key k WHERE name = %s", key["data"]["name"])
    assert key["data"]["hash"] not in row
    [(kept,)] = door.rig.sql("SELECT masked_hash FROM api_key WHERE name = %s", key["data"]["name"])
    assert len(kept) == 32


async def test_a_key_is_named_by_its_hash_where_secrets_are_never_shown_again(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, key_reveal=False) as door:
        customer = await door.customer()
        key = await made(door, customer)
        listed = (await ask(door, customer, "GET")).json["data"]
        assert listed[0]["hash"] == key["data"]["hash"] == hashlib.sha256(key["key"].encode()).hexdigest()
        assert listed[1]["hash"] == hashlib.sha256(customer.api_key.encode()).hexdigest()
