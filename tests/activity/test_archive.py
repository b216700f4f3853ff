"""A month of calls is exported and dropped: what is left still adds up, is still audited, and still answers."""

import asyncio
import csv
import gzip
import json
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.archive import drop, export, months
from app.activity.rollup import rebuild
from app.audit import audit
from app.kernel.errors import InvalidField, NotFound
from app.ledger.charge import ChargeId
from app.metering.refund import _refund
from tests.activity.conftest import Past, month_of
from tests.rig import Customer

D = Decimal
OLD = 100


async def lived(past: Past) -> tuple[Customer, str]:
    """A customer with calls and a refund of OLD days ago, and one call of today; and a hold that was settled then."""
    customer = await past.rig.customer("10")
    daily = await past.rig.new_key(customer, usage_limit_usd=5, reset_period="daily")
    held = await past.rig.authorize(customer.api_key, "1", request_id="held")
    await past.rig.settle(held["hold_id"], "0.125", usage={"input_tokens": 5})
    await past.charge(customer, "0.01", daily["api_key"], model="a", request_id="charged", usage={"input_tokens": 7})
    made = await past.charge(customer, "0.5", model="b", request_id="refunded")
    await past.rig.meter("refund", charge_id=made["charge_id"], amount_usd="0.2")
    await past.back(OLD)
    await past.charge(customer, "0.001", model="a", request_id="today")
    await past.roll_up()
    return customer, held["hold_id"]


async def test_after_a_drop_everything_but_the_calls_is_as_before(past: Past) -> None:
    customer, hold_id = await lived(past)
    activity, balance = await past.ask("/activity", customer), await past.rig.balance(customer)
    keys, credits = await past.ask("/keys", customer), await past.ask("/api/v1/credits", customer)
    account = past.rig.sql("SELECT id, posted_nusd, held_nusd, entry_count FROM account")
    [(account_id, call_id)] = past.rig.sql("SELECT account_id, id FROM usage WHERE request_id = 'refunded'")

    dropped = await past.drop(month_of(OLD))

    assert (dropped.calls, dropped.cost_nusd) == (3, 635_000_000)
    assert (await audit(past.rig.house.db)).findings == ()
    assert await past.ask("/activity", customer) == activity
    assert await past.rig.balance(customer) == balance == D("9.564")
    assert await past.ask("/keys", customer) == keys
    assert await past.ask("/api/v1/credits", customer) == credits
    assert past.rig.sql("SELECT id, posted_nusd, held_nusd, entry_count FROM account") == account
    assert [call["request_id"] for call in (await past.ask("/queries/history", customer))["data"]] == ["today"]
    again = await past.rig.settle(hold_id, "0.7")
    assert again["cost"]["total_cost_usd"] == D("0.125")
    assert await past.rig.balance(customer) == balance
    repeat = await past.charge(customer, "0.5", request_id="refunded", model="b")
    assert repeat["cost"]["total_cost_usd"] == D("0.5")
    assert await past.rig.balance(customer) == balance
    charge_id = str(ChargeId(account_id, call_id))
    assert (await past.rig.meter("refund", charge_id=charge_id)).status_code == 404
    explained = await past.rig.client.get(f"/activity/{charge_id}/explain", headers=customer.owner)
    assert explained.status_code == 404


async def test_days_of_a_dropped_month_are_never_summed_again(past: Past) -> None:
    customer, _ = await lived(past)
    activity = await past.ask("/activity", customer)
    await past.drop(month_of(OLD))
    assert await rebuild(past.rig.house.db) == 0
    await past.roll_up()
    assert await past.ask("/activity", customer) == activity
    assert (await audit(past.rig.house.db)).findings == ()


async def test_an_export_has_every_call_exactly_and_only_its_owner_may_read_it(past: Past) -> None:
    await lived(past)
    path = await past.export(month_of(OLD))
    assert path.stat().st_mode & 0o777 == 0o600
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    names = list(lines[0])
    calls = past.rig.sql(f"SELECT {', '.join(names)} FROM usage WHERE request_id <> 'today' ORDER BY account_id, id")
    assert names == [name for (name,) in past.rig.sql("SELECT column_name FROM information_schema.columns WHERE table_name = 'usage' ORDER BY ordinal_position")]  # fmt: skip
    assert len(lines) == len(calls) == 3

    def printed(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, datetime):
            return value.astimezone(UTC).isoformat()
        return json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else str(value)

    assert [list(line.values()) for line in lines] == [[printed(value) for value in call] for call in calls]


