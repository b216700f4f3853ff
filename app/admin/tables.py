"""What is remembered of operators: the tokens of their proxies and of themselves, and what they did."""

import uuid
from datetime import datetime

from sqlalchemy import CheckConstraint, Index, LargeBinary, text
from sqlalchemy.dialects.postgresql import UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import money, when, words


class ServiceToken(SQLModel, table=True):
    """A proxy's token. Tokens of one name are one service, so that a token can be replaced while calls are in flight.

    `on_expiry` is what becomes of its holds that it does not settle, where an authorize does not say.
    """

    __tablename__ = "service_token"
    __table_args__ = (
        CheckConstraint("on_expiry IN ('captured', 'hold', 'release')", name="service_token_on_expiry_known"),
        Index("service_token_secret", "secret_hash", unique=True),
    )

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    name: str = words()
    secret_hash: bytes = Field(sa_type=LargeBinary)
    on_expiry: str = words(default="captured", sa_column_kwargs={"server_default": "captured"})
    created_at: datetime = when()
    revoked_at: datetime | None = when(nullable=True)


class AdminToken(SQLModel, table=True):
    """An operator's token."""

    __tablename__ = "admin_token"
    __table_args__ = (
        Index("admin_token_secret", "secret_hash", unique=True),
        Index("admin_token_live_name", "name", unique=True, postgresql_where=text("revoked_at IS NULL")),
    )

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    name: str = words()
    secret_hash: bytes = Field(sa_type=LargeBinary)
    created_at: datetime = when()
    expires_at: datetime | None = when(nullable=True)
    revoked_at: datetime | None = when(nullable=True)


class AdminLog(SQLModel, table=True):
    """One act of an operator, written in the act's own transaction. Append-only.

    `amount_nusd` is what it moved or allowed; `proof` a MAC over the rest with the pepper, so that nobody who can only
    write to the database acts in an operator's name.
    """

    __tablename__ = "admin_log"

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    admin: str = words()
    act: str = words()
    subject: str = words()
    reason: str | None = words(default=None)
    amount_nusd: int | None = money(nullable=True)
    proof: bytes | None = Field(default=None, sa_type=LargeBinary)
    created_at: datetime = when()
