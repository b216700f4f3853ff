"""What gateways that ask with a subrequest are answered, and that what they are answered is held."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import httpx
import pytest
from httpx import Response

from app.admin.tokens import create_token
from app.kernel.security import new_secret
from app.kernel.settings import Settings
from app.main import create_app
from app.metering.api.ext_authz import PATH
from app.metering.holds import expire_holds
from app.wiring import build
from tests.rig import Customer, FakeBtcpay, Rig, exact

D = Decimal
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
ALLOWED = ("X-Account-Id", "X-Key-Id", "X-Billing-Request-Id", "X-Balance-Usd")


async def _token(rig: Rig) -> str:
    return (await rig.service())["Authorization"].removeprefix("Bearer ")


async def _ask(
    rig: Rig,
    headers: Mapping[str, str],
    *,
    target: str = PATH,
    method: str = "GET",
    told: str = "",
) -> Response:
    """As a gateway asks: its token with what it tells, and its client's headers."""
    token = {"X-Service-Token": await _token(rig) + told}
    return await rig.client.request(method, target, headers=token | dict(headers))


def _code(answer: Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_an_allowed_call_is_an_empty_200_with_four_headers_and_a_hold(rig: Rig) -> None:
    customer = await rig.customer("10")
    answer = await _ask(rig, customer.key)
    assert (answer.status_code, answer.content) == (200, b"")
    [(account_id, key_id)] = rig.sql("SELECT account_id, id FROM api_key")
    assert (answer.headers["X-Account-Id"], answer.headers["X-Key-Id"]) == (str(account_id), str(key_id))
    assert D(answer.headers["X-Balance-Usd"]) == D("9.99")
    assert await rig.held(customer) == D("0.01")
    settled = await rig.settle(answer.headers["X-Billing-Request-Id"], "0.003")
    assert settled["balance_usd"] == D("9.997")
    assert await rig.held(customer) == 0


async def test_the_key_is_found_in_every_header_that_clients_put_it_in(rig: Rig) -> None:
    customer = await rig.customer("10")
    key = customer.api_key
    for headers in (
        {"Authorization": f"Bearer {key}"}, {"Authorization": f"Token {key}"}, {"Authorization": f"bearer {key}"},
        {"x-api-key": key}, {"api-key": key},
    ):  # fmt: skip
        assert (await _ask(rig, headers)).status_code == 200, headers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["", "/v1/chat/completions", "//odd//../path/", "/%2e%2e/authorize"])
async def test_any_method_and_any_path_are_asked_about_alike(rig: Rig, method: str, path: str) -> None:
    customer = await rig.customer("10")
    assert (await _ask(rig, customer.key, method=method, target=PATH + path)).status_code == 200
    assert await rig.held(customer) == D("0.01")
    refused = await _ask(rig, {}, method=method, target=PATH + path)
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert (await rig.client.request(method, PATH + path, headers=customer.key)).status_code == 401


async def test_a_gateway_needs_a_service_token_in_its_own_header(rig: Rig) -> None:
    customer, token = await rig.customer("10"), await _token(rig)
    wrong: list[dict[str, str]] = [
        {}, {"X-Service-Token": ""}, {"X-Service-Token": customer.api_key}, {"X-Service-Token": new_secret("svc")},
        {"X-Service-Token": f"Bearer {token}"}, {"X-Service-Token": f"{token},{token}"}, {"X-Service-Token": f"{token} id=1"},
    ]  # fmt: skip
    for headers in wrong:
        answer = await rig.client.get(PATH, headers=customer.key | headers)
        assert _code(answer) == (401, "invalid_token")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    answer = await rig.client.get(f"{PATH}?token={token}", headers={"Authorization": f"Bearer {token}"})
    assert _code(answer) == (401, "invalid_token")
    assert await rig.held(customer) == 0


async def test_a_gateways_header_opens_nothing_else(rig: Rig) -> None:
    body = {"request_id": "a", "api_key": "sk-none", "max_cost_usd": 1}
    answer = await rig.client.post("/v1/meter/authorize", headers={"X-Service-Token": await _token(rig)}, json=body)
    assert _code(answer) == (401, "invalid_token")


