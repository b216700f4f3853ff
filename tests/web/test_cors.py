"""Whose web pages may ask from a browser: all of them what customers ask, none of them the rest."""

import json
from collections.abc import AsyncIterator

import pytest
from litestar.routes import HTTPRoute

from app.kernel.settings import Settings, SettingsError, load
from tests.door import JSON, Answer, Door, opened

PAGE = "https://app.example.com"
NOT_FOR_PAGES = (
    "/admin",
    "/operator",
    "/console",
    "/webhooks",
    "/receipts",
    "/docs",
    "/metrics",
    "/health",
    "/llms.txt",
    "/v1/meter/ext-authz",
)


@pytest.fixture
async def narrow(clean: str, settings: Settings) -> AsyncIterator[Door]:
    async with opened(clean, settings, cors_origins=(PAGE, "http://localhost:3000")) as door:
        yield door


def allowed(answer: Answer) -> str | None:
    return answer.headers.get("access-control-allow-origin")


def named(answer: Answer, header: str) -> set[str]:
    return {name.strip().lower() for name in answer.headers.get(header, "").split(",")}


async def preflight(door: Door, path: str, origin: str = PAGE, method: str = "POST", headers: str = "") -> Answer:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    return await door.ask("OPTIONS", path, asked | ({"Access-Control-Request-Headers": headers} if headers else {}))


async def test_a_page_reads_answers_refusals_and_what_waits_are_told_in(door: Door) -> None:
    customer, origin = await door.customer("10"), {"Origin": PAGE}
    answers = [
        await door.ask("GET", "/credits/balance", customer.key | origin),
        await door.ask("GET", "/credits/balance", origin),
        await door.ask("GET", "/keys/none", customer.owner | origin),
        await door.ask("PUT", "/keys", customer.owner | origin),
        await door.ask("POST", "/keys", customer.owner | JSON | origin, b"{"),
        await door.ask("GET", "/v1/models/none", origin),
        await door.ask("GET", "/topups/nothing/here", origin),
        await door.ask("GET", "/api/v1/key", customer.key | origin),
        await door.ask("HEAD", "/v1/models", origin),
        await door.ask("GET", "/openapi.json", origin),
        await door.ask("POST", "/v1/meter/authorize", origin | JSON, b"{}"),
        await door.ask("POST", "/v1/meter/settle?x=1", origin | JSON, b"{}"),
    ]
    assert [answer.status for answer in answers] == [200, 401, 404, 405, 400, 404, 404, 200, 200, 200, 401, 401]
    for answer in answers:
        assert allowed(answer) == "*"
        assert named(answer, "access-control-expose-headers") >= {"retry-after", "x-request-id", "idempotent-replayed", "x-next-cursor"}  # fmt: skip
        assert "access-control-allow-credentials" not in answer.headers, "no cookies are used"


async def test_a_verdict_on_the_hot_path_is_a_pages_too(door: Door) -> None:
    customer, service = await door.customer("10"), await door.service()
    body = json.dumps({"request_id": "r", "api_key": customer.api_key, "max_cost_usd": 1}).encode()
    answer = await door.ask("POST", "/v1/meter/authorize", service | JSON | {"Origin": PAGE}, body)
    assert (answer.status, answer.json["decision"], allowed(answer)) == (200, "allow", "*")
    assert allowed(await door.ask("POST", "/v1/meter/authorize", service | JSON, body)) is None, "nobody's page asked"


async def test_a_preflight_is_answered_without_a_credential(door: Door) -> None:
    for path in (
        "/keys",
        "/v1/meter/authorize",
        "/credits/balance",
        "/topup/create/btc",
        "/api/v1/keys/x",
        "/nope-not-there/x",
    ):
        answer = await preflight(door, path, headers="authorization,x-stainless-os, X-Custom")
        if path.startswith("/nope"):
            assert allowed(answer) is None
            continue
        assert (answer.status, answer.body, allowed(answer)) == (204, b"", "*")
        assert "x-request-id" in answer.headers
        assert named(answer, "access-control-allow-methods") >= {"get", "post", "patch", "delete", "put"}
        assert named(answer, "access-control-allow-headers") >= {
            "authorization", "x-api-key", "api-key", "x-credit-id", "idempotency-key", "content-type", "x-stainless-os", "x-custom",
        }  # fmt: skip
        assert int(answer.headers["access-control-max-age"]) > 0
    bare = await preflight(door, "/keys")
    assert named(bare, "access-control-allow-headers") >= {"authorization", "x-credit-id", "idempotency-key"}
    odd = await preflight(door, "/keys", headers="a b,\x7f,good," + ",".join(f"x{n}" for n in range(500)))
    assert "good" in named(odd, "access-control-allow-headers")
    assert len(odd.headers["access-control-allow-headers"]) < 1000


