"""The program as its operator meets it: started, asked, interrupted, refused, killed; on real ports, as real processes."""

import base64
import contextlib
import json
import os
import pwd
import re
import resource
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from app.kernel.embedded import EmbeddedPostgres
from app.kernel.settings import PLACEHOLDER, SettingsError, load
from tests.program import (
    ROOT,
    Program,
    all_gone,
    eventually,
    external_postgres,
    installation,
    is_free,
    ordinary_user,
)

pytestmark = pytest.mark.long

IS_ROOT = os.geteuid() == 0
PRODUCTION = {
    "ENVIRONMENT": "production",
    "DATABASE_URL": "postgresql://satmeter:secret-of-the-database@127.0.0.1:1/satmeter",
    "PUBLIC_URL": "https://satmeter.example",
    "SECRET_PEPPER": secrets.token_urlsafe(48),
    "SEALING_KEYS": "k1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
    "BTCPAY_URL": "https://btcpay.example",
    "BTCPAY_API_KEY": secrets.token_hex(20),
    "BTCPAY_STORE_ID": "store",
    "BTCPAY_WEBHOOK_SECRET": secrets.token_urlsafe(24),
}


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """One server for the tests that leave it as they found it."""
    with installation() as made:
        made.run()
        yield made


@pytest.fixture(scope="module")
def demo(program: Program) -> dict[str, str]:
    return dict(program.answer("demo"))


def post(url: str, token: str, body: object) -> Any:
    response = httpx.post(url, headers={"Authorization": f"Bearer {token}"}, json=body, timeout=15, trust_env=False)
    assert response.status_code in (200, 201), response.text
    return response.json()


def balance(demo: dict[str, str]) -> Decimal:
    headers = {"Authorization": f"Bearer {demo['api_key']}"}
    response = httpx.get(f"{demo['base_url']}/credits/balance", headers=headers, timeout=15, trust_env=False)
    assert response.status_code == 200, response.text
    return Decimal(str(json.loads(response.text, parse_float=Decimal)["balance"]))


def charge(demo: dict[str, str], request_id: str, cost_usd: str) -> Any:
    body = {"request_id": request_id, "api_key": demo["api_key"], "model": "a/model", "cost_usd": cost_usd}
    return post(f"{demo['base_url']}/v1/meter/charge", demo["service_token"], body)


def one_line(text: str) -> str:
    """What a refusal is: one line, that says who speaks."""
    assert text.startswith("satmeter: "), text
    assert len(text.splitlines()) == 1, text
    return text


# --- up, asked, down --------------------------------------------------------------------------------


def test_a_newcomer_gets_a_service_that_is_alive_and_ready(program: Program) -> None:
    assert program.status("/health/live") == 200
    assert program.status("/health/ready") == 200


def test_demo_prints_eight_names_and_they_work(program: Program, demo: dict[str, str]) -> None:
    names = [
        "base_url",
        "sandbox_url",
        "credit_id",
        "api_key",
        "service_token",
        "admin_token",
        "nwc_url",
        "gateway_url",
        "console_url",
    ]
    assert list(demo) == names
    assert demo["base_url"] == program.base_url
    assert demo["nwc_url"].startswith("nostr+walletconnect://")
    assert f"127.0.0.1%3A{program.sandbox_port}%2Frelay" in demo["nwc_url"]

    fresh = dict(program.answer("demo"))
    assert balance(fresh) == Decimal("5.25")
    assert charge(fresh, "first-call", "0.000045")["decision"] == "allow"
    assert balance(fresh) == Decimal("5.249955")


def test_audit_recomputes_the_books_beside_a_running_server(program: Program, demo: dict[str, str]) -> None:
    report = program.answer("audit")
    assert report["findings"] == []
    assert report["accounts"] >= 1
    assert report["entries"] >= 2


