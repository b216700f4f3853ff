"""Operators' tokens: shown once, kept as a hash. A revoked one is refused at once, a proxy's within a second."""

import asyncio
import hashlib
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import msgspec
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin.acts import write_act
from app.admin.scopes import SCOPES, require
from app.kernel.db import Database, Row, new_id, row, rows
from app.kernel.errors import DatabaseUnavailable, InvalidField, InvalidToken, NameTaken, NotFound
from app.kernel.security import Admin, OnExpiry, Pepper, Service, is_wellformed, new_secret

ADMIN_DAYS: Final = 90
"""How long an operator's token is good for where nothing else is said."""
_MOST_DAYS: Final = 3650
_GOOD_FOR_SECONDS = 1
_USE_SECONDS: Final = 60.0
TokenKind = Literal["service", "admin"]
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class NewToken:
    """What a token is asked to be. `on_expiry` is for the holds of a service; `scopes` None means all, and is an operator's."""

    kind: TokenKind
    name: str
    on_expiry: OnExpiry = "captured"
    scopes: Sequence[str] | None = None
    expires_at: datetime | None = None


async def create_token(
    db: Database,
    pepper: Pepper,
    kind: TokenKind,
    name: str,
    on_expiry: OnExpiry = "captured",
    *,
    scopes: Sequence[str] | None = None,
    expires_at: datetime | None | msgspec.UnsetType = msgspec.UNSET,
) -> str:
    """Make a token for the house itself and return it; it cannot be had again. An operator's expires after 90 days unless
    told otherwise. It is no act of an operator: the newcomer's server makes them for its demo and its gateway.

    Raises what `make_token` raises.
    """
    until = default_expiry(kind, datetime.now(UTC)) if isinstance(expires_at, msgspec.UnsetType) else expires_at
    new = NewToken(kind, name, on_expiry, scopes, until)
    _, secret = await db.transaction(lambda session: make_token(session, pepper, None, new))
    return secret


def default_expiry(kind: TokenKind, now: datetime) -> datetime | None:
    """When a token expires that was not told to: an operator's after 90 days, a proxy's never."""
    return now + timedelta(days=ADMIN_DAYS) if kind == "admin" else None


async def make_token(session: AsyncSession, pepper: Pepper, by: Admin | None, new: NewToken) -> tuple[Row, str]:
    """Make a token; returns its row and its secret, which cannot be had again.

    Several service tokens may bear one name: they are one service, so that a token can be replaced while calls are in
    flight. Nobody gives what they do not have. Raises InvalidField for a name that is not lower-case letters, digits,
    `._-`, for unknown scopes and for an expiry that has passed; NameTaken for an admin's name that has a live token;
    MissingScope for a scope that `by` lacks, who is None for the house itself.
    """
    _refuse_odd(new)
    if by is not None and new.kind == "admin":
        require(by, SCOPES if new.scopes is None else new.scopes)
    secret = new_secret("svc" if new.kind == "service" else "adm")
    token_id = new_id()
    made: dict[str, Any] = {
        "id": token_id,
        "name": new.name,
        "hash": pepper.lookup(secret),
        "expires_at": new.expires_at,
    }
    await (_insert_service(session, new, made) if new.kind == "service" else _insert_admin(session, new, made))
    if by is not None:
        await write_act(session, pepper, by, "token.create", f"token/{token_id}", after=_said(new))
    return await read_token(session, token_id), secret


def _refuse_odd(new: NewToken) -> None:
    if not _NAME.fullmatch(new.name):
        raise InvalidField(
            "a token's name is 1-64 lower-case letters, digits, dots, dashes or underscores", param="name"
        )
    if new.scopes is not None and (new.kind == "service" or not new.scopes or set(new.scopes) - set(SCOPES)):
        raise InvalidField(f"scopes are an admin token's, some of: {', '.join(SCOPES)}", param="scopes")
    now = datetime.now(UTC)
    if new.expires_at is not None and not now < new.expires_at <= now + timedelta(days=_MOST_DAYS):
        raise InvalidField(f"a token expires in the future, within {_MOST_DAYS} days, or never", param="expires_at")


async def _insert_service(session: AsyncSession, new: NewToken, made: dict[str, Any]) -> None:
    await row(
        session,
        """INSERT INTO service_token (id, name, secret_hash, on_expiry, expires_at)
           VALUES (:id, :name, :hash, :on_expiry, :expires_at)""",
        **made, on_expiry=new.on_expiry,
    )  # fmt: skip


async def _insert_admin(session: AsyncSession, new: NewToken, made: dict[str, Any]) -> None:
    await row(  # one that has expired keeps its name from nobody
        session,
        "UPDATE admin_token SET revoked_at = now() WHERE name = :name AND revoked_at IS NULL AND expires_at <= now()",
        name=new.name,
    )
    try:
        await row(
            session,
            """INSERT INTO admin_token (id, name, secret_hash, scopes, expires_at)
               VALUES (:id, :name, :hash, :scopes, :expires_at)""",
            **made, scopes=None if new.scopes is None else sorted(set(new.scopes), key=SCOPES.index),
        )  # fmt: skip
    except IntegrityError:
        raise NameTaken(
            f"There is a live admin token named {new.name!r}; revoke it, or choose another name", param="name"
        ) from None


def _said(new: NewToken) -> dict[str, Any]:
    of_kind = {"on_expiry": new.on_expiry} if new.kind == "service" else {"scopes": new.scopes and list(new.scopes)}
    return {"kind": new.kind, "name": new.name, "expires_at": new.expires_at, **of_kind}


