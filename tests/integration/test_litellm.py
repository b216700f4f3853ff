"""The plug-in in the real LiteLLM: the traps that were met there, each tried, and every call charged or released once."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import httpx
import pytest

from app.kernel.settings import Settings
from app.main import create_app
from app.wiring import build
from tests import databases
from tests.client.houses import calls, eventually, holds, open_holds, sells, serving
from tests.integration.real_litellm import LiteLLM, litellm
from tests.rig import Customer, Rig
from tests.sandbox.upstream import Upstream, running_upstream
from tests.wallets import FakeLightning, FakeWallets

pytestmark = pytest.mark.slow
USD_PER_MINI = (Decimal("0.15") / 10**6, Decimal("0.60") / 10**6, Decimal("0.075") / 10**6)
CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"


def body_of(path: str, text: str = "Hello there", **more: Any) -> dict[str, Any]:
    """A call as each API has it, with an order for the offline upstream in its prompt."""
    said = [{"role": "user", "content": text}]
    shapes: dict[str, dict[str, Any]] = {
        CHAT: {"model": "gpt-4o-mini", "messages": said, "max_tokens": 50},
        COMPLETIONS: {"model": "gpt-4o-mini", "prompt": text, "max_tokens": 50},
        MESSAGES: {"model": "claude-haiku-4-5", "messages": said, "max_tokens": 50},
        RESPONSES: {"model": "gpt-4o-mini", "input": text, "max_output_tokens": 50},
        "/v1/embeddings": {"model": "text-embedding-3-small", "input": text},
        "/v1/audio/speech": {"model": "tts-1", "input": text, "voice": "alloy"},
        "/v1/images/generations": {"model": "dall-e-3", "prompt": text, "size": "1024x1024"},
    }
    return shapes[path] | more


@dataclass
class World:
    rig: Rig
    upstream: Upstream
    proxy: LiteLLM
    customer: Customer
    client: httpx.AsyncClient
    seen_calls: int = 0
    seen_rows: int = 0
    held: set[str] = field(default_factory=set)

    async def post(
        self, path: str, text: str = "Hello there", headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        return await self.client.post(
            path, headers=self.customer.key | (headers or {}), json=body_of(path, text, **more)
        )

    async def new(self, count: int) -> list[dict[str, Any]]:
        """The charges since this was asked last, once all that was held is closed: so many, and no more."""
        await eventually(lambda: not open_holds(self.rig), 20)
        found = calls(self.rig)[self.seen_calls :]
        self.seen_calls += len(found)
        assert len(found) == count, found
        return found

    async def asked(self) -> list[dict[str, Any]]:
        """What reached the upstream since this was asked last."""
        found = await self.upstream.log(self.seen_rows)
        self.seen_rows = found[-1]["n"] if found else self.seen_rows
        return found

    async def leave(self, path: str, body: dict[str, Any], after_bytes: int) -> None:
        """Hang up after so many bytes of the answer's body; 0: before its head."""
        async with httpx.AsyncClient(base_url=self.proxy.url, trust_env=False, timeout=10) as client:
            if not after_bytes:
                with suppress(httpx.ReadTimeout):
                    await client.post(path, headers=self.customer.key, json=body, timeout=httpx.Timeout(10, read=0.3))
                return
            async with client.stream("POST", path, headers=self.customer.key, json=body) as answer:
                assert answer.status_code == 200
                got = 0
                async for chunk in answer.aiter_bytes():
                    got += len(chunk)
                    if got >= after_bytes:
                        return


