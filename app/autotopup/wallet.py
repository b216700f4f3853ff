"""What an automatic top-up asks of a customer's wallet: the Protocol that stands with its user; adapters bend to it.

A wallet's answer never moves money here. It may be slow, silent, wrong, or come after we gave up; what it says
only decides whether to ask again. All amounts are millisatoshis, all times aware UTC datetimes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit


class Encryption(StrEnum):
    """How requests to a wallet are encrypted, in NIP-47's words."""

    NIP44 = "nip44_v2"
    NIP04 = "nip04"


@dataclass(frozen=True, slots=True)
class WalletUri:
    """A parsed `nostr+walletconnect://` URI. `secret` (32 bytes as hex) pays: it stays out of every repr."""

    pubkey: str
    relays: tuple[str, ...]
    secret: str = field(repr=False)
    lud16: str | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """A wallet that was probed: how to reach it, and how to talk to it."""

    uri: WalletUri
    encryption: Encryption


@dataclass(frozen=True, slots=True)
class Probe:
    """What a wallet said about itself when it was connected."""

    encryption: Encryption
    methods: frozenset[str]
    alias: str | None = None
    balance_msat: int | None = None


class PayOutcome(StrEnum):
    """PAID: it says so, which BTCPay must confirm. REFUSED: a first answer that surely means no payment. UNKNOWN: all else."""

    PAID = "paid"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A `pay_invoice` that is signed but not sent, so that its id can be written down before it is."""

    event_id: str
    event: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class PayReply:
    """`code` is the wallet's own error code, if it gave one; `is_proven` that its preimage hashes to the payment hash."""

    outcome: PayOutcome
    code: str | None = None
    message: str = ""
    is_proven: bool = False
    was_answered: bool = False
    """Whether any answer came at all; a relay that cannot be reached leaves this False, and `was_published` too."""
    was_published: bool = True
    """Whether the request may have reached a relay."""
    was_taken: bool = True
    """False if every relay that it reached said that it does not take it; relays have passed such events on."""


@dataclass(frozen=True, slots=True)
class LookupReply:
    """Only a preimage that hashes to the payment hash proves a payment; nothing a wallet says proves that there was none."""

    is_proven: bool
    was_answered: bool


@dataclass(frozen=True, slots=True)
class LightningInvoice:
    """What a BOLT11 asks for. `network` is its prefix: bc, tb, tbs, bcrt."""

    network: str
    amount_msat: int | None
    payment_hash: str
    expires_at: datetime


class WalletError(Exception):
    """The wallet could not be connected. The text is for its owner, and says nothing about our network."""


class WalletUnreachable(WalletError):
    """No relay could be reached, or the wallet did not answer: always the same text, so that nobody scans with it."""


class WalletUnsuitable(WalletError):
    """The wallet answered and cannot be used: it lacks pay_invoice, is on another network, or refuses this key."""


@runtime_checkable
class Wallets(Protocol):
    """Customers' wallets, each call over a connection of its own."""

    def parse(self, uri: str) -> WalletUri:
        """Raises InvalidField (param `nwc_url`), with no part of the URI in its text."""

    async def probe(self, uri: WalletUri) -> Probe:
        """Info event, encryption, get_info. Raises WalletUnreachable or WalletUnsuitable."""

    def read_invoice(self, bolt11: str) -> LightningInvoice:
        """Raises ValueError for what is not a valid BOLT11."""

    def sign_payment(self, connection: Connection, bolt11: str, expires_at: datetime) -> SignedRequest:
        """A `pay_invoice` request, signed and not yet sent."""

    async def pay(self, connection: Connection, request: SignedRequest, payment_hash: str) -> PayReply:
        """Publish the request and wait for its answer (up to 90 s). Never raises for what a wallet or relay does."""

    async def look_up(self, connection: Connection, payment_hash: str) -> LookupReply:
        """Ask whether an invoice was paid. Never raises for what a wallet or relay does."""


def hosts(relays: Sequence[str]) -> list[str]:
    """What of the relays may be shown: their host names. A path or a query may hold a key to them."""
    return [urlsplit(relay).netloc for relay in relays]
