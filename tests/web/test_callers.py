"""Who is calling is asked first, on every route, whatever else is wrong; and one caller shows one credential of a kind."""

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest

from app.kernel.security import new_secret
from app.metering.api.ext_authz import PATH as EXT_AUTHZ
from tests.door import JSON, Answer, Door
from tests.rig import Customer
from tests.test_bad_input import ROUTES

Headers = list[tuple[str, str]]
TYPED: Final = ("Content-Type", "application/json")
MESSES: Final[Mapping[str, tuple[Headers, Any]]] = {
    "not JSON": ([TYPED], b"{"),
    "another type": ([TYPED], b'{"name": 5, "amount": [], "hold_id": 1}'),
    "nothing of what is needed": ([TYPED], b"{}"),
    "another content type": ([("Content-Type", "text/plain")], b"{}"),
    "no text at all": ([("Content-Type", "image/png")], b"\xff\xfe" * 40),
    "too large": ([TYPED], b" " * 2_000_000),
    "too large, it says": ([TYPED, ("Content-Length", "99999999999")], b"{}"),
    "too large, in chunks": ([TYPED], [b" " * 1_000_000, b"{}"]),
    "a length that is none": ([TYPED, ("Content-Length", "x")], b"{}"),
    "a malformed Idempotency-Key": ([TYPED, ("Idempotency-Key", "a b")], b"{}"),
}
QUERIES: Final = ("", "?limit=x&cursor=&from=x&api_key_id=null&status=y&show_key=z&bogus=1")


def _guarded() -> Iterator[tuple[str, str, Headers]]:
    """Each route that needs a credential, with one of the right kind that proves nothing."""
    stranger, key, token = str(uuid.uuid4()), new_secret("sk"), new_secret("svc")
    wrong: dict[str, Headers] = {
        "owner": [("x-credit-id", stranger)], "anybody": [("Authorization", f"Bearer {key}")], "key": [("x-api-key", key)],
        "service": [("Authorization", f"Bearer {token}")], "gateway": [("X-Service-Token", token)],
        "admin": [("Authorization", f"Bearer {new_secret('adm')}")],
    }  # fmt: skip
    for (method, template), route in ROUTES.items():
        if route.who in wrong:
            path = template.replace("{path:path}", "v1/x").replace("{method:str}", "btc")
            for name in ("charge_id", "key_id", "invoice_id", "topup_id"):
                path = path.replace(f"{{{name}:str}}", "x")
            yield method, path, wrong[route.who]
    yield "POST", "/accounts/create", [("Authorization", "Bearer dummy")]


async def test_401_comes_before_whatever_else_is_wrong_with_a_request(door: Door) -> None:
    wrong = []
    for method, path, headers in _guarded():
        for query in QUERIES:
            for what, (more, body) in MESSES.items():
                answer = await door.ask(method, path + query, headers + more, body)
                if answer.status != 401:
                    wrong.append(f"{method} {path}{query[:2]} {what}: {answer.status} {answer.code}")
    assert wrong == [], f"{len(wrong)}"


async def test_a_stranger_makes_nobody_read_a_large_body(door: Door) -> None:
    """And its connection is closed, because the rest of it may still be coming."""
    chunks = [b" " * 1000] * 5000
    answer = await door.ask("POST", "/v1/meter/settle/batch", [("Authorization", "Bearer svc-x"), TYPED], chunks)
    assert (answer.status, answer.headers.get("connection")) == (401, "close")
    small = await door.ask("POST", "/v1/meter/settle/batch", [("Authorization", "Bearer svc-x"), TYPED], b"{}")
    assert (small.status, small.headers.get("connection")) == (401, None)


async def test_a_known_caller_learns_what_is_wrong_in_the_order_of_the_wire(door: Door) -> None:
    service = list((await door.service()).items())
    for what, status in {"not JSON": 400, "nothing of what is needed": 422, "another content type": 415, "too large": 413}.items():  # fmt: skip
        more, body = MESSES[what]
        for path in ("/v1/meter/authorize", "/v1/meter/refund", "/v1/meter/settle/batch"):
            assert (await door.ask("POST", path, service + more, body)).status == status, (what, path)
    customer = await door.customer()
    bad = [*customer.owner.items(), TYPED, ("Idempotency-Key", "a b")]
    assert (await door.ask("POST", "/keys", bad, b"{")).json["error"]["param"] == "Idempotency-Key"


