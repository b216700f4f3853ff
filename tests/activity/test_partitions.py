"""Calls are kept by month or by day, and by either after the other, at any moment and with no call lost."""

import asyncio
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.activity.archive import DAYS_AHEAD, drop, export, make_partitions, months
from app.activity.calendar import Span, first_id, midnight
from app.activity.rollup import rebuild
from app.audit import audit
from app.cli import main
from app.kernel.errors import DatabaseUnavailable, InvalidField, NotFound
from tests.activity.conftest import Past
from tests.activity.test_archive import OLD, lived
from tests.past import move_back
from tests.rig import Customer

FAR = 2090
"""A year that nothing else has calls of."""


@pytest.fixture(autouse=True)
def no_partitions(owner_conn: psycopg.Connection[Any]) -> Iterator[None]:
    """Before and after, there is this month's alone: other tests have the same database."""
    take_away(owner_conn)
    yield
    owner_conn.execute("TRUNCATE usage")
    take_away(owner_conn)


def take_away(conn: psycopg.Connection[Any]) -> None:
    for (name,) in conn.execute(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'usage'::regclass AND inhrelid::regclass::text <> 'usage_default'"
    ).fetchall():
        conn.execute(f"DROP TABLE {name}".encode())
    conn.execute("SELECT make_usage_partitions(0)")


def at(text: str) -> datetime:
    """`02-28`, or `02-28T12:00`, of that year."""
    return datetime.fromisoformat(f"{FAR}-{text}").replace(tzinfo=UTC)


def parts(past: Past) -> dict[str, int]:
    """The partitions of that year, and how many calls each has."""
    names = past.rig.sql(
        f"SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'usage'::regclass AND inhrelid::regclass::text ~ '^usage_{FAR}' ORDER BY 1"
    )
    counted = dict(past.rig.sql("SELECT tableoid::regclass::text, count(*) FROM usage GROUP BY 1"))
    return {name.removeprefix(f"usage_{FAR}_"): counted.get(name, 0) for (name,) in names}


async def a_call(past: Past, *moments: datetime) -> None:
    """A call whose id says that it was then, as where a clock goes wrong."""
    customer = await past.rig.customer("10")
    for moment in moments:
        await past.charge(customer, "0.01", request_id=uuid.uuid4().hex)
        call = uuid.UUID(int=first_id(moment).int | 0x7000_8000_0000_0000_0000 | uuid.uuid4().int & 0xFFFF_FFFF)
        (made,) = past.rig.sql("SELECT id FROM usage ORDER BY created_at DESC LIMIT 1")[0]
        past.rig.sql("UPDATE usage SET id = %s WHERE id = %s", call, made)
        past.rig.sql("UPDATE entry SET usage_id = %s WHERE usage_id = %s", call, made)


def days(month: str, first: int, last: int) -> set[str]:
    return {f"{month}_{day:02}" for day in range(first, last + 1)}


async def test_by_day_there_is_a_partition_for_today_and_each_of_the_next_days(past: Past) -> None:
    assert await make_partitions(past.rig.house.db, by_day=True, now=at("02-25")) == DAYS_AHEAD + 1
    assert parts(past).keys() == days("02", 25, 28) | days("03", 1, 4)
    assert await make_partitions(past.rig.house.db, by_day=True, now=at("02-25T23:59:59.999")) == 0
    assert await make_partitions(past.rig.house.db, by_day=True, now=at("02-26")) == 1
    assert parts(past).keys() == days("02", 25, 28) | days("03", 1, 5)


async def test_a_call_is_in_its_own_day_to_the_millisecond(past: Past) -> None:
    await make_partitions(past.rig.house.db, by_day=True, now=at("12-30"))
    moments = ("12-30T23:59:59.999", "12-31T00:00:00", "12-31T23:59:59.999")
    await a_call(past, *map(at, moments), datetime(FAR + 1, 1, 1, tzinfo=UTC))
    assert {name: count for name, count in parts(past).items() if count} == {"12_30": 1, "12_31": 2}
    found = past.rig.sql("SELECT tableoid::regclass::text FROM usage ORDER BY id DESC LIMIT 1")
    assert found == [(f"usage_{FAR + 1}_01_01",)]


async def test_a_month_that_has_begun_stays_and_those_to_come_give_way_to_days(past: Past) -> None:
    db = past.rig.house.db
    await make_partitions(db, now=at("03-10"))
    assert parts(past).keys() == {"03", "04", "05", "06"}
    await a_call(past, at("03-20"), at("05-02"))  # the second is of a month that has not come

    await make_partitions(db, by_day=True, now=at("03-10"))
    assert parts(past) == {"03": 1, "05": 1}
    await make_partitions(db, by_day=True, now=at("03-31T23:59:59.999"))
    assert parts(past).keys() == {"03", "05"} | days("04", 1, 7)
    await make_partitions(db, by_day=True, now=at("04-30"))
    assert parts(past).keys() == {"03", "05"} | days("04", 1, 7) | {"04_30"}
    await make_partitions(db, by_day=True, now=at("05-31"))
    assert {"05", "06_01", "06_07"} <= parts(past).keys()


