"""The grid: every step of a top-up times every fault, and in every cell the right credit once and clean books.

The real adapter asks the real sandbox, the sandbox's webhooks come to the real app, and the app's database is
PostgreSQL; the faults are on the wires between them. A cell: arm the fault, make a top-up and repeat until it is made,
pay it, and let webhooks and jobs come until it is credited; then everything comes once more.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import pytest

from app.audit import audit
from app.kernel.settings import Settings
from app.topups.inbox import process_waiting
from app.topups.sweep import sweep
from tests import databases
from tests.rig import exact
from tests.world import PATIENCE, Backend, Owner, Process, running, tell

pytestmark = pytest.mark.long

T = TypeVar("T")


CELL_SECONDS: Final = 15


class Step(StrEnum):
    """Where on its way a top-up is. Those with a text are transactions, known by what they say before COMMIT."""

    ASK = "create: our customer asks"
    CLAIM = "create: the idempotency key is taken"
    QUOTE = "create: the rate is asked for"
    WRITE = "create: the row is written"
    MAKE = "create: the invoice is made"
    SHOW = "create: its payment method is asked for"
    COMPLETE = "create: both are tied together"
    HOOK = "webhook: it comes"
    STORE = "webhook: it is stored"
    TAKE = "reconcile: a webhook is taken from the inbox"
    DUE = "reconcile: the poller takes what is due"
    READ = "reconcile: the row is read"
    INVOICE = "reconcile: the invoice is asked for"
    PAYMENTS = "reconcile: its payments are asked for"
    RATE = "reconcile: today's rate is asked for"
    BOOK = "credit: it is booked"
    DONE = "credit: the webhook is done"


TRANSACTIONS: Final = {
    Step.CLAIM: "INSERT INTO idempotency",
    Step.WRITE: "INSERT INTO topup (",
    Step.COMPLETE: "INSERT INTO topup_invoice",
    Step.STORE: "INSERT INTO webhook_delivery",
    Step.TAKE: "UPDATE webhook_delivery SET attempts",
    Step.DUE: "UPDATE topup SET next_check_at = now() + interval '1 minute'",
    Step.READ: "AS asked_at",
    Step.BOOK: "INSERT INTO entry",
    Step.DONE: "SET processed_at",
}
ASKED_OF_THE_BACKEND: Final = {Step.QUOTE, Step.MAKE, Step.SHOW, Step.INVOICE, Step.PAYMENTS, Step.RATE}


class Fault(StrEnum):
    """What goes wrong. `before` and `after` are of the step's effect; what is duplicated or overtaken is the step."""

    DROP_BEFORE = "drop before effect"
    DROP_AFTER = "drop after effect"
    DELAY = "delay past every deadline"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    OUR_END_BEFORE = "restart of us before effect"
    OUR_END_AFTER = "restart of us after effect"
    THEIR_END_BEFORE = "restart of the backend before effect"
    THEIR_END_AFTER = "restart of the backend after effect"


@dataclass(frozen=True)
class Way:
    """A way to top up, and what it must come to in USD."""

    method: str
    currency: str
    amount: str
    credit: Decimal
    bonus: Decimal
    is_late: bool = False


LIGHTNING: Final = Way("btc-lightning", "SATS", "10000", Decimal("6.5"), Decimal("0.325"))
LATE: Final = Way("ltc", "LTC", "0.25", Decimal(10), Decimal(0), is_late=True)  # at 80 USD; 40 when it was paid
LTC: Final = Way("ltc", "USD", "20", Decimal(20), Decimal(0))
WAYS: Final = (
    LIGHTNING,
    LATE,
    Way("btc", "BTC", "0.001", Decimal(65), Decimal(0)),
    Way("lbtc", "USD", "10", Decimal(10), Decimal(0)),
    Way("xmr", "XMR", "0.1", Decimal(15), Decimal(0)),
)


