"""what is looked up by an id that nobody else has leads its index: one comparison decides at each step down"""

from collections.abc import Sequence

from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.drop_constraint("entry_once", "entry", type_="unique")
    op.create_unique_constraint("entry_once", "entry", ["reference", "kind", "account_id"])
    op.drop_index("usage_of_key", "usage")
    op.create_index("usage_of_key", "usage", ["key_id", "id"])
