"""A real nginx, a real Caddy and a real Envoy, with the configurations of deploy/gateways as they are, in front of an upstream."""

import asyncio
import json
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from app.kernel.settings import Settings
from app.main import create_app
from app.wiring import build
from tests.integration.nodes import Process
from tests.integration.street import _served
from tests.offers.payer import Challenge
from tests.program import eventually, free_ports
from tests.rig import Customer, FakeBtcpay, Rig
from tests.wallets import FakeLightning, FakeWallets

pytestmark = pytest.mark.long

D = Decimal
_OURS: Final = ("X-Account-Id", "X-Key-Id", "X-Billing-Request-Id", "X-Balance-Usd")
CONFIGURATIONS: Final = Path(__file__).parents[2] / "deploy" / "gateways"
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:{Path(sys.executable).parent}"
_FILES: Final = {"nginx": "nginx.conf", "caddy": "Caddyfile", "envoy": "envoy.yaml"}
_NGINX: Final = """daemon off; master_process off; pid {0}/pid; error_log {0}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;
    include {0}/ours.conf;
}}
"""


@dataclass(slots=True)
class Upstream:
    """An inference server that tells what it was sent. `/fails/<status>` fails so."""

    calls: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for told in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{told}.complete"})
            return
        if scope["type"] == "websocket":
            await self._talk(scope, receive, send)
            return
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        self.calls.append(scope["path"])
        headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
        seen = {"method": scope["method"], "path": scope["raw_path"].decode(), "size": size, "headers": headers}
        status = int(scope["path"].rpartition("/")[2]) if scope["path"].startswith("/fails/") else 200
        lines = [(b"content-type", b"application/json"), (b"x-upstream", b"yes")]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": json.dumps(seen).encode()})

    async def _talk(self, scope: Any, receive: Any, send: Any) -> None:
        """Tell the headers, then echo, until the other side has had enough."""
        self.calls.append(scope["path"])
        await receive()
        await send({"type": "websocket.accept"})
        headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
        await send({"type": "websocket.send", "text": json.dumps(headers)})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": f"heard {message['text']}"})


@dataclass(slots=True)
class Gate:
    """A gateway that runs, and what stands behind it."""

    client: httpx.AsyncClient
    rig: Rig
    upstream: Upstream
    lightning: FakeLightning | None = None

    async def call(self, headers: dict[str, str], path: str = "/v1/chat", method: str = "POST", **more: Any) -> Any:
        return await self.client.request(method, path, headers=headers, **more)

    async def refused(self, headers: dict[str, str], **more: Any) -> tuple[int, str, httpx.Headers]:
        """Status, code and headers of a call that must not reach the upstream."""
        before = len(self.upstream.calls)
        answer = await self.call(headers, **more)
        assert len(self.upstream.calls) == before
        assert answer.headers["content-type"] == "application/json"
        body = answer.json()
        assert body["statusCode"] == answer.status_code
        assert not [name for name in answer.headers if name.startswith("x-authz")]
        return answer.status_code, body["error"]["code"], answer.headers


def _program(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    if found is None:
        pytest.skip(f"no {name} here; on Debian: apt-get install nginx-light caddy; Envoy is of PyPI, for x86-64 Linux")
    return found


def _start_nginx(folder: Path, ours: str) -> Process:
    (folder / "ours.conf").write_text(ours)
    (folder / "nginx.conf").write_text(_NGINX.format(folder))
    return Process(folder, _program("nginx"), "-e", folder / "error.log", "-p", folder, "-c", folder / "nginx.conf")


def _start_caddy(folder: Path, ours: str) -> Process:
    (folder / "Caddyfile").write_text("{\n\tadmin off\n}\n" + ours)
    return Process(
        folder, _program("caddy"), "run", "--adapter", "caddyfile", "--config", folder / "Caddyfile",
        HOME=folder, XDG_DATA_HOME=folder, XDG_CONFIG_HOME=folder,
    )  # fmt: skip


def _start_envoy(folder: Path, ours: str) -> Process:
    (folder / "envoy.yaml").write_text(ours)
    return Process(
        folder, _program("envoy"), "-c", folder / "envoy.yaml", "--disable-hot-restart", "--concurrency", "1",
        "--log-level", "warning", HOME=folder,
    )  # fmt: skip


@contextmanager
def _gateway(name: str, folder: Path, token: str, satmeter_port: int, upstream_port: int) -> Iterator[str]:
    """The gateway with its configuration of ours, but for the ports and the token. Yields its URL."""
    _program(name)
    [port] = free_ports(1)
    ours = (CONFIGURATIONS / _FILES[name]).read_text()
    before = "port_value: " if name == "envoy" else "127.0.0.1:"
    for placeholder, value in (
        (f"{before}8080", f"{before}{satmeter_port}"), (f"{before}8000", f"{before}{upstream_port}"),
        (f"{before}8088", f"{before}{port}"), ("svc-REPLACE-ME", token),
    ):  # fmt: skip
        assert placeholder in ours
        ours = ours.replace(placeholder, value)
    process = {"nginx": _start_nginx, "caddy": _start_caddy, "envoy": _start_envoy}[name](folder, ours)
    try:
        eventually(lambda: _listens(port, process))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.end()


def _listens(port: int, process: Process) -> bool:
    assert process.popen.poll() is None, process.log.read_text()
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=list(_FILES))
async def gateway(request: pytest.FixtureRequest) -> str:
    _program(request.param)
    return str(request.param)


