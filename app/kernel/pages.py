"""Pages by keyset: an opaque cursor that says where the page before ended; and by number, for readers that know no cursor."""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from app.kernel.errors import InvalidField

T = TypeVar("T")
_CURSOR: Final = re.compile(r"[A-Za-z0-9_-]{1,1200}", re.ASCII)
DEFAULT_LIMIT = 50
MAX_LIMIT = 100
NUMBERED_LIMIT: Final = 200
MAX_SKIPPED: Final = 1_000_000
"""Rows before a page by number: each is counted again for every page, a cursor knows where to go on."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """A page as readers ask for it that know no cursor: so many rows after the first `skipped`."""

    size: int
    skipped: int = 0

    @classmethod
    def of(
        cls,
        *,
        limit: int | None,
        page: int | None = None,
        page_count: int | None = None,
        offset: int | None = None,
        cursor: str | None = None,
    ) -> "Numbered":
        """From `page` (from 1 on) of `page_count` or `limit` rows, or from `offset`. A size beyond 200 is taken for 200.

        Raises InvalidField for what is below its least, and for two ways at once to say where the page begins.
        """
        begins = {
            name: value for name, value in (("cursor", cursor), ("offset", offset), ("page", page)) if value is not None
        }
        if len(begins) > 1:
            raise InvalidField(
                f"{' and '.join(begins)} each say where the page begins; give one", param=list(begins)[-1]
            )
        if limit is not None and page_count is not None and limit != page_count:
            raise InvalidField("limit and page_count both say how many rows a page has; give one", param="page_count")
        named, size = ("limit", limit) if page_count is None else ("page_count", page_count)
        size = DEFAULT_LIMIT if size is None else min(at_least(1, size, named), NUMBERED_LIMIT)
        skipped = (
            at_least(0, offset, "offset")
            if offset is not None
            else (at_least(1, 1 if page is None else page, "page") - 1) * size
        )
        if skipped > MAX_SKIPPED:
            raise InvalidField(
                f"a page by number may begin after {MAX_SKIPPED:,} rows at most; go on with next_cursor as cursor",
                param="page" if offset is None else "offset",
            )
        return cls(size, skipped)


def at_least(least: int, value: int, param: str) -> int:
    """Raises InvalidField."""
    if value < least:
        raise InvalidField(f"{param} must be at least {least}, got {value}", param=param)
    return value


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
