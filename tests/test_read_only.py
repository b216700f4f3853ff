"""A server that takes no writes, as a demoted primary does: 503 on every way, and its connections are dropped for the next one's."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, row
from app.kernel.errors import DatabaseUnavailable
from app.kernel.settings import Settings
from app.main import create_app
from app.wiring import build
from tests.wallets import FakeLightning, FakeWallets

_WRITE = "INSERT INTO rate_count (bucket, window_start, count) VALUES ('read-only/1', now(), 1) ON CONFLICT DO NOTHING RETURNING 1 AS done"  # fmt: skip


@contextmanager
def demoted(url: str) -> Iterator[None]:
    """Connections that are made meanwhile take no writes; those that there are stay as they were."""
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode())
        try:
            yield
        finally:
            conn.execute("SET default_transaction_read_only = off")
            conn.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'.encode())


@pytest.fixture
async def db(clean: str) -> AsyncIterator[Database]:
    made = Database(clean, pool_size=2)
    yield made
    await made.close()


async def by_session(db: Database) -> Any:
    async def work(session: AsyncSession) -> Any:
        return await row(session, _WRITE)

    return await db.transaction(work)


async def test_every_way_to_it_is_our_trouble_and_follows_to_the_one_that_takes_writes(
    db: Database, clean: str
) -> None:
    lane = db.lane()
    ways = (lambda: by_session(db), lambda: db.one(_WRITE, {}), lambda: lane.all(_WRITE, {}))
    with demoted(clean):
        await db.open()
        for way in ways:
            with pytest.raises(DatabaseUnavailable) as refused:
                await way()
            assert refused.value.retry_after_seconds == 1
    for way in ways:  # the connections of before would still refuse
        await way()
    await lane.close()


async def test_a_host_of_it_is_not_ready_and_says_503_until_it_is(clean: str, settings: Settings) -> None:
    btcpay = FakeLightning()
    house = build(settings, clean, gateway=btcpay, wallets=FakeWallets(btcpay))
    transport = httpx.ASGITransport(create_app(house), raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
        with demoted(clean):
            await house.db.open()
            told = await client.get("/health/ready")
            made = await client.post("/accounts/create")
        assert (told.status_code, told.json()) == (503, {"status": "down", "database": "read only"})
        assert (made.status_code, made.json()["error"]["code"]) == (503, "database_unavailable")
        assert told.headers["retry-after"] == made.headers["retry-after"] == "1"
        assert (await client.get("/health/ready")).status_code == 200
        assert (await client.post("/accounts/create")).status_code == 201
    await house.close()


async def test_one_look_drops_every_connection_to_it(db: Database, clean: str) -> None:
    """Those that only read would go on reading from a standby, which may be behind."""
    lane = db.lane()
    is_read_only = "SELECT current_setting('transaction_read_only')::bool AS is_read_only"
    with demoted(clean):
        await db.open()
        assert [await db.one(is_read_only, {}), *await lane.all(is_read_only, {})] == [{"is_read_only": True}, (True,)]
        await lane.close()
        assert not await db.takes_writes()
    assert await db.takes_writes()
    assert [await db.one(is_read_only, {}), *await lane.all(is_read_only, {})] == [{"is_read_only": False}, (False,)]
    await lane.close()
