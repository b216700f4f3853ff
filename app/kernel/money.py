"""Money as integers: strict text to units, units to exact text, and the few roundings there are.

Books are kept in nano-USD (`…_nusd`), prices in pico-USD per unit (`…_pusd`), coins in their smallest
unit. No float comes near any of them: numbers are read from and written to the raw JSON text.
What a person pays or limits is read strictly; what a program reports of a cost is read as programs write it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Annotated, Final, TypeAlias

import msgspec

from app.kernel.errors import InvalidField

JsonNumber: TypeAlias = msgspec.Raw
"""A number on the wire, kept as its own text, so that no float can come between."""
ReportedNumber: TypeAlias = Annotated[msgspec.Raw, msgspec.Meta(extra={"reported": True})]
"""The same where `reported_usd` reads it."""

NUSD_PER_USD = 1_000_000_000
PUSD_PER_NUSD = 1_000
MAX_NUSD = 10**18
"""A thousand million USD in one amount: a BIGINT holds nine of them, so that no sum of a few overflows."""
MAX_REPORTED_LENGTH: Final = 40

_USD_TEXT = re.compile(r"\d{1,12}(\.\d{1,9})?", re.ASCII)
_PLAIN_NUMBER = re.compile(rb"(\d{1,12})(?:\.(\d{1,9}))?")
_REPORTED_TEXT = re.compile(r"(\d+)(?:\.(\d+))?(?:[eE]([+-]?\d+))?", re.ASCII)
_COIN_TEXT = re.compile(r"\d{1,12}(\.\d{1,8})?", re.ASCII)
_EXACT = Context(prec=60)


@dataclass(frozen=True, slots=True)
class Currency:
    """A currency that amounts are named in: `places` decimals make one smallest unit."""

    code: str
    places: int
    coin: str | None
    """The coin it is paid in, None for USD."""

    @property
    def scale(self) -> int:
        return int(10**self.places)


CURRENCIES = {
    currency.code: currency
    for currency in (
        Currency("USD", 9, None),
        Currency("BTC", 8, "BTC"),
        Currency("SATS", 0, "BTC"),
        Currency("LTC", 8, "LTC"),
        Currency("LBTC", 8, "LBTC"),
        Currency("XMR", 12, "XMR"),
    )
}
COIN_PLACES = {"BTC": 11, "LTC": 8, "LBTC": 8, "XMR": 12}
"""Decimals of a coin's smallest unit as we keep it: BTC in msat, because Lightning pays in them."""


def parse_usd(raw: msgspec.Raw | bytes, field: str) -> int:
    """A JSON number or decimal string in USD, as nano-USD.

    At most 12 ASCII digits before and 9 after the point; no sign, exponent, NaN or underscore.
    Raises InvalidField naming `field`, also for more than the books can hold.
    """
    return _within_the_books(_scaled(_matched(raw, field, _USD_TEXT, 9), 9), field)


def _within_the_books(amount_nusd: int, field: str) -> int:
    if amount_nusd > MAX_NUSD:
        raise InvalidField(f"{field} may be at most {usd_text(MAX_NUSD)} USD, got {usd_text(amount_nusd)}", param=field)
    return amount_nusd


def reported_usd(raw: msgspec.Raw | bytes, field: str, *, down: bool = False) -> int:
    """A cost as a program reports it, in USD, as the nearest nano-USD: one where it was less, but not nothing.

    Any JSON number or decimal text of at most 40 characters is read exactly, whatever its exponent and decimals:
    `4.5e-05` and `0.00032969999999999994` are what `json.dumps` writes for ordinary costs. A half goes to the even one;
    with `down` it is the one below.
    Raises InvalidField naming `field` for what is negative or no number, and for more than the books can hold.
    """
    if plain := _PLAIN_NUMBER.fullmatch(raw):  # nearly every cost is, and need not be rounded
        whole, fraction = plain.groups(b"")
        return _within_the_books(int(whole + fraction.ljust(9, b"0")), field)
    amount, divisor = _reported(_unquoted(raw), field)
    amount_nusd, rest = divmod(amount, divisor)
    if not down and (2 * rest > divisor or (2 * rest == divisor and amount_nusd % 2 == 1)):
        amount_nusd += 1
    return max(1, amount_nusd) if amount else 0


def _reported(text: str, field: str) -> tuple[int, int]:
    """Nano-USD as a fraction, exact but for what is far below one: its exponent may be larger than there is memory for."""
    match = _REPORTED_TEXT.fullmatch(text) if len(text) <= MAX_REPORTED_LENGTH else None
    if match is None:
        raise InvalidField(
            f"{field} must be a number in USD, not negative, of at most {MAX_REPORTED_LENGTH} characters", param=field
        )
    whole, fraction, exponent = match[1], match[2] or "", int(match[3] or 0)
    digits = (whole + fraction).lstrip("0")
    exponent += 9 - len(fraction)
    if not digits:
        return 0, 1
    if len(digits) + exponent <= len(str(MAX_NUSD)):
        amount, divisor = int(digits) * 10 ** max(exponent, 0), 10 ** min(max(-exponent, 0), 60)
        if amount <= MAX_NUSD * divisor:
            return amount, divisor
    raise InvalidField(f"{field} may be at most {usd_text(MAX_NUSD)} USD", param=field)