class Mischief:
    """Does one fault at one step, once, for whoever passes there."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.step: Step | None = None
        self.fault: Fault | None = None
        self.struck = False
        self.tasks: list[asyncio.Task[Any]] = []

    def arm(self, step: Step | None, fault: Fault | None) -> None:
        self.step, self.fault, self.struck = step, fault, False

    async def passing(self, step: Step | None, effect: Callable[[], Awaitable[T]], broken: Exception) -> T:
        """Let the step happen, or not, or not only. Raises `broken` where its connection breaks."""
        if step is None or step is not self.step or self.struck:
            return await effect()
        self.struck = True
        world = self._world
        match self.fault:
            case Fault.DROP_BEFORE:
                raise broken
            case Fault.DROP_AFTER:
                await effect()
                raise broken
            case Fault.DELAY:
                answer = await effect()
                await asyncio.sleep(PATIENCE.deadline_seconds + 0.1)
                return answer
            case Fault.DUPLICATE:
                answer = await effect()
                if step in TRANSACTIONS:  # what is committed is: its like is another process that does the same
                    await world.rival()
                    return answer
                return await effect()
            case Fault.REORDER:
                rival = asyncio.create_task(world.rival())
                self.tasks.append(rival)
                await asyncio.wait([rival], timeout=0.2)  # it may have to wait for what we hold
                return await effect()
            case Fault.OUR_END_BEFORE:
                world.kill()
                raise broken
            case Fault.OUR_END_AFTER:
                await effect()
                world.kill()
                raise broken
            case Fault.THEIR_END_BEFORE:
                await world.backend.restart()
                if step in ASKED_OF_THE_BACKEND:
                    raise broken
                return await effect()
            case Fault.THEIR_END_AFTER:
                answer = await effect()
                await world.backend.restart()
                return answer
        raise AssertionError(self.fault)


class World:
    """Us, who may be killed; a calm process that never is; the backend; one customer."""

    def __init__(self, settings: Settings, database_url: str, folder: Path) -> None:
        self._settings, self._database_url = settings, database_url
        self.owner = Owner(database_url)
        self.backend = Backend(folder, self._from_backend)
        self.mischief = Mischief(self)
        self.calm = Process(settings, database_url, self.backend.send)
        self.us: Process | None = None
        self._dead: list[Process] = []
        self._one_at_a_time = asyncio.Lock()
        self._letters: list[httpx.Request] = []
        self.phase = "create"
        self.asking: httpx.Request | None = None

    async def alive(self) -> Process:
        """Us, after a restart if need be."""
        async with self._one_at_a_time:
            while self._dead:
                await self._dead.pop().close()
            if self.us is None:
                us = Process(self._settings, self._database_url, self._to_backend, at_commit=self._at_commit)
                await us.start()
                self.us = us
            return self.us

    def kill(self) -> None:
        if self.us is not None:
            self.us.kill()
            self._dead.append(self.us)
            self.us = None

    async def end(self) -> None:
        self.kill()
        while self._dead:
            await self._dead.pop().close()

    async def rival(self) -> None:
        """Another process does what we are doing, at the same time."""
        await self.owner.everything_is_due()
        if self.phase == "create" and self.asking is not None:
            with contextlib.suppress(httpx.HTTPError):
                await self.calm.ask(self.asking)
        else:
            await self.calm.jobs()

    # The wires

    async def _to_backend(self, request: httpx.Request) -> httpx.Response:
        step = self._step_of(request)
        return await self.mischief.passing(step, lambda: self.backend.send(request), httpx.ReadError("cut"))

    def _step_of(self, request: httpx.Request) -> Step | None:
        path, is_creating = request.url.path, self.phase == "create"
        if request.method == "POST":
            return Step.MAKE
        if path.endswith("/rates"):
            return Step.QUOTE if is_creating else Step.RATE
        if path.endswith("/payment-methods"):
            return Step.SHOW if is_creating else Step.PAYMENTS
        return None if is_creating else Step.INVOICE

    async def _at_commit(self, said: str, let_through: Callable[[], Awaitable[None]]) -> None:
        step = next((step for step, text in TRANSACTIONS.items() if text in said), None)
        await self.mischief.passing(step, let_through, ConnectionResetError("cut"))

    async def _from_backend(self, request: httpx.Request) -> httpx.Response:
        """A webhook. The one that tells of the payment is the step's; before it is paid, none is."""
        is_told = b'"InvoiceSettled"' in request.content or b'"InvoicePaymentSettled"' in request.content
        step = Step.HOOK if is_told else None
        if step is self.mischief.step is Step.HOOK and self.mischief.fault is Fault.REORDER:
            return await self._in_reverse(request)
        return await self.mischief.passing(step, lambda: self._webhook(request), httpx.ReadError("cut"))

    async def _webhook(self, request: httpx.Request) -> httpx.Response:
        answer = await (await self.alive()).ask(request)
        assert answer.status_code in (200, 503), answer.text
        return answer

    async def _in_reverse(self, request: httpx.Request) -> httpx.Response:
        """Keep this one until another has overtaken it."""
        self.mischief.struck = True
        self._letters.append(request)
        if len(self._letters) == 2:
            for letter in reversed(self._letters):
                await self._webhook(letter)
            self._letters.clear()
        return httpx.Response(200)

    # The customer

    async def ask(self, method: str, path: str, headers: dict[str, str], body: Any = None) -> httpx.Response | None:
        """Ask us over a wire that may be cut; None if no answer came."""
        request = httpx.Request(method, f"http://us.test{path}", headers=headers, json=body)
        us = await self.alive()
        is_step = path.startswith("/topup/create")
        self.asking = request if is_step else None
        with contextlib.suppress(httpx.HTTPError):
            return await self.mischief.passing(
                Step.ASK if is_step else None, lambda: us.ask(request), httpx.ReadError("cut")
            )
        return None

    async def customer(self) -> dict[str, str]:
        answer = await self.calm.ask(httpx.Request("POST", "http://us.test/accounts/create"))
        return {"x-credit-id": answer.json()["credit_id"]}

    async def make(self, customer: dict[str, str], way: Way, tries: int = 10) -> str | None:
        """Ask for a top-up, again with the same key until it is there. Returns its invoice's id."""
        self.phase = "create"
        headers = customer | {"Idempotency-Key": uuid.uuid4().hex}
        for _ in range(tries):
            answer = await self.ask(
                "POST", f"/topup/create/{way.method}", headers, {"amount": way.amount, "currency": way.currency}
            )
            if answer is not None and answer.status_code == 201:
                return str(answer.json()["invoice_id"])
            assert answer is None or answer.status_code in (409, 503), answer.text
            await self.owner.everything_is_due()
        return None

    async def pay(self, invoice_id: str, way: Way) -> None:
        self.phase = "reconcile"
        if way.is_late:
            await self.backend.act(invoice_id, "expire")
            await self.backend.drive("clock", advance_seconds=3600)
            await self.backend.set_rates(LTC_USD="40")
        await self.backend.act(invoice_id, "pay")
        await self.backend.act(invoice_id, "confirm", blocks=10)
        if way.is_late:
            await self.backend.drive("clock", advance_seconds=-3600)

    async def settle_down(self, *, polls_first: bool, rounds: int = 3) -> None:
        """Let webhooks and jobs come until nothing waits any more."""
        for _ in range(rounds):
            await self.backend.all_told()
            await self.owner.everything_is_due()
            await (await self.alive()).jobs(polls_first=polls_first)
            await asyncio.gather(*self.mischief.tasks)
            self.mischief.tasks.clear()


