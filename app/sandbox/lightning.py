"""A Lightning node without channels: real signed BOLT11 invoices on regtest, paid when the driver says so."""

import hashlib
import secrets
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from enum import StrEnum

import bolt11
from bolt11.models.features import Feature, FeatureExtra, Features, FeatureState
from bolt11.models.tags import Tag, TagChar, Tags
from msgspec import Struct
from msgspec.structs import replace

from .store import Store

MSAT_PER_BTC = 100_000_000_000
MSAT_PER_SAT = 1000
FINAL_CLTV_BLOCKS = 18
REQUIRED: dict[Feature | FeatureExtra, FeatureState] = {
    Feature.var_onion_optin: FeatureState.required,
    Feature.payment_secret: FeatureState.required,
}


class Rounding(StrEnum):
    """What the node makes of an amount that is no whole sat."""

    OFF = "off"
    """asks for the msat, as lnd and Core Lightning do"""
    DOWN = "down"
    """asks for the sat below, but for one at least, as Blink and Strike do"""
    UP = "up"
    """asks for the sat above"""


class Request(Struct, frozen=True):
    """A BOLT11 invoice with the secret that proves its payment; None as amount leaves that to the payer."""

    bolt11: str
    payment_hash: str
    preimage: str
    amount_msat: int | None
    invoice_id: str
    expires_at: int
    paid_msat: int = 0

    def __repr__(self) -> str:
        return f"Request(payment_hash={self.payment_hash!r}, amount_msat={self.amount_msat}, paid={self.paid_msat})"


class LightningNode:
    """Issues BOLT11 under one node key, which is made at the first start and kept with the rest of the state."""

    def __init__(self, store: Store) -> None:
        self.store = store
        key = store.get("node", "key", str)
        if key is None:
            key = secrets.token_hex(32)
            store.put("node", "key", key)
        self._key = key
        self.rounding = store.get("node", "rounding", Rounding) or Rounding.OFF

    def round_to(self, rounding: Rounding) -> None:
        """From now on, and after a restart too."""
        self.rounding = rounding
        self.store.put("node", "rounding", rounding)

    def payable(self, amount: Decimal) -> Decimal:
        """What the node will ask for where this many whole bitcoins are due."""
        if self.rounding is Rounding.OFF:
            return amount
        how = ROUND_FLOOR if self.rounding is Rounding.DOWN else ROUND_CEILING
        sats = (amount * MSAT_PER_BTC / MSAT_PER_SAT).to_integral_value(how)
        return max(sats, Decimal(1)) * MSAT_PER_SAT / MSAT_PER_BTC

    def request(self, invoice_id: str, amount_msat: int | None, description: str, now: int, expires_at: int) -> Request:
        """Issue and remember a BOLT11 for this BTCPay invoice; `now` and `expires_at` in unix seconds."""
        preimage = secrets.token_bytes(32)
        payment_hash = hashlib.sha256(preimage).hexdigest()
        text = self._sign(payment_hash, amount_msat, description, now, max(expires_at - now, 1))
        request = Request(text, payment_hash, preimage.hex(), amount_msat, invoice_id, expires_at)
        self.store.put("bolt11", payment_hash, request)
        return request

    def find(self, text: str) -> Request | None:
        """The request behind a BOLT11 of ours, None for anything else."""
        try:
            payment_hash = bolt11.decode(text.removeprefix("lightning:").lower()).payment_hash
        except (bolt11.Bolt11Exception, ValueError):
            return None
        return self.store.get("bolt11", payment_hash, Request)

    def take_payment(self, request: Request, amount_msat: int) -> Request:
        """Record that this request was paid, which happens to a BOLT11 once."""
        assert request.paid_msat == 0, "a BOLT11 is paid once"
        paid = replace(request, paid_msat=amount_msat)
        self.store.put("bolt11", request.payment_hash, paid)
        return paid

    def _sign(self, payment_hash: str, amount_msat: int | None, text: str, now: int, lasts_seconds: int) -> str:
        tags = [
            Tag(TagChar.payment_hash, payment_hash),
            Tag(TagChar.description, text),
            Tag(TagChar.payment_secret, secrets.token_hex(32)),
            Tag(TagChar.expire_time, lasts_seconds),
            Tag(TagChar.min_final_cltv_expiry, FINAL_CLTV_BLOCKS),
            Tag(TagChar.features, Features.from_feature_list({**REQUIRED})),
        ]
        amount = bolt11.MilliSatoshi(amount_msat) if amount_msat else None
        return bolt11.encode(bolt11.Bolt11("bcrt", now, Tags(tags), amount), self._key)


def to_msat(coins: Decimal) -> int:
    """Whole bitcoins to millisatoshis; finer fractions do not exist on Lightning and are dropped."""
    return int(coins * MSAT_PER_BTC)


def to_coins(amount_msat: int) -> Decimal:
    """Millisatoshis to whole bitcoins."""
    return Decimal(amount_msat) / MSAT_PER_BTC
