"""Fields of a JSON body, read one by one: what is wrong with one is said by its name."""

from typing import TypeVar

import msgspec

from app.gateway.errors import InvalidField
from app.gateway.exchange import Body

T = TypeVar("T")


def text_of(body: Body, name: str, default: str | None = None, *, most: int | None = None) -> str:
    """A text that is not empty. Raises InvalidField."""
    found = _read(body, name, str, default)
    if not found:
        raise InvalidField(f"{name} is missing" if found is None else f"{name} is empty", param=name)
    if most is not None and len(found) > most:
        raise InvalidField(f"{name} has {len(found):,} characters; at most {most:,} are taken", param=name)
    return found


def words_of(body: Body, name: str) -> str | None:
    """A text, or a number as text, as `duration` comes; None where it is missing. Raises InvalidField."""
    found = _read(body, name, str | int | float, None)
    return None if found is None or found == "" else str(found)


def number_of(body: Body, name: str, default: int, least: int, most: int) -> int:
    """A whole number within bounds; as text too, as forms have it. Raises InvalidField."""
    text = words_of(body, name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or not least <= int(text[:12]) <= most:
        raise InvalidField(f"{name} is a whole number from {least} to {most}", param=name)
    return int(text)


def must_have_messages(body: Body) -> None:
    """One at least; what is in it the upstream judges. Raises InvalidField."""
    must_have(body, "messages")
    try:
        msgspec.json.decode(body["messages"], type=list[dict[str, msgspec.Raw]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidField("messages is a list of messages", param="messages") from None


def must_have(body: Body, name: str) -> None:
    """Something that is not empty. Raises InvalidField."""
    said = bytes(body.get(name, b"null")).translate(None, b" \t\r\n")
    if said in (b"null", b'""', b"[]"):
        raise InvalidField(f"{name} is missing" if said == b"null" else f"{name} is empty", param=name)


def _read(body: Body, name: str, kind: type[T] | object, default: T | None) -> T | None:
    raw = body.get(name)
    if raw is None or bytes(raw) == b"null":
        return default
    try:
        found: T = msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidField(f"{name} is not of the kind that it should be", param=name) from None
    return found
