"""The operator's price commands: prices import | check | verify | list | diff | activate | show, and the rules on top: override | markup |
fee | end | rules. Each returns text and data, prints nothing."""

import argparse
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, TypeAlias

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField, ModelNotPriced
from app.kernel.money import decimal_text, parse_usd, units_of, usd_text
from app.kernel.progress import Told, nobody
from app.pricing import rules
from app.pricing.catalogue import (
    MAX_DROP_PERCENT,
    MAX_LEAP_PERCENT,
    Change,
    Diff,
    PriceKey,
    activate,
    active_version,
    compared,
    diff,
    load,
    prices_of,
    store,
    version_of,
    versions,
)
from app.pricing.drafts import Draft, kept
from app.pricing.importer import read_prices, shortened
from app.pricing.quote import Catalogue, rounded_text
from app.pricing.rows import Dimension, explained
from app.pricing.verify import shown, verified

_SHOWN_CHANGES = 40
_PRICE_TEXT: Final = re.compile(r"\d{1,12}(\.\d{1,24})?", re.ASCII)
_FACTOR_TEXT: Final = re.compile(r"\d{1,4}(\.\d{1,6})?", re.ASCII)
_PUSD_PER_USD: Final = 10**12
_MOST_UNITS: Final = 10**12
_WIDEST: Final = max(map(len, Dimension))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command says: to a person, and as one JSON object."""

    text: str
    data: dict[str, Any]


CHANGES: Final = frozenset({"import", "activate", "override", "markup", "fee", "end"})
"""Verbs after which something is other than before."""
Noted: TypeAlias = Callable[[AsyncSession, str, Mapping[str, Any]], Awaitable[None]]
"""Told of each change in its own transaction, by its verb and its answer's data: who keeps a log, writes it there."""


async def noted_nowhere(session: AsyncSession, verb: str, data: Mapping[str, Any]) -> None:
    """No log is kept."""


