"""Ways back into an account whose credit id was lost or stolen: a recovery code, and a Nostr key that was bound to it.

Whoever stole a credit id could replace both. So what is replaced or taken away with the credit id alone goes on to work for
`GRACE_DAYS`, and a recovery ends every way back that is younger than the one it came by: the older one wins, which is the
owner's. Who shows the old code, or signs with the old key, ends it at once.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import lock, revoke_all
from app.kernel.db import Row, new_id, row, rows
from app.kernel.errors import InvalidToken, NameTaken, NotFound
from app.kernel.security import Caller, Kind, new_credit_id, new_recovery_code
from app.keys.issue import Keyring, NewKey, issue
from app.keys.verify import CREDENTIAL, LASTING
from app.ledger.tables import AccountStatus

GRACE_DAYS: Final = 7


def no_way_back() -> InvalidToken:
    """One refusal for whatever does not recover an account, which tells nothing of why."""
    return InvalidToken(
        "This recovers no account: an unknown, used or ended recovery code, or a Nostr event that proves nothing"
    )


@dataclass(frozen=True, slots=True)
class Recovered:
    """The new secrets, which are shown to the account's owner now; `api_key` where all keys were revoked."""

    account_id: uuid.UUID
    credit_id: str = field(repr=False)
    recovery_code: str = field(repr=False)
    keys_revoked: int
    api_key: str | None = field(repr=False)


async def recover(session: AsyncSession, keyring: Keyring, way: Caller, *, revoke_keys: bool) -> Recovered:
    """Another credit id and recovery code; every credit id of before is dead from the moment this commits.

    `way` is whose code or key was shown: a code is used up, a key stays bound. With `revoke_keys` every key goes too, and one
    named `Default` comes. Raises `no_way_back` when another recovery, or whoever closed the account, was first.
    """
    account = await lock(session, way.account_id)
    by = await row(
        session,
        f"SELECT {CREDENTIAL} FROM credential WHERE secret_hash = :hash AND key_id = :key_id AND ({LASTING} OR ends_at > now())",
        hash=way.lookup, key_id=way.key_id,
    )  # fmt: skip
    if by is None or account["status"] == AccountStatus.CLOSED:
        raise no_way_back()
    await _end_what_is_younger(session, by)
    if by["kind"] == Kind.NOSTR:
        await _bind_again(session, keyring, by)
    credit_id = new_credit_id()
    await keyring.register(session, credit_id, Kind.CREDIT_ID, way.account_id, None)
    code = await _make_code(session, keyring, way.account_id)
    revoked, api_key = 0, None
    if revoke_keys:
        revoked = await revoke_all(session, keyring, way.account_id)
        _, api_key = await issue(session, keyring, way.account_id, NewKey("Default"))
    await keyring.note(session, way.account_id, "recovered", way.kind.value)
    return Recovered(way.account_id, credit_id, code, revoked, api_key)


async def _end_what_is_younger(session: AsyncSession, by: Row) -> None:
    """Every credit id, a code that was used, and whichever way back came after this one."""
    await row(
        session,
        """DELETE FROM credential WHERE account_id = :account_id
             AND (kind = 'credit_id' OR (kind IN ('recovery_code', 'nostr') AND key_id >= :key_id))""",
        account_id=by["account_id"], key_id=by["key_id"],
    )  # fmt: skip


async def _bind_again(session: AsyncSession, keyring: Keyring, by: Row) -> None:
    """The key that recovered is bound for good, also where a thief had taken it away; an older one goes on to end."""
    await _let_end(session, keyring, by["account_id"], Kind.NOSTR)
    known = by | {"key_id": new_id(), "ends_at": None}
    await keyring.write(session, known)


# --- a recovery code --------------------------------------------------------------------------------


async def make_code(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, current: Caller | None) -> str:
    """A recovery code, in place of the one there is, which ends now if it is `current`, who was shown, else in `GRACE_DAYS`.

    Raises `no_way_back` for a `current` that is not this account's.
    """
    if current is not None:
        if current.account_id != account_id:
            raise no_way_back()
        await row(session, "DELETE FROM credential WHERE secret_hash = :hash", hash=current.lookup)
    code = await _make_code(session, keyring, account_id)
    await keyring.note(session, account_id, "recovery_code_made", Kind.CREDIT_ID)
    return code


