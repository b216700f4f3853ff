"""The receipt: what was asked, what came and what that is worth, what was credited and given on top. It adds up, to the last unit."""

import base64
import binascii
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, row, rows
from app.kernel.errors import InvoiceNotFound
from app.kernel.money import COIN_PLACES, CURRENCIES, decimal_of
from app.kernel.security import Pepper, equal
from app.kernel.settings import Settings
from app.topups.create import read_topup
from app.topups.methods import METHODS, Method, confirmations_asked


class Stage(StrEnum):
    """How far a top-up has come, as its payer would tell it."""

    PREPARED = "prepared"
    """The payment backend has not answered yet."""
    OPEN = "open"
    PARTLY = "partly"
    """It can be paid, and a part has come."""
    CONFIRMING = "confirming"
    PAID = "paid"
    EXPIRED = "expired"
    """Its time is over, and nothing came."""
    PARTLY_EXPIRED = "partly expired"
    """Its time is over, and something came, in time or late."""
    INVALID = "invalid"
    FAILED = "failed"
    """No invoice was made."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """One payment, in the coin's smallest unit. `worth_nusd` is what was credited for it: 0 until it was valued."""

    id: str
    value_units: int
    fee_units: int
    status: str
    received_at: datetime
    is_late: bool
    worth_nusd: int

    @property
    def counts(self) -> bool:
        """Whether it is part of what has come: not one that was replaced, unless it was credited before."""
        return self.status != "Invalid" or self.worth_nusd > 0

    @property
    def fee_nusd(self) -> int:
        """The fee's share of what the payment is worth. Its own rate is in its worth: a late one has another."""
        net_units = self.value_units - self.fee_units
        return -(-self.worth_nusd * self.fee_units // net_units) if net_units > 0 else 0

    @property
    def gross_nusd(self) -> int:
        """Its worth before the fee."""
        return self.worth_nusd + self.fee_nusd


@dataclass(frozen=True, slots=True)
class Receipt:
    """A top-up with its payments, as they are at a moment. Amounts of coin are in its smallest unit."""

    topup: Row
    payments: list[Row]
    at: datetime

    @property
    def method(self) -> Method:
        return METHODS[self.topup["method"]]

    @property
    def places(self) -> int:
        """Decimals of the coin's smallest unit."""
        return COIN_PLACES[self.method.coin]

    @property
    def arrived(self) -> Sequence[Arrived]:
        """Every payment, oldest first."""
        return [
            Arrived(
                each["payment_id"], each["value_coin_units"], each["fee_coin_units"], each["status"], each["received_at"],
                each["late"], each["worth_nusd"],
            )
            for each in self.payments
        ]  # fmt: skip

    @property
    def asked_units(self) -> int:
        """With the network's fee."""
        return int(self.topup["total_coin_units"] or 0)

    @property
    def received_units(self) -> int:
        """Confirmed or not."""
        return sum(each.value_units for each in self.arrived if each.counts)

    @property
    def to_go_units(self) -> int:
        """What is missing of what was asked: with what has come it is that, to the last unit."""
        return max(0, self.asked_units - self.received_units)

    @property
    def fee_units(self) -> int:
        """Of the payments that count."""
        return sum(each.fee_units for each in self.arrived if each.counts)

    @property
    def gross_nusd(self) -> int:
        """What the payments are worth before fees."""
        return sum(each.gross_nusd for each in self.arrived)

    @property
    def fee_nusd(self) -> int:
        return sum(each.fee_nusd for each in self.arrived)

    @property
    def rounding_nusd(self) -> int:
        """What was credited beside the payments' worth: a coin cannot be split finely enough to pay dollars exactly."""
        return self.credited_nusd - self.gross_nusd + self.fee_nusd

    @property
    def credited_nusd(self) -> int:
        return int(self.topup["credited_nusd"])

    @property
    def bonus_nusd(self) -> int:
        return int(self.topup["bonus_nusd"])

    @property
    def total_nusd(self) -> int:
        """What was added to the balance: payments - fees ± rounding + bonus."""
        return self.credited_nusd + self.bonus_nusd

    @property
    def confirmations(self) -> int:
        """After how many a payment counts; 0 for Lightning."""
        currency = CURRENCIES[self.topup["currency"]]
        amount = decimal_of(self.topup["amount_units"], currency.places)
        return confirmations_asked(self.method.id, amount, currency.code)

    @property
    def stage(self) -> Stage:
        status = self.topup["status"]
        simple = {
            "Creating": Stage.PREPARED, "Failed": Stage.FAILED, "Processing": Stage.CONFIRMING, "Settled": Stage.PAID,
            "Invalid": Stage.INVALID,
        }  # fmt: skip
        if status in simple:
            return simple[status]
        if status == "New" and self.topup["expires_at"] > self.at:
            return Stage.PARTLY if self.received_units else Stage.OPEN
        return Stage.PARTLY_EXPIRED if self.received_units else Stage.EXPIRED

    @property
    def is_open(self) -> bool:
        """Whether it is to be paid now."""
        return self.stage in (Stage.OPEN, Stage.PARTLY)

    @property
    def is_watched(self) -> bool:
        """Whether something may still happen to it: somebody looks on."""
        if self.stage in (Stage.PREPARED, Stage.OPEN, Stage.PARTLY, Stage.CONFIRMING):
            return True
        is_uncredited = self.stage is Stage.PAID and self.credited_nusd == 0
        is_over_time = self.stage in (Stage.EXPIRED, Stage.PARTLY_EXPIRED)
        return bool(self.topup["watch_until"] > self.at) and (is_uncredited or is_over_time)


def receipt_token(pepper: Pepper, account_id: uuid.UUID, topup_id: uuid.UUID) -> str:
    """What a receipt's address ends with: lets its bearer read this one receipt, and nothing else."""
    body = account_id.bytes + topup_id.bytes
    return base64.urlsafe_b64encode(body + pepper.tag(b"receipt", body)).decode().rstrip("=")


def receipt_url(settings: Settings, account_id: uuid.UUID, topup_id: uuid.UUID) -> str:
    return f"{settings.public_url}/receipts/{receipt_token(settings.pepper, account_id, topup_id)}"


def opened_token(pepper: Pepper, token: str) -> tuple[uuid.UUID, uuid.UUID]:
    """The account and top-up a token was made for. Raises InvoiceNotFound for any other text."""
    try:
        data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvoiceNotFound from None
    if "=" in token or len(data) != 48 or not equal(data[32:], pepper.tag(b"receipt", data[:32])):
        raise InvoiceNotFound
    return uuid.UUID(bytes=data[:16]), uuid.UUID(bytes=data[16:32])


async def read_receipt(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID) -> Receipt:
    """Raises InvoiceNotFound."""
    payments = await rows(
        session,
        """SELECT * FROM payment WHERE account_id = :account_id AND topup_id = :topup_id
           ORDER BY received_at, payment_id""",
        account_id=account_id, topup_id=topup_id,
    )  # fmt: skip
    now = await row(session, "SELECT now() AS now")
    assert now is not None
    return Receipt(await read_topup(session, account_id, topup_id), payments, now["now"])


def usd_rate(topup: Row) -> str | None:
    """USD per coin: the invoice's own for one priced in USD, our quote for one priced in a coin."""
    rate = topup["rate"] if topup["currency"] == "USD" else topup["usd_per_coin"]
    return None if rate is None else format(rate, "f")


def rate_source(topup: Row) -> str:
    return str(topup["rate_source"] or topup["backend"])
