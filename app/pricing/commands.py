"""The operator's price commands: prices import | list | diff | activate | show. Each returns text and data, prints nothing."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField
from app.kernel.money import decimal_text
from app.pricing.catalogue import (
    MAX_DROP_PERCENT,
    Change,
    Diff,
    activate,
    active_version,
    diff,
    load,
    store,
    versions,
)
from app.pricing.importer import Draft, read_prices, shortened

_SHOWN_CHANGES = 40


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command says: to a person, and as one JSON object."""

    text: str
    data: dict[str, Any]


def add_arguments(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Declare the verbs; `add(verb, help)` makes a parser that has --json already."""
    add("import", "read LiteLLM's, genai-prices' or our own price file into a draft version").add_argument("file")
    add("list", "the price versions")
    compare = add("diff", "what a version changes against the active one, or another")
    compare.add_argument("version", type=int)
    compare.add_argument("--against", type=int, metavar="VERSION", help="default: the active version")
    start = add("activate", "price new calls by this version; older ones keep theirs")
    start.add_argument("version", type=int)
    start.add_argument(
        "--max-drop", type=int, default=MAX_DROP_PERCENT, metavar="PERCENT", help="refuse larger drops (50)"
    )
    start.add_argument("--allow-drops", action="store_true", help="activate whatever drops")
    show = add("show", "the prices of one model")
    show.add_argument("model")
    show.add_argument("--version", type=int, help="default: the active version")


async def run(db: Database, verb: str, args: argparse.Namespace) -> Answer:
    """One verb in one transaction. Raises AppError with what is wrong with the file, the version or the model."""
    if verb == "import":
        path = Path(args.file)
        draft = _read(path)
        return await db.transaction(lambda session: import_prices(session, draft, path.name))
    verbs: dict[str, Callable[[AsyncSession], Any]] = {
        "list": list_versions,
        "diff": lambda session: show_diff(session, args.version, args.against),
        "activate": lambda session: make_active(session, args.version, args.max_drop, args.allow_drops),
        "show": lambda session: show_model(session, args.model, args.version),
    }
    answer: Answer = await db.transaction(verbs[verb])
    return answer


def _read(path: Path) -> Draft:
    try:
        return read_prices(path.read_bytes())
    except OSError as error:
        raise InvalidField(f"the price file cannot be read: {error.strerror}", param="file") from None


async def import_prices(session: AsyncSession, draft: Draft, name: str) -> Answer:
    """Store a draft, and say what it would change. Nothing is sold by it yet."""
    if not draft.prices:
        raise InvalidField("the file has no price that could be taken over", param="file")
    version_id = await store(
        session, draft.prices, draft.models, source=draft.format, source_hash=draft.source_hash, note=name
    )
    found = await diff(session, await active_version(session), version_id)
    report = draft.report
    data = {
        "version": version_id, "format": draft.format, "source_hash": draft.source_hash,
        "prices": len(draft.prices), "models": len(draft.models), "rounded_up": report.rounded,
        "doubled": report.doubled, "skipped": dict(report.skipped), "unknown_fields": dict(report.unknown_fields),
        "fees_not_imported": [fee.feature for fee in draft.fees], "diff": _diff_data(found),
    }  # fmt: skip
    lines = [
        f"Version {version_id} is a draft: {len(draft.prices)} prices of {len(draft.models)} models from {draft.format}.",
        *_counted("not understood", report.unknown_fields),
        *_counted("left out", report.skipped),
        *(f"rounded up to a pico-dollar: {each}" for each in shortened(report.rounded)),
        *(f"given twice, the dearer taken: {each}" for each in shortened(report.doubled)),
        *_diff_lines(found),
        f"Nothing is sold by it until: python -m app prices activate {version_id}",
    ]
    return Answer("\n".join(lines), data)


async def list_versions(session: AsyncSession) -> Answer:
    found = await versions(session)
    lines = [
        f"{each['id']:>4}  {each['state']:<8} {each['created_at']:%Y-%m-%d %H:%M}  {each['models']} models,"
        f" {each['prices']} prices  {each['source']}  {each['note']}".rstrip()
        for each in found
    ]
    return Answer("\n".join(lines) or "There are no price versions.", {"versions": [_version_data(v) for v in found]})


async def show_diff(session: AsyncSession, version_id: int, against: int | None) -> Answer:
    old_id = await active_version(session) if against is None else against
    found = await diff(session, old_id, version_id)
    data = {"version": version_id, "against": old_id, **_diff_data(found)}
    return Answer("\n".join(_diff_lines(found)), data)


async def make_active(session: AsyncSession, version_id: int, max_drop_percent: int, allow_drops: bool) -> Answer:
    found = await activate(session, version_id, max_drop_percent=max_drop_percent, allow_drops=allow_drops)
    text = f"Version {version_id} is active.\n" + "\n".join(_diff_lines(found))
    return Answer(text, {"active": version_id, **_diff_data(found)})


async def show_model(session: AsyncSession, model: str, version_id: int | None) -> Answer:
    chosen = await active_version(session) if version_id is None else version_id
    if chosen is None:
        raise InvalidField("no price version is active; see `prices list`", param="version")
    catalogue = await load(session, chosen)
    name, _ = catalogue.resolved(model)
    prices = [
        {
            "provider": provider, "dimension": dimension.value, "min_input_tokens": tier_min, "attributes": attributes,
            "price_usd": decimal_text(price_ausd, 18),
        }
        for provider in catalogue.providers_of(name)
        for dimension, tier_min, attributes, price_ausd in catalogue.listed(name, provider, datetime.now(UTC))
    ]  # fmt: skip
    lines = [
        f"{each['provider']:<16} {each['dimension']:<15} {each['price_usd']:<16}"
        f" {'from ' + str(each['min_input_tokens']) + ' input tokens' if each['min_input_tokens'] else ''}"
        f" {each['attributes']}".rstrip()
        for each in prices
    ]
    text = f"{name} in version {chosen}, USD per unit with markup:\n" + "\n".join(lines)
    return Answer(text, {"model": name, "version": chosen, "prices": prices})


def _counted(what: str, counts: Any) -> list[str]:
    return [f"{what}: {name} ({count})" for name, count in counts.most_common(_SHOWN_CHANGES)]


def _diff_lines(found: Diff) -> list[str]:
    moved = sorted(found.changed, key=lambda change: change.hundredths_percent or 0)
    shown = [_change_line(change) for change in moved[:_SHOWN_CHANGES]]
    more = [f"… and {len(moved) - _SHOWN_CHANGES} more"] if len(moved) > _SHOWN_CHANGES else []
    counted = f"{len(found.added)} prices new, {len(found.removed)} gone, {len(found.changed)} changed."
    return [counted, *shown, *more]


def _change_line(change: Change) -> str:
    percent = change.percent if change.hundredths_percent is None else f"{change.percent} %"
    return f"  {_named(change)}: {_usd(change.old_pusd)} -> {_usd(change.new_pusd)} ({percent})"


def _named(change: Change) -> str:
    model, provider, dimension, tier_min, attributes = change.key
    tier = f" from {tier_min} tokens" if tier_min else ""
    return f"{provider}/{model} {dimension}{tier} {attributes}".rstrip()


def _usd(price_pusd: int | None) -> str | None:
    return None if price_pusd is None else decimal_text(price_pusd, 12)


def _diff_data(found: Diff) -> dict[str, Any]:
    def data(changes: Sequence[Change]) -> list[dict[str, Any]]:
        return [
            {
                "model": change.key[0], "provider": change.key[1], "dimension": change.key[2],
                "min_input_tokens": change.key[3], "attributes": change.key[4], "old_usd": _usd(change.old_pusd),
                "new_usd": _usd(change.new_pusd), "percent": change.percent, "since": change.since.isoformat(),
            }
            for change in changes
        ]  # fmt: skip

    return {"added": data(found.added), "removed": data(found.removed), "changed": data(found.changed)}


def _version_data(version: Row) -> dict[str, Any]:
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in version.items()}