@pytest.fixture(scope="module")
async def whole(
    database_url: str, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """Satmeter, LiteLLM and the offline upstream, each over its own wire, for all tests of this file."""
    databases.empty(database_url)
    btcpay = FakeLightning()
    house = build(settings, database_url, gateway=btcpay, wallets=FakeWallets(btcpay))
    await house.db.open()
    transport = httpx.ASGITransport(create_app(house), raise_app_exceptions=False)  # type: ignore[arg-type]
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as inner,
        running_upstream() as upstream,
    ):
        rig = Rig(inner, house, database_url)
        await sells(rig)
        customer = await rig.customer("1000")
        token = (await rig.service())["Authorization"].removeprefix("Bearer ")
        async with serving(create_app(house)) as url:
            with litellm(tmp_path_factory.mktemp("litellm"), upstream.url, url, token) as proxy:
                await proxy.start()
                async with httpx.AsyncClient(base_url=proxy.url, trust_env=False, timeout=30) as client:
                    yield World(rig, upstream, proxy, customer, client)
    await house.close()


@pytest.fixture
async def world(whole: World) -> AsyncIterator[World]:
    """After each test the books are audited, and nothing is held."""
    whole.seen_calls = len(calls(whole.rig))
    await whole.asked()
    whole.held = set(holds(whole.rig))
    yield whole
    await eventually(lambda: not open_holds(whole.rig), 20)
    await whole.rig.audit()


def mini_usd(row: dict[str, Any]) -> Decimal:
    """What the offline upstream's own log says that a call to gpt-4o-mini cost."""
    counts = row["counts"]
    cached = counts.get("cache_read_tokens") or 0
    sent, answered, read = USD_PER_MINI
    fresh, output = Decimal(counts["input_tokens"] - cached), Decimal(counts["output_tokens"])
    return fresh * sent + Decimal(cached) * read + output * answered


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_each_call_is_charged_by_the_upstream_s_own_count(world: World, path: str, stream: bool) -> None:
    answer = await world.post(path, stream=stream)
    assert answer.status_code == 200, answer.text
    [row], [asked] = await world.new(1), await world.asked()
    assert (row["units"]["input_tokens"], row["units"]["output_tokens"]) == (
        asked["counts"]["input_tokens"],
        asked["counts"]["output_tokens"],
    )
    assert (row["outcome"], row["flags"]) == ("completed", "")
    if path != MESSAGES:
        assert row["cost_nusd"] == mini_usd(asked) * 10**9


async def test_embeddings_speech_images_and_transcriptions_are_charged(world: World) -> None:
    assert (await world.post("/v1/embeddings")).status_code == 200
    assert (await world.post("/v1/audio/speech", "Hello")).content
    assert (await world.post("/v1/images/generations")).status_code == 200
    sound = (
        await world.client.post(
            "/v1/audio/speech", headers=world.customer.key, json=body_of("/v1/audio/speech", "Hello")
        )
    ).content
    heard = await world.client.post(
        "/v1/audio/transcriptions", headers=world.customer.key, files={"file": ("a.mp3", sound, "audio/mpeg")},
        data={"model": "whisper-1", "prompt": "[sandbox: seconds=90]"},
    )  # fmt: skip
    assert heard.status_code == 200, heard.text
    rows = {(row["endpoint"], row["cost_nusd"]) for row in await world.new(5)}
    costs: dict[str, int] = dict(rows)
    assert costs["/v1/audio/speech"] == 5 * 15_000
    assert costs["/v1/images/generations"] == 40_000_000
    assert costs["/v1/audio/transcriptions"] == 90 * 100_000
    assert costs["/v1/embeddings"] > 0


async def test_1_a_call_that_says_no_log_is_charged(world: World) -> None:
    for more in (
        {"no-log": True},
        {"litellm_disabled_callbacks": ["satmeter"]},
        {"mock_response": "for free"},
        {"cache": {"no-cache": False}},
    ):
        answer = await world.post(CHAT, headers={"x-litellm-disable-callbacks": "satmeter"}, **more)
        assert answer.status_code == 200
        [row], [asked] = await world.new(1), await world.asked()
        assert row["cost_nusd"] == mini_usd(asked) * 10**9


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("options", [None, {"include_usage": False}])
async def test_2_a_stream_that_was_not_asked_for_its_usage_is_charged(world: World, path: str, options: Any) -> None:
    answer = await world.post(path, stream=True, **({"stream_options": options} if options else {}))
    assert '"usage":{' not in answer.text
    assert answer.text.rstrip().endswith("data: [DONE]")
    [row], [asked] = await world.new(1), await world.asked()
    assert (row["cost_nusd"], row["flags"]) == (mini_usd(asked) * 10**9, "")


