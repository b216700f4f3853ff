"""Refunds: money back for a call that was charged, once for each charge."""

import uuid
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row, rows
from app.kernel.errors import AlreadyRefunded, InvalidField, NotFound
from app.kernel.money import usd_text
from app.ledger.charge import ChargeId
from app.ledger.post import PostingMismatch, post
from app.ledger.tables import EntryKind


@dataclass(frozen=True, slots=True)
class Refunded:
    """A refund as it was made, also for every repeat."""

    amount_nusd: int
    balance_nusd: int


async def refund(
    db: Database, service: str, charge_id: str, amount_nusd: int | None, least_nusd: int | None = None
) -> Refunded:
    """Give back `amount_nusd` of a charge (all of it, if None), once; the key, and those above it, may spend it again.

    `least_nusd` is the amount as it was before it was rounded up, where it was: what is more than the charge for its
    rounding alone is the whole charge.
    A repeat changes nothing and gets the first answer. Raises NotFound for a charge that is not this service's,
    InvalidField for more than it cost, and AlreadyRefunded if another amount was given back before.
    """
    wanted = ChargeId.read(charge_id)
    return await db.transaction(lambda session: _refund(session, service, wanted, amount_nusd, least_nusd))


async def _refund(
    session: AsyncSession, service: str, wanted: ChargeId, amount_nusd: int | None, least_nusd: int | None = None
) -> Refunded:
    charge = await row(
        session,
        """SELECT u.key_id, u.window_start, u.cost_nusd, u.service FROM usage u
           WHERE u.account_id = :account_id AND u.id = :usage_id""",
        account_id=wanted.account_id, usage_id=wanted.usage_id,
    )  # fmt: skip
    if charge is None or charge["service"] != service:
        raise NotFound("No such charge")
    due_nusd = charge["cost_nusd"] if amount_nusd is None else amount_nusd
    if least_nusd is not None and least_nusd <= charge["cost_nusd"]:
        due_nusd = min(due_nusd, charge["cost_nusd"])
    if not 0 < due_nusd <= charge["cost_nusd"]:
        raise InvalidField(
            f"this charge was ${usd_text(charge['cost_nusd'])}; a refund is more than nothing and at most that",
            param="amount_usd",
        )
    try:
        posted = await post(
            session, wanted.account_id, EntryKind.REFUND, str(wanted.usage_id), "revenue:usage", due_nusd
        )
    except PostingMismatch as error:
        raise AlreadyRefunded from error
    if posted.is_new:
        await _let_the_key_spend_it_again(session, wanted.account_id, charge, due_nusd)
    return Refunded(due_nusd, posted.balance_after_nusd)


async def _let_the_key_spend_it_again(
    session: AsyncSession, account_id: uuid.UUID, charge: Row, amount_nusd: int
) -> None:
    """And every key above it: each window that the charge counted to, as it stands there.

    The account's row is locked by the posting, so no charge of these keys comes between.
    """
    await rows(
        session,
        """UPDATE api_key k SET lifetime_nusd = k.lifetime_nusd - CASE WHEN k.id = :key_id THEN :amount ELSE 0 END,
                  window_usage_nusd = k.window_usage_nusd - CASE WHEN k.window_start <= :window_start THEN :amount ELSE 0 END,
                  more_usage_nusd = CASE WHEN k.more_starts IS NOT NULL THEN ARRAY (
                      SELECT w.usage_nusd - CASE WHEN w.start <= :window_start THEN :amount ELSE 0 END
                      FROM unnest(k.more_starts, k.more_usage_nusd) WITH ORDINALITY w (start, usage_nusd, number) ORDER BY w.number) END
           FROM api_key called WHERE called.account_id = :account_id AND called.id = :key_id
             AND k.account_id = :account_id AND k.id = ANY (array_append(called.ancestor_ids, called.id))""",
        account_id=account_id, key_id=charge["key_id"], window_start=charge["window_start"], amount=amount_nusd,
    )  # fmt: skip
