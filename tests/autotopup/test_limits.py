"""Caps, back-off, pauses and what lifts them, the kill switch, and connections that come and go."""

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.autotopup import attempts, connect
from app.autotopup.rules import MAX_ATTEMPTS_A_DAY
from app.kernel.db import Row, rows
from app.kernel.errors import NotFound, RateLimitExceeded
from app.kernel.security import Caller, Kind, Resealed, Sealer
from app.topups.admission import Caps
from app.topups.create import Wish, create_topup
from app.topups.credit import TopupRef, check_due, credit_if_paid
from app.topups.methods import METHODS
from tests.autotopup.conftest import Street
from tests.wallets import SECRET


async def begins(street: Street) -> bool:
    """Whether an attempt may begin now; if it does, it is taken to its end with what the wallet does by default."""
    begun = await street.autotopup.begin(street.account_id)
    if begun.ref is not None:
        await street.autotopup.drive(begun.ref)
    return begun.ref is not None


# --- may it begin? -----------------------------------------------------------------------------------


async def test_nothing_begins_at_or_above_the_threshold(street: Street) -> None:
    await street.connect()
    await street.give(1)
    assert not await begins(street)
    await street.give(-0.01)
    assert await begins(street)


async def test_nothing_begins_without_a_wallet_or_on_a_frozen_account(street: Street) -> None:
    assert not await begins(street)
    await street.connect()
    street.sql("UPDATE account SET status = 'frozen'")
    assert not await begins(street)
    assert await street.autotopup.low() == []


async def test_a_shortfall_of_several_topups_is_filled_one_after_the_other_without_a_wait(street: Street) -> None:
    await street.connect(threshold=35, amount=10)
    watcher = street.watcher()
    watcher.notice(street.account_id)
    await watcher.idle()
    assert street.states() == ["settled"] * 3
    assert street.balance_usd() == pytest.approx(35.5)


async def test_a_shortfall_is_filled_no_further_than_the_cap_of_a_day(street: Street) -> None:
    await street.connect(threshold=500, amount=10, max_per_day=25)
    watcher = street.watcher()
    await watcher.look_for_low()
    await watcher.idle()
    assert street.states() == ["settled"] * 2
    assert street.balance_usd() == pytest.approx(25)


async def test_a_shortfall_is_filled_on_by_whoever_finds_the_payment(street: Street) -> None:
    await street.connect(threshold=15, amount=10)
    await street.attempt("silent")
    street.btcpay.pay(next(iter(street.btcpay.invoices)))
    street.clock.pass_(seconds=6)
    watcher = street.watcher()
    await watcher.look_for_due()
    await watcher.idle()
    assert street.states() == ["settled"] * 2


async def test_a_minute_lies_between_an_attempt_that_was_not_paid_and_the_next(street: Street) -> None:
    await street.connect(threshold=100)
    ref = await street.begin()
    street.btcpay.spoils = lambda asks: replace(asks, expires_at=street.clock())
    await street.autotopup.drive(ref)
    street.btcpay.spoils = lambda asks: asks
    assert street.states() == ["expired"]
    street.clock.pass_(seconds=59)
    begun = await street.autotopup.begin(street.account_id)
    assert begun.ref is None
    assert begun.again_at == street.clock() + timedelta(seconds=1)
    street.clock.pass_(seconds=1)
    assert await begins(street)


async def test_a_days_money_is_capped_and_comes_back_as_the_day_rolls_on(street: Street) -> None:
    await street.connect(threshold=500, amount=10, max_per_day=35)
    for _ in range(3):
        assert await begins(street)
        street.clock.pass_(hours=1)
    assert not await begins(street)
    assert await street.autotopup.low() == []
    street.clock.pass_(hours=21, minutes=-1)
    assert not await begins(street)
    street.clock.pass_(minutes=1)
    assert await begins(street)
    assert street.states() == ["settled"] * 4


async def test_what_is_open_holds_the_cap_and_what_surely_failed_does_not(street: Street) -> None:
    await street.connect(threshold=500, amount=10, max_per_day=10)
    await street.attempt("INSUFFICIENT_BALANCE")
    street.clock.pass_(hours=1)
    await street.attempt("silent")
    assert street.states() == ["rejected", "unknown"]
    await street.connect(threshold=500, amount=10, max_per_day=15)
    street.clock.pass_(minutes=2)
    assert not await begins(street)  # one is open
    await street.until_closed()
    street.clock.pass_(hours=1)
    assert await begins(street)


