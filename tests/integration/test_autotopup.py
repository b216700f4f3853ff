"""Auto top-ups from end to end: the real service, the real NIP-47 client, and a wallet over a relay that misbehaves.

After every test the street checks that nothing was paid twice, that what BTCPay calls settled was credited once, and
that the books add up. The relays are the sandbox's own and PyPI's nostr-relay, a real one in a process of its own.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import pytest
import structlog

from app.adapters.nip47 import NwcWallets, WalletPatience
from app.kernel import logs
from app.kernel.settings import Settings
from tests.integration.real_relay import RealRelay
from tests.integration.wallet_street import CREDITED_USD, Made, Street, opened
from tests.program import free_ports
from tests.rig import Customer

pytestmark = pytest.mark.long

SILENCE_SECONDS = 2.0
"""How long the service waits for a wallet whose answer does not come, or too late; in life it is 90 s."""
REFILLED = Decimal("4.75") + CREDITED_USD

is_not_heard = pytest.mark.parametrize("pay_seconds", [SILENCE_SECONDS], ids=["not heard"])


def waiting(pay_seconds: float) -> Made:
    def made(settings: Settings) -> NwcWallets:
        patience = WalletPatience(pay_seconds=pay_seconds, answer_seconds=5.0, reconnect_seconds=0.1)
        return NwcWallets(allow_private_relays=True, lightning_network=settings.lightning_network, patience=patience)

    return made


@pytest.fixture
def pay_seconds() -> float:
    """An answer that comes is waited for as long as it takes on a busy machine."""
    return 60.0


@pytest.fixture
async def street(clean: str, tmp_path: Path, pay_seconds: float) -> AsyncIterator[Street]:
    """A street whose wallet is on the sandbox's own relay."""
    async with opened(tmp_path / "data", clean, waiting(pay_seconds)) as street:
        yield street


@asynccontextmanager
async def real_relay(folder: Path) -> AsyncIterator[RealRelay]:
    relay = RealRelay(folder, free_ports(1)[0])
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[RealRelay]:
    async with real_relay(tmp_path) as relay:
        yield relay


@pytest.fixture(params=["sandbox's relay", pytest.param("nostr-relay", marks=pytest.mark.slow)])
async def either(request: pytest.FixtureRequest, street: Street, tmp_path: Path) -> AsyncIterator[Street]:
    """The street with either relay."""
    if request.param == "nostr-relay":
        async with real_relay(tmp_path) as relay:
            await street.wallet(relays=[relay.url])
            yield street
            await street.wallet(relays=[])
    else:
        yield street


async def is_refilled(street: Street, customer: Customer) -> None:
    await street.until(lambda: street.balance(customer), REFILLED)
    await street.until_state(customer, "settled")


def sign(amount: Decimal) -> int:
    return (amount > 0) - (amount < 0)


async def nothing_more_happens(street: Street, customer: Customer) -> None:
    """Whatever the jobs still do, the balance stays, and the wallet is not asked again."""
    balance, asked = await street.balance(customer), await street.asked_to_pay()
    await street.later(seconds=59)
    await street.settled_down()
    assert (await street.balance(customer), await street.asked_to_pay()) == (balance, asked)


# --- the wallet pays --------------------------------------------------------------------------------


@pytest.mark.parametrize("encryption", ["both", "nip44_v2", "nip04", "untold"])
async def test_a_balance_below_the_threshold_is_refilled_once(either: Street, encryption: str) -> None:
    await either.wallet(encryption=encryption)
    customer = await either.customer()
    shown = await either.connect(customer)
    expected = "nip44_v2" if encryption in ("both", "nip44_v2") else "nip04"
    assert (shown["state"], shown["encryption"]) == ("active", expected)
    assert (await either.attempts(customer)) == []

    await either.spend(customer)
    await is_refilled(either, customer)
    (attempt,) = await either.attempts(customer)
    assert (Decimal(str(attempt["credited_usd"])), attempt["code"]) == (CREDITED_USD, None)
    assert await either.asked_to_pay() == 1
    assert {request["encryption"] for request in (await either.wallet())["requests"]} == {expected}
    await nothing_more_happens(either, customer)


