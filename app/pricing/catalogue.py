"""Versions of the price catalogue: loaded, cached in process, compared, activated one at a time."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any, Final, TypeAlias

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row, rows
from app.kernel.errors import AppError, InvalidField, ModelNotPriced
from app.kernel.money import decimal_text
from app.kernel.progress import Told, nobody
from app.pricing.quote import Catalogue, rounded_text
from app.pricing.rows import PART_OF, Dimension, FeeRow, MarkupRow, ModelRow, PriceRow, parse_attributes
from app.pricing.rules import NOTICE_SECONDS, soonest
from app.pricing.sheet import Prices, Sheet
from app.pricing.tables import Price, PricedModel

MAX_DROP_PERCENT: Final = 50
MAX_LEAP_PERCENT: Final = 400
_REREAD_SECONDS: Final = 1.0
_KEPT_VERSIONS: Final = 4
_PUSD_PER_USD: Final = 10**12
_PRICES_AT_ONCE: Final = 2000
_VERSIONS_LOCK: Final = 0x5A7_9C1E5
PriceKey: TypeAlias = tuple[str, str, str, int, str]
"""model, provider, dimension, tier_min, attributes"""


class NoActiveVersion(ModelNotPriced):
    """No price version is active, so nothing is sold."""


class PriceDropTooLarge(AppError):
    """A price would drop by more than is allowed without saying so, or be gone."""

    status, code, type = 422, "price_drop_too_large", "invalid_request_error"


class PriceLeapTooLarge(AppError):
    """A price would rise by more than is allowed without saying so, or appear for a model that is sold already."""

    status, code, type = 422, "price_leap_too_large", "invalid_request_error"


@dataclass(frozen=True, slots=True)
class _Version:
    """A version that was activated: how often what stands on top of it has changed, and since when it is in effect."""

    id: int
    revision: int
    activated_at: datetime | None


class Catalogues:
    """The catalogues this process has loaded. What is in effect is asked again at most every second.

    What is known here is a hint: an id that is not known is asked for again at once. Time is the database's, told by the
    last look at it, so that processes whose clocks differ agree on what holds. One object for the process; several tasks
    may use it at once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = asyncio.Lock()
        self._versions: dict[int, _Version] = {}
        self._by_time: tuple[_Version, ...] = ()
        self._read_at: datetime | None = None
        self._read_at_seconds = 0.0
        self._fresh_until: float | None = None
        self._loaded: dict[int, Catalogue] = {}

    async def current(self, db: Database) -> Catalogue:
        """The version in effect. Raises NoActiveVersion, DatabaseUnavailable."""
        return (await self.now(db))[0]

    async def now(self, db: Database) -> tuple[Catalogue, datetime]:
        """The version in effect, and the moment that it is asked for: a call is priced by both, whenever it is settled.

        Raises NoActiveVersion, DatabaseUnavailable.
        """
        version_id, moment = await self.moment(db)
        if version_id is None:  # somebody may just have begun to sell
            await self._reread(db, since=self._clock())
            version_id, moment = await self.moment(db)
        if version_id is None:
            raise NoActiveVersion
        return await self._get(db, version_id), moment

    async def moment(self, db: Database) -> tuple[int | None, datetime]:
        """The same without loading the version: its id, None while nothing is sold. Raises DatabaseUnavailable."""
        await self._reread(db)
        moment = self._now()  # nothing is awaited in between: whatever has begun by then was read
        return self._in_effect(moment), moment

    async def at(self, db: Database, version_id: int) -> Catalogue:
        """An activated version, for a call that began under it. Raises InvalidField if there is none of that id."""
        await self._reread(db)
        if version_id not in self._versions:  # it may have been activated since, and another process have held by it
            await self._reread(db, since=self._clock())
        if version_id not in self._versions:
            raise InvalidField(f"no price version {version_id} was ever active", param="price_version")
        return await self._get(db, version_id)

    def known(self, version_id: int) -> Catalogue | None:
        """The same where it is at hand, for whom not to wait is worth it; else None, and `at` has it."""
        loaded = self._loaded.get(version_id)
        if loaded is None or not self._is_fresh(None) or loaded.revision < self._versions[version_id].revision:
            return None
        return loaded

    def _now(self) -> datetime:
        """By the database's clock, or a little less: never so late that something has begun which was not read."""
        assert self._read_at is not None
        return self._read_at + timedelta(seconds=self._clock() - self._read_at_seconds)

    def _in_effect(self, moment: datetime) -> int | None:
        """The version that was activated last. An older one that came back has the time when it did."""
        for version in reversed(self._by_time):
            if version.activated_at is not None and version.activated_at <= moment:
                return version.id
        return None

    async def _reread(self, db: Database, since: float | None = None) -> None:
        """Unless it was read less than a second ago, or after `since`. Whoever comes meanwhile waits for the same."""
        if self._is_fresh(since):
            return
        async with self._lock:
            if self._is_fresh(since):
                return
            asked_at = self._clock()
            found = await db.transaction(_activated)
            versions = [_Version(each["id"], each["revision"], each["activated_at"]) for each in found if each["id"]]
            self._versions = {version.id: version for version in versions}
            self._by_time = tuple(versions)
            self._read_at, self._read_at_seconds = found[0]["now"], self._clock()
            self._fresh_until = asked_at + _REREAD_SECONDS

    def _is_fresh(self, since: float | None) -> bool:
        if self._fresh_until is None:
            return False
        return self._clock() < self._fresh_until if since is None else self._fresh_until - _REREAD_SECONDS >= since

    async def _get(self, db: Database, version_id: int) -> Catalogue:
        loaded = self._loaded.get(version_id)
        if loaded is not None and loaded.revision >= self._versions[version_id].revision:
            return loaded
        async with self._lock:
            loaded = self._loaded.pop(version_id, None)
            if loaded is None or loaded.revision < self._versions[version_id].revision:
                loaded = await db.transaction(lambda session: load(session, version_id))
            self._loaded[version_id] = loaded
            self._forget_the_oldest()
            return loaded

    def _forget_the_oldest(self) -> None:
        in_effect = self._in_effect(self._now())
        for version_id in list(self._loaded)[: max(0, len(self._loaded) - _KEPT_VERSIONS)]:
            if version_id != in_effect:
                del self._loaded[version_id]