async def test_operators_webhooks_pages_metrics_and_gateways_are_for_no_page(door: Door) -> None:
    admin = await door.admin()
    for path in ("/admin/topups", "/admin/nope", "/webhooks/btcpay", "/", "/docs", "/llms.txt", "/receipts/x", "/metrics", "/health/ready", "/nope", "//admin/topups"):  # fmt: skip
        for answer in (
            await door.ask("GET", path, admin | {"Origin": PAGE}),
            await door.ask("POST", path, {"Origin": PAGE}),
            await preflight(door, path, method="GET"),
        ):
            assert not {name for name in answer.headers if name.startswith("access-control-")}, path
    assert (await preflight(door, "/v1/meter/ext-authz/v1/chat", method="POST")).status == 401, (
        "a yes would let it through"
    )


async def test_every_address_of_customers_is_for_pages_and_no_other(door: Door) -> None:
    """Also of a route that comes tomorrow."""
    seen = set()
    for route in door.app.routes:
        if isinstance(route, HTTPRoute):
            path = route.path_format.replace("{", "").replace("}", "")
            is_customers = route.path != "/" and not route.path.startswith(NOT_FOR_PAGES)
            assert (allowed(await preflight(door, path)) == "*") == is_customers, route.path
            seen.add(is_customers)
    assert seen == {True, False}


async def test_other_pages_than_those_named_are_told_nothing(narrow: Door) -> None:
    customer = await narrow.customer()
    for origin in (PAGE, "http://localhost:3000"):
        answer = await narrow.ask("GET", "/keys", customer.owner | {"Origin": origin})
        assert (answer.status, allowed(answer)) == (200, origin)
        assert (await preflight(narrow, "/keys", origin)).headers["access-control-allow-origin"] == origin
    for origin in (
        "https://evil.example.com",
        "null",
        f"{PAGE}.evil.example.com",
        "https://app.example.com:444",
        "http://app.example.com",
        "*",
    ):
        answer = await narrow.ask("GET", "/keys", customer.owner | {"Origin": origin})
        assert (answer.status, allowed(answer), answer.headers["vary"]) == (200, None, "Origin")
        refused = await preflight(narrow, "/keys", origin)
        assert (refused.status, allowed(refused)) == (204, None)
    assert "Origin" in (await narrow.ask("GET", "/v1/models")).headers["vary"], "a cache is told that it differs"


async def test_no_page_asks_where_it_is_switched_off(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, cors_origins=()) as door:
        assert allowed(await preflight(door, "/keys")) is None
        assert allowed(await door.ask("GET", "/v1/models", {"Origin": PAGE})) is None


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", ("*",)), ("*", ("*",)), ("off", ()), (" https://A.example.com ,http://localhost:3000", ("https://a.example.com", "http://localhost:3000")),
        ("chrome-extension://abc", ("chrome-extension://abc",)), ("http://[::1]:8080", ("http://[::1]:8080",)),
    ],
)  # fmt: skip
def test_the_setting_is_origins_as_browsers_send_them(
    tmp_path_factory: pytest.TempPathFactory, text: str, read: tuple[str, ...]
) -> None:
    assert load({"DATA_DIR": str(tmp_path_factory.mktemp("data")), "CORS_ORIGINS": text}).cors_origins == read


@pytest.mark.parametrize("text", ["https://a.example.com/", "a.example.com", "https://a.example.com/path", "*,https://a.example.com", "null", "https://*.example.com", "off,https://a.example.com"])  # fmt: skip
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    with pytest.raises(SettingsError, match="CORS_ORIGINS"):
        load({"DATA_DIR": str(tmp_path_factory.mktemp("data")), "CORS_ORIGINS": text})
