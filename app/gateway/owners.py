"""Whose each response is that an upstream keeps, so that nobody is shown another's."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from app.gateway.errors import NothingThere

_KEPT_SECONDS: Final = 30 * 86_400
"""For so long OpenAI keeps a response. Source: OpenAI API reference, "Create a model response", store."""


class Answered(msgspec.Struct, frozen=True):
    """Whose a response is, and which upstream has it."""

    id: str
    account_id: str
    upstream: str
    at: float


class Owners:
    """Whose each response is: in memory, and in a file of lines that outlives the process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / "responses.jsonl"
        since = time.time() - _KEPT_SECONDS
        self._known = {each.id: each for each in self._read() if each.at > since}
        self._rewrite()

    def note(self, id: str, account_id: str, upstream: str) -> None:
        made = self._known[id] = Answered(id, account_id, upstream, time.time())
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(made) + b"\n")

    def of(self, id: str, account_id: str) -> Answered:
        """Raises NothingThere, also for what is somebody else's."""
        found = self._known.get(id)
        if found is None or found.account_id != account_id:
            raise NothingThere(f"There is no response {id[:100]!r}")
        return found

    def _read(self) -> Iterator[Answered]:
        for line in self._path.read_bytes().split(b"\n") if self._path.exists() else ():
            try:
                yield msgspec.json.decode(line, type=Answered)
            except msgspec.DecodeError:
                continue  # the last line of a crash

    def _rewrite(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in self._known.values()))
        partial.replace(self._path)
