"""The house that tests live in: a real PostgreSQL migrated by Alembic, a real app, a behaving sandbox."""

import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import structlog

from app.kernel import logs
from app.kernel.embedded import EmbeddedPostgres
from app.kernel.settings import Settings, load
from app.main import create_app
from app.migrations import migrate
from app.wiring import House, build
from tests.rig import Rig
from tests.wallets import FakeLightning, FakeWallets

# What the app has to say is for operators; a test that wants to read it configures the logs itself.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))

_TABLES = (
    "nwc_attempt, nwc_connection, payment, topup_invoice, topup, usage, hold, entry, api_key, credential, account, idempotency, rate_count,"
    " webhook_delivery, service_token, admin_token, admin_log, price_version, priced_model, price,"
    " price_override, markup, fee, usage_day, usage_dropped, rollup_day, usage_archive"
)


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """What a test does with the logs ends with it: the stream that they went to may be closed by then."""
    before, least = structlog.get_config(), logs._least
    yield
    structlog.configure(**before)
    logs._least = least


@pytest.fixture(scope="session")
def database_url() -> Iterator[str]:
    """One migrated database for the run: TEST_DATABASE_URL's server, or an embedded one."""
    external = os.environ.get("TEST_DATABASE_URL")
    if external:
        with psycopg.connect(external, autocommit=True) as conn:
            conn.execute("DROP SCHEMA public CASCADE")
            conn.execute("CREATE SCHEMA public")
        migrate(external)
        yield external
        return
    folder = Path(tempfile.mkdtemp(prefix="satmeter-test-"))
    folder.chmod(0o755)
    server = EmbeddedPostgres(folder)
    try:
        url = server.start()
        migrate(url)
        yield url
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load({"DATA_DIR": str(tmp_path_factory.mktemp("data")), "LOG_LEVEL": "ERROR", "DATABASE_POOL": "20"})


@pytest.fixture
def clean(database_url: str) -> str:
    """An empty database before the test."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(f"TRUNCATE {_TABLES}".encode())
    return database_url


@pytest.fixture
async def house(clean: str, settings: Settings) -> AsyncIterator[House]:
    """The real parts over a fake backend that behaves."""
    btcpay = FakeLightning()
    made = build(settings, clean, gateway=btcpay, wallets=FakeWallets(btcpay))
    await made.db.open()
    yield made
    await made.db.close()


@pytest.fixture
async def rig(clean: str, settings: Settings) -> AsyncIterator[Rig]:
    """The app over HTTP. After the test the books are audited: nothing may differ."""
    btcpay = FakeLightning()
    made = build(settings, clean, gateway=btcpay, wallets=FakeWallets(btcpay))
    app = create_app(made)
    await made.db.open()
    # Litestar's own test client answers one request at a time; requests that race must really race.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
        rig = Rig(client, made, clean)
        yield rig
        await rig.audit()
    await made.close()


@pytest.fixture
def owner_conn(clean: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection as the database's owner, who may plant what the runtime role may not."""
    with psycopg.connect(clean, autocommit=True) as conn:
        yield conn
