"""The operator's usage commands: usage months | export | drop | rebuild. Each returns text and data, prints nothing."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from app.activity.archive import LEAST_AGE, drop, export, months
from app.activity.calendar import Span, read_day, read_month
from app.activity.rollup import rebuild, roll_up
from app.kernel.db import Database
from app.kernel.money import usd_text
from app.kernel.progress import Told, nobody


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command says: to a person, and as one JSON object."""

    text: str
    data: dict[str, Any]


def add_arguments(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Declare the verbs; `add(verb, help)` makes a parser that has --json already."""
    add("months", "the months of calls, and days where calls are kept by day, with rows and bytes")
    save = add(
        "export",
        "write a month's or a day's calls to a gzipped CSV file; a cell that begins like a formula has an apostrophe before it",
    )
    add_span(save)
    save.add_argument("--out", required=True, metavar="FILE.csv.gz")
    gone = add("drop", "drop the calls of an exported month or day; balances, keys and days stay")
    add_span(gone)
    gone.add_argument(
        "--force", action="store_true", help=f"also a month that ended less than {LEAST_AGE.days} days ago"
    )
    add("rebuild", "sum every day's calls again")


def add_span(parser: argparse.ArgumentParser) -> None:
    """A month or a day, one of them."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--month", metavar="YYYY-MM")
    which.add_argument("--day", metavar="YYYY-MM-DD", help="where calls are kept by day: USAGE_PARTITIONS")


async def run(
    db: Database, verb: str, args: argparse.Namespace, told: Told = nobody, reads: Database | None = None
) -> Answer:
    """One verb, with the owner's connection; what is exported is read where `reads` says. Raises AppError with what is wrong."""
    now = datetime.now(UTC)
    if verb == "months":
        return await _months(db)
    if verb == "rebuild":
        await roll_up(db)
        changed = await rebuild(db, told)
        return Answer(f"Every day was summed again: {changed} sums changed.", {"changed": changed})
    span, named = span_of(args)
    if verb == "export":
        saved = await export(db, span, Path(args.out), now, told, reads)
        text = f"{saved.calls} calls, {usd_text(saved.cost_nusd)} USD, SHA-256 {saved.sha256}"
        data = {"calls": saved.calls, "cost_usd": usd_text(saved.cost_nusd), "sha256": saved.sha256}
        return Answer(f"Exported {span}: {text}", named | data)
    await roll_up(db)
    gone = await drop(db, span, now, force=args.force)
    data = {"calls": gone.calls, "cost_usd": usd_text(gone.cost_nusd), "freed_bytes": gone.freed_bytes}
    return Answer(f"Dropped {span}: {gone.calls} calls, {gone.freed_bytes:,} bytes.", named | data)


def span_of(args: argparse.Namespace) -> tuple[Span, dict[str, str]]:
    """What `add_span` asked for, and how it is named in JSON. Raises InvalidField."""
    if args.day:
        return Span(read_day(args.day), is_day=True), {"day": args.day}
    return Span(read_month(args.month)), {"month": args.month}


async def _months(db: Database) -> Answer:
    found = await months(db)
    lines = [each["name"].removeprefix("usage_").replace("_", "-").replace("default", "other  ") for each in found]
    texts = [
        f"{name}  {each['calls']:>12,} calls  {each['bytes']:>15,} bytes  {_state(each)}".rstrip()
        for name, each in zip(lines, found, strict=True)
    ]
    return Answer("\n".join(texts), {"months": [msgspec.to_builtins(each) for each in found]})


def _state(month: dict[str, Any]) -> str:
    if month["dropped_at"] is not None:
        return f"dropped {month['dropped_at']:%Y-%m-%d}"
    return f"exported {month['exported_at']:%Y-%m-%d}" if month["exported_at"] is not None else ""
