"""What the offline upstream answered, call by call: kept to be read, and in a file where it must outlive the process."""

import os
import time
from collections import deque
from pathlib import Path
from typing import Final

import msgspec

from .ids import new_id
from .orders import Order
from .wire import Call, Row, key_digest

_KEPT: Final = 50_000
_KEPT_BODY_BYTES: Final = 16 * 1024


class Diary:
    """The rows of all calls, oldest first. In the file a call has a line when it begins and one when it has ended."""

    def __init__(self, folder: Path | None) -> None:
        self.rows: deque[Row] = deque(maxlen=_KEPT)
        self._next = 1
        self._file: int | None = None
        if folder is not None:
            self._open(folder)

    def _open(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "models.jsonl"
        for row in read_rows(path):
            if row.outcome == "running":
                row.outcome = "killed"
            self.rows.append(row)
            self._next = row.n + 1
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def begin(self, call: Call, order: Order) -> Row:
        """Note a call as it is taken on."""
        row = Row(
            n=self._next, at=time.time(), method=call.method, path=call.path, request_id=new_id("req_"),
            model=call.model, order=order, key_sha256=key_digest(call.key), header_names=sorted(call.headers),
            bytes_in=call.size, asked=call.fields if call.uploads or call.size <= _KEPT_BODY_BYTES else None,
        )  # fmt: skip
        self._next += 1
        self.rows.append(row)
        return row

    def write(self, row: Row) -> None:
        """Keep a row as it now stands, where there is a file."""
        if self._file is not None:
            os.write(self._file, msgspec.json.encode(row) + b"\n")

    def since(self, n: int) -> list[Row]:
        return [row for row in self.rows if row.n > n]

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_rows(path: Path) -> list[Row]:
    """The rows of a diary's file, each as it stood last; a line that a kill cut short is left out."""
    latest: dict[int, Row] = {}
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        row = msgspec.json.decode(line, type=Row)
        latest[row.n] = row
    return list(latest.values())
