"""Where a customer may send us: the grammar of a URL, and which of its addresses are on the public internet.

A URL that a stranger chose can point into our own network (SSRF). So its grammar is narrow enough for every parser
to read it the same way, each address its name resolves to is judged, and the judged address is the one dialled.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, TypeAlias

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Every address of a host name, for a port. Raises OSError if there is none."""

MAX_URL_CHARS: Final = 512
MAX_ADDRESSES: Final = 16  # a name with more is refused, not cut short: one of the others might be ours

_URL: Final = re.compile(
    r"(?P<scheme>wss?|https?)://"
    r"(?:\[(?P<ipv6>[0-9a-f:.]{2,45})\]|(?P<host>[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9])?))"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<rest>(?:[/?][!\"$-\[\]-~]*)?)"  # printable ASCII without `#` and backslash
)
_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMERIC: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
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

# Source: IANA's special-purpose registries for IPv4 and IPv6, and RFC 7526 for the old 6to4 anycast.
_IPV4_SPECIAL: Final = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# What is not in here is no public unicast: loopback, IPv4 in IPv6's clothes, NAT64, ULA, link-local, multicast.
_IPV6_PUBLIC: Final = IPv6Network("2000::/3")
_IPV6_SPECIAL: Final = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, which hides an IPv4 address, ORCHID, benchmarking
        "2001:db8::/32",
        "2002::/16",  # 6to4 hides an IPv4 address
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)


# Threads of their own: a name that never answers holds one, and cannot be called off. Not even all names that strangers
# have us try at once may keep a connected wallet, or the rest of the service, from resolving.
_RESOLVERS: Final = ThreadPoolExecutor(max_workers=32, thread_name_prefix="relay-resolver")
_PROBING_RESOLVERS: Final = ThreadPoolExecutor(max_workers=8, thread_name_prefix="relay-probe-resolver")
_NOTICE_RESOLVERS: Final = ThreadPoolExecutor(max_workers=16, thread_name_prefix="notice-resolver")


class NotAllowed(Exception):
    """This is no place to connect to. Never shown: what it would tell is how our network looks from inside."""


@dataclass(frozen=True, slots=True)
class OutsideUrl:
    """A URL in lower case, taken apart. `host` has no brackets, and `is_literal` if it is an address."""

    text: str
    is_secure: bool
    host: str
    port: int
    is_literal: bool


RelayUrl: TypeAlias = OutsideUrl


def read_relay_url(text: str, *, allow_private: bool) -> OutsideUrl:
    """Raises NotAllowed for anything but wss:// to a public-looking host; with `allow_private` ws:// and any host too."""
    return _read(text, "ws", allow_private=allow_private)


def read_webhook_url(text: str, *, allow_private: bool) -> OutsideUrl:
    """The same for https://, and with `allow_private` http://."""
    return _read(text, "http", allow_private=allow_private)


def _read(text: str, scheme: str, *, allow_private: bool) -> OutsideUrl:
    """Plain where it is `scheme`, encrypted where it is that with an s.

    A port is 443 or one from 1024 up: the others belong to services that are none of these.
    """
    # Before lower-casing: the Kelvin sign becomes a plain k then.
    found = _URL.fullmatch(_lowered(text)) if len(text) <= MAX_URL_CHARS and text.isascii() else None
    if found is None or found["scheme"] not in (scheme, f"{scheme}s"):
        raise NotAllowed("not such a URL")
    is_secure = found["scheme"] != scheme
    port = int(found["port"] or (443 if is_secure else 80))
    host = found["ipv6"] or found["host"]
    is_literal = _is_literal(host, is_ipv6=found["ipv6"] is not None)
    if port > 65535:
        raise NotAllowed("no such port")
    if not allow_private:
        _refuse_private(host, port, is_secure=is_secure, is_literal=is_literal)
    return OutsideUrl(_lowered(text), is_secure, host, port, is_literal)


async def allowed_addresses(url: OutsideUrl, resolve: Resolve, *, allow_private: bool) -> Sequence[str]:
    """The addresses of a host, judged now. Raises NotAllowed if a single one is not public."""
    found = [url.host] if url.is_literal else list(await resolve(url.host, url.port))
    addresses = list(dict.fromkeys(found))
    if not 1 <= len(addresses) <= MAX_ADDRESSES:
        raise NotAllowed("no address, or too many")
    if not allow_private and not all(is_public(address) for address in addresses):
        raise NotAllowed("an address that is not public")
    return addresses


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet's own, for one host, with no other address inside it."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _IPV4_SPECIAL)
    if address.scope_id is not None or address not in _IPV6_PUBLIC:
        return False
    return not any(address in network for network in _IPV6_SPECIAL)


async def resolve_by_system(host: str, port: int) -> Sequence[str]:
    """Every address the system knows for a name. Raises OSError."""
    return await asyncio.get_running_loop().run_in_executor(_RESOLVERS, _addresses, host, port)


async def resolve_for_probe(host: str, port: int) -> Sequence[str]:
    """The same for a wallet that is not connected yet, on threads that connected ones do not need."""
    return await asyncio.get_running_loop().run_in_executor(_PROBING_RESOLVERS, _addresses, host, port)


async def resolve_for_notices(host: str, port: int) -> Sequence[str]:
    """The same for what is told to whoever an account names."""
    return await asyncio.get_running_loop().run_in_executor(_NOTICE_RESOLVERS, _addresses, host, port)


def _addresses(host: str, port: int) -> Sequence[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(address[0]) for *_, address in found]


def _lowered(text: str) -> str:
    """The scheme and host in lower case; what follows them may mean something in capitals."""
    scheme, separator, rest = text.partition("://")
    end = next((at for at, char in enumerate(rest) if char in "/?"), len(rest))
    return scheme.lower() + separator + rest[:end].lower() + rest[end:]


def _is_literal(host: str, *, is_ipv6: bool) -> bool:
    """Raises NotAllowed for what is neither a name nor an address in its one canonical notation.

    A name that ends in a number is an address to some resolvers: `127.1`, `2130706433`, `0x7f.1`, `0177.0.0.1`.
    """
    labels = host.split(".")
    if not is_ipv6 and not _NUMERIC.fullmatch(labels[-1]):
        if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
            raise NotAllowed("not a host name")
        return False
    try:
        IPv6Address(host) if is_ipv6 else IPv4Address(host)
    except ValueError:
        raise NotAllowed("not an address") from None
    return True


def _refuse_private(host: str, port: int, *, is_secure: bool, is_literal: bool) -> None:
    """Raises NotAllowed for what can be told without asking anybody."""
    if not is_secure:
        raise NotAllowed("not encrypted")
    if port != 443 and port < 1024:
        raise NotAllowed("a port of some other service")
    if is_literal and not is_public(host):
        raise NotAllowed("an address that is not public")
    if not is_literal and ("." not in host or host.rpartition(".")[2] in _PRIVATE_NAMES):
        raise NotAllowed("a name of some private network")
