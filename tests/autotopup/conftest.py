"""A house whose time is the test's, with a backend and wallets that behave; after every test the books are audited."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import open_account
from app.admin.acts import write_act
from app.audit import audit
from app.autotopup import connect
from app.autotopup.attempts import AttemptRef
from app.autotopup.connect import Wish
from app.autotopup.run import AutoTopup
from app.autotopup.watch import Watcher
from app.kernel.db import Database, Row
from app.kernel.security import Admin
from app.kernel.settings import Settings
from app.ledger.post import post
from app.ledger.tables import EntryKind
from app.wiring import House, build
from tests.wallets import NWC_URL, Clock, FakeLightning, FakeWallets, Killed

USD = 1_000_000_000


@dataclass
class Street:
    """One account with a wallet, and everything around it."""

    house: House
    clock: Clock
    btcpay: FakeLightning
    wallets: FakeWallets
    database_url: str
    account_id: uuid.UUID

    @property
    def autotopup(self) -> AutoTopup:
        return self.another()

    def another(self, *, is_on: bool = True, db: Database | None = None) -> AutoTopup:
        """A process of ours: nothing is shared with another but the database and the world."""
        return AutoTopup(
            db or self.house.db, self.house.gateways, self.wallets, self.house.settings.sealer, network="bcrt", is_on=is_on,
            clock=self.clock,
        )  # fmt: skip

    def watcher(self) -> Watcher:
        return Watcher(self.another())

    async def open(self, usd: float = 0) -> uuid.UUID:
        opened = await self.house.db.transaction(lambda session: open_account(session, self.house.keyring))
        if usd:
            await self.give(usd, opened.account_id)
        return opened.account_id

    async def give(self, usd: float, account_id: uuid.UUID | None = None) -> None:
        """Move money by hand: negative is spending."""
        amount = round(usd * USD)
        whose = account_id or self.account_id
        admin, pepper = Admin(uuid.uuid4(), "ops"), self.house.settings.pepper

        async def work(session: AsyncSession) -> None:
            act = await write_act(session, pepper, admin, "account.adjust", str(whose), "by hand", amount)
            await post(session, whose, EntryKind.ADJUSTMENT, f"act/{act}", "adjustment", amount)

        await self.house.db.transaction(work)

    async def connect(
        self,
        threshold: float = 5,
        amount: float = 10,
        max_per_day: float | None = None,
        account_id: uuid.UUID | None = None,
    ) -> Row:
        uri = self.wallets.parse(NWC_URL)
        found = await connect.probe(self.wallets, uri)
        wish = Wish(
            round(threshold * USD), round(amount * USD), None if max_per_day is None else round(max_per_day * USD)
        )
        return await self.house.db.transaction(
            lambda session: connect.connect(
                session, self.house.settings.sealer, account_id or self.account_id, uri, found, wish, self.clock()
            )
        )

    async def disconnect(self) -> None:
        await self.house.db.transaction(lambda session: connect.disconnect(session, self.account_id))

    async def connection(self) -> Row:
        found = await self.house.db.transaction(lambda session: connect.find(session, self.account_id))
        assert found is not None
        return found

    async def begin(self) -> AttemptRef:
        begun = await self.autotopup.begin(self.account_id)
        assert begun.ref is not None, begun
        return begun.ref

    async def attempt(self, *acts: str) -> Row:
        """Begin an attempt and drive it as far as it goes; the wallet does these acts."""
        self.wallets.acts = list(acts)
        await self.autotopup.drive(await self.begin())
        return self.last()

    async def tick(self) -> None:
        """One round of the clock's jobs."""
        autotopup = self.autotopup
        await autotopup.sweep()
        for ref in await autotopup.due():
            await autotopup.drive(ref)

    async def until_closed(self, most: timedelta = timedelta(days=2)) -> Row:
        """Let time pass, with the jobs going, until nothing is open."""
        end = self.clock() + most
        while self.sql("SELECT 1 FROM nwc_attempt WHERE closed_at IS NULL"):
            assert self.clock() < end, self.last()
            [(next_at,)] = self.sql(
                "SELECT min(greatest(next_at, claimed_until)) FROM nwc_attempt WHERE closed_at IS NULL"
            )
            self.clock.now = max(self.clock.now, next_at) + timedelta(milliseconds=1)
            await self.tick()
        return self.last()

    async def dies(self, work: Any) -> None:
        with pytest.raises(Killed):
            await work

    def last(self) -> Row:
        with psycopg.connect(self.database_url, autocommit=True, row_factory=psycopg.rows.dict_row) as conn:
            found = conn.execute(
                "SELECT * FROM nwc_attempt WHERE account_id = %s ORDER BY created_at DESC, id DESC LIMIT 1",
                [self.account_id],
            ).fetchone()
        assert found is not None
        return found

    def state(self) -> str:
        return str(self.last()["state"])

    def states(self) -> list[str]:
        return [state for (state,) in self.sql("SELECT state FROM nwc_attempt ORDER BY created_at, id")]

    def balance_usd(self) -> float:
        [(posted,)] = self.sql("SELECT posted_nusd FROM account WHERE id = %s", self.account_id)
        return float(posted) / USD

    def sql(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            cursor = conn.execute(statement.encode(), params)
            return cursor.fetchall() if cursor.description else []

    async def audit(self) -> None:
        report = await audit(self.house.db)
        assert report.is_clean, report.findings
        # Whatever happened: no wallet paid anything twice, and no invoice was asked for oftener than is allowed.
        assert max(self.wallets.paid.values(), default=0) <= 1
        assert max(self.wallets.published.values(), default=0) <= 2

    def now(self) -> datetime:
        return self.clock()


async def made(database_url: str, settings: Settings) -> Street:
    clock = Clock()
    btcpay = FakeLightning(clock)
    wallets = FakeWallets(btcpay)
    house = build(settings, database_url, gateway=btcpay, wallets=wallets)
    await house.db.open()
    street = Street(house, clock, btcpay, wallets, database_url, uuid.uuid4())
    street.account_id = await street.open(4)
    return street


@pytest.fixture
async def street(clean: str, settings: Settings) -> AsyncIterator[Street]:
    street = await made(clean, settings)
    yield street
    try:
        await street.audit()
    finally:
        await street.house.close()