def parse_amount(raw: msgspec.Raw | bytes, currency: Currency, field: str) -> int:
    """A JSON number or decimal string in `currency`, as its smallest unit (nano-USD for USD)."""
    if currency.coin is None:
        return parse_usd(raw, field)
    text = _matched(raw, field, _COIN_TEXT, 8)
    fraction = text.partition(".")[2].rstrip("0")
    if len(fraction) > currency.places:
        raise InvalidField(f"{field}: {currency.code} has {currency.places} decimals, got {text}", param=field)
    return _scaled(text, currency.places)


def is_given(raw: msgspec.Raw) -> bool:
    """Whether an optional JSON field was there and not null."""
    return len(raw) > 0 and (len(raw) != 4 or bytes(raw) != b"null")


def _matched(raw: msgspec.Raw | bytes, field: str, pattern: re.Pattern[str], places: int) -> str:
    text = _unquoted(raw)
    if not pattern.fullmatch(text):
        raise InvalidField(
            f"{field} must be a decimal number with at most 12 digits before and {places} after the point,"
            " without sign or exponent",
            param=field,
        )
    return text


def _unquoted(raw: msgspec.Raw | bytes) -> str:
    """The text of a JSON number or string; of one that is too long for any amount, its beginning, which is none either."""
    text = bytes(raw)[:64].decode("ascii", "replace")
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text


def _scaled(text: str, places: int) -> int:
    whole, _, fraction = text.partition(".")
    return int(whole + fraction.ljust(places, "0")[:places])


def decimal_text(units: int, places: int) -> str:
    """`units` of 10^-places as a plain exact decimal: no exponent, no trailing zeros."""
    sign, digits = ("-" if units < 0 else ""), str(abs(units)).rjust(places + 1, "0")
    whole, fraction = (digits[:-places], digits[-places:].rstrip("0")) if places else (digits, "")
    return f"{sign}{whole}.{fraction}" if fraction else f"{sign}{whole}"


def usd_text(amount_nusd: int) -> str:
    """Nano-USD as an exact decimal in USD, such as `0.000045`."""
    return _usd(amount_nusd).decode()


def _usd(amount_nusd: int) -> bytes:
    """As decimal_text does it, at half the time: every answer has several."""
    if 0 < amount_nusd < NUSD_PER_USD:  # what nearly every call costs
        return (b"0.%09d" % amount_nusd).rstrip(b"0")
    whole, fraction = divmod(abs(amount_nusd), NUSD_PER_USD)
    text = (b"%d.%09d" % (whole, fraction)).rstrip(b"0") if fraction else b"%d" % whole
    return text if amount_nusd >= 0 else b"-" + text


def usd(amount_nusd: int) -> JsonNumber:
    """Nano-USD as a JSON number."""
    return _ZERO if amount_nusd == 0 else msgspec.Raw(_usd(amount_nusd))


_ZERO: Final = msgspec.Raw(b"0")  # most lines of most costs


def usd_or_null(amount_nusd: int | None) -> JsonNumber:
    return msgspec.Raw(b"null") if amount_nusd is None else usd(amount_nusd)


def number(units: int, places: int) -> JsonNumber:
    """`units` of 10^-places as a JSON number."""
    return msgspec.Raw(decimal_text(units, places).encode())


def charge_nusd(lines: Sequence[tuple[int, int]]) -> int:
    """What a call costs: Σ units × price (pico-USD per unit), rounded up to nano-USD once."""
    return -(-sum(units * price_pusd for units, price_pusd in lines) // PUSD_PER_NUSD)


def share_nusd(amount_nusd: int, percent: int) -> int:
    """`percent` of an amount, rounded down: for bonuses and refunds, which are given."""
    assert amount_nusd >= 0
    return amount_nusd * percent // 100


def worth_nusd(coins: Decimal, usd_per_coin: Decimal) -> int:
    """What `coins` are worth at a rate, in nano-USD, rounded down: for credits."""
    return int(
        _EXACT.multiply(_EXACT.multiply(coins, usd_per_coin), Decimal(NUSD_PER_USD)).to_integral_value(ROUND_FLOOR)
    )


def units_of(amount: Decimal, places: int, *, up: bool = False) -> int:
    """An exact Decimal as integer units of 10^-places, rounded down unless `up`."""
    scaled = _EXACT.scaleb(amount, places)
    return int(scaled.to_integral_value(ROUND_CEILING if up else ROUND_FLOOR))


def decimal_of(units: int, places: int) -> Decimal:
    return Decimal(units).scaleb(-places, _EXACT)
