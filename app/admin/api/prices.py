"""How operators ask about prices: versions, what one changes, which is active, and the rules on top."""

import asyncio
from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
from litestar import Controller, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin.prices import noting
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField, NotFound
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber, parse_usd, usd_text
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.reading import read, uuid_in
from app.kernel.security import Admin
from app.kernel.settings import Settings
from app.pricing import commands
from app.pricing.catalogue import MAX_DROP_PERCENT, MAX_LEAP_PERCENT, version_of, versions
from app.pricing.drafts import Draft
from app.pricing.importer import read_prices
from app.pricing.rows import Dimension

MAX_FILE_BYTES: Final = 8 * 1024 * 1024
"""A price file; LiteLLM's has one and a half."""
PriceFile = Annotated[msgspec.Raw, msgspec.Meta(extra={"holds": dict[str, Any] | list[Any]})]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Percent = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class VersionView(msgspec.Struct, frozen=True):
    """A version of the price catalogue: how many prices and models it has, and whether it is sold by."""

    id: int
    source: str
    source_hash: str
    note: str
    state: str
    prices: int
    models: int
    created_at: datetime
    activated_at: datetime | None

    @classmethod
    def of(cls, version: Row) -> "VersionView":
        return cls(**{name: version[name] for name in cls.__struct_fields__})


class VersionsPage(msgspec.Struct, frozen=True):
    data: list[VersionView]
    next_cursor: str | None


class ChangeView(msgspec.Struct, frozen=True):
    """A price that is new (`old_usd` is null), gone (`new_usd` is) or other than before, USD per unit."""

    model: str
    provider: str
    dimension: str
    min_input_tokens: int
    attributes: str
    old_usd: JsonNumber
    new_usd: JsonNumber
    percent: str

    @classmethod
    def of(cls, change: dict[str, Any]) -> "ChangeView":
        same = {name: change[name] for name in cls.__struct_fields__ if name not in ("old_usd", "new_usd")}
        return cls(**same, old_usd=_number(change["old_usd"]), new_usd=_number(change["new_usd"]))


class DiffView(msgspec.Struct, frozen=True):
    """What is sold otherwise by one version than by another."""

    added: list[ChangeView]
    removed: list[ChangeView]
    changed: list[ChangeView]

    @classmethod
    def of(cls, diff: dict[str, Any]) -> "DiffView":
        return cls(**{name: [ChangeView.of(each) for each in diff[name]] for name in cls.__struct_fields__})


class VersionDiff(msgspec.Struct, frozen=True):
    """What activating `version` would change of what is sold by `against`."""

    version: int
    against: int | None
    diff: DiffView


class ImportedView(msgspec.Struct, frozen=True):
    """What a price file became; with `dry_run` (then there is no `version`) what it would become."""

    version: int | None
    format: str
    source_hash: str
    prices: int
    models: int
    rounded_up: list[str]
    doubled: list[str]
    left_out: dict[str, str]
    diff: DiffView

    @classmethod
    def of(cls, data: dict[str, Any]) -> "ImportedView":
        same = {name: data[name] for name in cls.__struct_fields__ if name not in ("version", "diff")}
        return cls(version=data.get("version"), diff=DiffView.of(data["diff"]), **same)


class Activation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much a price may fall or rise; more is refused unless it is allowed."""

    max_drop_percent: Percent = MAX_DROP_PERCENT
    allow_drops: bool = False
    max_leap_percent: Percent = MAX_LEAP_PERCENT
    allow_leaps: bool = False


class ActivatedView(msgspec.Struct, frozen=True):
    """The version that new calls are priced by from `since` on."""

    active: int
    before: int | None
    since: datetime
    diff: DiffView


class OverrideRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """This price for `per_units` units, whatever is imported."""

    model: Name
    dimension: Dimension
    price_usd: JsonNumber
    per_units: Annotated[int, msgspec.Meta(ge=1, le=10**12)] = 1
    provider: Annotated[str, msgspec.Meta(max_length=200)] = ""
    min_input_tokens: Annotated[int, msgspec.Meta(ge=0, le=10**12)] = 0
    attributes: Annotated[str, msgspec.Meta(max_length=500)] = ""
    effective_from: Moment | None = None


class MarkupRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """This factor on prices, and this on each call: of all calls, or of a provider, a model or an account."""

    scope: Literal["default", "provider", "model", "account"]
    subject: Annotated[str, msgspec.Meta(max_length=200)] = ""
    factor: JsonNumber = msgspec.Raw(b"1")
    per_request_usd: JsonNumber = msgspec.Raw(b"0")
    effective_from: Moment | None = None


class FeeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What each call is asked that uses a feature."""

    feature: Name
    price_usd: JsonNumber
    effective_from: Moment | None = None


