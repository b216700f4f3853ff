"""Posting to the URL that a stranger named: to an address judged at that moment, once, following nothing, reading no answer.

post ── grammar ── resolve ── judge every address ── dial the judged one (TLS and Host keep the name) ── status alone
"""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import httpx

from app.adapters.addresses import (
    NotAllowed,
    OutsideUrl,
    Resolve,
    allowed_addresses,
    read_webhook_url,
    resolve_for_notices,
)
from app.kernel.errors import InvalidField
from app.notices.ways import Outcome, Sent

_TRIED: Final = 2
"""Of a host's addresses, one after the other, where the first cannot be reached."""
_GONE: Final = 410
_LONGEST_SECONDS: Final = 86_400


@dataclass(frozen=True, slots=True)
class PostPatience:
    """How long a receiver may take: to be reached, and in all until its status is there."""

    connect_seconds: float = 5.0
    total_seconds: float = 15.0


class HttpWebhooks:
    """Webhooks over httpx, a connection for each: an idle one is a stranger's to keep, and bound to an address of old."""

    def __init__(
        self,
        *,
        allow_private: bool,
        patience: PostPatience | None = None,
        resolve: Resolve = resolve_for_notices,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        self._allow_private, self._resolve = allow_private, resolve
        self._patience = patience or PostPatience()
        self._trusted = trusted or ssl.create_default_context()

    def shown(self, url: str, *, is_operators: bool = False) -> str:
        try:
            read = self._read(url, is_operators)
        except NotAllowed as error:
            more = "" if self._allow_private else ", on the public internet, with port 443 or one from 1024 up"
            raise InvalidField(
                f"webhook_url must be https://host/…{more}: this is {error}", param="webhook_url"
            ) from None
        start, _, rest = read.text.partition("://")
        host = rest.partition("/")[0].partition("?")[0]
        return f"{start}://{host}" + ("" if rest in (host, f"{host}/") else "/…")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, is_operators: bool = False) -> Sent:
        try:
            async with asyncio.timeout(self._patience.total_seconds):
                return await self._posted(self._read(url, is_operators), body, headers, is_operators)
        except NotAllowed:
            return Sent(Outcome.FAILED, error="not_allowed")
        except TimeoutError:
            return Sent(Outcome.FAILED, error="timeout")
        except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL):  # ValueError: what resolvers say to odd names
            return Sent(Outcome.FAILED, error="unreachable")

    def _read(self, url: str, is_operators: bool) -> OutsideUrl:
        return read_webhook_url(url, allow_private=self._allow_private or is_operators)

    async def _posted(self, url: OutsideUrl, body: bytes, headers: Mapping[str, str], is_operators: bool) -> Sent:
        addresses = await allowed_addresses(url, self._resolve, allow_private=self._allow_private or is_operators)
        failed: httpx.HTTPError | None = None
        for address in addresses[:_TRIED]:
            try:
                return await self._posted_to(address, url, body, headers)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:  # nothing was sent
                failed = error
        assert failed is not None
        raise failed

    async def _posted_to(self, address: str, url: OutsideUrl, body: bytes, headers: Mapping[str, str]) -> Sent:
        timeout = httpx.Timeout(self._patience.total_seconds, connect=self._patience.connect_seconds)
        own = {**headers, "host": _authority(url), "connection": "close", "accept-encoding": "identity"}
        async with httpx.AsyncClient(
            verify=self._trusted, timeout=timeout, follow_redirects=False, trust_env=False
        ) as client:
            request = client.build_request(
                "POST", _at(address, url), content=body, headers=own, extensions={"sni_hostname": url.host}
            )
            answer = await client.send(request, stream=True)
            try:  # its body may be of any length, and there is nothing in it for us
                return _judged(answer)
            finally:
                await answer.aclose()


def _authority(url: OutsideUrl) -> str:
    host = f"[{url.host}]" if ":" in url.host else url.host
    return host if url.port == (443 if url.is_secure else 80) else f"{host}:{url.port}"


def _at(address: str, url: OutsideUrl) -> httpx.URL:
    """The same path and query, at exactly this address."""
    rest = url.text.partition("://")[2]
    start = next((at for at, char in enumerate(rest) if char in "/?"), len(rest))
    path = rest[start:] if rest[start:].startswith("/") else f"/{rest[start:]}"
    host = f"[{address}]" if ":" in address else address
    return httpx.URL(f"{'https' if url.is_secure else 'http'}://{host}:{url.port}").copy_with(raw_path=path.encode())


def _judged(answer: httpx.Response) -> Sent:
    status = answer.status_code
    if answer.is_success:
        return Sent(Outcome.DELIVERED, status)
    if status == _GONE:
        return Sent(Outcome.GONE, status, "gone")
    return Sent(Outcome.FAILED, status, f"status_{status}", _retry_after(answer.headers.get("retry-after", "")))


def _retry_after(text: str) -> int | None:
    """Seconds, or a date (RFC 9110); None for anything else."""
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return min(int(text), _LONGEST_SECONDS)
    try:
        seconds = (parsedate_to_datetime(text).astimezone(UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return max(0, min(int(seconds), _LONGEST_SECONDS))
