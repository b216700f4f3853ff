"""Authorize, settle, release, charge: money set aside for a call, and taken once for what it cost."""

import hashlib
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final

import msgspec
from psycopg.types.json import Jsonb

from app.kernel.db import Database, Row, new_id
from app.kernel.errors import (
    AccountFrozen,
    AppError,
    FundsHeld,
    HoldClosed,
    HoldNotFound,
    InsufficientBalance,
    InvalidApiKey,
    KeyLimitExceeded,
    MissingScope,
    ModelNotAllowed,
    RequestIdReuse,
)
from app.kernel.money import usd, usd_text
from app.kernel.security import Pepper
from app.keys.verify import KeyOwner
from app.metering import statements
from app.metering.batch import Batches, decide_one
from app.metering.ticket import HoldTicket

_IN_HOLD_NAMESPACE: Final = hashlib.sha1(uuid.UUID("6f1f3c0e-0b53-4f9e-8f5f-5a7e3e7e2001").bytes, usedforsecurity=False)
_ATTEMPTS: Final = 4

# Values of the hot path are structs: made at each call, they cost a tenth of a frozen dataclass.


class Ask(msgspec.Struct, frozen=True):
    """What a proxy asks to hold for a call about to be made: `amount_nusd`, or what there is of it from `min_nusd` up.

    `asked` tells apart requests whose amount follows from prices: the same one again may come to another amount.
    `attributes` (quality, size, …) are kept for pricing the call when it is settled.
    """

    request_id: str
    amount_nusd: int
    model: str | None
    endpoint: str | None
    ttl_seconds: int = 900
    min_nusd: int | None = None
    price_version: int | None = None
    asked: bytes | None = None
    attributes: Mapping[str, str] | None = None

    def fingerprint(self, owner: KeyOwner) -> bytes:
        """Tells a repeat of this request from another one, or another key's, under the same request_id."""
        return hashlib.sha256(msgspec.msgpack.encode(self._told(owner))).digest()

    def is_fingerprint(self, owner: KeyOwner, found: bytes) -> bool:
        """Also one of an earlier version: a request may be repeated while the service is upgraded."""
        return found in (self.fingerprint(owner), hashlib.sha256(repr(self._told(owner)).encode()).digest())

    def _told(self, owner: KeyOwner) -> tuple[Any, ...]:
        asked = (self.amount_nusd, self.min_nusd) if self.asked is None else self.asked
        return owner.key_id.hex, self.request_id, self.model, self.endpoint, self.ttl_seconds, asked


class Held(msgspec.Struct, frozen=True):
    """An admitted call: its hold, and what is left after it."""

    hold_id: str
    account_id: uuid.UUID
    key_id: uuid.UUID
    amount_nusd: int
    available_nusd: int
    made_at: datetime
    expires_at: datetime
    price_version: int | None


class Work(msgspec.Struct, frozen=True):
    """What a call turned out to be: its cost, and what explains it (priced.py has `lines`)."""

    cost_nusd: int
    outcome: str = "completed"
    served_model: str | None = None
    provider: str | None = None
    upstream_id: str | None = None
    latency_ms: int | None = None
    ttft_ms: int | None = None
    units: Mapping[str, Any] | None = None
    price_version: int | None = None
    lines: Mapping[str, Any] | None = None
    flags: str | None = None

    def params(self) -> dict[str, Any]:
        return {
            "cost_nusd": self.cost_nusd, "outcome": self.outcome, "served_model": self.served_model, "provider": self.provider,
            "upstream_id": self.upstream_id, "latency_ms": self.latency_ms, "ttft_ms": self.ttft_ms,
            "units": None if self.units is None else Jsonb(self.units), "price_version": self.price_version,
            "lines": None if self.lines is None else Jsonb(self.lines), "flags": self.flags,
        }  # fmt: skip


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
    name = bytearray(digest.digest()[:16])
    name[6] = name[6] & 0x0F | 0x50  # what uuid.UUID does for a version, at a third of its time
    name[8] = name[8] & 0x3F | 0x80
    return msgspec.convert(bytes(name), uuid.UUID)


