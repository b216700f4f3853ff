"""Keys from birth to revocation: issue, list, read, change, revoke, and sealing anew."""

import hashlib
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, new_id, row, rows
from app.kernel.errors import InvalidField, KeyNotFound, NameTaken
from app.kernel.logs import log
from app.kernel.progress import Told, nobody
from app.kernel.security import Kind, Pepper, Resealed, Sealer, UnsealError, new_secret, preview
from app.keys.proof import PROVEN, event_proof, key_proof
from app.keys.tables import ResetPeriod
from app.keys.verify import credential_proof, proof_of_credential
from app.notices.tell import tell

NAME_LENGTH = 25
KEY_BYTES = 4096
"""What a key's name, scopes and models may have together: a page of a hundred keys stays below half a megabyte."""
SCOPES = ("spend", "balance", "topup", "activity")
"""What a key may be narrowed to; a key without scopes may do all of them."""

_WINDOW_NOW = """
    id, name, preview, sealed_secret, masked_hash, limit_nusd, reset_period, call_limit_nusd, requests_per_minute, held_nusd, lifetime_nusd, scopes, allowed_models,
    expire_at, disabled_at, deleted_at, created_at, updated_at,
    CASE WHEN window_start < date_trunc(reset_period, now(), 'UTC') THEN 0 ELSE window_usage_nusd END AS window_usage_nusd,
    date_trunc(reset_period, now(), 'UTC') + ('1 ' || reset_period)::interval AS reset_at
"""
"""A key's columns with its window as it stands now, whether or not a charge has rolled it yet."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a key is asked to be; everything but the name is optional."""

    name: str
    limit_nusd: int | None = None
    reset_period: ResetPeriod | None = None
    expire_at: datetime | None = None
    scopes: Sequence[str] | None = None
    allowed_models: Sequence[str] | None = None
    is_disabled: bool = False
    call_limit_nusd: int | None = None
    requests_per_minute: int | None = None


class Keyring:
    """Issues secrets: hashes them for look-up, and seals them when the operator lets them be shown again."""

    def __init__(self, pepper: Pepper, sealer: Sealer, *, reveal: bool, keys_per_account: int = 1000) -> None:
        self._pepper, self._sealer, self.reveal, self.keys_per_account = pepper, sealer, reveal, keys_per_account

    async def register(
        self,
        session: AsyncSession,
        secret: str,
        kind: Kind,
        account_id: uuid.UUID,
        key_id: uuid.UUID | None,
        label: str | None = None,
    ) -> None:
        """Make a secret known as the account's."""
        known = {
            "secret_hash": self._pepper.lookup(secret),
            "kind": kind.value,
            "account_id": account_id,
            "key_id": key_id,
        }
        await self.write(session, known | {"ends_at": None, "label": label})

    async def end(self, session: AsyncSession, known: Row, ends_at: datetime) -> None:
        """Let a credential hold until `ends_at` and no longer: it is written anew, with its proof, as it is never changed."""
        await row(session, "DELETE FROM credential WHERE secret_hash = :hash", hash=known["secret_hash"])
        await self.write(session, known | {"ends_at": ends_at})

    def lookup(self, secret: str) -> bytes:
        """The hash that a secret is known by."""
        return self._pepper.lookup(secret)

    async def write(self, session: AsyncSession, known: Row) -> None:
        """Write a credential as `known` has it, with its proof."""
        said = {name: known[name] for name in ("secret_hash", "kind", "account_id", "key_id", "ends_at", "label")}
        await row(
            session,
            """INSERT INTO credential (secret_hash, kind, account_id, key_id, ends_at, label, proof)
               VALUES (:secret_hash, :kind, :account_id, :key_id, :ends_at, :label, :proof)""",
            **said, proof=proof_of_credential(self._pepper, said),
        )  # fmt: skip

    async def note(
        self, session: AsyncSession, account_id: uuid.UUID, act: str, shown_by: str, subject: str | None = None
    ) -> None:
        """Write down what was done with the account's credentials, for its owner to read, and tell where notices go."""
        written = {"account_id": account_id, "id": new_id(), "act": act, "shown_by": shown_by, "subject": subject}
        await row(
            session,
            """INSERT INTO credential_event (account_id, id, act, shown_by, subject, proof)
               VALUES (:account_id, :id, :act, :shown_by, :subject, :proof)""",
            **written, proof=event_proof(self._pepper, written),
        )  # fmt: skip
        told = {"act": act, "shown_by": shown_by, "subject": subject}
        await tell(session, account_id, "key.revealed" if act == "key_revealed" else "account.rotated", told)

    async def prove(self, session: AsyncSession, account_id: uuid.UUID, key_id: uuid.UUID) -> None:
        """Prove what a key is set to now; whoever set it holds its account's lock."""
        found = await row(
            session, f"SELECT {', '.join(PROVEN)} FROM api_key WHERE account_id = :account_id AND id = :id",
            account_id=account_id, id=key_id,
        )  # fmt: skip
        assert found is not None
        await row(
            session, "UPDATE api_key SET proof = :proof WHERE account_id = :account_id AND id = :id",
            account_id=account_id, id=key_id, proof=key_proof(self._pepper, found),
        )  # fmt: skip

    def seal(self, secret: str, account_id: uuid.UUID, key_id: uuid.UUID) -> str | None:
        return self._sealer.seal(secret.encode(), sealed_as(account_id, key_id)) if self.reveal else None

    def open(self, sealed: str | None, account_id: uuid.UUID, key_id: uuid.UUID) -> str | None:
        """The secret again, None where it was never kept or may not be shown. Raises UnsealError."""
        if sealed is None or not self.reveal:
            return None
        return self._sealer.open(sealed, sealed_as(account_id, key_id)).decode()

    def resealed(self, sealed: str, account_id: uuid.UUID, key_id: uuid.UUID) -> str:
        """Raises UnsealError."""
        return self._sealer.seal(
            self._sealer.open(sealed, sealed_as(account_id, key_id)), sealed_as(account_id, key_id)
        )

    def masked(self, secret: str, key_id: uuid.UUID) -> bytes:
        """The SHA-256 of a key as it is kept: to the meter that is a credential, so the database alone may not tell it."""
        return self._pepper.masked(hashlib.sha256(secret.encode()).digest(), b"api_key.hash", key_id.bytes)

    def unmasked(self, kept: bytes | None, key_id: uuid.UUID) -> bytes | None:
        """The SHA-256 again, by which OpenRouter's clients name a key."""
        return None if kept is None else self._pepper.masked(kept, b"api_key.hash", key_id.bytes)

    @property
    def current_sealing_key(self) -> str:
        return self._sealer.current_id