async def test_no_key_a_malformed_one_and_an_unknown_one_are_401(rig: Rig) -> None:
    customer = await rig.customer("10")
    bodies = set()
    for key in ("sk-none", customer.api_key[:-1], new_secret("sk"), await _token(rig), "x" * 5000):
        answer = await _ask(rig, {"Authorization": f"Bearer {key}"})
        assert _code(answer) == (401, "invalid_api_key")
        bodies.add(answer.content)
    assert len(bodies) == 1
    for headers in ({}, {"Authorization": "Basic YTpi"}, {"x-credit-id": customer.credit_id}):
        assert _code(await _ask(rig, headers)) == (401, "invalid_api_key")


async def test_every_verdict_has_its_status_and_the_body_that_clients_know(rig: Rig) -> None:
    poor, rich = await rig.customer(), await rig.customer("10")
    answer = await _ask(rig, poor.key)
    assert _code(answer) == (402, "insufficient_balance")
    assert set(answer.json()) == {"error", "message", "statusCode"}
    assert exact(answer)["error"]["metadata"]["shortfall_usd"] == D("0.01")
    limited = await rig.new_key(rich, usage_limit_usd=0.01)
    assert (await _ask(rig, _bearer(limited))).status_code == 200
    answer = await _ask(rig, _bearer(limited))
    assert _code(answer) == (429, "funds_held")
    assert answer.headers["Retry-After"] == "2"
    await rig.meter("charge", request_id="c", api_key=rich.api_key, cost_usd="0.01")
    narrow = await rig.new_key(rich, scopes=["balance"])
    assert _code(await _ask(rig, _bearer(narrow))) == (403, "missing_scope")
    revoked = await rig.new_key(rich)
    assert (await _ask(rig, _bearer(revoked))).status_code == 200
    await rig.client.delete(f"/keys/{revoked['_id']}", headers=rich.owner)
    assert _code(await _ask(rig, _bearer(revoked))) == (401, "invalid_api_key")
    rig.sql("UPDATE account SET status = 'frozen'")
    assert _code(await _ask(rig, rich.key)) == (403, "account_frozen")


async def test_a_key_that_has_spent_its_limit_is_402(rig: Rig) -> None:
    customer = await rig.customer("10")
    key = await rig.new_key(customer, usage_limit_usd=0.01)
    await rig.meter("charge", request_id="c", api_key=key["api_key"], cost_usd="0.01")
    assert _code(await _ask(rig, _bearer(key))) == (402, "key_limit_exceeded")


async def test_a_key_for_some_models_passes_only_where_the_gateway_names_one_of_them(rig: Rig) -> None:
    customer = await rig.customer("10")
    key = await rig.new_key(customer, allowed_models=["openai/gpt-4o"])
    assert _code(await _ask(rig, _bearer(key))) == (403, "model_not_allowed")
    assert _code(await _ask(rig, _bearer(key), told="; model=other")) == (403, "model_not_allowed")
    assert (await _ask(rig, _bearer(key), told="; model=openai/gpt-4o")).status_code == 200
    claims = {"X-Model": "openai/gpt-4o", "model": "openai/gpt-4o"}  # a client's own word is none
    assert _code(await _ask(rig, _bearer(key) | claims)) == (403, "model_not_allowed")


async def test_fifty_at_once_on_a_balance_for_ten_are_ten_allowed(rig: Rig) -> None:
    customer = await _customer_with(rig, "0.1")
    answers = await asyncio.gather(*(_ask(rig, customer.key) for _ in range(50)))
    assert Counter(answer.status_code for answer in answers) == {200: 10, 429: 40}
    assert len({answer.headers["X-Billing-Request-Id"] for answer in answers if answer.status_code == 200}) == 10
    assert await rig.held(customer) == D("0.1")


