"""What every answer carries, and what an Idempotency-Key promises."""

import asyncio
import json
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from app.kernel import errors
from app.kernel.errors import AppError
from app.kernel.settings import Settings
from app.topups.gateway import GatewayUnavailable
from app.web.metrics import Answered
from app.web.refusals import error_body
from tests.door import JSON, Answer, Door, idempotency_key, opened, refusal_faults

pytestmark = pytest.mark.usefixtures("within_an_hour")

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
async def door(clean: str, settings: Settings) -> AsyncIterator[Door]:
    async with opened(clean, settings) as door:
        yield door


def _family(of: type[AppError]) -> list[type[AppError]]:
    return [one for child in of.__subclasses__() for one in (child, *_family(child))]


# --- the one body of every refusal -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", _family(AppError), ids=lambda kind: str(kind.__name__))
def test_every_error_has_the_documented_body_and_a_sentence(kind: type[AppError]) -> None:
    made = kind.__new__(kind)
    AppError.__init__(made, param="a", retry_after_seconds=3)  # some are made of what they tell about, not of these
    body = error_body(made)
    assert set(body) == {"error", "message", "statusCode"}
    assert set(body["error"]) == {"message", "type", "code", "param", "metadata"}
    assert body["error"]["message"] == body["message"] == (kind.__doc__ or "").strip().split("\n")[0]
    assert body["message"].endswith(".") or ";" in body["message"]
    assert body["statusCode"] == kind.status
    assert re.fullmatch(r"[a-z_]+", kind.code)
    assert body["error"]["metadata"]["retry_after"] == 3


def test_no_two_errors_share_a_code() -> None:
    codes = Counter(kind.code for kind in _family(AppError) if "code" in vars(kind))
    assert [code for code, count in codes.items() if count > 1] == []


def test_402_is_never_wait_and_429_never_no_money() -> None:
    assert {kind.code for kind in _family(AppError) if kind.status == 402} == {
        "insufficient_balance",
        "key_limit_exceeded",
        "invalid_challenge",  # a proof used before: what helps is the fresh challenge that it bears, which is paid
    }
    assert {kind.code for kind in _family(AppError) if kind.status == 429} == {"rate_limit_exceeded", "funds_held"}
    assert "InsufficientBalance" in (errors.__doc__ or "")


def test_the_tree_at_the_top_of_the_file_names_every_error() -> None:
    ours = [kind.__name__ for kind in _family(AppError) if kind.__module__ == errors.__name__]
    assert [name for name in ours if name not in (errors.__doc__ or "")] == []


async def test_a_defect_of_ours_is_a_500_that_says_nothing_of_what_broke(door: Door) -> None:
    customer = await door.customer()

    async def broken(*_: object) -> None:
        raise RuntimeError(f"secret {customer.api_key}")

    door.rig.btcpay.create = broken  # type: ignore[method-assign,assignment]
    answer = await door.ask("POST", "/topup/create/btc", customer.key | JSON, b'{"amount": 20}')
    assert not refusal_faults(answer, 500, "internal_error", {customer.api_key, "secret"})
    assert "X-Request-Id" in answer.json["message"]


async def test_a_backend_that_is_down_is_503_with_when_to_come_back(door: Door) -> None:
    customer = await door.customer()
    door.rig.btcpay.is_down = True
    answer = await door.ask("POST", "/topup/create/btc", customer.key | JSON, b'{"amount": 20}')
    assert not refusal_faults(answer, 503, "payment_backend_unavailable", door.secrets)
    assert int(answer.headers["retry-after"]) > 0


async def test_too_many_requests_is_429_with_when_to_come_back(clean: str, settings: Settings) -> None:
    async with opened(clean, replace(settings, accounts_per_hour_per_block=2)) as door:
        answers = [await door.ask("POST", "/accounts/create") for _ in range(3)]
    assert [answer.status for answer in answers] == [201, 201, 429]
    assert not refusal_faults(answers[2], 429, "rate_limit_exceeded", ())
    assert 0 < int(answers[2].headers["retry-after"]) <= 3600
    assert answers[2].json["error"]["metadata"]["retry_after"] == int(answers[2].headers["retry-after"])


async def test_a_connection_that_breaks_off_is_not_a_defect_of_ours(door: Door) -> None:
    customer = await door.customer()
    for body in ([b'{"amou'], [b""], [b'{"amount": 20}']):
        answer = await door.ask("POST", "/topup/create/btc", customer.key | JSON, body, breaks_off=True)
        assert not refusal_faults(answer, 400, "malformed_json", door.secrets)
    assert door.rig.btcpay.created == 0


