"""Delivering: what is due is claimed, sent outside any transaction, and what became of it written down.

Order is not promised, and one notice may come twice: its `webhook-id` is the same then.
Source: Standard Webhooks, "Specification".
"""

import asyncio
import base64
import hashlib
import hmac
import time
import uuid
from collections import Counter
from datetime import UTC, datetime
from typing import Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row
from app.kernel.errors import DatabaseUnavailable
from app.kernel.logs import log, where_it_broke
from app.kernel.security import Sealer, UnsealError
from app.notices import outbox
from app.notices.address import Target, find, opened
from app.notices.tell import HOUSE
from app.notices.ways import Messages, Outcome, Sent, Webhooks
from app.notices.words import sentence

UNDER_WAY: Final = 200
"""Sent at the same time by one process; most of that time is waiting for receivers."""
_EXACT: Final = msgspec.json.Decoder(float_hook=str)
"""Money as it is written, and not as a float would print it."""
_NOWHERE: Final = Sent(Outcome.GONE, error="no_address")
_UNREADABLE: Final = Sent(Outcome.FAILED, error="unreadable")


class Courier:
    """One process' deliveries. Several processes may deliver at once: notices are claimed."""

    def __init__(self, db: Database, sealer: Sealer, webhooks: Webhooks, messages: Messages) -> None:
        self._db, self._sealer, self._webhooks, self._messages = db, sealer, webhooks, messages
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: Counter[uuid.UUID] = Counter()
        self._is_closed = False

    async def deliver(self, now: datetime | None = None) -> int:
        """Begin to deliver what is due. Does not wait until it is done. Returns how many were begun."""
        room = UNDER_WAY - len(self._tasks)
        if room <= 0 or self._is_closed:
            return 0
        busy = [account_id for account_id, count in self._busy.items() if count >= outbox.OF_ONE_ACCOUNT]
        at = now or datetime.now(UTC)
        due = await outbox.claim(self._db, at, busy, room)
        for notice in due:
            self._begin(notice)
        return len(due)

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Stop. What was under way is sent again when its lease has ended."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, notice: Row) -> None:
        self._busy[notice["account_id"]] += 1
        task = asyncio.create_task(self._guarded(notice))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, notice: Row) -> None:
        try:
            await self._delivered(notice)
        except DatabaseUnavailable:
            log.warning("job.waits_for_database", job="deliver notices")
        except Exception as error:  # noqa: BLE001 - a door: nobody else would hear of it
            log.error("job.failed", job="deliver notices", exc_type=type(error).__name__, where=where_it_broke(error))
        finally:
            self._busy[notice["account_id"]] -= 1
            if self._busy[notice["account_id"]] <= 0:
                del self._busy[notice["account_id"]]

    async def _delivered(self, notice: Row) -> None:
        address = await self._db.transaction(lambda session: find(session, notice["account_id"]))
        sent = await self._sent(notice, address)

        async def write(session: AsyncSession) -> str | None:
            is_gone = sent.outcome is Outcome.GONE
            if is_gone and sent.status is not None and address is not None and notice["sealed_target"] is None:
                await outbox.switch_off(session, notice["account_id"], address["id"])
            return await outbox.finish(session, notice, sent, datetime.now(UTC), is_last=is_gone)

        state = await self._db.transaction(write)
        log.info(
            "notice.sent", account_id=str(notice["account_id"]), notice_id=str(notice["id"]), channel=notice["channel"],
            state=state, status=sent.status, code=sent.error, attempts=notice["attempts"],
        )  # fmt: skip

    async def _sent(self, notice: Row, address: Row | None) -> Sent:
        try:
            target = (
                None
                if address is None and notice["sealed_target"] is None
                else opened(self._sealer, address or {}, notice)
            )
        except UnsealError:
            return _UNREADABLE
        if target is None:
            return _NOWHERE
        if target.key is not None:
            text = sentence(notice["type"], _EXACT.decode(notice["data"]), message_id(notice["id"]))
            return await self._messages.send(target.key, text, notice["created_at"])
        assert target.url is not None
        body = body_of(notice)
        headers = signed(target, message_id(notice["id"]), body, int(time.time()))
        return await self._webhooks.post(target.url, body, headers, is_operators=notice["account_id"] == HOUSE)


class Body(msgspec.Struct, frozen=True):
    """What a webhook's receiver reads: the same bytes at each attempt."""

    type: str
    timestamp: datetime
    data: msgspec.Raw


def body_of(notice: Row) -> bytes:
    return msgspec.json.encode(
        Body(notice["type"], notice["created_at"].astimezone(UTC), msgspec.Raw(notice["data"].encode()))
    )


def message_id(notice_id: uuid.UUID) -> str:
    """The `webhook-id`."""
    return f"msg_{notice_id.hex}"


def signed(target: Target, webhook_id: str, body: bytes, timestamp: int) -> dict[str, str]:
    """Standard Webhooks' three headers; while a secret gives way to another, each has its signature."""
    content = f"{webhook_id}.{timestamp}.".encode() + body
    signatures = (
        base64.b64encode(hmac.digest(signing_key(secret), content, hashlib.sha256)).decode()
        for secret in target.secrets
    )
    return {
        "webhook-id": webhook_id, "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
        "content-type": "application/json", "user-agent": "Satmeter-Notices/1",
    }  # fmt: skip


def signing_key(secret: str) -> bytes:
    """The bytes behind `whsec_…`."""
    return base64.b64decode(secret.removeprefix("whsec_"))
