"""Telling: a notice is a row of the outbox, written in the transaction of what it tells of.

So none is lost, and none is sent for what did not happen. Where an account named no address nothing is written.
"""

import uuid
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import new_id, rows

HOUSE: Final = uuid.UUID(int=0)
"""The operator, where an account's id stands."""

EVENTS: Final = (
    "balance.low", "balance.empty", "topup.settled", "topup.late", "topup.partial", "autotopup.refused", "autotopup.paused",
    "key.limit_reached", "key.expiring", "key.revealed", "account.rotated", "notices.changed",
)  # fmt: skip
"""What an account can be told of."""
HOUSE_EVENTS: Final = ("review.waiting", "audit.difference", "backend.down")
TEST: Final = "notices.test"
"""This and `notices.changed` go whatever events were chosen: who takes an address over cannot do so unheard."""
_NAMESPACE: Final = uuid.UUID("8f0d7b3e-52c4-4f6a-9a53-0e4b5c1d9a11")


async def tell(
    session: AsyncSession,
    account_id: uuid.UUID | None,
    type: str,
    data: Mapping[str, Any] | msgspec.Raw,
    *,
    once: str | None = None,
) -> uuid.UUID:
    """Have an account told (None: the operator), wherever it wants to hear of this type; nothing where it does not.

    `data` is what a receiver reads, as it goes over the wire: money as `money.usd` gives it, no secret. `once` names the cause
    where it may be seen again: the same is told once. Returns its id.
    """
    assert type in (*EVENTS, TEST) if account_id is not None else type in (*HOUSE_EVENTS, TEST), type
    owner = account_id or HOUSE
    notice_id = new_id() if once is None else _id_of(owner, type, once)
    await rows(session, _TELL, account_id=owner, id=notice_id, type=type, data=msgspec.json.encode(data).decode())
    return notice_id


def _id_of(owner: uuid.UUID, type: str, once: str) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, f"{owner}/{type}/{once}")


_TELL: Final = """
    INSERT INTO notice (account_id, id, channel, type, data, next_at)
    SELECT CAST(:account_id AS uuid), CAST(:id AS uuid), way.channel, :type, CAST(:data AS jsonb), now()
    FROM meter_ways(CAST(:account_id AS uuid), :type) way
    ON CONFLICT (account_id, id, channel) DO NOTHING"""
