"""How operators ask for an audit: start one, read its verdict, read the last one."""

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromPath
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.background import Audits, last_verdict, read_audit
from app.kernel.db import Database, Row
from app.kernel.errors import NotFound
from app.kernel.reading import uuid_in
from app.kernel.security import Admin


class FindingView(msgspec.Struct, frozen=True):
    """One figure that differs: what the books say of `subject`, and what follows from the rest of them."""

    check: str
    subject: str
    recorded: str
    recomputed: str


class AuditView(msgspec.Struct, frozen=True):
    """An audit. What it found is null until it is done; `failed` found nothing out, and says nothing of the books."""

    id: UUID
    state: str
    started_by: str
    started_at: datetime
    finished_at: datetime | None
    is_clean: bool | None = None
    checks: int | None = None
    accounts: int | None = None
    entries: int | None = None
    findings: list[FindingView] | None = None

    @classmethod
    def of(cls, run: Row) -> "AuditView":
        told: dict[str, Any] = dict(run["report"] or {})
        if "findings" in told:
            told["findings"] = [FindingView(**each) for each in told["findings"]]
        return cls(run["id"], run["state"], run["admin"], run["started_at"], run["finished_at"], **told)


class StartedAudit(msgspec.Struct, frozen=True):
    """The audit that runs now, and the last verdict there is; ask for `/admin/audit/{id}` until its state is another."""

    id: UUID
    state: str
    started_at: datetime
    last: AuditView | None


@get("/admin/audit", status_code=202, tags=["Admin"], summary="Audit the books")
async def start_audit(
    admin: NamedDependency[Admin], db: NamedDependency[Database], audits: NamedDependency[Audits]
) -> StartedAudit:
    """Starts one in the background, unless one runs already: then this is about that one. It changes nothing."""
    started = await audits.start(admin)
    last = await db.transaction(_last_or_none)
    return StartedAudit(
        started["id"], started["state"], started["started_at"], None if last is None else AuditView.of(last)
    )


@get("/admin/audit/{audit_id:str}", tags=["Admin"], summary="What an audit found")
async def show_audit(
    admin: NamedDependency[Admin], db: NamedDependency[Database], audit_id: FromPath[str]
) -> AuditView:
    """By its id, or `last` for the last that came to its end."""
    if audit_id == "last":
        return AuditView.of(await db.transaction(last_verdict))
    found = uuid_in(audit_id)
    if found is None:
        raise NotFound("No such audit")
    return AuditView.of(await db.transaction(lambda session: read_audit(session, found)))


async def _last_or_none(session: AsyncSession) -> Row | None:
    try:
        return await last_verdict(session)
    except NotFound:
        return None


handlers = [start_audit, show_audit]
