"""Forms with files: read as they come, the files to disk, and written again for an upstream.

A form may name its model after its file, as curl's users do, so a file is taken to its end before anybody is asked for
anything: to an unnamed file on disk, so that memory stays flat, a slow caller holds nobody up, and a second upstream can
be asked with the same file.
"""

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import BinaryIO, Final, cast

import msgspec
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from app.gateway.errors import BodyTooLarge, InvalidField, Refusal
from app.gateway.exchange import Body, Exchange

MOST_FILE_BYTES: Final = 25 * 1024 * 1024
_MOST_FIELD_BYTES: Final = 1024 * 1024
_MOST_PARTS: Final = 200
_HELD_IN_MEMORY: Final = 256 * 1024
_CHUNK_BYTES: Final = 256 * 1024


class NotAForm(Refusal):
    """Send multipart/form-data."""

    status, code, type = 415, "unsupported_media_type", "invalid_request_error"


@dataclass(slots=True)
class File:
    """A file of a form, on disk."""

    field: str
    name: str
    content_type: str
    body: BinaryIO
    size: int = 0


@dataclass(slots=True)
class Form:
    """What a form said. A field may come several times, as `timestamp_granularities[]` does."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    files: list[File] = field(default_factory=list)

    def get(self, name: str) -> str | None:
        """The last value of a field."""
        return next((value for key, value in reversed(self.fields) if key == name), None)

    def as_body(self) -> Body:
        """Its fields as those of a JSON body, each a text."""
        return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in self.fields}

    def put(self, name: str, value: str) -> None:
        self.fields = [(key, each) for key, each in self.fields if key != name] + [(name, value)]

    def drop(self, *names: str) -> None:
        self.fields = [(key, value) for key, value in self.fields if key not in names]

    def close(self) -> None:
        for file in self.files:
            file.body.close()


async def read_form(exchange: Exchange) -> Form:
    """A form, read to its end. Close it. Raises NotAForm, InvalidField, BodyTooLarge, CallerGone."""
    kind, options = parse_options_header(exchange.headers.get("content-type", ""))
    if kind.lower() != "multipart/form-data" or not options.get("boundary"):
        raise NotAForm
    reading = _Reading()
    try:
        with PushMultipartParser(options["boundary"], max_segment_count=_MOST_PARTS) as parser:
            async for chunk in exchange.chunks():
                for event in parser.parse(chunk):
                    reading.take(event)
    except MultipartError as error:
        reading.form.close()
        raise InvalidField(f"the form could not be read: {error}") from None
    except BaseException:
        reading.form.close()
        raise
    return reading.form


class _Reading:
    """Takes a form's parts as they come."""

    def __init__(self) -> None:
        self.form = Form()
        self._file: File | None = None
        self._name, self._text = "", bytearray()

    def take(self, event: MultipartSegment | bytes | bytearray | None) -> None:
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            self._end()
        elif self._file is not None:
            self._write(self._file, event)
        else:
            self._text += event
            if len(self._text) > _MOST_FIELD_BYTES:
                raise InvalidField("a field of the form is larger than 1 MiB", param=self._name[:100])

    def _begin(self, segment: MultipartSegment) -> None:
        self._name, self._text, self._file = segment.name, bytearray(), None
        if segment.filename is not None:
            body = cast(BinaryIO, tempfile.SpooledTemporaryFile(_HELD_IN_MEMORY))  # noqa: SIM115 - closed with its form
            kind = segment.content_type or "application/octet-stream"
            self._file = File(segment.name, segment.filename, kind, body)
            self.form.files.append(self._file)

    def _write(self, file: File, chunk: bytes | bytearray) -> None:
        file.size += len(chunk)
        if file.size > MOST_FILE_BYTES:
            raise BodyTooLarge
        file.body.write(chunk)

    def _end(self) -> None:
        if self._file is not None:
            self._file.body.seek(0)
            return
        try:
            self.form.fields.append((self._name, self._text.decode()))
        except UnicodeDecodeError:
            raise InvalidField("is not UTF-8", param=self._name[:100]) from None


class Written:
    """A form on its way to an upstream: its content type, its length, and its bytes, as often as they are needed."""

    def __init__(self, fields: Iterable[tuple[str, str]], files: Iterable[File]) -> None:
        self._boundary = secrets.token_hex(16)
        self._files = list(files)
        self._fields = b"".join(self._part(name) + value.encode() + b"\r\n" for name, value in fields)

    @property
    def content_type(self) -> str:
        return f"multipart/form-data; boundary={self._boundary}"

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._fields
        for file in self._files:
            yield self._part(file.field, file.name, file.content_type)
            file.body.seek(0)
            while chunk := await asyncio.to_thread(file.body.read, _CHUNK_BYTES):
                yield chunk
            yield b"\r\n"
        yield b"--" + self._boundary.encode() + b"--\r\n"

    def _part(self, name: str, filename: str | None = None, content_type: str | None = None) -> bytes:
        head = f'--{self._boundary}\r\nContent-Disposition: form-data; name="{_quoted(name)}"'
        if filename is not None:
            head += f'; filename="{_quoted(filename)}"\r\nContent-Type: {_quoted(content_type or "")}'
        return head.encode() + b"\r\n\r\n"


def _quoted(text: str) -> str:
    """As a browser writes a name (HTML, "multipart form data"), so that none ends its line or its quotes."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
