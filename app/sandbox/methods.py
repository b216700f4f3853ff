"""The five payment methods: how each is spelled, how finely its coin divides, what it charges, how it is linked to."""

import re
from decimal import Decimal

from msgspec import Struct

# The policy asset of Liquid's regtest; a BIP21 link must name the asset, for one address can hold many.
LIQUID_ASSET = "5ac9f65c0efcc4775e0baec4ec03abdde22473cd3cf33c0419ca290e0751b225"


class Method(Struct, frozen=True):
    """A way to pay. Fees and dust are in whole coins.

    `decimals` is the coin's precision in asked amounts (Lightning: 1 millisatoshi). `first_fee` is added to what is asked
    from the first payment on, `next_fee` once a payment did not suffice (BTCPay's `MultiplePaymentsOnly`).
    `confirmations` overrides the invoice's speed policy.
    """

    id: str
    coin: str
    name: str
    scheme: str
    decimals: int = 8
    address_prefix: str = ""
    first_fee: Decimal = Decimal(0)
    next_fee: Decimal = Decimal(0)
    dust: Decimal = Decimal(0)
    confirmations: int | None = None

    @property
    def is_lightning(self) -> bool:
        return self.id.endswith("-LN")


SATOSHI = Decimal("0.00000001")
# 294 satoshi is the dust threshold of a P2WPKH output; 100 vbytes at 1 sat/vB the fee BTCPay adds for one more input.
METHODS = {
    method.id: method
    for method in (
        Method("BTC-LN", "BTC", "Bitcoin Lightning", "lightning", 11),
        Method("BTC-CHAIN", "BTC", "Bitcoin", "bitcoin", 8, "bcrt", Decimal(0), 100 * SATOSHI, 294 * SATOSHI),
        Method("LTC-CHAIN", "LTC", "Litecoin", "litecoin", 8, "rltc", Decimal(0), 1000 * SATOSHI, 294 * SATOSHI),
        Method("LBTC-CHAIN", "LBTC", "Liquid Bitcoin", "liquidnetwork", 8, "ert", Decimal(0), 10 * SATOSHI, SATOSHI),
        # The plugin always asks for the network's fee, and its store setting waits for 10 blocks: spendable.
        Method("XMR-CHAIN", "XMR", "Monero", "monero", 12, "", Decimal("0.000002"), Decimal("0.000002"), SATOSHI, 10),
    )
}

_LIGHTNING_KINDS = {"LN", "LIGHTNINGNETWORK", "LIGHTNINGLIKE", "OFFCHAIN"}
_CHAIN_KINDS = {"CHAIN", "ONCHAIN", "BTCLIKE", "MONEROLIKE", ""}


def find_method(spelling: str) -> Method | None:
    """The method of this id, in any case and in BTCPay 1.x's spellings too; None if there is none.

    Source: BTCPayServer/Payments/PaymentMethodId.cs, v2.4.1.
    """
    matched = re.fullmatch(r"([A-Z]+)(?:[-_]([A-Z]+))?", spelling.strip().upper())
    if matched is None:
        return None
    coin, kind = matched[1], matched[2] or ""
    if kind in _LIGHTNING_KINDS:
        return METHODS.get(f"{coin}-LN")
    return METHODS.get(f"{coin}-CHAIN") if kind in _CHAIN_KINDS else None


def payment_link(method: Method, destination: str, due: Decimal) -> str:
    """What a wallet opens. `due` is in whole coins; nothing is asked for once it is paid."""
    if not destination:
        return ""
    if method.is_lightning:
        return f"lightning:{destination}"
    query = [f"{'tx_amount' if method.coin == 'XMR' else 'amount'}={due.normalize():f}"] if due > 0 else []
    if method.coin == "LBTC":
        query.append(f"assetid={LIQUID_ASSET}")
    return f"{method.scheme}:{destination}" + (f"?{'&'.join(query)}" if query else "")
