"""Rows as CSV for people's spreadsheets, which take a cell that begins like a formula for one."""

import csv
import io
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TextIO

_BEGINS_A_FORMULA: Final = frozenset("=+-@\t\r\n＝＋－＠")
_UNSEEN: Final = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})
"""Kinds of characters that spreadsheets pass by before they look for a formula: spaces, marks of order, controls."""


def wants_csv(accept: str) -> bool:
    """Whether an Accept header names text/csv."""
    return any(each.partition(";")[0].strip().lower() == "text/csv" for each in accept.split(","))


def csv_text(names: Sequence[str], lines: Iterable[Sequence[str | None]]) -> str:
    """A header and lines as RFC 4180 has them; null is an empty cell."""
    out = io.StringIO(newline="")
    write = line_writer(out)
    write(names)
    for line in lines:
        write(line)
    return out.getvalue()


def line_writer(out: TextIO) -> Callable[[Iterable[str | int | None]], None]:
    """What writes a line of CSV to `out`, with no cell in it that a spreadsheet would run. Numbers stay numbers."""
    writer = csv.writer(out)

    def write(line: Iterable[str | int | None]) -> None:
        writer.writerow([harmless(cell) if isinstance(cell, str) else cell for cell in line])

    return write


def harmless(cell: str) -> str:
    """A text that a spreadsheet would run gets an apostrophe before it, as OWASP advises ("CSV injection").

    So does one that begins with an apostrophe: who reads the file back takes one away, and has every text as it was.
    """
    first = next((char for char in cell if char in _BEGINS_A_FORMULA or unicodedata.category(char) not in _UNSEEN), "")
    return f"'{cell}" if first in _BEGINS_A_FORMULA or cell.startswith("'") else cell
