"""Chat completions and completions, streamed and not, as OpenAI and those who speak like it send them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from .ids import new_id
from .orders import Order
from .prompts import Prompt, Seen, cached_of, example_of, most_tokens, of_messages, of_text, reasoning_of
from .usage import CHAT, Counts, Usage, provider_of
from .wire import DONE, SSE, Answer, Call, Piece, event, json_answer
from .words import digest_of, in_pieces, length_of, pieces, until

_ALWAYS_SAY_USAGE: Final = ("deepseek", "mistral", "gemini", "xai", "groq", "openrouter")
"""Whose streams have usage without being asked; the others' only with `stream_options.include_usage`."""
_VISIBLE_REASONING: Final = ("deepseek", "xai", "groq", "openrouter", "vllm")
FINGERPRINT: Final = "fp_sandbox"


@dataclass(slots=True)
class Said:
    """One choice: what it says or which functions it calls, in pieces of a token, and why it ended."""

    parts: list[str]
    reason: str
    tool: str | None = None
    thoughts: int = 0


@dataclass(slots=True)
class Talk:
    """All that a chat's answer is made of."""

    id: str
    created: int
    model: str
    choices: list[Said]
    counts: Counts
    shape: str
    tier: str

    @property
    def usage(self) -> Usage | None:
        return None if self.shape == "none" else CHAT[self.shape](self.counts)


def answer_chat(call: Call, order: Order, seen: Seen) -> Answer:
    fields = call.fields
    prompt = of_messages(fields.get("messages"), fields.get("tools"), order)
    talk = _talk(fields, order, prompt, seen, _choice, "chatcmpl-", ("max_completion_tokens", "max_tokens"))
    if not fields.get("stream"):
        body = _head(talk, "chat.completion") | {
            "choices": [_choice_view(talk, *pair) for pair in enumerate(talk.choices)]
        }
        return _whole(talk, body)
    return _streamed(talk, _chat_chunks(talk, _wants_usage(fields)))


def answer_completion(call: Call, order: Order, seen: Seen) -> Answer:
    fields = call.fields
    prompts = fields.get("prompt")
    is_many = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
    n = _n(fields) * (len(prompts) if is_many and isinstance(prompts, list) else 1)
    prompt = of_text(prompts, order)
    talk = _talk({**fields, "n": n}, order, prompt, seen, _text_choice, "cmpl-", ("max_tokens",))
    if not fields.get("stream"):
        choices = [_text_view(place, "".join(said.parts), said.reason) for place, said in enumerate(talk.choices)]
        return _whole(talk, _head(talk, "text_completion") | {"choices": choices})
    return _streamed(talk, _text_chunks(talk, _wants_usage(fields)))


def _talk(
    fields: dict[str, Any], order: Order, prompt: Prompt, seen: Seen, choose: Any, prefix: str, limits: tuple[str, ...]
) -> Talk:
    model = str(fields.get("model"))
    most = most_tokens(fields, *limits)
    thoughts = reasoning_of(model, fields.get("reasoning_effort"), order)
    thoughts = thoughts if most is None else min(thoughts, most)
    left = None if most is None else most - thoughts
    choices: list[Said] = [choose(fields, order, f"{prompt.text}#{place}", left) for place in range(_n(fields))]
    for said in choices:
        said.thoughts = thoughts
    audio_out = order.audio_out or 0
    counts = Counts(
        input_tokens=prompt.tokens,
        output_tokens=sum(len(said.parts) + thoughts for said in choices) + audio_out,
        cache_read_tokens=cached_of(prompt, order, seen),
        reasoning_tokens=thoughts * len(choices),
        audio_input_tokens=prompt.audio_tokens,
        audio_output_tokens=audio_out,
        image_input_tokens=prompt.image_tokens,
        queries=order.queries or (1 if fields.get("web_search_options") is not None else 0),
    )
    tier = str(fields.get("service_tier") or "default").replace("auto", "default")
    return Talk(new_id(prefix), int(time.time()), model, choices, counts, provider_of(model, order.usage), tier)


