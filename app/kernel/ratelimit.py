"""Limits: how often something may be done in a window, counted in the database so that every process counts together.

What is done rarely is counted each time, by the hour (`count_or_refuse`). Requests are counted by the minute in portions
(`Allowances`): a process takes a twentieth of a quota at once and gives it out by itself. Whoever asks is told where
they stand in the headers of draft-ietf-httpapi-ratelimit-headers.
"""

import asyncio
import ipaddress
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, in_portions, row
from app.kernel.errors import DatabaseUnavailable, RateLimitExceeded

_IPV6_BLOCKS: Final = ((64, 1), (56, 2), (48, 4))
"""Prefix lengths, and how many times the limit each may have: a site has a /56 or a /48 of networks for the asking."""
_WIDE_BLOCKS: Final = {4: ((16, 8),), 6: ((32, 16),)}
"""The same for what a provider has: who holds all of one may not use up what everybody has together."""
_ONE_SITES: Final = {4: 17, 6: 49}
"""The shortest prefix of a block that is let come near the limit for all."""
_HOUR_SECONDS: Final = 3600

_SECONDS_LEFT: Final = "extract(epoch FROM window_start + interval '1 hour' - now())::int"


# --- where a caller stands ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Policy:
    """So many of something in a window, by the name that callers read."""

    name: str
    quota: int
    window_seconds: int


@dataclass(frozen=True, slots=True)
class Standing:
    """What is left of a policy's quota, and for how long."""

    policy: Policy
    left: int
    seconds_left: int


_met: ContextVar[list[Standing] | None] = ContextVar("met", default=None)
"""The limits that this request has met."""


def begin() -> list[Standing]:
    """From now on a list of its own for this request; whoever counts adds to it."""
    met: list[Standing] = []
    _met.set(met)
    return met


def met() -> list[Standing]:
    return _met.get() or []


def tell(standing: Standing) -> None:
    found = _met.get()
    if found is not None:
        found.append(standing)


def as_headers(standings: Iterable[Standing]) -> list[tuple[bytes, bytes]]:
    """The two headers of the draft; of a policy that was met more than once, where it is tightest."""
    tightest: dict[str, Standing] = {}
    for one in standings:
        known = tightest.get(one.policy.name)
        if known is None or one.left < known.left:
            tightest[one.policy.name] = one
    if not tightest:
        return []
    policies = [f'"{name}";q={one.policy.quota};w={one.policy.window_seconds}' for name, one in tightest.items()]
    limits = [f'"{name}";r={one.left};t={one.seconds_left}' for name, one in tightest.items()]
    return [(b"ratelimit-policy", ", ".join(policies).encode()), (b"ratelimit", ", ".join(limits).encode())]


# --- whose neighbourhood ------------------------------------------------------------------------------


def blocks_of(address: str) -> tuple[tuple[str, int], ...]:
    """The neighbourhoods an address is counted with, smallest first, each with how many times the limit it may have.

    Of IPv4 its /24; of IPv6 its /64, /56 and /48.
    """
    ip = _ip(address)
    if ip is None:
        return (("unknown", 1),)
    return _networks(ip, ((24, 1),) if ip.version == 4 else _IPV6_BLOCKS)


