"""What offers remember: which top-up cures whose refusal, and whose a proof of payment is."""

import uuid
from datetime import datetime

from sqlalchemy import CheckConstraint, Index, LargeBinary, text
from sqlalchemy.dialects.postgresql import UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import account_key, money, when, words


class Offer(SQLModel, table=True):
    """A top-up that a refusal offers. Its row is there before the backend is asked; `payment_hash` once it can be paid.

    One of a key is open, until another takes its place (`closed_at`). `consumed_by` names the call that the single-use proof
    was spent on. `sealed` are a new account's secrets, until they were told for a day (`told_at`).
    """

    __table_args__ = (
        CheckConstraint("kind IN ('shortfall', 'account')", name="offer_kind_known"),
        CheckConstraint("amount_nusd > 0", name="offer_amount_positive"),
        CheckConstraint("(consumed_at IS NULL) = (consumed_by IS NULL)", name="offer_consumed_by_something"),
        Index("offer_open", "account_id", "key_id", unique=True, postgresql_where=text("closed_at IS NULL")),
        Index("offer_sealed", "created_at", postgresql_where=text("sealed IS NOT NULL")),
    )

    account_id: uuid.UUID = account_key()
    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    key_id: uuid.UUID = Field(sa_type=UUID)
    topup_id: uuid.UUID = Field(sa_type=UUID)
    kind: str = words()
    amount_nusd: int = money(default=None)
    amount_sats: int | None = money(nullable=True)
    payment_hash: bytes | None = Field(default=None, sa_type=LargeBinary)
    sealed: bytes | None = Field(default=None, sa_type=LargeBinary)
    created_at: datetime = when()
    expires_at: datetime = when()
    closed_at: datetime | None = when(nullable=True)
    consumed_at: datetime | None = when(nullable=True)
    consumed_by: str | None = words(default=None)
    told_at: datetime | None = when(nullable=True)


class ProofRef(SQLModel, table=True):
    """Whose a payment hash is: the small lookup table that makes it unique. Append-only.

    `proof` is a MAC over the rest, and the key that the offer was made for: a hash that somebody gave to another account in
    the database has none.
    """

    __tablename__ = "proof_ref"

    payment_hash: bytes = Field(sa_type=LargeBinary, primary_key=True)
    account_id: uuid.UUID = Field(sa_type=UUID)
    offer_id: uuid.UUID = Field(sa_type=UUID)
    proof: bytes = Field(sa_type=LargeBinary)


class OfferAsk(SQLModel, table=True):
    """Who asked for which new account a moment ago: payers ask twice before they pay, and are shown the same invoice."""

    __tablename__ = "offer_ask"
    __table_args__ = (Index("offer_ask_by_age", "asked_at"),)

    asked: bytes = Field(sa_type=LargeBinary, primary_key=True)
    account_id: uuid.UUID | None = Field(default=None, sa_type=UUID)
    asked_at: datetime = when()