_TOKENS: Final = """
    (SELECT 'service' AS kind, id, name, on_expiry, CAST(NULL AS text[]) AS scopes, created_at, expires_at, revoked_at FROM service_token
     UNION ALL SELECT 'admin', id, name, NULL, scopes, created_at, expires_at, revoked_at FROM admin_token)"""
_STATE: Final = (
    "CASE WHEN revoked_at IS NOT NULL THEN 'revoked' WHEN expires_at <= now() THEN 'expired' ELSE 'live' END"
)


async def read_token(session: AsyncSession, token_id: uuid.UUID) -> Row:
    """Raises NotFound."""
    found = await row(
        session,
        f"""SELECT t.*, {_STATE} AS state, u.last_used_at FROM {_TOKENS} t LEFT JOIN token_use u ON u.token_id = t.id
            WHERE t.id = :id""",
        id=token_id,
    )
    if found is None:
        raise NotFound("No such token")
    return found


async def list_tokens(
    session: AsyncSession,
    limit: int,
    before_id: uuid.UUID | None,
    kind: TokenKind | None = None,
    state: str | None = None,
) -> list[Row]:
    """A page of the tokens, newest first, without anything secret. `before_id` is where the page before ended."""
    return await rows(
        session,
        f"""SELECT t.*, u.last_used_at FROM (SELECT *, {_STATE} AS state FROM {_TOKENS} every) t
            LEFT JOIN token_use u ON u.token_id = t.id
            WHERE (CAST(:before_id AS uuid) IS NULL OR t.id < :before_id)
              AND (CAST(:kind AS text) IS NULL OR t.kind = :kind) AND (CAST(:state AS text) IS NULL OR t.state = :state)
            ORDER BY t.id DESC LIMIT :limit""",
        before_id=before_id, kind=kind, state=state, limit=limit,
    )  # fmt: skip


async def revoke_token(
    session: AsyncSession, pepper: Pepper, by: Admin, token_id: uuid.UUID, reason: str | None = None
) -> Row:
    """End a token. Raises NotFound, also on a repeat."""
    before = await read_token(session, token_id)
    gone = await row(
        session,
        f"UPDATE {before['kind']}_token SET revoked_at = now() WHERE id = :id AND revoked_at IS NULL RETURNING id",
        id=token_id,
    )
    if gone is None:
        raise NotFound("No such live token")
    await write_act(
        session, pepper, by, "token.revoke", f"token/{token_id}", reason,
        before={"kind": before["kind"], "name": before["name"], "state": before["state"]}, after={"state": "revoked"},
    )  # fmt: skip
    return await read_token(session, token_id)


# --- who is calling ---------------------------------------------------------------------------------


async def verify_service(db: Database, pepper: Pepper, secret: str) -> Service:
    """Raises InvalidToken, alike for malformed, unknown, revoked and expired ones."""
    found = await db.one(
        """SELECT id, name, on_expiry FROM service_token WHERE secret_hash = %(hash)s AND revoked_at IS NULL
           AND (expires_at IS NULL OR expires_at > now())""",
        {"hash": pepper.lookup(secret if is_wellformed(secret, "svc") else "")},
    )
    if found is None:
        raise InvalidToken
    return Service(found["id"], found["name"], found["on_expiry"])


async def verify_admin(db: Database, pepper: Pepper, secret: str) -> Admin:
    """Raises InvalidToken, alike for malformed, unknown, revoked and expired ones."""
    found = await db.one(
        """SELECT id, name, scopes FROM admin_token WHERE secret_hash = %(hash)s AND revoked_at IS NULL
           AND (expires_at IS NULL OR expires_at > now())""",
        {"hash": pepper.lookup(secret if is_wellformed(secret, "adm") else "")},
    )
    if found is None:
        raise InvalidToken
    return Admin(found["id"], found["name"], None if found["scopes"] is None else frozenset(found["scopes"]))


class Uses:
    """When tokens were last used: noted at most once a minute and process for each, and nobody waits for it."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._noted: dict[uuid.UUID, float] = {}
        self._writing: set[asyncio.Task[None]] = set()

    def note(self, token_id: uuid.UUID) -> None:
        """It was used just now."""
        now = time.monotonic()
        if now - self._noted.get(token_id, -_USE_SECONDS) < _USE_SECONDS:
            return
        self._noted[token_id] = now
        task = asyncio.create_task(self._write(token_id))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, token_id: uuid.UUID) -> None:
        try:
            await self._db.one(
                """INSERT INTO token_use AS u (token_id, last_used_at) VALUES (%(id)s, now())
                   ON CONFLICT (token_id) DO UPDATE SET last_used_at = now() WHERE u.last_used_at < now() - interval '1 minute'
                   RETURNING 1 AS noted""",
                {"id": token_id},
            )
        except DatabaseUnavailable:
            self._noted.pop(token_id, None)  # the next use is noted instead

    async def written(self) -> None:
        """Until what was noted so far is in the database."""
        await asyncio.gather(*self._writing)


class ServiceTokens:
    """Whose a service token is. What was found is good for a second, so that a proxy's calls need not ask each time."""

    def __init__(self, db: Database, pepper: Pepper) -> None:
        self._db, self._pepper = db, pepper
        self.uses = Uses(db)
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

    async def admin(self, secret: str) -> Admin:
        """An operator's: never remembered, so that a revoked one is refused at once. Raises InvalidToken."""
        admin = await verify_admin(self._db, self._pepper, secret)
        self.uses.note(admin.id)
        return admin

    async def _ask(self, digest: bytes, secret: str, now: float) -> Service:
        self._known.pop(digest, None)
        service = await verify_service(self._db, self._pepper, secret)
        self._known[digest] = now, service
        self.uses.note(service.id)
        return service
