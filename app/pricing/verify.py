"""Calls whose cost is known, priced again and compared: a provider's bill against the catalogue, one JSON object a line.

{"model": "gpt-4o", "usage": {"input_tokens": 10, …}, "cost_usd": "0.000025"} and, where they matter, provider, attributes,
features, and `at`, when it was. A line that cannot be read or priced is told with its number; none is passed over.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from math import ceil
from typing import Any, Final

from app.kernel.errors import InvalidField, ModelNotPriced
from app.kernel.money import MAX_NUSD
from app.pricing.quote import Call, Catalogue, Quote
from app.pricing.rows import Usage

_COUNTS: Final = frozenset(Usage.__struct_fields__)
_KNOWN: Final = frozenset({"model", "provider", "usage", "attributes", "features", "cost_usd", "at"})
_NUSD_PER_USD: Final = 10**9


@dataclass(frozen=True, slots=True)
class Difference:
    """A call that the catalogue does not price as it was billed. `kinds` are the dimensions that it was charged for."""

    line: int
    model: str
    kinds: tuple[str, ...]
    billed_nusd: int
    priced_nusd: int
    flags: tuple[str, ...]


@dataclass(slots=True)
class Verified:
    """What became of the lines: so many agree, and these do not or could not be priced."""

    agreed: int = 0
    differences: list[Difference] = field(default_factory=list)
    unpriced: list[tuple[int, str]] = field(default_factory=list)

    @property
    def lines(self) -> int:
        return self.agreed + len(self.differences) + len(self.unpriced)

    def by_model_and_kind(self) -> dict[tuple[str, str], tuple[int, int, int]]:
        """How many differ, and the sums that were billed and priced, in nano-USD."""
        found: dict[tuple[str, str], tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
        for each in self.differences:
            key = each.model, "+".join(each.kinds)
            count, billed, priced = found[key]
            found[key] = count + 1, billed + each.billed_nusd, priced + each.priced_nusd
        return dict(sorted(found.items(), key=lambda item: -abs(item[1][2] - item[1][1])))


def verified(catalogue: Catalogue, raw: bytes) -> Verified:
    """Price every line of a file, as of its own moment or now."""
    found, now = Verified(), datetime.now(UTC)
    for number, line in _lines(raw):
        try:
            billed_nusd, quote = _priced(catalogue, line, now)
        except (InvalidField, ModelNotPriced) as error:
            found.unpriced.append((number, error.message))
            continue
        if quote.cost_nusd == billed_nusd:
            found.agreed += 1
        else:
            kinds = tuple(dict.fromkeys(each.name for each in quote.lines))
            found.differences.append(Difference(number, quote.model, kinds, billed_nusd, quote.cost_nusd, quote.flags))
    return found


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(raw.splitlines(), 1) if line.strip())


def _priced(catalogue: Catalogue, line: bytes, now: datetime) -> tuple[int, Quote]:
    """What a line says that the call cost, rounded up to a nano-dollar, and what it costs here. Raises InvalidField."""
    told = _object(line)
    if unknown := sorted(told.keys() - _KNOWN):
        raise InvalidField(
            f"{', '.join(unknown)[:200]} is not known; there are {', '.join(sorted(_KNOWN))}", param="usage"
        )
    call = Call(
        str(told.get("model", "")), str(told.get("provider") or ""), attributes=_words(told.get("attributes")),
        features=tuple(map(str, told.get("features") or ())),
    )  # fmt: skip
    moment = datetime.fromisoformat(told["at"]) if isinstance(told.get("at"), str) else now
    billed = _nusd(told.get("cost_usd"))
    return billed, catalogue.price(
        call, _usage(told.get("usage")), moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    )


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        told = json.loads(line, parse_float=Decimal)
    except (ValueError, RecursionError):
        raise InvalidField("the line is not JSON", param="usage") from None
    if not isinstance(told, dict):
        raise InvalidField("the line is no object", param="usage")
    return told


def _words(told: Any) -> dict[str, str]:
    return (
        {str(name): str(value) for name, value in told.items() if value is not None} if isinstance(told, dict) else {}
    )


def _usage(told: Any) -> Usage:
    if not isinstance(told, dict):
        raise InvalidField("usage is an object of counts", param="usage")
    if unknown := sorted(told.keys() - _COUNTS):
        raise InvalidField(f"no usage counts {', '.join(unknown)[:200]}", param="usage")
    counts = {name: _count(name, value) for name, value in told.items() if value is not None}
    return Usage(**counts)


def _count(name: str, value: Any) -> int:
    is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 10**12:
        raise InvalidField(f"{name} is a count, got {str(value)[:50]}", param=name)
    rounded_up: int = ceil(value)
    return rounded_up


def _nusd(told: Any) -> int:
    try:
        exact = Decimal(str(told)) * _NUSD_PER_USD
    except InvalidOperation:
        exact = Decimal(-1)
    if not exact.is_finite() or not 0 <= exact <= MAX_NUSD:
        raise InvalidField(f"cost_usd is what the call cost, got {str(told)[:50]}", param="cost_usd")
    return ceil(exact)


def shown(found: Verified, most: int = 40) -> Iterable[str]:
    """For people: how many agree, then the differences by model and kind, the largest sum first, and what had no price."""
    yield f"{found.agreed} of {found.lines} calls cost here what was billed."
    for (model, kinds), (count, billed, priced) in list(found.by_model_and_kind().items())[:most]:
        ratio = f", x {priced / billed:.4f}" if billed else ""
        yield f"  {model} {kinds}: {count} calls billed {_usd(billed)}, here {_usd(priced)} USD{ratio}"
    for number, why in found.unpriced[:most]:
        yield f"  line {number}: {why}"
    if len(found.unpriced) > most:
        yield f"  … and {len(found.unpriced) - most} more that have no price"


def _usd(amount_nusd: int) -> str:
    return f"{Decimal(amount_nusd) / _NUSD_PER_USD:f}"
