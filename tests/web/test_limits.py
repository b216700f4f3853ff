"""What is limited per hour: a repeat is answered before it is counted, and a neighbourhood is counted as one."""

import json
from collections.abc import Awaitable, Callable

import pytest

from app.kernel.ratelimit import blocks_of
from app.kernel.settings import Settings
from tests.door import JSON, Answer, Door, opened
from tests.rig import Customer
from tests.wallets import NWC_URL

pytestmark = pytest.mark.usefixtures("within_an_hour")

Post = Callable[[Door, Customer, str], Awaitable[Answer]]


async def _create_account(door: Door, customer: Customer, key: str) -> Answer:
    return await door.ask("POST", "/accounts/create", {"Idempotency-Key": key})


async def _claim(door: Door, customer: Customer, key: str) -> Answer:
    [(txid,)] = door.rig.sql("SELECT payment_id FROM payment")
    return await door.ask(
        "POST", "/topup/claim", customer.key | JSON | {"Idempotency-Key": key}, json.dumps({"txid": txid}).encode()
    )


async def _connect(door: Door, customer: Customer, key: str) -> Answer:
    wallet = json.dumps({"nwc_url": NWC_URL}).encode()
    return await door.ask("POST", "/nwc-auto-topup/connect", customer.owner | JSON | {"Idempotency-Key": key}, wallet)


@pytest.mark.parametrize("post", [_create_account, _claim, _connect])
async def test_a_replay_is_answered_before_it_is_counted(door: Door, post: Post) -> None:
    customer = await door.customer("20")
    first = await post(door, customer, "one-key-for-all-of-it")
    assert first.status in (200, 201), first.body
    before = door.rig.sql("SELECT sum(count) FROM rate_count")
    again = [await post(door, customer, "one-key-for-all-of-it") for _ in range(5)]
    assert door.rig.sql("SELECT sum(count) FROM rate_count") == before
    door.rig.sql("UPDATE rate_count SET count = 10000000")
    again += [await post(door, customer, "one-key-for-all-of-it") for _ in range(5)]
    assert {(answer.status, answer.body) for answer in again} == {(first.status, first.body)}
    assert {answer.headers.get("idempotent-replayed") for answer in again} == {"true"}
    assert (await post(door, customer, "another-key-of-mine")).status == 429


async def test_a_refused_attempt_does_not_use_up_its_key(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, accounts_per_hour_per_block=1) as door:
        assert (await _create_account(door, Customer("", ""), "the-first-of-all-keys")).status == 201
        assert (await _create_account(door, Customer("", ""), "the-second-of-all-keys")).status == 429
        door.rig.sql("DELETE FROM rate_count")
        assert (await _create_account(door, Customer("", ""), "the-second-of-all-keys")).status == 201


async def test_the_networks_of_one_site_do_not_fill_the_limit_for_everybody(clean: str, settings: Settings) -> None:
    """334 /64s of one /48 made 10,020 accounts an hour at 30 each, and then nobody else could make one."""
    async with opened(clean, settings, accounts_per_hour_per_block=3, accounts_per_hour=60) as door:

        async def made_from(addresses: list[str]) -> int:
            answers = [await door.ask("POST", "/accounts/create", client=address) for address in addresses]
            assert {answer.status for answer in answers} <= {201, 429}
            return sum(answer.status == 201 for answer in answers)

        assert await made_from([f"2001:db8:1:{network:x}::1" for network in range(0, 0x10000, 0x2AB)]) == 12  # of a /48
        assert await made_from([f"2001:db8:2:4{network:02x}::1" for network in range(40)]) == 6  # of a /56
        assert await made_from([f"2001:db8:3:4::{host:x}" for host in range(1, 20)]) == 3  # of a /64
        assert await made_from([f"198.51.100.{host}" for host in range(20)]) == 3
        assert await made_from([f"::ffff:203.0.113.{host}" for host in range(20)]) == 3
        assert await made_from(["2001:db8:4::1"]) == 1, "somebody else"


def test_an_address_is_counted_with_its_neighbourhood() -> None:
    assert blocks_of("192.0.2.77") == (("192.0.2.0/24", 1),) == blocks_of("::ffff:192.0.2.1")
    assert [block for block, _ in blocks_of("2001:db8:a:bcde::1")] == [
        "2001:db8:a:bcde::/64", "2001:db8:a:bc00::/56", "2001:db8:a::/48"
    ]  # fmt: skip
    assert blocks_of("testclient") == (("unknown", 1),)
