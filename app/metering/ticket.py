"""The opaque `hold_id` on the wire: what it says of its hold, and that it is ours."""

import base64
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from app.kernel.errors import HoldNotFound
from app.kernel.security import Pepper, equal

SETTLED_WITHIN: Final = timedelta(days=365)
"""So long after it was made a hold may be spoken of. What guards a later settle from charging twice may be put away by then."""
_TAG_LENGTH: Final = 22


class HoldTicket(msgspec.Struct, frozen=True, array_like=True):
    """What an opaque `hold_id` carries, so that a settle needs no look-up, and works when the hold's row is gone.

    `amount_nusd` is what was held at first, None for a call that nothing was held for; `window_start` is None where
    the call counts to the key's window of the moment it is settled. The order of fields is that of tickets on the
    wire: new ones go to the end and have a default.
    """

    account_id: uuid.UUID
    key_id: uuid.UUID
    hold_id: uuid.UUID
    request_id: str
    window_start: datetime | None
    made_at: datetime
    amount_nusd: int | None
    price_version: int | None = None
    model: str | None = None
    endpoint: str | None = None
    attributes: Mapping[str, str] | None = None

    def sealed(self, pepper: Pepper, service: str) -> str:
        """The wire form, which only the service it was made for can use."""
        body = base64.urlsafe_b64encode(_pack(self)).rstrip(b"=")
        return (_tag(pepper, service, body) + body).decode()

    @classmethod
    def opened(cls, text: str, pepper: Pepper, service: str, now: datetime | None = None) -> "HoldTicket":
        """Raises HoldNotFound for anything that we did not make for this service, or made longer ago than SETTLED_WITHIN."""
        data = text.encode("ascii", "replace")
        tag, body = data[:_TAG_LENGTH], data[_TAG_LENGTH:]
        if not equal(tag, _tag(pepper, service, body)):  # of the text: Base64 would read other spellings of it alike
            raise HoldNotFound
        ticket = _unpack(base64.urlsafe_b64decode(body + b"=="))
        if (now or datetime.now(UTC)) - ticket.made_at > SETTLED_WITHIN:
            raise HoldNotFound(
                f"This hold was made more than {SETTLED_WITHIN.days} days ago: nothing is settled so late"
            )
        return ticket


_pack: Final = msgspec.msgpack.Encoder(uuid_format="bytes").encode
_unpack: Final = msgspec.msgpack.Decoder(HoldTicket).decode


def _tag(pepper: Pepper, service: str, body: bytes) -> bytes:
    return base64.urlsafe_b64encode(pepper.quick_tag(b"ticket", service.encode() + b"\x00" + body))[:_TAG_LENGTH]
