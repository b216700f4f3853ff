"""Minting: the offer that a refusal for want of money bears. One of a key at a time, within 1.5 seconds, or none."""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, new_id, row
from app.kernel.errors import (
    AppError,
    InsufficientBalance,
    InvalidChallenge,
    PaymentBackendUnavailable,
    RateLimitExceeded,
)
from app.kernel.logs import log, where_it_broke
from app.kernel.money import CURRENCIES, NUSD_PER_USD, decimal_of, worth_nusd
from app.kernel.security import Caller, Kind, Pepper
from app.keys.verify import KeyOwner
from app.offers.challenge import Asked, Challenges, Payable
from app.offers.counted import Result, outcomes
from app.offers.made import OPEN, Offered, close, complete, reserve
from app.topups.admission import Caps, lock_account
from app.topups.create import Receipts, Wish, create_topup
from app.topups.gateway import Gateways
from app.topups.methods import METHODS

METHOD: Final = METHODS["btc-lightning"]
TIMES_THE_SHORTFALL: Final = 20
"""A call is cheap, and paying for each by itself is not: an offer is for so many like the one that was refused."""
_PATIENCE_SECONDS: Final = 1.5
"""Who was refused is waiting for the answer."""
_LOOK_EVERY_SECONDS: Final = 0.1
_REST_SECONDS: Final = 5.0
_AT_ONCE: Final = 16
_CENT_NUSD: Final = NUSD_PER_USD // 100
_OPEN_AT_ONCE: Final = OPEN.replace(":account_id", "%(account_id)s").replace(":key_id", "%(key_id)s")


class ShortBalance(InsufficientBalance):
    """Insufficient balance."""

    def __init__(self, message: str, metadata: dict[str, Any], short: "Short") -> None:
        super().__init__(message, metadata=metadata)
        self.short = short


class UsedProof(InvalidChallenge):
    """This payment's proof was used before; it is good for one request."""

    def __init__(self, short: "Short") -> None:
        super().__init__()
        self.short = short


@dataclass(frozen=True, slots=True)
class Short:
    """What a refused call lacked: `shortfall_nusd` beyond what is there, and what the account owes besides, if it is below
    zero. `most_nusd` is what the key may still spend, None without a limit."""

    owner: KeyOwner
    shortfall_nusd: int
    debt_nusd: int = 0
    most_nusd: int | None = None

    @property
    def least_nusd(self) -> int:
        """What makes the refused call possible."""
        return max(1, self.shortfall_nusd) + self.debt_nusd