def test_a_reader_who_has_seen_enough_is_no_defect(program: Program) -> None:
    read, write = os.pipe()
    os.close(read)
    done = program.command_into(write, "audit")
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "defect" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_tokens_are_made_beside_a_running_server(program: Program, demo: dict[str, str]) -> None:
    made = program.answer("token", "create", "--service", "a-proxy")
    assert (made["kind"], made["name"]) == ("service", "a-proxy")
    assert charge(demo | {"service_token": made["token"]}, "by-a-proxy", "0.01")["decision"] == "allow"
    assert program.answer("token", "create", "--admin", "an-operator")["kind"] == "admin"


def test_a_token_with_an_impossible_name_is_refused_in_one_line(program: Program) -> None:
    done = program.command("token", "create", "--service", "No Such Name")
    assert done.returncode == 2
    assert "lower-case" in one_line(done.stderr)


def test_migrate_says_that_there_was_nothing_to_do(program: Program) -> None:
    assert program.answer("migrate")["changed"] is False


def test_keys_rotate_seals_what_is_kept(program: Program, demo: dict[str, str]) -> None:
    answer = program.answer("keys", "rotate")
    assert answer["changed"] >= 0
    assert answer["unreadable"] == 0


def test_commands_leave_the_running_server_its_database(program: Program) -> None:
    before = program.postmaster()
    program.answer("audit")
    assert program.postmaster() == before
    assert program.status("/health/ready") == 200


def test_secrets_are_for_our_eyes_only(program: Program) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in program.data_dir.iterdir()}
    assert modes["secrets.json"] == 0o600
    assert modes["postgres"] == 0o700


def test_a_killed_http_worker_is_replaced(program: Program) -> None:
    (before,) = program.children("http")
    before.kill()
    eventually(lambda: before not in program.children("http") and program.status("/health/ready") == 200)


def test_ctrl_c_stops_everything_and_a_second_run_finds_the_balance() -> None:
    with installation() as program:
        program.run("--demo")
        eventually(lambda: (program.data_dir / "demo.json").exists())
        assert stat.S_IMODE((program.data_dir / "demo.json").stat().st_mode) == 0o600
        demo = json.loads((program.data_dir / "demo.json").read_text())
        charge(demo, "before-the-break", "1.25")
        everything = program.processes()
        assert len(everything) > 5

        assert program.interrupt() == 0
        assert all_gone(everything)
        assert is_free(program.http_port)
        assert is_free(program.sandbox_port)
        assert "Traceback" not in program.printed + program.logged

        assert demo["nwc_url"] is not None
        as_an_earlier_version_left_it = json.dumps(demo | {"nwc_url": None})
        (program.data_dir / "demo.json").write_text(as_an_earlier_version_left_it)
        program.run("--demo")
        assert balance(demo) == Decimal("4.00")
        eventually(lambda: "of an earlier run, with $4.00 left" in program.printed)
        eventually(lambda: json.loads((program.data_dir / "demo.json").read_text()) == demo)
        assert program.answer("audit")["findings"] == []
        assert program.interrupt() == 0


@pytest.mark.parametrize(
    "moment", ["while it imports", "while a cluster is made", "while the database starts", "while it migrates", "then"]
)
def test_ctrl_c_while_it_starts_is_one_line_and_leaves_nothing_running_and_nothing_broken(moment: str) -> None:
    with installation() as program:
        has_come: dict[str, Callable[[], object]] = {
            "while it imports": lambda: "Starting Satmeter" in program.printed,
            "while a cluster is made": lambda: list(program.data_dir.glob("postgres.new/PG_VERSION")),
            "while the database starts": lambda: list(program.data_dir.glob("postgres/PG_VERSION")),
            "while it migrates": program.postmaster,
            "then": lambda: "Migrated" in program.printed,
        }
        program.start()
        eventually(has_come[moment])
        assert program.interrupt() == 130
        assert program.logged.splitlines() == ["satmeter: interrupted"]
        assert program.postmaster() is None

        assert program.answer("audit")["findings"] == []
        assert program.postmaster() is None


