"""Asking a backend over HTTP: in turn, with breaker, deadline, retries for GET alone, and an answer of bounded size.

ask ── turn ── breaker ── deadline ── retries (GET only) ── one bounded exchange

How long a question waits for its turn is our doing: neither the breaker nor the deadline counts it.
"""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import httpx

from app.adapters.breaker import Breaker
from app.kernel import tracing
from app.topups.gateway import GatewayBusy, GatewayUnavailable

MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024  # a full page of invoices is about 300 kB, more where metadata is rich

_RETRIED_STATUSES: Final = frozenset({502, 503, 504})
_RETRIED_ERRORS: Final = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_JITTER: Final = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a backend and how often to ask again. One question, retries included, ends at the deadline."""

    connect_seconds: float = 5.0
    read_seconds: float = 15.0  # making a BOLT11 can mean waiting for a Lightning node behind Tor
    write_seconds: float = 10.0
    turn_seconds: float = 5.0
    at_once: int = 64
    deadline_seconds: float = 20.0
    health_seconds: float = 3.0
    retries: int = 2
    backoff_seconds: float = 0.2
    break_after: int = 5
    break_window_seconds: float = 60.0
    cooldown_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


class Asker:
    """Asks one backend. A `client` that is passed in stays its owner's to close."""

    def __init__(
        self,
        backend: str,
        base_url: str,
        headers: Mapping[str, str],
        *,
        client: httpx.AsyncClient | None = None,
        patience: Patience | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        own_words: frozenset[int] = frozenset(),
    ) -> None:
        """`own_words` are the statuses from 500 up that the backend itself says things with."""
        self.patience = patience or Patience()
        self._backend = backend
        self._base_url = base_url
        self._headers = {"Accept": "application/json", "Content-Type": "application/json", **headers}
        # So that the bound on an answer's size is a bound on what travels.
        self._headers["Accept-Encoding"] = "identity"
        self._own_words = own_words
        self._owns_client = client is None
        self._turns = asyncio.Semaphore(self.patience.at_once)
        # More connections than turns, so that a question about health, which takes none, does not wait for one.
        limits = httpx.Limits(max_connections=self.patience.at_once + 8, max_keepalive_connections=20)
        self._client = client or httpx.AsyncClient(trust_env=False, follow_redirects=False, limits=limits)
        self._breaker = Breaker(
            backend,
            after=self.patience.break_after,
            window_seconds=self.patience.break_window_seconds,
            cooldown_seconds=self.patience.cooldown_seconds,
            monotonic=monotonic,
        )

    async def ask(
        self, method: str, path: str, query: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> Answer:
        """An answer of the backend's own, within the deadline. Raises GatewayUnavailable, which the breaker counts, or
        GatewayBusy, which it does not, if it is not this question's turn in time.

        Only GET is ever asked again. An answer that is merely wrong is not counted: one rotten invoice must
        not shut the door for all others.
        """
        retries = self.patience.retries if method == "GET" else 0
        async with self._turn():
            return await self._ask(method, path, query, content, retries)

    async def _ask(
        self, method: str, path: str, query: Mapping[str, str] | None, content: bytes | None, retries: int
    ) -> Answer:
        with self._breaker.watch():
            try:
                async with asyncio.timeout(self.patience.deadline_seconds):
                    answer = await self._insist(method, path, query, content, retries)
            except TimeoutError:
                seconds = self.patience.deadline_seconds
                raise GatewayUnavailable(f"{self._backend} did not answer within {seconds:g} s") from None
            if (answer.status >= 500 and answer.status not in self._own_words) or answer.status == 429:
                raise GatewayUnavailable(f"{self._backend} answered HTTP {answer.status}")
            return answer

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.patience.turn_seconds):
                await self._turns.acquire()
        except TimeoutError:
            raise GatewayBusy(f"{self.patience.at_once} questions to {self._backend} are under way already") from None
        try:
            yield
        finally:
            self._turns.release()

    async def exchange(
        self, method: str, path: str, query: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> Answer:
        """One HTTP exchange, past the breaker. Raises httpx.HTTPError, or GatewayUnavailable if the answer is too large."""
        with tracing.asking(self._backend, method) as (carried, span):
            request = self._client.build_request(
                method,
                self._base_url + path,
                params=query,
                content=content,
                headers=self._headers | carried,
                timeout=self._timeout(),
            )
            # Said here as well, since a client that was passed in may have other habits.
            response = await self._client.send(request, stream=True, auth=None, follow_redirects=False)
            try:
                body = await self._bounded(response)
            finally:
                await response.aclose()
            if span is not None:
                span.set_attribute("http.response.status_code", response.status_code)
            return Answer(response.status_code, body)

    async def close(self) -> None:
        """Give back the connections, unless the client is somebody else's."""
        if self._owns_client:
            await self._client.aclose()

    async def _insist(
        self, method: str, path: str, query: Mapping[str, str] | None, content: bytes | None, retries: int
    ) -> Answer:
        """Exchange, and again up to `retries` times if the network or a reverse proxy failed."""
        for retries_left in range(retries, -1, -1):
            try:
                answer = await self.exchange(method, path, query, content)
                if retries_left == 0 or answer.status not in _RETRIED_STATUSES:
                    return answer
            except httpx.PoolTimeout as error:
                raise GatewayBusy(f"no connection to {self._backend} was free") from error
            except httpx.HTTPError as error:
                if retries_left == 0 or not isinstance(error, _RETRIED_ERRORS):
                    message = f"{self._backend} could not be reached: {type(error).__name__}"
                    raise GatewayUnavailable(message) from error
            await asyncio.sleep(self.patience.backoff_seconds * (retries - retries_left + _JITTER.uniform(0.5, 1.5)))
        raise AssertionError("the last try returns or raises")

    async def _bounded(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise GatewayUnavailable(f"{self._backend} answered rubbish: more than {MAX_ANSWER_BYTES} bytes")
        return bytes(body)

    def _timeout(self) -> httpx.Timeout:
        patience = self.patience
        return httpx.Timeout(
            connect=patience.connect_seconds,
            read=patience.read_seconds,
            write=patience.write_seconds,
            pool=patience.turn_seconds,
        )


def checked_url(text: str, setting: str) -> str:
    """An absolute address without user, query or fragment. Raises ValueError, naming the setting."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise ValueError(f"{setting} is not a URL") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{setting} must be an absolute http:// or https:// address")
    if url.userinfo or url.query or url.fragment:
        raise ValueError(f"{setting} must have no user, query or fragment")
    return str(url).rstrip("/")


def checked_key(text: str, setting: str) -> str:
    """An API key fit for a header. Raises ValueError, naming the setting but not the key."""
    # A stray newline would make the HTTP library quote the whole header in its error.
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError(f"{setting} is empty or has characters that no API key has")
    return text
