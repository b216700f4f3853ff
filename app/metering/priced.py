"""What a call may cost and what it did cost: the catalogue's prices, frozen when the call was authorized."""

from collections.abc import Callable
from datetime import datetime

import msgspec
from msgspec.structs import replace

from app.kernel.db import Database
from app.kernel.errors import InvalidField
from app.kernel.money import usd_text
from app.metering.compared import compared
from app.metering.cost import Cost, catalogue_quote, cost_of, lines_of, told
from app.pricing.catalogue import Catalogues, NoActiveVersion, names_of
from app.pricing.quote import Ask, Call, Catalogue, Quote
from app.pricing.rows import Usage

__all__ = ["Cost", "Limits", "Pricer", "lines_of"]


class Limits(msgspec.Struct, frozen=True):
    """What is held for a call: `amount_nusd` if it is there, and `min_nusd` at least. The price version and the moment say
    so, and price the call when it is settled. `quote` is what the whole of it may cost; where the proxy said that, None, and
    `asked_nusd` is it."""

    amount_nusd: int
    min_nusd: int
    price_version: int | None
    made_at: datetime
    quote: Quote | None = None
    asked_nusd: int = 0


class HoldTooSmall(InvalidField):
    """Less may be held than the call costs with the shortest answer that is of use."""


class Pricer:
    """Asks the catalogue for the metering verbs; one object for the process."""

    def __init__(self, db: Database, catalogues: Catalogues, *, is_strict: bool = False) -> None:
        self._db, self._catalogues, self._is_strict = db, catalogues, is_strict

    async def moment(self) -> tuple[int | None, datetime]:
        """The version that a call authorized now is priced by, None while nothing is sold; and this moment."""
        return await self._catalogues.moment(self._db)

    async def names(self, model: str | None, version_id: int | None = None) -> tuple[str, ...]:
        """Every name that a list of allowed models may have this model under; in the version in effect if none is given."""
        if model is None:
            return ()
        if version_id is None:
            version_id, _ = await self.moment()
        return (model,) if version_id is None else names_of(await self._catalogues.at(self._db, version_id), model)

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

    async def granted_output_tokens(
        self, ask: Ask, most: Quote, version_id: int, held_nusd: int, made_at: datetime
    ) -> int | None:
        """How long each answer may be for what is held; None for a call that answers in no tokens. `most` is what the whole
        call may cost."""
        catalogue = await self._catalogues.at(self._db, version_id)
        asked = catalogue.answer_tokens(ask, made_at)
        if not asked or held_nusd >= most.cost_nusd:
            return asked or None
        return catalogue.affordable_output_tokens(held_nusd, ask, made_at)

    async def cost(
        self,
        version_id: int | None,
        asked: Call,
        served: Call,
        used: Usage,
        moment: datetime | None,
        held_nusd: int | None,
    ) -> Cost:
        """What a call cost at the prices it was authorized by, or at today's if there were none; see cost.py.

        Raises ModelNotPriced where nothing was held.
        """
        catalogue = None if version_id is None or moment is None else self._catalogues.known(version_id)
        if catalogue is None or moment is None:
            try:
                catalogue, moment = await self._catalogue(version_id, moment)
            except (
                NoActiveVersion,
                InvalidField,
            ):  # a version that is gone, as by an older backup: it was used all the same
                if held_nusd is None:
                    raise
                return Cost(held_nusd, flags=("not_priced",), is_the_hold=True)
        return cost_of(catalogue, asked, served, used, moment, held_nusd, is_strict=self._is_strict)

    async def _catalogue(self, version_id: int | None, moment: datetime | None) -> tuple[Catalogue, datetime]:
        """The version, or the one in effect where none was then; and the moment, or this one."""
        if version_id is not None and moment is not None:
            return await self._catalogues.at(self._db, version_id), moment
        catalogue, now = await self._catalogues.now(self._db)
        return catalogue, moment or now

    async def told(
        self,
        cost_nusd: int,
        version_id: int | None,
        moment: datetime | None,
        served: tuple[str, str],
        was_made: Callable[[], tuple[Call, Usage]],
    ) -> Cost:
        """A cost that came with the call, kept beside what the catalogue asks for what it used. `was_made` tells how it was
        served and what it used; it is asked only where the `served` model, of that provider, is sold."""
        if version_id is None or moment is None:
            version_id, now = await self.moment()
            moment = moment or now
        if version_id is None:  # nothing is sold; whether something has been just now is asked where it decides a price
            return Cost(cost_nusd)
        try:
            catalogue = self._catalogues.known(version_id) or await self._catalogues.at(self._db, version_id)
        except InvalidField:
            return Cost(cost_nusd)
        if not catalogue.is_known(*served):
            return Cost(cost_nusd)
        quote = catalogue_quote(catalogue, *was_made(), moment)
        if quote is not None:
            compared.count(f"{quote.provider}/{quote.model}", cost_nusd, quote.cost_nusd)
        return told(cost_nusd, quote)
