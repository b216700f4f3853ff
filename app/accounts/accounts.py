"""Accounts: opened without a name or an e-mail, known by a credit id alone; frozen, closed, given another credit id."""

import uuid
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, new_id, row, rows
from app.kernel.errors import InvalidField, NotFound
from app.kernel.money import usd_text
from app.kernel.security import Kind, new_credit_id
from app.keys.issue import Keyring, NewKey, issue, revoke
from app.ledger.tables import AccountStatus


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


async def lock(session: AsyncSession, account_id: uuid.UUID) -> Row:
    """The account's figures, which nobody changes until the transaction ends. Raises NotFound."""
    found = await row(
        session,
        """SELECT id, posted_nusd, held_nusd, floor_nusd, status, created_at FROM account WHERE id = :id
           FOR NO KEY UPDATE""",
        id=account_id,
    )
    if found is None:
        raise NotFound("No such account")
    return found


async def set_status(session: AsyncSession, account_id: uuid.UUID, status: AccountStatus) -> str:
    """Freeze an account, or let it call again, from the moment this commits; returns what it was.

    What it holds still settles. Raises NotFound, and InvalidField for an account that is closed: that is for ever.
    """
    before = await lock(session, account_id)
    if before["status"] == AccountStatus.CLOSED:
        raise InvalidField("this account is closed, and stays so", param="account_id")
    await _write_status(session, account_id, status)
    return str(before["status"])


async def rotate_credit_id(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> str:
    """Another credit id for the account; the old one is refused from the moment this commits. It cannot be had again.

    Raises NotFound, and InvalidField for a closed account.
    """
    account = await lock(session, account_id)
    if account["status"] == AccountStatus.CLOSED:
        raise InvalidField("this account is closed, and stays so", param="account_id")
    return await _another_credit_id(session, keyring, account_id)


async def close(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> str:
    """End an account with nothing on it: no credential of it works from the moment this commits; returns what it was.

    Its books stay. Raises NotFound, and InvalidField while something is on it or held, or it is closed already.
    """
    before = await lock(session, account_id)
    if before["status"] == AccountStatus.CLOSED:
        raise InvalidField("this account is closed already", param="account_id")
    if before["posted_nusd"] or before["held_nusd"]:
        raise InvalidField(
            f"an account is closed with nothing on it; this one has ${usd_text(before['posted_nusd'])}, of which"
            f" ${usd_text(before['held_nusd'])} are held",
            param="account_id",
        )
    await end_account(session, keyring, account_id)
    return str(before["status"])


async def end_account(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> None:
    """Close it, whatever is on it: its row stays, for ever, and no credential of it works. Its row is locked."""
    await _write_status(session, account_id, AccountStatus.CLOSED)
    await _another_credit_id(session, keyring, account_id)  # which nobody is told
    live = await rows(
        session, "SELECT id FROM api_key WHERE account_id = :account_id AND deleted_at IS NULL", account_id=account_id
    )
    for key in live:
        await revoke(session, keyring, account_id, key["id"])


async def _write_status(session: AsyncSession, account_id: uuid.UUID, status: AccountStatus) -> None:
    await row(
        session, "UPDATE account SET status = :status, updated_at = now() WHERE id = :id",
        status=status.value, id=account_id,
    )  # fmt: skip


async def _another_credit_id(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> str:
    await row(
        session, "DELETE FROM credential WHERE account_id = :account_id AND kind = 'credit_id'", account_id=account_id
    )
    credit_id = new_credit_id()
    await keyring.register(session, credit_id, Kind.CREDIT_ID, account_id, None)
    return credit_id
