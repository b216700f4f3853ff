"""What a call may cost and what it did cost: the catalogue's prices, frozen when the call was authorized."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import msgspec

from app.kernel.db import Database
from app.kernel.errors import InvalidField, ModelNotPriced
from app.kernel.money import usd_text
from app.pricing.catalogue import Catalogues, NoActiveVersion, names_of
from app.pricing.quote import Ask, Call, Catalogue, Quote
from app.pricing.rows import Usage


class Limits(msgspec.Struct, frozen=True):
    """What is held for a call: `amount_nusd` if it is there, and `min_nusd` at least. The price version and the moment say
    so, and price the call when it is settled. `quote` is what the whole of it may cost; None where the proxy said that."""

    amount_nusd: int
    min_nusd: int
    price_version: int | None
    made_at: datetime
    quote: Quote | None = None


class HoldTooSmall(InvalidField):
    """Less may be held than the call costs with the shortest answer that is of use."""


class Cost(msgspec.Struct, frozen=True):
    """What a call cost. `lines` are kept with it, to tell it again and to explain it; None where it came priced.

    `is_the_hold`: for want of a better figure it costs what its hold holds.
    """

    cost_nusd: int
    price_version: int | None = None
    lines: Mapping[str, Any] | None = None
    flags: tuple[str, ...] = ()
    is_the_hold: bool = False


class Pricer:
    """Asks the catalogue for the metering verbs; one object for the process."""

    def __init__(self, db: Database, catalogues: Catalogues) -> None:
        self._db, self._catalogues = db, catalogues

    async def moment(self) -> tuple[int | None, datetime]:
        """The version that a call authorized now is priced by, None while nothing is sold; and this moment."""
        return await self._catalogues.moment(self._db)

    async def names(self, model: str | None) -> tuple[str, ...]:
        """Every name that a list of allowed models may have this model under."""
        version_id, _ = await self.moment()
        if model is None or version_id is None:
            return () if model is None else (model,)
        return names_of(await self._catalogues.at(self._db, version_id), model)

    async def limits(self, ask: Ask, min_output_tokens: int | None, max_hold_nusd: int | None = None) -> Limits:
        """What an estimated call may cost at most, and with the shortest answer that is still of use; not more than
        `max_hold_nusd` is held.

        Without `min_output_tokens` only the whole will do. Raises ModelNotPriced, and HoldTooSmall where the shortest
        answer costs more than may be held.
        """
        catalogue, now = await self._catalogues.now(self._db)
        quote = catalogue.estimate(ask, now)
        most = quote.cost_nusd
        amount = most if max_hold_nusd is None else min(most, max_hold_nusd)
        if min_output_tokens is None and amount == most:
            return Limits(most, most, catalogue.version_id, now, quote)
        shortest = replace(ask, max_output_tokens=min(min_output_tokens or 1, catalogue.answer_tokens(ask, now)))
        least = catalogue.estimate(shortest, now).cost_nusd
        if least > amount:
            raise HoldTooSmall(
                f"The call costs at least ${usd_text(least)}, and ${usd_text(amount)} may be held for one",
                param="max_hold_usd",
            )
        return Limits(amount, amount if min_output_tokens is None else least, catalogue.version_id, now, quote)

    async def quoted(self, ask: Ask, version_id: int, made_at: datetime) -> Quote:
        """What a call that was authorized then may cost at most."""
        return (await self._catalogues.at(self._db, version_id)).estimate(ask, made_at)

    async def granted_output_tokens(self, ask: Ask, version_id: int, held_nusd: int, made_at: datetime) -> int | None:
        """How long each answer may be for what is held; None for a call that answers in no tokens."""
        catalogue = await self._catalogues.at(self._db, version_id)
        asked = catalogue.answer_tokens(ask, made_at)
        return catalogue.affordable_output_tokens(held_nusd, ask, made_at) if asked else None

    async def cost(
        self,
        version_id: int | None,
        asked: Call,
        served: Call,
        used: Usage,
        moment: datetime | None,
        held_nusd: int | None,
    ) -> Cost:
        """What a call cost at the prices it was authorized by, or at today's if there were none.

        It is priced as the model that was served; where that has no price, as the model that was asked for, and where
        that has none for what was used either, it costs what was held for it. Both are flagged: a call is never free
        for want of a price. Raises ModelNotPriced where nothing was held.
        """
        try:
            catalogue, moment = await self._catalogue(version_id, moment)
        except (
            NoActiveVersion,
            InvalidField,
        ):  # a version that is gone, as by an older backup: it was used all the same
            if held_nusd is None:
                raise
            return Cost(held_nusd, flags=("not_priced",), is_the_hold=True)
        try:
            return _cost(catalogue.price(served, used, moment), served)
        except ModelNotPriced:
            pass
        try:
            return _cost(
                catalogue.price(replace(asked, features=served.features), used, moment), asked, "priced_as_asked"
            )
        except ModelNotPriced:
            if held_nusd is None:
                raise
            return Cost(held_nusd, catalogue.version_id, flags=("not_priced",), is_the_hold=True)

    async def _catalogue(self, version_id: int | None, moment: datetime | None) -> tuple[Catalogue, datetime]:
        """The version, or the one in effect where none was then; and the moment, or this one."""
        if version_id is not None and moment is not None:
            return await self._catalogues.at(self._db, version_id), moment
        catalogue, now = await self._catalogues.now(self._db)
        return catalogue, moment or now


def _cost(quote: Quote, call: Call, *flags: str) -> Cost:
    lines = lines_of(quote)
    if call.attributes:  # kept too: a repeat that says others is another call
        lines["attributes"] = dict(call.attributes)
    return Cost(quote.cost_nusd, quote.version_id, lines, flags)


def lines_of(quote: Quote) -> dict[str, Any]:
    """A quote as it is kept: its five figures in nano-USD, and its lines: kind, name, units, list price in pico-USD, markup in ppm."""
    return {
        "model": quote.model,
        "provider": quote.provider,
        "parts": [quote.input_nusd, quote.output_nusd, quote.cache_input_nusd, quote.media_nusd, quote.fees_nusd],
        "lines": [
            [line.kind.value, line.name, line.units, line.list_price_pusd, line.markup_ppm] for line in quote.lines
        ],
    }
