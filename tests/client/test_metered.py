"""Any Python proxy behind `metered`: no path to it is free, and each call is charged or released once."""

import asyncio
import contextlib
import json
import re
import sys
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.client import metered
from tests.client.houses import (
    MODEL,
    USD_PER_INPUT,
    USD_PER_OUTPUT,
    Wire,
    a_meter,
    calls,
    eventually,
    holds,
    open_holds,
    sells,
    serving,
)
from tests.program import ROOT
from tests.rig import Customer, Rig

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 100}
USAGE = {"prompt_tokens": 9, "completion_tokens": 20, "total_tokens": 29}
COST_USD = 9 * USD_PER_INPUT + 20 * USD_PER_OUTPUT


@dataclass
class Proxy:
    """A proxy like those that people write: it answers a chat completion, whole or as a stream, and does as it is told."""

    status: int = 200
    usage: dict[str, Any] | None = field(default_factory=lambda: USAGE)
    raises: bool = False
    waits: asyncio.Event | None = None
    """Before its answer, or after the second piece of a stream."""
    ends: bool = True
    beside: bool = False
    """Whether usage comes in the last piece of text."""
    seen: list[dict[bytes, bytes]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "it has no lifespan"
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        body = json.loads(raw or b"{}")
        self.seen.append(dict(scope["headers"]))
        self.bodies.append(body)
        if self.raises:
            raise ValueError("a defect of the proxy's")
        stream = bool(body.get("stream")) and self.status == 200
        kind = b"text/event-stream" if stream else b"application/json"
        if not stream and self.waits:
            await self.waits.wait()
        await send(
            {
                "type": "http.response.start",
                "status": self.status,
                "headers": [(b"content-type", kind), (b"X-Account-Id", b"x")],
            }
        )
        if not stream:
            answer: Any = {
                "id": "c-1",
                "model": MODEL,
                "choices": [{"message": {"content": "Hi"}}],
                "usage": self.usage,
            }
            await send(
                {
                    "type": "http.response.body",
                    "body": json.dumps(answer if self.status == 200 else {"error": {}}).encode(),
                }
            )
            return
        await self._stream(receive, send)

    async def _stream(self, receive: Any, send: Any) -> None:
        gone = asyncio.create_task(receive())
        pieces: list[Any] = [{"choices": [{"delta": {"content": "word " * 4}}]} for _ in range(4)]
        if self.beside:
            pieces[-1]["usage"] = self.usage
        elif self.usage:
            pieces.append({"choices": [], "usage": self.usage})
        for number, piece in enumerate(pieces):
            if self.waits and number == 2:
                waiting = asyncio.create_task(self.waits.wait())
                await asyncio.wait({gone, waiting}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
            if gone.done():
                self.left += 1
                return
            event = b"data: " + json.dumps(piece).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        gone.cancel()
        if self.ends:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


@dataclass
class World:
    rig: Rig
    proxy: Proxy
    wire: Wire
    customer: Customer
    meter: Any
    client: httpx.AsyncClient

    async def post(self, **more: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", headers=self.customer.key, json=BODY | more)

    async def charged(self) -> list[dict[str, Any]]:
        """All that was charged, once everything is told."""
        await eventually(lambda: not self.meter.owed and not open_holds(self.rig))
        return calls(self.rig)

    async def leave(self, body: dict[str, Any], after: int) -> None:
        """Send a call and hang up after so many bytes of the answer."""
        host, port = self.client.base_url.host, self.client.base_url.port
        reader, writer = await asyncio.open_connection(host, port)
        raw = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-api-key: {self.customer.api_key}\r\ncontent-length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        if after:
            await reader.readexactly(after)
        else:
            await eventually(lambda: self.proxy.bodies)
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def world(rig: Rig, tmp_path: Path, proxy: Proxy | None = None, **options: Any) -> AsyncIterator[World]:
    await sells(rig)
    customer, wire, proxy = await rig.customer("10"), Wire(rig), proxy or Proxy()
    meter = await a_meter(rig, tmp_path, wire, drain_seconds=1)
    async with (
        serving(metered(proxy, meter, **options)) as url,
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as client,
    ):
        yield World(rig, proxy, wire, customer, meter, client)
    assert open_holds(rig) == 0 or wire.is_cut


async def test_a_call_is_charged_by_what_its_answer_says(rig: Rig, tmp_path: Path) -> None:
    async with world(rig, tmp_path) as w:
        answer = await w.post()
        assert (answer.status_code, answer.json()["usage"]) == (200, USAGE)
        [row] = await w.charged()
        assert row["cost_nusd"] == COST_USD * 10**9
        assert (row["served_model"], row["upstream_id"], row["endpoint"], row["outcome"]) == (
            MODEL,
            "c-1",
            "/v1/chat/completions",
            "completed",
        )
        assert answer.headers["x-billing-request-id"] == row["request_id"]
        assert "x-account-id" not in answer.headers


async def test_headers_that_say_who_pays_are_ours_alone(rig: Rig, tmp_path: Path) -> None:
    forged = {
        "X-Billing-Request-Id": "mine",
        "X-Account-Id": "another",
        "x_key_id": "k",
        "X-Satmeter-Cost": "0",
        "Accept-Encoding": "gzip",
    }
    async with world(rig, tmp_path) as w:
        await w.client.post("/v1/chat/completions", headers=w.customer.key | forged, json=BODY)
        [row], [seen] = await w.charged(), w.proxy.seen
        assert seen[b"x-billing-request-id"].decode() == row["request_id"] != "mine"
        assert not {b"x-account-id", b"x_key_id", b"x-satmeter-cost"} & set(seen)
        assert seen[b"accept-encoding"] == b"identity"


@pytest.mark.parametrize("asks", [True, False])
async def test_a_stream_tells_its_usage_to_us_and_to_a_caller_who_asked(rig: Rig, tmp_path: Path, asks: bool) -> None:
    more = {"stream_options": {"include_usage": asks}}
    async with world(rig, tmp_path) as w:
        answer = await w.post(stream=True, **more)
        assert w.proxy.bodies[0]["stream_options"]["include_usage"] is True
        assert ('"usage"' in answer.text) == asks
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.text.count("word word word word") == 4
        [row] = await w.charged()
        assert (row["cost_nusd"], row["flags"]) == (COST_USD * 10**9, "")


async def test_usage_beside_the_last_piece_is_hidden_and_so_is_what_nobody_is_shown(rig: Rig, tmp_path: Path) -> None:
    said = USAGE | {"cost": 0.5}
    for asks in (True, False):
        async with world(rig, tmp_path, Proxy(usage=said, beside=True), hidden=("cost",)) as w:
            answer = await w.post(stream=True, stream_options={"include_usage": asks})
            assert "cost" not in answer.text
            assert ("completion_tokens" in answer.text) == asks
            assert answer.text.count("word word word word") == 4
            assert (await w.charged())[-1]["cost_nusd"] == COST_USD * 10**9


async def test_a_stream_without_usage_is_counted_and_flagged(rig: Rig, tmp_path: Path) -> None:
    async with world(rig, tmp_path, Proxy(usage=None)) as w:
        await w.post(stream=True)
        [row] = await w.charged()
        assert (row["units"]["output_tokens"], row["outcome"]) == (20, "completed"), "80 bytes"
        assert row["units"]["input_tokens"] > 0
        assert "usage_estimated" in row["flags"]


async def test_who_may_not_call_reaches_nothing(rig: Rig, tmp_path: Path) -> None:
    async with world(rig, tmp_path, free=("/health",)) as w:
        poor = await rig.customer()
        for headers, status in (
            ({}, 401),
            ({"x-api-key": "sk-no"}, 401),
            (poor.key, 402),
            ({"authorization": "Basic x"}, 401),
        ):
            assert (await w.client.post("/v1/chat/completions", headers=headers, json=BODY)).status_code == status
            assert (await w.client.post("/health/", headers=headers, json=BODY)).status_code == status
            assert (await w.client.get("/v1/models", headers=headers)).status_code == status
            assert (await w.client.post("/v1/x", headers=headers, content=b"{")).status_code == status
        assert w.proxy.bodies == []
        assert (await w.client.post("/v1/x", headers=w.customer.key, content=b"[1]")).status_code == 400
        assert w.proxy.bodies == []
        assert (await w.client.get("/v1/models", headers=w.customer.key)).status_code == 200
        assert (await w.client.get("/health")).status_code == 200
        assert len(w.proxy.bodies) == 2
        assert await w.charged() == []


@pytest.mark.parametrize("named", ["Authorization: Bearer", "Authorization: Token", "x-api-key:", "api-key:"])
async def test_a_key_is_taken_in_each_way_that_it_is_sent(rig: Rig, tmp_path: Path, named: str) -> None:
    name, _, scheme = named.partition(":")
    async with world(rig, tmp_path) as w:
        headers = {name: f"{scheme.strip()} {w.customer.api_key}".strip()}
        assert (await w.client.post("/v1/chat/completions", headers=headers, json=BODY)).status_code == 200
        assert len(await w.charged()) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 502, 503])
async def test_a_call_that_the_upstream_refused_is_given_back(rig: Rig, tmp_path: Path, status: int) -> None:
    async with world(rig, tmp_path, Proxy(status=status)) as w:
        assert (await w.post()).status_code == status
        assert await w.charged() == []
        assert list(holds(rig).values()) == ["released"]


@pytest.mark.parametrize("proxy", [Proxy(status=500), Proxy(status=504), Proxy(status=408), Proxy(raises=True)])
async def test_a_call_that_may_have_run_is_charged_what_was_sent(rig: Rig, tmp_path: Path, proxy: Proxy) -> None:
    async with world(rig, tmp_path, proxy) as w:
        assert (await w.post()).status_code in (408, 500, 504)
        [row] = await w.charged()
        assert (row["outcome"], row["flags"], row["units"]["output_tokens"]) == ("partial", "usage_estimated", 0)
        assert row["cost_nusd"] > 0


async def test_a_stream_that_breaks_off_is_charged_for_what_came(rig: Rig, tmp_path: Path) -> None:
    async with world(rig, tmp_path, Proxy(usage=None, ends=False)) as w:
        with contextlib.suppress(httpx.HTTPError):
            await w.post(stream=True)
        [row] = await w.charged()
        assert (row["outcome"], row["units"]["output_tokens"]) == ("partial", 20)


@pytest.mark.parametrize(("stream", "after"), [(True, 0), (True, 300), (False, 0)])
async def test_a_client_that_leaves_pays_for_what_the_upstream_went_on_to_make(
    rig: Rig, tmp_path: Path, stream: bool, after: int
) -> None:
    proxy = Proxy(waits=asyncio.Event())
    async with world(rig, tmp_path, proxy) as w:
        await w.leave(BODY | {"stream": stream}, after)
        await asyncio.sleep(0.05)
        assert proxy.waits is not None
        proxy.waits.set()
        [row] = await w.charged()
        assert row["cost_nusd"] == COST_USD * 10**9
        assert row["flags"] == "", "the upstream's own count came"
        assert proxy.left == 0


async def test_a_client_that_leaves_is_told_of_when_it_is_not_read_on_and_pays_for_what_came(
    rig: Rig, tmp_path: Path
) -> None:
    proxy = Proxy(waits=asyncio.Event())
    async with world(rig, tmp_path, proxy, reads_on_seconds=0) as w:
        await w.leave(BODY | {"stream": True}, 300)
        [row] = await w.charged()
        assert (row["outcome"], row["flags"], row["units"]["output_tokens"]) == (
            "client_disconnected",
            "usage_estimated",
            10,
        )
        assert proxy.left == 1


async def test_a_call_that_cannot_be_paid_whole_asks_for_less(rig: Rig, tmp_path: Path) -> None:
    async with world(rig, tmp_path) as w:
        await w.post(model="gpt-4o", max_tokens=16000, n=128)
        assert w.proxy.bodies[0]["max_tokens"] == pytest.approx(10 / 0.00001 / 128, rel=0.01)
        assert len(await w.charged()) == 1


async def test_while_satmeter_is_away_nothing_is_called(rig: Rig, tmp_path: Path) -> None:
    async with world(rig, tmp_path) as w:
        w.wire.is_cut = True
        answer = await w.post()
        assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (
            503,
            "2",
            "billing_unavailable",
        )
        assert (await w.client.get("/v1/models", headers=w.customer.key)).status_code == 503
        assert w.proxy.bodies == []
        w.wire.is_cut = False


async def test_an_answer_ends_whether_or_not_satmeter_is_there_to_be_told(rig: Rig, tmp_path: Path) -> None:
    proxy = Proxy(waits=asyncio.Event())
    async with world(rig, tmp_path, proxy) as w:
        asking = asyncio.create_task(w.post())
        await eventually(lambda: proxy.bodies)
        w.wire.is_cut = True
        assert proxy.waits is not None
        proxy.waits.set()
        assert (await asking).status_code == 200
        assert calls(rig) == []
        w.wire.is_cut = False
        assert [row["cost_nusd"] for row in await w.charged()] == [COST_USD * 10**9]


async def test_a_body_that_is_too_large_is_refused(rig: Rig, tmp_path: Path) -> None:
    async with world(rig, tmp_path, max_body_bytes=1000) as w:
        assert (await w.post(messages="x" * 2000)).status_code == 413
        assert w.proxy.bodies == []


async def test_what_cannot_be_metered_is_not_to_be_had(rig: Rig, tmp_path: Path) -> None:
    await sells(rig)
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    proxy = Proxy()
    await metered(proxy, await a_meter(rig, tmp_path))({"type": "websocket", "path": "/v1/realtime"}, receive, send)
    assert said[0]["type"] == "websocket.close"
    assert proxy.bodies == []


async def test_calls_of_many_callers_at_once_are_each_charged_once(rig: Rig, tmp_path: Path) -> None:
    async with world(rig, tmp_path) as w:
        answers = await asyncio.gather(*(w.post(stream=number % 2 == 0) for number in range(60)))
        assert {answer.status_code for answer in answers} == {200}
        charged = await w.charged()
        assert len(charged) == 60
        assert sum(row["cost_nusd"] for row in charged) == 60 * COST_USD * 10**9
    assert await rig.balance(w.customer) == 10 - 60 * COST_USD


async def test_the_meter_lives_as_long_as_the_application(rig: Rig, tmp_path: Path) -> None:
    story: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "lifespan.startup"
        story.append("began with a spool" if list(tmp_path.glob("*.spool")) else "began without")
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        story.append("ended with a spool" if list(tmp_path.glob("*.spool")) else "ended without")
        await send({"type": "lifespan.shutdown.complete"})

    async with serving(metered(app, await a_meter(rig, tmp_path))):
        pass
    assert story == ["began with a spool", "ended with a spool"]
    assert list(tmp_path.glob("*.spool")) == []


async def test_the_readme_s_ten_lines_bill_a_proxy(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await sells(rig)
    customer, proxy = await rig.customer("10"), Proxy()
    [lines] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(lines.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my_proxy", types.SimpleNamespace(app=proxy))
    async with serving(rig.client._transport.app) as satmeter:  # type: ignore[attr-defined]
        monkeypatch.setenv("SATMETER_URL", satmeter)
        monkeypatch.setenv("SATMETER_TOKEN", (await rig.service())["Authorization"].removeprefix("Bearer "))
        made: dict[str, Any] = {}
        exec(lines, made)
        async with serving(made["app"]) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
            assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 401
            assert (await client.post("/v1/chat/completions", headers=customer.key, json=BODY)).status_code == 200
        assert [row["cost_nusd"] for row in calls(rig)] == [COST_USD * 10**9]
    assert len(proxy.bodies) == 1
