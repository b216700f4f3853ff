"""Accounts: opened without a name or an e-mail, known by a credit id alone."""

import uuid
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import new_id, row
from app.kernel.security import Kind, new_credit_id
from app.keys.issue import Keyring, NewKey, issue


@dataclass(frozen=True, slots=True)
class OpenedAccount:
    """A new account and its two secrets, which are shown to its owner now."""

    account_id: uuid.UUID
    credit_id: str = field(repr=False)
    api_key: str = field(repr=False)


async def open_account(session: AsyncSession, keyring: Keyring) -> OpenedAccount:
    """Open an account with nothing on it and a first key named `Default`.

    The credit id is kept as a hash only: nobody can be told it again.
    """
    account_id, credit_id = new_id(), new_credit_id()
    await row(session, "INSERT INTO account (id) VALUES (:id)", id=account_id)
    await keyring.register(session, credit_id, Kind.CREDIT_ID, account_id, None)
    _, api_key = await issue(session, keyring, account_id, NewKey("Default"))
    return OpenedAccount(account_id, credit_id, api_key)
