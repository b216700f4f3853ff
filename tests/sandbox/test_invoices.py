"""The pure state machine, row by row of BTCPay's own (InvoiceWatcher.UpdateInvoice, v2.4.1)."""

from decimal import Decimal
from typing import Any

import pytest
from msgspec.structs import replace

from app.sandbox.invoices import (
    Additional,
    Change,
    EventType,
    Invoice,
    PaymentStatus,
    Prompt,
    Seen,
    Status,
    advance,
    asked,
    mark,
    markable,
    observe,
    totals,
)

NOW = 1_800_000_000
EXPIRY = NOW + 900
WATCH_END = EXPIRY + 86_400
ADDRESS = "bcrt1qexample"


def an_invoice(method: str = "BTC-CHAIN", price: str = "100", rate: str = "50000", **more: Any) -> Invoice:
    """100 USD at 50,000 USD per coin: 0.002 coins."""
    settings: dict[str, Any] = {
        "id": "invoice",
        "number": 1,
        "store_id": "store",
        "price": Decimal(price),
        "currency": "USD",
        "is_topup": False,
        "metadata": {},
        "checkout": {},
        "speed": "MediumSpeed",
        "tolerance": Decimal(0),
        "created_at": NOW,
        "expires_at": EXPIRY,
        "watched_until": WATCH_END,
        "prompts": (Prompt(method, Decimal(rate), Decimal(0), ADDRESS),),
    }
    return Invoice(**{**settings, **more})


def seen(value: str = "0.002", confirmations: int = 0, id: str = "tx-0", **more: Any) -> Seen:
    return Seen(id, Decimal(value), confirmations, NOW, **more)


def look(invoice: Invoice, *sights: Seen, now: int = NOW + 1, method: str = "BTC-CHAIN") -> Change:
    return observe(invoice, method, ADDRESS, sights, now)


def told(change: Change) -> list[str]:
    return [event.type.value.removeprefix("Invoice") for event in change.events]


def state(change: Change) -> tuple[str, str]:
    return change.invoice.status.value, change.invoice.additional.value


# From New


def test_a_partial_payment_leaves_it_new_and_paid_partial_and_tells_the_payment_only() -> None:
    change = look(an_invoice(), seen("0.001"))
    assert state(change) == ("New", "PaidPartial")
    assert told(change) == ["ReceivedPayment"]


def test_an_unpaid_invoice_expires_at_its_time_and_not_before() -> None:
    assert state(advance(an_invoice(), EXPIRY - 1)) == ("New", "None")
    change = advance(an_invoice(), EXPIRY)
    assert state(change) == ("Expired", "None")
    assert [(event.type, event.facts) for event in change.events] == [(EventType.EXPIRED, {"partiallyPaid": False})]


def test_a_partially_paid_invoice_expires_with_both_events_and_keeps_paid_partial() -> None:
    partial = look(an_invoice(), seen("0.001")).invoice
    change = advance(partial, EXPIRY)
    assert state(change) == ("Expired", "PaidPartial")
    assert told(change) == ["Expired", "ExpiredPaidPartial"]
    assert change.events[0].facts == {"partiallyPaid": True}


def test_full_payment_counts_without_confirmations() -> None:
    change = look(an_invoice(), seen())
    assert state(change) == ("Processing", "None")
    assert told(change) == ["ReceivedPayment", "Processing"]
    assert change.events[-1].facts == {"overPaid": False}


def test_an_overpayment_is_processing_and_paid_over() -> None:
    change = look(an_invoice(), seen("0.0021"))
    assert state(change) == ("Processing", "PaidOver")
    assert change.events[-1].facts == {"overPaid": True}


def test_two_parts_make_a_whole_where_the_second_pays_for_its_input() -> None:
    partial = look(an_invoice(), seen("0.001", id="a-0")).invoice
    due = asked(partial, partial.prompts[0]).due
    assert due == Decimal("0.001001")
    change = look(partial, seen("0.001", id="a-0"), seen(str(due), id="b-0"))
    assert state(change) == ("Processing", "None")
    assert told(change) == ["ReceivedPayment", "Processing"]


