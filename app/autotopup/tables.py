"""What auto-topup remembers: the wallet an account is connected to, and every attempt to be paid by one."""

import uuid
from datetime import datetime

from sqlalchemy import CheckConstraint, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, UUID
from sqlmodel import Field, SQLModel

from app.autotopup.rules import OPEN, UNPAID, State
from app.kernel.tables import account_key, money, when, words


def states_sql(states: frozenset[State]) -> str:
    """The states as SQL's list of texts, always in one order."""
    return ", ".join(f"'{state.value}'" for state in State if state in states)


class NwcConnection(SQLModel, table=True):
    """An account's wallet. `id` changes with every connect, so that an attempt knows whether it is still the same one.

    The secret is sealed, bound to `nwc/<account_id>`. `refusals` counts those in a row, `refused_at` is the last of
    them; `not_before` is when the next attempt may begin; `silent_since` is when the first attempt was sent that got
    no answer, since the last one that did. `pause` is one of `rules.PAUSES`, null while active.
    """

    __tablename__ = "nwc_connection"
    __table_args__ = (
        CheckConstraint("threshold_nusd > 0 AND topup_amount_nusd > 0", name="nwc_connection_amounts_positive"),
        CheckConstraint("max_per_day_nusd >= topup_amount_nusd", name="nwc_connection_cap_allows_one"),
        CheckConstraint("refusals >= 0", name="nwc_connection_refusals_not_negative"),
    )

    account_id: uuid.UUID = account_key()
    id: uuid.UUID = Field(sa_type=UUID)
    wallet_pubkey: str = words()
    relays: list[str] = Field(sa_type=ARRAY(Text))
    lud16: str | None = words(default=None)
    encryption: str = words()
    can_look_up: bool = Field(default=False)
    sealed_secret: str = words()
    threshold_nusd: int = money(default=None)
    topup_amount_nusd: int = money(default=None)
    max_per_day_nusd: int | None = money(nullable=True)
    pause: str | None = words(default=None)
    refusals: int = money()
    refused_at: datetime | None = when(nullable=True)
    silent_since: datetime | None = when(nullable=True)
    not_before: datetime | None = when(nullable=True)
    created_at: datetime = when()


class NwcAttempt(SQLModel, table=True):
    """One attempt: an ordinary top-up that a wallet is asked to pay, at most one open per account.

    `topup_id` is made with the attempt, so that a crash before the invoice finds the same top-up again. `event_id` is
    the request as it was signed, committed before it is sent; `sends` counts those. `code` is the wallet's last error,
    `reason` one of `rules.REASONS`. A driver holds it until `claimed_until`, which also tells a later driver from it.
    """

    __tablename__ = "nwc_attempt"
    __table_args__ = (
        UniqueConstraint("account_id", "topup_id", name="nwc_attempt_topup_once"),
        UniqueConstraint("account_id", "payment_hash", name="nwc_attempt_payment_once"),
        CheckConstraint(f"state IN ({states_sql(frozenset(State))})", name="nwc_attempt_state_known"),
        CheckConstraint(f"(state IN ({states_sql(OPEN)})) = (closed_at IS NULL)", name="nwc_attempt_closed_when_it_says"),
        CheckConstraint("state <> 'sent' OR event_id IS NOT NULL", name="nwc_attempt_sent_has_event"),
        CheckConstraint("sends = 0 OR payment_hash IS NOT NULL", name="nwc_attempt_sent_has_invoice"),
        CheckConstraint("sends BETWEEN 0 AND 2", name="nwc_attempt_sent_twice_at_most"),
        CheckConstraint("amount_nusd > 0", name="nwc_attempt_amount_positive"),
        Index(
            "nwc_attempt_one_open", "account_id", unique=True, postgresql_where=text(f"state IN ({states_sql(OPEN)})")
        ),
        Index("nwc_attempt_due", "next_at", postgresql_where=text("next_at IS NOT NULL")),
        Index("nwc_attempt_newest", "account_id", "created_at"),
        Index("nwc_attempt_by_time", "created_at"),
        Index("nwc_attempt_unpaid", "closed_at", postgresql_where=text(f"state IN ({states_sql(UNPAID)})")),
    )  # fmt: skip

    account_id: uuid.UUID = account_key()
    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    topup_id: uuid.UUID = Field(sa_type=UUID)
    connection_id: uuid.UUID = Field(sa_type=UUID)
    amount_nusd: int = money(default=None)
    state: str = words()
    bolt11: str | None = words(default=None)
    payment_hash: str | None = words(default=None)
    invoice_expires_at: datetime | None = when(nullable=True)
    event_id: str | None = words(default=None)
    sends: int = money()
    code: str | None = words(default=None)
    reason: str | None = words(default=None)
    is_proven: bool = Field(default=False, sa_column_kwargs={"server_default": "false"})
    looks: int = money()
    created_at: datetime = when()
    sent_at: datetime | None = when(nullable=True)
    answered_at: datetime | None = when(nullable=True)
    closed_at: datetime | None = when(nullable=True)
    next_at: datetime | None = when(nullable=True)
    claimed_until: datetime | None = when(nullable=True)