def amount_to_offer(short: Short, least_usd_nusd: int) -> int | None:
    """What to offer, in whole cents; None where paying would not help: the key may not spend so much, or nobody can pay it."""
    limits = METHOD.limits["USD"]
    most_nusd = limits.most if short.most_nusd is None else min(limits.most, short.most_nusd + short.debt_nusd)
    wanted_nusd = max(
        TIMES_THE_SHORTFALL * max(1, short.shortfall_nusd) + short.debt_nusd, least_usd_nusd, limits.least
    )
    amount_nusd = -(-wanted_nusd // _CENT_NUSD) * _CENT_NUSD
    if amount_nusd > most_nusd:
        amount_nusd = most_nusd // _CENT_NUSD * _CENT_NUSD
    return amount_nusd if amount_nusd >= max(limits.least, short.least_nusd) else None


@dataclass(slots=True)
class Rest:
    """The breaker: after a failure nothing is minted for a while, then one tries for all."""

    monotonic: Callable[[], float] = time.monotonic
    _until: float | None = None

    def is_given(self) -> bool:
        if self._until is None:
            return False
        if self.monotonic() < self._until:
            return True
        self.begin()  # for the others; this one tries
        return False

    def begin(self) -> None:
        self._until = self.monotonic() + _REST_SECONDS

    def end(self) -> None:
        self._until = None


class Mint:
    """Makes offers out of top-ups. `reads` reads a BOLT11, and raises ValueError for what is none."""

    def __init__(
        self,
        db: Database,
        gateways: Gateways,
        pepper: Pepper,
        challenges: Challenges,
        reads: Callable[[str], Asked],
        *,
        least_nusd: int,
        caps: Caps,
        receipts: Receipts,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        self._db, self._gateways, self._pepper, self.challenges, self._reads = db, gateways, pepper, challenges, reads
        self._least_nusd, self._caps, self._receipts = least_nusd, caps, receipts
        self.rest, self.patience_seconds = Rest(), patience_seconds
        self._asking: dict[KeyOwner, asyncio.Task[Offered | None]] = {}
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def cured(self, error: AppError, *, wanted: bool) -> AppError:
        """The same refusal, with an offer where paying one would help; without, whatever goes wrong with that."""
        if isinstance(error, ShortBalance | UsedProof) and wanted and METHOD.id in self._gateways.methods:
            offered = await self._in_time(error.short)
            if offered is not None:
                error.metadata = {**(error.metadata or {}), "offer": offered.metadata()}
                error.headers |= offered.headers(self.challenges)
        return error

    async def _in_time(self, short: Short) -> Offered | None:
        """However many are refused at one moment, their key's offer is asked for once; what comes too late is for the next."""
        task = self._asking.get(short.owner)
        if task is None:
            task = self._asking[short.owner] = asyncio.create_task(self._for(short))
            task.add_done_callback(lambda _: self._asking.pop(short.owner, None))
        try:
            async with asyncio.timeout(self.patience_seconds):
                return await asyncio.shield(task)
        except TimeoutError:
            self.rest.begin()
            outcomes.count("too_slow")
            return None

    async def _for(self, short: Short) -> Offered | None:
        try:
            return await self._found_or_made(short)
        except RateLimitExceeded:
            return _without("too_many")
        except AppError as error:
            if isinstance(error, PaymentBackendUnavailable):
                self.rest.begin()
            return _without("failed")
        except Exception as error:  # noqa: BLE001 - the refusal stands without an offer, whatever broke
            log.error("offer.defect", exc_type=type(error).__name__, where=where_it_broke(error))
            return _without("failed")

    async def _found_or_made(self, short: Short) -> Offered | None:
        amount_nusd = amount_to_offer(short, self._least_nusd)
        if amount_nusd is None:
            return _without("no_use")
        ids = {"account_id": short.owner.account_id, "key_id": short.owner.key_id}
        found = await self._db.one(_OPEN_AT_ONCE, ids)
        if found is None or not (_suits(found, short) or found["is_being_made"]):
            if self._turns.locked() or self.rest.is_given():
                return _without("resting")
            async with self._turns:
                topup_id = new_id()
                found, offer_id = await self._db.transaction(
                    lambda session: _reserved(session, short, amount_nusd, topup_id)
                )
                if offer_id is not None:
                    wish = Wish(METHOD, "USD", amount_nusd)
                    made = await self.make(short.owner, offer_id, wish, topup_id, self._caps)
                    self.rest.end()
                    return made
        return await self._shown_again(found, short)

    async def awaited(self, owner: KeyOwner) -> Offered | None:
        """The open offer of a key, which somebody else may be making; None where nothing came of it."""
        found = await self._db.one(_OPEN_AT_ONCE, {"account_id": owner.account_id, "key_id": owner.key_id})
        return await self._shown_again(found, Short(owner, 0))

    async def _shown_again(self, found: Row | None, short: Short) -> Offered | None:
        """The offer that there is; one that is being made elsewhere is waited for."""
        ids = {"account_id": short.owner.account_id, "key_id": short.owner.key_id}
        while found is not None and found["is_being_made"]:
            await asyncio.sleep(_LOOK_EVERY_SECONDS)
            found = await self._db.one(_OPEN_AT_ONCE, ids)
        if found is None or not _suits(found, short):
            return None
        outcomes.count("shown_again")
        return Offered.of(found)

    async def make(
        self, owner: KeyOwner, offer_id: uuid.UUID, wish: Wish, topup_id: uuid.UUID, caps: Caps | None
    ) -> Offered:
        """The top-up of an offer that was reserved, as any other is made. Raises what `create_topup` raises, and
        PaymentBackendUnavailable for an invoice that cannot be read; the offer is closed then."""

        async def finish(session: AsyncSession, topup: Row) -> Offered:
            payable = Payable.of(topup["destination"], self._reads(topup["destination"]), topup["expires_at"])
            amount_nusd = _worth(topup)
            await complete(session, self._pepper, owner, offer_id, payable, amount_nusd)
            return Offered(payable, amount_nusd, topup["due_coin_units"] or 0, topup["checkout_url"] or "")

        caller = Caller(Kind.API_KEY, owner.account_id, owner.key_id)
        gateway = self._gateways.of_method(METHOD.id)
        try:
            made = await create_topup(self._db, gateway, caller, wish, topup_id, finish, caps, receipts=self._receipts)
        except BaseException as error:
            await self._db.transaction(lambda session: close(session, owner, offer_id))
            if isinstance(error, ValueError):
                raise PaymentBackendUnavailable(retry_after_seconds=5) from error
            raise
        outcomes.count("minted")
        return made


def _suits(found: Row, short: Short) -> bool:
    return bool(found["is_payable"]) and found["amount_nusd"] >= short.least_nusd


async def _reserved(
    session: AsyncSession, short: Short, amount_nusd: int, topup_id: uuid.UUID
) -> tuple[Row | None, uuid.UUID | None]:
    """The open offer that suits, or is being made, else the id of one that is ours to make. The account stays locked."""
    await lock_account(session, short.owner.account_id)
    found = await row(session, OPEN, account_id=short.owner.account_id, key_id=short.owner.key_id)
    if found is not None and (_suits(found, short) or found["is_being_made"]):
        return found, None
    return None, await reserve(session, short.owner, "shortfall", amount_nusd, topup_id)


def _worth(topup: Row) -> int:
    """What a top-up asks for, in nano-USD; in coins, at the rate that it will be credited by."""
    if topup["currency"] == "USD":
        return int(topup["amount_units"])
    assert topup["currency"] in ("BTC", "SATS"), "a satoshi is a bitcoin's smallest unit"
    return worth_nusd(decimal_of(topup["amount_units"], CURRENCIES["BTC"].places), topup["usd_per_coin"])


def _without(why: Result) -> Offered | None:
    outcomes.count(why)
    return None
