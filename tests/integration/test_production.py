"""What is in deploy/ says what is: containers and units agree with the program, and PRODUCTION.md's commands work."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.cli import _parser
from app.doctor.backends import EVENTS, NEEDED, WEBHOOKS
from app.gateway.settings import OWN as GATEWAY
from app.kernel.settings import FROM_FILES, SettingsError, load, variables
from tests.program import ROOT, external_postgres, installation

pytestmark = pytest.mark.long

DEPLOY = ROOT / "deploy"
PRODUCTION = (DEPLOY / "PRODUCTION.md").read_text()
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def is_a_setting(name: str) -> bool:
    return name in {*variables(), *GATEWAY} or name.removesuffix("_FILE") in {*FROM_FILES, "GATEWAY_SERVICE_TOKEN"}


def parses(words: list[str]) -> None:
    """Raises SystemExit for what is no command of ours."""
    _parser().parse_args(words)


# --- PRODUCTION.md ------------------------------------------------------------------------------------


def test_its_commands_work_one_after_the_other_from_an_empty_machine_to_a_clean_audit(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    blocks = re.findall(r"^```sh\n(.*?)^```", PRODUCTION, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    etc = tmp_path / "etc"
    with external_postgres() as postgres:
        url = postgres.new_database("satmeter", "CREATEROLE")
        given = f"""cat > "$ETC/satmeter.env" <<'ENV'