async def test_a_repeat_under_the_gateways_own_id_holds_once_and_a_clients_id_counts_for_nothing(rig: Rig) -> None:
    customer = await rig.customer("10")
    again = await asyncio.gather(*(_ask(rig, customer.key, told="; id=a.b:c-1") for _ in range(10)))
    assert len({answer.headers["X-Billing-Request-Id"] for answer in again}) == 1
    assert await rig.held(customer) == D("0.01")
    assert rig.sql("SELECT request_id FROM hold") == [("authz:a.b:c-1",)]
    clients = dict.fromkeys(("X-Request-Id", "X-Authz-Request-Id", "Idempotency-Key", "X-Billing-Request-Id"), "same")
    for _ in range(3):
        await _ask(rig, customer.key | clients)
    assert await rig.held(customer) == D("0.04")


async def test_an_id_that_was_another_keys_call_is_refused(rig: Rig) -> None:
    customer = await rig.customer("10")
    other = await rig.new_key(customer)
    assert (await _ask(rig, customer.key, told="; id=x")).status_code == 200
    assert _code(await _ask(rig, _bearer(other), told="; id=x")) == (409, "request_id_reuse")
    assert await rig.held(customer) == D("0.01")


@pytest.mark.parametrize(
    "told",
    ["; id=" + "x" * 59, "; id=", "; id=a b", "; id=a/b", "; id=1; id=2", "; nothing", "; model=", "; model=a b", "; ID=1", "; hold=5"],
)  # fmt: skip
async def test_what_a_gateway_tells_wrongly_is_400_for_it_and_401_for_strangers(rig: Rig, told: str) -> None:
    customer = await rig.customer("10")
    assert _code(await _ask(rig, customer.key, told=told)) == (400, "malformed_header")
    stranger = await rig.client.get(PATH, headers=customer.key | {"X-Service-Token": "svc-none" + told})
    assert _code(stranger) == (401, "invalid_token")
    assert await rig.held(customer) == 0


async def test_empty_parts_after_the_token_are_nothing(rig: Rig) -> None:
    customer = await rig.customer("10")
    for told in (";", "; ", ";;", " ;  id=1 ; model=m ;"):
        assert (await _ask(rig, customer.key, told=told)).status_code == 200


async def test_the_hold_remembers_the_clients_path_and_never_its_query(rig: Rig) -> None:
    customer = await rig.customer("10")
    for number, (headers, target, endpoint) in enumerate(
        [
            ({"X-Forwarded-Uri": "/v1/chat?key=secret#x"}, PATH, "/v1/chat"),
            ({"X-Original-URI": "/v1/a%20b;c?key=secret"}, PATH, "/v1/a%20b;c"),
            ({"X-Forwarded-Uri": "/first", "X-Original-URI": "/second"}, f"{PATH}/third", "/first"),
            ({"X-Original-URI": "https://user:secret@host/v1/x?y"}, PATH, "/v1/x"),
            ({}, f"{PATH}/v1/images?key=secret", "/v1/images"),
            ({"X-Forwarded-Uri": "/" + "x" * 5000}, PATH, "/" + "x" * 199),
            ({"X-Forwarded-Uri": "/a\tb\x7f"}, PATH, "/a"),
            ({"X-Forwarded-Uri": "javascript:alert(1)"}, PATH, None),
            ({"X-Forwarded-Uri": "?key=secret"}, PATH, None),
            ({}, PATH, None),
        ]
    ):
        answer = await _ask(rig, customer.key | headers, target=target, told=f"; id=e{number}")
        assert answer.status_code == 200
        assert rig.sql("SELECT endpoint FROM hold WHERE request_id = %s", f"authz:e{number}") == [(endpoint,)]


async def test_a_hold_that_nobody_settles_is_freed_after_a_quarter_of_an_hour_and_can_still_be_settled(
    rig: Rig,
) -> None:
    customer = await rig.customer("10")
    hold_id = (await _ask(rig, customer.key)).headers["X-Billing-Request-Id"]
    [(seconds,)] = rig.sql("SELECT extract(epoch FROM expires_at - now()) FROM hold")
    assert 890 < seconds <= 900
    rig.sql("UPDATE hold SET expires_at = now() - interval '1 second'")
    assert await expire_holds(rig.house.db) == 1
    assert await rig.held(customer) == 0
    await rig.settle(hold_id, "0.02")
    assert await rig.balance(customer) == D("9.98")


