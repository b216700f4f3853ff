"""Bringing a database to the schema this code knows: one lock, one transaction a step, clear refusals."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from alembic import command
from app import sharding
from app.kernel.connection import POOLERS, as_begin, as_options, as_set, as_shown, session_of
from app.kernel.db import RUNTIME_ROLE
from app.metering.functions import BY_ACCOUNT, FUNCTIONS, OF_ACCOUNT, Function
from app.sharding import ShardingError

_SCRIPTS = Path(__file__).parent.parent / "alembic"
_ADVISORY_LOCK = 0x5A7_3E7E2
_PARTITION = re.compile(r"usage_(\d{4}_\d{2}|default)")


class MigrationError(Exception):
    """The database cannot be brought to this code's schema; the message says why and what would help."""


def is_described_by_models(name: str | None, kind: str, parents: Mapping[str, str | None]) -> bool:
    """For Alembic's comparison: a month's partition of `usage` has no model of its own."""
    return not _PARTITION.fullmatch(parents.get("table_name") or name or "")


def head() -> str:
    """The newest revision this code knows."""
    revision = ScriptDirectory(str(_SCRIPTS)).get_current_head()
    assert revision is not None
    return revision


def current(url: str) -> str | None:
    """The revision a database is at, None when it is empty."""
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: _connected(url, autocommit=False), poolclass=NullPool
    )
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def migrate(url: str, pooler: str = POOLERS[0], *, sharded: bool = False) -> bool:
    """Upgrade to the head; False if it was there already. Two processes may call it at once.

    `sharded` has Citus distribute the tables by account. A database that is sharded stays so, whatever is said here, and what
    belongs beside its shards is made where it is missing.
    Raises MigrationError for a database of a newer version, a server before 15, missing rights, or another pooler than is said.
    """
    with _explained(), _connected(url) as conn:
        _check_server(conn)
        _check_pooling(conn, url, pooler)
        with _alone(url):
            return _migrate(conn, url, pooler, sharded=sharded)


def _migrate(conn: psycopg.Connection[Any], url: str, pooler: str, *, sharded: bool) -> bool:
    _refuse_newer(url)
    _ensure_runtime_role(conn)
    _check_session(url, pooler)
    is_new = _upgrade(url)
    if (sharded or sharding.is_sharded(conn)) and sharding.distribute(conn):
        is_new = True
    if not _has_our_functions(conn):
        _install_functions(conn)
        is_new = True
    if sharding.is_sharded(conn) and sharding.install(conn):
        is_new = True
    return is_new


def check(url: str, pooler: str = POOLERS[0]) -> None:
    """Raises MigrationError unless the database is at the head and we may use it; changes nothing."""
    with _explained(), _connected(url) as conn:
        _check_server(conn)
        _check_pooling(conn, url, pooler)
        _refuse_newer(url)
        found = current(url)
        if found != head():
            raise MigrationError(
                f"the database is at migration {found}, this code needs {head()}: run `python -m app migrate`"
            )
        if not _has_our_functions(conn):
            raise MigrationError("the database's metering functions are not this code's: run `python -m app migrate`")
        if not _may_be_runtime(conn):
            raise MigrationError(_what_a_dba_should_do(conn))
        if sharding.is_sharded(conn):
            sharding.check(conn)
        _check_session(url, pooler)


def is_sharded(url: str) -> bool:
    """Whether accounts are distributed over several servers, so that each is asked about by itself."""
    with _explained(), _connected(url) as conn:
        return sharding.is_sharded(conn)


def _connected(url: str, *, autocommit: bool = True) -> psycopg.Connection[Any]:
    """One that prepares nothing: behind a pooler it would be prepared in another server process."""
    return psycopg.connect(url, autocommit=autocommit, connect_timeout=5, prepare_threshold=None)


