"""How a body is read: whole, not too large, as JSON, straight into the type that its handler asks for."""

import re
from typing import Any

from litestar import Request
from litestar.types import Receive

from app.kernel.errors import InvalidField, MalformedJson, UnsupportedMediaType
from app.kernel.reading import read
from app.metering.api import reports

MAX_BODY_BYTES = 64 * 1024
LARGER_BODIES = dict.fromkeys(reports.ROUTES, reports.MAX_BODY_BYTES)
_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


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
    if _ESCAPED_NUL.search(body):
        raise InvalidField("Text may not contain NUL characters")
    try:
        body.decode()  # msgspec looks into no text that it only skips or keeps raw
    except UnicodeDecodeError as error:
        raise MalformedJson(f"The body is not valid JSON: {error}") from None
    return read(body, wanted)


def whole(receive: Receive) -> Receive:
    """A body that breaks off is the caller's trouble: without this, Litestar takes it for a defect of ours."""
    is_complete = False

    async def receiving() -> Any:
        nonlocal is_complete
        message = await receive()
        if message["type"] == "http.disconnect" and not is_complete:
            raise MalformedJson("The connection was closed before the whole body had come")
        is_complete = is_complete or not message.get("more_body", False)
        return message

    return receiving
