"""notices: where an account's go, the outbox, and the balance below which something is to be told

Accounts that are there have no mark: one is set when they name an address.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    for name in ('low_balance_nusd', 'notice_base_nusd', 'notice_mark_nusd'):
        op.add_column('account', sa.Column(name, sa.BigInteger(), nullable=True))
    op.create_check_constraint('account_low_balance_not_negative', 'account', 'low_balance_nusd >= 0')
    op.create_table('notice_address',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('sealed_url', sa.Text(), nullable=True),
    sa.Column('url_shown', sa.Text(), nullable=True),
    sa.Column('sealed_secret', sa.Text(), nullable=True),
    sa.Column('sealed_secret_before', sa.Text(), nullable=True),
    sa.Column('secret_before_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('webhook_off_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('npub', sa.Text(), nullable=True),
    sa.Column('events', postgresql.ARRAY(sa.Text()), nullable=True),
    sa.Column('runway_told_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('(sealed_url IS NULL) = (sealed_secret IS NULL) AND (sealed_url IS NULL) = (url_shown IS NULL)', name='notice_address_webhook_is_whole'),
    sa.CheckConstraint('(sealed_secret_before IS NULL) = (secret_before_until IS NULL)', name='notice_address_overlap_ends'),
    sa.PrimaryKeyConstraint('account_id')
    )
    op.create_table('notice',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('channel', sa.Text(), nullable=False),
    sa.Column('type', sa.Text(), nullable=False),
    sa.Column('data', postgresql.JSONB(), nullable=False),
    sa.Column('state', sa.Text(), server_default='pending', nullable=False),
    sa.Column('attempts', sa.Integer(), server_default='0', nullable=False),
    sa.Column('sealed_target', sa.Text(), nullable=True),
    sa.Column('status', sa.Integer(), nullable=True),
    sa.Column('error', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('next_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('claimed_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('closed_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("(state = 'pending') = (next_at IS NOT NULL) AND (state = 'pending') = (closed_at IS NULL)", name='notice_pending_has_its_time'),
    sa.CheckConstraint("channel IN ('webhook', 'nostr')", name='notice_channel_known'),
    sa.CheckConstraint("state IN ('pending', 'delivered', 'dead')", name='notice_state_known'),
    sa.CheckConstraint('attempts >= 0', name='notice_attempts_not_negative'),
    sa.PrimaryKeyConstraint('account_id', 'id', 'channel')
    )
    op.create_index('notice_closed', 'notice', ['closed_at'], unique=False, postgresql_where=sa.text('closed_at IS NOT NULL'))
    op.create_index('notice_due', 'notice', ['next_at', 'account_id'], unique=False, postgresql_where=sa.text("state = 'pending'"))
    op.create_index('notice_newest', 'notice', ['account_id', 'created_at'], unique=False)
    op.execute("GRANT SELECT, INSERT, DELETE ON notice TO satmeter_runtime")
    op.execute("GRANT UPDATE (state, attempts, sealed_target, status, error, next_at, claimed_until, closed_at) ON notice TO satmeter_runtime")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON notice_address TO satmeter_runtime")
    op.execute("GRANT UPDATE (low_balance_nusd, notice_base_nusd, notice_mark_nusd) ON account TO satmeter_runtime")

