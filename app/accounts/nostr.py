"""Proof by a Nostr key (NIP-98): a signed event that names this very request, and holds for a minute and once."""

import hashlib
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol, runtime_checkable

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import row

WINDOW_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class Signed:
    """What a well-signed event of kind 27235 says: values of its tags u, method and payload, `created_at` in Unix seconds."""

    id: bytes
    pubkey: str
    npub: str
    created_at: int
    urls: tuple[str, ...]
    methods: tuple[str, ...]
    payloads: tuple[str, ...]


@runtime_checkable
class Nostr(Protocol):
    """Whoever can tell a signed event from another text."""

    def signed(self, header: str) -> Signed | None:
        """The event in an Authorization header (`Nostr <base64>`), None unless its shape, kind, id and signature are right."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """What an event has to name: the whole URL, the method, and what the body is."""

    url: str
    method: str
    body: bytes


def is_of(event: Signed, request: Request, now: datetime) -> bool:
    """Whether the event was signed for this request, a minute ago at most. Source: NIP-98, commit 5cc2336."""
    payload = hashlib.sha256(request.body).hexdigest()
    is_body_named = event.payloads == (payload,) or (not request.body and not event.payloads)
    is_fresh = abs(now.timestamp() - event.created_at) <= WINDOW_SECONDS
    return is_fresh and is_body_named and event.urls == (request.url,) and event.methods == (request.method,)


async def take(session: AsyncSession, account_id: uuid.UUID, event: Signed) -> bool:
    """Whether the event was not taken before; now it is. Those of more than an hour ago are forgotten: they hold no more."""
    await row(
        session, "DELETE FROM nostr_event WHERE account_id = :account_id AND taken_at < now() - interval '1 hour'",
        account_id=account_id,
    )  # fmt: skip
    taken = await row(
        session,
        """INSERT INTO nostr_event (account_id, event_id) VALUES (:account_id, :event_id)
           ON CONFLICT DO NOTHING RETURNING 1 AS taken""",
        account_id=account_id, event_id=event.id,
    )  # fmt: skip
    return taken is not None
