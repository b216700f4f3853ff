"""entries of long-dropped calls are put away behind a closing"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    for name, kind in (
        ("entries", sa.BigInteger()),
        ("entries_sha256", sa.Text()),
        ("entries_digest", sa.LargeBinary()),
        ("entries_exported_at", sa.DateTime(timezone=True)),
        ("entries_dropped_at", sa.DateTime(timezone=True)),
    ):
        op.add_column("usage_archive", sa.Column(name, kind, nullable=True))
    op.create_table(
        "entry_closing",
        sa.Column("account_id", sa.UUID(), nullable=False),
        sa.Column("first_id", sa.BigInteger(), nullable=False),
        sa.Column("last_id", sa.BigInteger(), nullable=False),
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("amount_nusd", sa.BigInteger(), nullable=False),
        sa.Column("balance_after_nusd", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("first_id > 0 AND last_id >= first_id", name="entry_closing_has_entries"),
        sa.PrimaryKeyConstraint("account_id", "first_id"),
    )
    # Only the database's owner puts entries away; the service reads what is kept of them.
    op.execute("GRANT SELECT ON entry_closing TO satmeter_runtime")
