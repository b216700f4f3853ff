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
    # No CHECK says what the arrays have to do with each other, and no index who stands below whom: every call would pay for them,
    # and nobody else. The audit looks at the arrays.
    op.execute(
        "GRANT UPDATE (more_periods, more_limits_nusd, more_starts, more_usage_nusd) ON api_key TO satmeter_runtime"
    )
