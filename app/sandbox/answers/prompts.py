"""A prompt as it is read: its words, its tokens, what of it was seen before, and how long the answer may be."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from .orders import Order
from .words import digest_of, tokens_of

_A_MESSAGE: Final = 4
_AN_IMAGE: Final = 85
_A_RECORDING: Final = 50
_CACHED_FROM, _CACHED_STEP = 1024, 128
"""OpenAI caches prompts of 1,024 tokens and more, in steps of 128. Source: OpenAI, "Prompt caching"."""


@dataclass(slots=True)
class Prompt:
    """What a call says to the model."""

    text: str = ""
    tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0


@dataclass(slots=True)
class Seen:
    """Which prompts came before, as providers remember them for their caches."""

    digests: set[str] = field(default_factory=set)

    def is_new(self, text: str) -> bool:
        """Whether it was not seen before; from now on it was."""
        digest = digest_of(text)
        if digest in self.digests:
            return False
        if len(self.digests) > 10_000:
            self.digests.clear()
        self.digests.add(digest)
        return True


def of_messages(messages: Any, tools: Any, order: Order) -> Prompt:
    """A chat's messages and tools."""
    prompt = Prompt(tokens=3)
    for message in messages if isinstance(messages, list) else []:
        prompt.tokens += _A_MESSAGE
        if isinstance(message, dict):
            _add(prompt, message.get("content"))
            if message.get("tool_calls"):
                _add(prompt, msgspec.json.encode(message["tool_calls"]).decode())
    if tools:
        prompt.tokens += tokens_of(msgspec.json.encode(tools).decode())
    return _as_ordered(prompt, order)


def of_text(text: Any, order: Order) -> Prompt:
    """A prompt that is a text, a list of texts, or tokens already."""
    prompt = Prompt()
    _add(prompt, text)
    return _as_ordered(prompt, order)


def _as_ordered(prompt: Prompt, order: Order) -> Prompt:
    if order.images_in is not None:
        prompt.tokens += order.images_in - prompt.image_tokens
        prompt.image_tokens = order.images_in
    if order.audio_in is not None:
        prompt.tokens += order.audio_in - prompt.audio_tokens
        prompt.audio_tokens = order.audio_in
    at_least = sum(filter(None, (order.cached, order.cache_write, order.cache_write_1h)))
    prompt.tokens = max(prompt.tokens, at_least)
    return prompt


def _add(prompt: Prompt, content: Any) -> None:
    if isinstance(content, str):
        prompt.text += content
        prompt.tokens += tokens_of(content)
    elif isinstance(content, bool) or content is None:
        return
    elif isinstance(content, int):
        prompt.tokens += 1
    elif isinstance(content, list):
        for part in content:
            _add(prompt, part)
    elif isinstance(content, dict):
        _add_part(prompt, content)


def _add_part(prompt: Prompt, part: dict[str, Any]) -> None:
    kind = str(part.get("type", ""))
    if "image" in kind:
        prompt.image_tokens += _AN_IMAGE
        prompt.tokens += _AN_IMAGE
    elif "audio" in kind:
        prompt.audio_tokens += _A_RECORDING
        prompt.tokens += _A_RECORDING
    else:
        for name in ("text", "content", "input", "output", "arguments"):
            value = part.get(name)
            _add(prompt, msgspec.json.encode(value).decode() if isinstance(value, dict) else value)


def words_of(fields: dict[str, Any]) -> str:
    """All words of a request in which an order may stand."""
    return "\n".join(_texts(fields, depth=0))


def _texts(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value[:65536]
    elif depth < 8 and isinstance(value, list):
        for each in value:
            yield from _texts(each, depth + 1)
    elif depth < 8 and isinstance(value, dict):
        for each in value.values():
            yield from _texts(each, depth + 1)


def cached_of(prompt: Prompt, order: Order, seen: Seen) -> int:
    """How many tokens of a prompt an OpenAI-like provider has in its cache."""
    if order.cached is not None:
        return order.cached
    if prompt.tokens < _CACHED_FROM or seen.is_new(prompt.text):
        return 0
    return prompt.tokens // _CACHED_STEP * _CACHED_STEP


def most_tokens(fields: dict[str, Any], *names: str) -> int | None:
    """How long an answer may be, by the first of these fields that says it."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


_EFFORT: Final = {"none": 0, "minimal": 0, "low": 8, "medium": 16, "high": 32}
_REASONS: Final = ("gpt-5", "o1", "o3", "o4", "deepseek-r1", "deepseek-reasoner", "gemini-2.5-pro", "grok-4")


def reasoning_of(model: str, effort: Any, order: Order) -> int:
    """How many tokens the model thinks before it answers."""
    if order.reasoning is not None:
        return order.reasoning
    name = model.lower().rpartition("/")[2]
    if not name.startswith(_REASONS):
        return 0
    return _EFFORT.get(str(effort), 16)


def example_of(schema: Any, depth: int = 0) -> Any:
    """A value that a JSON schema allows, for what is asked of a model in JSON."""
    if not isinstance(schema, dict) or depth > 6:
        return "sandbox"
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        properties = schema.get("properties")
        return {
            name: example_of(each, depth + 1)
            for name, each in (properties if isinstance(properties, dict) else {}).items()
        }
    if kind == "array":
        return [example_of(schema.get("items"), depth + 1)]
    return {"integer": 1, "number": 1.5, "boolean": True, "null": None}.get(str(kind), "sandbox")
