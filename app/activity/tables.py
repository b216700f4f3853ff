"""What activity remembers: calls summed by day, and what is kept of months whose calls were dropped."""

import uuid
from datetime import date, datetime

from sqlalchemy import Boolean, CheckConstraint, Date, DateTime, Index, LargeBinary, PrimaryKeyConstraint
from sqlalchemy.dialects.postgresql import UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import account_key, money, when, words


class UsageDay(SQLModel, table=True):
    """The calls of one account, UTC day, key and model, and of the model and provider that answered; '' where none was named.

    A refund counts to the day of its call. `known_requests` are those whose provider told its cost, `known_nusd` what they were
    charged and `provider_nusd` what they cost it. The balance answer and the auditor read this table too.
    """

    __tablename__ = "usage_day"
    __table_args__ = (
        PrimaryKeyConstraint("account_id", "day", "key_id", "model", "served_model", "provider"),
        CheckConstraint("requests > 0 AND cost_nusd >= refunded_nusd AND refunded_nusd >= 0", name="usage_day_adds_up"),
        Index("usage_day_by_day", "day"),
    )

    account_id: uuid.UUID = account_key()
    day: date = Field(sa_type=Date, primary_key=True)
    key_id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    model: str = words(primary_key=True)
    requests: int = money(default=None)
    input_tokens: int = money(default=None)
    output_tokens: int = money(default=None)
    cost_nusd: int = money(default=None)
    refunded_nusd: int = money(default=None)
    served_model: str = words(primary_key=True, default="", sa_column_kwargs={"server_default": ""})
    provider: str = words(primary_key=True, default="", sa_column_kwargs={"server_default": ""})
    reasoning_tokens: int = money()
    known_requests: int = money()
    known_nusd: int = money()
    provider_nusd: int = money()


class UsageSummed(SQLModel, table=True):
    """How many of an account's entries usage_day tells: the first ones. Who sums more of them holds this row."""

    __tablename__ = "usage_summed"

    account_id: uuid.UUID = account_key()
    entries: int = money()


class UsageDropped(SQLModel, table=True):
    """What a key's calls of a dropped month or day cost, by the window they counted to: what key and entries are audited by.

    `month` is its archive's: the first day of the month, or the day.
    """

    __tablename__ = "usage_dropped"

    account_id: uuid.UUID = account_key()
    month: date = Field(sa_type=Date, primary_key=True)
    key_id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    window_start: datetime = Field(sa_type=DateTime(timezone=True), primary_key=True)
    calls: int = money(default=None)
    cost_nusd: int = money(default=None)
    refunded_nusd: int = money(default=None)


class UsageArchive(SQLModel, table=True):
    """A month of calls, or a day of them, that was exported, and perhaps dropped; `month` is its first day, or that day.

    `sha256` is the exported file's; `fingerprint` tells whether the month's rows of usage_day are those of the drop. The entries
    of dropped calls may follow them: how many, their file's SHA-256, a digest over their closings, and when.
    """

    __tablename__ = "usage_archive"
    __table_args__ = (
        CheckConstraint("(dropped_at IS NULL) = (fingerprint IS NULL)", name="usage_archive_fingerprint_when_dropped"),
    )

    month: date = Field(sa_type=Date, primary_key=True)
    is_day: bool = Field(default=False, sa_type=Boolean, sa_column_kwargs={"server_default": "false"})
    calls: int = money(default=None)
    cost_nusd: int = money(default=None)
    sha256: str = words()
    exported_at: datetime = when()
    dropped_at: datetime | None = when(nullable=True)
    fingerprint: str | None = words(default=None)
    entries: int | None = money(nullable=True)
    entries_sha256: str | None = words(default=None)
    entries_digest: bytes | None = Field(default=None, sa_type=LargeBinary)
    entries_exported_at: datetime | None = when(nullable=True)
    entries_dropped_at: datetime | None = when(nullable=True)