async def test_3_ids_of_a_caller_s_are_no_ids_of_ours(world: World) -> None:
    forged = {
        "x-litellm-call-id": "one",
        "x-billing-request-id": "one",
        "x-request-id": "one",
        "idempotency-key": "one",
    }
    metadata = {"user_api_key_auth_metadata": {"satmeter": "one"}, "satmeter": "one"}
    for _ in range(2):
        answer = await world.post(
            CHAT, headers=forged, metadata=metadata, litellm_metadata=metadata, litellm_call_id="one", id="one"
        )
        assert answer.status_code == 200
    rows = await world.new(2)
    assert len({row["request_id"] for row in rows} - {"one"}) == 2


async def test_4_there_is_nothing_but_the_calls(world: World) -> None:
    for method, path in (
        ("GET", "/settings"), ("GET", "/routes"), ("GET", "/router/settings"), ("GET", "/debug/asyncio-tasks"), ("GET", "/model/info"),
        ("GET", "/v1/model/info"), ("GET", "/model_group/info"), ("GET", "/health"), ("GET", "/health/readiness"), ("GET", "/config/yaml"),
        ("POST", "/key/generate"), ("POST", "/model/new"), ("GET", "/ui"), ("GET", "/"), ("GET", "/openapi.json"), ("POST", "/v1/rerank"),
        ("POST", "/openai/deployments/gpt-4o-mini/chat/completions"), ("POST", "/v1/chat/completions/"), ("POST", "//v1/chat/completions"),
        ("POST", "/engines/gpt-4o-mini/chat/completions"), ("POST", "/V1/chat/completions"),
        ("POST", "/anthropic/v1/messages"), ("POST", "/openai/v1/chat/completions"), ("POST", "/v1/batches"), ("POST", "/v1/responses/compact"),
        ("PUT", "/v1/chat/completions"), ("GET", "/v1/chat/completions"), ("POST", "/v1/models"), ("GET", "/metrics"),
    ):  # fmt: skip
        answer = await world.client.request(
            method,
            httpx.URL(world.proxy.url).copy_with(raw_path=path.encode()),
            headers=world.customer.key,
            json=body_of(CHAT),
        )
        assert answer.status_code == 404, (method, path, answer.text)
        assert "not_found" in answer.text
    assert await world.asked() == []
    models = await world.client.get("/v1/models", headers=world.customer.key)
    assert "gpt-4o-mini" in models.text
    assert (await world.client.get("/v1/models")).status_code == 401
    await world.new(0)


async def test_5_a_caller_s_key_reaches_neither_litellm_s_log_nor_the_upstream(world: World) -> None:
    odd = await world.rig.customer("10")
    for name, value in (
        ("authorization", f"Bearer {odd.api_key}"),
        ("authorization", f"Token {odd.api_key}"),
        ("x-api-key", odd.api_key),
        ("api-key", odd.api_key),
    ):
        answer = await world.client.post(
            CHAT, headers={name: value, "x-litellm-api-key": "sk-other"}, json=body_of(CHAT)
        )
        assert answer.status_code == 200, "6: each way to send a key is heard"
    await world.new(4)
    assert len(await world.asked()) == 4
    for secret in (odd.api_key, odd.api_key[3:], "svc-"):
        assert secret not in world.proxy.logged
    assert "gpt-4o-mini" in world.proxy.logged, "it is told everything: LITELLM_LOG=DEBUG"