def test_started_with_sigint_ignored_it_heeds_none_and_stops_on_sigterm() -> None:
    with installation() as program:
        program.ignores_interrupts = True
        program.run()
        everything = program.processes()
        os.killpg(program.parent.pid, signal.SIGINT)
        assert program.status("/health/ready") == 200
        assert program.is_alive
        program.parent.terminate()
        assert program.wait() == 0
        assert all_gone(everything)
        assert program.logged == ""


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["PORT", "SANDBOX_PORT"])
def test_a_taken_port_is_one_line_and_nothing_stays_running(variable: str) -> None:
    with installation() as program, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = program.command("run", **{variable: str(port)})
        assert done.returncode == 2
        assert f"{variable}={port} cannot be used" in one_line(done.stderr)
        assert program.postmaster() is None


def test_a_port_that_is_not_for_ordinary_users_is_one_line_that_advises_none_of_its_kind() -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 80:
        pytest.skip("on this machine every port is for ordinary users")
    with installation(ordinary_user() if IS_ROOT else None) as program:
        line = one_line(program.command("run", PORT="80").stderr)
        assert "PORT=80 cannot be used" in line
        assert "PORT=8080 make run" in line
        assert "PORT=90" not in line


def test_an_address_of_another_machine_is_one_line() -> None:
    with installation() as program:
        line = one_line(program.command("run", HOST="192.0.2.1").stderr)
        assert "HOST must be an address of this machine" in line


def test_a_data_dir_that_cannot_be_written_is_one_line() -> None:
    user = ordinary_user() if IS_ROOT else None
    with installation(user) as program:
        locked = program.folder / "locked"
        locked.mkdir(mode=0o500)
        done = program.command("run", DATA_DIR=str(locked / "data"))
        assert done.returncode == 2
        assert "DATA_DIR=" in one_line(done.stderr)
        assert "Permission denied" in done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="only root can make what belongs to another user")
def test_a_data_dir_of_another_user_is_one_line() -> None:
    with installation(ordinary_user()) as program:
        program.data_dir.mkdir(mode=0o755)
        (program.data_dir / "secrets.json").write_text("{}")
        (program.data_dir / "secrets.json").chmod(0o600)
        done = program.command("run")
        assert done.returncode == 2
        assert "DATA_DIR=" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("name", "says"), [("a,b", "a comma"), ("long-" + "x" * 100, "bytes too long"), ("file/below", "DATA_DIR=")]
)
def test_a_data_dir_that_postgresql_cannot_use_is_one_line(name: str, says: str) -> None:
    with installation() as program:
        (program.folder / "file").write_text("not a folder")
        done = program.command("migrate", DATA_DIR=str(program.folder / name))
        assert done.returncode == 2
        assert says in one_line(done.stderr)


def test_damaged_secrets_are_one_line() -> None:
    with installation() as program:
        program.data_dir.mkdir()
        (program.data_dir / "secrets.json").write_text("{")
        done = program.command("run")
        assert done.returncode == 2
        assert "secrets.json is damaged" in one_line(done.stderr)


def test_a_folder_with_a_space_in_its_name_is_good_enough() -> None:
    with installation() as program:
        program.data_dir = program.folder / "it's my data"
        done = program.command("migrate", DATA_DIR=str(program.data_dir))
        assert done.returncode == 0, done.stderr


def test_a_database_of_a_newer_version_is_one_line() -> None:
    with installation() as program:
        server = EmbeddedPostgres(program.data_dir)
        assert program.command("migrate").returncode == 0
        with psycopg.connect(server.start(), autocommit=True) as conn:
            conn.execute("UPDATE alembic_version SET version_num = '9999'")
        server.stop()
        for command in (["run"], ["run", "--demo"], ["migrate"], ["audit"]):
            done = program.command(*command)
            assert done.returncode == 2
            assert "at migration 9999, which is newer than this code" in one_line(done.stderr)
            assert program.postmaster() is None


