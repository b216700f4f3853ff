"""What a call costs: pure arithmetic over an immutable catalogue, exact until one rounding up at the end.

Units: a price is pico-USD (10^-12) for so many units; with its markup in parts per million it is atto-USD (10^-18,
`…_ausd`) for as many. Amounts are kept as whole numbers over one common divisor. A cost is nano-USD.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from math import lcm
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
from msgspec.structs import replace

from app.kernel.errors import InvalidField, ModelNotPriced
from app.kernel.money import MAX_NUSD, PUSD_PER_NUSD, decimal_text, usd_text
from app.pricing.axes import input_total
from app.pricing.held import Ask, Call, answers_in_no_tokens, held, must_be_free, with_input
from app.pricing.names import Names
from app.pricing.rows import (
    MEDIA,
    PPM,
    Dimension,
    FeeRow,
    Kind,
    MarkupRow,
    ModelRow,
    PriceRow,
    Usage,
    parse_attributes,
)
from app.pricing.sheet import NO_PRICES, Prices, Sheet, Timeline
from app.pricing.used import Used, used_by

__all__ = ["AUSD_PER_NUSD", "DEFAULT_OUTPUT_TOKENS", "Ask", "Call", "Catalogue", "Line", "Quote"]
AUSD_PER_NUSD: Final = PUSD_PER_NUSD * PPM
D = Dimension
DEFAULT_OUTPUT_TOKENS: Final = 16_384
"""What a call is held for when it does not say how long its answer may be."""


class Line(msgspec.Struct, frozen=True, gc=False):
    """One price line of a quote, exact: `units` × `list_price_pusd` / `per_units` × `markup_ppm`."""

    kind: Kind
    name: str
    """The dimension, or the feature that a fee is for."""
    units: int
    list_price_pusd: int
    markup_ppm: int = PPM
    per_units: int = 1

    @property
    def amount_ausd(self) -> int:
        """Atto-USD after markup, of which `per_units` make one."""
        return self.units * self.list_price_pusd * self.markup_ppm

    @property
    def price_pusd(self) -> str:
        """Pico-USD per unit after markup, exact."""
        return exact_text(Fraction(self.list_price_pusd * self.markup_ppm, self.per_units * PPM))

    @property
    def amount_pusd(self) -> str:
        """Pico-USD, exact."""
        return exact_text(Fraction(self.amount_ausd, self.per_units * PPM))


def exact_text(amount: Fraction) -> str:
    """As a decimal where it is one, else as a fraction, such as `215000000/3`."""
    twos_and_fives = amount.denominator
    for prime in (2, 5):
        while twos_and_fives % prime == 0:
            twos_and_fives //= prime
    if twos_and_fives != 1:
        return str(amount)
    places = amount.denominator.bit_length()
    return decimal_text(int(amount * 10**places), places)


def rounded_text(amount: Fraction, places: int) -> str:
    """As a decimal, rounded up in its last place where it has no end: of a price for a minute, what a second costs."""
    return decimal_text(-(-amount.numerator * 10**places // amount.denominator), places)


class Quote(msgspec.Struct, frozen=True):
    """What a call costs, and why. The parts add up to `cost_nusd`.

    `flags` say what was assumed, and `unpriced` what was used and has no price, which is in no line.
    """

    version_id: int
    model: str
    provider: str
    lines: tuple[Line, ...]
    cost_nusd: int
    input_nusd: int
    output_nusd: int
    cache_input_nusd: int
    media_nusd: int
    fees_nusd: int
    flags: tuple[str, ...] = ()
    unpriced: tuple[str, ...] = ()

    @property
    def divisor(self) -> int:
        """The least number that the units of every price go into."""
        return lcm(*[line.per_units for line in self.lines])

    def exact_pusd(self) -> dict[str, str]:
        """Each part in pico-USD before any rounding, exact."""
        amounts, divisor = _by_kind(self.lines)
        return {kind.value: exact_text(Fraction(amount, divisor * PPM)) for kind, amount in amounts.items()}


class Catalogue:
    """An immutable snapshot of one version with the overrides, markups and fees on top of it.

    It knows the whole history, so that a call is priced as of any moment. A look-up is a few dict
    accesses and a bisection, however long the history is.
    """

    __slots__ = (
        "_fees",
        "_imported",
        "_kept",
        "_markups",
        "_models",
        "_names",
        "_overrides",
        "_providers",
        "created",
        "revision",
        "version_id",
    )

    def __init__(
        self,
        version_id: int,
        prices: Iterable[PriceRow],
        *,
        overrides: Iterable[PriceRow] = (),
        models: Iterable[ModelRow] = (),
        markups: Iterable[MarkupRow] = (),
        fees: Iterable[FeeRow] = (),
        revision: int = 0,
        created: int = 0,
    ) -> None:
        self.version_id, self.revision, self.created = version_id, revision, created
        self._imported = _sheets(prices)
        self._overrides = _sheets(overrides)
        self._models = {(row.model, row.provider): row for row in models}
        self._markups = _timelines(((row.scope, row.subject), row) for row in markups)
        self._fees = _timelines((row.feature, row) for row in fees)
        self._providers = self._providers_of_models()
        self._kept: dict[tuple[Any, ...], _Kept] = {}
        self._names = Names(self._providers, {key: row.match for key, row in self._models.items() if row.match})

    def price(self, call: Call, usage: Usage, now: datetime) -> Quote:
        """What a call that used this costs, at the prices of `now`.

        Raises ModelNotPriced for a model, a used dimension or a feature without a price.
        """
        prices = self._prices(call, usage, now)
        bill = self._bill(call, prices, used_by(prices, usage), now)
        if bill.used.unpriced:
            raise prices.missing(bill.used.unpriced[0])
        return self._quoted(prices, bill, "usage")

    def price_known(self, call: Call, usage: Usage, now: datetime) -> Quote:
        """What of the call has a price; what has none is named in `unpriced`. Raises ModelNotPriced for an unknown model."""
        prices = self._prices(call, usage, now)
        unknown = [each for each in call.features if not self._has_fee(each, now)]
        if unknown:
            call = replace(call, features=tuple(each for each in call.features if each not in unknown))
        bill = self._bill(call, prices, used_by(prices, usage), now)
        quote = self._quoted(prices, bill, "usage")
        if not bill.used.unpriced and not unknown:
            return quote
        return replace(quote, unpriced=(*(each.value for each in bill.used.unpriced), *unknown))

    def estimate(self, ask: Ask, now: datetime) -> Quote:
        """What a call may cost at most, for its hold. An image model makes `n` images where it is not said how many.

        Raises ModelNotPriced like `price`, and InvalidField naming the unit that a price is for, if none is told.
        """
        prices = self._prices(ask.call, ask.usage, now, most=True)
        used = held(prices, ask, self._answer_tokens(prices, ask))
        if not used.lines:
            must_be_free(prices)
        return self._quoted(prices, self._dearest_bill(prices, ask, used, now), "estimate")

    def answer_tokens(self, ask: Ask, now: datetime) -> int:
        """How long each of the `n` answers may be: what was asked or the default, and never more than the model can.

        0 for a model that answers in something else. Raises ModelNotPriced.
        """
        return self._answer_tokens(self._prices(ask.call, ask.usage, now, most=True), ask)

    def affordable_output_tokens(self, available_nusd: int, ask: Ask, now: datetime) -> int:
        """How long each of the `n` answers may be for this money, at most as long as was asked.

        0 if even the input cannot be paid. An estimate for this many tokens costs at most `available_nusd`.
        """
        prices = self._prices(ask.call, ask.usage, now, most=True)

        def is_paid(tokens: int) -> bool:
            bill = self._dearest_bill(prices, ask, held(prices, ask, tokens), now)
            return bill.amount_ausd <= available_nusd * AUSD_PER_NUSD * bill.divisor

        enough, too_many = 0, self._answer_tokens(prices, ask) + 1
        if is_paid(too_many - 1):
            return too_many - 1
        while too_many - enough > 1:  # is_paid(enough) or enough is 0, and not is_paid(too_many)
            middle = (enough + too_many) // 2
            enough, too_many = (middle, too_many) if is_paid(middle) else (enough, middle)
        return enough

    def is_beyond(self, quote: Quote, usage: Usage) -> bool:
        """Whether an answer is longer than the catalogue says that the model's can be."""
        most = self.about(quote.model, quote.provider).max_output_tokens
        return most is not None and usage.output_tokens > most

    def models(self) -> list[str]:
        """Every model that may have a price, sorted."""
        return sorted(self._providers)

    def providers_of(self, model: str) -> tuple[str, ...]:
        """Who sells it; the first is taken where a call names none."""
        return self._providers[model]

    def about(self, model: str, provider: str) -> ModelRow:
        return self._models.get((model, provider)) or ModelRow(model, provider)

    def is_known(self, model: str, provider: str = "") -> bool:
        return self._names.found(model, provider) is not None

    def resolved(self, model: str, provider: str = "") -> tuple[str, str]:
        """Which (model, provider) a call means. Raises ModelNotPriced."""
        found = self._names.found(model, provider)
        if found is None:
            raise ModelNotPriced(f"{model[:200]!r} has no price here, so it is not sold", param="model")
        return found.model, found.provider

    def is_provider_assumed(self, model: str, provider: str) -> bool:
        """Whether the named provider has no price for it, so that another's is taken."""
        found = self._names.found(model, provider) if provider else None
        return found is not None and found.is_assumed

    def listed(self, model: str, provider: str, now: datetime) -> Iterator[tuple[Dimension, int, str, Fraction]]:
        """Dimension, tier_min, attributes and atto-USD per unit, as a caller without an agreement of its own pays."""
        layers = self._layers(model, provider)
        ppm = self._markup("", model, provider, now).multiplier_ppm
        seen = {
            (dimension, variant.text, tier_min)
            for layer in layers
            for dimension, variants in layer.variants.items()
            for variant in variants
            for tier_min, timeline in variant.tiers
            if timeline.at(now) is not None
        }
        for dimension, text, tier_min in sorted(seen, key=lambda key: (list(Dimension).index(key[0]), *key[1:])):
            prices = Prices(model, provider, layers, parse_attributes(text), tier_min, now)
            price = prices.find(dimension)
            if price is not None:
                yield dimension, tier_min, text, Fraction(price[0] * ppm, price[1])

    def standard_attributes(self, model: str, provider: str) -> Mapping[str, str]:
        return parse_attributes(self.about(model, provider).default_attributes)

    def fees(self, now: datetime) -> dict[str, int]:
        """What each feature costs for one request, in nano-USD."""
        found = ((feature, timeline.at(now)) for feature, timeline in sorted(self._fees.items()))
        return {feature: fee.price_nusd for feature, fee in found if fee is not None}

    def _providers_of_models(self) -> dict[str, tuple[str, ...]]:
        """The dearest provider first: where a call names none, nobody is charged too little."""
        found: dict[str, list[str]] = defaultdict(list)
        for model, provider in self._imported:
            found[model].append(provider)
        for model, provider in self._overrides:
            if provider not in found[model] and (provider or not found[model]):
                found[model].append(provider)
        return {
            model: tuple(sorted(providers, key=lambda provider: (-_dearness(self._layers(model, provider)), provider)))
            for model, providers in found.items()
        }

    def _layers(self, model: str, provider: str) -> tuple[Sheet, ...]:
        return (
            self._overrides.get((model, provider), NO_PRICES),
            self._overrides.get((model, ""), NO_PRICES),
            self._imported.get((model, provider), NO_PRICES),
        )

    def _prices(self, call: Call, usage: Usage, now: datetime, *, most: bool = False) -> Prices:
        """The price list of a call. Of a model whose prices never changed it is kept, one for each context tier."""
        key = (call.model, call.provider, most, *call.attributes.items())
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) >= _KEPT_LISTS:
                self._kept.clear()
            kept = self._kept[key] = self._list_of(call, now, most)
        if not kept.is_timeless:
            return kept.prices.at(input_total(usage), now)
        tier = bisect_right(kept.tiers, input_total(usage)) if kept.tiers else 0
        found = kept.by_tier.get(tier)
        if found is None:
            found = kept.by_tier[tier] = kept.prices.at(input_total(usage), now)
        return found

    def _list_of(self, call: Call, now: datetime, most: bool) -> "_Kept":
        model, provider = self.resolved(call.model, call.provider)
        about = self.about(model, provider)
        attributes = parse_attributes(about.default_attributes)
        for name, value in call.attributes.items():
            if value and (said := value.lower()) != "auto":
                attributes[name] = said
        layers = self._layers(model, provider)
        prices = Prices(model, provider, layers, attributes, 0, now, mode=about.mode, most=most)
        tiers = tuple(sorted({tier_min for layer in layers for tier_min in layer.tiers}))
        return _Kept(prices, tiers, all(layer.is_timeless for layer in layers))

    def _answer_tokens(self, prices: Prices, ask: Ask) -> int:
        """How long one answer may be: what was asked, or the default, and never more than the model can."""
        assert ask.n >= 1
        most = self.about(prices.model, prices.provider).max_output_tokens
        if ask.max_output_tokens is None and (
            answers_in_no_tokens(prices, most) or any(ask.usage.of(dimension) for dimension in MEDIA)
        ):
            return 0
        wanted = DEFAULT_OUTPUT_TOKENS if ask.max_output_tokens is None else ask.max_output_tokens
        return wanted if most is None else min(wanted, most)

    def _dearest_bill(self, prices: Prices, ask: Ask, used: Used, now: datetime) -> "_Bill":
        """The dearest that a call may cost which turns out shorter too: a context tier may be cheaper than that below it."""
        best = self._bill(ask.call, prices, used, now)
        input_tokens = input_total(ask.usage)
        for tier_min in {tier_min for layer in prices.layers for tier_min in layer.tiers}:
            if tier_min <= input_tokens:
                shorter = held(prices.at(tier_min - 1, now), with_input(ask, tier_min - 1), used.answer_tokens)
                bill = self._bill(ask.call, prices, shorter, now)
                if bill.amount_ausd * best.divisor > best.amount_ausd * bill.divisor:
                    best = bill
        return best

    def _bill(self, call: Call, prices: Prices, used: Used, now: datetime) -> "_Bill":
        markup = self._markup(call.account, prices.model, prices.provider, now)
        ppm = markup.multiplier_ppm
        lines = [
            Line(kind, dimension._value_, units, price[0], ppm, price[1])  # read at a fraction of `value`'s time
            for kind, dimension, units, price in used.lines
        ]
        if call.features:
            lines.extend(
                Line(Kind.FEES, feature, 1, self._fee_nusd(feature, now) * PUSD_PER_NUSD)
                for feature in dict.fromkeys(call.features)
            )
        if markup.fixed_per_request_nusd:
            lines.append(Line(Kind.FEES, "request", 1, markup.fixed_per_request_nusd * PUSD_PER_NUSD))
        return _Bill(used, tuple(lines), *_by_kind(lines))

    def _has_fee(self, feature: str, now: datetime) -> bool:
        timeline = self._fees.get(feature)
        return timeline is not None and timeline.at(now) is not None

    def _fee_nusd(self, feature: str, now: datetime) -> int:
        timeline = self._fees.get(feature)
        fee = timeline.at(now) if timeline is not None else None
        if fee is None:
            raise ModelNotPriced(f"The feature {feature[:100]!r} has no price here", param="features")
        return fee.price_nusd

    def _markup(self, account: UUID | str, model: str, provider: str, now: datetime) -> MarkupRow:
        """Account before model before provider before default; the first that there is decides alone."""
        if not self._markups:
            return _NO_MARKUP
        named = (
            ("account", str(account)), ("model", f"{provider}/{model}"), ("model", model), ("provider", provider), ("default", "")
        )  # fmt: skip
        for key in named:
            timeline = self._markups.get(key)
            markup = timeline.at(now) if timeline is not None else None
            if markup is not None:
                return markup
        return _NO_MARKUP

    def _quoted(self, prices: Prices, bill: "_Bill", param: str) -> Quote:
        cost_nusd = -(-bill.amount_ausd // (AUSD_PER_NUSD * bill.divisor))
        if cost_nusd > MAX_NUSD:
            raise InvalidField(
                f"the call would cost {usd_text(cost_nusd)} USD, more than the books can hold", param=param
            )
        of_input, of_output, of_cache, of_media, of_fees = _rounded(
            [*bill.amounts_ausd.values()], AUSD_PER_NUSD * bill.divisor, cost_nusd
        )
        return Quote(
            self.version_id, prices.model, prices.provider, bill.lines, cost_nusd,
            of_input, of_output, of_cache, of_media, of_fees, tuple(bill.used.flags),
        )  # fmt: skip


_NO_MARKUP: Final = MarkupRow("default", "")
_KEPT_LISTS: Final = 4096


@dataclass(frozen=True, slots=True)
class _Kept:
    """What calls that are made alike have in common: where their model's tiers begin, and its prices in each of them."""

    prices: Prices
    tiers: tuple[int, ...]
    is_timeless: bool
    by_tier: dict[int, Prices] = field(default_factory=dict)


class _Bill(msgspec.Struct, frozen=True):
    """The lines of a call, and what each kind of them comes to in atto-USD, of which `divisor` make one."""

    used: Used
    lines: tuple[Line, ...]
    amounts_ausd: Mapping[Kind, int]
    divisor: int

    @property
    def amount_ausd(self) -> int:
        return sum(self.amounts_ausd.values())


def _by_kind(lines: Iterable[Line]) -> tuple[dict[Kind, int], int]:
    """What the lines of each kind come to, and by how much that is to be divided: the least that all are whole in."""
    amounts, divisor = dict.fromkeys(_KINDS, 0), 1
    for line in lines:
        if divisor % line.per_units:
            more = lcm(divisor, line.per_units) // divisor
            amounts, divisor = {kind: amount * more for kind, amount in amounts.items()}, divisor * more
        amounts[line.kind] += line.amount_ausd * (divisor // line.per_units)
    return amounts, divisor


_KINDS: Final = tuple(Kind)  # an enumeration takes its time to be gone through; a quote has its figures in this order


def _rounded(exact: Sequence[int], per_nusd: int, total_nusd: int) -> list[int]:
    """Parts in nano-USD that add up to the total: each rounded down, then one more to the largest remainders.

    A part that is nothing stays nothing; each is within a nano-dollar of what it is exactly.
    """
    parts = [amount // per_nusd for amount in exact]
    if missing := total_nusd - sum(parts):
        order = sorted(range(len(exact)), key=lambda place: -(exact[place] % per_nusd))
        for place in order[:missing]:
            assert exact[place] % per_nusd
            parts[place] += 1
    return parts


def _sheets(rows: Iterable[PriceRow]) -> dict[tuple[str, str], Sheet]:
    grouped: dict[tuple[str, str], list[PriceRow]] = defaultdict(list)
    for row in rows:
        grouped[row.model, row.provider].append(row)
    return {key: Sheet(group) for key, group in grouped.items()}


_K = TypeVar("_K")
_R = TypeVar("_R", MarkupRow, FeeRow)


def _timelines(rows: Iterable[tuple[_K, _R]]) -> dict[_K, Timeline[_R]]:
    grouped: dict[_K, list[tuple[datetime, datetime | None, _R]]] = defaultdict(list)
    for key, row in rows:
        grouped[key].append((row.effective_from, row.effective_to, row))
    return {key: Timeline(periods) for key, periods in grouped.items()}


def _dearness(layers: tuple[Sheet, ...]) -> int:
    """How dear a provider is, to put providers in an order: the sum of its highest prices so far."""
    return sum(
        max((price[0] // price[1] for _, timeline in variant.tiers for price in timeline.values()), default=0)
        for layer in layers
        for variants in layer.variants.values()
        for variant in variants
    )
