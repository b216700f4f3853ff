"""An account's keys as OpenRouter's clients manage them: by hash, with the credit id as the management key."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from litestar import Controller, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField, KeyNotFound
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber
from app.kernel.pages import MAX_LIMIT, at_least
from app.kernel.security import Caller, Pepper
from app.kernel.settings import Settings
from app.keys.api import KeyRequest, new_key, wanted_changes
from app.keys.issue import Keyring, change, issue, key_of_hash, newest_keys, read, revoke
from app.keys.verify import hold_still
from app.openrouter.api.words import KeyWords, Reset, key_words, read_hash
from app.openrouter.spending import Spent, read_spent


class ManagedKeyRequest(msgspec.Struct, frozen=True):
    """What a key is asked to be. In PATCH an absent field stays, and null clears it."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    limit: JsonNumber = msgspec.Raw(b"")
    limit_reset: Reset | None | msgspec.UnsetType = msgspec.UNSET
    expires_at: Annotated[datetime, msgspec.Meta(tz=True)] | None | msgspec.UnsetType = msgspec.UNSET
    disabled: bool | msgspec.UnsetType = msgspec.UNSET

    def ours(self) -> KeyRequest:
        """The same request in the words of /keys."""
        return KeyRequest(
            name=self.name, usage_limit_usd=self.limit, reset_period=self.limit_reset, expire_at=self.expires_at,
            disabled=self.disabled,
        )  # fmt: skip


_THEIR_WORDS: Final = {"usage_limit_usd": "limit", "reset_period": "limit_reset", "expire_at": "expires_at"}


class ManagedKeyView(KeyWords, frozen=True, kw_only=True):
    """A key of the account in OpenRouter's words, USD. `hash` is the SHA-256 of the key, in hex."""

    hash: str | None
    name: str
    disabled: bool
    created_at: datetime
    updated_at: datetime
    workspace_id: UUID

    @classmethod
    def of(cls, keyring: Keyring, account_id: UUID, key: Row, spent: Spent) -> "ManagedKeyView":
        sha256 = keyring.unmasked(key["masked_hash"], key["id"])
        return cls(
            **key_words(key, spent),
            hash=sha256.hex() if sha256 else None,
            name=key["name"],
            disabled=key["disabled_at"] is not None,
            created_at=key["created_at"],
            updated_at=key["updated_at"],
            workspace_id=account_id,
        )


class ManagedKeyAnswer(msgspec.Struct, frozen=True):
    data: ManagedKeyView


class ManagedKeysAnswer(msgspec.Struct, frozen=True):
    data: list[ManagedKeyView]


class MadeKeyAnswer(msgspec.Struct, frozen=True):
    """`key` is the API key itself, and is told here alone."""

    data: ManagedKeyView
    key: str


class Deleted(msgspec.Struct, frozen=True):
    deleted: bool = True