@pytest.fixture
async def gate(gateway: str, rig: Rig, settings: Settings, tmp_path: Path) -> Any:
    upstream = Upstream()
    token = (await rig.service())["Authorization"].removeprefix("Bearer ")
    satmeter_port, upstream_port = free_ports(2)
    with ExitStack() as stack:
        lightning = FakeLightning()
        house = build(settings, rig.database_url, gateway=lightning, wallets=FakeWallets(lightning))
        house.mint.patience_seconds = 8  # a busy machine; the gateways wait ten seconds
        service = create_app(house)
        stack.enter_context(_served(service, satmeter_port))
        stack.enter_context(_served(upstream, upstream_port, ws="websockets-sansio"))
        url = stack.enter_context(_gateway(gateway, tmp_path, token, satmeter_port, upstream_port))
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
            yield Gate(client, rig, upstream, lightning)


async def test_an_allowed_call_reaches_the_upstream_with_our_headers_and_without_any_secret(gate: Gate) -> None:
    customer = await gate.rig.customer("10")
    hostile = {
        "X-Account-Id": "admin", "X-Key-Id": "admin", "X-Billing-Request-Id": "mine", "X-Balance-Usd": "1000000",
        "X-Service-Token": "svc-mine; id=mine", "X-Forwarded-Uri": "/mine", "X-Original-URI": "/mine", "X-Request-Id": "mine",
    }  # fmt: skip
    holds = set()
    for key in (
        {"Authorization": f"Bearer {customer.api_key}"},
        {"x-api-key": customer.api_key},
        {"api-key": customer.api_key},
    ):
        answer = await gate.call(key | hostile, "/v1/chat?q=1", content=b"x" * 300_000)
        assert (answer.status_code, answer.headers["x-upstream"]) == (200, "yes")
        seen = answer.json()
        assert (seen["method"], seen["path"], seen["size"]) == ("POST", "/v1/chat", 300_000)
        names = Counter(name for name, _ in seen["headers"])
        assert not {"authorization", "x-api-key", "api-key", "x-service-token"} & set(names)
        assert customer.api_key not in answer.text
        assert "svc-" not in answer.text
        headers = dict(seen["headers"])
        assert all(names[name.lower()] == 1 and headers[name.lower()] != hostile[name] for name in list(hostile)[:4])
        holds.add(headers["x-billing-request-id"])
    assert len(holds) == 3
    assert await gate.rig.held(customer) == D("0.03")
    assert gate.rig.sql("SELECT DISTINCT endpoint FROM hold") == [("/v1/chat",)]
    for hold_id in holds:
        await gate.rig.settle(hold_id, "0.002")
    assert await gate.rig.balance(customer) == D("9.994")


async def test_no_spelling_of_our_headers_that_an_upstream_takes_for_ours_gets_through(gate: Gate) -> None:
    """WSGI joins X_Billing_Request_Id to X-Billing-Request-Id, and a settle of `<hold>,evil` would find no hold."""
    customer = await gate.rig.customer("10")
    evil = {variant: "evil" for name in _OURS for variant in _spelled(name)}
    answer = await gate.call(customer.key | evil)
    seen = answer.json()["headers"]
    as_wsgi = Counter(name.lower().replace("-", "_") for name, _ in seen)
    assert all(as_wsgi[name.lower().replace("-", "_")] == 1 for name in _OURS)
    assert "evil" not in [value for _, value in seen]
    hold = dict(seen)["x-billing-request-id"]
    await gate.rig.settle(hold, "0.002")
    assert await gate.rig.balance(customer) == D("9.998")


