"""What the books remember: an account's running balance, and the entries that explain it."""

import uuid
from datetime import date, datetime
from enum import StrEnum

from sqlalchemy import BigInteger, CheckConstraint, Date, Index, LargeBinary, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import account_key_of_calls, money, when, words


class AccountStatus(StrEnum):
    ACTIVE = "active"
    FROZEN = "frozen"
    CLOSED = "closed"


class EntryKind(StrEnum):
    """Why money moved. Each kind has its own references, unique per account."""

    TOPUP = "topup"
    BONUS = "bonus"
    USAGE = "usage"
    REFUND = "refund"
    ADJUSTMENT = "adjustment"


class Account(SQLModel, table=True):
    """A customer's balance: `posted` is the sum of its entries, `held` the sum of its open holds.

    There is no CHECK on posted: a settle records what was used, even below the floor. A charge that leaves less
    than `low_nusd` says so, for those who keep the balance filled; null where nobody does. `low_balance_nusd` is what its owner
    calls low. One that leaves less than `notice_mark_nusd` is told to the notices' address, and takes the mark down to the next;
    null where nothing is left to tell. `notice_base_nusd` is the last top-up, of whose shares the marks are.
    """

    __table_args__ = (
        CheckConstraint("held_nusd >= 0", name="account_held_not_negative"),
        CheckConstraint("floor_nusd <= 0", name="account_floor_not_positive"),
        CheckConstraint("low_balance_nusd >= 0", name="account_low_balance_not_negative"),
        CheckConstraint("status IN ('active', 'frozen', 'closed')", name="account_status_known"),
        {"postgresql_with": {"fillfactor": 50}},  # room for updates in place: this is the hottest row there is
    )

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    posted_nusd: int = money()
    held_nusd: int = money()
    floor_nusd: int = money()
    entry_count: int = money()
    low_nusd: int | None = money(nullable=True)
    low_balance_nusd: int | None = money(nullable=True)
    notice_base_nusd: int | None = money(nullable=True)
    notice_mark_nusd: int | None = money(nullable=True)
    status: str = words(default="active", sa_column_kwargs={"server_default": "active"})
    created_at: datetime = when()
    updated_at: datetime = when()


class Entry(SQLModel, table=True):
    """One movement between an account and a house account (`contra`), double entry in one row.

    `id` counts 1, 2, 3 … within its account without a gap, so a missing entry shows. Append-only: the
    runtime role may not UPDATE or DELETE here; a mistake is corrected by another entry. `usage_id` is the call
    behind an entry of usage.
    """

    __table_args__ = (
        UniqueConstraint("reference", "kind", "account_id", name="entry_once"),
        CheckConstraint("kind IN ('topup', 'bonus', 'usage', 'refund', 'adjustment')", name="entry_kind_known"),
        CheckConstraint("(kind = 'usage') = (usage_id IS NOT NULL)", name="entry_of_usage_has_its_call"),
        Index("entry_not_of_calls", "created_at", postgresql_where=text("kind IN ('topup', 'bonus', 'adjustment')")),
        Index("entry_by_time", "created_at", postgresql_using="brin", postgresql_with={"autosummarize": "on"}),
        Index("entry_refund", "created_at", postgresql_where=text("kind = 'refund'")),
    )

    account_id: uuid.UUID = account_key_of_calls()
    id: int = Field(sa_type=BigInteger, primary_key=True, sa_column_kwargs={"autoincrement": False})
    kind: str = words()
    reference: str = words()
    contra: str = words()
    amount_nusd: int = money(default=None)
    balance_after_nusd: int = money(default=None)
    usage_id: uuid.UUID | None = Field(default=None, sa_type=UUID)
    created_at: datetime = when()


class EntryClosing(SQLModel, table=True):
    """What is kept of entries of usage that were put away: those of one account from `first_id` to `last_id`, without a gap.

    `month` names the archive of usage_archive that their calls are in. `amount_nusd` is their sum, `balance_after_nusd` the balance
    carried on, `digest` a SHA-256 over their own digests, `mac` a MAC by the pepper over all of it: whoever can only write to the
    database cannot make one. Written by the database's owner alone, and never changed.
    """

    __tablename__ = "entry_closing"
    __table_args__ = (CheckConstraint("first_id > 0 AND last_id >= first_id", name="entry_closing_has_entries"),)

    account_id: uuid.UUID = account_key_of_calls()
    first_id: int = Field(sa_type=BigInteger, primary_key=True, sa_column_kwargs={"autoincrement": False})
    last_id: int = money(default=None)
    month: date = Field(sa_type=Date)
    amount_nusd: int = money(default=None)
    balance_after_nusd: int = money(default=None)
    ended_at: datetime = when()
    digest: bytes = Field(sa_type=LargeBinary)
    mac: bytes = Field(sa_type=LargeBinary)
