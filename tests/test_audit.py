"""The auditor is quiet over honest books, however they were raced, and names every planted lie."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import OpenedAccount, open_account
from app.activity.archive import drop, export
from app.activity.rollup import roll_up
from app.admin.acts import write_act
from app.audit import CHECKS, FINDINGS_PER_CHECK, PROOFS, Report, Secrets, audit
from app.audit.offers import ALIASES, OFFERS
from app.autotopup.connect import Wish as WalletWish
from app.autotopup.connect import connect
from app.autotopup.rules import OPEN
from app.autotopup.run import AutoTopup
from app.autotopup.tables import states_sql
from app.kernel.db import Database, Row, row
from app.kernel.errors import AppError, DatabaseUnavailable
from app.kernel.money import CURRENCIES
from app.kernel.security import Admin, Caller, Kind
from app.keys.issue import NewKey, change, issue, revoke
from app.keys.tables import ResetPeriod
from app.keys.tree import Window
from app.keys.verify import KeyOwner
from app.ledger.charge import ChargeId
from app.ledger.post import post
from app.ledger.statement import balance
from app.ledger.tables import EntryKind
from app.metering.holds import Ask, Work, expire_holds, hold_id_for
from app.metering.refund import refund
from app.topups.create import Wish, create_topup
from app.topups.credit import TopupRef, credit_if_paid
from app.topups.gateway import AdditionalStatus, Hint, InvoiceStatus, PaymentStatus
from app.topups.inbox import process_waiting, store
from app.topups.methods import METHODS
from app.topups.review import resolve
from app.wiring import House
from tests.past import move_back_and_sort
from tests.rig import FakeBtcpay
from tests.wallets import NWC_URL, Clock, FakeWallets

USD = 1_000_000_000
EMPTY = (
    "TRUNCATE account, api_key, credential, entry, hold, usage, topup, payment, topup_invoice, topup_address, webhook_delivery,"
    " admin_log CASCADE"
)
Owner = psycopg.Connection[Any]


# The books: every kind of row there is, made by the real verbs.


@dataclass(frozen=True, slots=True)
class Books:
    """Two customers whose books have a bit of everything, and names for the rows that lies are planted in."""

    house: House
    account: uuid.UUID
    other: uuid.UUID
    key: uuid.UUID
    topup: uuid.UUID
    """Lightning, in USD, with a bonus, paid in full."""
    coin_topup: uuid.UUID
    """Litecoin, in LTC, half paid in time and then late."""
    other_topup: uuid.UUID
    open_topup: uuid.UUID
    """Waits to be paid."""
    settled: uuid.UUID
    """Holds, in these states."""
    open: uuid.UUID
    released: uuid.UUID
    attempt: uuid.UUID
    """Of the other's wallet: this one paid, the next one is asked."""
    open_attempt: uuid.UUID

    def fill(self, sql: str) -> str:
        """`{account}` and its like as quoted ids."""
        names = {name: f"'{getattr(self, name)}'" for name in Books.__slots__ if name != "house"}
        return sql.format(**names)


@pytest.fixture
async def books(house: House, owner_conn: Owner) -> AsyncIterator[Books]:
    rich, other = await opened(house), await opened(house)
    topup, coin_topup, other_topup, open_topup = (uuid.uuid4() for _ in range(4))
    await paid(house, rich.account_id, topup, "btc-lightning", "USD", 10 * USD)
    await paid(house, other.account_id, other_topup, "btc", "USD", 20 * USD)
    await asked(house, rich.account_id, open_topup, "xmr", "USD", 5 * USD)
    await paid_late_in_two_parts(house, rich.account_id, coin_topup)
    await hinted(house, topup)
    await spend(house, owner_conn, rich, "a")
    await spend(house, owner_conn, other, "b")
    await change_keys(house, rich.account_id)
    await spend_below(house, rich.account_id)
    await correct_by_hand(house, other.account_id)
    attempts = await paid_by_a_wallet(house, other.account_id)
    yield Books(
        house, rich.account_id, other.account_id, (await owner_of(house, rich)).key_id, topup, coin_topup, other_topup,
        open_topup, settled=hold_id_for("proxy", "a-settled"), open=hold_id_for("proxy", "a-open"),
        released=hold_id_for("proxy", "a-released"), attempt=attempts[0], open_attempt=attempts[1],
    )  # fmt: skip
    owner_conn.execute(EMPTY)


async def opened(house: House) -> OpenedAccount:
    return await house.db.transaction(lambda session: open_account(session, house.keyring))


async def owner_of(house: House, account: OpenedAccount) -> KeyOwner:
    found = await house.verifier.owner_of(secret=account.api_key)
    assert found is not None
    return found


async def asked(
    house: House, account_id: uuid.UUID, topup_id: uuid.UUID, method: str, currency: str, amount_units: int
) -> str:
    """A new top-up; returns its invoice id."""

    async def finish(_: AsyncSession, topup: Row) -> str:
        return str(topup["invoice_id"])

    caller = Caller(Kind.CREDIT_ID, account_id)
    wish = Wish(METHODS[method], currency, amount_units)
    return await create_topup(house.db, backend(house), caller, wish, topup_id, finish)


async def paid(
    house: House, account_id: uuid.UUID, topup_id: uuid.UUID, method: str, currency: str, amount_units: int
) -> None:
    invoice_id = await asked(house, account_id, topup_id, method, currency, amount_units)
    backend(house).pay(invoice_id)
    assert await credit_if_paid(house.db, backend(house), TopupRef(account_id, topup_id)) is not None


async def paid_late_in_two_parts(house: House, account_id: uuid.UUID, topup_id: uuid.UUID) -> None:
    invoice_id = await asked(house, account_id, topup_id, "ltc", "LTC", CURRENCIES["LTC"].scale)
    backend(house).pay(invoice_id, share=Decimal("0.5"))
    await credit_if_paid(house.db, backend(house), TopupRef(account_id, topup_id))
    backend(house).change(invoice_id, status=InvoiceStatus.EXPIRED, additional_status=AdditionalStatus.PAID_PARTIAL)
    assert await credit_if_paid(house.db, backend(house), TopupRef(account_id, topup_id)) is not None
    backend(house).pay(invoice_id, share=Decimal("0.6"), late=True)
    assert await credit_if_paid(house.db, backend(house), TopupRef(account_id, topup_id)) is not None


async def hinted(house: House, topup_id: uuid.UUID) -> None:
    """A webhook that came and was looked into, and one that waits."""
    invoice = (await backend(house).find(str(topup_id)))[0]
    await store(house.db, backend(house).name, Hint("first", "InvoiceSettled", invoice.id), b"{}")
    assert await process_waiting(house.db, backend(house)) == 1
    await store(house.db, backend(house).name, Hint("second", "InvoiceSettled", invoice.id), b"{}")


