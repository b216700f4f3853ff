"""The outbox as its courier and its owner see it: claimed, finished, listed, sent again, forgotten."""

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, LiteralString

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, in_portions, row, rows
from app.kernel.errors import NotFound
from app.kernel.shards import everywhere
from app.notices.ways import Outcome, Sent

BACK_OFF: Final = tuple(
    timedelta(seconds=each) for each in (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
)
"""After the first attempt, the second …: Standard Webhooks' own schedule, three days and a bit. Then it is dead."""
LEASE: Final = timedelta(minutes=2)
"""Longer than any attempt takes."""
OF_ONE_ACCOUNT: Final = 2
"""How many of one account's are under way at once: a receiver that stalls keeps nobody else waiting."""
KEPT_DAYS: Final = 30
_FORGOTTEN_AT_ONCE: Final = 5_000

_IS_DUE: Final = "state = 'pending' AND next_at <= %(now)s AND (claimed_until IS NULL OR claimed_until <= %(now)s)"


async def claim(db: Database, now: datetime, busy: Sequence[uuid.UUID], limit: int) -> list[Row]:
    """Take what is due, fairly between accounts but for the `busy`; it is ours until its lease ends. Each claim is an attempt."""
    due = await everywhere(db, _NAMED, _DUE, {"now": now, "busy": list(busy), "limit": limit})
    lease = {"now": now, "until": now + LEASE}
    claimed = [await db.one(_CLAIM, each | lease) for each in due[:limit]]
    return [each for each in claimed if each is not None]


_NAMED: Final[Mapping[str, LiteralString]] = {"account_id": "uuid", "id": "uuid", "channel": "text"}
_DUE: Final[LiteralString] = f"""
SELECT account_id, id, channel FROM (
    SELECT account_id, id, channel, next_at, row_number() OVER (PARTITION BY account_id ORDER BY next_at, id) AS place
    FROM notice WHERE {_IS_DUE} AND account_id <> ALL (%(busy)s::uuid[])) d
WHERE place <= {OF_ONE_ACCOUNT} ORDER BY place, next_at LIMIT %(limit)s
"""
_CLAIM: Final[LiteralString] = f"""
UPDATE notice SET claimed_until = %(until)s, attempts = attempts + 1
WHERE account_id = %(account_id)s AND id = %(id)s AND channel = %(channel)s AND {_IS_DUE}
RETURNING account_id, id, channel, type, CAST(data AS text) AS data, attempts, sealed_target, created_at, claimed_until
"""


async def finish(session: AsyncSession, notice: Row, sent: Sent, now: datetime, *, is_last: bool = False) -> str | None:
    """Write down what became of an attempt. Returns the state now; None where another courier has taken the notice over."""
    left = None if is_last or sent.outcome is not Outcome.FAILED else wait(notice["attempts"], sent.retry_after_seconds)
    state = "delivered" if sent.outcome is Outcome.DELIVERED else "pending" if left is not None else "dead"
    found = await row(
        session,
        """UPDATE notice SET state = :state, status = :status, error = :error, claimed_until = NULL, next_at = :next_at,
                             closed_at = :closed_at
           WHERE account_id = :account_id AND id = :id AND channel = :channel AND claimed_until = :claim RETURNING state""",
        state=state, status=sent.status, error=sent.error, next_at=None if left is None else now + left,
        closed_at=now if left is None else None, account_id=notice["account_id"], id=notice["id"], channel=notice["channel"],
        claim=notice["claimed_until"],
    )  # fmt: skip
    return state if found is not None else None


def wait(attempts: int, retry_after_seconds: int | None) -> timedelta | None:
    """How long after so many attempts that failed, longer where the receiver asked for it, a day at most; None: no more."""
    if attempts > len(BACK_OFF):
        return None
    return max(BACK_OFF[attempts - 1], min(timedelta(seconds=retry_after_seconds or 0), BACK_OFF[-1]))


async def switch_off(session: AsyncSession, account_id: uuid.UUID, address_id: uuid.UUID) -> None:
    """The receiver wants no more (410). A URL that was set meanwhile stays on."""
    await row(
        session,
        "UPDATE notice_address SET webhook_off_at = now() WHERE account_id = :account_id AND id = :id",
        account_id=account_id, id=address_id,
    )  # fmt: skip


async def list_deliveries(
    session: AsyncSession,
    account_id: uuid.UUID,
    limit: int,
    before: tuple[datetime, uuid.UUID, str] | None,
    state: str | None,
) -> list[Row]:
    """Newest first; `before` is where the page before ended."""
    at, last_id, channel = before or (None, None, None)
    return await rows(
        session,
        """SELECT account_id, id, channel, type, CAST(data AS text) AS data, state, attempts, status, error, created_at, next_at,
                  closed_at, sealed_target IS NOT NULL AS is_elsewhere
           FROM notice WHERE account_id = :account_id AND (CAST(:state AS text) IS NULL OR state = :state)
             AND (CAST(:at AS timestamptz) IS NULL OR (created_at, id, channel) < (:at, CAST(:last_id AS uuid), CAST(:channel AS text)))
           ORDER BY created_at DESC, id DESC, channel DESC LIMIT :limit""",
        account_id=account_id, state=state, at=at, last_id=last_id, channel=channel, limit=limit,
    )  # fmt: skip


async def replay(session: AsyncSession, account_id: uuid.UUID, notice_id: uuid.UUID) -> int:
    """Send it again at once, on each way it went, with all attempts before it. Raises NotFound."""
    found = await rows(
        session,
        """UPDATE notice SET state = 'pending', attempts = 0, next_at = now(), closed_at = NULL
           WHERE account_id = :account_id AND id = :id RETURNING channel""",
        account_id=account_id, id=notice_id,
    )  # fmt: skip
    if not found:
        raise NotFound("No such notice; they are kept for 30 days")
    return len(found)


async def forget_old(db: Database) -> int:
    """What was delivered, or given up, a month ago."""
    return await in_portions(
        db,
        f"""WITH old AS MATERIALIZED (
                SELECT account_id, id, channel FROM notice WHERE closed_at < now() - interval '{KEPT_DAYS} days' LIMIT :at_once)
            DELETE FROM notice n USING old o WHERE n.account_id = o.account_id AND n.id = o.id AND n.channel = o.channel
            RETURNING 1 AS forgotten""",
        _FORGOTTEN_AT_ONCE,
    )