def _n(fields: dict[str, Any]) -> int:
    n = fields.get("n")
    return n if isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 128 else 1


def _choice(fields: dict[str, Any], order: Order, seed: str, most: int | None) -> Said:
    name = _tool_of(fields)
    if name is not None:
        return _bounded(in_pieces(_arguments(fields, name)), most, "tool_calls", name)
    wanted = fields.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") in ("json_object", "json_schema"):
        schema = (wanted.get("json_schema") or {}).get("schema", {"type": "object", "properties": {"answer": {}}})
        return _bounded(in_pieces(msgspec.json.encode(example_of(schema)).decode()), most, "stop")
    return _text_choice(fields, order, seed, most)


def _text_choice(fields: dict[str, Any], order: Order, seed: str, most: int | None) -> Said:
    parts = pieces(seed, length_of(seed) if order.tokens is None else order.tokens, is_unicode=order.unicode)
    stops = fields.get("stop")
    parts, _ = until(parts, [stops] if isinstance(stops, str) else stops or [])
    return _bounded(parts, most, "stop")


def _bounded(parts: list[str], most: int | None, reason: str, tool: str | None = None) -> Said:
    if most is not None and len(parts) > most:
        return Said(parts[:most], "length", tool)
    return Said(parts, reason, tool)


def _tool_of(fields: dict[str, Any]) -> str | None:
    """Which function the model calls: the first, or the one it must; none after a function has answered."""
    names = [
        str(tool["function"].get("name"))
        for tool in fields.get("tools") or []
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    ]
    choice, messages = fields.get("tool_choice"), fields.get("messages") or [{}]
    if not names or choice == "none":
        return None
    if isinstance(choice, dict):
        return str((choice.get("function") or {}).get("name") or names[0])
    last = messages[-1]
    return None if isinstance(last, dict) and last.get("role") == "tool" and choice != "required" else names[0]


def _arguments(fields: dict[str, Any], name: str) -> str:
    schemas = [
        tool["function"].get("parameters") for tool in fields["tools"] if tool.get("function", {}).get("name") == name
    ]
    return msgspec.json.encode(example_of(schemas[0] if schemas else {"type": "object"})).decode()


# --- the whole at once ----------------------------------------------------------------------------


def _head(talk: Talk, object: str) -> dict[str, Any]:
    head = {"id": talk.id, "object": object, "created": talk.created, "model": talk.model}
    return head | ({"service_tier": talk.tier} if talk.shape == "openai" else {}) | {"system_fingerprint": FINGERPRINT}


def _whole(talk: Talk, body: dict[str, Any]) -> Answer:
    usage = talk.usage
    return json_answer(
        body if usage is None else body | {"usage": usage}, counts=talk.counts, id=talk.id, attributes=_attributes(talk)
    )


def _attributes(talk: Talk) -> dict[str, str]:
    return {} if talk.tier == "default" else {"service_tier": talk.tier}


def _choice_view(talk: Talk, place: int, said: Said) -> dict[str, Any]:
    text = "".join(said.parts)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if said.tool is not None:
        function = {"name": said.tool, "arguments": text}
        message |= {"content": None, "tool_calls": [{"id": new_id("call_"), "type": "function", "function": function}]}
    if said.thoughts and talk.shape in _VISIBLE_REASONING:
        message["reasoning_content"] = "".join(pieces(digest_of(text), said.thoughts))
    if talk.counts.queries:
        message["annotations"] = [CITATION]
    return {"index": place, "message": message, "logprobs": None, "finish_reason": said.reason}


CITATION: Final = {
    "type": "url_citation",
    "url_citation": {
        "start_index": 0, "end_index": 8, "url": "https://sandbox.invalid/source", "title": "A page that the sandbox made up",
    },
}  # fmt: skip


