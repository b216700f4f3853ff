"""What was called per day, key and model: from the calls that are summed, and from those that are not yet."""

import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import EPOCH
from app.activity.summed import SUMS, lines
from app.kernel.db import Row, rows

_FIRST: Final = EPOCH.date()
_LAST: Final = date(9999, 12, 30)


@dataclass(frozen=True, slots=True)
class Days:
    """Which days are asked for, both ends included, and of which key and model; None is all of them."""

    first: date | None = None
    last: date | None = None
    key_id: uuid.UUID | None = None
    model: str | None = None

    def params(self) -> dict[str, Any]:
        first, last = max(self.first or _FIRST, _FIRST), min(self.last or _LAST, _LAST)
        return {"first": first, "last": last, "key_id": self.key_id, "model": self.model}


Position = tuple[date, uuid.UUID, str]
"""Where a page ended: day, key and model."""


async def daily(
    session: AsyncSession, account_id: uuid.UUID, wanted: Days, *, limit: int, after: Position | None = None
) -> Sequence[Row]:
    """A page of days, newest first: day, key_id, model, requests, input_tokens, output_tokens, cost_nusd, refunded_nusd."""
    after_day, after_key, after_model = after or (None, None, None)
    return await rows(
        session,
        f"""SELECT * FROM ({_LINES}) lines
            WHERE CAST(:after_day AS date) IS NULL OR day < :after_day
               OR (day = :after_day AND (key_id, model COLLATE "C") > (CAST(:after_key AS uuid), CAST(:after_model AS text)))
            ORDER BY day DESC, key_id, model COLLATE "C" LIMIT :limit""",
        account_id=account_id, limit=limit, after_day=after_day, after_key=after_key, after_model=after_model,
        **wanted.params(),
    )  # fmt: skip


async def spent_by_key(
    session: AsyncSession, account_id: uuid.UUID, wanted: Days
) -> Mapping[uuid.UUID, Mapping[date, int]]:
    """Nano-USD a key and day, less what was refunded; days without a call are not there."""
    found = await rows(
        session,
        f"SELECT key_id, day, sum(cost_nusd - refunded_nusd)::bigint AS nusd FROM ({_LINES}) lines GROUP BY key_id, day",
        account_id=account_id, **wanted.params(),
    )  # fmt: skip
    spent: defaultdict[uuid.UUID, dict[date, int]] = defaultdict(dict)
    for each in found:
        spent[each["key_id"]][each["day"]] = each["nusd"]
    return spent


_IS_WANTED: Final = """day >= :first AND day <= :last
    AND (CAST(:key_id AS uuid) IS NULL OR key_id = :key_id) AND (CAST(:model AS text) IS NULL OR model = :model)"""
_LINES: Final = f"SELECT day, key_id, model, {SUMS} FROM ({lines(_IS_WANTED)}) calls GROUP BY day, key_id, model"