async def _activated(session: AsyncSession) -> list[Row]:
    """Those that were ever active, the last activated last, each with the time now; one row without a version if there is none."""
    return await rows(
        session,
        """SELECT clock_timestamp() AS now, v.id, v.revision, v.activated_at
           FROM (SELECT 1) one LEFT JOIN price_version v ON v.state <> 'draft' ORDER BY v.activated_at NULLS FIRST, v.id""",
    )


def names_of(catalogue: Catalogue, model: str) -> tuple[str, ...]:
    """The names, this one first, that mean what it means: a model alone, and after its seller and a slash. At most two.

    For a list of allowed models, so nothing near is taken for it: no other case, date or seller. A model alone is whom the
    catalogue takes it from. A name that a model of its own bears means that one.
    """
    if sellers := _sellers(catalogue, model):
        long = f"{sellers[0]}/{model}"
        return (model, long) if sellers[0] and not _sellers(catalogue, long) else (model,)
    seller, _, name = model.partition("/")
    return (model, name) if seller and _sellers(catalogue, name)[:1] == (seller,) else (model,)


def _sellers(catalogue: Catalogue, model: str) -> tuple[str, ...]:
    try:
        return catalogue.providers_of(model)
    except KeyError:
        return ()


async def load(session: AsyncSession, version_id: int) -> Catalogue:
    """One version with everything that is on top of it. Raises InvalidField if there is none of that id."""
    version = await version_of(session, version_id)
    models = await rows(
        session,
        """SELECT model, provider, mode, max_output_tokens, context_tokens, default_attributes, match
           FROM priced_model WHERE version_id = :id""",
        id=version_id,
    )
    overrides = await rows(
        session,
        """SELECT model, provider, dimension, price_pusd, per_units, tier_min, attributes, effective_from, effective_to
           FROM price_override ORDER BY effective_from, id""",
    )
    markups = await rows(
        session,
        """SELECT scope, subject, multiplier_ppm, fixed_per_request_nusd, effective_from, effective_to
           FROM markup ORDER BY effective_from, id""",
    )
    fees = await rows(
        session, "SELECT feature, price_nusd, effective_from, effective_to FROM fee ORDER BY effective_from, id"
    )
    return await build(version, await _price_rows(session, version_id), models, overrides, markups, fees)