async def test_the_number_of_attempts_a_day_is_capped(street: Street) -> None:
    await street.connect(threshold=5000, amount=1)
    for _ in range(MAX_ATTEMPTS_A_DAY):
        assert await begins(street)
        street.clock.pass_(seconds=61)
    assert not await begins(street)
    street.clock.pass_(hours=24)
    assert await begins(street)


async def test_the_safety_net_finds_a_low_account_that_nobody_told_of(street: Street) -> None:
    await street.connect()
    assert await street.autotopup.low() == [street.account_id]
    watcher = street.watcher()
    await watcher.look_for_low()
    await watcher.idle()
    assert street.state() == "settled"
    assert await street.autotopup.low() == []


async def test_the_safety_net_holds_while_the_sweep_is_broken(street: Street) -> None:
    broken, low = await street.open(100), street.account_id
    for street.account_id in (broken, low):
        await street.connect()
    street.sql("UPDATE nwc_connection SET refused_at = '2020-01-01', refusals = 1 WHERE account_id = %s", broken)
    street.account_id = broken
    await pay_by_hand(street)
    street.account_id = low
    watcher = street.watcher()
    with unwritable(street, "nwc_connection", broken):
        with pytest.raises(ExceptionGroup):
            await watcher.look_for_low()
        await watcher.idle()
    assert street.state() == "settled"


async def test_the_sweep_reads_no_more_for_all_the_history_there_is(street: Street) -> None:
    """Every 30 seconds: not even at a size where it looks cheap may the top-ups be read through."""
    await street.connect()
    await street.attempt("silent")
    await street.until_closed()
    street.sql(PLANT_TOPUPS, 20_000)
    street.sql(PLANT_ATTEMPTS)
    for table in ("topup", "nwc_attempt", "nwc_connection"):
        street.sql(f"ANALYZE {table}")

    async def look(session: AsyncSession) -> tuple[list[Row], list[Row]]:
        before = await scans(session)
        assert await attempts.paid_late(session, street.clock()) == []
        conn = await session.connection()
        assert (await conn.exec_driver_sql(attempts._DUE, {"now": street.clock()})).all() == []
        assert await connect.resumable(session) == []
        return before, await scans(session)

    before, after = await street.house.db.transaction(look)
    street.sql("DELETE FROM nwc_attempt WHERE created_at < '2021-01-01'")
    street.sql("DELETE FROM topup WHERE created_at < '2021-01-01'")
    assert before == after


async def scans(session: AsyncSession) -> list[Row]:
    """How often this backend read through the tables; what it has not told the statistics yet is counted as well."""
    return await rows(
        session,
        """SELECT relname, seq_scan FROM pg_stat_xact_user_tables WHERE relname IN ('topup', 'nwc_attempt')
           ORDER BY relname""",
    )


PLANT_TOPUPS = """
    INSERT INTO topup (account_id, id, backend, method, currency, amount_units, status, credited_nusd, created_at,
                       expires_at, watch_until, settled_at)
    SELECT id, gen_random_uuid(), 'btcpay', 'btc-lightning', 'USD', 1, 'Settled', 1, '2020-01-01', '2020-01-01', '2020-01-01',
           '2020-01-01' FROM account, generate_series(1, %s)"""
PLANT_ATTEMPTS = """
    INSERT INTO nwc_attempt (account_id, id, topup_id, connection_id, amount_nusd, state, created_at, closed_at)
    SELECT account_id, id, id, id, 1, 'expired', created_at, created_at FROM topup WHERE status = 'Settled'"""


# --- the kill switch -----------------------------------------------------------------------------------


async def test_switched_off_nothing_begins_and_nothing_is_sent(street: Street) -> None:
    await street.connect()
    off = street.another(is_on=False)
    assert (await off.begin(street.account_id)).ref is None
    assert await off.low() == []
    ref = await street.begin()
    await off.drive(ref)
    assert (street.state(), street.last()["reason"], sum(street.wallets.published.values())) == ("expired", "off", 0)


async def test_switched_off_what_was_sent_is_still_credited(street: Street) -> None:
    await street.connect()
    await street.attempt("pays silently")
    off = street.another(is_on=False)
    street.clock.pass_(seconds=10)
    for ref in await off.due():
        await off.drive(ref)
    assert (street.state(), street.balance_usd()) == ("settled", 14.5)


