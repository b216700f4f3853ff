"""A real PgBouncer in front of a database: the one on PATH, or TEST_PGBOUNCER's."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from tests.program import eventually, of_ordinary_user

_GIVEN: Final = os.environ.get("TEST_PGBOUNCER")
"""The path of the program to use."""
_FURTHER: Final = os.environ.get("TEST_PGBOUNCER_SETTINGS", "")
"""Further lines of its pgbouncer.ini, such as `max_prepared_statements = 0`; several with `;` between them."""


def told() -> str:
    """What stands in front of the database: its version, and what was set further."""
    return ", ".join([_version(_program()), *_settings()])


class Pooler:
    """`url` leads through it, as the database's owner; it may be stopped and started again."""

    def __init__(self, folder: Path, user: dict[str, Any]) -> None:
        self.folder, self._user = folder, user
        self.url = f"postgresql://owner@/satmeter?host={folder}&port=6432"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [_program(), self.folder / "pgbouncer.ini"], stdout=log, stderr=log, cwd="/", **self._user
            )
        eventually(self._answers, 20)

    def tell(self, what: signal.Signals) -> None:
        """A signal; to one that has ended already, nothing."""
        assert self._process is not None
        self._process.send_signal(what)

    def has_ended(self, within_seconds: float) -> bool:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_seconds)
            return True
        return False

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """At once, or as it understands another signal."""
        self.tell(how)
        assert self.has_ended(within_seconds=20), f"it goes on after {how.name}"

    def command(self, statement: str) -> list[tuple[Any, ...]]:
        """What its console answers."""
        url = f"postgresql://owner@/pgbouncer?host={self.folder}&port=6432"
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as conn:
            cursor = conn.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "log").read_text()
        with contextlib.suppress(psycopg.OperationalError):
            return bool(self.command("SHOW VERSION"))
        return False


@contextlib.contextmanager
def pooler(direct: str, mode: str, ignored: str = "options", database: str = "satmeter") -> Iterator[str]:
    """The URL of a database behind one; skips where none is installed."""
    with pooler_of(direct, mode, ignored, database) as made:
        yield made.url


@contextlib.contextmanager
def pooler_of(direct: str, mode: str, ignored: str = "options", database: str = "satmeter") -> Iterator[Pooler]:
    """The same with its hand on the pooler."""
    _program()
    folder = Path(tempfile.mkdtemp(prefix="satmeter-pool-"))
    folder.chmod(0o755)
    host = psycopg.conninfo.conninfo_to_dict(direct)["host"]
    lines = [
        "[databases]", f"satmeter = host={host} port=5432 dbname={database} user=owner",
        "[pgbouncer]", f"unix_socket_dir = {folder}", "listen_port = 6432", "auth_type = any", "admin_users = owner", f"pool_mode = {mode}",
        f"ignore_startup_parameters = {ignored}", "default_pool_size = 40", *_settings(),
    ]  # fmt: skip
    (folder / "pgbouncer.ini").write_text("\n".join([*lines, ""]))
    made = Pooler(folder, of_ordinary_user(folder))
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _settings() -> list[str]:
    return [line.strip() for line in _FURTHER.split(";") if line.strip()]


def _program() -> str:
    found = _GIVEN or shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if found is None:
        pytest.skip("pgbouncer is not installed (apt-get install pgbouncer)")
    return found


@functools.cache
def _version(program: str) -> str:
    return subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=10, check=True
    ).stdout.splitlines()[0]