async def build(
    version: Row,
    prices: Sequence[Row],
    models: Sequence[Row] = (),
    overrides: Sequence[Row] = (),
    markups: Sequence[Row] = (),
    fees: Sequence[Row] = (),
) -> Catalogue:
    """In a thread, because a large catalogue takes a second, in which the loop goes on with other calls."""

    def work() -> Catalogue:
        return Catalogue(
            version["id"],
            map(_price_row, prices),
            models=[ModelRow(**found) for found in models],
            overrides=map(_price_row, overrides),
            markups=[MarkupRow(**found) for found in markups],
            fees=[FeeRow(**found) for found in fees],
            revision=version["revision"],
            created=int(version["created_at"].timestamp()),
        )

    return await asyncio.to_thread(work)


async def version_of(session: AsyncSession, version_id: int) -> Row:
    """Raises InvalidField if there is no such version."""
    found = await row(session, "SELECT * FROM price_version WHERE id = :id", id=version_id)
    if found is None:
        raise InvalidField(f"there is no price version {version_id}", param="version")
    return found


async def prices_of(session: AsyncSession, version_id: int) -> list[PriceRow]:
    return [_price_row(found) for found in await _price_rows(session, version_id)]


async def _price_rows(session: AsyncSession, version_id: int) -> list[Row]:
    return await rows(
        session,
        """SELECT model, provider, dimension, price_pusd, per_units, tier_min, attributes, effective_from, effective_to
           FROM price WHERE version_id = :id ORDER BY model, provider, dimension, tier_min, attributes, effective_from""",
        id=version_id,
    )


def _price_row(found: Row) -> PriceRow:
    return PriceRow(**{**found, "dimension": Dimension(found["dimension"])})


async def versions(session: AsyncSession) -> list[Row]:
    """Every version, newest first, with how many prices and models it has."""
    return await rows(
        session,
        """SELECT v.id, v.source, v.source_hash, v.note, v.state, v.created_at, v.activated_at,
                  (SELECT count(*) FROM price p WHERE p.version_id = v.id) AS prices,
                  (SELECT count(DISTINCT (p.model, p.provider)) FROM price p WHERE p.version_id = v.id) AS models
           FROM price_version v ORDER BY v.id DESC""",
    )


async def active_version(session: AsyncSession) -> int | None:
    found = await row(session, "SELECT id FROM price_version WHERE state = 'active'")
    return None if found is None else int(found["id"])


async def store(
    session: AsyncSession,
    prices: Sequence[PriceRow],
    models: Sequence[ModelRow],
    *,
    source: str,
    source_hash: str,
    note: str = "",
    told: Told = nobody,
) -> int:
    """Write a new draft and return its id. Nothing is sold by it until it is activated."""
    await lock_versions(session)
    newest = await row(session, "SELECT coalesce(max(id), 0) AS id FROM price_version")
    assert newest is not None
    version_id = int(newest["id"]) + 1
    await rows(
        session,
        "INSERT INTO price_version (id, source, source_hash, note) VALUES (:id, :source, :hash, :note)",
        id=version_id, source=source, hash=source_hash, note=note,
    )  # fmt: skip
    await _insert_all(session, PricedModel, models, version_id)
    for start in range(0, len(prices), _PRICES_AT_ONCE):
        told(start, len(prices))
        await _insert_all(session, Price, prices[start : start + _PRICES_AT_ONCE], version_id)
    told(len(prices), len(prices))
    return version_id


