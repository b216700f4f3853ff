"""Reads on a real streaming standby: they say how old they are, and the primary does whatever the standby cannot."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import audit
from app.doctor.database import look
from app.doctor.lines import Level, Line
from app.kernel.db import row
from app.kernel.settings import Settings
from app.kernel.standby import Standby
from app.migrations import migrate
from tests import databases
from tests.door import Door, opened
from tests.program import ExternalPostgres, external_postgres
from tests.rig import Customer
from tests.standby import StreamingStandby, standby_of

pytestmark = pytest.mark.slow
WHERE = "SELECT pg_is_in_recovery() AS is_standby"


@dataclasses.dataclass(frozen=True, slots=True)
class Servers:
    primary: ExternalPostgres
    standby: StreamingStandby
    url: str
    read_url: str


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with external_postgres() as primary:
        url = primary.new_database("owner", "CREATEROLE")
        migrate(url)
        with standby_of(primary) as standby:
            yield Servers(primary, standby, url, standby.url_of(url))


@pytest.fixture
async def door(servers: Servers, settings: Settings) -> AsyncIterator[Door]:
    databases.empty(servers.url)
    servers.standby.catch_up()
    async with opened(servers.url, settings, database_read_url=servers.read_url) as made:
        yield made


async def history(door: Door, customer: Customer) -> tuple[int, datetime]:
    """How many calls it shows, and until when all of them are there."""
    told = await door.ask("GET", "/queries/history", customer.owner)
    assert told.status == 200, told.body
    return len(told.json["data"]), datetime.fromisoformat(told.headers["x-data-as-of"])


async def charge(door: Door, customer: Customer) -> None:
    hold = await door.rig.authorize(customer.api_key, "0.1")
    await door.rig.settle(hold["hold_id"], "0.05")


async def test_history_is_the_standby_s_and_says_how_old_it_is(door: Door, servers: Servers) -> None:
    customer = await door.customer("20")
    await charge(door, customer)
    servers.standby.catch_up()
    count, as_of = await history(door, customer)
    assert count == 1
    servers.standby.pause()
    try:
        now = datetime.now(UTC)
        await charge(door, customer)
        for path in ("/queries/history", "/activity", "/v1/models", "/v1/prices", "/api/v1/activity"):
            told = await door.ask("GET", path, customer.owner)
            assert datetime.fromisoformat(told.headers["x-data-as-of"]) < now, path
        assert (await history(door, customer))[0] == 1
        assert await door.rig.balance(customer) == Decimal("19.9"), "balances are the primary's"
    finally:
        servers.standby.resume()
    servers.standby.catch_up()
    count, later = await history(door, customer)
    assert (count, later > as_of) == (2, True)


async def test_who_is_calling_is_asked_of_the_primary(door: Door, servers: Servers) -> None:
    customer = await door.customer("20")
    key = await door.rig.new_key(customer)
    servers.standby.catch_up()
    servers.standby.pause()
    try:
        bearer = {"Authorization": f"Bearer {key['api_key']}"}
        assert (await door.ask("GET", "/queries/history", bearer)).status == 200
        assert (await door.ask("DELETE", f"/keys/{key['_id']}", customer.owner)).status in (200, 204)
        assert (await door.ask("GET", "/queries/history", bearer)).status == 401
    finally:
        servers.standby.resume()


async def test_an_audit_reads_the_standby(door: Door, servers: Servers) -> None:
    customer = await door.customer("20")
    servers.standby.catch_up()
    servers.standby.pause()
    try:
        await charge(door, customer)
        behind, ahead = await audit(door.rig.house.reads), await audit(door.rig.house.db)
    finally:
        servers.standby.resume()
    assert (behind.findings, ahead.findings, ahead.entries - behind.entries) == ((), (), 1)


async def test_a_read_that_the_recovery_cancels_is_the_primary_s(door: Door, servers: Servers) -> None:
    tried: list[bool] = []
    is_reading = asyncio.Event()

    async def read(session: AsyncSession) -> bool:
        found = await row(session, f"{WHERE}, (SELECT count(*) FROM rate_count)")
        assert found is not None
        tried.append(found["is_standby"])
        if found["is_standby"]:
            is_reading.set()
            await row(session, "SELECT pg_sleep(14)")
        return bool(found["is_standby"])

    reading = asyncio.create_task(door.rig.house.reads.transaction(read))
    await is_reading.wait()
    with psycopg.connect(servers.url, autocommit=True) as conn:
        conn.execute("TRUNCATE rate_count")
    assert await reading is False
    assert tried == [True, False]
    assert (await door.rig.house.reads.transaction(lambda session: row(session, WHERE))) == {"is_standby": True}


async def test_a_connection_to_it_takes_no_writes_and_no_single_statements(door: Door) -> None:
    reads = door.rig.house.reads
    assert isinstance(reads, Standby)
    assert await reads.one(WHERE, {}) == {"is_standby": False}


async def test_another_cluster_is_never_read(servers: Servers, settings: Settings) -> None:
    databases.empty(servers.url)
    with databases.migrated() as other:
        async with opened(servers.url, settings, database_read_url=other) as door:
            customer = await door.customer("20")
            await charge(door, customer)
            assert (await history(door, customer))[0] == 1


async def test_a_dead_standby_is_done_without(door: Door, servers: Servers) -> None:
    """The last of this file: it is started again, and read again."""
    customer = await door.customer("20")
    servers.standby.stop()
    try:
        await charge(door, customer)
        before = datetime.now(UTC)
        count, as_of = await history(door, customer)
        assert (count, as_of >= before.replace(microsecond=0)) == (1, True)
    finally:
        servers.standby.start()
    reads: Any = door.rig.house.reads

    async def is_back() -> bool:
        found = await reads.transaction(lambda session: row(session, WHERE))
        return bool(found["is_standby"])

    for _ in range(100):
        if await is_back():
            break
        await asyncio.sleep(0.2)
    assert await is_back()


async def test_the_doctor_says_whether_the_standby_is_there_and_how_late(door: Door, servers: Servers) -> None:
    async def said() -> Line:
        (line,) = [each for each in await look(door.rig.house, servers.url) if each.about == "database.standby"]
        return line

    servers.standby.catch_up()
    assert (await said()).level is Level.OK
    servers.standby.stop()
    try:
        gone = await said()
        assert gone.level is Level.WARNING
        assert "cannot be asked" in gone.found
    finally:
        servers.standby.start()
