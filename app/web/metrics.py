"""Requests counted: how many were answered how, and how fast; and one log line for each."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from litestar.types import Scope
from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from app.kernel.logs import tell_of_request

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""What is counted by its own name; callers may invent others, and each would be a new time series."""

_BOUNDS_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def account_for(scope: Scope, status: int, seconds: float) -> None:
    """One request's place in the metrics, and its log line."""
    route, method = scope.get("path_template") or "unmatched", str(scope.get("method", ""))
    method = method if method in _METHODS else "other"
    _answered.count(method, route, status, seconds)
    state = scope["state"]
    tell_of_request(
        state.get("request_id"), method, route, status, round(seconds * 1000, 2), state.get("error_code"), state.get("trace_id")
    )  # fmt: skip


@dataclass(slots=True)
class _Tally:
    """What was answered alike: in how many seconds altogether, and how often within each bound and beyond the last."""

    seconds: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS_SECONDS) + 1))


class Answered(Collector):
    """Requests answered, and how fast: counted as they come, and put into the library's terms when it asks.

    Its own counters, made for threads, take seven times as long.
    """

    def __init__(self) -> None:
        self._tallies: defaultdict[tuple[str, str, int], _Tally] = defaultdict(_Tally)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        tally = self._tallies[method, route, status]
        tally.seconds += seconds
        tally.within[bisect_left(_BOUNDS_SECONDS, seconds)] += 1

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("satmeter_requests", "Requests answered", labels=["method", "route", "status"])
        of_route: defaultdict[str, _Tally] = defaultdict(_Tally)
        for (method, route, status), tally in self._tallies.items():
            requests.add_metric([method, route, str(status)], sum(tally.within))
            total = of_route[route]
            total.seconds += tally.seconds
            total.within = [before + more for before, more in zip(total.within, tally.within, strict=True)]
        seconds = HistogramMetricFamily("satmeter_request_seconds", "Time to answer", labels=["route"])
        bounds = [*map(str, _BOUNDS_SECONDS), "+Inf"]
        for route, total in of_route.items():
            up_to = zip(bounds, accumulate(total.within), strict=True)
            seconds.add_metric([route], list(up_to), sum_value=total.seconds)
        yield requests
        yield seconds


_answered = Answered()
REGISTRY.register(_answered)
