"""The offline upstream, as the official clients of OpenAI and Anthropic see it, and all its ways to go wrong."""

import base64
import io
import json
import struct
import wave
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from app.pricing.starter import starter
from app.sandbox.models import MODELS
from tests.sandbox.upstream import Upstream, running_upstream

ASK: list[Any] = [{"role": "user", "content": "Say something about the sea."}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with running_upstream() as found:
        yield found


@pytest.fixture
async def client(upstream: Upstream) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key="sk-upstream", base_url=f"{upstream.url}/v1", max_retries=0) as found:
        yield found


@pytest.fixture
async def claude(upstream: Upstream) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(api_key="sk-ant", base_url=upstream.url, max_retries=0) as found:
        yield found


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_every_model_of_the_starter_catalogue_is_listed() -> None:
    listed = {name for names in MODELS.values() for name in names}
    assert {row.model for row in starter().models} <= listed


async def test_the_same_call_says_and_costs_the_same_and_is_honest_about_it(client: openai.AsyncOpenAI) -> None:
    first, second = [await client.chat.completions.create(model="gpt-4o-mini", messages=ASK) for _ in range(2)]
    assert first.choices[0].message.content == second.choices[0].message.content
    assert "no model" in str(first.choices[0].message.content)
    assert first.usage == second.usage
    assert first.id != second.id
    assert first.usage is not None
    assert first.usage.prompt_tokens == 3 + 4 + 7  # 28 bytes of words
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens


