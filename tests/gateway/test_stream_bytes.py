"""A stream passes byte for byte: of what a caller gets, all but the cost fields is what the upstream sent, however it was cut."""

import asyncio
import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.client.houses import serving
from tests.gateway.street import NUSD, opened
from tests.rig import Rig

COSTS = re.compile(
    rb',"input_cost_usd":[0-9.]+,"output_cost_usd":[0-9.]+,"cache_input_cost_usd":[0-9.]+,"total_cost_usd":([0-9.]+)'
    rb'(?:,"ttft_ms":[0-9.]+)?,"latency_ms":[0-9.]+'
)
CHAT = (
    b": a comment before all\n\n"
    b'data: {"id":"c-1","object":"chat.completion.chunk","x_unknown":{"a":[1, 2.50, -0e1]},"choices":[{"index":0,"delta":'
    b'{"role":"assistant","content":""},"logprobs":null}]}\n\n'
    b'data:{ "id":"c-1", "choices" : [ {"index":0,"delta":{"content":"caf\xc3\xa9 \\u00e9 \xf0\x9f\x90\x9f \\"usage\\" \\"error\\""}} ] }\n\n'
    b'id: 7\nretry: 10\ndata: {"id":"c-1","choices":[{"index":0,"delta":{"content":"\\n\\ndata: [DONE]"}}]}\n\n'
    b": ping\n\n\n\n"
    b'data: {"id":"c-1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"id":"c-1","choices":[],"usage":{"prompt_tokens":100,"completion_tokens":7,"total_tokens":107 }}\n\n'
    b"data: [DONE]\n\n"
)
MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m-1","model":"claude-sonnet-4-6","content":[],"usage":'
    b'{"input_tokens":100,"output_tokens":1}}}\n\n'
    b'event: ping\ndata: {"type": "ping"}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\xc3\xa9"}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":7}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
RESPONSES = (
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"r-1","usage":null}}\n\n'
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"\xc3\xa9 \\"usage\\""}\n\n'
    b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"r-1","output":[],"usage":'
    b'{"input_tokens":100,"input_tokens_details":{"cached_tokens":0},"output_tokens":7,"total_tokens":107}}}\n\n'
)
NUSD_OF = {"gpt-4o-mini": 100 * 150 + 7 * 600, "claude-sonnet-4-6": 100 * 3000 + 7 * 15_000}
SAID = [{"role": "user", "content": "x"}]
UPSTREAM = """
[[upstream]]
name = "fixed"
kind = "openai"
base_url = "%s"
models = ["gpt-4o-mini", "claude-sonnet-4-6"]
serves = ["chat", "responses", "messages"]
"""


@dataclass
class Fixed:
    """An upstream that answers whatever it is asked with these pieces."""

    pieces: list[bytes] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-secret", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})


def cut(stream: bytes, dice: random.Random) -> list[bytes]:
    """The same in pieces of any length, within words, characters and line ends."""
    places = sorted(dice.sample(range(1, len(stream)), dice.choice((0, 3, 40, len(stream) - 1))))
    return [stream[begin:end] for begin, end in zip([0, *places], [*places, len(stream)], strict=True)]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize(
    ("path", "stream", "model"),
    [("chat/completions", CHAT, "gpt-4o-mini"), ("messages", MESSAGES, "claude-sonnet-4-6"), ("responses", RESPONSES, "gpt-4o-mini")],
)  # fmt: skip
async def test_what_the_upstream_sent_is_what_the_caller_gets_but_for_its_costs(
    rig: Rig, tmp_path: Any, path: str, stream: bytes, model: str, line_end: bytes
) -> None:
    fixed, sent = Fixed(), stream.replace(b"\n", line_end)
    asked = {"model": model, "stream": True, "messages": SAID, "input": "x", "max_tokens": 9}
    asked |= {"stream_options": {"include_usage": True}} if path == "chat/completions" else {}
    async with serving(fixed) as url, opened(rig, tmp_path, upstreams=UPSTREAM % url) as street:
        for number in range(6):
            fixed.pieces = cut(sent, random.Random(number))
            answer = await street.post(f"/v1/{path}", asked)
            assert "x-secret" not in answer.headers
            [(cost_usd)] = COSTS.findall(answer.content)
            assert COSTS.sub(b"", answer.content) == sent
            assert json.loads(cost_usd) * float(NUSD) == pytest.approx(NUSD_OF[model])
        assert [charge["cost_nusd"] for charge in await street.charges()] == [NUSD_OF[model]] * 6


