"""What outlives a process: the spool's file, who may take it over, and what is told of it, once."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from app.client import Allowed, Charged, Denied, Done, Estimate, Hold, Meter, Unavailable
from app.client.meter import key_hash
from app.client.report import report
from app.client.spool import Asked, Begun, Captured, Spool, SpoolFile, Told, outcomes, settling
from tests.client.houses import (
    ASKED,
    COST_USD,
    MODEL,
    SENT_USD,
    USD_PER_OUTPUT,
    USED,
    Wire,
    a_meter,
    allowed,
    calls,
    eventually,
    holds,
    open_holds,
    serving,
)
from tests.program import ROOT
from tests.rig import Customer, Rig


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.spool"))


async def test_what_was_not_told_is_told_by_the_next_process_once(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    wire = Wire(rig)
    async with await a_meter(rig, tmp_path, wire, drain_seconds=0.05) as meter:
        settled, released, begun = [await allowed(meter, customer) for _ in range(3)]
        for call in (settled, released, begun):
            meter.forwarded(call)
        wire.is_cut = True
        meter.settle(settled, Done(usage=USED))
        meter.release(released)
    assert len(files(tmp_path)) == 1
    found = report(tmp_path)
    assert (found.is_clean, [(each.calls, each.owed, each.is_live) for each in found.files]) == (False, [(3, 2, False)])
    for _ in range(2):
        async with await a_meter(rig, tmp_path) as meter:
            assert await meter.drain(10) == 0
    assert files(tmp_path) == []
    assert report(tmp_path).is_clean
    assert await rig.balance(customer) == 10 - COST_USD - SENT_USD
    assert holds(rig) == {settled.request_id: "settled", released.request_id: "released", begun.request_id: "settled"}
    cut_off = next(row for row in calls(rig) if row["request_id"] == begun.request_id)
    assert (cut_off["outcome"], cut_off["flags"]) == ("partial", "usage_estimated")


@pytest.mark.parametrize("is_refused", [False, True])
async def test_what_is_known_of_a_call_is_told_by_whoever_settles_it(
    rig: Rig, customer: Customer, tmp_path: Path, is_refused: bool
) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        call = await allowed(meter, customer, features=["web"])
        meter.forwarded(call, lambda: USED)
        meter.known(call, Done(upstream_id="chatcmpl-7", upstream_model="mini", features_used=("web",)))
        await eventually(lambda: b'"captured"' in files(tmp_path)[0].read_bytes())
        if is_refused:
            await meter.release(call)
        meter.known(await allowed(meter, customer), Done(upstream_id="never forwarded"))
    async with await a_meter(rig, tmp_path) as meter:
        assert await meter.drain(10) == 0
    [row] = calls(rig)
    assert (row["upstream_id"], row["upstream_model"], row["outcome"]) == ("chatcmpl-7", "mini", "partial")
    assert row["cost_nusd"] == (COST_USD + Decimal("0.02")) * 10**9


async def test_a_call_of_which_nothing_is_known_costs_what_was_held(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        call = await allowed(meter, customer, Estimate(max_output_tokens=1000))
        meter.forwarded(call)
    async with await a_meter(rig, tmp_path) as meter:
        assert await meter.drain(10) == 0
    [row] = calls(rig)
    assert row["cost_nusd"] == call.hold_usd * 10**9 > 0
    assert "usage_missing" in row["flags"]


@pytest.mark.parametrize(
    "torn", [b'{"type":"owed","id":"x","ver', b'{"type":"captured"}\n', b"\x00" * 512, b"\xff\xfe\n", b"[]\n"]
)
async def test_a_torn_line_is_passed_by_and_the_others_are_told(
    rig: Rig, customer: Customer, tmp_path: Path, torn: bytes
) -> None:
    wire = Wire(rig)
    async with await a_meter(rig, tmp_path, wire, drain_seconds=0.01) as meter:
        call = await allowed(meter, customer)
        meter.forwarded(call)
        wire.is_cut = True
        meter.settle(call, Done(usage=USED))
    [left] = files(tmp_path)
    with left.open("ab") as file:
        file.write(torn)
    assert report(tmp_path).files[0].unreadable_lines == 1
    async with await a_meter(rig, tmp_path) as meter:
        assert await meter.drain(10) == 0
    assert [row["cost_nusd"] for row in calls(rig)] == [COST_USD * 10**9]
    assert files(tmp_path) == []


async def test_every_byte_that_a_crash_may_cut_off_leaves_lines_that_are_whole(tmp_path: Path) -> None:
    whole = SpoolFile.locked(tmp_path / "whole.spool", is_new=True)
    assert whole is not None
    whole.append(Begun("a", "hold-a", USED))
    whole.append(Captured("a", "hold-a", USED))
    whole.append(settling(Hold("b", "hold-b"), Done(usage=USED)))
    written = (tmp_path / "whole.spool").read_bytes()
    ends = [place for place, byte in enumerate(written) if byte == 10][1:]  # a file begins with an empty line
    for cut in range(len(written)):
        path = tmp_path / "cut.spool"
        path.write_bytes(written[:cut])
        found = SpoolFile.locked(path, is_new=False)
        assert found is not None
        lines = sum(cut >= end for end in ends)
        assert [owed.id for owed in outcomes(found)] == [[], ["a"], ["a"], ["a", "b"]][lines]
        found.append(settling(Hold("c", "hold-c"), Done(usage=USED)))
        os.close(found._fd)
        again = SpoolFile.locked(path, is_new=False)
        assert again is not None
        assert "c" in again.live, "what is written after a torn line is read"
        os.close(again._fd)
        path.unlink()
    whole.close()


async def test_the_spool_of_a_process_that_lives_is_never_taken_over(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    async with await a_meter(rig, tmp_path) as first:
        call = await allowed(first, customer)
        first.forwarded(call)
        async with await a_meter(rig, tmp_path) as second:
            assert second.owed == 0
            assert report(tmp_path).files[0].is_live
            assert report(tmp_path).is_clean, "what a living process has is no business of the operator's"
        assert open_holds(rig) == 1
        assert isinstance(await first.settle(call, Done(usage=USED)), Charged)
    assert len(calls(rig)) == 1


async def test_one_of_several_takes_over_what_a_process_left_behind(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        meter.forwarded(await allowed(meter, customer))
    meters = [await a_meter(rig, tmp_path) for _ in range(5)]
    await asyncio.gather(*(meter.__aenter__() for meter in meters))
    await asyncio.gather(*(meter.close() for meter in meters))
    assert len(calls(rig)) == 1
    assert files(tmp_path) == []


async def test_a_full_spool_refuses_new_calls_and_loses_no_settle(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    wire = Wire(rig)
    async with await a_meter(rig, tmp_path, wire, spool_bytes=2000) as meter:
        made = []
        while isinstance(verdict := await meter.authorize(customer.api_key, model=MODEL, estimate=ASKED), Allowed):
            meter.forwarded(verdict)
            made.append(verdict)
        assert isinstance(verdict, Unavailable)
        assert (verdict.status, verdict.code) == (503, "spool_full")
        assert 2 < len(made) < 20
        for call in made:
            meter.settle(call, Done(usage=USED))
        assert await meter.drain(10) == 0
        await eventually(lambda: files(tmp_path)[0].stat().st_size < 2000)
        await meter.release(await allowed(meter, customer))
    assert await rig.balance(customer) == 10 - len(made) * COST_USD
    assert open_holds(rig) == 0


async def test_a_disk_that_takes_nothing_refuses_new_calls_and_those_that_run_are_charged(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        call = await allowed(meter, customer)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            meter.forwarded(call)
            refused = await meter.authorize(customer.api_key, model=MODEL, estimate=ASKED)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)
        assert isinstance(refused, Unavailable)
        assert refused.code == "spool_full"
        await eventually(lambda: meter._spool.has_room)  # it is written anew as soon as it can be
        [path] = files(tmp_path)
        assert call.request_id in path.read_text()
        assert isinstance(await meter.settle(call, Done(usage=USED)), Charged)


async def test_a_file_is_kept_short_while_calls_come_and_go(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=200_000, sync_seconds=0)
    spool.open()
    spool.append(Begun("stays", "hold", USED))
    for number in range(3_000):
        spool.append(Begun(str(number), "hold" * 20, USED))
        spool.append(Told(str(number)))
        if number % 500 == 0:
            await asyncio.sleep(0)
    spool.append(Begun("stays too", "hold", USED))
    await eventually(lambda: spool.own.size < 110_000)
    [path] = files(tmp_path)
    assert path.stat().st_size == spool.own.size
    other = SpoolFile.locked(path, is_new=False)
    assert other is None, "the new file is locked as the old one was"
    found = report(tmp_path).files[0]
    assert (found.calls, found.is_live) == (2, True)
    await spool.close()


async def test_refused_items_are_kept_and_reported(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path) as meter:
        await meter.settle(Hold("forged", "no-hold"), Done(usage=USED))
    found = report(tmp_path)
    assert not found.is_clean
    [kept] = found.refused
    assert (kept.id, kept.verb, kept.status) == ("forged", "settle", 404)
    assert json.loads(bytes(kept.body))["usage"] == {"input_tokens": 100, "output_tokens": 50}
    told = _report(tmp_path)
    assert told.returncode == 1
    assert "refused settle forged: 404 hold_not_found" in told.stdout
    assert json.loads(_report(tmp_path, "--json").stdout)["refused"][0]["id"] == "forged"
    async with await a_meter(rig, tmp_path) as meter:
        assert meter.owed == 0, "it is not told again"


def test_the_report_of_a_clean_spool_and_of_none(tmp_path: Path) -> None:
    assert (_report(tmp_path).returncode, _report(tmp_path / "none").returncode) == (0, 2)


def _report(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.client", "report", str(folder), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


async def test_the_spool_is_for_its_owner_alone(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    async with await a_meter(rig, tmp_path / "spool") as meter:
        call = await allowed(meter, customer)
        meter.forwarded(call)
        await meter.settle(Hold("forged", "no-hold"), Done(usage=USED))
        modes = {path.name.partition(".")[2]: path.stat().st_mode & 0o777 for path in (tmp_path / "spool").iterdir()}
        assert modes == {"spool": 0o600, "jsonl": 0o600}
        assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
        text = "".join(path.read_text() for path in (tmp_path / "spool").iterdir())
        assert customer.api_key not in text
        await meter.release(call)


async def test_what_was_asked_about_and_never_forwarded_is_given_back(
    rig: Rig, customer: Customer, tmp_path: Path
) -> None:
    """Whether its authorize arrived or not. What Satmeter denied, or was not asked, leaves nothing behind."""
    wire = Wire(rig)
    async with await a_meter(rig, tmp_path, wire) as meter:
        assert isinstance(await meter.authorize("sk-unknown", model=MODEL, estimate=ASKED), Denied)
        wire.is_cut = True
        assert isinstance(await meter.authorize(customer.api_key, model=MODEL, estimate=ASKED), Unavailable)
    assert files(tmp_path) == []
    left = SpoolFile.locked(tmp_path / "gone.spool", is_new=True)
    assert left is not None
    for number, has_arrived in enumerate((True, False)):
        left.append(Asked(f"asked-{number}", key_hash(customer.api_key)))
        if has_arrived:
            await rig.authorize(customer.api_key, "0.5", request_id=f"asked-{number}")
    left.close()
    wire.is_cut = False
    async with await a_meter(rig, tmp_path, wire) as meter:
        await eventually(lambda: open_holds(rig) == 0)
        await eventually(lambda: meter.owed == 0 and wire.paths().count("/v1/meter/release") == 3, seconds=20)
    assert files(tmp_path) == []
    assert set(holds(rig).values()) == {"released"}


# --- kill -9 ---

STORY = """
import asyncio, json, sys
from pathlib import Path
from app.client import Allowed, Done, Estimate, Meter, Usage

