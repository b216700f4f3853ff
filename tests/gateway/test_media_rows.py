"""Speech, transcriptions and images through a gateway: each in its seed's own shape, charged once, or given back."""

import asyncio
import base64
import hashlib
import io
import wave
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from app.sandbox.answers.sounds import mp3, mp3_size
from tests.client.houses import calls, eventually, open_holds
from tests.gateway.media_house import DATA_URL, PICTURE, Media, media_house
from tests.rig import Rig
from tests.sandbox.upstream import running_upstream

HELLO = "Hello, welcome to the gateway!"


@pytest.fixture
async def media(rig: Rig, tmp_path: Path) -> AsyncIterator[Media]:
    async with running_upstream() as offline, media_house(rig, offline, tmp_path) as found:
        yield found


@pytest.fixture
async def sdk(media: Media) -> AsyncIterator[openai.AsyncOpenAI]:
    key = media.customer.api_key
    async with openai.AsyncOpenAI(api_key=key, base_url=f"{media.url}/v1", max_retries=0) as client:
        yield client


def a_wav(seconds: float) -> bytes:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(int(8000 * 2 * seconds)))
    return sound.getvalue()


# --- speech ---------------------------------------------------------------------------------------


async def test_speech_streams_a_recording_and_charges_its_characters(media: Media, sdk: openai.AsyncOpenAI) -> None:
    async with sdk.audio.speech.with_streaming_response.create(
        model="deepgram_aura_2", voice="aura-2-thalia-en", input=HELLO
    ) as answer:
        sound = await answer.read()
    assert sound[:2] == b"\xff\xf3"
    assert answer.headers["content-type"] == "audio/mpeg"
    (charge,) = await media.charged()
    assert await media.spent_usd() == Decimal(len(HELLO)) * 30 / 10**6
    assert Decimal(answer.headers["x-satmeter-cost-usd"]) == await media.spent_usd()
    assert charge["model"] == "deepgram_aura_2"
    (row,) = await media.offline.log()
    assert row["counts"] == {"characters": len(HELLO)}


async def test_speech_has_a_default_model_and_voice_on_every_path(media: Media) -> None:
    for prefix in ("", "/v1", "/api/v1"):
        assert (await media.ask(f"{prefix}/audio/speech", {"input": HELLO})).status_code == 200
    for row in await media.offline.log():
        assert (row["model"], row["asked"]["voice"]) == ("deepgram_aura_2", "aura-2-arcas-en")
    await media.charged(3)


ODD_SPEECH: list[tuple[dict[str, Any], str]] = [
    ({"input": "x" * 2001}, "input"), ({"input": "é" * 2001}, "input"), ({}, "input"), ({"input": ""}, "input"),
    ({"input": 7}, "input"), ({"input": "x", "model": ["a"]}, "model"), ({"input": "x", "voice": 1}, "voice"),
]  # fmt: skip


async def test_speech_that_is_too_long_or_odd_is_refused_before_anybody_is_asked(media: Media) -> None:
    for body, param in ODD_SPEECH:
        answer = await media.ask("/v1/audio/speech", body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), body
    assert await media.offline.log() == []
    await media.nothing_charged()


async def test_two_thousand_characters_are_taken_however_many_bytes_they_have(media: Media) -> None:
    assert (await media.ask("/v1/audio/speech", {"input": "é" * 2000})).status_code == 200
    await media.charged()
    assert await media.spent_usd() == Decimal(2000) * 30 / 10**6


FAULTS = [
    ("status=400", 400),
    ("status=429,retry_after=9", 429),
    ("status=500", 502),
    ("status=401", 502),
    ("cut=0", 502),
]


async def test_speech_that_nobody_began_to_say_costs_nothing(media: Media) -> None:
    for order, status in FAULTS:
        await media.offline.order(order)
        answer = await media.ask("/v1/audio/speech", {"input": HELLO})
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
        assert answer.headers.get("retry-after") == ("9" if status == 429 else None)
    await media.nothing_charged()


async def test_speech_that_breaks_off_is_charged_and_never_taken_for_whole(media: Media) -> None:
    await media.offline.order("cut=1")
    with pytest.raises(httpx.RemoteProtocolError):
        await media.ask("/v1/audio/speech", {"input": HELLO})
    await media.charged()
    assert await media.spent_usd() == Decimal(len(HELLO)) * 30 / 10**6


async def test_a_caller_who_leaves_pays_for_what_was_said(media: Media) -> None:
    await media.offline.order("bytes=2000000,pace=0.02")
    async with media.client.stream("POST", "/v1/audio/speech", json={"input": HELLO}) as answer:
        async for _ in answer.aiter_raw():
            break
    await media.charged()
    assert await media.spent_usd() == Decimal(len(HELLO)) * 30 / 10**6