# From Processing


def test_it_becomes_paid_over_and_no_longer_without_a_word() -> None:
    exact = look(an_invoice(), seen(id="a-0")).invoice
    more = look(exact, seen(id="a-0"), seen("0.001", id="b-0"))
    assert state(more) == ("Processing", "PaidOver")
    assert told(more) == ["ReceivedPayment"]
    less = look(more.invoice, seen(id="a-0"), seen("0.001", id="b-0", replaced=True))
    assert state(less) == ("Processing", "None")
    assert told(less) == []


def test_a_double_spend_puts_it_silently_back_to_new() -> None:
    processing = look(an_invoice(), seen()).invoice
    change = look(processing, seen(replaced=True))
    assert state(change) == ("New", "None")
    assert told(change) == []
    assert change.invoice.payments[0].status is PaymentStatus.INVALID


def test_a_double_spend_of_one_of_two_payments_leaves_it_new_and_partial() -> None:
    partial = look(an_invoice(), seen("0.001", id="a-0")).invoice
    both = look(partial, seen("0.001", id="a-0"), seen("0.0015", id="b-0")).invoice
    assert both.status is Status.PROCESSING
    change = look(both, seen("0.001", id="a-0"), seen("0.0015", id="b-0", replaced=True))
    assert state(change) == ("New", "PaidPartial")
    assert told(change) == []


def test_a_double_spend_after_its_time_lets_it_expire() -> None:
    processing = look(an_invoice(), seen()).invoice
    change = look(processing, seen(replaced=True), now=EXPIRY + 5)
    assert state(change) == ("Expired", "None")
    assert told(change) == ["Expired"]


def test_confirmed_payments_settle_it_and_the_payment_is_told_first() -> None:
    processing = look(an_invoice(), seen()).invoice
    change = look(processing, seen(confirmations=1))
    assert state(change) == ("Settled", "None")
    assert told(change) == ["PaymentSettled", "Settled"]
    assert change.events[-1].facts == {"manuallyMarked": False, "overPaid": False}


def test_only_confirmed_payments_settle_it() -> None:
    partial = look(an_invoice(), seen("0.001", id="a-0")).invoice
    both = look(partial, seen("0.001", id="a-0"), seen("0.0015", id="b-0")).invoice
    change = look(both, seen("0.001", 1, id="a-0"), seen("0.0015", id="b-0"))
    assert state(change) == ("Processing", "PaidOver")
    assert told(change) == ["PaymentSettled"]


def test_it_settles_overpaid() -> None:
    processing = look(an_invoice(), seen("0.003")).invoice
    change = look(processing, seen("0.003", 1))
    assert state(change) == ("Settled", "PaidOver")
    assert change.events[-1].facts == {"manuallyMarked": False, "overPaid": True}


def test_it_settles_alongside_an_unconfirmed_extra_payment() -> None:
    exact = look(an_invoice(), seen(id="a-0")).invoice
    more = look(exact, seen(id="a-0"), seen("0.001", id="b-0")).invoice
    change = look(more, seen(id="a-0", confirmations=1), seen("0.001", id="b-0"))
    assert state(change) == ("Settled", "PaidOver")
    assert [payment.status.value for payment in change.invoice.payments] == ["Settled", "Processing"]


def test_it_becomes_invalid_once_monitoring_ended_unconfirmed() -> None:
    processing = look(an_invoice(), seen()).invoice
    assert state(advance(processing, WATCH_END)) == ("Processing", "None")
    change = advance(processing, WATCH_END + 1)
    assert state(change) == ("Invalid", "None")
    assert [(event.type, event.facts) for event in change.events] == [(EventType.INVALID, {"manuallyMarked": False})]


# From Expired