class Meter:
    """The metering verbs. A verdict against the caller is raised as an AppError.

    Each is one statement; with `batch`, the calls in flight at one moment are decided in one transaction together.
    `on_low` is told of an account whose balance a charge took below its `low_nusd`; it must not take long.
    """

    def __init__(self, db: Database, pepper: Pepper, *, hold_sync_commit: bool, batch: bool) -> None:
        self._db, self._pepper = db, pepper
        self._synchronous_commit = "on" if hold_sync_commit else "off"
        if batch:
            together = Batches(db)
            # Settles come first: what they free is there for the others. A transaction is as durable as all that is in
            # it, so that holds that need not survive a crash of the database have transactions of their own.
            self._settle = together.decider(statements.SETTLE, statements.SETTLE_BATCH, statements.SETTLED)
            holding = together if hold_sync_commit else Batches(db)
            self._authorize = holding.decider(statements.AUTHORIZE, statements.AUTHORIZE_BATCH, statements.AUTHORIZED)
            self._charge = together.decider(statements.CHARGE, statements.CHARGE_BATCH, statements.CHARGED)
        else:
            self._settle = partial(decide_one, db, statements.SETTLE)
            self._authorize = partial(decide_one, db, statements.AUTHORIZE)
            self._charge = partial(decide_one, db, statements.CHARGE)
        self.on_low: Callable[[uuid.UUID], None] = lambda _: None

    async def authorize(self, service: str, owner: KeyOwner, ask: Ask) -> Held:
        """Hold money for a call, or raise why not. The same request again gets the same hold.

        Raises the refusals of `_refusal`, and RequestIdReuse for another request under the same id.
        """
        hold_id = hold_id_for(service, ask.request_id)
        min_nusd = ask.amount_nusd if ask.min_nusd is None else ask.min_nusd
        found = await self._authorize({
            "account_id": owner.account_id, "key_id": owner.key_id, "hold_id": hold_id, "service": service,
            "request_id": ask.request_id, "request_hash": ask.fingerprint(owner), "amount_nusd": ask.amount_nusd, "min_nusd": min_nusd,
            "model": ask.model, "endpoint": ask.endpoint, "price_version": ask.price_version, "ttl_seconds": ask.ttl_seconds,
            "synchronous_commit": self._synchronous_commit,
        })  # fmt: skip
        if found is None:
            raise InvalidApiKey
        if found["verdict"] == "repeat" and not ask.is_fingerprint(owner, bytes(found["request_hash"])):
            raise RequestIdReuse
        if found["verdict"] not in ("allow", "repeat"):
            raise _refusal(found, min_nusd, ask.model)
        ticket = HoldTicket(
            owner.account_id, owner.key_id, hold_id, ask.request_id, found["window_start"], found["created_at"],
            found["amount_nusd"], found["price_version"], ask.model, ask.endpoint, ask.attributes,
        )  # fmt: skip
        newly_held = found["amount_nusd"] if found["verdict"] == "allow" else 0
        available = found["posted_nusd"] - found["held_nusd"] - found["floor_nusd"] - newly_held
        return Held(
            ticket.sealed(self._pepper, service), owner.account_id, owner.key_id, found["amount_nusd"], max(0, available),
            found["created_at"], found["expires_at"], found["price_version"],
        )  # fmt: skip

    def opened(self, service: str, hold_id: str) -> HoldTicket:
        """Raises HoldNotFound for a hold_id that is not this service's."""
        return HoldTicket.opened(hold_id, self._pepper, service)

    async def settle(self, service: str, hold: HoldTicket | str, work: Work) -> Charged:
        """Charge what was used, whatever the hold said; the first settle wins, a repeat gets its answer.

        Raises HoldNotFound for a hold_id that is not this service's.
        """
        ticket = self.opened(service, hold) if isinstance(hold, str) else hold
        params = work.params() | {
            "account_id": ticket.account_id, "key_id": ticket.key_id, "hold_id": ticket.hold_id, "service": service,
            "request_id": ticket.request_id, "window_start": ticket.window_start, "model": ticket.model,
            "endpoint": ticket.endpoint, "charge_id": new_id(),
        }  # fmt: skip
        for _ in range(_ATTEMPTS):
            found = await self._settle(params)
            if found is not None:
                return (
                    _told_again(await self._earlier(params))
                    if found["is_repeat"]
                    else self._charged(found, ticket.account_id, work)
                )
        raise HoldNotFound

    async def held_nusd(self, ticket: HoldTicket) -> int:
        """What a hold holds, or held when it was closed: it may have grown. What it held at first if its row is gone."""
        found = await self._db.one(statements.HELD, _place(ticket))
        return found["amount_nusd"] if found else ticket.amount_nusd or 0

    async def release(self, service: str, hold_id: str) -> Row:
        """Give the money back: the call was not made. Harmless when the hold had expired or was released.

        Returns posted_nusd and held_nusd. Raises HoldNotFound, and HoldClosed after a settle.
        """
        found = await decide_one(self._db, statements.RELEASE, _place(self.opened(service, hold_id)))
        if found is None:
            raise HoldNotFound
        if found["state_before"] == "settled":
            raise HoldClosed("This hold was settled: the call was made, and its cost is charged")
        return found

    async def extend(self, service: str, hold_id: str, ttl_seconds: int, captured_nusd: int) -> Row:
        """Keep a hold for `ttl_seconds` from now at least, and let it grow to `captured_nusd`, what the call cost so far.

        Returns amount_nusd, expires_at, posted_nusd, held_nusd and floor_nusd. It grows beyond the balance too: that
        money is spent already. Raises HoldNotFound, and HoldClosed for one that is no longer open.
        """
        params = {"ttl_seconds": ttl_seconds, "captured_nusd": captured_nusd}
        found = await decide_one(self._db, statements.EXTEND, _place(self.opened(service, hold_id)) | params)
        if found is None:
            raise HoldNotFound
        if found["state"] != "open":
            after = "its cost is charged" if found["state"] == "settled" else "a settle still charges what was used"
            raise HoldClosed(f"This hold is {found['state']} and cannot be extended; {after}")
        return found

    async def charge(self, service: str, owner: KeyOwner, ask: Ask, work: Work) -> Charged:
        """Authorize and settle in one: for work already done. The same request again gets the same charge.

        `ask.amount_nusd` must be there to be spent; `work.cost_nusd` is taken. Raises as `authorize` does.
        """
        params = work.params() | {
            "account_id": owner.account_id, "key_id": owner.key_id, "hold_id": hold_id_for(service, ask.request_id),
            "service": service, "request_id": ask.request_id, "amount_nusd": ask.amount_nusd, "min_nusd": ask.amount_nusd,
            "model": ask.model, "endpoint": ask.endpoint, "charge_id": new_id(),
        }  # fmt: skip
        found = await self._charge(params)
        if found is None:
            raise InvalidApiKey
        if found["verdict"] == "repeat":
            earlier = await self._earlier(params)
            if not _is_same_charge(earlier, owner, ask, work):
                raise RequestIdReuse
            return _told_again(earlier)
        if found["verdict"] != "allow":
            raise _refusal(found, ask.amount_nusd, ask.model)
        return self._charged(found, owner.account_id, work)

    def _charged(self, found: Row, account_id: uuid.UUID, work: Work) -> Charged:
        if found["is_low"]:
            self.on_low(account_id)
        return _told_again(found | {"lines": work.lines})

    async def _earlier(self, params: Mapping[str, Any]) -> Row:
        found = await self._db.one(statements.EARLIER_CHARGE, params)
        assert found is not None, "an entry is never removed"
        return found


