"""What an answer says that it used, in each provider's own words; and what it has used by itself where it says nothing.

`usage_of` reads one usage object. `Answer` is fed an answer's bytes as they pass, a JSON body or a stream of server-sent
events, and knows at any moment what was used by then. Both are pure: they talk to nobody.
"""

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any, Final

import msgspec

from app.client.wire import MOST_UNITS, Attributes, Done, Outcome, Usage

CountTokens = Callable[[str], int]
_MOST_JSON_BYTES: Final = 32 * 1024 * 1024
"""Of a body that is kept until its end, to be read: what is longer is counted by its bytes."""
_MOST_LINE_BYTES: Final = 8 * 1024 * 1024
_MOST_KEPT_CHARS: Final = 4096
"""Of the text that is not counted yet."""


def bytes_by_four(text: str) -> int:
    """Tokens of a text where its model's tokenizer is not known: a quarter of its bytes."""
    return ceil(len(text.encode("utf-8", "surrogatepass")) / 4)


def usage_of(told: Any) -> Usage | None:
    """A provider's usage object as ours. None where it says nothing.

    OpenAI and those who speak like it count cached tokens within the input, Anthropic beside it. Where a total says more
    than input and output come to (Gemini's thoughts, xAI's reasoning), the rest is output.
    Sources: the API references of OpenAI, Anthropic, Google (OpenAI compatibility), xAI, DeepSeek, OpenRouter, Groq.
    """
    if not isinstance(told, Mapping):
        return None
    if "prompt_tokens" in told or "completion_tokens" in told:
        return _chat(told)
    if told.get("type") == "duration" or ("seconds" in told and "input_tokens" not in told):
        return Usage(audio_seconds=_seconds(told.get("seconds")))
    if "input_tokens" not in told and "output_tokens" not in told:
        return None
    if "total_tokens" in told or "input_tokens_details" in told or "input_token_details" in told:
        return _responses(told)
    return _anthropic(told)


def _chat(told: Mapping[str, Any]) -> Usage:
    of_input, of_output = _part(told, "prompt_tokens_details"), _part(told, "completion_tokens_details")
    cached = _count(of_input, "cached_tokens")
    if cached is None:
        cached = _first(told, "prompt_cache_hit_tokens", "cache_read_input_tokens", "cached_tokens")
    prompt = _count(told, "prompt_tokens") or 0
    return Usage(
        input_tokens=prompt, output_tokens=_answered(told, prompt, "completion_tokens"), cache_read_tokens=cached,
        cache_write_tokens=_first(of_input, "cache_write_tokens", "cache_creation_tokens") or _first(told, "cache_creation_input_tokens"),
        reasoning_tokens=_count(of_output, "reasoning_tokens"), audio_input_tokens=_count(of_input, "audio_tokens"),
        audio_output_tokens=_count(of_output, "audio_tokens"), image_input_tokens=_count(of_input, "image_tokens"),
        image_output_tokens=_count(of_output, "image_tokens"), video_input_tokens=_count(of_input, "video_tokens"),
        queries=_first(told, "num_search_queries") or _count(_part(told, "server_tool_use"), "web_search_requests"),
    )  # fmt: skip


def _responses(told: Mapping[str, Any]) -> Usage:
    of_input = _part(told, "input_tokens_details") or _part(told, "input_token_details")
    of_output = _part(told, "output_tokens_details") or _part(told, "output_token_details")
    sent = _count(told, "input_tokens") or 0
    return Usage(
        input_tokens=sent, output_tokens=_answered(told, sent, "output_tokens"),
        cache_read_tokens=_count(of_input, "cached_tokens"), cache_write_tokens=_count(of_input, "cache_write_tokens"),
        reasoning_tokens=_count(of_output, "reasoning_tokens"), audio_input_tokens=_count(of_input, "audio_tokens"),
        image_input_tokens=_count(of_input, "image_tokens"), audio_output_tokens=_count(of_output, "audio_tokens"),
        image_output_tokens=_count(of_output, "image_tokens"),
    )  # fmt: skip


