"""Metering's acceptance once more, with a real PgBouncer between the service and its database."""

import os
import subprocess
import sys

import pytest

from tests.pooler import pooler, told
from tests.program import external_postgres

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "chosen"),
    [("transaction", ""), ("session", "race or once or repeat")],
    ids=["transaction", "session"],
)
def test_metering_is_the_same_through_a_pooler(mode: str, chosen: str) -> None:
    """A process of its own, for its database is another. In session pooling a part is enough: there nothing is done otherwise."""
    with external_postgres() as made, pooler(made.new_database("owner", "CREATEROLE"), mode) as url:
        environ = {**os.environ, "TEST_DATABASE_URL": url, "TEST_DATABASE_POOLER": mode}
        environ.pop("PYTEST_XDIST_WORKER", None)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_metering.py"]
        done = subprocess.run(
            [*command, *(["-k", chosen] if chosen else [])],
            env=environ,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        last_line = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
        print(f"\nthrough {told()}, {mode}: {last_line}", end="")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
