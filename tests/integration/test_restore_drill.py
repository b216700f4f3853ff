"""The drill: a backup and its journal, a load, a crash, a restore to a moment; then what was paid after that moment is found."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from app.adapters.btcpay import BtcpayGateway
from app.admin.tokens import create_token
from app.audit import Secrets, audit
from app.kernel.db import rows
from app.kernel.embedded import _programs
from app.kernel.settings import Settings
from app.main import create_app
from app.migrations import check, migrate
from app.topups.credit import check_due
from app.topups.sweep import CATCH_UP, sweep
from app.wiring import House, build
from tests.program import eventually, nobody
from tests.wallets import FakeLightning, FakeWallets
from tests.world import SECRET, Backend, Wire, running

pytestmark = pytest.mark.slow


class Cluster:
    """A PostgreSQL that archives its journal; as deploy/PRODUCTION.md sets one up."""

    def __init__(self, folder: Path, archive: Path, user: str | None) -> None:
        self.folder, self.archive, self._user, self.sockets = folder, archive, user, folder.parent

    @property
    def url(self) -> str:
        return f"postgresql://dba@/satmeter?host={self.sockets}&port=5432"

    @property
    def _as_who(self) -> dict[str, Any]:
        return {"user": self._user, "group": "nogroup", "extra_groups": []} if self._user else {}

    def execute(self, program: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            [_bin() / program, *arguments], cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL, text=True, timeout=120, check=False,
            **self._as_who,
        )  # fmt: skip
        log = self.folder / "log"
        assert done.returncode == 0, done.stderr or (log.read_text() if log.exists() else program)

    def make(self) -> None:
        self.execute(
            "initdb", "-D", self.folder, "-U", "dba", "--auth=trust", "--locale=C", "--encoding=UTF8", "--no-sync"
        )
        with (self.folder / "postgresql.conf").open("a") as conf:
            conf.write(
                f"wal_level = replica\narchive_mode = on\narchive_command = 'cp %p {self.archive}/%f'\nfsync = off\n"
            )

    def start(self) -> None:
        options = f"-h '' -k {self.sockets} -p 5432"
        self.execute("pg_ctl", "start", "-D", self.folder, "-l", self.folder / "log", "-w", "-t", "100", "-o", options)

    def back_up(self, into: Path) -> None:
        self.execute("pg_basebackup", "-h", self.sockets, "-U", "dba", "-D", into, "-c", "fast", "-X", "none")

    def archive_all(self) -> None:
        """Until the journal up to now is in the archive."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            (segment,) = conn.execute("SELECT pg_walfile_name(pg_switch_wal())").fetchone() or ("",)
        eventually(lambda: (self.archive / segment).exists(), 60)

    def kill(self) -> None:
        pid = int((self.folder / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not _has_backends(self.folder), 30)

    def restore(self, base: Path, moment: datetime) -> None:
        """As an operator does, on another machine: the backup, the archive, the moment, a signal file."""
        self.folder, self.sockets = base, self.archive
        with (self.folder / "postgresql.conf").open("a") as conf:
            conf.write(
                f"restore_command = 'cp {self.archive}/%f %p'\nrecovery_target_time = '{moment.isoformat()}'\n"
                "recovery_target_action = promote\narchive_mode = off\n"
            )
        (self.folder / "recovery.signal").touch()
        self.start()
        eventually(self._is_promoted, 60)

    def _is_promoted(self) -> bool:
        with psycopg.connect(self.url, autocommit=True) as conn:
            return conn.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)

    def stop(self) -> None:
        if (self.folder / "postmaster.pid").exists():
            with contextlib.suppress(AssertionError):
                self.execute("pg_ctl", "stop", "-D", self.folder, "-m", "immediate", "-w")


