"""The crediting table, row by row, and what holds for every invoice there could be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.kernel.money import worth_nusd
from app.topups.gateway import AdditionalStatus as Also
from app.topups.gateway import Invoice, Payment
from app.topups.gateway import InvoiceStatus as Is
from app.topups.gateway import PaymentStatus as Paid
from app.topups.owed import LATE_GRACE, Owed, face_nusd, needs_rate_now, owed

USD: Final = 10**9
MADE: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
EXPIRES: Final = MADE + timedelta(hours=1)
IN_TIME, LATE = MADE + timedelta(minutes=5), EXPIRES + timedelta(hours=2)
GRACE_ENDS: Final = EXPIRES + LATE_GRACE
SECOND: Final = timedelta(seconds=1)


def paid(
    coins: str, status: Paid = Paid.SETTLED, at: datetime = IN_TIME, *, fee: str = "0", name: str | None = None
) -> Payment:
    return Payment(name or f"{coins} {status} {at}", Decimal(coins), Decimal(fee), status, at, "address")


def invoice(status: Is, also: Also, *payments: Payment, **changes: Any) -> Invoice:
    """20 USD in litecoin at 80 USD, which is 0.25 LTC; `changes` make it another."""
    ltc = Invoice(
        id="Inv", order_id="topup", currency="USD", amount=Decimal(20), status=status, additional_status=also,
        created_at=MADE, expires_at=EXPIRES, watched_until=EXPIRES + timedelta(days=7), checkout_url="", method="ltc",
        destination="", payment_link="", rate=Decimal(80), total=Decimal("0.25"), due=Decimal(0), paid=Decimal(0),
        fee=Decimal(0), payments=payments,
    )  # fmt: skip
    return replace(ltc, **changes)


BTC_USD: Final[dict[str, Any]] = {"method": "btc", "amount": Decimal(10), "rate": Decimal(65000)}
SATS: Final[dict[str, Any]] = {
    "method": "btc-lightning",
    "currency": "SATS",
    "amount": Decimal(1000),
    "rate": Decimal(10**8),
}
BTC: Final[dict[str, Any]] = {"method": "btc", "currency": "BTC", "amount": Decimal("0.001"), "rate": Decimal(1)}
XMR: Final[dict[str, Any]] = {"method": "xmr", "currency": "XMR", "amount": Decimal("0.1"), "rate": Decimal(1)}
LTC: Final[dict[str, Any]] = {"currency": "LTC", "amount": Decimal("0.25"), "rate": Decimal(1)}
LBTC: Final[dict[str, Any]] = {"method": "lbtc", "currency": "LBTC", "amount": Decimal("0.001"), "rate": Decimal(1)}


@dataclass(frozen=True)
class Row:
    """A row of the table: this invoice is worth `usd`, and is or is not shown to a person."""

    name: str
    invoice: Invoice
    usd: str
    review: bool = False
    quote: str | None = None
    rate_now: str | None = None
    known: tuple[tuple[str, str], ...] = ()

    def owed(self) -> Owed:
        known = {payment: _nusd(usd) for payment, usd in self.known}
        return owed(self.invoice, _decimal(self.quote), _decimal(self.rate_now), known)


def _nusd(usd: str) -> int:
    return int(Decimal(usd) * USD)


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)


FULL, HALF = paid("0.25", name="full"), paid("0.125", name="half")
TABLE: Final = (
    # New and Processing: nothing, whatever is on its way
    Row("new, nobody paid", invoice(Is.NEW, Also.NONE), "0"),
    Row("new, a part is settled", invoice(Is.NEW, Also.PAID_PARTIAL, HALF), "0"),
    Row("new again after a double spend", invoice(Is.NEW, Also.NONE, paid("0.25", Paid.INVALID)), "0"),
    Row("processing, in full", invoice(Is.PROCESSING, Also.NONE, paid("0.25", Paid.PROCESSING)), "0"),
    Row("processing, the half is settled", invoice(Is.PROCESSING, Also.NONE, HALF, paid("0.125", Paid.PROCESSING)), "0"),
    Row("processing, paid over", invoice(Is.PROCESSING, Also.PAID_OVER, paid("1", Paid.PROCESSING)), "0"),
    # Settled, tolerance 0: the face, once
    Row("settled, in full", invoice(Is.SETTLED, Also.NONE, FULL), "20"),
    Row("settled, by two halves", invoice(Is.SETTLED, Also.NONE, HALF, paid("0.125", name="other half")), "20"),
    Row("settled, coins rounded up", invoice(Is.SETTLED, Also.NONE, paid("0.00015385"), **BTC_USD), "10"),
    Row("settled, coins a satoshi short", invoice(Is.SETTLED, Also.NONE, paid("0.24999999")), "20"),
    Row("settled, the fee was paid on top", invoice(Is.SETTLED, Also.NONE, paid("0.26", fee="0.01")), "20"),
    Row("settled, beside a double spend", invoice(Is.SETTLED, Also.NONE, FULL, paid("0.25", Paid.INVALID)), "20"),
    # Settled, tolerance above 0: what was paid, never more than the face
    Row("settled, tolerated a little less", invoice(Is.SETTLED, Also.NONE, paid("0.24")), "19.2", review=True),
    Row("settled, two satoshis short", invoice(Is.SETTLED, Also.NONE, paid("0.24999998")), "19.9999984", review=True),
    Row("settled, tolerated all of it", invoice(Is.SETTLED, Also.NONE), "0", review=True),
    # Settled, paid over, or paid again: the excess too, once it is settled
    Row("settled, paid over", invoice(Is.SETTLED, Also.PAID_OVER, paid("0.3")), "24"),
    Row("settled, paid over by two satoshis", invoice(Is.SETTLED, Also.PAID_OVER, paid("0.25000002")), "20.0000016"),
    Row(
        "settled, the excess is rounded down",
        invoice(Is.SETTLED, Also.PAID_OVER, paid("0.00016000"), **{**BTC_USD, "rate": Decimal("65000.00001")}),
        "10.400000001",
    ),
    Row("settled, the excess is on its way", invoice(Is.SETTLED, Also.PAID_OVER, FULL, paid("0.25", Paid.PROCESSING)), "20"),
    Row("settled, paid again", invoice(Is.SETTLED, Also.NONE, FULL, paid("0.125", name="again")), "30"),
    Row("settled, paid again late, the price fell", invoice(Is.SETTLED, Also.NONE, FULL, paid("0.125", at=LATE)), "25", rate_now="40"),
    Row("settled, paid again late, the price rose", invoice(Is.SETTLED, Also.NONE, FULL, paid("0.125", at=LATE)), "30", rate_now="90"),
    # Expired: what is settled, late payments at the lower of then and now
    Row("expired, nobody paid", invoice(Is.EXPIRED, Also.NONE), "0"),
    Row("expired, a part is settled", invoice(Is.EXPIRED, Also.PAID_PARTIAL, HALF), "10"),
    Row("expired, a part is on its way", invoice(Is.EXPIRED, Also.PAID_PARTIAL, paid("0.125", Paid.PROCESSING)), "0"),
    Row("expired, a part less its fee", invoice(Is.EXPIRED, Also.PAID_PARTIAL, paid("0.125", fee="0.025")), "8"),
    Row("expired, a fee above its payment", invoice(Is.EXPIRED, Also.PAID_PARTIAL, paid("0.01", fee="0.02")), "0"),
    Row("expired, no face for a satoshi less", invoice(Is.EXPIRED, Also.PAID_PARTIAL, paid("0.24999999")), "19.9999992"),
    Row("expired, paid late, the price fell", invoice(Is.EXPIRED, Also.PAID_LATE, paid("0.25", at=LATE)), "10", rate_now="40"),
    Row("expired, paid late, the price rose", invoice(Is.EXPIRED, Also.PAID_LATE, paid("0.25", at=LATE)), "20", rate_now="90"),
    Row("expired, paid late, on its way", invoice(Is.EXPIRED, Also.PAID_LATE, paid("0.25", Paid.PROCESSING, LATE)), "0"),
    Row("expired, paid as the grace ends", invoice(Is.EXPIRED, Also.PAID_LATE, paid("0.25", at=GRACE_ENDS)), "20", rate_now="40"),
    Row("expired, paid after the grace", invoice(Is.EXPIRED, Also.PAID_LATE, paid("0.25", at=GRACE_ENDS + SECOND)), "10", rate_now="40"),
    Row("expired, half in time and half late", invoice(Is.EXPIRED, Also.PAID_LATE, HALF, paid("0.125", at=LATE)), "15", rate_now="40"),
    Row("expired, late, valued before", invoice(Is.EXPIRED, Also.PAID_LATE, paid("0.25", at=LATE, name="p")), "12", known=(("p", "12"),)),
    # Invalid: like late, and a person looks
    Row("invalid, nothing confirmed", invoice(Is.INVALID, Also.NONE, paid("0.25", Paid.PROCESSING)), "0", review=True),
    Row("invalid, half confirmed", invoice(Is.INVALID, Also.NONE, HALF, paid("0.125", Paid.PROCESSING)), "10", review=True),
    Row("invalid, confirmed afterwards", invoice(Is.INVALID, Also.PAID_OVER, paid("0.3")), "24", review=True),
    Row("invalid, paid late", invoice(Is.INVALID, Also.NONE, paid("0.25", at=LATE)), "10", review=True, rate_now="40"),
    # Marked: what was really paid, and a person looks
    Row("marked settled, unpaid", invoice(Is.SETTLED, Also.MARKED), "0", review=True),
    Row("marked settled, on its way", invoice(Is.SETTLED, Also.MARKED, paid("0.25", Paid.PROCESSING)), "0", review=True),
    Row("marked settled, half paid", invoice(Is.SETTLED, Also.MARKED, HALF), "10", review=True),
    Row("marked settled, paid late", invoice(Is.SETTLED, Also.MARKED, paid("0.25", at=LATE)), "10", review=True, rate_now="40"),
    Row("marked invalid, unpaid", invoice(Is.INVALID, Also.MARKED), "0", review=True),
    Row("marked invalid, though paid", invoice(Is.INVALID, Also.MARKED, FULL), "0", review=True),
    # Priced in a coin: our quote decides
    Row("sats, in full", invoice(Is.SETTLED, Also.NONE, paid("0.00001"), **SATS), "0.65", quote="65000"),
    Row("sats, a part, to the millisatoshi", invoice(Is.EXPIRED, Also.PAID_PARTIAL, paid("0.00000500001"), **SATS), "0.32500065", quote="65000"),
    Row("btc, in full", invoice(Is.SETTLED, Also.NONE, paid("0.001"), **BTC), "65", quote="65000"),
    Row("btc, paid over", invoice(Is.SETTLED, Also.PAID_OVER, paid("0.002"), **BTC), "130", quote="65000"),
    Row("btc, paid late, the price fell", invoice(Is.EXPIRED, Also.PAID_LATE, paid("0.001", at=LATE), **BTC), "50", quote="65000", rate_now="50000"),
    Row("btc, paid late, the price rose", invoice(Is.EXPIRED, Also.PAID_LATE, paid("0.001", at=LATE), **BTC), "65", quote="65000", rate_now="70000"),
    Row("lbtc, in full", invoice(Is.SETTLED, Also.NONE, paid("0.001"), **LBTC), "65", quote="65000"),
    Row("ltc, in full", invoice(Is.SETTLED, Also.NONE, FULL, **LTC), "20", quote="80"),
    Row("xmr, in full with its fee", invoice(Is.SETTLED, Also.NONE, paid("0.100002", fee="0.000002"), **XMR), "15", quote="150"),
    Row("xmr, a part, to the piconero", invoice(Is.EXPIRED, Also.PAID_PARTIAL, paid("0.000000000007"), **XMR), "0.000000001", quote="150"),
)  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_the_table(row: Row) -> None:
    found = row.owed()
    assert found.credit_nusd == _nusd(row.usd)
    assert (found.review is not None) is row.review


def test_the_table_has_every_pair_of_states_that_btcpay_can_show() -> None:
    shown = {(row.invoice.status, row.invoice.additional_status) for row in TABLE}
    assert shown >= {
        (Is.NEW, Also.NONE), (Is.NEW, Also.PAID_PARTIAL), (Is.PROCESSING, Also.NONE), (Is.PROCESSING, Also.PAID_OVER),
        (Is.SETTLED, Also.NONE), (Is.SETTLED, Also.PAID_OVER), (Is.SETTLED, Also.MARKED), (Is.EXPIRED, Also.NONE),
        (Is.EXPIRED, Also.PAID_PARTIAL), (Is.EXPIRED, Also.PAID_LATE), (Is.INVALID, Also.NONE), (Is.INVALID, Also.PAID_OVER),
        (Is.INVALID, Also.MARKED),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("payment", "known", "is_needed"),
    [
        (paid("0.25"), {}, False),
        (paid("0.25", at=GRACE_ENDS), {}, False),
        (paid("0.25", Paid.PROCESSING, LATE), {}, False),
        (paid("0.25", Paid.INVALID, LATE), {}, False),
        (paid("0.25", at=LATE, name="p"), {"p": 1}, False),
        (paid("0.25", at=LATE, name="p"), {"q": 1}, True),
        (paid("0.25", at=LATE), {}, True),
    ],
    ids=[
        "in time",
        "in grace",
        "late, on its way",
        "late, double spent",
        "late, valued",
        "late, another valued",
        "late",
    ],
)
def test_todays_rate_is_asked_for_settled_late_payments_alone(
    payment: Payment, known: dict[str, int], is_needed: bool
) -> None:
    expired = invoice(Is.EXPIRED, Also.PAID_LATE, payment)
    assert needs_rate_now(expired, known) is is_needed
    if not is_needed:
        owed(expired, None, None, known)


# --- what holds for every invoice -----------------------------------------------------------------

RATES: Final = st.decimals("0.01", "1000000", places=8)
COINS: Final = st.decimals("0.00000001", "5", places=11)


@st.composite
def payments(draw: st.DrawFn) -> tuple[Payment, ...]:
    return tuple(
        Payment(f"p{number}", draw(COINS), draw(st.decimals("0", "0.01", places=8)), draw(st.sampled_from(Paid)),
                draw(st.sampled_from((IN_TIME, EXPIRES, GRACE_ENDS, GRACE_ENDS + SECOND, LATE))), "address")
        for number in range(draw(st.integers(0, 5)))
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An invoice, and the rates there are when it is looked at."""

    invoice: Invoice
    quote: Decimal | None
    rate_now: Decimal

    @property
    def rate(self) -> Decimal:
        return self.quote if self.quote is not None else self.invoice.rate

    @property
    def face(self) -> int:
        return face_nusd(self.invoice, self.rate)

    @property
    def dust(self) -> int:
        return worth_nusd(Decimal("0.00000001"), self.rate) + 1

    def owed(self, known: dict[str, int] | None = None) -> Owed:
        return owed(self.invoice, self.quote, self.rate_now, known or {})

    def having(self, payments: Sequence[Payment]) -> "Case":
        return replace(self, invoice=replace(self.invoice, payments=tuple(payments)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any state with any payments: also what BTCPay would never show."""
    currency, method = draw(
        st.sampled_from((("USD", "ltc"), ("SATS", "btc-lightning"), ("BTC", "btc"), ("XMR", "xmr")))
    )
    rate = draw(RATES) if currency == "USD" else Decimal(10**8 if currency == "SATS" else 1)
    amount = draw(st.integers(1, 10**6).map(Decimal) if currency == "SATS" else st.decimals("0.001", "1000", places=8))
    shown = invoice(
        draw(st.sampled_from(Is)), draw(st.sampled_from(Also)), *draw(payments()),
        currency=currency, method=method, rate=rate, amount=amount,
    )  # fmt: skip
    return Case(shown, None if currency == "USD" else draw(RATES), draw(RATES))


def settled_worth(case: Case, rate: Decimal) -> int:
    """What the settled payments are worth at one rate, rounded in the payer's favour."""
    nets = (max(Decimal(0), p.value - p.fee) for p in case.invoice.payments if p.status is Paid.SETTLED)
    return sum(worth_nusd(net, rate) + 1 for net in nets)


@given(cases())
def test_never_more_than_was_settled_but_for_dust_and_never_less_than_nothing(case: Case) -> None:
    credit = case.owed().credit_nusd
    assert 0 <= credit <= settled_worth(case, case.rate) + case.dust
    if credit > settled_worth(case, case.rate):
        assert credit == case.face


@given(cases())
def test_a_payment_that_is_not_settled_changes_nothing(case: Case) -> None:
    settled = [payment for payment in case.invoice.payments if payment.status is Paid.SETTLED]
    assert case.having(settled).owed() == case.owed()


@given(cases(), payments())
def test_one_more_payment_never_takes_anything_away(case: Case, more: tuple[Payment, ...]) -> None:
    added = [replace(payment, id=f"more {payment.id}") for payment in more]
    assert case.having([*case.invoice.payments, *added]).owed().credit_nusd >= case.owed().credit_nusd


@given(cases())
def test_a_confirmation_never_takes_anything_away(case: Case) -> None:
    confirmed = [
        replace(payment, status=Paid.SETTLED) if payment.status is Paid.PROCESSING else payment
        for payment in case.invoice.payments
    ]
    assert case.having(confirmed).owed().credit_nusd >= case.owed().credit_nusd


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_payments_does_not_matter(case: Case, random: Random) -> None:
    shuffled = random.sample(case.invoice.payments, len(case.invoice.payments))
    assert case.having(shuffled).owed() == case.owed()


@given(cases(), RATES)
def test_what_a_payment_was_found_to_be_worth_stays_whatever_the_rate_does(case: Case, later: Decimal) -> None:
    first = case.owed()
    known = dict(first.worth_nusd)
    assert replace(case, rate_now=later).owed(known) == first
    if first.worth_nusd:
        assert not needs_rate_now(case.invoice, known)
        assert owed(case.invoice, case.quote, None, known) == first


@given(cases(), RATES)
def test_todays_rate_matters_to_late_payments_alone(case: Case, other: Decimal) -> None:
    in_time = case.having([payment for payment in case.invoice.payments if payment.received_at <= GRACE_ENDS])
    assert not needs_rate_now(in_time.invoice, {})
    assert owed(in_time.invoice, case.quote, None, {}) == replace(in_time, rate_now=other).owed()


@given(cases(), RATES)
def test_a_dearer_coin_of_today_never_makes_a_late_payment_worth_more_than_was_promised(
    case: Case, dearer: Decimal
) -> None:
    risen = replace(case, rate_now=case.rate + dearer).owed()
    assert risen == replace(case, rate_now=case.rate).owed()
    assert risen.credit_nusd >= case.owed().credit_nusd
