"""What each process of one `run` counts, told by whichever of them is asked.

Every process writes its counters into a folder of the run's every two seconds. Whoever is asked tells its own as they are
and the others' as they were written, each with a label `process`: nothing is added up here, because a sum falls when one
of them begins anew, and a counter that falls is taken for one that began at 0. Alone, a process tells its own without it.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector

FOLDER: Final = "SATMETER_COUNTERS"
NAME: Final = "SATMETER_PROCESS"
"""Environment variables from a parent to its children, and nobody's settings."""
_EVERY_SECONDS: Final = 2.0
_Sample = tuple[str, dict[str, str], float]


class _Told(msgspec.Struct, array_like=True):
    """A metric as one process told it."""

    name: str
    words: str
    kind: str
    samples: list[_Sample]


_decode: Final = msgspec.json.Decoder(list[_Told]).decode


class Processes:
    """This process's counters beside those of its siblings. `folder` None: it has none."""

    def __init__(self, folder: Path | None, name: str, registry: Any = REGISTRY) -> None:
        self._folder, self._name, self._registry = folder, name, registry

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> "Processes":
        """As the parent has told us."""
        folder = environ.get(FOLDER)
        return cls(Path(folder) if folder else None, environ.get(NAME, "http"))

    def collect(self) -> Iterator[Metric]:
        """Everything that is counted, ours first."""
        if self._folder is None:
            yield from self._registry.collect()
            return
        merged: dict[str, Metric] = {}
        for process, told in ((self._name, self._own()), *self._siblings()):
            for each in told:
                metric = merged.setdefault(each.name, Metric(each.name, each.words, each.kind))
                for name, labels, value in each.samples:
                    metric.add_sample(name, {**labels, "process": process}, value)
        yield from merged.values()

    def write(self) -> None:
        """Let our siblings know. A folder that is gone is the run's end, and no trouble of ours."""
        if self._folder is None:
            return
        partial = self._folder / f"{self._name}.{os.getpid()}"
        with contextlib.suppress(OSError):
            partial.write_bytes(msgspec.json.encode(self._own()))
            partial.replace(self._folder / f"{self._name}.json")

    @contextlib.asynccontextmanager
    async def written(self) -> AsyncIterator[None]:
        """Written again and again while the block runs."""

        async def write() -> None:
            while True:
                self.write()
                await asyncio.sleep(_EVERY_SECONDS)

        task = asyncio.create_task(write()) if self._folder is not None else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()

    def _own(self) -> list[_Told]:
        return [
            _Told(
                metric.name,
                metric.documentation,
                metric.type,
                [(s.name, dict(s.labels), float(s.value)) for s in metric.samples],
            )
            for metric in self._registry.collect()
        ]

    def _siblings(self) -> Iterable[tuple[str, list[_Told]]]:
        assert self._folder is not None
        for path in sorted(self._folder.glob("*.json")):
            if path.stem != self._name:
                with contextlib.suppress(OSError, msgspec.MsgspecError):
                    yield path.stem, _decode(path.read_bytes())


class Joined(Collector):
    """Several sources of metrics as one."""

    def __init__(self, *sources: Iterable[Metric]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            yield from source