@contextlib.contextmanager
def _alone(url: str) -> Iterator[None]:
    """One migration at a time. The lock is a transaction's, since that is what a pooler keeps together, and gives back."""
    with _connected(url) as conn, conn.transaction():
        conn.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        conn.execute("SELECT pg_advisory_xact_lock(%s)", [_ADVISORY_LOCK])
        yield


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """PostgreSQL's refusals in one line, and without the URL, which has a password in it."""
    try:
        yield
    except ShardingError as error:
        raise MigrationError(str(error)) from error
    except (psycopg.Error, DBAPIError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        first_line = str(cause).strip().split("\n", 1)[0]
        if isinstance(cause, psycopg.errors.InsufficientPrivilege):
            raise MigrationError(
                f"the database user may not do that: {first_line}; it must own the database and its tables"
            ) from error
        if isinstance(cause, psycopg.OperationalError):
            raise MigrationError(f"the database cannot be reached: {first_line}") from error
        if isinstance(cause, psycopg.ProgrammingError) and cause.sqlstate is None:
            raise MigrationError("DATABASE_URL is not like postgresql://user:password@host:5432/database") from error
        raise


def _check_server(conn: psycopg.Connection[Any]) -> None:
    if conn.info.server_version < 150000:
        raise MigrationError(f"PostgreSQL {conn.info.server_version // 10000} is too old; 15 or newer is needed")


def _check_pooling(conn: psycopg.Connection[Any], url: str, pooler: str) -> None:
    """Whoever is at the other end must be one server process for as long as the connection lasts, or the transaction.

    A pooler gives out process numbers of its own, so one that is the server's says that nobody is in between.
    """
    if _server_process(conn) == conn.info.backend_pid:
        return
    try:
        with _connected(url) as other:
            is_kept = all(_is_kept(conn, other) for _ in range(3))
    except psycopg.errors.ProtocolViolation as error:  # PgBouncer in pool_mode = statement
        raise MigrationError(
            "DATABASE_URL leads through a pooler that knows no transactions;"
            " set pool_mode = session, or pool_mode = transaction and DATABASE_POOLER=transaction"
        ) from error
    if not is_kept and pooler != "transaction":
        raise MigrationError(
            "DATABASE_URL leads through a pooler that changes the server's process under a connection;"
            " set DATABASE_POOLER=transaction, or pool_mode = session, or connect to PostgreSQL itself"
        )


def _is_kept(one: psycopg.Connection[Any], other: psycopg.Connection[Any]) -> bool:
    """Whether `one` has its server process to itself, though it is idle while `other` wants one."""
    before = _server_process(one)
    with other.transaction():
        return _server_process(other) != before and _server_process(one) == before


def _server_process(conn: psycopg.Connection[Any]) -> int:
    found = conn.execute("SELECT pg_backend_pid()", prepare=False).fetchone()
    assert found is not None
    return int(found[0])


def _check_session(url: str, pooler: str) -> None:
    """Whether a connection becomes what the service's must be: by its start, by being told once more, or in a transaction."""
    session = session_of(RUNTIME_ROLE)
    wanted, shown = (list(session.values()),), as_shown(session).encode()
    if pooler == "transaction":
        with _connected(url) as conn:
            conn.execute(as_begin(session).encode())
            assert conn.execute(shown).fetchone() == wanted
            conn.execute("ROLLBACK")
        return
    try:
        with psycopg.connect(url, autocommit=True, connect_timeout=5, options=as_options(session)) as conn:
            if conn.execute(shown).fetchone() == wanted:
                return
            conn.execute(as_set(session).encode())
            if conn.execute(shown).fetchone() == wanted:
                return
    except psycopg.OperationalError as error:
        if "startup parameter" in str(error):
            raise MigrationError(
                "the pooler in front of the database refuses how our connections begin;"
                " set ignore_startup_parameters = options in PgBouncer"
            ) from error
        raise
    raise MigrationError(
        f"a connection does not become the role {RUNTIME_ROLE} with our time limits: is there a pooler?"
    )


def _refuse_newer(url: str) -> None:
    found, known = current(url), {script.revision for script in ScriptDirectory(str(_SCRIPTS)).walk_revisions()}
    if found is not None and found not in known:
        raise MigrationError(
            f"the database is at migration {found}, which is newer than this code (it knows up to {head()});"
            " run the newer version, or restore the backup from before the upgrade"
        )


def _ensure_runtime_role(conn: psycopg.Connection[Any]) -> None:
    """The role is the server's, not the database's: a restored dump does not bring it, so it is looked for every time.

    Raises MigrationError if it is missing and we may not make it.
    """
    if _may_be_runtime(conn):
        return
    role = sql.Identifier(RUNTIME_ROLE)
    try:
        with contextlib.suppress(psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
            conn.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(role))
        conn.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(role))
    except psycopg.errors.InsufficientPrivilege as error:
        raise MigrationError(_what_a_dba_should_do(conn)) from error