async def expire_holds(db: Database) -> int:
    """Free what expired holds still hold; a settle that comes later still charges. Returns how many."""
    due = await db.one(statements.ACCOUNTS_WITH_EXPIRED_HOLDS, {})
    assert due is not None
    total = 0
    for account_id in due["account_ids"]:
        found = await db.one(statements.EXPIRE, {"account_id": account_id})
        total += found["count"] if found else 0
    return total


def _told_again(found: Row) -> Charged:
    return Charged(
        found["id"], found["cost_nusd"], found["balance_after_nusd"], found["held_after_nusd"], found["flags"],
        found["lines"],
    )  # fmt: skip


def _is_same_charge(found: Row, owner: KeyOwner, ask: Ask, work: Work) -> bool:
    """Prices may have changed since: what was used, and how, must be the same then, and what it cost where it came priced."""
    if found["key_id"] is None:  # that month's calls were dropped
        return bool(found["cost_nusd"] == work.cost_nusd)
    before = (found["key_id"], found["model"], found["endpoint"], found["units"])
    if before != (owner.key_id, ask.model, ask.endpoint, work.units):
        return False
    if found["cost_nusd"] == work.cost_nusd:
        return True
    return work.lines is not None and (found["lines"] or {}).get("attributes") == work.lines.get("attributes")


