"""What a check is: one promise of the books, and the SQL text that finds where it is broken.

A proof is a promise that SQL cannot look into: it needs what is kept outside the database.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal

from app.kernel.db import Row
from app.kernel.security import Pepper, Sealer
from app.kernel.settings import Settings


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of the books: `says` is what must be true.

    `sql` returns a row for everything that differs: `subject`, `recorded`, `recomputed`.
    """

    name: str
    says: str
    sql: str
    is_money: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference: what the books say of `subject`, and what follows from the rest of them. Money is in USD."""

    check: str
    subject: str
    recorded: str
    recomputed: str


@dataclass(frozen=True, slots=True)
class Secrets:
    """What proofs are made with; it is never in the database, so whoever can only write there cannot make them."""

    pepper: Pepper
    sealer: Sealer

    @classmethod
    def of(cls, settings: Settings) -> "Secrets":
        return cls(settings.pepper, settings.sealer)


@dataclass(frozen=True, slots=True)
class Proof:
    """One promise about each row that `sql` returns: `holds` says whether it is kept, else `broken` what is found.

    A row has a `subject`, and whatever `holds` looks at.
    """

    name: str
    says: str
    sql: str
    holds: Callable[[Secrets, Row], bool]
    broken: str
    whole: str


def values(given: Iterable[tuple[str | int | Decimal, ...]]) -> str:
    """Constants of ours as the rows of a VALUES list."""
    texts = (
        [
            f"'{each}'" if isinstance(each, str) else f"{each:f}" if isinstance(each, Decimal) else str(each)
            for each in line
        ]
        for line in given
    )
    return ", ".join(f"({', '.join(line)})" for line in texts)
