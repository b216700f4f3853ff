"""A street for each test that asks for one."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway import street as streets
from tests.rig import Rig


@pytest.fixture
async def street(rig: Rig, tmp_path: Path) -> AsyncIterator[streets.Street]:
    async with streets.opened(rig, tmp_path) as street:
        yield street
