"""growth: calls are put away by month or by day"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("usage_archive", sa.Column("is_day", sa.Boolean(), server_default="false", nullable=False))
