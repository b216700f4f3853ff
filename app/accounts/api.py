"""How HTTP asks for accounts: open one, and ask for its balance in three ways."""

from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from litestar import Request, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import open_account
from app.accounts.runway import Runway, read_runway
from app.kernel.db import Database
from app.kernel.errors import InvalidCreditId, MalformedHeader, NotFound
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber, number, usd, usd_or_null
from app.kernel.ratelimit import count_or_refuse, shares_of
from app.kernel.security import Caller
from app.kernel.settings import Settings
from app.keys.issue import Keyring
from app.keys.verify import Shown, Verifier, authenticate, require_scope
from app.ledger.statement import Balance, balance

_NULL: Final = msgspec.Raw(b"null")


class NewAccount(msgspec.Struct, frozen=True):
    """Both secrets of a new account. The credit id is never shown again: keep it."""

    success: bool
    credit_id: str
    api_key: str
    balance: JsonNumber


class BalanceRequest(msgspec.Struct, frozen=True):
    credit_id: str | None = None


class CheckRequest(msgspec.Struct, frozen=True):
    credit_id: str


class CheckedAccount(msgspec.Struct, frozen=True):
    """An account that exists. Nothing was made."""

    credit_id: str
    success: bool = True
    created: bool = False


class BalanceView(msgspec.Struct, frozen=True):
    """USD: what is on the account, what calls in flight hold of it, and what may be spent now; and how long it lasts."""

    balance: JsonNumber
    held: JsonNumber
    available: JsonNumber
    currency: str
    burn_usd_per_day: JsonNumber
    runway_days: JsonNumber
    low: bool | None

    @classmethod
    def of(cls, found: Balance, lasts: Runway) -> "BalanceView":
        tenths = lasts.tenths_of_days
        return cls(
            usd(found.posted_nusd), usd(found.held_nusd), usd(found.available_nusd), "USD",
            usd_or_null(lasts.burn_nusd_per_day), _NULL if tenths is None else number(tenths, 1), lasts.is_low,
        )  # fmt: skip


@post("/accounts/create", tags=["Accounts"], summary="Open an account")
async def create_account(
    request: Request[Any, Any, Any],
    db: NamedDependency[Database],
    settings: NamedDependency[Settings],
    keyring: NamedDependency[Keyring],
    once: NamedDependency[Once],
) -> NewAccount:
    """No e-mail, no password, no body. Limited per address block and per hour."""
    _refuse_guessable(request.headers.get("idempotency-key"))
    address = request.client.host if request.client else "unknown"

    async def admit() -> None:
        in_all = settings.accounts_per_hour
        for block, share in shares_of(address, settings.accounts_per_hour_per_block, in_all):
            await count_or_refuse(db, f"account/{block}", share, policy="accounts")
        await count_or_refuse(db, "account", in_all, policy="accounts-in-all", is_told=False)

    async def effect(session: Any) -> NewAccount:
        opened = await open_account(session, keyring)
        return NewAccount(True, opened.credit_id, opened.api_key, usd(0))

    return await once.do(NewAccount, effect, admit=admit)


def _refuse_guessable(key: str | None) -> None:
    """Nobody is logged in here: the key alone tells two strangers apart, so it must not be guessable."""
    if key is not None and len(key.strip('"')) < 16:
        raise MalformedHeader(
            "Idempotency-Key needs at least 16 characters on this route (a UUID will do): whoever repeats it gets the"
            " account's secrets again",
            param="Idempotency-Key",
        )


@post("/credits/balance", status_code=200, tags=["Accounts"], summary="Ask for the balance")
async def ask_balance(
    request: Request[Any, Any, Any],
    anybody: NamedDependency[Caller | None],
    db: NamedDependency[Database],
    verifier: NamedDependency[Verifier],
    data: JSONBody[BalanceRequest | None] = None,
) -> BalanceView:
    """With `credit_id` in the body, `x-credit-id`, or any API-key header."""
    if anybody is None or (data is not None and data.credit_id is not None):
        told = data.credit_id if data is not None else None
        return await _balance(db, await authenticate(verifier, Shown.of(request.headers.multi_items(), told)))
    return await _balance(db, anybody)


@get("/credits/balance", tags=["Accounts"], summary="Read the balance")
async def read_balance(caller: NamedDependency[Caller], db: NamedDependency[Database]) -> BalanceView:
    """With `x-credit-id` or any API-key header."""
    return await _balance(db, caller)


@post("/credits/check-or-create", status_code=200, tags=["Accounts"], summary="Is there an account of this credit id?")
async def check_account(verifier: NamedDependency[Verifier], data: JSONBody[CheckRequest]) -> CheckedAccount:
    """For clients that make a credit id themselves and ask for its account. Here a credit id is a secret that we make, so
    one that is not ours is never made one: it is 404, and `POST /accounts/create` opens an account."""
    try:
        await verifier.credit_id(data.credit_id)
    except InvalidCreditId:
        raise NotFound(
            "No account has this credit id, and none is opened for it: a credit id is a secret that we make."
            " POST /accounts/create, with no body, opens an account and answers its credit_id and api_key",
            param="credit_id",
        ) from None
    return CheckedAccount(data.credit_id.lower())


async def _balance(db: Database, caller: Caller) -> BalanceView:
    require_scope(caller, "balance")

    async def work(session: AsyncSession) -> BalanceView:
        found = await balance(session, caller.account_id)
        return BalanceView.of(found, await read_runway(session, caller.account_id, found, datetime.now(UTC)))

    return await db.transaction(work)
