"""Operators' tokens: shown once, kept as a hash. A revoked one is refused at once, a proxy's within a second."""

import asyncio
import hashlib
import re
import time
import uuid
from typing import Literal

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, new_id, row
from app.kernel.errors import InvalidField, InvalidToken, NameTaken
from app.kernel.security import Admin, OnExpiry, Pepper, Service, is_wellformed, new_secret

_GOOD_FOR_SECONDS = 1
TokenKind = Literal["service", "admin"]
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


async def create_token(
    db: Database, pepper: Pepper, kind: TokenKind, name: str, on_expiry: OnExpiry = "captured"
) -> str:
    """Make a token and return it; it cannot be had again. `on_expiry` is for the holds of a service.

    Several service tokens may bear one name: they are one service, so that a token can be replaced
    while calls are in flight. Raises InvalidField for a name that is not lower-case letters, digits, `._-`,
    NameTaken for an admin's name that has a live token.
    """
    if not _NAME.fullmatch(name):
        raise InvalidField(
            "a token's name is 1-64 lower-case letters, digits, dots, dashes or underscores", param="name"
        )
    secret = new_secret("svc" if kind == "service" else "adm")
    try:
        await db.transaction(lambda session: _insert(session, kind, name, pepper.lookup(secret), on_expiry))
    except IntegrityError:
        raise NameTaken(f"There is a live admin token named {name!r}; revoke it, or choose another name") from None
    return secret


async def _insert(session: AsyncSession, kind: TokenKind, name: str, secret_hash: bytes, on_expiry: OnExpiry) -> None:
    named = {"id": new_id(), "name": name, "hash": secret_hash}
    if kind == "admin":
        await row(session, "INSERT INTO admin_token (id, name, secret_hash) VALUES (:id, :name, :hash)", **named)
        return
    await row(
        session,
        "INSERT INTO service_token (id, name, secret_hash, on_expiry) VALUES (:id, :name, :hash, :on_expiry)",
        **named,
        on_expiry=on_expiry,
    )


async def verify_service(db: Database, pepper: Pepper, secret: str) -> Service:
    """Raises InvalidToken, alike for malformed, unknown and revoked ones."""
    found = await db.one(
        "SELECT id, name, on_expiry FROM service_token WHERE secret_hash = %(hash)s AND revoked_at IS NULL",
        {"hash": pepper.lookup(secret if is_wellformed(secret, "svc") else "")},
    )
    if found is None:
        raise InvalidToken
    return Service(found["id"], found["name"], found["on_expiry"])


class ServiceTokens:
    """Whose a service token is. What was found is good for a second, so that a proxy's calls need not ask each time."""

    def __init__(self, db: Database, pepper: Pepper) -> None:
        self._db, self._pepper = db, pepper
        self._known: dict[bytes, tuple[float, Service]] = {}
        self._asking: dict[bytes, asyncio.Task[Service]] = {}

    async def service(self, secret: str) -> Service:
        """Raises InvalidToken, for a revoked token at most a second after the revocation."""
        digest, now = hashlib.sha256(secret.encode()).digest(), time.monotonic()
        known = self._known.get(digest)
        if known is not None and now - known[0] < _GOOD_FOR_SECONDS:
            return known[1]
        asking = self._asking.get(digest)
        if asking is None:  # the first asks for all that come meanwhile
            asking = self._asking[digest] = asyncio.create_task(self._ask(digest, secret, now))
            asking.add_done_callback(lambda _: self._asking.pop(digest, None))
        return await asyncio.shield(asking)

    async def _ask(self, digest: bytes, secret: str, now: float) -> Service:
        self._known.pop(digest, None)
        service = await verify_service(self._db, self._pepper, secret)
        self._known[digest] = now, service
        return service


async def verify_admin(db: Database, pepper: Pepper, secret: str) -> Admin:
    """Raises InvalidToken, alike for malformed, unknown, revoked and expired ones."""
    found = await db.one(
        """SELECT id, name FROM admin_token WHERE secret_hash = %(hash)s AND revoked_at IS NULL
           AND (expires_at IS NULL OR expires_at > now())""",
        {"hash": pepper.lookup(secret if is_wellformed(secret, "adm") else "")},
    )
    if found is None:
        raise InvalidToken
    return Admin(found["id"], found["name"])


async def revoke_token(db: Database, kind: TokenKind, token_id: uuid.UUID) -> bool:
    """False if there was no such live token."""
    update = (
        "UPDATE service_token SET revoked_at = now() WHERE id = :id AND revoked_at IS NULL RETURNING id"
        if kind == "service"
        else "UPDATE admin_token SET revoked_at = now() WHERE id = :id AND revoked_at IS NULL RETURNING id"
    )
    return await db.transaction(lambda session: row(session, update, id=token_id)) is not None