async def test_an_export_has_nothing_that_a_spreadsheet_would_run(past: Past) -> None:
    """A caller chose the model's name, and a proxy its endpoint; numbers below nothing stay numbers."""
    customer = await past.rig.customer("10")
    formulas = ['=HYPERLINK("https://evil.example","Invoice")', "+1", "-1", "@SUM(A1)", "＝1"]
    for model in formulas:
        await past.charge(customer, "0.5", model=model, endpoint=model)
    held = await past.rig.authorize(customer.api_key, "0.5", "above", model="+")
    await past.rig.settle(held["hold_id"], "20")
    await past.back(OLD)
    path = await past.export(month_of(OLD))
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert sorted(line["model"] for line in lines) == sorted(f"'{model}" for model in [*formulas, "+"])
    assert {line["endpoint"] for line in lines} == {f"'{model}" for model in formulas} | {""}
    assert min(int(line["balance_after_nusd"]) for line in lines) == -12_500_000_000


def test_no_other_place_writes_csv() -> None:
    """The guard stands in one place, so that whoever writes CSV writes it through the guard."""
    writers = [
        path.name
        for path in Path("app").rglob("*.py")
        if "csv.writer" in (text := path.read_text()) or "DictWriter" in text
    ]
    assert writers == ["spreadsheet.py"]


async def test_a_month_is_dropped_only_when_it_is_over_exported_and_old(past: Past) -> None:
    await lived(past)
    now, old, this = datetime.now(UTC), month_of(OLD), month_of(0)
    with pytest.raises(InvalidField, match="not over"):
        await export(past.owner, this, past.folder / "this", now)
    with pytest.raises(InvalidField, match="not over"):
        await drop(past.owner, this, now, force=True)
    with pytest.raises(InvalidField, match="not exported"):
        await drop(past.owner, old, now)
    with pytest.raises(NotFound, match="no calls"):
        await export(past.owner, date(2001, 1, 1), past.folder / "none", now)
    with pytest.raises(InvalidField, match="not exported"):
        await drop(past.owner, date(2001, 1, 1), now)
    assert list(past.folder.iterdir()) == []
    path = await past.export(old)
    with pytest.raises(InvalidField, match="cannot be written"):
        await export(past.owner, old, path, now)
    with pytest.raises(InvalidField, match="less than 60 days"):
        await drop(past.owner, old, datetime.combine(old + timedelta(days=80), datetime.min.time(), UTC))
    assert past.count_calls() == 4


async def test_a_call_that_came_after_the_export_is_not_dropped_unseen(past: Past) -> None:
    customer, _ = await lived(past)
    await past.export(month_of(OLD))
    await past.charge(customer, "0.003", request_id="late")
    past.rig.sql("UPDATE usage SET id = (SELECT substr(id::text, 1, 24) || '000000000000' FROM usage WHERE request_id = 'charged')::uuid WHERE request_id = 'late'")  # fmt: skip
    past.rig.sql("UPDATE entry e SET usage_id = u.id FROM usage u WHERE e.reference = u.hold_id::text")
    with pytest.raises(InvalidField, match="export again"):
        await drop(past.owner, month_of(OLD), datetime.now(UTC), force=True)
    await rebuild(past.rig.house.db)
    await past.drop(month_of(OLD))
    assert (await audit(past.rig.house.db)).findings == ()


