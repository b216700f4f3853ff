"""offers: refusals that can be paid, and whose a proof of payment is"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "offer",
        sa.Column("account_id", sa.UUID(), sa.ForeignKey("account.id"), nullable=False),
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("key_id", sa.UUID(), nullable=False),
        sa.Column("topup_id", sa.UUID(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("amount_nusd", sa.BigInteger(), nullable=False),
        sa.Column("amount_sats", sa.BigInteger(), nullable=True),
        sa.Column("payment_hash", sa.LargeBinary(), nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("consumed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("consumed_by", sa.Text(), nullable=True),
        sa.Column("told_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('shortfall', 'account')", name="offer_kind_known"),
        sa.CheckConstraint("amount_nusd > 0", name="offer_amount_positive"),
        sa.CheckConstraint("(consumed_at IS NULL) = (consumed_by IS NULL)", name="offer_consumed_by_something"),
        sa.PrimaryKeyConstraint("account_id", "id"),
    )
    op.create_index(
        "offer_open", "offer", ["account_id", "key_id"], unique=True, postgresql_where=sa.text("closed_at IS NULL")
    )
    op.create_index("offer_sealed", "offer", ["created_at"], postgresql_where=sa.text("sealed IS NOT NULL"))
    op.create_table(
        "proof_ref",
        sa.Column("payment_hash", sa.LargeBinary(), nullable=False),
        sa.Column("account_id", sa.UUID(), nullable=False),
        sa.Column("offer_id", sa.UUID(), nullable=False),
        sa.Column("proof", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("payment_hash"),
    )
    op.create_table(
        "offer_ask",
        sa.Column("asked", sa.LargeBinary(), nullable=False),
        sa.Column("account_id", sa.UUID(), nullable=True),
        sa.Column("asked_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("asked"),
    )
    op.create_index("offer_ask_by_age", "offer_ask", ["asked_at"])
    op.execute("GRANT SELECT, INSERT ON offer, proof_ref TO satmeter_runtime")
    op.execute(
        "GRANT UPDATE (amount_nusd, amount_sats, payment_hash, sealed, expires_at, closed_at, consumed_at, consumed_by, told_at)"
        " ON offer TO satmeter_runtime"
    )
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON offer_ask TO satmeter_runtime")

