"""Pages by keyset: an opaque cursor that says where the page before ended."""

import base64
import binascii
import re
from typing import Any, Final, TypeVar

import msgspec

from app.kernel.errors import InvalidField

T = TypeVar("T")
_CURSOR: Final = re.compile(r"[A-Za-z0-9_-]{1,1200}", re.ASCII)
DEFAULT_LIMIT = 50
MAX_LIMIT = 100


def page_size(limit: int) -> int:
    """The rows a page may have. Raises InvalidField outside 1-100."""
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidField(f"limit must be from 1 to {MAX_LIMIT}, got {limit}", param="limit")
    return limit


def to_cursor(*position: Any) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(position)).decode().rstrip("=")


def from_cursor(cursor: str | None, position: type[T]) -> T | None:
    """Where to go on, None for the first page. Raises InvalidField for a cursor that we did not make."""
    if cursor is None:
        return None
    try:
        if not _CURSOR.fullmatch(cursor):  # b64decode passes over what is none of its alphabet
            raise ValueError
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        return msgspec.json.decode(text, type=position)
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        raise InvalidField("cursor is not one that a page of ours ended with", param="cursor") from None
