"""What is remembered of operators: the tokens of their proxies and of themselves, and what they did."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Index, LargeBinary, Text, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID
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
    expires_at: datetime | None = when(nullable=True)
    revoked_at: datetime | None = when(nullable=True)


class AdminToken(SQLModel, table=True):
    """An operator's token. `scopes` null means all of them."""

    __tablename__ = "admin_token"
    __table_args__ = (
        Index("admin_token_secret", "secret_hash", unique=True),
        Index("admin_token_live_name", "name", unique=True, postgresql_where=text("revoked_at IS NULL")),
    )

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    name: str = words()
    secret_hash: bytes = Field(sa_type=LargeBinary)
    scopes: list[str] | None = Field(default=None, sa_type=ARRAY(Text))
    created_at: datetime = when()
    expires_at: datetime | None = when(nullable=True)
    revoked_at: datetime | None = when(nullable=True)


class TokenUse(SQLModel, table=True):
    """When a token was last used, to the minute. A table of its own: what a token may do is never rewritten for it."""

    __tablename__ = "token_use"

    token_id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    last_used_at: datetime = when()


class AdminLog(SQLModel, table=True):
    """One act of an operator, written in the act's own transaction. Append-only.

    `amount_nusd` is what it moved or allowed; `before` and `after` are JSON texts of what it changed; `proof` is a MAC over
    the rest with the pepper, so that nobody who can only write to the database acts in an operator's name.
    """

    __tablename__ = "admin_log"

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    admin: str = words()
    act: str = words()
    subject: str = words()
    reason: str | None = words(default=None)
    amount_nusd: int | None = money(nullable=True)
    before: str | None = words(default=None)
    after: str | None = words(default=None)
    request_id: str | None = words(default=None)
    proof: bytes | None = Field(default=None, sa_type=LargeBinary)
    created_at: datetime = when()


class AuditRun(SQLModel, table=True):
    """One audit that an operator asked for, and what it found. One runs at a time; whoever runs it says so until it is done."""

    __tablename__ = "audit_run"
    __table_args__ = (
        CheckConstraint("state IN ('running', 'done', 'failed')", name="audit_run_state_known"),
        CheckConstraint("(state = 'running') = (finished_at IS NULL)", name="audit_run_finished_when_it_says"),
        Index("audit_run_one_running", "state", unique=True, postgresql_where=text("state = 'running'")),
    )

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    admin: str = words()
    state: str = words(default="running", sa_column_kwargs={"server_default": "running"})
    started_at: datetime = when()
    alive_until: datetime = when()
    finished_at: datetime | None = when(nullable=True)
    report: dict[str, Any] | None = Field(default=None, sa_type=JSONB)
