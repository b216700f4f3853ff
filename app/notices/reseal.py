"""Sealing anew, when the sealing keys are changed: URLs and signing secrets, and what still goes to an address of old."""

import uuid
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row, rows
from app.kernel.logs import log
from app.kernel.progress import Told, nobody
from app.kernel.security import Resealed, Sealer, UnsealError
from app.notices.address import sealed_as

_AT_ONCE: Final = 500
_COLUMNS: Final = {"sealed_url": "url", "sealed_secret": "secret", "sealed_secret_before": "secret_before"}
_STALE: Final = """
    SELECT account_id, CAST(NULL AS uuid) AS id, CAST(NULL AS text) AS channel, '{column}' AS of, {column} AS sealed FROM notice_address
    WHERE (CAST(:after AS uuid) IS NULL OR account_id > :after) AND NOT starts_with({column}, :current)"""
_STALE_TARGETS: Final = """
    SELECT account_id, id, channel, 'sealed_target' AS of, sealed_target AS sealed FROM notice
    WHERE (CAST(:after AS uuid) IS NULL OR account_id > :after) AND NOT starts_with(sealed_target, :current)"""


async def reseal_all(db: Database, sealer: Sealer, told: Told = nobody) -> Resealed:
    """Seal all of it under the newest key; what does not open stays as it is."""
    total, after, is_over = Resealed(), None, False
    while not is_over:
        some, after = await db.transaction(partial(_reseal_some, sealer=sealer, after=after))
        total, is_over = total + some, after is None
        told(total.done, None)
    return total


async def _reseal_some(
    session: AsyncSession, sealer: Sealer, after: uuid.UUID | None
) -> tuple[Resealed, uuid.UUID | None]:
    """Some accounts behind `after`, the operator's first, and the last of them: None when there are no more."""
    stale = " UNION ALL ".join([*(_STALE.format(column=column) for column in _COLUMNS), _STALE_TARGETS])
    accounts = await rows(
        session, f"SELECT DISTINCT account_id FROM ({stale}) s ORDER BY account_id LIMIT {_AT_ONCE}",
        after=after, current=f"{sealer.current_id}.",
    )  # fmt: skip
    if not accounts:
        return Resealed(), None
    last = accounts[-1]["account_id"]
    found = await rows(
        session, f"SELECT * FROM ({stale}) s WHERE account_id <= :last", after=after, current=f"{sealer.current_id}.", last=last
    )  # fmt: skip
    done = 0
    for each in found:
        done += await _resealed(session, sealer, each)
    return Resealed(done, len(found) - done), last


async def _resealed(session: AsyncSession, sealer: Sealer, each: Row) -> bool:
    what = _COLUMNS.get(each["of"]) or f"target/{each['id']}/{each['channel']}"
    named = sealed_as(each["account_id"], what)
    try:
        plain = sealer.open(each["sealed"], named)
    except UnsealError:
        log.error("notice.secret_unreadable", account_id=str(each["account_id"]))
        return False
    table = "notice_address" if each["id"] is None else "notice"
    only = "" if each["id"] is None else " AND id = :id AND channel = :channel"
    more = {} if each["id"] is None else {"id": each["id"], "channel": each["channel"]}
    await row(
        session, f"UPDATE {table} SET {each['of']} = :sealed WHERE account_id = :account_id AND {each['of']} = :before{only}",
        sealed=sealer.seal(plain, named), account_id=each["account_id"], before=each["sealed"], **more,
    )  # fmt: skip
    return True
