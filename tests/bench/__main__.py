"""python -m tests.bench: the hot path over HTTP in turn with `pgbench`, several rounds; ratios with their spread.

With `--against`, another checkout is measured in the same minutes: each load on the one and then on the other, in the
next round the other way about, each over a server and a fresh PostgreSQL of its own.
"""

import argparse
import asyncio
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from tests.bench import bulk, growth
from tests.bench.compared import Tpcb, through_sessions
from tests.bench.load import CONNECTIONS, Kind, Measured, client, load
from tests.bench.sides import ACCOUNTS, Run, Side, served, taking_all_that_wait
from tests.program import ROOT

Found = dict[str, list[Run]]
"""A run of each round, by the name of its load."""


_PAIRS_OF_GROWTH: Final = 20_000


def main() -> int:
    options = _options()
    accounts, rows = (1_000_000, 10_000_000) if options.large else (ACCOUNTS, 0)
    print(
        f"{os.cpu_count()} cores, load from {client()}, {CONNECTIONS} connections, workers: {options.workers}, {options.rounds} rounds"
    )
    print(f"{accounts:,} accounts, {rows:,} usage rows; building ...", flush=True)
    trees = [("here", ROOT), *([("against", options.against.resolve())] if options.against else [])]
    with ExitStack() as stack:
        if options.whole_batches:
            trees.append(("whole batches", stack.enter_context(taking_all_that_wait())))
        sides = [
            stack.enter_context(served(tree, name, workers=options.workers, accounts=accounts, rows=rows))
            for name, tree in trees
        ]
        _bench(sides, options.rounds, options.seconds)
    growth.report(_PAIRS_OF_GROWTH)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement")
    parser.add_argument("--workers", type=int, default=1, help="HTTP processes")
    parser.add_argument("--large", action="store_true", help="among 1 million accounts and 10 million usage rows")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout, measured in turn with this one")
    parser.add_argument(
        "--whole-batches", action="store_true", help="against this tree, but that batches are not kept even"
    )
    return parser.parse_args()


def _bench(sides: list[Side], rounds: int, seconds: int) -> None:
    here, found = sides[0], [defaultdict[str, list[Run]](list) for _ in sides]
    tpcb = Tpcb(here.database_url)
    for number in range(1, rounds + 1):
        found[0][_TPCB].append(here.during(lambda: tpcb.run(seconds)))
        in_turn = list(zip(sides, found, strict=True))[:: 1 if number % 2 else -1]
        for each in _LOADS:
            for side, runs in in_turn:
                runs[each.name].append(side.during(each.prepared(side, seconds)))
        for side, runs in in_turn:
            for verb, measured in bulk.alone(side.port, side.token, side.keys, seconds).items():
                runs[f"{verb} alone"].append(Run(measured, 0, 0))
        if number == 1:
            found[0][_ORM].append(here.during(lambda: asyncio.run(through_sessions(here.database_url, seconds))))
        for side in sides:
            findings = side.findings()
            told = "audit clean" if not findings else f"AUDIT FOUND {findings[:3]}"
            print(f"round {number}, {side.name}: {told}", flush=True)
    _report(found[0], here.worker_mib())
    for side, runs in zip(sides[1:], found[1:], strict=True):
        _compare(found[0], runs, here.worker_mib(), side.worker_mib())


@dataclass(frozen=True, slots=True)
class _Load:
    """What is asked of a side for some seconds, or until all of it is answered: first prepared, then measured."""

    name: str
    prepared: Callable[[Side, int], Callable[[], Measured]]


def _calls(name: str, kind: Kind, *, hot: bool = False, connections: int = CONNECTIONS) -> _Load:
    """Single calls, of one key or of all others."""

    def prepared(side: Side, seconds: int) -> Callable[[], Measured]:
        return partial(load, side.folder, side.port, side.token, _keys(side, hot), kind, seconds, connections)

    return _Load(name, prepared)


def _bulk(name: str, prepare: Callable[[int, str, list[str]], Callable[[], Measured]], *, hot: bool = False) -> _Load:
    """Calls many at a time, of one key or of all others."""
    return _Load(name, lambda side, _: prepare(side.port, side.token, _keys(side, hot)))


def _keys(side: Side, hot: bool) -> list[str]:
    return side.keys[:1] if hot else side.keys[1:]


_TPCB: Final = "TPC-B"
_ORM: Final = "pairs, SQLModel sessions"
_AUTHORIZE: Final = "authorize, uniform"
_FEW: Final = (1, 4, 16)
"""Connections of authorize, besides all 64."""
_LOADS: Final = (
    _calls("pairs, uniform", "pairs"),
    _calls("pairs, one hot key", "pairs", hot=True),
    _calls("charge, uniform", "charges"),
    _calls("charge, one hot key", "charges", hot=True),
    _calls(_AUTHORIZE, "authorizes"),
    *(_calls(f"authorize, at {count}", "authorizes", connections=count) for count in _FEW),
    _bulk("settle/batch, one hot key", bulk.settles, hot=True),
    _bulk("settle/batch, uniform", bulk.settles),
    _bulk("settle/batch, priced, hot", partial(bulk.settles, is_priced=True), hot=True),
    _bulk("events, one hot key", bulk.events, hot=True),
    _bulk("events, uniform", bulk.events),
    _bulk("events, priced, hot", partial(bulk.events, is_priced=True), hot=True),
)


