"""The real LiteLLM proxy of deploy/requirements-litellm.txt, with the plug-in that is shipped, as a process of its own.

It lives in a virtual environment in the user's cache, made by whoever needs it first. It does not read the network: its
prices are its own, and its only models are the offline upstream's.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.program import ROOT, free_ports

REQUIREMENTS: Final = ROOT / "deploy/requirements-litellm.txt"
DEPLOYED: Final = ROOT / "deploy/gateway"
INSTALL_SECONDS: Final = 600
START_SECONDS: Final = 120
MODELS: Final = {
    "gpt-4o-mini": "openai/gpt-4o-mini", "cheap": "openai/gpt-4o-mini", "gpt-4o": "openai/gpt-4o",
    "gemma-3-4b-it": "openai/gemma-3-4b-it", "claude-haiku-4-5": "anthropic/claude-haiku-4-5",
    "text-embedding-3-small": "openai/text-embedding-3-small", "tts-1": "openai/tts-1", "whisper-1": "openai/whisper-1",
    "dall-e-3": "openai/dall-e-3",
}  # fmt: skip


def installed() -> Path:
    """The virtual environment that has LiteLLM; made now if there is none. Skips where PyPI is not reached."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "satmeter"
    venv = cache / f"litellm-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}-py3{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(f"{venv}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (venv / "satmeter-installed").exists():
            shutil.rmtree(venv, ignore_errors=True)
            _install(venv)
            (venv / "satmeter-installed").touch()
    return venv


def _install(venv: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    if uv.exists():
        made = [str(uv), "venv", "--quiet", "--python", sys.executable, str(venv)]
        filled = [
            str(uv),
            "pip",
            "install",
            "--quiet",
            "--python",
            str(venv / "bin/python"),
            "--require-hashes",
            "-r",
            str(REQUIREMENTS),
        ]
    else:
        made = [sys.executable, "-m", "venv", str(venv)]
        filled = [str(venv / "bin/pip"), "install", "--quiet", "--require-hashes", "-r", str(REQUIREMENTS)]
    for command in (made, filled):
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        if done.returncode:
            said = done.stderr.strip()[-1500:]
            assert not any(word in said.lower() for word in ("hash", "conflict", "no matching")), said
            pytest.skip(f"LiteLLM could not be installed, is PyPI reachable? {said[-300:]}")


class LiteLLM:
    """The proxy on loopback, by a configuration of this repository."""

    def __init__(
        self, venv: Path, folder: Path, config: str, environ: dict[str, str], log_level: str = "DEBUG"
    ) -> None:
        [port] = free_ports(1)
        self.url, self._folder, self._venv, self._port = f"http://127.0.0.1:{port}", folder, venv, port
        self.master_key = f"sk-{secrets.token_hex(16)}"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "litellm.yaml").write_text(config)
        self._environ = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "LITELLM_MASTER_KEY": self.master_key,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "sk-the-operators-own", "ANTHROPIC_API_KEY": "sk-the-operators-own",
            "LITELLM_LOG": log_level, "PYTHONDONTWRITEBYTECODE": "1",
        } | environ  # fmt: skip

    @property
    def logged(self) -> str:
        return (self._folder / "log.txt").read_text(errors="replace")

    async def start(self) -> None:
        command = [
            str(self._venv / "bin/litellm"),
            "--config",
            str(self._folder / "litellm.yaml"),
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
        ]
        with open(self._folder / "log.txt", "ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, env=self._environ, stdout=log, stderr=log)
        async with (
            httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=5) as client,
            asyncio.timeout(START_SECONDS),
        ):
            while True:
                assert self._process.poll() is None, f"it ended:\n{self.logged[-3000:]}"
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/health/liveliness")).status_code == 200:
                        return
                await asyncio.sleep(0.2)

    async def stop(self, how: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(how)
        return await asyncio.to_thread(self._process.wait, 60)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)


def _config(upstream_url: str) -> str:
    """The configuration that is shipped, over the offline upstream's models, with a fallback and short waits."""
    shipped = (DEPLOYED / "litellm.yaml").read_text()
    models = "model_list:\n" + "".join(
        f'  - model_name: "{name}"\n    litellm_params:\n      model: "{model}"\n'
        f'      api_base: "{upstream_url}{"" if model.startswith("anthropic") else "/v1"}"\n'
        f"      api_key: os.environ/{'ANTHROPIC' if model.startswith('anthropic') else 'OPENAI'}_API_KEY\n"
        for name, model in MODELS.items()
    )
    rest = "\nlitellm_settings:\n" + shipped.split("\nlitellm_settings:\n", 1)[1]
    for before, after in (
        ("request_timeout: 600", 'request_timeout: 3\n  fallbacks: [{"gpt-4o": ["gpt-4o-mini"]}]'),
        ("num_retries: 2", "num_retries: 1"),
    ):
        assert before in rest
        rest = rest.replace(before, after)
    return models + rest


@contextlib.contextmanager
def litellm(
    folder: Path, upstream_url: str, satmeter_url: str, token: str, log_level: str = "DEBUG"
) -> Iterator[LiteLLM]:
    """With our plug-in. Not started yet; ended whatever happens."""
    (folder / "satmeter_litellm.py").symlink_to(DEPLOYED / "satmeter_litellm.py")
    environ = {
        "PYTHONPATH": str(ROOT), "SATMETER_URL": satmeter_url, "SATMETER_TOKEN": token, "SATMETER_SPOOL": str(folder / "spool"),
    }  # fmt: skip
    made = LiteLLM(installed(), folder, _config(upstream_url), environ, log_level)
    try:
        yield made
    finally:
        made.kill()


@contextlib.contextmanager
def converting(folder: Path, upstream_url: str) -> Iterator[LiteLLM]:
    """Behind the gateway, as deploy/gateway/converting.yaml has it, over the offline upstream. Not started yet."""
    config = (DEPLOYED / "converting.yaml").read_text()
    for of, base in (("anthropic/claude-*", upstream_url), ("openai/*", f"{upstream_url}/v1")):
        named = f'      model: "{of}"\n'
        assert named in config
        config = config.replace(named, f'{named}      api_base: "{base}"\n')
    made = LiteLLM(installed(), folder, config, {})
    try:
        yield made
    finally:
        made.kill()
