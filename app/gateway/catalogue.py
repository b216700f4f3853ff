"""What Satmeter's public catalogue says, as it was some seconds ago: the models that are sold, and what their prices depend on."""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, Final

import aiohttp
import msgspec

from app.gateway.costs import Facts

_GOOD_FOR_SECONDS: Final = 5.0
_MOST_MODELS: Final = 4096
_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)


class CatalogueAway(Exception):
    """Satmeter could not be asked."""


class Catalogue:
    """Asks Satmeter in the background: nobody waits for what is asked about a model's prices."""

    def __init__(self, session: aiohttp.ClientSession, meter_url: str) -> None:
        self._session, self._url = session, meter_url
        self._facts: dict[str, tuple[float, Facts | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def facts(self, model: str) -> Facts | None:
        """None while nothing is known of the model; it is asked about meanwhile."""
        at, facts = self._facts.get(model, (0.0, None))
        age = time.monotonic() - at
        if age > _GOOD_FOR_SECONDS:
            self._facts[model] = time.monotonic(), facts if age < 2 * _GOOD_FOR_SECONDS else None
            self._start(self._learn(model))
        return self._facts[model][1]

    async def known(self, model: str) -> Facts | None:
        """The same, for whoever cannot go on without; None where there is no such model, or Satmeter cannot be asked."""
        if self._facts.get(model, (0.0, None))[1] is None:
            await self._learn(model)
        return self._facts.get(model, (0.0, None))[1]

    async def models(self, path: str, query: dict[str, str]) -> dict[str, msgspec.Raw]:
        """One of the lists of models, each field of it as it was written. Raises CatalogueAway."""
        return await self._get(path, query)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _learn(self, model: str) -> None:
        with contextlib.suppress(CatalogueAway):
            lines = msgspec.json.decode((await self._get("/v1/prices", {"model": model}))["data"])
            if len(self._facts) > _MOST_MODELS:
                self._facts.clear()
            self._facts[model] = time.monotonic(), Facts.of(lines) if lines else None

    async def _get(self, path: str, query: dict[str, str]) -> dict[str, msgspec.Raw]:
        try:
            async with self._session.get(self._url + path, params=query, timeout=_TIMEOUT) as response:
                body = await response.read()
                if response.status != 200:
                    raise CatalogueAway(f"it answered {response.status}")
                return _FIELDS.decode(body)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise CatalogueAway(type(error).__name__) from error

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