def _report(found: Found, worker_mib: float) -> None:
    tpcb = found[_TPCB]
    per_second, cost_us = _middle(tpcb, _per_second), _middle(tpcb, _postgres_us)
    print(
        f"\nTPC-B (pgbench -M prepared, {CONNECTIONS} clients, scale {CONNECTIONS}) = 1.0: {per_second:,.0f} per second,"
    )
    print(f"{cost_us:,.0f} us of processor in PostgreSQL each. Per call, in bulk per item but for the milliseconds:\n")
    print(
        f"{'':26}{'ratio':>6}  {'min-max':>10} {'per second':>11} {'p50 ms':>7} {'p99 ms':>7} {'postgres us':>12} {'worker us':>10} {'failed':>7}"
    )
    for name in [name for name in found if name != _TPCB and not name.endswith("alone")]:
        runs = found[name]
        ratios = [_per_second(run) / _per_second(base) for run, base in zip(runs, tpcb, strict=False)]
        print(
            f"{name:26}{median(ratios):6.2f}  {_spread(ratios):>10} {_middle(runs, _per_second):11,.0f} {_middle(runs, _p50):7.1f}"
            f" {_middle(runs, _p99):7.1f} {_middle(runs, _postgres_us):12,.0f}"
            f" {_middle(runs, _worker_us):10,.0f} {sum(run.measured.failed for run in runs):7}"
        )
    print(f"\n{'':26}{'p50 ms':>8} {'p99 ms':>8}")
    for name in [*(each.name for each in _LOADS if each.name.startswith("authorize, ")), *_alone(found)]:
        print(f"{name:26}{_middle(found[name], _p50):8.2f} {_middle(found[name], _p99):8.2f}")
    tails = [_p99(run) / _p50(run) for run in found[_AUTHORIZE]]
    print(f"\np99/p50 of authorize at {CONNECTIONS} connections: {median(tails):.1f} ({_spread(tails, 1)})")
    print(f"memory of a worker: {worker_mib:,.0f} MiB")


def _compare(here: Found, against: Found, here_mib: float, against_mib: float) -> None:
    """Medians of both, and what the rounds' ratios were: above 1 this tree does more a second, or takes longer."""
    print(
        f"\nhere : against, in turn{'':14}{'per second':>21} {'ratio':>6}  {'min-max':>10} {'p50 ms':>15} {'ratio':>6}  {'min-max':>10}"
        f" {'postgres us':>15} {'worker us':>15}"
    )
    for name in against:
        faster, longer = _ratios(here[name], against[name], _per_second), _ratios(here[name], against[name], _p50)
        print(
            f"{name:37}{_middle(here[name], _per_second):9,.0f} : {_middle(against[name], _per_second):9,.0f}"
            f" {median(faster):6.2f}  {_spread(faster):>10} {_middle(here[name], _p50):6.2f} : {_middle(against[name], _p50):6.2f}"
            f" {median(longer):6.2f}  {_spread(longer):>10}"
            f" {_middle(here[name], _postgres_us):6,.0f} : {_middle(against[name], _postgres_us):6,.0f}"
            f" {_middle(here[name], _worker_us):6,.0f} : {_middle(against[name], _worker_us):6,.0f}"
        )
    print(f"memory of a worker, MiB{'':14}{here_mib:9,.0f} : {against_mib:9,.0f} {here_mib / against_mib:6.2f}")


def _alone(found: Found) -> Iterator[str]:
    return (name for name in found if name.endswith("alone"))


def _ratios(here: list[Run], against: list[Run], of: Callable[[Run], float]) -> list[float]:
    """Round by round: what disturbs the machine disturbs both."""
    return [of(mine) / of(other) for mine, other in zip(here, against, strict=True)]


def _middle(runs: list[Run], of: Callable[[Run], float]) -> float:
    return median(map(of, runs))


def _spread(values: list[float], places: int = 2) -> str:
    return f"{min(values):.{places}f}-{max(values):.{places}f}"


def _per_second(run: Run) -> float:
    return run.measured.per_second


def _postgres_us(run: Run) -> float:
    return run.postgres_us


def _worker_us(run: Run) -> float:
    return run.worker_us


def _p50(run: Run) -> float:
    return run.measured.p50_ms


def _p99(run: Run) -> float:
    return run.measured.p99_ms


if __name__ == "__main__":
    sys.exit(main())
