"""What the doctor says: a line about each thing that was looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """FAULT: something does not work, or money is at risk. WARNING: it works, and somebody should look."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Line:
    """`about` is a stable name such as `backend.permissions`, `found` a sentence, `help` what would help, if anything."""

    about: str
    level: Level
    found: str
    help: str = ""

    def __str__(self) -> str:
        return f"{self.level.value:<8} {self.about:<22} {self.found}" + (f": {self.help}" if self.help else "")


def ok(about: str, found: str) -> Line:
    return Line(about, Level.OK, found)


def warning(about: str, found: str, help: str = "") -> Line:
    return Line(about, Level.WARNING, found, help)


def fault(about: str, found: str, help: str = "") -> Line:
    return Line(about, Level.FAULT, found, help)


def exit_code(lines: Sequence[Line]) -> int:
    """0 where all is well, 1 with warnings, 2 with a fault."""
    levels = {line.level for line in lines}
    return 2 if Level.FAULT in levels else 1 if Level.WARNING in levels else 0


def duration(seconds: float) -> str:
    """As people say it, of one unit: `40 seconds`, `3 hours`, `12 days`."""
    for name, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}s"
    return f"{seconds:.0f} seconds"
