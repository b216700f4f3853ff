"""the books, keys, holds, calls, top-ups, prices, auto-topup

Every table as it is. Functions are code, not data: app/metering/functions.sql, which `migrate` installs.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    _make_tables()
    # A month whose partition is not there yet loses no call: app/metering/functions.sql moves them when it is made.
    op.execute("CREATE TABLE usage_default PARTITION OF usage DEFAULT")
    # Most accounts have few entries, some have millions. The plan that suits both looks for an entry by its reference;
    # with the true number of accounts the planner would read through all entries of an account instead.
    op.execute("ALTER TABLE entry ALTER COLUMN account_id SET (n_distinct = 100)")
    op.execute("GRANT USAGE ON SCHEMA public TO satmeter_runtime")
    for rights, tables in _RIGHTS.items():
        op.execute(f"GRANT {rights} ON {tables} TO satmeter_runtime")
    for table, columns in _CHANGED.items():
        op.execute(f"GRANT UPDATE ({columns}) ON {table} TO satmeter_runtime")


# The runtime role, which app.migrations made, may append to the books and never rewrite them. It adds prices and ends
# them, so that every charge can be recomputed. What is kept of a dropped month of calls is its owner's alone.
_RIGHTS = {
    "SELECT": "alembic_version, usage_dropped, usage_archive",
    "SELECT, INSERT": "entry, usage, topup_invoice, topup_address, admin_log, price_version, priced_model, price, price_override, markup, fee,"
    " api_key, topup, payment, webhook_delivery, service_token, admin_token, nwc_attempt, audit_run, seal, seal_run",
    "SELECT, INSERT (id)": "account",
    "SELECT, INSERT, DELETE": "credential, hold, audit_finding",
    "SELECT, INSERT, UPDATE": "rollup_day, figure, token_use, job_lease, audit_walk",
    "SELECT, INSERT, UPDATE, DELETE": "idempotency, rate_count, nwc_connection, usage_day",
    "UPDATE (state, activated_at, revision)": "price_version",
    "UPDATE (effective_to)": "price_override, markup, fee",
}


# What the service changes, and no more: not whose a row is, not a floor, not what a key's or top-up's beginning was.
_CHANGED = {
    "account": "posted_nusd, held_nusd, entry_count, low_nusd, status, updated_at",
    "api_key": "name, sealed_secret, limit_nusd, reset_period, window_start, window_usage_nusd, held_nusd, lifetime_nusd, scopes,"
    " allowed_models, call_limit_nusd, requests_per_minute, minute_start, minute_calls, expire_at, disabled_at, deleted_at, updated_at,"
    " revision, proof",
    "hold": "window_start, amount_nusd, captured_nusd, state, expires_at, closed_at",
    "topup": "amount_units, status, additional_status, invoice_id, checkout_url, destination, payment_link, total_coin_units,"
    " due_coin_units, paid_coin_units, fee_coin_units, rate, usd_per_coin, rate_source, rate_at, credited_nusd, bonus_nusd, review,"
    " reviewed, finding_id, expires_at, watch_until, settled_at, checked_at, next_check_at",
    "payment": "value_coin_units, fee_coin_units, status, worth_nusd",
    "audit_finding": "differences, unexplained, oldest_at",
    "webhook_delivery": "raw_body, processed_at, next_try_at, attempts",
    "service_token": "revoked_at",
    "admin_token": "revoked_at",
    "audit_run": "state, alive_until, finished_at, report",
    "nwc_attempt": "state, bolt11, payment_hash, invoice_expires_at, event_id, sends, code, reason, is_proven, looks, sent_at,"
    " answered_at, closed_at, next_at, claimed_until",
}


def _make_tables() -> None:
    op.create_table('account',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('posted_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('held_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('floor_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('entry_count', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('low_nusd', sa.BigInteger(), nullable=True),
    sa.Column('status', sa.Text(), server_default='active', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("status IN ('active', 'frozen', 'closed')", name='account_status_known'),
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
    sa.Column('amount_nusd', sa.BigInteger(), nullable=True),
    sa.Column('before', sa.Text(), nullable=True),
    sa.Column('after', sa.Text(), nullable=True),
    sa.Column('request_id', sa.Text(), nullable=True),
    sa.Column('proof', sa.LargeBinary(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_table('admin_token',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('secret_hash', sa.LargeBinary(), nullable=False),
    sa.Column('scopes', postgresql.ARRAY(sa.Text()), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('admin_token_live_name', 'admin_token', ['name'], unique=True, postgresql_where=sa.text('revoked_at IS NULL'))
    op.create_index('admin_token_secret', 'admin_token', ['secret_hash'], unique=True)
    op.create_table('audit_run',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('admin', sa.Text(), nullable=False),
    sa.Column('state', sa.Text(), server_default='running', nullable=False),
    sa.Column('started_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('alive_until', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('report', postgresql.JSONB(), nullable=True),
    sa.CheckConstraint("(state = 'running') = (finished_at IS NULL)", name='audit_run_finished_when_it_says'),
    sa.CheckConstraint("state IN ('running', 'done', 'failed')", name='audit_run_state_known'),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('audit_run_one_running', 'audit_run', ['state'], unique=True, postgresql_where=sa.text("state = 'running'"))
    op.create_table('audit_finding',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('differences', sa.BigInteger(), nullable=False),
    sa.Column('unexplained', sa.BigInteger(), nullable=False),
    sa.Column('oldest_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('found_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('account_id')
    )
    op.create_table('audit_walk',
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('after', sa.UUID(), nullable=False),
    sa.Column('seen_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('entries', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('entries_before', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('rounds', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('looked_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('name')
    )
    op.create_table('credential',
    sa.Column('secret_hash', sa.LargeBinary(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('key_id', sa.UUID(), nullable=True),
    sa.Column('proof', sa.LargeBinary(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("kind IN ('credit_id', 'api_key')", name='credential_kind_known'),
    sa.PrimaryKeyConstraint('secret_hash')
    )
    op.create_index('credential_of_owner', 'credential', ['account_id'], unique=False, postgresql_where=sa.text("kind = 'credit_id'"))
    op.create_index('credential_by_time', 'credential', ['created_at'], unique=False, postgresql_using='brin', postgresql_with={'autosummarize': 'on'})
    op.create_table('entry',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('reference', sa.Text(), nullable=False),
    sa.Column('contra', sa.Text(), nullable=False),
    sa.Column('amount_nusd', sa.BigInteger(), nullable=False),
    sa.Column('balance_after_nusd', sa.BigInteger(), nullable=False),
    sa.Column('usage_id', sa.UUID(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("(kind = 'usage') = (usage_id IS NOT NULL)", name='entry_of_usage_has_its_call'),
    sa.CheckConstraint("kind IN ('topup', 'bonus', 'usage', 'refund', 'adjustment')", name='entry_kind_known'),
    sa.PrimaryKeyConstraint('account_id', 'id'),
    sa.UniqueConstraint('account_id', 'kind', 'reference', name='entry_once')
    )
    op.create_index('entry_not_of_calls', 'entry', ['created_at'], unique=False, postgresql_where=sa.text("kind IN ('topup', 'bonus', 'adjustment')"))
    op.create_index('entry_by_time', 'entry', ['created_at'], unique=False, postgresql_using='brin', postgresql_with={'autosummarize': 'on'})
    op.create_index('entry_refund', 'entry', ['created_at'], unique=False, postgresql_where=sa.text("kind = 'refund'"))
    op.create_table('fee',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('feature', sa.Text(), nullable=False),
    sa.Column('price_nusd', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('effective_from', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('effective_to', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint('effective_from >= created_at', name='fee_not_backdated'),
    sa.CheckConstraint('price_nusd >= 0', name='fee_not_negative'),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_table('figure',
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('value', sa.BigInteger(), nullable=False),
    sa.Column('found_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('name')
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
    sa.Column('captured_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('state', sa.Text(), server_default='open', nullable=False),
    sa.Column('on_expiry', sa.Text(), server_default='captured', nullable=False),
    sa.Column('model', sa.Text(), nullable=True),
    sa.Column('endpoint', sa.Text(), nullable=True),
    sa.Column('price_version', sa.Integer(), nullable=True),
    sa.Column('attributes', postgresql.JSONB(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('closed_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("(state = 'open') = (closed_at IS NULL)", name='hold_closed_at_when_closed'),
    sa.CheckConstraint("on_expiry IN ('captured', 'hold', 'release')", name='hold_on_expiry_known'),
    sa.CheckConstraint("state IN ('open', 'settled', 'released', 'expired')", name='hold_state_known'),
    sa.CheckConstraint('amount_nusd >= 0', name='hold_amount_not_negative'),
    sa.CheckConstraint('captured_nusd BETWEEN 0 AND amount_nusd', name='hold_captured_within_amount'),
    sa.PrimaryKeyConstraint('account_id', 'id')
    )
    op.create_index('hold_closed', 'hold', ['closed_at'], unique=False, postgresql_where=sa.text('closed_at IS NOT NULL'))
    op.create_index('hold_open', 'hold', ['expires_at', 'account_id'], unique=False, postgresql_where=sa.text("state = 'open'"))
    op.create_table('idempotency',
    sa.Column('scope_key', sa.LargeBinary(), nullable=False),
    sa.Column('request_hash', sa.LargeBinary(), nullable=False),
    sa.Column('answer', sa.LargeBinary(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('claimed_until', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('scope_key')
    )
    op.create_index('idempotency_by_age', 'idempotency', ['created_at'], unique=False)
    op.create_table('job_lease',
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('holder', sa.UUID(), nullable=False),
    sa.Column('claimed_until', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('name')
    )
    op.create_table('markup',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('scope', sa.Text(), nullable=False),
    sa.Column('subject', sa.Text(), server_default='', nullable=False),
    sa.Column('multiplier_ppm', sa.BigInteger(), server_default='1000000', nullable=False),
    sa.Column('fixed_per_request_nusd', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('effective_from', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('effective_to', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("(scope = 'default') = (subject = '')", name='markup_subject_when_scoped'),
    sa.CheckConstraint("scope IN ('default', 'provider', 'model', 'account')", name='markup_scope_known'),
    sa.CheckConstraint('effective_from >= created_at', name='markup_not_backdated'),
    sa.CheckConstraint('multiplier_ppm >= 0 AND fixed_per_request_nusd >= 0', name='markup_not_negative'),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_table('price_override',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('model', sa.Text(), nullable=False),
    sa.Column('provider', sa.Text(), server_default='', nullable=False),
    sa.Column('dimension', sa.Text(), nullable=False),
    sa.Column('tier_min', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('attributes', sa.Text(), server_default='', nullable=False),
    sa.Column('price_pusd', sa.BigInteger(), nullable=False),
    sa.Column('per_units', sa.BigInteger(), server_default='1', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('effective_from', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('effective_to', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint('effective_from >= created_at', name='price_override_not_backdated'),
    sa.CheckConstraint('per_units > 0', name='price_override_per_units_positive'),
    sa.CheckConstraint('price_pusd >= 0', name='price_override_not_negative'),
    sa.CheckConstraint('tier_min >= 0', name='price_override_tier_not_negative'),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_table('price_version',
    sa.Column('id', sa.SmallInteger(), autoincrement=False, nullable=False),
    sa.Column('source', sa.Text(), nullable=False),
    sa.Column('source_hash', sa.Text(), nullable=False),
    sa.Column('note', sa.Text(), server_default='', nullable=False),
    sa.Column('state', sa.Text(), server_default='draft', nullable=False),
    sa.Column('revision', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('activated_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("state IN ('draft', 'active', 'retired')", name='price_version_state_known'),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('price_version_one_active', 'price_version', ['state'], unique=True, postgresql_where=sa.text("state = 'active'"))
    op.create_table('rate_count',
    sa.Column('bucket', sa.Text(), nullable=False),
    sa.Column('window_start', sa.DateTime(timezone=True), nullable=False),
    sa.Column('count', sa.BigInteger(), server_default='1', nullable=False),
    sa.PrimaryKeyConstraint('bucket', 'window_start')
    )
    op.create_table('rollup_day',
    sa.Column('day', sa.Date(), nullable=False),
    sa.Column('rolled_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('day')
    )
    op.create_table('seal',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('chain', sa.Text(), nullable=False),
    sa.Column('number', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('count', sa.BigInteger(), nullable=False),
    sa.Column('links', sa.LargeBinary(), nullable=False),
    sa.Column('kept', sa.LargeBinary(), nullable=False),
    sa.Column('run_id', sa.BigInteger(), nullable=False),
    sa.CheckConstraint('number > 0 AND count > 0', name='seal_has_a_place'),
    sa.PrimaryKeyConstraint('account_id', 'chain', 'number')
    )
    op.create_table('seal_run',
    sa.Column('id', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('made_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('until', sa.DateTime(timezone=True), nullable=False),
    sa.Column('seals', sa.BigInteger(), nullable=False),
    sa.Column('digest', sa.LargeBinary(), nullable=False),
    sa.Column('mac', sa.LargeBinary(), nullable=False),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_table('service_token',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('secret_hash', sa.LargeBinary(), nullable=False),
    sa.Column('on_expiry', sa.Text(), server_default='captured', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("on_expiry IN ('captured', 'hold', 'release')", name='service_token_on_expiry_known'),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('service_token_secret', 'service_token', ['secret_hash'], unique=True)
    op.create_table('token_use',
    sa.Column('token_id', sa.UUID(), nullable=False),
    sa.Column('last_used_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('token_id')
    )
    op.create_table('topup_address',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('topup_id', sa.UUID(), nullable=False),
    sa.Column('destination', sa.Text(), nullable=False),
    sa.Column('told_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('account_id', 'topup_id', 'destination')
    )
    op.create_index('topup_address_told', 'topup_address', ['destination'], unique=False, postgresql_using='hash')
    op.create_table('topup_invoice',
    sa.Column('backend', sa.Text(), nullable=False),
    sa.Column('invoice_id', sa.Text(), nullable=False),
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('topup_id', sa.UUID(), nullable=False),
    sa.PrimaryKeyConstraint('backend', 'invoice_id')
    )
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
    sa.Column('upstream_model', sa.Text(), nullable=True),
    sa.Column('cost_nusd', sa.BigInteger(), nullable=False),
    sa.Column('provider_cost_nusd', sa.BigInteger(), nullable=True),
    sa.Column('balance_after_nusd', sa.BigInteger(), nullable=False),
    sa.Column('held_after_nusd', sa.BigInteger(), nullable=False),
    sa.Column('latency_ms', sa.Integer(), nullable=True),
    sa.Column('ttft_ms', sa.Integer(), nullable=True),
    sa.Column('units', postgresql.JSONB(), nullable=True),
    sa.Column('price_version', sa.Integer(), nullable=True),
    sa.Column('lines', postgresql.JSONB(), nullable=True),
    sa.Column('flags', sa.Text(), server_default='', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('cost_nusd >= 0', name='usage_cost_not_negative'),
    sa.PrimaryKeyConstraint('account_id', 'id'),
    postgresql_partition_by='RANGE (id)'
    )
    op.create_index('usage_by_time', 'usage', ['id'], unique=False, postgresql_using='brin', postgresql_with={'autosummarize': 'on'})
    op.create_index('usage_of_key', 'usage', ['account_id', 'key_id', 'id'], unique=False)
    op.create_index('usage_of_upstream', 'usage', ['account_id', 'upstream_id'], unique=False, postgresql_where=sa.text('upstream_id IS NOT NULL'))
    op.create_table('usage_archive',
    sa.Column('month', sa.Date(), nullable=False),
    sa.Column('calls', sa.BigInteger(), nullable=False),
    sa.Column('cost_nusd', sa.BigInteger(), nullable=False),
    sa.Column('sha256', sa.Text(), nullable=False),
    sa.Column('exported_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('dropped_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('fingerprint', sa.Text(), nullable=True),
    sa.CheckConstraint('(dropped_at IS NULL) = (fingerprint IS NULL)', name='usage_archive_fingerprint_when_dropped'),
    sa.PrimaryKeyConstraint('month')
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
    op.create_index('webhook_with_body', 'webhook_delivery', ['received_at'], unique=False, postgresql_where=sa.text('octet_length(raw_body) > 0'))
    op.create_index('webhook_waiting', 'webhook_delivery', ['next_try_at'], unique=False, postgresql_where=sa.text('processed_at IS NULL'))
    op.create_table('api_key',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('preview', sa.Text(), nullable=False),
    sa.Column('sealed_secret', sa.Text(), nullable=True),
    sa.Column('masked_hash', sa.LargeBinary(), nullable=True),
    sa.Column('limit_nusd', sa.BigInteger(), nullable=True),
    sa.Column('reset_period', sa.Text(), nullable=True),
    sa.Column('call_limit_nusd', sa.BigInteger(), nullable=True),
    sa.Column('requests_per_minute', sa.Integer(), nullable=True),
    sa.Column('minute_start', sa.DateTime(timezone=True), nullable=True),
    sa.Column('minute_calls', sa.Integer(), nullable=True),
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
    sa.Column('revision', sa.BigInteger(), server_default='1', nullable=False),
    sa.Column('proof', sa.LargeBinary(), nullable=True),
    sa.CheckConstraint("reset_period IN ('day', 'week', 'month')", name='api_key_period_known'),
    sa.CheckConstraint('call_limit_nusd > 0', name='api_key_call_limit_positive'),
    sa.CheckConstraint('requests_per_minute > 0', name='api_key_requests_positive'),
    sa.CheckConstraint('held_nusd >= 0', name='api_key_held_not_negative'),
    sa.CheckConstraint('limit_nusd IS NULL OR limit_nusd >= 0', name='api_key_limit_not_negative'),
    sa.CheckConstraint('reset_period IS NULL OR limit_nusd IS NOT NULL', name='api_key_period_needs_limit'),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'id'),
    postgresql_with={'fillfactor': 50}
    )
    op.create_index('api_key_by_id', 'api_key', ['id'], unique=False)
    op.create_index('api_key_by_preview', 'api_key', ['preview'], unique=False)
    op.create_index('api_key_by_change', 'api_key', ['updated_at'], unique=False)
    op.create_index('api_key_live_name', 'api_key', ['account_id', 'name'], unique=True, postgresql_where=sa.text('deleted_at IS NULL'))
    op.create_table('nwc_attempt',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('topup_id', sa.UUID(), nullable=False),
    sa.Column('connection_id', sa.UUID(), nullable=False),
    sa.Column('amount_nusd', sa.BigInteger(), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('bolt11', sa.Text(), nullable=True),
    sa.Column('payment_hash', sa.Text(), nullable=True),
    sa.Column('invoice_expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('event_id', sa.Text(), nullable=True),
    sa.Column('sends', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('code', sa.Text(), nullable=True),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('is_proven', sa.Boolean(), server_default='false', nullable=False),
    sa.Column('looks', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('sent_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('answered_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('closed_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('next_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('claimed_until', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("(state IN ('created', 'invoiced', 'sent', 'paid_reported', 'unknown')) = (closed_at IS NULL)", name='nwc_attempt_closed_when_it_says'),
    sa.CheckConstraint("state <> 'sent' OR event_id IS NOT NULL", name='nwc_attempt_sent_has_event'),
    sa.CheckConstraint("state IN ('created', 'invoiced', 'sent', 'paid_reported', 'unknown', 'rejected', 'settled', 'expired')", name='nwc_attempt_state_known'),
    sa.CheckConstraint('amount_nusd > 0', name='nwc_attempt_amount_positive'),
    sa.CheckConstraint('sends = 0 OR payment_hash IS NOT NULL', name='nwc_attempt_sent_has_invoice'),
    sa.CheckConstraint('sends BETWEEN 0 AND 2', name='nwc_attempt_sent_twice_at_most'),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'id'),
    sa.UniqueConstraint('account_id', 'payment_hash', name='nwc_attempt_payment_once'),
    sa.UniqueConstraint('account_id', 'topup_id', name='nwc_attempt_topup_once')
    )
    op.create_index('nwc_attempt_by_time', 'nwc_attempt', ['created_at'], unique=False)
    op.create_index('nwc_attempt_due', 'nwc_attempt', ['next_at'], unique=False, postgresql_where=sa.text('next_at IS NOT NULL'))
    op.create_index('nwc_attempt_newest', 'nwc_attempt', ['account_id', 'created_at'], unique=False)
    op.create_index('nwc_attempt_one_open', 'nwc_attempt', ['account_id'], unique=True, postgresql_where=sa.text("state IN ('created', 'invoiced', 'sent', 'paid_reported', 'unknown')"))
    op.create_index('nwc_attempt_unpaid', 'nwc_attempt', ['closed_at'], unique=False, postgresql_where=sa.text("state IN ('rejected', 'expired')"))
    op.create_table('nwc_connection',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('wallet_pubkey', sa.Text(), nullable=False),
    sa.Column('relays', postgresql.ARRAY(sa.Text()), nullable=False),
    sa.Column('lud16', sa.Text(), nullable=True),
    sa.Column('encryption', sa.Text(), nullable=False),
    sa.Column('can_look_up', sa.Boolean(), nullable=False),
    sa.Column('sealed_secret', sa.Text(), nullable=False),
    sa.Column('threshold_nusd', sa.BigInteger(), nullable=False),
    sa.Column('topup_amount_nusd', sa.BigInteger(), nullable=False),
    sa.Column('max_per_day_nusd', sa.BigInteger(), nullable=True),
    sa.Column('pause', sa.Text(), nullable=True),
    sa.Column('refusals', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('refused_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('silent_since', sa.DateTime(timezone=True), nullable=True),
    sa.Column('not_before', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('max_per_day_nusd >= topup_amount_nusd', name='nwc_connection_cap_allows_one'),
    sa.CheckConstraint('refusals >= 0', name='nwc_connection_refusals_not_negative'),
    sa.CheckConstraint('threshold_nusd > 0 AND topup_amount_nusd > 0', name='nwc_connection_amounts_positive'),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id')
    )
    op.create_table('price',
    sa.Column('version_id', sa.SmallInteger(), nullable=False),
    sa.Column('model', sa.Text(), nullable=False),
    sa.Column('provider', sa.Text(), nullable=False),
    sa.Column('dimension', sa.Text(), nullable=False),
    sa.Column('tier_min', sa.BigInteger(), server_default='0', autoincrement=False, nullable=False),
    sa.Column('attributes', sa.Text(), server_default='', nullable=False),
    sa.Column('price_pusd', sa.BigInteger(), nullable=False),
    sa.Column('per_units', sa.BigInteger(), server_default='1', nullable=False),
    sa.Column('effective_from', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('effective_to', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint('per_units > 0', name='price_per_units_positive'),
    sa.CheckConstraint('price_pusd >= 0', name='price_not_negative'),
    sa.CheckConstraint('tier_min >= 0', name='price_tier_not_negative'),
    sa.ForeignKeyConstraint(['version_id'], ['price_version.id'], ),
    sa.PrimaryKeyConstraint('version_id', 'model', 'provider', 'dimension', 'tier_min', 'attributes', 'effective_from')
    )
    op.create_table('priced_model',
    sa.Column('version_id', sa.SmallInteger(), nullable=False),
    sa.Column('model', sa.Text(), nullable=False),
    sa.Column('provider', sa.Text(), nullable=False),
    sa.Column('mode', sa.Text(), server_default='', nullable=False),
    sa.Column('max_output_tokens', sa.BigInteger(), nullable=True),
    sa.Column('context_tokens', sa.BigInteger(), nullable=True),
    sa.Column('default_attributes', sa.Text(), server_default='', nullable=False),
    sa.Column('match', sa.Text(), server_default='', nullable=False),
    sa.ForeignKeyConstraint(['version_id'], ['price_version.id'], ),
    sa.PrimaryKeyConstraint('version_id', 'model', 'provider')
    )
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
    sa.Column('finding_id', sa.UUID(), nullable=True),
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
    op.create_index('topup_by_time', 'topup', ['created_at', 'id'], unique=False)
    op.create_index('topup_due', 'topup', ['next_check_at'], unique=False, postgresql_where=sa.text('next_check_at IS NOT NULL'))
    op.create_index('topup_newest', 'topup', ['account_id', 'created_at'], unique=False)
    op.create_index('topup_settled', 'topup', ['account_id', 'settled_at'], unique=False, postgresql_where=sa.text('credited_nusd > 0'))
    op.create_index('topup_to_review', 'topup', ['account_id'], unique=False, postgresql_where=sa.text('review IS NOT NULL'))
    op.create_index('topup_unapplied', 'topup', ['created_at'], unique=False, postgresql_where=sa.text('credited_nusd = 0 AND paid_coin_units > 0'))
    op.create_table('usage_day',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('day', sa.Date(), nullable=False),
    sa.Column('key_id', sa.UUID(), nullable=False),
    sa.Column('model', sa.Text(), nullable=False),
    sa.Column('requests', sa.BigInteger(), nullable=False),
    sa.Column('input_tokens', sa.BigInteger(), nullable=False),
    sa.Column('output_tokens', sa.BigInteger(), nullable=False),
    sa.Column('cost_nusd', sa.BigInteger(), nullable=False),
    sa.Column('refunded_nusd', sa.BigInteger(), nullable=False),
    sa.CheckConstraint('requests > 0 AND cost_nusd >= refunded_nusd AND refunded_nusd >= 0', name='usage_day_adds_up'),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'day', 'key_id', 'model')
    )
    op.create_index('usage_day_by_day', 'usage_day', ['day'], unique=False)
    op.create_table('usage_dropped',
    sa.Column('account_id', sa.UUID(), nullable=False),
    sa.Column('month', sa.Date(), nullable=False),
    sa.Column('key_id', sa.UUID(), nullable=False),
    sa.Column('window_start', sa.DateTime(timezone=True), nullable=False),
    sa.Column('calls', sa.BigInteger(), nullable=False),
    sa.Column('cost_nusd', sa.BigInteger(), nullable=False),
    sa.Column('refunded_nusd', sa.BigInteger(), nullable=False),
    sa.ForeignKeyConstraint(['account_id'], ['account.id'], ),
    sa.PrimaryKeyConstraint('account_id', 'month', 'key_id', 'window_start')
    )
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
    op.create_index('payment_by_id', 'payment', ['payment_id'], unique=False, postgresql_ops={'payment_id': 'text_pattern_ops'})
    op.create_index('payment_without_worth', 'payment', ['account_id', 'topup_id'], unique=False, postgresql_where=sa.text("status = 'Settled' AND worth_nusd = 0"))
