"""How HTTP asks for accounts: open one, and ask for its balance in three ways."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Protocol, runtime_checkable
from uuid import UUID

import msgspec
from litestar import Request, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts import recovery
from app.accounts.accounts import close, open_account, rotate_credit_id
from app.accounts.nostr import Nostr, Signed, is_of, take
from app.accounts.nostr import Request as Named
from app.accounts.recovery import first_code, no_way_back
from app.accounts.runway import Runway, read_runway
from app.kernel.db import Database
from app.kernel.errors import InvalidCreditId, InvalidField, MalformedHeader, NotFound
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber, number, usd, usd_or_null
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.ratelimit import count_or_refuse, shares_of
from app.kernel.security import Caller, Kind, canonical_recovery_code
from app.kernel.settings import Settings
from app.keys.issue import Keyring
from app.keys.verify import Shown, Verifier, authenticate, hold_still, refuse_ending, require_scope
from app.ledger.statement import Balance, balance

_NULL: Final = msgspec.Raw(b"null")


class NewAccount(msgspec.Struct, frozen=True):
    """The secrets of a new account. The credit id and the recovery code are never shown again: keep them, and not together."""

    success: bool
    credit_id: str
    api_key: str
    balance: JsonNumber
    recovery_code: str | msgspec.UnsetType = msgspec.UNSET


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


class NewAccountRequest(msgspec.Struct, frozen=True):
    """With an amount: an account that has it on it, for a Lightning payment. USD, SATS or BTC."""

    recovery: bool = False
    amount: JsonNumber = msgspec.Raw(b"")
    currency: Annotated[str, msgspec.Meta(min_length=1, max_length=10)] = "USD"


@runtime_checkable
class Buying(Protocol):
    """How an account is paid for before it is known."""

    async def buy(self, request: Request[Any, Any, Any], data: NewAccountRequest | None) -> NewAccount | None:
        """The account that a proof of payment opens; None where no amount and no proof is sent. Raises the 402 that tells how to
        pay, InvalidApiKey for what proves no payment for an account, and PaymentPending."""


@post("/accounts/create", tags=["Accounts"], summary="Open an account")
async def create_account(
    request: Request[Any, Any, Any],
    db: NamedDependency[Database],
    settings: NamedDependency[Settings],
    keyring: NamedDependency[Keyring],
    once: NamedDependency[Once],
    buying: NamedDependency[Buying],
    data: JSONBody[NewAccountRequest | None] = None,
) -> NewAccount:
    """No e-mail, no password, no body. Limited per address block and per hour.

    With `{"recovery": true}` a recovery code comes too, which gives another credit id when this one is lost or stolen
    (`POST /accounts/recover`). With `amount` and `currency` (USD, SATS, BTC) it is paid for first: 402 with a Lightning invoice in `WWW-Authenticate` (L402,
    Payment), and sent again with the proof in Authorization, the account with that on it. The same proof gets the same account for a day.
    """
    bought = await buying.buy(request, data)
    if bought is not None:
        return bought
    _refuse_guessable(request.headers.get("idempotency-key"))
    address = request.client.host if request.client else "unknown"

    async def admit() -> None:
        in_all = settings.accounts_per_hour
        for block, share in shares_of(address, settings.accounts_per_hour_per_block, in_all):
            await count_or_refuse(db, f"account/{block}", share, policy="accounts")
        await count_or_refuse(db, "account", in_all, policy="accounts-in-all", is_told=False)

    async def effect(session: Any) -> NewAccount:
        opened = await open_account(session, keyring)
        is_wanted = data is not None and data.recovery
        code = await first_code(session, keyring, opened.account_id) if is_wanted else msgspec.UNSET
        return NewAccount(True, opened.credit_id, opened.api_key, usd(0), code)

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


# --- another credit id ------------------------------------------------------------------------------


class RotateRequest(msgspec.Struct, frozen=True):
    overlap_seconds: Annotated[int, msgspec.Meta(ge=0, le=86_400)] = 0


class RotatedAccount(msgspec.Struct, frozen=True):
    """The new credit id, which is never shown again, and when the old one ends."""

    credit_id: str
    old_ends_at: datetime
    success: bool = True


class RecoverRequest(msgspec.Struct, frozen=True):
    """`revoke_keys`: every API key goes too, and a new one comes."""

    recovery_code: Annotated[str, msgspec.Meta(max_length=200)] | None = None
    revoke_keys: bool = False


class RecoveredAccount(msgspec.Struct, frozen=True):
    """The new secrets, which are never shown again; `api_key` where all keys were revoked."""

    credit_id: str
    recovery_code: str
    keys_revoked: int
    api_key: str | msgspec.UnsetType = msgspec.UNSET
    success: bool = True


@post("/accounts/rotate", status_code=200, tags=["Accounts"], summary="Another credit id")
async def rotate_account(
    request: Request[Any, Any, Any],
    rotating: NamedDependency[Caller],
    keyring: NamedDependency[Keyring],
    once: NamedDependency[Once],
    data: JSONBody[RotateRequest | None] = None,
) -> RotatedAccount:
    """The old credit id is refused from now on, or after `overlap_seconds` (a day at most), in which it reads and tops up and
    no more. API keys go on to work. With an `Idempotency-Key` the answer can be had again by the old credit id, should it be lost."""
    _refuse_guessable(request.headers.get("idempotency-key"))

    async def admit() -> None:
        if rotating.lasts == "over":
            raise InvalidCreditId
        refuse_ending(rotating)

    async def effect(session: AsyncSession) -> RotatedAccount:
        await hold_still(session, rotating)
        seconds = 0 if data is None else data.overlap_seconds
        made = await rotate_credit_id(
            session, keyring, rotating.account_id, Kind.CREDIT_ID.value, overlap_seconds=seconds
        )
        return RotatedAccount(made.credit_id, made.old_ends_at)

    return await once.do(RotatedAccount, effect, admit=admit)


@post("/accounts/recover", status_code=200, tags=["Accounts"], summary="Recover an account", proves_itself=True)
async def recover_account(
    request: Request[Any, Any, Any],
    db: NamedDependency[Database],
    settings: NamedDependency[Settings],
    keyring: NamedDependency[Keyring],
    verifier: NamedDependency[Verifier],
    nostr: NamedDependency[Nostr],
    once: NamedDependency[Once],
    data: JSONBody[RecoverRequest],
) -> RecoveredAccount:
    """Another credit id and recovery code, by the recovery code, or by a Nostr key that was bound before: then
    `Authorization: Nostr` has an event of NIP-98 that names this URL, POST and the body's SHA-256.

    Every credit id of before is dead at once, the code used up, and so is every code and Nostr key that came after the one shown.
    Limited per address block and per hour.
    """
    _refuse_guessable(request.headers.get("idempotency-key"))
    header = request.headers.get("authorization", "")
    if (data.recovery_code is None) == (not header):
        raise InvalidField(
            "Send recovery_code, or Authorization: Nostr with a signed event; one of them", param="recovery_code"
        )
    named = Named(f"{settings.public_url}/accounts/recover", "POST", await request.body())
    found: list[tuple[Caller, Signed | None]] = []

    async def admit() -> None:
        address = request.client.host if request.client else "unknown"
        for block, share in shares_of(address, settings.accounts_per_hour_per_block, settings.accounts_per_hour):
            await count_or_refuse(db, f"recover/{block}", share, policy="recoveries")
        if data.recovery_code is not None:
            event, way = (
                None,
                await verifier.recovering(Kind.RECOVERY_CODE, canonical_recovery_code(data.recovery_code)),
            )
        else:
            event = _signed(nostr, header, named)
            way = await verifier.recovering(Kind.NOSTR, event.pubkey if event else None)
        if way is None:
            raise no_way_back()
        found.append((way, event))

    async def effect(session: AsyncSession) -> RecoveredAccount:
        [(way, event)] = found
        if event is not None and not await take(session, way.account_id, event):
            raise no_way_back()
        made = await recovery.recover(session, keyring, way, revoke_keys=data.revoke_keys)
        return RecoveredAccount(made.credit_id, made.recovery_code, made.keys_revoked, made.api_key or msgspec.UNSET)

    return await once.do(RecoveredAccount, effect, admit=admit)


def _signed(nostr: Nostr, header: str, named: Named) -> Signed | None:
    """The event, None unless it was signed for this request."""
    event = nostr.signed(header)
    return event if event is not None and is_of(event, named, datetime.now(UTC)) else None


# --- ways back --------------------------------------------------------------------------------------


class WayBackView(msgspec.Struct, frozen=True):
    """A recovery code or a bound Nostr key. One with `ends_at` was replaced or taken away, and recovers until then."""

    kind: str
    npub: str | None
    ends_at: datetime | None


class WaysBack(msgspec.Struct, frozen=True):
    data: list[WayBackView]
    status: str = "success"


class CodeRequest(msgspec.Struct, frozen=True):
    """`recovery_code` is the one to be replaced: shown, it ends at once, else in 7 days."""

    recovery_code: Annotated[str, msgspec.Meta(max_length=200)] | None = None


class NewCode(msgspec.Struct, frozen=True):
    """The code is never shown again: keep it on paper, and not with the credit id."""

    recovery_code: str
    success: bool = True


class BoundKey(msgspec.Struct, frozen=True):
    npub: str
    success: bool = True


class Done(msgspec.Struct, frozen=True):
    message: str
    status: str = "success"


@get("/accounts/recovery", tags=["Accounts"], summary="How can the account be recovered?")
async def list_recovery(owner: NamedDependency[Caller], db: NamedDependency[Database]) -> WaysBack:
    """Those that last, and those that were replaced or taken away less than 7 days ago."""
    found = await db.transaction(lambda session: recovery.ways_back(session, owner.account_id))
    return WaysBack([WayBackView(each["kind"], each["label"], each["ends_at"]) for each in found])


@post("/accounts/recovery/code", tags=["Accounts"], summary="A recovery code")
async def create_recovery_code(
    owner: NamedDependency[Caller],
    keyring: NamedDependency[Keyring],
    verifier: NamedDependency[Verifier],
    once: NamedDependency[Once],
    data: JSONBody[CodeRequest | None] = None,
) -> NewCode:
    """The first one, or another. With the credit id alone the old code recovers for 7 days more, so that nobody who stole the
    credit id takes the account for good; whoever shows the old code ends it at once."""
    shown = None if data is None else data.recovery_code
    current: list[Caller | None] = []

    async def admit() -> None:
        code = None if shown is None else canonical_recovery_code(shown)
        current.append(None if shown is None else await verifier.recovering(Kind.RECOVERY_CODE, code))
        if shown is not None and current[0] is None:
            raise InvalidField("recovery_code is not this account's", param="recovery_code")

    async def effect(session: AsyncSession) -> NewCode:
        await hold_still(session, owner)
        return NewCode(await recovery.make_code(session, keyring, owner.account_id, current[0]))

    return await once.do(NewCode, effect, admit=admit)


@delete("/accounts/recovery/code", status_code=200, tags=["Accounts"], summary="Take the recovery code away")
async def remove_recovery_code(
    owner: NamedDependency[Caller], db: NamedDependency[Database], keyring: NamedDependency[Keyring]
) -> Done:
    """It recovers for 7 days more."""

    async def work(session: AsyncSession) -> None:
        await hold_still(session, owner)
        await recovery.remove_code(session, keyring, owner.account_id)

    await db.transaction(work)
    return Done(f"The recovery code ends in {recovery.GRACE_DAYS} days")


@post("/accounts/recovery/nostr", tags=["Accounts"], summary="Bind a Nostr key")
async def bind_nostr_key(
    request: Request[Any, Any, Any],
    owner: NamedDependency[Caller],
    settings: NamedDependency[Settings],
    keyring: NamedDependency[Keyring],
    nostr: NamedDependency[Nostr],
    once: NamedDependency[Once],
) -> BoundKey:
    """The account can be recovered by the key that signs this: `Authorization: Nostr` has an event of NIP-98 that names this URL
    and POST, `x-credit-id` says which account. The key bound before recovers for 7 days more."""
    event = _signed(nostr, request.headers.get("authorization", ""), await _named(request, settings))
    if event is None:
        raise InvalidField(_NOT_SIGNED, param="Authorization")

    async def effect(session: AsyncSession) -> BoundKey:
        await hold_still(session, owner)
        if not await take(session, owner.account_id, event):
            raise InvalidField(_NOT_SIGNED, param="Authorization")
        await recovery.bind(session, keyring, owner.account_id, event.pubkey, event.npub)
        return BoundKey(event.npub)

    return await once.do(BoundKey, effect)


@delete("/accounts/recovery/nostr", status_code=200, tags=["Accounts"], summary="Unbind the Nostr key")
async def unbind_nostr_key(
    request: Request[Any, Any, Any],
    owner: NamedDependency[Caller],
    db: NamedDependency[Database],
    settings: NamedDependency[Settings],
    keyring: NamedDependency[Keyring],
    nostr: NamedDependency[Nostr],
) -> Done:
    """It recovers for 7 days more, or no more if it signed this (`Authorization: Nostr`)."""
    header = request.headers.get("authorization", "")
    event = _signed(nostr, header, await _named(request, settings)) if header else None
    if header and event is None:
        raise InvalidField(_NOT_SIGNED, param="Authorization")

    async def work(session: AsyncSession) -> None:
        await hold_still(session, owner)
        if event is not None and not await take(session, owner.account_id, event):
            raise InvalidField(_NOT_SIGNED, param="Authorization")
        await recovery.unbind(session, keyring, owner.account_id, event.pubkey if event else None)

    await db.transaction(work)
    return Done("The Nostr key is unbound" if event else f"The Nostr key ends in {recovery.GRACE_DAYS} days")


_NOT_SIGNED: Final = (
    "Authorization: Nostr needs an event of kind 27235 (NIP-98), signed in the last minute and sent once, whose tags u, method and"
    " payload are this URL, this method and the body's SHA-256"
)


async def _named(request: Request[Any, Any, Any], settings: Settings) -> Named:
    return Named(f"{settings.public_url}{request.url.path}", request.method, await request.body())


# --- what was done, and the end ---------------------------------------------------------------------


class EventView(msgspec.Struct, frozen=True):
    """What was done with the account's credentials, and by what kind of them; `subject` is the key or npub it was done to."""

    id: UUID
    act: str
    shown_by: str
    subject: str | None
    created_at: datetime


