"""Speech and transcriptions: silence for a text, and a text for whatever was recorded.

Source: OpenAI API reference, "Create speech", "Create transcription".
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

from .orders import Order
from .sounds import CHARACTERS_A_SECOND, mp3, mp3_size, pcm, pcm_size, seconds_of, wav
from .usage import Counts
from .wire import Answer, Call, Piece, json_answer, refusal
from .words import length_of, pieces, tokens_of

_SOUNDS: Final[dict[str, tuple[Callable[[float], int], Callable[[int], Iterator[bytes]], str]]] = {
    "mp3": (mp3_size, mp3, "audio/mpeg"),
    "wav": (pcm_size, wav, "audio/wav"),
    "pcm": (pcm_size, pcm, "audio/pcm"),
}
_AUDIO_TOKENS_A_SECOND: Final = 10


def answer_speech(call: Call, order: Order) -> Answer:
    """Bytes as they come, in no JSON: nothing in them says what they cost."""
    text = str(call.fields.get("input") or "")
    wanted = str(call.fields.get("response_format") or "mp3")
    size_of, sound, content_type = _SOUNDS.get(wanted, _SOUNDS["mp3"])
    size = order.bytes or size_of(max(1.0, len(text) / CHARACTERS_A_SECOND))
    return Answer(
        [Piece(chunk) for chunk in sound(size)] if size < 1_000_000 else (Piece(chunk) for chunk in sound(size)),
        content_type, counts=Counts(characters=len(text)), attributes={"voice": str(call.fields.get("voice"))},
    )  # fmt: skip


def answer_transcription(call: Call, order: Order) -> Answer:
    upload = next((each for each in call.uploads if each.field == "file"), None)
    if upload is None:
        return refusal(400, "you must provide a file parameter", param="file")
    seconds = seconds_of(upload.head, upload.size) if order.seconds is None else order.seconds
    words = pieces(upload.name, length_of(upload.name) if order.tokens is None else order.tokens)
    text = "".join(words).strip()
    counts = Counts(audio_seconds=round(seconds, 3))
    wanted = str(call.fields.get("response_format") or "json")
    if call.model.startswith("gpt-4o") and order.usage != "duration":
        return _counted_in_tokens(text, seconds, order)
    used = {} if order.usage == "none" else {"usage": {"type": "duration", "seconds": math.ceil(seconds)}}
    if wanted == "verbose_json":
        verbose = _verbose(call, text, seconds)
        if order.usage == "none":
            del verbose["duration"]
        return json_answer(verbose | used, counts=counts)
    if wanted == "json":
        return json_answer({"text": text} | used, counts=counts)
    said = {"srt": _srt, "vtt": _vtt}.get(wanted, _text)(text, seconds).encode()
    return Answer([Piece(said)], "text/plain; charset=utf-8", counts=counts, length=len(said))


def _counted_in_tokens(text: str, seconds: float, order: Order) -> Answer:
    """As gpt-4o-transcribe says it."""
    heard = math.ceil(seconds * _AUDIO_TOKENS_A_SECOND) if order.audio_in is None else order.audio_in
    counts = Counts(
        input_tokens=heard, audio_input_tokens=heard, output_tokens=tokens_of(text), audio_seconds=round(seconds, 3)
    )
    usage = {
        "type": "tokens", "total_tokens": heard + counts.output_tokens, "input_tokens": heard,
        "input_token_details": {"text_tokens": 0, "audio_tokens": heard}, "output_tokens": counts.output_tokens,
    }  # fmt: skip
    return json_answer({"text": text, "usage": usage}, counts=counts)


def _verbose(call: Call, text: str, seconds: float) -> dict[str, Any]:
    segment = {
        "id": 0, "seek": 0, "start": 0.0, "end": round(seconds, 2), "text": text, "tokens": [0], "temperature": 0.0,
        "avg_logprob": -0.1, "compression_ratio": 1.0, "no_speech_prob": 0.99,
    }  # fmt: skip
    return {
        "task": "transcribe", "language": str(call.fields.get("language") or "english"),
        "duration": round(seconds, 3), "text": text, "segments": [segment],
    }  # fmt: skip


def _text(text: str, _: float) -> str:
    return text + "\n"


def _srt(text: str, seconds: float) -> str:
    return f"1\n00:00:00,000 --> {_clock(seconds, ',')}\n{text}\n\n"


def _vtt(text: str, seconds: float) -> str:
    return f"WEBVTT\n\n00:00:00.000 --> {_clock(seconds, '.')}\n{text}\n\n"


def _clock(seconds: float, point: str) -> str:
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{thousandths:03}"
