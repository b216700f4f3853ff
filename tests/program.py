"""The program as its operator meets it: real processes on loopback, each stopped by the pid it started."""

import contextlib
import itertools
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import psycopg
import pytest

from app.kernel.settings import variables
from tests.databases import WORKER

ROOT: Final = Path(__file__).parent.parent
Finished = subprocess.CompletedProcess[str]
_WELCOME: Final = "Satmeter is running at"


class Program:
    """One installation: a DATA_DIR and two ports of its own, and whatever `python -m app` does with them."""

    longest_command_seconds: float = 90
    ignores_interrupts = False
    """Whether `start` does as `nohup … &` in a script: with SIGINT ignored."""

    def __init__(self, folder: Path, user: str | None = None, **environ: str) -> None:
        self.folder, self.data_dir, self.user, self._tree = folder, folder / "data", user, ROOT
        self.http_port, self.sandbox_port, self.gateway_port = free_ports(3)
        self.base_url = f"http://127.0.0.1:{self.http_port}"
        self._python, extra = python_of(user)
        self._environ = _ours() | extra | {
            "HOME": str(folder), "DATA_DIR": str(self.data_dir), "PORT": str(self.http_port),
            "SANDBOX_PORT": str(self.sandbox_port), "GATEWAY_PORT": str(self.gateway_port), "LOG_LEVEL": "WARNING",
            # One demo account makes in minutes what a customer makes in years.
            "TOPUPS_WAITING": "100000", "TOPUPS_ONCE_PAID": "100000", "KEYS_PER_ACCOUNT": "100000",
        } | environ  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._printed, self._logged, self._welcomes = folder / "stdout", folder / "stderr", 0

    def run_the_source_of(self, tree: Path) -> None:
        """From now on another checkout's, by its own Python where it has one."""
        own = tree / ".venv" / "bin" / "python"
        self._tree, self._python = tree, str(own) if own.exists() else sys.executable

    # --- what an operator types ---

    def command(self, *arguments: str, **environ: str) -> Finished:
        """Run one command to its end. No traceback is ever shown to an operator."""
        return self.command_into(subprocess.PIPE, *arguments, **environ)

    def command_into(self, stdout: int, *arguments: str, **environ: str) -> Finished:
        """The same, with its output going to a file descriptor."""
        done = subprocess.run(
            [self._python, "-m", "app", *arguments], cwd=self._tree, env=self._environ | environ, stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=self.longest_command_seconds,
            check=False, **_as_user(self.user),
        )  # fmt: skip
        assert "Traceback" not in (done.stdout or "") + done.stderr, done.stderr
        return done

    def answer(self, *arguments: str) -> Any:
        """The one JSON object that a command prints."""
        done = self.command(*arguments, "--json")
        assert done.returncode == 0, done.stderr or done.stdout
        assert len(done.stdout.splitlines()) == 1
        return json.loads(done.stdout)

    def start(self, *arguments: str) -> None:
        """`python -m app run`, in a process group of its own, as a terminal would give it."""
        self._welcomes = self.printed.count(_WELCOME) if self._printed.exists() else 0
        with self._printed.open("ab") as printed, self._logged.open("ab") as logged:
            self._process = subprocess.Popen(
                [self._python, "-m", "app", "run", *arguments], cwd=self._tree, env=self._environ, stdin=subprocess.DEVNULL,
                stdout=printed, stderr=logged, start_new_session=True, **_as_user(self.user),
                preexec_fn=_ignore_interrupts if self.ignores_interrupts else None,
            )  # fmt: skip

    def run(self, *arguments: str) -> None:
        """`start`, and wait until it is ready."""
        self.start(*arguments)
        self.wait_until_ready()

    def wait_until_ready(self, seconds: float = 60) -> None:
        def is_ready() -> bool:
            assert self.is_alive, f"it ended:\n{self.printed}\n{self.logged}"
            # Its first child answers before the parent knows that all of them do; stopped in between it says "interrupted".
            return self.printed.count(_WELCOME) > self._welcomes and self.status("/health/ready") == 200

        eventually(is_ready, seconds)

    def interrupt(self) -> int:
        """Ctrl-C: SIGINT to the whole process group. Returns the exit code."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGINT)
        return self.wait()

    def wait(self, seconds: float = 30) -> int:
        assert self._process is not None
        return self._process.wait(seconds)

    # --- what is there ---

    @property
    def printed(self) -> str:
        return self._printed.read_text()

    @property
    def logged(self) -> str:
        return self._logged.read_text()

    @property
    def is_alive(self) -> bool:
        """Whether the parent runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def parent(self) -> Any:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def children(self, role: str) -> list[Any]:
        """Our child processes that serve `role`: http or sandbox."""
        return [child for child in self.parent.children() if _cmdline(child)[-1:] == [role]]

    def postmaster(self) -> Any | None:
        """The embedded PostgreSQL, None when it is not running."""
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            pid = int((self.data_dir / "postgres" / "postmaster.pid").read_text().split("\n", 1)[0])
            process = psutil.Process(pid)
            if process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def processes(self) -> list[Any]:
        """Everything that is running of this installation now."""
        found = []
        for first in (psutil.Process(self._process.pid) if self.is_alive else None, self.postmaster()):  # type: ignore[union-attr]
            if first is not None:
                with contextlib.suppress(psutil.Error):
                    found += [first, *first.children(recursive=True)]
        return found

    def status(self, path: str) -> int | None:
        """The status that a path answers now, None if nothing answers."""
        try:
            return httpx.get(f"{self.base_url}{path}", timeout=10, trust_env=False, verify=False).status_code
        except httpx.TransportError:
            return None

    def sql(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        """As the owner of its database."""
        url = self._environ.get("DATABASE_URL") or self._embedded_url()
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as conn:
            cursor = conn.execute(statement, params)
            return cursor.fetchall() if cursor.description else []

    def _embedded_url(self) -> str:
        lines = (self.data_dir / "postgres" / "postmaster.pid").read_text().splitlines()
        return f"host={lines[4]} port={lines[3]} user=postgres dbname=satmeter"

    # --- the end ---

    def kill(self) -> None:
        """kill -9 whatever of it is left, and reap it."""
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait(10)
        psutil.wait_procs(left, 10)


@contextlib.contextmanager
def installation(user: str | None = None, **environ: str) -> Iterator[Program]:
    """A program in a temporary folder; whatever happens, nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="satmeter-run-"))
    folder.chmod(0o755)
    if user is not None:
        shutil.chown(folder, user)
    program = Program(folder, user, **environ)
    try:
        yield program
    finally:
        program.kill()
        shutil.rmtree(folder, ignore_errors=True)


def eventually(is_true: Callable[[], object], seconds: float = 15) -> None:
    """Wait until it is; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def all_gone(processes: list[Any]) -> bool:
    """Whether none of them runs; a zombie that its parent has not reaped yet does not."""
    return not any(_runs(process) for process in processes)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _runs(process: Any) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _cmdline(process: Any) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, and that nobody else is given meanwhile."""
    return list(itertools.islice(filter(is_free, _PORTS), count))


def _ports_of_ours() -> Iterator[int]:
    """Each worker has its own, in turn; another run on this machine begins elsewhere.

    They lie below what systems give to connections that go out: one of those could come in between finding a port and
    listening on it.
    """
    number, workers = int(WORKER.removeprefix("gw") or 0), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ours = range(16_000 + number, 32_000, workers)
    begin = secrets.randbelow(len(ours))
    return itertools.cycle([*ours[begin:], *ours[:begin]])


_PORTS: Final = _ports_of_ours()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def ordinary_user() -> str:
    """A user without rights, to be when the tests run as root. Skips where there is none that can run Python."""
    user = nobody()
    python_of(user)
    return user


def nobody() -> str:
    """The same for programs that are not ours, and so need no Python."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("nobody").pw_name
    pytest.skip("there is no user 'nobody' here")


def python_of(user: str | None) -> tuple[str, dict[str, str]]:
    """A Python that `user` may run, and the environment that makes it see our packages.

    Ours, unless it lies in a home that they may not enter: then the system's of the same version. What was found once is
    not asked for again: of many tests in a row each would import the whole program as somebody else before it began.
    """
    packages = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))}
    system = shutil.which(f"python3.{sys.version_info.minor}", path=os.defpath)
    if user is None:
        return sys.executable, {}
    if user in _PYTHONS:
        return _PYTHONS[user]
    said = ""
    for python, environ in ((sys.executable, {}), (system or "python3", packages)):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [python, "-c", "import app.cli, app.run"], cwd=ROOT, env=_ours() | environ, capture_output=True, timeout=60,
                check=False, **_as_user(user),
            )  # fmt: skip
            if done.returncode == 0:
                return _PYTHONS.setdefault(user, (python, environ))
            said = done.stderr.decode(errors="replace")[-300:]
    pytest.skip(
        f"the user {user!r} can run neither {sys.executable} nor a Python 3.{sys.version_info.minor} in its place: {said}"
    )


