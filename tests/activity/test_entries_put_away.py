"""Entries of calls long dropped are exported and deleted: what is left adds up, every lie about them is found, no call is charged again."""

import asyncio
import contextlib
import csv
import gzip
import json
import signal
import subprocess
import sys
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.activity.calendar import Span, midnight
from app.audit import Finding, Secrets, audit
from app.audit.continuous import look_at_new, walk
from app.audit.putting_away import LEAST_AGE, drop, export
from app.audit.sealing import seal
from app.kernel.errors import HoldNotFound, InvalidField, NotFound
from app.ledger.charge import ChargeId
from app.ledger.statement import statement
from app.metering.retention import forget_closed_holds
from app.metering.ticket import SETTLED_WITHIN, HoldTicket
from tests.activity.conftest import Past, month_of
from tests.rig import Customer
from tests.seals_of_before import sealing_as_before

OLD = 500


@dataclass
class Life:
    """Two customers of long ago, whose month of calls was dropped: entries 1 to 7 of the first are a top-up, two calls, one that
    was refunded, two more, the refund."""

    past: Past
    customer: Customer
    other: Customer
    hold_id: str
    month: date

    @property
    def span(self) -> Span:
        return Span(self.month)

    async def export(self) -> Path:
        path = self.past.folder / f"entries-{uuid.uuid4().hex[:6]}.csv.gz"
        await export(self.past.owner, self.span, path)
        return path

    async def drop(self) -> int:
        return (await drop(self.past.owner, self.past.rig.house.settings.pepper, self.span, datetime.now(UTC))).entries

    async def findings(self) -> tuple[Finding, ...]:
        house = self.past.rig.house
        return (await audit(house.db, Secrets.of(house.settings))).findings

    def count(self) -> list[tuple[Any, ...]]:
        return self.past.rig.sql("SELECT kind, count(*) FROM entry GROUP BY 1 ORDER BY 1")


@pytest.fixture
async def life(past: Past, request: pytest.FixtureRequest) -> Life:
    """With the parameter `before`, sealed as before 0009."""
    rig = past.rig
    customer, other = await rig.customer("10"), await rig.customer("10")
    held = await rig.authorize(customer.api_key, "1", request_id="held")
    await rig.settle(held["hold_id"], "0.125")
    await past.charge(customer, "0.01", request_id="charged")
    made = await past.charge(customer, "0.5", request_id="refunded")
    await past.charge(customer, "0.02")
    await past.charge(customer, "0.03")
    await rig.meter("refund", charge_id=made["charge_id"], amount_usd="0.2")
    await past.charge(other, "0.04")
    await past.back(OLD)
    await past.charge(customer, "0.001", request_id="today")
    await past.roll_up()
    await past.drop(month_of(OLD))
    await forget_closed_holds(rig.house.db)
    with sealing_as_before() if getattr(request, "param", "") == "before" else contextlib.nullcontext():
        await seal(rig.house.db, rig.house.settings.pepper)
    return Life(past, customer, other, held["hold_id"], month_of(OLD))


