"""How operators ask about accounts: find, show, freeze, close, give another credit id, credit and debit."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Controller, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin import accounts
from app.admin.accounts import Adjusted, Shown
from app.admin.api.asked import Because, Reason, account_in, reason_of
from app.admin.api.topups import ReviewedTopup
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber, parse_usd, usd
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.security import Admin
from app.kernel.settings import Settings
from app.keys.api import KeyView
from app.keys.issue import Keyring
from app.ledger.tables import AccountStatus

SearchText = Annotated[str, msgspec.Meta(min_length=1, max_length=2000, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
Status = Literal["active", "frozen", "closed"]


class AccountView(msgspec.Struct, frozen=True):
    """An account's figures, USD. `matched` is what a search found it by."""

    account_id: UUID
    status: str
    balance_usd: JsonNumber
    held_usd: JsonNumber
    available_usd: JsonNumber
    floor_usd: JsonNumber
    keys: int
    created_at: datetime
    matched: list[str] | None = None

    @classmethod
    def of(cls, account: Row) -> "AccountView":
        return cls(account["id"], account["status"], **_figures(account), keys=account["keys"],
                   created_at=account["created_at"], matched=account.get("matched"))  # fmt: skip


def _figures(account: Row) -> dict[str, JsonNumber]:
    posted, held, floor = account["posted_nusd"], account["held_nusd"], account["floor_nusd"]
    return {
        "balance_usd": usd(posted), "held_usd": usd(held), "floor_usd": usd(floor),
        "available_usd": usd(max(0, posted - held - floor)),
    }  # fmt: skip


class AccountsPage(msgspec.Struct, frozen=True):
    data: list[AccountView]
    next_cursor: str | None


class HoldView(msgspec.Struct, frozen=True):
    """What is set aside for a call in flight, USD."""

    id: UUID
    key_id: UUID
    service: str
    request_id: str
    model: str | None
    hold_usd: JsonNumber
    captured_usd: JsonNumber
    created_at: datetime
    expires_at: datetime


class EntryView(msgspec.Struct, frozen=True):
    """One movement on the account, USD; `contra` is the house account it came from or went to."""

    id: int
    kind: str
    reference: str
    contra: str
    amount_usd: JsonNumber
    balance_after_usd: JsonNumber
    created_at: datetime


class WholeAccount(msgspec.Struct, frozen=True):
    """An account with the newest of its keys, top-ups and entries, and its open holds; 20 of each at most."""

    account: AccountView
    keys: list[KeyView]
    topups: list[ReviewedTopup]
    holds: list[HoldView]
    entries: list[EntryView]

    @classmethod
    def of(cls, shown: Shown) -> "WholeAccount":
        return cls(
            AccountView.of(shown.account),
            [KeyView.of(key) for key in shown.keys],
            [ReviewedTopup.of(topup) for topup in shown.topups],
            [_hold(hold) for hold in shown.holds],
            [_entry(entry) for entry in shown.entries],
        )


def _hold(hold: Row) -> HoldView:
    same = {name: hold[name] for name in ("id", "key_id", "service", "request_id", "model", "created_at", "expires_at")}
    return HoldView(**same, hold_usd=usd(hold["amount_nusd"]), captured_usd=usd(hold["captured_nusd"]))


def _entry(entry: Row) -> EntryView:
    same = {name: entry[name] for name in ("id", "kind", "reference", "contra", "created_at")}
    amount, after = usd(entry["amount_nusd"]), usd(entry["balance_after_nusd"])
    return EntryView(**same, amount_usd=amount, balance_after_usd=after)


class OpenedView(msgspec.Struct, frozen=True):
    """A new account and both its secrets. They are shown now alone."""

    account_id: UUID
    credit_id: str
    api_key: str
    balance_usd: JsonNumber


class Rotated(msgspec.Struct, frozen=True):
    """The account's new credit id. The old one is refused; this one is shown now alone."""

    account_id: UUID
    credit_id: str


class SearchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    q: SearchText


class Adjustment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much and why. With `dry_run` it is said what would happen, and nothing does."""

    amount_usd: JsonNumber
    reason: Reason
    dry_run: bool = False


class Debit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much and why. With `below_floor` it takes what is held or is not there too."""

    amount_usd: JsonNumber
    reason: Reason
    dry_run: bool = False
    below_floor: bool = False


class AdjustedView(msgspec.Struct, frozen=True):
    """What an adjustment did, USD; with `dry_run` what it would do. `reference` is its entry's and names the act in the log."""

    account_id: UUID
    amount_usd: JsonNumber
    balance_before_usd: JsonNumber
    balance_usd: JsonNumber
    available_usd: JsonNumber
    dry_run: bool
    reference: str | None

    @classmethod
    def of(cls, adjusted: Adjusted) -> "AdjustedView":
        return cls(
            adjusted.account_id, usd(adjusted.amount_nusd), usd(adjusted.before_nusd), usd(adjusted.after_nusd),
            usd(adjusted.available_nusd), adjusted.reference is None, adjusted.reference,
        )  # fmt: skip


class AdminAccountsController(Controller):
    """Accounts, as operators see them. Needs an admin token."""

    path = "/admin/accounts"
    tags = ("Admin",)

    @get("/", summary="List or search accounts")
    async def list(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        settings: NamedDependency[Settings],
        q: FromQuery[str | None] = None,
        status: FromQuery[Status | None] = None,
        limit: FromQuery[int] = DEFAULT_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> AccountsPage:
        """Newest first; `q` finds whose something is. A secret is better looked for with POST /admin/accounts/search."""
        size, after = page_size(limit), from_cursor(cursor, tuple[UUID])
        if q is not None:
            return await self._search(db, settings, q, status, size, after[0] if after else None)
        wanted = None if status is None else AccountStatus(status)
        found = await db.transaction(
            lambda session: accounts.list_accounts(session, size + 1, after[0] if after else None, wanted)
        )
        return _page(found, size)

    @post("/search", status_code=200, summary="Whose is this?")
    async def search(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        data: JSONBody[SearchRequest],
    ) -> AccountsPage:
        """By account id, credit id, API key, its masked form, SHA-256 or id, by a top-up's id, invoice or address, by a
        payment's hash or transaction, by the subject of a JWT: what stands in a body is in no log of addresses."""

        async def effect(session: AsyncSession) -> AccountsPage:
            found = await accounts.search(session, settings.pepper, data.q, settings.jwt_issuer)
            return _page(found[:100], 100)

        return await once.do(AccountsPage, effect)

    @post("/", summary="Open an account")
    async def create(
        self,
        admin: NamedDependency[Admin],
        keyring: NamedDependency[Keyring],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
    ) -> OpenedView:
        """For a customer, to whom both secrets are to be given."""

        async def effect(session: AsyncSession) -> OpenedView:
            opened = await accounts.open_by(session, keyring, settings.pepper, admin)
            return OpenedView(opened.account_id, opened.credit_id, opened.api_key, usd(0))

        return await once.do(OpenedView, effect)

    @get("/{account_id:str}", summary="Show an account")
    async def show(
        self, admin: NamedDependency[Admin], db: NamedDependency[Database], account_id: FromPath[str]
    ) -> WholeAccount:
        """Its balance, and the newest of what belongs to it."""
        found = await db.transaction(lambda session: accounts.show(session, account_in(account_id)))
        return WholeAccount.of(found)

    @post("/{account_id:str}/freeze", status_code=200, summary="Freeze an account")
    async def freeze(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        data: JSONBody[Because | None] = None,
    ) -> AccountView:
        """No call of it is allowed any more; what is in flight settles, and what is paid is credited."""

        async def effect(session: AsyncSession) -> AccountView:
            told = account_in(account_id), reason_of(data)
            return AccountView.of(await accounts.freeze(session, settings.pepper, admin, *told))

        return await once.do(AccountView, effect)

    @post("/{account_id:str}/unfreeze", status_code=200, summary="Let a frozen account call again")
    async def unfreeze(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        data: JSONBody[Because | None] = None,
    ) -> AccountView:
        """Not one that is closed."""

        async def effect(session: AsyncSession) -> AccountView:
            told = account_in(account_id), reason_of(data)
            return AccountView.of(await accounts.unfreeze(session, settings.pepper, admin, *told))

        return await once.do(AccountView, effect)

    @post("/{account_id:str}/close", status_code=200, summary="Close an account")
    async def close(
        self,
        admin: NamedDependency[Admin],
        keyring: NamedDependency[Keyring],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        data: JSONBody[Because | None] = None,
    ) -> AccountView:
        """One with nothing on it, for ever: its credit id and keys are refused from then on. Its books stay."""

        async def effect(session: AsyncSession) -> AccountView:
            told = account_in(account_id), reason_of(data)
            return AccountView.of(await accounts.close(session, keyring, settings.pepper, admin, *told))

        return await once.do(AccountView, effect)

    @post("/{account_id:str}/rotate", status_code=200, summary="Give an account another credit id")
    async def rotate(
        self,
        admin: NamedDependency[Admin],
        keyring: NamedDependency[Keyring],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        data: JSONBody[Because | None] = None,
    ) -> Rotated:
        """For one that leaked. The old one is refused before this is answered; keys work as before."""

        async def effect(session: AsyncSession) -> Rotated:
            told = account_in(account_id), reason_of(data)
            return Rotated(told[0], await accounts.rotate(session, keyring, settings.pepper, admin, *told))

        return await once.do(Rotated, effect)

    @post("/{account_id:str}/credit", status_code=200, summary="Credit an account")
    async def credit(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        data: JSONBody[Adjustment],
    ) -> AdjustedView:
        """An ordinary entry, `adjustment`, whose reference names the act in the log. Nothing sets a balance."""
        amount_nusd = parse_usd(data.amount_usd, "amount_usd")

        async def effect(session: AsyncSession) -> AdjustedView:
            told = account_in(account_id), amount_nusd, data.reason
            return AdjustedView.of(await accounts.adjust(session, settings.pepper, admin, *told, dry_run=data.dry_run))

        return await once.do(AdjustedView, effect)

    @post("/{account_id:str}/debit", status_code=200, summary="Debit an account")
    async def debit(
        self,
        admin: NamedDependency[Admin],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        account_id: FromPath[str],
        data: JSONBody[Debit],
    ) -> AdjustedView:
        """The same the other way. It leaves what is held and the floor alone, unless `below_floor` is true."""
        amount_nusd = parse_usd(data.amount_usd, "amount_usd")

        async def effect(session: AsyncSession) -> AdjustedView:
            told = account_in(account_id), -amount_nusd, data.reason
            how: dict[str, Any] = {"dry_run": data.dry_run, "below_floor": data.below_floor}
            return AdjustedView.of(await accounts.adjust(session, settings.pepper, admin, *told, **how))

        return await once.do(AdjustedView, effect)

    async def _search(
        self, db: Database, settings: Settings, q: str, status: Status | None, size: int, before_id: UUID | None
    ) -> AccountsPage:
        if not q.isprintable() or not q.strip() or len(q) > 2000:
            raise InvalidField("q is what to look for, a line of at most 2,000 characters", param="q")
        found = await db.transaction(lambda session: accounts.search(session, settings.pepper, q, settings.jwt_issuer))
        wanted = [
            each for each in found
            if (status is None or each["status"] == status) and (before_id is None or each["id"] < before_id)
        ]  # fmt: skip
        return _page(wanted, size)


def _page(found: list[Row], size: int) -> AccountsPage:
    ended = to_cursor(found[size - 1]["id"]) if len(found) > size else None
    return AccountsPage([AccountView.of(account) for account in found[:size]], ended)
