"""The README is true: `make run` is run, what it prints is pasted, and every command of the README after it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

from tests.program import free_ports

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RUN_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Running:
    """A `make run` that is up, and all it printed."""

    printed: str
    environ: dict[str, str]

    def paste(self, script: str) -> str:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=ROOT,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    if not (ROOT / ".venv/bin/python").exists() or shutil.which("curl") is None:
        pytest.skip("this runs the README's commands, which need `make setup` and curl")
    port, sandbox_port, gateway_port = free_ports(3)
    folder = Path(tempfile.mkdtemp(prefix="satmeter-readme-"))
    folder.chmod(0o755)  # PostgreSQL runs as somebody else when root runs this
    mine = {
        "PORT": str(port), "SANDBOX_PORT": str(sandbox_port), "GATEWAY_PORT": str(gateway_port), "DATA_DIR": str(folder / "data"),
        "BASE": f"http://127.0.0.1:{port}", "SANDBOX": f"http://127.0.0.1:{sandbox_port}",
        "GATEWAY": f"http://127.0.0.1:{gateway_port}",
    }  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"} | mine
    output = folder / "printed"
    with output.open("w") as file:
        process = subprocess.Popen(["make", "run"], cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        yield Running(_wait_for(output, "Ctrl-C stops everything", process), environ)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(output: Path, text: str, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if text in output.read_text():
            return output.read_text()
        time.sleep(0.2)
    raise AssertionError(output.read_text())


def test_make_run_ends_with_a_funded_account_and_three_commands_that_work(running: Running) -> None:
    commands = curls(_printed_parts(running)[0])
    assert len(commands) == 3
    balance, charge, topup = (json.loads(running.paste(command), parse_float=Decimal) for command in commands)
    assert balance["balance"] == Decimal("5.25")
    assert charge["decision"] == "allow"
    assert charge["balance_usd"] == Decimal("5.249955")
    assert charge["cost"]["output_cost_usd"] == Decimal("0.00003")
    assert topup["lightning_invoice"].startswith("lnbcrt")
    assert topup["checkout_url"].startswith(running.environ["SANDBOX"])


def test_make_run_prints_what_connects_a_wallet_that_refills_the_balance(running: Running) -> None:
    first, second = _printed_parts(running)
    (balance, charge, _), (connect,) = curls(first), curls(second)
    assert json.loads(running.paste(connect))["data"]["state"] == "active"
    before = json.loads(running.paste(balance), parse_float=Decimal)["balance"]
    charge_more = re.sub(r'"usage": {.*?}', '"cost_usd": 1', charge).replace('"try-', '"more-')
    assert json.loads(running.paste(charge_more))["decision"] == "allow"
    deadline = time.monotonic() + 30
    while json.loads(running.paste(balance), parse_float=Decimal)["balance"] != before - 1 + Decimal("10.5"):
        assert time.monotonic() < deadline, running.paste(balance)
        time.sleep(0.2)


def test_make_run_ends_with_a_call_of_a_model_that_is_charged(running: Running) -> None:
    snippet = running.printed.partition("python3 - <<'END'\n")[2].partition("\nEND\n")[0]
    (balance, *_), _ = (curls(part) for part in _printed_parts(running))
    before = json.loads(running.paste(balance), parse_float=Decimal)["balance"]
    said = running.paste(f"{sys.executable} - <<'END'\n{snippet}\nEND").split()
    assert said[-1] == "USD"
    deadline = time.monotonic() + 10
    while json.loads(running.paste(balance), parse_float=Decimal)["balance"] != before - Decimal(said[-2]):
        assert time.monotonic() < deadline, running.paste(balance)
        time.sleep(0.1)


def _printed_parts(running: Running) -> tuple[str, str]:
    """What is there to paste, and what may be pasted after it."""
    first, _, second = running.printed.partition("Or connect the sandbox's own Lightning wallet:")
    return first, second


def curls(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith("curl ")]


def test_every_command_block_of_the_readme_works_pasted_one_after_the_other(running: Running) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    printed = running.paste("\n".join(blocks))
    assert '"status":"Settled"' in printed
    assert '"balance":6.825' in printed  # 10,000 sat at the sandbox's 65,000 USD, and 5 %
    assert '"total_cost_usd":0.000045,"input_cost_usd":0.000015,"output_cost_usd":0.00003' in printed
    assert '"state":"active"' in printed
    assert '"balance":15.324955' in printed  # 2 spent, 10 and 5 % of it paid by the wallet
    assert '"state":"settled"' in printed
    assert '"type":"notices.test","signed":true' in printed
    assert '"keys_revoked":1' in printed
    assert '"charged_usd":0.000045,"refunded_usd":0,"net_usd":0.000045' in printed
    assert "id,timestamp,model,provider,endpoint,input_count" in printed
    assert '"total_usage":' in printed
    assert "nothing differs" in printed
    assert "would go from" in printed
    assert "account.freeze" in printed
    assert "revenue_usd" in printed


def test_the_page_of_the_readme_shows_the_balance_with_a_key_that_can_do_nothing_else(running: Running) -> None:
    if shutil.which("node") is None:
        pytest.skip("the README's page is run by node")
    base = running.environ["BASE"]
    made = running.paste(f"curl -s -X POST {base}/accounts/create")
    wanted = '{"name": "widget", "scopes": ["balance"]}'
    credit_id = json.loads(made)["credit_id"]
    key = running.paste(
        f"curl -s {base}/keys -H 'x-credit-id: {credit_id}' -H 'Content-Type: application/json' -d '{wanted}'"
    )
    api_key = json.loads(key)["data"]["api_key"]
    script = README.partition("```html")[2].partition("<script>")[2].partition("</script>")[0]
    script = script.replace("http://127.0.0.1:8080", base).replace("sk-…", api_key)
    page = "const shown = {}; globalThis.document = { getElementById: (id) => (shown[id] ??= {}) };"
    file = Path(running.environ["DATA_DIR"]).parent / "page.mjs"
    file.write_text(f"{page}\n{script}\nprocess.on('exit', () => console.log(JSON.stringify(shown)));")
    assert json.loads(running.paste(f"node {file}")) == {"balance": {"textContent": "$0"}}
    for path in ("queries/history", "topups"):
        assert "missing_scope" in running.paste(f"curl -s {base}/{path} -H 'x-api-key: {api_key}'")


def test_every_other_command_the_readme_names_exists(running: Running) -> None:
    for target in set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE)):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    commands = sorted(set(re.findall(r"`python -m app ([a-z]+(?: [a-z]+)?)", README)))
    assert len(commands) > 10
    shown = subprocess.run(  # in one process: they would be started for a minute
        [sys.executable, "-c", _ASK_EACH_FOR_HELP, *commands], cwd=ROOT, capture_output=True, text=True
    )
    assert (shown.returncode, shown.stdout.splitlines()) == (0, []), shown.stderr


_ASK_EACH_FOR_HELP = """
import contextlib, io, sys
from app.cli import main
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(sys.stderr):
        try:
            code = main([*command.split(), "--help"])
        except SystemExit as end:
            code = end.code
    if code:
        print(command)
"""


def test_every_file_and_page_the_readme_names_exists(running: Running) -> None:
    for path in set(re.findall(r"`((?:app|deploy|tests)/[\w./]+)`", README)):
        assert (ROOT / path).exists(), path
    for page in ("/docs", "/openapi.json", "/health/live", "/health/ready", "/metrics"):
        assert f"`{page}`" in README
        running.paste(f"curl -sf -o /dev/null $BASE{page}")
