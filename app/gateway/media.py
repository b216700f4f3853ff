"""Media that calls made: kept on disk for some days, and shown to whoever has the signed URL, and to nobody else.

A folder a generation, a file a picture; the folder's time is that of its making. A URL is signed with a key of ours and
ends when the file does. There is no listing, and nothing of what is shown can run in a browser.
"""

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from app.gateway.errors import Refusal

_ID: Final = re.compile(r"gen_[0-9a-f]{32}", re.ASCII)
_RANGE: Final = re.compile(r"bytes=(\d{0,15})-(\d{0,15})", re.ASCII)
_KEY_BYTES: Final = 32
_CHUNK_BYTES: Final = 256 * 1024
_SECONDS_A_DAY: Final = 86_400
TYPES: Final = {
    "png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "gif": "image/gif", "mp4": "video/mp4", "webm": "video/webm",
    "bin": "application/octet-stream",
}  # fmt: skip
"""What is kept, by how its file's name ends. Nothing that a browser would run: a picture in SVG is no picture here."""
_MAGIC: Final = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"), (re.compile(rb"\xff\xd8\xff"), "jpg"), (re.compile(rb"RIFF....WEBP", re.S), "webp"),
    (re.compile(rb"GIF8[79]a"), "gif"), (re.compile(rb"....ftyp", re.S), "mp4"), (re.compile(rb"\x1a\x45\xdf\xa3"), "webm"),
)  # fmt: skip
_SAFE: Final = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "sandbox; default-src 'none'",
    "cross-origin-resource-policy": "cross-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "private, max-age=3600",
    "accept-ranges": "bytes",
}


class BadSignature(Refusal):
    """This URL is not signed by us, or its time is over."""

    status, code, type = 403, "invalid_signature", "permission_error"


class RangeRefused(Refusal):
    """There is no such range of bytes in this file."""

    status, code, type = 416, "range_not_satisfiable", "invalid_request_error"


def kind_of(head: bytes) -> str:
    """What a file is, by its first bytes: how its name ends here."""
    return next((kind for magic, kind in _MAGIC if magic.match(head)), "bin")


def new_generation() -> str:
    """An id that nobody guesses."""
    return f"gen_{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that is kept, as its caller is told of it."""

    url: str
    content_type: str
    path: Path


class MediaStore:
    """The files, and the key that signs their URLs. `days` is how long they are kept."""

    def __init__(self, folder: Path, public_url: str, days: int) -> None:
        self.folder, self._public_url, self._days = folder, public_url.rstrip("/"), days
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._key = _key_in(folder / "signing.key")

    def place(self, generation: str, n: int) -> "Placing":
        """Where a new file is written: `write` its bytes, then `keep` it."""
        folder = self.folder / generation
        folder.mkdir(exist_ok=True, mode=0o700)
        return Placing(folder, n)

    def shown(self, generation: str, n: int, now: float | None = None) -> Kept | None:
        """A kept file under a URL that ends when the file does. None if there is none."""
        found = self._find(generation, n)
        if found is None:
            return None
        expires = int(found.stat().st_mtime) + self._days * _SECONDS_A_DAY
        if expires <= (time.time() if now is None else now):
            return None
        signed = f"sig={self._signature(generation, n, expires)}&exp={expires}"
        return Kept(f"{self._public_url}/v1/media/{generation}/{n}?{signed}", TYPES[found.suffix[1:]], found)

    def opened(self, generation: str, n: str, sig: str, exp: str, now: float) -> "Shown":
        """The file that a signed URL names. Raises BadSignature for any other."""
        is_read = (
            _ID.fullmatch(generation) and re.fullmatch(r"\d{1,3}", n, re.A) and re.fullmatch(r"\d{1,12}", exp, re.A)
        )
        if not is_read:
            raise BadSignature
        is_ours = hmac.compare_digest(sig.encode(), self._signature(generation, int(n), int(exp)).encode())
        found = self._find(generation, int(n))
        if not is_ours or int(exp) <= now or found is None:
            raise BadSignature
        return Shown(found.open("rb"), found.stat().st_size, TYPES[found.suffix[1:]])

    def sweep(self, now: float) -> int:
        """Forget what is older than its days. Returns how many generations that were."""
        old = [each for each in self._generations() if each.stat().st_mtime < now - self._days * _SECONDS_A_DAY]
        for each in old:
            shutil.rmtree(each, ignore_errors=True)
        return len(old)

    def _generations(self) -> Iterator[Path]:
        return (each for each in self.folder.iterdir() if each.is_dir() and _ID.fullmatch(each.name))

    def _find(self, generation: str, n: int) -> Path | None:
        return next((path for path in (self.folder / generation).glob(f"{n}.*") if path.suffix[1:] in TYPES), None)

    def _signature(self, generation: str, n: int, expires: int) -> str:
        return hmac.new(self._key, f"{generation}/{n}:{expires}".encode(), hashlib.sha256).hexdigest()


