"""Authorize, settle, release, charge: money set aside for a call, and taken once for what it cost."""

import base64
import binascii
import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

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
from app.kernel.security import Pepper, equal
from app.keys.verify import KeyOwner
from app.metering import statements
from app.metering.batch import decide_one, decider

_HOLD_NAMESPACE: Final = uuid.UUID("6f1f3c0e-0b53-4f9e-8f5f-5a7e3e7e2001")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ATTEMPTS: Final = 4


@dataclass(frozen=True, slots=True)
class HoldTicket:
    """What an opaque `hold_id` carries, so that a settle needs no look-up, and works when the hold's row is gone."""

    account_id: uuid.UUID
    key_id: uuid.UUID
    hold_id: uuid.UUID
    window_start: datetime
    request_id: str

    def sealed(self, pepper: Pepper, service: str) -> str:
        """The wire form, which only the service it was made for can use."""
        body = self.account_id.bytes + self.key_id.bytes + self.hold_id.bytes
        body += _microseconds(self.window_start).to_bytes(8) + self.request_id.encode()
        return _base64(pepper.tag(b"hold", service.encode(), body) + body)

    @classmethod
    def opened(cls, text: str, pepper: Pepper, service: str) -> "HoldTicket":
        """Raises HoldNotFound for anything that we did not make for this service."""
        try:
            data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except (binascii.Error, ValueError):
            raise HoldNotFound from None
        tag, body = data[:16], data[16:]
        # Base64 reads several spellings alike; only the one we gave out is ours.
        if len(body) < 57 or _base64(data) != text or not equal(tag, pepper.tag(b"hold", service.encode(), body)):
            raise HoldNotFound
        ids = [uuid.UUID(bytes=body[start : start + 16]) for start in (0, 16, 32)]
        return cls(ids[0], ids[1], ids[2], _from_microseconds(int.from_bytes(body[48:56])), body[56:].decode())


@dataclass(frozen=True, slots=True)
class Ask:
    """What a proxy asks to hold for a call about to be made."""

    request_id: str
    amount_nusd: int
    model: str | None
    endpoint: str | None
    ttl_seconds: int = 900

    def fingerprint(self, owner: KeyOwner) -> bytes:
        """Tells a repeat of this request from another one, or another key's, under the same request_id."""
        return hashlib.sha256(repr((owner.key_id, self)).encode()).digest()


@dataclass(frozen=True, slots=True)
class Held:
    """An admitted call: its hold, and what is left after it."""

    hold_id: str
    account_id: uuid.UUID
    key_id: uuid.UUID
    amount_nusd: int
    available_nusd: int
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Work:
    """What a call turned out to be: its cost, and what explains it."""

    cost_nusd: int
    outcome: str = "completed"
    served_model: str | None = None
    provider: str | None = None
    upstream_id: str | None = None
    latency_ms: int | None = None
    ttft_ms: int | None = None
    units: Mapping[str, Any] | None = field(default=None)
    flags: str | None = None

    def params(self) -> dict[str, Any]:
        return _fields(self) | {"units": Jsonb(self.units) if self.units is not None else None}


@dataclass(frozen=True, slots=True)
class Charged:
    """A recorded charge; a repeat of the call that made it gets the same figures."""

    charge_id: uuid.UUID
    cost_nusd: int
    balance_nusd: int
    held_nusd: int
    flags: str


def hold_id_for(service: str, request_id: str) -> uuid.UUID:
    """The one id a (service, request_id) can ever have: the primary key then keeps it unique for ever."""
    return uuid.uuid5(_HOLD_NAMESPACE, f"{service}\x00{request_id}")


