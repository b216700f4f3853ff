"""An account that is paid for before it is known: a wallet without one pays a refusal, and is told its secrets for it."""

import hashlib
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import open_account
from app.accounts.recovery import first_code
from app.kernel.db import Database, Row, in_portions, new_id, row
from app.kernel.errors import AppError, InsufficientBalance, InvalidApiKey, RateLimitExceeded
from app.kernel.money import usd_text
from app.kernel.ratelimit import Allowances, Policy, count_or_refuse, shares_of
from app.kernel.security import Pepper, Sealer, UnsealError
from app.keys.issue import Keyring
from app.keys.verify import KeyOwner
from app.ledger.statement import balance
from app.offers.challenge import Proof
from app.offers.counted import outcomes
from app.offers.made import OPEN, Offered, reserve
from app.offers.mint import Mint
from app.offers.proofs import Proofs, Proven
from app.topups.create import Wish

_SAME_WITHIN_SECONDS: Final = 60
"""So soon the same wish from the same place is the same payer's: clients probe, and ask again before they pay."""
_TOLD_HOURS: Final = 24
_SEALED_DAYS: Final = 10
"""As long as a late payment may still be credited."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many accounts may be offered: a minute in all, an hour to a neighbourhood and in all."""

    per_minute: int
    per_hour: int
    per_hour_per_block: int


@dataclass(frozen=True, slots=True)
class Bought:
    """A paid account, its secrets, and the receipt for the proof that was sent."""

    credit_id: str
    api_key: str
    balance_nusd: int
    receipt: str
    recovery_code: str | None


class _Secrets(msgspec.Struct, frozen=True):
    credit_id: str
    api_key: str
    recovery_code: str | None = None


class Openings:
    """Offers accounts, and hands them to who paid."""

    def __init__(
        self, db: Database, mint: Mint, proofs: Proofs, keyring: Keyring, pepper: Pepper, sealer: Sealer, limits: Limits
    ) -> None:
        self._db, self._mint, self._proofs, self._keyring = db, mint, proofs, keyring
        self._pepper, self._sealer, self._limits = pepper, sealer, limits
        self._allowances = Allowances(db)

    async def refused(
        self, address: str, agent: str, wish: Wish, *, with_recovery: bool = False
    ) -> InsufficientBalance:
        """The refusal that a request for a paid account gets: with an offer, but for where there are too many.

        Raises PaymentBackendUnavailable.
        """
        offered = await self._offered(address, agent, wish, with_recovery)
        if offered is None:
            return InsufficientBalance(
                "An account with money on it is opened for a payment, and no more can be offered at the moment; ask again in a"
                " minute, or open one without: POST /accounts/create with no body",
                headers={"Retry-After": "60"},
            )
        told = offered.metadata()
        due = {"amount_due": offered.amount_due}
        told = (
            {name: told[name] for name in ("lightning_invoice", "expires_at", "checkout_url")} | due | {"offer": told}
        )
        return InsufficientBalance(
            f"Pay the Lightning invoice of {offered.payable.amount_sats} sats (${usd_text(offered.amount_nusd)}), and send this"
            " again with the proof: the account is opened with that on it",
            metadata=told,
            headers=offered.headers(self._mint.challenges),
        )

    async def _offered(self, address: str, agent: str, wish: Wish, with_recovery: bool) -> Offered | None:
        """None where there are too many."""
        asked = self._pepper.tag(
            b"offer/ask", address.encode(), agent.encode(), wish.currency.encode(), str(wish.amount_units).encode(),
            b"recovery" if with_recovery else b"",
        )  # fmt: skip
        found = await self._db.transaction(lambda session: _fresh(session, asked, is_locked=False))
        if found is None:
            try:
                await self._admit(address)
            except RateLimitExceeded:
                outcomes.count("too_many")
                return None
        topup_id = new_id()
        found, ours = await self._db.transaction(lambda session: self._opened(session, asked, topup_id, with_recovery))
        if ours is not None:
            owner, offer_id = ours
            return await self._mint.make(owner, offer_id, wish, topup_id, None)
        assert found is not None
        return await self._mint.awaited(KeyOwner(found["account_id"], found["key_id"]))

    async def _admit(self, address: str) -> None:
        """Raises RateLimitExceeded."""
        await self._allowances.take("offers", Policy("offers", self._limits.per_minute, 60))
        for block, share in shares_of(address, self._limits.per_hour_per_block, self._limits.per_hour):
            await count_or_refuse(self._db, f"account/{block}", share, policy="accounts", is_told=False)
        await count_or_refuse(self._db, "account", self._limits.per_hour, policy="accounts-in-all", is_told=False)

    async def _opened(
        self, session: AsyncSession, asked: bytes, topup_id: uuid.UUID, with_recovery: bool
    ) -> tuple[Row | None, tuple[KeyOwner, uuid.UUID] | None]:
        """The offer that this was answered by a moment ago, or the account and the offer that are now made for it."""
        found = await _fresh(session, asked, is_locked=True)
        if found is not None:
            return found, None
        opened = await open_account(session, self._keyring)
        key = await row(session, "SELECT id FROM api_key WHERE account_id = :account_id", account_id=opened.account_id)
        assert key is not None
        owner = KeyOwner(opened.account_id, key["id"])
        code = await first_code(session, self._keyring, opened.account_id) if with_recovery else None
        secrets = msgspec.json.encode(_Secrets(opened.credit_id, opened.api_key, code))
        offer_id = await reserve(
            session, owner, "account", 1, topup_id, self._sealer.seal_bytes(secrets, f"offer/{topup_id}")
        )
        await row(
            session, "UPDATE offer_ask SET account_id = :account_id, asked_at = now() WHERE asked = :asked",
            account_id=opened.account_id, asked=asked,
        )  # fmt: skip
        return None, (owner, offer_id)

    async def bought(self, credential: str) -> Bought | AppError:
        """The account that this proof paid for, for a day from when it was first told. A refusal after that, for another offer.

        Raises InvalidApiKey for what proves no payment for an account, PaymentPending for one that is not credited yet.
        """
        proof = self._proofs.challenges.read(credential)
        proven = await self._proofs.proven(credential)
        if proven.kind != "account":
            raise InvalidApiKey
        told = await self._db.transaction(lambda session: self._told(session, proof, proven))
        if told is None:
            return InsufficientBalance("What this payment opened was told for a day; the proof opens nothing more")
        secrets, posted_nusd = told
        return Bought(
            secrets.credit_id, secrets.api_key, posted_nusd, self._proofs.challenges.receipt(proof, datetime.now(UTC)),
            secrets.recovery_code,
        )  # fmt: skip

    async def _told(self, session: AsyncSession, proof: Proof, proven: Proven) -> tuple[_Secrets, int] | None:
        """The secrets; from the first time on they are sealed under the payer's preimage besides, which is stored nowhere."""
        account_id, offer_id = proven.owner.account_id, proven.offer_id
        found = await row(
            session,
            f"""SELECT sealed, told_at, coalesce(told_at > now() - interval '{_TOLD_HOURS} hours', true) AS is_told FROM offer
                WHERE account_id = :account_id AND id = :id FOR UPDATE""",
            account_id=account_id, id=offer_id,
        )  # fmt: skip
        if found is None or found["sealed"] is None or not found["is_told"]:
            return None
        place, payers = f"offer/{proven.topup_id}", _payers(proof)
        try:
            opened = self._sealer.open_bytes(bytes(found["sealed"]), place)
            secrets = opened if found["told_at"] is None else payers.open_bytes(opened, place)
        except UnsealError:  # the operator took a sealing key away meanwhile
            return None
        if found["told_at"] is None:
            outcomes.count("opened")
            await row(
                session,
                """UPDATE offer SET sealed = :sealed, told_at = now(), consumed_at = now(), consumed_by = 'account'
                   WHERE account_id = :account_id AND id = :id""",
                sealed=self._sealer.seal_bytes(payers.seal_bytes(secrets, place), place), account_id=account_id, id=offer_id,
            )  # fmt: skip
        posted_nusd = (await balance(session, account_id)).posted_nusd
        return msgspec.json.decode(secrets, type=_Secrets), posted_nusd


