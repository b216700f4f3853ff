"""A deployment as its operator has it: two hosts behind a real nginx with deploy/nginx.conf, restarted under load."""

import asyncio
import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from app.kernel.settings import load as settings_of
from app.ledger.post import post
from app.ledger.tables import EntryKind
from app.wiring import build
from tests.program import ROOT, Program, eventually, external_postgres, free_ports, installation, is_free

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("ROLLING_RESTARTS", "2"))
CALLERS = 6


@dataclass
class Load:
    """Callers that never stop, and how each of their requests ended."""

    url: str
    api_key: str
    service_token: str
    ends: Counter[str] = field(default_factory=Counter)
    charged: set[str] = field(default_factory=set)
    accounts: int = 0
    calls: int = 0
    is_over: bool = False

    async def call(self, client: httpx.AsyncClient) -> None:
        """One after the other: a charge, a balance, and every fourth time a new account, of which an address may open ten
        thousand an hour through nginx, which gives each a key. What is refused before it is sent is nobody's loss."""
        self.calls += 1
        request_id = uuid.uuid4().hex
        body = {"request_id": request_id, "api_key": self.api_key, "model": "a/model", "cost_usd": "0.000001"}
        service = {"Authorization": f"Bearer {self.service_token}"}
        asked: list[Callable[[], Awaitable[httpx.Response]]] = [
            lambda: client.post("/v1/meter/charge", headers=service, json=body),
            lambda: client.get("/credits/balance", headers={"x-api-key": self.api_key}),
        ]
        if self.calls % 4 == 0:
            asked.append(lambda: client.post("/accounts/create"))
        for ask in asked:
            try:
                answer = await ask()
            except httpx.ConnectError:
                self.ends["refused"] += 1
                await asyncio.sleep(0.05)
                continue
            except httpx.TransportError as error:
                self.ends[f"lost: {type(error).__name__}"] += 1
                continue
            refused = answer.json()["error"]["code"] if answer.is_error and "error" in answer.text[:20] else ""
            self.ends[f"{answer.status_code} {refused}".strip()] += 1
            if "decision" in answer.text:
                assert answer.json()["decision"] == "allow", answer.text
                self.charged.add(request_id)
            self.accounts += "credit_id" in answer.text

    async def work(self, *, keeps_connections: bool) -> None:
        limits = httpx.Limits(max_keepalive_connections=20 if keeps_connections else 0)
        async with httpx.AsyncClient(
            base_url=self.url, verify=False, trust_env=False, timeout=30, limits=limits
        ) as client:
            while not self.is_over:
                await self.call(client)
                await asyncio.sleep(0.01)  # so that what restarts gets some of this machine, too


@contextlib.asynccontextmanager
async def under_load(load: Load) -> AsyncIterator[None]:
    """Half of the callers keep their connections, half make one for each request."""
    workers = [asyncio.create_task(load.work(keeps_connections=number % 2 == 0)) for number in range(CALLERS)]
    try:
        await more(load, 100)
        yield
        await more(load, 100)
    finally:
        load.is_over = True
        await asyncio.gather(*workers)


async def more(load: Load, answers: int) -> None:
    """Until that many more were answered."""
    target = load.ends["200"] + answers
    async with asyncio.timeout(30):
        while load.ends["200"] < target:
            await asyncio.sleep(0.01)


@dataclass
class Deployment:
    """One database, two hosts and nginx."""

    hosts: list[Program]
    database_url: str
    environ: dict[str, str]
    url: str

    async def load(self, url: str | None = None) -> Load:
        """For a new customer with ten dollars."""
        house = build(settings_of(self.environ), self.database_url)
        await house.db.open()
        try:
            token = (await asyncio.to_thread(self.hosts[0].answer, "token", "create", "--service", f"p{uuid.uuid4().hex[:8]}"))["token"]  # fmt: skip
            async with httpx.AsyncClient(base_url=self.hosts[0].base_url, trust_env=False) as client:
                made = (await client.post("/accounts/create")).json()
            with psycopg.connect(self.database_url) as conn:
                found = conn.execute("SELECT id FROM account ORDER BY created_at DESC LIMIT 1").fetchone()
            assert found is not None
            await house.db.transaction(
                lambda session: post(session, found[0], EntryKind.ADJUSTMENT, "for the test", "adjustment", 10**10)
            )
            return Load(url or self.url, made["api_key"], token)
        finally:
            await house.close()

    def count(self, table: str) -> int:
        with psycopg.connect(self.database_url) as conn:
            found = conn.execute(f"SELECT count(*) FROM {table}".encode()).fetchone()
        assert found is not None
        return int(found[0])


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(external_postgres())
        url = postgres.new_database("owner", "CREATEROLE")
        environ = {
            "DATABASE_URL": url, "SECRET_PEPPER": "a pepper of both hosts, long enough", "SEALING_KEYS": "k1:" + "A" * 43 + "=",
            "BTCPAY_URL": "http://127.0.0.1:9", "BTCPAY_API_KEY": "k", "BTCPAY_STORE_ID": "store", "BTCPAY_WEBHOOK_SECRET": "w" * 24,
            "ACCOUNTS_PER_HOUR": "1000000000", "ACCOUNTS_PER_HOUR_PER_BLOCK": "1000000000",  # twenty rounds open ten thousand
            "DRAIN_SECONDS": "1", "TRUSTED_PROXIES": "127.0.0.1", "DATA_DIR": tempfile.mkdtemp(prefix="satmeter-unused-"),
        }  # fmt: skip
        hosts = [stack.enter_context(installation(**environ, WORKERS=str(workers))) for workers in (2, 1)]
        for host in hosts:
            host.run("--only", "http")
        port = stack.enter_context(nginx([host.http_port for host in hosts]))
        yield Deployment(hosts, url, environ, f"https://127.0.0.1:{port}")


