"""A primary that dies under load and a standby that takes its place: nothing acknowledged is lost, nothing is charged twice."""

import asyncio
import os
import uuid
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from app.audit import audit
from app.kernel.db import Database
from app.kernel.errors import AppError
from app.keys.verify import KeyOwner
from app.metering.holds import Ask, Meter, Work
from app.migrations import migrate
from tests.program import external_postgres
from tests.standby import standby_of
from tests.test_batches import PEPPER, SERVICE, plant

pytestmark = pytest.mark.slow
ROUNDS = int(os.environ.get("FAILOVERS", "1"))
CALLERS = 16


class Callers:
    """Each calls one after the other under names of its own, and says a call again until it is answered."""

    def __init__(self, meters: list[Meter], owner: KeyOwner) -> None:
        self.meters, self.owner = meters, owner
        self.charged: dict[str, Any] = {}
        self.ends: Counter[str] = Counter()
        self.is_over = False

    async def run(self) -> None:
        await asyncio.gather(*(self._call(number) for number in range(CALLERS)))

    async def _call(self, number: int) -> None:
        while not self.is_over:
            await self._charge(self.meters[number % len(self.meters)], uuid.uuid4().hex)

    async def _charge(self, meter: Meter, request_id: str) -> None:
        while True:
            try:
                charge = await meter.charge(SERVICE, self.owner, Ask(request_id, 10, None, None), Work(10))
            except AppError as error:
                self.ends[error.code] += 1
                await asyncio.sleep(0.05)
            else:
                self.charged[request_id] = charge
                self.ends["charged"] += 1
                return


async def until(is_true: Any, seconds: float = 180) -> None:
    for _ in range(int(seconds / 0.05)):
        if is_true():
            return
        await asyncio.sleep(0.05)
    assert is_true()


@pytest.mark.parametrize("number", range(ROUNDS))
async def test_a_primary_that_dies_loses_nothing_that_was_acknowledged_and_doubles_nothing(number: int) -> None:
    """The standby is synchronous, and DATABASE_URL names both, as deploy/SCALING.md says."""
    with external_postgres() as primary:
        url = primary.new_database("owner", "CREATEROLE")
        await asyncio.to_thread(migrate, url)
        with standby_of(primary) as standby:
            primary.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.sql("SELECT pg_reload_conf()")
            await until(lambda: primary.sql("SELECT sync_state FROM pg_stat_replication") == [("sync",)])
            with psycopg.connect(url, autocommit=True) as conn:
                (owner,) = plant(conn, [10**12], [{}])
            hosts = f"{primary.socket_folder},{standby.socket_folder}"
            both = f"postgresql://{urlsplit(url).username}@/satmeter?host={hosts}&port=5432,5432&target_session_attrs=read-write"
            houses = [Database(both, pool_size=4) for _ in range(2)]
            for each in houses:
                await each.open()
            callers = Callers([Meter(each, PEPPER, hold_sync_commit=True, batch=True) for each in houses], owner)
            running = asyncio.create_task(callers.run())
            try:
                await until(lambda: len(callers.charged) >= 100)
                await asyncio.to_thread(primary.kill)
                before = len(callers.charged)
                await asyncio.to_thread(standby.promote)
                await until(lambda: len(callers.charged) >= before + 100)
            finally:
                callers.is_over = True
                await running
            with psycopg.connect(standby.url_of(url), autocommit=True) as conn:
                found = conn.execute("SELECT request_id, count(*), sum(cost_nusd) FROM usage GROUP BY 1").fetchall()
            booked = {request_id: (count, cost) for request_id, count, cost in found}
            lost = callers.charged.keys() - booked.keys()
            doubled = {request_id for request_id, (count, cost) in booked.items() if (count, cost) != (1, 10)}
            print(f"\nfailover {number + 1}: {dict(callers.ends)}, {len(lost)} lost, {len(doubled)} doubled", end="")
            assert (lost, doubled, booked.keys() - callers.charged.keys()) == (set(), set(), set())
            assert callers.ends.keys() <= {"charged", "database_unavailable"}
            report = await audit(houses[0])
            assert report.is_clean, report.findings
            for each in houses:
                await each.close()
