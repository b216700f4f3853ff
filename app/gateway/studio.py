"""The media rows together: which path is which row, what they share, and the work that goes on by itself."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp

from app.client import Meter
from app.gateway import videos
from app.gateway.exchange import Exchange
from app.gateway.fetching import Fetcher
from app.gateway.images import edits, generations
from app.gateway.jobs import JobStore
from app.gateway.media import BadSignature, MediaStore
from app.gateway.paths import Route, Row
from app.gateway.settings import GatewaySettings
from app.gateway.speech import speech
from app.gateway.transcriptions import transcriptions

_SWEPT_EVERY_SECONDS: Final = 3600
_SECONDS_A_DAY: Final = 86_400


class Studio:
    """What speech, transcriptions, images and videos of one gateway share; open for as long as the gateway is."""

    def __init__(self, settings: GatewaySettings, meter: Meter, session: aiohttp.ClientSession) -> None:
        self.settings, self.meter, self.session = settings, meter, session
        self.media = MediaStore(_made(settings.folder / "media"), settings.public_url, settings.media_days)
        self.fetcher = Fetcher()
        jobs = JobStore(_made(settings.folder / "videos"))
        self.filming = videos.Filming(self, jobs, settings.films_looked_for_every_seconds)

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator["Studio"]:
        """While the block runs, films are finished, and what is too old is forgotten."""
        working = [asyncio.create_task(self.filming.run()), asyncio.create_task(self._sweep())]
        try:
            yield self
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
            await self.fetcher.close()

    async def _sweep(self) -> None:
        while True:
            now = time.time()
            await asyncio.to_thread(self.media.sweep, now)
            await asyncio.to_thread(self.filming.jobs.sweep, now - self.settings.media_days * _SECONDS_A_DAY)
            await asyncio.sleep(_SWEPT_EVERY_SECONDS)


def _in_studio(row: Callable[[Studio, Exchange], Awaitable[None]]) -> Row:
    async def answer(gateway: Any, exchange: Exchange) -> None:
        await row(gateway.studio, exchange)

    return answer


async def _make_video(studio: Studio, exchange: Exchange) -> None:
    await videos.create(studio, studio.filming, exchange)


async def _show_video(studio: Studio, exchange: Exchange) -> None:
    await videos.show(studio, studio.filming, exchange, exchange.path.rpartition("/")[2])


async def _show_media(studio: Studio, exchange: Exchange) -> None:
    *_, generation, n = exchange.path.split("/")
    await show_media(studio.media, exchange, generation, n)


MEDIA_ROUTES: Final = (
    Route("POST", "/audio/speech", _in_studio(speech)),
    Route("POST", "/audio/transcriptions", _in_studio(transcriptions)),
    Route("POST", "/images/generations", _in_studio(generations)),
    Route("POST", "/images/edits", _in_studio(edits)),
    Route("POST", "/videos", _in_studio(_make_video)),
    Route("GET", "/videos/{id}", _in_studio(_show_video)),
    Route("GET", "/media/{id}/{n}", _in_studio(_show_media), needs_key=False),
)


async def show_media(media: MediaStore, exchange: Exchange, generation: str, n: str) -> None:
    """GET /v1/media/{id}/{n}?sig=&exp=: the bytes, to whoever has the signed URL."""
    query = exchange.query
    if not {"sig", "exp"} <= query.keys():
        raise BadSignature
    found = media.opened(generation, n, query["sig"], query["exp"], time.time())
    with found.file:
        status, headers, start, end = found.part(exchange.headers.get("range"))
        await exchange.start(status, headers)
        if exchange.method != "HEAD":
            async for chunk in found.chunks(start, end):
                await exchange.write(chunk)
        await exchange.end()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
