"""Idempotency-Key: a POST's effect happens once, and its answer can be had again for a day.

The answer is saved in the effect's own transaction, sealed twice: under the service's key, and under one made
of the caller's credential and Idempotency-Key, neither of which is stored. So a show-once secret in it can be
read by whoever sends the same request again, and from the database by nobody. It takes its own bytes and 72 more,
and what a caller may have kept in an hour is limited.
"""

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, in_portions, row
from app.kernel.errors import DatabaseUnavailable, IdempotencyInProgress, IdempotencyKeyReuse, RateLimitExceeded
from app.kernel.ratelimit import add, counted
from app.kernel.security import Pepper, Sealer, UnsealError

T = TypeVar("T")
CLAIM_SECONDS: Final = 60
"""How long a first request may run before a repeat takes it for lost, though its process lives, and runs itself."""
LEASE_SECONDS: Final = 6
"""How long the first request's process may be silent before it is known to be dead. It is told by the database alone: a process's
number would be another's on another host, or after a restart, and behind a pooler no connection is one process's."""
_RENEWED_EVERY_SECONDS: Final = 2
KEPT_BYTES_PER_HOUR: Final = 4 * 1024 * 1024
"""Of one caller's answers; some tens of thousand ordinary ones."""
_ROW_BYTES: Final = 250
"""What an answer takes besides itself: its row and the index's entry."""
_NAMESPACE: Final = uuid.UUID("2d1d0a0c-6d5b-4f5c-9e57-5a7e3e7e2000")