async def test_a_hold_is_settled_and_released_by_its_own_gateway_only(rig: Rig) -> None:
    customer = await rig.customer("10")
    hold_id = (await _ask(rig, customer.key)).headers["X-Billing-Request-Id"]
    other = await create_token(rig.house.db, rig.house.settings.pepper, "service", "other")
    for verb, more in (("settle", {"cost_usd": 0.01}), ("release", {})):
        answer = await rig.client.post(
            f"/v1/meter/{verb}", headers={"Authorization": f"Bearer {other}"}, json={"hold_id": hold_id, **more}
        )
        assert _code(answer) == (404, "hold_not_found")
    assert (await rig.meter("release", hold_id=hold_id)).status_code == 200
    assert await rig.held(customer) == 0


# --- nginx ----------------------------------------------------------------------------------------


async def _ask_as_nginx(rig: Rig, headers: Mapping[str, str]) -> Response:
    return await _ask(rig, headers, target=f"{PATH}?mode=nginx")


def _rebuilt(answer: Response) -> tuple[int, Any]:
    """What error_page makes of it."""
    assert answer.headers["X-Authz-Body"].isascii()
    assert json.loads(answer.headers["X-Authz-Body"]) == answer.json()
    return int(answer.headers["X-Authz-Status"]), json.loads(answer.headers["X-Authz-Body"])["error"]["code"]


async def test_for_nginx_every_refusal_is_401_or_403_with_the_real_one_in_its_headers(rig: Rig) -> None:
    poor, rich = await rig.customer(), await _customer_with(rig, "0.01")
    answer = await _ask_as_nginx(rig, poor.key)
    assert answer.status_code == 403
    assert _rebuilt(answer) == (402, "insufficient_balance")
    allowed = await _ask_as_nginx(rig, rich.key)
    assert allowed.status_code == 200
    assert set(ALLOWED) <= {name.title() for name in allowed.headers}
    assert "X-Authz-Status" not in allowed.headers
    answer = await _ask_as_nginx(rig, rich.key)
    assert (answer.status_code, answer.headers["Retry-After"]) == (403, "2")
    assert _rebuilt(answer) == (429, "funds_held")
    answer = await _ask_as_nginx(rig, {})
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert _rebuilt(answer) == (401, "invalid_api_key")
    assert "…" in answer.json()["message"]  # which no header may hold as it is
    answer = await rig.client.get(f"{PATH}?mode=nginx", headers=rich.key)
    assert answer.status_code == 401
    assert _rebuilt(answer) == (401, "invalid_token")


async def test_nginxs_way_is_the_gateways_to_choose_and_never_its_clients(rig: Rig) -> None:
    poor = await rig.customer()
    for target in (
        "/v1/chat?mode=nginx",
        "/?mode=nginx",
        "/v1/chat?mode=other",
        "?mode=chat",
        "?mode=a&mode=b",
        "?mode",
        "?mode=%ff",
    ):
        for method in ("GET", "POST"):
            answer = await _ask(rig, poor.key, target=PATH + target, method=method)
            assert _code(answer) == (402, "insufficient_balance")


async def test_without_a_database_nobody_passes(settings: Settings) -> None:
    house = build(settings, "postgresql://nobody@127.0.0.1:1/none", gateway=FakeBtcpay())
    await house.db.open()
    transport = httpx.ASGITransport(create_app(house), raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
        headers = {"X-Service-Token": new_secret("svc"), "Authorization": f"Bearer {new_secret('sk')}"}
        plain, nginx = await asyncio.gather(*(client.get(PATH + how, headers=headers) for how in ("", "?mode=nginx")))
    await house.close()
    for answer in (plain, nginx):
        assert _code(answer) == (503, "database_unavailable")
        assert answer.headers["Retry-After"] == "1"
    assert _rebuilt(nginx) == (503, "database_unavailable")


def _bearer(key: Mapping[str, Any]) -> dict[str, str]:
    return Customer("", key["api_key"]).key


async def _customer_with(rig: Rig, usd: str) -> Customer:
    """One who has spent the rest."""
    customer = await rig.customer("10")
    await rig.meter("charge", request_id="spent", api_key=customer.api_key, cost_usd=str(10 - D(usd)))
    return customer
