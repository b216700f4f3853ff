"""Requests a minute: one limit for all processes, told in the headers of the draft, and what each caller is counted as."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.kernel.db import Database
from app.kernel.errors import RateLimitExceeded
from app.kernel.ratelimit import Allowances, Policy, Standing, as_headers, begin, forget_old_counts, shares_of
from app.kernel.settings import Settings
from tests.door import JSON, Answer, Door, opened

pytestmark = pytest.mark.usefixtures("within_an_hour")

_STANDING = re.compile(r'"([a-z-]+)";r=(\d+);t=(\d+)')
_POLICY = re.compile(r'"([a-z-]+)";q=(\d+);w=(\d+)')
BAD_KEY = {"Authorization": "Bearer sk-nobody"}


def told(answer: Answer) -> dict[str, tuple[int, int, int]]:
    """Policy → quota, window and what is left of it, from both headers."""
    standings = {name: int(left) for name, left, _ in _STANDING.findall(answer.headers.get("ratelimit", ""))}
    policies = {
        name: (int(quota), int(window))
        for name, quota, window in _POLICY.findall(answer.headers.get("ratelimit-policy", ""))
    }
    assert standings.keys() == policies.keys()
    return {name: (*policies[name], standings[name]) for name in policies}


async def until_refused(ask: Any, most: int = 60) -> tuple[int, Answer]:
    """How many were answered before the first 429, and that."""
    for count in range(most):
        answer = await ask()
        if answer.status == 429:
            return count, answer
    raise AssertionError(f"none of {most} was refused")


def is_a_refusal(answer: Answer, policy: str, quota: int) -> None:
    assert answer.code == "rate_limit_exceeded"
    assert told(answer)[policy] == (quota, 60, 0)
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def within_one_minute() -> float:
    return 1_800_000_000


async def test_each_caller_has_a_limit_of_its_own(clean: str, settings: Settings) -> None:
    limits = {
        "requests_per_minute_per_block": 5, "requests_per_minute_per_credit_id": 6, "requests_per_minute_per_key": 7,
        "requests_per_minute_per_service": 8, "requests_per_minute_per_admin": 9, "accounts_per_hour_per_block": 100,
    }  # fmt: skip
    async with opened(clean, settings, now=within_one_minute, **limits) as door:
        one, other = await door.customer(), await door.customer()
        service = await door.service()

        count, refused = await until_refused(lambda: door.ask("GET", "/credits/balance", one.owner))
        assert count == 6
        is_a_refusal(refused, "credit-id", 6)
        count, refused = await until_refused(lambda: door.ask("GET", "/credits/balance", one.key))
        assert count == 7
        is_a_refusal(refused, "api-key", 7)
        assert (await door.ask("GET", "/credits/balance", other.key)).status == 200, "another key's"
        assert told(await door.ask("GET", "/credits/balance", other.owner))["credit-id"] == (6, 60, 5)

        count, refused = await until_refused(lambda: door.ask("GET", "/v1/models", client="192.0.2.1"))
        assert count == 5
        is_a_refusal(refused, "address", 5)
        assert (await door.ask("GET", "/v1/models", client="192.0.2.200")).status == 429, "a neighbour"
        assert (await door.ask("GET", "/v1/models", client="198.51.100.1")).status == 200, "somebody else"
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert (await door.ask("GET", path, client="192.0.2.1")).status == 200, path

        def verify() -> Any:
            return door.ask(
                "POST", "/v1/meter/verify", service | JSON, b'{"api_key": "' + other.api_key.encode() + b'"}'
            )

        count, refused = await until_refused(verify)
        assert 8 <= count <= 9, "a portion more, in one process"
        is_a_refusal(refused, "service-token", 8)

        operator = await door.admin()
        count, refused = await until_refused(lambda: door.ask("GET", "/admin/accounts", operator))
        assert count == 9
        is_a_refusal(refused, "admin-token", 9)


async def test_the_hot_routes_tell_where_a_service_stands_and_stop_it(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, now=within_one_minute, requests_per_minute_per_service=20) as door:
        customer, service = await door.customer("20"), await door.service()
        numbers = iter(range(100))

        def charge() -> Any:
            body = b'{"request_id":"r-%d","api_key":"%s","model":"m","cost_usd":0.001}'
            return door.ask(
                "POST", "/v1/meter/charge", service | JSON, body % (next(numbers), customer.api_key.encode())
            )

        first = await charge()
        assert first.status == 200
        assert told(first)["service-token"][:2] == (20, 60)
        count, refused = await until_refused(charge)
        assert 19 <= count <= 20
        is_a_refusal(refused, "service-token", 20)
        assert door.rig.sql("SELECT count(*) FROM usage") == [(count + 1,)], "what was refused was not charged"


async def test_guesses_are_counted_on_their_neighbourhood_and_hurt_nobody_who_can_prove_who_they_are(
    clean: str, settings: Settings
) -> None:
    async with opened(clean, settings, now=within_one_minute, requests_per_minute_per_block=4) as door:
        customer = await door.customer()
        answers = [await door.ask("GET", "/credits/balance", BAD_KEY, client="203.0.113.9") for _ in range(6)]
        assert [answer.status for answer in answers] == [401] * 4 + [429] * 2
        assert (await door.ask("GET", "/credits/balance", customer.key, client="203.0.113.9")).status == 200


async def test_the_networks_of_one_ipv6_site_are_one_neighbourhood(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, now=within_one_minute, requests_per_minute_per_block=3) as door:
        asked = [await door.ask("GET", "/v1/models", client=f"2001:db8:7:{n:x}::1") for n in range(0, 0x10000, 0xFFF)]
        assert [answer.status for answer in asked].count(200) == 12
        assert (await door.ask("GET", "/v1/models", client="2001:db8:8::1")).status == 200


async def test_not_set_nothing_is_counted_and_nothing_told(door: Door) -> None:
    answer = await door.ask("GET", "/v1/models")
    assert not {"ratelimit", "ratelimit-policy"} & answer.headers.keys()
    assert door.rig.sql("SELECT count(*) FROM rate_count WHERE starts_with(bucket, 'requests/')") == [(0,)]


async def test_an_hourly_limit_is_told_in_the_same_headers(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, now=within_one_minute, accounts_per_hour_per_block=2) as door:
        answers = [await door.ask("POST", "/accounts/create") for _ in range(3)]
        assert [answer.status for answer in answers] == [201, 201, 429]
        assert [told(answer)["accounts"] for answer in answers] == [(2, 3600, 1), (2, 3600, 0), (2, 3600, 0)]
        assert "accounts-in-all" not in told(answers[0]), "how many there are is nobody's business"
        assert int(answers[2].headers["retry-after"]) <= 3600


# --- a provider's networks ----------------------------------------------------------------------------


async def test_no_provider_fills_the_limit_for_everybody(clean: str, settings: Settings) -> None:
    """256 /24s of one /16 made 7,680 of 10,000 accounts an hour, and two of them all."""
    async with opened(
        clean, settings, now=within_one_minute, accounts_per_hour_per_block=2, accounts_per_hour=60
    ) as door:

        async def made_from(addresses: list[str]) -> int:
            answers = [await door.ask("POST", "/accounts/create", client=address) for address in addresses]
            assert {answer.status for answer in answers} <= {201, 429}
            return sum(answer.status == 201 for answer in answers)

        assert await made_from([f"10.7.{third}.1" for third in range(40)]) == 16  # of a /16
        assert await made_from([f"2001:db8:{site:x}::1" for site in range(40)]) == 30  # of a /32, sites of its own
        assert await made_from(["192.0.2.1"]) == 1, "somebody else"


@pytest.mark.parametrize("address", ["10.7.1.1", "2001:db8::1", "::ffff:10.7.1.1"])
def test_no_wide_neighbourhood_has_more_than_half_of_all_whatever_the_settings(address: str) -> None:
    for per_block, in_all in ((30, 10_000), (1_000, 10_000), (10**9, 10), (1, 1)):
        for block, share in shares_of(address, per_block, in_all):
            length = int(block.rpartition("/")[2])
            if length in (16, 32, 48):
                assert share <= max(1, in_all // 2), (block, per_block, in_all)


# --- shared by processes ------------------------------------------------------------------------------


@pytest.fixture
async def databases(clean: str) -> AsyncIterator[list[Database]]:
    """As many as processes would have."""
    made = [Database(clean, pool_size=2) for _ in range(3)]
    for db in made:
        await db.open()
    yield made
    for db in made:
        await db.close()


async def _let_through(allowances: list[Allowances], policy: Policy, times: int, *, ahead: bool) -> int:
    async def one(by: Allowances) -> bool:
        try:
            await (by.take_ahead if ahead else by.take)("bucket", policy)
        except RateLimitExceeded:
            return False
        return True

    return sum(await asyncio.gather(*(one(allowances[n % len(allowances)]) for n in range(times))))


@pytest.mark.parametrize("quota", [1, 3, 40, 1000])
async def test_processes_together_never_let_through_more_than_the_quota(databases: list[Database], quota: int) -> None:
    processes, policy = [Allowances(db, now=lambda: 1_000_000) for db in databases], Policy("p", quota, 60)
    through = await _let_through(processes, policy, 2 * quota + 10, ahead=False)
    portion = max(1, quota // 20)
    assert quota - (len(processes) - 1) * (portion - 1) <= through <= quota
    assert await _let_through(processes, policy, 9, ahead=False) <= quota - through


@pytest.mark.parametrize("quota", [1, 40, 1000])
async def test_who_does_not_wait_goes_over_by_a_portion_for_each_process_at_most(
    databases: list[Database], quota: int
) -> None:
    processes, policy = [Allowances(db, now=lambda: 2_000_000) for db in databases], Policy("p", quota, 60)
    through = await _let_through(processes, policy, 3 * quota + 30, ahead=True)
    portion = max(1, quota // 20)
    assert quota - (len(processes) - 1) * (portion - 1) <= through <= quota + len(processes) * portion
    assert await _let_through(processes, policy, 9, ahead=True) == 0


async def test_a_portion_is_one_question_and_a_new_window_a_new_quota(databases: list[Database]) -> None:
    clock, policy = [3_000_000.0], Policy("p", 1000, 60)
    process = Allowances(databases[0], now=lambda: clock[0])
    assert await _let_through([process], policy, 51, ahead=False) == 51
    found = await databases[0].one("SELECT sum(count)::int AS taken FROM rate_count", {})
    assert found == {"taken": 100}, "two portions of fifty"
    assert await _let_through([process], policy, 2000, ahead=False) == 949
    clock[0] += 60
    assert await _let_through([process], policy, 10, ahead=False) == 10


async def test_a_database_that_is_away_stops_nobody(clean: str) -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/nothing", pool_size=2)
    process, policy = Allowances(away, now=lambda: 4_000_000), Policy("p", 2, 60)
    assert await _let_through([process], policy, 20, ahead=True) == 20
    await away.close()


async def test_old_counts_are_forgotten_in_portions_and_those_that_still_count_are_not(
    databases: list[Database],
) -> None:
    [db, *_] = databases
    made = """INSERT INTO rate_count (bucket, window_start, count) SELECT 'old/' || n, now() - interval '3 hours', 1
              FROM generate_series(1, 25) n RETURNING 1 AS made"""
    await db.many(made, {})
    await db.one(
        "INSERT INTO rate_count (bucket, window_start, count) VALUES ('new', now(), 1) RETURNING 1 AS made", {}
    )
    assert await forget_old_counts(db, at_once=10) == 25
    assert await db.one("SELECT string_agg(bucket, ',') AS left FROM rate_count", {}) == {"left": "new"}


def test_headers_name_a_policy_once_where_it_is_tightest() -> None:
    begin()
    wide, narrow, other = Policy("address", 20, 60), Policy("address", 5, 60), Policy("accounts", 3, 3600)
    lines = dict(as_headers([Standing(wide, 9, 7), Standing(narrow, 4, 7), Standing(other, 0, 1800)]))
    assert lines[b"ratelimit-policy"] == b'"address";q=5;w=60, "accounts";q=3;w=3600'
    assert lines[b"ratelimit"] == b'"address";r=4;t=7, "accounts";r=0;t=1800'
    assert as_headers([]) == []
