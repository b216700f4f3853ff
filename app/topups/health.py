"""Telling the operator of a payment backend that cannot be reached: once for each time that it is away."""

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database
from app.kernel.figures import keep, kept
from app.notices.tell import tell
from app.topups.gateway import InvoiceGateway

LOOKS_TO_TELL = 2
"""How many times in a row it must have been away: a backend may be restarted."""


async def look_at_backend(db: Database, gateway: InvoiceGateway) -> int:
    """Ask it, and tell where it has been away for that long. Returns how many looks in a row it was away."""
    is_up = await gateway.is_healthy()
    return await db.transaction(lambda session: _note(session, gateway.name, is_up))


async def _note(session: AsyncSession, name: str, is_up: bool) -> int:
    figure = f"backend_away/{name}"
    before = (await kept(session)).get(figure)
    if is_up:
        if before is not None and before.value > 0:
            await keep(session, **{figure: 0})
        return 0
    looks = (before.value if before is not None else 0) + 1
    await keep(session, **{figure: looks})
    if looks == LOOKS_TO_TELL:
        await tell(session, None, "backend.down", {"backend": name})
    return looks
