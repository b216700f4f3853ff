"""A crash in every state, and drivers that race: paid at most once, credited exactly when the backend settled."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.autotopup import attempts
from app.autotopup.rules import LEASE
from app.kernel.db import Database
from app.kernel.errors import DatabaseUnavailable
from app.topups.gateway import Invoice
from tests.autotopup.conftest import Street
from tests.wallets import Killed

T = TypeVar("T")


class Fuse:
    """Kills whoever makes the n-th call to this method of a fake, before or after it has its effect."""

    def __init__(self, part: object, method: str, *, is_after: bool, left: int = 0) -> None:
        self.part, self.method, self.is_after, self.left = part, method, is_after, left
        self.real = getattr(part, method)
        setattr(part, method, self._sync if not asyncio.iscoroutinefunction(self.real) else self._async)

    def _burns(self) -> bool:
        self.left -= 1
        return self.left == -1

    def _sync(self, *args: object) -> object:
        burns = self._burns()
        if burns and not self.is_after:
            raise Killed
        result = self.real(*args)
        if burns:
            raise Killed
        return result

    async def _async(self, *args: object) -> object:
        burns = self._burns()
        if burns and not self.is_after:
            raise Killed
        result = await self.real(*args)
        if burns:
            raise Killed
        return result


async def killed_somewhere(street: Street) -> None:
    """Drive until the fuse burns; if the attempt has to wait first, time passes."""
    for _ in range(40):
        try:
            await street.tick()
        except Killed:
            return
        if street.last()["closed_at"] is not None:
            return
        street.clock.pass_(seconds=20)


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("act", ["pays", "pays silently", "silent", "INSUFFICIENT_BALANCE", "RATE_LIMITED"])
@pytest.mark.parametrize("method", ["create", "fetch", "read_invoice", "sign_payment", "pay", "look_up"])
async def test_a_crash_at_any_call_is_reconciled_by_the_next_driver(
    street: Street, method: str, act: str, is_after: bool
) -> None:
    await street.connect()
    street.wallets.acts = [act]
    await street.begin()
    part = street.btcpay if method in ("create", "fetch") else street.wallets
    fuse = Fuse(part, method, is_after=is_after)
    await killed_somewhere(street)
    setattr(part, method, fuse.real)
    await street.until_closed()
    paid = sum(street.wallets.paid.values())
    assert paid <= 1
    assert street.balance_usd() == (14.5 if paid else 4)
    assert street.state() == ("settled" if paid else street.state())
    assert street.btcpay.created == 1
    # Only RATE_LIMITED, heard and written down, allows a second request.
    assert sum(street.wallets.published.values()) <= (2 if act == "RATE_LIMITED" else 1)


@pytest.mark.parametrize("act", ["dies unsent", "dies sent", "dies paid"])
async def test_what_was_sent_is_never_sent_again_after_a_crash(street: Street, act: str) -> None:
    await street.connect()
    street.wallets.acts = [act]
    ref = await street.begin()
    await street.dies(street.autotopup.drive(ref))
    assert street.state() == "sent"
    await street.tick()
    assert street.state() == "sent"  # it may still be waiting for its answer somewhere
    street.clock.pass_(seconds=LEASE.total_seconds() + 1)
    await street.tick()
    assert street.state() == ("settled" if act == "dies paid" else "unknown")
    attempt = await street.until_closed()
    assert attempt["state"] == ("settled" if act == "dies paid" else "expired")
    assert sum(street.wallets.published.values()) == (0 if act == "dies unsent" else 1)
    assert attempt["sends"] == 1


async def test_a_crash_between_attempt_and_invoice_finds_the_same_topup(street: Street) -> None:
    await street.connect()
    ref = await street.begin()
    fuse = Fuse(street.btcpay, "create", is_after=True)
    await street.dies(street.autotopup.drive(ref))
    street.btcpay.create = fuse.real  # type: ignore[method-assign]
    assert street.state() == "created"
    attempt = await street.until_closed()
    assert (attempt["state"], street.btcpay.created) == ("settled", 1)
    assert street.sql("SELECT id FROM topup") == [(attempt["topup_id"],)]


async def test_a_cancelled_driver_leaves_what_it_sent_written_down(street: Street) -> None:
    await street.connect()
    asked = asyncio.Event()

    async def hang(event_id: str, bolt11: str) -> None:
        asked.set()
        await asyncio.sleep(60)

    street.wallets.before_pay = hang
    driving = asyncio.create_task(street.autotopup.drive(await street.begin()))
    await asked.wait()
    driving.cancel()
    await asyncio.gather(driving, return_exceptions=True)
    assert street.state() == "sent"
    street.wallets.before_pay = None
    assert (await street.until_closed())["state"] == "expired"


async def test_a_driver_with_a_stale_list_waits_for_the_attempts_time(street: Street) -> None:
    await street.connect()
    street.wallets.acts = ["RATE_LIMITED", "pays"]
    await street.begin()
    [due] = await street.autotopup.due()
    await street.another().drive(due)
    assert street.state() == "invoiced"
    street.clock.pass_(seconds=29)
    await street.another().drive(due)
    assert sum(street.wallets.published.values()) == 1
    street.clock.pass_(seconds=1)
    await street.another().drive(due)
    assert (street.state(), sum(street.wallets.published.values())) == ("settled", 2)


async def test_drivers_at_once_ask_the_wallet_once(street: Street) -> None:
    await street.connect()
    ref = await street.begin()
    await asyncio.gather(*(street.another().drive(ref) for _ in range(12)))
    await street.until_closed()
    assert (street.state(), list(street.wallets.published.values()), street.btcpay.created) == ("settled", [1], 1)


async def test_a_driver_that_slept_through_its_claim_sends_nothing(street: Street) -> None:
    """It asks the backend before the second request, and sleeps; another takes over and sends; the first wakes up."""
    await street.connect()
    await street.attempt("RATE_LIMITED", "silent", "pays")
    street.clock.pass_(seconds=31)
    asleep, wake = asyncio.Event(), asyncio.Event()
    fetch = street.btcpay.fetch

    async def sleepy(invoice_id: str) -> Invoice | None:
        if not asleep.is_set():
            asleep.set()
            await wake.wait()
        return await fetch(invoice_id)

    street.btcpay.fetch = sleepy  # type: ignore[method-assign]
    ref = attempts.ref_of(street.last())
    sleeper = asyncio.create_task(street.another().advance(ref))
    await asleep.wait()
    street.clock.pass_(seconds=LEASE.total_seconds() + 1)
    await street.another().advance(ref)
    wake.set()
    assert await sleeper is None
    assert list(street.wallets.published.values()) == [2]
    assert (street.state(), street.wallets.acts) == ("unknown", ["pays"])


async def test_an_answer_that_comes_when_another_has_taken_over_changes_nothing(street: Street) -> None:
    await street.connect()
    ref = await street.begin()
    slept = asyncio.Event()

    async def oversleep(event_id: str, bolt11: str) -> None:
        street.clock.pass_(seconds=LEASE.total_seconds() + 1)
        await street.another().advance(ref)  # finds SENT, abandoned
        slept.set()

    street.wallets.before_pay = oversleep
    street.wallets.acts = ["INSUFFICIENT_BALANCE"]
    await street.autotopup.drive(ref)
    assert slept.is_set()
    assert street.state() == "unknown"
    assert (await street.connection())["refusals"] == 0


async def test_a_hundred_charges_below_the_threshold_begin_one_attempt(street: Street) -> None:
    await street.connect()
    begun = await asyncio.gather(*(street.another().begin(street.account_id) for _ in range(100)))
    assert len([each for each in begun if each.ref]) == 1
    assert street.states() == ["created"]


async def test_two_processes_noticing_and_two_clocks_ticking_pay_once(street: Street) -> None:
    await street.connect()
    watchers = [street.watcher() for _ in range(4)]
    for _ in range(25):
        for watcher in watchers:
            watcher.notice(street.account_id)
        await asyncio.gather(
            *(watcher.look_for_low() for watcher in watchers), *(watcher.look_for_due() for watcher in watchers)
        )
    await asyncio.gather(*(watcher.idle() for watcher in watchers))
    assert (street.states(), list(street.wallets.published.values())) == (["settled"], [1])
    assert street.balance_usd() == 14.5


async def test_a_closing_process_stops_its_drivers(street: Street) -> None:
    await street.connect()
    asked = asyncio.Event()

    async def hang(event_id: str, bolt11: str) -> None:
        asked.set()
        await asyncio.sleep(60)

    street.wallets.before_pay = hang
    watcher = street.watcher()
    watcher.notice(street.account_id)
    await asked.wait()
    await watcher.close()
    assert street.state() == "sent"
    watcher.notice(street.account_id)
    await watcher.idle()
    street.wallets.before_pay = None


def test_a_notice_without_an_event_loop_is_no_trouble(street: Street) -> None:
    street.watcher().notice(street.account_id)


class BreaksAfterCommit:
    """The database, whose connection breaks right after the commit that wrote SENT."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def transaction(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        result = await self._db.transaction(work)
        if isinstance(result, dict) and result.get("state") == "sent":
            raise DatabaseUnavailable(retry_after_seconds=1)
        return result


async def test_a_lost_commit_of_the_request_sends_nothing(street: Street) -> None:
    """Whether SENT was committed or not, the wallet is not asked; and what was, is waited for as if it had been."""
    await street.connect()
    ref = await street.begin()
    await street.autotopup.advance(ref)
    broken = street.another(db=cast("Database", BreaksAfterCommit(street.house.db)))
    with pytest.raises(DatabaseUnavailable):
        await broken.advance(ref)
    assert (street.state(), sum(street.wallets.published.values())) == ("sent", 0)
    attempt = await street.until_closed()
    assert (attempt["state"], sum(street.wallets.published.values())) == ("expired", 0)