class RuleView(msgspec.Struct, frozen=True):
    """An override, a markup or a fee; what the others have is null."""

    id: UUID
    kind: Literal["override", "markup", "fee"]
    effective_from: datetime
    effective_to: datetime | None
    model: str | None = None
    provider: str | None = None
    dimension: str | None = None
    min_input_tokens: int | None = None
    attributes: str | None = None
    price_usd: JsonNumber = msgspec.Raw(b"null")
    scope: str | None = None
    subject: str | None = None
    factor: JsonNumber = msgspec.Raw(b"null")
    per_request_usd: JsonNumber = msgspec.Raw(b"null")
    feature: str | None = None

    @classmethod
    def of(cls, rule: dict[str, Any]) -> "RuleView":
        read: dict[str, Any] = {
            "id": UUID(rule["id"]), "effective_from": datetime.fromisoformat(rule["effective_from"]),
            "effective_to": rule["effective_to"] and datetime.fromisoformat(rule["effective_to"]),
        }  # fmt: skip
        numbers: dict[str, Any] = {
            name: _number(rule[name]) for name in ("price_usd", "factor", "per_request_usd") if name in rule
        }
        return cls(**{**rule, **read, **numbers})


class RulesView(msgspec.Struct, frozen=True):
    data: list[RuleView]


class Ended(msgspec.Struct, frozen=True):
    """A rule that ends in a few seconds; calls that began under it keep it."""

    ended: UUID


async def put(session: AsyncSession, wish: OverrideRequest | MarkupRequest | FeeRequest) -> commands.Answer:
    """A rule as it was asked for, here or by a form. Raises InvalidField."""
    match wish:
        case OverrideRequest():
            return await commands.override_price(
                session, wish.model, wish.dimension.value, _usd(wish.price_usd, "price_usd"), per=wish.per_units, provider=wish.provider,
                from_tokens=wish.min_input_tokens, attributes=wish.attributes, since=wish.effective_from,
            )  # fmt: skip
        case MarkupRequest():
            return await commands.put_markup(
                session, wish.scope, wish.subject, factor=_usd(wish.factor, "factor"),
                per_request_usd=_usd(wish.per_request_usd, "per_request_usd"), since=wish.effective_from,
            )  # fmt: skip
        case FeeRequest():
            return await commands.ask_fee(session, wish.feature, _usd(wish.price_usd, "price_usd"), wish.effective_from)


