"""A circuit breaker: when a backend keeps failing, stop asking it for a moment, then let one question through."""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import Final
from weakref import WeakSet

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from app.topups.gateway import GatewayBusy, GatewayUnavailable


class Breaker:
    """Opens after `after` failures in a row within `window_seconds`; closed again by the first answer.

    While open, questions fail at once. After `cooldown_seconds` one probe goes through and the others
    still fail at once: an answer closes the breaker, another failure starts the next cool-down.
    """

    def __init__(
        self,
        backend: str,
        *,
        after: int,
        window_seconds: float,
        cooldown_seconds: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._backend = backend
        self._window_seconds = window_seconds
        self._cooldown_seconds = cooldown_seconds
        self._monotonic = monotonic
        self._failed_at: deque[float] = deque(maxlen=after)
        self._open_until: float | None = None
        self._is_probing = False
        breakers.watch(self)

    @property
    def backend(self) -> str:
        return self._backend

    @property
    def is_open(self) -> bool:
        """Whether the backend is given a rest: also while a probe is under way."""
        return self._open_until is not None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Guard one question: GatewayUnavailable inside counts as a failure, a normal end as an answer.

        Anything else, such as our own queue or our caller's cancellation, says nothing about the backend.
        Raises GatewayUnavailable without running the body while open.
        """
        is_probe = self._admit()
        try:
            yield
            self._answered()
        except GatewayBusy:
            raise
        except GatewayUnavailable:
            self._failed(is_probe)
            raise
        finally:
            if is_probe:
                self._is_probing = False

    def _admit(self) -> bool:
        """Let the question pass and say whether it is the probe, or raise GatewayUnavailable."""
        if self._open_until is None:
            return False
        wait_seconds = self._open_until - self._monotonic()
        if wait_seconds > 0 or self._is_probing:
            raise GatewayUnavailable(f"{self._backend} is not answering; retry in {max(1, ceil(wait_seconds))} s")
        self._is_probing = True
        return True

    def _answered(self) -> None:
        self._failed_at.clear()
        self._open_until = None

    def _failed(self, is_probe: bool) -> None:
        now = self._monotonic()
        self._failed_at.append(now)
        is_full = len(self._failed_at) == self._failed_at.maxlen
        # A question that was under way when the breaker opened must not prolong the cool-down: only a probe may.
        if is_probe or (self._open_until is None and is_full and now - self._failed_at[0] <= self._window_seconds):
            if self._open_until is None:
                breakers.count_opened(self._backend)
            self._open_until = now + self._cooldown_seconds


class Breakers(Collector):
    """Which breakers of this process are open, by backend, and how often each opened."""

    def __init__(self) -> None:
        self._living: WeakSet[Breaker] = WeakSet()
        self._opened: Counter[str] = Counter()

    def watch(self, breaker: Breaker) -> None:
        self._living.add(breaker)

    def count_opened(self, backend: str) -> None:
        self._opened[backend] += 1

    def collect(self) -> Iterator[Metric]:
        is_open = GaugeMetricFamily(
            "satmeter_breaker_open", "1 while a backend is given a rest because it kept failing", labels=["backend"]
        )
        opened = CounterMetricFamily("satmeter_breaker_opened", "How often that began", labels=["backend"])
        for backend in sorted({breaker.backend for breaker in self._living}):
            is_open.add_metric([backend], any(each.is_open for each in self._living if each.backend == backend))
            opened.add_metric([backend], self._opened[backend])
        yield is_open
        yield opened


breakers: Final = Breakers()
REGISTRY.register(breakers)
