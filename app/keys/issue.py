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
from app.keys.tree import Window, read_above, windows_of
from app.keys.verify import SCOPES, credential_proof, proof_of_credential
from app.notices.tell import tell

NAME_LENGTH = 25
KEY_BYTES = 4096
"""What a key's name, scopes and models may have together: a page of a hundred keys stays below half a megabyte."""

_WINDOW_NOW = """
    id, name, preview, sealed_secret, masked_hash, limit_nusd, reset_period, call_limit_nusd, requests_per_minute, held_nusd, lifetime_nusd, scopes, allowed_models,
    expire_at, disabled_at, deleted_at, created_at, updated_at, parent_id, ancestor_ids, more_periods, more_limits_nusd,
    meter_used(window_start, reset_period, window_usage_nusd, now()) AS window_usage_nusd,
    date_trunc(reset_period, now(), 'UTC') + ('1 ' || reset_period)::interval AS reset_at,
    CASE WHEN more_limits_nusd IS NOT NULL THEN meter_more_used(more_starts, more_periods, more_usage_nusd, now()) END AS more_usage_nusd,
    CASE WHEN more_limits_nusd IS NOT NULL THEN ARRAY (
        SELECT date_trunc(w.period, now(), 'UTC') + ('1 ' || w.period)::interval FROM unnest(more_periods) WITH ORDINALITY w (period, number)
        ORDER BY w.number) END AS more_reset_at,
    lifetime_nusd + coalesce((SELECT below.nusd FROM below WHERE below.id = api_key.id), 0) AS total_nusd
"""
"""A key's columns with its windows as they stand now, whether or not a charge has rolled them yet. `total_nusd` is what it and
the keys below it ever spent."""


