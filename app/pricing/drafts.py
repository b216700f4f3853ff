"""A price file on its way to rows of ours: what of it became a price, what did not, and why."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any, Final, TypeAlias

from app.kernel.errors import InvalidField
from app.pricing.rows import Dimension, FeeRow, ModelRow, PriceRow, attributes_text, parse_attributes

MILLION: Final = 10**6
INCLUSIVE: Final = frozenset({"xai", "x-ai"})
"""Whose longer tier begins at its threshold; everybody else's begins one token above. Source: xAI, "Models and pricing"."""
_LEAST_TEN_SECONDS: Final = frozenset({"whisper-large-v3", "whisper-large-v3-turbo", "distil-whisper-large-v3-en"})
"""Groq's. Source: Groq, "Speech to text": "Minimum billed length: 10 seconds"; no price file has a field for it."""
_PUSD_PER_USD: Final = 10**12
_MAX_PUSD: Final = 10**18
_MAX_UNITS: Final = 10**18
_MAX_TOKENS: Final = 10**12
_NAME_CHARS: Final = 500
_DIGITS_OF_A_QUOTIENT: Final = 10
_SHORT: Final = Context(prec=6)
_OWN_UNITS: Final = (60, 3600, 1000, 9, 7)
Number: TypeAlias = Decimal | int
_Row: TypeAlias = tuple[str, str, Dimension, int, str, datetime]


@dataclass(slots=True)
class Report:
    """What an import did not take over as it stood. Models are counted, not fields."""

    unknown_fields: Counter[str] = field(default_factory=Counter)
    """Fields that nobody here knows. If one may be a price, its models are left out."""
    extras: Counter[str] = field(default_factory=Counter)
    """Prices of what is paid beside a call and no usage counts: a fee can ask for them."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why, and how often, a single price was left out."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Models that cannot be priced right, and why."""
    rounded: list[str] = field(default_factory=list)
    """Prices finer than can be kept, which were rounded up."""
    doubled: list[str] = field(default_factory=list)
    """Prices given twice, of which the dearer was taken."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A price file as rows of ours."""

    format: str
    source_hash: str
    prices: tuple[PriceRow, ...]
    models: tuple[ModelRow, ...]
    fees: tuple[FeeRow, ...]
    report: Report


class BrokenEntry(InvalidField):
    """An entry of the price file cannot be read."""


class NotUnderstood(Exception):
    """A model has a price that we cannot charge right, so it is not sold."""


@contextmanager
def entry(name: Any) -> Iterator[None]:
    """Whatever is wrong with an entry is the file's mistake, told with the entry's name."""
    try:
        yield
    except (BrokenEntry, NotUnderstood):
        raise
    except KeyError as error:
        raise _broken(name, f"it has no {str(error)[:50]}") from None
    except InvalidField as error:
        raise _broken(name, error.message) from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        raise _broken(name, f"{type(error).__name__}: {str(error)[:200]}") from None


def _broken(name: Any, what: str) -> BrokenEntry:
    return BrokenEntry(f"the price file cannot be read at {str(name)[:100]!r}: {what}", param="file")