ENVIRONMENT=production
PUBLIC_URL=https://satmeter.invalid
BTCPAY_URL=https://btcpay.invalid
BTCPAY_STORE_ID=the-store-s-id
PAYMENT_METHODS=btc:btcpay
NWC_AUTO_TOPUP=off
ENV
echo '{url}' > database_url; openssl rand -hex 20 > btcpay_api_key; cd "$ROOT"
"""
        script = "\n".join([blocks[0], given, *blocks[1:]])
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=120, check=False,
            env={
                "PATH": os.environ["PATH"], "HOME": str(tmp_path), "ETC": str(etc), "ROOT": str(ROOT), "PYTHON": sys.executable,
                "DATA_DIR": str(tmp_path / "data"), "PRICES": str(ROOT / "app/pricing/starter.json"),
            },
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The database is at migration" in done.stdout
    assert "svc-" in done.stdout
    assert "adm-" in done.stdout
    assert re.search(r"^ok +database\.role ", done.stdout, re.MULTILINE)
    assert re.search(r"^fault +btcpay\.reach ", done.stdout, re.MULTILINE)  # there is none at btcpay.invalid
    assert "nothing differs" in done.stdout
    modes = {path.name: path.stat().st_mode & 0o777 for path in (etc / "credentials").iterdir()}
    assert set(modes.values()) == {0o600}


def test_what_it_names_exists() -> None:
    for name in set(re.findall(r"`([A-Z][A-Z_]{4,})(?:=[^`]*)?`", PRODUCTION)) - {"CREATEROLE"}:
        assert is_a_setting(name), name
    for path in set(re.findall(r"\b((?:deploy|tests|app)/[\w./-]*\w)", PRODUCTION)):
        assert (ROOT / path).exists(), path
    for permission in (*NEEDED, WEBHOOKS):
        assert f"| `{permission}` |" in PRODUCTION
    assert all(f"`{event}`" in PRODUCTION for event in EVENTS)
    assert len(re.findall(r"^\*\*\d+\. ", PRODUCTION, re.MULTILINE)) == 10


COMMANDS = sorted(set(re.findall(r"`satmeter ([a-z]+(?: [a-z]+)?)", PRODUCTION) + re.findall(r"^\s*satmeter ([a-z]+(?: [a-z]+)?)", PRODUCTION, re.MULTILINE)))  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_it_names_is_one(command: str) -> None:
    groups: Any = _parser()._actions[-1].choices
    if command.split()[0] not in groups:
        pytest.skip("the operator's commands are not in this checkout")
    with pytest.raises(SystemExit) as ended:
        parses([*command.split(), "--help"])
    assert ended.value.code == 0


# --- secrets in files ---------------------------------------------------------------------------------


def test_a_secret_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "pepper").write_text("p-e-p-p-e-r " * 4 + "\n")
    found = load({"DATA_DIR": str(tmp_path / "data"), "SECRET_PEPPER_FILE": str(tmp_path / "pepper")})
    assert found.secret_pepper == ("p-e-p-p-e-r " * 4).strip()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SECRET_PEPPER": "p" * 40, "SECRET_PEPPER_FILE": "there"}, "SECRET_PEPPER and SECRET_PEPPER_FILE are both set"),
        ({"BTCPAY_API_KEY_FILE": "nowhere"}, "cannot be read: No such file"),
        ({"SEALING_KEYS_FILE": "empty"}, "is empty"),
        ({"DATABASE_URL_FILE": "binary"}, "is no text"),
    ],
)  # fmt: skip
def test_a_secret_s_file_that_cannot_be_used_is_refused_and_never_shown(
    environ: dict[str, str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "there").write_text("secret-word " * 5)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00secret-word")
    files = {name: str(tmp_path / value) if name.endswith("_FILE") else value for name, value in environ.items()}
    with pytest.raises(SettingsError, match=words) as refused:
        load(files | {"DATA_DIR": str(tmp_path / "data")})
    assert "secret-word" not in str(refused.value)


def test_a_database_of_a_file_reaches_the_children(tmp_path: Path) -> None:
    with external_postgres() as postgres:
        (tmp_path / "url").write_text(postgres.new_database("owner", "CREATEROLE") + "\n")
        with installation(DATABASE_URL_FILE=str(tmp_path / "url")) as program:
            program.run()
            assert program.postmaster() is None
            program.parent.terminate()
            assert program.wait(60) == 0


# --- units --------------------------------------------------------------------------------------------


def directives(unit: Path, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_starts_what_there_is_with_settings_that_there_are(unit: Path) -> None:
    (start,) = directives(unit, "ExecStart")
    words = start.split()
    assert words[0] == "/usr/bin/env"
    python = words.index("/opt/satmeter/.venv/bin/python")
    assert words[python + 1 : python + 3] == ["-m", "app"]
    parses(words[python + 3 :])
    names = [word.partition("=")[0] for word in words[1:python]]
    names += [setting.partition("=")[0] for setting in directives(unit, "Environment")]
    assert [name for name in names if not is_a_setting(name)] == []
    credentials = {each.partition(":")[0] for each in directives(unit, "LoadCredential")}
    assert credentials == {each.partition("=%d/")[2] for each in directives(unit, "Environment")}
    assert directives(unit, "KillMode") == ["mixed"]
    assert int(directives(unit, "TimeoutStopSec")[0]) >= 60


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_what_systemd_takes_and_lets_it_do_next_to_nothing(unit: Path, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    here = tmp_path / unit.name.replace("@.", "@8080.")  # with programs and users of this machine
    text = unit.read_text().replace("/opt/satmeter/.venv/bin/python", sys.executable)
    here.write_text(re.sub(r"^User=.*$", "User=root", text, flags=re.MULTILINE))
    done = subprocess.run(
        [program, "verify", "--man=no", here], capture_output=True, text=True, timeout=60, check=False
    )
    assert [line for line in done.stderr.splitlines() if here.name in line] == []
    judged = subprocess.run([program, "security", "--offline=true", unit], capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    if "offline" in judged.stderr:
        pytest.skip("this systemd-analyze judges no files")
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", judged.stdout)
    assert float(exposure) < 2


# --- containers ---------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, each with what it says."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines]


def said(name: str) -> list[str]:
    return [value for each, value in instructions() if each == name]


def test_the_image_is_locked_by_hashes_and_an_ordinary_user_s() -> None:
    for image in said("FROM"):
        version = re.match(r"python:3\.(\d+)-slim-bookworm", image)
        assert version is not None
        assert 11 <= int(version[1]) < 13, "as pyproject's requires-python has it"
    (installs,) = [run for run in said("RUN") if "pip install" in run]
    assert "--require-hashes" in installs
    assert "index-url" not in installs
    (user,) = said("USER")
    assert all(int(number) >= 10_000 for number in user.split(":"))
    names = [name for name, _ in instructions()]
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :]), "nothing in it is the user's to change"


def test_the_image_starts_what_there_is_with_settings_that_there_are() -> None:
    (entry,), (words,) = said("ENTRYPOINT"), said("CMD")[-1:]
    assert json.loads(entry) == ["python", "-m", "app"]
    parses(json.loads(words))
    of_python = {"PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    names = set(re.findall(r"\b([A-Z_]{3,})=", said("ENV")[-1])) - of_python
    assert [name for name in names if not is_a_setting(name)] == []


def test_what_the_image_copies_is_enough_to_run(tmp_path: Path) -> None:
    allowed = (ROOT / ".dockerignore").read_text().split()
    for source in (copy.split()[0] for copy in said("COPY") if not copy.startswith("--from")):
        assert f"!{source}" in allowed, source
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "import app.cli, app.doctor, app.jobs, app.main, app.migrations, app.run; print(app.cli.__file__, app.migrations.head())"], cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_compose_runs_what_there_is_read_only_and_with_its_secrets_in_files() -> None:
    compose: dict[str, Any] = importlib.import_module("yaml").safe_load((DEPLOY / "compose.yaml").read_text())
    ours = {name: each for name, each in compose["services"].items() if each["image"] == "satmeter"}
    assert set(ours) == {"migrate", "http-1", "http-2", "jobs", "gateway"}
    for name, service in ours.items():
        parses(service["command"])
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["stop_grace_period"] == "90s", name
        assert [each for each in service["environment"] if not is_a_setting(each)] == []
        files = {
            value.removeprefix("/run/secrets/")
            for key, value in service["environment"].items()
            if key.endswith("_FILE")
        }
        assert files == set(service["secrets"]), name
        assert not any(key in FROM_FILES for key in service["environment"]), "a secret in the open"
    assert set(compose["secrets"]) >= {
        secret for service in compose["services"].values() for secret in service.get("secrets", ())
    }
    assert (
        DEPLOY / ours["http-1"]["build"]["context"] / ours["http-1"]["build"]["dockerfile"]
    ).resolve() == DEPLOY / "Dockerfile"
    addresses = {
        name: each["networks"]["inside"]["ipv4_address"]
        for name, each in compose["services"].items()
        if isinstance(each.get("networks"), dict)
    }
    nginx = "\n".join(compose["services"]["nginx"]["command"])
    (pattern, hosts) = re.findall(r"s#(server 127.0.0.1:8080 max_fails=0;)#(.*?)#", nginx)[0]
    assert pattern in (DEPLOY / "nginx.conf").read_text(), "sed finds the line that it replaces"
    assert re.findall(r"server ([\d.]+):8080", hosts) == [addresses["http-1"], addresses["http-2"]]
    assert ours["http-1"]["environment"]["TRUSTED_PROXIES"] == addresses["nginx"]
    assert "archive_mode=on" in compose["services"]["postgres"]["command"]