_BELOW = """
    WITH below AS MATERIALIZED (
        SELECT above.id, sum(k.lifetime_nusd)::bigint AS nusd FROM api_key k, unnest(k.ancestor_ids) above (id)
        WHERE k.account_id = :account_id GROUP BY 1)
"""
"""What the keys below each key ever spent; it stands before a statement that selects _WINDOW_NOW."""


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
    windows: Sequence[Window] | None = None
    """Several at once, in place of limit_nusd and reset_period."""
    parent_id: uuid.UUID | None = None

    @property
    def all_windows(self) -> Sequence[Window]:
        if self.windows is not None:
            return self.windows
        return () if self.limit_nusd is None else (Window(self.reset_period, self.limit_nusd),)


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

    async def claim(
        self, session: AsyncSession, subject: bytes, account_id: uuid.UUID, key_id: uuid.UUID
    ) -> tuple[uuid.UUID, uuid.UUID]:
        """Let a JWT's subject have this account and key, or learn which it has already; waits for who claims it just now."""
        known: Row = {
            "secret_hash": self._pepper.lookup_subject(subject), "kind": Kind.API_KEY.value, "account_id": account_id,
            "key_id": key_id, "ends_at": None, "label": None,
        }  # fmt: skip
        await self.write(session, known, unless_there=True)
        found = await row(
            session, "SELECT account_id, key_id FROM credential WHERE secret_hash = :hash", hash=known["secret_hash"]
        )
        assert found is not None, "credentials of keys are never deleted"
        return found["account_id"], found["key_id"]

    async def end(self, session: AsyncSession, known: Row, ends_at: datetime) -> None:
        """Let a credential hold until `ends_at` and no longer: it is written anew, with its proof, as it is never changed."""
        await row(session, "DELETE FROM credential WHERE secret_hash = :hash", hash=known["secret_hash"])
        await self.write(session, known | {"ends_at": ends_at})

    def lookup(self, secret: str) -> bytes:
        """The hash that a secret is known by."""
        return self._pepper.lookup(secret)

    async def write(self, session: AsyncSession, known: Row, *, unless_there: bool = False) -> None:
        """Write a credential as `known` has it, with its proof."""
        said = {name: known[name] for name in ("secret_hash", "kind", "account_id", "key_id", "ends_at", "label")}
        await row(
            session,
            f"""INSERT INTO credential (secret_hash, kind, account_id, key_id, ends_at, label, proof)
                VALUES (:secret_hash, :kind, :account_id, :key_id, :ends_at, :label, :proof)
                {"ON CONFLICT (secret_hash) DO NOTHING" if unless_there else ""}""",
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
        await self.prove_all(session, account_id, [key_id])

    async def prove_all(self, session: AsyncSession, account_id: uuid.UUID, key_ids: Sequence[uuid.UUID]) -> None:
        """The same for several keys of an account."""
        found = await rows(
            session, f"SELECT {', '.join(PROVEN)} FROM api_key WHERE account_id = :account_id AND id = ANY (:ids)",
            account_id=account_id, ids=list(key_ids),
        )  # fmt: skip
        assert len(found) == len(key_ids)
        for key in found:
            await row(
                session, "UPDATE api_key SET proof = :proof WHERE account_id = :account_id AND id = :id",
                account_id=account_id, id=key["id"], proof=key_proof(self._pepper, key),
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
        return self.masked_subject(hashlib.sha256(secret.encode()).digest(), key_id)

    def masked_subject(self, subject: bytes, key_id: uuid.UUID) -> bytes:
        """The same of what a JWT's subject has in its place."""
        return self._pepper.masked(subject, b"api_key.hash", key_id.bytes)

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

    Below `new.parent_id` it may do no more than that key, which must work now: whoever revokes that one waits for us, or we for
    them. Raises NameTaken when a live key of the account has that name, InvalidApiKey for a parent that works no more, InvalidField
    past what an account, a key or its parent may have.
    """
    key_id, secret = new_id(), new_secret("sk")
    kept = _Kept(preview(secret), keyring.seal(secret, account_id, key_id), keyring.masked(secret, key_id))
    await _write_new(session, keyring, account_id, key_id, new, kept)
    await keyring.register(session, secret, Kind.API_KEY, account_id, key_id)
    await keyring.prove(session, account_id, key_id)
    return await read(session, account_id, key_id), secret


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a key's row has of its secret."""

    preview: str
    sealed: str | None
    masked_hash: bytes


async def issue_to_subject(
    session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, key_id: uuid.UUID, subject: bytes, new: NewKey
) -> None:
    """Make the key that a subject's JWTs stand for, and nothing else does, once `Keyring.claim` gave it to the subject."""
    kept = _Kept(subject_preview(subject), None, keyring.masked_subject(subject, key_id))
    await _write_new(session, keyring, account_id, key_id, new, kept)
    await keyring.prove(session, account_id, key_id)


def subject_preview(subject: bytes) -> str:
    """What is shown of a subject's key: it tells a subject from another, and not who it is."""
    shown = subject.hex()
    return f"jwt-{shown[:4]}…{shown[-4:]}"


async def _write_new(
    session: AsyncSession, keyring: Keyring, account_id: uuid.UUID, key_id: uuid.UUID, new: NewKey, kept: _Kept
) -> None:
    """The key's row; nothing leads to it yet."""
    await _refuse_too_many(session, account_id, keyring.keys_per_account)
    above = await read_above(session, account_id, new.parent_id)
    scopes = new.scopes
    if above is not None:
        above.must_work()
        if scopes is None:
            scopes = above.unsaid_scopes()
        above.refuse_beyond(
            windows=new.all_windows, limits_param="usage_limit_usd" if new.windows is None else "limits", expire_at=new.expire_at,
            scopes=scopes, allowed_models=new.allowed_models, call_limit_nusd=new.call_limit_nusd,
            requests_per_minute=new.requests_per_minute,
        )  # fmt: skip
    _refuse_too_large(new.name, scopes, new.allowed_models)
    first, more = _first_and_more(new.all_windows)
    try:
        await row(
            session,
            """INSERT INTO api_key (account_id, id, name, preview, sealed_secret, masked_hash, limit_nusd, reset_period, expire_at,
                                    scopes, allowed_models, disabled_at, call_limit_nusd, requests_per_minute, parent_id, ancestor_ids,
                                    window_start, more_periods, more_limits_nusd, more_starts, more_usage_nusd)
               VALUES (:account_id, :id, :name, :preview, :sealed, :masked_hash, :limit_nusd, :reset_period, :expire_at,
                       :scopes, :allowed_models, CASE WHEN :is_disabled THEN now() END, :call_limit_nusd, :requests_per_minute, :parent_id,
                       :ancestor_ids, now(), CAST(:more_periods AS text[]), CAST(:more_limits_nusd AS bigint[]),
                       CASE WHEN CAST(:more AS int) > 0 THEN array_fill(now(), ARRAY[CAST(:more AS int)]) END,
                       CASE WHEN CAST(:more AS int) > 0 THEN array_fill(CAST(0 AS bigint), ARRAY[CAST(:more AS int)]) END)""",
            account_id=account_id, id=key_id, name=new.name, preview=kept.preview, sealed=kept.sealed, masked_hash=kept.masked_hash,
            limit_nusd=None if first is None else first.limit_nusd, reset_period=None if first is None else first.period,
            expire_at=new.expire_at, scopes=scopes, allowed_models=new.allowed_models, is_disabled=new.is_disabled,
            call_limit_nusd=new.call_limit_nusd, requests_per_minute=new.requests_per_minute, parent_id=new.parent_id,
            ancestor_ids=None if above is None else above.chain, more=len(more),
            more_periods=[each.period for each in more] or None, more_limits_nusd=[each.limit_nusd for each in more] or None,
        )  # fmt: skip
    except IntegrityError as error:
        raise _name_taken(error, new.name) from None


def _first_and_more(windows: Sequence[Window]) -> tuple[Window | None, Sequence[Window]]:
    return (windows[0] if windows else None), windows[1:]


_UNDER = "(CAST(:under AS uuid) IS NULL OR CAST(:under AS uuid) = ANY (ancestor_ids))"
"""Only keys below one, where a key asks."""


async def read(session: AsyncSession, account_id: uuid.UUID, key_id: uuid.UUID, under: uuid.UUID | None = None) -> Row:
    """Raises KeyNotFound, alike for a missing key, another account's, and one that does not stand below `under`."""
    found = await row(
        session, f"{_BELOW} SELECT {_WINDOW_NOW} FROM api_key WHERE account_id = :account_id AND id = :id AND {_UNDER}",
        account_id=account_id, id=key_id, under=under,
    )  # fmt: skip
    if found is None:
        raise KeyNotFound
    return found


async def list_keys(
    session: AsyncSession,
    account_id: uuid.UUID,
    limit: int,
    after: uuid.UUID | None,
    *,
    include_disabled: bool,
    under: uuid.UUID | None = None,
) -> list[Row]:
    """A page of the account's keys, or of those below one, oldest first; revoked ones only on request. `after` is where the page
    before ended."""
    # Ids are made in the order of time, and the primary key has them so.
    return await rows(
        session,
        f"""{_BELOW} SELECT {_WINDOW_NOW} FROM api_key
            WHERE account_id = :account_id AND (:all OR deleted_at IS NULL) AND (CAST(:after AS uuid) IS NULL OR id > :after) AND {_UNDER}
            ORDER BY id LIMIT :limit""",
        account_id=account_id, all=include_disabled, after=after, limit=limit, under=under,
    )  # fmt: skip


async def newest_keys(
    session: AsyncSession,
    account_id: uuid.UUID,
    limit: int,
    offset: int,
    *,
    include_disabled: bool,
    under: uuid.UUID | None = None,
) -> list[Row]:
    """A page of the account's keys, or of those below one, newest first, without revoked ones; those that are switched off only on
    request."""
    return await rows(
        session,
        f"""{_BELOW} SELECT {_WINDOW_NOW} FROM api_key
            WHERE account_id = :account_id AND deleted_at IS NULL AND (:all OR disabled_at IS NULL) AND {_UNDER}
            ORDER BY id DESC LIMIT :limit OFFSET :offset""",
        account_id=account_id, all=include_disabled, limit=limit, offset=offset, under=under,
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
    session: AsyncSession,
    keyring: Keyring,
    account_id: uuid.UUID,
    key_id: uuid.UUID,
    changes: Mapping[str, Any],
    under: uuid.UUID | None = None,
) -> Row:
    """Change a live key: `changes` has new values of NewKey's fields, and nothing of what stays.

    A window of another period starts at 0, and the holds that are open move along to it; one of a period that was there keeps
    what was spent in it. limit_nusd and reset_period are of the first window: taking the limit away takes that window with it.
    Raises KeyNotFound, NameTaken, InvalidField, also for more than the keys above it may.
    """
    locked = await row(session, "SELECT now() AS now FROM account WHERE id = :id FOR NO KEY UPDATE", id=account_id)
    before = await read(session, account_id, key_id, under)
    if locked is None or before["deleted_at"] is not None:
        raise KeyNotFound
    after = {
        name: before[name]
        for name in ("name", "expire_at", "scopes", "allowed_models", "call_limit_nusd", "requests_per_minute")
    }
    after |= {name: value for name, value in changes.items() if name in after}
    windows = _changed_windows(before, changes)
    await _refuse_beyond_above(session, account_id, before, after, windows, changes)
    if {
        "name",
        "scopes",
        "allowed_models",
    } & changes.keys():  # one from before there was this limit may still be disabled
        _refuse_too_large(after["name"], after["scopes"], after["allowed_models"])
    try:
        await row(
            session,
            """UPDATE api_key SET name = :name, scopes = :scopes,
                      expire_at = :expire_at, allowed_models = :allowed_models, updated_at = now(), revision = revision + 1,
                      call_limit_nusd = :call_limit_nusd, requests_per_minute = :requests_per_minute,
                      disabled_at = CASE WHEN :disabled THEN coalesce(disabled_at, CAST(:now AS timestamptz)) END
               WHERE account_id = :account_id AND id = :id""",
            **after, account_id=account_id, id=key_id, now=locked["now"],
            disabled=changes.get("is_disabled", before["disabled_at"] is not None),
        )  # fmt: skip
    except IntegrityError as error:
        raise _name_taken(error, after["name"]) from None
    await _set_windows(session, account_id, key_id, windows)
    await keyring.prove(session, account_id, key_id)
    return await read(session, account_id, key_id)


def _changed_windows(before: Row, changes: Mapping[str, Any]) -> list[Window]:
    """Raises InvalidField."""
    if "windows" in changes:
        return list(changes["windows"])
    limit_nusd = changes.get("limit_nusd", before["limit_nusd"])
    period = changes.get("reset_period", None if changes.get("limit_nusd", 0) is None else before["reset_period"])
    if period is not None and limit_nusd is None:
        raise InvalidField("reset_period needs usage_limit_usd", param="reset_period")
    more = windows_of(before)[1:]
    if period in [each.period for each in more] and limit_nusd is not None:
        raise InvalidField("this key has another window of that period: see limits", param="reset_period")
    return sorted([Window(period, limit_nusd), *more] if limit_nusd is not None else more)


async def _refuse_beyond_above(
    session: AsyncSession,
    account_id: uuid.UUID,
    before: Row,
    after: Mapping[str, Any],
    windows: Sequence[Window],
    changes: Mapping[str, Any],
) -> None:
    """What is set now may not be more than the keys above it have; what was set before may be, and is bounded by them all the same."""
    above = await read_above(session, account_id, before["parent_id"])
    if above is None:
        return
    named = ("expire_at", "scopes", "allowed_models", "call_limit_nusd", "requests_per_minute")
    said = {name: after[name] if name in changes else None for name in named}
    if "scopes" in changes and after["scopes"] is None:
        said["scopes"] = SCOPES
    is_set = {"windows", "limit_nusd", "reset_period"} & changes.keys()
    above.refuse_beyond(
        windows=windows if is_set else (), limits_param="limits" if "windows" in changes else "usage_limit_usd", **said
    )


async def _set_windows(
    session: AsyncSession, account_id: uuid.UUID, key_id: uuid.UUID, windows: Sequence[Window]
) -> None:
    """Those of a period that the key has no window of begin now, and so do, for all windows, the holds that are open."""
    # Not now(): that is when the transaction began, and it may have waited for a charge that rolled a window since.
    found = await row(
        session,
        """SELECT reset_period, window_start, window_usage_nusd, more_periods, more_starts, more_usage_nusd, clock_timestamp() AS now
           FROM api_key WHERE account_id = :account_id AND id = :id""",
        account_id=account_id, id=key_id,
    )  # fmt: skip
    assert found is not None
    had = {found["reset_period"]: (found["window_start"], found["window_usage_nusd"])}
    more = zip(found["more_periods"] or (), found["more_starts"] or (), found["more_usage_nusd"] or (), strict=True)
    had |= {period: (start, usage_nusd) for period, start, usage_nusd in more}
    periods = [each.period for each in windows] or [None]
    (start, usage_nusd), *others = [had.get(period, (found["now"], 0)) for period in periods]
    await row(
        session,
        """UPDATE api_key SET limit_nusd = :limit_nusd, reset_period = :reset_period, window_start = :start, window_usage_nusd = :usage_nusd,
                  more_periods = CAST(:more_periods AS text[]), more_limits_nusd = CAST(:more_limits_nusd AS bigint[]),
                  more_starts = CAST(:more_starts AS timestamptz[]), more_usage_nusd = CAST(:more_usage_nusd AS bigint[])
           WHERE account_id = :account_id AND id = :id""",
        account_id=account_id, id=key_id, limit_nusd=windows[0].limit_nusd if windows else None, reset_period=periods[0],
        start=start, usage_nusd=usage_nusd, more_periods=periods[1:] or None,
        more_limits_nusd=[each.limit_nusd for each in windows[1:]] or None, more_starts=[each for each, _ in others] or None,
        more_usage_nusd=[each for _, each in others] or None,
    )  # fmt: skip
    if set(periods) - had.keys():
        await row(
            session,
            """UPDATE hold SET window_start = :now WHERE account_id = :account_id AND state = 'open' AND key_id IN (
                   SELECT id FROM api_key WHERE account_id = :account_id AND (id = :id OR :id = ANY (ancestor_ids)))""",
            now=found["now"], account_id=account_id, id=key_id,
        )  # fmt: skip


async def revoke(
    session: AsyncSession,
    keyring: Keyring,
    account_id: uuid.UUID,
    key_id: uuid.UUID,
    under: uuid.UUID | None = None,
) -> None:
    """Soft-delete: the key and all below it are refused from the moment this commits; their open holds still settle.

    The sealed secrets go too, since nobody will be shown them again. Raises KeyNotFound, also on a repeat.
    """
    # The account's row is what every authorize locks first: whoever waits behind us sees the key gone.
    await row(session, "SELECT 1 AS locked FROM account WHERE id = :id FOR NO KEY UPDATE", id=account_id)
    if (await read(session, account_id, key_id, under))["deleted_at"] is not None:
        raise KeyNotFound
    gone = await rows(
        session,
        """UPDATE api_key SET deleted_at = now(), updated_at = now(), revision = revision + 1, sealed_secret = NULL
           WHERE account_id = :account_id AND (id = :id OR :id = ANY (ancestor_ids)) AND deleted_at IS NULL RETURNING id""",
        account_id=account_id, id=key_id,
    )  # fmt: skip
    await keyring.prove_all(session, account_id, [each["id"] for each in gone])


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


def _name_taken(error: IntegrityError, name: str) -> Exception:
    if "api_key_live_name" in str(error.orig):
        return NameTaken(f"Another live key of this account is named {name!r}", param="name")
    return error
