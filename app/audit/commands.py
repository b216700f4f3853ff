"""The operator's entries commands: entries export | drop. Each returns text and data, prints nothing."""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from app.activity.commands import Answer, add_span, span_of
from app.audit.putting_away import LEAST_AGE, drop, export
from app.kernel.db import Database
from app.kernel.money import usd_text
from app.kernel.progress import Told, nobody
from app.kernel.security import Pepper


def add_arguments(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Declare the verbs; `add(verb, help)` makes a parser that has --json already."""
    save = add(
        "export", "write the ledger entries of dropped calls to a gzipped CSV file; those of refunded calls stay"
    )
    add_span(save)
    save.add_argument("--out", required=True, metavar="FILE.csv.gz")
    add_span(
        add(
            "drop",
            f"delete exported entries, {LEAST_AGE.days} days after their month at the earliest; sums and seals stay",
        )
    )


async def run(
    db: Database,
    pepper: Pepper,
    verb: str,
    args: argparse.Namespace,
    told: Told = nobody,
    reads: Database | None = None,
) -> Answer:
    """One verb, with the owner's connection. Raises AppError with what is wrong."""
    span, named = span_of(args)
    if verb == "export":
        done, says = await export(db, span, Path(args.out), told, reads), "Exported"
    else:
        done, says = await drop(db, pepper, span, datetime.now(UTC), told), "Dropped"
    data = {"entries": done.entries, "amount_usd": usd_text(done.amount_nusd), "sha256": done.sha256}
    text = f"{says} {span}: {done.entries} entries, {usd_text(done.amount_nusd)} USD, SHA-256 of the file {done.sha256}"
    return Answer(text, named | data)
