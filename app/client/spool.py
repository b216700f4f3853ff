"""What must survive our end: calls that were asked about or forwarded, what they used so far, and what Satmeter is yet to be told.

A folder, and in it one append-only file of JSON lines for each process, locked while that lives. A line is written to the
system at once, so that a killed process loses nothing, and fsync'd in groups (`sync_seconds`), so that a machine without
power loses no more than that. Whoever finds the file of a process that is gone takes it over: what had an outcome is told,
what had none is settled at its last capture, and what was never forwarded is given back. Lines that cannot be read (the last one of a crash) are passed by and counted.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from app.client.wire import Done, Hold, Refused, Usage

log = logging.getLogger("satmeter.client")

Verb = Literal["settle", "release", "charge", "refund"]
REFUSED_FILE: Final = "refused.jsonl"
_SUFFIX: Final = ".spool"
_REWRITTEN_FROM_BYTES: Final = 1024 * 1024


class Asked(msgspec.Struct, frozen=True, tag="asked", omit_defaults=True):
    """Satmeter is asked whether a call may be made, by the key that has this SHA-256: something may be held for it."""

    id: str
    key: str | None = None


class Begun(msgspec.Struct, frozen=True, tag="begun", omit_defaults=True):
    """A call was forwarded; `used` is what it costs whatever comes of it, None where that is not known."""

    id: str
    hold_id: str
    used: Usage | None = None


class Captured(msgspec.Struct, frozen=True, tag="captured"):
    """What the call has used so far."""

    id: str
    hold_id: str
    used: Usage


class Known(msgspec.Struct, frozen=True, tag="known"):
    """What a settle of the call says whatever was used: who serves it, and by which id."""

    id: str
    hold_id: str
    done: Done


class Owed(msgspec.Struct, frozen=True, tag="owed"):
    """What Satmeter is to be told of a call: the body of the verb."""

    id: str
    verb: Verb
    body: msgspec.Raw


class Told(msgspec.Struct, frozen=True, tag="told"):
    """Satmeter has answered."""

    id: str


class Kept(msgspec.Struct, frozen=True):
    """An item that Satmeter refused, with why: for the operator."""

    id: str
    verb: Verb
    body: msgspec.Raw
    status: int
    error: msgspec.Raw


Line = Asked | Begun | Captured | Known | Owed | Told
_LINES: Final = msgspec.json.Decoder(Line)


class SpoolFull(Exception):
    """No more calls can be kept: no new one may begin."""


class SpoolFile:
    """One process's file, locked by whoever holds this. In memory are the lines of calls that are not done."""

    def __init__(self, path: Path | None) -> None:
        """With `path` None nothing is kept on disk."""
        self.path, self._fd = path, -1
        self.live: dict[str, dict[type[Line], bytes]] = {}
        self.live_bytes = self.size = self.unreadable = 0
        self.is_dirty = self.is_broken = False
        self.rewritten_from_bytes = _REWRITTEN_FROM_BYTES
        self.written = asyncio.Event()
        self._tail: list[bytes] | None = None

    @classmethod
    def locked(cls, path: Path, *, is_new: bool) -> "SpoolFile | None":
        """The file, read; None where another process has it or removed it meanwhile."""
        made = cls(path)
        flags = os.O_CREAT | os.O_EXCL if is_new else 0
        try:
            made._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            # Of a new file nobody has more than a look, which is over in a moment.
            fcntl.flock(made._fd, fcntl.LOCK_EX if is_new else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino != os.fstat(made._fd).st_ino:
                raise FileNotFoundError(path)
        except (BlockingIOError, FileNotFoundError):
            os.close(made._fd)
            return None
        made._read(made._fd)
        _write_all(made._fd, b"\n")  # whatever is written next begins a line
        with contextlib.suppress(FileNotFoundError):
            path.with_suffix(".new").unlink()
        return made

    @classmethod
    def read_only(cls, fd: int) -> "SpoolFile":
        """What is in a file, for looking at it."""
        made = cls(None)
        made._read(fd)
        return made

    def append(self, line: Line) -> None:
        """Keep a line. That the disk does not take it is logged and remembered: what was used is told all the same."""
        encoded = msgspec.json.encode(line) + b"\n"
        self._remember(line, encoded)
        self.size += len(encoded)
        if self.path is None:
            return
        if self._tail is not None:
            self._tail.append(encoded)
        try:
            _write_all(self._fd, encoded)
        except OSError as error:
            self._failed(error)
        self.is_dirty = True
        self.written.set()

    def sync(self) -> None:
        """Bring to disk what was written; in a thread."""
        self.is_dirty = False
        try:
            if self.path is not None:
                os.fsync(self._fd)
        except OSError as error:
            self._failed(error)

    @property
    def wants_rewriting(self) -> bool:
        is_long = self.size > max(self.rewritten_from_bytes, 2 * self.live_bytes)
        return self.path is not None and (self.is_broken or is_long)

    async def rewrite(self) -> None:
        """Put what is not done into a new file in this one's place. Lines that come meanwhile go to both."""
        assert self.path is not None
        lines = b"".join(line for lines in self.live.values() for line in lines.values())
        self._tail = []
        beside = self.path.with_suffix(".new")
        try:
            fd = await asyncio.to_thread(_written, beside, lines)
            tail = b"".join(self._tail)
            _write_all(fd, tail)
            os.fsync(fd)
            os.rename(beside, self.path)
        except OSError as error:
            self._failed(error)
        else:
            os.close(self._fd)
            self._fd, self.size, self.is_broken = fd, len(lines) + len(tail), False
            _sync_folder(self.path.parent)
        finally:
            self._tail = None

    def close(self) -> None:
        """Give the file back. One that has nothing left to tell is removed."""
        if self.path is None or self._fd < 0:
            return
        if not self.live:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        else:
            self.sync()
        os.close(self._fd)
        self._fd = -1

    def _read(self, fd: int) -> None:
        with open(fd, "rb", closefd=False) as file:
            for raw in file:
                self.size += len(raw)
                try:
                    self._remember(_LINES.decode(raw), raw)
                except msgspec.DecodeError:
                    self.unreadable += bool(raw.strip())
        if self.unreadable:
            log.warning("satmeter.spool_lines_unreadable file=%s lines=%d", self.path, self.unreadable)

    def _remember(self, line: Line, encoded: bytes) -> None:
        if isinstance(line, Told):
            self.live_bytes -= sum(map(len, self.live.pop(line.id, {}).values()))
            return
        of_call = self.live.setdefault(line.id, {})
        self.live_bytes += len(encoded) - len(of_call.get(type(line), b""))
        of_call[type(line)] = encoded

    def _failed(self, error: OSError) -> None:
        self.is_broken = True
        log.error("satmeter.spool_not_written file=%s reason=%s", self.path, error)


class Spool:
    """The folder: our own file, and those of processes that are gone. With `folder` None nothing is kept on disk."""

    def __init__(self, folder: Path | None, *, max_bytes: int, sync_seconds: float = 0.02) -> None:
        self._folder, self._max_bytes, self._sync_seconds = folder, max_bytes, sync_seconds
        self._own = SpoolFile(None)
        self._is_closing = False
        self._syncing: asyncio.Task[None] | None = None

    def open(self) -> None:
        if self._folder is not None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            own = SpoolFile.locked(self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}{_SUFFIX}", is_new=True)
            assert own is not None, "nobody else has a name made a moment ago"
            own.rewritten_from_bytes = min(_REWRITTEN_FROM_BYTES, self._max_bytes // 2)
            self._own = own
            _sync_folder(self._folder)
            self._syncing = asyncio.create_task(self._sync())

    @property
    def own(self) -> SpoolFile:
        return self._own

    @property
    def has_room(self) -> bool:
        return (
            self._own.live_bytes < self._max_bytes and self._own.size < 2 * self._max_bytes and not self._own.is_broken
        )

    def append(self, line: Line) -> None:
        self._own.append(line)

    def of_the_gone(self) -> Iterator[SpoolFile]:
        """The files of processes that are gone, now ours. Read through, and close each when all of it is told."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")) if self._folder is not None else ():
            try:
                found = SpoolFile.locked(path, is_new=False) if path != self._own.path else None
            except OSError as error:  # another user's, or a disk that fails: the others are told all the same
                log.error("satmeter.spool_not_read file=%s reason=%s", path, error)
                continue
            if found is not None:
                yield found

    def refuse(self, owed: Owed, refused: Refused) -> None:
        """Keep what Satmeter does not take; it is on disk when this returns."""
        error = msgspec.Raw(msgspec.json.encode(refused.error))
        log.error(
            "satmeter.refused id=%s verb=%s status=%d code=%s",
            owed.id,
            owed.verb,
            refused.status,
            refused.error.get("code"),
        )
        if self._folder is not None:
            line = msgspec.json.encode(Kept(owed.id, owed.verb, owed.body, refused.status, error)) + b"\n"
            fd = os.open(self._folder / REFUSED_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                _write_all(fd, line)
                os.fsync(fd)
            finally:
                os.close(fd)

    async def close(self) -> None:
        self._is_closing = True
        self._own.written.set()
        if self._syncing is not None:
            await self._syncing
        self._own.close()

    async def _sync(self) -> None:
        """fsync what was written, together, as long as something is; and keep the file short."""
        while not self._is_closing:
            await self._own.written.wait()
            self._own.written.clear()
            if self._own.is_dirty:
                await asyncio.to_thread(self._own.sync)
            if self._own.wants_rewriting:
                await self._own.rewrite()
            await asyncio.sleep(self._sync_seconds)


def outcomes(file: SpoolFile) -> list[Owed]:
    """What a process that is gone had not told. A call without an outcome costs what was captured of it last, or what was
    sent; where not even that is known, what is held for it. One that was only asked about never ran."""
    return [_outcome({kind: _LINES.decode(line) for kind, line in lines.items()}) for lines in file.live.values()]


def _outcome(lines: Mapping[type[Line], Line]) -> Owed:
    owed, captured, known, begun = (lines.get(kind) for kind in (Owed, Captured, Known, Begun))
    if isinstance(owed, Owed):
        return owed
    last = captured or begun or known or lines[Asked]
    if isinstance(last, Asked):
        return giving_back(last.id, last.key, "whoever asked is gone")
    assert isinstance(last, Captured | Begun | Known), "there are no other kinds"
    used = None if isinstance(last, Known) else last.used
    return settling(Hold(last.id, last.hold_id), unfinished(used, known.done if isinstance(known, Known) else Done()))


def unfinished(used: Usage | None, known: Done) -> Done:
    """What is told of a call whose end nobody saw."""
    return msgspec.structs.replace(known, usage=used, outcome="partial", usage_estimated=True)


def giving_back(request_id: str, key: str | None, reason: str) -> Owed:
    """By the id that was asked with, since no answer told of a hold."""
    body = {"request_id": request_id, "api_key_hash": key, "reason": reason}
    return Owed(request_id, "release", msgspec.Raw(msgspec.json.encode(body)))


def settling(call: Hold, done: Done) -> Owed:
    return Owed(call.request_id, "settle", msgspec.Raw(msgspec.json.encode({"hold_id": call.hold_id} | done.body())))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _written(path: Path, data: bytes) -> int:
    """A new file that is locked and on disk."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _write_all(fd, data)
    os.fsync(fd)
    return fd


def _sync_folder(folder: Path) -> None:
    """A name in a folder is on disk when the folder is."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
