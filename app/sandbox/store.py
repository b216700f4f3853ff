"""What the sandbox remembers between runs: one small JSON file per record, readable by its owner alone."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")


class Store:
    """Records by kind and id under one folder. Files are replaced whole, so a reader never sees half a record.

    Nothing is fsynced: a power cut may lose the last seconds of a sandbox.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, kind: str, id: str, record: object) -> None:
        """Write or overwrite a record."""
        path = self._path(kind, id)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        written = path.with_suffix(".new")
        _write_private(written, msgspec.json.encode(record), os.O_TRUNC)
        written.replace(path)

    def remove(self, kind: str, id: str) -> None:
        """Forget a record; one that is not there is forgotten already."""
        self._path(kind, id).unlink(missing_ok=True)

    def get(self, kind: str, id: str, type: type[T]) -> T | None:
        """One record, None if there is none."""
        path = self._path(kind, id)
        return msgspec.json.decode(path.read_bytes(), type=type) if path.exists() else None

    def every(self, kind: str, type: type[T]) -> Iterator[T]:
        """All records of a kind, in no promised order."""
        for path in (self.folder / kind).glob("*.json"):
            yield msgspec.json.decode(path.read_bytes(), type=type)

    def append(self, kind: str, id: str, record: object) -> None:
        """Add a line to a journal."""
        path = self._path(kind, id).with_suffix(".jsonl")
        path.parent.mkdir(exist_ok=True, mode=0o700)
        _write_private(path, msgspec.json.encode(record) + b"\n", os.O_APPEND)

    def journal(self, kind: str, id: str, type: type[T]) -> list[T]:
        """A journal's lines, oldest first; a last line cut short by a crash is left out."""
        path = self._path(kind, id).with_suffix(".jsonl")
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [msgspec.json.decode(line, type=type) for line in lines]

    def _path(self, kind: str, id: str) -> Path:
        # Ids are ours and short, but addresses are not always file names; whatever looks odd is named by its hash.
        name = id if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", id) else hashlib.sha256(id.encode()).hexdigest()
        return self.folder / kind / f"{name}.json"


def _write_private(path: Path, content: bytes, how: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
    with os.fdopen(descriptor, "ab" if how == os.O_APPEND else "wb") as file:
        file.write(content)