async def main() -> None:
    url, token, key, spool, where = sys.argv[1:]
    async with Meter(url, token, spool=Path(spool), capture_seconds=0.02, settle_seconds=30 if where == "owed" else 0) as meter:
        call = await meter.authorize(key, model="gpt-4o-mini", estimate=Estimate(input_tokens=100, max_output_tokens=1000))
        assert isinstance(call, Allowed), call
        produced = 0
        if where != "allowed":
            meter.forwarded(call, lambda: Usage(input_tokens=100, output_tokens=produced))
        if where == "streaming":
            produced = 40
            await asyncio.sleep(0.2)
        if where in ("owed", "told"):
            told = meter.settle(call, Done(usage=Usage(input_tokens=100, output_tokens=50)))
        if where == "told":
            await told
        print("there", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@contextmanager
def killed(*arguments: str) -> Iterator[None]:
    """A process with a call at some point of its life, killed there."""
    process = subprocess.Popen([sys.executable, "-c", STORY, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield None
        assert process.stdout.readline() == "there\n"
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def test_kill_9_at_any_moment_of_a_call_charges_it_once(rig: Rig, customer: Customer, tmp_path: Path) -> None:
    token = (await rig.service())["Authorization"].removeprefix("Bearer ")
    app: Any = rig.client._transport.app  # type: ignore[attr-defined]
    due = {
        "allowed": None, "forwarded": SENT_USD, "streaming": SENT_USD + 40 * USD_PER_OUTPUT, "owed": COST_USD, "told": COST_USD,
    }  # fmt: skip
    async with serving(app) as url:
        await asyncio.gather(*(
            asyncio.to_thread(_kill, url, token, customer.api_key, str(tmp_path / where), where) for where in due
        ))  # fmt: skip
        for where, cost_usd in due.items():
            before = await rig.balance(customer)
            for _ in range(2):
                async with Meter(url, token, spool=tmp_path / where, settle_seconds=0) as meter:
                    assert await meter.drain(10) == 0
            charged = before - await rig.balance(customer)
            assert charged == (0 if cost_usd is None or where == "told" else cost_usd), where
            assert files(tmp_path / where) == []
    assert len(calls(rig)) == 4
    assert open_holds(rig) == 0
    assert "released" in holds(rig).values(), "the call that was allowed and never made"


def _kill(*arguments: str) -> None:
    with killed(*arguments):
        pass


async def test_a_lock_is_let_go_by_a_process_that_is_killed_and_by_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.spool"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys,time\nfrom pathlib import Path\nfrom app.client.spool import SpoolFile\n"
         "f=SpoolFile.locked(Path(sys.argv[1]), is_new=True)\nprint('locked', flush=True)\ntime.sleep(60)", str(path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert SpoolFile.locked(path, is_new=False) is None
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    found = SpoolFile.locked(path, is_new=False)
    assert found is not None
    found.close()
    assert not path.exists()
