"""An attempt's life: what wallets answer, what is credited for it, and what it means for the next attempt."""

from dataclasses import replace
from datetime import timedelta

import pytest

from app.autotopup.rules import DEFINITE, PAUSE_AT_ONCE
from app.autotopup.wallet import Encryption, LightningInvoice
from app.topups.credit import check_due
from app.topups.gateway import AdditionalStatus, InvoiceStatus
from tests.autotopup.conftest import Street
from tests.wallets import UNREACHABLE

REFUSED_AT_ONCE = sorted(DEFINITE - {"RATE_LIMITED", "UNSUPPORTED_ENCRYPTION"})
AMBIGUOUS = ("PAYMENT_FAILED", "INTERNAL", "OTHER", "NOT_FOUND", "SOMETHING_NEW", "not a code; DROP TABLE")


async def test_a_wallet_that_pays_refills_the_balance_with_the_bonus(street: Street) -> None:
    await street.connect()
    attempt = await street.attempt("pays")
    assert (attempt["state"], attempt["sends"], attempt["is_proven"]) == ("settled", 1, True)
    assert street.balance_usd() == 4 + 10 + 0.5


async def test_the_request_is_committed_before_it_is_published(street: Street) -> None:
    seen = []

    async def look(event_id: str, bolt11: str) -> None:
        seen.append(street.last())
        assert (seen[-1]["state"], seen[-1]["event_id"], seen[-1]["bolt11"]) == ("sent", event_id, bolt11)
        # Nor is any transaction of ours open while the wallet is asked.
        [(idle,)] = street.sql(
            """SELECT count(*) FROM pg_stat_activity
               WHERE state LIKE 'idle in transaction%%' AND datname = current_database()"""
        )
        assert idle == 0

    street.wallets.before_pay = look
    await street.connect()
    await street.attempt("pays")
    assert len(seen) == 1


@pytest.mark.parametrize("act", ["pays unproven", "wrong preimage"])
async def test_a_reply_without_proof_waits_for_the_backend_all_the_same(street: Street, act: str) -> None:
    await street.connect()
    attempt = await street.attempt(act)
    paid = act == "pays unproven"
    assert attempt["state"] == ("settled" if paid else "paid_reported")
    assert street.balance_usd() == (14.5 if paid else 4)
    attempt = await street.until_closed()
    assert attempt["state"] == ("settled" if paid else "expired")
    assert (await street.connection())["refusals"] == (0 if paid else 1)


@pytest.mark.parametrize("code", REFUSED_AT_ONCE)
async def test_a_sure_refusal_closes_the_attempt(street: Street, code: str) -> None:
    await street.connect()
    attempt = await street.attempt(code)
    assert (attempt["state"], attempt["code"], attempt["reason"]) == ("rejected", code, "refused")
    connection = await street.connection()
    assert connection["refusals"] == 1
    assert connection["pause"] == (code if code in PAUSE_AT_ONCE else None)
    [(low,)] = street.sql("SELECT low_nusd FROM account")
    assert (low is None) == (code in PAUSE_AT_ONCE)


@pytest.mark.parametrize("code", AMBIGUOUS)
@pytest.mark.parametrize("was_paid", [True, False])
async def test_any_other_error_may_come_of_a_payment(street: Street, code: str, was_paid: bool) -> None:
    await street.connect()
    attempt = await street.attempt(f"pays, then {code}" if was_paid else code)
    assert (attempt["state"], attempt["sends"]) == ("unknown", 1)
    assert (await street.autotopup.begin(street.account_id)).ref is None
    attempt = await street.until_closed()
    assert attempt["state"] == ("settled" if was_paid else "expired")
    assert attempt["code"] == (code if code.isupper() and " " not in code else "OTHER")
    assert street.balance_usd() == (14.5 if was_paid else 4)
    assert (await street.connection())["refusals"] == (0 if was_paid else 1)


@pytest.mark.parametrize(("act", "ends"), [("silent", "expired"), ("garbage", "expired"), ("pays silently", "settled")])
async def test_a_lost_answer_is_unknown_until_the_backend_decides(street: Street, act: str, ends: str) -> None:
    street.wallets.answers_lookups = False
    await street.connect()
    attempt = await street.attempt(act)
    assert attempt["state"] == "unknown"
    began = street.clock()
    attempt = await street.until_closed()
    assert (attempt["state"], sum(street.wallets.published.values())) == (ends, 1)
    if ends == "expired":
        assert abs(street.clock() - began - timedelta(minutes=25)) < timedelta(seconds=2)


async def test_a_wallet_that_pays_after_we_stopped_listening_is_credited(street: Street) -> None:
    await street.connect()
    await street.attempt("late")
    street.clock.pass_(minutes=5)
    await street.tick()
    assert street.state() == "unknown"
    street.wallets.pay_late()
    street.clock.pass_(minutes=5)
    await street.tick()
    assert (street.state(), street.balance_usd()) == ("settled", 14.5)