async def test_back_to_months_a_month_of_days_goes_on_by_days(past: Past) -> None:
    db = past.rig.house.db
    await make_partitions(db, by_day=True, now=at("04-28"))
    assert parts(past).keys() == days("04", 28, 30) | days("05", 1, 5)
    await make_partitions(db, now=at("04-29"))
    assert parts(past).keys() == days("04", 28, 30) | days("05", 1, 31) | {"06", "07"}
    await make_partitions(db, by_day=True, now=at("04-29"))
    assert parts(past).keys() == days("04", 28, 30) | days("05", 1, 31)
    await a_call(past, at("05-31T23:59:59.999"), at("06-01"))
    assert parts(past)["05_31"] == 1
    await make_partitions(db, now=at("06-02"))
    assert parts(past)["06"] == 1


@pytest.mark.parametrize("by_day", [True, False])
async def test_calls_that_came_before_their_partition_move_into_it(past: Past, by_day: bool) -> None:
    moments = [at("02-28T23:59:59.999"), at("03-01"), at("03-01T12:00"), at("03-09")]
    await a_call(past, *moments)
    assert parts(past) == {}
    await make_partitions(past.rig.house.db, by_day=by_day, now=at("03-01T12:00"))
    found = {name: count for name, count in parts(past).items() if count}
    assert found == ({"02_28": 1, "03_01": 2, "03_09": 1} if by_day else {"02": 1, "03": 3})
    assert past.rig.sql("SELECT count(*) FROM usage_default") == [(0,)]
    assert past.count_calls() == 4


async def test_switching_back_and_forth_while_calls_come_loses_none(past: Past) -> None:
    """Today's partition is taken away again and again, so that calls go into the default one, and come back by day or by month."""
    customer, db, is_over = await past.rig.customer("10"), past.rig.house.db, False
    made: list[str] = []

    async def call() -> None:
        while not is_over:
            made.append((await past.charge(customer, "0.001", request_id=uuid.uuid4().hex))["charge_id"])

    callers = [asyncio.create_task(call()) for _ in range(4)]
    try:
        for by_day in (True, False, True, False):
            before = len(made)
            past.conn.execute(
                f"""DO $$ DECLARE part regclass; BEGIN
                    LOCK TABLE ONLY usage IN ACCESS EXCLUSIVE MODE;
                    FOR part IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'usage'::regclass AND inhrelid::regclass::text ~ '^usage_{datetime.now(UTC):%Y_%m}' LOOP
                        EXECUTE format('ALTER TABLE usage DETACH PARTITION %s', part);
                        EXECUTE format('INSERT INTO usage SELECT * FROM %s', part);
                        EXECUTE format('DROP TABLE %s', part);
                    END LOOP;
                END $$""".encode()
            )
            while len(made) < before + 20:
                await asyncio.sleep(0.01)
            while past.rig.sql("SELECT 1 FROM usage_default LIMIT 1"):
                try:
                    await make_partitions(db, by_day=by_day)
                except DatabaseUnavailable:  # somebody was reading; the job comes again, too
                    await asyncio.sleep(0.05)
            name = f"usage_{datetime.now(UTC):%Y_%m_%d}" if by_day else f"usage_{datetime.now(UTC):%Y_%m}"
            assert past.rig.sql("SELECT to_regclass(%s) IS NOT NULL", name) == [(True,)]
    finally:
        is_over = True
        await asyncio.gather(*callers)
    assert past.count_calls() == len(made) == len(set(made))
    assert (await audit(db)).is_clean


async def test_who_reads_for_long_is_not_waited_for_and_keeps_no_call_waiting(past: Past) -> None:
    db = past.rig.house.db
    await make_partitions(db, now=at("03-10"))
    with past.conn.transaction():
        past.conn.execute("SELECT count(*) FROM usage")
        assert await make_partitions(db, by_day=True, now=at("04-10")) == 0
        with pytest.raises(DatabaseUnavailable):
            await make_partitions(db, by_day=True, now=at("07-10"))
        assert parts(past).keys() == {"03", "04", "05", "06"}
        await past.charge(await past.rig.customer("10"), "0.01")
    await make_partitions(db, by_day=True, now=at("04-27"))
    assert parts(past).keys() == {"03", "04"} | days("05", 1, 4)


async def lived_by_day(past: Past) -> tuple[Customer, date]:
    """A customer with calls on two days of one month of long ago, kept by day, and one call of today; the second of the two days."""
    day = datetime.now(UTC).date() - OLD * timedelta(days=1)
    old = OLD + (day.day == 1)
    customer = await past.rig.customer("10")
    held = await past.rig.authorize(customer.api_key, "1", request_id="held")
    await past.rig.settle(held["hold_id"], "0.125", usage={"input_tokens": 5})
    move_back(past.conn, 1)
    made = await past.charge(customer, "0.5", model="b", request_id="refunded")
    await past.rig.meter("refund", charge_id=made["charge_id"], amount_usd="0.2")
    move_back(past.conn, old)
    await make_partitions(past.rig.house.db, by_day=True)
    await past.charge(customer, "0.001", model="a", request_id="today")
    await past.roll_up()
    return customer, datetime.now(UTC).date() - old * timedelta(days=1)