_NGINX = """daemon off; master_process off; pid {0}/pid; error_log {0}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;
    include {0}/ours.conf;
}}
"""


@contextlib.contextmanager
def nginx(hosts: list[int]) -> Iterator[int]:
    """deploy/nginx.conf as it is, but for addresses and certificate; gives the port of its TLS."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("no nginx here; on Debian: apt-get install nginx-light")
    plain, tls = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="satmeter-nginx-") as name:
        folder = Path(name)
        servers = "".join(f"server 127.0.0.1:{port} max_fails=0; " for port in hosts)
        ours = (ROOT / "deploy" / "nginx.conf").read_text()
        for written, meant in (
            ("server 127.0.0.1:8080 max_fails=0;", servers),
            ("listen 80;", f"listen 127.0.0.1:{plain};"),
            ("listen [::]:80;", ""),
            ("listen 443 ", f"listen 127.0.0.1:{tls} "),
            ("listen [::]:443 ssl http2;", ""),
            ("/etc/letsencrypt/live/satmeter.example", name),
        ):
            assert written in ours
            ours = ours.replace(written, meant)
        (folder / "ours.conf").write_text(ours)
        (folder / "nginx.conf").write_text(_NGINX.format(folder))
        certify(folder)
        process = subprocess.Popen([program, "-e", folder / "error.log", "-p", folder, "-c", folder / "nginx.conf"])
        try:
            eventually(lambda: process.poll() is not None or not is_free(tls), 20)
            assert process.poll() is None, (folder / "error.log").read_text()
            yield tls
        finally:
            process.terminate()
            process.wait(10)


def certify(folder: Path) -> None:
    """A certificate of nobody's, with its key."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "satmeter.example")]),
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "fullchain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "privkey.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def restart(host: Program) -> None:
    """As systemd does: asked once, waited for, started again."""
    host.parent.terminate()
    assert host.wait(60) == 0
    host.run("--only", "http")


def lost(load: Load) -> dict[str, int]:
    return {end: count for end, count in load.ends.items() if end not in ("200", "201", "refused")}


async def test_a_rolling_restart_of_two_hosts_behind_nginx_loses_no_request(deployment: Deployment) -> None:
    load = await deployment.load()
    accounts, entries = deployment.count("account"), deployment.count("entry")
    async with under_load(load):
        for number in range(ROUNDS):
            for host in deployment.hosts:
                await asyncio.to_thread(restart, host)
                await more(load, 50)
            print(f"rolling restart {number + 1}: {sum(load.ends.values())} requests, {lost(load) or 'none'} lost")
    assert lost(load) == {}
    assert load.ends["refused"] == 0
    assert deployment.count("entry") - entries == len(load.charged)
    assert deployment.count("account") - accounts == load.accounts


async def test_sigterm_under_direct_load_loses_no_request(deployment: Deployment) -> None:
    """Without anything in front: whoever is not refused at the door is answered."""
    host = deployment.hosts[0]
    load = await deployment.load(host.base_url)
    accounts, entries = deployment.count("account"), deployment.count("entry")
    async with under_load(load):
        await asyncio.to_thread(restart, host)
    answered = load.ends["200"] + load.ends["201"]
    print(f"SIGTERM: {answered} answered, {load.ends['refused']} refused at the door, {lost(load) or 'none'} lost")
    assert lost(load) == {}
    assert load.ends["refused"] > 0
    assert deployment.count("entry") - entries == len(load.charged)
    assert deployment.count("account") - accounts == load.accounts


async def test_a_customer_who_keeps_an_idle_connection_does_not_notice(deployment: Deployment) -> None:
    async with httpx.AsyncClient(base_url=deployment.url, verify=False, trust_env=False, timeout=30) as client:
        for _ in deployment.hosts:
            assert (await client.get("/health/live")).status_code == 200
        await asyncio.to_thread(restart, deployment.hosts[0])
        assert (await client.post("/accounts/create")).status_code == 201


def test_ready_says_draining_and_all_is_served_until_the_operator_presses_ctrl_c_again(deployment: Deployment) -> None:
    with installation(**deployment.environ | {"DRAIN_SECONDS": "600"}) as host:
        host.run("--only", "http")
        host.parent.terminate()
        eventually(lambda: host.status("/health/ready") == 503, 20)
        told = httpx.get(f"{host.base_url}/health/ready", trust_env=False, timeout=20)
        assert (told.json(), told.headers["retry-after"]) == ({"status": "draining"}, "1")
        made = httpx.post(f"{host.base_url}/accounts/create", trust_env=False, timeout=20)
        assert made.status_code == 201
        assert "connection" not in made.headers
        os.kill(host.parent.pid, signal.SIGINT)
        assert host.wait(60) == 0


def test_jobs_run_without_a_door_of_their_own(deployment: Deployment) -> None:
    with installation(**deployment.environ) as jobs:
        jobs.start("--only", "jobs")
        eventually(lambda: "jobs are running" in jobs.printed, 60)
        assert jobs.parent.children() == []
        assert jobs.status("/health/live") is None
        jobs.parent.terminate()
        assert jobs.wait(60) == 0


def test_a_part_without_its_database_and_backend_is_one_line() -> None:
    with installation() as program:
        done = program.command("run", "--only", "http")
        assert done.returncode == 2
        assert "needs DATABASE_URL and BTCPAY_URL" in done.stderr
        assert len(done.stderr.splitlines()) == 1