async def test_a_payment_seen_after_the_attempt_was_closed_is_credited_and_settles_it(street: Street) -> None:
    await street.connect()
    await street.attempt("silent")
    await street.until_closed()
    [invoice] = street.btcpay.invoices.values()
    street.btcpay.pay(invoice.id, late=True)
    street.sql("UPDATE topup SET next_check_at = now()")
    await check_due(street.house.db, street.btcpay)
    await street.tick()
    assert (street.state(), round(street.balance_usd(), 2)) == ("settled", 14.5)


async def test_a_lookup_proves_a_payment_that_the_backend_has_not_told_yet(street: Street) -> None:
    await street.connect()
    await street.attempt("pays silently")
    [invoice] = street.btcpay.invoices.values()
    street.btcpay.change(invoice.id, status=InvoiceStatus.NEW, payments=())
    street.clock.pass_(seconds=6)
    await street.tick()
    attempt = street.last()
    assert (attempt["state"], attempt["is_proven"], street.balance_usd()) == ("paid_reported", True, 4)
    street.btcpay.invoices[invoice.id] = invoice
    street.clock.pass_(seconds=10)
    await street.tick()
    assert (street.state(), street.balance_usd()) == ("settled", 14.5)


async def test_a_proven_payment_that_never_arrives_is_shown_to_a_person_and_no_more_is_asked(street: Street) -> None:
    await street.connect()
    await street.attempt("proves without paying")
    assert street.state() == "paid_reported"
    assert (await street.until_closed())["reason"] == "unconfirmed"
    assert (await street.connection())["pause"] == "unconfirmed"
    [(review,)] = street.sql("SELECT review FROM topup")
    assert "proved a payment" in review


# --- the one re-send -----------------------------------------------------------------------------------


async def test_a_rate_limited_wallet_is_asked_once_more_for_the_same_invoice_after_half_a_minute(
    street: Street,
) -> None:
    await street.connect()
    attempt = await street.attempt("RATE_LIMITED", "pays")
    assert (attempt["state"], attempt["sends"]) == ("invoiced", 1)
    street.clock.pass_(seconds=29)
    await street.tick()
    assert sum(street.wallets.published.values()) == 1
    street.clock.pass_(seconds=1)
    await street.tick()
    assert (street.state(), list(street.wallets.published.values())) == ("settled", [2])
    assert len({event_id for event_id, _, _ in street.wallets.requests}) == 2


@pytest.mark.parametrize("second", [*sorted(DEFINITE), "PAYMENT_FAILED", "silent"])
async def test_after_a_second_request_nothing_is_a_sure_refusal_any_more(street: Street, second: str) -> None:
    await street.connect()
    await street.attempt("RATE_LIMITED", second)
    street.clock.pass_(seconds=30)
    await street.tick()
    assert street.state() == "unknown"
    attempt = await street.until_closed()
    assert (attempt["state"], list(street.wallets.published.values())) == ("expired", [2])
    connection = await street.connection()
    assert (connection["refusals"], connection["pause"]) == (1, second if second in PAUSE_AT_ONCE else None)


async def test_a_wallet_that_speaks_otherwise_now_is_asked_once_more_in_that_way(street: Street) -> None:
    await street.connect()
    street.wallets.encryption = Encryption.NIP04
    attempt = await street.attempt("UNSUPPORTED_ENCRYPTION", "pays")
    assert (attempt["state"], attempt["sends"]) == ("settled", 2)
    assert [how for _, _, how in street.wallets.requests] == [Encryption.NIP44, Encryption.NIP04]
    assert (await street.connection())["encryption"] == "nip04"


@pytest.mark.parametrize("is_gone", [True, False])
async def test_a_wallet_that_speaks_as_before_or_is_gone_is_not_asked_again(street: Street, is_gone: bool) -> None:
    await street.connect()
    street.wallets.unfit = UNREACHABLE if is_gone else None
    attempt = await street.attempt("UNSUPPORTED_ENCRYPTION", "pays")
    assert (attempt["state"], attempt["sends"]) == ("rejected", 1)
    assert (await street.connection())["refusals"] == 1


async def test_no_second_request_for_an_invoice_that_was_paid_by_hand(street: Street) -> None:
    await street.connect()
    await street.attempt("RATE_LIMITED", "pays")
    [invoice] = street.btcpay.invoices.values()
    street.btcpay.pay(invoice.id)
    street.clock.pass_(seconds=31)
    await street.tick()
    await street.tick()
    assert (street.state(), street.balance_usd()) == ("settled", 14.5)
    assert sum(street.wallets.published.values()) == 1


async def test_what_reached_no_relay_is_sent_again_while_the_invoice_lasts(street: Street) -> None:
    await street.connect()
    attempt = await street.attempt("unreachable", "unreachable", "pays")
    assert (attempt["state"], attempt["sends"], attempt["reason"]) == ("invoiced", 0, "unreached")
    attempt = await street.until_closed()
    assert (attempt["state"], attempt["sends"], list(street.wallets.published.values())) == ("settled", 1, [1])


async def test_relays_that_stay_away_cost_no_refusal_and_the_wallet_is_asked_seldomer(street: Street) -> None:
    await street.connect()
    street.wallets.act = "unreachable"
    await street.attempt()
    attempt = await street.until_closed()
    assert (attempt["state"], attempt["reason"]) == ("expired", "unreached")
    connection = await street.connection()
    assert (connection["refusals"], connection["pause"]) == (0, None)
    assert timedelta(minutes=5) <= connection["not_before"] - street.clock() <= timedelta(hours=1)