def _spelled(name: str) -> list[str]:
    """Each way to write a header's name that has an underscore."""
    first, *parts = name.split("-")
    spelled = [first]
    for part in parts:
        spelled = [f"{begun}{mark}{part}" for begun in spelled for mark in "-_"]
    return [each for each in spelled if "_" in each]


async def test_a_websocket_passes_both_ways_with_one_hold_and_our_headers(gate: Gate) -> None:
    customer = await gate.rig.customer("10")
    url = f"{str(gate.client.base_url).replace('http', 'ws', 1).rstrip('/')}/v1/realtime?model=gpt-realtime"
    async with connect(url, additional_headers=customer.key | {"X-Account-Id": "evil"}, proxy=None) as socket:
        headers = dict(json.loads(await socket.recv()))
        assert "authorization" not in headers
        assert headers["x-account-id"] != "evil"
        for word in ("one", "two", "x" * 100_000):
            await socket.send(word)
            assert await socket.recv() == f"heard {word}"
    assert gate.rig.sql("SELECT endpoint, state FROM hold") == [("/v1/realtime", "open")]
    await gate.rig.settle(headers["x-billing-request-id"], "0.25")
    assert await gate.rig.balance(customer) == D("9.75")


async def test_a_websocket_that_may_not_be_opened_is_refused_like_any_call(gate: Gate) -> None:
    poor = await gate.rig.customer()
    url = f"{str(gate.client.base_url).replace('http', 'ws', 1).rstrip('/')}/v1/realtime"
    for headers, status in ((poor.key, 402), ({}, 401)):
        with pytest.raises(InvalidStatus) as refusal:
            async with connect(url, additional_headers=headers, proxy=None):
                pass
        assert refusal.value.response.status_code == status
    assert gate.upstream.calls == []


async def test_what_went_wrong_in_nginx_itself_is_not_told_as_billing_that_is_away(
    gateway: str, gate: Gate, tmp_path: Path
) -> None:
    if gateway != "nginx":
        pytest.skip("the others tell their own errors by their own status")
    customer = await gate.rig.customer("10")
    (tmp_path / "body").rmdir()  # where nginx would put a long body aside
    answer = await gate.call(customer.key, content=b"x" * 300_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "gateway_error")
    assert (await gate.call(customer.key)).status_code == 200


@pytest.mark.parametrize("name", ["Caddyfile", "nginx.conf", "envoy.yaml", "apisix.yaml", "traefik.yml"])
def test_every_gateway_file_drops_the_spellings_that_an_upstream_takes_for_ours(name: str) -> None:
    """nginx, Caddy and Envoy show it above; of those that are not run here, the file is read."""
    says = (CONFIGURATIONS / name).read_text()
    drops = {
        "Caddyfile": ["request_header -*_*"], "nginx.conf": ["underscores_in_headers off;"],
        "envoy.yaml": ["headers_with_underscores_action: DROP_HEADER"], "apisix.yaml": ['name:find("_", 1, true)'],
        "traefik.yml": [f'{each}: ""' for name in _OURS for each in _spelled(name)],
    }  # fmt: skip
    assert all(each in says for each in drops[name])


