"""Anthropic's Messages: made, streamed, counted, with what was written to its cache and read from it.

Source: Anthropic API reference, "Messages", "Streaming Messages", "Count Message tokens", "Prompt caching".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from . import usage
from .ids import new_id
from .orders import Order
from .prompts import Prompt, Seen, example_of, most_tokens, of_messages
from .usage import Counts
from .wire import SSE, Answer, Call, Piece, event, json_answer
from .words import in_pieces, length_of, pieces, tokens_of, until


@dataclass(slots=True)
class _Cached:
    read: int = 0
    written_5m: int = 0
    written_1h: int = 0


def count_tokens(call: Call, order: Order) -> Answer:
    return json_answer({"input_tokens": _prompt(call.fields, order).tokens})


def answer_message(call: Call, order: Order, seen: Seen) -> Answer:
    fields = call.fields
    prompt = _prompt(fields, order)
    blocks, reason, stop = _blocks(fields, order, prompt.text)
    cached = _cached(fields, order, seen)
    counts = Counts(
        input_tokens=max(prompt.tokens, cached.read + cached.written_5m + cached.written_1h),
        output_tokens=sum(len(parts) for _, parts in blocks),
        cache_read_tokens=cached.read, cache_write_tokens=cached.written_5m, cache_write_1h_tokens=cached.written_1h,
        queries=order.queries if order.queries is not None else _searches(fields),
        image_input_tokens=prompt.image_tokens,
    )  # fmt: skip
    message: dict[str, Any] = {
        "id": new_id("msg_"), "type": "message", "role": "assistant", "model": call.model,
        "content": [_filled(block, parts) for block, parts in blocks],
        "stop_reason": reason, "stop_sequence": stop, "usage": usage.anthropic(counts, counts.output_tokens),
    }  # fmt: skip
    if fields.get("stream"):
        events = _events(message, blocks, counts, says_usage=order.usage != "none")
        said = message["usage"] if order.usage != "none" else None
        return Answer(events, SSE, id=message["id"], counts=counts, usage=said, is_stream=True)
    if order.usage == "none":
        del message["usage"]
    return json_answer(message, counts=counts, id=message["id"])


def _prompt(fields: dict[str, Any], order: Order) -> Prompt:
    system = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
    return of_messages([*system, *(fields.get("messages") or [])], fields.get("tools"), order)


def _searches(fields: dict[str, Any]) -> int:
    return sum(str(tool.get("type", "")).startswith("web_search") for tool in fields.get("tools") or [])


# --- what is said ---------------------------------------------------------------------------------

Block = tuple[dict[str, Any], list[str]]
"""A content block without its text, and the text in pieces of a token."""


def _blocks(fields: dict[str, Any], order: Order, seed: str) -> tuple[list[Block], str, str | None]:
    most = most_tokens(fields, "max_tokens") or 1
    blocks: list[Block] = []
    thinking = fields.get("thinking")
    if (isinstance(thinking, dict) and thinking.get("type") in ("enabled", "adaptive")) or order.reasoning:
        thoughts = pieces(f"{seed}?", min(16 if order.reasoning is None else order.reasoning, most))
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, thoughts))
        most -= len(thoughts)
    tool = _tool_of(fields)
    if tool is not None:
        arguments = in_pieces(msgspec.json.encode(example_of(tool.get("input_schema"))).decode())
        blocks.append(({"type": "tool_use", "id": new_id("toolu_"), "name": tool.get("name"), "input": {}}, arguments))
        return blocks, "tool_use", None
    length = length_of(seed) if order.tokens is None else order.tokens
    said, stop = until(pieces(seed, length, is_unicode=order.unicode), fields.get("stop_sequences") or [])
    is_cut = len(said) > most
    blocks.append(({"type": "text", "text": ""}, said[:most]))
    return blocks, "max_tokens" if is_cut else "stop_sequence" if stop else "end_turn", None if is_cut else stop


def _tool_of(fields: dict[str, Any]) -> dict[str, Any] | None:
    tools = [tool for tool in fields.get("tools") or [] if isinstance(tool, dict) and "input_schema" in tool]
    choice = fields.get("tool_choice") or {}
    if not tools or choice.get("type") == "none":
        return None
    last = (fields.get("messages") or [{}])[-1].get("content")
    if isinstance(last, list) and any(part.get("type") == "tool_result" for part in last):
        return None
    return next((tool for tool in tools if tool.get("name") == choice.get("name")), tools[0])


def _filled(block: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    text = "".join(parts)
    if block["type"] == "tool_use":
        return block | {"input": msgspec.json.decode(text)}
    return block | ({"thinking": text, "signature": "c2FuZGJveA=="} if block["type"] == "thinking" else {"text": text})


# --- what was cached ------------------------------------------------------------------------------


def _cached(fields: dict[str, Any], order: Order, seen: Seen) -> _Cached:
    """All up to each `cache_control` mark is written once, for as long as its mark says, and read from then on."""
    if any(each is not None for each in (order.cached, order.cache_write, order.cache_write_1h)):
        return _Cached(order.cached or 0, order.cache_write or 0, order.cache_write_1h or 0)
    cached, text, before = _Cached(), "", 0
    for words, mark in _marked(fields):
        text += words
        if mark is None:
            continue
        size = tokens_of(text) - before
        before += size
        if not seen.is_new(f"{mark}:{text}"):
            cached.read += size
        elif mark == "1h":
            cached.written_1h += size
        else:
            cached.written_5m += size
    return cached


def _marked(fields: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The prompt's blocks in the order in which they are cached: tools, system, messages."""
    messages = [message.get("content") for message in fields.get("messages") or [] if isinstance(message, dict)]
    for content in (fields.get("tools"), fields.get("system"), *messages):
        for block in content if isinstance(content, list) else [content]:
            if isinstance(block, dict):
                mark = block.get("cache_control")
                words = block.get("text") or msgspec.json.encode(block).decode()
                yield str(words), str(mark.get("ttl", "5m")) if isinstance(mark, dict) else None
            elif block:
                yield str(block), None


