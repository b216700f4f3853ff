"""Arrays of parameters as PostgreSQL reads them fastest, and written much cheaper than by psycopg's own adaptation."""

import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import chain
from struct import Struct
from types import NoneType
from typing import Any, Final

import msgspec
import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

_TYPES: Final = psycopg.postgres.types


class BinaryArray(bytes):
    """An array in PostgreSQL's binary form."""


class _BinaryArrayDumper(Dumper):
    format = Format.BINARY
    oid = 0  # the statement says it, as it does where a column of nulls is sent: so both are one statement to prepare

    def dump(self, obj: BinaryArray) -> bytes:
        return obj


psycopg.adapters.register_dumper(BinaryArray, _BinaryArrayDumper)


def as_array(values: Sequence[Any]) -> str | BinaryArray | None:
    """A PostgreSQL array, sent as one parameter. Of nothing but nulls there is none: the functions unfold and ask a null as they
    do such an array, and most calls tell little of what could be told.

    Ids and bytes are sent as they are: read from text ids would be a thirtieth of what a batch takes. So is JSON (dicts), as an
    array of texts, each of which is read where it is written down: an array of jsonb takes longer, and memory. All else is text.
    What JSON writes as PostgreSQL reads it is written at once: null, truth values, numbers, quoted ids and times, and
    text without control characters; with them, or with what else is escaped, it is written by hand.
    """
    kinds = set(map(type, values))
    if kinds == _NOTHING:
        return None
    if kinds == _IDS:
        return _ids(values)
    if kinds <= _BYTES:
        return _array("bytea", values)
    if kinds <= _DICTS:
        texts: Iterable[bytes | None] = _json_lines(values).split(b"\n")[:-1]
        if NoneType in kinds:
            texts = (None if value is None else text for value, text in zip(values, texts, strict=True))
        return _array("text", list(texts))
    if kinds <= _ALIKE_IN_JSON:
        text = _json(values)
        if b"\\" not in text:
            return f"{{{text[1:-1].decode()}}}"
    return "{" + ",".join(map(_element, values)) + "}"


def _element(value: object) -> str:
    return "NULL" if value is None else '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _ids(values: Sequence[uuid.UUID]) -> BinaryArray:
    """MessagePack writes each id behind two bytes of its own; here it is behind its length, 16."""
    count, packed = len(values), _msgpack(values)
    array, start = bytearray(b"\0\0\0\x10" + bytes(16)) * count, len(packed) - 18 * count
    for place in range(16):  # of all ids at once
        array[4 + place :: 20] = packed[start + 2 + place :: 18]
    return BinaryArray(_head("uuid", count) + array)


def _array(kind: str, values: Sequence[bytes | None]) -> BinaryArray:
    """Each value behind its length."""
    if None in values:
        each = chain.from_iterable((_NULL,) if value is None else (_length(len(value)), value) for value in values)
    else:
        each = chain.from_iterable(zip(map(_length, map(len, values)), values, strict=True))  # type: ignore[arg-type]
    return BinaryArray(_head(kind, len(values)) + b"".join(each))


def _head(kind: str, count: int) -> bytes:
    """One dimension that begins at 1, and may have nulls."""
    return _HEAD.pack(1, 1, _TYPES[kind].oid, count, 1)


_HEAD: Final = Struct(">iiIii")
_length: Final = Struct(">i").pack
_NULL: Final = _length(-1)
_msgpack: Final = msgspec.msgpack.Encoder(uuid_format="bytes").encode
_json: Final = msgspec.json.Encoder().encode
_json_lines: Final = msgspec.json.Encoder().encode_lines
_NOTHING: Final = frozenset({NoneType})
_IDS: Final = frozenset({uuid.UUID})
_BYTES: Final = frozenset({NoneType, bytes})
_DICTS: Final = frozenset({NoneType, dict})
_ALIKE_IN_JSON: Final = frozenset({NoneType, bool, int, uuid.UUID, str, datetime})
