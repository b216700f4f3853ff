"""Auto top-up with LNbits as its backend: the two together, with the reader of invoices that the service has."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import open_account
from app.adapters.nip47 import NwcWallets
from app.audit import audit
from app.autotopup import connect
from app.autotopup.attempts import list_attempts
from app.autotopup.connect import Wish
from app.autotopup.wallet import Connection, Encryption, PayOutcome, PayReply, Probe, SignedRequest, WalletUri
from app.kernel.db import Row
from app.kernel.settings import Settings
from app.wiring import House, build
from tests.adapters.fake_lnbits import FakeLnbits, a_gateway
from tests.wallets import PUBKEY, SECRET

USD = 1_000_000_000


class PayingWallets(NwcWallets):
    """The real adapter, but for the relay: whoever is given pays, and says that it did."""

    def __init__(self, pays: Callable[[str], Awaitable[None]]) -> None:
        super().__init__(allow_private_relays=True, lightning_network="bc")
        self._pays = pays
        self._asked: dict[str, str] = {}

    def sign_payment(self, connection: Connection, bolt11: str, expires_at: datetime) -> SignedRequest:
        request = super().sign_payment(connection, bolt11, expires_at)
        self._asked[request.event_id] = bolt11
        return request

    async def pay(self, connection: Connection, request: SignedRequest, payment_hash: str) -> PayReply:
        await self._pays(self._asked[request.event_id])
        return PayReply(PayOutcome.PAID, was_answered=True)


async def topped_up_by_itself(house: House, account_id: uuid.UUID) -> list[str]:
    """Connect a wallet to an account without money, and see what became of the attempts."""
    uri = WalletUri(PUBKEY, ("ws://127.0.0.1:1",), SECRET)
    probe, wish = Probe(Encryption.NIP44, frozenset({"pay_invoice"})), Wish(5 * USD, 10 * USD, None)
    await house.db.transaction(
        lambda session: connect.connect(session, house.settings.sealer, account_id, uri, probe, wish, datetime.now(UTC))
    )
    house.watcher.notice(account_id)
    await house.watcher.idle()

    async def read(session: AsyncSession) -> list[Row]:
        return await list_attempts(session, account_id, 10, None)

    return [attempt["state"] for attempt in await house.db.transaction(read)]


@pytest.fixture
async def lnbits() -> FakeLnbits:
    fake = FakeLnbits()
    fake.now = datetime.now(UTC).replace(microsecond=0)
    return fake


@pytest.fixture
async def house(clean: str, settings: Settings, lnbits: FakeLnbits) -> AsyncIterator[House]:
    async def pays(bolt11: str) -> None:
        lnbits.pay(next(each["payment_hash"] for each in lnbits.payments if each["bolt11"] == bolt11))

    gateway = a_gateway(lnbits, now=lambda: datetime.now(UTC))
    made = build(replace(settings, lightning_network="bc"), clean, gateway=gateway, wallets=PayingWallets(pays))
    await made.db.open()
    yield made
    report = await audit(made.db)
    assert report.is_clean, report.findings
    await made.close()


async def test_an_invoice_of_lnbits_without_optional_fields_is_paid_by_the_customers_wallet(house: House) -> None:
    opened = await house.db.transaction(lambda session: open_account(session, house.keyring))
    assert await topped_up_by_itself(house, opened.account_id) == ["settled"]
