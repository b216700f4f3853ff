"""A coin's node that is asked over JSON-RPC, and what it showed for our addresses so far.

    NodeAway (an OSError)     no usable answer: not running, still starting, or rubbish
    └─ NodeRefused            the node's own error, with its code

Numbers in an answer are read from their digits into the shape that was asked for: never through a float.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import httpx
import msgspec
from msgspec import Struct
from msgspec.structs import replace

from .chain import AddressBook
from .invoices import Seen
from .methods import Method
from .store import Store

T = TypeVar("T")
TIMEOUT = httpx.Timeout(15, connect=2)


class NodeAway(OSError):
    """The node gave no usable answer."""


class NodeRefused(NodeAway):
    """The node answered with an error of its own."""

    def __init__(self, name: str, code: int, message: str) -> None:
        self.code = code
        super().__init__(f"{name}: {message} ({code})")


class _Refusal(Struct, frozen=True):
    code: int
    message: str


class _Answer(Struct, Generic[T], frozen=True):
    error: _Refusal | None = None
    result: T | None = None


class Node:
    """A node by its URL; user and password in it are for signing in, and are never shown."""

    def __init__(
        self, name: str, url: str, transport: httpx.AsyncBaseTransport | None = None, *, uses_digest: bool = False
    ) -> None:
        """`uses_digest`: it wants to be signed in to by RFC 7616. Raises ValueError if this is no http address."""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            raise ValueError(f"the address of {name} is not a URL") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"the address of {name} must be an absolute http:// address")
        self.name = name
        self._url = parsed.copy_with(userinfo=b"")
        self._who = (parsed.username, parsed.password) if parsed.username else None
        self._uses_digest = uses_digest
        self._transport = transport
        self._tls = httpx.create_ssl_context()

    def __repr__(self) -> str:
        return f"Node({self.name!r}, {str(self._url)!r})"

    async def ask(self, shape: type[T], method: str, **params: Any) -> T:
        """The result of a call. Raises NodeAway, NodeRefused for the node's own errors."""
        answer = self._read(_Answer[shape], await self._post(method, params))  # type: ignore[valid-type]
        if answer.error is not None:
            raise NodeRefused(self.name, answer.error.code, answer.error.message)
        if answer.result is None:
            raise NodeAway(f"{self.name} answered nothing to {method}")
        return answer.result

    async def tell(self, method: str, **params: Any) -> None:
        """A call whose result nobody needs. Raises like `ask`."""
        answer: _Answer[Any] = self._read(_Answer[Any], await self._post(method, params))
        if answer.error is not None:
            raise NodeRefused(self.name, answer.error.code, answer.error.message)

    async def _post(self, method: str, params: dict[str, Any]) -> httpx.Response:
        """One exchange on a connection of its own, for a node that was restarted leaves dead ones behind."""
        body = {"jsonrpc": "2.0", "id": "sandbox", "method": method, "params": params}
        try:
            async with httpx.AsyncClient(
                transport=self._transport, verify=self._tls, timeout=TIMEOUT, trust_env=False
            ) as client:
                return await client.post(self._url, json=body, auth=self._signature())
        except httpx.HTTPError as error:
            raise NodeAway(f"{self.name} could not be reached: {type(error).__name__}") from error

    def _signature(self) -> httpx.Auth:
        if self._who is None:
            return httpx.Auth()  # signs nothing
        return httpx.DigestAuth(*self._who) if self._uses_digest else httpx.BasicAuth(*self._who)

    def _read(self, shape: type[_Answer[T]], response: httpx.Response) -> _Answer[T]:
        # litecoind puts its errors into HTTP 404 and 500, with the JSON as always.
        try:
            return msgspec.json.decode(response.content, type=shape)
        except ValueError as error:  # msgspec's errors are ValueErrors
            if not response.is_success:
                raise NodeAway(f"{self.name} answered HTTP {response.status_code}") from None
            raise NodeAway(f"{self.name} answered rubbish: {error}") from None


class Sightings:
    """What a node showed for each address it made for us. A node forgets what was replaced; an invoice does not."""

    def __init__(self, method: Method, store: Store, now: Callable[[], int]) -> None:
        self.method = method
        self.store = store
        self.now = now

    def begin(self, address: str) -> str:
        """Remember that this address is the node's; returns it."""
        self.store.put("sightings", address, AddressBook(self.method.id, address))
        return address

    def known(self, address: str) -> tuple[Seen, ...] | None:
        """What was seen there so far, None if the address is of another chain, such as the simulated one."""
        book = self.store.get("sightings", address, AddressBook)
        return None if book is None else book.payments

    def update(self, address: str, shown: Sequence[Seen], gone: Callable[[Seen], Seen]) -> Sequence[Seen]:
        """Take over what the node shows now; `gone` says what to think of a payment that it no longer shows."""
        known = self.known(address) or ()
        payments = merged(known, shown, gone)
        if payments != known:
            self.store.put("sightings", address, AddressBook(self.method.id, address, payments))
        return payments


def merged(known: Sequence[Seen], shown: Sequence[Seen], gone: Callable[[Seen], Seen]) -> tuple[Seen, ...]:
    """The known payments as they are now, each as old as at first sight, then the new ones."""
    now = {payment.id: payment for payment in shown}
    old = [replace(now.pop(p.id), seen_at=p.seen_at) if p.id in now else gone(p) for p in known]
    return (*old, *now.values())
