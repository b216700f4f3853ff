"""Whether a JWT is good: signed by its issuer, for us, and now."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import jwt
import msgspec

from app.adapters.jwks import ALGORITHMS, Keys
from app.kernel.errors import InvalidApiKey, IssuerUnavailable
from app.kernel.security import subject_hash
from app.topups.gateway import GatewayError

_SKEW_SECONDS: Final = 60
"""How much an issuer's clock may be ahead of ours. Behind it is not: what is over by our clock is over."""
_TYPES: Final = (None, "jwt", "at+jwt", "application/at+jwt")
"""What a token says that it is; a logout's or a proof's is signed by the same keys. Source: RFC 8725 §3.11, RFC 9068."""
_MOST_SUBJECT_CHARS: Final = 255
_MOST_KEY_ID_CHARS: Final = 200
_SIGNED: Final = jwt.PyJWS()


class _Head(msgspec.Struct):
    alg: str
    kid: str | None = None
    typ: str | None = None


class _Claims(msgspec.Struct):
    iss: str
    exp: int | float
    aud: str | list[str] | None = None
    client_id: str | None = None
    use: str | None = msgspec.field(default=None, name="token_use")
    nbf: int | float | None = None
    iat: int | float | None = None


class JwtIssuer:
    """Judges the tokens of one issuer. `subject_claim` says whose account a token is of."""

    def __init__(
        self,
        issuer: str,
        audiences: Collection[str],
        keys: Keys,
        *,
        subject_claim: str = "sub",
        now: Callable[[], float] = time.time,
    ) -> None:
        self._issuer, self._audiences, self._keys, self._now = issuer, frozenset(audiences), keys, now
        self._subject_claim = subject_claim

    async def subject(self, token: str) -> bytes:
        """Whose it is. Raises InvalidApiKey, alike whatever is wrong with it, and IssuerUnavailable where nobody can tell.

        The claims are looked at first: what is not for us, or over, asks nobody for keys.
        """
        head, payload = _taken_apart(token)
        subject = self._believed(payload)
        key = await self._keys.find(head.kid, head.alg)
        if key is None or not _is_signed(token, key):
            raise InvalidApiKey
        return subject_hash(self._issuer, subject)

    async def keys(self) -> Sequence[str]:
        """Each key that signs now, as `kid (algorithm)`. Raises IssuerUnavailable, which says why."""
        try:
            found = await self._keys.read()
        except GatewayError as error:
            raise IssuerUnavailable(str(error)) from None
        return [f"{name or 'unnamed'} ({key.algorithm_name})" for name, key in found.items()]

    async def close(self) -> None:
        """Give back the connections."""
        await self._keys.close()

    def _believed(self, payload: bytes) -> str:
        """The subject, if all else is as it should be. Raises InvalidApiKey."""
        try:
            claims, named = (
                msgspec.json.decode(payload, type=_Claims),
                msgspec.json.decode(payload, type=dict[str, Any]),
            )
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise InvalidApiKey from None
        subject = named.get(self._subject_claim)
        if claims.iss != self._issuer or not self._is_for_us(claims) or not self._is_now(claims):
            raise InvalidApiKey
        if not isinstance(subject, str) or not 1 <= len(subject) <= _MOST_SUBJECT_CHARS or not subject.isprintable():
            raise InvalidApiKey
        return subject

    def _is_for_us(self, claims: _Claims) -> bool:
        """By `aud`; an access token of Amazon Cognito has none, and says in `client_id` for which application it was made."""
        named = [claims.aud] if isinstance(claims.aud, str) else claims.aud
        if named is None and claims.use == "access" and claims.client_id is not None:
            named = [claims.client_id]
        return not self._audiences.isdisjoint(named or ())

    def _is_now(self, claims: _Claims) -> bool:
        now = self._now()
        begins = [claims.nbf or 0, claims.iat or 0]
        if not all(math.isfinite(each) for each in (claims.exp, *begins) if isinstance(each, float)):
            return False
        return now < claims.exp and max(begins) <= now + _SKEW_SECONDS


def _taken_apart(token: str) -> tuple[_Head, bytes]:
    """What it says, before anybody knows whether it is true. Raises InvalidApiKey."""
    try:
        told = _SIGNED.decode_complete(token, options={"verify_signature": False})
        head = msgspec.convert(told["header"], _Head)
    except (jwt.PyJWTError, msgspec.ValidationError):
        raise InvalidApiKey from None
    is_known = (
        head.alg in ALGORITHMS.values() and "crit" not in told["header"] and len(head.kid or "") <= _MOST_KEY_ID_CHARS
    )
    if not is_known or (head.typ.lower() if head.typ else None) not in _TYPES:
        raise InvalidApiKey
    return head, told["payload"]


def _is_signed(token: str, key: jwt.PyJWK) -> bool:
    """By the key's own algorithm, whatever the token says of it."""
    try:
        _SIGNED.decode(token, key, algorithms=[key.algorithm_name])
    except (jwt.PyJWTError, ValueError):
        return False
    return True
