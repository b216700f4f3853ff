"""What is left of each model's calls: what customers paid, what the providers asked, and the difference."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.summed import lines
from app.kernel.db import rows


@dataclass(frozen=True, slots=True)
class Margin:
    """The calls of a model, nano-USD. `known_nusd` is what was charged for those whose provider's cost was told."""

    model: str
    calls: int
    charged_nusd: int
    known_calls: int
    known_nusd: int
    provider_nusd: int

    @property
    def margin_nusd(self) -> int:
        """Of the calls whose provider's cost is known, and of no other."""
        return self.known_nusd - self.provider_nusd

    @property
    def permille(self) -> int | None:
        """The margin in thousandths of what was charged; None where nothing is known."""
        return self.margin_nusd * 1000 // self.known_nusd if self.known_nusd else None


async def margins(session: AsyncSession, now: datetime) -> list[Margin]:
    """By model, of today and yesterday, UTC; what brought most first. A proxy tells `provider_cost_usd` with its settle."""
    found = await rows(
        session,
        f"""SELECT model, sum(requests)::bigint AS calls, sum(cost_nusd)::bigint AS charged_nusd, sum(known_requests)::bigint AS known_calls,
                  sum(known_nusd)::bigint AS known_nusd, sum(provider_nusd)::bigint AS provider_nusd
           FROM ({lines("day >= :first", of_all=True)}) calls GROUP BY 1 ORDER BY 3 DESC, 1 LIMIT 200""",
        first=now.astimezone(UTC).date() - timedelta(days=1),
    )
    return [Margin(**each) for each in found]
