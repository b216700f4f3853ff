"""Transcriptions: a recording to be written down, charged by its seconds, answered in the format that was asked for.

Only the upstream's own word tells how long a recording was that a caller made, so its answer is asked for with that word
in it (`verbose_json`, or `json` of models that know no other) and shown in the caller's format here.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final

import aiohttp
import msgspec

from app.client import Estimate, Usage
from app.client.usage import usage_of
from app.gateway import asking
from app.gateway.costs import usd_text
from app.gateway.errors import InvalidField
from app.gateway.exchange import Exchange
from app.gateway.forms import Form, Written, read_form
from app.gateway.inference import NOT_SENT_ON
from app.gateway.paid import Gateway, Paid, check_caller, targets_of
from app.gateway.recordings import check_format, held_seconds, told_seconds
from app.gateway.upstreams import Target

DEFAULT_MODEL: Final = "nova-3"
FORMATS: Final = ("json", "text", "srt", "vtt", "verbose_json")
_ONLY_JSON: Final = re.compile(r"transcribe", re.IGNORECASE)
"""Models that know no `verbose_json`: OpenAI's gpt-4o-transcribe and its like, which tell tokens in `json`."""
_MOST_ANSWER_BYTES: Final = 16 * 1024 * 1024
_MOST_REFUSAL_BYTES: Final = 64 * 1024
_NUSD: Final = 10**9


async def transcriptions(gateway: Gateway, exchange: Exchange) -> None:
    """POST /audio/transcriptions."""
    await check_caller(gateway, exchange)
    form = await read_form(exchange)
    try:
        await _transcribed(gateway, exchange, form)
    finally:
        form.close()


async def _transcribed(gateway: Gateway, exchange: Exchange, form: Form) -> None:
    file = next((each for each in form.files if each.field == "file"), None)
    if file is None or not file.size:
        raise InvalidField("file is missing, or empty", param="file")
    check_format(file)
    wanted = form.get("response_format") or "json"
    if wanted not in FORMATS:
        raise InvalidField(f"response_format is one of {', '.join(FORMATS)}", param="response_format")
    model = form.get("model") or DEFAULT_MODEL
    targets = targets_of(gateway, model, "transcriptions")
    told = await asyncio.to_thread(told_seconds, file)
    estimate = Estimate(audio_seconds=held_seconds(file, told))
    paid = await Paid.held(gateway, exchange, targets[0], exchange.path, estimate)
    form.drop("stream", *NOT_SENT_ON)
    said = await _asked(gateway, exchange, form, paid, targets)
    used, is_estimated = _used(said, told, held_seconds(file, told))
    charge = paid.charge(used, is_estimated=is_estimated)
    await _shown(exchange, said, wanted, used, await paid.cost_usd(charge))


async def _asked(gateway: Gateway, exchange: Exchange, form: Form, paid: Paid, targets: list[Target]) -> dict[str, Any]:
    """The upstream's answer with all that it tells. Nothing is left held when it raises."""

    async def send(target: Target, wanted: str) -> aiohttp.ClientResponse:
        form.put("model", target.upstream_model)
        form.put("response_format", wanted)
        written = Written(form.fields, form.files)
        return await asking.ask(
            gateway.session, target, "audio/transcriptions", written.chunks(), exchange.headers,
            content_type=written.content_type,
        )  # fmt: skip

    async def ask(target: Target) -> aiohttp.ClientResponse:
        if _ONLY_JSON.search(target.upstream_model):
            return await send(target, "json")
        response = await send(target, "verbose_json")
        if response.status in (400, 422) and b"response_format" in await response.content.read(_MOST_REFUSAL_BYTES):
            response.close()
            return await send(target, "json")
        return response

    response = await paid.answer(targets, ask)
    try:
        return await _read(response)
    except (aiohttp.ClientError, TimeoutError, OSError):
        paid.unused("the provider ended before it had answered", may_have_run=True)
        raise asking.failed("The model's provider ended before it had answered") from None
    finally:
        response.close()


async def _read(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """An answer in JSON; one of a server that only writes text is its text."""
    raw = bytearray()
    async for chunk in response.content.iter_any():
        raw += chunk
        if len(raw) > _MOST_ANSWER_BYTES:
            raise OSError("more than any transcript has")
    try:
        said = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = {"text": raw.decode("utf-8", "replace").strip()}
    return said if isinstance(said, dict) else {"text": str(said)}


def _used(said: Mapping[str, Any], told_seconds: float | None, held_seconds: float) -> tuple[Usage, bool]:
    """What the upstream says that it heard; else what the recording says, or its size, which is an estimate."""
    counted = usage_of(said.get("usage")) or Usage()
    seconds = said.get("duration")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < 1_000_000:
        seconds = counted.audio_seconds
    if seconds is None and counted == Usage():
        return Usage(audio_seconds=held_seconds if told_seconds is None else told_seconds), True
    return msgspec.structs.replace(counted, audio_seconds=seconds), False


async def _shown(exchange: Exchange, said: dict[str, Any], wanted: str, used: Usage, cost_usd: Decimal | None) -> None:
    headers = {} if cost_usd is None else {"x-satmeter-cost-usd": usd_text(int(cost_usd * _NUSD))}
    if wanted == "verbose_json":
        return await exchange.answer(200, msgspec.json.encode(said), headers)
    if wanted == "json":
        short = {name: said[name] for name in ("text", "usage", "logprobs") if said.get(name) is not None}
        return await exchange.answer(200, msgspec.json.encode(short), headers)
    text = _WRITTEN[wanted](said, used.audio_seconds or 0)
    return await exchange.answer(200, text.encode(), headers, "text/plain; charset=utf-8")


# --- the formats ----------------------------------------------------------------------------------


def _as_text(said: Mapping[str, Any], _: float) -> str:
    return f"{said.get('text', '')}\n"


def _as_srt(said: Mapping[str, Any], seconds: float) -> str:
    cues = [
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n\n"
        for number, (start, end, text) in enumerate(_cues(said, seconds), 1)
    ]
    return "".join(cues)


def _as_vtt(said: Mapping[str, Any], seconds: float) -> str:
    cues = [f"{_clock(start, '.')} --> {_clock(end, '.')}\n{text}\n\n" for start, end, text in _cues(said, seconds)]
    return "WEBVTT\n\n" + "".join(cues)


_WRITTEN: Final[Mapping[str, Callable[[Mapping[str, Any], float], str]]] = {
    "text": _as_text, "srt": _as_srt, "vtt": _as_vtt,
}  # fmt: skip


def _cues(said: Mapping[str, Any], seconds: float) -> list[tuple[float, float, str]]:
    """What is said from when to when; all of it at once where the upstream does not tell. A cue has no empty line in it."""
    segments = [each for each in said.get("segments") or [] if isinstance(each, dict)]
    if not segments:
        segments = [{"start": 0, "end": seconds, "text": said.get("text", "")}]
    return [
        (
            _time(each.get("start")),
            _time(each.get("end")),
            " ".join(str(each.get("text", "")).split()).replace("-->", "→"),
        )
        for each in segments
    ]


def _time(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1_000_000 else 0.0


def _clock(seconds: float, point: str) -> str:
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{thousandths:03}"