async def test_the_checkout_names_the_service_and_leads_back_to_the_receipt_by_hand_and_by_itself(
    street: Street,
) -> None:
    customer = await street.customer()
    await street.connect(customer)
    await street.spend(customer)
    await is_refilled(street, customer)
    invoices = (await street.sandbox.get("/sandbox/invoices")).json()
    assert [each["metadata"]["itemDesc"] for each in invoices] == [
        "Satmeter: top-up of 10 USD",
        "Satmeter: top-up of 5 USD",
    ]
    topups = (await street.service.get("/topups", headers=customer.owner)).json()["data"]
    assert [each["checkout"]["redirectURL"] for each in invoices] == [each["receipt_url"] for each in topups]
    page = (await street.sandbox.get(f"/i/{invoices[1]['id']}")).text
    assert "top-up of 5 USD" in page
    assert topups[1]["receipt_url"] in page


async def test_it_goes_on_refilling_but_not_oftener_than_the_cap_of_a_day(street: Street) -> None:
    customer = await street.customer()
    await street.connect(customer, max_per_day_usd=20)
    await street.spend(customer, "0.5")
    await is_refilled(street, customer)
    await street.later(seconds=61)
    await street.spend(customer, "11")
    await street.until(lambda: street.balance(customer), Decimal("4.25") + CREDITED_USD)
    await street.later(seconds=61)
    await street.spend(customer, "10")
    await nothing_more_happens(street, customer)
    assert len(await street.attempts(customer)) == 2
    await street.later(hours=24)
    await street.until(lambda: street.balance(customer), Decimal("4.75") + CREDITED_USD)


async def test_connecting_with_too_little_on_the_account_refills_at_once(street: Street) -> None:
    customer = await street.customer()
    await street.spend(customer)
    await street.connect(customer)
    await is_refilled(street, customer)


