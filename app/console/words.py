"""Figures and times as a person reads them: dollars exact and with cents, coins with their unit, times in the viewer's zone."""

from datetime import UTC, datetime
from typing import Final

from htpy import Element, span, time

from app.kernel.money import COIN_PLACES, CURRENCIES, decimal_text, usd_text

_COINS: Final = {"BTC": "BTC", "LTC": "LTC", "LBTC": "L-BTC", "XMR": "XMR"}


def dollars(amount_nusd: int) -> str:
    """Exact, and with cents even where they are none: $6.50, -$0.325."""
    whole, _, fraction = usd_text(abs(amount_nusd)).partition(".")
    return f"{'−' if amount_nusd < 0 else ''}${int(whole):,}.{fraction.ljust(2, '0')}"


def about(amount_nusd: int) -> Element:
    """Short, for what is looked at: $12.34, and the exact figure on hover; less than ten cents keeps what it has."""
    exact = dollars(amount_nusd)
    shown = exact if abs(amount_nusd) < 100_000_000 else exact[: exact.index(".") + 3]
    return span(class_="money", title=exact)[shown] if shown != exact else span(class_="money")[exact]


def coins(units: int, coin: str) -> str:
    return f"{decimal_text(units, COIN_PLACES[coin])} {_COINS[coin]}"


def amount(units: int, currency: str) -> str:
    """What was asked for, in the currency that it was asked in."""
    if currency == "USD":
        return dollars(units)
    text = decimal_text(units, CURRENCIES[currency].places)
    return f"{int(text):,} sats" if currency == "SATS" else f"{text} {_COINS[currency]}"


def count(number: int, what: str, many: str = "") -> str:
    """1 call, 2 calls."""
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def moment(when: datetime, *, counts_down: bool = False) -> Element:
    """A time that a script of ours rewrites in the viewer's zone; without it, and on hover, it is UTC."""
    utc = when.astimezone(UTC)
    text = utc.strftime("%Y-%m-%d %H:%M UTC")
    attributes = {"datetime": utc.strftime("%Y-%m-%dT%H:%M:%SZ"), "title": utc.strftime("%Y-%m-%d %H:%M:%S UTC")}
    return time(attributes | ({"data-countdown": True} if counts_down else {"data-local": True}))[text]


def shortened(text: str, keep: int = 8) -> str:
    """A long id by its ends."""
    return text if len(text) <= 2 * keep + 3 else f"{text[:keep]}…{text[-keep:]}"
