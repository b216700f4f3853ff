"""Reads price files that others keep into rows of ours: LiteLLM's map, genai-prices' data, and our own format.

Files are data: neither library is needed. Numbers are read from the raw text, never through a float. What is
not understood never becomes a price: it is reported, and its model left out if it may be one. A price of nothing is not
taken over: in such files it often means "not known", and free of charge is for the operator to say, by an override.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any, Final

from app.kernel.errors import InvalidField
from app.kernel.money import units_of
from app.pricing.drafts import MILLION, Draft, Gathered, entry, whole
from app.pricing.from_genai import genai_providers, read_genai
from app.pricing.from_litellm import is_litellm, read_litellm
from app.pricing.rows import Dimension, FeeRow, ModelRow, PriceRow, attributes_text, parse_attributes

D = Dimension
OWN_FORMAT: Final = "satmeter-prices-1"
_EXAMPLES: Final = 20


def read_prices(raw: bytes) -> Draft:
    """Recognise the format of a file and read it. Raises InvalidField if it is none that we know, or naming a broken entry."""
    document = _parsed(raw)
    gathered = Gathered()
    with entry("its outermost level"):
        name = _read(document, gathered)
    return gathered.draft(name, hashlib.sha256(raw).hexdigest())


def _read(document: Any, gathered: Gathered) -> str:
    """The name of the format that it was read as."""
    if isinstance(document, dict) and document.get("format") == OWN_FORMAT:
        name = OWN_FORMAT
        _read_own(document, gathered)
    elif (providers := genai_providers(document)) is not None:
        name = "genai-prices"
        read_genai(providers, gathered)
    elif isinstance(document, dict) and any(is_litellm(each) for each in document.values()):
        name = "litellm"
        read_litellm(document, gathered)
    else:
        raise InvalidField("the file is neither LiteLLM's price map nor genai-prices' data nor our own format")
    return name


def _parsed(raw: bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise InvalidField(f"the price file has {constant} for a number")

    try:
        return json.loads(raw, parse_float=Decimal, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidField(f"the price file is not JSON: {str(error)[:200]}") from None


# Our own format, also of the starter catalogue: prices as decimal text, in USD.


def _read_own(document: Mapping[str, Any], gathered: Gathered) -> None:
    for feature, price_usd in (document.get("fees") or {}).items():
        with entry(f"fees, {feature}"):
            gathered.fees.append(FeeRow(str(feature), units_of(Decimal(str(price_usd)), 9, up=True)))
    for place, model in enumerate(document["models"]):
        with entry(model.get("model", f"model {place}")):
            _read_own_model(model, gathered)


def _read_own_model(model: Mapping[str, Any], gathered: Gathered) -> None:
    row = PriceRow(str(model["model"]), str(model["provider"]).lower(), D.INPUT, 0)
    defaults = attributes_text(parse_attributes(model.get("default_attributes", "")))
    about = ModelRow(
        row.model, row.provider, str(model.get("mode", "")), whole(model.get("max_output_tokens")),
        whole(model.get("context_tokens")), defaults,
    )  # fmt: skip
    with gathered.model(about):
        for unit, per in (("usd_per_million", MILLION), ("usd_per_minute", 60), ("usd_each", 1)):
            for name, value in (model.get(unit) or {}).items():
                with entry(f"{row.model} {unit} {name}"):
                    _read_own_price(replace(row, dimension=_own_dimension(name)), value, per, gathered)


def _own_dimension(name: str) -> Dimension:
    try:
        return Dimension(name)
    except ValueError:
        raise InvalidField(f"there is no dimension {name[:50]!r}; there are {', '.join(Dimension)}") from None


def _read_own_price(row: PriceRow, value: Any, per: int, gathered: Gathered) -> None:
    """A text, or one for each context tier (`"200001": …`) or set of attributes (`"quality=hd": …`), or for both."""
    if not isinstance(value, dict):
        gathered.add(row, Decimal(str(value)), per)
        return
    for name, each in value.items():
        named = (
            replace(row, tier_min=int(name))
            if name.isdigit()
            else replace(row, attributes=attributes_text(parse_attributes(name)))
        )
        _read_own_price(named, each, per, gathered)


def shortened(names: list[str]) -> list[str]:
    """The first few of a list that may be long."""
    return [*names[:_EXAMPLES], f"… and {len(names) - _EXAMPLES} more"] if len(names) > _EXAMPLES else names
