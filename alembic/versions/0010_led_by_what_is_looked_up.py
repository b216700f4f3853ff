"""what is looked up by more than its account does not begin with it, so that none of an account's rows are read but that one"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.drop_constraint("entry_once", "entry", type_="unique")
    op.create_unique_constraint("entry_once", "entry", ["reference", "kind", "account_id"])
    op.drop_index("api_key_live_name", "api_key")
    op.create_index("api_key_live_name", "api_key", ["name", "account_id"], unique=True, postgresql_where=sa.text("deleted_at IS NULL"))
    op.drop_index("usage_of_key", "usage")
    op.create_index("usage_of_key", "usage", ["key_id", "id"])