async def lock_versions(session: AsyncSession) -> None:
    """One writer of versions at a time, until the transaction ends."""
    await rows(session, "SELECT pg_advisory_xact_lock(:lock)", lock=_VERSIONS_LOCK)


async def _insert_all(session: AsyncSession, table: Any, values: Sequence[Any], version_id: int) -> None:
    if values:
        columns = type(values[0]).__dataclass_fields__
        await session.execute(
            insert(table), [{"version_id": version_id} | {c: getattr(value, c) for c in columns} for value in values]
        )


@dataclass(frozen=True, slots=True)
class Change:
    """A price in two versions, pico-USD per unit; None where one has none. `since` is when the second one holds."""

    key: PriceKey
    old_pusd: Fraction | None
    new_pusd: Fraction | None
    since: datetime

    @property
    def hundredths_percent(self) -> int | None:
        """The change in 0.01 %, rounded down; None where there is nothing to compare with."""
        if not self.old_pusd or self.new_pusd is None:
            return None
        return (self.new_pusd - self.old_pusd) * 10_000 // self.old_pusd

    @property
    def percent(self) -> str:
        """Such as `-50` or `12.5`; `new` and `gone` where there is nothing to compare."""
        if self.old_pusd is None:
            return "new"
        if self.new_pusd is None:
            return "gone"
        change = self.hundredths_percent
        return "was free" if change is None else decimal_text(change, 2)

    @property
    def old_usd(self) -> str | None:
        return _usd_of(self.old_pusd)

    @property
    def new_usd(self) -> str | None:
        return _usd_of(self.new_pusd)

    def is_drop_over(self, percent: int) -> bool:
        """Whether the price falls by more than `percent` or to a tenth, or is gone: of an old price of nothing, none can."""
        if self.old_pusd is None:
            return False
        if self.new_pusd is None:
            return True
        return (self.old_pusd - self.new_pusd) * 100 > self.old_pusd * percent or self._is_shifted(
            self.old_pusd, self.new_pusd
        )

    def is_leap_over(self, percent: int) -> bool:
        """Whether the price rises by more than `percent` or tenfold, or appears: each is a leap from nothing."""
        if self.new_pusd is None:
            return False
        if not self.old_pusd:
            return self.new_pusd > 0
        return (self.new_pusd - self.old_pusd) * 100 > self.old_pusd * percent or self._is_shifted(
            self.new_pusd, self.old_pusd
        )

    @staticmethod
    def _is_shifted(more: Fraction, less: Fraction) -> bool:
        """Whether one is the other with its point moved, as where a price for a thousand is taken for one of a million."""
        while less and more > less:
            more /= 10
            if more == less:
                return True
        return False


def _usd_of(price_pusd: Fraction | None) -> str | None:
    return None if price_pusd is None else rounded_text(Fraction(price_pusd) / _PUSD_PER_USD, 18)


@dataclass(frozen=True, slots=True)
class Diff:
    """What a version would change for a call.

    A line that comes or goes where another line has a price too has changed from or to that price; only what had no
    price before is new, and only what has none afterwards is gone.
    """

    added: tuple[Change, ...]
    removed: tuple[Change, ...]
    changed: tuple[Change, ...]

    sold: frozenset[tuple[str, str]] = field(default=frozenset(), compare=False)
    """Models and providers that were sold before: a price that one of them gets is a leap, of a new model it is none."""

    def drops(self, percent: int = MAX_DROP_PERCENT) -> tuple[Change, ...]:
        return tuple(change for change in (*self.removed, *self.changed) if change.is_drop_over(percent))

    def leaps(self, percent: int = MAX_LEAP_PERCENT) -> tuple[Change, ...]:
        appeared = (change for change in self.added if change.key[:2] in self.sold)
        return tuple(change for change in (*appeared, *self.changed) if change.is_leap_over(percent))