def _anthropic(told: Mapping[str, Any]) -> Usage:
    read, written = _count(told, "cache_read_input_tokens"), _count(told, "cache_creation_input_tokens")
    by_age = _part(told, "cache_creation")
    hour, minutes = _count(by_age, "ephemeral_1h_input_tokens"), _count(by_age, "ephemeral_5m_input_tokens")
    written = max(written or 0, (hour or 0) + (minutes or 0)) if written is not None or by_age else None
    return Usage(
        input_tokens=(_count(told, "input_tokens") or 0) + (read or 0) + (written or 0),
        output_tokens=_count(told, "output_tokens") or 0, cache_read_tokens=read,
        cache_write_tokens=None if written is None else written - (hour or 0), cache_write_1h_tokens=hour,
        queries=_count(_part(told, "server_tool_use"), "web_search_requests") or None,
    )  # fmt: skip


def _answered(told: Mapping[str, Any], sent: int, name: str) -> int:
    return max(_count(told, name) or 0, (_count(told, "total_tokens") or 0) - sent)


def _part(told: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = told.get(name)
    return part if isinstance(part, Mapping) else {}


def _first(told: Mapping[str, Any], *names: str) -> int | None:
    return next((count for name in names if (count := _count(told, name)) is not None), None)


def _count(told: Mapping[str, Any], name: str) -> int | None:
    count = told.get(name)
    if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count <= MOST_UNITS:
        return None
    return ceil(count)


def _seconds(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= MOST_UNITS else None


class Answer:
    """An answer as it passes. `usage` is what the upstream says, None while it says nothing; `produced_tokens` what was
    counted of it: the text that went by, and never less than its pieces, each of which is a token at least."""

    def __init__(self, content_type: str, *, count_tokens: CountTokens = bytes_by_four) -> None:
        self.is_stream = content_type.lower().startswith("text/event-stream")
        self._is_json = "json" in content_type.lower()
        self._count_tokens = count_tokens
        self._rest = bytearray()
        self._is_overlong = False
        self._told: dict[str, Any] = {}
        self._text: list[str] = []
        self._searches: set[str] = set()
        """Ids of the searches that a provider made by itself, as Responses name them."""
        self._tokens = self._pieces = self._kept_chars = 0
        self.bytes = 0
        self.images = 0
        self.audio_seconds: float | None = None
        self.model: str | None = None
        self.upstream_id: str | None = None
        self.service_tier: str | None = None
        self.is_finished = self.has_failed = False
        """Whether a stream has said that it is at its end, or that it goes no further."""
        self._ends_by_itself = False

    def feed(self, chunk: bytes) -> None:
        self.bytes += len(chunk)
        if self.is_stream:
            self._feed_lines(chunk)
        elif self._is_json and not self._is_overlong:
            self._rest += chunk
            if len(self._rest) > _MOST_JSON_BYTES:
                self._is_overlong, self._rest = True, bytearray()

    def end(self) -> None:
        """Nothing more comes."""
        if self.is_stream:
            self._feed_lines(b"\n\n")
        elif self._rest:
            self._read(bytes(self._rest))
            self._rest = bytearray()

    @property
    def usage(self) -> Usage | None:
        told = usage_of(self._told)
        if told is None or not self._searches:
            return told
        return msgspec.structs.replace(told, queries=max(told.queries or 0, len(self._searches)))

    @property
    def produced_tokens(self) -> int:
        """Counted once, as it comes."""
        if self._text:
            self._count()
        return max(self._tokens, self._pieces)

    def _count(self) -> None:
        self._tokens += self._count_tokens("".join(self._text))
        self._text, self._kept_chars = [], 0

    def so_far(self, sent: Usage | None) -> Usage | None:
        """What was used by now: the upstream's word or what was counted, whichever is more. None where neither is known."""
        told, counted = self.usage, self.produced_tokens
        if told is None and sent is None and not counted:
            return None
        base = told or sent or Usage()
        if counted > (base.output_tokens or 0):
            base = msgspec.structs.replace(base, output_tokens=counted)
        return base

    def done(self, sent: Usage | None, outcome: Outcome = "completed", **more: Any) -> Done:
        """What the call came to. By the upstream's word where the answer came to its end and said one, else as counted,
        and said so. An answer that says nothing of itself costs what was sent, where that is what it is sold by (speech);
        else what is held: an empty usage tells that."""
        told = self.usage
        if self.has_failed or (outcome == "completed" and self._ends_by_itself and not self.is_finished):
            outcome = "partial"
        is_whole = told is not None and not self.has_failed and (outcome == "completed" or self.is_finished)
        used = told if is_whole else self.so_far(sent)
        if outcome == "completed" and told is None and not self.produced_tokens:
            is_whole = sent is not None and sent.characters is not None
            used = sent if is_whole or (sent is not None and sent.audio_seconds is not None) else None
        if self.images:
            used, is_whole = msgspec.structs.replace(used or Usage(), images=self.images), True
        if self.audio_seconds is not None and (told is None or told.audio_seconds is None):
            used, is_whole = msgspec.structs.replace(used or Usage(), audio_seconds=self.audio_seconds), True
        served = Attributes(service_tier=self.service_tier) if self.service_tier else None
        about = {"served_model": self.model, "upstream_id": self.upstream_id, "attributes": served}
        return Done(usage=used, outcome=outcome, usage_estimated=not is_whole, **(about | more))

    # --- reading ---

    def _feed_lines(self, chunk: bytes) -> None:
        if b"\r" in chunk:  # which ends a line too
            chunk = chunk.replace(b"\r", b"\n")
        self._rest += chunk
        if b"\n" not in chunk:
            if len(self._rest) > _MOST_LINE_BYTES:
                self._pieces += len(self._rest) // 4
                self._rest = bytearray()
            return
        lines = bytes(self._rest).split(b"\n")
        self._rest = bytearray(lines.pop())
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.is_finished = True
                elif data:
                    self._read(data)

    def _read(self, data: bytes) -> None:
        try:
            read = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if isinstance(read, dict):
            self._take(read)

    def _take(self, event: dict[str, Any]) -> None:
        """An event of a stream, or a whole body: who answers, what is said of usage, and the text."""
        inner = event
        for name in ("response", "message"):  # of Responses and of Anthropic's message_start
            if isinstance(event.get(name), dict):
                inner = event[name]
        self.model = _text(inner, "model") or self.model
        self.upstream_id = _text(inner, "id") or self.upstream_id
        self.service_tier = _text(inner, "service_tier") or self.service_tier
        for told in (inner.get("usage"), event.get("usage"), _part(event, "x_groq").get("usage")):
            if isinstance(told, dict):
                self._told |= {name: value for name, value in told.items() if value is not None}
        kind = event.get("type")
        self._ends_by_itself |= kind in ("message_start", "response.created")  # usage is told before the end, too
        self.is_finished |= kind in ("message_stop", "response.completed", "response.incomplete")
        self.has_failed |= kind in ("error", "response.failed") or (
            self.is_stream and isinstance(event.get("error"), dict)
        )
        output = inner.get("output")
        for item in (event.get("item"), *(output if isinstance(output, list) else ())):
            if isinstance(item, dict) and item.get("type") in _SEARCHES and _is_search(item):
                self._searches.add(str(item.get("id")))
        if isinstance(event.get("duration"), int | float):
            self.audio_seconds = _seconds(event["duration"])
        self._take_text(event)

    def _take_text(self, event: dict[str, Any]) -> None:
        for choice in event.get("choices") or ():
            if isinstance(choice, dict):
                for part in (choice.get("delta"), choice.get("message"), choice):
                    if isinstance(part, dict):
                        self._add(part)
        data = event.get("data")
        if isinstance(data, list) and not self.is_stream:
            self.images = sum(isinstance(each, dict) and ("url" in each or "b64_json" in each) for each in data)
        delta = event.get("delta")
        self._add(delta if isinstance(delta, dict) else {"text": delta})
        if not self.is_stream:
            for each in event.get("content") or ():
                if isinstance(each, dict):
                    self._add(each)

    def _add(self, part: Mapping[str, Any]) -> None:
        found = [part[name] for name in _TEXTS if isinstance(part.get(name), str) and part[name]]
        for call in part.get("tool_calls") or ():
            function = _part(call, "function") if isinstance(call, dict) else {}
            found += [function[name] for name in ("name", "arguments") if isinstance(function.get(name), str)]
        if found:
            self._pieces += 1
            self._text += found
            self._kept_chars += sum(map(len, found))
            if self._kept_chars > _MOST_KEPT_CHARS:
                self._count()


_SEARCHES: Final = ("web_search_call", "file_search_call")


def _is_search(item: Mapping[str, Any]) -> bool:
    """To open a page that was found, and to look within it, are no searches. Source: OpenAI docs, "Web search", output."""
    return _part(item, "action").get("type") not in ("open_page", "find_in_page", "find")


_TEXTS: Final = ("content", "text", "refusal", "reasoning", "reasoning_content", "thinking", "partial_json")


def _text(event: Mapping[str, Any], name: str) -> str | None:
    value = event.get(name)
    return value if isinstance(value, str) and value else None
