"""What top-ups remember: what was asked, what the backend said last, what was credited."""

import uuid
from datetime import datetime
from decimal import Decimal

from sqlalchemy import BigInteger, CheckConstraint, ForeignKeyConstraint, Index, LargeBinary, Numeric, text
from sqlalchemy.dialects.postgresql import UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import account_key, account_key_of_calls, money, when, words


class Topup(SQLModel, table=True):
    """One top-up: written before the backend is asked, so that a crash between the two is found again.

    `amount_units` is in the smallest unit of `currency` (nano-USD for USD); `…_coin_units` in the coin's.
    `status` and `additional_status` are the backend's words, `Creating` until it has answered, and
    `Failed` when it refused. `review` says why a person should look, `finding_id` which of its findings that is, and
    `reviewed` what they dealt with last. `usd_per_coin` is our quote, which fixes what a coin-priced top-up is worth.
    """

    __table_args__ = (
        CheckConstraint("credited_nusd >= 0 AND bonus_nusd >= 0", name="topup_credits_not_negative"),
        CheckConstraint("amount_units > 0", name="topup_amount_positive"),
        Index("topup_due", "next_check_at", postgresql_where=text("next_check_at IS NOT NULL")),
        Index("topup_newest", "account_id", "created_at"),
        Index("topup_settled", "account_id", "settled_at", postgresql_where=text("credited_nusd > 0")),
        Index("topup_by_id", "id"),  # the sweep knows an invoice's order id only
        Index("topup_by_time", "created_at", "id"),
        Index("topup_unapplied", "created_at", postgresql_where=text("credited_nusd = 0 AND paid_coin_units > 0")),
        Index("topup_to_review", "account_id", postgresql_where=text("review IS NOT NULL")),
        Index("topup_unapplied", "created_at", postgresql_where=text("credited_nusd = 0 AND paid_coin_units > 0")),
    )

    account_id: uuid.UUID = account_key()
    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    key_id: uuid.UUID | None = Field(default=None, sa_type=UUID)
    backend: str = words()
    method: str = words()
    currency: str = words()
    amount_units: int = money(default=None)
    status: str = words(default="Creating", sa_column_kwargs={"server_default": "Creating"})
    additional_status: str = words(default="None", sa_column_kwargs={"server_default": "None"})
    invoice_id: str | None = words(default=None)
    checkout_url: str | None = words(default=None)
    destination: str | None = words(default=None)
    payment_link: str | None = words(default=None)
    total_coin_units: int | None = money(nullable=True)
    due_coin_units: int | None = money(nullable=True)
    paid_coin_units: int | None = money(nullable=True)
    fee_coin_units: int | None = money(nullable=True)
    rate: Decimal | None = Field(default=None, sa_type=Numeric)
    usd_per_coin: Decimal | None = Field(default=None, sa_type=Numeric)
    rate_source: str | None = words(default=None)
    rate_at: datetime | None = when(nullable=True)
    credited_nusd: int = money()
    bonus_nusd: int = money()
    bonus_percent: int = money()
    review: str | None = words(default=None)
    reviewed: str | None = words(default=None)
    finding_id: uuid.UUID | None = Field(default=None, sa_type=UUID)
    created_at: datetime = when()
    expires_at: datetime = when()
    watch_until: datetime = when()
    settled_at: datetime | None = when(nullable=True)
    checked_at: datetime | None = when(nullable=True)
    next_check_at: datetime | None = when(nullable=True)


class TopupInvoice(SQLModel, table=True):
    """Which top-up an invoice belongs to: the small lookup table that makes an invoice id unique."""

    __tablename__ = "topup_invoice"

    backend: str = words(primary_key=True)
    invoice_id: str = words(primary_key=True)
    account_id: uuid.UUID = Field(sa_type=UUID)
    topup_id: uuid.UUID = Field(sa_type=UUID)


class TopupAddress(SQLModel, table=True):
    """Every address or Lightning invoice that the backend ever told for a top-up. Append-only: what is shown is one of these.

    A second one comes after a payment only, so a top-up whose address was changed by somebody else is found. The top-up's
    row is locked by the same statement.
    """

    __tablename__ = "topup_address"
    __table_args__ = (Index("topup_address_told", "destination", postgresql_using="hash"),)

    account_id: uuid.UUID = account_key_of_calls()
    topup_id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    destination: str = words(primary_key=True)
    told_at: datetime = when()


class Payment(SQLModel, table=True):
    """One payment towards a top-up, as the backend told it last. `usd_per_coin` is set once it was credited."""

    __table_args__ = (
        ForeignKeyConstraint(["account_id", "topup_id"], ["topup.account_id", "topup.id"]),
        CheckConstraint("status IN ('Processing', 'Settled', 'Invalid')", name="payment_status_known"),
        Index("payment_by_id", "payment_id", postgresql_ops={"payment_id": "text_pattern_ops"}),
        Index(
            "payment_without_worth", "account_id", "topup_id",
            postgresql_where=text("status = 'Settled' AND worth_nusd = 0"),
        ),
    )  # fmt: skip

    account_id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    topup_id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    payment_id: str = words(primary_key=True)
    value_coin_units: int = Field(sa_type=BigInteger)
    fee_coin_units: int = Field(sa_type=BigInteger)
    status: str = words()
    received_at: datetime = when()
    late: bool = Field(default=False)
    worth_nusd: int = money()


class WebhookDelivery(SQLModel, table=True):
    """The inbox: every authentic webhook once, kept raw for 90 days, processed later. A hint, never a fact."""

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        Index("webhook_waiting", "next_try_at", postgresql_where=text("processed_at IS NULL")),
        Index("webhook_with_body", "received_at", postgresql_where=text("octet_length(raw_body) > 0")),
    )

    backend: str = words(primary_key=True)
    delivery_id: str = words(primary_key=True)
    type: str = words(primary_key=True)
    invoice_id: str | None = words(default=None)
    raw_body: bytes = Field(sa_type=LargeBinary)
    received_at: datetime = when()
    processed_at: datetime | None = when(nullable=True)
    next_try_at: datetime = when()
    attempts: int = Field(default=0)
