"""Counting limits per hour, kept in the database so that every process counts together."""

import ipaddress
from typing import Final

from app.kernel.db import Database, row
from app.kernel.errors import RateLimitExceeded

_IPV6_BLOCKS: Final = ((64, 1), (56, 2), (48, 4))
"""Prefix lengths, and how many times the limit each may have: a site has a /56 or a /48 of networks for the asking."""


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
    found = await db.transaction(
        lambda session: row(
            session,
            """INSERT INTO rate_count AS r (bucket, window_start, count) VALUES (:bucket, date_trunc('hour', now()), 1)
               ON CONFLICT (bucket, window_start) DO UPDATE SET count = r.count + 1
               RETURNING count, extract(epoch FROM window_start + interval '1 hour' - now())::int AS seconds_left""",
            bucket=bucket,
        )
    )
    assert found is not None
    if found["count"] > per_hour:
        raise RateLimitExceeded(
            f"Too many requests from here: at most {per_hour} an hour",
            retry_after_seconds=max(1, found["seconds_left"]),
        )


async def forget_old_counts(db: Database) -> None:
    await db.transaction(
        lambda session: row(session, "DELETE FROM rate_count WHERE window_start < now() - interval '2 hours'")
    )