def test_demo_without_a_server_is_one_line() -> None:
    with installation() as program:
        done = program.command("demo")
        assert done.returncode == 2
        assert "make run" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *[({name: ""}, f"{name} is not set") for name in PRODUCTION if name != "ENVIRONMENT"],
        *[
            ({name: f"x-{PLACEHOLDER}-{'x' * 40}"}, f"{name} still has its placeholder")
            for name in ("DATABASE_URL", "SECRET_PEPPER", "SEALING_KEYS", "BTCPAY_API_KEY", "BTCPAY_WEBHOOK_SECRET")
        ],
        ({"BTCPAY_URL": "http://btcpay.example"}, "BTCPAY_URL is plain http"),
        ({"BTCPAY_URL": "HTTP://btcpay.example"}, "BTCPAY_URL is plain http"),
        ({"NWC_ALLOW_PRIVATE_RELAYS": "on"}, "NWC_ALLOW_PRIVATE_RELAYS is on"),
    ],
)
def test_production_refuses_a_convenience(changes: dict[str, str], reason: str) -> None:
    assert load(PRODUCTION).is_production
    with pytest.raises(SettingsError, match=re.escape(reason)):
        load(PRODUCTION | changes)


def test_production_says_all_that_is_wrong_at_once() -> None:
    with installation() as program:
        done = program.command("run", ENVIRONMENT="production", NWC_ALLOW_PRIVATE_RELAYS="on")
        assert done.returncode == 2
        said = one_line(done.stderr)
        for name in PRODUCTION:
            assert name in said
        assert "NWC_ALLOW_PRIVATE_RELAYS is on" in said
        assert not program.data_dir.exists()


def test_production_without_its_database_is_one_line_without_the_password() -> None:
    with installation() as program:
        done = program.command("run", **PRODUCTION)
        assert done.returncode == 2
        assert "the database cannot be reached" in one_line(done.stderr)
        assert "secret-of-the-database" not in done.stderr


def test_an_unreadable_database_url_is_one_line_without_the_password() -> None:
    with installation() as program:
        done = program.command("migrate", DATABASE_URL="postgres//satmeter:secret-of-the-database@host")
        assert done.returncode == 2
        assert "DATABASE_URL" in one_line(done.stderr)
        assert "secret-of-the-database" not in done.stderr


# --- kill -9 ----------------------------------------------------------------------------------------


def test_children_leave_with_a_killed_parent_and_the_next_run_adopts_its_postgresql_until_sigterm() -> None:
    with installation() as program:
        program.run()
        children, postmaster = program.children("http") + program.children("sandbox"), program.postmaster()
        assert len(children) == 2
        program.parent.send_signal(signal.SIGKILL)
        program.wait()
        eventually(lambda: all_gone(children))
        assert program.postmaster() == postmaster

        program.run()
        assert program.postmaster() == postmaster
        everything = program.processes()
        program.parent.terminate()
        assert program.wait() == 0
        assert all_gone(everything)


def test_a_pid_that_a_crash_left_behind_is_not_believed() -> None:
    """Nor is one that is another program's by now: here ours."""
    with installation() as program:
        assert program.command("migrate").returncode == 0
        pid_file = program.data_dir / "postgres" / "postmaster.pid"
        pid_file.write_text(f"{os.getpid()}\n{pid_file.parent}\n1\n5432\n{pid_file.parent}\n\n1 1\nready\n")
        assert program.answer("migrate")["changed"] is False
        assert program.postmaster() is None


def test_a_killed_command_is_not_waited_for() -> None:
    """`run` stops PostgreSQL at its end although a command that used it, too, never said goodbye."""
    with installation() as program, installation(DATA_DIR=str(program.data_dir)) as other:
        other.start()
        eventually(lambda: program.postmaster() is not None)
        postmaster = program.postmaster()
        other.parent.kill()
        other.wait()
        assert program.answer("migrate")["revision"]
        assert all_gone([postmaster])
        assert program.postmaster() is None


