"""Ids as the providers write them: theirs differ by what stands in front."""

import secrets
from itertools import count

_START = secrets.token_hex(6)
_numbers = count(1)


def new_id(prefix: str) -> str:
    """An id that no other process has given, in the order of time."""
    return f"{prefix}{_START}{next(_numbers):010x}"