@pytest.fixture(scope="module")
async def world(
    database_url: str, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    world = World(settings, database_url, tmp_path_factory.mktemp("sandbox"))
    async with running(world.owner, world.backend, world.calm):
        await world.alive()
        yield world
        await world.end()


COUNTED: dict[str, int] = {}
"""How many cells of each kind were walked through, for the report at the end."""


def cells(way: Way) -> list[Any]:
    """Every step that this way takes, times every fault."""
    skipped = set() if way.is_late else {Step.RATE}
    if way.currency == "USD":
        skipped |= {Step.QUOTE}
    return [
        pytest.param(way, step, fault, id=f"{way.method}-{step.name}-{fault.name}")
        for step in Step
        if step not in skipped
        for fault in Fault
    ]


FAST: Final = [*cells(LIGHTNING), *(cell for cell in cells(LATE) if cell.values[1] is Step.RATE)]
FULL: Final = [cell for way in WAYS for cell in cells(way)]
SLOW: Final = [cell for cell in FULL if cell.id not in {fast.id for fast in FAST}]


@pytest.mark.usefixtures("clean_once")
@pytest.mark.parametrize(("way", "step", "fault"), FAST)
async def test_every_cell_ends_with_the_right_credit_once(world: World, way: Way, step: Step, fault: Fault) -> None:
    async with asyncio.timeout(CELL_SECONDS):
        await walk_through(world, way, step, fault)
    COUNTED["cells"] = COUNTED.get("cells", 0) + 1


@pytest.mark.slow
@pytest.mark.usefixtures("clean_once")
@pytest.mark.parametrize(("way", "step", "fault"), SLOW)
async def test_every_cell_of_every_other_way_to_pay(world: World, way: Way, step: Step, fault: Fault) -> None:
    async with asyncio.timeout(CELL_SECONDS):
        await walk_through(world, way, step, fault)
    COUNTED["cells of the slow suite"] = COUNTED.get("cells of the slow suite", 0) + 1


async def walk_through(world: World, way: Way, step: Step, fault: Fault) -> None:
    """One cell."""
    await prepare(world, step, fault)
    customer = await world.customer()
    invoice_id = await world.make(customer, way)
    assert invoice_id is not None
    [topup] = await topups_of(world, invoice_id)
    await world.pay(invoice_id, way)
    await world.settle_down(polls_first=step is Step.DUE)
    assert world.mischief.struck, "nobody passed the step"

    await is_credited_once(world, customer, invoice_id, way)
    await world.backend.act(invoice_id, "redeliver")
    await world.settle_down(polls_first=True, rounds=2)
    await asyncio.gather(*(world.calm.jobs() for _ in range(2)))
    await is_credited_once(world, customer, invoice_id, way)

    # A POST that comes twice makes two; so may two of us, if one is held up between its row and its POST for longer
    # than its claim lasts. The customer was shown one of them.
    is_twice = step in (Step.WRITE, Step.MAKE) and fault in (Fault.DUPLICATE, Fault.REORDER)
    invoices = await world.backend.invoices_of(topup)
    assert len(invoices) in ((1, 2) if is_twice else (1,))
    assert invoice_id in [invoice["id"] for invoice in invoices]
    await the_books_are_clean(world)


LEFT_ALONE: Final = [
    (step, fault)
    for step in (Step.MAKE, Step.SHOW, Step.COMPLETE)
    for fault in (Fault.DROP_AFTER, Fault.DELAY, Fault.OUR_END_AFTER, Fault.THEIR_END_AFTER)
    if (step, fault) not in ((Step.COMPLETE, Fault.DELAY), (Step.COMPLETE, Fault.THEIR_END_AFTER))
] + [(Step.SHOW, Fault.DROP_BEFORE), (Step.SHOW, Fault.OUR_END_BEFORE), (Step.COMPLETE, Fault.DROP_BEFORE), (Step.COMPLETE, Fault.OUR_END_BEFORE)]  # fmt: skip


@pytest.mark.usefixtures("clean_once")
@pytest.mark.parametrize("finder", ["poller", "sweep"])
@pytest.mark.parametrize(("step", "fault"), LEFT_ALONE, ids=lambda value: value.name)
async def test_an_invoice_whose_customer_never_asks_again_is_found_and_what_is_paid_to_it_is_credited(
    world: World, step: Step, fault: Fault, finder: str
) -> None:
    async with asyncio.timeout(CELL_SECONDS):
        await leave_alone(world, step, fault, finder)
    COUNTED["cells left alone"] = COUNTED.get("cells left alone", 0) + 1


async def leave_alone(world: World, step: Step, fault: Fault, finder: str) -> None:
    await prepare(world, step, fault)
    customer = await world.customer()
    before = {one["id"] for one in await world.backend.look("invoices")}
    await world.make(customer, LIGHTNING, tries=1)
    assert world.mischief.struck
    [invoice_id] = {one["id"] for one in await world.backend.look("invoices")} - before
    await world.pay(invoice_id, LIGHTNING)
    await world.backend.drive("lose-events")
    if finder == "sweep":
        us = await world.alive()
        await sweep(us.house.db, us.gateway)
    await world.settle_down(polls_first=True, rounds=1)
    await is_credited_once(world, customer, invoice_id, LIGHTNING)
    await the_books_are_clean(world)


def test_report_the_grid(pytestconfig: pytest.Config, record_property: Callable[[str, object], None]) -> None:
    """Last, so that it can tell how many cells there were."""
    for what, count in COUNTED.items():
        record_property(what, count)
    told = ", ".join(f"{count} {what}" for what, count in COUNTED.items())
    tell(pytestconfig, f"fault grid: {told or 'no cells'}, each credited once and the books clean")


# --- what the machine and the grid have brought to light ---------------------------------------------


@pytest.mark.usefixtures("clean_once")
@pytest.mark.parametrize("is_paid_again", [False, True], ids=["alone", "while another comes"])
async def test_a_credited_payment_that_falls_away_is_shown_to_a_person_and_not_taken_back(
    world: World, is_paid_again: bool
) -> None:
    await prepare(world)
    customer = await world.customer()
    invoice_id = await world.make(customer, LTC)
    assert invoice_id is not None
    await world.backend.act(invoice_id, "pay", amount="0.125")
    await world.backend.act(invoice_id, "confirm", blocks=10)
    await world.backend.act(invoice_id, "expire")
    await world.settle_down(polls_first=True)
    assert await balance_of(world, customer) == 10
    [shown] = (await world.backend.look(f"invoices/{invoice_id}"))["paymentMethods"]
    await world.backend.act(invoice_id, "double-spend", paymentId=shown["payments"][0]["id"])
    if is_paid_again:
        await world.backend.act(invoice_id, "pay", amount="0.125")
        await world.backend.act(invoice_id, "confirm", blocks=10)
    await world.settle_down(polls_first=True)
    assert await balance_of(world, customer) == 10
    [(review,)] = await world.owner.sql("SELECT review FROM topup WHERE invoice_id = %s", invoice_id)
    assert "does not count any more" in review
    await the_books_are_clean(world)


@pytest.mark.usefixtures("clean_once")
async def test_a_repeat_that_makes_the_invoice_makes_it_at_the_rate_of_that_moment(world: World) -> None:
    await prepare(world)
    customer = await world.customer()
    headers = customer | {"Idempotency-Key": uuid.uuid4().hex}
    asked = ("POST", "/topup/create/ltc", headers, {"amount": "0.25", "currency": "LTC"})
    await world.backend.drive("down", mode="error", methods=["POST"])
    refused = await world.ask(*asked)
    assert refused is not None
    assert refused.status_code == 503
    await world.backend.drive("down", mode="off")
    await world.backend.set_rates(LTC_USD="40")
    made = await world.ask(*asked)
    assert made is not None
    assert exact(made)["rate_usd"] == 40
    await world.pay(str(made.json()["invoice_id"]), LTC)
    await world.settle_down(polls_first=True)
    assert await balance_of(world, customer) == 10  # and not the 20 of a quote that nobody else can have any more
    await the_books_are_clean(world)


@pytest.mark.usefixtures("clean_once")
async def test_a_repeat_of_a_topup_that_was_given_up_is_watched_again(world: World) -> None:
    await prepare(world)
    customer = await world.customer()
    headers = customer | {"Idempotency-Key": uuid.uuid4().hex}
    asked = ("POST", "/topup/create/ltc", headers, {"amount": "20", "currency": "USD"})
    before = {one["id"] for one in await world.backend.look("invoices")}
    await world.backend.drive("down", mode="error", methods=["POST"])
    await world.ask(*asked)
    await world.owner.sql("UPDATE topup SET created_at = now() - interval '11 minutes' WHERE invoice_id IS NULL")
    await world.settle_down(polls_first=True, rounds=1)
    assert await world.owner.sql("SELECT status FROM topup WHERE invoice_id IS NULL") == [("Failed",)]
    await world.backend.drive("down", mode="lost", methods=["POST"])
    await world.ask(*asked)
    await world.backend.drive("down", mode="off")
    [invoice_id] = {one["id"] for one in await world.backend.look("invoices")} - before
    await world.pay(invoice_id, LTC)
    await world.backend.drive("lose-events")
    await world.settle_down(polls_first=True)
    assert await balance_of(world, customer) == 20
    await the_books_are_clean(world)


@pytest.mark.usefixtures("clean_once")
async def test_a_webhook_that_was_tried_for_days_does_not_stop_the_inbox(world: World) -> None:
    await prepare(world)
    customer = await world.customer()
    invoice_id = await world.make(customer, LIGHTNING)
    assert invoice_id is not None
    await world.pay(invoice_id, LIGHTNING)
    await world.backend.all_told()
    await world.owner.sql("UPDATE webhook_delivery SET attempts = 2000 WHERE invoice_id = %s", invoice_id)
    await world.owner.everything_is_due()
    us = await world.alive()
    assert await process_waiting(us.house.db, us.gateway) > 0
    await is_credited_once(world, customer, invoice_id, LIGHTNING)


# --- given and then -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean_once(database_url: str) -> None:
    """Empty books before the first cell; the later ones live beside those before them, as accounts do."""
    databases.empty(database_url)


async def prepare(world: World, step: Step | None = None, fault: Fault | None = None) -> None:
    await world.alive()
    await world.owner.put_to_rest()
    await world.backend.set_rates(LTC_USD="80")
    await world.backend.drive("lose-events", from_now_on=step is Step.DUE)  # then the poller is all there is
    world.mischief.arm(step, fault)


async def topups_of(world: World, invoice_id: str) -> list[str]:
    found = await world.owner.sql("SELECT topup_id FROM topup_invoice WHERE invoice_id = %s", invoice_id)
    return [str(topup) for (topup,) in found]


async def is_credited_once(world: World, customer: dict[str, str], invoice_id: str, way: Way) -> None:
    shown = await world.calm.ask(httpx.Request("GET", f"http://us.test/topup/status/{invoice_id}", headers=customer))
    topup = exact(shown)
    assert (topup["credited_usd"], topup["bonus_usd"]) == (way.credit, way.bonus)
    assert await balance_of(world, customer) == way.credit + way.bonus
    entries = await world.owner.sql(
        """SELECT e.kind, e.amount_nusd FROM entry e JOIN topup_invoice i ON i.account_id = e.account_id
           WHERE i.invoice_id = %s ORDER BY e.id""",
        invoice_id,
    )
    given = {"topup": way.credit, "bonus": way.bonus}
    assert entries == [(kind, int(usd.scaleb(9))) for kind, usd in given.items() if usd]
    unseen = await world.owner.sql(
        "SELECT type FROM webhook_delivery WHERE invoice_id = %s AND processed_at IS NULL", invoice_id
    )
    assert unseen == []


async def balance_of(world: World, customer: dict[str, str]) -> Decimal:
    answer = await world.calm.ask(httpx.Request("GET", "http://us.test/credits/balance", headers=customer))
    return Decimal(exact(answer)["balance"])


async def the_books_are_clean(world: World) -> None:
    report = await audit(world.calm.house.db)
    assert report.is_clean, report.findings
