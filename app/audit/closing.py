"""What is kept of entries that were put away: closings, each of which stands for many in a row, and proves that it is ours."""

import hashlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Final

from app.audit.check import Proof, Secrets
from app.kernel.db import Row
from app.kernel.security import Pepper, equal


@dataclass(frozen=True, slots=True)
class Closing:
    """A row of `entry_closing` but for its MAC."""

    account_id: uuid.UUID
    first_id: int
    last_id: int
    month: date
    amount_nusd: int
    balance_after_nusd: int
    ended_at: datetime
    digest: bytes

    @property
    def entries(self) -> int:
        return self.last_id - self.first_id + 1

    def said(self) -> bytes:
        """All of it as one text: what is signed, and what the export's digest is made of."""
        told = f"{self.account_id}/{self.first_id}/{self.last_id}/{self.month}/{self.amount_nusd}/{self.balance_after_nusd}"
        return f"{told}/{self.ended_at.timestamp():.6f}/".encode() + self.digest

    def mac(self, pepper: Pepper) -> bytes:
        return pepper.tag(b"entries/closing", self.said())

    def as_row(self, pepper: Pepper) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"mac": self.mac(pepper)}


class Runs:
    """Entries as they come, by account and number, made into closings: `take` and `end` return those that are over."""

    def __init__(self, month: date) -> None:
        self._month = month
        self._some: list[Row] = []
        self._digest = hashlib.sha256()
        self._amount_nusd = 0
        self._first: Row | None = None
        self._last: Row | None = None

    def take(self, entries: Iterable[Row]) -> Iterator[Closing]:
        for entry in entries:
            if self._last is not None and (entry["account_id"], entry["id"]) != (
                self._last["account_id"],
                self._last["id"] + 1,
            ):
                yield from self.end()
            self._first = self._first or entry
            self._last = entry
            self._amount_nusd += entry["amount_nusd"]
            self._digest.update(entry["content"])

    def end(self) -> Iterator[Closing]:
        if self._first is not None and self._last is not None:
            yield Closing(
                self._first["account_id"], self._first["id"], self._last["id"], self._month, self._amount_nusd,
                self._last["balance_after_nusd"], self._last["created_at"], self._digest.digest(),
            )  # fmt: skip
        self._first = self._last = None
        self._amount_nusd, self._digest = 0, hashlib.sha256()


def _is_ours(secrets: Secrets, row: Row) -> bool:
    closing = Closing(**{name: row[name] for name in Closing.__slots__} | {"digest": bytes(row["digest"])})
    return equal(bytes(row["mac"]), closing.mac(secrets.pepper))


CLOSINGS: Final = (
    Proof(
        "closing_is_ours",
        "What is kept of entries that were put away was written by us, as it stands.",
        f"SELECT account_id || '/' || first_id || '-' || last_id AS subject, {', '.join(Closing.__slots__)}, mac FROM entry_closing",
        _is_ours, broken="not written by us", whole="written by us",
    ),
)  # fmt: skip
