"""How far a long command is: a bar on a terminal, plain lines now and then anywhere else; on stderr, beside the answer."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Final, TypeAlias

from rich.console import Console
from rich.progress import Progress

LINE_EVERY_SECONDS: Final = 5.0
Told: TypeAlias = Callable[[int, int | None], None]
"""Told how much is done, and of how much, if that is known."""


def nobody(done: int, of: int | None) -> None:
    """Nobody watches."""


@contextmanager
def shown(
    what: str, unit: str, stream: IO[str] | None = None, now: Callable[[], float] = time.monotonic
) -> Iterator[Told]:
    """Show it while the block runs. `unit` is what is counted, such as `checks`."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _bar(what, unit, stream) as told:
            yield told
    else:
        yield _Lines(what, unit, stream, now)


@contextmanager
def _bar(what: str, unit: str, stream: IO[str]) -> Iterator[Told]:
    with Progress(console=Console(file=stream), transient=True) as progress:
        bar = progress.add_task(f"{what}, {unit}", total=None)
        yield lambda done, of: progress.update(bar, completed=done, total=of)


class _Lines:
    """A line for the first, one every few seconds, and one for the last."""

    def __init__(self, what: str, unit: str, stream: IO[str], now: Callable[[], float]) -> None:
        self._what, self._unit, self._stream, self._now = what, unit, stream, now
        self._again_at = 0.0
        self._last = ""

    def __call__(self, done: int, of: int | None) -> None:
        line = f"{self._what}: {done}{f' of {of}' if of is not None else ''} {self._unit}"
        if line == self._last or (self._last and self._now() < self._again_at and done != of):
            return
        self._last, self._again_at = line, self._now() + LINE_EVERY_SECONDS
        print(line, file=self._stream, flush=True)