class Once:
    """One POST as its handler sees it: `do` runs the effect, or gives the answer it gave before.

    Without an Idempotency-Key the effect simply runs. `replayed` tells the door which it was.
    """

    def __init__(
        self,
        db: Database,
        pepper: Pepper,
        sealer: Sealer,
        *,
        scope: str,
        secret: str,
        payer: str,
        key: str | None,
        request_hash: bytes,
    ) -> None:
        """`scope` names the caller and what is asked, without a secret; `secret` is what proved who is calling, if anything
        did; on `payer`'s account is counted what is kept."""
        self._db, self._sealer, self._key = db, sealer, key
        self._request_hash, self._bucket = request_hash, f"answers/{payer}"
        self._scope_key = pepper.tag(b"idempotency", scope.encode(), (key or "").encode())
        self._row = f"idempotency/{self._scope_key.hex()}"
        self._callers_own = Sealer(
            [("caller", hashlib.sha256(f"satmeter/answer\x00{scope}\x00{secret}\x00{key}".encode()).digest())]
        )
        self.replayed = False
        self._claimed_at: datetime | None = None
        self._renewing: asyncio.Task[None] | None = None

    def derived_id(self) -> uuid.UUID | None:
        """An id that every repeat of this request derives alike, None without an Idempotency-Key."""
        return uuid.uuid5(_NAMESPACE, (self._scope_key + self._request_hash).hex()) if self._key is not None else None

    async def do(
        self,
        answer_type: type[T],
        effect: Callable[[AsyncSession], Awaitable[T]],
        *,
        admit: Callable[[], Awaitable[None]] | None = None,
    ) -> T:
        """Run `effect` in one transaction together with saving its answer. `admit` may refuse it first; a repeat is not asked.

        Raises IdempotencyKeyReuse, IdempotencyInProgress, or what `admit` or the effect raises; then nothing is kept.
        """
        earlier = await self.claim(answer_type)
        if earlier is not None:
            return earlier

        async def work(session: AsyncSession) -> T:
            answer = await effect(session)
            await self.save(session, answer)
            return answer

        try:
            if admit is not None:
                await admit()
            return await self._db.transaction(work)
        except BaseException:
            await self.abandon()
            raise

    async def claim(self, answer_type: type[T]) -> T | None:
        """Take the key for this request, or return the answer it already has.

        Raises IdempotencyKeyReuse, IdempotencyInProgress, and RateLimitExceeded where too much is kept for this caller.
        """
        if self._key is None:
            return None
        found = await self._db.transaction(self._claimed)
        if found is None:
            self._renewing = asyncio.create_task(self._renew())
            return None
        if bytes(found["request_hash"]) != self._request_hash:
            raise IdempotencyKeyReuse
        if found["answer"] is None:
            raise IdempotencyInProgress(retry_after_seconds=1)
        self.replayed = True
        return msgspec.json.decode(self._opened(bytes(found["answer"])), type=answer_type)

    async def save(self, session: AsyncSession, answer: object) -> None:
        """Keep the answer, in the caller's transaction, which with it becomes the only one that counts.

        Raises IdempotencyInProgress, and so undoes the effect, when a repeat took over from us and is done first.
        """
        if self._key is None:
            return
        self._rest()
        sealed = self._sealed(msgspec.json.encode(answer))
        kept = await row(
            session,
            "UPDATE idempotency SET answer = :answer WHERE scope_key = :key AND answer IS NULL RETURNING 1 AS kept",
            answer=sealed,
            key=self._scope_key,
        )
        if kept is None:
            raise IdempotencyInProgress(retry_after_seconds=1)
        await add(session, self._bucket, len(sealed) + _ROW_BYTES)

    async def abandon(self) -> None:
        """Give the key back after a refusal, so that the corrected request may use it. A repeat that took over keeps it."""
        if self._key is not None:
            self._rest()
            await self._db.transaction(lambda session: self._if_ours(session, "DELETE FROM idempotency"))

    async def _renew(self) -> None:
        """Say again and again that we live, as long as an effect may take. A claim that has run out is not renewed."""
        until = time.monotonic() + CLAIM_SECONDS - LEASE_SECONDS
        still_ours = f"UPDATE idempotency SET claimed_until = now() + interval '{LEASE_SECONDS} seconds'"
        while time.monotonic() < until:
            await asyncio.sleep(_RENEWED_EVERY_SECONDS)
            with contextlib.suppress(DatabaseUnavailable):
                await self._db.transaction(
                    lambda session: self._if_ours(session, still_ours, "AND claimed_until >= now()")
                )

    def _rest(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()

    async def _if_ours(self, session: AsyncSession, change: str, further: str = "") -> None:
        await row(
            session,
            f"{change} WHERE scope_key = :key AND answer IS NULL AND created_at = :claimed_at {further} RETURNING 1 AS done",
            key=self._scope_key, claimed_at=self._claimed_at,
        )  # fmt: skip

    def _sealed(self, answer: bytes) -> bytes:
        return self._sealer.seal_bytes(self._callers_own.seal_bytes(answer, self._row), self._row)

    def _opened(self, sealed: bytes) -> bytes:
        try:
            return self._callers_own.open_bytes(self._sealer.open_bytes(sealed, self._row), self._row)
        except UnsealError:  # the operator took a sealing key away within the two days
            raise IdempotencyKeyReuse("The answer to this request cannot be shown again; what it did stands") from None

    async def _claimed(self, session: AsyncSession) -> dict[str, Any] | None:
        """None when the claim is ours: the key is new, or its first request died without an answer. Its time tells it from others."""
        made = await row(
            session,
            f"""INSERT INTO idempotency AS i (scope_key, request_hash, claimed_until)
                VALUES (:key, :hash, now() + interval '{LEASE_SECONDS} seconds')
                ON CONFLICT (scope_key) DO UPDATE SET claimed_until = EXCLUDED.claimed_until, created_at = EXCLUDED.created_at
                WHERE i.answer IS NULL AND i.claimed_until < EXCLUDED.created_at AND i.request_hash = EXCLUDED.request_hash
                RETURNING created_at""",
            key=self._scope_key, hash=self._request_hash,
        )  # fmt: skip
        if made is not None:
            self._claimed_at = made["created_at"]
            await self._refuse_beyond_what_is_kept(session)
            return None
        return await row(
            session, "SELECT request_hash, answer FROM idempotency WHERE scope_key = :key", key=self._scope_key
        )

    async def _refuse_beyond_what_is_kept(self, session: AsyncSession) -> None:
        found = await counted(session, self._bucket)
        if found is not None and found["count"] >= KEPT_BYTES_PER_HOUR:
            raise RateLimitExceeded(
                f"{KEPT_BYTES_PER_HOUR:,} bytes of answers are kept for your Idempotency-Keys of this hour, and no more; wait, or"
                " send this without one",
                retry_after_seconds=max(1, found["seconds_left"]),
            )


async def forget_old_answers(db: Database, at_once: int = 5000) -> int:
    """Delete answers older than two days, in portions; callers are promised one. Returns how many."""
    return await in_portions(
        db,
        """DELETE FROM idempotency WHERE scope_key IN (
               SELECT scope_key FROM idempotency WHERE created_at < now() - interval '2 days'
               ORDER BY created_at LIMIT :at_once)
           RETURNING 1 AS gone""",
        at_once,
    )