async def test_months_lists_what_there_is_and_what_was_put_away(past: Past) -> None:
    await lived(past)
    old = month_of(OLD)
    await past.export(old)
    found = {each["month"]: each for each in await months(past.owner)}
    assert (found[old]["calls"], found[old]["dropped_at"]) == (3, None)
    assert found[old]["exported_at"] is not None
    assert found[old]["bytes"] > 0
    assert found[month_of(0)]["calls"] == 1
    assert found[None]["name"] == "usage_default"
    await drop(past.owner, old, datetime.now(UTC), force=True)
    found = {each["month"]: each for each in await months(past.owner)}
    assert (found[old]["calls"], found[old]["bytes"]) == (0, 0)
    assert found[old]["dropped_at"] is not None
    with pytest.raises(InvalidField, match="dropped before"):
        await drop(past.owner, old, datetime.now(UTC), force=True)


@pytest.mark.long
async def test_the_commands_do_it_with_and_without_json(past: Past, tmp_path: Path) -> None:
    await lived(past)
    month = f"{month_of(OLD):%Y-%m}"
    environ = {"DATABASE_URL": past.rig.database_url, "DATA_DIR": str(tmp_path / "data"), "PATH": "/usr/bin:/bin"}

    def command(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "app", "usage", *words], env=environ, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return done.stdout or done.stderr

    assert "must" not in command("months")
    assert "was not exported" in command("drop", "--month", month, "--force", code=2)
    assert "2026-01" in command("drop", "--month", "01/2026", code=2)
    out = str(tmp_path / "calls.csv.gz")
    assert json.loads(command("export", "--month", month, "--out", out, "--json"))["calls"] == 3
    assert json.loads(command("drop", "--month", month, "--force", "--json"))["cost_usd"] == "0.635"
    assert json.loads(command("rebuild", "--json")) == {"changed": 0}
    assert f"{month}" in command("months")
    [old] = [each for each in json.loads(command("months", "--json"))["months"] if each["month"] == f"{month}-01"]
    assert old["dropped_at"] is not None


@pytest.mark.parametrize("table", ["usage_day", "usage_dropped", "usage"])
async def test_after_a_drop_still_no_row_can_be_removed_unseen(past: Past, table: str) -> None:
    await lived(past)
    await past.charge(await past.rig.customer("10"), "0.25", model="c")
    await past.back(2)
    await rebuild(past.owner)  # the days that were summed have moved, too
    await past.drop(month_of(OLD + 2))
    found = past.conn.execute(f"SELECT tableoid::regclass::text, ctid::text FROM {table}".encode()).fetchall()
    assert len(found) >= 2
    for part, place in found:
        with past.conn.transaction():
            past.conn.execute(f"CREATE TEMP TABLE gone AS SELECT * FROM {part} WHERE ctid = '{place}'".encode())
            past.conn.execute(f"DELETE FROM {part} WHERE ctid = '{place}'".encode())
        assert not (await audit(past.rig.house.db)).is_clean
        with past.conn.transaction():
            past.conn.execute(f"INSERT INTO {table} SELECT * FROM gone".encode())
            past.conn.execute("DROP TABLE gone")
    assert (await audit(past.rig.house.db)).is_clean


async def test_a_drop_waits_for_a_refund_in_flight_and_gives_way_to_it(past: Past) -> None:
    """A refund that has read its call holds the drop back, and is not lost from what is kept."""
    customer, _ = await lived(past)
    old, now, db = month_of(OLD), datetime.now(UTC), past.rig.house.db
    [(account_id, call_id)] = past.rig.sql("SELECT account_id, id FROM usage WHERE request_id = 'charged'")
    await past.export(old)
    may_commit = asyncio.Event()

    async def slow_refund(session: AsyncSession) -> None:
        await _refund(session, "proxy", ChargeId(account_id, call_id), None)
        await may_commit.wait()

    refund = asyncio.create_task(db.transaction(slow_refund))
    await asyncio.sleep(0.2)
    gone = asyncio.create_task(drop(past.owner, old, now))
    while not past.rig.sql("SELECT 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"):
        assert not gone.done(), gone
        await asyncio.sleep(0.02)
    may_commit.set()
    await refund
    with pytest.raises(InvalidField, match="refunded just now"):
        await gone
    assert past.count_calls() == 4
    await drop(past.owner, old, now)
    assert past.count_calls() == 1
    assert await past.rig.balance(customer) == D("9.574")
    assert sum(line["refunded_usd"] for line in (await past.ask("/activity", customer))["data"]) == D("0.21")