class AdminPricesController(Controller):
    """The price catalogue, and what stands on top of it. Needs an admin token."""

    path = "/admin/prices"
    tags = ("Admin",)

    @get("/", summary="List price versions")
    async def list(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        limit: FromQuery[int] = DEFAULT_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> VersionsPage:
        """Newest first."""
        size, after = page_size(limit), from_cursor(cursor, tuple[int])
        every = await db.transaction(versions)
        found = [each for each in every if after is None or each["id"] < after[0]]
        ended = to_cursor(found[size - 1]["id"]) if len(found) > size else None
        return VersionsPage([VersionView.of(version) for version in found[:size]], ended)

    @post("/import", request_max_body_size=MAX_FILE_BYTES, summary="Import a price file")
    async def import_file(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        data: JSONBody[PriceFile],
        name: FromQuery[str] = "over HTTP",
        dry_run: FromQuery[bool] = False,
    ) -> ImportedView:
        """LiteLLM's, genai-prices' or our own, as the body. It becomes a draft; nothing is sold by it until it is activated."""
        if not name.isprintable() or len(name) > 200:
            raise InvalidField("name is a line of at most 200 characters", param="name")
        draft = await asyncio.to_thread(_draft, data)

        async def effect(session: AsyncSession) -> ImportedView:
            if dry_run:
                return ImportedView.of((await commands.check(session, draft)).data)
            made = await commands.import_prices(session, draft, name)
            await noting(settings.pepper, admin)(session, "import", made.data)
            return ImportedView.of(made.data)

        return await once.do(ImportedView, effect)

    @get("/{version:str}/diff", summary="What a version changes")
    async def diff(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        version: FromPath[str],
        against: FromQuery[int | None] = None,
    ) -> VersionDiff:
        """Against the active version, or another."""

        async def work(session: AsyncSession) -> VersionDiff:
            found = (await commands.show_diff(session, await _version(session, version), against)).data
            return VersionDiff(found["version"], found["against"], DiffView.of(found))

        return await db.transaction(work)

    @post("/{version:str}/activate", status_code=200, summary="Sell by a version")
    async def activate(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        version: FromPath[str],
        data: JSONBody[Activation | None] = None,
    ) -> ActivatedView:
        """In a few seconds, when every process knows it. What falls or rises by much is refused unless it is allowed."""
        how = data or Activation()

        async def effect(session: AsyncSession) -> ActivatedView:
            made = await commands.make_active(session, await _version(session, version), **msgspec.structs.asdict(how))
            await noting(settings.pepper, admin)(session, "activate", made.data)
            since = datetime.fromisoformat(made.data["since"])
            return ActivatedView(made.data["active"], made.data["before"], since, DiffView.of(made.data))

        return await once.do(ActivatedView, effect)

    @get("/rules", summary="What stands on top of the catalogue")
    async def rules(self, admin: NamedDependency[Admin], db: NamedDependency[Database]) -> RulesView:
        """Overrides, markups and fees that hold now or will."""
        found = await db.transaction(commands.list_rules)
        return RulesView([RuleView.of(rule) for rule in found.data["rules"]])

    @post("/overrides", summary="Ask a price of your own")
    async def override(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        data: JSONBody[OverrideRequest],
    ) -> RuleView:
        """From a few seconds on, or from `effective_from`. It ends the one before it."""

        async def effect(session: AsyncSession) -> RuleView:
            made = await put(session, data)
            await noting(settings.pepper, admin)(session, "override", made.data)
            return RuleView.of(made.data)

        return await once.do(RuleView, effect)

    @post("/markups", summary="Put a factor on prices")
    async def markup(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        data: JSONBody[MarkupRequest],
    ) -> RuleView:
        """From a few seconds on, or from `effective_from`. It ends the one of this subject before it."""

        async def effect(session: AsyncSession) -> RuleView:
            made = await put(session, data)
            await noting(settings.pepper, admin)(session, "markup", made.data)
            return RuleView.of(made.data)

        return await once.do(RuleView, effect)

    @post("/fees", summary="Ask a fee for a feature")
    async def fee(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        data: JSONBody[FeeRequest],
    ) -> RuleView:
        """From a few seconds on, or from `effective_from`. It ends the fee of this feature before it."""

        async def effect(session: AsyncSession) -> RuleView:
            made = await put(session, data)
            await noting(settings.pepper, admin)(session, "fee", made.data)
            return RuleView.of(made.data)

        return await once.do(RuleView, effect)

    @delete("/rules/{rule_id:str}", status_code=200, summary="End an override, a markup or a fee")
    async def end(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        settings: NamedDependency[Settings],
        rule_id: FromPath[str],
    ) -> Ended:
        """In a few seconds. What calls have cost stays."""
        found = uuid_in(rule_id)
        if found is None:
            raise NotFound("No such rule")

        async def work(session: AsyncSession) -> Ended:
            try:
                made = await commands.end_rule(session, str(found))
            except InvalidField as error:
                raise NotFound(error.message) from None
            await noting(settings.pepper, admin)(session, "end", made.data)
            return Ended(found)

        return await db.transaction(work)


def _draft(file: msgspec.Raw) -> Draft:
    """Raises MalformedJson, and InvalidField for what is no price file."""
    read(file, dict[str, Any] | list[Any])  # strictly: what the importers read it with takes more
    return read_prices(bytes(file))


async def _version(session: AsyncSession, text: str) -> int:
    """Raises NotFound."""
    try:
        if not text.isascii() or not text.isdigit() or len(text) > 4:
            raise InvalidField
        return int((await version_of(session, int(text)))["id"])
    except InvalidField:
        raise NotFound("No such price version") from None


def _number(text: str | None) -> JsonNumber:
    return msgspec.Raw(b"null" if text is None else text.encode())


def _usd(raw: JsonNumber, param: str) -> str:
    """As text, for the verbs. Raises InvalidField."""
    return usd_text(parse_usd(raw, param))
