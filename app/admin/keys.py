"""What operators do with the keys of any account: the customers' own verbs, each written down as an act."""

import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import lock
from app.admin.acts import write_act
from app.kernel.db import Row
from app.kernel.errors import InvalidField
from app.kernel.money import usd_text
from app.kernel.security import Admin, Pepper
from app.keys import issue as keys
from app.keys.issue import Keyring, NewKey
from app.keys.tree import said_windows
from app.ledger.tables import AccountStatus

_TOLD: Final = ("name", "reset_period", "expire_at", "scopes", "allowed_models", "requests_per_minute")
_MONEY: Final = {"limit_nusd": "usage_limit_usd", "call_limit_nusd": "max_usd_per_call"}


async def create(
    session: AsyncSession, keyring: Keyring, pepper: Pepper, admin: Admin, account_id: uuid.UUID, new: NewKey
) -> tuple[Row, str]:
    """Raises NotFound, InvalidField for a closed account, and what a customer is refused."""
    if (await lock(session, account_id))["status"] == AccountStatus.CLOSED:
        raise InvalidField("this account is closed, and stays so", param="account_id")
    key, secret = await keys.issue(session, keyring, account_id, new)
    await write_act(session, pepper, admin, "key.create", f"{account_id}/{key['id']}", after=_said(key))
    return key, secret


async def change(
    session: AsyncSession,
    keyring: Keyring,
    pepper: Pepper,
    admin: Admin,
    account_id: uuid.UUID,
    key_id: uuid.UUID,
    changes: Mapping[str, Any],
    act: str = "key.change",
    reason: str | None = None,
) -> Row:
    """Raises KeyNotFound, NameTaken, InvalidField."""
    await lock(session, account_id)
    before = await keys.read(session, account_id, key_id)
    after = await keys.change(session, keyring, account_id, key_id, changes)
    old, new = _said(before), _said(after)
    changed = [name for name in new if old[name] != new[name]]
    await write_act(
        session, pepper, admin, act, f"{account_id}/{key_id}", reason,
        before={name: old[name] for name in changed}, after={name: new[name] for name in changed},
    )  # fmt: skip
    return after


async def switch(
    session: AsyncSession,
    keyring: Keyring,
    pepper: Pepper,
    admin: Admin,
    account_id: uuid.UUID,
    key_id: uuid.UUID,
    *,
    is_disabled: bool,
    reason: str | None = None,
) -> Row:
    """Switch a key off, or on again. Raises KeyNotFound."""
    act = "key.disable" if is_disabled else "key.enable"
    return await change(session, keyring, pepper, admin, account_id, key_id, {"is_disabled": is_disabled}, act, reason)


async def revoke(
    session: AsyncSession,
    keyring: Keyring,
    pepper: Pepper,
    admin: Admin,
    account_id: uuid.UUID,
    key_id: uuid.UUID,
    reason: str | None = None,
) -> None:
    """Raises KeyNotFound, also on a repeat."""
    await lock(session, account_id)
    before = await keys.read(session, account_id, key_id)
    await keys.revoke(session, keyring, account_id, key_id)
    await write_act(
        session, pepper, admin, "key.revoke", f"{account_id}/{key_id}", reason,
        before=_said(before), after={"state": "revoked"},
    )  # fmt: skip


def _said(key: Row) -> dict[str, Any]:
    """A key as the log tells it: money as a decimal, times as texts, no secret."""
    told = {name: key[name] for name in _TOLD} | {"disabled": key["disabled_at"] is not None}
    told["limits"] = said_windows(key) if key["more_periods"] else None  # one alone is told in its short form
    told |= {word: None if key[name] is None else usd_text(key[name]) for name, word in _MONEY.items()}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in told.items()}
