"""The row of an offer: kept before the backend is asked, completed with its invoice, closed when another takes its place."""

import uuid
from dataclasses import dataclass
from typing import Any, Final, LiteralString

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, new_id, row
from app.kernel.money import COIN_PLACES, JsonNumber, number, usd
from app.kernel.security import Pepper
from app.keys.verify import KeyOwner
from app.offers.challenge import Challenges, Payable

LEAST_SECONDS: Final = 60
"""An offer with less time left is not shown any more: who reads it could not pay it in time."""
_LOST_AFTER_SECONDS: Final = 10
"""One that has no invoice by then lost whoever was making it."""

OPEN: Final[LiteralString] = f"""
    SELECT o.id, o.topup_id, o.amount_nusd, o.amount_sats, o.payment_hash, o.expires_at, t.destination, t.checkout_url, t.due_coin_units,
           o.payment_hash IS NOT NULL AND o.expires_at > now() + interval '{LEAST_SECONDS} seconds' AND t.credited_nusd = 0 AS is_payable,
           o.payment_hash IS NULL AND o.created_at > now() - interval '{_LOST_AFTER_SECONDS} seconds' AS is_being_made
    FROM offer o LEFT JOIN topup t ON t.account_id = o.account_id AND t.id = o.topup_id
    WHERE o.account_id = :account_id AND o.key_id = :key_id AND o.closed_at IS NULL"""


@dataclass(frozen=True, slots=True)
class Offered:
    """An offer as a refusal shows it."""

    payable: Payable
    amount_nusd: int
    due_coin_units: int
    checkout_url: str

    @classmethod
    def of(cls, found: Row) -> "Offered":
        bolt11 = found["destination"]
        payable = Payable(
            bolt11, _network(bolt11), found["amount_sats"], bytes(found["payment_hash"]), found["expires_at"]
        )
        return cls(payable, found["amount_nusd"], found["due_coin_units"] or 0, found["checkout_url"] or "")

    def metadata(self) -> dict[str, Any]:
        """`expires_at` in Unix seconds, as of every top-up."""
        return {
            "lightning_invoice": self.payable.bolt11, "amount_usd": usd(self.amount_nusd), "amount_sats": self.payable.amount_sats,
            "expires_at": int(self.payable.expires_at.timestamp()), "checkout_url": self.checkout_url,
        }  # fmt: skip

    @property
    def amount_due(self) -> JsonNumber:
        """In coins."""
        return number(self.due_coin_units, COIN_PLACES["BTC"])

    def headers(self, challenges: Challenges) -> dict[str, str]:
        return {"WWW-Authenticate": challenges.line(self.payable), "Cache-Control": "no-store"}


def _network(bolt11: str) -> str:
    return next((prefix for prefix in ("bcrt", "bc", "tbs", "tb") if bolt11.lower().startswith(f"ln{prefix}")), "")


async def reserve(
    session: AsyncSession,
    owner: KeyOwner,
    kind: str,
    amount_nusd: int,
    topup_id: uuid.UUID,
    sealed: bytes | None = None,
) -> uuid.UUID:
    """Write the open offer of a key, in the place of the one that was. Its account is locked, or new."""
    await row(
        session,
        "UPDATE offer SET closed_at = now() WHERE account_id = :account_id AND key_id = :key_id AND closed_at IS NULL",
        account_id=owner.account_id, key_id=owner.key_id,
    )  # fmt: skip
    offer_id = new_id()
    await row(
        session,
        """INSERT INTO offer (account_id, id, key_id, topup_id, kind, amount_nusd, sealed)
           VALUES (:account_id, :id, :key_id, :topup_id, :kind, :amount_nusd, :sealed)""",
        account_id=owner.account_id, id=offer_id, key_id=owner.key_id, topup_id=topup_id, kind=kind, amount_nusd=amount_nusd,
        sealed=sealed,
    )  # fmt: skip
    return offer_id


async def complete(
    session: AsyncSession, pepper: Pepper, owner: KeyOwner, offer_id: uuid.UUID, payable: Payable, amount_nusd: int
) -> None:
    """Tie an offer to its invoice, and the invoice's payment hash to it: from now on it can be paid, and proven."""
    await row(
        session,
        """INSERT INTO proof_ref (payment_hash, account_id, offer_id, proof) VALUES (:payment_hash, :account_id, :offer_id, :proof)
           ON CONFLICT (payment_hash) DO NOTHING""",
        payment_hash=payable.payment_hash, account_id=owner.account_id, offer_id=offer_id,
        proof=offer_proof(pepper, payable.payment_hash, owner, offer_id),
    )  # fmt: skip
    await row(
        session,
        """UPDATE offer SET payment_hash = :payment_hash, amount_sats = :sats, amount_nusd = :amount_nusd, expires_at = :expires_at
           WHERE account_id = :account_id AND id = :id""",
        payment_hash=payable.payment_hash, sats=payable.amount_sats, amount_nusd=amount_nusd, expires_at=payable.expires_at,
        account_id=owner.account_id, id=offer_id,
    )  # fmt: skip


async def close(session: AsyncSession, owner: KeyOwner, offer_id: uuid.UUID) -> None:
    """No invoice came of it."""
    await row(
        session,
        "UPDATE offer SET closed_at = now() WHERE account_id = :account_id AND id = :id AND payment_hash IS NULL AND closed_at IS NULL",
        account_id=owner.account_id, id=offer_id,
    )  # fmt: skip


def offer_proof(pepper: Pepper, payment_hash: bytes, owner: KeyOwner, offer_id: uuid.UUID) -> bytes:
    """The MAC that binds a payment hash to whose offer it is, and to the key that its proof stands for."""
    return pepper.tag(b"offer/owner", payment_hash, owner.account_id.bytes, owner.key_id.bytes, offer_id.bytes)
