"""How bytes get to Satmeter: a Protocol of one verb, and httpx as what is taken where nobody gives another."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import httpx


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    """By lower-case names."""
    body: bytes


class NotReached(Exception):
    """Nothing was sent: it may be sent again, and nothing has happened."""


class AnswerLost(Exception):
    """It was sent, and nobody knows what became of it: it may be sent again under the same id alone."""


class Transport(Protocol):
    """Posts JSON and brings the answer. It repeats nothing: retry.py decides what is safe to repeat.

    Raises NotReached or AnswerLost, and nothing else, within `timeout_seconds` all in all.
    """

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Answer: ...

    async def close(self) -> None: ...


class HttpxTransport:
    """A Transport on an httpx client of its own, which keeps up to `connections` open."""

    def __init__(self, *, connections: int = 100) -> None:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.AsyncClient(limits=limits, trust_env=False)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Answer:
        try:
            async with asyncio.timeout(timeout_seconds):  # httpx's own is for each step, and slow steps add up
                response = await self._client.post(url, content=body, headers=dict(headers), timeout=timeout_seconds)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NotReached(str(error)) from error
        except (httpx.HTTPError, TimeoutError) as error:
            raise AnswerLost(str(error)) from error
        return Answer(response.status_code, response.headers, response.content)

    async def close(self) -> None:
        await self._client.aclose()
