"""What a call costs: pure arithmetic over an immutable catalogue, exact until one rounding up at the end.

Units: a price is pico-USD (10^-12) per unit; with its markup in parts per million it is atto-USD (10^-18,
`…_ausd`), still a whole number. A cost is nano-USD.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Final, TypeVar

from app.kernel.errors import InvalidField, ModelNotPriced
from app.kernel.money import MAX_NUSD, PUSD_PER_NUSD, charge_nusd, decimal_text, usd_text
from app.pricing.rows import (
    CACHE,
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

AUSD_PER_NUSD: Final = PUSD_PER_NUSD * PPM
D = Dimension
DEFAULT_OUTPUT_TOKENS: Final = 16_384
"""What a call is held for when it does not say how long its answer may be."""
_MADE_OF: Final[Mapping[Dimension, tuple[Dimension, ...]]] = MappingProxyType(
    {D.IMAGES: (D.IMAGE_OUTPUT,), D.PIXELS: (D.IMAGE_OUTPUT,), D.AUDIO_SECONDS: (D.AUDIO_INPUT, D.AUDIO_OUTPUT)}
)
"""The same thing counted in another unit: it is charged once, in the unit that the model is priced by."""


@dataclass(frozen=True, slots=True)
class Call:
    """Which model is called, by whom, and how: `attributes` are quality, size, resolution, service_tier, …"""

    model: str
    provider: str = ""
    account: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """What a call will use at most: what is known of its input, and how long each of `n` answers may be."""

    call: Call
    usage: Usage = field(default_factory=Usage)
    max_output_tokens: int | None = None
    n: int = 1


def by_account(ask: Ask, account: str) -> Ask:
    """The same ask, at what this account pays."""
    return replace(ask, call=replace(ask.call, account=account))


@dataclass(frozen=True, slots=True)
class Line:
    """One price line of a quote, exact: `units` × `list_price_pusd` × `markup_ppm`."""

    kind: Kind
    name: str
    """The dimension, or the feature that a fee is for."""
    units: int
    list_price_pusd: int
    markup_ppm: int = PPM

    @property
    def price_ausd(self) -> int:
        """Atto-USD per unit, after markup."""
        return self.list_price_pusd * self.markup_ppm

    @property
    def amount_ausd(self) -> int:
        return self.units * self.price_ausd

    @property
    def price_pusd(self) -> str:
        """Pico-USD per unit after markup, as an exact decimal."""
        return decimal_text(self.price_ausd, 6)

    @property
    def amount_pusd(self) -> str:
        """Pico-USD, as an exact decimal."""
        return decimal_text(self.amount_ausd, 6)


@dataclass(frozen=True, slots=True)
class Quote:
    """What a call costs, and why. The parts add up to `cost_nusd`."""

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

    def exact_pusd(self) -> dict[str, str]:
        """Each part in pico-USD before any rounding, as exact decimals."""
        return {kind.value: decimal_text(amount, 6) for kind, amount in _by_kind(self.lines).items()}


class Catalogue:
    """An immutable snapshot of one version with the overrides, markups and fees on top of it.

    It knows the whole history, so that a call is priced as of any moment. A look-up is a few dict
    accesses and a bisection, however long the history is.
    """

    __slots__ = (
        "_fees",
        "_imported",
        "_markups",
        "_models",
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

    def price(self, call: Call, usage: Usage, now: datetime) -> Quote:
        """What a call that used this costs, at the prices of `now`.

        Raises ModelNotPriced for a model, a used dimension or a feature without a price.
        """
        prices = self._prices(call, usage.input_tokens, now)
        return self._quoted(prices, self._lines(call, prices, usage), "usage")

    def estimate(self, ask: Ask, now: datetime) -> Quote:
        """What a call may cost at most, for its hold. An image model makes `n` images where it is not said how many.

        Raises ModelNotPriced like `price`, and InvalidField naming the unit that a price is for, if none is told.
        """
        prices = self._prices(ask.call, ask.usage.input_tokens, now)
        usage = _with_output(prices, ask, self._answer_tokens(prices, ask))
        lines = self._lines(ask.call, prices, usage)
        if all(line.kind is Kind.FEES for line in lines) and next(_used(prices, usage), None) is None:
            _must_be_free(prices)
        return self._quoted(prices, lines, "estimate")

    def answer_tokens(self, ask: Ask, now: datetime) -> int:
        """How long each of the `n` answers may be: what was asked or the default, and never more than the model can.

        0 for a model that answers in something else. Raises ModelNotPriced.
        """
        return self._answer_tokens(self._prices(ask.call, ask.usage.input_tokens, now), ask)

    def affordable_output_tokens(self, available_nusd: int, ask: Ask, now: datetime) -> int:
        """How long each of the `n` answers may be for this money, at most as long as was asked.

        0 if even the input cannot be paid. An estimate for this many tokens costs at most `available_nusd`.
        """
        prices = self._prices(ask.call, ask.usage.input_tokens, now)
        asked = self._answer_tokens(prices, ask)

        def amount_ausd(tokens: int) -> int:
            usage = _with_output(prices, ask, tokens)
            return sum(line.amount_ausd for line in self._lines(ask.call, prices, usage))

        left_ausd = available_nusd * AUSD_PER_NUSD - amount_ausd(0)
        if not asked or left_ausd < 0:
            return 0
        each_ausd = amount_ausd(1) - amount_ausd(0)
        return min(asked, left_ausd // each_ausd) if each_ausd else asked

    def models(self) -> list[str]:
        """Every model that may have a price, sorted."""
        return sorted(self._providers)

    def providers_of(self, model: str) -> tuple[str, ...]:
        """Who sells it; the first is taken where a call names none."""
        return self._providers[model]

    def about(self, model: str, provider: str) -> ModelRow:
        return self._models.get((model, provider)) or ModelRow(model, provider)

    def is_known(self, model: str) -> bool:
        return self._resolved(model, "") is not None

    def resolved(self, model: str, provider: str = "") -> tuple[str, str]:
        """Which (model, provider) a call means. Raises ModelNotPriced."""
        found = self._resolved(model, provider.lower())
        if found is None:
            raise ModelNotPriced(f"{model[:200]!r} has no price here, so it is not sold", param="model")
        return found

    def listed(self, model: str, provider: str, now: datetime) -> Iterator[tuple[Dimension, int, str, int]]:
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
            price_pusd = prices.find(dimension)
            if price_pusd is not None:
                yield dimension, tier_min, text, price_pusd * ppm

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

    def _resolved(self, model: str, provider: str) -> tuple[str, str] | None:
        """The named provider's price, else the model's own; `provider/model` also names a provider."""
        if provider:
            for name in (model, f"{provider}/{model}", model.removeprefix(f"{provider}/")):
                if provider in self._providers.get(name, ()):
                    return name, provider
        if model in self._providers:
            return model, self._providers[model][0]
        head, _, tail = model.partition("/")
        return (tail, head.lower()) if head.lower() in self._providers.get(tail, ()) else None

    def _layers(self, model: str, provider: str) -> tuple[Sheet, ...]:
        return (
            self._overrides.get((model, provider), NO_PRICES),
            self._overrides.get((model, ""), NO_PRICES),
            self._imported.get((model, provider), NO_PRICES),
        )

    def _prices(self, call: Call, input_tokens: int, now: datetime) -> Prices:
        model, provider = self.resolved(call.model, call.provider)
        said = {name: value.lower() for name, value in call.attributes.items() if value and value != "auto"}
        attributes = {**self.standard_attributes(model, provider), **said}
        return Prices(model, provider, self._layers(model, provider), attributes, input_tokens, now)

    def _answer_tokens(self, prices: Prices, ask: Ask) -> int:
        """How long one answer may be: what was asked, or the default, and never more than the model can."""
        assert ask.n >= 1
        if ask.max_output_tokens is None and (
            prices.find(D.OUTPUT) is None or any(ask.usage.of(dimension) for dimension in MEDIA)
        ):
            return 0
        wanted = DEFAULT_OUTPUT_TOKENS if ask.max_output_tokens is None else ask.max_output_tokens
        most = self.about(prices.model, prices.provider).max_output_tokens
        return wanted if most is None else min(wanted, most)

    def _lines(self, call: Call, prices: Prices, usage: Usage) -> tuple[Line, ...]:
        markup = self._markup(call.account, prices.model, prices.provider, prices.now)
        lines = [
            Line(kind, dimension.value, units, price_pusd, markup.multiplier_ppm)
            for kind, dimension, units, price_pusd in _used(prices, usage)
        ]
        lines.extend(
            Line(Kind.FEES, feature, 1, self._fee_nusd(feature, prices.now) * PUSD_PER_NUSD)
            for feature in dict.fromkeys(call.features)
        )
        if markup.fixed_per_request_nusd:
            lines.append(Line(Kind.FEES, "request", 1, markup.fixed_per_request_nusd * PUSD_PER_NUSD))
        return tuple(lines)

    def _fee_nusd(self, feature: str, now: datetime) -> int:
        timeline = self._fees.get(feature)
        fee = timeline.at(now) if timeline is not None else None
        if fee is None:
            raise ModelNotPriced(f"The feature {feature[:100]!r} has no price here", param="features")
        return fee.price_nusd

    def _markup(self, account: str, model: str, provider: str, now: datetime) -> MarkupRow:
        """Account before model before provider before default; the first that there is decides alone."""
        named = (
            ("account", account), ("model", f"{provider}/{model}"), ("model", model), ("provider", provider), ("default", "")
        )  # fmt: skip
        for key in named:
            timeline = self._markups.get(key)
            markup = timeline.at(now) if timeline is not None else None
            if markup is not None:
                return markup
        return _NO_MARKUP

    def _quoted(self, prices: Prices, lines: tuple[Line, ...], param: str) -> Quote:
        total_ausd = sum(line.amount_ausd for line in lines)
        # Rounding up to pico first and to nano then is rounding up once: the ceiling of a ceiling is the ceiling.
        cost_nusd = charge_nusd([(1, -(-total_ausd // PPM))])
        if cost_nusd > MAX_NUSD:
            raise InvalidField(
                f"the call would cost {usd_text(cost_nusd)} USD, more than the books can hold", param=param
            )
        parts = _rounded(_by_kind(lines), cost_nusd)
        return Quote(
            self.version_id, prices.model, prices.provider, lines, cost_nusd,
            parts[Kind.INPUT], parts[Kind.OUTPUT], parts[Kind.CACHE_INPUT], parts[Kind.MEDIA], parts[Kind.FEES],
        )  # fmt: skip


_NO_MARKUP: Final = MarkupRow("default", "")
_Used = tuple[Kind, Dimension, int, int]


def _used(prices: Prices, usage: Usage) -> Iterator[_Used]:
    """What was used, in which units, at which price (pico-USD)."""
    media = list(_media(prices, usage))
    yield from media
    covered = {part for _, dimension, _, _ in media for part in _MADE_OF.get(dimension, ())}
    # A model that is sold by the image or the second need have no price for the tokens it counts besides.
    is_sold_by_media = bool(media)
    yield from _tokens(
        prices, usage, D.INPUT, (D.CACHE_READ, D.CACHE_WRITE_5M, D.CACHE_WRITE_1H, D.AUDIO_INPUT, D.IMAGE_INPUT),
        covered, optional=is_sold_by_media,
    )  # fmt: skip
    yield from _tokens(
        prices, usage, D.OUTPUT, (D.REASONING, D.AUDIO_OUTPUT, D.IMAGE_OUTPUT), covered, optional=is_sold_by_media
    )
    if usage.queries:
        yield Kind.FEES, D.QUERIES, usage.queries, prices.must(D.QUERIES)
    if usage.requests and (each_pusd := prices.find(D.REQUESTS)) is not None:
        yield Kind.FEES, D.REQUESTS, usage.requests, each_pusd


def _media(prices: Prices, usage: Usage) -> Iterator[_Used]:
    for dimension in MEDIA:
        units = usage.of(dimension)
        if not units:
            continue
        price_pusd = prices.find(dimension)
        if price_pusd is not None:
            yield Kind.MEDIA, dimension, units, price_pusd
        elif (
            dimension is D.IMAGES
            and not usage.pixels
            and (pixels := _pixels_of_one(prices.attributes))
            and (each_pusd := prices.find(D.PIXELS)) is not None
        ):
            yield Kind.MEDIA, D.PIXELS, units * pixels, each_pusd
        elif not any(usage.of(part) for part in _MADE_OF.get(dimension, ())):
            raise prices.missing(dimension)


def _pixels_of_one(attributes: Mapping[str, str]) -> int:
    """An image's pixels, where its size is said as `1024x1024`; else 0."""
    width, _, height = attributes.get("size", "").partition("x")
    is_size = width.isascii() and height.isascii() and width.isdigit() and height.isdigit()
    return int(width) * int(height) if is_size and len(width) < 7 and len(height) < 7 else 0


