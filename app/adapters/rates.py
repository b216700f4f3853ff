"""Rate sources of our own, for backends that have no rates: one over HTTP, one fixed for the sandbox."""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final
from urllib.parse import urlsplit

import httpx
from msgspec import Raw

from app.adapters import reading
from app.adapters.asking import Asker, Patience
from app.topups.gateway import GatewayRefused, GatewayUnavailable, Rate

_RATE_MAX_USD: Final = Decimal(10) ** 9
_STEP: Final = re.compile(r"([^.\[\]]+)|\[(0|[1-9][0-9]{0,3})\]")
_PATH: Final = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[(0|[1-9][0-9]{0,3})\])*")
_QUICK: Final = Patience(connect_seconds=3, read_seconds=5, deadline_seconds=8, retries=1)
"""A customer waits while a rate is asked for, up to two of these."""


@dataclass(frozen=True, slots=True)
class Trust:
    """How far a source is believed.

    A rate is asked for again after `fresh_seconds`; while the source is silent the last one serves until it is
    `stale_seconds` old. One that is more than `jump_percent` away from the last is asked for a second time.
    """

    fresh_seconds: float = 30.0
    stale_seconds: float = 300.0
    jump_percent: Decimal = Decimal(10)
    confirm_after_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class _Known:
    rate: Rate
    asked_at_seconds: float


