"""Attempts as rows: begun, claimed by one driver, moved from state to state by it alone, listed."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

from sqlalchemy.ext.asyncio import AsyncSession

from app.autotopup.rules import DAY, HOLDS_CAP, LATE_AT_MOST, LEASE, MOVES, OPEN, UNPAID, Standing, State
from app.autotopup.tables import states_sql
from app.kernel.db import Database, Row, new_id, row, rows
from app.kernel.shards import everywhere

_IS_OPEN: Final = f"state IN ({states_sql(OPEN)})"
_IS_UNPAID: Final = f"state IN ({states_sql(UNPAID)})"
_DUE_AT_ONCE: Final = 200


@dataclass(frozen=True, slots=True)
class AttemptRef:
    """An attempt's primary key."""

    account_id: uuid.UUID
    attempt_id: uuid.UUID


class TakenOver(Exception):
    """Another driver has this attempt now, or has moved it on: whatever we were about to write is not ours to write."""


def ref_of(attempt: Mapping[str, Any]) -> AttemptRef:
    return AttemptRef(attempt["account_id"], attempt["id"])


async def standing(session: AsyncSession, account_id: uuid.UUID, now: datetime) -> Standing:
    """The account's balance, and what its attempts of the last 24 hours hold of its caps."""
    found = await row(
        session,
        f"""SELECT a.posted_nusd, a.status, bool_or(n.{_IS_OPEN}) AS has_open,
                   max(n.created_at) FILTER (WHERE n.state <> 'settled') AS unpaid_at,
                   min(n.created_at) FILTER (WHERE n.created_at > :day) AS oldest_at,
                   count(n.id) FILTER (WHERE n.created_at > :day) AS attempts,
                   coalesce(sum(n.amount_nusd) FILTER (WHERE n.created_at > :day AND n.state IN ({states_sql(HOLDS_CAP)})), 0)
                       ::bigint AS spent_nusd
            FROM account a
            LEFT JOIN nwc_attempt n ON n.account_id = a.id AND (n.created_at > :day OR n.{_IS_OPEN})
            WHERE a.id = :account_id GROUP BY a.id""",
        account_id=account_id, day=now - DAY,
    )  # fmt: skip
    assert found is not None
    return Standing(
        balance_nusd=found["posted_nusd"], is_active=found["status"] == "active", has_open=bool(found["has_open"]),
        unpaid_at=found["unpaid_at"], oldest_at=found["oldest_at"], attempts=found["attempts"], spent_nusd=found["spent_nusd"],
    )  # fmt: skip


async def open_attempt(session: AsyncSession, connection: Row, now: datetime) -> AttemptRef | None:
    """Begin an attempt with this connection; None if the account has an open one."""
    ref = AttemptRef(connection["account_id"], new_id())
    made = await row(
        session,
        f"""INSERT INTO nwc_attempt (account_id, id, topup_id, connection_id, amount_nusd, state, created_at, next_at)
            VALUES (:account_id, :id, :topup_id, :connection_id, :amount, 'created', :now, :now)
            ON CONFLICT (account_id) WHERE {_IS_OPEN} DO NOTHING RETURNING id""",
        account_id=ref.account_id, id=ref.attempt_id, topup_id=new_id(), connection_id=connection["id"],
        amount=connection["topup_amount_nusd"], now=now,
    )  # fmt: skip
    return ref if made is not None else None


async def claim(session: AsyncSession, ref: AttemptRef, now: datetime) -> Row | None:
    """Take an open attempt that is due and that nobody holds; until `claimed_until` it is ours alone.

    None if it is not to be had. A list of what is due may be stale, so its time is looked at once more; a credit that
    came by itself is reason enough.
    """
    return await row(
        session,
        f"""UPDATE nwc_attempt n SET claimed_until = :until
            WHERE account_id = :account_id AND id = :id AND {_IS_OPEN} AND (claimed_until IS NULL OR claimed_until <= :now)
              AND (next_at <= :now
                   OR (SELECT credited_nusd FROM topup t WHERE t.account_id = :account_id AND t.id = n.topup_id) > 0)
            RETURNING *""",
        until=now + LEASE, account_id=ref.account_id, id=ref.attempt_id, now=now,
    )  # fmt: skip


