"""credentials that end, ways back into an account, what was done with credentials"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column('credential', sa.Column('ends_at', sa.DateTime(timezone=True), nullable=True))
    op.add_column('credential', sa.Column('label', sa.Text(), nullable=True))
    op.drop_constraint('credential_kind_known', 'credential')
    op.create_check_constraint(
        'credential_kind_known', 'credential', "kind IN ('credit_id', 'api_key', 'recovery_code', 'nostr')"
    )
    op.drop_index('credential_of_owner', 'credential')
    op.create_index('credential_of_owner', 'credential', ['account_id'], unique=False, postgresql_where=sa.text("kind <> 'api_key'"))
    op.create_table('credential_event',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('act', sa.Text(), nullable=False),
    sa.Column('shown_by', sa.Text(), nullable=False),
    sa.Column('subject', sa.Text(), nullable=True),
    sa.Column('proof', sa.LargeBinary(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['account_id'], ['account.id']),
    sa.PrimaryKeyConstraint('account_id', 'id')
    )
    op.create_table('nostr_event',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('event_id', sa.LargeBinary(), nullable=False),
    sa.Column('taken_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['account_id'], ['account.id']),
    sa.PrimaryKeyConstraint('account_id', 'event_id')
    )
    op.execute("GRANT SELECT, INSERT ON credential_event TO satmeter_runtime")
    op.execute("GRANT SELECT, INSERT, DELETE ON nostr_event TO satmeter_runtime")