async def test_nobody_without_money_or_a_key_is_served(media: Media) -> None:
    poor = await media.rig.customer("0")
    for key, status in ((poor.api_key, 402), ("sk-nobody", 401), ("", 401)):
        headers = {"authorization": f"Bearer {key}" if key else ""}
        for path, body in (
            ("/v1/audio/speech", {"input": HELLO}),
            ("/v1/images/generations", {"model": "dall-e-3", "prompt": "A sea"}),
            ("/v1/videos", {"model": "sora-2", "prompt": "A sea"}),
            ("/v1/videos", {"model": "sora-2", "prompt": "A sea", "image_url": "https://10.0.0.1/"}),
            ("/v1/images/generations", {"model": "dall-e-3", "prompt": "A sea", "image_url": "https://10.0.0.1/"}),
        ):
            answer = await media.ask(path, body, headers=headers)
            assert (answer.status_code, path) == (status, path)
        files = {"file": ("a.wav", a_wav(1))}
        assert (await media.client.post("/v1/audio/transcriptions", files=files, headers=headers)).status_code == status
    assert await media.offline.log() == []
    await media.nothing_charged()


# --- transcriptions -------------------------------------------------------------------------------


async def test_a_recording_is_written_down_in_each_format_and_charged_by_its_seconds(
    media: Media, sdk: openai.AsyncOpenAI
) -> None:
    forms: list[Any] = ["json", "text", "srt", "vtt", "verbose_json"]
    said: dict[str, Any] = {}
    for form in forms:
        said[form] = await sdk.audio.transcriptions.create(
            model="whisper-1", file=("hello.wav", a_wav(90.5)), response_format=form, language="en"
        )
    text = said["json"].text
    assert "no model" in text
    assert said["text"] == f"{text}\n"
    assert said["srt"] == f"1\n00:00:00,000 --> 00:01:30,500\n{text}\n\n"
    assert said["vtt"] == f"WEBVTT\n\n00:00:00.000 --> 00:01:30.500\n{text}\n\n"
    assert (said["verbose_json"].text, said["verbose_json"].duration) == (text, 90.5)
    await media.charged(5)
    assert await media.spent_usd() == 5 * Decimal("0.006") * 91 / 60
    for row in await media.offline.log():
        assert row["asked"]["language"] == "en"
        assert row["counts"] == {"audio_seconds": 90.5}


async def test_a_form_may_name_its_file_first_and_no_model_at_all(media: Media) -> None:
    form: Any = [("file", ("a.mp3", b"".join(mp3(mp3_size(60))))), ("language", (None, "en"))]
    for prefix in ("", "/v1", "/api/v1"):
        answer = await media.client.post(f"{prefix}/audio/transcriptions", files=form)
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == {"text", "usage"}
    assert {charge["model"] for charge in await media.charged(3)} == {"nova-3"}
    assert await media.spent_usd() == 3 * Decimal("0.0043")


async def test_a_recording_that_claims_to_be_short_is_charged_as_the_upstream_heard_it(media: Media) -> None:
    await media.offline.order("seconds=600")
    answer = await media.client.post(
        "/v1/audio/transcriptions", files={"file": ("a.wav", a_wav(1))}, data={"model": "whisper-1"}
    )
    assert answer.status_code == 200
    await media.charged()
    assert await media.spent_usd() == Decimal("0.06")


async def test_where_the_upstream_says_nothing_the_container_does_and_the_charge_says_so(media: Media) -> None:
    await media.offline.order("usage=none")
    files, asked = {"file": ("a.wav", a_wav(30))}, {"model": "whisper-1"}
    answer = await media.client.post("/v1/audio/transcriptions", files=files, data=asked)
    assert answer.status_code == 200, answer.text
    (charge,) = await media.charged()
    assert "usage_estimated" in charge["flags"]
    assert await media.spent_usd() == Decimal("0.003")


NO_RECORDINGS: list[tuple[str, bytes, dict[str, str], str]] = [
    ("a.txt", b"hello", {}, "file"), ("a.exe", b"MZ", {}, "file"), ("a.ogg", b"OggS", {}, "file"), ("noise", b"\0" * 64, {}, "file"), ("a.mp3", b"", {}, "file"),
    ("a.wav", a_wav(1), {"response_format": "docx"}, "response_format"),
]  # fmt: skip


