"""The databases that tests run on: one for each process that runs tests, emptied before a test by what is in it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psycopg
from alembic.config import Config
from psycopg import sql

from alembic import command
from app.kernel.embedded import EmbeddedPostgres
from app.migrations import migrate

WORKER: Final = os.environ.get("PYTEST_XDIST_WORKER", "")
"""Which of several processes that run tests this one is: gw0, gw1, …; nothing where there is one."""
POOLER: Final = os.environ.get("TEST_DATABASE_POOLER", "none")
"""What TEST_DATABASE_URL leads through: the service's DATABASE_POOLER."""
CITUS: Final = os.environ.get("CITUS_URL", "")
"""The coordinator of a Citus to run on, sharded by account, in one process; what is in that database is lost."""
_ONE_AT_A_TIME: Final = 0x5A7_7E57
"""An advisory lock. Roles are the whole server's: two workers that make one at once would meet."""


@contextlib.contextmanager
def migrated() -> Iterator[str]:
    """The URL of a migrated database of our own: on TEST_DATABASE_URL's server, on CITUS_URL's, or on an embedded one."""
    given = CITUS or os.environ.get("TEST_DATABASE_URL")
    with _embedded() if not given else _beside_given(given) if WORKER else _given(given) as url:
        yield url


_TRIES: Final = 5
_WITH_PAGES: Final = """
    SELECT oid::regclass::text FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'alembic_version' AND pg_relation_size(oid) > 0"""
_DISTRIBUTED: Final = """
    UNION ALL SELECT logicalrelid::text FROM pg_dist_partition JOIN pg_class c ON c.oid = logicalrelid
    WHERE NOT c.relispartition"""


def empty(url: str) -> None:
    """Leave no row in any table, whatever tables there are, but for the migrations' own. Partitions stay.

    Only what has a page is truncated: nobody need make the files of an empty table and its indexes anew. What a failed
    test left running may be in the way; it is let through, so that this test does not fail for that one.
    """
    with psycopg.connect(url, autocommit=True) as conn:
        for tries_left in reversed(range(_TRIES)):
            tables = [
                name for (name,) in conn.execute((_WITH_PAGES + (_DISTRIBUTED if CITUS else "")).encode()).fetchall()
            ]
            try:
                if tables:
                    conn.execute(f"TRUNCATE {', '.join(tables)} CASCADE".encode())
                return
            except psycopg.errors.DeadlockDetected:
                if not tries_left:
                    raise


def kept(conn: psycopg.Connection[Any]) -> Callable[[], None]:
    """Returns what puts every table back to how it is now; what is kept for that goes with the connection."""
    tables = [
        name for (name,) in conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    ]
    tables = [
        name for name in tables if not name.startswith("usage_2") and name not in ("alembic_version", "usage_default")
    ]
    conn.execute("; ".join(f'CREATE TEMP TABLE "kept_{name}" AS TABLE public."{name}"' for name in tables).encode())

    def put_back() -> None:
        conn.execute(f"TRUNCATE {', '.join(tables)} CASCADE".encode())
        conn.execute("; ".join(f'INSERT INTO public."{name}" TABLE "kept_{name}"' for name in tables).encode())

    return put_back


@contextlib.contextmanager
def _embedded() -> Iterator[str]:
    """A cluster of our own, with the settings that the service runs on: a race is as wide here as it is there."""
    folder = Path(tempfile.mkdtemp(prefix="satmeter-test-"))
    folder.chmod(0o755)
    server = EmbeddedPostgres(folder)
    try:
        url = server.start()
        migrate(url)
        yield url
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _given(url: str) -> Iterator[str]:
    """The database that was given, made new."""
    with psycopg.connect(url, autocommit=True) as conn:
        if CITUS:  # which cannot drop the schema
            conn.execute("SET client_min_messages = error")
            for (drop,) in conn.execute(_DROPS).fetchall():
                conn.execute(drop.encode())
        else:
            conn.execute("DROP SCHEMA public CASCADE")
            conn.execute("CREATE SCHEMA public")
    migrate(url, POOLER, sharded=bool(CITUS))
    yield url


_DROPS: Final = """
    SELECT format('DROP FUNCTION %s CASCADE', oid::regprocedure) FROM pg_proc WHERE pronamespace IN ('public'::regnamespace, to_regnamespace('by_account'))
    UNION ALL
    SELECT 'DROP TABLE ' || string_agg(oid::regclass::text, ', ') || ' CASCADE' FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
    HAVING count(*) > 0"""


@contextlib.contextmanager
def _beside_given(given: str) -> Iterator[str]:
    """A database of this worker's on the server of the one that was given; none is left in the end."""
    with psycopg.connect(given, autocommit=True) as conn:
        name = f"{conn.info.dbname}_{WORKER}"
        drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        conn.execute("SELECT pg_advisory_lock(%s)", [_ONE_AT_A_TIME])
        conn.execute(drop)
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        migrate(url := _named(given, name), POOLER)
    try:
        yield url
    finally:
        with psycopg.connect(given, autocommit=True) as conn:
            conn.execute(drop)


def _named(url: str, database: str) -> str:
    """Another database on the same server. urlunsplit would lose the slashes of a URL without a host."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/{database}" + (f"?{parts.query}" if parts.query else "")


@contextlib.contextmanager
def at_revision(clean: str, revision: str) -> Iterator[str]:
    """A database beside `clean`, as the migrations up to `revision` leave it; gone afterwards."""
    name = f"{urlsplit(clean).path.lstrip('/')}_at_{revision}"
    drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    with psycopg.connect(clean, autocommit=True) as conn:
        conn.execute(drop)
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        url = _named(clean, name)
        config = Config()
        config.set_main_option("script_location", "alembic")
        config.attributes["connect"] = lambda: psycopg.connect(url)
        command.upgrade(config, revision)
        yield url
        conn.execute(drop)
