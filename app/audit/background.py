"""Audits that operators ask for: each runs in the background, one at a time, and its result can be had by its id."""

import asyncio
import uuid
from contextlib import suppress
from typing import Any, Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.check import Secrets
from app.audit.run import Report, audit
from app.kernel.db import Database, Row, new_id, row
from app.kernel.errors import AppError, NotFound
from app.kernel.figures import keep
from app.kernel.logs import log, where_it_broke
from app.kernel.security import Admin
from app.notices.tell import tell

_ALIVE_SECONDS: Final = 60
_BEAT_SECONDS: Final = 15.0
_WITH_NOW: Final = "id, admin, state, started_at, finished_at, report"


class Audits:
    """Starts audits in this process, whichever process is asked for their results."""

    def __init__(self, db: Database, secrets: Secrets, reads: Database | None = None) -> None:
        """An audit reads where `reads` says; that it ran is remembered in `db`."""
        self._db, self._secrets, self._reads = db, secrets, reads or db
        self._running: set[asyncio.Task[None]] = set()

    async def start(self, admin: Admin) -> Row:
        """The audit that runs: one that was begun before, else a new one. One whose process is gone counts as failed."""
        started, is_new = await self._db.transaction(lambda session: _start(session, admin))
        if is_new:
            task = asyncio.create_task(self._run(started["id"]))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return started

    async def _run(self, audit_id: uuid.UUID) -> None:
        beating = asyncio.create_task(self._beat(audit_id))
        try:
            report = await audit(self._reads, self._secrets)
            await self._db.transaction(lambda session: note_verdict(session, len(report.findings), str(audit_id)))
            await self._finish(audit_id, "done", as_data(report))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - a door: nobody else waits for this task
            log.error("audit.failed", exc_type=type(error).__name__, where=where_it_broke(error))
            with suppress(AppError):
                await self._finish(audit_id, "failed", None)
        finally:
            beating.cancel()

    async def _beat(self, audit_id: uuid.UUID) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            with suppress(AppError):
                await self._db.one(
                    f"""UPDATE audit_run SET alive_until = now() + interval '{_ALIVE_SECONDS} seconds'
                        WHERE id = %(id)s AND state = 'running' RETURNING 1 AS beaten""",
                    {"id": audit_id},
                )

    async def _finish(self, audit_id: uuid.UUID, state: str, report: dict[str, Any] | None) -> None:
        text = None if report is None else msgspec.json.encode(report).decode()
        await self._db.transaction(
            lambda session: row(
                session,
                """UPDATE audit_run SET state = :state, finished_at = now(), report = CAST(:report AS jsonb)
                   WHERE id = :id AND state = 'running'""",
                id=audit_id, state=state, report=text,
            )
        )  # fmt: skip

    async def close(self) -> None:
        """Whatever runs here is given up; whoever asks next starts another."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


async def note_verdict(session: AsyncSession, differences: int, audit_id: str) -> None:
    """What monitoring is told of a whole audit; the operator too where something differs."""
    await keep(session, audit_differences=differences)
    if differences:
        await tell(session, None, "audit.difference", {"differences": differences, "found_by": "audit"}, once=audit_id)


async def _start(session: AsyncSession, admin: Admin) -> tuple[Row, bool]:
    await row(
        session,
        "UPDATE audit_run SET state = 'failed', finished_at = now() WHERE state = 'running' AND alive_until < now()",
    )
    made = await row(
        session,
        f"""INSERT INTO audit_run (id, admin, alive_until) VALUES (:id, :admin, now() + interval '{_ALIVE_SECONDS} seconds')
            ON CONFLICT (state) WHERE state = 'running' DO NOTHING RETURNING {_WITH_NOW}""",
        id=new_id(), admin=admin.name,
    )  # fmt: skip
    if made is not None:
        return made, True
    found = await row(session, f"SELECT {_WITH_NOW} FROM audit_run WHERE state = 'running'")
    return (found, False) if found is not None else await _start(session, admin)  # it has ended since


async def read_audit(session: AsyncSession, audit_id: uuid.UUID) -> Row:
    """Raises NotFound."""
    found = await row(session, f"SELECT {_WITH_NOW} FROM audit_run WHERE id = :id", id=audit_id)
    if found is None:
        raise NotFound("No such audit")
    return found


async def last_verdict(session: AsyncSession) -> Row:
    """The last audit that came to its end. Raises NotFound where none did."""
    found = await row(
        session, f"SELECT {_WITH_NOW} FROM audit_run WHERE state = 'done' ORDER BY finished_at DESC, id DESC LIMIT 1"
    )
    if found is None:
        raise NotFound("No audit has come to its end yet")
    return found


async def running_audit(session: AsyncSession) -> Row | None:
    """The one that runs now."""
    return await row(session, f"SELECT {_WITH_NOW} FROM audit_run WHERE state = 'running' AND alive_until >= now()")


def as_data(report: Report) -> dict[str, Any]:
    """A report as it is kept and told."""
    return {
        "is_clean": report.is_clean, "checks": report.checks, "accounts": report.accounts, "entries": report.entries,
        "findings": [msgspec.to_builtins(each) for each in report.findings],
    }  # fmt: skip