OPERATORS = b'"cost":0.000123,"is_byok":false,"cost_details":{"upstream_inference_cost":0.0001},'
LITELLM = (
    b'data: {"id":"c-1","choices":[{"index":0,"delta":{"content":"Hi","role":"assistant"}}]}\n\n'
    b'data: {"id":"c-1","choices":[{"finish_reason":"stop","index":0,"delta":{}}]}\n\n'
    b'data: {"id":"c-1","choices":[{"index":0,"delta":{"content":null}}],"usage":{%b"prompt_tokens":100,'
    b'"completion_tokens":7,"total_tokens":107}}\n\n'
    b"data: [DONE]\n\n"
)
"""Whose last word has a choice that says nothing, and what the call costs the operator."""


@pytest.mark.parametrize(
    ("path", "stream", "model"),
    [
        ("chat/completions", LITELLM, "gpt-4o-mini"),
        ("messages", MESSAGES.replace(b'{"output_tokens":7', b'{%b"output_tokens":7'), "claude-sonnet-4-6"),
        ("responses", RESPONSES.replace(b'{"input_tokens":100', b'{%b"input_tokens":100'), "gpt-4o-mini"),
    ],
)
async def test_what_a_call_costs_the_operator_is_kept_and_told_to_no_caller(
    rig: Rig, tmp_path: Any, path: str, stream: bytes, model: str
) -> None:
    fixed = Fixed([stream % OPERATORS])
    asked = {"model": model, "stream": True, "messages": SAID, "input": "x", "max_tokens": 9}
    asked |= {"stream_options": {"include_usage": True}} if path == "chat/completions" else {}
    async with serving(fixed) as url, opened(rig, tmp_path, upstreams=UPSTREAM % url) as street:
        answer = await street.post(f"/v1/{path}", asked)
        [cost_usd] = COSTS.findall(answer.content)
        assert COSTS.sub(b"", answer.content) == stream % b""
        charge = await street.only_charge()
        assert json.loads(cost_usd) * float(NUSD) == pytest.approx(charge["cost_nusd"])
        assert (charge["cost_nusd"], charge["provider_cost_nusd"]) == (NUSD_OF[model], 123_000)


@pytest.mark.parametrize("said", ["1e400", "-1", "NaN", '"many"', "null", "[]", "1000000", "true", '{"usd":1}'])
async def test_an_upstreams_odd_word_of_its_costs_keeps_nobody_from_being_charged(
    rig: Rig, tmp_path: Any, said: str
) -> None:
    fixed = Fixed([LITELLM % b'"cost":%b,' % said.encode()])
    async with serving(fixed) as url, opened(rig, tmp_path, upstreams=UPSTREAM % url) as street:
        answer = await street.post("/v1/chat/completions", {"model": "gpt-4o-mini", "stream": True, "messages": SAID})
        assert answer.content.endswith(b"data: [DONE]\n\n")
        charge = await street.only_charge()
        assert charge["provider_cost_nusd"] is None
        assert charge["cost_nusd"] == NUSD_OF["gpt-4o-mini"] or said == "NaN"  # which is no JSON, and counted here


async def test_a_caller_who_did_not_ask_for_usage_gets_all_but_the_event_of_it(rig: Rig, tmp_path: Any) -> None:
    fixed = Fixed([CHAT])
    async with serving(fixed) as url, opened(rig, tmp_path, upstreams=UPSTREAM % url) as street:
        answer = await street.post("/v1/chat/completions", {"model": "gpt-4o-mini", "stream": True, "messages": SAID})
        (of_usage,) = re.findall(rb"data: [^\n]*\"usage\":\{[^\n]*\n\n", CHAT)
        assert answer.content == CHAT.replace(of_usage, b"")
        fixed.pieces = [LITELLM % OPERATORS]
        answer = await street.post("/v1/chat/completions", {"model": "gpt-4o-mini", "stream": True, "messages": SAID})
        assert b"usage" not in answer.content
        assert answer.content.endswith(b'"delta":{}}]}\n\ndata: [DONE]\n\n')
        assert [charge["cost_nusd"] for charge in await street.charges()] == [NUSD_OF["gpt-4o-mini"]] * 2
