"""How HTTP asks for keys: the routes of the PayPerQ API, with the credit id, or with a key for those below it."""

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
from app.keys.issue import Keyring, NewKey, change, clean_name, issue, list_keys, read, revoke
from app.keys.tables import ResetPeriod
from app.keys.tree import PERIOD_WORDS, Window
from app.keys.verify import SCOPES, hold_still, refuse_ending

MIN_LIMIT_NUSD = 10_000_000
"""$0.01, the seed's minimum."""

Period = Literal["daily", "weekly", "monthly"]
LimitPeriod = Literal["daily", "weekly", "monthly", "total"]
Scope = Literal["spend", "balance", "topup", "activity", "keys"]
ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[!-~]+\Z")]
_PERIODS: dict[str, ResetPeriod] = {
    "daily": ResetPeriod.DAILY, "weekly": ResetPeriod.WEEKLY, "monthly": ResetPeriod.MONTHLY
}  # fmt: skip
_WORDS = {period.value: word for word, period in _PERIODS.items()}
_LIMIT_PERIODS: dict[str, str | None] = {word: period for period, word in PERIOD_WORDS.items()}


class LimitRequest(msgspec.Struct, frozen=True):
    """One window: what may be spent in each UTC day, ISO week or month, or in all."""

    usd: JsonNumber
    period: LimitPeriod


class KeyRequest(msgspec.Struct, frozen=True):
    """What a key is asked to be. In PATCH an absent field stays, and null clears it.

    `limits` are several windows at once, each period once; `usage_limit_usd` with `reset_period` is the short form of one, and
    of several the shortest.
    """

    name: str | msgspec.UnsetType = msgspec.UNSET
    usage_limit_usd: JsonNumber = msgspec.Raw(b"")
    reset_period: Period | None | msgspec.UnsetType = msgspec.UNSET
    expire_at: Annotated[datetime, msgspec.Meta(tz=True)] | None | msgspec.UnsetType = msgspec.UNSET
    scopes: Annotated[list[Scope], msgspec.Meta(max_length=len(SCOPES) + 1)] | None | msgspec.UnsetType = msgspec.UNSET
    allowed_models: Annotated[list[ModelName], msgspec.Meta(max_length=200)] | None | msgspec.UnsetType = msgspec.UNSET
    disabled: bool | msgspec.UnsetType = msgspec.UNSET
    max_usd_per_call: JsonNumber = msgspec.Raw(b"")
    requests_per_minute: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None | msgspec.UnsetType = msgspec.UNSET
    limits: Annotated[list[LimitRequest], msgspec.Meta(max_length=20)] | None | msgspec.UnsetType = msgspec.UNSET


class LimitView(msgspec.Struct, frozen=True):
    """One window of a key: what may be spent in it, what it and the keys below it have spent, and what is left, USD."""

    usd: JsonNumber
    period: LimitPeriod
    spent_usd: JsonNumber
    remaining_usd: JsonNumber
    reset_at: datetime | None

    @classmethod
    def all_of(cls, key: Row) -> "list[LimitView]":
        """The shortest first; none for a key without a limit."""
        return [
            cls(usd(limit), PERIOD_WORDS[period], usd(spent), usd(max(0, limit - spent)), reset_at)  # type: ignore[arg-type]
            for period, limit, spent, reset_at in windows_of(key)
        ]


def windows_of(key: Row) -> list[tuple[str | None, int, int, datetime | None]]:
    """Each window's period, limit and spending in nano-USD, and when it begins anew; the shortest first."""
    if key["limit_nusd"] is None:
        return []
    first = key["reset_period"], key["limit_nusd"], key["window_usage_nusd"], key["reset_at"]
    names = ("more_periods", "more_limits_nusd", "more_usage_nusd", "more_reset_at")
    return [first, *zip(*(key[name] or () for name in names), strict=True)]


