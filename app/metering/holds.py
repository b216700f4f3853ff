"""Authorize, settle, release, charge: money set aside for a call, and taken once for what it cost."""

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from math import ceil
from typing import Any, Final, LiteralString, TypeVar, cast

import msgspec
import psycopg
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, new_id
from app.kernel.errors import (
    AccountFrozen,
    AppError,
    DatabaseUnavailable,
    FundsHeld,
    HoldCaptured,
    HoldClosed,
    HoldNotFound,
    InsufficientBalance,
    InvalidApiKey,
    InvalidField,
    KeyLimitExceeded,
    MissingScope,
    ModelNotAllowed,
    RateLimitExceeded,
    RequestIdReuse,
)
from app.kernel.logs import log
from app.kernel.money import usd, usd_text
from app.kernel.security import OnExpiry, Pepper
from app.kernel.shards import everywhere, is_sharded
from app.keys.verify import SCOPES, KeyOwner, narrowed
from app.metering.batch import Answer, Batches, Decider
from app.metering.functions import (
    FUNCTIONS,
    AuthorizeAnswer,
    AuthorizeParams,
    Bounded,
    CallParams,
    ChargeAnswer,
    ChargeParams,
    ExtendAnswer,
    ExtendParams,
    ReleaseAnswer,
    VerifyAnswer,
    asking,
)
from app.metering.ticket import HoldTicket
from app.offers.mint import Short, ShortBalance
from app.offers.proofs import Use, consume

_IN_HOLD_NAMESPACE: Final = hashlib.sha1(uuid.UUID("6f1f3c0e-0b53-4f9e-8f5f-5a7e3e7e2001").bytes, usedforsecurity=False)
_VERSION_BITS: Final = 0xF000_C000 << 48
_VERSION_5: Final = 0x5000_8000 << 48
_BETWEEN_NAMES: Final = "\x7f"
_B = TypeVar("_B", bound=Bounded)

# Values of the hot path are structs: made at each call, they cost a tenth of a frozen dataclass.


class Ask(msgspec.Struct, frozen=True):
    """What a proxy asks to hold for a call about to be made: `amount_nusd`, or what there is of it from `min_nusd` up.

    `asked` tells apart requests whose amount follows from prices: the same one again may come to another amount.
    `attributes` (quality, size, …) are kept for pricing the call when it is settled, by the prices of `made_at`.
    `model_names` are all names that the catalogue knows the model by, if it knows more than one.
    """

    request_id: str
    amount_nusd: int
    model: str | None
    endpoint: str | None
    ttl_seconds: int = 900
    min_nusd: int | None = None
    price_version: int | None = None
    asked: bytes | None = None
    attributes: dict[str, str] | None = None
    made_at: datetime | None = None
    model_names: tuple[str, ...] = ()
    on_expiry: OnExpiry = "captured"

    @property
    def needed_nusd(self) -> int:
        return self.amount_nusd if self.min_nusd is None else self.min_nusd

    def names(self) -> str | None:
        """As functions.sql takes them: with what stands in no name between them."""
        if not self.model or self.model_names in ((), (self.model,)):  # nearly every model has one name
            return self.model or None
        return _BETWEEN_NAMES.join({self.model: None} | dict.fromkeys(self.model_names))

    def fingerprint(self, verb: str, owner: KeyOwner, work: "Work | None" = None) -> bytes:
        """Tells a repeat of this request from another one, or another key's, under the same request_id."""
        asked: Any = self.asked
        if asked is None:
            asked = (self.amount_nusd, self.min_nusd, self.attributes) if work is None else work.told()
        told = (
            verb,
            owner.key_id.hex,
            self.request_id,
            self.model,
            self.endpoint,
            self.ttl_seconds,
            self.on_expiry,
            asked,
        )
        return hashlib.sha256(msgspec.msgpack.encode(told)).digest()