# --- two credentials of one kind ---------------------------------------------------------------------


def _is_refused(answer: Answer) -> bool:
    return (answer.status, answer.code) == (400, "malformed_header")


async def _two_keys(door: Door, customer: Customer) -> tuple[str, str]:
    return customer.api_key, (await door.rig.new_key(customer))["api_key"]


def _key_headers(key: str) -> Headers:
    return [("Authorization", f"Bearer {key}"), ("Authorization", f"Token {key}"), ("x-api-key", key), ("api-key", key)]


@pytest.mark.parametrize("whose", ["the same account's", "another account's", "nobody's"])
async def test_two_api_keys_that_differ_are_400_in_any_two_headers(door: Door, whose: str) -> None:
    customer, stranger = await door.customer(), await door.customer()
    first, second = await _two_keys(door, customer)
    second = {"another account's": stranger.api_key, "nobody's": "sk-x"}.get(whose, second)
    gateway = ("X-Service-Token", (await door.service())["Authorization"].split()[1])
    for one in _key_headers(first):
        for other in _key_headers(second):
            assert _is_refused(await door.ask("GET", "/credits/balance", [one, other]))
            assert _is_refused(await door.ask("GET", "/api/v1/key", [other, one]))
            assert _is_refused(await door.ask("POST", "/credits/balance", [one, other]))
            assert _is_refused(await door.ask("GET", EXT_AUTHZ, [gateway, one, other]))
            assert _is_refused(await door.ask("POST", "/accounts/create", [one, other]))
        for same in _key_headers(first):
            assert (await door.ask("GET", "/credits/balance", [one, same])).status == 200


async def test_two_credit_ids_that_differ_are_400_and_the_same_one_twice_is_one(door: Door) -> None:
    customer, stranger = await door.customer(), await door.customer()
    ours, theirs = ("x-credit-id", customer.credit_id), ("x-credit-id", stranger.credit_id)
    shouted = ("x-credit-id", customer.credit_id.upper())
    for method, path in (("GET", "/credits/balance"), ("GET", "/keys"), ("POST", "/credits/balance"), ("GET", "/nwc-auto-topup")):  # fmt: skip
        for pair in ([ours, theirs], [theirs, ours], [ours, ("x-credit-id", "x")]):
            assert _is_refused(await door.ask(method, path, pair)), (method, path)
        assert (await door.ask(method, path, [ours, shouted])).status == 200


async def test_a_credit_id_in_the_body_and_another_in_the_header_are_400(door: Door) -> None:
    customer, stranger = await door.customer(), await door.customer()
    said = json.dumps({"credit_id": customer.credit_id}).encode()
    for other in (stranger.credit_id, str(uuid.uuid4())):
        answer = await door.ask("POST", "/credits/balance", {"x-credit-id": other} | JSON, said)
        assert answer.status in (400, 401)
        assert answer.status == 401 or answer.code == "malformed_header"
    assert _is_refused(await door.ask("POST", "/credits/balance", stranger.owner | JSON, said))
    assert _is_refused(await door.ask("POST", "/credits/balance", stranger.key | JSON, said))
    for same in (customer.owner, customer.key, {}):
        assert (await door.ask("POST", "/credits/balance", same | JSON, said)).status == 200


async def test_a_credit_id_and_a_key_of_two_accounts_are_400_and_either_must_prove_something(door: Door) -> None:
    customer, stranger = await door.customer(), await door.customer()
    for path in ("/credits/balance", "/keys", "/api/v1/key"):
        assert _is_refused(await door.ask("GET", path, stranger.key | customer.owner)), path
        assert (await door.ask("GET", path, customer.key | customer.owner)).status == 200, path
        assert (await door.ask("GET", path, {"x-api-key": "sk-x"} | customer.owner)).status == 401, path


