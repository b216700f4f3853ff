"""Cost fields put into an answer's usage, and the operator's own taken out. Every other byte stays as the upstream wrote it."""

import re
from typing import Final

import msgspec

OPERATORS: Final = ("cost", "cost_details", "is_byok")
"""What a call costs whoever sells it on, as OpenRouter and LiteLLM tell it: no caller's business.
Sources: OpenRouter docs, "Usage accounting"; LiteLLM docs, `include_cost_in_streaming_usage`."""
_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def without_operators(document: bytes, usage: bytes) -> tuple[bytes, bytes]:
    """`document`, and its object `usage`, which is given as it stands there, without the operator's own figures."""
    if not any(b'"%b"' % name.encode() in usage for name in OPERATORS):
        return document, usage
    members = _MEMBERS.decode(usage)
    for name in OPERATORS:
        members.pop(name, None)
    left, begin = msgspec.json.encode(members), _where(document, usage)
    return document[:begin] + left + document[begin + len(usage) :], left


def put_in(document: bytes, usage: bytes, fields: bytes) -> bytes:
    """`document` with `fields` added to its object `usage`, which is given as it stands there."""
    begin = _where(document, usage)
    end = begin + len(usage) - 1
    comma = b"" if usage[1:-1].strip() == b"" else b","
    return b"".join((document[:end], comma, fields, document[end:]))


def put_null(document: bytes, usage: bytes) -> bytes:
    """`document` without its usage, for a caller who did not ask for it."""
    begin = _where(document, usage)
    return document[:begin] + b"null" + document[begin + len(usage) :]


def put_first(document: bytes, fields: bytes) -> bytes:
    """An object with `fields` in front of its own."""
    begin = document.index(b"{") + 1
    comma = b"" if document[begin:].lstrip()[:1] == b"}" else b","
    return b"".join((document[:begin], fields, comma, document[begin:]))


def put_into(document: bytes, name: bytes, fields: bytes) -> bytes:
    """`document` with `fields` in front of those of its first object of that name; itself where it has none."""
    found = re.search(rb'"%b"\s*:\s*\{\s*(\}?)' % name, document)
    if found is None:
        return document
    begin = found.start(1)
    return b"".join((document[:begin], fields, b"" if found[1] else b",", document[begin:]))


def _where(document: bytes, usage: bytes) -> int:
    return document.index(usage, document.index(b'"usage"'))
