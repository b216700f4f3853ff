"""What metering remembers: money held for calls in flight, and what each call cost."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Index, Integer, LargeBinary, text
from sqlalchemy.dialects.postgresql import JSONB, UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import account_key_of_calls, money, when, words


class Hold(SQLModel, table=True):
    """Money set aside for one call.

    `id` is derived from (service, request_id), so the primary key is what makes a request_id unique: a charge without a
    hold leaves a row too, already settled. `request_hash` tells a repeat of the request that made it from another one.
    `window_start` is the key's window in which the call began, and to which its cost will count. `created_at` is the
    moment by whose prices the call is priced. `captured_nusd` is what the call has cost so far, as its proxy said:
    it cannot be released, and `on_expiry` says what becomes of a hold that nobody settles: what was captured is charged,
    or all that is held, or nothing.
    """

    __table_args__ = (
        CheckConstraint("amount_nusd >= 0", name="hold_amount_not_negative"),
        CheckConstraint("state IN ('open', 'settled', 'released', 'expired')", name="hold_state_known"),
        CheckConstraint("(state = 'open') = (closed_at IS NULL)", name="hold_closed_at_when_closed"),
        CheckConstraint("captured_nusd BETWEEN 0 AND amount_nusd", name="hold_captured_within_amount"),
        CheckConstraint("on_expiry IN ('captured', 'hold', 'release')", name="hold_on_expiry_known"),
        Index("hold_open", "expires_at", "account_id", postgresql_where=text("state = 'open'")),
        Index("hold_closed", "closed_at", postgresql_where=text("closed_at IS NOT NULL")),
    )

    account_id: uuid.UUID = account_key_of_calls()
    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    service: str = words()
    request_id: str = words()
    request_hash: bytes = Field(sa_type=LargeBinary)
    key_id: uuid.UUID = Field(sa_type=UUID)
    window_start: datetime = when()
    amount_nusd: int = money(default=None)
    captured_nusd: int = money()
    state: str = words(default="open", sa_column_kwargs={"server_default": "open"})
    on_expiry: str = words(default="captured", sa_column_kwargs={"server_default": "captured"})
    model: str | None = words(default=None)
    endpoint: str | None = words(default=None)
    price_version: int | None = Field(default=None, sa_type=Integer)
    attributes: dict[str, Any] | None = Field(default=None, sa_type=JSONB(none_as_null=True))
    created_at: datetime = when()
    expires_at: datetime = when()
    closed_at: datetime | None = when(nullable=True)


class Usage(SQLModel, table=True):
    """One call that was charged; its id is the charge id, a UUIDv7, and tells the month whose partition it is in.

    `hold_id` is the hold's, and derived from (service, request_id) also for a call without one. That a call is
    charged once is the promise of its entry, which is kept when a month of calls is dropped. `units` are what was
    used, as the proxy told it; `lines` are what it cost by the catalogue (quote.py), null where the call came priced.
    `upstream_model` and `provider_cost_nusd` are what the proxy says it was served by and paid itself: never charged.
    """

    __table_args__ = (
        CheckConstraint("cost_nusd >= 0", name="usage_cost_not_negative"),
        Index("usage_of_key", "key_id", "id"),
        Index("usage_of_upstream", "account_id", "upstream_id", postgresql_where=text("upstream_id IS NOT NULL")),
        Index("usage_by_time", "id", postgresql_using="brin", postgresql_with={"autosummarize": "on"}),
        {"postgresql_partition_by": "RANGE (id)"},
    )

    account_id: uuid.UUID = account_key_of_calls()
    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    hold_id: uuid.UUID = Field(sa_type=UUID)
    service: str = words()
    request_id: str = words()
    key_id: uuid.UUID = Field(sa_type=UUID)
    window_start: datetime = when()
    model: str | None = words(default=None)
    served_model: str | None = words(default=None)
    provider: str | None = words(default=None)
    endpoint: str | None = words(default=None)
    outcome: str = words()
    upstream_id: str | None = words(default=None)
    upstream_model: str | None = words(default=None)
    cost_nusd: int = money(default=None)
    provider_cost_nusd: int | None = money(nullable=True)
    balance_after_nusd: int = money(default=None)
    held_after_nusd: int = money(default=None)
    latency_ms: int | None = Field(default=None, sa_type=Integer)
    ttft_ms: int | None = Field(default=None, sa_type=Integer)
    units: dict[str, Any] | None = Field(default=None, sa_type=JSONB(none_as_null=True))
    price_version: int | None = Field(default=None, sa_type=Integer)
    lines: dict[str, Any] | None = Field(default=None, sa_type=JSONB(none_as_null=True))
    flags: str = words(default="", sa_column_kwargs={"server_default": ""})
    created_at: datetime = when()
