"""Proofs of payment: whose key one stands for, once the backend says that it was paid. A preimage credits nothing.

A token (L402) is an alias of the key that its offer was made for. A `Payment` is good for one request: the call that admits it
consumes it, in its own transaction.
"""

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, LiteralString

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row
from app.kernel.errors import InvalidApiKey, PaymentPending
from app.kernel.logs import log
from app.kernel.security import Pepper
from app.keys.verify import KeyOwner
from app.offers.challenge import Challenges, Proof
from app.offers.counted import outcomes
from app.offers.made import offer_proof
from app.offers.mint import Short, UsedProof
from app.topups.admission import lock_account
from app.topups.credit import TopupRef, credit_if_paid
from app.topups.gateway import GatewayError, Gateways

PATIENCE_SECONDS: Final = 3.0
_LOOK_EVERY_SECONDS: Final = 0.25
_CACHE_SIZE: Final = 100_000

_OFFER: Final[LiteralString] = """
    SELECT r.account_id, r.offer_id, r.proof, o.key_id, o.topup_id, o.kind, o.created_at, t.backend, t.credited_nusd > 0 AS is_credited
    FROM proof_ref r JOIN offer o ON o.account_id = r.account_id AND o.id = r.offer_id
    JOIN topup t ON t.account_id = o.account_id AND t.id = o.topup_id WHERE r.payment_hash = %(payment_hash)s"""


@dataclass(frozen=True, slots=True)
class Use:
    """A proof that is good for one request, and has to be consumed by it."""

    owner: KeyOwner
    offer_id: uuid.UUID


@dataclass(frozen=True, slots=True)
class Proven:
    """A paid offer. `use` is what its proof has to be consumed as; None for a token."""

    owner: KeyOwner
    offer_id: uuid.UUID
    topup_id: uuid.UUID
    kind: str
    made_at: datetime
    use: Use | None = None


class Proofs:
    """Reads proofs. What was credited stays so: a token is looked up in the database once by each process."""

    def __init__(
        self,
        db: Database,
        gateways: Gateways,
        pepper: Pepper,
        challenges: Challenges,
        *,
        token_days: int,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._db, self._gateways, self._pepper, self.challenges = db, gateways, pepper, challenges
        self._life, self._now, self._patience_seconds = timedelta(days=token_days), now, patience_seconds
        self._credited: OrderedDict[bytes, Proven] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[None]] = {}

    async def proven(self, credential: str, *, patience_seconds: float | None = None) -> Proven:
        """Whose proof this is. Raises InvalidApiKey, and PaymentPending where the backend does not know of the payment in time."""
        proof = self.challenges.read(credential)
        found = self._credited.get(proof.payment_hash) or await self._looked_up(proof, patience_seconds)
        if not proof.single_use:
            if self._now() >= found.made_at + self._life:
                raise InvalidApiKey
            return found
        use = Use(found.owner, found.offer_id)
        return Proven(found.owner, found.offer_id, found.topup_id, found.kind, found.made_at, use)

    async def spent(self, credential: str, beside: KeyOwner | None) -> KeyOwner:
        """The key that a request is made by: `beside`, where another key was sent too, else the proof's. One that is good for
        one request is consumed. Raises UsedProof where it was before, and what `proven` raises."""
        found = await self.proven(credential)
        if beside is not None and beside != found.owner:
            return beside
        if found.use is not None:
            use = found.use
            await self._db.transaction(lambda session: consume(session, use, "request"))
        return found.owner

    async def asked_of(self, payment_hash: bytes) -> KeyOwner | None:
        """The key that an invoice was made for. Its hash proves nothing."""
        found = await self._db.one(_OFFER, {"payment_hash": payment_hash})
        return None if found is None else KeyOwner(found["account_id"], found["key_id"])

    async def _looked_up(self, proof: Proof, patience_seconds: float | None) -> Proven:
        found = await self._db.one(_OFFER, {"payment_hash": proof.payment_hash})
        if found is None:
            raise InvalidApiKey
        proven = self._ours(proof, found)
        if not found["is_credited"]:
            await self._until_credited(proof, found, patience_seconds)
        outcomes.count("proven")
        self._credited[proof.payment_hash] = proven
        if len(self._credited) > _CACHE_SIZE:
            self._credited.popitem(last=False)
        return proven

    def _ours(self, proof: Proof, found: Row) -> Proven:
        """Raises InvalidApiKey for an offer that somebody gave to another account in the database."""
        owner = KeyOwner(found["account_id"], found["key_id"])
        if bytes(found["proof"]) != offer_proof(self._pepper, proof.payment_hash, owner, found["offer_id"]):
            log.error("offer.forged", account_id=str(owner.account_id))
            raise InvalidApiKey
        return Proven(owner, found["offer_id"], found["topup_id"], found["kind"], found["created_at"])

    async def _until_credited(self, proof: Proof, found: Row, patience_seconds: float | None) -> None:
        """The backend is asked at once, by one for all who wait. Raises PaymentPending: never is anybody told to pay again."""
        task = self._asking.get(proof.payment_hash)
        if task is None:
            task = self._asking[proof.payment_hash] = asyncio.create_task(self._asked(proof, found))
            task.add_done_callback(lambda _: self._asking.pop(proof.payment_hash, None))
        try:
            async with asyncio.timeout(self._patience_seconds if patience_seconds is None else patience_seconds):
                await asyncio.shield(task)
        except TimeoutError:
            outcomes.count("pending")
            raise PaymentPending(retry_after_seconds=1) from None

    async def _asked(self, proof: Proof, found: Row) -> None:
        """Until it is credited, or nobody can be waiting any more. Raises TimeoutError."""
        gateway = self._gateways.named(found["backend"])
        until = asyncio.get_running_loop().time() + self._patience_seconds
        while asyncio.get_running_loop().time() < until:
            if gateway is not None:
                try:
                    await credit_if_paid(self._db, gateway, TopupRef(found["account_id"], found["topup_id"]))
                except GatewayError as error:
                    log.warning("offer.backend_unavailable", backend=gateway.name, error=str(error))
            again = await self._db.one(_OFFER, {"payment_hash": proof.payment_hash})
            if again is not None and again["is_credited"]:
                return
            await asyncio.sleep(_LOOK_EVERY_SECONDS)
        raise TimeoutError


async def consume(session: AsyncSession, use: Use, by: str) -> None:
    """Spend a proof that is good for one request on this one; the same one again may have it again.

    Raises UsedProof where another has had it. The account is locked first, as by whoever makes an offer.
    """
    await lock_account(session, use.owner.account_id)
    consumed = await row(
        session,
        """UPDATE offer SET consumed_at = now(), consumed_by = :by
           WHERE account_id = :account_id AND id = :id AND consumed_at IS NULL RETURNING 1 AS done""",
        account_id=use.owner.account_id, id=use.offer_id, by=by,
    )  # fmt: skip
    if consumed is None and (by == "request" or not await _is_consumed_by(session, use, by)):
        outcomes.count("used_before")
        raise UsedProof(Short(use.owner, 0))
    outcomes.count("consumed")


async def _is_consumed_by(session: AsyncSession, use: Use, by: str) -> bool:
    found = await row(
        session,
        "SELECT 1 AS is_so FROM offer WHERE account_id = :account_id AND id = :id AND consumed_by = :by",
        account_id=use.owner.account_id, id=use.offer_id, by=by,
    )  # fmt: skip
    return found is not None