class OpenRouterKeysController(Controller):
    """The account's keys, for clients made for OpenRouter. The credit id is the management key: `Authorization: Bearer`
    or `x-credit-id`; for the keys below it an API key of scope `keys` is one too."""

    path = "/api/v1/keys"
    tags = ("OpenRouter",)

    @get("/", summary="List keys, as OpenRouter tells them")
    async def list_managed_keys(
        self,
        manager: NamedDependency[Caller],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        offset: FromQuery[int] = 0,
        include_disabled: FromQuery[bool] = False,
    ) -> ManagedKeysAnswer:
        """Up to 100 keys, newest first, after `offset` of them; `include_disabled=true` shows those that are switched off
        too. A revoked key is gone."""
        at_least(0, offset, "offset")

        async def work(session: Any) -> ManagedKeysAnswer:
            found = await newest_keys(
                session, manager.account_id, MAX_LIMIT, offset, include_disabled=include_disabled, under=manager.key_id
            )
            spent = await read_spent(session, manager.account_id, datetime.now(UTC).date())
            return ManagedKeysAnswer(
                [ManagedKeyView.of(keyring, manager.account_id, key, spent[key["id"]]) for key in found]
            )

        return await db.transaction(work)

    @post("/", summary="Create a key, as OpenRouter tells it")
    async def create_managed_key(
        self,
        manager: NamedDependency[Caller],
        keyring: NamedDependency[Keyring],
        once: NamedDependency[Once],
        data: JSONBody[ManagedKeyRequest],
    ) -> MadeKeyAnswer:
        """The full key is in `key` of this answer; keep it. Names have 1 to 25 characters, and are the account's own only once."""
        with _in_their_words():
            new = new_key(data.ours(), manager.key_id)

        async def effect(session: Any) -> MadeKeyAnswer:
            await hold_still(session, manager)
            with _in_their_words():
                made, secret = await issue(session, keyring, manager.account_id, new)
            spent = await read_spent(session, manager.account_id, datetime.now(UTC).date(), made["id"])
            return MadeKeyAnswer(ManagedKeyView.of(keyring, manager.account_id, made, spent[made["id"]]), secret)

        return await once.do(MadeKeyAnswer, effect)

    @get("/{key_hash:str}", summary="Show a key, as OpenRouter tells it")
    async def show_managed_key(
        self,
        manager: NamedDependency[Caller],
        db: NamedDependency[Database],
        settings: NamedDependency[Settings],
        keyring: NamedDependency[Keyring],
        key_hash: FromPath[str],
    ) -> ManagedKeyAnswer:
        """One key, by the SHA-256 of it in hex."""

        async def work(session: Any) -> ManagedKeyAnswer:
            key_id = await _live_key(session, settings.pepper, manager, key_hash)
            return await _told(session, keyring, manager.account_id, await read(session, manager.account_id, key_id))

        return await db.transaction(work)

    @patch("/{key_hash:str}", summary="Change a key, as OpenRouter tells it")
    async def change_managed_key(
        self,
        manager: NamedDependency[Caller],
        db: NamedDependency[Database],
        settings: NamedDependency[Settings],
        keyring: NamedDependency[Keyring],
        key_hash: FromPath[str],
        data: JSONBody[ManagedKeyRequest],
    ) -> ManagedKeyAnswer:
        """Only the fields sent change; null clears one. Another `limit_reset` starts a new window at 0."""
        with _in_their_words():
            changes = wanted_changes(data.ours())

        async def work(session: Any) -> ManagedKeyAnswer:
            key_id = await _live_key(session, settings.pepper, manager, key_hash)
            with _in_their_words():
                changed = await change(session, keyring, manager.account_id, key_id, changes)
            return await _told(session, keyring, manager.account_id, changed)

        return await db.transaction(work)

    @delete("/{key_hash:str}", status_code=200, summary="Revoke a key, as OpenRouter tells it")
    async def revoke_managed_key(
        self,
        manager: NamedDependency[Caller],
        db: NamedDependency[Database],
        settings: NamedDependency[Settings],
        keyring: NamedDependency[Keyring],
        key_hash: FromPath[str],
    ) -> Deleted:
        """The key, and all below it, stop working before this is answered; it cannot be undone."""

        async def work(session: Any) -> None:
            key_id = await _live_key(session, settings.pepper, manager, key_hash)
            await revoke(session, keyring, manager.account_id, key_id)

        await db.transaction(work)
        return Deleted()


async def _live_key(session: Any, pepper: Pepper, manager: Caller, text: str) -> UUID:
    """Raises KeyNotFound, alike for what is no hash, another account's, one that is not below the calling key, and a revoked one."""
    sha256 = read_hash(text)
    key_id = None if sha256 is None else await key_of_hash(session, pepper, manager.account_id, sha256)
    if key_id is None or (await read(session, manager.account_id, key_id, manager.key_id))["deleted_at"] is not None:
        raise KeyNotFound
    return key_id


async def _told(session: Any, keyring: Keyring, account_id: UUID, key: Row) -> ManagedKeyAnswer:
    spent = await read_spent(session, account_id, datetime.now(UTC).date(), key["id"])
    return ManagedKeyAnswer(ManagedKeyView.of(keyring, account_id, key, spent[key["id"]]))


@contextmanager
def _in_their_words() -> Iterator[None]:
    """A refusal names the field that was sent, not the one that /keys has for it."""
    try:
        yield
    except InvalidField as error:
        theirs = _THEIR_WORDS.get(error.param or "")
        if theirs is None:
            raise
        said = error.message
        for ours, word in _THEIR_WORDS.items():
            said = said.replace(ours, word)
        raise InvalidField(said, param=theirs) from None
