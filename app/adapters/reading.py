"""Reading other people's JSON strictly: the whole shape or nothing, decimals by their digits. Pure.

Whatever does not fit is GatewayUnavailable("<backend> answered rubbish: <field>"): nobody is credited from
an answer that was half understood.
"""

import re
from decimal import ROUND_DOWN, Context, Decimal
from typing import Final, TypeVar

import msgspec
from msgspec import Raw

from app.topups.gateway import GatewayUnavailable

_AMOUNT: Final = re.compile(rb"-?[0-9]{1,15}(?:\.[0-9]{1,18})?")
# A BTCPay rate is a .NET decimal, which a store's averaging rate script fills to 28 digits.
_RATE: Final = re.compile(rb"[0-9]{1,15}(?:\.[0-9]{1,28})?")
_RATE_STEP: Final = Decimal(1).scaleb(-18)
_EXACT: Final = Context(prec=60)

_ERROR_PATH: Final = re.compile(r"`\$([^`]*)`\Z")
_ERROR_MISSING: Final = re.compile(r"missing required field `(\w+)`")

T = TypeVar("T")


def decode(backend: str, body: bytes, shape: type[T], what: str) -> T:
    """The JSON as `shape`; the error names the field within `what` that does not fit."""
    try:
        return msgspec.json.decode(body, type=shape)
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise rubbish(backend, _where(what, error)) from None


def decimal(backend: str, raw: Raw, field: str, pattern: re.Pattern[bytes] = _AMOUNT) -> Decimal:
    """A decimal from its digits in the JSON text, which may stand in a string or as a number."""
    text = bytes(raw)
    digits = text[1:-1] if text[:1] == b'"' else text
    if not pattern.fullmatch(digits):
        raise rubbish(backend, field)
    return Decimal(digits.decode("ascii"))


def rate(backend: str, raw: Raw, field: str) -> Decimal:
    """A positive rate. Digits after the 18th are cut off, so that it is the same here and in the database."""
    value = decimal(backend, raw, field, _RATE)
    if -int(value.as_tuple().exponent) > 18:
        value = value.quantize(_RATE_STEP, rounding=ROUND_DOWN, context=_EXACT)
    if value <= 0:
        raise rubbish(backend, field)
    return value


def rubbish(backend: str, field: str) -> GatewayUnavailable:
    return GatewayUnavailable(f"{backend} answered rubbish: {field}")


def plain(text: str) -> str:
    """Somebody else's words made fit for one line of a message: printable, at most 500 characters."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable())[:500]


def _where(what: str, error: Exception) -> str:
    """The path of the field an error is about, such as `invoice.status`."""
    if not isinstance(error, msgspec.ValidationError):
        return f"{what} is not JSON"
    path = _ERROR_PATH.search(str(error))
    missing = _ERROR_MISSING.search(str(error))
    return what + (path[1] if path else "") + (f".{missing[1]}" if missing else "")
