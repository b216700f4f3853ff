"""What our own rate sources promise."""

import asyncio
from collections import deque
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import pytest

from app.adapters.asking import Patience
from app.adapters.rates import FixedRateSource, HttpRateSource, Trust, read_rate
from app.topups.gateway import GatewayRefused, GatewayUnavailable
from tests.adapters.fake_greenfield import Clock

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Ticker:
    """Answers with the next of `says`, and goes on saying the last one."""

    def __init__(self, *says: str | httpx.Response | Exception) -> None:
        self.says = deque(says)
        self.requests: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        said = self.says.popleft() if len(self.says) > 1 else self.says[0]
        if isinstance(said, Exception):
            raise said
        await asyncio.sleep(0)
        return said if isinstance(said, httpx.Response) else httpx.Response(200, text=said)


def a_source(ticker: Ticker, clock: Clock | None = None, **settings: Any) -> HttpRateSource:
    values: dict[str, Any] = {
        "url_template": "https://rates.example/v1/{coin}-USD",
        "json_path": "data.amount",
        "names": {"BTC": "XBT"},
        "trust": Trust(confirm_after_seconds=0),
        "patience": Patience(backoff_seconds=0, retries=0),
        "client": httpx.AsyncClient(transport=httpx.MockTransport(ticker)),
        "monotonic": clock or Clock(),
        "now": lambda: NOW,
    }
    merged = {**values, **settings}
    return HttpRateSource(merged.pop("url_template"), merged.pop("json_path"), **merged)


def amount(text: str) -> str:
    return f'{{"data":{{"amount":"{text}"}}}}'


async def test_a_rate_says_what_who_and_when() -> None:
    ticker = Ticker(amount("64392.123456789012345678"))
    rate = await a_source(ticker).rate("BTC")
    assert rate.usd == Decimal("64392.123456789012345678")
    assert (rate.source, rate.quoted_at) == ("rates.example", NOW)
    assert str(ticker.requests[0].url) == "https://rates.example/v1/XBT-USD"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ('{"error":[],"result":{"XXBTZUSD":{"a":["1"],"b":["64392.10","1","1.0"]}}}', "result.*.b[0]"),
        ('{"error":[],"result":{"XXBTZUSD":{"b":["64392.10"]}}}', "result.XXBTZUSD.b[0]"),
        ('{"bitcoin":{"usd":64392.10}}', "bitcoin.usd"),
        ('{"data":{"amount":"64392.10","base":"BTC"}}', "data.amount"),
        ('{"list":[[1],[2, 64392.10]]}', "list[1][1]"),
    ],
)
def test_the_number_is_read_from_its_own_digits(body: str, path: str) -> None:
    assert str(read_rate("r", body.encode(), path)) == "64392.10"


def test_digits_after_the_eighteenth_are_cut() -> None:
    assert read_rate("r", b'{"a":"1.1234567890123456789"}', "a") == Decimal("1.123456789012345678")


@pytest.mark.parametrize(
    "body",
    [
        "", "null", "[]", "{}", '{"data":null}', '{"data":[]}', '{"data":{}}', '{"data":{"amount":null}}', "<html>", "[" * 9999,
        *(amount(text) for text in ("", "0", "0.0", "-1", "NaN", "Infinity", "1e5", "64,392", "64_392", " 1", ".5", "1.", "٣")),
        amount("1000000000"), amount("9" * 20), '{"data":{"amount":true}}', '{"data":{"amount":6.4e4}}', '{"data":{"amount":[1]}}',
    ],
)  # fmt: skip
async def test_what_is_no_rate_is_no_answer(body: str) -> None:
    with pytest.raises(GatewayUnavailable, match=r"rates\.example answered rubbish: data\.amount"):
        await a_source(Ticker(body)).rate("BTC")


@pytest.mark.parametrize(
    ("body", "path"), [('{"a":{"x":1,"y":2}}', "a.*"), ('{"a":[1]}', "a[1]"), ('{"a":[]}', "a[0]"), ('{"a":1}', "a.b")]
)
def test_a_path_that_leads_nowhere_is_rubbish(body: str, path: str) -> None:
    with pytest.raises(GatewayUnavailable, match="rubbish"):
        read_rate("r", body.encode(), path)


async def test_a_rate_is_kept_for_a_moment_and_then_asked_for_again() -> None:
    ticker, clock = Ticker(amount("100"), amount("101")), Clock()
    source = a_source(ticker, clock)
    assert [(await source.rate("BTC")).usd for _ in range(3)] == [100, 100, 100]
    clock.seconds += 30
    assert (await source.rate("BTC")).usd == 101
    assert len(ticker.requests) == 2


