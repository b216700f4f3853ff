"""Bringing a database to the schema this code knows: one lock, one transaction a step, clear refusals."""

from pathlib import Path
from typing import Any

import psycopg
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from alembic import command

_SCRIPTS = Path(__file__).parent.parent / "alembic"
_ADVISORY_LOCK = 0x5A7_3E7E2


class MigrationError(Exception):
    """The database cannot be brought to this code's schema; the message says why and what would help."""


def head() -> str:
    """The newest revision this code knows."""
    revision = ScriptDirectory(str(_SCRIPTS)).get_current_head()
    assert revision is not None
    return revision


def current(url: str) -> str | None:
    """The revision a database is at, None when it is empty."""
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(url, connect_timeout=5), poolclass=NullPool
    )
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def migrate(url: str) -> bool:
    """Upgrade to the head; False if it was there already. Two processes may call it at once.

    Raises MigrationError for a database of a newer version, a server before 15, or missing rights.
    """
    try:
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as lock:
            _check_server(lock)
            lock.execute("SELECT pg_advisory_lock(%s)", [_ADVISORY_LOCK])
            return _upgrade(url)
    except psycopg.OperationalError as error:
        raise MigrationError(f"the database cannot be reached: {_first_line(error)}") from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise MigrationError(f"the database user may not do that: {_first_line(error)}") from error


def _check_server(conn: psycopg.Connection[Any]) -> None:
    if conn.info.server_version < 150000:
        raise MigrationError(f"PostgreSQL {conn.info.server_version // 10000} is too old; 15 or newer is needed")


def _upgrade(url: str) -> bool:
    before, known = current(url), {script.revision for script in ScriptDirectory(str(_SCRIPTS)).walk_revisions()}
    if before is not None and before not in known:
        raise MigrationError(
            f"the database is at migration {before}, which is newer than this code (it knows up to {head()});"
            " run the newer version, or restore the backup from before the upgrade"
        )
    if before == head():
        return False
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connect"] = lambda: psycopg.connect(url, connect_timeout=5)
    command.upgrade(config, "head")
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
