"""Waiting for what happens by itself."""

import asyncio
from collections.abc import Callable


async def eventually(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Until it holds, or for so long."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)