# --- crowds -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_crowd_of_silent_and_slow_callers_keeps_nobody_out_and_does_not_hold_up_the_end() -> None:
    """Started under a low limit of open files, which is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as sockets, installation() as program:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
        try:
            program.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
        program.wait_until_ready()
        (served,) = program.children("http")
        assert served.rlimit(psutil.RLIMIT_NOFILE)[0] == min(hard, 1 << 20)
        before = served.memory_info().rss
        half_a_body = b"POST /keys HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nx"
        for sent in [b""] * 1100 + [b"GET / HTTP/1.1\r\nHost: h\r\n"] * 20 + [half_a_body] * 20:
            caller = sockets.enter_context(socket.create_connection(("127.0.0.1", program.http_port), timeout=5))
            caller.sendall(sent)
        took = []
        for _ in range(20):
            began = time.monotonic()
            assert program.status("/health/live") == 200
            took.append(time.monotonic() - began)
        grown = served.memory_info().rss - before
        began = time.monotonic()
        program.parent.terminate()
        assert program.wait() == 0
        stopped = time.monotonic() - began
        assert max(took) < 2
        assert grown < 64 * 1024 * 1024
        assert stopped < 18  # to wait for them would take 20
        assert "Traceback" not in program.printed + program.logged


# --- whose machine it is ------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user runs it in every other test here")
def test_an_ordinary_user_runs_it_beside_and_after_root_and_root_after_them(program: Program) -> None:
    with installation(ordinary_user()) as theirs:
        theirs.run()
        assert {process.username() for process in theirs.processes()} == {theirs.user}
        assert balance(theirs.answer("demo")) == Decimal("5.25")
        assert theirs.answer("audit")["findings"] == []
        assert theirs.interrupt() == 0
        assert theirs.postmaster() is None
    with installation() as ours:
        assert ours.answer("migrate")["changed"] is True


@pytest.mark.skipif(not IS_ROOT, reason="only root's run has somebody else run PostgreSQL")
def test_root_s_run_opens_no_folder_above_data_dir() -> None:
    with installation() as program:
        home = program.folder / "home"
        home.mkdir(mode=0o700)
        program.data_dir = home / "data"
        assert program.command("migrate", DATA_DIR=str(program.data_dir)).returncode == 0
        assert stat.S_IMODE(home.stat().st_mode) == 0o700


def made_open_by_an_earlier_version(program: Program) -> None:
    """Its files and its folder readable by all; under root its cluster as nobody's, letting in whoever comes."""
    assert program.command("migrate").returncode == 0
    cluster = program.data_dir / "postgres"
    (cluster / "pg_hba.conf").write_text("local all all trust\n")
    if program.user is None and IS_ROOT:
        for path in (cluster, *cluster.rglob("*")):
            shutil.chown(path, "nobody", "nogroup")
    for name in ("postgres.lock", "postgres.users", "secrets.json", "satmeter.log"):
        (program.data_dir / name).touch()
        (program.data_dir / name).chmod(0o644)
        if program.user is not None:
            shutil.chown(program.data_dir / name, program.user)
    program.data_dir.chmod(0o755)


@pytest.mark.skipif(not IS_ROOT, reason="only root gives a cluster to another user")
def test_a_cluster_that_was_given_to_its_user_by_half_is_given_whole() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        server = EmbeddedPostgres(Path(folder))
        server.start()
        server.stop()
        cluster = Path(folder) / "postgres"
        for path in list(cluster.rglob("*"))[::2]:  # Ctrl-C came while it was given away
            shutil.chown(path, "nobody")
        try:
            with psycopg.connect(server.start()) as conn:
                assert conn.execute("SELECT 1").fetchone() == (1,)
        finally:
            server.stop()
        assert len({path.lstat().st_uid for path in (cluster, *cluster.rglob("*"))}) == 1