class EventsPage(msgspec.Struct, frozen=True):
    data: list[EventView]
    next_cursor: str | None
    status: str = "success"


@get("/accounts/events", tags=["Accounts"], summary="What was done with the credentials")
async def list_events(
    owner: NamedDependency[Caller],
    db: NamedDependency[Database],
    limit: FromQuery[int] = DEFAULT_LIMIT,
    cursor: FromQuery[str | None] = None,
) -> EventsPage:
    """Newest first: rotated, recovered, recovery codes and Nostr keys that came and went, keys that were shown again."""
    size, after = page_size(limit), from_cursor(cursor, tuple[UUID])
    found = await db.transaction(
        lambda session: recovery.events(session, owner.account_id, size + 1, after[0] if after else None)
    )
    return EventsPage(
        [EventView(**each) for each in found[:size]], to_cursor(found[size - 1]["id"]) if len(found) > size else None
    )


@delete("/accounts", status_code=200, tags=["Accounts"], summary="Close the account")
async def close_account(
    owner: NamedDependency[Caller], db: NamedDependency[Database], keyring: NamedDependency[Keyring]
) -> Done:
    """For good, and only with nothing on it: 422 tells what still is. Its books stay; no credential of it works any more."""

    async def work(session: AsyncSession) -> None:
        await hold_still(session, owner)
        await close(session, keyring, owner.account_id)
        await keyring.note(session, owner.account_id, "closed", owner.kind.value)

    await db.transaction(work)
    return Done("Account closed")


handlers: Final = (
    create_account, ask_balance, read_balance, check_account, rotate_account, recover_account, list_recovery, create_recovery_code,
    remove_recovery_code, bind_nostr_key, unbind_nostr_key, list_events, close_account,
)  # fmt: skip
