"""activity: what was used, summed by day; and what is kept of months whose calls were dropped"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# The service adds to the days and sums them anew; what is kept of a dropped month is its owner's alone.
_RIGHTS = {
    "SELECT, INSERT, UPDATE, DELETE": ("usage_day",),
    "SELECT, INSERT, UPDATE": ("rollup_day",),
    "SELECT": ("usage_dropped", "usage_archive"),
}


def upgrade() -> None:
    op.create_table(
        "usage_day",
        sa.Column("account_id", sa.UUID(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("key_id", sa.UUID(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost_nusd", sa.BigInteger(), nullable=False),
        sa.Column("refunded_nusd", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("requests > 0 AND cost_nusd >= refunded_nusd AND refunded_nusd >= 0", name="usage_day_adds_up"),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"]),
        sa.PrimaryKeyConstraint("account_id", "day", "key_id", "model"),
    )
    op.create_index("usage_day_by_day", "usage_day", ["day"])
    op.create_table(
        "rollup_day",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("rolled_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("day"),
    )
    op.create_table(
        "usage_dropped",
        sa.Column("account_id", sa.UUID(), nullable=False),
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("key_id", sa.UUID(), nullable=False),
        sa.Column("window_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("calls", sa.BigInteger(), nullable=False),
        sa.Column("cost_nusd", sa.BigInteger(), nullable=False),
        sa.Column("refunded_nusd", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"]),
        sa.PrimaryKeyConstraint("account_id", "month", "key_id", "window_start"),
    )
    op.create_table(
        "usage_archive",
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("calls", sa.BigInteger(), nullable=False),
        sa.Column("cost_nusd", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("exported_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("dropped_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        sa.CheckConstraint("(dropped_at IS NULL) = (fingerprint IS NULL)", name="usage_archive_fingerprint_when_dropped"),
        sa.PrimaryKeyConstraint("month"),
    )
    # A day of all accounts is found without an index page for every call: ids come in the order of time.
    op.execute("CREATE INDEX usage_by_time ON usage USING brin (id) WITH (autosummarize = on)")
    op.execute("CREATE INDEX entry_refund ON entry (created_at) WHERE kind = 'refund'")
    for rights, tables in _RIGHTS.items():
        for table in tables:
            op.execute(f"GRANT {rights} ON {table} TO satmeter_runtime")
