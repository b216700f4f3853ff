"""Server-sent events cut out of a stream, each with the empty line that ends it, whatever ends its lines."""

import re
from typing import Final

_END: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_MOST_EVENT_BYTES: Final = 32 * 1024 * 1024


class BadStream(Exception):
    """An event that does not end."""


class Splitter:
    """Events as they are whole. What is not is kept until the rest of it has come."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Raises BadStream."""
        data = self._rest + chunk if self._rest else chunk
        found, begin = list[bytes](), 0
        for end in _END.finditer(data, max(0, len(self._rest) - 3)):
            found.append(data[begin : end.end()])
            begin = end.end()
        self._rest = data[begin:]
        if len(self._rest) > _MOST_EVENT_BYTES:
            raise BadStream
        return found