async def test_many_who_ask_at_once_make_one_question() -> None:
    ticker = Ticker(amount("100"))
    source = a_source(ticker)
    rates = await asyncio.gather(*(source.rate("BTC") for _ in range(50)))
    assert {rate.usd for rate in rates} == {Decimal(100)}
    assert len(ticker.requests) == 1


@pytest.mark.parametrize("failure", [httpx.ConnectError("no"), httpx.Response(500), httpx.Response(404), "{}"])
async def test_while_the_source_is_silent_the_last_rate_serves_until_it_is_too_old(
    failure: str | httpx.Response | Exception,
) -> None:
    clock = Clock()
    source = a_source(Ticker(amount("100"), failure), clock)
    first = await source.rate("BTC")
    clock.seconds += 299
    assert await source.rate("BTC") == first
    clock.seconds += 1
    with pytest.raises(GatewayUnavailable):
        await source.rate("BTC")


async def test_without_any_rate_a_silent_source_is_unavailable() -> None:
    with pytest.raises(GatewayUnavailable):
        await a_source(Ticker(httpx.ConnectError("no"))).rate("BTC")


@pytest.mark.parametrize(("jump", "questions"), [("110", 2), ("90", 2), ("110.01", 3), ("89.99", 3), ("1", 3)])
async def test_a_jump_is_believed_when_it_is_said_twice(jump: str, questions: int) -> None:
    ticker, clock = Ticker(amount("100"), amount(jump)), Clock()
    source = a_source(ticker, clock)
    await source.rate("BTC")
    clock.seconds += 30
    assert (await source.rate("BTC")).usd == Decimal(jump)
    assert len(ticker.requests) == questions


async def test_a_slip_is_not_believed() -> None:
    ticker, clock = Ticker(amount("100"), amount("10000"), amount("101")), Clock()
    source = a_source(ticker, clock)
    await source.rate("BTC")
    clock.seconds += 30
    assert (await source.rate("BTC")).usd == 100
    assert (await source.rate("BTC")).usd == 101


async def test_a_source_that_contradicts_itself_is_unavailable_once_the_last_rate_is_old() -> None:
    clock = Clock()
    source = a_source(Ticker(amount("100"), amount("10000"), amount("101")), clock)
    await source.rate("BTC")
    clock.seconds += 300
    with pytest.raises(GatewayUnavailable, match="contradicts itself on BTC: 100, then 10000, then 101 USD"):
        await source.rate("BTC")


async def test_a_coin_without_a_name_is_refused_unasked() -> None:
    ticker = Ticker(amount("1"))
    with pytest.raises(GatewayRefused, match="no rate for 'LTC'; there are BTC"):
        await a_source(ticker).rate("LTC")
    assert ticker.requests == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url_template": "rates.example/{coin}"}, "RATE_URL must be an absolute"),
        ({"url_template": "ftp://rates.example/{coin}"}, "RATE_URL must be an absolute"),
        ({"url_template": "https://u:p@rates.example/{coin}"}, "RATE_URL must have no user"),
        ({"url_template": "https://{coin}.example/"}, "only after its host"),
        ({"url_template": "https://rates.example/{coin}/{secret}"}, "no other placeholder"),
        ({"url_template": "https://[::1/{coin}"}, "RATE_URL is not a URL"),
        ({"url_template": "http://rates.example/{coin}"}, "plain http"),
        ({"json_path": ""}, "RATE_PATH"),
        ({"json_path": "a..b"}, "RATE_PATH"),
        ({"json_path": "a[x]"}, "RATE_PATH"),
        ({"names": {"BTC": "../x"}}, "RATE_NAMES"),
    ],
)
def test_a_setting_that_cannot_be_right_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_source(Ticker("{}"), **settings)


async def test_plain_http_is_for_development() -> None:
    source = a_source(Ticker(amount("1")), url_template="http://127.0.0.1/{coin}", allow_http=True)
    assert (await source.rate("BTC")).source == "127.0.0.1"


async def test_a_fixed_rate_is_fixed() -> None:
    source = FixedRateSource({"BTC": Decimal(64_000)}, now=lambda: NOW)
    rate = await source.rate("BTC")
    assert (rate.usd, rate.source, rate.quoted_at) == (Decimal(64_000), "fixed", NOW)
    with pytest.raises(GatewayRefused):
        await source.rate("XMR")
    await source.close()


@pytest.mark.parametrize("usd", ["0", "-1", "NaN", "Infinity", "1000000000"])
def test_a_fixed_rate_must_be_one(usd: str) -> None:
    with pytest.raises(ValueError, match="no rate for BTC"):
        FixedRateSource({"BTC": Decimal(usd)})
