"""Alembic's environment: the URL comes from app.migrations, the models from every tables.py."""

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool
from sqlmodel import SQLModel

import app.activity.tables
import app.admin.tables
import app.audit.tables
import app.autotopup.tables
import app.console.tables
import app.keys.tables
import app.ledger.tables
import app.metering.tables
import app.notices.tables
import app.offers.tables
import app.pricing.tables
import app.topups.tables  # noqa: F401
from alembic import context
from app.migrations import is_described_by_models

config = context.config


def run() -> None:
    engine = create_engine("postgresql+psycopg://", creator=config.attributes["connect"], poolclass=NullPool)
    with engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=SQLModel.metadata,
            compare_server_default=False,
            include_name=is_described_by_models,
        )
        with context.begin_transaction():
            context.run_migrations()


run()
