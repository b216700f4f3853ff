"""Video jobs on disk: what each owes and to whom, so that it is finished, paid or given back, whoever dies meanwhile.

A job is a file that is replaced whole and flushed before anything depends on it. Who works on one holds its lock, which
dies with its process.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

_ID: Final = re.compile(r"gen_[0-9a-f]{32}", re.ASCII)


class State(StrEnum):
    """How far a job is. What is left to do is told by it alone."""

    ASKING = "asking"
    """Money is held, and the upstream may or may not have been asked."""
    MADE = "made"
    """The upstream has it."""
    STORED = "stored"
    """The film is here, and yet to be charged."""
    FAILING = "failing"
    """It failed, and what is held is yet to be given back."""
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        return self in (State.COMPLETED, State.FAILED)


class Job(msgspec.Struct, kw_only=True):
    """One film: its money, its upstream, and how far it is. Times are Unix seconds; amounts are USD as text."""

    id: str
    model: str
    account_id: str
    key_sha256: str
    request_id: str
    hold_id: str
    held_until: float
    estimated_cost_usd: str
    created: int
    upstream: str
    upstream_model: str
    provider: str | None = None
    seconds: float
    attributes: dict[str, str]
    state: State = State.ASKING
    prompt_sha256: str = ""
    upstream_id: str | None = None
    asked_at: float = 0
    """When the upstream was asked for it last."""
    lost: int = 0
    """How often in a row the upstream did not know it."""
    progress: int = 0
    error: dict[str, str] | None = None
    may_have_run: bool = False
    """It failed here, and its upstream may have made it all the same."""
    cost_usd: str | None = None
    ended: float = 0


class Busy(Exception):
    """Somebody else is working on it."""


class JobStore:
    """The jobs, a file each; those that are over lie apart, so that nobody reads them to find the others."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._over = folder, folder / "over"
        self._over.mkdir(parents=True, exist_ok=True, mode=0o700)

    def save(self, job: Job) -> None:
        """On disk when this returns."""
        folder = self._over if job.state.is_over else self.folder
        written = folder / f"{job.id}.{os.getpid()}.new"
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(job))
            file.flush()
            os.fsync(file.fileno())
        written.replace(folder / f"{job.id}.json")
        _flush(folder)
        if job.state.is_over:
            for end in ("json", "lock"):
                (self.folder / f"{job.id}.{end}").unlink(missing_ok=True)

    def find(self, id: str) -> Job | None:
        if not _ID.fullmatch(id):
            return None
        for folder in (self._over, self.folder, self._over):  # one that ends just now lies in the last
            with contextlib.suppress(FileNotFoundError):
                return msgspec.json.decode((folder / f"{id}.json").read_bytes(), type=Job)
        return None

    def open_jobs(self) -> list[Job]:
        """Those that are not over. What cannot be read is left where it is, for the operator."""
        return self._in(self.folder)

    def all_jobs(self) -> list[Job]:
        return self._in(self.folder) + self._in(self._over)

    def sweep(self, before: float) -> None:
        """Forget jobs that ended before then."""
        for job in self._in(self._over):
            if job.ended < before:
                (self._over / f"{job.id}.json").unlink(missing_ok=True)

    def _in(self, folder: Path) -> list[Job]:
        found = []
        for path in sorted(folder.glob("gen_*.json")):
            with contextlib.suppress(msgspec.DecodeError, FileNotFoundError):
                found.append(msgspec.json.decode(path.read_bytes(), type=Job))
        return found

    @contextlib.contextmanager
    def working_on(self, id: str, new: Job | None = None) -> Iterator[Job]:
        """The job as it stands now, or a new one that is written down, nobody else's to change until the block ends.

        Raises Busy, and KeyError for one that is over.
        """
        lock = os.open(self.folder / f"{id}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy from None
            if new is not None:
                self.save(new)
            job = new or self.find(id)
            if job is None or job.state.is_over:
                (self.folder / f"{id}.lock").unlink(missing_ok=True)
                raise KeyError(id)
            yield job
        finally:
            os.close(lock)


def _flush(folder: Path) -> None:
    """So that a name that was given in it is there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