async def test_a_day_is_exported_and_dropped_by_itself(past: Past) -> None:
    customer, day = await lived_by_day(past)
    activity, now = await past.ask("/activity", customer), datetime.now(UTC)
    span, before = Span(day, is_day=True), Span(day - timedelta(days=1), is_day=True)
    with pytest.raises(InvalidField, match="was not exported"):
        await drop(past.owner, span, now)
    exported = await export(past.owner, span, past.folder / "day", now)
    assert (exported.calls, exported.cost_nusd) == (1, 500_000_000)
    with pytest.raises(InvalidField, match="less than 60 days"):
        await drop(past.owner, span, midnight(day) + timedelta(days=50))
    assert (await drop(past.owner, span, now)).calls == 1
    assert past.count_calls() == 2
    assert (await audit(past.rig.house.db)).findings == ()
    with pytest.raises(InvalidField, match="dropped before"):
        await drop(past.owner, span, now)

    found = {each["name"]: each for each in await months(past.owner)}
    assert [(each["month"], each["calls"], each["dropped_at"] is None) for name, each in found.items() if name in (name_of(before), name_of(span))] \
        == [(before.first, 1, True), (day, 0, False)]  # fmt: skip
    if before.first.month == day.month:
        with pytest.raises(InvalidField, match="dropped before: export what is left by day"):
            await export(past.owner, day.replace(day=1), past.folder / "month", now)
    await export(past.owner, before, past.folder / "before", now)
    await drop(past.owner, before, now)
    assert past.count_calls() == 1
    await rebuild(past.owner)
    assert await past.ask("/activity", customer) == activity
    assert (await audit(past.rig.house.db)).findings == ()


async def test_a_month_kept_by_day_is_exported_and_dropped_whole(past: Past) -> None:
    customer, day = await lived_by_day(past)
    activity, now, month = await past.ask("/activity", customer), datetime.now(UTC), day.replace(day=1)
    await export(past.owner, Span(day, is_day=True), past.folder / "day", now)
    assert (await export(past.owner, month, past.folder / "month", now)).calls == 2
    with pytest.raises(InvalidField, match="was not exported"):
        await drop(past.owner, Span(day, is_day=True), now)  # the month's file has taken its place
    assert (await drop(past.owner, month, now)).calls == 2
    assert past.count_calls() == 1
    assert await past.ask("/activity", customer) == activity
    assert (await audit(past.rig.house.db)).findings == ()
    with pytest.raises(NotFound):
        await export(past.owner, Span(day, is_day=True), past.folder / "again", now)


async def test_a_day_of_a_month_that_is_kept_as_one_cannot_be_dropped(past: Past) -> None:
    await lived(past)
    day = datetime.now(UTC).date() - OLD * timedelta(days=1)
    span, now = Span(day, is_day=True), datetime.now(UTC)
    await export(past.owner, span, past.folder / "day", now)
    with pytest.raises(InvalidField, match="in its month's partition"):
        await drop(past.owner, span, now)
    assert past.count_calls() == 4


@pytest.mark.parametrize("lie", ["calls = calls + 1", "cost_nusd = cost_nusd - 1", "month = month + 1"])
async def test_what_is_kept_of_a_dropped_day_cannot_be_changed_unseen(past: Past, lie: str) -> None:
    _, day = await lived_by_day(past)
    span, now = Span(day, is_day=True), datetime.now(UTC)
    await export(past.owner, span, past.folder / "day", now)
    await drop(past.owner, span, now)
    past.conn.execute("CREATE TEMP TABLE was AS SELECT * FROM usage_dropped")
    past.conn.execute(f"UPDATE usage_dropped SET {lie}".encode())
    assert not (await audit(past.rig.house.db)).is_clean
    past.conn.execute("DELETE FROM usage_dropped; INSERT INTO usage_dropped SELECT * FROM was")
    assert (await audit(past.rig.house.db)).is_clean


def name_of(span: Span) -> str:
    return f"usage_{span}".replace("-", "_")


@pytest.mark.parametrize(("words", "says"), [
    (["export", "--day", "2026-02-30", "--out", "x"], "a day is given like"),
    (["drop", "--day", "2026-2-3"], "a day is given like"),
    (["drop", "--month", "2026-01-01"], "a month is given like"),
])  # fmt: skip
def test_a_day_that_is_none_is_one_line(
    clean: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:  # fmt: skip
    monkeypatch.setenv("DATABASE_URL", clean)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["satmeter", "usage", *words])
    assert main() == 2
    assert says in capsys.readouterr().err