# --- back-off and pauses ---------------------------------------------------------------------------------


async def test_refusals_are_followed_by_1_2_and_4_hours_and_then_a_pause(street: Street) -> None:
    await street.connect()
    street.wallets.act = "INSUFFICIENT_BALANCE"
    for hours in (1, 2, 4):
        assert await begins(street)
        street.clock.pass_(hours=hours, seconds=-1)
        assert not await begins(street)
        street.clock.pass_(seconds=1)
    assert await begins(street)
    connection = await street.connection()
    assert (connection["pause"], connection["refusals"]) == ("refusals", 4)
    assert street.sql("SELECT low_nusd FROM account") == [(None,)]
    street.clock.pass_(days=30)
    assert not await begins(street)


async def test_a_payment_forgives_the_refusals_before_it(street: Street) -> None:
    await street.connect(threshold=500)
    for _ in range(3):
        await street.attempt("QUOTA_EXCEEDED")
        street.clock.pass_(hours=4)
    await street.attempt("pays")
    connection = await street.connection()
    assert (connection["refusals"], connection["not_before"], connection["pause"]) == (0, None, None)


@pytest.mark.parametrize(("code", "is_lifted"), [("INSUFFICIENT_BALANCE", True), ("UNAUTHORIZED", False)])
async def test_a_topup_by_hand_forgives_a_refusal_but_no_lost_right(street: Street, code: str, is_lifted: bool) -> None:
    await street.connect(threshold=500)
    street.wallets.act = code
    for _ in range(4):
        await begins(street)
        street.clock.pass_(hours=5)
    assert (await street.connection())["pause"] == ("refusals" if is_lifted else "UNAUTHORIZED")
    street.sql("UPDATE nwc_connection SET refused_at = now() - interval '1 minute'")  # tells the database's time
    await pay_by_hand(street)
    await street.tick()
    connection = await street.connection()
    assert (connection["pause"] is None) == is_lifted
    assert street.sql("SELECT low_nusd IS NOT NULL FROM account") == [(is_lifted,)]


async def pay_by_hand(street: Street) -> None:
    """A top-up that has nothing to do with the wallet."""
    topup_id = uuid.uuid4()

    async def finish(_: object, topup: dict[str, object]) -> str:
        return str(topup["invoice_id"])

    invoice_id = await create_topup(
        street.house.db, street.btcpay, Caller(Kind.CREDIT_ID, street.account_id), Wish(METHODS["btc"], "USD", 20 * 10**9),
        topup_id, finish,
    )  # fmt: skip
    street.btcpay.pay(invoice_id)
    assert await credit_if_paid(street.house.db, street.btcpay, TopupRef(street.account_id, topup_id))


async def test_a_customer_s_own_invoices_keep_no_wallet_from_being_asked(street: Street) -> None:
    """The account has as many waiting as it may; what its wallet is asked to pay is bounded by caps of its own."""
    caps, usd = Caps(waiting=3, per_hour=3, paid=3), 10**9

    async def finish(_: object, topup: Row) -> None:
        """Nothing is done with it."""

    async def ask(amount_usd: int) -> None:
        caller, wish = Caller(Kind.CREDIT_ID, street.account_id), Wish(METHODS["btc"], "USD", amount_usd * usd)
        await create_topup(street.house.db, street.btcpay, caller, wish, uuid.uuid4(), finish, caps, joins=True)

    for amount_usd in (20, 21, 22):
        await ask(amount_usd)
    with pytest.raises(RateLimitExceeded):
        await ask(23)
    await street.connect()
    assert (await street.attempt("pays"))["state"] == "settled"


async def test_payments_after_the_pause_are_forgiven_each_by_itself_and_as_one_with_their_attempt(
    street: Street,
) -> None:
    broken, whole = street.account_id, await street.open(4)
    for street.account_id in (broken, whole):
        await street.connect()
        await street.attempt("silent")
    await street.until_closed()
    for invoice_id in list(street.btcpay.invoices):
        street.btcpay.pay(invoice_id, late=True)
    street.sql("UPDATE topup SET next_check_at = now()")
    await check_due(street.house.db, street.btcpay)
    street.sql("UPDATE nwc_connection SET pause = 'unconfirmed'")  # which the wallet's own payment alone lifts
    with pytest.raises(ExceptionGroup), unwritable(street, "nwc_connection", broken):
        await street.autotopup.sweep()
    assert paused_and_states(street) == {broken: (True, "expired"), whole: (False, "settled")}
    await street.autotopup.sweep()
    assert paused_and_states(street) == {broken: (False, "settled"), whole: (False, "settled")}


