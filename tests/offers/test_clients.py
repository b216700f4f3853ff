"""Released clients of PyPI and npm, unchanged, pay a running service over the sandbox's wallet: without an account, and with a key
that has no money."""

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.gateway.test_js_sdks import node
from tests.program import Program, installation

pytestmark = pytest.mark.slow
HERE: Final = Path(__file__).parent / "clients"
WITHIN_SECONDS: Final = 90
WISH: Final = {"amount": 5000, "currency": "SATS"}
CALL: Final = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with installation(LOG_LEVEL="INFO") as program:
        program.run()
        yield program


@pytest.fixture(scope="module")
def demo(program: Program) -> Any:
    return program.answer("demo")


async def run(*command: str, cwd: Path, **environ: str) -> tuple[int, str, str]:
    """A program that comes to its end, or is ended; nothing of it is left."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=os.environ | environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(WITHIN_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return -1, "", f"not within {WITHIN_SECONDS} s"
    return process.returncode or 0, out.decode(), err.decode()


def asked(demo: Any, *names: str) -> tuple[dict[str, str], dict[str, str]]:
    """What the payers are told; each has a key of its own that has no money. And the keys."""
    keys = {
        name: httpx.post(f"{demo['base_url']}/accounts/create", trust_env=False, timeout=20).json()["api_key"]
        for name in names
    }
    return {
        "ACCOUNT_URL": f"{demo['base_url']}/accounts/create", "MODEL_URL": f"{demo['gateway_url']}/v1/chat/completions",
        "NWC_URL": demo["nwc_url"], "KEYS": json.dumps(keys), "WISH": json.dumps(WISH), "CALL": json.dumps(CALL),
    }, keys  # fmt: skip


def check(told: Mapping[str, Any], demo: Any, keys: Mapping[str, str], program: Program) -> None:
    accounts = set()
    for name, (account, *calls) in told.items():
        status, made = account
        assert status == 201, (name, account)
        balance = httpx.get(
            f"{demo['base_url']}/credits/balance",
            headers={"x-credit-id": made["credit_id"]},
            trust_env=False,
            timeout=20,
        ).json()["balance"]
        assert balance == made["balance"] > 3, name
        accounts.add(made["credit_id"])
        assert [call[0] for call in calls] == [200] * len(calls), (name, calls)
        assert all(call[1]["choices"][0]["message"]["content"] for call in calls)
        if calls:  # it topped up the key that was sent beside, by one payment
            left = httpx.get(
                f"{demo['base_url']}/credits/balance", headers={"x-api-key": keys[name]}, trust_env=False, timeout=20
            ).json()["balance"]
            assert 0.9 < left < 1.06, name
    assert len(accounts) == len(told)
    logged = program.logged + program.printed
    assert "L402 " not in logged
    assert "/accounts/create" in logged


async def test_the_clients_of_pypi_pay_for_an_account_and_for_a_call_of_a_key_without_money(
    program: Program, demo: Any, tmp_path: Path
) -> None:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    if not Path(uv).exists():
        pytest.skip("there is no uv here, which makes the clients' virtual environment")
    for command in (
        ("venv", "--quiet", "--python", sys.executable, "venv"),
        ("pip", "install", "--quiet", "--python", "venv/bin/python", "--require-hashes", "-r", str(HERE / "requirements.txt")),
    ):  # fmt: skip
        code, _, err = await run(uv, *command, cwd=tmp_path)
        if code != 0:
            assert not any(word in err.lower() for word in ("hash", "conflict")), err
            pytest.skip(f"the clients could not be installed, is PyPI reachable? {err[-300:]}")
    environ, keys = asked(demo, "l402-requests", "pyl402", "bolthub")
    code, out, err = await run(str(tmp_path / "venv/bin/python"), str(HERE / "payers.py"), cwd=tmp_path, **environ)
    assert code == 0, err
    told = json.loads(out)
    assert set(told) == {"l402-requests", "pyl402", "bolthub", "l402sdk"}
    check(told, demo, keys, program)


async def test_the_clients_of_npm_pay_for_an_account_and_for_a_call_of_a_key_without_money(
    program: Program, demo: Any, tmp_path: Path
) -> None:
    nodejs, npm = node()
    for name in ("package.json", "package-lock.json", "payers.mjs"):
        shutil.copy(HERE / name, tmp_path)
    path = f"{Path(nodejs).parent}:/usr/bin:/bin"
    code, _, err = await run(
        *npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--legacy-peer-deps", cwd=tmp_path, PATH=path
    )
    if code != 0:
        pytest.skip(f"npm could not fetch the clients: {err[-300:]}")
    environ, keys = asked(demo, "alby", "mppx")
    code, out, err = await run(nodejs, "--experimental-websocket", "payers.mjs", cwd=tmp_path, PATH=path, **environ)
    assert code == 0, err
    told = json.loads(out)
    assert set(told) == {"alby", "mppx"}
    check(told, demo, keys, program)