async def test_a_stream_says_what_the_whole_answer_does_and_its_usage_only_if_asked(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="gpt-4o", messages=ASK, n=2)
    texts, usages = ["", ""], []
    stream = await client.chat.completions.create(
        model="gpt-4o", messages=ASK, n=2, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usages.append(chunk.usage)
    assert texts == [choice.message.content for choice in whole.choices]
    assert usages[-1] == whole.usage
    assert set(usages[:-1]) == {None}
    bare = await client.chat.completions.create(model="gpt-4o", messages=ASK, stream=True)
    assert [chunk.usage async for chunk in bare if chunk.usage] == []


async def test_functions_are_called_with_what_their_schema_asks_for(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="gpt-4o", messages=ASK, tools=WEATHER)
    call: Any = (answer.choices[0].message.tool_calls or [])[0]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"city": "sandbox", "days": 1}
    arguments = ""
    async for chunk in await client.chat.completions.create(model="gpt-4o", messages=ASK, tools=WEATHER, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            arguments += (delta.function and delta.function.arguments) or ""
    assert arguments == call.function.arguments
    told = [*ASK, answer.choices[0].message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert (
        (await client.chat.completions.create(model="gpt-4o", messages=told, tools=WEATHER)).choices[0].message.content
    )


async def test_an_answer_ends_at_its_limit_and_at_a_stop_sequence(client: openai.AsyncOpenAI) -> None:
    short = await client.chat.completions.create(model="gpt-4o", messages=ASK, max_completion_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 3
    stopped = await client.chat.completions.create(model="gpt-4o", messages=ASK, stop=["model"])
    assert stopped.choices[0].message.content == "[sandbox, no "


SHAPES = [
    ("gpt-5", "reasoning=8,cached=5,tokens=10", 8, {"completion_tokens": 18, "cached": 5}),
    ("deepseek-chat", "cached=5,tokens=10,reasoning=4", 4, {"completion_tokens": 14, "cached": 5, "prompt_cache_hit_tokens": 5}),
    ("gemini-2.5-pro", "reasoning=8,tokens=10", 8, {"completion_tokens": 10}),
    ("grok-4", "reasoning=8,tokens=10,cached=2", 8, {"completion_tokens": 10, "cached": 2}),
    ("llama-3.1-8b", "tokens=10", 0, {"completion_tokens": 10, "queue_time": 0.0}),
    ("mistral-small-latest", "tokens=10", 0, {"completion_tokens": 10}),
    ("gpt-4o", "usage=openrouter,tokens=10", 0, {"completion_tokens": 10, "is_byok": False}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "order", "reasoning", "expected"), SHAPES)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_each_provider_says_its_usage_in_its_own_shape_and_the_log_has_one(
    upstream: Upstream, model: str, order: str, reasoning: int, expected: dict[str, Any], is_stream: bool
) -> None:
    body = {"model": model, "messages": ASK, "stream": is_stream, "stream_options": {"include_usage": True}}
    answer = await upstream.client.post("/v1/chat/completions", json=body, headers={"x-sandbox": order})
    said = (
        [event["usage"] for event in events_of(answer.text) if event.get("usage")]
        if is_stream
        else [answer.json()["usage"]]
    )
    usage = said[-1] | {"cached": (said[-1].get("prompt_tokens_details") or {}).get("cached_tokens")}
    assert usage | expected == usage
    (row,) = await upstream.log()
    counts = row["counts"]
    assert counts["output_tokens"] == 10 + reasoning
    assert counts.get("reasoning_tokens", 0) == reasoning
    assert usage["total_tokens"] == counts["input_tokens"] + counts["output_tokens"]
    assert row["sent_output_tokens"] == counts["output_tokens"]
    assert row["outcome"] == "completed"


async def test_a_long_prompt_that_was_seen_before_is_read_from_the_cache(client: openai.AsyncOpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "sea " * 1100}]
    cached = []
    for _ in range(2):
        usage = (await client.chat.completions.create(model="gpt-4o", messages=long)).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 1107 // 128 * 128]


async def test_completions_answer_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="gpt-4o-mini", prompt="The capital of France is", max_tokens=30)
    streamed = await client.completions.create(
        model="gpt-4o-mini", prompt="The capital of France is", max_tokens=30, stream=True
    )
    assert "".join([chunk.choices[0].text async for chunk in streamed]) == whole.choices[0].text
    two = await client.completions.create(model="gpt-4o-mini", prompt=["one", "two"])
    assert len(two.choices) == 2


async def test_responses_are_made_streamed_and_kept(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="gpt-5", input="Say something.", reasoning={"effort": "low"})
    assert made.usage is not None
    assert made.usage.output_tokens_details.reasoning_tokens == 8
    kept = await client.responses.retrieve(made.id)
    assert kept.output_text == made.output_text
    async with client.responses.stream(model="gpt-5", input="Say something.", reasoning={"effort": "low"}) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == made.output_text
    assert final.usage == made.usage
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve("resp_of_nobody")


async def test_embeddings_are_the_same_as_numbers_and_as_base64(upstream: Upstream) -> None:
    async def ask(form: str) -> Any:
        body = {"model": "text-embedding-3-small", "input": ["Hello world", "Hello"], "encoding_format": form}
        return (await upstream.client.post("/v1/embeddings", json=body)).json()

    numbers, text = await ask("float"), await ask("base64")
    packed = base64.b64decode(text["data"][1]["embedding"])
    assert list(struct.unpack("<1536f", packed)) == numbers["data"][1]["embedding"]
    assert numbers["usage"] == text["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


async def test_messages_count_what_is_written_to_the_cache_and_read_from_it(claude: anthropic.AsyncAnthropic) -> None:
    system: Any = [
        {"type": "text", "text": "You know the sea. " * 40, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"type": "text", "text": "You know the sky. " * 20, "cache_control": {"type": "ephemeral"}},
    ]

    async def ask() -> anthropic.types.Usage:
        message = await claude.messages.create(model="claude-haiku-4-5", max_tokens=50, system=system, messages=ASK)
        return message.usage

    first, second = await ask(), await ask()
    assert first.cache_creation is not None
    assert (first.cache_creation.ephemeral_1h_input_tokens, first.cache_creation.ephemeral_5m_input_tokens) == (180, 90)
    assert (first.cache_read_input_tokens, second.cache_read_input_tokens) == (0, 270)
    assert second.cache_creation_input_tokens == 0
    assert first.input_tokens == second.input_tokens
    counted = await claude.messages.count_tokens(model="claude-haiku-4-5", system=system, messages=ASK)
    assert counted.input_tokens == first.input_tokens + 270


async def test_a_streamed_message_with_a_tool_and_thinking_is_put_together_again(
    claude: anthropic.AsyncAnthropic,
) -> None:
    tools: Any = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    async with claude.messages.stream(
        model="claude-haiku-4-5", max_tokens=200, tools=tools, messages=ASK,
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:  # fmt: skip
        final = await stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "tool_use"]
    tool: Any = final.content[1]
    assert tool.input == {"city": "sandbox"}
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens == 16 + 5


async def test_speech_is_a_recording_as_long_as_the_text(client: openai.AsyncOpenAI) -> None:
    text = "Hello, welcome to the sandbox! " * 3
    heard = {}
    forms: list[Any] = ["mp3", "wav", "pcm"]
    for form in forms:
        answer: Any = await client.audio.speech.create(
            model="tts-1",
            voice="alloy",
            input=text,
            response_format=form,
        )
        heard[form] = answer.content
    assert heard["mp3"][:2] == b"\xff\xf3"
    assert len(heard["mp3"]) % 96 == 0
    with wave.open(io.BytesIO(heard["wav"])) as sound:
        assert sound.getnframes() * 2 == len(heard["pcm"])
        assert sound.getnframes() / sound.getframerate() == pytest.approx(len(text) / 15, abs=0.01)


@pytest.mark.parametrize("form", ["json", "text", "srt", "vtt", "verbose_json"])
async def test_a_recording_is_written_down_in_each_format(
    client: openai.AsyncOpenAI, upstream: Upstream, form: Any
) -> None:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000 * 2 * 3 // 2))
    answer: Any = await client.audio.transcriptions.create(
        model="whisper-1",
        file=("hello.wav", sound.getvalue()),
        response_format=form,
    )
    text = answer if isinstance(answer, str) else answer.text
    assert "no model" in text
    if form == "verbose_json":
        assert answer.duration == 1.5
    if form in ("srt", "vtt"):
        assert "-->" in text
    (row,) = await upstream.log()
    assert row["counts"] == {"audio_seconds": 1.5}


async def test_images_are_real_as_large_as_asked_and_counted_as_their_model_is(
    client: openai.AsyncOpenAI, upstream: Upstream
) -> None:
    made = await client.images.generate(model="gpt-image-1", prompt="A sea", size="1024x1536", quality="low", n=2)
    assert made.data is not None
    assert made.usage is not None
    assert made.usage.output_tokens == 2 * 272 * 3 // 2
    raw = base64.b64decode(made.data[0].b64_json or "")
    assert struct.unpack(">II", raw[16:24]) == (1024, 1536)
    assert len(zlib.decompress(raw[raw.index(b"IDAT") + 4 : -16])) == 1536 * 1025
    by_url = await client.images.generate(model="dall-e-3", prompt="A sea")
    assert by_url.data is not None
    fetched = await upstream.client.get(str(by_url.data[0].url))
    assert fetched.headers["content-type"] == "image/png"
    edited = await client.images.edit(model="gpt-image-1", prompt="Bluer", image=("sea.png", raw))
    assert edited.usage is not None
    assert edited.usage.input_tokens_details.image_tokens == 323


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")  # others speak its wire
async def test_a_video_is_done_after_some_polls_and_a_failing_one_says_why(
    client: openai.AsyncOpenAI, upstream: Upstream
) -> None:
    job = await client.videos.create(model="sora-2", prompt="A sea", seconds="8")
    seen = [(await client.videos.retrieve(job.id)).status for _ in range(3)]
    assert (job.status, *seen) == ("queued", "queued", "in_progress", "completed")
    film = await client.videos.download_content(job.id)
    assert film.content[4:8] == b"ftyp"
    await upstream.order("fail, polls=0", path="/videos")
    failed = await client.videos.create(model="sora-2", prompt="A sea")
    assert failed.status == "failed"
    assert failed.error is not None
    assert [row["counts"] for row in await upstream.log() if row["method"] == "POST"] == [{"video_seconds": 8}, {}]


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, openai.AuthenticationError), (429, openai.RateLimitError), (500, openai.InternalServerError), (400, openai.BadRequestError)],
)  # fmt: skip
async def test_refusals_are_worded_as_the_providers_word_them(
    client: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic, status: int, error: type[openai.APIStatusError]
) -> None:
    ordered: list[Any] = [{"role": "user", "content": f"[sandbox: status={status}, retry_after=7]"}]
    with pytest.raises(error) as refused:
        await client.chat.completions.create(model="gpt-4o", messages=ordered)
    assert refused.value.response.headers["retry-after"] == "7"
    with pytest.raises(anthropic.APIStatusError) as also:
        await claude.messages.create(model="claude-haiku-4-5", max_tokens=5, messages=ordered)
    assert also.value.status_code == status
    body: Any = also.value.body
    assert body["type"] == "error"


