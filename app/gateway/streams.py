"""Streams that are open: looked at once a second, so that none of them costs a timer."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Final, Protocol

_PING_SECONDS: Final = 15.0
PING: Final = b": ping\n\n"


class Open(Protocol):
    """A stream under way."""

    last_sent_at: float
    """When something was sent last, on time.monotonic()'s clock."""
    is_sending: bool

    @property
    def is_gone(self) -> bool: ...

    async def ping(self) -> None:
        """A comment that keeps proxies awake."""

    def cut(self) -> None:
        """Stop reading the upstream: its caller is gone, and it was read on for long enough."""


class Streams:
    def __init__(self, client_gone_seconds: float) -> None:
        self._client_gone_seconds = client_gone_seconds
        self._open: dict[Open, float | None] = {}
        """Each with the moment since which its caller is gone."""
        self._pings: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def opened(self, stream: Open) -> Iterator[None]:
        self._open[stream] = None
        try:
            yield
        finally:
            del self._open[stream]

    def look(self, now: float) -> None:
        for stream, gone_at in list(self._open.items()):
            if stream.is_gone:
                if gone_at is None:
                    gone_at = self._open[stream] = now
                if now - gone_at >= self._client_gone_seconds:
                    stream.cut()
            elif now - stream.last_sent_at > _PING_SECONDS and not stream.is_sending:
                task = asyncio.create_task(stream.ping())
                self._pings.add(task)
                task.add_done_callback(self._pings.discard)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Looked at once a second while the block runs."""

        async def watch() -> None:
            while True:
                await asyncio.sleep(1)
                self.look(time.monotonic())

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, *self._pings, return_exceptions=True)
