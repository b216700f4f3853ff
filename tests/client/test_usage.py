"""Usage in each provider's words, and what is counted where an answer says nothing. Pure."""

import json
from typing import Any

import pytest

from app.client.asked import asked_of, limited, telling_usage
from app.client.usage import Answer, usage_of
from app.client.wire import Usage

TOLD: list[tuple[str, dict[str, Any], Usage]] = [
    ("OpenAI", {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150,
                "prompt_tokens_details": {"cached_tokens": 40, "audio_tokens": 10},
                "completion_tokens_details": {"reasoning_tokens": 20, "audio_tokens": 5}},
     Usage(100, 50, cache_read_tokens=40, audio_input_tokens=10, reasoning_tokens=20, audio_output_tokens=5)),
    ("Gemini's thoughts are in the total alone", {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 95}, Usage(10, 85)),
    ("xAI", {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 35, "completion_tokens_details": {"reasoning_tokens": 20}},
     Usage(10, 25, reasoning_tokens=20)),
    ("DeepSeek", {"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 6},
     Usage(10, 5, cache_read_tokens=4)),
    ("OpenRouter", {"prompt_tokens": 10, "completion_tokens": 5, "cost": 0.1, "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 3}},
     Usage(10, 5, cache_read_tokens=0, cache_write_tokens=3)),
    ("Perplexity", {"prompt_tokens": 10, "completion_tokens": 5, "num_search_queries": 2}, Usage(10, 5, queries=2)),
    ("embeddings", {"prompt_tokens": 8, "total_tokens": 8}, Usage(8, 0)),
    ("Responses", {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 40}, "output_tokens": 50,
                   "output_tokens_details": {"reasoning_tokens": 20}, "total_tokens": 150},
     Usage(100, 50, cache_read_tokens=40, reasoning_tokens=20)),
    ("images", {"input_tokens": 50, "output_tokens": 4160, "total_tokens": 4210, "input_tokens_details": {"text_tokens": 10, "image_tokens": 40}},
     Usage(50, 4160, image_input_tokens=40)),
    ("Anthropic counts its cache beside the input",
     {"input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 300, "cache_read_input_tokens": 1000,
      "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200}},
     Usage(1310, 5, cache_read_tokens=1000, cache_write_tokens=100, cache_write_1h_tokens=200)),
    ("Anthropic", {"input_tokens": 10, "output_tokens": 5, "server_tool_use": {"web_search_requests": 2}}, Usage(10, 5, queries=2)),
    ("transcription by time", {"type": "duration", "seconds": 12.5}, Usage(audio_seconds=12.5)),
    ("transcription by tokens", {"type": "tokens", "input_tokens": 14, "input_token_details": {"audio_tokens": 14}, "output_tokens": 9, "total_tokens": 23},
     Usage(14, 9, audio_input_tokens=14)),
    ("nonsense is not believed", {"prompt_tokens": -5, "completion_tokens": True, "total_tokens": "x", "prompt_tokens_details": [1]}, Usage(0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("told", "usage"), [(told, usage) for _, told, usage in TOLD], ids=[name for name, _, _ in TOLD]
)
def test_a_provider_s_usage_is_read(told: dict[str, Any], usage: Usage) -> None:
    assert usage_of(told) == usage


@pytest.mark.parametrize("told", [None, 5, [], {}, {"tokens": 3}, "usage"])
def test_what_says_nothing_is_no_usage(told: Any) -> None:
    assert usage_of(told) is None


def events(*each: dict[str, Any] | str) -> bytes:
    return b"".join(b"data: " + (e if isinstance(e, str) else json.dumps(e)).encode() + b"\n\n" for e in each)


def delta(text: str) -> dict[str, Any]:
    return {"id": "c-1", "model": "m", "choices": [{"index": 0, "delta": {"content": text}}]}


CHAT = events(
    delta("Hello "),
    delta("world"),
    {"id": "c-1", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}},
    "[DONE]",
)
ANTHROPIC = b"".join(
    b"event: x\r\ndata: " + json.dumps(each).encode() + b"\r\n\r\n"
    for each in (
        {
            "type": "message_start",
            "message": {"id": "msg_1", "model": "claude", "usage": {"input_tokens": 9, "output_tokens": 1}},
        },
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hello world"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    )
)
RESPONSES = events(
    {"type": "response.created", "response": {"id": "resp_1", "model": "m"}},
    {"type": "response.output_text.delta", "delta": "Hello world"},
    {"type": "response.completed", "response": {"id": "resp_1", "model": "m",
     "usage": {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11}}},
)  # fmt: skip


@pytest.mark.parametrize("stream", [CHAT, ANTHROPIC, RESPONSES])
def test_a_stream_s_usage_is_read_however_it_is_cut(stream: bytes) -> None:
    for size in range(1, len(stream) + 1, 7):
        answer = Answer("text/event-stream; charset=utf-8")
        for start in range(0, len(stream), size):
            answer.feed(stream[start : start + size])
        answer.end()
        assert answer.usage == Usage(9, 2)
        assert answer.is_finished
        assert answer.upstream_id in ("c-1", "msg_1", "resp_1")
        done = answer.done(Usage(100, 0))
        assert (done.usage, done.usage_estimated) == (Usage(9, 2), False)
        left = answer.done(Usage(100, 0), "client_disconnected")
        assert (left.usage, left.usage_estimated) == (Usage(9, 2), False), "it was read to its end all the same"


def test_a_stream_that_is_cut_off_is_counted_by_what_came() -> None:
    answer = Answer("text/event-stream")
    answer.feed(events(*(delta("word " * 8) for _ in range(10))))
    done = answer.done(Usage(100, 0), "partial")
    assert (done.usage, done.usage_estimated) == (Usage(100, 100), True)


def test_each_piece_is_a_token_at_least() -> None:
    answer = Answer("text/event-stream")
    answer.feed(events(*(delta("a") for _ in range(100))))
    assert answer.produced_tokens == 100


def test_a_message_that_said_one_token_at_its_start_costs_what_came() -> None:
    answer = Answer("text/event-stream")
    answer.feed(ANTHROPIC[: ANTHROPIC.index(b"event:", ANTHROPIC.index(b"text_delta"))])
    assert answer.usage == Usage(9, 1)
    assert answer.done(Usage(100, 0), "client_disconnected").usage == Usage(9, 3)


@pytest.mark.parametrize("failure", [
    b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"x"}}\n\n', b'data: {"error":{"message":"x"}}\n\n',
    b'data: {"type":"response.failed","response":{"error":{"code":"x"},"usage":null}}\n\n',
])  # fmt: skip
def test_a_stream_that_says_that_it_failed_is_not_whole(failure: bytes) -> None:
    for stream in (CHAT, ANTHROPIC, RESPONSES):
        answer = Answer("text/event-stream")
        answer.feed(stream.replace(b"\r\n", b"\n").split(b"\n\n")[0] + b"\n\n" + events(delta("word " * 8)) + failure)
        answer.end()
        done = answer.done(Usage(9, 0))
        assert (done.outcome, done.usage_estimated) == ("partial", True)
        assert done.usage is not None
        assert (done.usage.output_tokens or 0) >= 10


def test_a_message_s_stream_that_ends_without_its_end_is_not_whole() -> None:
    answer = Answer("text/event-stream")
    answer.feed(ANTHROPIC[: ANTHROPIC.index(b"event:", ANTHROPIC.index(b"text_delta"))])
    done = answer.done(Usage(9, 0))
    assert (done.outcome, done.usage_estimated, done.usage) == ("partial", True, Usage(9, 3))


def test_tool_calls_reasoning_and_refusals_are_counted() -> None:
    for part in (
        {"tool_calls": [{"function": {"name": "f", "arguments": "x" * 40}}]}, {"reasoning_content": "x" * 40}, {"refusal": "x" * 40},
    ):  # fmt: skip
        answer = Answer("text/event-stream")
        answer.feed(events({"choices": [{"delta": part}]}))
        assert answer.produced_tokens >= 10, part


def test_a_whole_body_says_its_usage_or_is_counted() -> None:
    answer = Answer("application/json")
    answer.feed(json.dumps({"id": "c", "model": "m", "usage": {"prompt_tokens": 9, "completion_tokens": 2}}).encode())
    answer.end()
    done = answer.done(Usage(100, 0))
    assert (done.usage, done.usage_estimated, done.served_model) == (Usage(9, 2), False, "m")
    silent = Answer("application/json")
    silent.feed(json.dumps({"choices": [{"message": {"content": "x" * 40}}]}).encode())
    silent.end()
    assert (silent.done(Usage(9, 0)).usage, silent.done(Usage(9, 0)).usage_estimated) == (Usage(9, 10), True)


def test_an_answer_that_says_nothing_of_itself_costs_what_is_held_and_never_nothing() -> None:
    for content_type in ("application/json", "text/event-stream", "text/plain", ""):
        answer = Answer(content_type)
        answer.feed(b"\x00\xff{[")
        answer.end()
        assert answer.done(Usage(9, 0)).body()["usage"] == {}
        assert answer.done(None, "partial").body() == {"usage": {}, "usage_estimated": True, "outcome": "completed"}


def test_speech_costs_its_characters_and_images_their_count() -> None:
    spoken = Answer("audio/mpeg")
    spoken.feed(b"\xff\xfb" * 100)
    done = spoken.done(Usage(characters=20))
    assert (done.usage, done.usage_estimated) == (Usage(characters=20), False)
    made = Answer("application/json")
    made.feed(json.dumps({"created": 1, "data": [{"url": "x"}, {"b64_json": "y"}]}).encode())
    made.end()
    assert made.done(Usage(5, 0)).body()["usage"]["images"] == 2


@pytest.mark.parametrize(("path", "body", "expected"), [
    ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 7, "n": 2}, (7, 2, "max_tokens")),
    ("/chat/completions", {"messages": [], "max_completion_tokens": 8, "max_tokens": 9}, (8, 1, "max_completion_tokens")),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2, "best_of": 4}, (None, 12, "max_tokens")),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 5}, (5, 1, "max_output_tokens")),
    ("/v1/messages", {"messages": [], "max_tokens": 5}, (5, 1, "max_tokens")),
    ("/v1/embeddings", {"input": ["a"]}, (None, 1, None)),
    ("/v1/chat/completions", {"max_tokens": "many", "n": -3, "messages": 5}, (None, 1, "max_tokens")),
    ("/v1/chat/completions", {"max_tokens": True, "n": 10**30}, (None, 1, "max_tokens")),
])  # fmt: skip
def test_what_is_asked_for_is_estimated(path: str, body: dict[str, Any], expected: tuple[Any, ...]) -> None:
    asked = asked_of(path, body)
    assert (asked.estimate.max_output_tokens, asked.estimate.n, asked.limit) == expected


def test_a_text_is_held_by_its_bytes_and_a_picture_by_what_models_make_of_it() -> None:
    def of(content: Any) -> int:
        return (
            asked_of("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}).estimate.input_tokens
            or 0
        )

    assert 1000 < of("x" * 4000) < 1020
    assert of("字" * 1000) > 740
    assert of([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4_000_000}}]) < 2000
    assert of([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]) > 1000
    deep: Any = "x" * 400
    for _ in range(5000):
        deep = [deep]
    assert of(deep) > 100


def test_a_body_is_limited_and_asked_for_its_usage_and_otherwise_left_alone() -> None:
    body = {"model": "m", "stream": True, "max_tokens": 500, "odd": {"x": 1}}
    asked = asked_of("/v1/chat/completions", body)
    assert limited(body, asked, None) == body
    assert limited(body, asked, 100) == body | {"max_tokens": 100}
    assert limited(body, asked, 1000) == body
    assert telling_usage(body, asked) == body | {"stream_options": {"include_usage": True}}
    refusing = body | {"stream_options": {"include_usage": False, "x": 1}}
    assert telling_usage(refusing, asked)["stream_options"] == {"include_usage": True, "x": 1}
    assert telling_usage(body, asked_of("/v1/messages", body)) == body
