"""What a coin costs and how finely a currency divides: rates that stand still until the driver moves them."""

from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal

DEFAULT_RATES: Mapping[str, Decimal] = {
    "BTC_USD": Decimal(65000),
    "LTC_USD": Decimal(80),
    "XMR_USD": Decimal(150),
}
SATOSHIS_PER_BTC = Decimal(100_000_000)
# Source: BTCPayServer.Rating/Currencies.json, v2.4.1.
DECIMALS = {"USD": 2, "EUR": 2, "GBP": 2, "SATS": 0, "BTC": 8, "LTC": 8, "LBTC": 8, "XMR": 12}


class RateBook:
    """The current rates by pair, such as `LTC_USD`; LBTC follows BTC, SATS is a hundred-millionth of it."""

    def __init__(self, rates: Mapping[str, Decimal | None]) -> None:
        self.pairs: dict[str, Decimal | None] = dict(rates)

    def set(self, rates: Mapping[str, Decimal | None]) -> None:
        """Move some pairs. None takes a pair away, as when an exchange does not answer."""
        self.pairs.update({pair.upper(): rate for pair, rate in rates.items()})

    def rate(self, coin: str, currency: str) -> Decimal | None:
        """`currency` per whole `coin`, None where no rule gives it."""
        coin, currency = coin.upper(), currency.upper()
        if coin == currency:
            return Decimal(1)
        direct = f"{coin}_{currency}"
        if direct in self.pairs:
            return self.pairs[direct]
        price, unit = self._in_usd(coin), self._in_usd(currency)
        return price / unit if price and unit else None

    def _in_usd(self, currency: str) -> Decimal | None:
        if currency == "USD":
            return Decimal(1)
        if f"{currency}_USD" in self.pairs:
            return self.pairs[f"{currency}_USD"]
        if currency == "LBTC":
            return self.pairs.get("BTC_USD")
        bitcoin = self.pairs.get("BTC_USD")
        return bitcoin / SATOSHIS_PER_BTC if currency == "SATS" and bitcoin else None


def decimals_of(currency: str) -> int:
    """How many decimals amounts in this currency are shown with."""
    return DECIMALS.get(currency.upper(), 2)


def round_price(price: Decimal, currency: str) -> Decimal:
    """The price as BTCPay keeps it: at the currency's decimals, and finer where that would be 1 % off or more.

    Source: UIInvoiceController.cs (CreateInvoiceCoreRaw) and BTCPayServer.Rating/Extensions.cs, v2.4.1.
    """
    if price == 0:
        return price
    decimals = decimals_of(currency)
    while True:
        rounded = price.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)
        if abs(rounded - price) < price / 100:
            return price if rounded == price else rounded
        decimals += 1
