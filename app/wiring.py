"""From settings to real parts: the one place that knows every concrete name."""

from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import TypeAlias
from urllib.parse import urlsplit

from app.accounts.nostr import Nostr
from app.accounts.subjects import Issuer, TokenSubjects
from app.adapters.addresses import resolve_for_notices
from app.adapters.btcpay import BtcpayGateway
from app.adapters.direct_messages import NostrMessages
from app.adapters.issuer import JwtIssuer
from app.adapters.jwks import Keys
from app.adapters.lnbits import LnbitsGateway, RateSource
from app.adapters.nip47 import NwcWallets
from app.adapters.nip98 import SignedRequests
from app.adapters.rates import FixedRateSource, HttpRateSource
from app.adapters.relay import Dialler
from app.adapters.webhooks import HttpWebhooks
from app.admin.tokens import ServiceTokens
from app.audit.background import Audits
from app.audit.check import Secrets
from app.audit.sealing import Notary
from app.autotopup.run import AutoTopup
from app.autotopup.wallet import Wallets
from app.autotopup.watch import Watcher
from app.kernel.db import RUNTIME_ROLE, Database
from app.kernel.settings import Settings, SettingsError
from app.kernel.standby import Standby
from app.keys.issue import Keyring
from app.keys.verify import Verifier
from app.metering.holds import Meter
from app.metering.priced import Pricer
from app.notices.address import keep_operators
from app.notices.courier import Courier
from app.notices.limits import LimitsReached
from app.notices.ways import Messages, Webhooks
from app.offers.challenge import Challenges
from app.offers.mint import Mint
from app.offers.opening import Limits, Openings
from app.offers.proofs import Proofs
from app.pricing.catalogue import Catalogues
from app.topups.admission import Caps
from app.topups.gateway import Gateways, InvoiceGateway
from app.topups.methods import METHODS
from app.topups.receipt import receipt_url


@dataclass(frozen=True, slots=True)
class House:
    """Everything that the doors need; tests build the same from other parts."""

    settings: Settings
    db: Database
    reads: Database
    """For what may be a moment old: a standby, where there is one, else the same as `db`."""
    gateways: Gateways
    verifier: Verifier
    keyring: Keyring
    meter: Meter
    services: ServiceTokens
    nostr: Nostr
    issuer: Issuer | None
    """Whose JWTs stand for keys, if anybody's do."""
    catalogues: Catalogues
    read_catalogues: Catalogues
    """What `reads` has of them: calls are never priced by what a standby knows."""
    pricer: Pricer
    mint: Mint
    proofs: Proofs
    openings: Openings
    wallets: Wallets
    autotopup: AutoTopup
    watcher: Watcher
    audits: Audits
    notary: Notary
    webhooks: Webhooks
    messages: Messages
    courier: Courier
    limits_reached: LimitsReached

    async def close(self) -> None:
        """Give back every connection."""
        await self.watcher.close()
        await self.courier.close()
        await self.limits_reached.idle()
        await self.audits.close()
        if self.issuer is not None:
            await self.issuer.close()
        await self.services.uses.written()
        for gateway in self.gateways:
            await gateway.close()
        if self.reads is not self.db:
            await self.reads.close()
        await self.db.close()


def build(
    settings: Settings, database_url: str, gateway: InvoiceGateway | None = None, wallets: Wallets | None = None
) -> House:
    """Put the parts together; nothing is opened or asked yet. One `gateway`, if given, takes every method."""
    db, catalogues = (
        Database(database_url, pool_size=settings.database_pool, pooler=settings.database_pooler),
        Catalogues(),
    )
    reads = standby(settings, db) or db
    takers = gateways(settings) if gateway is None else Gateways(dict.fromkeys(METHODS, gateway), health_seconds=0)
    purses = wallets or nwc_wallets(settings)
    autotopup = AutoTopup(
        db, takers, purses, settings.sealer, network=settings.lightning_network, is_on=settings.nwc_auto_topup,
        receipts=partial(receipt_url, settings),
    )  # fmt: skip
    webhooks, messages = http_webhooks(settings), nostr_messages(settings)
    challenges = Challenges(settings.pepper, urlsplit(settings.public_url).netloc, f"{settings.service_name} balance")
    mint = Mint(
        db, takers, settings.pepper, challenges, purses.read_invoice, least_nusd=settings.offer_min_nusd,
        caps=Caps(settings.topups_waiting, settings.topups_per_hour, settings.topups_once_paid),
        receipts=partial(receipt_url, settings),
    )  # fmt: skip
    proofs = Proofs(db, takers, settings.pepper, challenges, token_days=settings.offer_token_days)
    keyring = Keyring(
        settings.pepper, settings.sealer, reveal=settings.key_reveal, keys_per_account=settings.keys_per_account
    )
    limits = Limits(settings.offers_per_minute, settings.accounts_per_hour, settings.accounts_per_hour_per_block)
    house = House(
        settings=settings,
        db=db,
        reads=reads,
        gateways=takers,
        verifier=Verifier(db, settings.pepper),
        keyring=keyring,
        meter=Meter(
            db,
            settings.pepper,
            hold_sync_commit=settings.hold_sync_commit,
            batch=settings.meter_batch != "off",
            by_account=settings.meter_batch == "account",
        ),
        services=ServiceTokens(db, settings.pepper),
        nostr=SignedRequests(),
        issuer=jwt_issuer(settings),
        catalogues=catalogues,
        read_catalogues=catalogues if reads is db else Catalogues(),
        pricer=Pricer(db, catalogues, is_strict=settings.strict_provider),
        mint=mint,
        proofs=proofs,
        openings=Openings(db, mint, proofs, keyring, settings.pepper, settings.sealer, limits),
        wallets=purses,
        autotopup=autotopup,
        watcher=Watcher(autotopup),
        audits=Audits(db, Secrets.of(settings), reads),
        notary=Notary(db, settings.pepper),
        webhooks=webhooks,
        messages=messages,
        courier=Courier(db, settings.sealer, webhooks, messages),
        limits_reached=LimitsReached(db),
    )
    house.verifier.proofs = proofs
    if house.issuer is not None:
        house.verifier.subjects = TokenSubjects(db, keyring, house.issuer, settings.jwt_scopes)
    house.meter.on_low = house.watcher.notice
    house.meter.on_limit = house.limits_reached.notice
    return house


