"""Anything may happen in any order to a wallet's attempts; a model says which state each is in, and where the money is.

The model knows what the wallet did and what the backend saw, and nothing of our rules but the tables below.
AUTOTOPUP_MACHINE_STEPS=n runs more or fewer steps of the long run.
"""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from app.audit import audit
from app.kernel.settings import Settings
from app.topups.credit import check_due
from tests import databases
from tests.autotopup.conftest import made
from tests.wallets import Killed
from tests.world import tell

pytestmark = pytest.mark.long

T = TypeVar("T")
SLOW_STEPS: Final = int(os.environ.get("AUTOTOPUP_MACHINE_STEPS", "5000"))
CAP_USD: Final = 60
AFTER_FIRST: Final = {
    "pays": "paid_reported", "pays unproven": "paid_reported", "wrong preimage": "paid_reported",
    "proves without paying": "paid_reported", "pays silently": "unknown", "silent": "unknown", "garbage": "unknown",
    "late": "unknown", "pays, then OTHER": "unknown", "pays, then PAYMENT_FAILED": "unknown", "PAYMENT_FAILED": "unknown",
    "INTERNAL": "unknown", "UNHEARD_OF": "unknown", "INSUFFICIENT_BALANCE": "rejected", "QUOTA_EXCEEDED": "rejected",
    "UNAUTHORIZED": "rejected", "RESTRICTED": "rejected", "EXPIRED": "rejected", "NOT_IMPLEMENTED": "rejected",
    "BAD_REQUEST": "rejected", "RATE_LIMITED": "invoiced", "UNSUPPORTED_ENCRYPTION": "invoiced", "unreachable": "invoiced",
    "dies unsent": "sent", "dies sent": "sent", "dies paid": "sent",
}  # fmt: skip
"""An attempt's state after the first request for its invoice, by what the wallet did."""
MAY_BE_SENT_TWICE: Final = ("RATE_LIMITED", "UNSUPPORTED_ENCRYPTION")
ACTS: Final = tuple(AFTER_FIRST)
PAYING: Final = {act for act in ACTS if act.startswith("pays")} | {"dies paid", "late"}


def after_second(act: str) -> str:
    """After the second request no refusal is sure any more."""
    return "unknown" if AFTER_FIRST[act] == "rejected" or act in MAY_BE_SENT_TWICE else AFTER_FIRST[act]


@dataclass
class Place:
    """Where the machine runs: one event loop, one database."""

    loop: asyncio.AbstractEventLoop
    settings: Settings
    database_url: str


STEPS: Final[Counter[str]] = Counter()


