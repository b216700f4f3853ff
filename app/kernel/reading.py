"""JSON text read into the type that was asked for; what does not fit is told by the name of its field."""

import re
from typing import Any, Final
from uuid import UUID

import msgspec

from app.kernel.errors import InvalidField, MalformedJson

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
_PATH_IN_MESSAGE: Final = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_FIELD_IN_MESSAGE: Final = re.compile(r"^Object (?:missing required|contains unknown) field `(?P<name>.*)`$", re.DOTALL)


def read(text: bytes | msgspec.Raw, wanted: Any) -> Any:
    """Raises MalformedJson, and InvalidField for JSON that is not of the type `wanted`."""
    try:
        try:
            return msgspec.json.decode(text, type=wanted)
        except msgspec.ValidationError as error:
            msgspec.json.decode(text, type=msgspec.Raw)  # it stops at the first wrong type, before what is no JSON
            raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedJson(f"The body is not valid JSON: {error}") from None


def uuid_in(text: str) -> UUID | None:
    """The UUID that a text is, in its one spelling: `uuid.UUID` would take braces, urn: and missing hyphens too."""
    return UUID(text) if _UUID.fullmatch(text) else None


def _invalid(complaint: str) -> InvalidField:
    """msgspec's complaint, such as "Expected `int`, got `str` - at `$.ttl_seconds`", naming its field."""
    match = _PATH_IN_MESSAGE.match(complaint)
    what, path = (match["what"], match["path"] or "") if match else ("not valid", "")
    if field := _FIELD_IN_MESSAGE.match(what):
        param = f"{path}.{field['name']}".lstrip(".")[:100]
        problem = "is required" if "missing" in what else "is not a field of this request"
        return InvalidField(f"{param} {problem}", param=param)
    return InvalidField(f"{path or 'The body'}: {what[:300]}", param=path or None)
