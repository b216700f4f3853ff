"""The five ways to pay: what they take, within which limits, and what they give on top."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Final

from app.kernel.errors import AmountOutOfRange, UnknownMethod, UnsupportedCurrency
from app.kernel.money import CURRENCIES, JsonNumber, number, parse_amount

WEEK_MINUTES: Final = 7 * 24 * 60


@dataclass(frozen=True, slots=True)
class Limits:
    """Least and most, both allowed, in the currency's smallest unit (nano-USD for USD)."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Method:
    """One way to pay. `monitor_minutes` is how long after expiry a payment may still confirm."""

    id: str
    display_name: str
    coin: str
    limits: Mapping[str, Limits]
    expires_in_minutes: int
    monitor_minutes: int
    bonus_percent: int = 0

    @property
    def is_lightning(self) -> bool:
        return self.id == "btc-lightning"


def _limits(**given: tuple[str, str]) -> Mapping[str, Limits]:
    return MappingProxyType(
        {
            code: Limits(*(parse_amount(text.encode(), CURRENCIES[code], code) for text in pair))
            for code, pair in given.items()
        }
    )


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        method.id: method
        for method in (
            Method(
                "btc-lightning", "Bitcoin Lightning", "BTC",
                _limits(USD=("0.1", "1000"), BTC=("0.000001", "0.01"), SATS=("100", "1000000")), 15, 24 * 60, bonus_percent=5,
            ),
            Method("btc", "Bitcoin", "BTC", _limits(USD=("10", "10000"), BTC=("0.0001", "0.01")), 60, WEEK_MINUTES),
            Method("ltc", "Litecoin", "LTC", _limits(USD=("2", "1000"), LTC=("0.03", "100")), 60, WEEK_MINUTES),
            Method("lbtc", "Liquid Bitcoin", "LBTC", _limits(USD=("2", "10000"), LBTC=("0.00005", "0.1")), 60, WEEK_MINUTES),
            Method("xmr", "Monero", "XMR", _limits(USD=("5", "10000"), XMR=("0.01", "50")), 60, WEEK_MINUTES),
        )
    }
)  # fmt: skip


# About 1,000 USD each. From there one more block makes a double spend dearer than the prize.
_TWO_CONFIRMATIONS_FROM: Final[Mapping[str, Decimal]] = MappingProxyType(
    {
        "USD": Decimal(1000), "BTC": Decimal("0.01"), "SATS": Decimal(1_000_000), "LTC": Decimal(10),
        "LBTC": Decimal("0.01"), "XMR": Decimal(4),
    }
)  # fmt: skip


def confirmations_asked(method_id: str, amount: Decimal, currency: str) -> int:
    """After how many confirmations a payment counts: none for Lightning; one, or two from about 1,000 USD or in a currency
    we cannot judge. Never none on a chain: an unconfirmed payment can be replaced by its payer."""
    if method_id == "btc-lightning":
        return 0
    threshold = _TWO_CONFIRMATIONS_FROM.get(currency)
    return 1 if threshold is not None and amount < threshold else 2


def method_named(name: str, offered: Collection[str]) -> Method:
    """One of the methods that are offered here. Raises UnknownMethod, naming them."""
    if name not in METHODS or name not in offered:
        there_are = ", ".join(method for method in METHODS if method in offered)
        raise UnknownMethod(f"No payment method {name[:40]!r}; there are {there_are}", param="method")
    return METHODS[name]


def currency_named(text: str) -> str:
    """The currency's one spelling: clients write `sats` and `usd` too."""
    return text.upper() if text.isascii() else text  # some other letters have ASCII ones for their capitals


def checked_amount(method: Method, currency: str, raw: JsonNumber) -> int:
    """The amount in the currency's smallest unit.

    Raises UnsupportedCurrency, InvalidField for what is no amount, AmountOutOfRange with the limits.
    """
    if currency not in method.limits:
        raise UnsupportedCurrency(
            f"{method.display_name} takes {', '.join(method.limits)}, not {currency[:20]!r}", param="currency"
        )
    amount, limits, places = (
        parse_amount(raw, CURRENCIES[currency], "amount"),
        method.limits[currency],
        CURRENCIES[currency].places,
    )
    if not limits.least <= amount <= limits.most:
        least, most = number(limits.least, places), number(limits.most, places)
        raise AmountOutOfRange(
            f"{method.display_name} takes {bytes(least).decode()} to {bytes(most).decode()} {currency},"
            f" got {bytes(number(amount, places)).decode()}",
            param="amount",
            metadata={"min": least, "max": most, "currency": currency},
        )
    return amount
