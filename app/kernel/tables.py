"""What every room shares: column shapes, saved answers, counters of a rate limit, leases of jobs."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Index, LargeBinary, Text, func
from sqlalchemy.dialects.postgresql import UUID
from sqlmodel import Field, SQLModel


def money(*, default: int | None = 0, nullable: bool = False) -> Any:
    """A BIGINT column: SQLModel's own int would be 32 bits wide."""
    server_default = None if default is None or nullable else str(default)
    return Field(
        default=None if nullable else default,
        sa_type=BigInteger,
        nullable=nullable,
        sa_column_kwargs={"server_default": server_default} if server_default else {},
    )


def when(*, nullable: bool = False) -> Any:
    """A timestamptz column; one that may not be null is filled with the transaction's time."""
    return Field(
        default=None,
        sa_type=DateTime(timezone=True),
        nullable=nullable,
        sa_column_kwargs={} if nullable else {"server_default": func.now()},
    )


def words(**kwargs: Any) -> Any:
    return Field(sa_type=Text, **kwargs)


def account_key() -> Any:
    """The account_id that leads every primary key, so that the schema shards by it."""
    return Field(sa_type=UUID, primary_key=True, foreign_key="account.id")


def account_key_of_calls() -> Any:
    """The same where every call writes a row, with the account's row locked by the same statement: no foreign key.

    An account is never deleted, and the audit finds a row without one; the checks would be a fifth of a call's cost.
    """
    return Field(sa_type=UUID, primary_key=True)


class Idempotency(SQLModel, table=True):
    """The saved answer to a POST, sealed, so that a repeat gets it again.

    `scope_key` is a MAC over the caller and the Idempotency-Key. `answer` is null while the first request
    runs; `claimed_until` is when it is given up for dead and the next one may run.
    """

    __table_args__ = (Index("idempotency_by_age", "created_at"),)

    scope_key: bytes = Field(sa_type=LargeBinary, primary_key=True)
    request_hash: bytes = Field(sa_type=LargeBinary)
    answer: bytes | None = Field(default=None, sa_type=LargeBinary)
    created_at: datetime = when()
    claimed_until: datetime = when()


class RateCount(SQLModel, table=True):
    """How often something was done from somewhere in one window."""

    __tablename__ = "rate_count"
    bucket: str = words(primary_key=True)
    window_start: datetime = Field(sa_type=DateTime(timezone=True), primary_key=True)
    count: int = money(default=1)


class KeptFigure(SQLModel, table=True):
    """A figure that one process found and every process tells; a handful of rows."""

    __tablename__ = "figure"
    name: str = words(primary_key=True)
    value: int = money(default=None)
    found_at: datetime = when()


class JobLease(SQLModel, table=True):
    """Which process leads in a job that one alone should do, and until when."""

    __tablename__ = "job_lease"
    name: str = words(primary_key=True)
    holder: uuid.UUID = Field(sa_type=UUID)
    claimed_until: datetime = Field(sa_type=DateTime(timezone=True))