def sealed_as(account_id: uuid.UUID, key_id: uuid.UUID) -> str:
    """The name that a key's kept secret is bound to."""
    return f"api_key/{account_id}/{key_id}"


def clean_name(text: str) -> str:
    """NFC, trimmed, 1-25 code points, none of them a control, a bidi mark or unassigned.

    Raises InvalidField.
    """
    name = unicodedata.normalize("NFC", text).strip()
    if not 1 <= len(name) <= NAME_LENGTH:
        raise InvalidField(f"name must have 1 to {NAME_LENGTH} characters, got {len(name)}", param="name")
    if any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for char in name):
        raise InvalidField("name may not contain control, direction or unassigned characters", param="name")
    return name


async def issue(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, new: NewKey) -> tuple[Row, str]:
    """Make a key; returns its row and its secret, which is not shown again unless revealing is on.

    Raises NameTaken when a live key of the account has that name, InvalidField past what an account or a key may have.
    """
    _refuse_too_large(new.name, new.scopes, new.allowed_models)
    await _refuse_too_many(session, account_id, keyring.keys_per_account)
    key_id, secret = new_id(), new_secret("sk")
    try:
        await row(
            session,
            """INSERT INTO api_key (account_id, id, name, preview, sealed_secret, masked_hash, limit_nusd, reset_period, expire_at,
                                    scopes, allowed_models, disabled_at, call_limit_nusd, requests_per_minute)
               VALUES (:account_id, :id, :name, :preview, :sealed, :masked_hash, :limit_nusd, :reset_period, :expire_at,
                       :scopes, :allowed_models, CASE WHEN :is_disabled THEN now() END, :call_limit_nusd, :requests_per_minute)""",
            account_id=account_id, id=key_id, name=new.name, preview=preview(secret),
            sealed=keyring.seal(secret, account_id, key_id), masked_hash=keyring.masked(secret, key_id),
            limit_nusd=new.limit_nusd, reset_period=new.reset_period,
            expire_at=new.expire_at, scopes=new.scopes, allowed_models=new.allowed_models, is_disabled=new.is_disabled,
            call_limit_nusd=new.call_limit_nusd, requests_per_minute=new.requests_per_minute,
        )  # fmt: skip
    except IntegrityError as error:
        raise _name_taken(error, new.name) from None
    await keyring.register(session, secret, Kind.API_KEY, account_id, key_id)
    await keyring.prove(session, account_id, key_id)
    return await read(session, account_id, key_id), secret


async def read(session: AsyncSession, account_id: uuid.UUID, key_id: uuid.UUID) -> Row:
    """Raises KeyNotFound, alike for a missing key and another account's."""
    found = await row(
        session, f"SELECT {_WINDOW_NOW} FROM api_key WHERE account_id = :account_id AND id = :id",
        account_id=account_id, id=key_id,
    )  # fmt: skip
    if found is None:
        raise KeyNotFound
    return found


