"""Whether an account may make one more top-up: each is an invoice that a backend makes and we watch for a day."""

import uuid
from dataclasses import dataclass
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, row
from app.kernel.errors import InvalidCreditId, RateLimitExceeded

SAME_WITHIN_SECONDS: Final = 60
"""So soon the same wish again is taken for the same top-up: somebody pressed twice, or an answer was lost."""
_WAITS: Final = "status IN ('Creating', 'New') AND coalesce(paid_coin_units, 0) = 0 AND expires_at > now()"
"""Nothing of it was paid, and it still can be."""


@dataclass(frozen=True, slots=True)
class Caps:
    """How many top-ups an account that never paid may have waiting, and make in an hour; once it paid, both are `paid`."""

    waiting: int
    per_hour: int
    paid: int


async def lock_account(session: AsyncSession, account_id: uuid.UUID) -> None:
    """Until the transaction ends, nobody else counts this account's top-ups or adds one.

    Raises InvalidCreditId for one that was closed since its caller was asked who it is: nobody could spend what is paid.
    """
    locked = await row(session, "SELECT status FROM account WHERE id = :id FOR NO KEY UPDATE", id=account_id)
    if locked is not None and locked["status"] == "closed":
        raise InvalidCreditId


async def same_wish(
    session: AsyncSession, account_id: uuid.UUID, method: str, currency: str, amount_units: int
) -> Row | None:
    """The account's top-up that was made for the same wish a moment ago and still waits to be paid."""
    return await row(
        session,
        f"""SELECT * FROM topup
            WHERE account_id = :account_id AND created_at > now() - make_interval(secs => {SAME_WITHIN_SECONDS})
              AND method = :method AND currency = :currency AND amount_units = :amount AND {_WAITS}
            ORDER BY created_at DESC, id DESC LIMIT 1""",
        account_id=account_id, method=method, currency=currency, amount=amount_units,
    )  # fmt: skip


async def has_paid(session: AsyncSession, account_id: uuid.UUID) -> bool:
    """Whether a top-up of the account was ever credited."""
    found = await row(
        session,
        "SELECT EXISTS (SELECT FROM topup WHERE account_id = :account_id AND credited_nusd > 0) AS has_paid",
        account_id=account_id,
    )
    assert found is not None
    return bool(found["has_paid"])


async def refuse_too_many(session: AsyncSession, account_id: uuid.UUID, caps: Caps) -> None:
    """Raises RateLimitExceeded when the account has as many top-ups as it may, with the seconds until one more may be made."""
    is_known = await has_paid(session, account_id)
    waiting, per_hour = (caps.paid, caps.paid) if is_known else (caps.waiting, caps.per_hour)
    await _refuse(
        session, account_id, waiting, _WAITS, "expires_at - now()",
        f"{waiting} top-ups of this account wait to be paid; pay one of them, or wait until one expires",
    )  # fmt: skip
    await _refuse(
        session, account_id, per_hour, "created_at > now() - interval '1 hour'", "created_at + interval '1 hour' - now()",
        f"This account made {per_hour} top-ups within an hour; use one of them, or wait",
    )  # fmt: skip


async def _refuse(session: AsyncSession, account_id: uuid.UUID, most: int, which: str, left: str, message: str) -> None:
    """Refuse when `most` of them are there already: the wait ends when so many are gone that one more fits."""
    # No invoice can be paid in time for longer than a day, so the newest of the index are enough.
    full = await row(
        session,
        f"""SELECT ceil(extract(epoch FROM {left}))::int AS seconds FROM topup
            WHERE account_id = :account_id AND created_at > now() - interval '1 day' AND {which}
            ORDER BY {left} DESC OFFSET :most - 1 LIMIT 1""",
        account_id=account_id, most=most,
    )  # fmt: skip
    if full is not None:
        raise RateLimitExceeded(message, retry_after_seconds=max(1, full["seconds"]))