class Held(msgspec.Struct, frozen=True):
    """An admitted call: its hold, and what is left after it. `is_repeat`: it was admitted before.

    `available_nusd` is what the account has left, `spendable_nusd` the least of that and of what bounds the key.
    """

    hold_id: str
    account_id: uuid.UUID
    key_id: uuid.UUID
    amount_nusd: int
    available_nusd: int
    made_at: datetime
    expires_at: datetime
    price_version: int | None
    spendable_nusd: int
    is_repeat: bool = False


class Verified(msgspec.Struct, frozen=True):
    """A key that may spend: how much now, and what it and the keys above it were narrowed to."""

    available_nusd: int
    scopes: list[str] | None
    allowed_models: list[str] | None


class Work(msgspec.Struct, frozen=True):
    """What a call turned out to be: its cost, and what explains it (priced.py has `lines`).

    `at_least_the_hold`: for want of a better figure it costs no less than what its hold holds, which may have grown.
    `provider_cost_nusd` and `upstream_model` are the proxy's own: kept, and never charged.
    """

    cost_nusd: int
    outcome: str = "completed"
    served_model: str | None = None
    provider: str | None = None
    upstream_id: str | None = None
    latency_ms: int | None = None
    ttft_ms: int | None = None
    units: dict[str, Any] | None = None
    price_version: int | None = None
    lines: dict[str, Any] | None = None
    flags: str | None = None
    at_least_the_hold: bool = False
    provider_cost_nusd: int | None = None
    upstream_model: str | None = None

    def told(self) -> tuple[Any, ...]:
        """What the cost follows from. Where the call was priced by the catalogue, prices may have changed at a repeat."""
        attributes = self.lines.get("attributes") if self.lines else None
        is_priced = self.lines is not None and "lines" in self.lines
        cost_nusd = None if is_priced else self.cost_nusd
        return self.served_model, self.provider, self.units, attributes, self.outcome, cost_nusd

    def params(
        self,
        ticket: HoldTicket,
        service: str,
        request_hash: bytes | None = None,
        needed_nusd: int | None = None,
        names: str | None = None,
    ) -> ChargeParams:
        """What functions.sql is told of this call, whose it is being said by the ticket. One that nothing was held for has a
        fingerprint, `request_hash`: another one under its id is refused."""
        return ChargeParams(
            ticket.account_id, ticket.hold_id, ticket.key_id, service, ticket.request_id, request_hash, ticket.window_start,
            needed_nusd, ticket.model, names, ticket.endpoint, new_id(), self.cost_nusd, self.at_least_the_hold, self.outcome,
            self.served_model, self.provider, self.upstream_id, self.upstream_model, self.provider_cost_nusd,
            self.latency_ms, self.ttft_ms, self.units, self.price_version, self.lines, self.flags,
        )  # fmt: skip


class Charged(msgspec.Struct, frozen=True):
    """A recorded charge; a repeat of the call that made it gets the same figures."""

    charge_id: uuid.UUID
    cost_nusd: int
    balance_nusd: int
    held_nusd: int
    flags: str
    lines: Mapping[str, Any] | None


def hold_id_for(service: str, request_id: str) -> uuid.UUID:
    """The one id a (service, request_id) can ever have, a UUIDv5: the primary key then keeps it unique for ever."""
    digest = _IN_HOLD_NAMESPACE.copy()
    digest.update(f"{service}\x00{request_id}".encode())
    name = int.from_bytes(digest.digest()[:16]) & ~_VERSION_BITS | _VERSION_5
    return msgspec.convert(name.to_bytes(16), uuid.UUID)  # a third of uuid.UUID's time


