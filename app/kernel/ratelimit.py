"""Counting limits per hour, kept in the database so that every process counts together."""

import ipaddress
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row
from app.kernel.errors import RateLimitExceeded

_IPV6_BLOCKS: Final = ((64, 1), (56, 2), (48, 4))
"""Prefix lengths, and how many times the limit each may have: a site has a /56 or a /48 of networks for the asking."""

_SECONDS_LEFT: Final = "extract(epoch FROM window_start + interval '1 hour' - now())::int"


def blocks_of(address: str) -> tuple[tuple[str, int], ...]:
    """The neighbourhoods an address is counted with, smallest first, each with how many times the limit it may have.

    Of IPv4 its /24; of IPv6 its /64, /56 and /48.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return (("unknown", 1),)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    lengths = ((24, 1),) if ip.version == 4 else _IPV6_BLOCKS
    return tuple((str(ipaddress.ip_network((ip, length), strict=False)), times) for length, times in lengths)


async def count_or_refuse(db: Database, bucket: str, per_hour: int) -> None:
    """Count one more in this hour. Raises RateLimitExceeded past `per_hour`, with the seconds to wait."""
    found = await db.transaction(lambda session: add(session, bucket, 1))
    if found["count"] > per_hour:
        raise RateLimitExceeded(
            f"Too many requests from here: at most {per_hour} an hour",
            retry_after_seconds=max(1, found["seconds_left"]),
        )


async def add(session: AsyncSession, bucket: str, amount: int) -> Row:
    """Count `amount` more in this hour; returns its count and seconds_left."""
    found = await row(
        session,
        f"""INSERT INTO rate_count AS r (bucket, window_start, count) VALUES (:bucket, date_trunc('hour', now()), :amount)
            ON CONFLICT (bucket, window_start) DO UPDATE SET count = r.count + EXCLUDED.count
            RETURNING count, {_SECONDS_LEFT} AS seconds_left""",
        bucket=bucket, amount=amount,
    )  # fmt: skip
    assert found is not None
    return found


async def counted(session: AsyncSession, bucket: str) -> Row | None:
    """This hour's count and seconds_left, without counting; None where nothing was counted."""
    return await row(
        session,
        f"""SELECT count, {_SECONDS_LEFT} AS seconds_left FROM rate_count
            WHERE bucket = :bucket AND window_start = date_trunc('hour', now())""",
        bucket=bucket,
    )


async def forget_old_counts(db: Database) -> None:
    await db.transaction(
        lambda session: row(session, "DELETE FROM rate_count WHERE window_start < now() - interval '2 hours'")
    )