def _may_be_runtime(conn: psycopg.Connection[Any]) -> bool:
    """Whether the role exists and we may become it."""
    try:
        with conn.transaction():
            conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(RUNTIME_ROLE)))
    except (psycopg.errors.InvalidParameterValue, psycopg.errors.InsufficientPrivilege):
        return False
    return True


def _what_a_dba_should_do(conn: psycopg.Connection[Any]) -> str:
    found = conn.execute("SELECT quote_ident(current_user), to_regrole(%s) IS NOT NULL", [RUNTIME_ROLE]).fetchone()
    assert found is not None
    user, exists = found
    grant = f"GRANT {RUNTIME_ROLE} TO {user};"
    if exists:
        return f"the user {user} is not a member of the role {RUNTIME_ROLE}; as a superuser: {grant}"
    return (
        f"the role {RUNTIME_ROLE} does not exist and the user {user} may not create it;"
        f" as a superuser: CREATE ROLE {RUNTIME_ROLE} NOLOGIN; {grant}"
    )


def _upgrade(url: str) -> bool:
    if current(url) == head():
        return False
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connect"] = lambda: _connected(url, autocommit=False)
    command.upgrade(config, "head")
    return True


# --- functions: code, which is installed and not migrated ---------------------------------------------

_OURS = """SELECT p.proname, p.prosrc, obj_description(p.oid, 'pg_proc'), p.oid::regprocedure::text FROM pg_proc p
           WHERE p.pronamespace = 'public'::regnamespace AND (starts_with(p.proname, 'meter_') OR p.proname = ANY (%s))
           UNION ALL
           SELECT n.nspname || '.' || p.proname, p.prosrc, obj_description(p.oid, 'pg_proc'), p.oid::regprocedure::text
           FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = %s"""


def _installable(conn: psycopg.Connection[Any]) -> dict[str, Function]:
    of_account = sharding.wrappers() if sharding.is_sharded(conn) else list(OF_ACCOUNT.values())
    return FUNCTIONS | {function.name: function for function in of_account}


def _has_our_functions(conn: psycopg.Connection[Any]) -> bool:
    """Whether the functions there are are the file's and their wrappers, to the letter, and no others of their kind."""
    installed = conn.execute(_OURS, [list(FUNCTIONS), BY_ACCOUNT]).fetchall()
    wanted = {name: (function.body, function.fingerprint) for name, function in _installable(conn).items()}
    return len(installed) == len(wanted) and {name: (body, note) for name, body, note, _ in installed} == wanted


def _install_functions(conn: psycopg.Connection[Any]) -> None:
    """Put the file's functions in place of those that are there, whatever their parameters were, in one transaction."""
    schema, role = sql.Identifier(BY_ACCOUNT), sql.Identifier(RUNTIME_ROLE)
    with conn.transaction():
        for _, _, _, signature in conn.execute(_OURS, [list(FUNCTIONS), BY_ACCOUNT]).fetchall():
            conn.execute(f"DROP FUNCTION {signature}".encode())
        conn.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(schema))
        conn.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, role))
        for function in _installable(conn).values():
            conn.execute(function.text.encode())
            name = sql.Identifier(*function.name.split("."))
            conn.execute(sql.SQL("COMMENT ON FUNCTION {} IS {}").format(name, sql.Literal(function.fingerprint)))
            conn.execute(sql.SQL("REVOKE EXECUTE ON FUNCTION {} FROM PUBLIC").format(name))
            conn.execute(sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}").format(name, role))
        if sharding.is_sharded(conn):
            sharding.delegate(conn)
        conn.execute(
            "SELECT make_usage_partitions(0)"
        )  # those to come are the job's, which knows whether they are months
