"""A real Nostr relay on loopback: PyPI's nostr-relay in a process of its own, which can be stopped and come back."""

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

PROGRAM = Path(sys.executable).with_name("nostr-relay")
START_SECONDS = 30


@dataclass
class RealRelay:
    """nostr-relay on a port. What it stored is there again after a restart: requests and answers, too."""

    folder: Path
    port: int
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    async def start(self) -> None:
        if not PROGRAM.exists():
            pytest.skip("nostr-relay is not installed beside this Python")
        config = self.folder / "relay.yaml"
        config.write_text(CONFIG.format(database=self.folder / "relay.sqlite3", port=self.port))
        with (self.folder / "relay.log").open("ab") as log:
            self._process = subprocess.Popen(
                [PROGRAM, "-c", config, "serve", "--use-uvicorn"], cwd=self.folder, env=os.environ | {"HOME": str(self.folder)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        await self._wait_until_it_answers()

    async def stop(self) -> None:
        """Ends the process that `start` started, and no other."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait, 5)
        self._process = None

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                async with connect(self.url, proxy=None, open_timeout=5):
                    return
            except (OSError, TimeoutError, WebSocketException):
                await asyncio.sleep(0.1)
        await self.stop()
        raise RuntimeError(f"nostr-relay did not start; it said:\n{(self.folder / 'relay.log').read_text()[-3000:]}")


CONFIG = """
DEBUG: false
relay_name: a relay for tests
storage:
  sqlalchemy.url: sqlite+aiosqlite:///{database}
  num_concurrent_reqs: 10
  num_concurrent_adds: 2
  validators:
    - nostr_relay.validators.is_signed
    - nostr_relay.validators.is_recent
gunicorn:
  bind: 127.0.0.1:{port}
  workers: 1
  loglevel: warning
verification:
  nip05_verification: disabled
authentication:
  enabled: false
message_timeout: 1800
subscription_limit: 32
"""