class Meter:
    """The metering verbs. A verdict against the caller is raised as an AppError.

    Each is one statement; with `batch`, the calls in flight at one moment are decided in one together.
    """

    def __init__(self, db: Database, pepper: Pepper, *, hold_sync_commit: bool, batch: bool) -> None:
        self._db, self._pepper = db, pepper
        self._synchronous_commit = "on" if hold_sync_commit else "off"
        self._authorize = decider(db, statements.AUTHORIZE, statements.AUTHORIZE_BATCH if batch else None)
        self._settle = decider(db, statements.SETTLE, statements.SETTLE_BATCH if batch else None)
        self._charge = decider(db, statements.CHARGE, statements.CHARGE_BATCH if batch else None)

    async def authorize(self, service: str, owner: KeyOwner, ask: Ask) -> Held:
        """Hold money for a call, or raise why not. The same request again gets the same hold.

        Raises the refusals of `_refusal`, and RequestIdReuse for another request under the same id.
        """
        hold_id, fingerprint = hold_id_for(service, ask.request_id), ask.fingerprint(owner)
        found = await self._authorize(
            _fields(ask) | _fields(owner) | {
                "hold_id": hold_id, "service": service, "request_hash": fingerprint,
                "synchronous_commit": self._synchronous_commit,
            },
        )  # fmt: skip
        if found is None:
            raise InvalidApiKey
        if found["verdict"] == "repeat" and bytes(found["request_hash"]) != fingerprint:
            raise RequestIdReuse
        if found["verdict"] not in ("allow", "repeat"):
            raise _refusal(found, ask.amount_nusd, ask.model)
        ticket = HoldTicket(owner.account_id, owner.key_id, hold_id, found["window_start"], ask.request_id)
        newly_held = ask.amount_nusd if found["verdict"] == "allow" else 0
        available = found["posted_nusd"] - found["held_nusd"] - found["floor_nusd"] - newly_held
        return Held(
            ticket.sealed(self._pepper, service), owner.account_id, owner.key_id, ask.amount_nusd, max(0, available),
            found["expires_at"],
        )  # fmt: skip

    async def settle(self, service: str, hold_id: str, work: Work) -> Charged:
        """Charge what was used, whatever the hold said; the first settle wins, a repeat gets its answer.

        Raises HoldNotFound for a hold_id that is not this service's.
        """
        ticket = HoldTicket.opened(hold_id, self._pepper, service)
        params = _fields(ticket) | work.params() | {"charge_id": new_id(), "service": service}
        for _ in range(_ATTEMPTS):
            found = await self._settle(params)
            if found is not None:
                return _charged(found)
        raise HoldNotFound

    async def release(self, service: str, hold_id: str) -> Row:
        """Give the money back: the call was not made. Harmless when the hold had expired or was released.

        Returns posted_nusd and held_nusd. Raises HoldNotFound, and HoldClosed after a settle.
        """
        ticket = HoldTicket.opened(hold_id, self._pepper, service)
        found = await decide_one(self._db, statements.RELEASE, _fields(ticket))
        if found is None:
            raise HoldNotFound
        if found["state_before"] == "settled":
            raise HoldClosed("This hold was settled: the call was made, and its cost is charged")
        return found

    async def charge(self, service: str, owner: KeyOwner, ask: Ask, work: Work) -> Charged:
        """Authorize and settle in one: for work already priced. The same request again gets the same charge.

        `ask.amount_nusd` must be there to be spent; `work.cost_nusd` is taken. Raises as `authorize` does.
        """
        params = _fields(ask) | _fields(owner) | work.params() | {
            "hold_id": hold_id_for(service, ask.request_id), "service": service, "charge_id": new_id()
        }  # fmt: skip
        found = await self._charge(params)
        if found is None:
            raise InvalidApiKey
        if found["verdict"] == "repeat" and not _is_same_charge(found, owner, ask, work):
            raise RequestIdReuse
        if found["verdict"] not in ("allow", "repeat"):
            raise _refusal(found, ask.amount_nusd, ask.model)
        return _charged(found)


async def expire_holds(db: Database) -> int:
    """Free what expired holds still hold; a settle that comes later still charges. Returns how many."""
    due = await db.one(statements.ACCOUNTS_WITH_EXPIRED_HOLDS, {})
    assert due is not None
    total = 0
    for account_id in due["account_ids"]:
        found = await db.one(statements.EXPIRE, {"account_id": account_id})
        total += found["count"] if found else 0
    return total


def _charged(found: Row) -> Charged:
    return Charged(
        found["id"], found["cost_nusd"], found["balance_after_nusd"], found["held_after_nusd"], found["flags"]
    )


def _is_same_charge(found: Row, owner: KeyOwner, ask: Ask, work: Work) -> bool:
    before = (found["earlier_key_id"], found["cost_nusd"], found["earlier_model"], found["earlier_endpoint"])
    return before == (owner.key_id, work.cost_nusd, ask.model, ask.endpoint)


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


def _fields(value: Ask | KeyOwner | HoldTicket | Work) -> dict[str, Any]:
    """Its fields as parameters; `dataclasses.asdict` would copy every one of them deeply, which takes longer than PostgreSQL."""
    return {name: getattr(value, name) for name in value.__slots__}


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _microseconds(when: datetime) -> int:
    delta = when - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _from_microseconds(count: int) -> datetime:
    return _EPOCH + timedelta(microseconds=count)
