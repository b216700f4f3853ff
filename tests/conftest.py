"""The house that tests live in: a real PostgreSQL migrated by Alembic, a real app, a behaving sandbox."""

import gc
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psycopg
import pytest
import structlog

from app.audit import audit
from app.kernel import logs
from app.kernel.db import Database
from app.kernel.settings import Settings, load
from app.main import create_app
from app.wiring import House, build
from tests import databases
from tests.rig import Rig
from tests.wallets import FakeLightning, FakeWallets
from tests.world import tell

# Whoever starts the tests with SIGINT and SIGQUIT ignored (`nohup make test &`) would have every program started by them ignore them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# What the app has to say is for operators; a test that wants to read it configures the logs itself.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
logs._least = logging.CRITICAL


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests import shares  # where there is no xdist, nobody asks

    return shares.make(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if databases.WORKER:
        items.sort(key=is_short)
    gc.freeze()  # as the service does: thousands of tests' items need not be looked at by every collection
    gc.set_threshold(20_000, 20, 50)


def is_short(item: pytest.Item) -> bool:
    """Long tests begin first: one that begins last would be waited for by every process."""
    return item.get_closest_marker("slow") is None and item.get_closest_marker("long") is None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of several had to tell besides its verdicts."""
    for text in getattr(node, "workeroutput", {}).get("told", ()):
        tell(node.config, text)


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """What a test does with the logs ends with it, the stream that they went to may be closed by then; and who may read
    what is made from now on."""
    before, least, stream = structlog.get_config(), logs._least, logs._stream
    mask = os.umask(0o022)
    os.umask(mask)
    yield
    os.umask(mask)
    structlog.configure(**before)
    logs._least, logs._stream = least, stream


@pytest.fixture
def within_an_hour() -> None:
    """For what is counted by the hour of the clock: an hour that ends in the middle of a test begins before it instead."""
    left = 3600 - time.time() % 3600
    if left < 30:
        time.sleep(left)


@pytest.fixture(scope="session")
def database_url() -> Iterator[str]:
    """One migrated database for the run, or for each of the processes that share it."""
    with databases.migrated() as url:
        yield url


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load(
        {
            "DATA_DIR": str(tmp_path_factory.mktemp("data")),
            "LOG_LEVEL": "ERROR",
            "DATABASE_POOL": "20",
            "DATABASE_POOLER": databases.POOLER,
            "METER_BATCH": "account" if databases.CITUS else "on",
        }
    )


@pytest.fixture(scope="session")
async def auditor(database_url: str) -> AsyncIterator[Database]:
    """One connection for the audits after tests."""
    made = Database(database_url, pool_size=1, pooler=databases.POOLER)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def clean(database_url: str) -> str:
    """An empty database before the test."""
    databases.empty(database_url)
    return database_url


@pytest.fixture
async def db(clean: str) -> AsyncIterator[Database]:
    """The database without a house; after the test the books are audited."""
    made = Database(clean, pool_size=12)
    await made.open()
    yield made
    report = await audit(made)
    await made.close()
    assert report.is_clean, report.findings


@pytest.fixture
async def house(clean: str, settings: Settings) -> AsyncIterator[House]:
    """The real parts over a fake backend that behaves."""
    btcpay = FakeLightning()
    made = build(settings, clean, gateway=btcpay, wallets=FakeWallets(btcpay))
    await made.db.open()
    yield made
    await made.db.close()


@pytest.fixture
async def rig(clean: str, settings: Settings, auditor: Database) -> AsyncIterator[Rig]:
    """The app over HTTP. After the test the books are audited: nothing may differ."""
    btcpay = FakeLightning()
    made = build(settings, clean, gateway=btcpay, wallets=FakeWallets(btcpay))
    app = create_app(made)
    await made.db.open()
    # Litestar's own test client answers one request at a time; requests that race must really race.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
        rig = Rig(client, made, clean, auditor)
        yield rig
        try:
            await rig.audit()
        finally:
            await made.close()


@pytest.fixture
def owner_conn(clean: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection as the database's owner, who may plant what the runtime role may not."""
    with psycopg.connect(clean, autocommit=True) as conn:
        yield conn