def standby(settings: Settings, primary: Database, *, role: str | None = RUNTIME_ROLE) -> Standby | None:
    """The reads of DATABASE_READ_URL, which fall back to the primary; None where that is not set."""
    if settings.database_read_url is None:
        return None
    return Standby(settings.database_read_url, primary, pool_size=settings.database_pool, role=role)


def nwc_wallets(settings: Settings) -> Wallets:
    """Customers' wallets over Nostr relays."""
    return NwcWallets(
        # The sandbox's own relay is on loopback; and where money is none, there is none to steal with an address.
        allow_private_relays=settings.nwc_allow_private_relays or settings.uses_sandbox,
        lightning_network=settings.lightning_network,
    )


def http_webhooks(settings: Settings) -> Webhooks:
    """Customers' and the operator's own URLs. The sandbox's is on loopback, as its relay is."""
    return HttpWebhooks(allow_private=settings.notice_allow_private or settings.uses_sandbox)


def nostr_messages(settings: Settings) -> Messages:
    """Direct messages, from a key of ours that is the pepper's: nothing more to keep, and the same after a restore."""
    allow_private = settings.notice_allow_private or settings.uses_sandbox
    relays = (settings.sandbox_relay_url,) if settings.uses_sandbox else settings.notice_relays
    dialler = Dialler(allow_private=allow_private, resolve=resolve_for_notices)
    return NostrMessages(dialler, settings.pepper.derived_key(b"nostr").hex(), relays)


def jwt_issuer(settings: Settings) -> Issuer | None:
    """Who signs the JWTs that stand for keys. Its address is the operator's choice, as BTCPay's is: it may be within."""
    if not settings.jwt_issuer:
        return None
    return JwtIssuer(
        settings.jwt_issuer, settings.jwt_audience, Keys(settings.jwt_jwks), subject_claim=settings.jwt_claim
    )


async def name_operators_address(house: House) -> None:
    """Have the operator told where the settings say. Raises InvalidField for a URL or key that is none."""
    settings = house.settings
    url, key = settings.notice_webhook_url or None, settings.notice_npub or None
    shown = None if url is None else house.webhooks.shown(url, is_operators=True)
    hex_key = None if key is None else house.messages.key_of(key)
    secret = settings.notice_webhook_secret or None
    await house.db.transaction(lambda session: keep_operators(session, settings.sealer, url, shown, secret, hex_key))


def gateways(settings: Settings) -> Gateways:
    """Each offered method with the backend that takes it. Raises SettingsError for a backend's unusable setting."""
    makers = {"btcpay": btcpay, "lnbits": lnbits}
    try:
        made = {name: make(settings) for name, make in makers.items() if settings.takes_with(name)}
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return Gateways({method: made[backend] for method, backend in settings.payment_methods})


def btcpay(settings: Settings) -> InvoiceGateway:
    """The BTCPay client. The sandbox is asked in the same way: the client cannot tell."""
    return BtcpayGateway(
        base_url=settings.btcpay_url or settings.sandbox_url,
        api_key=settings.btcpay_api_key,
        store_id=settings.btcpay_store_id,
        webhook_secret=settings.btcpay_webhook_secret,
        service_name=settings.service_name,
    )


def lnbits(settings: Settings) -> InvoiceGateway:
    """The LNbits client, with a rate source of our own: LNbits' rates cannot be relied on offline."""
    assert settings.lnbits_url is not None
    return LnbitsGateway(
        base_url=settings.lnbits_url,
        invoice_key=settings.lnbits_invoice_key,
        rates=_rates(settings),
        service_name=settings.service_name,
        webhook_url=f"{settings.public_url}/webhooks/lnbits" if settings.lnbits_webhook else None,
    )


Rates: TypeAlias = RateSource


def second_rates(settings: Settings) -> Rates:
    """Somebody other than who prices the top-ups: RATE_URL beside BTCPay; beside LNbits, which is priced by that, another
    exchange."""
    if settings.takes_with("btcpay"):
        return _rates(settings)
    if "kraken" in settings.rate_url:
        return HttpRateSource("https://api.coinbase.com/v2/prices/{coin}-USD/spot", "data.amount", names={"BTC": "BTC"})
    return HttpRateSource(
        "https://api.kraken.com/0/public/Ticker?pair={coin}USD", "result.*.b[0]", names={"BTC": "XBT"}
    )


def _rates(settings: Settings) -> RateSource:
    if settings.rate_fixed:
        return FixedRateSource({coin: Decimal(usd) for coin, usd in settings.rate_fixed})
    return HttpRateSource(
        settings.rate_url, settings.rate_path, names=dict(settings.rate_names), allow_http=not settings.is_production
    )
