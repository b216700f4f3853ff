"""A real LNbits on loopback with its FakeWallet: installed into a virtual environment of its own, started, set up.

The environment is kept in SATMETER_LNBITS_VENV, or in the user's cache folder, so that only the first run installs.
"""

import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.program import free_ports

REQUIREMENTS = ("lnbits==1.6.2", "bitstring<5")  # with bitstring 5 LNbits does not start
INSTALL_SECONDS = 900
START_SECONDS = 90


@dataclass(frozen=True, slots=True)
class Wallet:
    id: str
    invoice_key: str
    admin_key: str


@dataclass(slots=True)
class RealLnbits:
    """A running LNbits with a shop's wallet and a customer's, who has 5,000,000 sats."""

    url: str
    _command: list[str]
    _cwd: Path
    _environ: dict[str, str]
    _log: Path
    _process: subprocess.Popen[bytes] | None = None
    shop: Wallet = field(init=False)
    payer: Wallet = field(init=False)

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._cwd, env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/api/v1/health", trust_env=False).status_code < 500:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"LNbits did not start; it said:\n{self._log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        """Ends the process that `start` started, and no other."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(20)
        self._process = None

    def set_up(self, webhook_origin: str) -> None:
        """The first administrator, webhooks to loopback allowed, two wallets, and money for one of them."""
        password = secrets.token_urlsafe(12)
        user = {"username": "operator", "password": password}
        self._call("PUT", "/api/v1/auth/first_install", {**user, "password_repeat": password})
        token = self._call("POST", "/api/v1/auth", user)["access_token"]
        bearer = f"Bearer {token}"
        # In the environment these two count only without the admin's pages, and those are needed for the first install.
        rules = {
            "lnbits_callback_url_rules": [webhook_origin.replace(".", "\\.")],
            "lnbits_callback_allow_private_ips": True,
        }
        self._call("PATCH", "/admin/api/v1/settings", rules, Authorization=bearer)
        self.shop, self.payer = self._wallet("shop"), self._wallet("payer")
        credit = {"amount": 5_000_000, "id": self.payer.id}
        self._call("PUT", "/users/api/v1/balance", credit, Authorization=bearer)

    async def post(self, key: str, body: bytes | dict[str, Any]) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.post(f"{self.url}/api/v1/payments", headers={"X-Api-Key": key}, content=content)

    async def pay(self, bolt11: str) -> httpx.Response:
        return await self.post(self.payer.admin_key, {"out": True, "bolt11": bolt11})

    def _wallet(self, name: str) -> Wallet:
        made = self._call("POST", "/api/v1/account", {"name": name})
        return Wallet(made["id"], made["inkey"], made["adminkey"])

    def _call(self, method: str, path: str, body: dict[str, Any], **headers: str) -> Any:
        # Without a client that keeps cookies: the second account would be the first one's.
        answer = httpx.request(method, self.url + path, json=body, headers=headers, trust_env=False)
        assert answer.is_success, f"{method} {path}: HTTP {answer.status_code} {answer.text[:300]}"
        return answer.json()


@contextmanager
def real_lnbits(venv: Path, folder: Path, webhook_origin: str) -> Iterator[RealLnbits]:
    """Started, set up, and stopped afterwards. Its data lives in `folder`."""
    [port] = free_ports(1)
    environ = {
        "PATH": f"{venv / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "TZ": os.environ.get("TZ", "UTC"),
        "LNBITS_DATA_FOLDER": str(folder), "LNBITS_EXTENSIONS_PATH": str(folder), "AUTH_SECRET_KEY": secrets.token_hex(16),
        "LNBITS_BACKEND_WALLET_CLASS": "FakeWallet", "FAKE_WALLET_SECRET": "ToTheMoon1", "LNBITS_ADMIN_UI": "true",
        "LNBITS_RATE_LIMIT_NO": "100000", "HOST": "127.0.0.1", "PORT": str(port),
    }  # fmt: skip
    # Its own command runs the server in a child process that outlives it.
    uvicorn = [str(venv / "bin" / "uvicorn"), "lnbits.__main__:app"]
    command = [*uvicorn, "--host", "127.0.0.1", "--port", str(port)]
    # It looks for its static files in the folder that it is started from.
    [packages] = venv.glob("lib/python*/site-packages")
    lnbits = RealLnbits(f"http://127.0.0.1:{port}", command, packages, environ, folder / "log.txt")
    try:
        lnbits.start()
        lnbits.set_up(webhook_origin)
        yield lnbits
    finally:
        lnbits.stop()


def installed() -> Path:
    """The virtual environment that has LNbits; made now if there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "satmeter" / "lnbits-1.6.2"
    venv = Path(os.environ.get("SATMETER_LNBITS_VENV") or cache).absolute()
    done = venv / "satmeter-installed"
    if not done.exists():
        print(f"\ninstalling {' '.join(REQUIREMENTS)} into {venv}: about 270 MB, a minute or two", flush=True)
        venv.parent.mkdir(parents=True, exist_ok=True)
        _run("making the virtual environment", [sys.executable, "-m", "venv", str(venv)])
        _run("pip install, which needs PyPI", [str(venv / "bin" / "pip"), "install", "--quiet", *REQUIREMENTS])
        done.touch()
        print("installed", flush=True)
    return venv


def _run(what: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise RuntimeError(f"LNbits could not be installed ({what} failed):\n" + "\n".join(errors[-15:]))


class Receiver:
    """Takes whatever is posted to it on loopback, and keeps the raw bodies."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[bytes] = []
        [self.port] = free_ports(1)
        self._server: asyncio.Server | None = None

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", self.port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def about(self, text: str, count: int, seconds: float = 10) -> list[bytes]:
        """The bodies that hold `text`, once there are `count` of them or the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            found = [body for body in self.bodies if text.encode() in body]
            if len(found) >= count or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.1)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        self.headers.append(head)
        self.bodies.append(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
