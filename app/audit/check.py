"""What a check is: one promise of the books, and the SQL text that finds where it is broken."""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of the books: `says` is what must be true.

    `sql` returns a row for everything that differs: `subject`, `recorded`, `recomputed`.
    """

    name: str
    says: str
    sql: str
    is_money: bool = False


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
