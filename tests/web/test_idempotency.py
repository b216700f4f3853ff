"""What is kept for an Idempotency-Key: the answer's own bytes and little more, and no more an hour than is sensible."""

import json
import uuid

import pytest

from app.kernel.idempotency import KEPT_BYTES_PER_HOUR
from tests.door import JSON, Answer, Door, refusal_faults
from tests.rig import Customer

pytestmark = pytest.mark.usefixtures("within_an_hour")


async def _large_key(door: Door, customer: Customer, once: str | None) -> Answer:
    models = [f"{number:03}".ljust(200, "x") for number in range(19)]
    body = json.dumps({"name": uuid.uuid4().hex[:20], "allowed_models": models}).encode()
    headers = {"Idempotency-Key": once} if once else {}
    return await door.ask("POST", "/keys", customer.owner | JSON | headers, body)


async def test_what_is_kept_of_an_answer_is_little_more_than_the_answer(door: Door) -> None:
    customer = await door.customer()
    size = "SELECT pg_total_relation_size('idempotency')"
    [(before,)] = door.rig.sql(size)
    answer = await _large_key(door, customer, "one-large-answer")
    assert answer.status == 201
    assert len(answer.body) > 4_000
    [(kept,)] = door.rig.sql("SELECT octet_length(answer) FROM idempotency")
    assert kept < len(answer.body) + 100
    for number in range(20):
        assert (await _large_key(door, customer, f"more-{number}")).status == 201
    [(after,)] = door.rig.sql(size)
    assert after - before < 3 * 21 * len(answer.body)


async def test_what_is_kept_is_limited_by_account_and_hour(door: Door) -> None:
    customer, other = await door.customer(), await door.customer()
    first = await _large_key(door, customer, "the-first")
    door.rig.sql(
        "UPDATE rate_count SET count = count + %s WHERE bucket LIKE 'answers/%%'", KEPT_BYTES_PER_HOUR - 11_000
    )
    statuses = [(await _large_key(door, customer, f"more-{number}")).status for number in range(4)]
    assert statuses == [201, 201, 429, 429], "four and a half kB each"
    refused = await _large_key(door, customer, "one-more")
    assert not refusal_faults(refused, 429, "rate_limit_exceeded", ())
    assert len((await door.ask("GET", "/keys", customer.owner)).json["data"]) == 4, "a refused one made nothing"
    by_key = {"Idempotency-Key": "by-another-credential"} | customer.key | JSON
    assert (await door.ask("POST", "/topup/create/btc", by_key, b'{"amount": 20}')).status == 429, (
        "it is the account's share"
    )
    assert (await _large_key(door, customer, None)).status == 201, "nothing is kept without a key"
    assert (await _large_key(door, other, "the-first")).status == 201, "another account's is its own"
    assert first.status == 201


async def test_a_replay_is_answered_however_much_is_kept(door: Door) -> None:
    customer, body = await door.customer(), b'{"name": "x"}'
    headers = customer.owner | JSON | {"Idempotency-Key": "kept"}
    first = await door.ask("POST", "/keys", headers, body)
    door.rig.sql("UPDATE rate_count SET count = 1000000000")
    again = await door.ask("POST", "/keys", headers, body)
    assert (again.status, again.body, again.headers["idempotent-replayed"]) == (201, first.body, "true")


async def test_an_answer_is_shown_only_to_the_credential_that_got_it(door: Door) -> None:
    """From what is in the database, the service's keys and the Idempotency-Key, a show-once secret cannot be had."""
    customer = await door.customer()
    headers = customer.owner | JSON | {"Idempotency-Key": "a-show-once-secret"}
    made = await door.ask("POST", "/keys", headers, b'{"name": "x"}')
    [(sealed,)] = door.rig.sql("SELECT answer FROM idempotency")
    house = door.rig.house
    [(scope_key,)] = door.rig.sql("SELECT scope_key FROM idempotency")
    inner = house.settings.sealer.open_bytes(bytes(sealed), f"idempotency/{bytes(scope_key).hex()}")
    assert made.json["data"]["api_key"].encode() not in inner
    assert b"api_key" not in inner
