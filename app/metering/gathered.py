"""How many calls a batch decides together, and how long its first one waited for it: counted by who makes batches."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

_CALLS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 500)
_SECONDS: Final = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class _Counts:
    """How often within each bound and beyond the last, and the sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._within, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._within[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def told(self, name: str, words: str) -> Metric:
        bounds = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._within), strict=True))
        return HistogramMetricFamily(name, words, buckets=buckets, sum_value=self._sum)


class Gathered(Collector):
    """Counts batches as they go to the database."""

    def __init__(self) -> None:
        self._calls, self._waits = _Counts(_CALLS), _Counts(_SECONDS)

    def count(self, calls: int, waited_seconds: float) -> None:
        self._calls.add(calls)
        self._waits.add(waited_seconds)

    def collect(self) -> Iterator[Metric]:
        yield self._calls.told("satmeter_batch_calls", "Calls that were decided together")
        yield self._waits.told("satmeter_batch_wait_seconds", "How long a batch's first call waited for it to begin")


gathered = Gathered()
REGISTRY.register(gathered)
