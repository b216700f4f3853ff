"""Recordings that callers send: which formats there are, and how long one is by its own container's word.

That word is the caller's, who may have written a small one over a long recording. It sizes a hold, and pays only where
the upstream says nothing itself; it is never believed below what so many bytes must last.
"""

import re
import struct
from typing import Final

from tinytag import TinyTag, TinyTagException

from app.gateway.errors import InvalidField
from app.gateway.forms import File

FORMATS: Final = ("mp3", "mp4", "mpeg", "mpga", "m4a", "wav", "webm")
_MAGIC: Final = re.compile(rb"ID3|\xff[\xe0-\xff]|RIFF....WAVE|....ftyp|\x1aE\xdf\xa3|\x00\x00\x01[\xb3\xba]", re.S)
_MOST_BYTES_A_SECOND: Final = {"wav": 1_536_000}
_MOST_COMPRESSED_BYTES_A_SECOND: Final = 64_000
"""512 kbit/s: nobody compresses speech to more."""
_LEAST_BYTES_A_SECOND: Final = {"wav": 8_000}
_LEAST_COMPRESSED_BYTES_A_SECOND: Final = 2_000
"""16 kbit/s, as thin as speech is usually sent: what is held for where nothing is known but the size."""


def check_format(file: File) -> str:
    """How its name ends, or what its bytes say. Raises InvalidField for what is no recording that is taken here."""
    ending = _ending(file)
    file.body.seek(0)
    looks_right = _MAGIC.match(file.body.read(16)) is not None
    file.body.seek(0)
    if ending in FORMATS or (not ending and looks_right):
        return ending
    raise InvalidField(
        f"{ending[:20] or 'this'!r} is no format that is taken here: send {', '.join(FORMATS)}", param="file"
    )


def told_seconds(file: File) -> float | None:
    """How long the container says that it is; None where it says nothing."""
    file.body.seek(0)
    try:
        found = TinyTag.get(file_obj=file.body, tags=False).duration
    except (TinyTagException, struct.error, ValueError, TypeError, LookupError, ArithmeticError, EOFError, OSError):
        found = None
    finally:
        file.body.seek(0)
    if found is None or not 0 < found < 1_000_000:
        return None
    return max(found, least_seconds(file))


def least_seconds(file: File) -> float:
    """What so many bytes last at least."""
    return file.size / _MOST_BYTES_A_SECOND.get(_ending(file), _MOST_COMPRESSED_BYTES_A_SECOND)


def held_seconds(file: File, told: float | None) -> float:
    """What is held for before the upstream says how long it was."""
    if told is not None:
        return told
    return max(1.0, file.size / _LEAST_BYTES_A_SECOND.get(_ending(file), _LEAST_COMPRESSED_BYTES_A_SECOND))


def _ending(file: File) -> str:
    return file.name.rpartition(".")[2].lower() if "." in file.name else ""
