"""Why a call cost what it did: its price lines, exact, which add up to the charge once they are rounded up."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, row
from app.kernel.errors import NotFound
from app.ledger.charge import ChargeId

PPM: Final = 1_000_000
_AUSD_PER_NUSD: Final = 10**9


@dataclass(frozen=True, slots=True)
class Line:
    """`units` at `price_pusd` (pico-USD for `per_units` of them, the list price), times the markup."""

    kind: str
    name: str
    units: int
    price_pusd: int
    markup_ppm: int
    per_units: int = 1

    @property
    def amount_ausd(self) -> Fraction:
        """Atto-USD, 10^-18."""
        return Fraction(self.units * self.price_pusd * self.markup_ppm, self.per_units)


@dataclass(frozen=True, slots=True)
class Explained:
    """A charge with its lines: their sum and `rounding_ausd`, less than a nano-dollar, are the charge."""

    charge: Row
    lines: tuple[Line, ...]

    @property
    def exact_ausd(self) -> Fraction:
        return sum((line.amount_ausd for line in self.lines), Fraction(0))

    @property
    def rounding_ausd(self) -> Fraction:
        return int(self.charge["cost_nusd"]) * _AUSD_PER_NUSD - self.exact_ausd


def usage_id_of(text: str, account_id: uuid.UUID) -> uuid.UUID:
    """The call's id, from itself or from a `charge_id`. Raises NotFound, for another account's charge too."""
    try:
        return uuid.UUID(text)
    except ValueError:
        charge_id = ChargeId.read(text)
    if charge_id.account_id != account_id:
        raise NotFound("No such charge")
    return charge_id.usage_id


async def explain(session: AsyncSession, account_id: uuid.UUID, text: str) -> Explained:
    """Raises NotFound, alike for what is missing, another account's, and of a month whose calls were dropped."""
    charge = await row(
        session,
        """SELECT u.id, u.account_id, coalesce(u.model, u.served_model) AS model, coalesce(u.provider, u.lines->>'provider') AS provider,
                  u.served_model, u.lines->>'model' AS priced_as, u.price_version, u.lines, u.flags, u.cost_nusd, coalesce(r.amount_nusd, 0) AS refunded_nusd,
                  h.amount_nusd AS held_nusd
           FROM usage u LEFT JOIN hold h ON h.account_id = u.account_id AND h.id = u.hold_id
                        LEFT JOIN entry r ON r.account_id = u.account_id AND r.kind = 'refund' AND r.reference = u.id::text
                                         AND r.contra = 'revenue:usage'
           WHERE u.account_id = :account_id AND u.id = :id""",
        account_id=account_id, id=usage_id_of(text, account_id),
    )  # fmt: skip
    if charge is None:
        raise NotFound("No such charge")
    return Explained(charge, lines_of(charge["lines"], charge["cost_nusd"], charge["flags"]))


def lines_of(kept: Mapping[str, Any] | None, cost_nusd: int, flags: str) -> tuple[Line, ...]:
    """The price lines that were kept with the call, and what of its hold it cost for what has no price; one line of the
    whole cost where it was not priced by us."""
    if kept is not None and "lines" in kept:
        lines = tuple(Line(*line) for line in kept["lines"])
        rest_nusd = cost_nusd - sum(kept["parts"])
        return (*lines, Line("call", "held", 1, rest_nusd * 1000, PPM)) if rest_nusd else lines
    name = "held" if {"not_priced", "usage_missing"} & set(flags.split(",")) else "given"
    return (Line("call", name, 1, cost_nusd * 1000, PPM),)
