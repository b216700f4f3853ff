"""Where an account's notices go: set, shown, taken away; each change told to the address that was there before.

URL and signing secrets are sealed. A secret is shown when it is made; another takes its place with both signing for a while.
"""

import base64
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, new_id, row
from app.kernel.errors import NotFound
from app.kernel.security import Sealer
from app.notices.marks import last_topup_nusd
from app.notices.tables import Channel
from app.notices.tell import HOUSE, tell

_SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Wish:
    """What an owner wants to hear of, and where. `key` is a Nostr public key in hex; `events` None: all."""

    url: str | None = field(repr=False)
    url_shown: str | None
    key: str | None
    low_balance_nusd: int | None
    events: Sequence[str] | None


class Target(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one notice goes: a URL with the secrets that sign it, or a Nostr key."""

    url: str | None = None
    secrets: tuple[str, ...] = ()
    key: str | None = None

    def __repr__(self) -> str:
        return "Target(…)"


async def find(session: AsyncSession, account_id: uuid.UUID) -> Row | None:
    """The address, with what its owner calls low; None where nothing was ever set. The house's has no account."""
    return await row(
        session,
        """SELECT n.*, coalesce(n.secret_before_until > now(), false) AS has_secret_before, a.low_balance_nusd
           FROM notice_address n LEFT JOIN account a ON a.id = n.account_id WHERE n.account_id = :account_id""",
        account_id=account_id,
    )


async def put(session: AsyncSession, sealer: Sealer, account_id: uuid.UUID, wish: Wish) -> tuple[Row, str | None]:
    """Set all of it at once. Returns the address, and the signing secret where a URL came that was not there before.

    The address of before is told, and so is the new one.
    """
    await _lock(session, account_id)
    before = await find(session, account_id)
    url_before = _url_of(sealer, before)
    secret = new_secret() if wish.url is not None and wish.url != url_before else None
    if before is not None and _is_other(before, url_before, wish):
        await _tell_the_old(
            session, sealer, before, keeps_url=wish.url == url_before, keeps_key=wish.key == before["npub"]
        )
    await _write(session, sealer, wish, account_id, secret, before if wish.url == url_before else None)
    await row(
        session, "UPDATE account SET low_balance_nusd = :low WHERE id = :id", low=wish.low_balance_nusd, id=account_id
    )
    if before is None or before["low_balance_nusd"] != wish.low_balance_nusd:
        await _set_marks(session, account_id, is_first=before is None)
    if before is not None and (url_before or before["npub"]) and _is_other(before, url_before, wish):
        await tell(session, account_id, "notices.changed", _said(wish.url_shown, wish.key, wish.events))
    made = await find(session, account_id)
    assert made is not None
    return made, secret


async def remove(session: AsyncSession, sealer: Sealer, account_id: uuid.UUID) -> None:
    """Nothing is told any more, but that, to the address that was there. Raises NotFound."""
    await _lock(session, account_id)
    before = await find(session, account_id)
    if before is None:
        raise NotFound("No notices are set for this account")
    await _tell_the_old(session, sealer, before, keeps_url=False, keeps_key=False)
    await row(session, "DELETE FROM notice_address WHERE account_id = :account_id", account_id=account_id)
    await row(
        session, "UPDATE account SET low_balance_nusd = NULL, notice_mark_nusd = NULL WHERE id = :id", id=account_id
    )


async def another_secret(session: AsyncSession, sealer: Sealer, account_id: uuid.UUID, overlap: timedelta) -> str:
    """A new signing secret; for so long both sign, so that the receiver can change at leisure. Raises NotFound."""
    await _lock(session, account_id)
    before = await find(session, account_id)
    if before is None or before["sealed_secret"] is None:
        raise NotFound("No webhook is set for this account")
    secret = new_secret()
    old = sealer.open(before["sealed_secret"], sealed_as(account_id, "secret"))
    await row(
        session,
        """UPDATE notice_address SET sealed_secret = :new, sealed_secret_before = :old, secret_before_until = now() + :overlap,
                                     webhook_off_at = NULL, updated_at = now()
           WHERE account_id = :account_id""",
        new=sealer.seal(secret.encode(), sealed_as(account_id, "secret")),
        old=sealer.seal(old, sealed_as(account_id, "secret_before")), overlap=overlap, account_id=account_id,
    )  # fmt: skip
    await tell(
        session,
        account_id,
        "notices.changed",
        {"changed": "signing_secret", "overlap_seconds": int(overlap.total_seconds())},
    )
    return secret


async def keep_operators(
    session: AsyncSession, sealer: Sealer, url: str | None, url_shown: str | None, secret: str | None, key: str | None
) -> None:
    """What the settings say of the operator's own address becomes the house's, so that it is told like any account."""
    if url is None and key is None:
        await row(session, "DELETE FROM notice_address WHERE account_id = :house", house=HOUSE)
        return
    await row(
        session, _PUT, account_id=HOUSE, id=new_id(), url_shown=url_shown, npub=key, events=None,
        url=None if url is None else sealer.seal(url.encode(), sealed_as(HOUSE, "url")), is_other=True,
        secret=None if url is None else sealer.seal((secret or "").encode(), sealed_as(HOUSE, "secret")),
    )  # fmt: skip


def opened(sealer: Sealer, address: Row, notice: Row) -> Target | None:
    """Where a notice goes now; None where there is nothing any more. Raises UnsealError."""
    account_id = notice["account_id"]
    if notice["sealed_target"] is not None:
        named = sealed_as(account_id, f"target/{notice['id']}/{notice['channel']}")
        return msgspec.json.decode(sealer.open(notice["sealed_target"], named), type=Target)
    if notice["channel"] == Channel.NOSTR:
        return Target(key=address["npub"]) if address["npub"] else None
    if address["sealed_url"] is None or address["webhook_off_at"] is not None:
        return None
    return _webhook(sealer, address)


def new_secret() -> str:
    """`whsec_` and 32 random bytes in base64, as Standard Webhooks has it."""
    return f"whsec_{base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()}"


def sealed_as(account_id: uuid.UUID, what: str) -> str:
    """The name that what is sealed here is bound to."""
    return f"notice/{account_id}/{what}"


# --- parts of a change ------------------------------------------------------------------------------


async def _lock(session: AsyncSession, account_id: uuid.UUID) -> None:
    """Changes of one account come one after the other, and none while a charge looks at its marks."""
    await row(session, "SELECT id FROM account WHERE id = :id FOR NO KEY UPDATE", id=account_id)


def _url_of(sealer: Sealer, address: Row | None) -> str | None:
    if address is None or address["sealed_url"] is None:
        return None
    return sealer.open(address["sealed_url"], sealed_as(address["account_id"], "url")).decode()


def _webhook(sealer: Sealer, address: Row) -> Target:
    """The URL, and the secrets that sign now: the newest first."""
    account_id = address["account_id"]
    keys = [sealer.open(address["sealed_secret"], sealed_as(account_id, "secret")).decode()]
    if address["has_secret_before"]:
        keys.append(sealer.open(address["sealed_secret_before"], sealed_as(account_id, "secret_before")).decode())
    return Target(url=_url_of(sealer, address), secrets=tuple(keys))


def _is_other(before: Row, url_before: str | None, wish: Wish) -> bool:
    events = list(wish.events) if wish.events is not None else None
    return (url_before, before["npub"], before["events"]) != (wish.url, wish.key, events)


def _said(url_shown: str | None, key: str | None, events: Sequence[str] | None) -> dict[str, Any]:
    return {"changed": "address", "webhook_url": url_shown, "nostr_key": key, "events": events}


async def _tell_the_old(
    session: AsyncSession, sealer: Sealer, before: Row, *, keeps_url: bool, keeps_key: bool
) -> None:
    """What is taken away hears of it a last time: a thief of the credit id would begin here. Not who takes its place."""
    targets = []
    if before["sealed_url"] is not None and before["webhook_off_at"] is None and not keeps_url:
        address = before | {"has_secret_before": False}
        targets.append((Channel.WEBHOOK, _webhook(sealer, address)))
    if before["npub"] is not None and not keeps_key:
        targets.append((Channel.NOSTR, Target(key=before["npub"])))
    notice_id, account_id = new_id(), before["account_id"]
    for channel, target in targets:
        named = sealed_as(account_id, f"target/{notice_id}/{channel.value}")
        await row(
            session,
            """INSERT INTO notice (account_id, id, channel, type, data, sealed_target, next_at)
               VALUES (:account_id, :id, :channel, 'notices.changed', CAST(:data AS jsonb), :target, now())""",
            account_id=account_id, id=notice_id, channel=channel.value, data='{"changed": "address", "is_last": true}',
            target=sealer.seal(msgspec.json.encode(target), named),
        )  # fmt: skip


async def _write(
    session: AsyncSession, sealer: Sealer, wish: Wish, account_id: uuid.UUID, secret: str | None, same: Row | None
) -> None:
    """`same` is the address of before where its URL stays, and its secret with it."""
    kept = None if same is None else same["sealed_secret"]
    await row(
        session, _PUT, account_id=account_id, id=new_id(), url_shown=wish.url_shown, npub=wish.key,
        url=None if wish.url is None else sealer.seal(wish.url.encode(), sealed_as(account_id, "url")),
        secret=kept if secret is None else sealer.seal(secret.encode(), sealed_as(account_id, "secret")),
        events=None if wish.events is None else list(wish.events), is_other=same is None,
    )  # fmt: skip


_PUT: Final = """
    INSERT INTO notice_address AS n (account_id, id, sealed_url, url_shown, sealed_secret, npub, events, updated_at)
    VALUES (:account_id, :id, :url, :url_shown, :secret, :npub, CAST(:events AS text[]), now())
    ON CONFLICT (account_id) DO UPDATE SET
        id = CASE WHEN :is_other THEN EXCLUDED.id ELSE n.id END,
        sealed_url = EXCLUDED.sealed_url, url_shown = EXCLUDED.url_shown, npub = EXCLUDED.npub, events = EXCLUDED.events,
        sealed_secret = EXCLUDED.sealed_secret,
        sealed_secret_before = CASE WHEN :is_other THEN NULL ELSE n.sealed_secret_before END,
        secret_before_until = CASE WHEN :is_other THEN NULL ELSE n.secret_before_until END,
        webhook_off_at = NULL, updated_at = EXCLUDED.updated_at"""
"""A URL that is set again is tried again, also one that had wanted no more."""


async def _set_marks(session: AsyncSession, account_id: uuid.UUID, *, is_first: bool) -> None:
    """What was told, or passed before anybody wanted to hear of it, is not told now. What the owner calls low is, by the next
    charge that leaves less."""
    await row(
        session,
        """UPDATE account SET notice_base_nusd = coalesce(notice_base_nusd, :base), notice_mark_nusd = greatest(
               CASE WHEN low_balance_nusd > posted_nusd THEN low_balance_nusd END,
               meter_mark(coalesce(notice_base_nusd, :base), low_balance_nusd, floor_nusd,
                          least(posted_nusd, CASE WHEN NOT :is_first THEN greatest(notice_mark_nusd, low_balance_nusd) END)))
           WHERE id = :id""",
        id=account_id, is_first=is_first, base=await last_topup_nusd(session, account_id),
    )  # fmt: skip
