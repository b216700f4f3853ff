"""What operators' requests share: reasons, and ids in a path."""

from typing import Annotated
from uuid import UUID

import msgspec

from app.admin.acts import LEAST_REASON, MOST_REASON
from app.kernel.errors import InvoiceNotFound, KeyNotFound, NotFound
from app.kernel.reading import uuid_in

Reason = Annotated[
    str, msgspec.Meta(min_length=LEAST_REASON, max_length=MOST_REASON, pattern=r"^(?=.*[^ ])[^\x00-\x1f\x7f]+\Z")
]


class Because(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why: it stands in the log."""

    reason: Reason | None = None


def reason_of(data: Because | None) -> str | None:
    return None if data is None else data.reason


def account_in(text: str) -> UUID:
    """Raises NotFound, alike for what is no id and for a missing account."""
    found = uuid_in(text)
    if found is None:
        raise NotFound("No such account")
    return found


def key_in(text: str) -> UUID:
    """Raises KeyNotFound."""
    found = uuid_in(text)
    if found is None:
        raise KeyNotFound
    return found


def topup_in(text: str) -> UUID:
    """Raises InvoiceNotFound."""
    found = uuid_in(text)
    if found is None:
        raise InvoiceNotFound
    return found
