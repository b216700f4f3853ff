"""What a spool has in it, for the operator: what is yet to be told, what was cut off, and what Satmeter refuses.

    python -m app.client report FOLDER [--json]

It reads only, and disturbs nobody: files of processes that live are read as they are.
"""

import contextlib
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from app.client.spool import REFUSED_FILE, Kept, Owed, SpoolFile


class FileReport(msgspec.Struct, frozen=True):
    """One process's file. `is_live`: that process has it; what `is_owed` of a live one is on its way."""

    file: str
    is_live: bool
    bytes: int
    calls: int
    """Forwarded, and not told of yet."""
    owed: int
    """Of them, those whose outcome is known."""
    unreadable_lines: int


class Report(msgspec.Struct, frozen=True):
    folder: str
    files: Sequence[FileReport]
    refused: Sequence[Kept]

    @property
    def is_clean(self) -> bool:
        """Whether nothing is left for anybody to do: what is of a process that lives is told by that."""
        return not self.refused and not any(file.calls and not file.is_live for file in self.files)


def report(folder: Path) -> Report:
    """Raises FileNotFoundError where there is no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    files = [found for path in sorted(folder.glob("*.spool")) if (found := _file(path)) is not None]
    return Report(str(folder), files, _refused(folder / REFUSED_FILE))


def as_text(found: Report) -> str:
    lines = [f"spool {found.folder}: {'clean' if found.is_clean else 'not clean'}"]
    for file in found.files:
        whose = "of a running process" if file.is_live else "left behind: the next process tells it"
        torn = f", {file.unreadable_lines} lines unreadable" if file.unreadable_lines else ""
        lines.append(
            f"  {file.file}: {file.calls} calls, {file.owed} of them ended, {file.bytes} bytes{torn} ({whose})"
        )
    for kept in found.refused:
        error: dict[str, Any] = msgspec.json.decode(kept.error)
        lines.append(f"  refused {kept.verb} {kept.id}: {kept.status} {error.get('code')}: {error.get('message')}")
        lines.append(f"    {bytes(kept.body).decode()}")
    return "\n".join(lines)


def _file(path: Path) -> FileReport | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # told meanwhile
        return None
    try:
        is_live = not _is_free(fd)
        file = SpoolFile.read_only(fd)
    finally:
        os.close(fd)
    owed = sum(Owed in lines for lines in file.live.values())
    return FileReport(path.name, is_live, file.size, len(file.live), owed, file.unreadable)


def _is_free(fd: int) -> bool:
    """Whether no process has the file. A shared lock, for a moment: it keeps nobody from anything but this moment."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        return True
    return False


def _refused(path: Path) -> list[Kept]:
    found = []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for raw in file:
            with contextlib.suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(raw, type=Kept))
    return found
