"""days of calls by the marks of accounts, sessions that are over"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "session_over",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("over_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("session_over_by_age", "session_over", ["over_at"])
    op.execute("GRANT SELECT, INSERT, DELETE ON session_over TO satmeter_runtime")
    _sum_by_marks()


def _sum_by_marks() -> None:
    """What was summed was summed by days that are over; from now on it is by each account's entries, from the first one on. A job
    does so while calls come, and until it is done readers look at the calls. What is known of dropped months stays."""
    op.create_table(
        "usage_summed",
        sa.Column("account_id", sa.UUID(), sa.ForeignKey("account.id"), nullable=False),
        sa.Column("entries", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("account_id"),
    )
    op.execute("GRANT SELECT, INSERT, UPDATE (entries) ON usage_summed TO satmeter_runtime")
    # An archive may be a day's, where there is a column that says so.
    op.execute(
        """DELETE FROM usage_day d WHERE NOT EXISTS (
               SELECT FROM usage_archive x WHERE x.dropped_at IS NOT NULL AND d.day >= x.month
               AND d.day < CASE WHEN (to_jsonb(x) ->> 'is_day')::boolean THEN x.month + 1 ELSE (x.month + interval '1 month')::date END)"""
    )
    for name in ("served_model", "provider"):
        op.add_column("usage_day", sa.Column(name, sa.Text(), server_default="", nullable=False))
    for name in ("reasoning_tokens", "known_requests", "known_nusd", "provider_nusd"):
        op.add_column("usage_day", sa.Column(name, sa.BigInteger(), server_default="0", nullable=False))
    op.drop_constraint("usage_day_pkey", "usage_day")
    op.create_primary_key(
        "usage_day_pkey", "usage_day", ["account_id", "day", "key_id", "model", "served_model", "provider"]
    )
    op.drop_table("rollup_day")