async def test_7_a_refusal_has_its_status_code_and_headers_on_every_route(world: World) -> None:
    poor = await world.rig.customer()
    for path in (CHAT, COMPLETIONS, RESPONSES, "/v1/embeddings", "/v1/audio/speech", "/v1/images/generations"):
        answer = await world.client.post(path, headers=poor.key, json=body_of(path))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (
            402,
            "insufficient_balance",
            "insufficient_quota",
        ), path
        assert error["metadata"]["topup"]
        assert (await world.client.post(path, json=body_of(path))).status_code == 401
    heard = await world.client.post(
        "/v1/audio/transcriptions",
        headers=poor.key,
        files={"file": ("a.mp3", b"x" * 9000)},
        data={"model": "whisper-1"},
    )
    assert (heard.status_code, heard.json()["error"]["code"]) == (402, "insufficient_balance")
    said = await world.client.post(MESSAGES, headers={"x-api-key": poor.api_key}, json=body_of(MESSAGES))
    assert (said.status_code, said.json()["type"], said.json()["error"]["type"]) == (402, "error", "billing_error")
    narrow = await world.rig.new_key(world.customer, allowed_models=["gpt-4o"])
    refused = await world.client.post(CHAT, headers={"x-api-key": narrow["api_key"]}, json=body_of(CHAT))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    assert await world.asked() == []
    await world.new(0)


async def test_8_a_fallback_is_charged_as_it_was_served_and_an_alias_as_what_it_means(world: World) -> None:
    await world.upstream.order("status=500", model="gpt-4o", times=4)
    answer = await world.post(CHAT, model="gpt-4o")
    assert answer.status_code == 200, answer.text
    [row], asked = await world.new(1), await world.asked()
    assert [each["model"] for each in asked][-1] == "gpt-4o-mini"
    assert (row["served_model"], row["cost_nusd"]) == ("gpt-4o-mini", mini_usd(asked[-1]) * 10**9)
    await world.client.post(CHAT, headers=world.customer.key, json=body_of(CHAT, model="cheap"))
    [row], [served] = await world.new(1), await world.asked()
    assert row["cost_nusd"] == mini_usd(served) * 10**9
    await world.upstream.client.delete("/sandbox/orders")


async def test_8_fallbacks_of_a_caller_s_are_not_heard(world: World) -> None:
    elsewhere = [{"model": "gpt-4o", "api_base": "http://127.0.0.1:9"}, "gpt-4o"]
    answer = await world.post(CHAT, "[sandbox: status=400]", fallbacks=elsewhere, num_retries=50, model_list=[])
    assert answer.status_code == 400
    assert {each["model"] for each in await world.asked()} == {"gpt-4o-mini"}
    await world.new(0)


async def test_9_cached_tokens_and_models_that_litellm_has_no_price_for_cost_what_they_cost_here(world: World) -> None:
    await world.post(CHAT, "[sandbox: cached=7] " + "word " * 40)
    [row], [asked] = await world.new(1), await world.asked()
    assert row["units"]["cache_read_tokens"] == 7
    assert row["cost_nusd"] == mini_usd(asked) * 10**9
    assert row["provider_cost_nusd"] > 0
    await world.post(CHAT, model="gemma-3-4b-it")
    [row], [asked] = await world.new(1), await world.asked()
    counts = asked["counts"]
    assert row["cost_nusd"] == counts["input_tokens"] * 40 + counts["output_tokens"] * 80
    priced: dict[str, Any] = {
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "model_info": {"input_cost_per_token": 0},
        "base_model": "x",
    }
    await world.post(CHAT, **priced)
    [row], [asked] = await world.new(1), await world.asked()
    assert row["cost_nusd"] == mini_usd(asked) * 10**9


