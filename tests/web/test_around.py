"""What stands around every request: each is counted as long as it took, whoever answered it."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import psycopg
import pytest
from litestar import Litestar
from litestar.di import Provide

from app.kernel import logs
from app.kernel.settings import Settings
from tests.door import JSON, Door, opened

WAIT_SECONDS = 0.4


@contextmanager
def _tokens_are_locked(url: str, seconds: float) -> Iterator[None]:
    """For so long the table of tokens is locked: whoever asks waits."""
    with psycopg.connect(url) as conn:
        conn.execute("LOCK TABLE service_token IN ACCESS EXCLUSIVE MODE")
        timer = threading.Timer(seconds, conn.rollback)
        timer.start()
        yield
        timer.join()


async def _seconds(door: Door, route: str) -> float:
    text = (await door.ask("GET", "/metrics")).body.decode()
    sums = [line for line in text.splitlines() if line.startswith(f'satmeter_request_seconds_sum{{route="{route}"}}')]
    return sum(float(line.rsplit(" ", 1)[1]) for line in sums)


@pytest.mark.parametrize("body", [b'{"request_id": "x"}', [b'{"request_id"', b': "x"}'], b"{"])
@pytest.mark.parametrize("verb", ["authorize", "settle", "charge", "refund"])
async def test_a_refused_call_is_counted_as_long_as_it_took(door: Door, clean: str, verb: str, body: bytes) -> None:
    route = f"/v1/meter/{verb}"
    before = await _seconds(door, route)
    with _tokens_are_locked(clean, WAIT_SECONDS):
        answer = await door.ask("POST", route, JSON | {"Authorization": "Bearer svc-x"}, body)
    assert answer.status == 401
    assert await _seconds(door, route) - before >= WAIT_SECONDS * 0.8


@pytest.mark.parametrize(
    ("public_url", "is_told"), [("https://pay.example.com", True), ("http://127.0.0.1:8080", False)]
)
async def test_browsers_are_told_to_stay_with_https_where_the_public_url_is(
    clean: str, settings: Settings, public_url: str, is_told: bool
) -> None:
    async with opened(clean, settings, public_url=public_url) as door:
        service = await door.service()
        for method, path, headers, body in (
            ("GET", "/health/live", {}, None), ("GET", "/keys", {}, None), ("GET", "/nope", {}, None), ("OPTIONS", "/keys", {}, None),
            ("GET", "/", {}, None), ("POST", "/v1/meter/authorize", JSON | service, b"{}"), ("GET", "/docs", {}, None),
            ("POST", "/v1/meter/settle", JSON | service, b'{"hold_id": "x", "cost_usd": 1}'),
        ):  # fmt: skip
            answer = await door.ask(method, path, headers, body)
            assert ("strict-transport-security" in answer.headers) is is_told, path
        customer = await door.customer("20")
        call = json.dumps({"request_id": "r", "api_key": customer.api_key, "max_cost_usd": 1}).encode()
        answer = await door.ask("POST", "/v1/meter/authorize", JSON | service, call)
        assert answer.json["decision"] == "allow"
        assert ("strict-transport-security" in answer.headers) is is_told


async def test_options_names_every_method_that_the_address_takes(door: Door) -> None:
    app: Litestar = door.app
    for route in app.routes:
        path = re.sub(r"\{\w+:(\w+)\}", lambda part: str(UUID(int=1)) if part[1] == "uuid" else "1", route.path)
        if "ext-authz" in path:
            continue  # there every method is a gateway's question
        told = await door.ask("OPTIONS", path)
        assert told.status == 204
        allowed = set(told.headers["allow"].split(", "))
        refused = (await door.ask("BREW", path)).headers["allow"].split(", ")
        assert allowed == set(refused), path
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            answer = await door.ask(method, path)
            assert (answer.status == 405) is (method not in allowed), (method, path)


async def test_every_request_is_logged_under_the_id_that_its_answer_bears(
    door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    customer, service = await door.customer("20"), await door.service()
    logs.configure("INFO")
    call = json.dumps({"request_id": "r", "api_key": customer.api_key, "max_cost_usd": 1}).encode()
    asked = [
        await door.ask("POST", "/v1/meter/authorize", JSON | service, call),
        await door.ask("POST", "/v1/meter/authorize", JSON | service, b"{}"),
        await door.ask("GET", "/keys", customer.owner),
        await door.ask("GET", "/nope"),
    ]
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    ids = {line["request_id"]: line["status"] for line in told if line["event"] == "request"}
    assert ids == {answer.headers["x-request-id"]: answer.status for answer in asked}


async def test_no_dependency_asks_the_database(door: Door) -> None:
    """Litestar resolves them side by side and cancels the others when one refuses; a cancelled look-up costs its connection."""
    dependencies = door.app.dependencies or {}
    provides = {name: one for name, one in dependencies.items() if isinstance(one, Provide)}
    assert set(provides) >= {"caller", "db", "once"}
    assert {name for name, one in provides.items() if not one.has_sync_callable} == {"once"}, "which asks nobody"