# --- piece by piece -------------------------------------------------------------------------------


def _events(message: dict[str, Any], blocks: list[Block], counts: Counts, *, says_usage: bool) -> Iterator[Piece]:
    start = message | {"content": [], "stop_reason": None, "stop_sequence": None}
    start["usage"] = usage.anthropic(counts, 1) if says_usage else {"input_tokens": 0, "output_tokens": 0}
    yield _event({"type": "message_start", "message": start}, 0)
    said = 0
    for place, (block, parts) in enumerate(blocks):
        yield _event({"type": "content_block_start", "index": place, "content_block": block}, said)
        if place == 0:
            yield _event({"type": "ping"}, said)
        for part in parts:
            said += 1
            yield _event({"type": "content_block_delta", "index": place, "delta": _delta(block, part)}, said)
        if block["type"] == "thinking":
            signed = {"type": "signature_delta", "signature": "c2FuZGJveA=="}
            yield _event({"type": "content_block_delta", "index": place, "delta": signed}, said)
        yield _event({"type": "content_block_stop", "index": place}, said)
    end = {"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]}
    total = usage.anthropic(counts, said) if says_usage else {"output_tokens": 0}
    yield _event({"type": "message_delta", "delta": end, "usage": total}, said)
    yield _event({"type": "message_stop"}, said)


def _delta(block: dict[str, Any], part: str) -> dict[str, Any]:
    if block["type"] == "tool_use":
        return {"type": "input_json_delta", "partial_json": part}
    name = "thinking" if block["type"] == "thinking" else "text"
    return {"type": f"{name}_delta", name: part}


def _event(data: dict[str, Any], output_tokens: int) -> Piece:
    return Piece(event(data, data["type"]), output_tokens)