def shares_of(address: str, per_block: int, in_all: int) -> list[tuple[str, int]]:
    """How many an address's neighbourhoods may have of what there is `in_all`: those of a site, and its provider's.

    No neighbourhood as wide as an IPv4 /16 or an IPv6 /48 has more than half of it, whatever the settings.
    """
    ip = _ip(address)
    wide = () if ip is None or ip.is_loopback else _networks(ip, _WIDE_BLOCKS[ip.version])
    half = max(1, in_all // 2)
    return [
        (
            block,
            min(times * per_block, half)
            if ip and _is_wide(block, ip.version) and not ip.is_loopback
            else times * per_block,
        )
        for block, times in (*blocks_of(address), *wide)
    ]


def _is_wide(block: str, version: int) -> bool:
    return int(block.rpartition("/")[2]) < _ONE_SITES[version]


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return None
    return ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped else ip


def _networks(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, lengths: tuple[tuple[int, int], ...]
) -> tuple[tuple[str, int], ...]:
    return tuple((str(ipaddress.ip_network((ip, length), strict=False)), times) for length, times in lengths)


# --- requests, in portions ----------------------------------------------------------------------------


class _Share:
    """What this process has of one bucket's quota in one window: `left` of what it took, below 0 what it lent itself."""

    __slots__ = ("asking", "is_used_up", "left", "taken_by_all", "window")

    def __init__(self, window: int) -> None:
        self.window, self.left, self.taken_by_all, self.is_used_up = window, 0, 0, False
        self.asking: asyncio.Task[None] | None = None


_PORTIONS: Final = 20
_PATIENCE_SECONDS: Final = 5.0
_MOST_SHARES: Final = 50_000
_TAKE: Final = """
    WITH soft AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true) AS is_off)
    INSERT INTO rate_count AS r (bucket, window_start, count)
    SELECT %(bucket)s, to_timestamp(%(window)s), %(amount)s FROM soft WHERE is_off = 'off'
    ON CONFLICT (bucket, window_start) DO UPDATE SET count = r.count + EXCLUDED.count RETURNING count"""
"""A crash of the database may forget what was taken in the last moment; nobody waits for a disk to be counted."""


class Allowances:
    """Requests, by the window: each process takes portions of a quota from the count that all share, and counts by itself.

    However many processes there are, together they never let through more than the quota (`take`), or with `take_ahead`, which
    does not wait for the database, a portion more for each process. What one process took and does not use, another has not: of
    several, each may keep a portion less one. While the database is away nobody is counted.
    """

    def __init__(self, db: Database, *, now: Callable[[], float] = time.time) -> None:
        self._db, self._now = db, now
        self._shares: dict[str, _Share] = {}
        self._uncounted_until = 0.0

    async def take(self, bucket: str, policy: Policy) -> None:
        """Count a request. Raises RateLimitExceeded where the quota of this window is used up; a quota of 0 is none."""
        await self._take(bucket, policy, lent=0)

    async def take_ahead(self, bucket: str, policy: Policy) -> None:
        """The same for who may not wait: the next portion is asked for while the last one is given out, and until it is
        there one portion more is let through."""
        await self._take(bucket, policy, lent=_portion(policy))

    async def _take(self, bucket: str, policy: Policy, lent: int) -> None:
        if policy.quota == 0:
            return
        now = self._now()
        share = self._share_of(bucket, int(now) // policy.window_seconds * policy.window_seconds)
        while share.left <= -lent and not share.is_used_up and now >= self._uncounted_until:
            await asyncio.shield(self._asking(bucket, policy, share))
        seconds_left = max(1, share.window + policy.window_seconds - int(now))
        if share.left <= (0 if share.is_used_up else -lent) and now >= self._uncounted_until:
            tell(Standing(policy, 0, seconds_left))
            raise RateLimitExceeded(
                f"Too many requests: at most {policy.quota} in {policy.window_seconds} seconds",
                retry_after_seconds=seconds_left,
            )
        share.left -= 1
        if lent and share.left <= lent // 2 and not share.is_used_up:
            self._asking(bucket, policy, share)
        tell(Standing(policy, max(0, share.left + max(0, policy.quota - share.taken_by_all)), seconds_left))

    def _share_of(self, bucket: str, window: int) -> _Share:
        share = self._shares.get(bucket)
        if share is None or share.window != window:
            if len(self._shares) >= _MOST_SHARES:  # what is forgotten was taken, and is not given out again
                fresh = {name: each for name, each in self._shares.items() if each.window == window}
                self._shares = fresh if len(fresh) < _MOST_SHARES else {}
            share = self._shares[bucket] = _Share(window)
        return share

    def _asking(self, bucket: str, policy: Policy, share: _Share) -> asyncio.Task[None]:
        """One question at a time for a bucket, whoever waits for it."""
        if share.asking is None or share.asking.done():
            share.asking = asyncio.create_task(self._ask(bucket, policy, share))
        return share.asking

    async def _ask(self, bucket: str, policy: Policy, share: _Share) -> None:
        amount = _portion(policy) + max(0, -share.left)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                found = await self._db.one(_TAKE, {"bucket": bucket, "window": share.window, "amount": amount})
        except (DatabaseUnavailable, TimeoutError):
            self._uncounted_until = self._now() + _PATIENCE_SECONDS
            return
        assert found is not None
        share.taken_by_all = found["count"]
        share.left += max(0, min(amount, policy.quota - (share.taken_by_all - amount)))
        share.is_used_up = share.taken_by_all >= policy.quota


def _portion(policy: Policy) -> int:
    return max(1, policy.quota // _PORTIONS)


# --- what is counted each time, by the hour -----------------------------------------------------------


async def count_or_refuse(
    db: Database, bucket: str, per_hour: int, *, policy: str | None = None, is_told: bool = True
) -> None:
    """Count one more in this hour. Raises RateLimitExceeded past `per_hour`, with the seconds to wait.

    The caller is told where they stand, under the name `policy` or the bucket's own; not `is_told`, only when refused.
    """
    found = await db.transaction(lambda session: add(session, bucket, 1))
    seconds_left = max(1, found["seconds_left"])
    is_over = found["count"] > per_hour
    if is_told or is_over:
        named = Policy(policy or bucket.partition("/")[0], per_hour, _HOUR_SECONDS)
        tell(Standing(named, max(0, per_hour - found["count"]), seconds_left))
    if is_over:
        raise RateLimitExceeded(
            f"Too many requests from here: at most {per_hour} an hour", retry_after_seconds=seconds_left
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


async def forget_old_counts(db: Database, at_once: int = 10_000) -> int:
    """Delete what was counted more than two hours ago, in portions; strangers of many networks leave many rows. Returns how many."""
    return await in_portions(
        db,
        """DELETE FROM rate_count WHERE (bucket, window_start) IN (
               SELECT bucket, window_start FROM rate_count WHERE window_start < now() - interval '2 hours' LIMIT :at_once)
           RETURNING 1 AS gone""",
        at_once,
    )