class Gathered:
    """Rows while they are being gathered, and what happened to them."""

    def __init__(self) -> None:
        self.report = Report()
        self.fees: list[FeeRow] = []
        self._prices: dict[tuple[str, str], dict[_Row, PriceRow]] = defaultdict(dict)
        self._models: dict[tuple[str, str], ModelRow] = {}

    @contextmanager
    def model(self, row: ModelRow) -> Iterator[None]:
        """Read one model. One that has a price that is not understood has none at all afterwards, and is named."""
        named = f"{row.provider}/{row.model}" if row.provider else row.model
        self._add_model(row)
        before = dict(self._prices[row.model, row.provider])
        try:
            yield
            if row.provider == "groq" and row.model.rsplit("/", 1)[-1] in _LEAST_TEN_SECONDS:
                raise NotUnderstood("it charges for ten seconds at least")
        except NotUnderstood as error:
            self._prices[row.model, row.provider] = before
            self.report.left_out[named] = str(error)

    def _add_model(self, row: ModelRow) -> None:
        """Raises InvalidField for a name that no database keeps."""
        for name in (row.model, row.provider, row.mode):
            if not name.isprintable() or len(name) > _NAME_CHARS:
                raise InvalidField(f"a name is at most {_NAME_CHARS} printable characters", param="file")
        known = self._models.setdefault((row.model, row.provider), row)
        if known.max_output_tokens is None and row.max_output_tokens is not None:
            self._models[row.model, row.provider] = row

    def add(self, row: PriceRow, price_usd: Any, per: int = 1, *, is_free_told: bool = False) -> None:
        """Add `price_usd` for `per` units under the name that `row` gives, or report why not.

        A price of nothing often means "not known", and is taken over only with `is_free_told`.
        """
        if not 0 <= row.tier_min <= _MAX_TOKENS:
            raise InvalidField(f"a tier begins at 0 to {_MAX_TOKENS} tokens, got {row.tier_min}", param="file")
        reason = None if is_free_told and price_usd == 0 else unfit(price_usd)
        if reason is None:
            price_pusd, per_units, is_exact = kept(price_usd, per)
            reason = "beyond what a price can be" if price_pusd > _MAX_PUSD else None
        if reason is not None:
            self.report.skipped[reason] += 1
            return
        named = f"{row.model} {row.dimension} {price_usd}/{per}"
        if not is_exact:
            self.report.rounded.append(named)
        self._put(replace(row, price_pusd=price_pusd, per_units=per_units), named)

    def multiplied(
        self, model: str, provider: str, by: Number, dimensions: frozenset[Dimension], **attributes: str
    ) -> None:
        """Every price of these dimensions once more, `by` so much, for calls with these attributes as well."""
        factor = Fraction(by)
        for row in list(self._prices[model, provider].values()):
            if row.dimension in dimensions and not attributes.keys() & parse_attributes(row.attributes).keys():
                exact = Fraction(row.price_pusd, row.per_units) * factor
                self._put(
                    replace(
                        with_attributes(row, **attributes), price_pusd=exact.numerator, per_units=exact.denominator
                    ),
                    "",
                )

    def copied(self, alias: ModelRow, model: str) -> bool:
        """Sell a model under another name too. False if it is not sold."""
        prices = self._prices.get((model, alias.provider))
        known = self._models.get((model, alias.provider))
        if not prices or known is None:
            return False
        self._add_model(replace(known, model=alias.model))
        for row in list(prices.values()):
            self._put(replace(row, model=alias.model), "")
        return True

    def prices_of(self, model: str, provider: str) -> list[PriceRow]:
        return list(self._prices[model, provider].values())

    def draft(self, name: str, source_hash: str) -> Draft:
        models = tuple(row for key, row in self._models.items() if self._prices.get(key))
        prices = tuple(row for rows in self._prices.values() for row in rows.values())
        return Draft(name, source_hash, prices, models, tuple(self.fees), self.report)

    def _put(self, row: PriceRow, named: str) -> None:
        prices = self._prices[row.model, row.provider]
        key = (row.model, row.provider, row.dimension, row.tier_min, row.attributes, row.effective_from)
        before = prices.get(key)
        same = before is not None and before.price_pusd * row.per_units == row.price_pusd * before.per_units
        if before is not None and not same:
            self.report.doubled.append(named)
        if before is None or before.price_pusd * row.per_units < row.price_pusd * before.per_units:
            prices[key] = row


def unfit(price_usd: Any) -> str | None:
    """Why a value can be no price of ours, None if it can."""
    if isinstance(price_usd, bool) or not isinstance(price_usd, Decimal | int):
        return "not a number"
    if price_usd < 0:
        return "negative"
    if price_usd == 0:
        return "a price of nothing"
    return "beyond what a price can be" if abs(Decimal(price_usd).adjusted()) > 30 else None


def kept(price_usd: Number, per: int) -> tuple[int, int, bool]:
    """A price as whole pico-USD for so many units, and whether that is exact: for one unit, or for its own."""
    price, per = _own_unit(price_usd, per)
    exact = price * _PUSD_PER_USD / per
    if exact.denominator == 1:
        return exact.numerator, 1, True
    of_all = price * _PUSD_PER_USD
    units = per * of_all.denominator
    if of_all.numerator <= _MAX_PUSD and units <= _MAX_UNITS:
        return of_all.numerator, units, True
    return -(-exact.numerator // exact.denominator), 1, False


def _own_unit(price_usd: Number, per: int) -> tuple[Fraction, int]:
    """What a file has divided, in the unit that it was divided by: 0.0005666666666666667 is 0.034 for 60."""
    digits = len(Decimal(price_usd).normalize().as_tuple().digits)
    price = Fraction(price_usd)
    if digits < _DIGITS_OF_A_QUOTIENT:
        return price, per
    for units in _OWN_UNITS:
        whole = Fraction(_SHORT.multiply(Decimal(price_usd), Decimal(units)))
        if abs(whole - price * units) * 10 ** (digits - 1) <= whole:
            return whole, per * units
    return price, per


def with_attributes(row: PriceRow, **attributes: str) -> PriceRow:
    """Raises InvalidField for a value that has no canonical text, which no catalogue could load."""
    wanted = parse_attributes(row.attributes) | {name: value.lower() for name, value in attributes.items()}
    text = attributes_text(wanted)
    if parse_attributes(text) != wanted:
        raise InvalidField(f"{text[:100]!r} cannot be an attribute", param="attributes")
    return replace(row, attributes=text)


def whole(value: Any) -> int | None:
    is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    return int(value) if is_number and 0 <= value <= _MAX_TOKENS else None


def tier_above(tokens: int, provider: str) -> int:
    """The least input that a price above so many tokens is for."""
    return tokens if provider in INCLUSIVE else tokens + 1