class HttpRateSource:
    """USD per coin from a JSON page that anybody can read, such as an exchange's ticker.

    `url_template` and `json_path` may hold `{coin}`, for which `names` gives the source's own name of a coin
    (Kraken's BTC is XBT). The path is `data.amount`, `result.*.b[0]`: names, indices, and `*` for the only member.
    """

    def __init__(
        self,
        url_template: str,
        json_path: str,
        *,
        names: Mapping[str, str],
        trust: Trust | None = None,
        allow_http: bool = False,
        client: httpx.AsyncClient | None = None,
        patience: Patience = _QUICK,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`names` lists the coins there are, each with the source's name. Raises ValueError, naming the setting."""
        self._host = _checked_host(url_template, allow_http=allow_http)
        self._url_template = url_template
        self._json_path = _checked_path(json_path)
        self._names = {coin: _checked_name(name) for coin, name in names.items()}
        self._trust = trust or Trust()
        self._monotonic = monotonic
        self._now = now
        self._known: dict[str, _Known] = {}
        self._locks = {coin: asyncio.Lock() for coin in names}
        self._asker = Asker(self._host, "", {}, client=client, patience=patience, monotonic=monotonic)

    def __repr__(self) -> str:
        return f"HttpRateSource({self._host!r})"

    async def rate(self, coin: str) -> Rate:
        """USD per whole `coin`. Many who ask at once make one question.

        Raises GatewayRefused for a coin that the source has no name for, GatewayUnavailable if it cannot be
        asked and the last rate is too old, or if it contradicts itself.
        """
        if coin not in self._names:
            raise GatewayRefused(f"no rate for {coin!r}; there are {', '.join(self._names)}")
        async with self._locks[coin]:
            last = self._known.get(coin)
            if last is not None and self._age_seconds(last) < self._trust.fresh_seconds:
                return last.rate
            try:
                self._known[coin] = await self._believed(coin, last)
            except GatewayUnavailable:
                if last is None or self._age_seconds(last) >= self._trust.stale_seconds:
                    raise
            return self._known[coin].rate

    async def close(self) -> None:
        """Give back the connections, unless the client is somebody else's."""
        await self._asker.close()

    async def _believed(self, coin: str, last: _Known | None) -> _Known:
        """What the source says; twice, if that is far from what it said last."""
        asked = await self._asked(coin)
        if last is None or not self._is_jump(last.rate.usd, asked.rate.usd):
            return asked
        await asyncio.sleep(self._trust.confirm_after_seconds)
        again = await self._asked(coin)
        if self._is_jump(asked.rate.usd, again.rate.usd):
            figures = f"{last.rate.usd:f}, then {asked.rate.usd:f}, then {again.rate.usd:f}"
            raise GatewayUnavailable(f"{self._host} contradicts itself on {coin}: {figures} USD")
        return again

    async def _asked(self, coin: str) -> _Known:
        # Its age counts from before the question, so that a slow answer is not taken for a fresh one.
        asked_at, seconds, name = self._now(), self._monotonic(), self._names[coin]
        answer = await self._asker.ask("GET", self._url_template.replace("{coin}", name))
        if answer.status != 200:
            raise GatewayUnavailable(f"{self._host} answered HTTP {answer.status}")
        usd = read_rate(self._host, answer.body, self._json_path.replace("{coin}", name))
        return _Known(Rate(usd, self._host, asked_at), seconds)

    def _is_jump(self, before: Decimal, after: Decimal) -> bool:
        return abs(after - before) * 100 > before * self._trust.jump_percent

    def _age_seconds(self, known: _Known) -> float:
        return self._monotonic() - known.asked_at_seconds


class FixedRateSource:
    """Rates that never change, for the sandbox and tests."""

    def __init__(
        self, usd_per_coin: Mapping[str, Decimal], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        for coin, usd in usd_per_coin.items():
            if not (usd.is_finite() and 0 < usd < _RATE_MAX_USD):
                raise ValueError(f"{usd} USD is no rate for {coin}")
        self._usd_per_coin = dict(usd_per_coin)
        self._now = now

    async def rate(self, coin: str) -> Rate:
        if coin not in self._usd_per_coin:
            raise GatewayRefused(f"no rate for {coin!r}; there are {', '.join(self._usd_per_coin)}")
        return Rate(self._usd_per_coin[coin], "fixed", self._now())

    async def close(self) -> None:
        """Nothing to give back."""


def read_rate(backend: str, body: bytes, json_path: str) -> Decimal:
    """The number at `json_path`, from its own digits, which may stand in a string."""
    raw = Raw(body)
    for step in _STEP.finditer(json_path):
        raw = _member(backend, raw, step[1], json_path) if step[1] else _element(backend, raw, int(step[2]), json_path)
    usd = reading.rate(backend, raw, json_path)
    if usd >= _RATE_MAX_USD:
        raise reading.rubbish(backend, json_path)
    return usd


def _member(backend: str, raw: Raw, name: str, json_path: str) -> Raw:
    members = reading.decode(backend, bytes(raw), dict[str, Raw], json_path)
    if name == "*" and len(members) == 1:
        return next(iter(members.values()))
    if name not in members:
        raise reading.rubbish(backend, f"{json_path} has no {name}")
    return members[name]


def _element(backend: str, raw: Raw, index: int, json_path: str) -> Raw:
    elements = reading.decode(backend, bytes(raw), list[Raw], json_path)
    if index >= len(elements):
        raise reading.rubbish(backend, f"{json_path} has no [{index}]")
    return elements[index]


# Settings


def _checked_host(url_template: str, *, allow_http: bool) -> str:
    """The source's host, which is also its name in the books."""
    try:
        parts = urlsplit(url_template)
        host = parts.hostname
    except ValueError:
        raise ValueError("RATE_URL is not a URL") from None
    if parts.scheme not in ("http", "https") or not host or not url_template.isascii():
        raise ValueError("RATE_URL must be an absolute http:// or https:// address")
    if parts.username or parts.fragment or "{" in parts.netloc:
        raise ValueError("RATE_URL must have no user or fragment, and {coin} only after its host")
    if "{" in url_template.replace("{coin}", ""):
        raise ValueError("RATE_URL may hold {coin} and no other placeholder")
    if parts.scheme == "http" and not allow_http:
        raise ValueError("RATE_URL is plain http; whoever sits between could set our prices; use https")
    return host


def _checked_path(json_path: str) -> str:
    if not _PATH.fullmatch(json_path):
        raise ValueError("RATE_PATH must be names and indices such as data.amount or result.*.b[0]")
    return json_path


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
        raise ValueError(f"RATE_NAMES: {name[:40]!r} is no coin's name")
    return name
