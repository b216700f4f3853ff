"""What became of offers, counted for monitoring by result."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal, TypeAlias

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

Result: TypeAlias = Literal[
    "minted", "shown_again", "no_use", "too_many", "resting", "too_slow", "failed", "proven", "pending", "consumed", "used_before",
    "opened",
]  # fmt: skip


class Outcomes(Collector):
    """Counts by result; no label tells whose."""

    def __init__(self) -> None:
        self._counts: Counter[Result] = Counter()

    def count(self, result: Result) -> None:
        self._counts[result] += 1

    def collect(self) -> Iterator[Metric]:
        told = CounterMetricFamily("satmeter_offers", "Offers in refusals, and proofs of payment", labels=["result"])
        for result, count in self._counts.items():
            told.add_metric([result], count)
        yield told


outcomes = Outcomes()
REGISTRY.register(outcomes)
