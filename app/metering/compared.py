"""What proxies said that calls cost, beside what the catalogue would have asked: a wrong price shows within the hour.

Both are kept with the call. The metrics count them by model, and the database is asked for any time that was.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import rows


@dataclass(slots=True)
class _Sums:
    told_nusd: int = 0
    catalogue_nusd: int = 0


class Compared(Collector):
    """Costs that were told and that the catalogue has a price for, summed by model, since this process began."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, _Sums] = defaultdict(_Sums)

    def count(self, model: str, told_nusd: int, catalogue_nusd: int) -> None:
        """`model` is a name of the catalogue's, of which there are not too many."""
        sums = self._sums[model]
        sums.told_nusd += told_nusd
        sums.catalogue_nusd += catalogue_nusd

    def collect(self) -> Iterator[Metric]:
        told = CounterMetricFamily(
            "satmeter_told_cost_nusd", "What proxies said calls cost, nano-USD", labels=["model"]
        )
        ours = CounterMetricFamily(
            "satmeter_catalogue_cost_nusd", "What the catalogue asks for the same calls, nano-USD", labels=["model"]
        )
        ratio = GaugeMetricFamily(
            "satmeter_told_to_catalogue_ratio", "Told cost by catalogue cost, both known; 1 is right", labels=["model"]
        )
        for model, sums in self._sums.items():
            told.add_metric([model], sums.told_nusd)
            ours.add_metric([model], sums.catalogue_nusd)
            if sums.catalogue_nusd:
                ratio.add_metric([model], sums.told_nusd / sums.catalogue_nusd)
        yield from (told, ours, ratio)


compared = Compared()
REGISTRY.register(compared)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The calls of a model whose cost was told and which the catalogue has a price for."""

    model: str
    calls: int
    told_nusd: int
    catalogue_nusd: int

    @property
    def permille(self) -> int | None:
        """Told cost in thousandths of the catalogue's; None where that asks nothing."""
        return self.told_nusd * 1000 // self.catalogue_nusd if self.catalogue_nusd else None


async def ratios(session: AsyncSession, hours: int = 24) -> list[Ratio]:
    """By model, of the last hours; the one that differs most first."""
    found = await rows(
        session,
        """SELECT lines->>'model' AS model, count(*) AS calls, sum(cost_nusd)::bigint AS told_nusd,
                  sum((lines->>'catalogue_nusd')::bigint)::bigint AS catalogue_nusd
           FROM usage WHERE created_at > now() - make_interval(hours => :hours) AND lines ? 'catalogue_nusd'
           GROUP BY 1 ORDER BY 1""",
        hours=hours,
    )
    by_model = [Ratio(each["model"], each["calls"], each["told_nusd"], each["catalogue_nusd"]) for each in found]
    return sorted(by_model, key=lambda ratio: -abs((ratio.permille or 0) - 1000))