async def spend(house: House, owner_conn: Owner, account: OpenedAccount, prefix: str) -> None:
    """Every way a call can go; the holds are named after how they ended."""
    meter, owner = house.meter, await owner_of(house, account)
    holds = {
        name: (await meter.authorize("proxy", owner, Ask(f"{prefix}-{name}", USD // 100, "m", "/chat"))).hold_id
        for name in (
            "settled",
            "priced",
            "above",
            "nothing",
            "released",
            "released_late",
            "expired",
            "expired_late",
            "open",
        )
    }
    settled = await meter.settle("proxy", holds["settled"], Work(45_000))
    await meter.settle("proxy", holds["settled"], Work(99_000))
    await refund(house.db, "proxy", str(ChargeId(account.account_id, settled.charge_id)), 40_000)
    lines = {"parts": [3, 0, 0, 0, 0], "lines": [["input", "input", 2, 1_250, 1_000_000]]}
    await meter.settle("proxy", holds["priced"], Work(3, lines=lines))
    await meter.settle("proxy", holds["above"], Work(USD // 10))
    await meter.settle("proxy", holds["nothing"], Work(0))
    await meter.release("proxy", holds["released"])
    await meter.release("proxy", holds["released_late"])
    await meter.settle("proxy", holds["released_late"], Work(7))
    late = [hold_id_for("proxy", f"{prefix}-{name}") for name in ("expired", "expired_late")]
    owner_conn.execute("UPDATE hold SET expires_at = now() - interval '1 minute' WHERE id = ANY (%s)", [late])
    assert await expire_holds(house.db) == 2
    await meter.settle("proxy", holds["expired_late"], Work(11))
    await meter.charge("proxy", owner, Ask(f"{prefix}-charged", 5_000, None, None), Work(5_000))
    await meter.charge("proxy", owner, Ask(f"{prefix}-free", 0, None, None), Work(0))


async def change_keys(house: House, account_id: uuid.UUID) -> None:
    """A key whose period changes while a call is in flight, and one that is revoked while another is."""
    for name, act in (("moved", to_monthly), ("revoked", revoked)):
        owner = await new_key(house, account_id, NewKey(name, limit_nusd=USD, reset_period=ResetPeriod.DAILY))
        before = await house.meter.authorize("proxy", owner, Ask(f"{name}-1", 1000, None, None))
        during = await house.meter.authorize("proxy", owner, Ask(f"{name}-2", 1000, None, None))
        await house.meter.settle("proxy", before.hold_id, Work(900))
        await act(house, owner)
        await house.meter.settle("proxy", during.hold_id, Work(800))


async def spend_below(house: House, account_id: uuid.UUID) -> None:
    """A key below a key below a key of three windows, each with calls that ended in every way, and one that did not."""
    three = [Window(ResetPeriod.DAILY, USD), Window(ResetPeriod.MONTHLY, 2 * USD), Window(None, 3 * USD)]
    grandparent = await new_key(house, account_id, NewKey("grandparent", windows=three))
    parent = await new_key(house, account_id, NewKey("parent", limit_nusd=3 * USD, parent_id=grandparent.key_id))
    child = await new_key(house, account_id, NewKey("child", windows=three[::2], parent_id=parent.key_id))
    for owner in (grandparent, parent, child):
        name = owner.key_id.hex
        holds = [await house.meter.authorize("proxy", owner, Ask(f"{name}-{n}", 1000, None, None)) for n in range(3)]
        charged = await house.meter.settle("proxy", holds[0].hold_id, Work(1200))
        await refund(house.db, "proxy", str(ChargeId(account_id, charged.charge_id)), 200)
        await house.meter.release("proxy", holds[1].hold_id)
        await house.meter.charge("proxy", owner, Ask(f"{name}-charged", 500, None, None), Work(500))


async def new_key(house: House, account_id: uuid.UUID, new: NewKey) -> KeyOwner:
    key, _ = await house.db.transaction(lambda session: issue(session, house.keyring, account_id, new))
    return KeyOwner(account_id, key["id"])


async def to_monthly(house: House, owner: KeyOwner) -> None:
    monthly = {"reset_period": ResetPeriod.MONTHLY}
    await house.db.transaction(lambda session: change(session, house.keyring, owner.account_id, owner.key_id, monthly))


async def revoked(house: House, owner: KeyOwner) -> None:
    await house.db.transaction(lambda session: revoke(session, house.keyring, owner.account_id, owner.key_id))


async def correct_by_hand(house: House, account_id: uuid.UUID) -> None:
    admin = Admin(uuid.uuid4(), "ops")

    async def work(session: AsyncSession) -> None:
        for amount_nusd in (-12_345, 100):
            act = await write_act(
                session, house.settings.pepper, admin, "account.adjust", str(account_id), "by hand", amount_nusd
            )
            await post(session, account_id, EntryKind.ADJUSTMENT, f"act/{act}", "adjustment", amount_nusd)

    await house.db.transaction(work)


async def paid_by_a_wallet(house: House, account_id: uuid.UUID) -> tuple[uuid.UUID, uuid.UUID]:
    """An attempt that a wallet paid, and one whose answer is awaited."""
    wallets, clock = house.wallets, Clock()
    assert isinstance(wallets, FakeWallets)
    wallets.acts = ["pays", "silent"]
    autotopup = AutoTopup(
        house.db, house.gateways, wallets, house.settings.sealer, network="bcrt", is_on=True, clock=clock
    )
    uri = wallets.parse(NWC_URL)
    probe, wish = await wallets.probe(uri), WalletWish(900 * USD, 10 * USD, None)
    await house.db.transaction(
        lambda session: connect(session, house.settings.sealer, account_id, uri, probe, wish, clock())
    )
    made = []
    for _ in wallets.acts.copy():
        begun = await autotopup.begin(account_id)
        assert begun.ref is not None
        await autotopup.drive(begun.ref)
        made.append(begun.ref.attempt_id)
        clock.pass_(seconds=61)
    return made[0], made[1]


async def grown_old(books: Books, owner_conn: Owner, url: str, folder: Path) -> None:
    """All that was charged is of 102 days ago, exported and dropped; a call of two days ago is summed by day."""
    now, house = datetime.now(UTC), books.house
    month = (now - timedelta(days=102)).date().replace(day=1)
    await move_back_and_sort(house.db, owner_conn, 100)
    await house.meter.charge("proxy", KeyOwner(books.account, books.key), Ask("recent", 700, "m", None), Work(700))
    await move_back_and_sort(house.db, owner_conn, 2)
    await roll_up(house.db)
    owner = Database(url, pool_size=1, role=None)
    await owner.open()
    await export(owner, month, folder / "calls.csv.gz", now)
    await drop(owner, month, now, force=True)
    await owner.close()


def backend(house: House) -> FakeBtcpay:
    gateway = house.gateways.named("btcpay")
    assert isinstance(gateway, FakeBtcpay)
    return gateway


# Honest books.


async def test_honest_books_are_clean(books: Books) -> None:
    report = await audit(books.house.db, Secrets.of(books.house.settings))
    assert report.findings == ()
    assert (report.is_clean, report.checks, report.accounts) == (True, len(CHECKS) + len(PROOFS), 2)
    assert report.entries > 15


@pytest.mark.parametrize("share", ["0.333333333333", "1", "1.7"])
@pytest.mark.parametrize(("method", "currency"), [(m.id, code) for m in METHODS.values() for code in m.limits])
async def test_every_way_to_pay_is_clean(house: House, method: str, currency: str, share: str) -> None:
    """Odd amounts, too little and too much, in time and late, less a fee."""
    ref = TopupRef((await opened(house)).account_id, uuid.uuid4())
    amount_units = METHODS[method].limits[currency].least * 13 // 7
    if currency == "USD":
        amount_units -= amount_units % 10**7
    invoice_id = await asked(house, ref.account_id, ref.topup_id, method, currency, amount_units)
    for late in (False, True):
        backend(house).pay(invoice_id, share=Decimal(share), late=late)
        first, *more = backend(house).invoices[invoice_id].payments
        backend(house).change(invoice_id, payments=(replace(first, fee=first.value / 97), *more))
        await credit_if_paid(house.db, backend(house), ref)
        assert (await audit(house.db)).findings == ()
    assert (await house.db.transaction(lambda session: balance(session, ref.account_id))).posted_nusd > 0


async def test_what_a_person_decided_is_clean(house: House, owner_conn: Owner) -> None:
    """Settled though half was paid, and later not even that: shown, decided with an adjustment, and not found again."""
    ref = TopupRef((await opened(house)).account_id, uuid.uuid4())
    invoice_id = await asked(house, ref.account_id, ref.topup_id, "btc", "USD", 10 * USD)
    payment = backend(house).pay(invoice_id, share=Decimal("0.5"))
    backend(house).change(invoice_id, status=InvoiceStatus.SETTLED)
    credited = await credit_if_paid(house.db, backend(house), ref)
    assert credited is not None
    backend(house).change(invoice_id, payments=(replace(payment, status=PaymentStatus.INVALID),))
    await credit_if_paid(house.db, backend(house), ref)
    owner_conn.execute(
        "UPDATE topup SET settled_at = settled_at - interval '2 hours', created_at = created_at - interval '3 hours'"
    )
    assert (await audit(house.db)).findings == ()
    await house.db.transaction(lambda session: resolve(session, ref, -credited.amount_nusd))
    assert (await audit(house.db)).findings == ()
    assert (await house.db.transaction(lambda session: balance(session, ref.account_id))).posted_nusd == 0


async def test_books_of_which_a_month_was_dropped_are_clean(
    books: Books, owner_conn: Owner, clean: str, tmp_path: Path
) -> None:
    await grown_old(books, owner_conn, clean, tmp_path)
    assert (await audit(books.house.db)).findings == ()
    assert owner_conn.execute("SELECT count(*) FROM usage").fetchone() == (1,)


async def test_empty_books_are_clean(house: House) -> None:
    report = await audit(house.db)
    assert (report.findings, report.accounts, report.entries) == ((), 0, 0)


async def test_an_audit_in_the_middle_of_traffic_finds_nothing(house: House, owner_conn: Owner) -> None:
    """Snapshots are taken while calls, top-ups, changes of keys, expiries and postings race over three accounts."""
    accounts = [await opened(house) for _ in range(3)]
    for account in accounts:
        await paid(house, account.account_id, uuid.uuid4(), "btc", "USD", 10 * USD)
    reports = await asyncio.gather(
        *(trade(house, account, f"{name}-{n}", n) for name, account in enumerate(accounts) for n in range(60)),
        *(top_up_from_all_sides(house, account) for account in accounts for _ in range(3)),
        *(move_window(house, account, n) for account in accounts for n in range(4)),
        *(expire_holds(house.db) for _ in range(5)),
        *(audited(house) for _ in range(8)),
    )
    assert [report for report in reports if isinstance(report, tuple)] == [()] * 8
    assert (await audit(house.db)).findings == ()


async def trade(house: House, account: OpenedAccount, request_id: str, n: int) -> None:
    owner = await owner_of(house, account)
    try:
        if n % 5 == 0:
            ask = Ask(request_id, n * 1000, None, None)
            await asyncio.gather(*(house.meter.charge("proxy", owner, ask, Work(n * 1000)) for _ in range(2)))
            return
        held = await house.meter.authorize("proxy", owner, Ask(request_id, USD // 50, None, None, ttl_seconds=n % 3))
        await asyncio.sleep(n / 100)
        settles = [house.meter.settle("proxy", held.hold_id, Work(n * 777)) for _ in range(2)]
        releases = [house.meter.release("proxy", held.hold_id)] if n % 3 == 0 else []
        await asyncio.gather(*settles, *releases, return_exceptions=True)
    except AppError:
        """Refused for want of money, which the races decide."""


async def top_up_from_all_sides(house: House, account: OpenedAccount) -> None:
    """Webhooks and pollers ask before, while and after the invoice is paid."""
    ref = TopupRef(account.account_id, uuid.uuid4())
    invoice_id = await asked(house, ref.account_id, ref.topup_id, "btc-lightning", "USD", USD)

    async def pay() -> None:
        await asyncio.sleep(0.01)
        backend(house).pay(invoice_id)

    await asyncio.gather(*(credit_if_paid(house.db, backend(house), ref) for _ in range(6)), pay())
    await asyncio.gather(*(credit_if_paid(house.db, backend(house), ref) for _ in range(3)))


async def move_window(house: House, account: OpenedAccount, n: int) -> None:
    owner = await owner_of(house, account)
    period = (ResetPeriod.DAILY, ResetPeriod.WEEKLY, ResetPeriod.MONTHLY)[n % 3]
    await asyncio.sleep(n / 50)
    await house.db.transaction(
        lambda session: change(
            session, house.keyring, owner.account_id, owner.key_id, {"limit_nusd": 100 * USD, "reset_period": period}
        )
    )


async def audited(house: House) -> tuple[Any, ...]:
    return (await audit(house.db)).findings


async def test_a_credit_from_an_answer_that_was_overtaken_is_still_explained(house: House) -> None:
    """A check that asked earlier may hear later of the payment, and book after one that heard of none."""
    account = await opened(house)
    ref = TopupRef(account.account_id, uuid.uuid4())
    invoice_id = await asked(house, ref.account_id, ref.topup_id, "btc", "USD", 10 * USD)
    slow = SlowToAsk(backend(house))
    early = asyncio.create_task(credit_if_paid(house.db, slow, ref))
    await slow.was_asked.wait()
    await credit_if_paid(house.db, backend(house), ref)
    backend(house).pay(invoice_id)
    slow.may_answer.set()
    assert await early is not None
    assert (await audit(house.db)).findings == ()


class SlowToAsk(FakeBtcpay):
    """The same backend over a slow line: it answers when it may, with what is true then."""

    def __init__(self, real: FakeBtcpay) -> None:
        super().__init__()
        self.invoices = real.invoices
        self.was_asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def fetch(self, invoice_id: str) -> Any:
        self.was_asked.set()
        await self.may_answer.wait()
        return await super().fetch(invoice_id)


# Lies.


@dataclass(frozen=True, slots=True)
class Lie:
    """A corruption, and the check that must name it. `undo` is for what no TRUNCATE takes back."""

    label: str
    check: str
    sql: str
    without: tuple[str, ...] = ()
    """Constraints, as `table.name`, that are gone while it is planted."""
    undo: str = ""
    is_of_the_past: bool = False
    """Planted after a month of calls was dropped, and later ones were summed by day."""


_HOLD = (
    "account_id, id, service, request_id, request_hash, key_id, window_start, amount_nusd, state, expires_at, closed_at"
)
_ENTRY = "account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd"
_GIFT = f"""
    INSERT INTO entry ({_ENTRY}, created_at, usage_id)
    SELECT id, entry_count + 1, '{{kind}}', '{{reference}}', '{{contra}}', {{amount}}, posted_nusd + {{amount}}, now(),
           CASE WHEN '{{kind}}' = 'usage' THEN gen_random_uuid() END
    FROM account WHERE id = {{{{account}}}};
    UPDATE account SET posted_nusd = posted_nusd + {{amount}}, entry_count = entry_count + 1 WHERE id = {{{{account}}}}"""


def gift(kind: str, reference: str, contra: str, amount: int) -> str:
    """An entry planted with care: balance, count and running sum all fit."""
    return _GIFT.format(kind=kind, reference=reference, contra=contra, amount=amount)


_RECENT = "day > now() - interval '9 days'"
GHOST = "'00000000-0000-4000-8000-000000000000'"
LIES = (
    Lie("a balance raised by a nano-dollar", "balance_is_sum_of_entries", "UPDATE account SET posted_nusd = posted_nusd + 1 WHERE id = {account}"),
    Lie("money moved from one balance to another", "balance_is_sum_of_entries", "UPDATE account SET posted_nusd = posted_nusd + CASE id WHEN {account} THEN 500 ELSE -500 END"),
    Lie("an amount rewritten", "balance_is_sum_of_entries", "UPDATE entry SET amount_nusd = amount_nusd + 5 WHERE account_id = {account} AND id = 1"),
    Lie("an amount rewritten, its balance too", "balance_after_is_running_sum", "UPDATE entry SET amount_nusd = amount_nusd + 5 WHERE account_id = {account} AND id = 2; UPDATE account SET posted_nusd = posted_nusd + 5 WHERE id = {account}"),
    Lie("a balance after rewritten", "balance_after_is_running_sum", "UPDATE entry SET balance_after_nusd = 0 WHERE account_id = {account} AND id = 3"),
    Lie("two amounts swapped", "balance_after_is_running_sum", "UPDATE entry SET amount_nusd = amount_nusd + CASE id WHEN 1 THEN 9 ELSE -9 END WHERE account_id = {account} AND id IN (1, 2)"),
    Lie("the last entry removed with its money", "entries_are_counted", "UPDATE account a SET posted_nusd = posted_nusd - e.amount_nusd FROM entry e WHERE e.account_id = a.id AND e.id = a.entry_count AND a.id = {account}; DELETE FROM entry e USING account a WHERE e.account_id = a.id AND e.id = a.entry_count AND a.id = {account}"),
    Lie("an entry count rewritten", "entries_are_counted", "UPDATE account SET entry_count = entry_count + 1 WHERE id = {account}"),
    Lie("an entry removed from the middle", "entry_ids_have_no_gap", "DELETE FROM entry WHERE account_id = {account} AND id = 2; UPDATE account SET entry_count = entry_count - 1 WHERE id = {account}"),
    Lie("an entry given a number far away", "entry_ids_have_no_gap", "UPDATE entry SET id = 1000 WHERE account_id = {account} AND id = 2"),
    Lie("an entry under a number that is taken", "entry_ids_have_no_gap", "UPDATE entry SET id = 1 WHERE account_id = {account} AND id = 2", ("entry.entry_pkey",)),
    Lie("an entry slipped in before older ones", "entries_are_in_time_order", "UPDATE entry SET created_at = now() - interval '1 hour' WHERE account_id = {account} AND id = 5"),
    Lie("a top-up entry posted twice", "entry_is_posted_once", f"INSERT INTO entry ({_ENTRY}) SELECT account_id, 900, kind, reference, contra, amount_nusd, balance_after_nusd FROM entry WHERE account_id = {{account}} AND kind = 'topup' AND reference = {{topup}} || '/0'", ("entry.entry_once",)),
    Lie("usage that adds money", "entry_sign_fits_its_kind", gift("usage", str(uuid.uuid4()), "revenue:usage", 100)),
    Lie("a refund that takes money", "entry_sign_fits_its_kind", gift("refund", "r/1", "refund", -100)),
    Lie("an entry of a kind there is not", "entry_sign_fits_its_kind", gift("gift", "g/1", "adjustment", 100), ("entry.entry_kind_known",)),
    Lie("usage paid by another house account", "entry_contra_fits_its_kind", "UPDATE entry SET contra = 'adjustment' WHERE account_id = {account} AND kind = 'usage'"),
    Lie("an adjustment out of the revenue", "entry_contra_fits_its_kind", gift("adjustment", "x", "revenue:usage", 100)),
    Lie("an account made away with", "all_balances_are_all_entries", "DELETE FROM account WHERE id = {account}"),
    Lie("an entry of usage made away with", "all_revenue_is_all_usage", "DELETE FROM entry WHERE account_id = {account} AND kind = 'usage' AND reference = {settled}::text"),
    Lie("held money forgotten", "account_held_is_sum_of_open_holds", "UPDATE account SET held_nusd = 0 WHERE id = {account}"),
    Lie("an open hold removed", "account_held_is_sum_of_open_holds", "DELETE FROM hold WHERE id = {open}"),
    Lie("an open hold made smaller", "key_held_is_sum_of_open_holds", "UPDATE hold SET amount_nusd = 1 WHERE id = {open}"),
    Lie("a key's held money raised", "key_held_is_sum_of_open_holds", "UPDATE api_key SET held_nusd = held_nusd + 1 WHERE id = {key}"),
    Lie("an open hold given to another key", "key_held_is_sum_of_open_holds", "UPDATE hold SET key_id = (SELECT id FROM api_key WHERE account_id = {account} AND name = 'moved') WHERE id = {open}"),
    Lie("a key's window emptied", "key_window_is_sum_of_its_usage", "UPDATE api_key SET window_usage_nusd = 0 WHERE id = {key}"),
    Lie("a key's window begun anew without emptying", "key_window_is_sum_of_its_usage", "UPDATE api_key SET window_start = window_start + interval '1 second' WHERE id = {key}"),
    Lie("a parent's window emptied of what a child spent", "key_window_is_sum_of_its_usage", "UPDATE api_key SET window_usage_nusd = 0 WHERE account_id = {account} AND name = 'parent'"),
    Lie("a grandparent's second window made smaller", "key_window_is_sum_of_its_usage", "UPDATE api_key SET more_usage_nusd[1] = more_usage_nusd[1] - 1 WHERE account_id = {account} AND name = 'grandparent'"),
    Lie("a grandparent's third window made larger", "key_window_is_sum_of_its_usage", "UPDATE api_key SET more_usage_nusd[2] = more_usage_nusd[2] + 1 WHERE account_id = {account} AND name = 'grandparent'"),
    Lie("a child's own second window emptied", "key_window_is_sum_of_its_usage", "UPDATE api_key SET more_usage_nusd[1] = 0 WHERE account_id = {account} AND name = 'child'"),
    Lie("a grandparent's window begun anew without emptying", "key_window_is_sum_of_its_usage", "UPDATE api_key SET more_starts[1] = now() + interval '1 second' WHERE account_id = {account} AND name = 'grandparent'"),
    Lie("a child's call moved before its parent's window", "key_window_is_sum_of_its_usage", "UPDATE usage u SET window_start = u.window_start - interval '400 days' FROM api_key k WHERE k.account_id = {account} AND k.name = 'child' AND u.account_id = k.account_id AND u.key_id = k.id"),
    Lie("a child's call made its grandparent's", "key_lifetime_is_sum_of_usage", "UPDATE usage u SET key_id = g.id FROM api_key k, api_key g WHERE k.account_id = {account} AND k.name = 'child' AND g.account_id = {account} AND g.name = 'grandparent' AND u.account_id = k.account_id AND u.key_id = k.id"),
    Lie("a grandparent's held money forgotten", "key_held_is_sum_of_open_holds", "UPDATE api_key SET held_nusd = 0 WHERE account_id = {account} AND name = 'grandparent'"),
    Lie("a child freed of those above it", "key_window_is_sum_of_its_usage", "UPDATE api_key SET parent_id = NULL, ancestor_ids = NULL WHERE account_id = {account} AND name = 'child'"),
    Lie("a child's grandparent left out", "key_stands_below_its_parent", "UPDATE api_key SET ancestor_ids = ARRAY[parent_id] WHERE account_id = {account} AND name = 'child'"),
    Lie("a child put below another key", "key_stands_below_its_parent", "UPDATE api_key SET parent_id = {key} WHERE account_id = {account} AND name = 'child'"),
    Lie("a window named twice", "key_has_each_window_once", "UPDATE api_key SET more_periods[1] = reset_period WHERE account_id = {account} AND name = 'grandparent'"),
    Lie("a window without a limit", "key_has_each_window_once", "UPDATE api_key SET more_limits_nusd[1] = NULL WHERE account_id = {account} AND name = 'grandparent'"),
    Lie("a key's lifetime shortened", "key_lifetime_is_sum_of_usage", "UPDATE api_key SET lifetime_nusd = lifetime_nusd - 1 WHERE id = {key}"),
    Lie("a charged hold released", "hold_is_settled_by_its_usage", "UPDATE hold SET state = 'released' WHERE id = {settled}"),
    Lie("a released hold called settled", "hold_is_settled_by_its_usage", "UPDATE hold SET state = 'settled' WHERE id = {released}"),
    Lie("a charged hold opened again", "hold_is_settled_by_its_usage", "UPDATE hold SET state = 'open', closed_at = NULL WHERE id = {settled}"),
    Lie("a charge moved to another window", "usage_agrees_with_its_hold", "UPDATE usage SET window_start = window_start - interval '1 day' WHERE hold_id = {settled}"),
    Lie("a charge moved to another key", "usage_agrees_with_its_hold", "UPDATE usage SET key_id = (SELECT id FROM api_key WHERE account_id = {account} AND name = 'moved') WHERE hold_id = {settled}"),
    Lie("a hold that nobody expired", "no_hold_outlives_its_time", "UPDATE hold SET expires_at = now() - interval '6 minutes' WHERE id = {open}"),
    Lie("an open hold with a time of closing", "hold_is_closed_when_it_says", "UPDATE hold SET closed_at = now() WHERE id = {open}", ("hold.hold_closed_at_when_closed",)),
    Lie("a hold in a state there is not", "hold_is_closed_when_it_says", "UPDATE hold SET state = 'paused' WHERE id = {open}", ("hold.hold_state_known", "hold.hold_closed_at_when_closed")),
    Lie("negative held money", "figures_keep_their_sign", "UPDATE account SET held_nusd = -1 WHERE id = {account}", ("account.account_held_not_negative",)),
    Lie("a floor above zero", "figures_keep_their_sign", "UPDATE account SET floor_nusd = 1 WHERE id = {account}", ("account.account_floor_not_positive",)),
    Lie("a negative cost", "figures_keep_their_sign", "UPDATE usage SET cost_nusd = -1 WHERE hold_id = {settled}", ("usage.usage_cost_not_negative",)),
    Lie("a hold of less than nothing", "figures_keep_their_sign", "UPDATE hold SET amount_nusd = -1 WHERE id = {open}", ("hold.hold_amount_not_negative", "hold.hold_captured_within_amount")),
    Lie("a call without its entry", "usage_has_its_entry", "UPDATE entry SET reference = 'lost' WHERE account_id = {account} AND kind = 'usage' AND reference = {settled}::text"),
    Lie("an entry of a call that never was", "usage_entry_has_its_call", gift("usage", str(uuid.uuid4()), "revenue:usage", -100)),
    Lie("a call removed", "usage_entry_has_its_call", "DELETE FROM usage WHERE hold_id = {settled}"),
    Lie("a cost rewritten", "usage_entry_takes_the_cost", "UPDATE usage SET cost_nusd = cost_nusd - 1 WHERE hold_id = {settled}"),
    Lie("a call's balance rewritten", "usage_tells_the_balance_after_it", "UPDATE usage SET balance_after_nusd = balance_after_nusd + 1 WHERE hold_id = {settled}"),
    Lie("a call backdated", "usage_and_entry_are_one_moment", "UPDATE usage SET created_at = created_at - interval '1 day' WHERE hold_id = {settled}"),
    Lie("an entry that names another call", "usage_entry_names_its_call", "UPDATE entry SET usage_id = gen_random_uuid() WHERE account_id = {account} AND reference = {settled}::text"),
    Lie("a price line made cheaper", "lines_add_up_to_the_cost", "UPDATE usage SET lines = jsonb_set(lines, '{{lines,0,3}}', '1') WHERE account_id = {account} AND lines IS NOT NULL"),
    Lie("a line moved between the figures", "lines_add_up_to_the_cost", "UPDATE usage SET lines = jsonb_set(lines, '{{parts,0}}', '1') WHERE account_id = {account} AND lines IS NOT NULL"),
    Lie("a refund of more than it cost", "refund_is_of_a_charge", "UPDATE entry SET amount_nusd = 45001 WHERE account_id = {account} AND kind = 'refund' AND contra = 'revenue:usage'"),
    Lie("a refund from nowhere", "entry_contra_fits_its_kind", gift("refund", str(uuid.uuid4()), "refund", 5 * USD)),
    Lie("a refund from nowhere of no call", "refund_is_of_a_charge", gift("refund", "failed video", "refund", 5 * USD)),
    Lie("an adjustment for no reason", "adjustment_has_its_reason", gift("adjustment", "forged", "adjustment", 5 * USD)),
    Lie("an adjustment by an act that is not", "adjustment_has_its_reason", gift("adjustment", f"act/{uuid.uuid4()}", "adjustment", 5 * USD)),
    Lie("an adjustment by an act about another", "adjustment_has_its_reason", "UPDATE entry SET reference = (SELECT reference FROM entry WHERE kind = 'adjustment' AND amount_nusd > 0), kind = 'adjustment', contra = 'adjustment', usage_id = NULL WHERE account_id = {account} AND id = 3"),
    Lie("an adjustment of more than was decided", "adjustment_has_its_reason", "UPDATE entry SET amount_nusd = amount_nusd + 1 WHERE kind = 'adjustment'"),
    Lie("a thousand dollars lent by nobody", "floor_has_its_act", "UPDATE account SET floor_nusd = -1000000000000 WHERE id = {account}"),
    Lie("a frozen account that spends", "stopped_account_stays_stopped", "INSERT INTO admin_log (id, admin, act, subject) VALUES (gen_random_uuid(), 'ops', 'account.freeze', {account})", undo="DELETE FROM admin_log"),
    Lie("a floor that was decided otherwise", "floor_has_its_act", "INSERT INTO admin_log (id, admin, act, subject, amount_nusd) VALUES (gen_random_uuid(), 'ops', 'account.floor', {account}, -5); UPDATE account SET floor_nusd = -6 WHERE id = {account}", undo="DELETE FROM admin_log"),
    Lie("another address to pay to", "topup_shows_its_address", "UPDATE topup SET destination = 'bc1qthief' WHERE id = {open_topup}"),
    Lie("another address made known", "addresses_change_after_payments_only", "INSERT INTO topup_address VALUES ({account}, {open_topup}, 'bc1qthief'); UPDATE topup SET destination = 'bc1qthief' WHERE id = {open_topup}", undo="DELETE FROM topup_address"),
    Lie("a wallet asked to pay a thief", "attempt_pays_its_topup", "UPDATE nwc_attempt SET bolt11 = 'lnbcrt1thief' WHERE id = {open_attempt}"),
    Lie("a service that may lend", "what_binds_is_not_rewritten", "GRANT UPDATE (floor_nusd) ON account TO satmeter_runtime", undo="REVOKE UPDATE (floor_nusd) ON account FROM satmeter_runtime"),
    Lie("a service that may swap credentials", "what_binds_is_not_rewritten", "GRANT UPDATE ON credential TO satmeter_runtime", undo="REVOKE UPDATE ON credential FROM satmeter_runtime"),
    Lie("a service that may add addresses and change them", "books_are_append_only", "GRANT UPDATE (destination) ON topup_address TO satmeter_runtime", undo="REVOKE UPDATE (destination) ON topup_address FROM satmeter_runtime"),
    Lie("a refund of what was never charged", "refund_is_of_a_charge", gift("refund", str(uuid.uuid4()), "revenue:usage", 100)),
    Lie("a refund that the key was not given back", "key_lifetime_is_sum_of_usage", "UPDATE api_key SET lifetime_nusd = lifetime_nusd + 40000 WHERE id = {key}"),
    Lie("a request charged twice", "request_is_charged_once", "UPDATE usage SET request_id = 'a-settled' WHERE account_id = {account} AND request_id = 'a-charged'"),
    Lie("a top-up's credit raised", "topup_credit_is_sum_of_entries", "UPDATE topup SET credited_nusd = credited_nusd + 1 WHERE id = {topup}"),
    Lie("a top-up's credit forgotten, to be had again", "topup_credit_is_sum_of_entries", "UPDATE topup SET credited_nusd = 0 WHERE id = {topup}"),
    Lie("a bonus forgotten, to be had again", "topup_bonus_is_sum_of_entries", "UPDATE topup SET bonus_nusd = 0 WHERE id = {topup}"),
    Lie("a credit without a top-up", "topup_entry_has_its_topup", gift("topup", f"{uuid.uuid4()}/0", "btcpay:btc", 100)),
    Lie("a bonus without a top-up", "topup_entry_has_its_topup", gift("bonus", "welcome", "bonus:lightning", 100)),
    Lie("a credit for somebody else's top-up", "topup_entry_has_its_topup", "UPDATE entry SET reference = {other_topup} || '/0' WHERE account_id = {account} AND reference = {topup} || '/0' AND kind = 'topup'"),
    Lie("a top-up removed", "topup_entry_has_its_topup", "DELETE FROM topup WHERE id = {topup}"),
    Lie("a second credit of the same top-up", "topup_entries_form_a_chain", gift("topup", "REF/1", "btcpay:btc-lightning", 100).replace("'REF/1'", "{topup} || '/1'")),
    Lie("a credit from another method", "topup_entry_comes_from_its_backend", "UPDATE entry SET contra = 'btcpay:xmr' WHERE account_id = {account} AND kind = 'topup' AND reference = {topup} || '/0'"),
    Lie("a credit from a backend that is none", "entry_contra_fits_its_kind", "UPDATE entry SET contra = 'nowhere' WHERE account_id = {account} AND kind = 'topup'"),
    Lie("an adjustment of a review that never was", "review_entry_has_its_review", gift("adjustment", "review/REF/1", "adjustment", 100).replace("'review/REF/1'", "'review/' || {topup} || '/1'")),
    Lie("a bonus beyond its share", "topup_bonus_is_its_share", "UPDATE topup SET bonus_nusd = bonus_nusd + 1 WHERE id = {topup}"),
    Lie("a bonus percentage raised", "bonus_percent_is_what_the_method_gives", "UPDATE topup SET bonus_percent = 50 WHERE id = {open_topup}"),
    Lie("a payment made smaller than its credit", "credit_is_backed_by_payments", "UPDATE payment SET worth_nusd = worth_nusd / 2 WHERE topup_id = {topup}"),
    Lie("a coin's payment made smaller than its credit", "credit_is_backed_by_payments", "UPDATE payment SET worth_nusd = 1 WHERE topup_id = {coin_topup} AND late"),
    Lie("a credit without its payments", "credited_topup_has_a_settled_payment", "DELETE FROM payment WHERE topup_id = {topup}"),
    Lie("a payment that fell back", "only_settled_payments_are_worth_something", "UPDATE payment SET status = 'Invalid' WHERE topup_id = {other_topup}"),
    Lie("a payment worth more than its coins", "payment_is_worth_its_coins", "UPDATE payment SET worth_nusd = worth_nusd * 2 WHERE topup_id = {coin_topup} AND NOT late"),
    Lie("a payment's coins made fewer", "payment_is_worth_its_coins", "UPDATE payment SET value_coin_units = value_coin_units / 2 WHERE topup_id = {topup}"),
    Lie("a settled payment worth nothing", "settled_payments_are_valued", "UPDATE payment SET worth_nusd = 0 WHERE topup_id = {topup}"),
    Lie("a settled payment not credited", "settled_payments_are_credited", "UPDATE topup SET credited_nusd = credited_nusd - 1 WHERE id = {coin_topup}"),
    Lie("a settled top-up not credited", "settled_topup_is_credited", "UPDATE topup SET status = 'Settled', settled_at = now() - interval '2 hours' WHERE id = {open_topup}"),
    Lie("a payment counted for two top-ups", "payment_counts_for_one_topup", "UPDATE payment SET payment_id = (SELECT payment_id FROM payment WHERE topup_id = {topup}) WHERE topup_id = {other_topup}"),
    Lie("a payment of no top-up", "payment_has_its_topup", f"UPDATE payment SET topup_id = {GHOST} WHERE topup_id = {{topup}}"),
    Lie("an invoice nobody can look up", "invoice_of_topup_is_known", "DELETE FROM topup_invoice WHERE topup_id = {topup}"),
    Lie("an invoice handed to another customer", "invoice_of_topup_is_known", "UPDATE topup_invoice SET account_id = {account}, topup_id = {topup} WHERE topup_id = {other_topup}"),
    Lie("an invoice used by two top-ups", "invoice_of_topup_is_known", "UPDATE topup SET invoice_id = (SELECT invoice_id FROM topup WHERE id = {other_topup}) WHERE id = {topup}"),
    Lie("an invoice that leads nowhere", "known_invoice_has_its_topup", f"UPDATE topup_invoice SET topup_id = {GHOST} WHERE topup_id = {{topup}}"),
    Lie("a top-up nobody will look at", "open_topup_is_watched", "UPDATE topup SET next_check_at = NULL WHERE id = {open_topup}"),
    Lie("a webhook left lying", "webhooks_are_looked_into", "UPDATE webhook_delivery SET received_at = now() - interval '2 hours' WHERE processed_at IS NULL"),
    Lie("an attempt without its top-up", "attempt_has_its_topup", f"UPDATE nwc_attempt SET topup_id = {GHOST} WHERE id = {{attempt}}"),
    Lie("an attempt at another's top-up", "attempt_has_its_topup", "UPDATE nwc_attempt SET topup_id = {topup} WHERE id = {attempt}"),
    Lie("an attempt at another amount", "attempt_has_its_topup", "UPDATE nwc_attempt SET amount_nusd = 1 WHERE id = {attempt}"),
    Lie("two open attempts", "account_has_one_open_attempt", f"DROP INDEX nwc_attempt_one_open; INSERT INTO nwc_attempt (account_id, id, topup_id, connection_id, amount_nusd, state) SELECT account_id, {GHOST}, {GHOST}, connection_id, amount_nusd, 'created' FROM nwc_attempt WHERE id = {{open_attempt}}", undo=f"DELETE FROM nwc_attempt WHERE id = {GHOST}; CREATE UNIQUE INDEX nwc_attempt_one_open ON nwc_attempt (account_id) WHERE state IN ({states_sql(OPEN)})"),
    Lie("a settled attempt that nothing was credited for", "settled_attempt_is_credited", "UPDATE nwc_attempt SET state = 'settled', closed_at = now() WHERE id = {open_attempt}"),
    Lie("a credited attempt left open", "settled_attempt_is_credited", "UPDATE nwc_attempt SET state = 'expired' WHERE id = {attempt}; UPDATE topup t SET settled_at = now() - interval '2 hours', created_at = now() - interval '3 hours' FROM nwc_attempt n WHERE n.id = {attempt} AND t.id = n.topup_id"),
    Lie("one payment for two attempts", "payment_is_asked_for_by_one_attempt", "UPDATE nwc_attempt SET payment_hash = 'ab'", ("nwc_attempt.nwc_attempt_payment_once",)),
    Lie("a low mark of no wallet", "low_mark_is_the_threshold", "UPDATE account SET low_nusd = 5 WHERE id = {account}"),
    Lie("a threshold that no charge tells of", "low_mark_is_the_threshold", "UPDATE account SET low_nusd = NULL WHERE id = {other}"),
    Lie("a paused wallet that charges still tell of", "low_mark_is_the_threshold", "UPDATE nwc_connection SET pause = 'refusals'"),
    Lie("an attempt of an account that is not", "everything_has_its_account", f"UPDATE nwc_attempt SET account_id = {GHOST} WHERE id = {{attempt}}"),
    Lie("a hold of an account that is not", "everything_has_its_account", f"UPDATE hold SET account_id = {GHOST} WHERE id = {{released}}"),
    Lie("a credit id of an account that is not", "everything_has_its_account", f"UPDATE credential SET account_id = {GHOST} WHERE account_id = {{account}} AND kind = 'credit_id'"),
    Lie("a hold under another account's key", "everything_has_its_key", "UPDATE hold SET key_id = {key} WHERE account_id = {other} AND state = 'open'"),
    Lie("a key removed", "everything_has_its_key", "DELETE FROM api_key WHERE id = {key}"),
    Lie("a second credit id to somebody's money", "account_has_one_credit_id", "INSERT INTO credential (secret_hash, kind, account_id) VALUES ('thief', 'credit_id', {account})"),
    Lie("a second way back to somebody's money", "account_has_one_way_back", "INSERT INTO credential (secret_hash, kind, account_id, key_id) VALUES ('thief', 'recovery_code', {account}, gen_random_uuid()), ('thieves', 'recovery_code', {account}, gen_random_uuid())"),
    Lie("an account locked out", "account_has_one_credit_id", "DELETE FROM credential WHERE account_id = {account} AND kind = 'credit_id'"),
    Lie("a second secret to somebody's key", "key_has_one_secret", "INSERT INTO credential (secret_hash, kind, account_id, key_id) VALUES ('thief', 'api_key', {account}, {key})"),
    Lie("a key without a secret", "key_has_one_secret", "DELETE FROM credential WHERE key_id = {key}"),
    Lie("a secret to a key that is not", "secret_opens_what_it_says", f"INSERT INTO credential (secret_hash, kind, account_id, key_id) VALUES ('thief', 'api_key', {{account}}, {GHOST})"),
    Lie("a secret that pays from another account", "secret_opens_what_it_says", "UPDATE credential SET account_id = {other} WHERE key_id = {key}"),
    Lie("a window that begins tomorrow", "nothing_is_from_the_future", "UPDATE api_key SET window_start = now() + interval '1 day' WHERE id = {key}"),
    Lie("an entry from the future", "nothing_is_from_the_future", "UPDATE entry SET created_at = now() + interval '1 hour' WHERE account_id = {account} AND id = 1"),
    Lie("a hold closed before it was made", "nothing_ends_before_it_began", "UPDATE hold SET closed_at = created_at - interval '1 hour' WHERE id = {released}"),
    Lie("a day's sum raised", "days_are_the_sum_of_their_calls", f"UPDATE usage_day SET cost_nusd = cost_nusd + 1 WHERE {_RECENT}", is_of_the_past=True),
    Lie("a day's tokens rewritten", "days_are_the_sum_of_their_calls", f"UPDATE usage_day SET input_tokens = 5 WHERE {_RECENT}", is_of_the_past=True),
    Lie("a day's refund that never was", "days_are_the_sum_of_their_calls", f"UPDATE usage_day SET refunded_nusd = 1 WHERE {_RECENT}", is_of_the_past=True),
    Lie("a notice of a top-up that never was", "told_topup_was_credited", "INSERT INTO notice (account_id, id, channel, type, data, next_at) VALUES ({account}, gen_random_uuid(), 'webhook', 'topup.settled', jsonb_build_object('topup_id', gen_random_uuid()), now())", undo="DELETE FROM notice"),
    Lie("a notice that nobody sends", "notices_do_not_wait", "INSERT INTO notice (account_id, id, channel, type, data, next_at) VALUES ({account}, gen_random_uuid(), 'webhook', 'balance.low', '{{}}', now() - interval '3 days')", undo="DELETE FROM notice"),
    Lie("a mark where nobody is told", "notice_mark_is_one_of_its_marks", "UPDATE account SET notice_mark_nusd = 1 WHERE id = {account}"),
    Lie("a mark of one's own", "notice_mark_is_one_of_its_marks", "INSERT INTO notice_address (account_id, id) VALUES ({account}, gen_random_uuid()); UPDATE account SET notice_mark_nusd = 7 WHERE id = {account}", undo="DELETE FROM notice_address"),
    Lie("a day forgotten", "days_are_the_sum_of_their_calls", f"DELETE FROM usage_day WHERE {_RECENT}", is_of_the_past=True),
    Lie("a day's calls under another model", "days_are_the_sum_of_their_calls", f"UPDATE usage_day SET model = 'free' WHERE {_RECENT}", is_of_the_past=True),
    Lie("a call removed from a summed day", "days_are_the_sum_of_their_calls", "DELETE FROM usage", is_of_the_past=True),
    Lie("a day told before it is over", "days_are_the_sum_of_their_calls", "INSERT INTO usage_day VALUES ({account}, now()::date, {key}, 'm', 1, 1, 1, 1, 0)"),
    Lie("a dropped month made cheaper", "dropped_calls_are_in_their_entries", "UPDATE usage_dropped SET cost_nusd = cost_nusd - 1 WHERE account_id = {account} AND cost_nusd > 0", is_of_the_past=True),
    Lie("what is kept of a dropped month removed", "dropped_calls_are_in_their_entries", "DELETE FROM usage_dropped WHERE account_id = {other}", is_of_the_past=True),
    Lie("a month called dropped to hide a call", "dropped_calls_are_in_their_entries", f"DELETE FROM usage; INSERT INTO usage_archive (month, calls, cost_nusd, sha256, dropped_at, fingerprint) SELECT date_trunc('month', day), 1, 1, '', now(), '0' FROM usage_day WHERE {_RECENT}", is_of_the_past=True),
    Lie("entries called put away", "put_away_entries_are_those_of_their_archive", "INSERT INTO entry_closing (account_id, first_id, last_id, month, amount_nusd, balance_after_nusd, digest, mac) VALUES ({account}, 900, 901, '2001-01-01', 0, 0, '', '')"),
    Lie("a dropped month that was none", "usage_entry_has_its_call", "UPDATE usage_archive SET dropped_at = NULL, fingerprint = NULL", is_of_the_past=True),
    Lie("a dropped month's calls given to another key", "key_lifetime_is_sum_of_usage", "UPDATE usage_dropped SET key_id = (SELECT id FROM api_key WHERE account_id = {account} AND name = 'moved') WHERE key_id = {key}", is_of_the_past=True),
    Lie("a dropped month's refund forgotten", "key_lifetime_is_sum_of_usage", "UPDATE usage_dropped SET refunded_nusd = 0 WHERE key_id = {key}", is_of_the_past=True),
    Lie("a dropped month's window moved", "key_window_is_sum_of_its_usage", "UPDATE usage_dropped SET window_start = window_start - interval '1 day' WHERE key_id = {key}", is_of_the_past=True),
    Lie("a dropped day rewritten", "days_of_dropped_months_stay", f"UPDATE usage_day SET model = 'free' WHERE model = '' AND NOT {_RECENT}", is_of_the_past=True),
    Lie("a dropped day forgotten", "days_of_dropped_months_stay", f"DELETE FROM usage_day WHERE NOT {_RECENT}", is_of_the_past=True),
    Lie("a service that may rewrite what is kept", "books_are_append_only", "GRANT UPDATE ON usage_dropped TO satmeter_runtime", undo="REVOKE UPDATE ON usage_dropped FROM satmeter_runtime"),
    Lie("a lock taken off the entries", "constraints_are_in_force", "SELECT 1", ("entry.entry_once",)),
    Lie("a lock taken off the charges", "constraints_are_in_force", "SELECT 1", ("entry.entry_of_usage_has_its_call",)),
    Lie("top-ups that need no account", "constraints_are_in_force", "SELECT 1", ("topup.topup_account_id_fkey",)),
    Lie("a service that may rewrite entries", "books_are_append_only", "GRANT UPDATE ON entry TO satmeter_runtime", undo="REVOKE UPDATE ON entry FROM satmeter_runtime"),
    Lie("a service that may rewrite one column", "books_are_append_only", "GRANT UPDATE (cost_nusd) ON usage TO satmeter_runtime", undo="REVOKE UPDATE (cost_nusd) ON usage FROM satmeter_runtime"),
    Lie("a service that may do anything", "books_are_append_only", "ALTER ROLE satmeter_runtime SUPERUSER", undo="ALTER ROLE satmeter_runtime NOSUPERUSER"),
    Lie("a rule that swallows entries", "nothing_stands_between_us_and_the_books", "CREATE RULE thief AS ON DELETE TO entry DO INSTEAD NOTHING", undo="DROP RULE thief ON entry"),
    Lie("foreign keys switched off", "nothing_stands_between_us_and_the_books", "ALTER TABLE topup DISABLE TRIGGER ALL", undo="ALTER TABLE topup ENABLE TRIGGER ALL"),
    Lie("entries hidden from the auditor", "nothing_stands_between_us_and_the_books", "ALTER TABLE entry ENABLE ROW LEVEL SECURITY", undo="ALTER TABLE entry DISABLE ROW LEVEL SECURITY"),
)  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.label.replace(" ", "_"))
async def test_a_planted_lie_is_found_by_its_check(
    books: Books, owner_conn: Owner, lie: Lie, clean: str, tmp_path: Path
) -> None:
    if lie.is_of_the_past:
        await grown_old(books, owner_conn, clean, tmp_path)
    with planted(owner_conn, lie, books):
        report = await audit(books.house.db)
    assert lie.check in {finding.check for finding in report.findings}
    assert all(finding.recorded != finding.recomputed for finding in report.findings)


def test_every_check_has_a_lie_that_it_finds() -> None:
    """Those of offers have theirs where offers are made: tests/offers/test_opening.py."""
    assert {lie.check for lie in LIES} | {check.name for check in OFFERS} == {check.name for check in CHECKS}
    assert len({check.name for check in CHECKS}) == len(CHECKS)


SWAP = """
    WITH two AS (SELECT account_id, min(secret_hash) AS secret_hash FROM credential WHERE kind = '{kind}' GROUP BY 1),
         old AS (DELETE FROM credential c USING two WHERE c.secret_hash = two.secret_hash RETURNING c.*)
    INSERT INTO credential (secret_hash, kind, account_id, key_id, proof, created_at) SELECT o.secret_hash, o.kind, n.account_id, n.key_id, o.proof, o.created_at
    FROM old o JOIN old n ON n.account_id <> o.account_id"""
"""With no more than the service's own rights; nothing in the database tells it from the truth."""

PROVED_LIES = (
    Lie("a closing of nobody's", "closing_is_ours", "INSERT INTO entry_closing (account_id, first_id, last_id, month, amount_nusd, balance_after_nusd, digest, mac) VALUES ({account}, 900, 901, '2001-01-01', 0, 0, '', '')"),
    Lie("a kept key moved to another key", "kept_key_opens", "UPDATE api_key SET sealed_secret = (SELECT sealed_secret FROM api_key WHERE id = {key}) WHERE account_id = {other}"),
    Lie("a kept key moved to another account", "kept_key_opens", "UPDATE api_key SET account_id = {other}, name = 'mine' WHERE id = {key}"),
    Lie("a kept key altered", "kept_key_opens", "UPDATE api_key SET sealed_secret = overlay(sealed_secret placing 'dead' from 40) WHERE id = {key}"),
    Lie("a wallet's secret under a key that is gone", "wallet_secret_opens", "UPDATE nwc_connection SET sealed_secret = replace(sealed_secret, '.', '0.')"),
    Lie("notices sent elsewhere", "notice_address_opens", "INSERT INTO notice_address (account_id, id, sealed_url, url_shown, sealed_secret) VALUES ({account}, gen_random_uuid(), 'dev1.00', 'https://thief.example.com', 'dev1.00')", undo="DELETE FROM notice_address"),
    Lie("a rotation that never was", "credential_event_is_ours", "INSERT INTO credential_event (account_id, id, act, shown_by, proof) VALUES ({account}, gen_random_uuid(), 'rotated', 'credit_id', 'x')", undo="DELETE FROM credential_event"),
    Lie("two accounts' credit ids swapped", "credential_is_bound", SWAP.format(kind="credit_id")),
    Lie("two accounts' keys swapped", "credential_is_bound", SWAP.format(kind="api_key")),
    Lie("a credential that nothing binds", "credential_is_bound", "UPDATE credential SET proof = NULL WHERE account_id = {account}"),
    Lie("an act in an operator's name", "act_is_an_operator_s", "INSERT INTO admin_log (id, admin, act, subject, reason, amount_nusd) VALUES (gen_random_uuid(), 'ops', 'account.adjust', {account}, 'forged', 5)", undo="DELETE FROM admin_log"),
    Lie("an act about more than it was", "act_is_an_operator_s", "UPDATE admin_log SET amount_nusd = 5000000000", undo="DELETE FROM admin_log"),
    Lie("a review that no operator decided", "review_has_its_act", "UPDATE topup SET reviewed = 'x' WHERE id = {topup}; UPDATE entry SET kind = 'adjustment', contra = 'adjustment', usage_id = NULL, reference = 'review/' || {topup} || '/x' WHERE account_id = {account} AND id = 3"),
    Lie("a wallet moved to another account", "wallet_secret_opens", "UPDATE nwc_connection SET account_id = {account}"),
)  # fmt: skip
"""What only the secrets that are kept outside the database can tell."""


@pytest.mark.parametrize("lie", PROVED_LIES, ids=lambda lie: lie.label.replace(" ", "_"))
async def test_a_lie_that_the_database_believes_is_found_with_the_secrets(
    books: Books, owner_conn: Owner, lie: Lie
) -> None:
    with planted(owner_conn, lie, books):
        report = await audit(books.house.db, Secrets.of(books.house.settings))
        assert lie.check not in {finding.check for finding in (await audit(books.house.db)).findings}
    assert lie.check in {finding.check for finding in report.findings}


def test_every_proof_has_a_lie_that_it_finds() -> None:
    assert {lie.check for lie in PROVED_LIES} | {proof.name for proof in ALIASES} == {proof.name for proof in PROOFS}
    assert not {proof.name for proof in PROOFS} & {check.name for check in CHECKS}


@contextmanager
def planted(conn: Owner, lie: Lie, books: Books) -> Iterator[None]:
    """The lie stands inside the block; after it the schema is as before, and the rows are gone."""
    restores = [_drop(conn, *constraint.split(".")) for constraint in lie.without]
    try:
        conn.execute("SET session_replication_role = replica")
        conn.execute(books.fill(lie.sql))
        yield
    finally:
        conn.execute("SET session_replication_role = origin")
        if lie.undo:
            conn.execute(lie.undo)
        if restores:
            conn.execute(EMPTY)
        for restore in reversed(restores):
            conn.execute(restore)


def _drop(conn: Owner, table: str, name: str) -> str:
    """Drop a constraint; returns what brings it back."""
    found = conn.execute(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s::regclass AND conname = %s",
        (table, name),
    ).fetchone()
    assert found is not None
    conn.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    return f"ALTER TABLE {table} ADD CONSTRAINT {name} {found[0]}"


@pytest.mark.parametrize(
    ("table", "which"), [("entry", "true"), ("usage", "true"), ("hold", "state = 'open'"), ("payment", "true")]
)
async def test_no_row_can_be_removed_unseen(books: Books, owner_conn: Owner, table: str, which: str) -> None:
    """Each in turn. Of holds the open ones: a closed one moves no money, and a settle needs no hold to be there."""
    owner_conn.execute("SET session_replication_role = replica")
    found = owner_conn.execute(f"SELECT ctid::text FROM {table} WHERE {which}").fetchall()
    assert len(found) >= 2
    for (place,) in found:
        with owner_conn.transaction():
            owner_conn.execute(f"CREATE TEMP TABLE gone AS SELECT * FROM {table} WHERE ctid = '{place}'")
            owner_conn.execute(f"DELETE FROM {table} WHERE ctid = '{place}'")
        assert not (await audit(books.house.db)).is_clean
        with owner_conn.transaction():
            owner_conn.execute(f"INSERT INTO {table} SELECT * FROM gone")
            owner_conn.execute("DROP TABLE gone")
    assert (await audit(books.house.db)).is_clean


# What a report says.


async def test_a_finding_tells_both_numbers_in_dollars(books: Books, owner_conn: Owner) -> None:
    owner_conn.execute("UPDATE account SET held_nusd = held_nusd + 1500000000 WHERE id = %s", [books.account])
    (finding,) = (await audit(books.house.db)).findings
    assert (finding.check, finding.subject) == ("account_held_is_sum_of_open_holds", str(books.account))
    # A call of `spend` is open, and one of each of the three keys of `spend_below`.
    held = Decimal(USD // 100 + 3 * 1000) / USD
    assert (finding.recorded, finding.recomputed) == (f"{held + Decimal('1.5')}", f"{held}")


async def test_a_flood_of_differences_is_cut_short_and_counted(house: House, owner_conn: Owner) -> None:
    count = FINDINGS_PER_CHECK + 7
    owner_conn.execute(
        "INSERT INTO account (id, entry_count) SELECT gen_random_uuid(), 1 FROM generate_series(1, %s)", [count]
    )
    found = [finding for finding in (await audit(house.db)).findings if finding.check == "entries_are_counted"]
    assert len(found) == FINDINGS_PER_CHECK + 1
    assert (found[-1].subject, found[-1].recorded) == ("differences in all", str(count))


async def test_an_audit_can_write_nothing(house: House) -> None:
    """Whatever a check's text says: its transaction is read-only. Here it is asked to open one more account."""

    class WritesAfterwards:
        async def transaction(self, work: Callable[[AsyncSession], Awaitable[Report]]) -> Report:
            async def both(session: AsyncSession) -> Report:
                report = await work(session)
                await row(session, "INSERT INTO account (id) VALUES (gen_random_uuid())")
                return report

            return await house.db.transaction(both)

    with pytest.raises(DatabaseUnavailable) as refused:
        await audit(cast("Database", WritesAfterwards()))
    assert "read-only transaction" in str(refused.value.__cause__)
    assert await house.db.many("SELECT id FROM account", {}) == []
