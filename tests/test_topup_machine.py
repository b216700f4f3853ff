"""Anything may happen in any order: a random world drives top-ups, and a model says what each must have been credited.

The model keeps its own book: it knows what the driver paid and at which rates, takes from the sandbox only what the
world looks like (an invoice's state, a payment's confirmation), and never calls our own arithmetic. What is owed is
looked at when we look, since a rate of today is the one of the first look, and what was credited is never taken back.
TOPUP_MACHINE_SEED=n runs the one seed that a failure has told, TOPUP_MACHINE_STEPS=n more or fewer steps.
"""

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from decimal import ROUND_DOWN, Decimal
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.audit import audit
from app.kernel.settings import Settings
from app.topups.gateway import GatewayError
from app.topups.sweep import sweep
from tests import databases
from tests.rig import exact
from tests.world import Backend, Owner, Process, tell

pytestmark = pytest.mark.long

T = TypeVar("T")
SLOW_STEPS: Final = int(os.environ.get("TOPUP_MACHINE_STEPS", "20000"))
FAST_STEPS: Final = 300
MOST_BILLS: Final = 8
GRACE_SECONDS: Final = 60
STEPS: Final[Counter[str]] = Counter()

ORDERS: Final = (
    ("btc-lightning", "BTC", "USD", "5"), ("btc-lightning", "BTC", "SATS", "12345"), ("btc-lightning", "BTC", "BTC", "0.0002"),
    ("btc", "BTC", "USD", "33.33"), ("btc", "BTC", "BTC", "0.001"), ("ltc", "LTC", "USD", "7.77"), ("ltc", "LTC", "LTC", "0.3"),
    ("lbtc", "LBTC", "USD", "2.5"), ("lbtc", "LBTC", "LBTC", "0.0004"), ("xmr", "XMR", "USD", "12.34"), ("xmr", "XMR", "XMR", "0.07"),
)  # fmt: skip
RATES: Final = {
    "BTC": ("65000", "40000.123456", "120000"), "LTC": ("80", "33.333", "200"), "XMR": ("150", "77.7", "400")
}  # fmt: skip


@dataclass
class Bill:
    """An invoice of the sandbox, and what the model knows of it. Amounts in coins and USD, exact."""

    id: str
    order_id: str
    method: str
    coin: str
    usd_per_coin: Fraction
    face_usd: Fraction
    is_ours: bool = False
    driven: list[Fraction] = field(default_factory=list)
    worth_nusd: dict[str, int] = field(default_factory=dict)
    credited_nusd: int = 0

    @property
    def bonus_nusd(self) -> int:
        return self.credited_nusd * 5 // 100 if self.method == "btc-lightning" else 0


@dataclass
class Wanted:
    """A request for a top-up that was not answered yet, and is repeated with its key."""

    key: str
    order: tuple[str, str, str, str]


