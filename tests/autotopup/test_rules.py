"""The rules alone: every reply has one meaning, every state its successors, every wait its length."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.autotopup import rules
from app.autotopup.api import AttemptState
from app.autotopup.rules import DEFINITE, MOVES, OPEN, PAUSE_AT_ONCE, PAUSES, State, meaning_of
from app.autotopup.wallet import LightningInvoice, PayOutcome, PayReply

NOW = datetime(2026, 2, 1, tzinfo=UTC)
replies = st.builds(
    PayReply, outcome=st.sampled_from(PayOutcome), code=st.none() | st.sampled_from(sorted(DEFINITE)) | st.text(max_size=50),
    message=st.text(max_size=5), is_proven=st.booleans(), was_answered=st.booleans(), was_published=st.booleans(),
)  # fmt: skip


@given(replies, st.integers(1, 2))
def test_every_reply_means_something_that_may_follow_a_request(reply: PayReply, sends: int) -> None:
    meaning = meaning_of(reply, sends)
    assert meaning.state in MOVES[State.SENT]
    assert meaning.code is None or (meaning.code.isascii() and len(meaning.code) <= 40)
    assert meaning.pause is None or meaning.pause in PAUSES
    assert meaning.reason is None or meaning.reason in rules.REASONS


@given(replies, st.integers(1, 2))
def test_only_a_sure_refusal_of_the_only_request_closes_an_attempt_or_lets_it_be_sent_again(
    reply: PayReply, sends: int
) -> None:
    meaning = meaning_of(reply, sends)
    surely_refused = reply.outcome is PayOutcome.REFUSED and reply.code in DEFINITE and sends == 1
    if meaning.state is State.REJECTED:
        assert surely_refused
    if meaning.state is State.INVOICED:
        assert surely_refused or (not reply.was_published and not reply.was_answered)
        assert meaning.was_sent == surely_refused or not reply.was_published
    if reply.outcome is PayOutcome.PAID:
        assert meaning.state is State.PAID_REPORTED


@pytest.mark.parametrize("code", sorted(PAUSE_AT_ONCE))
def test_a_wallet_that_withdrew_its_consent_is_paused_even_on_a_second_answer(code: str) -> None:
    for sends, state in ((1, State.REJECTED), (2, State.UNKNOWN)):
        meaning = meaning_of(PayReply(PayOutcome.REFUSED, code, was_answered=True), sends)
        assert (meaning.state, meaning.pause) == (state, code)


def test_settled_may_follow_anything_and_nothing_follows_it() -> None:
    assert all(State.SETTLED in after for state, after in MOVES.items() if state is not State.SETTLED)
    assert MOVES[State.SETTLED] == frozenset()
    assert set(MOVES) == set(State)
    closed = set(State) - OPEN
    assert all(MOVES[state] <= {State.SETTLED} for state in closed)


def test_the_wire_knows_every_state() -> None:
    assert set(AttemptState.__args__) == {state.value for state in State}  # type: ignore[attr-defined]


def test_waits_grow_and_end() -> None:
    assert [rules.back_off(n) for n in (1, 2, 3, 4, 9)] == [timedelta(hours=hours) for hours in (1, 2, 4, 4, 4)]
    silences = [rules.after_silence(timedelta(minutes=minutes)) for minutes in (0, 5, 30, 60, 600)]
    assert silences == [timedelta(minutes=minutes) for minutes in (5, 5, 15, 30, 60)]
    waits = [(rules.look_again_at(n, None, NOW) - NOW).total_seconds() for n in range(6)]
    assert waits == [5, 15, 60, 300, 300, 300]
    expires = NOW - timedelta(minutes=9)
    assert rules.look_again_at(5, expires, NOW) == NOW + timedelta(minutes=1)


@pytest.mark.parametrize(
    ("status", "after", "is_over"),
    [
        ("New", timedelta(hours=23), False), ("New", timedelta(hours=24), True), ("Processing", timedelta(hours=1), False),
        ("Expired", timedelta(minutes=9), False), ("Expired", timedelta(minutes=10), True),
        ("Invalid", timedelta(minutes=10), True), ("Settled", timedelta(minutes=10), True),
    ],
)  # fmt: skip
def test_an_unpaid_invoice_is_over_when_the_backend_says_so_and_the_grace_has_passed(
    status: str, after: timedelta, is_over: bool
) -> None:
    assert rules.is_over(status, NOW - after, NOW) is is_over


@given(st.sampled_from(["bc", "tb", "bcrt"]), st.none() | st.integers(-5, 10), st.integers(-5, 10), st.integers(0, 300))
def test_an_invoice_is_paid_only_when_it_asks_for_exactly_what_was_asked_for(
    network: str, asked: int | None, due: int, seconds: int
) -> None:
    invoice = LightningInvoice(network, asked, "ab", NOW + timedelta(seconds=seconds))
    is_right = network == "bcrt" and asked == due and due > 0
    fault = rules.invoice_fault(invoice, due, "bcrt", NOW)
    assert (fault is None) == (is_right and seconds >= 120)
    wrong = "network" if network != "bcrt" else "amount"
    assert fault in (None, wrong if not is_right else "too_late")
