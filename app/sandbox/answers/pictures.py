"""Pictures: real PNGs of one colour and its shades, small however large they are."""

import struct
import zlib
from typing import Final

from .words import digest_of

_SAYS: Final = b"Comment\0Made by the Satmeter sandbox; no model drew this"
_MOST_PIXELS: Final = 4096


def png(seed: str, width: int, height: int) -> bytes:
    """A gradient whose colour comes of the words."""
    digest = bytes.fromhex(digest_of(seed))
    palette = bytes(channel * shade // 255 for shade in range(256) for channel in digest[:3])
    rows = b"".join(b"\0" + bytes([255 * row // height]) * width for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"tEXt", _SAYS),
        (b"PLTE", palette),
        (b"IDAT", zlib.compress(rows, 1)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def size_of(text: str | None) -> tuple[int, int]:
    """`1024x1536` as numbers; a square where it is not said, `auto`, or a ratio."""
    width, _, height = (text or "").partition("x")
    if width.isascii() and height.isascii() and width.isdigit() and height.isdigit():
        return min(int(width), _MOST_PIXELS) or 1, min(int(height), _MOST_PIXELS) or 1
    return 1024, 1024


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