async def _make_code(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> str:
    await _let_end(session, keyring, account_id, Kind.RECOVERY_CODE)
    code = new_recovery_code()
    await keyring.register(session, code.replace("-", ""), Kind.RECOVERY_CODE, account_id, new_id())
    return code


async def first_code(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> str:
    """The recovery code of an account that is opened now."""
    return await _make_code(session, keyring, account_id)


async def remove_code(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID) -> None:
    """The recovery code ends in `GRACE_DAYS`. Raises NotFound where there is none that lasts."""
    if not await _let_end(session, keyring, account_id, Kind.RECOVERY_CODE):
        raise NotFound("This account has no recovery code")
    await keyring.note(session, account_id, "recovery_code_removed", Kind.CREDIT_ID)


# --- a Nostr key ------------------------------------------------------------------------------------


async def bind(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, pubkey: str, npub: str) -> None:
    """Let the account be recovered by this key; the one before ends in `GRACE_DAYS`.

    Raises NameTaken where it is bound to an account already, also to this one.
    """
    lookup = keyring.lookup(pubkey)
    bound = await row(session, f"SELECT {CREDENTIAL} FROM credential WHERE secret_hash = :hash", hash=lookup)
    if bound is not None and (bound["account_id"] != account_id or bound["ends_at"] is None):
        raise NameTaken(_BOUND, param="Authorization")
    await row(session, "DELETE FROM credential WHERE secret_hash = :hash", hash=lookup)
    await _let_end(session, keyring, account_id, Kind.NOSTR)
    try:
        await keyring.register(session, pubkey, Kind.NOSTR, account_id, new_id(), npub)
    except IntegrityError:  # bound elsewhere at this very moment
        raise NameTaken(_BOUND, param="Authorization") from None
    await keyring.note(session, account_id, "nostr_bound", Kind.CREDIT_ID, npub)


_BOUND: Final = "This Nostr key is bound to an account already"


async def unbind(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, signed_by: str | None) -> None:
    """The key that is bound ends in `GRACE_DAYS`, or now if it signed this. Raises NotFound where there is none."""
    bound = await _of_kind(session, account_id, Kind.NOSTR, LASTING)
    if not bound:
        raise NotFound("No Nostr key is bound to this account")
    if signed_by is not None and keyring.lookup(signed_by) == bytes(bound[0]["secret_hash"]):
        await row(session, "DELETE FROM credential WHERE secret_hash = :hash", hash=bound[0]["secret_hash"])
    else:
        await _let_end(session, keyring, account_id, Kind.NOSTR)
    await keyring.note(session, account_id, "nostr_unbound", Kind.CREDIT_ID, bound[0]["label"])


# --- what there is ----------------------------------------------------------------------------------


async def ways_back(session: AsyncSession, account_id: uuid.UUID) -> Sequence[Row]:
    """Each with its kind, label, and when it ends; those that last first."""
    return await rows(
        session,
        f"""SELECT kind, label, created_at, ends_at FROM credential
            WHERE account_id = :account_id AND kind IN ('recovery_code', 'nostr') AND ({LASTING} OR ends_at > now())
            ORDER BY ends_at DESC NULLS FIRST, kind""",
        account_id=account_id,
    )  # fmt: skip


async def events(
    session: AsyncSession, account_id: uuid.UUID, limit: int, before_id: uuid.UUID | None
) -> list[dict[str, Any]]:
    """What was done with the account's credentials, newest first. `before_id` is where the page before ended."""
    return await rows(
        session,
        """SELECT id, act, shown_by, subject, created_at FROM credential_event
           WHERE account_id = :account_id AND (CAST(:before_id AS uuid) IS NULL OR id < :before_id)
           ORDER BY id DESC LIMIT :limit""",
        account_id=account_id, before_id=before_id, limit=limit,
    )  # fmt: skip


async def _let_end(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, kind: Kind) -> bool:
    """Whether there was one that lasts; it ends in `GRACE_DAYS`. What ended long ago goes."""
    await row(
        session, "DELETE FROM credential WHERE account_id = :account_id AND kind = :kind AND ends_at <= now()",
        account_id=account_id, kind=kind.value,
    )  # fmt: skip
    found = await _of_kind(session, account_id, kind, LASTING)
    for one in found:
        await keyring.end(session, one, one["end_of_grace"])
    return bool(found)


async def _of_kind(session: AsyncSession, account_id: uuid.UUID, kind: Kind, which: str) -> list[Row]:
    return await rows(
        session,
        f"""SELECT {CREDENTIAL}, now() + make_interval(days => {GRACE_DAYS}) AS end_of_grace FROM credential
            WHERE account_id = :account_id AND kind = :kind AND {which}""",
        account_id=account_id, kind=kind.value,
    )  # fmt: skip
