"""the books, keys, holds, top-ups"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = '0001'
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table('account',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('posted_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('held_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('floor_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('entry_count', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('status', sa.Text(), server_default='active', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("status IN ('active', 'frozen')", name='account_status_known'),
    sa.CheckConstraint('floor_nusd <= 0', name='account_floor_not_positive'),
    sa.CheckConstraint('held_nusd >= 0', name='account_held_not_negative'),
    sa.PrimaryKeyConstraint('id'),
    postgresql_with={'fillfactor': 50}
    )
    op.create_table('admin_log',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('admin', sa.Text(), nullable=False),
    sa.Column('act', sa.Text(), nullable=False),
    sa.Column('subject', sa.Text(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_table('admin_token',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('secret_hash', sa.LargeBinary(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('admin_token_live_name', 'admin_token', ['name'], unique=True, postgresql_where=sa.text('revoked_at IS NULL'))
    op.create_index('admin_token_secret', 'admin_token', ['secret_hash'], unique=True)
    op.create_table('credential',
    sa.Column('secret_hash', sa.LargeBinary(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('key_id', sa.UUID(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("kind IN ('credit_id', 'api_key')", name='credential_kind_known'),
    sa.PrimaryKeyConstraint('secret_hash')
    )
    op.create_table('idempotency',
    sa.Column('scope_key', sa.LargeBinary(), nullable=False),
    sa.Column('request_hash', sa.LargeBinary(), nullable=False),
    sa.Column('answer', sa.LargeBinary(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('claimed_until', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('scope_key')
    )
    op.create_table('rate_count',
    sa.Column('bucket', sa.Text(), nullable=False),
    sa.Column('window_start', sa.DateTime(timezone=True), nullable=False),
    sa.Column('count', sa.BigInteger(), server_default='1', nullable=False),
    sa.PrimaryKeyConstraint('bucket', 'window_start')
    )
    op.create_table('service_token',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('secret_hash', sa.LargeBinary(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('service_token_secret', 'service_token', ['secret_hash'], unique=True)
    op.create_table('topup_invoice',
    sa.Column('backend', sa.Text(), nullable=False),
    sa.Column('invoice_id', sa.Text(), nullable=False),
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('topup_id', sa.UUID(), nullable=False),
    sa.PrimaryKeyConstraint('backend', 'invoice_id')
    )
    op.create_table('webhook_delivery',
    sa.Column('backend', sa.Text(), nullable=False),
    sa.Column('delivery_id', sa.Text(), nullable=False),
    sa.Column('type', sa.Text(), nullable=False),
    sa.Column('invoice_id', sa.Text(), nullable=True),
    sa.Column('raw_body', sa.LargeBinary(), nullable=False),
    sa.Column('received_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('processed_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('next_try_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('attempts', sa.Integer(), nullable=False),
    sa.PrimaryKeyConstraint('backend', 'delivery_id', 'type')
    )
    op.create_index('webhook_waiting', 'webhook_delivery', ['next_try_at'], unique=False, postgresql_where=sa.text('processed_at IS NULL'))
    op.create_table('api_key',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('preview', sa.Text(), nullable=False),
    sa.Column('sealed_secret', sa.Text(), nullable=True),
    sa.Column('limit_nusd', sa.BigInteger(), nullable=True),
    sa.Column('reset_period', sa.Text(), nullable=True),
    sa.Column('window_start', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('window_usage_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('held_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('lifetime_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('scopes', postgresql.ARRAY(sa.Text()), nullable=True),
    sa.Column('allowed_models', postgresql.ARRAY(sa.Text()), nullable=True),
    sa.Column('expire_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('disabled_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('deleted_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("reset_period IN ('day', 'week', 'month')", name='api_key_period_known'),
    sa.CheckConstraint('held_nusd >= 0', name='api_key_held_not_negative'),
    sa.CheckConstraint('limit_nusd IS NULL OR limit_nusd >= 0', name='api_key_limit_not_negative'),
    sa.CheckConstraint('reset_period IS NULL OR limit_nusd IS NOT NULL', name='api_key_period_needs_limit'),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'id'),
    postgresql_with={'fillfactor': 50}
    )
    op.create_index('api_key_live_name', 'api_key', ['account_id', 'name'], unique=True, postgresql_where=sa.text('deleted_at IS NULL'))
    op.create_table('entry',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('reference', sa.Text(), nullable=False),
    sa.Column('contra', sa.Text(), nullable=False),
    sa.Column('amount_nusd', sa.BigInteger(), nullable=False),
    sa.Column('balance_after_nusd', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("kind IN ('topup', 'bonus', 'usage', 'refund', 'adjustment')", name='entry_kind_known'),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'id'),
    sa.UniqueConstraint('account_id', 'kind', 'reference', name='entry_once')
    )
    op.create_table('hold',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('service', sa.Text(), nullable=False),
    sa.Column('request_id', sa.Text(), nullable=False),
    sa.Column('request_hash', sa.LargeBinary(), nullable=False),
    sa.Column('key_id', sa.UUID(), nullable=False),
    sa.Column('window_start', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('amount_nusd', sa.BigInteger(), nullable=False),
    sa.Column('state', sa.Text(), server_default='open', nullable=False),
    sa.Column('model', sa.Text(), nullable=True),
    sa.Column('endpoint', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('closed_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("(state = 'open') = (closed_at IS NULL)", name='hold_closed_at_when_closed'),
    sa.CheckConstraint("state IN ('open', 'settled', 'released', 'expired')", name='hold_state_known'),
    sa.CheckConstraint('amount_nusd >= 0', name='hold_amount_not_negative'),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'id')
    )
    op.create_index('hold_open', 'hold', ['expires_at', 'account_id'], unique=False, postgresql_where=sa.text("state = 'open'"))
    op.create_index('hold_open_of_account', 'hold', ['account_id'], unique=False, postgresql_where=sa.text("state = 'open'"))
    op.create_table('topup',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('key_id', sa.UUID(), nullable=True),
    sa.Column('backend', sa.Text(), nullable=False),
    sa.Column('method', sa.Text(), nullable=False),
    sa.Column('currency', sa.Text(), nullable=False),
    sa.Column('amount_units', sa.BigInteger(), nullable=False),
    sa.Column('status', sa.Text(), server_default='Creating', nullable=False),
    sa.Column('additional_status', sa.Text(), server_default='None', nullable=False),
    sa.Column('invoice_id', sa.Text(), nullable=True),
    sa.Column('checkout_url', sa.Text(), nullable=True),
    sa.Column('destination', sa.Text(), nullable=True),
    sa.Column('payment_link', sa.Text(), nullable=True),
    sa.Column('total_coin_units', sa.BigInteger(), nullable=True),
    sa.Column('due_coin_units', sa.BigInteger(), nullable=True),
    sa.Column('paid_coin_units', sa.BigInteger(), nullable=True),
    sa.Column('fee_coin_units', sa.BigInteger(), nullable=True),
    sa.Column('rate', sa.Numeric(), nullable=True),
    sa.Column('usd_per_coin', sa.Numeric(), nullable=True),
    sa.Column('rate_source', sa.Text(), nullable=True),
    sa.Column('rate_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('credited_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('bonus_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('bonus_percent', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('review', sa.Text(), nullable=True),
    sa.Column('reviewed', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('watch_until', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('settled_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('checked_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('next_check_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint('amount_units > 0', name='topup_amount_positive'),
    sa.CheckConstraint('credited_nusd >= 0 AND bonus_nusd >= 0', name='topup_credits_not_negative'),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'id')
    )
    op.create_index('topup_by_id', 'topup', ['id'], unique=False)
    op.create_index('topup_due', 'topup', ['next_check_at'], unique=False, postgresql_where=sa.text('next_check_at IS NOT NULL'))
    op.create_index('topup_newest', 'topup', ['account_id', 'created_at'], unique=False)
    op.create_index('topup_to_review', 'topup', ['account_id'], unique=False, postgresql_where=sa.text('review IS NOT NULL'))
    op.create_table('usage',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('hold_id', sa.UUID(), nullable=False),
    sa.Column('service', sa.Text(), nullable=False),
    sa.Column('request_id', sa.Text(), nullable=False),
    sa.Column('key_id', sa.UUID(), nullable=False),
    sa.Column('window_start', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('model', sa.Text(), nullable=True),
    sa.Column('served_model', sa.Text(), nullable=True),
    sa.Column('provider', sa.Text(), nullable=True),
    sa.Column('endpoint', sa.Text(), nullable=True),
    sa.Column('outcome', sa.Text(), nullable=False),
    sa.Column('upstream_id', sa.Text(), nullable=True),
    sa.Column('cost_nusd', sa.BigInteger(), nullable=False),
    sa.Column('balance_after_nusd', sa.BigInteger(), nullable=False),
    sa.Column('held_after_nusd', sa.BigInteger(), nullable=False),
    sa.Column('latency_ms', sa.Integer(), nullable=True),
    sa.Column('ttft_ms', sa.Integer(), nullable=True),
    sa.Column('units', postgresql.JSONB(astext_type=sa.Text()), nullable=True),
    sa.Column('flags', sa.Text(), server_default='', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('cost_nusd >= 0', name='usage_cost_not_negative'),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'id'),
    sa.UniqueConstraint('account_id', 'hold_id', name='usage_once')
    )
    op.create_index('usage_of_key', 'usage', ['account_id', 'key_id', 'window_start'], unique=False)
    op.create_table('payment',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('topup_id', sa.UUID(), nullable=False),
    sa.Column('payment_id', sa.Text(), nullable=False),
    sa.Column('value_coin_units', sa.BigInteger(), nullable=False),
    sa.Column('fee_coin_units', sa.BigInteger(), nullable=False),
    sa.Column('status', sa.Text(), nullable=False),
    sa.Column('received_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('late', sa.Boolean(), nullable=False),
    sa.Column('worth_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.CheckConstraint("status IN ('Processing', 'Settled', 'Invalid')", name='payment_status_known'),
    sa.ForeignKeyConstraint(['account_id', 'topup_id'], ['topup.account_id', 'topup.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'topup_id', 'payment_id')
    )
    _grant_rights()


def _grant_rights() -> None:
    """The runtime role, which app.migrations made, may append to the books and never rewrite them."""
    op.execute("GRANT USAGE ON SCHEMA public TO satmeter_runtime")
    for rights, tables in _RIGHTS.items():
        op.execute(f"GRANT {rights} ON {tables} TO satmeter_runtime")


_RIGHTS = {
    "SELECT": "alembic_version",
    "SELECT, INSERT": "entry, usage, topup_invoice, admin_log",
    "SELECT, INSERT, UPDATE": "account, api_key, hold, topup, payment, webhook_delivery, service_token, admin_token",
    "SELECT, INSERT, DELETE": "credential",
    "SELECT, INSERT, UPDATE, DELETE": "idempotency, rate_count",
}