async def test_neither_answers_nor_logs_hold_the_wallets_secret(
    street: Street, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = (await street.wallet())["uri"].rpartition("secret=")[2]
    logs.configure("DEBUG")
    try:
        customer = await street.customer()
        shown = [await street.connect(customer)]
        await street.spend(customer)
        await is_refilled(street, customer)
        shown += [await street.connection(customer), await street.attempts(customer)]
        logged = capsys.readouterr()
    finally:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    assert len(secret) == 64
    assert "autotopup.settled" in logged.out + logged.err
    assert secret not in repr(shown) + logged.out + logged.err
    assert secret not in repr(street.sql("SELECT * FROM nwc_connection"))


@pytest.mark.parametrize("rounding", ["down", "up", "off"])
async def test_a_node_that_takes_whole_sats_only_is_paid_by_hand_and_by_the_wallet_and_credited_the_price(
    street: Street, rounding: str
) -> None:
    await street.drive("lightning/rounding", rounding=rounding)
    customer = await street.customer()  # topped up by hand: $5, which is no whole number of sats
    await street.connect(customer)
    await street.spend(customer)
    await is_refilled(street, customer)
    for topup in (await street.service.get("/topups", headers=customer.owner)).json()["data"]:
        assert sign(Decimal(str(topup["network_fee"]))) == {"down": -1, "up": 1, "off": 0}[rounding]


# --- it refuses -------------------------------------------------------------------------------------

REFUSALS = ("INSUFFICIENT_BALANCE", "QUOTA_EXCEEDED", "BAD_REQUEST")
PAUSING = ("UNAUTHORIZED", "RESTRICTED", "EXPIRED", "NOT_IMPLEMENTED")
AMBIGUOUS = ("PAYMENT_FAILED", "INTERNAL", "OTHER", "NOT_FOUND", "A_CODE_OF_TOMORROW")


@pytest.mark.parametrize("code", REFUSALS)
async def test_a_refusal_closes_the_attempt_and_another_follows_later(street: Street, code: str) -> None:
    customer = await street.connected(behaviour="refuses", code=code)
    await street.spend(customer)
    await street.until_state(customer, "rejected")
    (attempt,) = await street.attempts(customer)
    assert attempt["code"] == code
    await nothing_more_happens(street, customer)
    assert (await street.connection(customer))["state"] == "active"

    await street.wallet(behaviour="pays")
    await street.later(hours=1)
    await is_refilled(street, customer)
    assert [each["state"] for each in await street.attempts(customer)] == ["settled", "rejected"]


@pytest.mark.parametrize("code", PAUSING)
async def test_a_refusal_for_good_pauses_at_once(street: Street, code: str) -> None:
    customer = await street.connected(behaviour="refuses", code=code)
    await street.spend(customer)
    await street.until_state(customer, "rejected")
    connection = await street.connection(customer)
    assert (connection["state"], connection["enabled"]) == ("paused", False)
    assert connection["pause_reason"]
    await street.wallet(behaviour="pays")
    await street.later(hours=5)
    await nothing_more_happens(street, customer)
    await street.connect(customer)
    await is_refilled(street, customer)


@pytest.mark.parametrize("code", AMBIGUOUS)
async def test_an_error_that_may_hide_a_payment_is_waited_for_and_no_second_invoice_is_made(
    street: Street, code: str
) -> None:
    customer = await street.connected(behaviour="refuses", code=code)
    await street.spend(customer)
    await street.until_state(customer, "unknown")
    await street.wallet(behaviour="pays")
    await street.later(minutes=14)
    await nothing_more_happens(street, customer)
    assert len(await street.invoices()) == 1
    # Only BTCPay's word that the invoice expired, and the grace after it, close the attempt.
    await street.later(minutes=11)
    await street.until_state(customer, "expired")
    assert (await street.attempts(customer))[0]["code"] in (code, "OTHER")
    await street.later(hours=1)
    await is_refilled(street, customer)
    assert await street.asked_to_pay() == 2


async def test_a_payment_that_the_wallet_called_failed_is_credited_all_the_same(street: Street) -> None:
    customer = await street.connected(behaviour="refuses", code="PAYMENT_FAILED")
    await street.spend(customer)
    await street.until_state(customer, "unknown")
    (invoice,) = await street.invoices()
    await street.drive(f"invoices/{invoice['id']}/pay")
    await street.until(lambda: street.balance(customer), REFILLED)
    await street.until_state(customer, "settled")


async def test_a_wallet_that_is_rate_limited_is_asked_once_more_for_the_same_invoice(street: Street) -> None:
    customer = await street.connected(behaviour="refuses", code="RATE_LIMITED")
    await street.spend(customer)

    async def code() -> str | None:
        attempts = await street.attempts(customer)
        return attempts[0]["code"] if attempts else None

    await street.until(code, "RATE_LIMITED")
    await street.wallet(behaviour="pays")
    await street.later(seconds=31)
    await is_refilled(street, customer)
    assert (len(await street.invoices()), await street.asked_to_pay()) == (1, 2)


async def test_a_wallet_that_changed_its_encryption_is_asked_again_in_the_new_one(street: Street) -> None:
    await street.wallet(encryption="nip04")
    customer = await street.connected(encryption="nip44_v2")
    assert (await street.connection(customer))["encryption"] == "nip04"
    await street.spend(customer)
    await is_refilled(street, customer)
    assert (await street.connection(customer))["encryption"] == "nip44_v2"
    assert len(await street.invoices()) == 1


async def test_four_refusals_in_a_row_pause_it(street: Street) -> None:
    customer = await street.connected(behaviour="refuses", code="QUOTA_EXCEEDED")
    await street.spend(customer)
    for number in range(1, 5):

        async def refused() -> int:
            return sum(each["state"] == "rejected" for each in await street.attempts(customer))

        await street.until(refused, number)
        await street.later(hours=5)
    assert (await street.connection(customer))["state"] == "paused"
    assert len(await street.attempts(customer)) == 4


# --- it answers badly, or not at all ----------------------------------------------------------------


@is_not_heard
async def test_a_silent_wallet_is_waited_for_until_the_invoice_is_over(either: Street) -> None:
    customer = await either.connected(behaviour="silent")
    await either.spend(customer)
    await either.until_state(customer, "unknown")
    await either.later(minutes=26)
    await either.until_state(customer, "expired")
    assert len(await either.invoices()) == 1
    assert (await either.connection(customer))["state"] == "active"


@pytest.mark.parametrize(
    "behaviour", ["loses_answer", "garbage", "zero_preimage", "wrong_preimage", "answers_twice", "pays"]
)
async def test_a_wallet_that_pays_settles_when_its_payment_is_credited_whatever_it_says(
    either: Street, behaviour: str
) -> None:
    """Long before the minute is over that an answer is waited for."""
    customer = await either.connected(behaviour=behaviour)
    await either.spend(customer)
    await is_refilled(either, customer)
    assert await either.asked_to_pay() == 1
    await nothing_more_happens(either, customer)


@is_not_heard
async def test_an_answer_that_comes_after_we_gave_up_waiting_changes_nothing(either: Street) -> None:
    customer = await either.connected(behaviour="answers_late", delay_seconds=SILENCE_SECONDS + 1)
    await either.spend(customer)
    await is_refilled(either, customer)
    await asyncio.sleep(SILENCE_SECONDS + 1)
    await nothing_more_happens(either, customer)


@is_not_heard
async def test_a_wallet_that_pays_after_we_gave_up_waiting_is_credited(either: Street) -> None:
    customer = await either.connected(behaviour="pays_late", delay_seconds=SILENCE_SECONDS + 1)
    await either.spend(customer)
    await either.until_state(customer, "unknown")
    assert await either.balance(customer) == Decimal("4.75")
    await is_refilled(either, customer)
    assert await either.asked_to_pay() == 1


async def test_a_wallet_that_lies_is_not_believed(either: Street) -> None:
    customer = await either.connected(behaviour="lies")
    await either.spend(customer)
    await either.until_state(customer, "paid_reported")
    await nothing_more_happens(either, customer)
    assert await either.balance(customer) == Decimal("4.75")
    await either.later(minutes=26)
    await either.until_state(customer, "expired")
    assert await either.balance(customer) == Decimal("4.75")


async def test_a_payment_that_btcpay_does_not_show_yet_waits_for_it(street: Street, relay: RealRelay) -> None:
    await street.wallet(relays=[relay.url])
    customer = await street.connected()
    await street.drive("lose-events", from_now_on=True)
    await relay.stop()  # so that BTCPay goes blind between the invoice and its payment, for certain
    await street.spend(customer)
    await street.until_state(customer, "invoiced")
    await street.drive("down", mode="error", methods=["GET"])
    await relay.start()
    await street.later(seconds=31)
    await street.until_state(customer, "paid_reported")
    assert await street.balance(customer) == Decimal("4.75")
    await nothing_more_happens(street, customer)
    await street.drive("down", mode="off")
    await street.later(minutes=6)
    await is_refilled(street, customer)
    await street.wallet(relays=[])


async def test_an_invoice_whose_answer_was_lost_is_found_again_and_not_made_twice(street: Street) -> None:
    customer = await street.connected()
    await street.drive("down", mode="lost", methods=["POST"])
    await street.spend(customer)
    await street.until_state(customer, "created")

    async def made() -> int:
        return len(await street.invoices())

    await street.until(made, 1)
    await street.drive("down", mode="off")
    await street.later(seconds=30)
    await is_refilled(street, customer)
    assert await made() == 1


# --- its relay --------------------------------------------------------------------------------------


async def test_a_relay_restarted_while_the_wallet_thinks_costs_nothing(street: Street, relay: RealRelay) -> None:
    await street.wallet(relays=[relay.url])
    customer = await street.connected(behaviour="answers_late", delay_seconds=0.7)
    await street.spend(customer)
    await street.until(street.asked_to_pay, 1)
    await relay.restart()  # which hands every request that it stored to the wallet again
    await is_refilled(street, customer)
    await nothing_more_happens(street, customer)
    await street.wallet(relays=[])


async def test_an_attempt_waits_for_a_relay_that_is_away(street: Street, relay: RealRelay) -> None:
    await street.wallet(relays=[relay.url])
    customer = await street.connected()
    await relay.stop()
    await street.spend(customer)
    await street.until_state(customer, "invoiced")
    assert (await street.asked_to_pay(), len(await street.invoices())) == (0, 1)
    await relay.start()
    await street.later(seconds=31)
    await is_refilled(street, customer)
    assert len(await street.invoices()) == 1
    await street.wallet(relays=[])


async def test_two_relays_carry_one_payment(street: Street, relay: RealRelay, tmp_path: Path) -> None:
    own = (await street.wallet())["relays"][0]
    await street.wallet(relays=[relay.url, own])
    customer = await street.connected(behaviour="answers_twice")
    await relay.stop()
    await street.spend(customer)
    await is_refilled(street, customer)
    await relay.start()
    await nothing_more_happens(street, customer)
    await street.wallet(relays=[])


@is_not_heard
async def test_a_wallet_that_was_away_finds_the_request_at_the_relay_and_pays_once(
    street: Street, relay: RealRelay
) -> None:
    own = (await street.wallet())["relays"][0]
    await street.wallet(relays=[relay.url])
    customer = await street.connected(relays=[own])  # it listens there no more
    await street.spend(customer)
    await street.until_state(customer, "unknown")
    await street.wallet(relays=[relay.url])
    await is_refilled(street, customer)
    await nothing_more_happens(street, customer)
    await street.wallet(relays=[])


async def test_connecting_to_a_wallet_that_is_not_there_says_so(street: Street) -> None:
    customer = await street.customer()
    await street.wallet(behaviour="silent")
    body = {"nwc_url": (await street.wallet())["uri"]}
    answer = await street.service.post("/nwc-auto-topup/connect", headers=customer.owner, json=body, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text
    assert body["nwc_url"].rpartition("secret=")[2] not in answer.text
    assert (await street.connection(customer)) is None


# --- two processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["pays", "loses_answer", "answers_twice"])
async def test_two_schedulers_at_once_make_one_payment(clean: str, tmp_path: Path, behaviour: str) -> None:
    async with opened(tmp_path / "data", clean, waiting(SILENCE_SECONDS), processes=2) as street:
        customers = [await street.customer()]
        await street.connect(customers[0])
        await street.wallet(behaviour=behaviour)
        await street.spend(customers[0])
        account_id = street.sql("SELECT id FROM account")[0][0]
        for house in street.houses * 5:
            house.watcher.notice(account_id)
        await is_refilled(street, customers[0])
        await nothing_more_happens(street, customers[0])
        assert (len(await street.invoices()), await street.asked_to_pay()) == (1, 1)


async def test_ten_customers_of_one_wallet_are_each_refilled_once(clean: str, tmp_path: Path) -> None:
    async with opened(tmp_path / "data", clean, waiting(60.0), processes=2) as street:
        customers = [await street.customer() for _ in range(10)]
        for customer in customers:
            await street.connect(customer)
        await asyncio.gather(*map(street.spend, customers))
        for customer in customers:
            await is_refilled(street, customer)
        assert await street.asked_to_pay() == 10