async def test_two_tokens_that_differ_are_400(door: Door) -> None:
    one, other = (await door.service())["Authorization"], f"Bearer {new_secret('svc')}"
    admin = (await door.admin())["Authorization"]
    body = [("Content-Type", "application/json")]
    for path in ("/v1/meter/authorize", "/v1/meter/settle", "/v1/meter/refund", "/v1/meter/events"):
        pair = [("Authorization", one), ("Authorization", other)]
        assert _is_refused(await door.ask("POST", path, pair + body, b"{}"))
        assert (await door.ask("POST", path, [pair[0], pair[0], *body], b"{}")).status == 422
    assert _is_refused(await door.ask("GET", "/admin/topups", [("Authorization", admin), ("Authorization", one)]))
    tokens = [("X-Service-Token", one.split()[1]), ("X-Service-Token", other.split()[1])]
    assert _is_refused(await door.ask("GET", EXT_AUTHZ, tokens))


# --- whose Idempotency-Key it is ---------------------------------------------------------------------


async def _new_account(door: Door, headers: Headers, key: str) -> Answer:
    return await door.ask("POST", "/accounts/create", [*headers, ("Idempotency-Key", key)])


@pytest.mark.parametrize(
    "sent",
    [
        ("Authorization", "Bearer dummy"), ("Authorization", "Token dummy"), ("Authorization", "Basic dXNlcjpwYXNz"), ("Authorization", "dummy"),
        ("x-api-key", "dummy"), ("api-key", "dummy"), ("x-credit-id", "dummy"), ("Authorization", "Bearer svc-dummy"),
        ("Authorization", "Bearer adm-dummy"), ("x-api-key", new_secret("sk")), ("x-credit-id", str(uuid.uuid4())), ("x-credit-id", ""),
    ],
)  # fmt: skip
async def test_a_credential_that_proves_nothing_is_401_also_where_none_is_needed(
    door: Door, sent: tuple[str, str]
) -> None:
    answer = await _new_account(door, [sent], "my-first-account-0001")
    assert answer.status == 401
    assert door.rig.sql("SELECT count(*) FROM account") == [(0,)]


async def test_the_same_key_sent_in_any_header_is_one_caller(door: Door) -> None:
    customer = await door.customer()
    key, body = uuid.uuid4().hex, json.dumps({"amount": 20}).encode()
    answers = [
        await door.ask("POST", "/topup/create/btc", [header, TYPED, ("Idempotency-Key", key)], body)
        for header in _key_headers(customer.api_key)
    ]
    assert [answer.status for answer in answers] == [201] * 4
    assert len({answer.json["invoice_id"] for answer in answers}) == 1
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, "true", "true", "true"]


async def test_strangers_are_told_apart_by_their_address_and_callers_by_what_they_proved(door: Door) -> None:
    one, other = await door.customer(), await door.customer()
    service, admin = await door.service(), await door.admin()
    key = "my-first-account-0001"
    callers: list[Headers] = [
        [], list(one.owner.items()), list(one.key.items()), list(other.owner.items()), list(service.items()), list(admin.items())
    ]  # fmt: skip
    made = [await _new_account(door, headers, key) for headers in callers]
    made.append(await door.ask("POST", "/accounts/create", {"Idempotency-Key": key}, client="203.0.113.9"))
    assert [answer.status for answer in made] == [201] * 7
    assert len({answer.json["credit_id"] for answer in made}) == 7
    again = [await _new_account(door, headers, key) for headers in callers]
    assert [answer.body for answer in again] == [answer.body for answer in made[:6]]


async def test_a_refused_head_costs_the_database_no_connection(door: Door) -> None:
    """500 times a malformed Idempotency-Key: the caller's look-up is answered, and nothing is cancelled."""
    customer = await door.customer()

    async def refused(headers: Headers) -> Answer:
        return await door.ask("POST", "/keys", [*headers, TYPED, ("Idempotency-Key", "a b")], b'{"name": "x"}')

    await door.race(refused(list(customer.owner.items())) for _ in range(20))
    seen = _backends(door)
    for _ in range(25):
        for answer in await door.race(refused(list(customer.owner.items())) for _ in range(20)):
            assert (answer.status, answer.code) == (400, "malformed_header")
        seen |= _backends(door)
    assert len(seen) <= 41, "connections were thrown away"  # two pools of 20, and one for batches
    for answer in await door.race(refused([("x-credit-id", str(uuid.uuid4()))]) for _ in range(20)):
        assert answer.status == 401


def _backends(door: Door) -> set[int]:
    found = door.rig.sql(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return {pid for (pid,) in found}
