"""How fast an account spends, and how long its balance lasts at that."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import row
from app.ledger.statement import Balance

FULL_DAYS = 7
_DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Runway:
    """Nano-USD a day, rounded up, and tenths of days, rounded down; None where nothing was spent lately.

    `is_low` is None where the account has no mark below which its balance would be low: its owner's own, else its wallet's threshold.
    """

    burn_nusd_per_day: int | None
    tenths_of_days: int | None
    is_low: bool | None


def runway(spent_nusd: int, seconds: int, spendable_nusd: int) -> tuple[int | None, int | None]:
    """The burn rate, and how long `spendable_nusd` lasts, when `spent_nusd` went in so many seconds.

    Less than a day of spending is taken for a day's: the first call of an account foretells nothing.
    """
    if spent_nusd <= 0:
        return None, None
    seconds = max(seconds, _DAY_SECONDS)
    burn = -(-spent_nusd * _DAY_SECONDS // seconds)
    return burn, max(0, spendable_nusd) * 10 * seconds // (spent_nusd * _DAY_SECONDS)


async def read_runway(session: AsyncSession, account_id: uuid.UUID, found: Balance, now: datetime) -> Runway:
    """From what was spent in the last 7 full UTC days and today, less refunds; less time for a younger account.

    What its keys ever spent, less what the rollups have of the days before, is what they spent since: no call needs to
    be looked at, however many there were today.
    """
    first = datetime(now.year, now.month, now.day, tzinfo=UTC) - timedelta(days=FULL_DAYS)
    figures = await row(
        session,
        """SELECT a.created_at, coalesce(a.low_balance_nusd, a.low_nusd) AS low_nusd,
                  (SELECT coalesce(sum(lifetime_nusd), 0)::bigint FROM api_key WHERE account_id = :id)
                  - (SELECT coalesce(sum(cost_nusd - refunded_nusd), 0)::bigint FROM usage_day
                     WHERE account_id = :id AND day < :first_day) AS spent_nusd
           FROM account a WHERE a.id = :id""",
        id=account_id, first_day=first.date(),
    )  # fmt: skip
    assert figures is not None
    seconds = int((now - max(first, figures["created_at"])).total_seconds())
    burn, tenths = runway(figures["spent_nusd"], seconds, found.posted_nusd - found.floor_nusd)
    low_nusd = figures["low_nusd"]
    return Runway(burn, tenths, None if low_nusd is None else found.posted_nusd < low_nusd)