def add_arguments(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Declare the verbs; `add(verb, help)` makes a parser that has --json already."""
    add("import", "read LiteLLM's, genai-prices' or our own price file into a draft version").add_argument("file")
    add("list", "the price versions")
    compare = add("diff", "what a version changes against the active one, or another")
    compare.add_argument("version", type=int)
    compare.add_argument("--against", type=int, metavar="VERSION", help="default: the active version")
    start = add("activate", "price new calls by this version, from a few seconds on; older ones keep theirs")
    start.add_argument("version", type=int)
    start.add_argument(
        "--max-drop", type=int, default=MAX_DROP_PERCENT, metavar="PERCENT", help="refuse larger drops (50)"
    )
    start.add_argument("--allow-drops", action="store_true", help="activate whatever drops or is gone")
    start.add_argument(
        "--max-leap", type=int, default=MAX_LEAP_PERCENT, metavar="PERCENT", help="refuse larger rises (400)"
    )
    start.add_argument("--allow-leaps", action="store_true", help="activate whatever rises or appears")
    add("check", "what a price file would become, without storing it").add_argument("file")
    verify = add("verify", "price calls whose cost is known, one JSON object a line, and tell what differs")
    verify.add_argument("usage")
    verify.add_argument("--version", type=int, help="default: the active version")
    verify.add_argument("--prices", metavar="FILE", help="by this price file instead")
    show = add("show", "the prices of one model")
    show.add_argument("model")
    show.add_argument("--version", type=int, help="default: the active version")
    _add_rules(add)


def _add_rules(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    override = add("override", "ask this price of a model, whatever is imported")
    override.add_argument("model")
    override.add_argument(
        "dimension", choices=[each.value for each in Dimension], metavar="DIMENSION", help="what is counted; see below"
    )
    override.formatter_class = argparse.RawDescriptionHelpFormatter
    override.epilog = "dimensions, what one unit is:\n" + "\n".join(
        f"  {each.value:<{_WIDEST}}  {explained(each)}" for each in Dimension
    )
    override.add_argument("price_usd", help="such as 0.00000015, or 0.15 with --per 1000000; 0 is free of charge")
    override.add_argument("--per", type=int, default=1, metavar="UNITS", help="how many units that pays for (1)")
    override.add_argument("--provider", default="", help="default: whoever serves it")
    override.add_argument("--from-tokens", type=int, default=0, metavar="N", help="for calls of so much input at least")
    override.add_argument(
        "--attributes", default="", help="for calls asked like this, such as quality=hd;size=1024x1024"
    )
    markup = add("markup", "put a factor on prices, and an amount on each call")
    whose = markup.add_mutually_exclusive_group(required=True)
    whose.add_argument("--default", action="store_true", help="on every call for which there is none nearer")
    whose.add_argument("--provider")
    whose.add_argument("--model", help="a model, or provider/model")
    whose.add_argument("--account", metavar="ACCOUNT_ID", help="on this account's calls, before any other markup")
    markup.add_argument("--factor", default="1", help="1.2 is 20 %% on top (1)")
    markup.add_argument("--per-request", default="0", metavar="USD", help="added to each call (0)")
    fee = add("fee", "ask a fee for a feature, such as web, of each call that uses it")
    fee.add_argument("feature")
    fee.add_argument("price_usd", help="for one call, such as 0.02")
    for each in (override, markup, fee):
        each.add_argument(
            "--from", dest="since", metavar="TIME", help="such as 2026-07-01T00:00:00Z (in a few seconds)"
        )
    add("end", "end an override, a markup or a fee; what calls have cost stays").add_argument("id")
    add("rules", "the overrides, markups and fees that hold now or will")


async def run(
    db: Database, verb: str, args: argparse.Namespace, told: Told = nobody, noted: Noted = noted_nowhere
) -> Answer:
    """One verb in one transaction. Raises AppError with what is wrong with the file, the version or the model."""
    if verb == "verify" and args.prices:
        sold = _read(Path(args.prices))
        return _verified(Catalogue(0, sold.prices, models=sold.models, fees=sold.fees), _bytes(Path(args.usage)))
    draft = _read(Path(args.file)) if verb in ("import", "check") else None
    verbs: dict[str, Callable[[AsyncSession], Any]] = {
        "import": lambda session: import_prices(session, _given(draft), Path(args.file).name, told),
        "verify": lambda session: verify(session, _bytes(Path(args.usage)), args.version),
        "list": list_versions,
        "diff": lambda session: show_diff(session, args.version, args.against),
        "activate": lambda session: make_active(
            session, args.version, max_drop_percent=args.max_drop, allow_drops=args.allow_drops,
            max_leap_percent=args.max_leap, allow_leaps=args.allow_leaps,
        ),
        "check": lambda session: check(session, _given(draft)),
        "show": lambda session: show_model(session, args.model, args.version),
        "override": lambda session: override_price(
            session, args.model, args.dimension, args.price_usd, per=args.per, provider=args.provider,
            from_tokens=args.from_tokens, attributes=args.attributes, since=_moment(args.since),
        ),
        "markup": lambda session: _put_markup(session, args),
        "fee": lambda session: ask_fee(session, args.feature, args.price_usd, _moment(args.since)),
        "end": lambda session: end_rule(session, args.id),
        "rules": list_rules,
    }  # fmt: skip

    async def work(session: AsyncSession) -> Answer:
        answer: Answer = await verbs[verb](session)
        if verb in CHANGES:
            await noted(session, verb, answer.data)
        return answer

    return await db.transaction(work)


async def _put_markup(session: AsyncSession, args: argparse.Namespace) -> Answer:
    try:
        return await put_markup(
            session, *_markup_of(args), factor=args.factor, per_request_usd=args.per_request, since=_moment(args.since)
        )
    except InvalidField as error:  # by the name that was typed
        if error.param not in _OPTIONS:
            raise
        raise InvalidField(f"{_OPTIONS[error.param]}: {error.message}", param=error.param) from None


_OPTIONS: Final = {"factor": "--factor", "per_request_usd": "--per-request"}


def _given(draft: Draft | None) -> Draft:
    assert draft is not None
    return draft


def _read(path: Path) -> Draft:
    return read_prices(_bytes(path))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidField(f"the file cannot be read: {error.strerror}", param="file") from None


async def verify(session: AsyncSession, usage: bytes, version_id: int | None) -> Answer:
    """Price calls whose cost is known by a version, the active one if none is named, with what stands on top of it."""
    chosen = await active_version(session) if version_id is None else version_id
    if chosen is None:
        raise InvalidField("no price version is active; name one, or a price file", param="version")
    return _verified(await load(session, chosen), usage)


def _verified(catalogue: Catalogue, usage: bytes) -> Answer:
    found = verified(catalogue, usage)
    data = {
        "version": catalogue.version_id, "calls": found.lines, "agreed": found.agreed,
        "unpriced": [{"line": number, "why": why} for number, why in found.unpriced],
        "differences": [
            {
                "line": each.line, "model": each.model, "kinds": list(each.kinds), "billed_usd": usd_text(each.billed_nusd),
                "priced_usd": usd_text(each.priced_nusd), "flags": list(each.flags),
            }
            for each in found.differences
        ],
    }  # fmt: skip
    return Answer("\n".join(shown(found)), data)


async def import_prices(session: AsyncSession, draft: Draft, name: str, told: Told = nobody) -> Answer:
    """Store a draft, and say what it would change. Nothing is sold by it yet."""
    if not draft.prices:
        raise InvalidField("the file has no price that could be taken over", param="file")
    version_id = await store(
        session, draft.prices, draft.models, source=draft.format, source_hash=draft.source_hash, note=name, told=told
    )
    found = await diff(session, await active_version(session), version_id)
    lines = [
        f"Version {version_id} is a draft: {len(draft.prices)} prices of {len(draft.models)} models from {draft.format}.",
        *_report_lines(draft),
        *_diff_lines(found),
        f"Nothing is sold by it until: python -m app prices activate {version_id}",
    ]
    return Answer("\n".join(lines), {"version": version_id, **_report_data(draft), "diff": _diff_data(found)})


async def check(session: AsyncSession, draft: Draft) -> Answer:
    """What a price file would become, and what it would change. Nothing is stored."""
    active = await active_version(session)
    old = [] if active is None else await prices_of(session, active)
    found = compared(old, draft.prices, datetime.now(UTC))
    drops, leaps = found.drops(), found.leaps()
    lines = [
        f"{len(draft.prices)} prices of {len(draft.models)} models from {draft.format}; {len(draft.report.left_out)} models left out.",
        *_report_lines(draft),
        *_diff_lines(found),
        *_guarded("would need --allow-drops", drops),
        *_guarded("would need --allow-leaps", leaps),
    ]
    data = {
        **_report_data(draft), "against": active, "diff": _diff_data(found), "drops": _changes_data(drops),
        "leaps": _changes_data(leaps),
    }  # fmt: skip
    return Answer("\n".join(lines), data)


def _guarded(what: str, changes: Sequence[Change]) -> list[str]:
    return [f"{len(changes)} prices {what}:", *_capped(changes, what)] if changes else []


def _report_data(draft: Draft) -> dict[str, Any]:
    report = draft.report
    return {
        "format": draft.format, "source_hash": draft.source_hash, "prices": len(draft.prices),
        "models": len(draft.models), "rounded_up": report.rounded, "doubled": report.doubled,
        "skipped": dict(report.skipped), "unknown_fields": dict(report.unknown_fields), "left_out": report.left_out,
        "extras": dict(report.extras), "fees_not_imported": [fee.feature for fee in draft.fees],
    }  # fmt: skip


def _report_lines(draft: Draft) -> list[str]:
    report = draft.report
    return [
        *_counted("not understood", report.unknown_fields),
        *_counted("left out", report.skipped),
        *_counted("an extra that no usage counts, ask a fee for it", report.extras),
        *(f"not sold: {each}" for each in shortened([f"{model}: {why}" for model, why in report.left_out.items()])),
        *(
            f"a fee, not imported: {fee.feature}; python -m app prices fee {fee.feature} {usd_text(fee.price_nusd)}"
            for fee in draft.fees
        ),
        *(f"rounded up: {each}" for each in shortened(report.rounded)),
        *(f"given twice, the dearer taken: {each}" for each in shortened(report.doubled)),
    ]


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


async def make_active(
    session: AsyncSession,
    version_id: int,
    *,
    max_drop_percent: int = MAX_DROP_PERCENT,
    allow_drops: bool = False,
    max_leap_percent: int = MAX_LEAP_PERCENT,
    allow_leaps: bool = False,
) -> Answer:
    """Raises what `activate` raises."""
    before = await active_version(session)
    found = await activate(
        session, version_id, max_drop_percent=max_drop_percent, allow_drops=allow_drops,
        max_leap_percent=max_leap_percent, allow_leaps=allow_leaps,
    )  # fmt: skip
    since = (await version_of(session, version_id))["activated_at"]
    text = f"Version {version_id} is active from {since:%Y-%m-%d %H:%M:%S} UTC on.\n" + "\n".join(_diff_lines(found))
    return Answer(text, {"active": version_id, "before": before, "since": since.isoformat(), **_diff_data(found)})


async def show_model(session: AsyncSession, model: str, version_id: int | None) -> Answer:
    chosen = await active_version(session) if version_id is None else version_id
    if chosen is None:
        raise InvalidField("no price version is active; see `prices list`", param="version")
    catalogue = await load(session, chosen)
    name, _ = catalogue.resolved(model)
    prices = [
        {
            "provider": provider, "dimension": dimension.value, "min_input_tokens": tier_min, "attributes": attributes,
            "price_usd": rounded_text(price_ausd / 10**18, 18),
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


async def override_price(
    session: AsyncSession,
    model: str,
    dimension: str,
    price_usd: str,
    *,
    per: int = 1,
    provider: str = "",
    from_tokens: int = 0,
    attributes: str = "",
    since: datetime | None = None,
) -> Answer:
    """From a few seconds on, or from `since`, this price instead of what is imported."""
    price_pusd, per_units = _price(price_usd, per)
    model, provider, is_sold = await _names(session, model, provider.lower())
    rule_id = await rules.set_override(
        session, model, Dimension(dimension), price_pusd, provider=provider, tier_min=from_tokens,
        attributes=attributes, per_units=per_units, effective_from=since,
    )  # fmt: skip
    note = (
        "" if is_sold else f"\nNo active version sells {_of(model, provider)}: this is all that is known of its prices."
    )
    return await _made(session, rule_id, note)


async def put_markup(
    session: AsyncSession,
    scope: rules.Scope,
    subject: str,
    *,
    factor: str = "1",
    per_request_usd: str = "0",
    since: datetime | None = None,
) -> Answer:
    """From a few seconds on, or from `since`, this on top of prices."""
    if not _FACTOR_TEXT.fullmatch(factor):
        raise InvalidField(
            "the factor is a decimal number up to 1000, of at most 6 decimals, such as 1.2", param="factor"
        )
    rule_id = await rules.set_markup(
        session, scope, _subject(scope, subject), multiplier_ppm=units_of(Decimal(factor), 6),
        fixed_per_request_nusd=parse_usd(per_request_usd.encode(), "per_request_usd"), effective_from=since,
    )  # fmt: skip
    return await _made(session, rule_id)


async def ask_fee(session: AsyncSession, feature: str, price_usd: str, since: datetime | None) -> Answer:
    """From a few seconds on, or from `since`, this for each call that uses the feature."""
    rule_id = await rules.set_fee(
        session, _name(feature, "feature"), parse_usd(price_usd.encode(), "price_usd"), effective_from=since
    )
    return await _made(session, rule_id)


async def end_rule(session: AsyncSession, text: str) -> Answer:
    """Raises InvalidField if there is no such rule, or it has ended."""
    rule_id = _uuid(text, "id")
    for table in rules.TABLES:
        if await rules.end(session, table, rule_id):
            return Answer(
                f"The rule {rule_id} ends in a few seconds. Calls that began under it keep it.", {"ended": str(rule_id)}
            )
    raise InvalidField(f"no rule {rule_id} holds or will; see `prices rules`", param="id")


async def list_rules(session: AsyncSession) -> Answer:
    found = await _standing(session)
    return Answer("\n".join(map(_rule_line, found)) or "There are no overrides, markups or fees.", {"rules": found})


async def _made(session: AsyncSession, rule_id: uuid.UUID, note: str = "") -> Answer:
    rule = next(each for each in await _standing(session) if each["id"] == str(rule_id))
    return Answer(f"{_rule_line(rule)}{note}\nEnd it with: python -m app prices end {rule_id}", rule)


async def _standing(session: AsyncSession) -> list[dict[str, Any]]:
    return [
        _RULE_DATA[table](each) | _when(each) for table in rules.TABLES for each in await rules.standing(session, table)
    ]


_RULE_DATA: Final[dict[rules.RuleTable, Callable[[Row], dict[str, Any]]]] = {
    "price_override": lambda rule: {
        "id": str(rule["id"]), "kind": "override", "model": rule["model"], "provider": rule["provider"],
        "dimension": rule["dimension"], "min_input_tokens": rule["tier_min"], "attributes": rule["attributes"],
        "price_usd": _usd(Fraction(rule["price_pusd"], rule["per_units"])),
    },
    "markup": lambda rule: {
        "id": str(rule["id"]), "kind": "markup", "scope": rule["scope"], "subject": rule["subject"],
        "factor": decimal_text(rule["multiplier_ppm"], 6), "per_request_usd": usd_text(rule["fixed_per_request_nusd"]),
    },
    "fee": lambda rule: {
        "id": str(rule["id"]), "kind": "fee", "feature": rule["feature"], "price_usd": usd_text(rule["price_nusd"])
    },
}  # fmt: skip


def _when(rule: Row) -> dict[str, str | None]:
    until = rule["effective_to"]
    return {"effective_from": rule["effective_from"].isoformat(), "effective_to": until.isoformat() if until else None}


def _rule_line(rule: dict[str, Any]) -> str:
    if rule["kind"] == "override":
        key = (rule["model"], rule["provider"], rule["dimension"], rule["min_input_tokens"], rule["attributes"])
        what = f"{_named(key)}: {rule['price_usd']} USD a unit"
    elif rule["kind"] == "markup":
        what = (
            f"{rule['scope']} {rule['subject']}".rstrip()
            + f": x {rule['factor']} + {rule['per_request_usd']} USD a call"
        )
    else:
        what = f"{rule['feature']}: {rule['price_usd']} USD a call"
    until = f" until {rule['effective_to']}" if rule["effective_to"] else ""
    return f"{rule['id']}  {rule['kind']:<8}  {what}, from {rule['effective_from']}{until}"


async def _names(session: AsyncSession, model: str, provider: str) -> tuple[str, str, bool]:
    """The names that the catalogue keeps its prices under (`openai/gpt-4o` is openai's gpt-4o), and whether it has any."""
    active = await active_version(session)
    if active is None:
        return _name(model, "model"), provider, False
    try:
        name, seller = (await load(session, active)).resolved(_name(model, "model"), provider)
    except ModelNotPriced:
        return model, provider, False
    named = provider or (seller if name != model else "")
    return name, named, named in ("", seller)


def _markup_of(args: argparse.Namespace) -> tuple[rules.Scope, str]:
    if args.account is not None:
        return "account", args.account
    if args.model is not None:
        return "model", args.model
    return ("default", "") if args.default else ("provider", args.provider)


def _subject(scope: rules.Scope, subject: str) -> str:
    if scope == "account":
        return str(_uuid(subject, "account"))
    return subject if scope == "default" else _name(subject, scope)


def _name(text: str, param: str) -> str:
    if not 1 <= len(text) <= 200 or not text.isprintable() or text != text.strip():
        raise InvalidField(f"{param} is a name of 1 to 200 characters", param=param)
    return text


def _uuid(text: str, param: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise InvalidField(f"{param} must be a UUID, got {text[:50]!r}", param=param) from None


def _price(text: str, per: int) -> tuple[int, int]:
    """USD for `per` units as pico-USD for so many. Raises InvalidField for what is no price, or a finer one."""
    if not _PRICE_TEXT.fullmatch(text) or not 1 <= per <= _MOST_UNITS:
        raise InvalidField("the price is a decimal number in USD for 1 unit, or for --per UNITS", param="price_usd")
    price_pusd, per_units, is_exact = kept(Decimal(text), per)
    if not is_exact:
        raise InvalidField(f"{text} USD for {per} is finer than can be kept", param="price_usd")
    return price_pusd, per_units


def _moment(text: str | None) -> datetime | None:
    """ISO 8601; UTC where it names no zone."""
    try:
        moment = datetime.fromisoformat(text) if text is not None else None
    except ValueError:
        raise InvalidField(f"--from is a time such as 2026-07-01T00:00:00Z, got {text!r:.50}", param="from") from None
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


def _of(model: str, provider: str) -> str:
    return f"{provider}/{model}" if provider else model


def _counted(what: str, counts: Any) -> list[str]:
    return [f"{what}: {name} ({count})" for name, count in counts.most_common(_SHOWN_CHANGES)]


def _diff_lines(found: Diff) -> list[str]:
    """How many, and which: what is gone first, then what falls most, then what is new."""
    moved = sorted(found.changed, key=lambda change: change.hundredths_percent or 0)
    counted = f"{len(found.added)} prices new, {len(found.removed)} gone, {len(found.changed)} changed."
    return [counted, *_capped(found.removed, "gone"), *_capped(moved, "changed"), *_capped(found.added, "new")]


def _capped(changes: Sequence[Change], what: str) -> list[str]:
    more = len(changes) - _SHOWN_CHANGES
    shown = [_change_line(change) for change in changes[:_SHOWN_CHANGES]]
    return [*shown, f"  … and {more} more {what}"] if more > 0 else shown


def _change_line(change: Change) -> str:
    """`p/m output from 100001 tokens: 0.0001 -> 0.000001 (-99 %)`, or one price that is new or gone."""
    prices = " -> ".join(price for price in (change.old_usd, change.new_usd) if price is not None)
    percent = change.percent if change.hundredths_percent is None else f"{change.percent} %"
    return f"  {_named(change.key)}: {prices} ({percent})"


def _named(key: PriceKey) -> str:
    model, provider, dimension, tier_min, attributes = key
    tier = f" from {tier_min} tokens" if tier_min else ""
    return f"{_of(model, provider)} {dimension}{tier} {attributes}".rstrip()


def _usd(price_pusd: Fraction | int | None) -> str | None:
    return None if price_pusd is None else rounded_text(Fraction(price_pusd) / _PUSD_PER_USD, 18)


def _diff_data(found: Diff) -> dict[str, Any]:
    return {
        "added": _changes_data(found.added),
        "removed": _changes_data(found.removed),
        "changed": _changes_data(found.changed),
    }


def _changes_data(changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [
        {
            "model": change.key[0], "provider": change.key[1], "dimension": change.key[2],
            "min_input_tokens": change.key[3], "attributes": change.key[4], "old_usd": change.old_usd,
            "new_usd": change.new_usd, "percent": change.percent, "since": change.since.isoformat(),
        }
        for change in changes
    ]  # fmt: skip


def _version_data(version: Row) -> dict[str, Any]:
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in version.items()}