async def test_10_nothing_of_the_inside_reaches_a_caller(world: World) -> None:
    host = world.upstream.url.removeprefix("http://")
    asks: dict[str, Any] = {"stream_options": {"include_usage": True}}
    answers = [await world.post(CHAT), await world.post(CHAT, stream=True, **asks), await world.post(RESPONSES, stream=True),
               await world.post(MESSAGES, stream=True), await world.post(CHAT, "[sandbox: status=500]"),
               await world.post(CHAT, "[sandbox: status=400]"), await world.post(MESSAGES, "[sandbox: status=401]")]  # fmt: skip
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith(("x-litellm", "llm_provider", "server"))], (
            answer.headers
        )
        told = answer.text + str(answer.headers)
        assert host not in told
        assert "sk-the-operators-own" not in told
        assert "litellm" not in told.lower()
        assert '"cost"' not in told, "what it cost the operator"
    assert all("x-billing-request-id" in answer.headers for answer in answers)
    assert '"usage"' in answers[1].text
    await world.new(4)


async def test_11_what_goes_wrong_upstream_is_said_as_what_it_is(world: World) -> None:
    for order, status, code in (
        ("status=401", 502, "upstream_error"), ("status=500", 502, "upstream_error"), ("status=503", 502, "upstream_error"),
        ("status=429, retry_after=1", 429, "rate_limit_exceeded"), ("status=400", 400, "upstream_refused"), ("cut=0", 502, "upstream_error"),
    ):  # fmt: skip
        answer = await world.post(CHAT, f"[sandbox: {order}]")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), (order, answer.text)
        if status == 429:
            assert int(answer.headers["retry-after"]) >= 1
        await world.new(0)
    unknown = await world.post(CHAT, model="no-such-model")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (422, "model_not_priced")
    for banned in (
        {"api_base": "http://127.0.0.1:9"},
        {"api_key": "sk-mine"},
        {"extra_headers": {"x": "y"}},
        {"custom_llm_provider": "x"},
        {"user_config": {"a": 1}},
    ):
        assert (await world.post(CHAT, **banned)).status_code == 200, banned
    await world.new(5)


async def test_11_an_upstream_that_took_a_call_and_never_answered_may_have_run(world: World) -> None:
    answer = await world.post(CHAT, "[sandbox: hang]")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_error")
    [row] = await world.new(1)
    assert (row["outcome"], row["flags"], row["units"]["output_tokens"]) == ("partial", "usage_estimated", 0)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
async def test_n2_n3_a_client_that_leaves_a_stream_pays_for_it(world: World, path: str) -> None:
    await world.leave(path, body_of(path, "[sandbox: pace=0.03, tokens=20]", stream=True), 200)
    [row], [asked] = await world.new(1), await world.asked()
    assert row["units"]["output_tokens"] == asked["counts"]["output_tokens"] == 20, (
        "it is read on, so that the count is the upstream's"
    )
    assert row["outcome"] in ("client_disconnected", "completed")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
async def test_a_client_that_leaves_before_the_answer_pays_for_it(world: World, path: str) -> None:
    await world.leave(path, body_of(path, "[sandbox: delay=1]"), 0)
    [row], [asked] = await world.new(1), await world.asked()
    assert row["units"]["output_tokens"] == asked["counts"]["output_tokens"] > 0