class Meter:
    """The metering verbs; functions.sql decides them. A verdict against the caller is raised as an AppError.

    With `batch`, the calls in flight at one moment are decided in one transaction together, or `by_account` those of each account.
    `on_low` is told of an account whose balance a charge took below its `low_nusd`, `on_limit` of a key that
    a call was refused for want of its limit; they must not take long.
    """

    def __init__(
        self, db: Database, pepper: Pepper, *, hold_sync_commit: bool, batch: bool, by_account: bool = False
    ) -> None:
        self._db, self._pepper = db, pepper
        self._synchronous_commit = "on" if hold_sync_commit else "off"
        together = Batches(db, together=batch, by_account=by_account)
        # Settles and releases come first: what they free is there for the others. A transaction is as durable as all that
        # is in it, so that holds that need not survive a crash of the database have transactions of their own.
        self._settle = together.decider(FUNCTIONS["meter_charge"], ChargeParams, ChargeAnswer)
        self._release = together.decider(FUNCTIONS["meter_release"], CallParams, ReleaseAnswer)
        self._extend = together.decider(FUNCTIONS["meter_extend"], ExtendParams, ExtendAnswer)
        holding = together if hold_sync_commit else Batches(db, together=batch, by_account=by_account)
        self._authorize = holding.decider(FUNCTIONS["meter_authorize"], AuthorizeParams, AuthorizeAnswer)
        self._charge = together.decider(FUNCTIONS["meter_charge"], ChargeParams, ChargeAnswer)
        self._verify = asking("meter_verify", by_account=by_account)
        self.on_low: Callable[[uuid.UUID], None] = lambda _: None
        self.on_limit: Callable[[uuid.UUID, uuid.UUID, AppError], None] = lambda *_: None

    async def authorize(self, service: str, owner: KeyOwner, ask: Ask, use: Use | None = None) -> Held:
        """Hold money for a call, or raise why not. The same request again gets the same hold while that is open.
        A proof of payment that is good for one request is consumed by the call that it admits.

        Raises the refusals of `_refusal`, RequestIdReuse for another request under the same id, and HoldClosed.
        """
        hold_id = hold_id_for(service, ask.request_id)
        found = await self._decided(self._authorize, use, AuthorizeParams(
            owner.account_id, hold_id, owner.key_id, service, ask.request_id, ask.fingerprint("authorize", owner),
            ask.amount_nusd, ask.needed_nusd, ask.model, ask.names(), ask.endpoint, ask.price_version, ask.attributes,
            ask.made_at or datetime.now(UTC), ask.ttl_seconds, ask.on_expiry, self._synchronous_commit if use is None else "on",
        ))  # fmt: skip
        if found is None:
            raise InvalidApiKey
        is_repeat = found.verdict == "repeat"
        if not is_repeat and found.verdict != "allow":
            raise _with_what_is_left(self._refused(found, ask.needed_nusd, ask.model, owner), found)
        ticket = HoldTicket(
            owner.account_id, owner.key_id, hold_id, ask.request_id, found.window_start, found.made_at,
            found.amount_nusd, found.price_version, ask.model, ask.endpoint, ask.attributes,
        )  # fmt: skip
        newly_held = 0 if is_repeat else found.amount_nusd
        available = found.posted_nusd - found.held_nusd - found.floor_nusd - newly_held
        return Held(
            ticket.sealed(self._pepper, service), owner.account_id, owner.key_id, found.amount_nusd, max(0, available),
            found.made_at, found.expires_at, found.price_version,
            _spendable(found, newly_held, available), is_repeat,
        )  # fmt: skip

    def opened(self, service: str, hold_id: str) -> HoldTicket:
        """Raises HoldNotFound for a hold_id that is not this service's."""
        return HoldTicket.opened(hold_id, self._pepper, service)

    async def found(self, service: str, owner: KeyOwner, request_id: str) -> HoldTicket:
        """The ticket of an authorize whose answer was lost. Raises HoldNotFound where this key has no such hold."""
        hold_id = hold_id_for(service, request_id)
        hold = await self._db.one(_HOLD, {"account_id": owner.account_id, "hold_id": hold_id, "key_id": owner.key_id})
        if hold is None:
            raise HoldNotFound
        return HoldTicket(
            owner.account_id, owner.key_id, hold_id, request_id, hold["window_start"], hold["created_at"],
            hold["amount_nusd"], hold["price_version"], hold["model"], hold["endpoint"], hold["attributes"],
        )  # fmt: skip

    async def verify(self, owner: KeyOwner, model: str | None, model_names: tuple[str, ...]) -> Verified:
        """What an authorize for nothing would be answered, without a hold. Raises the refusals of `_refusal`."""
        names = Ask("", 0, model, None, model_names=model_names).names()
        answered = await self._db.one(self._verify, {
            "account": owner.account_id, "account_id": owner.account_id, "key_id": owner.key_id, "names": names,
        })  # fmt: skip
        if answered is None:
            raise InvalidApiKey
        found = VerifyAnswer(**answered)
        if found.verdict is not None:
            raise _refusal(found, 0, model, owner)
        scopes = narrowed(found.scopes, SCOPES)
        return Verified(max(0, found.available_nusd), scopes, narrowed(found.allowed_models))

    async def settle(self, service: str, hold: HoldTicket | str, work: Work) -> Charged:
        """Charge what was used, whatever the hold said; the first settle wins, a repeat gets its answer.

        Raises HoldNotFound for a hold_id that is not this service's.
        """
        ticket = self.opened(service, hold) if isinstance(hold, str) else hold
        return _or_raise(*await self.take([work.params(ticket, service)]))

    async def take(self, used: Sequence[ChargeParams]) -> list[Charged | AppError]:
        """Charge calls that were made, whatever is left, and say of each what was charged, or why nothing was: HoldNotFound
        where there is no such account, RequestIdReuse. The same call again gets its answer.

        Raises what went wrong for a fault of ours, once all are answered: asked again, each is charged once.
        """
        found = await self._settle.many(used)
        for each in found:
            if isinstance(each, BaseException) and not _is_refusal(each):
                raise each
        taken = [self._taken(row, each) for row, each in zip(found, used, strict=True)]
        again = [place for place, each in enumerate(taken) if each is None]
        told = await asyncio.gather(*(self._earlier(used[place]) for place in again)) if again else ()
        for place, charged in zip(again, told, strict=True):
            taken[place] = charged
        return cast("list[Charged | AppError]", taken)

    def _taken(self, found: Answer[ChargeAnswer], used: ChargeParams) -> Charged | AppError | None:
        """None for what was charged before."""
        if found is None:
            return HoldNotFound()
        if isinstance(found, AppError):
            return found
        assert isinstance(found, ChargeAnswer)
        match found.verdict:
            case "reuse":
                return RequestIdReuse()
            case "repeat":
                return None
            case _:
                return self._charged(found, used)

    async def release(self, service: str, hold: HoldTicket | str) -> ReleaseAnswer:
        """Give the money back: the call was not made. Harmless when the hold had expired or was released.

        Raises HoldNotFound, HoldClosed after a settle, HoldCaptured after a capture.
        """
        ticket = self.opened(service, hold) if isinstance(hold, str) else hold
        found = await self._release(CallParams(ticket.account_id, ticket.hold_id))
        if found is None or found.state is None:
            raise HoldNotFound
        if found.state == "settled":
            raise HoldClosed(
                "This hold was settled: the call was made, and its cost is charged", metadata={"state": "settled"}
            )
        if found.state == "open" and found.captured_nusd > 0:
            captured = found.captured_nusd
            raise HoldCaptured(
                f"The call has cost ${usd_text(captured)} so far, as was said when its hold was extended: settle it instead",
                metadata={"captured_usd": usd(captured)},
            )
        return found

    async def extend(self, service: str, hold_id: str, ttl_seconds: int, captured_nusd: int) -> ExtendAnswer:
        """Keep a hold for `ttl_seconds` from now at least, and let it grow to `captured_nusd`, what the call cost so far.

        It grows beyond the balance too: that money is spent already. Raises HoldNotFound, and HoldClosed for one that is no
        longer open.
        """
        ticket = self.opened(service, hold_id)
        found = await self._extend(ExtendParams(ticket.account_id, ticket.hold_id, ttl_seconds, captured_nusd))
        if found is None or found.state is None:
            raise HoldNotFound
        if found.state != "open":
            raise _closed(found.state)
        return found

    async def charge(self, service: str, owner: KeyOwner, ask: Ask, work: Work, use: Use | None = None) -> Charged:
        """Authorize and settle in one: for work already done. The same request again gets the same charge.
        A proof of payment is consumed as by `authorize`.

        `ask.amount_nusd` must be there to be spent; `work.cost_nusd` is taken. Raises as `authorize` does.
        """
        hold_id, now = hold_id_for(service, ask.request_id), datetime.now(UTC)
        ticket = HoldTicket(
            owner.account_id, owner.key_id, hold_id, ask.request_id, None, now, None, None, ask.model, ask.endpoint
        )
        params = work.params(ticket, service, ask.fingerprint("charge", owner, work), ask.amount_nusd, ask.names())
        found = await self._decided(self._charge, use, params)
        if found is None:
            raise InvalidApiKey
        if found.verdict not in ("charged", "repeat"):
            raise self._refused(found, ask.amount_nusd, ask.model, owner)
        if found.verdict == "repeat":
            return await self._earlier(params)
        return self._charged(found, params)

    async def _decided(self, decider: Decider[_B], use: Use | None, params: CallParams) -> _B | None:
        """The verdict; with a proof to be consumed, in one transaction with that, and a refused call consumes nothing.

        Raises InvalidChallenge for a proof that another call has had.
        """
        if use is None:
            return await decider(params)
        refused: list[_B | None] = []

        async def work(session: AsyncSession) -> _B:
            refused.clear()
            await consume(session, use, str(params.hold_id))
            found = await decider.within(session, params)
            if found is None or found.verdict not in ("allow", "repeat", "charged"):
                refused.append(found)
                raise _Undone
            return found

        try:
            return await self._db.transaction(work)
        except _Undone:
            return refused[0]

    def _refused(self, found: Bounded, amount_nusd: int, model: str | None, owner: KeyOwner) -> AppError:
        """`_refusal`, and that of a key's limit is told of."""
        refusal = _refusal(found, amount_nusd, model, owner)
        if found.verdict == "key_limit_exceeded":
            self.on_limit(owner.account_id, owner.key_id, refusal)
        return refusal

    def _charged(self, found: ChargeAnswer, params: ChargeParams) -> Charged:
        if found.is_low:
            self.on_low(params.account_id)
        return Charged(
            params.charge_id,
            found.cost_nusd,
            found.balance_after_nusd,
            found.held_after_nusd,
            found.flags,
            params.lines,
        )

    async def _earlier(self, params: CallParams) -> Charged:
        """What the call was charged before."""
        found = await self._db.one(_EARLIER_CHARGE, {"account_id": params.account_id, "hold_id": params.hold_id})
        assert found is not None, "an entry is never removed"
        return Charged(
            found["id"], found["cost_nusd"], found["balance_after_nusd"], found["held_after_nusd"], found["flags"],
            found["lines"],
        )  # fmt: skip