def test_a_full_late_payment_is_paid_late_and_never_settles_by_itself() -> None:
    expired = advance(an_invoice(), EXPIRY).invoice
    late = look(expired, seen(), now=EXPIRY + 60)
    assert state(late) == ("Expired", "PaidLate")
    assert told(late) == ["ReceivedPayment", "PaidAfterExpiration"]
    assert late.events[0].facts == {"afterExpiration": True}
    confirmed = look(late.invoice, seen(confirmations=6), now=EXPIRY + 600)
    assert state(confirmed) == ("Expired", "PaidLate")
    assert told(confirmed) == ["PaymentSettled"]
    assert confirmed.events[0].facts == {"afterExpiration": True}
    assert state(advance(confirmed.invoice, WATCH_END + 1)) == ("Expired", "PaidLate")


def test_a_partial_late_payment_is_paid_partial() -> None:
    expired = advance(an_invoice(), EXPIRY).invoice
    change = look(expired, seen("0.001"), now=EXPIRY + 60)
    assert state(change) == ("Expired", "PaidPartial")
    assert told(change) == ["ReceivedPayment"]


# Terminal states


def test_extra_payments_after_settled_are_told_and_change_nothing_else() -> None:
    settled = look(an_invoice(), seen(confirmations=1)).invoice
    assert (settled.status, settled.additional) == (Status.SETTLED, Additional.NONE)
    extra = look(settled, seen(confirmations=1), seen("0.005", id="b-0"), now=EXPIRY + 60)
    assert state(extra) == ("Settled", "None")
    assert told(extra) == ["ReceivedPayment"]
    assert extra.events[0].facts == {"afterExpiration": False}
    assert totals(extra.invoice).paid_net > 300
    later = look(extra.invoice, seen(confirmations=2), seen("0.005", 1, id="b-0"), now=EXPIRY + 90)
    assert told(later) == ["PaymentSettled"]


def test_a_reorg_after_settled_does_not_unsettle_it() -> None:
    settled = look(an_invoice(), seen(confirmations=1)).invoice
    change = look(settled, seen(replaced=True), now=WATCH_END + 1)
    assert state(change) == ("Settled", "None")


def test_an_invalid_invoice_does_not_recover() -> None:
    invalid = advance(look(an_invoice(), seen()).invoice, WATCH_END + 1).invoice
    change = look(invalid, seen(confirmations=1), now=WATCH_END + 60)
    assert state(change) == ("Invalid", "None")
    assert told(change) == ["PaymentSettled"]
    assert change.events[0].facts == {"afterExpiration": True}


# The operator's word


@pytest.mark.parametrize("status", [Status.NEW, Status.PROCESSING, Status.EXPIRED, Status.INVALID])
def test_the_operator_may_mark_as_settled(status: Status) -> None:
    change = mark(an_invoice(status=status), Status.SETTLED)
    assert change is not None
    assert state(change) == ("Settled", "Marked")
    assert change.events[0].facts == {"manuallyMarked": True, "overPaid": False}


@pytest.mark.parametrize(
    ("status", "additional"),
    [("New", "None"), ("Processing", "None"), ("Expired", "PaidLate"), ("Settled", "Marked")],
)
def test_the_operator_may_mark_as_invalid(status: str, additional: str) -> None:
    change = mark(an_invoice(status=Status(status), additional=Additional(additional)), Status.INVALID)
    assert change is not None
    assert state(change) == ("Invalid", "Marked")
    assert change.events[0].facts == {"manuallyMarked": True}


def test_a_settled_invoice_cannot_be_marked() -> None:
    settled = an_invoice(status=Status.SETTLED)
    assert markable(settled) == []
    assert mark(settled, Status.SETTLED) is None
    assert mark(settled, Status.INVALID) is None
    assert mark(settled, Status.EXPIRED) is None


def test_a_marked_invoice_stays_as_it_was_marked() -> None:
    marked = mark(an_invoice(), Status.SETTLED)
    assert marked is not None
    assert state(advance(marked.invoice, WATCH_END + 1)) == ("Settled", "Marked")