@pytest.mark.parametrize("order", ["cut=6, tokens=20, pace=0.03", "cut=6, tokens=20"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
async def test_an_upstream_that_dies_mid_stream_is_paid_for_what_came(world: World, path: str, order: str) -> None:
    answer = await world.post(path, f"[sandbox: {order}]", stream=True)
    assert "litellm" not in answer.text.lower()
    [row], asked = await world.new(1), await world.asked()
    assert (row["outcome"], row["flags"]) == ("partial", "usage_estimated")
    assert row["units"]["input_tokens"] > 0
    if answer.status_code == 200 and path != RESPONSES:
        assert row["units"]["output_tokens"] >= asked[-1]["sent_output_tokens"] > 0


async def test_n4_a_caller_cannot_make_us_stop_waiting(world: World) -> None:
    impatient = {"timeout": 0.05, "stream_timeout": 0.05, "request_timeout": 0.05, "max_retries": 9}
    answer = await world.post(
        CHAT,
        "[sandbox: pace=0.05, tokens=10]",
        headers={"x-litellm-timeout": "0.05", "x-litellm-stream-timeout": "0.05"},
        stream=True,
        **impatient,
    )
    assert answer.text.rstrip().endswith("[DONE]")
    [row], [asked] = await world.new(1), await world.asked()
    assert row["cost_nusd"] == mini_usd(asked) * 10**9


async def test_a_call_that_was_tried_again_is_charged_once(world: World) -> None:
    await world.upstream.order("status=500", model="gpt-4o-mini", times=1)
    assert (await world.post(CHAT)).status_code == 200
    [row], asked = await world.new(1), await world.asked()
    assert [each["status"] for each in asked] == [500, 200]
    assert row["cost_nusd"] == mini_usd(asked[-1]) * 10**9


async def test_what_cannot_be_paid_whole_is_answered_shorter(world: World) -> None:
    short = await world.rig.customer("10")
    answer = await world.client.post(
        CHAT, headers=short.key, json=body_of(CHAT, model="gpt-4o", n=128, max_tokens=16000)
    )
    assert answer.status_code == 200
    [_], [asked] = await world.new(1), await world.asked()
    assert 7000 < (asked["asked"] or {}).get("max_tokens", 0) < 8000


async def test_many_calls_of_all_kinds_with_faults_come_to_what_the_upstream_says(world: World) -> None:
    before = await world.rig.balance(world.customer)
    orders = [
        "",
        "[sandbox: status=400]",
        "[sandbox: cut=0]",
        "[sandbox: cached=5] " + "word " * 30,
        "[sandbox: usage=deepseek, cached=3]  long enough",
    ]
    answers = await asyncio.gather(*(
        world.post(path, orders[number % len(orders)], stream=number % 2 == 0) for number in range(20) for path in (CHAT, COMPLETIONS)
    ))  # fmt: skip
    served = [answer for answer in answers if answer.status_code == 200]
    rows = await world.new(len(served))
    asked = [each for each in await world.asked() if each["outcome"] == "completed"]
    assert len(asked) == len(served)
    assert sum(row["cost_nusd"] for row in rows) == sum(mini_usd(each) for each in asked) * 10**9
    assert before - await world.rig.balance(world.customer) == sum(mini_usd(each) for each in asked)


async def test_12_kill_9_mid_stream_is_charged_once_by_the_next_and_sigterm_settles_what_runs(world: World) -> None:
    text = "[sandbox: pace=0.1, tokens=45]"
    reading = asyncio.create_task(_read(world, body_of(CHAT, text, stream=True, max_tokens=100)))
    await asyncio.sleep(2.5)
    await world.proxy.stop(signal.SIGKILL)
    got = await reading
    assert open_holds(world.rig) == 1
    await world.proxy.start()
    [row] = await world.new(1)
    assert 0 < row["units"]["output_tokens"] <= got + 1
    assert row["units"]["output_tokens"] >= got - 15, "a second's worth at most is lost"
    assert "usage_estimated" in row["flags"]
    await world.asked()
    reading = asyncio.create_task(_read(world, body_of(CHAT, "[sandbox: pace=0.05, tokens=20]", stream=True)))
    await asyncio.sleep(0.6)
    await world.proxy.stop(signal.SIGTERM)
    await reading
    assert open_holds(world.rig) == 0
    [row], [asked] = await world.new(1), await world.asked()
    assert row["cost_nusd"] == mini_usd(asked) * 10**9


async def _read(world: World, body: dict[str, Any]) -> int:
    """How many pieces of a stream came."""
    pieces = 0
    with suppress(httpx.HTTPError):
        async with world.client.stream("POST", CHAT, headers=world.customer.key, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                    pieces += 1
    return pieces
