"""OpenAI's Responses: made, streamed by their events, kept to be asked for again.

Source: OpenAI API reference, "Responses" and "Streaming events".
"""

import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from . import usage
from .ids import new_id
from .orders import Order
from .prompts import Seen, cached_of, example_of, most_tokens, of_messages, reasoning_of
from .usage import Counts
from .wire import SSE, Answer, Call, Piece, event, json_answer
from .words import in_pieces, length_of, pieces

_KEPT: Final = 2_000
Responses = dict[str, dict[str, Any]]
"""What was answered, by id; `background` ones end when they are asked for."""


def answer_response(call: Call, order: Order, seen: Seen, kept: Responses) -> Answer:
    fields = call.fields
    asked = fields.get("input")
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if fields.get("instructions"):
        messages = [{"role": "system", "content": fields["instructions"]}, *(messages or [])]
    prompt = of_messages(messages, fields.get("tools"), order)
    most = most_tokens(fields, "max_output_tokens")
    thoughts = reasoning_of(call.model, (fields.get("reasoning") or {}).get("effort"), order)
    thoughts = thoughts if most is None else min(thoughts, most)
    said, tool = _said(fields, order, prompt.text)
    is_cut = most is not None and len(said) > most - thoughts
    said = said[: most - thoughts] if is_cut and most is not None else said
    queries = order.queries if order.queries is not None else _searches(fields)
    counts = Counts(
        input_tokens=prompt.tokens, output_tokens=len(said) + thoughts, reasoning_tokens=thoughts,
        cache_read_tokens=cached_of(prompt, order, seen), image_input_tokens=prompt.image_tokens, queries=queries,
    )  # fmt: skip
    response = _response(fields, said, tool, counts, is_cut)
    if order.usage == "none":
        response["usage"] = None
    if fields.get("store") is not False:
        _keep(kept, response)
    if fields.get("stream"):
        return Answer(
            _events(response, said, counts),
            SSE,
            id=response["id"],
            counts=counts,
            usage=response["usage"],
            is_stream=True,
        )
    if fields.get("background"):
        waiting = response | {"status": "queued", "output": [], "usage": None}
        return json_answer(waiting, counts=counts, id=response["id"])
    return json_answer(response, counts=counts, id=response["id"])


def _keep(kept: Responses, response: dict[str, Any]) -> None:
    if len(kept) >= _KEPT:
        kept.pop(next(iter(kept)))
    kept[response["id"]] = response


def _said(fields: dict[str, Any], order: Order, seed: str) -> tuple[list[str], str | None]:
    tools = [each for each in fields.get("tools") or [] if isinstance(each, dict) and each.get("type") == "function"]
    asked = fields.get("input")
    last = asked[-1] if isinstance(asked, list) and asked and isinstance(asked[-1], dict) else {}
    if tools and fields.get("tool_choice") != "none" and last.get("type") != "function_call_output":
        arguments = msgspec.json.encode(example_of(tools[0].get("parameters"))).decode()
        return in_pieces(arguments), str(tools[0].get("name"))
    length = length_of(seed) if order.tokens is None else order.tokens
    return pieces(seed, length, is_unicode=order.unicode), None


def _searches(fields: dict[str, Any]) -> int:
    return sum(str(tool.get("type", "")).startswith("web_search") for tool in fields.get("tools") or [])


def _response(
    fields: dict[str, Any], said: list[str], tool: str | None, counts: Counts, is_cut: bool
) -> dict[str, Any]:
    output: list[dict[str, Any]] = []
    if counts.reasoning_tokens:
        output.append({"id": new_id("rs_"), "type": "reasoning", "summary": []})
    output += [
        {
            "id": new_id("ws_"),
            "type": "web_search_call",
            "status": "completed",
            "action": {"type": "search", "query": "sandbox"},
        }
        for _ in range(counts.queries)
    ]
    output.append(_item(said, tool))
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if is_cut else "completed",
        "background": bool(fields.get("background")),
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "metadata": fields.get("metadata") or {},
        "model": fields.get("model"),
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": fields.get("previous_response_id"),
        "reasoning": fields.get("reasoning") or {"effort": None, "summary": None},
        "service_tier": "default",
        "store": fields.get("store") is not False,
        "temperature": fields.get("temperature", 1.0),
        "text": {"format": {"type": "text"}},
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.get("tools") or [],
        "top_p": fields.get("top_p", 1.0),
        "truncation": "disabled",
        "usage": usage.responses(counts),
        "user": None,
    }


def _item(said: list[str], tool: str | None) -> dict[str, Any]:
    text = "".join(said)
    if tool is not None:
        call = {"type": "function_call", "status": "completed", "call_id": new_id("call_"), "name": tool}
        return {"id": new_id("fc_"), **call, "arguments": text}
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"id": new_id("msg_"), "type": "message", "status": "completed", "role": "assistant", "content": content}


def _events(response: dict[str, Any], said: list[str], counts: Counts) -> Iterator[Piece]:
    """The events of a stream; the usage stands in the last one."""
    numbered = _Numbered()
    running = response | {"status": "in_progress", "output": [], "usage": None}
    yield numbered("response.created", response=running)
    yield numbered("response.in_progress", response=running)
    numbered.output_tokens = counts.reasoning_tokens
    for place, item in enumerate(response["output"]):
        yield from _item_events(numbered, place, item, said)
    end = "response.incomplete" if response["status"] == "incomplete" else "response.completed"
    yield numbered(end, response=response)


class _Numbered:
    """Makes events one after the other."""

    def __init__(self) -> None:
        self.number, self.output_tokens = 0, 0

    def __call__(self, kind: str, **more: Any) -> Piece:
        data = {"type": kind, "sequence_number": self.number, **more}
        self.number += 1
        return Piece(event(data, kind), self.output_tokens)


def _item_events(numbered: _Numbered, place: int, item: dict[str, Any], said: list[str]) -> Iterator[Piece]:
    kind = item["type"]
    started = item | {"status": "in_progress"} if "status" in item else item
    empty: dict[str, dict[str, Any]] = {"message": {"content": []}, "function_call": {"arguments": ""}}
    started = started | empty.get(kind, {})
    yield numbered("response.output_item.added", output_index=place, item=started)
    at: dict[str, Any] = {"item_id": item["id"], "output_index": place}
    if kind == "message":
        yield from _text_events(numbered, at | {"content_index": 0}, item, said)
    elif kind == "function_call":
        for part in said:
            numbered.output_tokens += 1
            yield numbered("response.function_call_arguments.delta", **at, delta=part)
        yield numbered("response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
    yield numbered("response.output_item.done", output_index=place, item=item)


def _text_events(numbered: _Numbered, at: dict[str, Any], item: dict[str, Any], said: list[str]) -> Iterator[Piece]:
    part = item["content"][0]
    yield numbered("response.content_part.added", **at, part=part | {"text": ""})
    for delta in said:
        numbered.output_tokens += 1
        yield numbered("response.output_text.delta", **at, delta=delta, logprobs=[])
    yield numbered("response.output_text.done", **at, text=part["text"], logprobs=[])
    yield numbered("response.content_part.done", **at, part=part)