async def list_keys(
    session: AsyncSession, account_id: uuid.UUID, limit: int, after: uuid.UUID | None, *, include_disabled: bool
) -> list[Row]:
    """A page of the account's keys, oldest first; revoked ones only on request. `after` is where the page before ended."""
    # Ids are made in the order of time, and the primary key has them so.
    return await rows(
        session,
        f"""SELECT {_WINDOW_NOW} FROM api_key
            WHERE account_id = :account_id AND (:all OR deleted_at IS NULL) AND (CAST(:after AS uuid) IS NULL OR id > :after)
            ORDER BY id LIMIT :limit""",
        account_id=account_id, all=include_disabled, after=after, limit=limit,
    )  # fmt: skip


async def newest_keys(
    session: AsyncSession, account_id: uuid.UUID, limit: int, offset: int, *, include_disabled: bool
) -> list[Row]:
    """A page of the account's keys, newest first, without revoked ones; those that are switched off only on request."""
    return await rows(
        session,
        f"""SELECT {_WINDOW_NOW} FROM api_key
            WHERE account_id = :account_id AND deleted_at IS NULL AND (:all OR disabled_at IS NULL)
            ORDER BY id DESC LIMIT :limit OFFSET :offset""",
        account_id=account_id, all=include_disabled, limit=limit, offset=offset,
    )  # fmt: skip


async def key_of_hash(session: AsyncSession, pepper: Pepper, account_id: uuid.UUID, sha256: bytes) -> uuid.UUID | None:
    """The account's key that has this SHA-256, also a revoked one; None for none and for another account's."""
    lookup = pepper.lookup_hashed(sha256)
    found = await row(
        session,
        """SELECT key_id, proof FROM credential
           WHERE secret_hash = :hash AND kind = 'api_key' AND account_id = :account_id""",
        hash=lookup, account_id=account_id,
    )  # fmt: skip
    if found is None or found["proof"] != credential_proof(pepper, lookup, Kind.API_KEY, account_id, found["key_id"]):
        return None
    key_id: uuid.UUID = found["key_id"]
    return key_id


async def _refuse_too_many(session: AsyncSession, account_id: uuid.UUID, most: int) -> None:
    """The account stays locked, so that keys of one moment are counted one after the other."""
    await row(session, "SELECT 1 AS locked FROM account WHERE id = :id FOR NO KEY UPDATE", id=account_id)
    found = await row(
        session, "SELECT count(*) AS live FROM api_key WHERE account_id = :account_id AND deleted_at IS NULL",
        account_id=account_id,
    )  # fmt: skip
    assert found is not None
    if found["live"] >= most:
        raise InvalidField(f"this account has {found['live']} keys and may have {most}; revoke one that is not needed")


def _refuse_too_large(name: str, scopes: Sequence[str] | None, models: Sequence[str] | None) -> None:
    size = len(name.encode()) + sum(len(text.encode()) + 1 for text in (*(scopes or ()), *(models or ())))
    if size > KEY_BYTES:
        raise InvalidField(
            f"name, scopes and allowed_models have {size} bytes together; a key may have {KEY_BYTES}",
            param="allowed_models",
        )


async def change(
    session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, key_id: uuid.UUID, changes: Mapping[str, Any]
) -> Row:
    """Change a live key: `changes` has new values of NewKey's fields, and nothing of what stays.

    Another reset_period starts a new window at 0, to which the holds that are open move along. Taking
    the limit away takes the period with it. Raises KeyNotFound, NameTaken, InvalidField.
    """
    await row(session, "SELECT 1 AS locked FROM account WHERE id = :id FOR NO KEY UPDATE", id=account_id)
    before = await read(session, account_id, key_id)
    if before["deleted_at"] is not None:
        raise KeyNotFound
    after = {
        name: before[name]
        for name in (
            "name", "limit_nusd", "reset_period", "expire_at", "scopes", "allowed_models", "call_limit_nusd", "requests_per_minute"
        )
    }  # fmt: skip
    after |= {name: value for name, value in changes.items() if name in after}
    if changes.get("limit_nusd", 0) is None and "reset_period" not in changes:
        after["reset_period"] = None
    if after["reset_period"] is not None and after["limit_nusd"] is None:
        raise InvalidField("reset_period needs usage_limit_usd", param="reset_period")
    if {
        "name",
        "scopes",
        "allowed_models",
    } & changes.keys():  # one from before there was this limit may still be disabled
        _refuse_too_large(after["name"], after["scopes"], after["allowed_models"])
    try:
        await row(
            session,
            """UPDATE api_key SET name = :name, limit_nusd = :limit_nusd, reset_period = :reset_period, scopes = :scopes,
                      expire_at = :expire_at, allowed_models = :allowed_models, updated_at = now(), revision = revision + 1,
                      call_limit_nusd = :call_limit_nusd, requests_per_minute = :requests_per_minute,
                      disabled_at = CASE WHEN :disabled THEN coalesce(disabled_at, now()) END
               WHERE account_id = :account_id AND id = :id""",
            **after, account_id=account_id, id=key_id,
            disabled=changes.get("is_disabled", before["disabled_at"] is not None),
        )  # fmt: skip
    except IntegrityError as error:
        raise _name_taken(error, after["name"]) from None
    if after["reset_period"] != before["reset_period"]:
        await _start_window(session, account_id, key_id)
    await keyring.prove(session, account_id, key_id)
    return await read(session, account_id, key_id)