@pytest.mark.parametrize("as_root", [True, False])
def test_data_dir_and_its_database_are_the_operator_s_alone(as_root: bool) -> None:
    if as_root and not IS_ROOT:
        pytest.skip("only root can run as root")
    with installation(None if as_root or not IS_ROOT else ordinary_user()) as program:
        made_open_by_an_earlier_version(program)
        program.run("--demo")
        eventually(lambda: (program.data_dir / "demo.json").exists())
        assert program.answer("audit")["findings"] == []
        paths = [program.data_dir, *program.data_dir.glob("*"), *program.data_dir.glob("sandbox/**/*")]
        assert {path.name for path in paths} >= {
            "satmeter.log",
            "postgres.lock",
            "postgres.users",
            "demo.json",
            "sandbox",
        }
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        socket_folder = Path((program.data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[4])
        assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
        hba = (program.data_dir / "postgres" / "pg_hba.conf").read_text()
        assert "trust" not in hba
        assert program.sql("SELECT current_user") == [("postgres",)]
        if as_root:
            postmaster = program.postmaster()
            assert postmaster is not None
            assert postmaster.uids().real not in {0, *(user.pw_uid for user in pwd.getpwall())}
            assert others_connect(socket_folder, "nobody") == "Permission denied"
            program.sql("SELECT pg_reload_conf()")
            kill_a_backend(postmaster)
            eventually(lambda: program.status("/health/ready") == 200)
        assert program.interrupt() == 0
        assert socket_folder.exists() == (socket_folder == program.data_dir / "postgres")


def others_connect(socket_folder: Path, user: str) -> str:
    """What another user is told who tries to become the database's superuser."""
    program = f"import socket; socket.socket(socket.AF_UNIX).connect({str(socket_folder / '.s.PGSQL.5432')!r})"
    python = shutil.which("python3", path=os.defpath)
    if python is None:
        pytest.skip("no Python here that another user may run")
    done = subprocess.run(
        [python, "-c", program], user=user, group="nogroup", extra_groups=[], cwd="/", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.stderr.strip().rpartition("] ")[2]


def kill_a_backend(postmaster: Any) -> None:
    """kill -9, after which the postmaster starts all of them anew."""
    next(child for child in postmaster.children() if "idle" in " ".join(child.cmdline())).kill()


# --- your own PostgreSQL ------------------------------------------------------------------------------


def test_it_runs_on_an_external_postgresql_as_an_owner_who_may_create_roles() -> None:
    with external_postgres() as server:
        url = server.new_database("owner", "CREATEROLE")
        with installation(DATABASE_URL=url) as program:
            program.run()
            demo = dict(program.answer("demo"))
            assert balance(demo) == Decimal("5.25")
            charge(demo, "on-my-own-server", "0.25")
            assert balance(demo) == Decimal("5.00")
            assert program.answer("audit")["findings"] == []
            assert not (program.data_dir / "postgres").exists()
            assert program.interrupt() == 0
            assert server.version() >= 15


def test_without_createrole_one_line_says_what_a_dba_should_do_and_that_is_enough() -> None:
    with external_postgres() as server:
        url = server.new_database("Owner")
        with installation(DATABASE_URL=url) as program:
            done = program.command("run")
            assert done.returncode == 2
            create = 'CREATE ROLE satmeter_runtime NOLOGIN; GRANT satmeter_runtime TO "Owner";'
            assert create in one_line(done.stderr)

            server.sql("CREATE ROLE satmeter_runtime NOLOGIN")
            done = program.command("migrate")
            assert done.returncode == 2
            assert 'not a member of the role satmeter_runtime; as a superuser: GRANT satmeter_runtime TO "Owner";' in (
                one_line(done.stderr)
            )

            server.sql('GRANT satmeter_runtime TO "Owner"')
            assert program.answer("migrate")["changed"] is True
            assert program.answer("audit")["findings"] == []


def test_a_user_who_may_not_create_tables_is_told_in_one_line() -> None:
    with external_postgres() as server:
        url = server.new_database("guest", "CREATEROLE", owns=False)
        with installation(DATABASE_URL=url) as program:
            done = program.command("migrate")
            assert done.returncode == 2
            assert "must own the database" in one_line(done.stderr)


# --- make -----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile and the locked requirements, and no virtual environment yet."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    return tmp_path


def make(checkout: Path, *arguments: str, path: str = os.defpath) -> subprocess.CompletedProcess[str]:
    program = shutil.which("make")
    if program is None:
        pytest.skip("make is not installed")
    environ = {"PATH": path, "HOME": str(checkout)}
    return subprocess.run(
        [program, *arguments], cwd=checkout, env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def said_in_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
    return line


def test_make_alone_lists_what_there_is_and_does_nothing(checkout: Path) -> None:
    done = make(checkout)
    assert done.returncode == 0
    offered = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")}
    assert offered == {
        "setup",
        "run",
        "quick",
        "test",
        "lint",
        "check",
        "torture",
        "in-a-row",
        "citus",
        "bench",
        "bench-gateway",
        "vendor",
    }
    assert not (checkout / ".venv").exists()


def test_make_with_a_python_that_is_not_there_is_one_line(checkout: Path) -> None:
    assert "PYTHON=python9.9 is not a program on this machine" in said_in_one_line(
        make(checkout, "PYTHON=python9.9", "setup")
    )


def test_make_with_a_python_that_is_too_old_is_one_line_that_says_which(checkout: Path) -> None:
    python = checkout / "python3.9"
    python.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.2"\n[ "$1" = -c ] && exit 1\nexit 0\n')
    python.chmod(0o755)
    line = said_in_one_line(make(checkout, f"PYTHON={python}", "setup"))
    assert "is Python 3.9.2; Satmeter needs Python 3.11 or 3.12" in line
    assert not (checkout / ".venv").exists()


def test_make_says_why_a_virtual_environment_could_not_be_made(checkout: Path) -> None:
    python = checkout / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -m ] || exit 0\necho "Error: no space left on device"\nexit 1\n')
    python.chmod(0o755)
    line = said_in_one_line(make(checkout, f"PYTHON={python}", "setup"))
    assert line.endswith("Error: no space left on device")
    assert "apt-get" not in line


def test_make_in_a_folder_that_cannot_be_written_is_one_line(checkout: Path) -> None:
    """For root every folder can be; then it is another user who asks."""
    who: dict[str, Any] = {"user": ordinary_user()} if IS_ROOT else {}
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders let no other user in
        folder = Path(name)
        shutil.copy(checkout / "Makefile", folder)
        shutil.copytree(checkout / "deploy", folder / "deploy")
        folder.chmod(0o555)
        done = subprocess.run(
            ["make", "setup"], cwd=folder, env={"PATH": os.environ["PATH"], "HOME": "/"}, capture_output=True, text=True,
            timeout=60, check=False, **who,
        )  # fmt: skip
        folder.chmod(0o755)
    assert f"{folder} cannot be written by" in said_in_one_line(done)


def test_make_without_a_python_that_fits_is_one_line(checkout: Path) -> None:
    tools = checkout / "tools"
    tools.mkdir()
    for name in ("sh", "test", "echo", "touch"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python3").chmod(0o755)
    done = make(checkout, "run", path=str(tools))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert "needs Python 3.11 or 3.12" in line


def test_make_without_python3_venv_is_one_line(checkout: Path) -> None:
    """As on Debian without python3-venv: `-m venv` makes half an environment, and says why it stopped."""
    python = checkout / "python"
    python.write_text(
        '#!/bin/sh\n[ "$1" = -m ] || exit 0\nmkdir -p .venv/bin && touch .venv/bin/python\necho no ensurepip\nexit 1\n'
    )
    python.chmod(0o755)
    for _ in range(2):
        done = make(checkout, f"PYTHON={python}", "setup")
        assert done.returncode != 0
        (line,) = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
        assert "apt-get install python3-venv" in line


def test_make_offers_what_the_design_promises() -> None:
    done = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for step in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest"):
        assert step in done.stdout
    assert sys.version_info[:2] in ((3, 11), (3, 12))