_HOLD: Final[LiteralString] = """
SELECT window_start, created_at, amount_nusd, price_version, model, endpoint, attributes FROM hold
WHERE account_id = %(account_id)s AND id = %(hold_id)s AND key_id = %(key_id)s
"""

_EARLIER_CHARGE: Final[LiteralString] = """
SELECT e.usage_id AS id, -e.amount_nusd AS cost_nusd, e.balance_after_nusd, coalesce(u.held_after_nusd, 0) AS held_after_nusd,
       coalesce(u.flags, '') AS flags, u.lines
FROM entry e LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id
WHERE e.account_id = %(account_id)s AND e.kind = 'usage' AND e.reference = %(hold_id)s::text
"""
"""What a repeat is answered: the entry is there for ever, its call until that month's calls are dropped."""


async def expire_holds(db: Database) -> int:
    """Close the holds that nobody settled in time, until none is due; accounts that are locked come next time.

    What was captured is charged, the rest freed; a settle that comes later still charges. Where accounts live on several servers
    each is asked about by itself, and those of a server that is down come next time, too. Returns how many.
    """
    total, passed_by, by_account = 0, set[uuid.UUID](), await is_sharded(db)
    at_once, ask = 1 if by_account else _ACCOUNTS_AT_ONCE, asking("meter_expire", by_account=by_account)
    while due := [each for each in await _accounts_with_expired_holds(db) if each not in passed_by]:
        for start in range(0, len(due), at_once):
            some = due[start : start + at_once]
            try:
                closed, is_done = await _expire(db, ask, some)
            except DatabaseUnavailable:
                if not by_account:
                    raise
                closed, is_done = 0, True
            total += closed
            if is_done:
                passed_by.update(some)
    return total


