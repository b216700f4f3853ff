"""auto-topup: connected wallets, and each attempt to be paid by one"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_OPEN = "state IN ('created', 'invoiced', 'sent', 'paid_reported', 'unknown')"
_UNPAID = "state IN ('rejected', 'expired')"


def upgrade() -> None:
    op.create_table(
        "nwc_connection",
        sa.Column("account_id", sa.UUID(), nullable=False),
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("wallet_pubkey", sa.Text(), nullable=False),
        sa.Column("relays", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("lud16", sa.Text(), nullable=True),
        sa.Column("encryption", sa.Text(), nullable=False),
        sa.Column("can_look_up", sa.Boolean(), nullable=False),
        sa.Column("sealed_secret", sa.Text(), nullable=False),
        sa.Column("threshold_nusd", sa.BigInteger(), nullable=False),
        sa.Column("topup_amount_nusd", sa.BigInteger(), nullable=False),
        sa.Column("max_per_day_nusd", sa.BigInteger(), nullable=True),
        sa.Column("pause", sa.Text(), nullable=True),
        sa.Column("refusals", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("refused_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("silent_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "threshold_nusd > 0 AND topup_amount_nusd > 0", name="nwc_connection_amounts_positive"
        ),
        sa.CheckConstraint("max_per_day_nusd >= topup_amount_nusd", name="nwc_connection_cap_allows_one"),
        sa.CheckConstraint("refusals >= 0", name="nwc_connection_refusals_not_negative"),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"]),
        sa.PrimaryKeyConstraint("account_id"),
    )
    op.create_table(
        "nwc_attempt",
        sa.Column("account_id", sa.UUID(), nullable=False),
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("topup_id", sa.UUID(), nullable=False),
        sa.Column("connection_id", sa.UUID(), nullable=False),
        sa.Column("amount_nusd", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("bolt11", sa.Text(), nullable=True),
        sa.Column("payment_hash", sa.Text(), nullable=True),
        sa.Column("invoice_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("event_id", sa.Text(), nullable=True),
        sa.Column("sends", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("is_proven", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("looks", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("answered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_until", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('created', 'invoiced', 'sent', 'paid_reported', 'unknown', 'rejected', 'settled', 'expired')",
            name="nwc_attempt_state_known",
        ),
        sa.CheckConstraint(f"({_OPEN}) = (closed_at IS NULL)", name="nwc_attempt_closed_when_it_says"),
        sa.CheckConstraint("state <> 'sent' OR event_id IS NOT NULL", name="nwc_attempt_sent_has_event"),
        sa.CheckConstraint("sends = 0 OR payment_hash IS NOT NULL", name="nwc_attempt_sent_has_invoice"),
        sa.CheckConstraint("sends BETWEEN 0 AND 2", name="nwc_attempt_sent_twice_at_most"),
        sa.CheckConstraint("amount_nusd > 0", name="nwc_attempt_amount_positive"),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"]),
        sa.PrimaryKeyConstraint("account_id", "id"),
        sa.UniqueConstraint("account_id", "topup_id", name="nwc_attempt_topup_once"),
        sa.UniqueConstraint("account_id", "payment_hash", name="nwc_attempt_payment_once"),
    )
    op.create_index(
        "nwc_attempt_one_open", "nwc_attempt", ["account_id"], unique=True, postgresql_where=sa.text(_OPEN)
    )
    op.create_index("nwc_attempt_due", "nwc_attempt", ["next_at"], postgresql_where=sa.text("next_at IS NOT NULL"))
    op.create_index("nwc_attempt_newest", "nwc_attempt", ["account_id", "created_at"])
    op.create_index("nwc_attempt_unpaid", "nwc_attempt", ["closed_at"], postgresql_where=sa.text(_UNPAID))
    # When an account was topped up last forgives its wallet, which is looked for every 30 seconds.
    op.create_index(
        "topup_settled", "topup", ["account_id", "settled_at"], postgresql_where=sa.text("credited_nusd > 0")
    )
    for rights, table in _RIGHTS.items():
        op.execute(f"GRANT {rights} ON {table} TO satmeter_runtime")


_RIGHTS = {
    "SELECT, INSERT, UPDATE, DELETE": "nwc_connection",  # a secret that its owner takes away is gone
    "SELECT, INSERT, UPDATE": "nwc_attempt",
}
