"""How a body is read: whole, not too large, as JSON, straight into the type that its handler asks for."""

import re
from collections.abc import Mapping
from typing import Any, Final

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.types import Receive

from app.kernel.errors import BodyTooLarge, InvalidField, MalformedJson, UnsupportedMediaType
from app.kernel.reading import read

MAX_BODY_BYTES: Final = 64 * 1024
_LENGTH: Final = re.compile(r"\d{1,18}", re.ASCII)
_ESCAPED_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


async def refuse_large_body(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A guard, for what its head says already; what is longer than it says is refused as it is read. Raises BodyTooLarge."""
    assert isinstance(handler, HTTPRouteHandler)
    length, limit = connection.headers.get("content-length", ""), handler.resolve_request_max_body_size()
    if limit is not None and _LENGTH.fullmatch(length) and int(length) > limit:
        raise BodyTooLarge


class JsonRequest(Request[Any, Any, Any]):
    """A request whose JSON body is read straight into the handler's type, so that no number becomes a float."""

    async def json(self) -> Any:
        """Raises UnsupportedMediaType, MalformedJson or InvalidField."""
        field = self.route_handler.parsed_data_field
        assert field is not None
        return read_json(await self.body(), field.annotation, self.headers.get("content-type"))


def read_json(body: bytes, wanted: Any, content_type: str | None) -> Any:
    """Decode a JSON body strictly. Raises UnsupportedMediaType, MalformedJson or InvalidField."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(f"The body must be application/json, got {media_type[:100]!r}")
    if b"\\u0000" in body and _ESCAPED_NUL.search(body):  # looked for alone it costs as much as reading the body does
        raise InvalidField("Text may not contain NUL characters")
    try:
        body.decode()  # msgspec looks into no text that it only skips or keeps raw
    except UnicodeDecodeError as error:
        raise MalformedJson(f"The body is not valid JSON: {error}") from None
    return read(body, wanted)


class Body:
    """A request's body as it comes.

    One that breaks off is the caller's trouble: without this, Litestar takes it for a defect of ours.
    """

    def __init__(self, receive: Receive, headers: Mapping[bytes, bytes]) -> None:
        self._receive, self.is_whole = receive, False
        length = headers.get(b"content-length", b"0").decode("latin-1")
        self.may_be_long = (
            b"transfer-encoding" in headers or not _LENGTH.fullmatch(length) or int(length) > MAX_BODY_BYTES
        )

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.is_whole:
            raise MalformedJson("The connection was closed before the whole body had come")
        self.is_whole = self.is_whole or not message.get("more_body", False)
        return message
