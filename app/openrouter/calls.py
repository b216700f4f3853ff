"""An account's calls as OpenRouter tells them: summed by day, model and provider, and one by its id.

Source: OpenRouter API, "Get user activity" and "Get request & usage metadata for a generation".
"""

import uuid
from collections.abc import Sequence
from datetime import date
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.summed import SUMS, lines
from app.kernel.db import Row, row, rows
from app.kernel.errors import NotFound
from app.kernel.reading import uuid_in
from app.ledger.charge import ChargeId

DAYS_TOLD: Final = 30
"""Before today."""


async def activity(
    session: AsyncSession, account_id: uuid.UUID, first: date, last: date, key_id: uuid.UUID | None = None
) -> Sequence[Row]:
    """Newest day first: day, model, served_model, provider, requests, tokens, cost_nusd, refunded_nusd; both ends included."""
    return await rows(session, _ACTIVITY, account_id=account_id, first=first, last=last, key_id=key_id)


async def generation(session: AsyncSession, account_id: uuid.UUID, text: str) -> Row:
    """A call of the account by its id, its `charge_id`, or the id that the upstream gave it; of several the newest.

    Raises NotFound, alike for what is missing and another account's.
    """
    # An upstream's id may look like one of ours, so whichever it looks like, it may be the other.
    by_charge = _usage_id(account_id, text)
    found = None if by_charge is None else await _call(session, "u.id = :id", account_id, id=by_charge)
    if found is None and text.isprintable():
        found = await _call(session, "u.upstream_id = :upstream_id", account_id, upstream_id=text)
    if found is None:
        raise NotFound("No such generation", param="id")
    return found


def _usage_id(account_id: uuid.UUID, text: str) -> uuid.UUID | None:
    if (usage_id := uuid_in(text)) is not None:
        return usage_id
    try:
        charge = ChargeId.read(text)
    except NotFound:
        return None
    return charge.usage_id if charge.account_id == account_id else None


async def _call(session: AsyncSession, which: str, account_id: uuid.UUID, **params: Any) -> Row | None:
    return await row(
        session, f"{_CALL} WHERE u.account_id = :account_id AND {which} ORDER BY u.id DESC LIMIT 1",
        account_id=account_id, **params,
    )  # fmt: skip


_REFUND: Final = """LEFT JOIN entry r ON r.account_id = u.account_id AND r.kind = 'refund' AND r.reference = u.id::text
                                    AND r.contra = 'revenue:usage'"""
_CALL: Final = f"""
    SELECT u.id, u.account_id, u.upstream_id, u.request_id, coalesce(u.served_model, u.model, '') AS model,
           coalesce(u.provider, u.lines->>'provider') AS provider, u.outcome, u.latency_ms, u.ttft_ms, u.units,
           u.cost_nusd - coalesce(r.amount_nusd, 0) AS cost_nusd
    FROM usage u {_REFUND}"""


_WANTED: Final = "day >= :first AND day <= :last AND (CAST(:key_id AS uuid) IS NULL OR key_id = :key_id)"
_ACTIVITY: Final = f"""
    SELECT day, model, served_model, provider, {SUMS}
    FROM ({lines(_WANTED)}) calls GROUP BY day, model, served_model, provider ORDER BY day DESC, model, served_model, provider"""
