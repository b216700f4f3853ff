"""What a caller asks a model for, as an estimate to hold money by: read from the bodies of OpenAI's and Anthropic's APIs."""

import re
from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import Any, Final

import msgspec

from app.client.usage import bytes_by_four
from app.client.wire import MOST_UNITS, Estimate, word

TOKENS_OF_AN_IMAGE: Final = 1600
"""About what a large picture comes to (OpenAI's high detail, Anthropic's largest)."""
_BASE64_PER_AUDIO_TOKEN: Final = 2000
_TOKENS_BESIDE_A_MESSAGE: Final = 4
_TOKENS_BESIDE_A_PROMPT: Final = 8


class Asked(msgspec.Struct, frozen=True):
    """A call that somebody wants to make. `limit` is the field that says how long its answer may be, None where it has none;
    `shows_usage`: whether its stream tells its usage to a caller who asked for that."""

    model: str | None
    endpoint: str
    estimate: Estimate
    is_stream: bool = False
    limit: str | None = None
    shows_usage: bool = True
    can_be_asked_for_usage: bool = False
    """Whether its stream tells its usage only where `stream_options.include_usage` asks for it."""


class Reading(msgspec.Struct, frozen=True):
    """A request that was read. `body` may be changed on its way; None: it is sent on as it came."""

    asked: Asked
    body: Mapping[str, Any] | None = None

    def sent_on(self, raw: bytes, granted_tokens: int | None) -> bytes:
        """What the upstream gets: the body, limited to what was granted, and telling its usage."""
        if self.body is None:
            return raw
        return msgspec.json.encode(telling_usage(limited(self.body, self.asked, granted_tokens), self.asked))


Reader = Callable[[str, str, bytes], Reading | None]
"""Of a path, a content type and a body; None for what cannot be read."""


def read_request(path: str, content_type: str, raw: bytes) -> Reading | None:
    """A JSON object, or a form with a file to be transcribed."""
    if content_type.lower().startswith("multipart/form-data"):
        return _read_form(path, content_type, raw)
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return Reading(asked_of(path, body), body) if isinstance(body, dict) else None


def _read_form(path: str, content_type: str, raw: bytes) -> Reading | None:
    fields = form_fields(content_type, raw)
    file = fields.get("file")
    if file is None or "model" not in fields:
        return None
    model = fields["model"].decode("utf-8", "replace").strip()
    return Reading(Asked(model, word("/" + path.strip("/")), Estimate(audio_seconds=seconds_of(file))))


def form_fields(content_type: str, raw: bytes) -> dict[str, bytes]:
    """The fields of a form by their names, as they came. Source: RFC 7578."""
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        return {}
    found = {}
    for part in raw.split(b"--" + (boundary[1] or boundary[2]).encode("latin-1", "replace"))[1:]:
        head, _, value = part.partition(b"\r\n\r\n")
        if (name := _FIELD.search(head)) is not None:
            found[name[1].decode("latin-1")] = value.removesuffix(b"\r\n")
    return found


def seconds_of(sound: bytes) -> float:
    """How long a recording is: as its WAV header says, else as long as its bytes last at 32 kbit/s, which is seldom less."""
    if sound[:4] == b"RIFF" and sound[8:16] == b"WAVEfmt ":
        rate = int.from_bytes(sound[28:32], "little")
        return len(sound) / rate if rate >= _BYTES_PER_SECOND else len(sound) / _BYTES_PER_SECOND
    return len(sound) / _BYTES_PER_SECOND


_BYTES_PER_SECOND: Final = 4000
_BOUNDARY: Final = re.compile(r'boundary=(?:"([^"]+)"|([^\s;]+))', re.IGNORECASE)
_FIELD: Final = re.compile(rb'content-disposition:[^\r\n]*;\s*name="?([^";\r\n]+)', re.IGNORECASE)


def asked_of(path: str, body: Mapping[str, Any]) -> Asked:
    """What a JSON body sent to this path asks for. A field that is not what it should be is not estimated: the upstream
    judges it."""
    endpoint = path.strip("/").removeprefix("api/").removeprefix("v1/")
    kind = _KINDS.get(endpoint, _whatever)
    stream_options = body.get("stream_options")
    wants_usage = isinstance(stream_options, Mapping) and stream_options.get("include_usage") is True
    can_be_asked = endpoint in ("chat/completions", "completions")
    estimate, limit = kind(body)
    model = body.get("model")
    return Asked(
        model if isinstance(model, str) else None, word("/" + path.strip("/")), estimate, body.get("stream") is True, limit,
        wants_usage or not can_be_asked, can_be_asked,
    )  # fmt: skip


