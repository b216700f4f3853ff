"""What a call did cost: by the model that served it, as it was served, and never nothing for want of a price. Pure."""

from datetime import datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from app.kernel.errors import InvalidField, ModelNotPriced
from app.pricing.quote import Call, Catalogue, Quote
from app.pricing.rows import Usage


class Cost(msgspec.Struct, frozen=True):
    """What a call cost. `lines` are kept with it, to tell it again and to explain it; None where nothing is known of it.

    `is_the_hold`: for want of a better figure it costs what its hold holds, if that is more.
    """

    cost_nusd: int
    price_version: int | None = None
    lines: dict[str, Any] | None = None
    flags: tuple[str, ...] = ()
    is_the_hold: bool = False


def cost_of(
    catalogue: Catalogue,
    asked: Call,
    served: Call,
    used: Usage,
    moment: datetime,
    held_nusd: int | None,
    *,
    is_strict: bool = False,
) -> Cost:
    """What the call cost at the prices of `moment`.

    It is priced as the model that was served. A served name that means nothing here costs what the asked model would, and
    the hold at least; what was used and has no price costs the rest of the hold at least, by its name among the flags.
    Raises ModelNotPriced where nothing was held, and InvalidField for another provider's price if `is_strict`.
    """
    is_known = catalogue.is_known(served.model)
    if not is_known and (not catalogue.is_known(asked.model) or served.model == asked.model):
        if held_nusd is None:
            catalogue.resolved(served.model)
        return Cost(held_nusd or 0, catalogue.version_id, flags=("not_priced",), is_the_hold=True)
    call = served if is_known else replace(asked, features=served.features)
    quote = catalogue.price_known(call, used, moment)
    if quote.unpriced and held_nusd is None:
        catalogue.price(call, used, moment)
    if quote.unpriced and not quote.lines:
        return Cost(held_nusd or 0, catalogue.version_id, flags=("not_priced",), is_the_hold=True)
    flags = [*quote.flags]
    if quote.unpriced:
        flags.extend(f"not_priced:{each}" for each in quote.unpriced)
    if not is_known:
        flags.append("served_not_priced")
    if is_known and catalogue.is_provider_assumed(call.model, call.provider):
        if is_strict:
            raise InvalidField(f"{call.provider[:100]!r} has no price for {call.model[:200]!r} here", param="provider")
        flags.append("provider_assumed")
    if catalogue.is_beyond(quote, used):
        flags.append("beyond_model")
    is_the_hold = held_nusd is not None and (bool(quote.unpriced) or not is_known)
    return Cost(quote.cost_nusd, quote.version_id, kept(quote, call), tuple(flags), is_the_hold)


def kept(quote: Quote, call: Call) -> dict[str, Any]:
    """The quote as it is kept, with how the call was made: a repeat that says otherwise is another call."""
    lines = lines_of(quote)
    return lines | {"attributes": dict(call.attributes)} if call.attributes else lines


def told(cost_nusd: int, quote: Quote | None) -> Cost:
    """A cost that came with the call, beside what the catalogue asks for it where that is known."""
    if quote is None:
        return Cost(cost_nusd)
    beside = {"model": quote.model, "provider": quote.provider, "catalogue_nusd": quote.cost_nusd}
    return Cost(cost_nusd, quote.version_id, beside)


def catalogue_quote(catalogue: Catalogue, served: Call, used: Usage, moment: datetime) -> Quote | None:
    """What the catalogue asks for a call, None if it does not know it whole."""
    try:
        return catalogue.price(served, used, moment)
    except (ModelNotPriced, InvalidField):
        return None


def lines_of(quote: Quote) -> dict[str, Any]:
    """A quote as it is kept: its five figures in nano-USD, and its lines: kind, name, units, list price in pico-USD, markup
    in ppm, and for how many units that price is where it is for several. `divisor` is what all of those go into."""
    lines: list[list[Any]] = [
        [line.kind._value_, line.name, line.units, line.list_price_pusd, line.markup_ppm]
        if line.per_units == 1
        else [line.kind._value_, line.name, line.units, line.list_price_pusd, line.markup_ppm, line.per_units]
        for line in quote.lines
    ]
    found: dict[str, Any] = {
        "model": quote.model,
        "provider": quote.provider,
        "parts": [quote.input_nusd, quote.output_nusd, quote.cache_input_nusd, quote.media_nusd, quote.fees_nusd],
        "lines": lines,
    }
    divisor = quote.divisor
    return found if divisor == 1 else found | {"divisor": divisor}