class KeyView(msgspec.Struct, frozen=True, rename={"id": "_id"}):
    """A key as its owner sees it; `api_key` is only there when it may be shown. What the keys below it spend counts as its own.

    `parent_id` is the key it stands under, `depth` how many stand above it. `api_key` is null, and `api_key_reason` is `unreadable`, where it was kept and cannot be opened any more: the operator lost
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
    limits: list[LimitView]
    parent_id: UUID | None
    depth: int
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
                "parent_id",
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
            total_usage_all_time_usd=usd(key["total_nusd"]),
            reset_period=_WORDS.get(key["reset_period"]),  # type: ignore[arg-type]
            reset_at=key["reset_at"],
            limits=LimitView.all_of(key),
            depth=len(key["ancestor_ids"] or ()),
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
    """Manage the account's API keys: all of them with `x-credit-id`, those below it with a key of scope `keys`."""

    path = "/keys"
    tags = ("API keys",)

    @get("/", summary="List keys")
    async def list(
        self,
        manager: NamedDependency[Caller],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        include_disabled: FromQuery[bool] = False,
        show_key: FromQuery[bool] = False,
        limit: FromQuery[int] = MAX_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> KeysAnswer:
        """The account's keys, oldest first, or those below the calling one; `include_disabled=true` shows revoked ones too. Each
        comes after its parent, which `parent_id` names.

        Clients that know no pages get the largest one: up to 100 keys, and `next_cursor` if there are more.
        """
        size, after = page_size(limit), from_cursor(cursor, tuple[UUID])
        found = await db.transaction(
            lambda session: list_keys(
                session,
                manager.account_id,
                size + 1,
                after[0] if after else None,
                include_disabled=include_disabled,
                under=manager.key_id,
            )
        )
        await _note_shown(db, keyring, manager, found[:size], show_key)
        return KeysAnswer(
            [KeyView.of(key, _shown(keyring, manager, key, show_key)) for key in found[:size]],
            to_cursor(found[size - 1]["id"]) if len(found) > size else None,
        )

    @post("/", summary="Create a key")
    async def create(
        self,
        manager: NamedDependency[Caller],
        keyring: NamedDependency[Keyring],
        once: NamedDependency[Once],
        data: JSONBody[KeyRequest],
    ) -> KeyAnswer:
        """The full key is in this answer; keep it. An account may have 1,000 live ones, unless the operator says otherwise.
        Made with a key of scope `keys`, it stands below that one (5 deep at most), may not be given more than it has, and what it
        spends counts to it and all above."""
        new = new_key(data, manager.key_id)

        async def effect(session: Any) -> KeyAnswer:
            await hold_still(session, manager)
            return KeyAnswer(KeyView.of(*await issue(session, keyring, manager.account_id, new)))

        return await once.do(KeyAnswer, effect)

    @get("/{key_id:str}", summary="Show a key")
    async def show(
        self,
        manager: NamedDependency[Caller],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        key_id: FromPath[str],
        show_key: FromQuery[bool] = False,
    ) -> KeyAnswer:
        """One key; with `show_key=true` its secret too, if the operator allows it."""
        found = await db.transaction(lambda session: read(session, manager.account_id, _key_id(key_id), manager.key_id))
        await _note_shown(db, keyring, manager, [found], show_key)
        return KeyAnswer(KeyView.of(found, _shown(keyring, manager, found, show_key)))

    @patch("/{key_id:str}", summary="Change a key")
    async def change(
        self,
        manager: NamedDependency[Caller],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        key_id: FromPath[str],
        data: JSONBody[KeyRequest],
    ) -> KeyAnswer:
        """Only the fields sent change; null clears one. A window of a period that the key had none of starts at 0."""
        changes = wanted_changes(data)
        found = await db.transaction(
            lambda session: change(session, keyring, manager.account_id, _key_id(key_id), changes, manager.key_id)
        )
        return KeyAnswer(KeyView.of(found))

    @delete("/{key_id:str}", status_code=200, summary="Revoke a key")
    async def revoke(
        self,
        manager: NamedDependency[Caller],
        db: NamedDependency[Database],
        keyring: NamedDependency[Keyring],
        key_id: FromPath[str],
    ) -> Revoked:
        """The key, and all below it, stop working before this is answered; it cannot be undone."""
        where = manager.account_id, _key_id(key_id), manager.key_id
        await db.transaction(lambda session: revoke(session, keyring, *where))
        return Revoked()


def _key_id(text: str) -> UUID:
    found = uuid_in(text)
    if found is None:
        raise KeyNotFound
    return found


async def _note_shown(db: Database, keyring: Keyring, manager: Caller, keys: Sequence[Row], wanted: bool) -> None:
    """Before a kept secret is shown again, its owner's log tells of it. Raises MissingScope for a credit id that ends."""
    if not wanted or not keyring.reveal or not any(key["sealed_secret"] for key in keys):
        return
    refuse_ending(manager)
    subject = str(keys[0]["id"]) if len(keys) == 1 else f"{len(keys)} keys"
    await db.transaction(
        lambda session: keyring.note(session, manager.account_id, "key_revealed", manager.kind.value, subject)
    )


def _shown(keyring: Keyring, manager: Caller, key: Row, wanted: bool) -> str | None | msgspec.UnsetType:
    """The secret; None where what was kept of it does not open, absent where nothing was kept or asked for."""
    if not wanted:
        return msgspec.UNSET
    try:
        return keyring.open(key["sealed_secret"], manager.account_id, key["id"]) or msgspec.UNSET
    except UnsealError:
        log.error("key.secret_unreadable", account_id=str(manager.account_id), key_id=str(key["id"]))
        return None


def new_key(data: KeyRequest, parent_id: UUID | None = None) -> NewKey:
    """Raises InvalidField, also where the name is missing."""
    wanted = wanted_changes(data)
    if "name" not in wanted:
        raise InvalidField("name is required", param="name")
    if wanted.get("reset_period") is not None and wanted.get("limit_nusd") is None:
        raise InvalidField("reset_period needs usage_limit_usd", param="reset_period")
    return NewKey(**wanted, parent_id=parent_id)


def wanted_changes(data: KeyRequest) -> dict[str, Any]:
    """The fields that were sent, checked, under the names the verbs know. Raises InvalidField."""
    changes: dict[str, Any] = {}
    if data.name is not msgspec.UNSET:
        changes["name"] = clean_name(data.name)
    if bytes(data.usage_limit_usd):
        given = is_given(data.usage_limit_usd)
        changes["limit_nusd"] = _limit(data.usage_limit_usd, "usage_limit_usd") if given else None
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
    is_short = any(changes.get(name) is not None for name in ("limit_nusd", "reset_period"))
    if data.limits is not msgspec.UNSET and not (data.limits is None and is_short):
        changes["windows"] = _windows(data.limits or (), changes)
    return changes


def _windows(limits: Sequence[LimitRequest], short: dict[str, Any]) -> list[Window]:
    """Raises InvalidField, also where the short form was sent too and says something else. A null there says nothing beside them,
    and nor does a null in their place beside it: there are clients that send every field."""
    windows = sorted(Window(_LIMIT_PERIODS[each.period], _limit(each.usd, "limits")) for each in limits)
    periods = [each.period for each in windows]
    twice = next((period for period in periods if periods.count(period) > 1), "")
    if twice != "":
        raise InvalidField(f"limits has two windows of {PERIOD_WORDS[twice]!r}; each may be named once", param="limits")
    first = {
        "limit_nusd": windows[0].limit_nusd if windows else None,
        "reset_period": windows[0].period if windows else None,
    }
    for name, param in (("limit_nusd", "usage_limit_usd"), ("reset_period", "reset_period")):
        if short.pop(name, None) not in (None, first[name]):
            raise InvalidField(f"{param} and limits say different things; send one of them", param=param)
    return windows


def _limit_of_a_call(raw: JsonNumber) -> int | None:
    if not is_given(raw):
        return None
    limit = parse_usd(raw, "max_usd_per_call")
    if limit == 0:
        raise InvalidField("max_usd_per_call must be more than 0, or null for no limit", param="max_usd_per_call")
    return limit


def _limit(raw: JsonNumber, param: str) -> int:
    limit = parse_usd(raw, param)
    if limit < MIN_LIMIT_NUSD:
        raise InvalidField(f"{param} must be at least 0.01, or null for no limit", param=param)
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
