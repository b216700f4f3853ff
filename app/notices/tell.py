"""Telling: a notice is a row of the outbox, written in the transaction of what it tells of.

So none is lost, and none is sent for what did not happen. Where an account named no address nothing is written.
"""

import uuid
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import new_id, row

HOUSE: Final = uuid.UUID(int=0)
"""The operator, where an account's id stands."""

EVENTS: Final = (
    "balance.low", "balance.empty", "topup.settled", "topup.late", "topup.partial", "autotopup.refused", "autotopup.paused",
    "key.limit_reached", "key.expiring", "key.revealed", "account.rotated", "notices.changed",
)  # fmt: skip
"""What an account can be told of."""
HOUSE_EVENTS: Final = ("review.waiting", "audit.difference", "backend.down")
TEST: Final = "notices.test"
ALWAYS: Final = ("notices.changed", TEST)
"""These go whatever events were chosen: who takes an address over cannot do so unheard."""
_NAMESPACE: Final = uuid.UUID("8f0d7b3e-52c4-4f6a-9a53-0e4b5c1d9a11")


async def tell(
    session: AsyncSession, account_id: uuid.UUID | None, type: str, data: Mapping[str, Any], *, once: str | None = None
) -> None:
    """Have an account told (None: the operator), wherever it wants to hear of this type; nothing where it does not.

    `data` is what a receiver reads, as it goes over the wire: money as `money.usd` gives it, no secret. `once` names the cause
    where it may be seen again: the same is told once.
    """
    assert type in (*EVENTS, TEST) if account_id is not None else type in (*HOUSE_EVENTS, TEST), type
    owner = account_id or HOUSE
    await row(
        session, f"WITH told AS ({_TELL} RETURNING 1) SELECT count(*) FROM told",
        account_id=owner, id=new_id() if once is None else _id_of(owner, type, once), type=type,
        data=msgspec.json.encode(data).decode(), always=type in ALWAYS,
    )  # fmt: skip


def _id_of(owner: uuid.UUID, type: str, once: str) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, f"{owner}/{type}/{once}")


_TELL: Final = """
    INSERT INTO notice (account_id, id, channel, type, data, next_at)
    SELECT n.account_id, :id, way.channel, :type, CAST(:data AS jsonb), now()
    FROM notice_address n
    CROSS JOIN LATERAL (VALUES ('webhook', n.sealed_url IS NOT NULL AND n.webhook_off_at IS NULL),
                               ('nostr', n.npub IS NOT NULL)) way (channel, is_there)
    WHERE n.account_id = :account_id AND way.is_there AND (:always OR n.events IS NULL OR :type = ANY (n.events))
    ON CONFLICT (account_id, id, channel) DO NOTHING"""
