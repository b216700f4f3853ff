"""The command line as a newcomer meets it: what it offers, explains and completes, and how far it says it is."""

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from app import __version__
from app.cli import main
from app.kernel import progress
from app.pricing.rows import Dimension
from tests.program import ROOT


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    return capsys.readouterr().err


def test_a_command_that_there_is_none_of_lists_those_of_an_operator(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("nonsense", capsys=capsys)
    assert "'run'" in said
    assert "serve" not in said


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["nonsense"], ["mcp", "--help"]])
def test_who_asks_what_there_is_waits_for_nothing_that_does_it(words: list[str]) -> None:
    code = (
        "import sys\nfrom app.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)  # fmt: skip
    loaded = set(done.stderr.splitlines()[-1].split())
    assert {"app", "argparse"} <= loaded
    assert loaded.isdisjoint({"litestar", "psycopg", "rich", "sqlalchemy", "structlog", "uvicorn"})


def test_every_dimension_of_a_price_is_explained_where_one_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prices", "override", "--help"])
    lines = capsys.readouterr().out.splitlines()
    told = {found[1]: found[2] for line in lines if (found := re.fullmatch(r"  ([a-z0-9_]+)  +(an? .+)", line))}
    assert told.keys() == {each.value for each in Dimension}
    assert len(set(told.values())) == len(told)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_takes_the_script_that_completes_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "satmeter" in script
    for word in ("rotate", "--on-expiry", "override"):
        assert word in script
    assert "serve" not in re.findall(r"[a-z]+", script)
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed; its script was made all the same")
    done = subprocess.run([program, "-n"], input=script, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes_a_command_and_its_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    ask = """
COMP_WORDS=(satmeter keys ro); COMP_CWORD=2; COMP_LINE="satmeter keys ro"; COMP_POINT=16
_shtab_satmeter satmeter ro keys
echo "${COMPREPLY[@]}"
"""
    script = capsys.readouterr().out + ask
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["rotate"]


def test_satmeter_is_a_command_where_the_checkout_is_installed(tmp_path: Path) -> None:
    """As `make setup` does it: nothing is downloaded for it, and nothing left in the checkout, nor taken from where we run."""
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--no-index", "--ignore-installed"]  # fmt: skip
    before = _installed()
    subprocess.run([*pip, "--no-build-isolation", "--prefix", str(tmp_path), "-e", str(ROOT)], check=True, timeout=60)
    done = subprocess.run(
        [tmp_path / "bin" / "satmeter", "--version"],
        env={"PATH": os.defpath, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == f"satmeter {__version__}\n"
    assert _installed() == before


def _installed() -> list[Path]:
    """What there is of us beside this Python: pip takes away what it installs anew, wherever that is to go."""
    return sorted(
        [*Path(sysconfig.get_path("purelib")).glob("*satmeter*"), *Path(sys.executable).parent.glob("satmeter*")]
    )


def test_on_a_terminal_a_bar_shows_how_far_it_is_and_goes_away() -> None:
    terminal = Terminal()
    with progress.shown("Auditing", "checks", terminal) as told:
        told(1, 4)
        told(4, 4)
    shown = terminal.getvalue()
    assert "Auditing, checks" in shown
    assert "100%" in shown
    assert "\x1b[" in shown


def test_elsewhere_plain_lines_tell_the_first_now_and_then_and_the_last() -> None:
    pipe, now = io.StringIO(), [100.0]
    with progress.shown("Exporting", "calls", pipe, lambda: now[0]) as told:
        told(1000, None)
        told(2000, None)
        now[0] += progress.LINE_EVERY_SECONDS
        told(3000, None)
        told(9000, 9000)
    assert pipe.getvalue().splitlines() == [
        "Exporting: 1000 calls",
        "Exporting: 3000 calls",
        "Exporting: 9000 of 9000 calls",
    ]


def test_nothing_is_said_of_what_was_never_begun() -> None:
    pipe = io.StringIO()
    with progress.shown("Exporting", "calls", pipe):
        pass
    assert pipe.getvalue() == ""


def test_the_version_is_the_same_wherever_it_stands() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert project["version"] == __version__ == newest[1]
    assert project["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")


@pytest.mark.parametrize("name", ["LICENSE", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_readme_leads_to_the_files_beside_it(name: str) -> None:
    assert (ROOT / name).exists()
    assert f"({name})" in (ROOT / "README.md").read_text()