_PYTHONS: Final[dict[str, tuple[str, dict[str, str]]]] = {}


def of_ordinary_user(folder: Path) -> dict[str, Any]:
    """How to run a program as one who may be no root, with this folder for its own."""
    user = nobody() if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
    return _as_user(user)


def _as_user(user: str | None) -> dict[str, Any]:
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def _ours() -> dict[str, str]:
    """Our environment without settings, so that none of the developer's own reaches the program."""
    return {name: value for name, value in os.environ.items() if name not in variables()}


class ExternalPostgres:
    """A PostgreSQL that is not ours: a private cluster on a Unix socket, with databases for the asking."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """As its superuser."""
        with psycopg.connect(self._url("dba", database), autocommit=True, connect_timeout=5) as conn:
            cursor = conn.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def new_database(self, user: str, rights: str = "", *, owns: bool = True) -> str:
        """A database for a user who is no superuser; returns its URL."""
        self.sql(f'CREATE ROLE "{user}" LOGIN {rights}')
        self.sql("CREATE DATABASE satmeter" + (f' OWNER "{user}"' if owns else ""))
        return self._url(user, "satmeter")

    @property
    def socket_folder(self) -> str:
        return str(self._folder)

    def kill(self) -> None:
        """As a machine that loses its power: nobody says goodbye."""
        postmaster = psutil.Process(int((self._folder / "data" / "postmaster.pid").read_text().split()[0]))
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        eventually(lambda: all_gone(processes))

    def version(self) -> int:
        return int(self.sql("SHOW server_version_num")[0][0]) // 10000

    def _url(self, user: str, database: str) -> str:
        return f"postgresql://{user}@/{database}?host={self._folder}&port=5432"


@contextlib.contextmanager
def external_postgres() -> Iterator[ExternalPostgres]:
    """A new cluster of the PostgreSQL installed on this machine; skips where there is none."""
    programs = installed_postgres()
    folder = Path(tempfile.mkdtemp(prefix="satmeter-pg-"))
    options = of_ordinary_user(folder)

    def execute(name: str, *arguments: str) -> None:
        done = subprocess.run(
            [programs / name, *arguments], cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=60, check=False, **options,
        )  # fmt: skip
        assert done.returncode == 0, (folder / "log").read_text() if (folder / "log").exists() else name

    data = str(folder / "data")
    try:
        execute("initdb", "-D", data, "-U", "dba", "--auth=trust", "--locale=C", "--encoding=UTF8", "--no-sync")
        server = f"-h '' -k {folder} -p 5432 -c fsync=off"
        execute("pg_ctl", "start", "-D", data, "-l", str(folder / "log"), "-w", "-o", server)
        try:
            yield ExternalPostgres(folder)
        finally:
            with contextlib.suppress(AssertionError):  # a test may have killed it
                execute("pg_ctl", "stop", "-D", data, "-m", "immediate", "-w")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def installed_postgres() -> Path:
    """The newest PostgreSQL, of 15 or later, that has a server and is not the wheel's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]), reverse=True)
    on_path = shutil.which("initdb")
    for initdb in [*found, *([Path(on_path)] if on_path else [])]:
        said = subprocess.run([initdb, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
        if (version := re.search(r"\d+", said)) and int(version[0]) >= 15:
            return initdb.parent
    pytest.skip("no PostgreSQL server of version 15 or later is installed here")
