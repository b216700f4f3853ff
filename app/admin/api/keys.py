"""How operators ask about the keys of any account, in the customers' own words."""

from uuid import UUID

from litestar import Controller, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin import keys
from app.admin.api.asked import Because, account_in, key_in, reason_of
from app.kernel.db import Database
from app.kernel.idempotency import Once
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.security import Admin
from app.kernel.settings import Settings
from app.keys.api import KeyAnswer, KeyRequest, KeysAnswer, KeyView, Revoked, new_key, wanted_changes
from app.keys.issue import Keyring, list_keys, read
from app.ledger.statement import balance


class OperatorKeyRequest(KeyRequest, frozen=True, forbid_unknown_fields=True):
    """What a key is asked to be. In PATCH an absent field stays, and null clears it. Unknown fields are refused."""


class AdminKeysController(Controller):
    """API keys of any account. What a key's secret is, nobody is shown but in the answer that makes it."""

    path = "/admin/accounts/{account_id:str}/keys"
    tags = ("Admin",)

    @get("/", summary="List an account's keys")
    async def list(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        account_id: FromPath[str],
        include_disabled: FromQuery[bool] = True,
        limit: FromQuery[int] = DEFAULT_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> KeysAnswer:
        """Oldest first, revoked ones too unless `include_disabled=false`."""
        size, after, account = page_size(limit), from_cursor(cursor, tuple[UUID]), account_in(account_id)

        async def work(session: AsyncSession) -> KeysAnswer:
            await balance(session, account)  # which knows whether there is such an account
            found = await list_keys(
                session, account, size + 1, after[0] if after else None, include_disabled=include_disabled
            )
            ended = to_cursor(found[size - 1]["id"]) if len(found) > size else None
            return KeysAnswer([KeyView.of(key) for key in found[:size]], ended)

        return await db.transaction(work)

    @post("/", summary="Create a key for an account")
    async def create(
        self,
        admin: NamedDependency[Admin],
        keyring: NamedDependency[Keyring],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        data: JSONBody[OperatorKeyRequest],
    ) -> KeyAnswer:
        """The full key is in this answer."""
        new = new_key(data)

        async def effect(session: AsyncSession) -> KeyAnswer:
            made = await keys.create(session, keyring, settings.pepper, admin, account_in(account_id), new)
            return KeyAnswer(KeyView.of(*made))

        return await once.do(KeyAnswer, effect)

    @get("/{key_id:str}", summary="Show a key")
    async def show(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        account_id: FromPath[str],
        key_id: FromPath[str],
    ) -> KeyAnswer:
        """Never its secret."""
        found = await db.transaction(lambda session: read(session, account_in(account_id), key_in(key_id)))
        return KeyAnswer(KeyView.of(found))

    @patch("/{key_id:str}", summary="Change a key")
    async def change(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        key_id: FromPath[str],
        data: JSONBody[OperatorKeyRequest],
    ) -> KeyAnswer:
        """Only the fields sent change; null clears one."""
        changes = wanted_changes(data)
        where = account_in(account_id), key_in(key_id)
        found = await db.transaction(
            lambda session: keys.change(session, keyring, settings.pepper, admin, *where, changes)
        )
        return KeyAnswer(KeyView.of(found))

    @delete("/{key_id:str}", status_code=200, summary="Revoke a key")
    async def delete(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        key_id: FromPath[str],
    ) -> Revoked:
        """The key stops working before this is answered; it cannot be undone."""
        where = account_in(account_id), key_in(key_id)
        await db.transaction(lambda session: keys.revoke(session, keyring, settings.pepper, admin, *where))
        return Revoked()

    @post("/{key_id:str}/revoke", status_code=200, summary="Revoke a key, with a reason")
    async def revoke(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        keyring: NamedDependency[Keyring],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        key_id: FromPath[str],
        data: JSONBody[Because | None] = None,
    ) -> Revoked:
        """The same as DELETE."""

        async def effect(session: AsyncSession) -> Revoked:
            where = account_in(account_id), key_in(key_id)
            await keys.revoke(session, keyring, settings.pepper, admin, *where, reason_of(data))
            return Revoked()

        return await once.do(Revoked, effect)

    @post("/{key_id:str}/disable", status_code=200, summary="Switch a key off")
    async def disable(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        keyring: NamedDependency[Keyring],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        key_id: FromPath[str],
        data: JSONBody[Because | None] = None,
    ) -> KeyAnswer:
        """It is refused before this is answered; `enable` is the way back."""
        return await self._switch(admin, once, keyring, settings, account_id, key_id, data, is_disabled=True)

    @post("/{key_id:str}/enable", status_code=200, summary="Switch a key on again")
    async def enable(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        keyring: NamedDependency[Keyring],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        key_id: FromPath[str],
        data: JSONBody[Because | None] = None,
    ) -> KeyAnswer:
        """One that was revoked stays so."""
        return await self._switch(admin, once, keyring, settings, account_id, key_id, data, is_disabled=False)

    async def _switch(
        self,
        admin: Admin,
        once: Once,
        keyring: Keyring,
        settings: Settings,
        account_id: str,
        key_id: str,
        data: Because | None,
        *,
        is_disabled: bool,
    ) -> KeyAnswer:
        async def effect(session: AsyncSession) -> KeyAnswer:
            where = account_in(account_id), key_in(key_id)
            how = {"is_disabled": is_disabled, "reason": reason_of(data)}
            return KeyAnswer(KeyView.of(await keys.switch(session, keyring, settings.pepper, admin, *where, **how)))  # type: ignore[arg-type]

        return await once.do(KeyAnswer, effect)