async def test_every_refusal_arrives_with_its_status_its_body_and_its_headers(gate: Gate) -> None:
    rich, poor = await gate.rig.customer("10"), await gate.rig.customer()
    status, code, headers = await gate.refused({})
    assert (status, code, headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert (await gate.refused({"Authorization": "Bearer sk-none"}))[:2] == (401, "invalid_api_key")
    assert (await gate.refused(poor.key))[:2] == (402, "insufficient_balance")
    narrow = await gate.rig.new_key(rich, scopes=["balance"])
    assert (await gate.refused(_bearer(narrow)))[:2] == (403, "missing_scope")
    limited = await gate.rig.new_key(rich, usage_limit_usd=0.01)
    assert (await gate.call(_bearer(limited))).status_code == 200
    status, code, headers = await gate.refused(_bearer(limited))
    assert (status, code, headers["Retry-After"]) == (429, "funds_held", "2")
    some = await gate.rig.new_key(rich, allowed_models=["m"])
    assert (await gate.refused(_bearer(some) | {"X-Model": "m"}))[:2] == (403, "model_not_allowed")
    for path in ("/", "/v1/meter/ext-authz", "/v1/chat?mode=nginx", "/v1/chat?mode=other"):
        assert (await gate.refused({}, path=path))[0] == 401
    for path in ("/_satmeter", "/%2e%2e/x", "//x"):
        assert (await gate.call({}, path)).status_code in (400, 401, 404)
    assert gate.upstream.calls == ["/v1/chat"]
    for method in ("GET", "OPTIONS", "PUT", "DELETE"):
        assert (await gate.refused({}, method=method))[0] == 401


async def test_a_refusal_that_can_be_paid_is_paid_through_the_gateway_and_the_proof_lets_the_call_pass(
    gate: Gate,
) -> None:
    poor = await gate.rig.customer()
    status, code, headers = await gate.refused(poor.key)
    assert (status, code, headers["Cache-Control"]) == (402, "insufficient_balance", "no-store")
    challenge = Challenge.of(headers["WWW-Authenticate"])
    assert gate.lightning is not None
    gate.lightning.pay(gate.lightning.of(challenge.invoice).id)
    for proof in (challenge.l402(), challenge.once(), challenge.l402() | {"x-api-key": poor.api_key}):
        answer = await gate.call(proof)
        for _ in range(5):  # a busy machine: what is not known yet is known in a moment
            if answer.status_code == 503:
                answer = await gate.call(proof)
        assert (answer.status_code, answer.headers["x-upstream"]) == (200, "yes")
        assert "authorization" not in dict(answer.json()["headers"])
    assert (await gate.refused(challenge.once()))[1] == "invalid_challenge"
    other = await gate.rig.customer()
    assert "WWW-Authenticate" not in (await gate.refused(other.key | {"X-Topup-Offer": "none"}))[2]


async def test_what_the_upstream_says_is_passed_on_untouched(gate: Gate) -> None:
    customer = await gate.rig.customer("10")
    for status in (401, 402, 403, 404, 429, 500, 503):
        answer = await gate.call(customer.key, f"/fails/{status}")
        assert (answer.status_code, answer.headers["x-upstream"]) == (status, "yes")
    for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
        answer = await gate.call(customer.key, method=method)
        assert (answer.status_code, answer.headers["x-upstream"]) == (200, "yes")


async def test_fifty_calls_at_once_on_a_balance_for_ten_let_ten_through(gate: Gate) -> None:
    customer = await gate.rig.customer("10")
    await gate.rig.meter("charge", request_id="spent", api_key=customer.api_key, cost_usd="9.9")
    answers = await asyncio.gather(*(gate.call(customer.key) for _ in range(50)))
    assert Counter(answer.status_code for answer in answers) == {200: 10, 429: 40}
    assert len(gate.upstream.calls) == 10


async def test_while_satmeter_is_away_nobody_passes_and_an_upstream_that_is_away_is_a_502(
    gateway: str, rig: Rig, settings: Settings, tmp_path: Path
) -> None:
    customer, upstream = await rig.customer("10"), Upstream()
    token = (await rig.service())["Authorization"].removeprefix("Bearer ")
    satmeter_port, upstream_port, nothing = free_ports(3)
    with _served(upstream, upstream_port), _gateway(gateway, tmp_path, token, nothing, upstream_port) as url:
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
            status, code, headers = await Gate(client, rig, upstream).refused(customer.key)
    assert (status, code, headers["Retry-After"]) == (503, "billing_unavailable", "1")
    service = create_app(build(settings, rig.database_url, gateway=FakeBtcpay()))
    with _served(service, satmeter_port), _gateway(gateway, tmp_path, token, satmeter_port, nothing) as url:
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
            assert (await client.post("/v1/chat", headers=customer.key)).status_code == 502


async def test_a_gateway_with_a_token_that_is_none_lets_nobody_pass(
    gateway: str, rig: Rig, settings: Settings, tmp_path: Path
) -> None:
    customer, upstream = await rig.customer("10"), Upstream()
    satmeter_port, upstream_port = free_ports(2)
    service = create_app(build(settings, rig.database_url, gateway=FakeBtcpay()))
    with (
        _served(service, satmeter_port),
        _served(upstream, upstream_port),
        _gateway(gateway, tmp_path, "svc-wrong", satmeter_port, upstream_port) as url,
    ):
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
            assert (await Gate(client, rig, upstream).refused(customer.key))[:2] == (401, "invalid_token")


def _bearer(key: Any) -> dict[str, str]:
    return Customer("", key["api_key"]).key


def test_a_program_named_by_its_whole_path_keeps_its_words_in_its_folder(tmp_path: Path) -> None:
    """As nginx and caddy are; an ordinary user may not write beside them, and nobody should."""
    process = Process(tmp_path, "/bin/sh", "-c", "echo $WORD", WORD="said")
    process.popen.wait(10)
    assert process.log.parent == tmp_path
    assert process.log.read_text() == "said\n"
