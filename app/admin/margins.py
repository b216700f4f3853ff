"""What is left of each model's calls: what customers paid, what the providers asked, and the difference."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.calendar import first_id
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


async def margins(session: AsyncSession, now: datetime, hours: int = 24) -> list[Margin]:
    """By model, of the last hours; what brought most first. A proxy tells `provider_cost_usd` with its settle."""
    found = await rows(
        session,
        """SELECT coalesce(model, '') AS model, count(*) AS calls, sum(cost_nusd)::bigint AS charged_nusd,
                  count(provider_cost_nusd) AS known_calls,
                  coalesce(sum(cost_nusd) FILTER (WHERE provider_cost_nusd IS NOT NULL), 0)::bigint AS known_nusd,
                  coalesce(sum(provider_cost_nusd), 0)::bigint AS provider_nusd
           FROM usage WHERE id >= :since GROUP BY 1 ORDER BY 3 DESC, 1 LIMIT 200""",
        since=first_id(now - timedelta(hours=hours)),
    )
    return [Margin(**each) for each in found]
