"""The name of a charge on the wire: opaque, and enough to find the call with its account."""

import base64
import binascii
import uuid

import msgspec

from app.kernel.errors import NotFound

_URL_SAFE = bytes.maketrans(b"+/", b"-_")


class ChargeId(msgspec.Struct, frozen=True):
    """What the wire's opaque charge_id carries, so that a charge is found with its account."""

    account_id: uuid.UUID
    usage_id: uuid.UUID

    def __str__(self) -> str:
        pair = self.account_id.int << 128 | self.usage_id.int
        return binascii.b2a_base64(pair.to_bytes(32), newline=False).translate(_URL_SAFE, b"=").decode()

    @classmethod
    def read(cls, text: str) -> "ChargeId":
        """Raises NotFound for anything that is none of ours."""
        try:
            data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            found = cls(uuid.UUID(bytes=data[:16]), uuid.UUID(bytes=data[16:]))
        except (binascii.Error, ValueError):
            raise NotFound("No such charge") from None
        if str(found) != text:
            raise NotFound("No such charge")
        return found
