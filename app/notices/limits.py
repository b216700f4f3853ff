"""Keys at their limit, told once a window: what a refused call tells is noted at once, and written down in the background.

A refused call consumes nothing and writes nothing, so that there is no transaction of its own to write the notice in. One that
is lost with its process is told by the next refusal.
"""

import asyncio
import uuid
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, row
from app.kernel.errors import AppError, DatabaseUnavailable
from app.kernel.logs import log, where_it_broke
from app.notices.tell import tell

_REMEMBERED: Final = 10_000
_UNDER_WAY: Final = 100


class LimitsReached:
    """One process' memory of the limits that it has told of."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._told: set[tuple[uuid.UUID, str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def notice(self, account_id: uuid.UUID, key_id: uuid.UUID, refusal: AppError) -> None:
        """A call of this key was refused for its limit, or for that of a key above it, which is the one that is told of.

        Takes microseconds, and never raises.
        """
        said = refusal.metadata or {}
        key_id = uuid.UUID(said["limit_key_id"]) if "limit_key_id" in said else key_id
        window = f"{said.get('limit_period')}/{said.get('reset_at')}/{bytes(said.get('limit_usd', b'')).decode()}"
        if (key_id, window) in self._told or len(self._tasks) >= _UNDER_WAY:
            return
        if len(self._told) >= _REMEMBERED:
            self._told.clear()
        self._told.add((key_id, window))
        task = asyncio.get_running_loop().create_task(self._guarded(account_id, key_id, window, said))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def idle(self) -> None:
        """Wait until all of it is written down."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _guarded(self, account_id: uuid.UUID, key_id: uuid.UUID, window: str, said: dict[str, Any]) -> None:
        try:
            await self._db.transaction(lambda session: _tell(session, account_id, key_id, window, said))
        except DatabaseUnavailable:
            self._told.discard((key_id, window))
        except Exception as error:  # noqa: BLE001 - a door: nobody else would hear of it
            log.error("notice.not_written", exc_type=type(error).__name__, where=where_it_broke(error))


async def _tell(
    session: AsyncSession, account_id: uuid.UUID, key_id: uuid.UUID, window: str, said: dict[str, Any]
) -> None:
    key = await row(
        session, "SELECT name, preview FROM api_key WHERE account_id = :account_id AND id = :id",
        account_id=account_id, id=key_id,
    )  # fmt: skip
    if key is None:
        return
    data = {
        "key_id": key_id, "name": key["name"], "key": key["preview"], "limit_source": said.get("limit_source"),
        "limit_usd": said.get("limit_usd"), "available_usd": said.get("available_usd"), "reset_at": said.get("reset_at"),
    }  # fmt: skip
    await tell(session, account_id, "key.limit_reached", data, once=f"{key_id}/{window}")
