"""An Idempotency-Key whose first request died with its process is free once that is known to be dead, and not before."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from app.kernel.db import Database
from app.kernel.errors import IdempotencyInProgress
from app.kernel.idempotency import CLAIM_SECONDS, LEASE_SECONDS, Once
from app.kernel.security import Pepper, Sealer

CLAIMER = """
import asyncio, sys
from app.kernel.db import Database
from tests.test_claims import once
async def main():
    db = Database(sys.argv[1], pool_size=2)
    await db.open()
    assert await once(db).claim(str) is None
    print("claimed", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def once(db: Database) -> Once:
    sealer = Sealer([("k1", b"k" * 32)])
    return Once(
        db, Pepper(b"p" * 32), sealer, scope="POST /x", secret="s", payer="address/::1", key="once", request_hash=b"h"
    )


@pytest.fixture
async def db(clean: str) -> Any:
    made = Database(clean, pool_size=2)
    await made.open()
    yield made
    await made.close()


@contextlib.contextmanager
def claimer(url: str) -> Iterator[subprocess.Popen[str]]:
    """A process on another host, as far as the database can tell, in the middle of its request."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", CLAIMER, url], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        yield process
    finally:
        process.kill()
        process.communicate()


async def is_free(db: Database) -> bool:
    again = once(db)
    try:
        assert await again.claim(str) is None
    except IdempotencyInProgress:
        return False
    await again.abandon()
    return True


async def test_the_key_of_a_killed_process_is_free_within_seconds_and_a_living_one_s_is_not(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    def claimed_until() -> Any:
        found = owner_conn.execute("SELECT claimed_until FROM idempotency").fetchone()
        return found and found[0]

    with claimer(owner_conn.info.dsn) as process:
        first = claimed_until()
        for _ in range(200):
            if claimed_until() > first:
                break
            assert not await is_free(db)
            await asyncio.sleep(0.1)
        assert claimed_until() > first, "a living process says so again and again"
        process.kill()
        process.wait(20)
        waited = 0.0
        while not await is_free(db):
            assert waited < CLAIM_SECONDS / 2, (
                "free once it is known to be dead, not after the longest time it could take"
            )
            await asyncio.sleep(0.2)
            waited += 0.2
    assert LEASE_SECONDS < CLAIM_SECONDS / 2


async def test_who_was_taken_over_from_neither_renews_nor_gives_away_what_is_another_s(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    stalled, other = once(db), once(db)
    assert await stalled.claim(str) is None
    owner_conn.execute("UPDATE idempotency SET claimed_until = now() - interval '1 second'")
    assert await other.claim(str) is None
    await stalled.abandon()
    assert not await is_free(db), "the second request is running"
    await other.abandon()
    assert await is_free(db)


async def test_what_has_its_answer_is_not_renewed(db: Database, owner_conn: psycopg.Connection[Any]) -> None:
    asked = once(db)
    assert await asked.do(str, lambda _: asyncio.sleep(0, "made")) == "made"
    assert await once(db).claim(str) == "made"
    assert asked._renewing is not None
    with contextlib.suppress(asyncio.CancelledError):
        await asked._renewing
    assert asked._renewing.done()
