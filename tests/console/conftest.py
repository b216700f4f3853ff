"""The app's own door for tests of the pages."""

from collections.abc import AsyncIterator

import pytest

from app.kernel.settings import Settings
from tests.door import Door, opened


@pytest.fixture
async def door(clean: str, settings: Settings) -> AsyncIterator[Door]:
    async with opened(clean, settings) as door:
        yield door