async def move(session: AsyncSession, attempt: Row, to: State, now: datetime, **changes: Any) -> Row:
    """Write the next state, which ends our claim unless it is SENT: then it begins anew, since we send and wait now.

    Raises TakenOver if the attempt is not as we claimed it; nothing is written then.
    """
    was = State(attempt["state"])
    assert to in MOVES[was] or to is was, f"{was} may not become {to}"
    changes |= {
        "state": to.value,
        "claimed_until": now + LEASE if to is State.SENT else None,
        "closed_at": None if to in OPEN else now,
    }
    if to not in OPEN:
        changes["next_at"] = None
    assert changes.keys() <= _CHANGEABLE, changes.keys() - _CHANGEABLE
    moved = await row(
        session,
        f"""UPDATE nwc_attempt SET {", ".join(f"{name} = :{name}" for name in sorted(changes))}
            WHERE account_id = :account_id AND id = :id AND state = :was AND claimed_until = :claim RETURNING *""",
        **changes, account_id=attempt["account_id"], id=attempt["id"], was=was.value, claim=attempt["claimed_until"],
    )  # fmt: skip
    if moved is None:
        raise TakenOver
    return moved


_CHANGEABLE: Final = frozenset(
    {
        "state", "bolt11", "payment_hash", "invoice_expires_at", "event_id", "sends", "code", "reason", "is_proven", "looks",
        "sent_at", "answered_at", "closed_at", "next_at", "claimed_until",
    }
)  # fmt: skip


async def paid_late(session: AsyncSession, now: datetime) -> list[AttemptRef]:
    """Attempts closed of late whose top-up was credited after all."""
    # Each top-up is looked up by its key: were this a join, all top-ups there ever were might be read for it.
    found = await rows(
        session,
        f"""SELECT n.account_id, n.id FROM nwc_attempt n
            WHERE n.{_IS_UNPAID} AND n.closed_at > :since
              AND (SELECT t.credited_nusd FROM topup t WHERE t.account_id = n.account_id AND t.id = n.topup_id) > 0""",
        since=now - LATE_AT_MOST,
    )
    return [AttemptRef(each["account_id"], each["id"]) for each in found]


async def settle_late(session: AsyncSession, ref: AttemptRef) -> Row | None:
    """A closed attempt whose top-up was credited after all becomes SETTLED; None if it is no longer one that was not paid."""
    return await row(
        session,
        f"""UPDATE nwc_attempt SET state = 'settled', reason = NULL
            WHERE account_id = :account_id AND id = :id AND {_IS_UNPAID} RETURNING *""",
        account_id=ref.account_id, id=ref.attempt_id,
    )  # fmt: skip


async def due(db: Database, now: datetime) -> list[AttemptRef]:
    """Open attempts that nobody holds and whose time has come; a credit that came by itself is reason enough."""
    found = await everywhere(db, {"account_id": "uuid", "id": "uuid"}, _DUE, {"now": now})
    return [AttemptRef(each["account_id"], each["id"]) for each in found]


_DUE: Final[LiteralString] = f"""
SELECT n.account_id, n.id FROM nwc_attempt n LEFT JOIN topup t ON t.account_id = n.account_id AND t.id = n.topup_id
WHERE n.{_IS_OPEN} AND (n.claimed_until IS NULL OR n.claimed_until <= %(now)s) AND (n.next_at <= %(now)s OR t.credited_nusd > 0)
ORDER BY n.next_at LIMIT {_DUE_AT_ONCE}
"""


async def read(session: AsyncSession, ref: AttemptRef) -> Row:
    found = await row(
        session, "SELECT * FROM nwc_attempt WHERE account_id = :account_id AND id = :id",
        account_id=ref.account_id, id=ref.attempt_id,
    )  # fmt: skip
    assert found is not None
    return found


async def list_attempts(
    session: AsyncSession, account_id: uuid.UUID, limit: int, before: tuple[datetime, uuid.UUID] | None
) -> list[Row]:
    """The account's attempts with what became of their top-ups, newest first; `before` is where the page before ended."""
    return await rows(
        session,
        """SELECT n.*, t.invoice_id, coalesce(t.credited_nusd + t.bonus_nusd, 0) AS credited_nusd FROM nwc_attempt n
           LEFT JOIN topup t ON t.account_id = n.account_id AND t.id = n.topup_id
           WHERE n.account_id = :account_id
             AND (CAST(:at AS timestamptz) IS NULL OR (n.created_at, n.id) < (:at, CAST(:id AS uuid)))
           ORDER BY n.created_at DESC, n.id DESC LIMIT :limit""",
        account_id=account_id, at=before[0] if before else None, id=before[1] if before else None, limit=limit,
    )  # fmt: skip
