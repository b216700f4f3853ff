"""From settings to real parts: the one place that knows every concrete name."""

from dataclasses import dataclass

from app.adapters.btcpay import BtcpayGateway
from app.kernel.db import Database
from app.kernel.settings import Settings
from app.keys.issue import Keyring
from app.keys.verify import Verifier
from app.metering.holds import Meter
from app.topups.gateway import Gateways, InvoiceGateway
from app.topups.methods import METHODS


@dataclass(frozen=True, slots=True)
class House:
    """Everything that the doors need; tests build the same from other parts."""

    settings: Settings
    db: Database
    gateways: Gateways
    verifier: Verifier
    keyring: Keyring
    meter: Meter

    async def close(self) -> None:
        """Give back every connection."""
        for gateway in self.gateways:
            await gateway.close()
        await self.db.close()


def build(settings: Settings, database_url: str, gateway: InvoiceGateway | None = None) -> House:
    """Put the parts together; nothing is opened or asked yet. One `gateway`, if given, takes every method."""
    db = Database(database_url, pool_size=settings.database_pool)
    return House(
        settings=settings,
        db=db,
        gateways=Gateways(dict.fromkeys(METHODS, gateway or btcpay(settings))),
        verifier=Verifier(db, settings.pepper),
        keyring=Keyring(settings.pepper, settings.sealer, reveal=settings.key_reveal),
        meter=Meter(db, settings.pepper, hold_sync_commit=settings.hold_sync_commit),
    )


def btcpay(settings: Settings) -> BtcpayGateway:
    """The BTCPay client. The sandbox is asked in the same way: the client cannot tell."""
    return BtcpayGateway(
        base_url=settings.btcpay_url or settings.sandbox_url,
        api_key=settings.btcpay_api_key,
        store_id=settings.btcpay_store_id,
        webhook_secret=settings.btcpay_webhook_secret,
    )
