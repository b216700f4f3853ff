"""A streaming standby of a PostgreSQL of the machine's, made as an operator makes one."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg

from tests.program import ExternalPostgres, eventually, installed_postgres, of_ordinary_user

_SETTINGS = "-c fsync=off -c hot_standby_feedback=off -c max_standby_streaming_delay=0"


class StreamingStandby:
    """`url_of` leads to it where the given URL leads to its primary."""

    def __init__(self, primary: ExternalPostgres, folder: Path, options: dict[str, Any]) -> None:
        self._primary, self._folder, self._options = primary, folder, options
        self._data = str(folder / "data")

    def url_of(self, url: str) -> str:
        return f"postgresql://{urlsplit(url).username}@/satmeter?host={self._folder}&port=5432"

    @property
    def socket_folder(self) -> str:
        return str(self._folder)

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url_of("postgresql://dba@x/y"), autocommit=True) as conn:
            cursor = conn.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def pause(self) -> None:
        """From now on it replays nothing."""
        self.sql("SELECT pg_wal_replay_pause()")
        eventually(lambda: self.sql("SELECT pg_get_wal_replay_pause_state()") == [("paused",)])

    def resume(self) -> None:
        self.sql("SELECT pg_wal_replay_resume()")

    def catch_up(self) -> None:
        """Until what is committed on the primary by now can be read here."""
        ((now,),) = self._primary.sql("SELECT pg_current_wal_lsn()::text")
        eventually(lambda: self.sql(f"SELECT pg_last_wal_replay_lsn() >= '{now}'") == [(True,)], 30)

    def promote(self) -> None:
        self.execute("pg_ctl", "promote", "-D", self._data, "-w")

    def start(self) -> None:
        options = f"-h '' -k {self._folder} -p 5432 {_SETTINGS}"
        self.execute("pg_ctl", "start", "-D", self._data, "-l", str(self._folder / "log"), "-w", "-o", options)

    def stop(self) -> None:
        self.execute("pg_ctl", "stop", "-D", self._data, "-m", "immediate", "-w")

    def execute(self, name: str, *arguments: str) -> None:
        log = self._folder / "log"
        done = subprocess.run(
            [installed_postgres() / name, *arguments], cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=120, check=False, **self._options,
        )  # fmt: skip
        assert done.returncode == 0, log.read_text() if log.exists() else name

    def follow(self, host: str) -> None:
        """Copy the primary, and follow it from then on."""
        self.execute(
            "pg_basebackup", "-h", host, "-p", "5432", "-U", "dba", "-D", self._data, "-R", "-c", "fast", "--no-sync"
        )


@contextlib.contextmanager
def standby_of(primary: ExternalPostgres) -> Iterator[StreamingStandby]:
    folder = Path(tempfile.mkdtemp(prefix="satmeter-standby-"))
    options = of_ordinary_user(folder)
    made = StreamingStandby(primary, folder, options)
    try:
        made.follow(primary.socket_folder)
        made.start()
        try:
            yield made
        finally:
            with contextlib.suppress(AssertionError):  # a test may have stopped it
                made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