class Placing:
    """A file on its way: nobody sees it before it is whole."""

    def __init__(self, folder: Path, n: int) -> None:
        self._folder, self._n = folder, n
        self._written = folder / f"{n}.{secrets.token_hex(4)}.new"
        self._file: BinaryIO = self._written.open("xb")
        self._head = b""

    def write(self, chunk: bytes) -> None:
        if len(self._head) < 16:
            self._head += chunk[:16]
        self._file.write(chunk)

    def keep(self) -> None:
        """Put it in its place, on disk, under what its own first bytes say that it is."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._written.replace(self._folder / f"{self._n}.{kind_of(self._head)}")

    def drop(self) -> None:
        """Forget it, unless it was kept."""
        self._file.close()
        self._written.unlink(missing_ok=True)


@dataclass(slots=True)
class Shown:
    """A file that may be shown, open."""

    file: BinaryIO
    size: int
    content_type: str

    def part(self, wanted: str | None) -> tuple[int, dict[str, str], int, int]:
        """Status, headers, and which bytes: the whole, or the one range that was asked for.

        Raises RangeRefused. Several ranges, or what is none, is the whole, as RFC 9110 allows.
        """
        headers = {"content-type": self.content_type, **_SAFE}
        found = _RANGE.fullmatch(wanted.strip()) if wanted else None
        if found is None or not (found[1] or found[2]):
            return 200, headers | {"content-length": str(self.size)}, 0, self.size
        start, end = self._bounds(found[1], found[2])
        if start >= end:
            raise RangeRefused(headers={"content-range": f"bytes */{self.size}"})
        headers |= {"content-range": f"bytes {start}-{end - 1}/{self.size}", "content-length": str(end - start)}
        return 206, headers, start, end

    def _bounds(self, first: str, last: str) -> tuple[int, int]:
        if not first:
            return max(0, self.size - int(last)), self.size
        return int(first), min(int(last) + 1, self.size) if last else self.size

    async def chunks(self, start: int, end: int) -> AsyncIterator[bytes]:
        self.file.seek(start)
        while start < end:
            chunk = await asyncio.to_thread(self.file.read, min(_CHUNK_BYTES, end - start))
            if not chunk:
                return
            start += len(chunk)
            yield chunk


def _key_in(path: Path) -> bytes:
    """The signing key, made on first use; readable by its owner alone."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_key(path)
    with os.fdopen(descriptor, "wb") as file:
        key = secrets.token_bytes(_KEY_BYTES)
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return key


def _read_key(path: Path) -> bytes:
    """Another process may be writing it just now."""
    for _ in range(100):
        if len(key := path.read_bytes()) == _KEY_BYTES:
            return key
        time.sleep(0.01)
    raise ValueError(f"{path} is not a key of ours; remove it, and the URLs signed with it end")