class AutoTopupMachine(RuleBasedStateMachine):
    """One account, its wallet, and everything that can happen to them."""

    place: Place
    has_begun = False

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(60):
                return await work

        return self.place.loop.run_until_complete(bounded())

    @initialize()
    def begin_world(self) -> None:
        databases.empty(self.place.database_url)
        self.street = self.do(made(self.place.database_url, self.place.settings))
        self.do(self.street.connect(threshold=20, max_per_day=CAP_USD))
        self.has_begun, self.is_connected, self.is_on = True, True, True
        self.moved_usd = 4.0
        self.sent: dict[str, list[str]] = {}
        """What the wallet did with each request that reached it, by BOLT11."""
        self.first_sent_at: dict[str, datetime] = {}
        self.street.wallets.before_pay = self._heard

    async def _heard(self, event_id: str, bolt11: str) -> None:
        """A request is about to be published: it is written down, the wallet is connected, and it may be."""
        last = self.street.last()
        assert (last["state"], last["event_id"], last["bolt11"]) == ("sent", event_id, bolt11)
        assert self.is_connected
        assert self.is_on
        before = [act for act in self.sent.get(bolt11, []) if act != "unreachable"]
        assert len(before) == 0 or (len(before) == 1 and before[0] in MAY_BE_SENT_TWICE), before
        assert last["invoice_expires_at"] - self.street.clock() >= timedelta(seconds=120)
        acts = self.street.wallets.acts
        self.sent.setdefault(bolt11, []).append(acts[0] if acts else self.street.wallets.act)
        self.first_sent_at.setdefault(bolt11, self.street.clock())

    # --- what happens ---

    @rule(act=st.sampled_from(ACTS), times=st.integers(1, 3))
    def a_charge(self, act: str, times: int) -> None:
        """Everything is up, the balance falls below the threshold, and what came before is done with."""
        self.is_on = True
        self.street.btcpay.is_down = self.street.btcpay.loses_answers = False
        self.do(self._come_to_rest())
        if not self.is_connected or self.do(self.street.connection())["not_before"] is not None:
            self.connect()
        if self.street.balance_usd() >= 20:
            self.the_balance_moves(-30.0 * (1 + self.street.balance_usd() // 30))
        self.drive(act, times)

    async def _come_to_rest(self) -> None:
        self.street.wallets.act = "silent"
        while self.street.sql("SELECT 1 FROM nwc_attempt WHERE closed_at IS NULL"):
            self.street.clock.pass_(seconds=200)
            await self._tick()
        self.street.clock.pass_(seconds=61)

    @rule(act=st.sampled_from(ACTS), times=st.integers(1, 3))
    def drive(self, act: str, times: int) -> None:
        """A charge tells of the low balance, or the clock finds it; the wallet does `act` if it is asked."""
        STEPS["drive"] += 1
        before = {bolt11: len(acts) for bolt11, acts in self.sent.items()}
        self.street.wallets.act = act
        self.do(self._drive(times))
        for bolt11, acts in self.sent.items():
            if len(acts) > before.get(bolt11, 0):
                STEPS[f"asked: {act}"] += 1
                self._check_state(bolt11, acts)

    async def _drive(self, times: int) -> None:
        drivers = [self.street.another(is_on=self.is_on) for _ in range(times)]
        await asyncio.gather(*(driver.begin(self.street.account_id) for driver in drivers))
        for ref in await drivers[0].due():
            await asyncio.gather(*(self._mortal(driver.drive(ref)) for driver in drivers))

    async def _mortal(self, work: Coroutine[Any, Any, object]) -> None:
        with contextlib.suppress(Killed):
            await work

    def _check_state(self, bolt11: str, acts: list[str]) -> None:
        heard = [act for act in acts if act != "unreachable"]
        expected = AFTER_FIRST[acts[-1]] if len(heard) <= 1 else after_second(acts[-1])
        [(state,)] = self.street.sql("SELECT state FROM nwc_attempt WHERE bolt11 = %s", bolt11)
        allowed = {expected}
        if self.street.wallets.paid[bolt11] and not self.street.btcpay.is_down:
            allowed |= {"settled"} if expected == "paid_reported" else set()
        if expected == "invoiced" and acts[-1] == "UNSUPPORTED_ENCRYPTION" and not self.street.btcpay.is_down:
            allowed = {"rejected"}  # it speaks as before, so that there is no use in asking again
        assert state in allowed, (acts, state)

    @rule(seconds=st.sampled_from((1, 6, 20, 31, 61, 200, 600, 1600, 3700, 15_000, 90_000)))
    def time_passes(self, seconds: int) -> None:
        STEPS["time passes"] += 1
        self.street.clock.pass_(seconds=seconds)

    @rule()
    def tick(self) -> None:
        STEPS["tick"] += 1
        self.do(self._tick())

    async def _tick(self) -> None:
        driver = self.street.another(is_on=self.is_on)
        await driver.sweep()
        for ref in await driver.due():
            await self._mortal(driver.drive(ref))

    @rule()
    def the_wallet_pays_late(self) -> None:
        STEPS["late"] += 1
        self.street.wallets.pay_late()

    @rule(which=st.integers(0, 60))
    def somebody_pays_by_hand(self, which: int) -> None:
        """As a wallet would: an invoice is paid once, and not after it expired."""
        bolt11s = list(self.street.btcpay.bolt11s)
        if bolt11s:
            STEPS["by hand"] += 1
            self.street.wallets._pay(bolt11s[-1 - which % len(bolt11s)])

    @rule(usd=st.sampled_from((-30.0, -10.0, -5.0, 3.0, 25.0)))
    def the_balance_moves(self, usd: float) -> None:
        STEPS["balance"] += 1
        self.do(self.street.give(usd))
        self.moved_usd += usd

    @rule()
    def disconnect(self) -> None:
        if self.is_connected:
            STEPS["disconnect"] += 1
            self.do(self.street.disconnect())
            self.is_connected = False

    @rule()
    def connect(self) -> None:
        STEPS["connect"] += 1
        self.do(self.street.connect(threshold=20, max_per_day=CAP_USD))
        self.is_connected = True

    @rule()
    def switch(self) -> None:
        STEPS["switch"] += 1
        self.is_on = not self.is_on

    @rule(is_down=st.booleans(), loses_answers=st.booleans())
    def the_backend_ails(self, is_down: bool, loses_answers: bool) -> None:
        STEPS["backend"] += 1
        self.street.btcpay.is_down, self.street.btcpay.loses_answers = is_down, loses_answers

    # --- what is always true ---

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        if not self.has_begun:
            return
        open_ones = self.street.sql("SELECT count(*) FROM nwc_attempt WHERE closed_at IS NULL")[0][0]
        assert open_ones <= 1
        assert max(self.street.wallets.paid.values(), default=0) <= 1
        states = dict(self.street.sql("SELECT bolt11, state FROM nwc_attempt WHERE bolt11 IS NOT NULL"))
        for bolt11, state in states.items():
            if state == "settled":
                assert self.street.wallets.paid[bolt11] == 1
            if state == "rejected":
                assert not set(self.sent[bolt11]) & PAYING, "a wallet that may have paid has surely refused nothing"
        self._assert_balance(exactly=False)
        self._assert_cap()

    def _assert_balance(self, *, exactly: bool) -> None:
        paid = sum(self.street.wallets.paid.values())
        credited = round((self.street.balance_usd() - self.moved_usd) / 10.5, 6)
        assert credited == paid if exactly else credited <= paid, (credited, paid)

    def _assert_cap(self) -> None:
        """Of what wallets were asked to pay, no more than the cap may be paid in any 24 hours."""
        times = sorted(at for bolt11, at in self.first_sent_at.items() if self._is_payable(bolt11))
        for at in times:
            within = [one for one in times if at <= one < at + timedelta(hours=24)]
            assert len(within) * 10 <= CAP_USD + 10, within  # an attempt begins up to an hour before it is sent

    def _is_payable(self, bolt11: str) -> bool:
        """Paid, and a wallet that was asked did it: what a person pays is no business of the cap."""
        return self.street.wallets.paid[bolt11] > 0 and bool(set(self.sent[bolt11]) & PAYING)

    def teardown(self) -> None:
        if self.has_begun:
            try:
                self.do(self._quiet())
            finally:
                self.do(self.street.house.close())

    async def _quiet(self) -> None:
        """The storm is over: everything is up, and what is open comes to its end."""
        self.street.btcpay.is_down = self.street.btcpay.loses_answers = False
        await self._come_to_rest()
        self.street.sql("UPDATE topup SET next_check_at = now() WHERE next_check_at IS NOT NULL")
        await check_due(self.street.house.db, self.street.btcpay)
        await self._tick()
        self._assert_balance(exactly=True)
        for bolt11, state in self.street.sql("SELECT bolt11, state FROM nwc_attempt WHERE bolt11 IS NOT NULL"):
            assert (state == "settled") == (self.street.wallets.paid[bolt11] == 1), (self.sent.get(bolt11), state)
        report = await audit(self.street.house.db)
        assert report.is_clean, report.findings


def run_machine(
    database_url: str, settings: Settings, config: pytest.Config, *, steps: int, examples: int, steps_each: int
) -> None:
    loop = asyncio.new_event_loop()
    place_ = Place(loop, settings, database_url)
    how = hypothesis.settings(
        max_examples=examples, stateful_step_count=steps_each, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    STEPS.clear()

    class Machine(AutoTopupMachine):
        place = place_

    try:
        while STEPS.total() < steps:
            run_state_machine_as_test(Machine, settings=how)
        told = ", ".join(f"{name} {count}" for name, count in STEPS.most_common())
        tell(config, f"auto-topup machine: {STEPS.total()} steps, all as the model says ({told})")
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_whatever_happens_a_few_hundred_times(
    database_url: str, settings: Settings, pytestconfig: pytest.Config
) -> None:
    run_machine(database_url, settings, pytestconfig, steps=300, examples=8, steps_each=50)


@pytest.mark.slow
def test_whatever_happens_thousands_of_times(
    database_url: str, settings: Settings, pytestconfig: pytest.Config
) -> None:
    run_machine(database_url, settings, pytestconfig, steps=SLOW_STEPS, examples=30, steps_each=150)