def _tokens(
    prices: Prices,
    usage: Usage,
    whole: Dimension,
    parts: tuple[Dimension, ...],
    covered: set[Dimension],
    *,
    optional: bool,
) -> Iterator[_Used]:
    """The tokens of one direction: its parts that are priced apart, and what is left of the whole, never below 0."""
    is_unsold = optional and prices.find(whole) is None
    rest = usage.of(whole)
    for part in parts:
        units = usage.of(part)
        price_pusd = (prices.find(part) if is_unsold else _apart(prices, part)) if units else None
        if part in covered:
            rest -= units
        elif price_pusd is not None:
            rest -= units
            yield Kind.CACHE_INPUT if part in CACHE else Kind(whole.value), part, units, price_pusd
    if rest > 0 and not is_unsold:
        yield Kind(whole.value), whole, rest, prices.must(whole)


def _apart(prices: Prices, part: Dimension) -> int | None:
    """What a part of the tokens costs if it is priced apart. Cached tokens always are, and have their own figure."""
    return prices.cached(part) if part in CACHE else prices.find(part)


def _with_output(prices: Prices, ask: Ask, tokens: int) -> Usage:
    """The ask with answers of this length; if reasoning is dearer than plain output, they are held for as reasoning."""
    total, output_pusd = tokens * ask.n, prices.find(D.OUTPUT)
    reasoning = (prices.find(D.REASONING) or 0) > (output_pusd or 0)
    images = ask.usage.images if output_pusd is not None else _images(prices, ask)
    return replace(ask.usage, output_tokens=total, reasoning_tokens=total if reasoning else 0, images=images)