async def test_nobody_is_served_without_a_key(upstream: Upstream) -> None:
    async with httpx.AsyncClient(base_url=upstream.url) as nobody:
        answer = await nobody.post("/v1/chat/completions", json={"model": "gpt-4o", "messages": ASK})
    assert answer.status_code == 401
    (row,) = await upstream.log()
    assert (row["outcome"], row["counts"]) == ("refused", {})


# --- going wrong ----------------------------------------------------------------------------------


async def test_a_stream_that_is_cut_has_said_as_many_tokens_as_the_log_says(upstream: Upstream) -> None:
    body = {"model": "gpt-4o+cut=9", "messages": ASK, "stream": True}
    heard = ""
    with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012 - it breaks off while it is read
        async with upstream.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for text in answer.aiter_text():
                heard += text
    (row,) = await upstream.log()
    assert len(events_of(heard)) == 9
    assert row["sent_output_tokens"] == 8  # the first event says who speaks
    assert row["outcome"] == "cut"
    assert row["model"] == "gpt-4o"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_death_before_the_first_byte_says_nothing_at_all(upstream: Upstream, is_stream: bool) -> None:
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await upstream.client.post(
            "/v1/chat/completions", json={"model": "gpt-4o+cut=0", "messages": ASK, "stream": is_stream}
        )
    (row,) = await upstream.log()
    assert (row["outcome"], row.get("sent_output_tokens", 0)) == ("cut", 0)


