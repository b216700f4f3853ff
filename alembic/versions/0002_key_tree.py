"""a tree of keys, and several windows at once

A key that was there stands under none and has one window: for it nothing changes, and its proof holds as it is.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("api_key", sa.Column("parent_id", sa.UUID(), nullable=True))
    op.add_column("api_key", sa.Column("ancestor_ids", postgresql.ARRAY(sa.UUID()), nullable=True))
    op.add_column("api_key", sa.Column("more_periods", postgresql.ARRAY(sa.Text()), nullable=True))
    op.add_column("api_key", sa.Column("more_limits_nusd", postgresql.ARRAY(sa.BigInteger()), nullable=True))
    op.add_column("api_key", sa.Column("more_starts", postgresql.ARRAY(sa.DateTime(timezone=True)), nullable=True))
    op.add_column("api_key", sa.Column("more_usage_nusd", postgresql.ARRAY(sa.BigInteger()), nullable=True))
    op.create_check_constraint(
        "api_key_stands_in_a_tree",
        "api_key",
        "num_nulls(parent_id, ancestor_ids) = 2 OR (num_nulls(parent_id, ancestor_ids) = 0"
        " AND cardinality(ancestor_ids) BETWEEN 1 AND 5 AND ancestor_ids[cardinality(ancestor_ids)] = parent_id)",
    )
    op.create_check_constraint(
        "api_key_windows_are_whole",
        "api_key",
        "num_nulls(more_periods, more_limits_nusd, more_starts, more_usage_nusd) = 4"
        " OR (num_nulls(more_periods, more_limits_nusd, more_starts, more_usage_nusd) = 0 AND limit_nusd IS NOT NULL"
        " AND cardinality(more_limits_nusd) BETWEEN 1 AND 3 AND cardinality(more_periods) = cardinality(more_limits_nusd)"
        " AND cardinality(more_starts) = cardinality(more_limits_nusd) AND cardinality(more_usage_nusd) = cardinality(more_limits_nusd))",
    )
    # Who stands under a key is asked of its account's keys alone; most keys stand under none.
    op.create_index(
        "api_key_under", "api_key", ["account_id", "parent_id"], postgresql_where=sa.text("parent_id IS NOT NULL")
    )
    op.execute(
        "GRANT UPDATE (more_periods, more_limits_nusd, more_starts, more_usage_nusd) ON api_key TO satmeter_runtime"
    )
