"""How HTTP asks for keys: the routes of the PayPerQ API, with the credit id."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Controller, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField, KeyNotFound
from app.kernel.idempotency import Once
from app.kernel.logs import log
from app.kernel.money import JsonNumber, is_given, parse_usd, usd, usd_or_null
from app.kernel.pages import MAX_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.reading import uuid_in
from app.kernel.security import Caller, UnsealError
from app.keys.issue import SCOPES, Keyring, NewKey, change, clean_name, issue, list_keys, read, revoke
from app.keys.tables import ResetPeriod
from app.keys.verify import hold_still, refuse_ending

MIN_LIMIT_NUSD = 10_000_000
"""$0.01, the seed's minimum."""

Period = Literal["daily", "weekly", "monthly"]
Scope = Literal["spend", "balance", "topup", "activity"]
ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[!-~]+\Z")]
_PERIODS: dict[str, ResetPeriod] = {
    "daily": ResetPeriod.DAILY, "weekly": ResetPeriod.WEEKLY, "monthly": ResetPeriod.MONTHLY
}  # fmt: skip
_WORDS = {period.value: word for word, period in _PERIODS.items()}


class KeyRequest(msgspec.Struct, frozen=True):
    """What a key is asked to be. In PATCH an absent field stays, and null clears it."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    usage_limit_usd: JsonNumber = msgspec.Raw(b"")
    reset_period: Period | None | msgspec.UnsetType = msgspec.UNSET
    expire_at: Annotated[datetime, msgspec.Meta(tz=True)] | None | msgspec.UnsetType = msgspec.UNSET
    scopes: Annotated[list[Scope], msgspec.Meta(max_length=len(SCOPES))] | None | msgspec.UnsetType = msgspec.UNSET
    allowed_models: Annotated[list[ModelName], msgspec.Meta(max_length=200)] | None | msgspec.UnsetType = msgspec.UNSET
    disabled: bool | msgspec.UnsetType = msgspec.UNSET
    max_usd_per_call: JsonNumber = msgspec.Raw(b"")
    requests_per_minute: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None | msgspec.UnsetType = msgspec.UNSET


class KeyView(msgspec.Struct, frozen=True, rename={"id": "_id"}):
    """A key as its owner sees it; `api_key` is only there when it may be shown.

    It is null, and `api_key_reason` is `unreadable`, where it was kept and cannot be opened any more: the operator lost
    the key it was sealed with, or somebody moved it. The API key itself works as before.
    """

    id: UUID
    name: str
    api_key_preview: str
    usage_limit_usd: JsonNumber
    current_period_usage_usd: JsonNumber
    total_usage_all_time_usd: JsonNumber
    reset_period: Period | None
    reset_at: datetime | None
    expire_at: datetime | None
    scopes: list[str] | None
    allowed_models: list[str] | None
    max_usd_per_call: JsonNumber
    requests_per_minute: int | None
    disabled: bool
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    api_key: str | None | msgspec.UnsetType = msgspec.UNSET
    api_key_reason: Literal["unreadable"] | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, key: Row, secret: str | None | msgspec.UnsetType = msgspec.UNSET) -> "KeyView":
        same = {
            name: key[name]
            for name in (
                "id",
                "name",
                "expire_at",
                "scopes",
                "allowed_models",
                "requests_per_minute",
                "created_at",
                "updated_at",
                "deleted_at",
            )
        }
        return cls(
            **same,
            api_key_preview=key["preview"],
            usage_limit_usd=usd_or_null(key["limit_nusd"]),
            max_usd_per_call=usd_or_null(key["call_limit_nusd"]),
            current_period_usage_usd=usd(key["window_usage_nusd"]),
            total_usage_all_time_usd=usd(key["lifetime_nusd"]),
            reset_period=_WORDS.get(key["reset_period"]),  # type: ignore[arg-type]
            reset_at=key["reset_at"],
            disabled=key["disabled_at"] is not None,
            api_key=secret,
            api_key_reason="unreadable" if secret is None else msgspec.UNSET,
        )


class KeyAnswer(msgspec.Struct, frozen=True):
    data: KeyView
    status: str = "success"


class KeysAnswer(msgspec.Struct, frozen=True):
    data: list[KeyView]
    next_cursor: str | None
    status: str = "success"


class Revoked(msgspec.Struct, frozen=True):
    status: str = "success"
    message: str = "API key revoked successfully"


class KeysController(Controller):
    """Manage the account's API keys. All of it needs `x-credit-id`."""

    path = "/keys"
    tags = ("API keys",)

    @get("/", summary="List keys")
    async def list(
        self,
        owner: NamedDependency[Caller],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        include_disabled: FromQuery[bool] = False,
        show_key: FromQuery[bool] = False,
        limit: FromQuery[int] = MAX_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> KeysAnswer:
        """The account's keys, oldest first; `include_disabled=true` shows revoked ones too.

        Clients that know no pages get the largest one: up to 100 keys, and `next_cursor` if there are more.
        """
        size, after = page_size(limit), from_cursor(cursor, tuple[UUID])
        found = await db.transaction(
            lambda session: list_keys(
                session, owner.account_id, size + 1, after[0] if after else None, include_disabled=include_disabled
            )
        )
        await _note_shown(db, keyring, owner, found[:size], show_key)
        return KeysAnswer(
            [KeyView.of(key, _shown(keyring, owner, key, show_key)) for key in found[:size]],
            to_cursor(found[size - 1]["id"]) if len(found) > size else None,
        )

    @post("/", summary="Create a key")
    async def create(
        self,
        owner: NamedDependency[Caller],
        keyring: NamedDependency[Keyring],
        once: NamedDependency[Once],
        data: JSONBody[KeyRequest],
    ) -> KeyAnswer:
        """The full key is in this answer; keep it. An account may have 1,000 live ones, unless the operator says otherwise."""
        new = new_key(data)

        async def effect(session: Any) -> KeyAnswer:
            await hold_still(session, owner)
            return KeyAnswer(KeyView.of(*await issue(session, keyring, owner.account_id, new)))

        return await once.do(KeyAnswer, effect)

    @get("/{key_id:str}", summary="Show a key")
    async def show(
        self,
        owner: NamedDependency[Caller],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        key_id: FromPath[str],
        show_key: FromQuery[bool] = False,
    ) -> KeyAnswer:
        """One key; with `show_key=true` its secret too, if the operator allows it."""
        found = await db.transaction(lambda session: read(session, owner.account_id, _key_id(key_id)))
        await _note_shown(db, keyring, owner, [found], show_key)
        return KeyAnswer(KeyView.of(found, _shown(keyring, owner, found, show_key)))

    @patch("/{key_id:str}", summary="Change a key")
    async def change(
        self,
        owner: NamedDependency[Caller],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        key_id: FromPath[str],
        data: JSONBody[KeyRequest],
    ) -> KeyAnswer:
        """Only the fields sent change; null clears one. Another `reset_period` starts a new window at 0."""
        changes = wanted_changes(data)
        found = await db.transaction(
            lambda session: change(session, keyring, owner.account_id, _key_id(key_id), changes)
        )
        return KeyAnswer(KeyView.of(found))

    @delete("/{key_id:str}", status_code=200, summary="Revoke a key")
    async def revoke(
        self,
        owner: NamedDependency[Caller],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        key_id: FromPath[str],
    ) -> Revoked:
        """The key stops working before this is answered; it cannot be undone."""
        await db.transaction(lambda session: revoke(session, keyring, owner.account_id, _key_id(key_id)))
        return Revoked()


def _key_id(text: str) -> UUID:
    found = uuid_in(text)
    if found is None:
        raise KeyNotFound
    return found


async def _note_shown(db: Database, keyring: Keyring, owner: Caller, keys: Sequence[Row], wanted: bool) -> None:
    """Before a kept secret is shown again, its owner's log tells of it. Raises MissingScope for a credit id that ends."""
    if not wanted or not keyring.reveal or not any(key["sealed_secret"] for key in keys):
        return
    refuse_ending(owner)
    subject = str(keys[0]["id"]) if len(keys) == 1 else f"{len(keys)} keys"
    await db.transaction(
        lambda session: keyring.note(session, owner.account_id, "key_revealed", owner.kind.value, subject)
    )


def _shown(keyring: Keyring, owner: Caller, key: Row, wanted: bool) -> str | None | msgspec.UnsetType:
    """The secret; None where what was kept of it does not open, absent where nothing was kept or asked for."""
    if not wanted:
        return msgspec.UNSET
    try:
        return keyring.open(key["sealed_secret"], owner.account_id, key["id"]) or msgspec.UNSET
    except UnsealError:
        log.error("key.secret_unreadable", account_id=str(owner.account_id), key_id=str(key["id"]))
        return None


def new_key(data: KeyRequest) -> NewKey:
    """Raises InvalidField, also where the name is missing."""
    wanted = wanted_changes(data)
    if "name" not in wanted:
        raise InvalidField("name is required", param="name")
    if wanted.get("reset_period") is not None and wanted.get("limit_nusd") is None:
        raise InvalidField("reset_period needs usage_limit_usd", param="reset_period")
    return NewKey(**wanted)


def wanted_changes(data: KeyRequest) -> dict[str, Any]:
    """The fields that were sent, checked, under the names the verbs know. Raises InvalidField."""
    changes: dict[str, Any] = {}
    if data.name is not msgspec.UNSET:
        changes["name"] = clean_name(data.name)
    if bytes(data.usage_limit_usd):
        changes["limit_nusd"] = _limit(data.usage_limit_usd)
    if data.reset_period is not msgspec.UNSET:
        changes["reset_period"] = _PERIODS[data.reset_period].value if data.reset_period else None
    if data.expire_at is not msgspec.UNSET:
        changes["expire_at"] = _future(data.expire_at)
    if data.scopes is not msgspec.UNSET:
        changes["scopes"] = data.scopes
    if data.allowed_models is not msgspec.UNSET:
        changes["allowed_models"] = data.allowed_models
    if data.disabled is not msgspec.UNSET:
        changes["is_disabled"] = data.disabled
    if bytes(data.max_usd_per_call):
        changes["call_limit_nusd"] = _limit_of_a_call(data.max_usd_per_call)
    if data.requests_per_minute is not msgspec.UNSET:
        changes["requests_per_minute"] = data.requests_per_minute
    return changes


def _limit_of_a_call(raw: JsonNumber) -> int | None:
    if not is_given(raw):
        return None
    limit = parse_usd(raw, "max_usd_per_call")
    if limit == 0:
        raise InvalidField("max_usd_per_call must be more than 0, or null for no limit", param="max_usd_per_call")
    return limit


def _limit(raw: JsonNumber) -> int | None:
    if not is_given(raw):
        return None
    limit = parse_usd(raw, "usage_limit_usd")
    if limit < MIN_LIMIT_NUSD:
        raise InvalidField("usage_limit_usd must be at least 0.01, or null for no limit", param="usage_limit_usd")
    return limit


def _future(when: datetime | None) -> datetime | None:
    if when is None:
        return None
    try:
        utc = when.astimezone(UTC)
    except OverflowError:
        raise InvalidField("expire_at is outside the calendar", param="expire_at") from None
    if utc <= datetime.now(UTC):
        raise InvalidField("expire_at must be in the future", param="expire_at")
    return utc