@contextmanager
def unwritable(street: Street, table: str, account_id: uuid.UUID) -> Iterator[None]:
    """For this account, every change of the table breaks."""
    street.sql(
        f"""CREATE FUNCTION breaks() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN IF NEW.account_id = '{account_id}' THEN RAISE 'broken'; END IF; RETURN NEW; END $$"""
    )
    street.sql(f"CREATE TRIGGER breaks BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION breaks()")
    try:
        yield
    finally:
        street.sql("DROP FUNCTION breaks CASCADE")


def paused_and_states(street: Street) -> dict[uuid.UUID, tuple[bool, str]]:
    found = street.sql(
        "SELECT account_id, pause IS NOT NULL, state FROM nwc_connection JOIN nwc_attempt USING (account_id)"
    )
    return {account_id: (is_paused, state) for account_id, is_paused, state in found}


async def test_a_topup_from_before_the_refusal_forgives_nothing(street: Street) -> None:
    await street.connect(threshold=500)
    await pay_by_hand(street)
    street.clock.pass_(hours=1)
    await street.attempt("INSUFFICIENT_BALANCE")
    await street.tick()
    assert (await street.connection())["refusals"] == 1


async def test_a_day_of_silence_pauses_with_a_reason_of_its_own(street: Street) -> None:
    await street.connect()
    street.wallets.act, street.wallets.answers_lookups = "silent", False
    began, tried = street.clock(), 0
    while (await street.connection())["pause"] is None:
        tried += await begins(street)
        await street.until_closed()
        connection = await street.connection()
        street.clock.now = max(street.clock(), connection["not_before"])
    assert (connection["pause"], connection["refusals"]) == ("silence", 0)
    assert timedelta(hours=24) <= street.clock() - began < timedelta(hours=27)
    assert 10 < tried < MAX_ATTEMPTS_A_DAY


async def test_a_topup_by_hand_ends_the_silence_of_a_wallet_that_is_not_paused(street: Street) -> None:
    """Else two silences a month apart, and nothing between them but top-ups by hand, were one of a month."""
    await street.connect(threshold=500)
    street.wallets.answers_lookups = False
    await street.attempt("silent")
    await street.until_closed()
    street.sql("UPDATE nwc_connection SET silent_since = now() - interval '1 minute'")  # tells the database's time
    await street.tick()
    assert (await street.connection())["silent_since"] is not None
    await pay_by_hand(street)
    await street.tick()
    assert (await street.connection())["silent_since"] is None
    street.clock.pass_(days=30)
    await street.attempt("silent")
    await street.until_closed()
    assert (await street.connection())["pause"] is None


async def test_an_answer_of_any_kind_ends_the_silence(street: Street) -> None:
    await street.connect()
    street.wallets.answers_lookups = False
    await street.attempt("silent")
    await street.until_closed()
    assert (await street.connection())["silent_since"] is not None
    street.clock.pass_(hours=2)
    await street.attempt("INSUFFICIENT_BALANCE")
    assert (await street.connection())["silent_since"] is None


# --- connections come and go -----------------------------------------------------------------------------


async def test_connecting_again_lifts_a_pause_and_forgives_everything(street: Street) -> None:
    await street.connect()
    await street.attempt("EXPIRED")
    assert (await street.connection())["pause"] == "EXPIRED"
    await street.connect()
    street.clock.pass_(minutes=2)
    assert (await street.attempt("pays"))["state"] == "settled"


async def test_a_wallet_removed_before_it_is_asked_is_not_asked(street: Street) -> None:
    await street.connect()
    ref = await street.begin()
    await street.autotopup.advance(ref)
    await street.disconnect()
    await street.autotopup.drive(ref)
    assert (street.state(), street.last()["reason"], sum(street.wallets.published.values())) == (
        "expired",
        "disconnected",
        0,
    )