def compared(old: Iterable[PriceRow], new: Iterable[PriceRow], now: datetime) -> Diff:
    """What each price of either version comes to now, and whenever one of its model changes after, in both."""
    was, will_be = _by_model(old), _by_model(new)
    found: dict[tuple[bool, bool], list[Change]] = defaultdict(list)
    for sold in was.keys() | will_be.keys():
        for change in _changes(was.get(sold, ()), will_be.get(sold, ()), now):
            found[change.old_pusd is None, change.new_pusd is None].append(change)
    added, removed, changed = (
        sorted(found[kind], key=lambda change: (change.key, change.since))
        for kind in ((True, False), (False, True), (False, False))
    )
    return Diff(tuple(added), tuple(removed), tuple(changed), frozenset(was))


def _by_model(prices: Iterable[PriceRow]) -> dict[tuple[str, str], list[PriceRow]]:
    grouped: dict[tuple[str, str], list[PriceRow]] = defaultdict(list)
    for each in prices:
        grouped[each.model, each.provider].append(each)
    return grouped


def _changes(old: Sequence[PriceRow], new: Sequence[PriceRow], now: datetime) -> Iterator[Change]:
    """Those of one model at one provider. A difference that lasts is told once, from when it begins."""
    if set(old) == set(new):
        return
    was, will_be = Sheet(old), Sheet(new)
    moments = _moments((*old, *new), now)
    for model, provider, dimension, tier_min, attributes in sorted({_key(each) for each in (*old, *new)}):
        before: tuple[Fraction | None, Fraction | None] = (None, None)
        for since in moments:
            old_pusd, new_pusd = (
                _charged(Prices(model, provider, (sheet,), parse_attributes(attributes), tier_min, since), dimension)
                for sheet in (was, will_be)
            )
            if old_pusd != new_pusd and (old_pusd, new_pusd) != before:
                key = (model, provider, dimension.value, tier_min, attributes)
                yield Change(key, old_pusd, new_pusd, since)
            before = (old_pusd, new_pusd)


def _key(price: PriceRow) -> tuple[str, str, Dimension, int, str]:
    return price.model, price.provider, price.dimension, price.tier_min, price.attributes


def _moments(prices: Iterable[PriceRow], now: datetime) -> list[datetime]:
    """Now, and whenever a price begins or ends after."""
    marks = {moment for each in prices for moment in (each.effective_from, each.effective_to) if moment is not None}
    return sorted({now} | {moment for moment in marks if moment > now})


def _charged(prices: Prices, dimension: Dimension) -> Fraction | None:
    """What a unit is charged at; where it has no price of its own, as what it is a part of."""
    price = prices.charged(dimension)
    if price is None and (whole := PART_OF.get(dimension)) is not None:
        price = prices.charged(whole)
    return None if price is None else Fraction(*price)


async def diff(session: AsyncSession, old_id: int | None, new_id: int) -> Diff:
    """What activating `new_id` instead of `old_id` changes. Raises InvalidField for an unknown version."""
    now = await _now(session)
    await version_of(session, new_id)
    if old_id is not None:
        await version_of(session, old_id)
    old = [] if old_id is None else await prices_of(session, old_id)
    return compared(old, await prices_of(session, new_id), now)


