"""What is remembered of credentials: who a secret belongs to, and what a key may spend."""

import uuid
from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, CheckConstraint, DateTime, Index, Integer, LargeBinary, Text, text
from sqlalchemy.dialects.postgresql import ARRAY, UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import account_key, money, when, words


class ResetPeriod(StrEnum):
    """How often a key's window starts anew (UTC); the values are `date_trunc`'s own words."""

    DAILY = "day"
    WEEKLY = "week"
    MONTHLY = "month"


class Credential(SQLModel, table=True):
    """Secret → whose it is. A small lookup table, immutable but for deletion, so it may be cached.

    `proof` is a MAC over the rest with the pepper: two hashes that somebody swapped in the database have none.
    `key_id` is an API key's, or says which recovery code or binding of a Nostr key it is: made in the order of time, and never
    twice. What ends is written anew with `ends_at`. `label` is what its owner is shown of it, such as an npub.
    """

    __table_args__ = (
        CheckConstraint("kind IN ('credit_id', 'api_key', 'recovery_code', 'nostr')", name="credential_kind_known"),
        Index("credential_of_owner", "account_id", postgresql_where=text("kind <> 'api_key'")),
        Index("credential_by_time", "created_at", postgresql_using="brin", postgresql_with={"autosummarize": "on"}),
    )

    secret_hash: bytes = Field(sa_type=LargeBinary, primary_key=True)
    kind: str = words()
    account_id: uuid.UUID = Field(sa_type=UUID)
    key_id: uuid.UUID | None = Field(default=None, sa_type=UUID)
    proof: bytes | None = Field(default=None, sa_type=LargeBinary)
    created_at: datetime = when()
    ends_at: datetime | None = when(nullable=True)
    label: str | None = words(default=None)


class CredentialEvent(SQLModel, table=True):
    """What was done with an account's credentials, and by what: its owner's own log. Append-only.

    `shown_by` is the kind of credential that was shown for it, or `operator`; `subject` the key or npub it was done to.
    `proof` is a MAC over the rest.
    """

    __tablename__ = "credential_event"

    account_id: uuid.UUID = account_key()
    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    act: str = words()
    shown_by: str = words()
    subject: str | None = words(default=None)
    proof: bytes = Field(sa_type=LargeBinary)
    created_at: datetime = when()


class NostrEvent(SQLModel, table=True):
    """A signed event that was taken once, so that it is not taken again; kept for an hour, it holds for a minute."""

    __tablename__ = "nostr_event"

    account_id: uuid.UUID = account_key()
    event_id: bytes = Field(sa_type=LargeBinary, primary_key=True)
    taken_at: datetime = when()


class ApiKey(SQLModel, table=True):
    """A key's limits and what it has spent, it and the keys below it.

    `ancestor_ids` are the keys that it stands under, from the root down to `parent_id`: written once, as nobody changes parents.
    What a key is charged counts to each of them too, in `window_usage_nusd`, `held_nusd` and `minute_calls`; `lifetime_nusd`
    is its own calls alone, so that an account's keys add up to what the account used.

    The window rolls lazily: it is over when `window_start` lies before the period that now is in.
    `window_usage_nusd` sums the charges that began in this window; `held_nusd` all open holds. `minute_calls` counts
    the calls that were admitted in the minute of `minute_start`, where there is a limit to them.
    `more_…` are further windows of the key, as long as each other: period (null: for ever), limit, start and usage. The audit
    sees to it: what a CHECK says is prepared anew for every call.
    `masked_hash` is the secret's SHA-256 under a pad of the pepper's: without that it tells nothing.
    `revision` counts its changes, and `proof` is a MAC over all that a person set: whoever can only write to the database raises
    no limit unseen.
    """

    __tablename__ = "api_key"
    __table_args__ = (
        CheckConstraint("held_nusd >= 0", name="api_key_held_not_negative"),
        CheckConstraint("limit_nusd IS NULL OR limit_nusd >= 0", name="api_key_limit_not_negative"),
        CheckConstraint("reset_period IN ('day', 'week', 'month')", name="api_key_period_known"),
        CheckConstraint("reset_period IS NULL OR limit_nusd IS NOT NULL", name="api_key_period_needs_limit"),
        CheckConstraint("call_limit_nusd > 0", name="api_key_call_limit_positive"),
        CheckConstraint("requests_per_minute > 0", name="api_key_requests_positive"),
        Index("api_key_by_id", "id"),  # an operator may know no more of a key, or its preview
        Index("api_key_by_preview", "preview"),
        Index("api_key_by_change", "updated_at"),
        Index("api_key_live_name", "name", "account_id", unique=True, postgresql_where=text("deleted_at IS NULL")),
        {"postgresql_with": {"fillfactor": 50}},
    )

    account_id: uuid.UUID = account_key()
    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    name: str = words()
    preview: str = words()
    sealed_secret: str | None = words(default=None)
    masked_hash: bytes | None = Field(default=None, sa_type=LargeBinary)
    limit_nusd: int | None = money(nullable=True)
    reset_period: str | None = words(default=None)
    call_limit_nusd: int | None = money(nullable=True)
    requests_per_minute: int | None = Field(default=None, sa_type=Integer)
    minute_start: datetime | None = when(nullable=True)
    minute_calls: int | None = Field(default=None, sa_type=Integer)
    window_start: datetime = when()
    window_usage_nusd: int = money()
    held_nusd: int = money()
    lifetime_nusd: int = money()
    scopes: list[str] | None = Field(default=None, sa_type=ARRAY(Text))
    allowed_models: list[str] | None = Field(default=None, sa_type=ARRAY(Text))
    expire_at: datetime | None = when(nullable=True)
    disabled_at: datetime | None = when(nullable=True)
    deleted_at: datetime | None = when(nullable=True)
    created_at: datetime = when()
    updated_at: datetime = when()
    revision: int = money(default=1)
    proof: bytes | None = Field(default=None, sa_type=LargeBinary)
    parent_id: uuid.UUID | None = Field(default=None, sa_type=UUID)
    ancestor_ids: list[uuid.UUID] | None = Field(default=None, sa_type=ARRAY(UUID))
    more_periods: list[str | None] | None = Field(default=None, sa_type=ARRAY(Text))
    more_limits_nusd: list[int] | None = Field(default=None, sa_type=ARRAY(BigInteger))
    more_starts: list[datetime] | None = Field(default=None, sa_type=ARRAY(DateTime(timezone=True)))
    more_usage_nusd: list[int] | None = Field(default=None, sa_type=ARRAY(BigInteger))