class Fuse:
    """Kills a process when so many of its messages to the backend or COMMITs have passed."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.is_after = False
        self.process: Process | None = None

    async def passing(self, effect: Callable[[], Awaitable[T]], broken: Exception) -> T:
        if self.left is None:
            return await effect()
        self.left -= 1
        if self.left >= 0:
            return await effect()
        self.left = None
        if self.is_after:
            await effect()
        assert self.process is not None
        self.process.kill()
        raise broken


@dataclass
class Place:
    """Where the machine runs: one event loop, one database."""

    loop: asyncio.AbstractEventLoop
    settings: Settings
    database_url: str


class TopupMachine(RuleBasedStateMachine):
    """One account, a few top-ups, and everything that can happen to them."""

    place: Place
    has_begun = False

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(60):
                return await work

        return self.place.loop.run_until_complete(bounded())

    @initialize(orders=st.lists(st.sampled_from(ORDERS), min_size=2, max_size=4))
    def begin(self, orders: list[tuple[str, str, str, str]]) -> None:
        databases.empty(self.place.database_url)
        self.folder = Path(tempfile.mkdtemp(prefix="satmeter-machine-"))
        self.letters: list[httpx.Request] = []
        self.bills: list[Bill] = []
        self.wanted: list[Wanted] = []
        self.rates: dict[str, str | None] = {coin: rates[0] for coin, rates in RATES.items()}
        self.down: tuple[str, tuple[str, ...]] = ("off", ())
        self.keys = 0
        self.fuse = Fuse()
        self.owner = Owner(self.place.database_url)
        self.backend = Backend(self.folder, self._keep_letter)
        try:
            self.do(self._begin())
        except BaseException:
            self.do(self.backend.stop())
            raise
        self.has_begun = True
        for order in orders:
            self._create(order)

    async def _begin(self) -> None:
        await self.owner.start()
        await self.backend.start()
        self.calm = Process(self.place.settings, self.place.database_url, self.backend.send)
        await self.calm.start()
        await self._start_us()
        made = await self.us.ask(httpx.Request("POST", "http://us.test/accounts/create"))
        self.customer = {"x-credit-id": made.json()["credit_id"]}

    async def _start_us(self) -> None:
        fuse = self.fuse
        self.us = fuse.process = Process(
            self.place.settings, self.place.database_url,
            lambda request: fuse.passing(lambda: self.backend.send(request), httpx.ReadError("cut")),
            at_commit=lambda _, let_through: fuse.passing(let_through, ConnectionResetError("cut")),
        )  # fmt: skip
        await self.us.start()

    def teardown(self) -> None:
        if not self.has_begun:
            return
        try:
            self.do(self._quiet())
        finally:
            self.do(self._end())
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _end(self) -> None:
        await self.us.close()
        await self.calm.close()
        await self.backend.stop()
        await self.owner.close()

    async def _keep_letter(self, letter: httpx.Request) -> httpx.Response:
        self.letters.append(letter)
        return httpx.Response(200)

    # --- the customer ---

    @precondition(lambda self: len(self.bills) + len(self.wanted) < MOST_BILLS)
    @rule(order=st.sampled_from(ORDERS))
    def create(self, order: tuple[str, str, str, str]) -> None:
        self._create(order)

    def _create(self, order: tuple[str, str, str, str]) -> None:
        STEPS["create"] += 1
        self.keys += 1
        self.wanted.append(Wanted(f"key-{self.keys}", order))
        self.do(self._ask_for(self.wanted[-1]))

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        STEPS["ask again"] += 1
        self.do(self._ask_for(data.draw(st.sampled_from(self.wanted))))

    async def _ask_for(self, wanted: Wanted) -> None:
        method, _, currency, amount = wanted.order
        headers = self.customer | {"Idempotency-Key": wanted.key}
        request = httpx.Request(
            "POST",
            f"http://us.test/topup/create/{method}",
            headers=headers,
            json={"amount": amount, "currency": currency},
        )
        await self.owner.everything_is_due()  # a claim of ours that died with us has run out
        answer = None
        with contextlib.suppress(httpx.ConnectError):
            answer = await self.us.ask(request)
        await self.backend.all_told()
        await self._notice(wanted)
        if answer is not None:
            assert answer.status_code in (201, 503), answer.text
        if answer is not None and answer.status_code == 201:
            bill = next(bill for bill in self.bills if bill.id == answer.json()["invoice_id"])
            bill.is_ours = True
            self.wanted.remove(wanted)

    async def _notice(self, wanted: Wanted) -> None:
        """Enter the invoice that the sandbox has since, if it has, at the rate of this moment."""
        method, coin, currency, amount = wanted.order
        for made in await self.backend.look("invoices"):
            if made["id"] in {bill.id for bill in self.bills}:
                continue
            usd_per_coin = self._rate(coin)
            assert usd_per_coin is not None
            coins = Fraction(amount) / (10**8 if currency == "SATS" else 1)
            face = Fraction(amount) if currency == "USD" else coins * usd_per_coin
            order_id = made["metadata"]["orderId"]
            assert order_id not in {bill.order_id for bill in self.bills}, "two invoices for one top-up"
            self.bills.append(Bill(made["id"], order_id, method, coin, usd_per_coin, face))

    def _rate(self, coin: str) -> Fraction | None:
        rate = self.rates["BTC" if coin == "LBTC" else coin]
        return None if rate is None else Fraction(rate)

    async def _claim(self, bill: Bill) -> None:
        shown = (await self.backend.look(f"invoices/{bill.id}"))["paymentMethods"][0]
        is_lightning = bill.method == "btc-lightning"
        ids = [payment["id"].partition("#")[0].partition("-")[0] for payment in shown["payments"]]
        proof = {"txid": ids[-1] if ids else "0" * 64}
        if is_lightning:
            proof = {"payment_hash": ids[-1]} if ids else {"lightning_invoice": shown["destination"]}
        answer = await self.us.ask(
            httpx.Request("POST", "http://us.test/topup/claim", headers=self.customer, json=proof)
        )
        if answer.status_code == 429:
            return
        assert answer.status_code in (200, 404, 503), answer.text
        await self._looked([one for one in self.bills if (one.method == "btc-lightning") is is_lightning])
        if shown["payments"] and shown["payments"][-1]["id"] in bill.worth_nusd and not self._is_down("GET"):
            assert answer.status_code == 200

    # --- the payer and the chain ---

    @precondition(lambda self: self.bills)
    @rule(data=st.data(), share=st.sampled_from(("1", "1", "0.3", "0.5", "1.5", "3")), replaceable=st.booleans())
    def pay(self, data: st.DataObject, share: str, replaceable: bool) -> None:
        STEPS["pay"] += 1
        self.do(self._pay(data.draw(st.sampled_from(self.bills)), Decimal(share), replaceable))

    @precondition(lambda self: self.bills)
    @rule(data=st.data(), share=st.sampled_from(("1", "1", "0.6", "1.3")))
    def pay_and_confirm(self, data: st.DataObject, share: str) -> None:
        STEPS["pay and confirm"] += 1
        bill = data.draw(st.sampled_from(self.bills))
        self.do(self._pay(bill, Decimal(share), replaceable=False))
        self.do(self._try(bill, "confirm", blocks=10))

    async def _pay(self, bill: Bill, share: Decimal, replaceable: bool) -> None:
        shown = (await self.backend.look(f"invoices/{bill.id}"))["paymentMethods"][0]
        due = Decimal(shown["due"]) if Decimal(shown["due"]) > 0 else Decimal(shown["amount"])
        coins = (due * share).quantize(Decimal("1e-12" if bill.coin == "XMR" else "1e-8"), ROUND_DOWN)
        if coins > 0:
            await self.backend.act(bill.id, "pay", amount=f"{coins:f}", replaceable=replaceable)
            bill.driven.append(Fraction(coins))
        await self.backend.all_told()

    @precondition(lambda self: self.bills)
    @rule(data=st.data(), blocks=st.sampled_from((1, 1, 2, 10)))
    def confirm(self, data: st.DataObject, blocks: int) -> None:
        self._act("confirm", data, blocks=blocks)

    @precondition(lambda self: self.bills)
    @rule(data=st.data())
    def double_spend(self, data: st.DataObject) -> None:
        self._act("double-spend", data)

    @precondition(lambda self: self.bills)
    @rule(data=st.data())
    def reorganise(self, data: st.DataObject) -> None:
        """A payment is replaced though it was confirmed."""
        STEPS["reorganise"] += 1
        bill = data.draw(st.sampled_from(self.bills))
        shown = self.do(self.backend.look(f"invoices/{bill.id}"))["paymentMethods"][0]
        if shown["payments"]:
            payment = data.draw(st.sampled_from(shown["payments"]))
            self.do(self._try(bill, "double-spend", paymentId=payment["id"]))

    @precondition(lambda self: self.bills)
    @rule(data=st.data(), monitoring=st.sampled_from((False, False, True)))
    def expire(self, data: st.DataObject, monitoring: bool) -> None:
        self._act("expire", data, monitoring=monitoring)

    @precondition(lambda self: self.bills)
    @rule(data=st.data(), status=st.sampled_from(("Settled", "Invalid")))
    def mark(self, data: st.DataObject, status: str) -> None:
        self._act("mark", data, status=status)

    def _act(self, act: str, data: st.DataObject, **body: Any) -> None:
        STEPS[act] += 1
        self.do(self._try(data.draw(st.sampled_from(self.bills)), act, **body))

    async def _try(self, bill: Bill, act: str, **body: Any) -> None:
        """What the world does not allow now does not happen."""
        url = f"http://sandbox.test/sandbox/invoices/{bill.id}/{act}"
        answer = await self.backend.send(httpx.Request("POST", url, json=body))
        assert answer.status_code in (200, 409, 422), answer.text
        await self.backend.all_told()

    @rule(seconds=st.sampled_from((30, 300, 3600, 8 * 86400)))
    def time_passes(self, seconds: int) -> None:
        STEPS["time passes"] += 1
        self.do(self.backend.drive("clock", advance_seconds=seconds))
        self.do(self.backend.all_told())

    @rule(data=st.data(), coin=st.sampled_from(tuple(RATES)))
    def rate_moves(self, data: st.DataObject, coin: str) -> None:
        STEPS["rate moves"] += 1
        self.rates[coin] = data.draw(st.sampled_from((*RATES[coin], None)))
        self.do(self._set_rates())

    async def _set_rates(self) -> None:
        await self.backend.drive("rates", **{f"{coin}_USD": rate for coin, rate in self.rates.items()})

    # --- bad luck ---

    @rule(
        mode=st.sampled_from(("refuse", "lost", "error", "rubbish")), methods=st.sampled_from(((), ("POST",), ("GET",)))
    )
    def go_down(self, mode: str, methods: tuple[str, ...]) -> None:
        STEPS["go down"] += 1
        self.down = (mode, methods)
        self.do(self.backend.drive("down", mode=mode, methods=list(methods)))

    @precondition(lambda self: self.down[0] != "off")
    @rule()
    def come_up(self) -> None:
        STEPS["come up"] += 1
        self.do(self._come_up())

    async def _come_up(self) -> None:
        self.down = ("off", ())
        await self.backend.drive("down", mode="off")
        await asyncio.sleep(0.02)  # the breaker's cool-down

    def _is_down(self, http_method: str) -> bool:
        mode, methods = self.down
        return mode != "off" and (not methods or http_method in methods)

    @rule(
        what=st.sampled_from(("the backend restarts", "we restart", "we die", "we die", "events are lost")),
        left=st.integers(0, 12), is_after=st.booleans(), at=st.sampled_from(("poll", "process", "create")), data=st.data(),
    )  # fmt: skip
    def disaster(self, what: str, left: int, is_after: bool, at: str, data: st.DataObject) -> None:
        """We die at any message that we send while we look or create: `left` is how many pass before."""
        STEPS[what] += 1
        if what == "the backend restarts":
            self.do(self._restart_backend())
        elif what == "we restart":
            self.do(self._restart_us())
        elif what == "events are lost":
            self.letters.clear()
        else:
            wanted = data.draw(st.sampled_from(self.wanted)) if at == "create" and self.wanted else None
            self.do(self._die(left, is_after, at, wanted))

    async def _restart_backend(self) -> None:
        await self.backend.restart()
        await self._set_rates()
        self.down = ("off", ())
        await asyncio.sleep(0.02)

    async def _restart_us(self) -> None:
        await self.us.close()
        await self._start_us()

    async def _die(self, left: int, is_after: bool, act: str, wanted: Wanted | None) -> None:
        if act != "create":
            await self.owner.everything_is_due()
        self.fuse.left, self.fuse.is_after = left, is_after
        if wanted is not None:
            await self._ask_for(wanted)
        else:
            await self.us.jobs(polls_first=act == "poll")
        self.fuse.left = None
        await self._restart_us()
        # How far we came is for us to find out; a look at everything brings both books together again.
        await self._come_up()
        await self._poll()

    # --- the webhooks and the jobs ---

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def webhooks_come(self, data: st.DataObject) -> None:
        STEPS["webhooks come"] += 1
        letters = data.draw(st.permutations(self.letters[:6]))
        self.do(self._deliver(letters))
        if data.draw(st.booleans()):
            del self.letters[:6]  # else they come again

    async def _deliver(self, letters: list[httpx.Request]) -> None:
        answers = await asyncio.gather(*(self.us.ask(letter) for letter in letters))
        assert {answer.status_code for answer in answers} <= {200}

    @precondition(lambda self: self.bills)
    @rule(data=st.data())
    def redeliver(self, data: st.DataObject) -> None:
        self._act("redeliver", data)

    @rule(how=st.sampled_from(("poll", "process", "process", "sweep", "claim", "all at once")), data=st.data())
    def look(self, how: str, data: st.DataObject) -> None:
        if how == "claim" and not self.bills:
            return
        STEPS[how] += 1
        if how == "poll":
            self.do(self._poll())
        elif how == "process":
            self.do(self._process())
        elif how == "sweep":
            self.do(self._sweep())
        elif how == "claim":
            self.do(self._claim(data.draw(st.sampled_from(self.bills))))
        else:
            self.do(self._look_at_once())

    async def _process(self) -> None:
        await self.owner.everything_is_due()
        waiting = await self.owner.sql("SELECT DISTINCT invoice_id FROM webhook_delivery WHERE processed_at IS NULL")
        named = {invoice_id for (invoice_id,) in waiting}
        await self.owner.put_to_rest()
        await self.us.jobs()
        await self.owner.sql("UPDATE topup SET next_check_at = now() WHERE next_check_at IS NOT NULL")
        await self._looked([bill for bill in self.bills if bill.id in named])

    async def _poll(self) -> None:
        await self.owner.everything_is_due()
        await self.us.jobs(polls_first=True)
        self._found()
        await self._looked(self.bills)

    def _found(self) -> None:
        """What the poller or the sweep finds is ours from then on, should its customer never ask again."""
        if not self._is_down("GET"):
            for bill in self.bills:
                bill.is_ours = True

    async def _sweep(self) -> None:
        with contextlib.suppress(GatewayError):
            await sweep(self.us.house.db, self.us.gateway)
        news = [bill for bill in self.bills if not bill.is_ours]
        self._found()
        await self._looked(news)

    async def _look_at_once(self) -> None:
        await self.owner.everything_is_due()
        await asyncio.gather(
            self.us.jobs(polls_first=True), self.calm.jobs(), self.calm.jobs(polls_first=True), self.us.jobs()
        )
        await self._poll()

    # --- the model ---

    async def _looked(self, bills: list[Bill]) -> None:
        """We have just looked at these: what they must have been credited by now."""
        if self._is_down("GET"):
            return
        for bill in bills:
            if bill.is_ours:
                self._look(bill, await self.backend.look(f"invoices/{bill.id}"))

    def _look(self, bill: Bill, shown: Any) -> None:
        state, also = shown["status"], shown["additionalStatus"]
        payments = shown["paymentMethods"][0]["payments"]
        values = sorted(Fraction(payment["value"]) for payment in payments)
        assert values == sorted(bill.driven), "the sandbox tells of what was not paid"
        settled = [payment for payment in payments if payment["status"] == "Settled"]
        latest = shown["expirationTime"] + GRACE_SECONDS
        late = {payment["id"] for payment in settled if payment["receivedDate"] > latest}
        today = self._rate(bill.coin)
        if late - bill.worth_nusd.keys() and today is None:
            return  # there is no rate to value them by, and so no look
        if state in ("New", "Processing") or (state, also) == ("Invalid", "Marked"):
            return
        for payment in settled:
            rate = bill.usd_per_coin
            if payment["id"] in late and today is not None:
                rate = min(rate, today)
            coins = Fraction(payment["value"]) - Fraction(payment["fee"])
            bill.worth_nusd.setdefault(payment["id"], max(0, floor(coins * rate * 10**9)))
        paid = sum(bill.worth_nusd[payment["id"]] for payment in settled)
        face = floor(bill.face_usd * 10**9)
        # Coins divide to a hundred-millionth; a full payment is the face, not what rounding made of it.
        if (state, also) in (("Settled", "None"), ("Settled", "PaidOver")):
            paid = face if abs(paid - face) <= floor(bill.usd_per_coin * 10) + 1 else paid
        bill.credited_nusd = max(bill.credited_nusd, paid)

    @invariant()
    def the_books_are_the_model(self) -> None:
        if self.has_begun:
            self.do(self._compare())

    async def _compare(self) -> None:
        found = await self.owner.sql("SELECT invoice_id, credited_nusd, bonus_nusd FROM topup WHERE credited_nusd > 0")
        model = {bill.id: (bill.credited_nusd, bill.bonus_nusd) for bill in self.bills if bill.credited_nusd}
        assert {id: (credited, bonus) for id, credited, bonus in found} == model
        [(balance,)] = await self.owner.sql("SELECT posted_nusd FROM account")
        assert balance == sum(credited + bonus for credited, bonus in model.values())

    @rule()
    def quiet(self) -> None:
        STEPS["quiet"] += 1
        self.do(self._quiet())

    async def _quiet(self) -> None:
        """The storm is over: everything is up, everybody has looked, and the books are right."""
        await self._come_up()
        await self._deliver(self.letters)
        self.letters.clear()
        await self._process()
        await self._poll()
        await self._compare()
        report = await audit(self.calm.house.db)
        assert report.is_clean, report.findings
        balance = await self.us.ask(httpx.Request("GET", "http://us.test/credits/balance", headers=self.customer))
        total = sum(bill.credited_nusd + bill.bonus_nusd for bill in self.bills)
        assert exact(balance)["balance"] == Decimal(total).scaleb(-9)


def run_machine(
    database_url: str, settings: Settings, config: pytest.Config, *, steps: int, examples: int, steps_each: int
) -> None:
    """Run seed after seed until there were so many steps; a failing seed is printed."""
    loop = asyncio.new_event_loop()
    place_ = Place(loop, settings, database_url)
    chosen = os.environ.get("TOPUP_MACHINE_SEED")
    how = hypothesis.settings(
        max_examples=examples, stateful_step_count=steps_each, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    STEPS.clear()
    try:
        while STEPS.total() < steps:
            seed = int(chosen) if chosen else random.SystemRandom().randrange(2**32)

            class Machine(TopupMachine):
                place = place_

            try:
                run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=how)
            except BaseException:
                tell(config, f"top-up machine: TOPUP_MACHINE_SEED={seed} fails after {STEPS.total()} steps")
                raise
            tell(config, f"top-up machine: seed {seed} done, {STEPS.total()} steps so far")
            if chosen:
                break
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    each = ", ".join(f"{name} {count}" for name, count in STEPS.most_common())
    tell(config, f"top-up machine: {STEPS.total()} steps, all as the model says ({each})")


def test_whatever_happens_a_few_hundred_times(
    database_url: str, settings: Settings, pytestconfig: pytest.Config
) -> None:
    run_machine(database_url, settings, pytestconfig, steps=FAST_STEPS, examples=6, steps_each=60)


@pytest.mark.slow
def test_whatever_happens_twenty_thousand_times(
    database_url: str, settings: Settings, pytestconfig: pytest.Config
) -> None:
    run_machine(database_url, settings, pytestconfig, steps=SLOW_STEPS, examples=20, steps_each=200)