def _refusal(found: Row, amount_nusd: int, model: str | None) -> AppError:
    """The error behind a verdict, with the numbers that explain it."""
    match found["verdict"]:
        case "key_limit_exceeded" | "key_funds_held":
            return _over_key_limit(found, amount_nusd)
        case "insufficient_balance" | "funds_held":
            return _over_balance(found, amount_nusd)
        case "account_frozen":
            return AccountFrozen()
        case "missing_scope":
            return MissingScope("This API key lacks the scope 'spend'")
        case "model_not_allowed":
            return ModelNotAllowed(f"This API key may not call {model or 'a model that is not named'}", param="model")
        case "reuse":
            return RequestIdReuse()
        case _:
            return InvalidApiKey()


def _over_balance(found: Row, amount_nusd: int) -> AppError:
    available = max(0, found["posted_nusd"] - found["held_nusd"] - found["floor_nusd"])
    metadata = {
        "limit_source": "account_balance", "required_usd": usd(amount_nusd), "available_usd": usd(available),
        "shortfall_usd": usd(max(0, amount_nusd - available)), "topup": "/topup/create/btc-lightning",
    }  # fmt: skip
    needs = f"needs ${usd_text(amount_nusd)}, ${usd_text(available)} available"
    if found["verdict"] == "funds_held":
        return FundsHeld(f"Funds held by requests in flight: {needs}", retry_after_seconds=2, metadata=metadata)
    return InsufficientBalance(f"Insufficient balance: {needs}", metadata=metadata)


def _over_key_limit(found: Row, amount_nusd: int) -> AppError:
    remaining = max(0, found["limit_nusd"] - found["usage_nusd"] - found["key_held_nusd"])
    metadata = {
        "limit_source": "key_limit", "required_usd": usd(amount_nusd), "available_usd": usd(remaining),
        "limit_usd": usd(found["limit_nusd"]), "reset_at": found["reset_at"],
    }  # fmt: skip
    needs = f"needs ${usd_text(amount_nusd)}, ${usd_text(remaining)} of ${usd_text(found['limit_nusd'])} left"
    if found["verdict"] == "key_funds_held":
        return FundsHeld(
            f"This API key's limit is held by requests in flight: {needs}", retry_after_seconds=2, metadata=metadata
        )
    return KeyLimitExceeded(f"This API key has reached its spending limit: {needs}", metadata=metadata)


def _place(ticket: HoldTicket) -> dict[str, Any]:
    """Where its hold is."""
    return {"account_id": ticket.account_id, "hold_id": ticket.hold_id}