async def test_relays_that_do_not_take_the_request_are_not_the_wallets_silence(street: Street) -> None:
    await street.connect()
    street.wallets.answers_lookups = False
    attempt = await street.attempt("not taken")
    assert attempt["state"] == "unknown"  # relays have said so of what they passed on
    attempt = await street.until_closed()
    assert (attempt["state"], attempt["reason"]) == ("expired", "not_taken")
    connection = await street.connection()
    assert (connection["silent_since"], connection["refusals"], connection["pause"]) == (None, 0, None)
    assert connection["not_before"] > street.clock()


# --- the invoice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"network": "bc"}, "network"),
        ({"amount_msat": None}, "amount"),
        ({"amount_msat": 1}, "amount"),
        ({"amount_msat": 10**15}, "amount"),
        ({"expires": 119}, "too_late"),
    ],
)
async def test_an_invoice_that_is_not_what_was_asked_for_is_sent_to_no_wallet_and_the_check_is_named(
    street: Street, wrong: dict[str, int | str | None], fault: str
) -> None:
    if "expires" in wrong:
        street.btcpay.spoils = lambda asks: replace(asks, expires_at=street.clock() + timedelta(seconds=119))
    else:
        street.btcpay.spoils = lambda asks: replace(asks, **wrong)  # type: ignore[arg-type]
    await street.connect()
    attempt = await street.attempt("pays")
    assert (attempt["state"], attempt["reason"]) == ("expired", fault)
    assert not street.wallets.published


async def test_an_invoice_that_cannot_be_read_is_sent_to_no_wallet(street: Street) -> None:
    await street.connect()
    ref = await street.begin()
    street.btcpay.bolt11s.clear()
    street.wallets.read_invoice = _raises  # type: ignore[method-assign]
    await street.autotopup.drive(ref)
    assert (street.state(), street.last()["reason"]) == ("expired", "unreadable")


def _raises(bolt11: str) -> LightningInvoice:
    raise ValueError("not a BOLT11")


async def test_a_payment_hash_that_was_used_before_is_not_paid_for_again(street: Street) -> None:
    await street.connect(amount=1)
    await street.attempt("INSUFFICIENT_BALANCE")
    used = street.last()["payment_hash"]
    street.btcpay.spoils = lambda asks: replace(asks, payment_hash=used)
    street.clock.pass_(hours=2)
    attempt = await street.attempt("pays")
    assert (attempt["state"], attempt["reason"], sum(street.wallets.published.values())) == ("expired", "used", 1)


async def test_a_backend_that_is_down_is_asked_again_for_the_same_topup(street: Street) -> None:
    await street.connect()
    street.btcpay.is_down = True
    assert (await street.attempt())["state"] == "created"
    street.btcpay.is_down, street.btcpay.loses_answers = False, True
    street.clock.pass_(seconds=30)
    await street.tick()
    assert street.state() == "created"
    street.btcpay.loses_answers = False
    street.clock.pass_(minutes=1)
    await street.tick()
    assert (street.state(), street.btcpay.created, street.balance_usd()) == ("settled", 1, 14.5)


async def test_a_backend_that_stays_down_ends_the_attempt_and_costs_no_refusal(street: Street) -> None:
    await street.connect()
    street.btcpay.is_down = True
    await street.attempt()
    attempt = await street.until_closed()
    assert (attempt["state"], attempt["reason"]) == ("expired", "backend")
    assert (await street.connection())["refusals"] == 0
    street.btcpay.is_down = False
    street.clock.pass_(minutes=6)
    assert (await street.attempt("pays"))["state"] == "settled"


async def test_while_the_backend_is_down_nothing_that_was_sent_is_given_up(street: Street) -> None:
    await street.connect()
    await street.attempt("pays silently")
    street.btcpay.is_down, street.wallets.answers_lookups = True, False
    for _ in range(20):
        street.clock.pass_(minutes=5)
        await street.tick()
    assert street.state() == "unknown"
    street.btcpay.is_down = False
    street.clock.pass_(minutes=5)
    await street.tick()
    assert (street.state(), street.balance_usd()) == ("settled", 14.5)


async def test_an_invoice_that_the_backend_lost_is_given_up_after_a_day(street: Street) -> None:
    await street.connect()
    await street.attempt("silent")
    street.btcpay.invoices.clear()
    began = street.clock()
    assert (await street.until_closed())["state"] == "expired"
    assert street.clock() - began > timedelta(hours=24)


async def test_an_invoice_marked_settled_by_hand_credits_nothing_and_ends(street: Street) -> None:
    await street.connect()
    await street.attempt("silent")
    [invoice_id] = street.btcpay.invoices
    street.btcpay.change(invoice_id, status=InvoiceStatus.SETTLED, additional_status=AdditionalStatus.MARKED)
    assert (await street.until_closed())["state"] == "expired"
    assert street.balance_usd() == 4