async def _expire(db: Database, ask: LiteralString, accounts: list[uuid.UUID]) -> tuple[int, bool]:
    """How many holds of theirs were closed, and whether those were all. One that cannot be charged keeps back no other account."""
    spare = [new_id() for _ in range(_ACCOUNTS_AT_ONCE)]
    try:
        found = await db.one(ask, {"account": accounts[0], "lock": accounts, "wait": False, "charge_id": spare})
    except (InvalidField, psycopg.Error) as error:
        if len(accounts) == 1:
            log.error("meter.hold_not_expired", account_id=str(accounts[0]), reason=str(error).partition("\n")[0])
            return 0, True
        each = [await _expire(db, ask, [account_id]) for account_id in accounts]
        return sum(closed for closed, _ in each), all(is_done for _, is_done in each)
    assert found is not None
    return found["freed"] + found["charged"], found["charged"] < len(spare)


async def _accounts_with_expired_holds(db: Database) -> list[uuid.UUID]:
    found = await everywhere(db, {"account_id": "uuid"}, _ACCOUNTS_WITH_EXPIRED_HOLDS, {})
    return [each["account_id"] for each in found]


_ACCOUNTS_AT_ONCE: Final = 200
_ACCOUNTS_WITH_EXPIRED_HOLDS: Final[LiteralString] = """
SELECT DISTINCT account_id FROM hold WHERE state = 'open' AND expires_at < now() ORDER BY account_id LIMIT 100000
"""


