"""Many media calls of every sort at once, with faults between them: what was charged is what the upstream's own log comes to."""

import asyncio
import contextlib
import random
from decimal import Decimal
from math import ceil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client.houses import calls, eventually, open_holds
from tests.gateway.media_house import DATA_URL, Media, media_house
from tests.gateway.test_media_rows import a_wav
from tests.gateway.test_videos import left_alone
from tests.rig import Rig
from tests.sandbox.upstream import running_upstream

FAULTS = (
    "",
    "",
    "",
    "",
    "status=500",
    "status=400",
    "status=429",
    "cut=0",
    "cut=1",
    "delay=0.05",
    "pace=0.01",
    "usage=none",
)
CALLS = 120
SEED = 20261128
PRICES = {
    "tts-1": Decimal("0.000015"), "deepgram_aura_2": Decimal("0.00003"), "whisper-1": Decimal("0.0001"),
    "dall-e-3": Decimal("0.04"), "flux-2-pro": Decimal("0.03"), "flux-2-pro-i2i": Decimal("0.045"),
    "kling-2.1-pro": Decimal("0.0575"), "veo3-fast": Decimal("0.15"),
}  # fmt: skip


async def one(media: Media, dice: random.Random, number: int) -> None:
    """Some call, some fault, and a caller who may hang up."""
    fault = f"[sandbox: {dice.choice(FAULTS)}]"
    patience = dice.choice((30, 30, 30, 0.03))
    kind = dice.choice(("speech", "transcription", "image", "edit", "video"))
    words = f"{fault} {number} " + "la " * dice.randrange(100)
    with contextlib.suppress(httpx.TransportError):
        if kind == "speech":
            body = {"model": dice.choice(("tts-1", "deepgram_aura_2")), "input": words}
            await media.ask("/v1/audio/speech", body, timeout=patience)
        elif kind == "transcription":
            files = {"file": (f"{number}.wav", a_wav(dice.randrange(1, 90)))}
            data = {"model": "whisper-1", "prompt": fault}
            await media.client.post("/v1/audio/transcriptions", files=files, data=data, timeout=patience)
        elif kind == "image":
            wish = {"model": dice.choice(("dall-e-3", "flux-2-pro")), "prompt": words, "n": dice.randrange(1, 3)}
            await media.ask("/v1/images/generations", wish, timeout=patience)
        elif kind == "edit":
            body = {"model": "flux-2-pro-i2i", "prompt": words, "image_url": DATA_URL}
            await media.ask("/v1/images/generations", body, timeout=patience)
        else:
            model = dice.choice(("kling-2.1-pro", "veo3-fast"))
            body = {"model": model, "prompt": words + dice.choice(("", "[sandbox: fail]")), "duration": "5"}
            await media.ask("/v1/videos", body, timeout=patience)


def owed_usd(row: dict[str, Any]) -> Decimal:
    """What the customer owes for one call by the upstream's log: for what it made, where a byte of it came out."""
    counts, price = row["counts"], PRICES[row["model"]]
    is_speech = row["path"].endswith("/speech")
    cut, film_seconds = row["order"].get("cut"), counts.get("video_seconds", 0)
    if row["status"] >= 400:
        return Decimal(0)
    if film_seconds:  # found again, whatever became of the answer
        return price * int(film_seconds)
    if cut == 0 or (cut and not is_speech):  # half a body in JSON is none
        return Decimal(0)
    units: int = sum(ceil(counts.get(name, 0)) for name in ("characters", "audio_seconds", "images"))
    return price * units


@pytest.mark.long
async def test_the_charges_of_a_mixed_run_with_faults_are_what_the_upstreams_log_comes_to(
    rig: Rig, tmp_path: Path
) -> None:
    dice = random.Random(SEED)
    customer = await rig.customer("500")
    async with running_upstream() as offline, media_house(rig, offline, tmp_path, customer=customer) as media:
        for start in range(0, CALLS, 12):
            await asyncio.gather(*(one(media, dice, number) for number in range(start, start + 12)))
        await left_alone(media, 60)
        await eventually(lambda: not open_holds(rig), 20)
        assert await media.gateway.meter.drain(20) == 0
        posts = [row for row in await offline.log() if row["method"] == "POST"]
        assert len({row["outcome"] for row in posts} & {"completed", "refused", "cut"}) == 3
        owed = sum(owed_usd(row) for row in posts)
        assert 1 < owed == 500 - await rig.balance(customer)
        assert len({call["request_id"] for call in calls(rig)}) == len(calls(rig))