def _images(prices: Prices, ask: Ask) -> int:
    """How many images a model that answers in no text will make: one for each of the answers, unless it is said.

    Raises InvalidField where they are sold by the pixel and it is not said how large they are.
    """
    if any(ask.usage.of(dimension) for dimension in MEDIA):
        return ask.usage.images
    if prices.sells(D.IMAGES):
        return ask.n
    if not prices.sells(D.PIXELS):
        return 0
    if not _pixels_of_one(prices.attributes):
        raise InvalidField(f"{prices.model[:200]!r} is sold by the pixel: say size as 1024x1024", param="estimate.size")
    return ask.n


_TOLD_IN: Final[Mapping[Dimension, str]] = MappingProxyType(
    {
        D.CHARACTERS: "characters", D.VIDEO_SECONDS: "video_seconds", D.AUDIO_SECONDS: "audio_seconds",
        D.INPUT: "input_tokens", D.IMAGES: "images", D.QUERIES: "queries",
    }
)  # fmt: skip
"""Where an estimate tells how much of something there will be."""


def _must_be_free(prices: Prices) -> None:
    """Raises InvalidField if a model of which no use is foreseen has a price for any: that is not told, not free."""
    sold = [dimension for dimension in Dimension if prices.sells(dimension)]
    for dimension, name in _TOLD_IN.items():
        if dimension in sold:
            raise InvalidField(
                f"{prices.model[:200]!r} is priced by {dimension}: say how many in estimate.{name}",
                param=f"estimate.{name}",
            )
    if sold:
        raise InvalidField(
            f"{prices.model[:200]!r} is priced by {', '.join(sold)}, which an estimate cannot tell: give max_cost_usd",
            param="max_cost_usd",
        )


def _by_kind(lines: Iterable[Line]) -> dict[Kind, int]:
    amounts = dict.fromkeys(Kind, 0)
    for line in lines:
        amounts[line.kind] += line.amount_ausd
    return amounts


def _rounded(exact_ausd: Mapping[Kind, int], total_nusd: int) -> dict[Kind, int]:
    """Parts in nano-USD that add up to the total: each rounded down, then one more to the largest remainders.

    A part that is nothing stays nothing; each is within a nano-dollar of what it is exactly.
    """
    parts = {kind: amount // AUSD_PER_NUSD for kind, amount in exact_ausd.items()}
    missing = total_nusd - sum(parts.values())
    order = sorted(Kind, key=lambda kind: -(exact_ausd[kind] % AUSD_PER_NUSD))
    for kind in order[:missing]:
        assert exact_ausd[kind] % AUSD_PER_NUSD
        parts[kind] += 1
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
        max((price_pusd for _, timeline in variant.tiers for price_pusd in timeline.values()), default=0)
        for layer in layers
        for variants in layer.variants.values()
        for variant in variants
    )
