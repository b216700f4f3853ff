"""The words of the books as an operator says them."""

from typing import Any, Final

from htpy import Element

from app.console.operator.acting import pill

TOPUP_STATES: Final = {
    "Creating": ("Being made", "wait"), "New": ("Waiting for payment", ""), "Processing": ("Confirming", "wait"),
    "Settled": ("Paid", "good"), "Expired": ("Expired", "bad"), "Invalid": ("Invalid", "bad"), "Failed": ("Not made", "bad"),
}  # fmt: skip
MORE_STATES: Final = {
    "PaidPartial": "partly paid", "PaidLate": "paid late", "PaidOver": "paid over", "Marked": "marked by hand",
}  # fmt: skip
PAYMENT_STATES: Final = {
    "Processing": ("Confirming", "wait"),
    "Settled": ("Confirmed", "good"),
    "Invalid": ("Does not count", "bad"),
}
ENTRIES: Final = {
    "topup": "Top-up", "bonus": "Bonus", "usage": "Call", "refund": "Refund", "adjustment": "Adjustment",
}  # fmt: skip
STATUSES: Final = {"active": "good", "frozen": "wait", "closed": "bad"}
MATCHES: Final = {
    "account_id": "account id", "credit_id": "credit id", "key_id": "key id", "topup_id": "top-up id", "key_preview": "masked key",
    "api_key": "API key", "api_key_hash": "API key's hash", "invoice_id": "invoice", "payment": "payment", "address": "address",
}  # fmt: skip


def topup_state(topup: Any) -> Element:
    words, look = TOPUP_STATES[topup["status"]]
    extra = MORE_STATES.get(topup["additional_status"])
    return pill(f"{words}, {extra}" if extra else words, look)


def account_state(status: str) -> Element:
    return pill(status.capitalize(), STATUSES[status])
