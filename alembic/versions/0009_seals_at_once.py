"""what is new of an account's entries is sealed at once"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # What was sealed until now was sealed link by link, as who still runs the code of before does.
    op.add_column("seal", sa.Column("form", sa.BigInteger(), server_default="1", nullable=False))