def _text_view(place: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": place, "text": text, "logprobs": None, "finish_reason": reason}


# --- piece by piece -------------------------------------------------------------------------------


def _wants_usage(fields: dict[str, Any]) -> bool:
    options = fields.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _streamed(talk: Talk, chunks: Iterator[Piece]) -> Answer:
    return Answer(
        chunks, SSE, headers=[("cache-control", "no-cache")], id=talk.id, counts=talk.counts, usage=talk.usage,
        attributes=_attributes(talk), is_stream=True,
    )  # fmt: skip


def _chat_chunks(talk: Talk, wants_usage: bool) -> Iterator[Piece]:
    chunk = _Chunks(talk, "chat.completion.chunk", wants_usage)
    for place, said in enumerate(talk.choices):
        yield chunk.piece(
            _delta(place, {"role": "assistant", "content": None if said.tool else "", "refusal": None}), 0
        )
        yield from _thoughts(talk, chunk, place, said)
        if said.tool is not None:
            function: dict[str, Any] = {"name": said.tool, "arguments": ""}
            start = {"index": 0, "id": new_id("call_"), "type": "function", "function": function}
            yield chunk.piece(_delta(place, {"tool_calls": [start]}), 0)
        for part in said.parts:
            more = {"tool_calls": [{"index": 0, "function": {"arguments": part}}]} if said.tool else {"content": part}
            yield chunk.piece(_delta(place, more), 1)
        yield chunk.piece(_delta(place, {}, said.reason), 0, is_last=place == len(talk.choices) - 1)
    yield from chunk.end()


def _thoughts(talk: Talk, chunk: "_Chunks", place: int, said: Said) -> Iterator[Piece]:
    """What was thought: word by word where the provider shows it, else at once, without a word."""
    if talk.shape not in _VISIBLE_REASONING:
        chunk.output_tokens += said.thoughts
        return
    for part in pieces(digest_of("".join(said.parts)), said.thoughts):
        yield chunk.piece(_delta(place, {"reasoning_content": part}), 1)


def _delta(place: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": place, "delta": delta, "logprobs": None, "finish_reason": reason}


def _text_chunks(talk: Talk, wants_usage: bool) -> Iterator[Piece]:
    chunk = _Chunks(talk, "text_completion", wants_usage)
    for place, said in enumerate(talk.choices):
        chunk.output_tokens += said.thoughts
        for part in said.parts:
            yield chunk.piece(_text_view(place, part, None), 1)
        yield chunk.piece(_text_view(place, "", said.reason), 0, is_last=place == len(talk.choices) - 1)
    yield from chunk.end()


class _Chunks:
    """The events of one stream, with its usage where this provider puts it."""

    def __init__(self, talk: Talk, object: str, wants_usage: bool) -> None:
        self.talk, self.output_tokens = talk, 0
        self.wants_usage = wants_usage and talk.shape != "none"
        self.head = _head(talk, object)
        self.says_itself = talk.shape in _ALWAYS_SAY_USAGE

    def piece(self, choice: dict[str, Any], tokens: int, *, is_last: bool = False) -> Piece:
        """An event with one choice, after which so many more tokens have been said."""
        self.output_tokens += tokens
        body = self.head | {"choices": [choice]}
        if self.talk.shape == "gemini":
            body["usage"] = self._so_far()
        elif is_last and self.talk.shape == "groq":
            body["x_groq"] = {"id": self.talk.id, "usage": self.talk.usage}
        elif is_last and self.says_itself and self.talk.shape != "openrouter":
            body["usage"] = self.talk.usage
        elif self.wants_usage:
            body["usage"] = None
        return Piece(event(body), self.output_tokens)

    def _so_far(self) -> Usage:
        """Gemini tells in every event what it is until there: the last one holds."""
        counts = self.talk.counts
        thought = min(counts.reasoning_tokens, self.output_tokens)
        return CHAT["gemini"](
            msgspec.structs.replace(counts, output_tokens=self.output_tokens, reasoning_tokens=thought)
        )

    def end(self) -> Iterator[Piece]:
        total = self.talk.counts.output_tokens
        own_chunk = self.talk.shape == "openrouter" or (
            self.wants_usage and self.talk.shape in ("openai", "vllm", "groq")
        )
        if own_chunk:
            yield Piece(event(self.head | {"choices": [], "usage": self.talk.usage}), total)
        yield Piece(DONE, total)
