"""What the operator says on top of the imported prices: overrides, markups, fees. Added and ended, never edited."""

import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final, Literal, get_args

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, new_id, row, rows
from app.kernel.errors import InvalidField
from app.kernel.money import MAX_NUSD
from app.pricing.rows import PPM, Dimension, attributes_text, parse_attributes

RuleTable = Literal["price_override", "markup", "fee"]
Scope = Literal["default", "provider", "model", "account"]
TABLES: Final[tuple[RuleTable, ...]] = get_args(RuleTable)
NOTICE_SECONDS: Final = 5.0
"""How long after it is set a rule, or a version, begins to hold: every process has read it by then, as each reads again what
is older than a second. A call is so held for and charged by the same prices, whichever processes it comes to."""
_MAX_PUSD = 10**18


async def set_override(
    session: AsyncSession,
    model: str,
    dimension: Dimension,
    price_pusd: int,
    *,
    provider: str = "",
    tier_min: int = 0,
    attributes: str = "",
    per_units: int = 1,
    effective_from: datetime | None = None,
    notice_seconds: float = NOTICE_SECONDS,
) -> uuid.UUID:
    """From a few seconds on, or from a later moment, this is the price for so many units, whatever is imported.

    The override before it ends then.

    An override fits every call that has its attributes and its tier, also where an imported price fits more closely.
    Raises InvalidField for a moment in the past or a price out of range.
    """
    _check_range(price_pusd, _MAX_PUSD, "price_pusd")
    _check_range(tier_min, 10**12, "tier_min")
    override_id = new_id()
    await _replace(
        session,
        "price_override",
        {
            "model": model, "provider": provider.lower(), "dimension": dimension.value, "tier_min": tier_min,
            "attributes": attributes_text(parse_attributes(attributes)),
        },
        {"price_pusd": price_pusd, "per_units": per_units},
        override_id,
        effective_from,
        notice_seconds,
    )  # fmt: skip
    return override_id


async def set_markup(
    session: AsyncSession,
    scope: Scope,
    subject: str = "",
    *,
    multiplier_ppm: int = PPM,
    fixed_per_request_nusd: int = 0,
    effective_from: datetime | None = None,
    notice_seconds: float = NOTICE_SECONDS,
) -> uuid.UUID:
    """What is put on prices: parts per million of them, and nano-USD on each call. Replaces the one of this subject."""
    if (scope == "default") != (subject == ""):
        raise InvalidField("a markup has a subject, but for the default one", param="subject")
    _check_range(multiplier_ppm, 1000 * PPM, "multiplier_ppm")
    _check_range(fixed_per_request_nusd, MAX_NUSD, "fixed_per_request_nusd")
    markup_id = new_id()
    values = {"multiplier_ppm": multiplier_ppm, "fixed_per_request_nusd": fixed_per_request_nusd}
    named = {"scope": scope, "subject": subject.lower() if scope == "provider" else subject}
    await _replace(session, "markup", named, values, markup_id, effective_from, notice_seconds)
    return markup_id


async def set_fee(
    session: AsyncSession,
    feature: str,
    price_nusd: int,
    *,
    effective_from: datetime | None = None,
    notice_seconds: float = NOTICE_SECONDS,
) -> uuid.UUID:
    """What a feature costs for one request, in nano-USD. Replaces the fee of this feature."""
    _check_range(price_nusd, MAX_NUSD, "price_nusd")
    fee_id = new_id()
    await _replace(
        session, "fee", {"feature": feature}, {"price_nusd": price_nusd}, fee_id, effective_from, notice_seconds
    )
    return fee_id


async def end(
    session: AsyncSession, table: RuleTable, rule_id: uuid.UUID, *, notice_seconds: float = NOTICE_SECONDS
) -> bool:
    """From a few seconds on this rule does not hold any more. False if there is no such rule that could end."""
    await tell_everybody(session)
    found = await row(
        session,
        f"""UPDATE {table} SET effective_to = greatest(:moment, effective_from)
            WHERE id = :id AND (effective_to IS NULL OR effective_to > :moment) RETURNING id""",
        id=rule_id,
        moment=await soonest(session, notice_seconds),
    )
    return found is not None


async def standing(session: AsyncSession, table: RuleTable) -> list[Row]:
    """The rules that hold now or will, the oldest first."""
    return await rows(
        session,
        f"""SELECT * FROM {table} WHERE effective_to IS NULL OR effective_to > greatest(now(), effective_from)
            ORDER BY effective_from, id""",
    )


async def soonest(session: AsyncSession, notice_seconds: float) -> datetime:
    """When what is set at this moment can begin: by the clock, as a transaction may have begun long before."""
    found = await row(
        session, "SELECT clock_timestamp() + make_interval(secs => :notice) AS moment", notice=notice_seconds
    )
    assert found is not None
    moment: datetime = found["moment"]
    return moment


async def tell_everybody(session: AsyncSession) -> None:
    """Every process sees within a second that what stands on top of the versions has changed. Waits for whoever is telling."""
    await rows(session, "UPDATE price_version SET revision = revision + 1 WHERE state <> 'draft'")


async def _replace(
    session: AsyncSession,
    table: RuleTable,
    named: Mapping[str, str | int],
    values: Mapping[str, int],
    rule_id: uuid.UUID,
    effective_from: datetime | None,
    notice_seconds: float,
) -> None:
    """End what is named the same when the new one begins, and add the new one. Column names are ours, never a caller's."""
    await tell_everybody(session)  # first, because it may wait, and the notice begins afterwards
    moment = await _moment(session, effective_from, notice_seconds)
    same = " AND ".join(f"{column} = :{column}" for column in named)
    await rows(
        session,
        f"""UPDATE {table} SET effective_to = greatest(:moment, effective_from)
            WHERE {same} AND (effective_to IS NULL OR effective_to > :moment)""",
        moment=moment,
        **named,
    )
    columns = [*named, *values]
    await rows(
        session,
        f"""INSERT INTO {table} (id, {", ".join(columns)}, effective_from)
            VALUES (:id, {", ".join(f":{column}" for column in columns)}, :moment)""",
        id=rule_id, moment=moment, **named, **values,
    )  # fmt: skip


async def _moment(session: AsyncSession, effective_from: datetime | None, notice_seconds: float) -> datetime:
    """When a rule begins: what is to begin before everybody can know of it begins when they do."""
    now = await soonest(session, 0)
    if effective_from is not None and effective_from < now:
        raise InvalidField("effective_from lies in the past: what a call has cost stays", param="effective_from")
    first = now + timedelta(seconds=notice_seconds)
    return first if effective_from is None else max(first, effective_from)


def _check_range(value: int, most: int, field: str) -> None:
    if not 0 <= value <= most:
        raise InvalidField(f"{field} must be from 0 to {most}, got {value}", param=field)
