"""Whose secret is this: from a credit id or an API key to its account."""

import hashlib
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from app.kernel.db import Database, Row
from app.kernel.errors import InvalidApiKey, InvalidCreditId, MissingScope
from app.kernel.security import Caller, Kind, Pepper, canonical_credit_id, is_wellformed

_CACHE_SIZE = 100_000


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """The two ids a key stands for. Never changes while the key's credential exists, so it may be cached."""

    account_id: uuid.UUID
    key_id: uuid.UUID


class Verifier:
    """Looks credentials up. What a key may do now is never cached: that is decided by its row."""

    def __init__(self, db: Database, pepper: Pepper) -> None:
        self._db, self._pepper = db, pepper
        self._owners: OrderedDict[bytes, KeyOwner] = OrderedDict()

    async def credit_id(self, text: str) -> Caller:
        """Raises InvalidCreditId, alike for a malformed, an unknown and a rotated one."""
        canonical = canonical_credit_id(text)
        lookup = self._pepper.lookup(canonical or "")
        found = await self._db.one(
            "SELECT account_id FROM credential WHERE secret_hash = %(hash)s AND kind = 'credit_id'", {"hash": lookup}
        )
        if canonical is None or found is None:
            raise InvalidCreditId
        return Caller(Kind.CREDIT_ID, found["account_id"])

    async def api_key(self, secret: str) -> Caller:
        """A live key as a caller. Raises InvalidApiKey, alike for unknown, revoked, disabled and expired ones."""
        lookup = self._pepper.lookup(secret) if is_wellformed(secret, "sk") else self._pepper.lookup("")
        found = await self._db.one(_LIVE_KEY, {"hash": lookup})
        if found is None:
            raise InvalidApiKey
        return Caller(Kind.API_KEY, found["account_id"], found["key_id"], _scopes(found))

    async def owner_of(self, *, secret: str | None = None, sha256: bytes | None = None) -> KeyOwner | None:
        """The account and key a secret (or its SHA-256) was issued for; says nothing of what it may do now."""
        if secret is not None:
            sha256 = hashlib.sha256(secret.encode()).digest()
        assert sha256 is not None
        cached = self._owners.get(sha256)
        if cached is not None:
            self._owners.move_to_end(sha256)
            return cached
        if secret is not None and not is_wellformed(secret, "sk"):
            return None
        return await self._look_up(sha256)

    async def _look_up(self, sha256: bytes) -> KeyOwner | None:
        found = await self._db.one(
            "SELECT account_id, key_id FROM credential WHERE secret_hash = %(hash)s AND kind = 'api_key'",
            {"hash": self._pepper.lookup_hashed(sha256)},
        )
        if found is None:
            return None
        owner = KeyOwner(found["account_id"], found["key_id"])
        self._owners[sha256] = owner
        if len(self._owners) > _CACHE_SIZE:
            self._owners.popitem(last=False)
        return owner


def key_in(headers: Mapping[str, str]) -> str | None:
    """The API key a client showed, in any of the four ways clients do it; header names in lower case."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "token") and token.strip():
        return token.strip()
    return headers.get("x-api-key") or headers.get("api-key")


async def authenticate(verifier: Verifier, headers: Mapping[str, str]) -> Caller:
    """Who is calling: by `x-credit-id` if it is there, else by an API key.

    Raises InvalidCreditId or InvalidApiKey.
    """
    if "x-credit-id" in headers:
        return await verifier.credit_id(headers["x-credit-id"])
    secret = key_in(headers)
    if secret is None:
        raise InvalidApiKey("No credential: send an API key as 'Authorization: Bearer sk-…', or 'x-credit-id'")
    return await verifier.api_key(secret)


def require_scope(caller: Caller, scope: str) -> None:
    """Raises MissingScope if the caller is a key that was narrowed to other things."""
    if caller.scopes is not None and scope not in caller.scopes:
        raise MissingScope(f"This API key lacks the scope '{scope}'")


_LIVE_KEY = """
SELECT c.account_id, c.key_id, k.scopes
FROM credential c JOIN api_key k ON k.account_id = c.account_id AND k.id = c.key_id
WHERE c.secret_hash = %(hash)s AND c.kind = 'api_key' AND k.deleted_at IS NULL AND k.disabled_at IS NULL
  AND (k.expire_at IS NULL OR k.expire_at > now())
"""


def _scopes(found: Row) -> frozenset[str] | None:
    return None if found["scopes"] is None else frozenset(found["scopes"])
