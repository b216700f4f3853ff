"""One litecoind and one monerod for all tests that need a chain, and a street of its own for each test."""

import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog

from tests.integration.nodes import Litecoin, Monero, needs, running
from tests.integration.street import Street, opened


@pytest.fixture(scope="session")
def nodes_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="satmeter-nodes-"))
    for name in ("litecoin", "monero"):
        (folder / name).mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
async def litecoin(nodes_folder: Path) -> AsyncIterator[Litecoin]:
    needs("litecoind")
    async with running(Litecoin(nodes_folder / "litecoin")) as node:
        yield node


@pytest.fixture(scope="session")
async def monero(nodes_folder: Path) -> AsyncIterator[Monero]:
    needs("monerod", "monero-wallet-rpc")
    async with running(Monero(nodes_folder / "monero")) as node:
        yield node


@pytest.fixture
async def street(clean: str, tmp_path: Path, litecoin: Litecoin, monero: Monero) -> AsyncIterator[Street]:
    print()
    # Only the progress is printed: what went wrong shows in what the tests assert.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        async with opened(tmp_path / "data", clean, litecoin, monero) as street:
            yield street
    finally:
        structlog.reset_defaults()
