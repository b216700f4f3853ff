"""A database without any price, and short words for rows of them."""

from collections.abc import AsyncIterator

import psycopg
import pytest

from app.wiring import House


@pytest.fixture
async def unpriced(house: House, clean: str) -> AsyncIterator[House]:
    """The real parts over a database that has no price; none is left after the test."""
    truncate = b"TRUNCATE price, priced_model, price_version, price_override, markup, fee"
    with psycopg.connect(clean, autocommit=True) as conn:
        conn.execute(truncate)
        yield house
        conn.execute(truncate)
