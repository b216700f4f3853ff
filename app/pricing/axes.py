"""Tokens that are counted more than once, told apart: how each was read, and what it is.

A count of cached tokens and one of audio tokens overlap by as many as were both. Where that was told it is known; where
it was not, the cheapest split that the counts allow is taken, and said. Parts that together exceed their whole were
counted beside it: the whole is as much more. What comes out adds up to the tokens that there were, each counted once.
"""

from collections.abc import Callable, Mapping, Sequence
from math import lcm
from operator import attrgetter
from typing import Final, TypeAlias

import msgspec

from app.pricing.rows import COUNTED_IN, INPUT_CELLS, OUTPUT_CELLS, Dimension, Usage
from app.pricing.sheet import Price

D = Dimension
SPLIT_ASSUMED: Final = "split_assumed"
PARTS_BESIDE: Final = "parts_beside"
PriceOf: TypeAlias = Callable[[Dimension], Price | None]
_HOWS: Final = range(len(INPUT_CELLS))
_WHATS: Final = range(len(INPUT_CELLS[0]))
_JOINT: Final = tuple((how, what) for how in _HOWS[1:] for what in _WHATS[1:] if INPUT_CELLS[how][what] in COUNTED_IN)


class Tokens(msgspec.Struct, frozen=True):
    """How many there were of each, those that there were none of left out; and what was assumed."""

    units: Mapping[Dimension, int]
    total: int
    flags: tuple[str, ...] = ()


_kinds_of: Final = attrgetter(
    *(COUNTED_IN[what] for what in INPUT_CELLS[0][1:]), *(COUNTED_IN[INPUT_CELLS[how][what]] for how, what in _JOINT)
)
_parts_of: Final = attrgetter(*(COUNTED_IN[part] for part in OUTPUT_CELLS[1:]))
_READS: Final = tuple(how[0] for how in INPUT_CELLS[1:])
_reads_of: Final = attrgetter(*(COUNTED_IN[cell] for cell in _READS))


def input_total(usage: Usage) -> int:
    """How large the call's input was, which decides its context tier."""
    if any(_kinds_of(usage)):
        return _Input(usage).total
    return _whole(usage.input_tokens, sum(filter(None, _reads_of(usage))))[0]


def input_sums(usage: Usage) -> tuple[list[int], list[int]]:
    """How many tokens of the input were read in each way, and how many were of each kind."""
    table = _Input(usage)
    return table.rows, table.columns


def input_tokens(usage: Usage, whats: Sequence[int], price_of: PriceOf, *, most: bool = False) -> Tokens:
    """The tokens of the input by their cells. `whats` are the columns that have prices: all else is text.

    With `most`, the dearest split that the counts allow: of a hold, of which nothing is known yet.
    """
    return text_tokens(usage) or _Input(usage).by_cell(whats, price_of, most)


def text_tokens(usage: Usage) -> Tokens | None:
    """The tokens of an input that is text alone, as most are: one column, so that there is nothing to split. Else None."""
    return None if any(_kinds_of(usage)) else by_reading(usage)


def by_reading(usage: Usage) -> Tokens:
    """The same of an input that is known to be text alone."""
    counts = _reads_of(usage)
    parts = sum(filter(None, counts))
    if not parts:
        return Tokens({D.INPUT: usage.input_tokens} if usage.input_tokens else {}, usage.input_tokens)
    total, is_beside = _whole(usage.input_tokens, parts)
    units = {D.INPUT: total - parts} if total > parts else {}
    units |= {cell: count for cell, count in zip(_READS, counts, strict=True) if count}
    return Tokens(units, total, (PARTS_BESIDE,) if is_beside else ())


def output_tokens(usage: Usage, plain: Dimension, stands_for: Callable[[Dimension], Dimension]) -> Tokens:
    """The tokens of the output by what they are charged as. `plain` is what those are of which nothing is said."""
    counts = _parts_of(usage)
    if not any(counts):  # most answers
        return Tokens({plain: usage.output_tokens} if usage.output_tokens else {}, usage.output_tokens)
    units: dict[Dimension, int] = {}
    parts = 0
    for part, count in zip(OUTPUT_CELLS[1:], counts, strict=True):
        if count:
            parts += count
            units[stands_for(part)] = units.get(stands_for(part), 0) + count
    total, is_beside = _whole(usage.output_tokens, parts)
    if total > parts:
        units[plain] = units.get(plain, 0) + total - parts
    return Tokens(units, total, (PARTS_BESIDE,) if is_beside else ())


def _whole(told: int, parts: int) -> tuple[int, bool]:
    """How many there were in all, and whether the parts were counted beside them."""
    return (told + parts, True) if parts > told else (told, False)