async def activate(
    session: AsyncSession,
    version_id: int,
    *,
    max_drop_percent: int = MAX_DROP_PERCENT,
    allow_drops: bool = False,
    max_leap_percent: int = MAX_LEAP_PERCENT,
    allow_leaps: bool = False,
    notice_seconds: float = NOTICE_SECONDS,
) -> Diff:
    """Make a version the one that new calls are priced by, from a few seconds on; the one before is retired.

    The first one ever begins at once: nothing was sold before. An older one may come back.
    Raises InvalidField for an unknown version or one without prices; PriceDropTooLarge, naming the worst, if a price drops
    by more than `max_drop_percent` or is gone, unless `allow_drops`; PriceLeapTooLarge likewise for what rises or appears.
    """
    await lock_versions(session)
    before = await active_version(session)
    if before == version_id:
        return Diff((), (), ())
    found = await diff(session, before, version_id)
    if not await rows(session, "SELECT 1 FROM price WHERE version_id = :id LIMIT 1", id=version_id):
        raise InvalidField(f"price version {version_id} has no prices", param="version")
    if not allow_drops:
        _refuse_drops(found.drops(max_drop_percent), max_drop_percent)
    if not allow_leaps:
        _refuse_leaps(found.leaps(max_leap_percent), max_leap_percent)
    await rows(session, "UPDATE price_version SET state = 'retired' WHERE state = 'active'")
    if version_id == await _in_effect(session):  # the one before was to begin, and now never does
        await rows(session, "UPDATE price_version SET activated_at = NULL WHERE id = :id", id=before)
        await rows(session, "UPDATE price_version SET state = 'active' WHERE id = :id", id=version_id)
        return found
    await rows(
        session,
        "UPDATE price_version SET state = 'active', activated_at = :moment WHERE id = :id",
        id=version_id, moment=await soonest(session, 0 if before is None else notice_seconds),
    )  # fmt: skip
    return found


async def _in_effect(session: AsyncSession) -> int | None:
    """The version that calls of this moment are priced by."""
    found = await row(
        session,
        """SELECT id FROM price_version WHERE state <> 'draft' AND activated_at <= clock_timestamp()
           ORDER BY activated_at DESC, id DESC LIMIT 1""",
    )
    return None if found is None else int(found["id"])


def _refuse_drops(drops: tuple[Change, ...], max_drop_percent: int) -> None:
    if not drops:
        return
    gone = [change for change in drops if change.new_pusd is None]
    fallen = sorted(
        (change for change in drops if change.new_pusd is not None), key=lambda change: change.hundredths_percent or 0
    )
    said = []
    if fallen:
        said.append(f"{len(fallen)} prices drop by more than {max_drop_percent} %, such as {_worst(fallen)}")
    if gone:
        models = sorted({change.key[0] for change in gone})
        said.append(f"{len(gone)} prices of {len(models)} models are gone, such as of {', '.join(models[:5])}")
    raise PriceDropTooLarge(
        f"{'; '.join(said)}; look at the diff, then activate with --allow-drops if they are right",
        metadata={"drops": len(fallen), "gone": len(gone)},
    )


def _refuse_leaps(leaps: tuple[Change, ...], max_leap_percent: int) -> None:
    if not leaps:
        return
    appeared = [change for change in leaps if change.old_pusd is None]
    risen = sorted(
        (change for change in leaps if change.old_pusd is not None),
        key=lambda change: -(change.hundredths_percent or 0),
    )
    said = []
    if risen:
        said.append(f"{len(risen)} prices rise by more than {max_leap_percent} %, such as {_worst(risen)}")
    if appeared:
        models = sorted({change.key[0] for change in appeared})
        said.append(
            f"{len(appeared)} prices appear of {len(models)} models that are sold, such as of {', '.join(models[:5])}"
        )
    raise PriceLeapTooLarge(
        f"{'; '.join(said)}; look at the diff, then activate with --allow-leaps if they are right",
        metadata={"leaps": len(risen), "appeared": len(appeared)},
    )


def _worst(changes: Sequence[Change]) -> str:
    """`m input -99 % (0.000003 to 0.00000003 USD)`, …"""
    return ", ".join(
        f"{each.key[0]} {each.key[2]} {each.percent} % ({each.old_usd} to {each.new_usd} USD)" for each in changes[:5]
    )


async def _now(session: AsyncSession) -> datetime:
    found = await row(session, "SELECT now() AS now")
    assert found is not None
    now: datetime = found["now"]
    return now