async def revoke(session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, key_id: uuid.UUID) -> None:
    """Soft-delete: the key is refused from the moment this commits; its open holds still settle.

    The sealed secret goes too, since nobody will be shown it again. Raises KeyNotFound, also on a repeat.
    """
    # The account's row is what every authorize locks first: whoever waits behind us sees the key gone.
    await row(session, "SELECT 1 AS locked FROM account WHERE id = :id FOR NO KEY UPDATE", id=account_id)
    gone = await row(
        session,
        """UPDATE api_key SET deleted_at = now(), updated_at = now(), revision = revision + 1, sealed_secret = NULL
           WHERE account_id = :account_id AND id = :id AND deleted_at IS NULL RETURNING id""",
        account_id=account_id, id=key_id,
    )  # fmt: skip
    if gone is None:
        raise KeyNotFound
    await keyring.prove(session, account_id, key_id)


async def reseal_all(db: Database, keyring: Keyring, told: Told = nobody) -> Resealed:
    """Seal every kept secret under the newest key, or forget them all when revealing is off.

    One that does not open stays as it is.
    """
    if not keyring.reveal:
        found = await db.transaction(
            lambda session: rows(
                session, "UPDATE api_key SET sealed_secret = NULL WHERE sealed_secret IS NOT NULL RETURNING id"
            )
        )
        return Resealed(len(found))
    total = Resealed()
    last: tuple[uuid.UUID, uuid.UUID] | None = (uuid.UUID(int=0), uuid.UUID(int=0))
    while last is not None:
        some, last = await db.transaction(partial(_reseal_some, keyring=keyring, after=last))
        total += some
        told(total.done, None)
    return total


async def _reseal_some(
    session: AsyncSession, keyring: Keyring, after: tuple[uuid.UUID, uuid.UUID]
) -> tuple[Resealed, tuple[uuid.UUID, uuid.UUID] | None]:
    """Some keys behind `after`, and the last of them: None when there are no more."""
    stale = await rows(
        session,
        """SELECT account_id, id, sealed_secret FROM api_key
           WHERE (account_id, id) > (:account_id, :id) AND NOT starts_with(sealed_secret, :current)
           ORDER BY account_id, id LIMIT 500""",
        account_id=after[0], id=after[1], current=f"{keyring.current_sealing_key}.",
    )  # fmt: skip
    done = 0
    for key in stale:
        try:
            sealed = keyring.resealed(key["sealed_secret"], key["account_id"], key["id"])
        except UnsealError:
            log.error("key.secret_unreadable", account_id=str(key["account_id"]), key_id=str(key["id"]))
            continue
        await row(
            session,
            """UPDATE api_key SET sealed_secret = :sealed
               WHERE account_id = :account_id AND id = :id AND sealed_secret = :before""",
            sealed=sealed, account_id=key["account_id"], id=key["id"], before=key["sealed_secret"],
        )  # fmt: skip
        done += 1
    return Resealed(done, len(stale) - done), (stale[-1]["account_id"], stale[-1]["id"]) if stale else None


async def _start_window(session: AsyncSession, account_id: uuid.UUID, key_id: uuid.UUID) -> None:
    # Not now(): that is when the transaction began, and it may have waited for a charge that rolled the window since.
    started = await row(
        session,
        """UPDATE api_key SET window_start = statement_timestamp(), window_usage_nusd = 0
           WHERE account_id = :account_id AND id = :key_id RETURNING window_start""",
        account_id=account_id, key_id=key_id,
    )  # fmt: skip
    assert started is not None
    await row(
        session,
        """UPDATE hold SET window_start = :window_start
           WHERE account_id = :account_id AND key_id = :key_id AND state = 'open'""",
        window_start=started["window_start"], account_id=account_id, key_id=key_id,
    )  # fmt: skip


def _name_taken(error: IntegrityError, name: str) -> Exception:
    if "api_key_live_name" in str(error.orig):
        return NameTaken(f"Another live key of this account is named {name!r}", param="name")
    return error
