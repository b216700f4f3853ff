"""Recordings of silence: MP3, WAV and PCM as long as a text would take to say, and how long a recording is."""

import struct
from collections.abc import Iterator
from typing import Final

RATE: Final = 24_000
CHARACTERS_A_SECOND: Final = 15
_MP3_HEADER: Final = bytes.fromhex("fff344c4")
"""MPEG-2 layer III, 32 kbit/s, 24 kHz, mono: a frame is 96 bytes and 24 ms, and silent where the rest is zero."""
_MP3_FRAME: Final = _MP3_HEADER + bytes(92)
_MP3_FRAMES_A_SECOND = RATE / 576
_CHUNK: Final = 48 * 1024
_UNKNOWN_BYTES_A_SECOND: Final = 16_000
"""What a recording in another container is taken for: 128 kbit/s."""


def mp3(size: int) -> Iterator[bytes]:
    """At least so many bytes of frames."""
    frames = max(1, -(-size // len(_MP3_FRAME)))
    at_once = _CHUNK // len(_MP3_FRAME)
    while frames > 0:
        yield _MP3_FRAME * min(frames, at_once)
        frames -= at_once


def mp3_size(seconds: float) -> int:
    return max(1, round(seconds * _MP3_FRAMES_A_SECOND)) * len(_MP3_FRAME)


def wav(size: int) -> Iterator[bytes]:
    """A header, and so many bytes of samples, 16 bit mono."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, RATE * 2, 2, 16)
    yield b"RIFF" + struct.pack("<I", 36 + size) + b"WAVE" + form + b"data" + struct.pack("<I", size)
    yield from pcm(size)


def pcm(size: int) -> Iterator[bytes]:
    while size > 0:
        yield bytes(min(size, _CHUNK))
        size -= _CHUNK


def pcm_size(seconds: float) -> int:
    return round(seconds * RATE) * 2


def seconds_of(head: bytes, size: int) -> float:
    """How long a recording is of which these are the first bytes of so many."""
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE" and (at := head.find(b"fmt ")) > 0:
        a_second = struct.unpack_from("<I", head, at + 16)[0]
        data = head.find(b"data", at)
        return (size - data - 8) / a_second if a_second and data > 0 else 0.0
    if head[:4] == _MP3_HEADER:
        return size / len(_MP3_FRAME) / _MP3_FRAMES_A_SECOND
    return size / _UNKNOWN_BYTES_A_SECOND