async def test_half_a_body_is_what_it_says(upstream: Upstream) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await upstream.client.post("/v1/embeddings", json={"model": "text-embedding-3-small+cut=1", "input": "x"})


async def test_one_who_hangs_is_noticed_when_the_client_has_left(upstream: Upstream) -> None:
    with pytest.raises(httpx.ReadTimeout):
        await upstream.client.post("/v1/chat/completions", json={"model": "gpt-4o+hang", "messages": ASK}, timeout=0.1)
    (row,) = await upstream.log()
    assert row["outcome"] == "hung"


async def test_a_client_that_leaves_a_slow_stream_stops_it(upstream: Upstream) -> None:
    body = {"model": "gpt-4o+pace=0.01,tokens=1000", "messages": ASK, "stream": True}
    async with upstream.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for _ in answer.aiter_lines():
            break
    (row,) = await upstream.log()
    assert row["outcome"] == "client_gone"
    assert row.get("sent_output_tokens", 0) < 1000


@pytest.mark.parametrize("order", ["split=7", "crlf", "pings", "gzip", "unicode,split=1,tokens=60"])
async def test_however_a_stream_comes_a_client_reads_the_same(
    client: openai.AsyncOpenAI, upstream: Upstream, order: str
) -> None:
    words = "[sandbox: unicode,tokens=60]" if "unicode" in order else ""
    ask: list[Any] = [{"role": "user", "content": f"Hello {words}"}]
    whole = await client.chat.completions.create(model="gpt-4o", messages=ask)
    await upstream.order(order)
    stream = await client.chat.completions.create(model="gpt-4o", messages=ask, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content


async def test_an_error_in_a_stream_is_an_event(client: openai.AsyncOpenAI, upstream: Upstream) -> None:
    await upstream.order("error_after=4")
    stream = await client.chat.completions.create(model="gpt-4o", messages=ASK, stream=True)
    with pytest.raises(openai.APIError, match="had an error"):
        [chunk async for chunk in stream]


async def test_an_order_that_says_what_there_is_not_is_refused(upstream: Upstream) -> None:
    for bad in ("cut=many", "explode", "status=200"):
        answer = await upstream.client.post(
            "/v1/chat/completions", json={"model": "gpt-4o", "messages": ASK}, headers={"x-sandbox": bad}
        )
        assert answer.status_code == 400, bad
        assert (await upstream.client.post("/sandbox/orders", json={"order": bad})).status_code == 400


async def test_rubbish_is_refused_and_no_error_of_ours(upstream: Upstream) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/v1/images/generations"):
        for body in (
            b"{",
            b"[]",
            b'{"model": 5}',
            b'{"model": "m", "messages": 7, "tools": [3], "thinking": 1, "prompt": {}}',
        ):
            answer = await upstream.client.post(
                path, content=body, headers={"content-type": "application/json", "anthropic-version": "2023-06-01"}
            )
            assert answer.status_code in (200, 400), (path, body, answer.text)


async def test_log_and_jobs_outlive_the_process(tmp_path: Path) -> None:
    async with running_upstream(tmp_path) as first:
        made = (await first.client.post("/v1/videos", json={"model": "sora-2", "prompt": "A sea"})).json()
        (before,) = await first.log()
    async with running_upstream(tmp_path) as second:
        polled = (await second.client.get(f"/v1/videos/{made['id']}")).json()
        rows = await second.log()
    assert polled["status"] == "queued"
    assert rows[0] == before
    assert [row["n"] for row in rows] == [1, 2]
