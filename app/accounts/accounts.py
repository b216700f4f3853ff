"""Accounts: opened without a name or an e-mail, known by a credit id alone; frozen, closed, given another credit id."""

import contextlib
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, new_id, row, rows
from app.kernel.errors import InvalidField, KeyNotFound, NotFound
from app.kernel.money import usd, usd_text
from app.kernel.security import Kind, new_credit_id
from app.keys.issue import Keyring, NewKey, issue, revoke
from app.keys.verify import CREDENTIAL, LASTING
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
    account_id = new_id()
    credit_id = await write_new(session, keyring, account_id)
    _, api_key = await issue(session, keyring, account_id, NewKey("Default"))
    return OpenedAccount(account_id, credit_id, api_key)


async def write_new(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> str:
    """An account without any key; returns its credit id."""
    credit_id = new_credit_id()
    await row(session, "INSERT INTO account (id) VALUES (:id)", id=account_id)
    await keyring.register(session, credit_id, Kind.CREDIT_ID, account_id, None)
    return credit_id


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


@dataclass(frozen=True, slots=True)
class Rotated:
    """The new credit id, which is shown to its owner now, and until when the old one reads and tops up."""

    credit_id: str = field(repr=False)
    old_ends_at: datetime


async def rotate_credit_id(
    session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, shown_by: str, *, overlap_seconds: int = 0
) -> Rotated:
    """Another credit id for the account; the old one is refused from the moment this commits, or after its overlap.

    It cannot be had again. One that was in an overlap already is gone at once. `shown_by` is what whoever asks for it
    showed, for the owner's log. Raises NotFound, and InvalidField for a closed account.
    """
    account = await lock(session, account_id)
    if account["status"] == AccountStatus.CLOSED:
        raise InvalidField("this account is closed, and stays so", param="account_id")
    rotated = await _another_credit_id(session, keyring, account_id, overlap_seconds)
    await keyring.note(session, account_id, "rotated", shown_by)
    return rotated


async def close(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> str:
    """End an account with nothing on it: no credential of it works from the moment this commits; returns what it was.

    Its books stay. Raises NotFound, and InvalidField, which tells all of it, while something is on it, held, waits to be
    paid or decided or a wallet is connected, or it is closed already.
    """
    before = await lock(session, account_id)
    if before["status"] == AccountStatus.CLOSED:
        raise InvalidField("this account is closed already", param="account_id")
    await _refuse_with_something_on_it(session, before)
    await end_account(session, keyring, account_id)
    return str(before["status"])


async def _refuse_with_something_on_it(session: AsyncSession, account: Row) -> None:
    more = await row(session, _ON_IT, account_id=account["id"])
    assert more is not None
    reasons = [
        f"${usd_text(account['posted_nusd'])} are on it" if account["posted_nusd"] else "",
        f"${usd_text(account['held_nusd'])} are held by calls in flight" if account["held_nusd"] else "",
        f"{more['waiting']} top-ups can still be paid or wait for a block: let them expire" if more["waiting"] else "",
        f"{more['reviews']} top-ups wait for the operator" if more["reviews"] else "",
        "a wallet is connected: DELETE /nwc-auto-topup/connection first" if more["wallets"] else "",
    ]
    if any(reasons):
        raise InvalidField(
            f"an account is closed with nothing on it; of this one {'; '.join(filter(None, reasons))}",
            param="account_id",
            metadata={
                "balance_usd": usd(account["posted_nusd"]), "held_usd": usd(account["held_nusd"]), "waiting_topups": more["waiting"],
                "topups_in_review": more["reviews"], "wallet_connected": bool(more["wallets"]),
            },
        )  # fmt: skip


_ON_IT: Final = """
    SELECT count(*) FILTER (WHERE status = 'Processing' OR (status IN ('Creating', 'New') AND expires_at > now())) AS waiting,
           count(*) FILTER (WHERE review IS NOT NULL) AS reviews,
           (SELECT count(*) FROM nwc_connection WHERE account_id = :account_id) AS wallets
    FROM topup WHERE account_id = :account_id"""


async def end_account(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> None:
    """Close it, whatever is on it: its row stays, for ever, and no credential of it works. Its row is locked."""
    await _write_status(session, account_id, AccountStatus.CLOSED)
    await row(
        session, "DELETE FROM credential WHERE account_id = :account_id AND kind <> 'api_key'", account_id=account_id
    )
    await keyring.register(session, new_credit_id(), Kind.CREDIT_ID, account_id, None)  # which nobody is told
    await revoke_all(session, keyring, account_id)


async def revoke_all(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> int:
    """Every live key of the account; returns how many there were."""
    live = await rows(
        session, "SELECT id FROM api_key WHERE account_id = :account_id AND deleted_at IS NULL", account_id=account_id
    )
    for key in live:
        with contextlib.suppress(KeyNotFound):  # it may have gone with another
            await revoke(session, keyring, account_id, key["id"])
    return len(live)


async def _write_status(session: AsyncSession, account_id: uuid.UUID, status: AccountStatus) -> None:
    await row(
        session, "UPDATE account SET status = :status, updated_at = now() WHERE id = :id",
        status=status.value, id=account_id,
    )  # fmt: skip


async def _another_credit_id(
    session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, overlap_seconds: int
) -> Rotated:
    """The last one stays known as one that ends or ended: whoever showed it may have its answer repeated, and no more."""
    old = await row(
        session,
        f"""SELECT {CREDENTIAL}, now() + make_interval(secs => :seconds) AS end_of_overlap
            FROM credential WHERE account_id = :account_id AND kind = 'credit_id' AND {LASTING}""",
        account_id=account_id, seconds=overlap_seconds,
    )  # fmt: skip
    assert old is not None
    await row(
        session, f"DELETE FROM credential WHERE account_id = :account_id AND kind = 'credit_id' AND NOT ({LASTING})",
        account_id=account_id,
    )  # fmt: skip
    await keyring.end(session, old, old["end_of_overlap"])
    credit_id = new_credit_id()
    await keyring.register(session, credit_id, Kind.CREDIT_ID, account_id, None)
    return Rotated(credit_id, old["end_of_overlap"])
