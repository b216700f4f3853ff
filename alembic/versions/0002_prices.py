"""prices: versions, overrides, markups, fees"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "fee",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("feature", sa.Text(), nullable=False),
        sa.Column("price_nusd", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("effective_from", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("effective_to", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("effective_from >= created_at", name="fee_not_backdated"),
        sa.CheckConstraint("price_nusd >= 0", name="fee_not_negative"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "markup",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), server_default="", nullable=False),
        sa.Column("multiplier_ppm", sa.BigInteger(), server_default="1000000", nullable=False),
        sa.Column("fixed_per_request_nusd", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("effective_from", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("effective_to", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(scope = 'default') = (subject = '')", name="markup_subject_when_scoped"),
        sa.CheckConstraint("scope IN ('default', 'provider', 'model', 'account')", name="markup_scope_known"),
        sa.CheckConstraint("effective_from >= created_at", name="markup_not_backdated"),
        sa.CheckConstraint("multiplier_ppm >= 0 AND fixed_per_request_nusd >= 0", name="markup_not_negative"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "price_override",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), server_default="", nullable=False),
        sa.Column("dimension", sa.Text(), nullable=False),
        sa.Column("tier_min", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("attributes", sa.Text(), server_default="", nullable=False),
        sa.Column("price_pusd", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("effective_from", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("effective_to", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("effective_from >= created_at", name="price_override_not_backdated"),
        sa.CheckConstraint("price_pusd >= 0", name="price_override_not_negative"),
        sa.CheckConstraint("tier_min >= 0", name="price_override_tier_not_negative"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "price_version",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("source_hash", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
        sa.Column("state", sa.Text(), server_default="draft", nullable=False),
        sa.Column("revision", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("activated_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('draft', 'active', 'retired')", name="price_version_state_known"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "price_version_one_active",
        "price_version",
        ["state"],
        unique=True,
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_table(
        "price",
        sa.Column("version_id", sa.SmallInteger(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("dimension", sa.Text(), nullable=False),
        sa.Column("tier_min", sa.BigInteger(), autoincrement=False, server_default="0", nullable=False),
        sa.Column("attributes", sa.Text(), server_default="", nullable=False),
        sa.Column("price_pusd", sa.BigInteger(), nullable=False),
        sa.Column("effective_from", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("effective_to", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("price_pusd >= 0", name="price_not_negative"),
        sa.CheckConstraint("tier_min >= 0", name="price_tier_not_negative"),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["price_version.id"],
        ),
        sa.PrimaryKeyConstraint(
            "version_id", "model", "provider", "dimension", "tier_min", "attributes", "effective_from"
        ),
    )
    op.create_table(
        "priced_model",
        sa.Column("version_id", sa.SmallInteger(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), server_default="", nullable=False),
        sa.Column("max_output_tokens", sa.BigInteger(), nullable=True),
        sa.Column("context_tokens", sa.BigInteger(), nullable=True),
        sa.Column("default_attributes", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["price_version.id"],
        ),
        sa.PrimaryKeyConstraint("version_id", "model", "provider"),
    )
    _grant_rights()


def _grant_rights() -> None:
    """The runtime role adds prices and ends them; it never rewrites one, so that every charge can be recomputed."""
    for rights, tables in _RIGHTS.items():
        op.execute(f"GRANT {rights} ON {tables} TO satmeter_runtime")


_RIGHTS = {
    "SELECT, INSERT": "price_version, priced_model, price, price_override, markup, fee",
    "UPDATE (state, activated_at, revision)": "price_version",
    "UPDATE (effective_to)": "price_override, markup, fee",
}