async def test_a_wallet_removed_while_it_is_asked_is_forgotten_and_its_payment_credited(street: Street) -> None:
    await street.connect()

    async def disconnect(event_id: str, bolt11: str) -> None:
        await street.disconnect()
        assert street.sql("SELECT 1 FROM nwc_connection") == []

    street.wallets.before_pay = disconnect
    attempt = await street.attempt("pays silently")
    assert attempt["state"] == "unknown"
    assert (await street.until_closed())["state"] == "settled"
    assert street.balance_usd() == 14.5
    with pytest.raises(NotFound):
        await street.disconnect()


async def test_a_wallet_put_in_anothers_place_waits_for_what_that_was_asked_to_pay(street: Street) -> None:
    await street.connect()
    await street.attempt("late")
    await street.connect(amount=20)
    street.clock.pass_(minutes=2)
    assert not await begins(street)
    street.wallets.pay_late()
    attempt = await street.until_closed()
    assert (attempt["state"], attempt["amount_nusd"]) == ("settled", 10 * 10**9)
    assert street.balance_usd() == 14.5


async def test_what_another_wallet_does_counts_against_that_one_only(street: Street) -> None:
    await street.connect()
    await street.attempt("PAYMENT_FAILED")
    await street.connect()
    await street.until_closed()
    assert (await street.connection())["refusals"] == 0


async def test_an_attempt_that_is_not_needed_any_more_is_not_sent(street: Street) -> None:
    await street.connect()
    ref = await street.begin()
    await street.give(100)
    await street.autotopup.drive(ref)
    assert (street.state(), street.last()["reason"], street.btcpay.created) == ("expired", "not_needed", 0)


async def test_disconnecting_and_beginning_at_once_never_asks_a_wallet_that_is_gone(street: Street) -> None:
    """After the DELETE is answered nothing more is committed as sent, whatever was going on."""
    for _ in range(10):
        await street.connect()
        street.clock.pass_(minutes=2)
        begun = await street.autotopup.begin(street.account_id)
        assert begun.ref is not None
        sent_before_gone: list[bool] = []

        async def look(event_id: str, bolt11: str, sent: list[bool] = sent_before_gone) -> None:
            sent.append(True)

        street.wallets.before_pay, street.wallets.acts = look, ["INSUFFICIENT_BALANCE"]
        await asyncio.gather(street.autotopup.drive(begun.ref), street.disconnect())
        assert street.last()["closed_at"] is not None
        assert bool(sent_before_gone) == (street.state() == "rejected")


async def test_the_secret_is_sealed_anew_by_keys_rotate_and_opens_for_its_account_alone(street: Street) -> None:
    await street.connect()
    old = street.house.settings.sealing_keys
    new = Sealer([("newer", bytes(range(32))), *old])
    before = (await street.connection())["sealed_secret"]
    assert SECRET not in before
    assert await connect.reseal_all(street.house.db, new) == Resealed(1)
    assert await connect.reseal_all(street.house.db, new) == Resealed()
    connection = await street.connection()
    assert connection["sealed_secret"].startswith("newer.")
    assert connect.opened(new, connection).uri.secret == SECRET
    stolen = {**connection, "account_id": uuid.uuid4()}
    with pytest.raises(Exception, match="does not open"):
        connect.opened(new, stolen)
    assert SECRET not in repr(connect.opened(new, connection))


async def test_a_secret_that_does_not_open_is_counted_and_keeps_no_other_from_being_sealed_anew(street: Street) -> None:
    accounts = [street.account_id, *[await street.open() for _ in range(2)]]
    for account_id in accounts:
        await street.connect(account_id=account_id)
    street.sql("UPDATE nwc_connection SET sealed_secret = 'lost.00' WHERE account_id = %s", min(accounts))
    new = Sealer([("newer", bytes(range(32))), *street.house.settings.sealing_keys])
    assert await connect.reseal_all(street.house.db, new) == Resealed(2, unreadable=1)
    assert await connect.reseal_all(street.house.db, new) == Resealed(0, unreadable=1)
    assert street.sql("SELECT sealed_secret FROM nwc_connection WHERE account_id = %s", min(accounts)) == [("lost.00",)]


async def test_a_secret_that_cannot_be_opened_pauses_with_a_reason(street: Street) -> None:
    await street.connect()
    ref = await street.begin()
    await street.autotopup.advance(ref)
    street.sql("UPDATE nwc_connection SET sealed_secret = 'gone.00'")
    await street.autotopup.drive(ref)
    assert (street.state(), (await street.connection())["pause"]) == ("expired", "unreadable")