# --- request ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/health/live", "/nope", "/keys", "/receipts/x", "/docs/openapi.json"])
async def test_every_answer_has_a_request_id_and_a_callers_own_is_kept(door: Door, target: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", (await door.ask("GET", target)).headers["x-request-id"])
    for own in ("abc", "A-b_c.d:e", "x" * 64, str(uuid.uuid4())):
        assert (await door.ask("GET", target, {"X-Request-Id": own})).headers["x-request-id"] == own


async def test_a_request_id_that_could_do_harm_is_replaced(door: Door) -> None:
    for own in (
        "",
        "a b",
        "x" * 65,
        "a\r\nSet-Cookie: b=1",
        "a\nb",
        "é",
        "<script>",
        '"',
        "a\x00",
        "a\n",
        b"\xff",
        "a,b",
        "{}",
    ):
        answer = await door.ask("GET", "/nope", {"X-Request-Id": own})
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"]), own
        assert "set-cookie" not in answer.headers


async def test_a_trace_gives_its_id_to_a_request_without_one(door: Door) -> None:
    parent = f"00-{TRACE}-00f067aa0ba902b7-01"
    assert (await door.ask("GET", "/nope", {"traceparent": parent})).headers["x-request-id"] == TRACE
    answer = await door.ask("GET", "/nope", {"traceparent": parent, "X-Request-Id": "own"})
    assert answer.headers["x-request-id"] == "own"
    for bad in (
        f"ff-{TRACE}-00f067aa0ba902b7-01", f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
        f"00-{TRACE}-00f067aa0ba902b7", "x", parent + "\n", parent + "-extra",
    ):  # fmt: skip
        found = (await door.ask("GET", "/nope", {"traceparent": bad})).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", found), bad
        assert found not in (TRACE, "0" * 32), bad


async def test_no_answer_may_be_cached_or_sniffed(door: Door) -> None:
    customer = await door.customer()
    for target in ("/keys?show_key=true", "/credits/balance", "/nope", "/topups"):
        answer = await door.ask("GET", target, customer.owner)
        assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")


async def test_invented_methods_do_not_become_time_series(door: Door) -> None:
    for number in range(5):
        await door.ask(f"BREW{number}", "/health/live")
        await door.ask("GET", f"/nope/{number}")
    series = (await door.ask("GET", "/metrics")).body.decode()
    assert "BREW" not in series
    assert "/nope" not in series
    assert 'method="other",route="unmatched",status="405"' in series


def test_each_answer_is_counted_once_and_by_how_long_it_took() -> None:
    answered, registry = Answered(), CollectorRegistry()
    registry.register(answered)
    for seconds in (0.0005, 0.001, 0.002, 20):
        answered.count("GET", "/a", 200, seconds)
    answered.count("POST", "/a", 503, 0.02)
    answered.count("GET", "/b", 200, 0.5)
    told = generate_latest(registry).decode().splitlines()
    assert [line for line in told if line.startswith("satmeter_requests_total")] == [
        'satmeter_requests_total{method="GET",route="/a",status="200"} 4.0',
        'satmeter_requests_total{method="POST",route="/a",status="503"} 1.0',
        'satmeter_requests_total{method="GET",route="/b",status="200"} 1.0',
    ]
    within = [re.fullmatch(r'satmeter_request_seconds_bucket{le="(.+)",route="/a"} (.+)', line) for line in told]
    assert [(found[1], found[2]) for found in within if found] == [
        ("0.001", "2.0"), ("0.003", "3.0"), ("0.01", "3.0"), ("0.03", "4.0"), ("0.1", "4.0"), ("0.3", "4.0"),
        ("1.0", "4.0"), ("3.0", "4.0"), ("10.0", "4.0"), ("+Inf", "5.0"),
    ]  # fmt: skip
    assert 'satmeter_request_seconds_count{route="/a"} 5.0' in told
    assert 'satmeter_request_seconds_sum{route="/a"} 20.0235' in told


# --- Idempotency-Key -------------------------------------------------------------------------------------------


def _is_replay_of(first: Answer, second: Answer) -> bool:
    same = (first.status, first.body) == (second.status, second.body)
    return same and second.headers.get("idempotent-replayed") == "true" and "idempotent-replayed" not in first.headers


async def test_the_same_key_gives_the_same_new_api_key_again(door: Door) -> None:
    customer = await door.customer()
    headers, body = customer.owner | JSON | idempotency_key(), b'{"name": "once", "usage_limit_usd": 0.000000001e0}'
    assert (await door.ask("POST", "/keys", headers, body)).status == 422
    body = b'{"name": "once", "usage_limit_usd": 1.25, "expire_at": "2999-01-01T00:00:00+01:00"}'
    first, second = [await door.ask("POST", "/keys", headers, body) for _ in range(2)]
    assert first.status == 201, first.body
    assert _is_replay_of(first, second)
    assert first.json["data"]["api_key"].startswith("sk-")
    assert len((await door.ask("GET", "/keys", customer.owner)).json["data"]) == 2


async def test_the_same_key_gives_the_same_account_again(door: Door) -> None:
    headers = idempotency_key()
    first, second = [await door.ask("POST", "/accounts/create", headers) for _ in range(2)]
    assert _is_replay_of(first, second)
    assert first.json["credit_id"]
    assert door.rig.sql("SELECT count(*) FROM account") == [(1,)]


async def test_the_same_key_gives_the_same_invoice_again_and_one_is_made(door: Door) -> None:
    customer = await door.customer()
    headers, body = customer.key | JSON | idempotency_key(), b'{"amount": "1000", "currency": "SATS"}'
    first, second = [await door.ask("POST", "/topup/create/btc-lightning", headers, body) for _ in range(2)]
    assert first.status == 201, first.body
    assert _is_replay_of(first, second)
    assert door.rig.btcpay.created == 1


async def test_a_lost_answer_of_the_backend_does_not_become_a_second_invoice(door: Door) -> None:
    customer = await door.customer()
    headers, body = customer.key | JSON | idempotency_key(), b'{"amount": 20}'
    door.rig.btcpay.loses_answers = True
    assert (await door.ask("POST", "/topup/create/btc", headers, body)).status == 503
    door.rig.btcpay.loses_answers = False
    second, third = [await door.ask("POST", "/topup/create/btc", headers, body) for _ in range(2)]
    assert second.status == 201, second.body
    assert _is_replay_of(second, third)
    assert door.rig.btcpay.created == 1


async def test_a_quoted_and_a_bare_key_are_the_same_key(door: Door) -> None:
    customer, key = await door.customer(), uuid.uuid4().hex
    bare, quoted = [
        await door.ask("POST", "/keys", customer.owner | JSON | {"Idempotency-Key": spelling}, b'{"name": "q"}')
        for spelling in (key, f'"{key}"')
    ]
    assert _is_replay_of(bare, quoted)


async def test_the_credit_id_is_one_caller_in_upper_and_lower_case(door: Door) -> None:
    customer, key = await door.customer(), idempotency_key()
    lower, upper = [
        await door.ask("POST", "/keys", {"x-credit-id": spelling} | JSON | key, b'{"name": "q"}')
        for spelling in (customer.credit_id, customer.credit_id.upper())
    ]
    assert _is_replay_of(lower, upper)


async def test_the_same_key_with_another_body_is_409(door: Door) -> None:
    customer = await door.customer()
    headers = customer.owner | JSON | idempotency_key()
    assert (await door.ask("POST", "/keys", headers, b'{"name": "a"}')).status == 201
    answer = await door.ask("POST", "/keys", headers, b'{"name": "b"}')
    assert not refusal_faults(answer, 409, "idempotency_key_reuse", door.secrets)
    assert len((await door.ask("GET", "/keys", customer.owner)).json["data"]) == 2


async def test_two_callers_and_two_routes_with_the_same_key_are_independent(door: Door) -> None:
    one, other, key = await door.customer(), await door.customer(), idempotency_key()
    answers = [
        await door.ask("POST", "/keys", caller.owner | JSON | key, b'{"name": "same"}') for caller in (one, other)
    ]
    answers += [
        await door.ask("POST", f"/topup/create/{method}", one.owner | JSON | key, b'{"amount": 20}')
        for method in ("btc", "ltc")
    ]
    answers.append(await door.ask("POST", "/accounts/create", key))
    assert [answer.status for answer in answers] == [201] * 5
    assert len({answer.body for answer in answers}) == 5
    assert not any("idempotent-replayed" in answer.headers for answer in answers)


async def test_a_refused_request_does_not_burn_its_key(door: Door) -> None:
    customer, body = await door.customer(), b'{"name": "Default"}'
    headers = customer.owner | JSON | idempotency_key()
    assert (await door.ask("POST", "/keys", headers, body)).code == "name_taken"
    [default] = (await door.ask("GET", "/keys", customer.owner)).json["data"]
    await door.ask("DELETE", f"/keys/{default['_id']}", customer.owner)
    answer = await door.ask("POST", "/keys", headers, body)
    assert (answer.status, "idempotent-replayed" in answer.headers) == (201, False)
    other = customer.owner | JSON | idempotency_key()
    assert (await door.ask("POST", "/keys", other, b'{"name": ""}')).status == 422
    assert (await door.ask("POST", "/keys", other, b'{"name": "good"}')).status == 201
    assert (await door.ask("POST", "/topup/create/btc", other, b'{"amount": 1}')).status == 422
    assert (await door.ask("POST", "/topup/create/btc", other, b'{"amount": 20}')).status == 201


def _once(answers: list[Answer]) -> list[Answer]:
    """The answers that are not `come back shortly`; each of those says when."""
    waiting = [answer for answer in answers if answer.status == 409]
    for answer in waiting:
        assert not refusal_faults(answer, 409, "idempotency_in_progress", ())
        assert int(answer.headers["retry-after"]) >= 1
    done = [answer for answer in answers if answer.status != 409]
    assert {answer.status for answer in done} == {201}
    assert sum("idempotent-replayed" not in answer.headers for answer in done) == 1
    return done


async def test_twenty_at_once_make_one_api_key(door: Door) -> None:
    customer = await door.customer()
    headers = customer.owner | JSON | idempotency_key()
    done = _once(await door.race(door.ask("POST", "/keys", headers, b'{"name": "race"}') for _ in range(20)))
    assert len({answer.body for answer in done}) == 1
    assert len((await door.ask("GET", "/keys", customer.owner)).json["data"]) == 2


async def test_twenty_at_once_make_one_account(door: Door) -> None:
    headers = idempotency_key()
    done = _once(await door.race(door.ask("POST", "/accounts/create", headers) for _ in range(20)))
    assert len({answer.body for answer in done}) == 1
    assert door.rig.sql("SELECT count(*) FROM account") == [(1,)]


async def test_twenty_at_once_make_one_invoice(door: Door) -> None:
    customer = await door.customer()
    headers = customer.key | JSON | idempotency_key()
    done = _once(await door.race(door.ask("POST", "/topup/create/btc", headers, b'{"amount": 20}') for _ in range(20)))
    assert len({answer.body for answer in done}) == 1
    assert (door.rig.btcpay.created, door.rig.sql("SELECT count(*) FROM topup")) == (1, [(1,)])


async def test_a_request_that_takes_over_from_one_that_hangs_is_the_only_one_that_counts(door: Door) -> None:
    customer = await door.customer()
    headers, body = customer.key | JSON | idempotency_key(), b'{"amount": 20}'
    reached, go_on, create = asyncio.Event(), asyncio.Event(), door.rig.btcpay.create

    async def hanging(new: object) -> object:
        door.rig.btcpay.create = create  # type: ignore[method-assign]
        reached.set()
        await go_on.wait()
        raise GatewayUnavailable("hung up")

    door.rig.btcpay.create = hanging  # type: ignore[method-assign,assignment]
    first = asyncio.create_task(door.ask("POST", "/topup/create/btc", headers, body))
    await reached.wait()
    door.rig.sql("UPDATE idempotency SET claimed_until = now() - interval '1 second'")
    second = await door.ask("POST", "/topup/create/btc", headers, body)
    go_on.set()
    assert (await first).status == 503
    assert second.status == 201, second.body
    assert _is_replay_of(second, await door.ask("POST", "/topup/create/btc", headers, body))
    assert (door.rig.btcpay.created, door.rig.sql("SELECT count(*) FROM topup")) == (1, [(1,)])


async def test_a_saved_answer_cannot_be_read_from_the_database(door: Door) -> None:
    customer, key = await door.customer(), idempotency_key()
    made = await door.ask("POST", "/keys", customer.owner | JSON | key, b'{"name": "sealed"}')
    account = await door.ask("POST", "/accounts/create", key)
    saved = door.rig.sql("SELECT encode(scope_key, 'hex') || encode(request_hash, 'hex') || answer FROM idempotency")
    assert len(saved) == 2
    secrets = (
        made.json["data"]["api_key"],
        account.json["api_key"],
        account.json["credit_id"],
        customer.credit_id,
        key["Idempotency-Key"],
    )
    for (text,) in saved:
        for secret in secrets:
            assert secret not in text
            assert secret.encode().hex() not in text


async def test_answers_are_forgotten_after_two_days_and_not_before(door: Door) -> None:
    from app.kernel.idempotency import forget_old_answers

    await door.ask("POST", "/accounts/create", idempotency_key())
    door.rig.sql("UPDATE idempotency SET created_at = now() - interval '47 hours'")
    assert await forget_old_answers(door.rig.house.db) == 0
    door.rig.sql("UPDATE idempotency SET created_at = now() - interval '49 hours'")
    assert await forget_old_answers(door.rig.house.db) == 1


async def test_numbers_are_printed_exactly_and_never_with_an_exponent(door: Door) -> None:
    customer = await door.customer("50")
    headers = await door.service() | JSON
    body = json.dumps({"request_id": "tiny", "api_key": customer.api_key, "cost_usd": "0.000000045"}).encode()
    answer = await door.ask("POST", "/v1/meter/charge", headers, body)
    assert b'"total_cost_usd":0.000000045' in answer.body
    assert b'"balance_usd":49.999999955' in answer.body
