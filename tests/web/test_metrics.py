"""What /metrics tells, whichever process is asked, and to whom."""

import asyncio
import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.adapters.breaker import Breaker, Breakers
from app.admin.figures import _QUESTIONS, sum_up
from app.audit.gauges import gauges
from app.jobs import Job, schedule
from app.kernel.db import Database
from app.kernel.figures import keep
from app.kernel.settings import Settings, SettingsError, load
from app.metering.gathered import Gathered
from app.topups.gateway import GatewayUnavailable
from app.web.exposition import Exposition
from app.web.processes import FOLDER, NAME, Joined, Processes
from tests.door import Door, opened
from tests.test_production import PRODUCTION

TOKEN = "a-token-for-the-scraper-of-ours"


async def figures(door: Door) -> dict[str, float]:
    """Every sample by its name and labels, as a scrape reads it."""
    # What was asked within five seconds is told again, and a test does not wait so long.
    exposition = Exposition(door.rig.house.db, door.rig.house.settings, Processes(None, "http"), gauges)
    return read((await exposition.text()).decode())


def read(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


# --- the books ----------------------------------------------------------------------------------------


async def test_empty_books_tell_zeros_and_no_holes(door: Door) -> None:
    """A rule compares what is there; of what is not, it never rings."""
    told = await figures(door)
    for name in (
        'satmeter_topups{status="Settled"}', "satmeter_topups_uncredited", "satmeter_topups_uncredited_oldest_seconds",
        "satmeter_topups_to_review", "satmeter_inbox_waiting", "satmeter_inbox_oldest_seconds", "satmeter_holds_open",
        "satmeter_holds_expired", 'satmeter_autotopup_attempts{outcome="rejected"}', 'satmeter_topups_watched{status="New"}',
        "satmeter_topups_check_overdue_seconds",
    ):  # fmt: skip
        assert told[name] == 0, name
    assert told["satmeter_database_up"] == 1


async def test_each_figure_of_the_books_tells_what_is_there(door: Door) -> None:
    rig = door.rig
    customer = await rig.customer("20")
    open_topup = await rig.topup(customer, "30")
    rig.btcpay.pay(open_topup, settled=False)
    await rig.poll()
    rig.sql("UPDATE payment SET received_at = now() - interval '2 hours' WHERE status = 'Processing'")
    reviewed = await rig.topup(customer, "40")
    rig.sql("UPDATE topup SET review = 'a person should look' WHERE invoice_id = %s", reviewed)
    await rig.deliver(open_topup)
    rig.sql("UPDATE webhook_delivery SET received_at = now() - interval '5 minutes' WHERE processed_at IS NULL")
    await rig.authorize(customer.api_key, "1")
    await rig.authorize(customer.api_key, "2")
    rig.sql("UPDATE hold SET expires_at = now() - interval '1 minute' WHERE amount_nusd = 2000000000")
    await sum_up(rig.house.db)
    await rig.house.db.transaction(lambda session: keep(session, audit_differences=3))

    told = await figures(door)
    assert told['satmeter_topups{status="Settled"}'] == 1
    assert told['satmeter_topups{status="Processing"}'] == 1
    assert told['satmeter_topups{status="New"}'] == 1
    assert told["satmeter_topups_uncredited"] == 1
    assert 7200 <= told["satmeter_topups_uncredited_oldest_seconds"] < 7300
    assert told["satmeter_topups_to_review"] == 1
    assert told["satmeter_inbox_waiting"] == 1
    assert 300 <= told["satmeter_inbox_oldest_seconds"] < 400
    assert told["satmeter_holds_open"] == 2
    assert told["satmeter_holds_expired"] == 1
    assert told["satmeter_liabilities_nusd"] == 20 * 10**9
    assert told["satmeter_held_nusd"] == 3 * 10**9
    assert told["satmeter_debts_nusd"] == 0
    assert told["satmeter_accounts"] == 1
    assert told["satmeter_audit_differences"] == 3
    assert told["satmeter_audit_timestamp_seconds"] > 1.7e9

    rig.btcpay.change(open_topup, payments=(), paid=rig.btcpay.invoices[open_topup].paid * 0)
    rig.btcpay.pay(open_topup)
    await rig.poll()
    rig.sql("DELETE FROM payment WHERE status = 'Processing'")
    rig.sql("UPDATE topup SET review = NULL")
    told = await figures(door)
    assert told["satmeter_topups_uncredited"] == 0, "credited"
    assert told["satmeter_topups_uncredited_oldest_seconds"] == 0


async def test_debts_are_not_taken_from_what_is_owed_to_others(door: Door) -> None:
    rig = door.rig
    rich, poor = await rig.customer("20"), await rig.customer("20")
    hold = await rig.authorize(poor.api_key, "19")
    await rig.settle(hold["hold_id"], "25")
    await sum_up(rig.house.db)
    told = await figures(door)
    assert (told["satmeter_liabilities_nusd"], told["satmeter_debts_nusd"]) == (20 * 10**9, 5 * 10**9)
    assert await rig.balance(rich) == 20


async def test_no_question_of_a_scrape_reads_a_whole_table(door: Door) -> None:
    """Where there are enough rows for the planner to care, every question goes by an index."""
    rig = door.rig
    with psycopg.connect(rig.database_url, autocommit=True) as conn:
        conn.execute("SET enable_seqscan = off")  # the tables are small here; an index must be there to be taken
        for question in _QUESTIONS:
            sql = question.sql.replace(":yesterday", f"'{uuid.UUID(int=0)}'")
            plan = json.dumps(conn.execute(f"EXPLAIN (FORMAT JSON) {sql}".encode()).fetchall())
            assert "Seq Scan" not in plan, (question.name, plan)
            assert "Index" in plan


async def test_while_the_database_is_away_processes_still_tell_and_say_so(settings: Settings) -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/nothing", pool_size=2)
    told = read((await Exposition(away, settings, Processes(None, "http"), gauges).text()).decode())
    await away.close()
    assert told["satmeter_database_up"] == 0
    assert not any(name.startswith("satmeter_topups") for name in told)
    assert any(name.startswith("satmeter_batch_calls_count") for name in told)


async def test_the_books_are_asked_once_in_five_seconds_however_many_ask(door: Door) -> None:
    clock = [1000.0]
    exposition = Exposition(
        door.rig.house.db, door.rig.house.settings, Processes(None, "http"), gauges, monotonic=lambda: clock[0]
    )
    before = read((await exposition.text()).decode())
    door.rig.sql("INSERT INTO figure (name, value) VALUES ('accounts', 77)")
    many = await asyncio.gather(*(exposition.text() for _ in range(20)))
    assert all("satmeter_accounts" not in read(text.decode()) for text in many)
    assert "satmeter_accounts" not in before
    clock[0] += 5
    assert read((await exposition.text()).decode())["satmeter_accounts"] == 77


# --- the clock ----------------------------------------------------------------------------------------


async def test_the_last_success_and_failure_of_every_job_is_told_by_whoever_is_asked(
    door: Door,
) -> None:
    done, failed = asyncio.Event(), asyncio.Event()

    async def works(_: Any) -> None:
        done.set()

    async def breaks(_: Any) -> None:
        failed.set()
        raise RuntimeError("a defect")

    scheduler = schedule(door.rig.house, (Job("works", 0.05, works), Job("breaks", 0.05, breaks)))
    try:
        await asyncio.wait_for(asyncio.gather(done.wait(), failed.wait()), 20)
        for _ in range(400):
            names = {name for (name,) in door.rig.sql("SELECT name FROM figure")}
            if {"job/works", "job_failed/breaks", "job/catch up"} <= names:
                break
            await asyncio.sleep(0.05)
    finally:
        scheduler.shutdown(wait=False)
    told = await figures(door)
    assert told['satmeter_job_success_timestamp_seconds{task="works"}'] > 1.7e9
    assert told['satmeter_job_failure_timestamp_seconds{task="breaks"}'] > 1.7e9
    assert told['satmeter_job_interval_seconds{task="works"}'] == 0.05
    assert 'satmeter_job_success_timestamp_seconds{task="breaks"}' not in told


# --- breakers and batches -----------------------------------------------------------------------------


def test_the_breaker_of_each_backend_is_told() -> None:
    def told() -> dict[str, float]:
        registry = CollectorRegistry()
        registry.register(collector)
        return read(generate_latest(registry).decode())

    collector = Breakers()
    ours = Breaker("A backend of this test", after=2, window_seconds=60, cooldown_seconds=5, monotonic=lambda: 0.0)
    collector.watch(ours)
    assert told()['satmeter_breaker_open{backend="A backend of this test"}'] == 0
    for _ in range(2):
        with pytest.raises(GatewayUnavailable), ours.watch():
            raise GatewayUnavailable("down")
    assert told()['satmeter_breaker_open{backend="A backend of this test"}'] == 1


def test_batches_are_counted_by_size_and_wait() -> None:
    batches, registry = Gathered(), CollectorRegistry()
    registry.register(batches)
    for calls, seconds in ((1, 0.0), (3, 0.002), (900, 9.0)):
        batches.count(calls, seconds)
    told = read(generate_latest(registry).decode())
    assert told['satmeter_batch_calls_bucket{le="1"}'] == 1
    assert told['satmeter_batch_calls_bucket{le="4"}'] == 2
    assert told['satmeter_batch_calls_bucket{le="500"}'] == 2
    assert told['satmeter_batch_calls_bucket{le="+Inf"}'] == told["satmeter_batch_calls_count"] == 3
    assert told["satmeter_batch_calls_sum"] == 904
    assert told['satmeter_batch_wait_seconds_bucket{le="0.003"}'] == 2


async def test_a_call_is_counted_in_the_batch_that_decides_it(door: Door) -> None:
    customer, before = await door.customer("20"), await figures(door)
    await asyncio.gather(*(door.rig.authorize(customer.api_key, "0.01") for _ in range(20)))
    after = await figures(door)
    assert after["satmeter_batch_calls_sum"] - before["satmeter_batch_calls_sum"] == 20
    assert 1 <= after["satmeter_batch_calls_count"] - before["satmeter_batch_calls_count"] <= 20


# --- several processes --------------------------------------------------------------------------------


def _counting(folder: Path | None, name: str, count: float) -> Processes:
    registry = CollectorRegistry()
    Counter("calls", "Calls", ["route"], registry=registry).labels("/a").inc(count)
    Gauge("open", "Open", registry=registry).set(count)
    return Processes(folder, name, registry)


def _all_of(processes: Processes) -> dict[str, float]:
    found = read(generate_latest(Joined(processes.collect())).decode())
    return {name: value for name, value in found.items() if "created" not in name}


def test_whichever_process_is_asked_each_process_s_counters_are_told_and_nothing_is_added_up(tmp_path: Path) -> None:
    one, two, jobs = (
        _counting(tmp_path, "http-1", 1),
        _counting(tmp_path, "http-2", 20),
        _counting(tmp_path, "jobs", 300),
    )
    for each in (one, two, jobs):
        each.write()
    wanted = {
        f'{name}{{process="{process}"{more}}}': value
        for process, value in (("http-1", 1.0), ("http-2", 20.0), ("jobs", 300.0))
        for name, more in (("calls_total", ',route="/a"'), ("open", ""))
    }
    assert _all_of(one) == _all_of(two) == _all_of(jobs) == wanted


def test_a_process_that_began_anew_is_its_own_counter_s_reset_and_nobody_else_s(tmp_path: Path) -> None:
    one, two = _counting(tmp_path, "http-1", 1000), _counting(tmp_path, "http-2", 20)
    one.write()
    two.write()
    _counting(tmp_path, "http-1", 0).write()
    told = _all_of(two)
    assert told['calls_total{process="http-1",route="/a"}'] == 0
    assert told['calls_total{process="http-2",route="/a"}'] == 20


def test_a_sibling_s_half_written_or_strange_file_hurts_nobody_and_a_folder_that_is_gone_neither(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    one = _counting(folder, "http-1", 1)
    (folder / "http-2.json").write_text('[["calls"')
    (folder / "http-3.json").write_text("{}")
    assert len(_all_of(one)) == 2
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    one.write()
    assert len(_all_of(one)) == 2


def test_alone_a_process_tells_its_own_without_a_label() -> None:
    assert _all_of(_counting(None, "http", 5)) == {'calls_total{route="/a"}': 5.0, "open": 5.0}
    assert Processes.of({})._folder is None
    assert Processes.of({FOLDER: "/x", NAME: "http-2"})._name == "http-2"


# --- to whom ------------------------------------------------------------------------------------------


async def _status(door: Door, token: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token is not None else None
    return (await door.ask("GET", "/metrics", headers)).status


async def test_a_newcomer_s_metrics_are_open_and_with_a_token_they_are_not(clean: str, settings: Settings) -> None:
    async with opened(clean, settings) as door:
        assert await _status(door) == 200
    async with opened(clean, settings, metrics_token=TOKEN) as door:
        assert [await _status(door, token) for token in (None, "", "wrong", TOKEN + "x", TOKEN)] == [401] * 4 + [200]
        assert (await door.ask("HEAD", "/metrics")).status == 401


async def test_in_production_metrics_are_never_public_by_accident(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, environment="production") as door:
        answer = await door.ask("GET", "/metrics")
        assert answer.code == "not_found"
        assert "METRICS_TOKEN" in answer.json["message"]
    async with opened(clean, settings, environment="production", metrics_token=TOKEN) as door:
        assert [await _status(door), await _status(door, TOKEN)] == [401, 200]


async def test_a_port_of_their_own_tells_metrics_and_nothing_else(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, metrics_port=80) as door:  # where this door says that requests come in
        assert await _status(door) == 200
        for method, path in (
            ("GET", "/"),
            ("GET", "/health/live"),
            ("POST", "/accounts/create"),
            ("POST", "/v1/meter/charge"),
        ):
            assert (await door.ask(method, path)).code == "not_found", path
    async with opened(clean, settings, metrics_port=9999) as door:
        assert await _status(door) == 404
        assert (await door.ask("GET", "/health/live")).status == 200
    async with opened(clean, settings, metrics_port=80, metrics_token=TOKEN) as door:
        assert [await _status(door), await _status(door, TOKEN)] == [401, 200]


def test_metrics_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    own = {"DATA_DIR": str(tmp_path)}
    assert load(own).metrics_port is None
    for wrong, name in (
        ({"METRICS_PORT": "8080"}, "METRICS_PORT"), ({"METRICS_PORT": "x"}, "METRICS_PORT"), ({"METRICS_TOKEN": "two words"}, "METRICS_TOKEN"),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=name):
            load(own | wrong)
    assert TOKEN not in repr(replace(load(own), metrics_token=TOKEN))
    assert load(PRODUCTION | {"METRICS_TOKEN": TOKEN}).metrics_token == TOKEN
