"""Pictures that a caller points to: a data URL, or one file of the public internet, never anything of our own network.

A URL that a stranger chose is a way into the network that we stand in (SSRF): only https on its own port is asked, each
address of its name is judged, the judged ones are those that are dialled, and nothing is followed.
"""

import base64
import binascii
import ipaddress
import re
import socket
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from app.gateway.errors import InvalidField
from app.gateway.media import kind_of

MOST_BYTES: Final = 25 * 1000 * 1000
_MOST_URL_CHARS: Final = 2048
_TIMEOUT: Final = aiohttp.ClientTimeout(total=20, sock_connect=5)
_DATA: Final = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)
_PICTURES: Final = ("png", "jpg", "webp")
_PRIVATE_NAMES: Final = (
    "localhost",
    "local",
    "internal",
    "intranet",
    "lan",
    "home",
    "corp",
    "private",
    "arpa",
    "onion",
)
_PUBLIC_IPV6: Final = ipaddress.IPv6Network("2000::/3")
_SPECIAL: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.175.48.0/24", "2620:4f:8000::/48", "3fff::/20",
        ),
    )
)  # fmt: skip
"""What Python takes for a part of the internet, in some of its versions, and is no host of its own there. Source: IANA."""


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet's own, with no other address inside it."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if any(address in network for network in _SPECIAL):
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    hides_another = address.sixtofour or address.teredo or address.ipv4_mapped or address.scope_id
    return address in _PUBLIC_IPV6 and address.is_global and not hides_another


class _Judging(AbstractResolver):
    """Resolves names to public addresses alone: one that is not spoils them all, for the next answer might be it."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if not found or not all(is_public(each["host"]) for each in found):
            raise OSError("not a public address")
        return found

    async def close(self) -> None:
        await self._inner.close()


class Fetcher:
    """Fetches what callers point to, on connections that serve nothing else. `resolver` is who knows names."""

    def __init__(self, resolver: AbstractResolver | None = None) -> None:
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    async def picture(self, url: Any, param: str = "image_url") -> tuple[bytes, str]:
        """A picture's bytes, and how its name ends. Raises InvalidField, which tells nothing of what is where."""
        if not isinstance(url, str):
            raise InvalidField("must be a URL", param=param)
        raw = _inline(url, param) if url[:5].lower() == "data:" else await self._fetched(url, param)
        kind = kind_of(raw[:16])
        if kind not in _PICTURES:
            raise InvalidField(f"{param} is no picture in PNG, JPEG or WebP", param=param)
        return raw, kind

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _fetched(self, text: str, param: str) -> bytes:
        url = checked(text, param)
        try:
            async with self._opened().get(url, timeout=_TIMEOUT, allow_redirects=False) as response:
                if response.status != 200:
                    raise InvalidField(f"{param} could not be fetched: it must answer 200", param=param)
                return await _bounded(response, param)
        except (aiohttp.ClientError, TimeoutError, OSError):
            raise InvalidField(f"{param} could not be fetched", param=param) from None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = _Judging(self._resolver or ThreadedResolver())
            connector = aiohttp.TCPConnector(resolver=resolver, limit=8, force_close=True, use_dns_cache=False)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                headers={"user-agent": "Satmeter"},
            )
        return self._session


def checked(text: str, param: str) -> URL:
    """A URL that may be asked. Raises InvalidField."""
    problem = InvalidField(f"{param} must be a public https:// URL, or a data: URL of a picture", param=param)
    if len(text) > _MOST_URL_CHARS or not text.isascii() or any(ord(char) <= 32 for char in text):
        raise problem
    try:
        url = URL(text)
        host, port = url.host or "", url.port
    except ValueError:
        raise problem from None
    if url.scheme != "https" or port != 443 or url.user is not None or url.password is not None or "\\" in text:
        raise problem
    is_address = ":" in host or re.fullmatch(r"[0-9.]+", host) is not None
    is_name = "." in host and host.rstrip(".").rpartition(".")[2].lower() not in _PRIVATE_NAMES
    if not (is_public(host) if is_address else is_name):
        raise problem
    return url


async def _bounded(response: aiohttp.ClientResponse, param: str) -> bytes:
    taken = bytearray()
    async for chunk in response.content.iter_chunked(64 * 1024):
        taken += chunk
        if len(taken) > MOST_BYTES:
            raise InvalidField(f"{param} is larger than 25 MB", param=param)
    return bytes(taken)


def _inline(url: str, param: str) -> bytes:
    head = _DATA.match(url)
    if head is None:
        raise InvalidField(f"{param} must be data:image/…;base64,…", param=param)
    if (len(url) - head.end()) * 3 // 4 > MOST_BYTES:
        raise InvalidField(f"{param} is larger than 25 MB", param=param)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidField(f"{param} is not base64", param=param) from None