async def test_what_cannot_be_written_down_is_refused_before_anybody_is_asked(media: Media) -> None:
    for name, content, fields, param in NO_RECORDINGS:
        answer = await media.client.post("/v1/audio/transcriptions", files={"file": (name, content)}, data=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), name
    assert (await media.ask("/v1/audio/transcriptions", {"model": "whisper-1"})).status_code == 415
    assert await media.offline.log() == []
    await media.nothing_charged()


@pytest.mark.long
async def test_a_recording_larger_than_25_mb_is_413_and_one_just_below_goes_through(media: Media) -> None:
    for size, status in ((25 * 1024 * 1024 + 1, 413), (25 * 1024 * 1024, 200)):
        answer = await media.client.post(
            "/v1/audio/transcriptions", files={"file": ("a.wav", a_wav(0) + bytes(size - 44))}
        )
        assert answer.status_code == status
    (row,) = await media.offline.log()
    assert row["bytes_in"] > 25 * 1024 * 1024
    await media.charged()


async def test_a_recording_that_nobody_wrote_down_costs_nothing(media: Media) -> None:
    for order, status in (*FAULTS, ("cut=1", 502)):
        await media.offline.order(order)
        answer = await media.client.post("/v1/audio/transcriptions", files={"file": ("a.wav", a_wav(1))})
        assert answer.status_code == status
    await media.nothing_charged()


# --- images ---------------------------------------------------------------------------------------


async def test_an_image_is_told_with_its_cost_and_shown_to_whoever_has_its_url(media: Media) -> None:
    body = {"model": "gpt-image-1", "prompt": "A futuristic cityscape at sunset", "quality": "medium", "n": 1}
    answer = await media.ask("/v1/images/generations", body)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    (charge,) = await media.charged()
    words = -(-len(body["prompt"]) // 4)  # type: ignore[arg-type]
    assert await media.spent_usd() == Decimal("0.0805") + words * Decimal("0.000005")
    assert '"cost":' + format(await media.spent_usd(), "f").rstrip("0") in answer.text
    assert (said["model"], charge["model"]) == ("gpt-image-1", "gpt-image-1")
    (image,) = said["data"]
    assert set(image) == {"url", "content_type"}
    async with httpx.AsyncClient() as stranger:
        url = media.reached(image["url"])
        shown = await stranger.get(url)
        assert (shown.status_code, shown.headers["content-type"]) == (200, image["content_type"])
        assert shown.content[:8] == b"\x89PNG\r\n\x1a\n"
        part = await stranger.get(url, headers={"range": "bytes=0-7"})
        assert (part.status_code, part.content) == (206, b"\x89PNG\r\n\x1a\n")
        head = await stranger.head(url)
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) == len(shown.content)
        for wrong in (url.replace("sig=", "sig=0"), url.partition("?")[0], url[:-1] + "x"):
            refused = await stranger.get(wrong)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "invalid_signature")


PRICED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("dall-e-3", {"size": "16:9"}, "1792x1024", "0.08"), ("dall-e-3", {"size": "9:16", "quality": "hd"}, "1024x1792", "0.12"),
    ("dall-e-3", {"size": "1:1"}, "1024x1024", "0.04"), ("dall-e-3", {}, None, "0.04"),
    ("flux-2-pro", {"size": "16:9", "quality": "2k"}, "16:9", "0.075"), ("flux-2-pro", {"n": 3}, None, "0.09"),
    ("flux-kontext-max", {"n": "2"}, None, "0.16"), ("nano-banana-pro", {"quality": "4k"}, None, "0.24"),
]  # fmt: skip


async def test_images_are_charged_by_their_number_size_and_quality(media: Media) -> None:
    for model, asked, sent, usd in PRICED:
        answer = await media.ask("/v1/images/generations", {"model": model, "prompt": "A sea", **asked})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == int(asked.get("n", 1))
        assert Decimal(str(answer.json()["cost"])) == Decimal(usd)
        row = (await media.offline.log())[-1]
        assert (row["asked"].get("size"), row["asked"]["response_format"]) == (sent, "b64_json")
    await media.charged(len(PRICED))
    assert await media.spent_usd() == sum(Decimal(usd) for *_, usd in PRICED)


async def test_base64_comes_to_whoever_asks_for_it(media: Media, sdk: openai.AsyncOpenAI) -> None:
    made = await sdk.images.generate(model="dall-e-3", prompt="A sea", response_format="b64_json")
    assert made.data is not None
    assert base64.b64decode(made.data[0].b64_json or "")[:4] == b"\x89PNG"
    assert made.data[0].url is None
    await media.charged()