class _Undone(Exception):
    """The call is refused, and so what was done for it is taken back."""


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, AppError) and error.status < 500


def _or_raise(taken: Charged | AppError) -> Charged:
    if isinstance(taken, AppError):
        raise taken
    return taken


def _refusal(found: Bounded, amount_nusd: int, model: str | None, owner: KeyOwner) -> AppError:
    """The error behind a verdict, with the numbers that explain it."""
    match found.verdict:
        case "key_limit_exceeded" | "key_funds_held":
            return _over_key_limit(found, amount_nusd)
        case "too_many_calls":
            return _too_many_calls(found)
        case "call_too_dear":
            return _too_dear(found, amount_nusd)
        case "insufficient_balance" | "funds_held":
            return _over_balance(found, amount_nusd, owner)
        case "account_frozen":
            return AccountFrozen()
        case "missing_scope":
            return MissingScope("This API key lacks the scope 'spend'")
        case "model_not_allowed":
            return ModelNotAllowed(f"This API key may not call {model or 'a model that is not named'}", param="model")
        case "reuse":
            return RequestIdReuse()
        case "closed":
            assert isinstance(found, AuthorizeAnswer)
            assert found.state is not None
            return _closed(found.state)
        case _:
            return InvalidApiKey()


def _over_balance(found: Bounded, amount_nusd: int, owner: KeyOwner) -> AppError:
    left = found.posted_nusd - found.held_nusd - found.floor_nusd
    available = max(0, left)
    metadata = {
        "limit_source": "account_balance", "required_usd": usd(amount_nusd), "available_usd": usd(available),
        "shortfall_usd": usd(max(0, amount_nusd - available)), "topup": "/topup/create/btc-lightning",
    }  # fmt: skip
    needs = f"needs ${usd_text(amount_nusd)}, ${usd_text(available)} available"
    if found.verdict == "funds_held":
        return FundsHeld(f"Funds held by requests in flight: {needs}", retry_after_seconds=2, metadata=metadata)
    short = Short(owner, max(0, amount_nusd - available), max(0, -left), found.left_nusd)
    return ShortBalance(f"Insufficient balance: {needs}", metadata, short)