def _bin() -> Path:
    """Debian's, or the wheel's where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_basebackup"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found and int(found[-1].parts[-3]) >= 15 else _programs()


def _has_backends(folder: Path) -> bool:
    for process in psutil.process_iter(["name", "cwd"]):
        if process.info["name"] == "postgres" and process.info["cwd"] == str(folder):
            return True
    return False


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="satmeter-drill-"))
    user = nobody() if os.geteuid() == 0 else None
    archive = folder / "archive"
    archive.mkdir()
    if user is not None:
        shutil.chown(folder, user)
        shutil.chown(archive, user)
    made = Cluster(folder / "data", archive, user)
    try:
        made.make()
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Life:
    """One life of the service over the database, with nobody to call it back: webhooks are lost, all of them."""

    house: House
    gateway: BtcpayGateway
    backend: Backend
    client: httpx.AsyncClient
    service: dict[str, str]

    async def account(self) -> dict[str, str]:
        made = (await self.client.post("/accounts/create")).json()
        return {"x-credit-id": made["credit_id"], "api_key": made["api_key"]}

    async def topup(
        self, account: dict[str, str], method: str, amount: str, currency: str = "USD", *, paid: bool = True
    ) -> str:
        answer = await self.client.post(
            f"/topup/create/{method}",
            headers={"x-credit-id": account["x-credit-id"]},
            json={"amount": amount, "currency": currency},
        )
        assert answer.status_code == 201, answer.text
        invoice_id = str(answer.json()["invoice_id"])
        if paid:
            await self.pay(invoice_id)
        return invoice_id

    async def pay(self, invoice_id: str) -> None:
        await self.backend.act(invoice_id, "pay")
        await self.backend.act(invoice_id, "confirm", blocks=10)

    async def charge(self, account: dict[str, str], cost_usd: str) -> None:
        body = {"request_id": uuid.uuid4().hex, "api_key": account["api_key"], "model": "m", "cost_usd": cost_usd}
        answer = await self.client.post("/v1/meter/charge", headers=self.service, json=body)
        assert answer.json()["decision"] == "allow", answer.text

    async def look(self) -> None:
        """What the jobs do, for everything there is: poll what is due, sweep back over the days."""
        await self.house.db.transaction(_everything_is_due)
        await check_due(self.house.db, self.gateway)
        await sweep(self.house.db, self.gateway, CATCH_UP, self.house.settings.pepper)

    async def balance(self, account: dict[str, str]) -> Decimal:
        answer = await self.client.get("/credits/balance", headers={"x-credit-id": account["x-credit-id"]})
        return Decimal(str(answer.json()["balance"])) if answer.status_code == 200 else Decimal(-1)

    async def findings(self) -> list[Any]:
        return list((await audit(self.house.db, Secrets.of(self.house.settings))).findings)


async def _everything_is_due(session: Any) -> None:
    await rows(session, "UPDATE topup SET next_check_at = now() WHERE next_check_at IS NOT NULL")


@contextlib.asynccontextmanager
async def living(settings: Settings, url: str, backend: Backend) -> AsyncIterator[Life]:
    async with httpx.AsyncClient(transport=Wire(backend.send)) as asking:
        gateway = BtcpayGateway(
            base_url="http://sandbox.test", api_key="key", store_id="Store", webhook_secret=SECRET, client=asking
        )
        house = build(settings, url, gateway=gateway, wallets=FakeWallets(FakeLightning()))
        await house.db.open()
        transport = httpx.ASGITransport(create_app(house))  # type: ignore[arg-type]
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local", timeout=60) as client:
                token = await create_token(house.db, settings.pepper, "service", f"p{uuid.uuid4().hex[:8]}")
                yield Life(house, gateway, backend, client, {"Authorization": f"Bearer {token}"})
        finally:
            await house.close()


async def _nobody_listens(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("the webhook's receiver is away")


async def test_what_was_paid_after_the_moment_of_a_restore_is_found_and_credited_once(
    cluster: Cluster, settings: Settings, tmp_path: Path
) -> None:
    base = cluster.folder.parent / "base"
    backend = Backend(tmp_path, _nobody_listens)
    async with running(backend):
        cluster.execute("createdb", "-h", cluster.sockets, "-U", "dba", "satmeter")
        await asyncio.to_thread(migrate, cluster.url)
        async with living(settings, cluster.url, backend) as life:
            customer = await life.account()
            await life.topup(customer, "btc-lightning", "10")
            await life.look()
            await asyncio.to_thread(cluster.back_up, base)

            await asyncio.gather(*(life.charge(customer, "0.01") for _ in range(40)))
            waiting = await life.topup(customer, "btc", "20", paid=False)
            assert await life.balance(customer) == Decimal("10.10")
            moment = await _moment(cluster.url)

            await asyncio.gather(*(life.charge(customer, "0.05") for _ in range(20)))
            await life.pay(waiting)
            await life.topup(customer, "btc-lightning", "30")
            await life.topup(customer, "ltc", "0.5", "LTC")
            unpaid = await life.topup(customer, "xmr", "7", paid=False)
            stranger = await life.account()
            await life.topup(stranger, "btc-lightning", "5")
            await life.look()
            assert await life.balance(customer) == Decimal("10.10") - 1 + 20 + Decimal("31.50") + 40
            assert await life.balance(stranger) == Decimal("5.25")
            assert await life.findings() == []
            await asyncio.to_thread(cluster.archive_all)
        await asyncio.to_thread(cluster.kill)
        await asyncio.to_thread(cluster.restore, base, moment)
        await asyncio.to_thread(check, cluster.url)

        async with living(settings, cluster.url, backend) as life, living(settings, cluster.url, backend) as other:
            assert await life.balance(customer) == Decimal("10.10"), "to the moment, and to the cent"
            assert await life.findings() == []
            for _ in range(3):
                await asyncio.gather(life.look(), other.look())
            # The charges after that moment are gone with it; what was paid is not: 20 of a top-up that the books knew,
            # 30 and its bonus and half a litecoin at 80 dollars of two that they did not.
            assert await life.balance(customer) == Decimal("10.10") + 20 + Decimal("31.50") + 40
            assert await life.balance(stranger) == -1, "an account that was opened after that moment is gone"
            assert await life.findings() == []
            await life.pay(unpaid)
            for _ in range(2):
                await asyncio.gather(life.look(), other.look())
            assert await life.balance(customer) == Decimal("10.10") + 20 + Decimal("31.50") + 40 + 7
            assert await life.findings() == []
            print(await _story(cluster.url))


async def _moment(url: str) -> datetime:
    """A moment of the database's clock with nothing in flight."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("SELECT pg_sleep(0.05)")
        (moment,) = conn.execute("SELECT clock_timestamp()").fetchone() or (None,)
        conn.execute("SELECT pg_sleep(0.05)")
    assert isinstance(moment, datetime)
    return moment


async def _story(url: str) -> str:
    with psycopg.connect(url, autocommit=True) as conn:
        found = conn.execute(
            "SELECT method, status, credited_nusd, bonus_nusd, review FROM topup ORDER BY created_at"
        ).fetchall()
    return "\n".join(f"{method}: {status}, credited {credited}, bonus {bonus}, {review or 'no review'}" for method, status, credited, bonus, review in found)  # fmt: skip