async def test_an_image_of_an_image_is_an_edit(media: Media, sdk: openai.AsyncOpenAI) -> None:
    body = {"model": "flux-2-pro-i2i", "prompt": "Bluer", "image_url": DATA_URL}
    answer = await media.ask("/v1/images/generations", body)
    assert answer.status_code == 200, answer.text
    edited = await sdk.images.edit(model="gpt-image-1", prompt="Bluer", image=("sea.png", PICTURE), quality="low")
    assert edited.data is not None
    assert edited.data[0].url is not None
    rows = await media.offline.log()
    assert [row["path"] for row in rows] == ["/v1/images/edits"] * 2
    await media.charged(2)
    assert await media.spent_usd() == Decimal("0.045") + Decimal("0.016") + 2 * Decimal("0.000005") + 323 * Decimal(
        "0.00001"
    )


ART = {"model": "dall-e-3", "prompt": "x"}
NO_IMAGES: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"), ({"prompt": ""}, "prompt"), ({"n": 0}, "n"), ({"n": 11}, "n"), ({"n": 1.5}, "n"), ({"n": True}, "n"),
    ({"stream": True}, "stream"), ({"response_format": "gif"}, "response_format"), ({"image_url": "http://127.0.0.1/a.png"}, "image_url"),
    ({"image_url": "https://169.254.169.254/a"}, "image_url"), ({"image_url": "file:///etc/passwd"}, "image_url"),
    ({"image_url": "data:text/html;base64,PGI+"}, "image_url"), ({"size": 7.5, "quality": ["hd"]}, "quality"),
]  # fmt: skip


async def test_images_that_cannot_be_made_are_refused_before_anybody_is_asked(media: Media) -> None:
    for changed, param in NO_IMAGES:
        answer = await media.ask("/v1/images/generations", ART | changed)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), changed
    assert await media.offline.log() == []
    await media.nothing_charged()


async def test_images_that_did_not_come_cost_nothing(media: Media) -> None:
    for order, status in (*FAULTS, ("cut=1", 502)):
        await media.offline.order(order)
        assert (await media.ask("/v1/images/generations", ART)).status_code == status
    await media.nothing_charged()


async def test_a_caller_who_hangs_up_on_an_image_pays_for_it(media: Media) -> None:
    await media.offline.order("delay=0.3")
    with pytest.raises(httpx.ReadTimeout):
        await media.ask("/v1/images/generations", {"model": "dall-e-3", "prompt": "A sea"}, timeout=0.1)
    await media.charged()
    assert await media.spent_usd() == Decimal("0.04")


async def test_an_image_is_shown_though_billing_is_away_and_charged_when_it_is_back(media: Media) -> None:
    await media.offline.order("delay=0.2")

    async def cut() -> None:
        await eventually(lambda: open_holds(media.rig) == 1)
        media.wire.is_cut = True

    answer, _ = await asyncio.gather(
        media.ask("/v1/images/generations", {"model": "dall-e-3", "prompt": "A sea"}), cut()
    )
    assert (answer.status_code, answer.json()["cost"], answer.json()["cost_estimated"]) == (200, 0.04, True)
    assert calls(media.rig) == []
    media.wire.is_cut = False
    await media.charged()
    assert await media.spent_usd() == Decimal("0.04")


async def test_no_key_of_ours_and_no_address_reaches_the_caller_and_no_key_of_theirs_the_upstream(media: Media) -> None:
    await media.offline.order("status=400")
    refused = await media.ask("/v1/images/generations", {"model": "dall-e-3", "prompt": "A sea"})
    made = await media.ask("/v1/images/generations", {"model": "dall-e-3", "prompt": "A sea"})
    for answer in (refused, made):
        everything = answer.text + str(answer.headers)
        assert "sk-upstreams-own" not in everything
        assert urlsplit(media.offline.url).netloc not in everything
    theirs = hashlib.sha256(media.customer.api_key.encode()).hexdigest()
    assert theirs not in {row["key_sha256"] for row in await media.offline.log()}
    await media.charged()


async def test_media_paths_are_asked_in_their_own_way(media: Media) -> None:
    for method, path in (
        ("GET", "/v1/audio/speech"),
        ("GET", "/v1/videos"),
        ("POST", "/v1/media/gen_x/0"),
        ("DELETE", "/v1/images/edits"),
    ):
        assert (await media.client.request(method, path)).status_code == 405
    for path in ("/v1/media", "/v1/media/gen_x", "/v1/media/gen_x/0/1", "/v1/audio", "/audio/speech/x"):
        assert (await media.client.get(path)).status_code == 404
