"""What a call costs, told to the caller with its answer: computed from the prices that the authorize told.

It is Satmeter's arithmetic on Satmeter's lines, for calls whose prices were all told: text in, text out, a fee. Of any
other (cached, audio, image or search tokens, context tiers, prices by attribute) the settle's own answer is waited for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import lcm
from typing import Final

import msgspec

from app.client import Allowed, Cost, PriceOfCall, Usage

_NUSD: Final = 10**9
_MOST_USD: Final = 10**6
"""Of one call; an upstream that says more is not believed."""
_PLACES: Final = 18
"""Of a price with its markup, as Satmeter tells it."""
_KINDS: Final = ("input", "output", "cache_input", "media", "fees")
_PLAIN: Final = frozenset({"input_tokens", "output_tokens", "reasoning_tokens"})


@dataclass(frozen=True, slots=True)
class Facts:
    """What the public catalogue says of a model's prices: whether a few lines can be all of them."""

    has_tiers: bool
    has_attributes: bool
    has_providers: bool
    dimensions: frozenset[str]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, object]]) -> "Facts":
        lines = list(lines)
        return cls(
            any(line["min_input_tokens"] for line in lines), any(line["attributes"] for line in lines),
            len({line["provider"] for line in lines}) > 1, frozenset(str(line["dimension"]) for line in lines),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Costs:
    """The figures of one call in nano-USD; they add up to the total."""

    total_nusd: int
    input_nusd: int = 0
    output_nusd: int = 0
    cache_input_nusd: int = 0
    media_nusd: int = 0
    fees_nusd: int = 0

    @classmethod
    def charged(cls, cost: Cost) -> "Costs":
        """As Satmeter's own answer has them."""
        parts = (cost.input_cost_usd, cost.output_cost_usd, cost.cache_input_cost_usd, cost.media_cost_usd,
                 cost.fees_usd)  # fmt: skip
        return cls(_nusd(cost.total_cost_usd), *(_nusd(part or Decimal(0)) for part in parts))

    def fields(self, latency_ms: float, ttft_ms: float | None) -> bytes:
        """As fields of a usage object, without its braces."""
        told = {
            "input_cost_usd": self.input_nusd, "output_cost_usd": self.output_nusd,
            "cache_input_cost_usd": self.cache_input_nusd, "total_cost_usd": self.total_nusd,
        }  # fmt: skip
        text = ",".join(f'"{name}":{usd_text(amount_nusd)}' for name, amount_nusd in told.items())
        if ttft_ms is not None:
            text += f',"ttft_ms":{ttft_ms:.1f}'
        return f'{text},"latency_ms":{latency_ms:.1f}'.encode()


def told_by(allowed: Allowed, usage: Usage, features: tuple[str, ...], facts: Facts | None) -> Costs | None:
    """What the call costs, None where the authorize's lines are not all that it may be charged by."""
    if facts is None or facts.has_tiers or facts.has_attributes or facts.has_providers or not allowed.prices:
        return None
    if {name for name, count in usage.counts().items() if count} - _PLAIN:
        return None
    if usage.reasoning_tokens and "reasoning" in facts.dimensions:
        return None
    units = {"input": usage.input_tokens or 0, "output": usage.output_tokens or 0, "requests": 1}
    units |= dict.fromkeys(features, 1)
    lines = {line.name: line for line in allowed.prices}
    used = {name: count for name, count in units.items() if count}
    if any(name not in lines for name in used.keys() - {"requests"}) or lines.keys() - units.keys():
        return None
    return _summed([(line, used.get(name, 0)) for name, line in lines.items()])


def _summed(lines: list[tuple[PriceOfCall, int]]) -> Costs:
    """Rounded up once in all; a nano-dollar that the parts lack goes to those with the largest remainders."""
    divisor = lcm(*(line.per_units for line, _ in lines))
    exact = dict.fromkeys(_KINDS, 0)
    for line, units in lines:
        exact[line.kind] += units * int(line.price_usd.scaleb(_PLACES)) * (divisor // line.per_units)
    per_nusd = divisor * 10**_PLACES // _NUSD
    total = -(-sum(exact.values()) // per_nusd)
    parts = {kind: amount // per_nusd for kind, amount in exact.items()}
    order = sorted(_KINDS, key=lambda kind: -(exact[kind] % per_nusd))
    for kind in order[: total - sum(parts.values())]:
        parts[kind] += 1
    return Costs(total, *(parts[kind] for kind in _KINDS))


class _Own(msgspec.Struct):
    cost: Decimal | None = None


def operators_usd(usage: bytes) -> Decimal | None:
    """What a call costs the operator, where its usage says so."""
    try:
        own = msgspec.json.decode(usage, type=_Own, strict=False).cost if b'"cost"' in usage else None
    except msgspec.DecodeError:
        return None
    return own if own is not None and own.is_finite() and 0 <= own < _MOST_USD else None


def usd_text(amount_nusd: int) -> str:
    """Exact, plain: `0.000045`."""
    whole, places = divmod(amount_nusd, _NUSD)
    return f"{whole}.{places:09d}".rstrip("0").rstrip(".")


def _nusd(amount_usd: Decimal) -> int:
    return int(amount_usd * _NUSD)
