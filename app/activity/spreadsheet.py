"""Rows as CSV for people's spreadsheets, which take a cell that begins like a formula for one."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Final

_BEGINS_A_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def wants_csv(accept: str) -> bool:
    """Whether an Accept header names text/csv."""
    return any(each.partition(";")[0].strip().lower() == "text/csv" for each in accept.split(","))


def csv_text(names: Sequence[str], lines: Iterable[Sequence[str | None]]) -> str:
    """A header and lines as RFC 4180 has them; null is an empty cell."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(names)
    writer.writerows([_harmless(cell or "") for cell in line] for line in lines)
    return out.getvalue()


def _harmless(cell: str) -> str:
    """A text that a spreadsheet would run gets an apostrophe before it, as OWASP advises ("CSV injection")."""
    return f"'{cell}" if cell.startswith(_BEGINS_A_FORMULA) else cell