def limited(body: Mapping[str, Any], asked: Asked, tokens: int | None) -> dict[str, Any]:
    """The body, asking for an answer no longer than was granted."""
    if tokens is None or asked.limit is None:
        return dict(body)
    wanted = _natural(body, asked.limit)
    return dict(body) | {asked.limit: tokens if wanted is None else min(wanted, tokens)}


def telling_usage(body: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """The body, asking for the usage at the end of a stream, whatever the caller said."""
    if not (asked.is_stream and asked.can_be_asked_for_usage):
        return dict(body)
    options = body.get("stream_options")
    return dict(body) | {
        "stream_options": (dict(options) if isinstance(options, Mapping) else {}) | {"include_usage": True}
    }


_Read = tuple[Estimate, str | None]


def _chat(body: Mapping[str, Any]) -> _Read:
    limit = "max_tokens" if "max_tokens" in body and "max_completion_tokens" not in body else "max_completion_tokens"
    return _tokens(
        body, _inside(body, "messages", "tools", "functions", "response_format"), limit, _natural(body, "n") or 1
    )


def _completions(body: Mapping[str, Any]) -> _Read:
    prompt = body.get("prompt")
    many = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    answers = max(_natural(body, "n") or 1, _natural(body, "best_of") or 1)
    return _tokens(body, _inside(body, "prompt", "suffix"), "max_tokens", answers * many)


def _responses(body: Mapping[str, Any]) -> _Read:
    return _tokens(body, _inside(body, "input", "instructions", "tools", "text"), "max_output_tokens", 1)


def _messages(body: Mapping[str, Any]) -> _Read:
    return _tokens(body, _inside(body, "messages", "system", "tools"), "max_tokens", 1)


def _embeddings(body: Mapping[str, Any]) -> _Read:
    return Estimate(input_tokens=_inside(body, "input")), None


def _speech(body: Mapping[str, Any]) -> _Read:
    text = body.get("input")
    return Estimate(characters=len(text) if isinstance(text, str) else 0), None


def _images(body: Mapping[str, Any]) -> _Read:
    made = _natural(body, "n") or 1
    return Estimate(
        input_tokens=_inside(body, "prompt"), images=made, n=made, quality=_said(body, "quality"), size=_said(body, "size")
    ), None  # fmt: skip


def _whatever(body: Mapping[str, Any]) -> _Read:
    """A path that is not known: all of it is read, and it may answer as long as the model can."""
    return Estimate(input_tokens=_count(body)), None


_KINDS: Final[Mapping[str, Callable[[Mapping[str, Any]], _Read]]] = {
    "chat/completions": _chat, "completions": _completions, "responses": _responses, "messages": _messages,
    "embeddings": _embeddings, "audio/speech": _speech, "images/generations": _images,
}  # fmt: skip


def _tokens(body: Mapping[str, Any], input_tokens: int, limit: str, answers: int) -> _Read:
    estimate = Estimate(
        input_tokens=input_tokens + _TOKENS_BESIDE_A_PROMPT, max_output_tokens=_natural(body, limit), n=answers, service_tier=_said(body, "service_tier")
    )  # fmt: skip
    return estimate, limit


def _natural(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_UNITS
    return value if is_count else None


def _said(body: Mapping[str, Any], name: str) -> str | None:
    """`auto` says nothing."""
    value = body.get(name)
    return value if isinstance(value, str) and value and value != "auto" else None


def _inside(body: Mapping[str, Any], *names: str) -> int:
    return sum(_count(body[name]) for name in names if body.get(name) is not None)


def _count(value: Any) -> int:
    """Tokens of whatever is in there: texts by their bytes, pictures and sounds by what models make of them."""
    return sum(_each(value))


def _each(value: Any) -> Iterator[int]:
    waiting = [value]
    while waiting:  # not by recursion: a caller decides how deep it goes
        each = waiting.pop()
        if isinstance(each, str):
            yield TOKENS_OF_AN_IMAGE if each.startswith("data:image/") else bytes_by_four(each)
        elif isinstance(each, Mapping):
            kind = each.get("type")
            if kind in ("image_url", "image", "input_image"):
                yield TOKENS_OF_AN_IMAGE
            elif kind == "input_audio" and isinstance(sound := each.get("input_audio"), Mapping):
                yield ceil(len(str(sound.get("data", ""))) / _BASE64_PER_AUDIO_TOKEN)
            else:
                yield _TOKENS_BESIDE_A_MESSAGE if "role" in each else 1
                waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
        elif each is not None:
            yield 1