def _over_key_limit(found: Bounded, amount_nusd: int) -> AppError:
    assert found.limit_nusd is not None
    remaining = max(0, found.left_nusd or 0)
    metadata = {
        **_limit_source("key_limit", found), "required_usd": usd(amount_nusd), "available_usd": usd(remaining),
        "limit_usd": usd(found.limit_nusd), "reset_at": found.reset_at,
    }  # fmt: skip
    needs = f"needs ${usd_text(amount_nusd)}, ${usd_text(remaining)} of ${usd_text(found.limit_nusd)} left"
    if "limit_period" in metadata:
        needs += f" ({metadata['limit_period']})"
    whose = "A key above this API key has reached its" if "limit_key_id" in metadata else "This API key has reached its"
    if found.verdict == "key_funds_held":
        limit = "The limit of a key above this API key" if "limit_key_id" in metadata else "This API key's limit"
        return FundsHeld(f"{limit} is held by requests in flight: {needs}", retry_after_seconds=2, metadata=metadata)
    return KeyLimitExceeded(f"{whose} spending limit: {needs}", metadata=metadata)


def _with_what_is_left(error: AppError, found: Bounded) -> AppError:
    if isinstance(error, InsufficientBalance | KeyLimitExceeded):
        available = found.posted_nusd - found.held_nusd - found.floor_nusd
        if found.verdict == "call_too_dear":
            assert found.limit_nusd is not None  # that of one call: what the key has spent may have no limit
            error.spendable_nusd = max(0, min(available, found.limit_nusd))
        else:
            error.spendable_nusd = _spendable(found, 0, available)
    return error


def _limit_source(bound: str, found: Bounded) -> dict[str, Any]:
    """Which limit refuses: `key_limit` is the key's own and only one, `key_limit:daily` one of its own, and
    `parent_key_limit:<key id>:daily` that of a key above it; the same in fields of their own."""
    key_id, _, period = (found.bound or "").partition(":")
    word = _PERIODS.get(period)
    source = ":".join(filter(None, (f"parent_{bound}" if key_id else bound, key_id, word)))
    named = {"limit_key_id": key_id or None, "limit_period": word}
    return {"limit_source": source} | {name: value for name, value in named.items() if value is not None}


_PERIODS: Final = {"day": "daily", "week": "weekly", "month": "monthly", "total": "total"}


def _spendable(found: Bounded, newly_held: int, available: int) -> int:
    """The least of what the account has left and what the key's tightest limit leaves."""
    left = found.left_nusd
    return max(0, available if left is None else min(available, left - newly_held))


def _too_many_calls(found: Bounded) -> AppError:
    assert found.reset_at is not None
    seconds = ceil((found.reset_at - datetime.now(UTC)).total_seconds())
    return RateLimitExceeded(
        "This API key has made as many requests as it may in a minute", retry_after_seconds=min(60, max(1, seconds)),
        metadata={**_limit_source("requests_per_minute", found), "reset_at": found.reset_at},
    )  # fmt: skip


def _too_dear(found: Bounded, amount_nusd: int) -> AppError:
    most = found.limit_nusd
    assert most is not None
    return KeyLimitExceeded(
        f"A call by this API key may cost ${usd_text(most)}, and this one needs ${usd_text(amount_nusd)}",
        metadata={
            **_limit_source("max_usd_per_call", found), "required_usd": usd(amount_nusd), "available_usd": usd(most), "limit_usd": usd(most),
        },
    )  # fmt: skip


def _closed(state: str) -> HoldClosed:
    after = "its cost is charged" if state == "settled" else "a settle still charges what was used"
    return HoldClosed(f"This hold is {state}, not open; {after}", metadata={"state": state})