def _payers(proof: Proof) -> Sealer:
    return Sealer([("payer", hashlib.sha256(b"satmeter/offer\x00" + proof.preimage).digest())])


async def _fresh(session: AsyncSession, asked: bytes, *, is_locked: bool) -> Row | None:
    """The open offer that this was answered by a moment ago. `is_locked`, whoever asks the same waits until this is decided."""
    if is_locked:
        before = await row(
            session,
            """INSERT INTO offer_ask AS a (asked) VALUES (:asked) ON CONFLICT (asked) DO UPDATE SET asked_at = a.asked_at
               RETURNING account_id, asked_at""",
            asked=asked,
        )  # fmt: skip
    else:
        before = await row(session, "SELECT account_id, asked_at FROM offer_ask WHERE asked = :asked", asked=asked)
    if before is None or before["account_id"] is None:
        return None
    found = await row(
        session,
        f"""SELECT f.account_id, f.key_id, o.is_payable, o.is_being_made FROM offer f
            JOIN LATERAL ({OPEN.replace(":account_id", "f.account_id").replace(":key_id", "f.key_id")}) o ON true
            WHERE f.account_id = :account_id AND f.kind = 'account' AND f.closed_at IS NULL
              AND f.created_at > now() - interval '{_SAME_WITHIN_SECONDS} seconds'""",
        account_id=before["account_id"],
    )  # fmt: skip
    return found if found is not None and (found["is_payable"] or found["is_being_made"]) else None


async def forget_old_offers(db: Database, at_once: int = 5000) -> int:
    """Forget the secrets that were told for a day, or that nobody paid for, and who asked an hour ago. Returns how many."""
    forgotten = await in_portions(
        db,
        f"""WITH old AS MATERIALIZED (
                SELECT account_id, id FROM offer WHERE sealed IS NOT NULL
                  AND (told_at < now() - interval '{_TOLD_HOURS} hours'
                       OR (told_at IS NULL AND created_at < now() - interval '{_SEALED_DAYS} days'))
                LIMIT :at_once)
            UPDATE offer f SET sealed = NULL FROM old o WHERE f.account_id = o.account_id AND f.id = o.id RETURNING 1 AS gone""",
        at_once,
    )
    return forgotten + await in_portions(
        db,
        """DELETE FROM offer_ask WHERE asked IN (
               SELECT asked FROM offer_ask WHERE asked_at < now() - interval '1 hour' LIMIT :at_once) RETURNING 1 AS gone""",
        at_once,
    )