@pytest.mark.parametrize("life", ["now", "before"], indirect=True)
async def test_what_is_left_adds_up_and_is_answered_as_before(life: Life) -> None:
    rig = life.past.rig
    balances = [await rig.balance(each) for each in (life.customer, life.other)]
    activity = await life.past.ask("/activity", life.customer)
    assert await life.findings() == ()

    path = await life.export()
    assert await life.findings() == ()
    assert await life.drop() == 5

    assert life.count() == [("adjustment", 2), ("refund", 1), ("usage", 2)] or life.count() == [
        ("refund", 1),
        ("topup", 2),
        ("usage", 2),
    ]
    assert rig.sql("SELECT first_id, last_id, amount_nusd FROM entry_closing ORDER BY account_id = %s DESC, first_id", account_of(life)) == [
        (2, 3, -135_000_000), (5, 6, -50_000_000), (2, 2, -40_000_000),
    ]  # fmt: skip
    assert await life.findings() == ()
    assert [await rig.balance(each) for each in (life.customer, life.other)] == balances
    assert await life.past.ask("/activity", life.customer) == activity
    await life.past.charge(life.customer, "0.002")
    await seal(rig.house.db, rig.house.settings.pepper, whole=True)
    assert await life.findings() == ()
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert sorted(int(line["amount_nusd"]) for line in lines) == [
        -125_000_000,
        -40_000_000,
        -30_000_000,
        -20_000_000,
        -10_000_000,
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def account_of(life: Life) -> uuid.UUID:
    [(account_id,)] = life.past.rig.sql("SELECT account_id FROM entry WHERE kind = 'refund'")
    return uuid.UUID(str(account_id))


async def test_the_continuous_audit_adds_up_too(life: Life) -> None:
    db = life.past.rig.house.db
    await life.export()
    await life.drop()
    await look_at_new(db)
    while await walk(db, 1):
        pass
    assert life.past.rig.sql("SELECT * FROM audit_finding") == []
    life.past.conn.execute("UPDATE entry_closing SET amount_nusd = amount_nusd - 1 WHERE first_id = 5")
    while await walk(db, 1):
        pass
    assert {account for (account,) in life.past.rig.sql("SELECT account_id FROM audit_finding")} == {account_of(life)}
    life.past.conn.execute("UPDATE entry_closing SET amount_nusd = amount_nusd + 1 WHERE first_id = 5")


async def test_the_statement_has_a_line_for_what_was_put_away(life: Life) -> None:
    db, account_id = life.past.rig.house.db, account_of(life)
    await life.export()
    await life.drop()
    lines = await db.transaction(lambda session: statement(session, account_id))
    assert [(line["id"], line["reference"]) for line in lines if line["reference"].startswith("put away")] \
        == [(6, "put away/5-6"), (3, "put away/2-3")]  # fmt: skip
    balance = 0
    for line in reversed(lines):
        balance += line["amount_nusd"]
        assert line["balance_after_nusd"] == balance

    async def page(before_id: int | None) -> list[int]:
        found = await db.transaction(lambda session: statement(session, account_id, limit=2, before_id=before_id))
        return [line["id"] for line in found]

    pages = await page(None)
    while some := await page(pages[-1]):
        pages += some
    assert pages == [line["id"] for line in lines] == [8, 7, 6, 4, 3, 1]


LIES = {
    "a sum made smaller": ("UPDATE entry_closing SET amount_nusd = amount_nusd + 1 WHERE first_id = 5", {"closing_is_ours", "balance_is_sum_of_entries"}),
    "a sum made smaller, and all that follows it": (
        """UPDATE entry_closing SET amount_nusd = amount_nusd + 1, balance_after_nusd = balance_after_nusd + 1 WHERE first_id = 5;
           UPDATE entry SET balance_after_nusd = balance_after_nusd + 1 WHERE id > 6; UPDATE account SET posted_nusd = posted_nusd + 1 WHERE entry_count > 3""",
        {"closing_is_ours", "entries_are_as_sealed", "dropped_calls_are_in_their_entries"},
    ),
    "a balance that is not carried": ("UPDATE entry_closing SET balance_after_nusd = balance_after_nusd + 1 WHERE first_id = 5", {"closing_is_ours", "balance_after_is_running_sum"}),
    "a closing taken away": ("DELETE FROM entry_closing WHERE first_id = 5", {"entry_ids_have_no_gap", "entries_are_as_sealed", "put_away_entries_are_those_of_their_archive"}),
    "a closing of another account's": ("UPDATE entry_closing SET account_id = (SELECT id FROM account WHERE entry_count = 2) WHERE first_id = 5", {"closing_is_ours"}),
    "another digest": ("UPDATE entry_closing SET digest = sha256('x') WHERE first_id = 5", {"closing_is_ours"}),
    "another month": ("UPDATE entry_closing SET month = month + 31 WHERE first_id = 5", {"closing_is_ours", "put_away_entries_are_those_of_their_archive"}),
    "an entry put back": (
        """INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd, usage_id, created_at)
           SELECT account_id, 5, 'usage', gen_random_uuid()::text, 'revenue:usage', 0, balance_after_nusd, gen_random_uuid(), created_at
           FROM entry WHERE id = 4""",
        {"entry_ids_have_no_gap", "entries_are_as_sealed"},
    ),
    "an entry that should be there gone": ("DELETE FROM entry WHERE kind = 'refund'", {"entry_ids_have_no_gap", "entries_are_as_sealed"}),
    "an entry called put away": (
        """INSERT INTO entry_closing SELECT account_id, id, id, c.month, amount_nusd, balance_after_nusd, created_at, sha256('x'), '\\x00'
           FROM entry, (SELECT month FROM entry_closing LIMIT 1) c WHERE kind = 'refund'; DELETE FROM entry WHERE kind = 'refund'""",
        {"closing_is_ours", "put_away_entries_are_those_of_their_archive"},
    ),
    "a closing made wider": ("DELETE FROM entry WHERE kind = 'refund'; UPDATE entry_closing SET last_id = 7 WHERE first_id = 5", {"closing_is_ours"}),
    "an archive that was not put away": ("UPDATE usage_archive SET entries_dropped_at = NULL", {"put_away_entries_are_those_of_their_archive"}),
    "fewer entries in the archive": ("UPDATE usage_archive SET entries = entries - 1", {"put_away_entries_are_those_of_their_archive"}),
    "a link in the middle of what was put away": ("UPDATE seal SET links = set_byte(links, 70, get_byte(links, 70) # 1) WHERE chain = 'entries' AND count > 5", {"runs_form_a_chain"}),
    "the seals taken away with a closing's": ("DELETE FROM seal WHERE chain = 'entries'", {"runs_form_a_chain", "nothing_old_is_unsealed"}),
    "an account without its entries": (
        "DELETE FROM entry WHERE account_id = (SELECT id FROM account WHERE entry_count = 2); DELETE FROM entry_closing WHERE account_id = (SELECT id FROM account WHERE entry_count = 2);"
        " UPDATE account SET posted_nusd = 0, entry_count = 0 WHERE entry_count = 2", {"entries_are_as_sealed"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("life", ["now", "before"], indirect=True)
async def test_every_lie_about_what_was_put_away_is_found(life: Life) -> None:
    """One after the other, each undone."""
    await life.export()
    await life.drop()
    assert await life.findings() == ()
    tables = ("entry", "entry_closing", "usage_archive", "account", "seal")
    for table in tables:
        life.past.conn.execute(f"CREATE TEMP TABLE was_{table} AS TABLE {table}".encode())
    for what, (lie, checks) in LIES.items():
        life.past.conn.execute(lie.encode())
        found = {each.check for each in await life.findings()}
        assert checks <= found, (what, found)
        with life.past.conn.transaction():
            life.past.conn.execute("SET LOCAL session_replication_role = replica")  # the accounts are put back, too
            for table in tables:
                life.past.conn.execute(f"DELETE FROM {table}".encode())
                life.past.conn.execute(f"INSERT INTO {table} TABLE was_{table}".encode())
    assert await life.findings() == ()


@pytest.mark.parametrize("life", ["now", "before"], indirect=True)
async def test_only_old_sealed_exported_entries_of_dropped_calls_go_and_once(life: Life) -> None:
    past, pepper = life.past, life.past.rig.house.settings.pepper
    before = life.count()
    with pytest.raises(InvalidField, match="not exported"):
        await life.drop()
    with pytest.raises(InvalidField, match="were not dropped"):
        await export(
            past.owner,
            Span(month_of(0)),
            past.folder / "this",
        )
    with pytest.raises(InvalidField, match="were not dropped"):
        await export(past.owner, Span(life.month, is_day=True), past.folder / "day")
    path = await life.export()
    with pytest.raises(InvalidField, match="cannot be written"):
        await export(past.owner, life.span, path)
    with pytest.raises(InvalidField, match="400 days"):
        await drop(past.owner, pepper, life.span, midnight(life.span.end) + LEAST_AGE - timedelta(seconds=1))
    past.conn.execute(
        "UPDATE entry SET amount_nusd = amount_nusd - 1, balance_after_nusd = balance_after_nusd - 1 WHERE id = 5"
    )
    with pytest.raises(InvalidField, match="not as it was sealed"):
        await life.drop()
    past.conn.execute(
        "UPDATE entry SET amount_nusd = amount_nusd + 1, balance_after_nusd = balance_after_nusd + 1 WHERE id = 5"
    )
    past.conn.execute("CREATE TEMP TABLE was AS TABLE seal; DELETE FROM seal WHERE chain = 'entries'")
    with pytest.raises(InvalidField, match="not sealed yet"):
        await life.drop()
    past.conn.execute("INSERT INTO seal SELECT * FROM was WHERE chain = 'entries'")
    past.conn.execute("CREATE TEMP TABLE held AS SELECT * FROM entry WHERE id = 5; DELETE FROM entry WHERE id = 5")
    with pytest.raises(InvalidField, match="not those that were exported"):
        await life.drop()
    past.conn.execute("INSERT INTO entry TABLE held")
    assert life.count() == before
    assert past.rig.sql("SELECT count(*) FROM entry_closing") == [(0,)]
    assert await life.drop() == 5
    for again in (life.drop, life.export):
        with pytest.raises(InvalidField, match="dropped before"):
            await again()
    assert await life.findings() == ()


async def test_two_drops_at_once_are_one(life: Life) -> None:
    await life.export()
    ends = await asyncio.gather(*(life.drop() for _ in range(2)), return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["InvalidField", "int"]
    assert await life.findings() == ()


async def test_entries_of_an_open_question_stay(life: Life) -> None:
    """One whose hold is still there, and one whose call came when its month was dropped, and is refunded while the others go."""
    past, rig = life.past, life.past.rig
    late = await past.charge(life.customer, "0.07", request_id="late")
    past.rig.sql(
        """UPDATE usage SET id = (substr((SELECT usage_id::text FROM entry WHERE id = 2 AND kind = 'usage' LIMIT 1), 1, 18) || substr(id::text, 19))::uuid
           WHERE request_id = 'late'"""
    )
    past.rig.sql("UPDATE entry e SET usage_id = u.id FROM usage u WHERE e.reference = u.hold_id::text")
    await seal(rig.house.db, rig.house.settings.pepper)
    [(account_id, call_id)] = rig.sql("SELECT account_id, id FROM usage WHERE request_id = 'late'")
    rig.sql(
        """INSERT INTO hold (account_id, id, service, request_id, request_hash, key_id, amount_nusd, state, closed_at)
           SELECT account_id, reference::uuid, 'proxy', 'held', '', (SELECT key_id FROM usage LIMIT 1), 1, 'settled', now() FROM entry WHERE id = 2 AND account_id = %s""",
        account_id,
    )  # fmt: skip
    await life.export()
    refunding = asyncio.create_task(rig.meter("refund", charge_id=str(ChargeId(account_id, call_id))))
    assert await life.drop() == 4
    assert (await refunding).status_code == 200
    assert late["cost"]["total_cost_usd"] > 0
    assert rig.sql("SELECT id FROM entry WHERE account_id = %s ORDER BY 1", account_id) == [
        (1,),
        (2,),
        (4,),
        (7,),
        (8,),
        (9,),
        (10,),
    ]
    rig.sql("DELETE FROM hold WHERE request_id = 'held'")
    assert await life.findings() == ()


async def test_no_ticket_old_enough_to_settle_again_is_taken(life: Life) -> None:
    pepper, now = life.past.rig.house.settings.pepper, datetime.now(UTC)
    assert SETTLED_WITHIN < LEAST_AGE
    ticket = HoldTicket(uuid.uuid4(), uuid.uuid4(), uuid.uuid4(), "r", None, now, 1)
    text = ticket.sealed(pepper, "proxy")
    assert HoldTicket.opened(text, pepper, "proxy", now + SETTLED_WITHIN) == ticket
    with pytest.raises(HoldNotFound, match="more than 365 days"):
        HoldTicket.opened(text, pepper, "proxy", now + SETTLED_WITHIN + timedelta(seconds=1))


async def test_a_settle_of_long_ago_is_refused_and_charges_nothing_when_its_entry_is_gone(life: Life) -> None:
    rig = life.past.rig
    await life.export()
    await life.drop()
    ticket = HoldTicket.opened(life.hold_id, rig.house.settings.pepper, "proxy")
    old = HoldTicket(ticket.account_id, ticket.key_id, ticket.hold_id, ticket.request_id, ticket.window_start, ticket.made_at - timedelta(days=OLD), ticket.amount_nusd)  # fmt: skip
    balance = await rig.balance(life.customer)
    for verb, more in (("settle", {"cost_usd": "0.125"}), ("release", {}), ("extend", {"ttl_seconds": 60})):
        answer = await rig.meter(verb, hold_id=old.sealed(rig.house.settings.pepper, "proxy"), **more)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "hold_not_found"), verb
    batch = await rig.meter(
        "settle/batch", settles=[{"hold_id": old.sealed(rig.house.settings.pepper, "proxy"), "cost_usd": "0.125"}]
    )
    assert "hold_not_found" in batch.text
    assert await rig.balance(life.customer) == balance


async def test_the_service_s_own_role_may_put_nothing_away(life: Life) -> None:
    await life.export()
    with pytest.raises(Exception, match="permission denied"):
        await drop(life.past.rig.house.db, life.past.rig.house.settings.pepper, life.span, datetime.now(UTC))
    assert life.past.rig.sql("SELECT count(*) FROM entry_closing") == [(0,)]


async def test_a_month_without_entries_is_told(life: Life) -> None:
    life.past.rig.sql(
        "INSERT INTO usage_archive (month, calls, cost_nusd, sha256, dropped_at, fingerprint) VALUES ('2001-01-01', 0, 0, '', now(), '0')"
    )
    with pytest.raises(NotFound, match="no entries"):
        await export(life.past.owner, Span(date(2001, 1, 1)), life.past.folder / "none")
    assert not (life.past.folder / "none").exists()
    life.past.rig.sql("DELETE FROM usage_archive WHERE month = '2001-01-01'")


@pytest.mark.slow
async def test_the_commands_do_it_and_one_that_is_killed_has_done_nothing(life: Life, tmp_path: Path) -> None:
    past, month = life.past, f"{life.month:%Y-%m}"
    environ = {
        "DATABASE_URL": past.rig.database_url, "DATA_DIR": str(tmp_path / "data"), "PATH": "/usr/bin:/bin",
        "SECRET_PEPPER": past.rig.house.settings.secret_pepper,
    }  # fmt: skip

    def started(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "app", "entries", *words, "--month", month, "--json"]
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    exported, _ = started("export", "--out", str(tmp_path / "entries.csv.gz")).communicate(timeout=60)
    assert json.loads(exported) | {"sha256": ""} == {"month": month, "entries": 5, "amount_usd": "-0.225", "sha256": ""}
    before = life.count()
    with past.conn.transaction():  # whoever deletes entries waits for this one
        past.conn.execute("SELECT FROM entry WHERE id = 5 FOR UPDATE")
        killed = started("drop")
        while not past.rig.sql("SELECT 1 FROM pg_locks WHERE NOT granted"):
            assert killed.poll() is None
            await asyncio.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
    while past.rig.sql(
        "SELECT 1 FROM pg_stat_activity WHERE query ILIKE 'DELETE FROM entry%%' AND state <> 'idle' AND pid <> pg_backend_pid()"
    ):
        await asyncio.sleep(0.05)
    assert (life.count(), await life.findings()) == (before, ())
    dropped, _ = started("drop").communicate(timeout=60)
    assert json.loads(dropped)["entries"] == 5
    assert await life.findings() == ()
    again = started("drop")
    _, says = again.communicate(timeout=60)
    assert again.returncode == 2
    assert "dropped before" in says
