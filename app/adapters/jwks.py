"""An issuer's keys: read from a file or asked for over HTTP, seldom, and used for a while though the issuer is away.

A token names the key that signed it. One that names a key we do not have makes us ask again, but no more than a few times in a row
and then every 20 seconds, whatever tokens come: else whoever sends nonsense would have us hammer the issuer.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import jwt
import msgspec

from app.adapters.asking import Asker, Patience
from app.kernel.errors import IssuerUnavailable
from app.kernel.logs import log
from app.topups.gateway import GatewayError, GatewayUnavailable

ALGORITHMS: Final = {"RSA": "RS256", "EC": "ES256"}
"""By type of key, so that no token chooses how it is verified. Source: RFC 7518 §3.3, §3.4."""
_RETRY_AFTER_SECONDS: Final = 10
_MOST_BYTES: Final = 256 * 1024
_MOST_KEYS: Final = 100
_LEAST_RSA_BITS: Final = 2048
_PATIENCE: Final = Patience(connect_seconds=3, read_seconds=3, deadline_seconds=4, retries=1, at_once=1)


@dataclass(frozen=True, slots=True)
class Trust:
    """How far an issuer is believed: its keys are asked for again after `fresh_seconds`, beside the calls that need them, and
    while it is away serve until they are `stale_seconds` old. `burst` questions may follow each other, then one in
    `pause_seconds`."""

    fresh_seconds: float = 300.0
    stale_seconds: float = 3600.0
    burst: float = 3.0
    pause_seconds: float = 20.0


class Keys:
    """The keys of one issuer. `source` is an http(s) address, or the path of a file, which may be replaced at any time."""

    def __init__(
        self,
        source: str,
        *,
        trust: Trust | None = None,
        patience: Patience = _PATIENCE,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        is_url = source.startswith(("http://", "https://"))
        self._source, self._monotonic = source, monotonic
        self._trust = trust or (Trust() if is_url else Trust(fresh_seconds=10))
        self.named = urlsplit(source).hostname or "" if is_url else source
        self._asker = Asker(self.named, "", {}, patience=patience, monotonic=monotonic) if is_url else None
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read_at = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._may_ask, self._counted_at = self._trust.burst, monotonic()

    async def find(self, key_id: str | None, algorithm: str) -> jwt.PyJWK | None:
        """The key that a token names, or the only one there is for it if it names none; None for a key the issuer does not have.

        Raises IssuerUnavailable while no keys are known.
        """
        if self._keys and self._age_seconds() >= self._trust.stale_seconds:
            log.error("jwt.keys_forgotten", source=self.named, age_seconds=int(self._age_seconds()))
            self._keys = {}
        found = self._known(key_id, algorithm)
        if found is None:
            await self._ask()
            found = self._known(key_id, algorithm)
        elif self._age_seconds() >= self._trust.fresh_seconds:
            self._begin()
        if not self._keys:
            raise IssuerUnavailable(retry_after_seconds=_RETRY_AFTER_SECONDS)
        return found

    async def read(self) -> Mapping[str, jwt.PyJWK]:
        """The keys, asked for now. Raises GatewayUnavailable, with what is wrong in words."""
        found = readable(await self._raw(), self.named)
        self._keys, self._read_at = found, self._monotonic()
        return found

    async def close(self) -> None:
        """Give back the connections."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        if self._asker is not None:
            await self._asker.close()

    def _known(self, key_id: str | None, algorithm: str) -> jwt.PyJWK | None:
        fitting = [
            key for name, key in self._keys.items() if key.algorithm_name == algorithm and key_id in (None, name)
        ]
        return fitting[0] if len(fitting) == 1 else None

    def _age_seconds(self) -> float:
        return self._monotonic() - self._read_at

    async def _ask(self) -> None:
        """All who wait for keys wait for one question."""
        if (asking := self._begin()) is not None:
            await asyncio.shield(asking)

    def _begin(self) -> asyncio.Task[None] | None:
        """The question that is under way, or a new one; None where it is too soon for that."""
        if self._asking is None or self._asking.done():
            now = self._monotonic()
            regained = (now - self._counted_at) / self._trust.pause_seconds
            self._may_ask, self._counted_at = min(self._trust.burst, self._may_ask + regained), now
            if self._may_ask < 1:
                return None
            self._may_ask -= 1
            self._asking = asyncio.create_task(self._read_or_say())
        return self._asking

    async def _read_or_say(self) -> None:
        try:
            await self.read()
        except GatewayError as error:
            log.warning("jwt.keys_unavailable", source=self.named, reason=str(error))

    async def _raw(self) -> bytes:
        if self._asker is None:
            return _file(Path(self._source))
        answer = await self._asker.ask("GET", self._source)
        if answer.status != 200:
            raise GatewayUnavailable(f"{self.named} answered HTTP {answer.status}")
        return answer.body


def _file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise GatewayUnavailable(f"{path} cannot be read: {error.strerror or error}") from None


class _Set(msgspec.Struct):
    keys: list[dict[str, Any]]


def readable(raw: bytes, named: str) -> dict[str, jwt.PyJWK]:
    """The usable keys of a JWKS by their `kid`. Raises GatewayUnavailable where there is none.

    Not used are keys for other things than RS256 and ES256 signatures, shared secrets, weak ones, and whatever bears a private
    part: who could read that signs for everybody. Source: RFC 7517.
    """
    if len(raw) > _MOST_BYTES:
        raise GatewayUnavailable(f"{named} has more than {_MOST_BYTES} bytes of keys")
    try:
        told = msgspec.json.decode(raw, type=_Set).keys[:_MOST_KEYS]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise GatewayUnavailable(f"{named} has no JWKS: JSON with a list of keys") from None
    made = [(str(each.get("kid") or ""), _key(each)) for each in told]
    found = {name: key for name, key in made if key is not None}
    if not found:
        raise GatewayUnavailable(f"{named} has no key for RS256 (of 2048 bits) or ES256, of {len(told)} there")
    return found


def _key(told: Mapping[str, Any]) -> jwt.PyJWK | None:
    algorithm = ALGORITHMS.get(str(told.get("kty")))
    uses = told.get("key_ops", ["verify"])
    is_meant = told.get("use", "sig") == "sig" and isinstance(uses, list) and "verify" in uses
    if algorithm is None or not is_meant or told.get("alg", algorithm) != algorithm or "d" in told:
        return None
    if algorithm == "ES256" and told.get("crv") != "P-256":
        return None
    try:
        key = jwt.PyJWK(dict(told), algorithm)
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    is_weak = algorithm == "RS256" and key.key.key_size < _LEAST_RSA_BITS
    return None if is_weak else key