class _Input:
    """The input's counts as a table of rows (how) and columns (what), of which the sums are known and some cells."""

    __slots__ = ("columns", "flags", "joint", "rows", "total")

    def __init__(self, usage: Usage) -> None:
        rows = [usage.of(how[0]) if index else 0 for index, how in enumerate(INPUT_CELLS)]
        columns = [usage.of(what) if index else 0 for index, what in enumerate(INPUT_CELLS[0])]
        self.joint = {
            place: count
            for place in _JOINT
            if (count := getattr(usage, COUNTED_IN[INPUT_CELLS[place[0]][place[1]]])) is not None
        }
        beside = False
        if self.joint:
            for sums, axis in ((rows, 0), (columns, 1)):
                for index in range(1, len(sums)):
                    both = sum(count for place, count in self.joint.items() if place[axis] == index)
                    sums[index], more = _whole(sums[index], both)
                    beside = beside or more
        by_how, is_beside = _whole(usage.input_tokens, sum(rows))
        by_what, are_beside = _whole(usage.input_tokens, sum(columns))
        self.total = max(by_how, by_what)
        rows[0], columns[0] = self.total - sum(rows), self.total - sum(columns)
        self.rows, self.columns = rows, columns
        self.flags = (PARTS_BESIDE,) if beside or is_beside or are_beside else ()

    def by_cell(self, whats: Sequence[int], price_of: PriceOf, most: bool) -> Tokens:
        table = self._table(whats, price_of, most)
        units = {INPUT_CELLS[how][what]: count for (how, what), count in table.items() if count}
        flags = (*self.flags, SPLIT_ASSUMED) if self._is_open(whats) else self.flags
        return Tokens(units, self.total, flags)

    def _table(self, whats: Sequence[int], price_of: PriceOf, most: bool) -> dict[tuple[int, int], int]:
        columns = self._merged(whats)
        if sum(map(bool, columns)) <= 1 or sum(map(bool, self.rows)) <= 1:
            return {
                (how, what): min(self.rows[how], columns[what])
                for how in _HOWS for what in _WHATS if self.rows[how] and columns[what]
            }  # fmt: skip
        known = {place: count for place, count in self.joint.items() if place[1] in whats}
        rows = [count - sum(n for place, n in known.items() if place[0] == how) for how, count in enumerate(self.rows)]
        left = [count - sum(n for place, n in known.items() if place[1] == what) for what, count in enumerate(columns)]
        flow = _cheapest(rows, left, self._costs(price_of, known, most))
        return {(how, what): flow[how][what] + known.get((how, what), 0) for how in _HOWS for what in _WHATS}

    def _merged(self, whats: Sequence[int]) -> list[int]:
        """The columns' sums, with what has no price of its own among the text."""
        columns = [count if what in whats else 0 for what, count in enumerate(self.columns)]
        columns[0] = self.total - sum(columns[1:])
        return columns

    def _is_open(self, whats: Sequence[int]) -> bool:
        """Whether the counts allow more than one split: whether the cells that nobody told of go round in a circle."""
        columns = self._merged(whats)
        known = {place: count for place, count in self.joint.items() if place[1] in whats}
        rows = [how for how in _HOWS if self.rows[how] > sum(n for place, n in known.items() if place[0] == how)]
        left = [what for what in _WHATS if columns[what] > sum(n for place, n in known.items() if place[1] == what)]
        open_cells = {(how, what) for how in rows for what in left} - known.keys()
        while lonely := {place for place in open_cells if _is_alone(place, open_cells)}:
            open_cells -= lonely
        return bool(open_cells)

    def _costs(self, price_of: PriceOf, known: Mapping[tuple[int, int], int], most: bool) -> list[list[int]]:
        """What a token costs in each cell, in one unit for all. No more go where it was told how many there were."""
        prices = [[price_of(cell) or (0, 1) for cell in how] for how in INPUT_CELLS]
        unit = lcm(*(price[1] for how in prices for price in how))
        costs = [[price[0] * (unit // price[1]) * (-1 if most else 1) for price in how] for how in prices]
        never = 1 + 2 * len(_HOWS) * max(abs(cost) for how in costs for cost in how)
        for how, what in known:
            costs[how][what] += never
        return costs


def _is_alone(place: tuple[int, int], among: set[tuple[int, int]]) -> bool:
    """Whether it is the only one of its row, or of its column: then its count follows from the others."""
    return any(sum(each[axis] == place[axis] for each in among) == 1 for axis in (0, 1))


def _cheapest(supply: list[int], demand: list[int], costs: list[list[int]]) -> list[list[int]]:
    """How many to move from each row to each column so that all are moved, at the least cost: by shortest paths."""
    flow = [[0] * len(demand) for _ in supply]
    while any(supply):
        to_row: list[int | None] = [0 if left else None for left in supply]
        to_column: list[int | None] = [None] * len(demand)
        row_of, column_of = [0] * len(demand), [-1] * len(supply)
        while _shorten(to_row, to_column, row_of, column_of, flow, costs):
            pass
        end = min((c for c, left in enumerate(demand) if left), key=lambda c: (to_column[c] is None, to_column[c] or 0))
        _push(end, supply, demand, row_of, column_of, flow)
    return flow


def _shorten(
    to_row: list[int | None],
    to_column: list[int | None],
    row_of: list[int],
    column_of: list[int],
    flow: list[list[int]],
    costs: list[list[int]],
) -> bool:
    """One round over all edges: forward, and back over what was moved before. Whether any way became shorter."""
    is_shorter = False
    for row, there in enumerate(to_row):
        for column, cost in enumerate(costs[row]):
            ahead = to_column[column]
            if there is not None and (ahead is None or there + cost < ahead):
                to_column[column], row_of[column], is_shorter = there + cost, row, True
            back = to_column[column]
            here = to_row[row]
            if flow[row][column] and back is not None and (here is None or back - cost < here):
                to_row[row], column_of[row], is_shorter = back - cost, column, True
    return is_shorter


def _push(
    end: int,
    supply: list[int],
    demand: list[int],
    row_of: list[int],
    column_of: list[int],
    flow: list[list[int]],
) -> None:
    """Move as many as fit along the way that ends in this column."""
    forward, back, column = [], [], end
    while True:
        row = row_of[column]
        forward.append((row, column))
        column = column_of[row]
        if column < 0:
            break
        back.append((row, column))
    count = min(supply[row], demand[end], *(flow[r][c] for r, c in back))
    for r, c in forward:
        flow[r][c] += count
    for r, c in back:
        flow[r][c] -= count
    supply[row] -= count
    demand[end] -= count
