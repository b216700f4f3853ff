"""How operators ask about tokens: their proxies' and their own."""

from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from litestar import Controller, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin.api.asked import Because, reason_of
from app.admin.scopes import SCOPES, Scope
from app.admin.tokens import NewToken, TokenKind, default_expiry, list_tokens, make_token, revoke_token
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField, NotFound
from app.kernel.idempotency import Once
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.reading import uuid_in
from app.kernel.security import Admin, OnExpiry
from app.kernel.settings import Settings

TokenState = Literal["live", "expired", "revoked"]
InState = Annotated[TokenState | None, QueryParameter(name="state")]


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a token is asked to be. An admin's expires after 90 days unless `expires_at` says otherwise, null: never."""

    kind: TokenKind
    name: str
    scopes: Annotated[list[Scope], msgspec.Meta(min_length=1, max_length=len(SCOPES))] | None = None
    expires_at: Annotated[datetime, msgspec.Meta(tz=True)] | None | msgspec.UnsetType = msgspec.UNSET
    on_expiry: OnExpiry | None = None


class TokenView(msgspec.Struct, frozen=True):
    """A token, without what is secret about it. `last_used_at` is true to the minute."""

    id: UUID
    kind: TokenKind
    name: str
    state: TokenState
    scopes: list[str] | None
    on_expiry: str | None
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, token: Row) -> "TokenView":
        return cls(**{name: token[name] for name in cls.__struct_fields__})


class NewTokenView(msgspec.Struct, frozen=True):
    """A new token. Keep `token`: it is shown now alone."""

    token: str
    about: TokenView


class TokensPage(msgspec.Struct, frozen=True):
    data: list[TokenView]
    next_cursor: str | None


class AdminTokensController(Controller):
    """Service and admin tokens."""

    path = "/admin/tokens"
    tags = ("Admin",)

    @get("/", summary="List tokens")
    async def list(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        kind: FromQuery[TokenKind | None] = None,
        in_state: InState = None,
        limit: FromQuery[int] = DEFAULT_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> TokensPage:
        """Newest first, with when each was last used."""
        size, after = page_size(limit), from_cursor(cursor, tuple[UUID])
        found = await db.transaction(
            lambda session: list_tokens(session, size + 1, after[0] if after else None, kind, in_state)
        )
        ended = to_cursor(found[size - 1]["id"]) if len(found) > size else None
        return TokensPage([TokenView.of(token) for token in found[:size]], ended)

    @post("/", summary="Create a token")
    async def create(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        data: JSONBody[TokenRequest],
    ) -> NewTokenView:
        """Nobody gives a scope that they do not have."""
        if data.on_expiry is not None and data.kind == "admin":
            raise InvalidField("on_expiry goes with a service token", param="on_expiry")
        until = default_expiry(data.kind, datetime.now(UTC)) if data.expires_at is msgspec.UNSET else data.expires_at
        new = NewToken(data.kind, data.name, data.on_expiry or "captured", data.scopes, until)

        async def effect(session: AsyncSession) -> NewTokenView:
            made, secret = await make_token(session, settings.pepper, admin, new)
            return NewTokenView(secret, TokenView.of(made))

        return await once.do(NewTokenView, effect)

    @delete("/{token_id:str}", status_code=200, summary="Revoke a token")
    async def delete(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        settings: NamedDependency[Settings],
        token_id: FromPath[str],
    ) -> TokenView:
        """An operator's is refused at once, a proxy's within a second."""
        found = await db.transaction(lambda session: revoke_token(session, settings.pepper, admin, _token_in(token_id)))
        return TokenView.of(found)

    @post("/{token_id:str}/revoke", status_code=200, summary="Revoke a token, with a reason")
    async def revoke(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        token_id: FromPath[str],
        data: JSONBody[Because | None] = None,
    ) -> TokenView:
        """The same as DELETE."""

        async def effect(session: AsyncSession) -> TokenView:
            told = _token_in(token_id), reason_of(data)
            return TokenView.of(await revoke_token(session, settings.pepper, admin, *told))

        return await once.do(TokenView, effect)


def _token_in(text: str) -> UUID:
    found = uuid_in(text)
    if found is None:
        raise NotFound("No such token")
    return found
