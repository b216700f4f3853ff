"""What notices remember: where an account's go, and each one that was written, until it is delivered and long forgotten."""

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import CheckConstraint, Index, Integer, Text, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import account_key_of_calls, when, words


class Channel(StrEnum):
    """How a notice travels."""

    WEBHOOK = "webhook"
    NOSTR = "nostr"


class DeliveryState(StrEnum):
    """PENDING: to be sent, or sent again. DEAD: given up; kept to be seen, and sent again when its owner asks."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


class NoticeAddress(SQLModel, table=True):
    """Where an account's notices go. The operator's stand under the house's id, which is no account's.

    The URL may hold a token and is sealed like the signing secrets, bound to `notice/<account_id>/<what>`; `url_shown` is what
    may be shown of it. `id` changes with the URL, so that an answer of an old one switches off no new one. `npub` is a public
    key in hex. `events` null: all. `runway_told_at` is null while a short runway is still to be told.
    """

    __tablename__ = "notice_address"
    __table_args__ = (
        CheckConstraint(
            "(sealed_url IS NULL) = (sealed_secret IS NULL) AND (sealed_url IS NULL) = (url_shown IS NULL)",
            name="notice_address_webhook_is_whole",
        ),
        CheckConstraint(
            "(sealed_secret_before IS NULL) = (secret_before_until IS NULL)", name="notice_address_overlap_ends"
        ),
    )

    account_id: uuid.UUID = account_key_of_calls()
    id: uuid.UUID = Field(sa_type=UUID)
    sealed_url: str | None = words(default=None)
    url_shown: str | None = words(default=None)
    sealed_secret: str | None = words(default=None)
    sealed_secret_before: str | None = words(default=None)
    secret_before_until: datetime | None = when(nullable=True)
    webhook_off_at: datetime | None = when(nullable=True)
    npub: str | None = words(default=None)
    events: list[str] | None = Field(default=None, sa_type=ARRAY(Text))
    runway_told_at: datetime | None = when(nullable=True)
    created_at: datetime = when()
    updated_at: datetime = when()


class Notice(SQLModel, table=True):
    """The outbox: one row for each way that a notice goes, written in the transaction of its cause.

    `id` is the same on every way and at every attempt: the `webhook-id`. `sealed_target` is set where it goes elsewhere than
    to the account's address of today: what tells of a change is told to the old one. A courier holds a row until
    `claimed_until`. `status` and `error` are of the last attempt; no word of a stranger's answer is kept.
    """

    __table_args__ = (
        CheckConstraint("channel IN ('webhook', 'nostr')", name="notice_channel_known"),
        CheckConstraint("state IN ('pending', 'delivered', 'dead')", name="notice_state_known"),
        CheckConstraint(
            "(state = 'pending') = (next_at IS NOT NULL) AND (state = 'pending') = (closed_at IS NULL)",
            name="notice_pending_has_its_time",
        ),
        CheckConstraint("attempts >= 0", name="notice_attempts_not_negative"),
        Index("notice_due", "next_at", "account_id", postgresql_where=text("state = 'pending'")),
        Index("notice_newest", "account_id", "created_at"),
        Index("notice_closed", "closed_at", postgresql_where=text("closed_at IS NOT NULL")),
    )

    account_id: uuid.UUID = account_key_of_calls()
    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    channel: str = words(primary_key=True)
    type: str = words()
    data: dict[str, Any] = Field(sa_type=JSONB)
    state: str = words(default="pending", sa_column_kwargs={"server_default": "pending"})
    attempts: int = Field(default=0, sa_type=Integer, sa_column_kwargs={"server_default": "0"})
    sealed_target: str | None = words(default=None)
    status: int | None = Field(default=None, sa_type=Integer)
    error: str | None = words(default=None)
    created_at: datetime = when()
    next_at: datetime | None = when(nullable=True)
    claimed_until: datetime | None = when(nullable=True)
    closed_at: datetime | None = when(nullable=True)
