"""Who leads: one process at a time does a job, by a row that it holds for a while and may hold again."""

import uuid
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, row

OURSELVES: Final = uuid.uuid4()
"""This process, for as long as it lives."""


async def leads(db: Database, name: str, seconds: int, holder: uuid.UUID = OURSELVES) -> bool:
    """Take or keep the lease of a job for so long. False while another process has it.

    What is done under a lease must be right without it: a process may be stopped for longer than its lease lasts.
    """
    return await db.transaction(lambda session: _claimed(session, name, seconds, holder))


async def _claimed(session: AsyncSession, name: str, seconds: int, holder: uuid.UUID) -> bool:
    now = await row(session, "SELECT now() AS now")
    assert now is not None
    found = await row(
        session,
        """INSERT INTO job_lease AS l (name, holder, claimed_until) VALUES (:name, :holder, CAST(:now AS timestamptz) + make_interval(secs => :seconds))
           ON CONFLICT (name) DO UPDATE SET holder = EXCLUDED.holder, claimed_until = EXCLUDED.claimed_until
           WHERE l.holder = EXCLUDED.holder OR l.claimed_until < :now RETURNING 1 AS ours""",
        name=name, holder=holder, now=now["now"], seconds=seconds,
    )  # fmt: skip
    return found is not None