# Confirmations


@pytest.mark.parametrize(
    ("speed", "needed"), [("HighSpeed", 0), ("MediumSpeed", 1), ("LowMediumSpeed", 2), ("LowSpeed", 6)]
)
def test_the_speed_policy_says_how_many_blocks(speed: str, needed: int) -> None:
    if needed:
        early = look(an_invoice(speed=speed), seen(confirmations=needed - 1))
        assert early.invoice.status is Status.PROCESSING
    assert look(an_invoice(speed=speed), seen(confirmations=needed)).invoice.status is Status.SETTLED


def test_high_speed_waits_for_a_block_where_the_payment_may_be_replaced() -> None:
    change = look(an_invoice(speed="HighSpeed"), seen(replaceable=True))
    assert change.invoice.status is Status.PROCESSING


def test_monero_waits_for_ten_blocks_whatever_the_speed() -> None:
    invoice = an_invoice("XMR-CHAIN", speed="HighSpeed")
    assert look(invoice, seen(confirmations=9), method="XMR-CHAIN").invoice.status is Status.PROCESSING
    assert look(invoice, seen(confirmations=10), method="XMR-CHAIN").invoice.status is Status.SETTLED


@pytest.mark.parametrize(("method", "speed"), [("BTC-LN", "LowSpeed"), ("BTC-CHAIN", "HighSpeed")])
def test_what_settles_at_first_sight_is_told_settled_before_received(method: str, speed: str) -> None:
    change = look(an_invoice(method, speed=speed), seen(), method=method)
    assert told(change) == ["PaymentSettled", "ReceivedPayment", "Processing", "Settled"]


def test_a_payment_found_again_is_not_told_again() -> None:
    processing = look(an_invoice(), seen()).invoice
    assert look(processing, seen()) == Change(processing)


# Figures


def test_tolerance_lets_a_little_less_be_enough() -> None:
    invoice = an_invoice(tolerance=Decimal(1))
    assert look(invoice, seen("0.00198")).invoice.status is Status.PROCESSING
    assert look(invoice, seen("0.00197")).invoice.status is Status.NEW


def test_coins_are_rounded_up_and_paying_them_exactly_is_not_overpaying() -> None:
    invoice = an_invoice(price="10.00", rate="65000")
    figures = asked(invoice, invoice.prompts[0])
    assert figures.amount == Decimal("0.00015385")
    change = look(invoice, seen("0.00015385"))
    assert state(change) == ("Processing", "None")
    assert asked(change.invoice, change.invoice.prompts[0]).due == 0


def test_one_satoshi_more_is_overpaying_and_shows_as_negative_due() -> None:
    change = look(an_invoice(price="10.00", rate="65000"), seen("0.00015386"))
    assert state(change) == ("Processing", "PaidOver")
    assert asked(change.invoice, change.invoice.prompts[0]).due < 0


def test_a_fee_within_a_payment_does_not_pay_for_the_invoice() -> None:
    invoice = an_invoice("XMR-CHAIN")
    asking = replace(invoice, prompts=(replace(invoice.prompts[0], fee=Decimal("0.000002")),))
    assert asked(asking, asking.prompts[0]).amount == Decimal("0.002002")
    assert look(asking, seen("0.002"), method="XMR-CHAIN").invoice.status is Status.NEW
    assert look(asking, seen("0.002002"), method="XMR-CHAIN").invoice.status is Status.PROCESSING


def test_an_invoice_without_amount_takes_its_price_from_the_first_payment() -> None:
    change = look(an_invoice(price="0", is_topup=True), seen("0.001"))
    assert state(change) == ("Processing", "None")
    assert change.invoice.price == 50


def test_an_invoice_over_zero_settles_at_once() -> None:
    change = advance(an_invoice(price="0", prompts=()), NOW)
    assert state(change) == ("Settled", "None")
    assert told(change) == ["Processing", "Settled"]
