"""An account that never paid cannot fill the payment backend with invoices, and a second press of a button makes no second one."""

import asyncio
import uuid
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest
from httpx import Response

from app.topups.gateway import GatewayUnavailable
from tests.rig import Customer, Rig

pytestmark = pytest.mark.usefixtures("within_an_hour")

D = Decimal


async def ask(
    rig: Rig, headers: dict[str, str], amount: object, method: str = "btc", currency: str = "USD"
) -> Response:
    return await rig.client.post(
        f"/topup/create/{method}", headers=headers, json={"amount": amount, "currency": currency}
    )


async def ask_for_each(rig: Rig, headers: dict[str, str], amounts: range) -> list[Response]:
    return [await ask(rig, headers, amount) for amount in amounts]


def headers_of(customer: Customer, who: str) -> dict[str, str]:
    return customer.owner if who == "credit id" else customer.key


def let_pass(rig: Rig, minutes: int) -> None:
    rig.sql(
        "UPDATE topup SET created_at = created_at - make_interval(mins => %s), expires_at = expires_at - make_interval(mins => %s)",
        minutes,
        minutes,
    )


@pytest.mark.parametrize("who", ["credit id", "API key"])
async def test_an_account_that_never_paid_has_ten_top_ups_waiting_at_most(rig: Rig, who: str) -> None:
    customer = await rig.customer()
    answers = await ask_for_each(rig, headers_of(customer, who), range(20, 32))
    assert [answer.status_code for answer in answers] == [201] * 10 + [429] * 2
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 3500 < int(refused.headers["retry-after"]) <= 3600  # until the first one of an hour expires
    assert (rig.btcpay.created, rig.sql("SELECT count(*) FROM topup")) == (10, [(10,)])
    assert (await ask(rig, (await rig.customer()).key, 20)).status_code == 201  # another account is another matter


async def test_one_that_is_paid_or_expired_makes_room_for_another(rig: Rig) -> None:
    customer = await rig.customer()
    await ask_for_each(rig, customer.key, range(20, 30))
    let_pass(rig, 61)
    answers = await ask_for_each(rig, customer.key, range(20, 31))
    assert [answer.status_code for answer in answers] == [201] * 10 + [429]
    rig.btcpay.pay(answers[0].json()["invoice_id"])
    await rig.poll()
    assert (await ask(rig, customer.key, 31)).status_code == 201


async def test_an_account_that_never_paid_makes_thirty_an_hour(rig: Rig) -> None:
    customer = await rig.customer()
    for first in (20, 30, 40):
        assert {answer.status_code for answer in await ask_for_each(rig, customer.key, range(first, first + 10))} == {
            201
        }
        rig.sql("UPDATE topup SET expires_at = now() - interval '1 second'")
    refused = await ask(rig, customer.key, 50)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 3500 < int(refused.headers["retry-after"]) <= 3600
    rig.sql("UPDATE topup SET created_at = created_at - interval '59 minutes 50 seconds'")
    assert 0 < int((await ask(rig, customer.key, 50)).headers["retry-after"]) <= 10
    rig.sql("UPDATE topup SET created_at = created_at - interval '10 seconds'")
    assert (await ask(rig, customer.key, 50)).status_code == 201


async def test_an_account_that_paid_once_makes_a_hundred(rig: Rig) -> None:
    customer = await rig.customer("20")
    answers = [await ask(rig, customer.key, amount, "btc-lightning") for amount in range(1, 101)]
    assert Counter(answer.status_code for answer in answers) == {201: 99, 429: 1}
    assert answers[-1].status_code == 429


@pytest.mark.parametrize("who", ["credit id", "API key"])
async def test_fifty_at_one_moment_leave_ten(rig: Rig, who: str) -> None:
    customer = await rig.customer()
    answers = await asyncio.gather(*(ask(rig, headers_of(customer, who), 20 + n) for n in range(50)))
    assert Counter(answer.status_code for answer in answers) == {201: 10, 429: 40}
    assert (rig.btcpay.created, rig.sql("SELECT count(*) FROM topup")) == (10, [(10,)])


@pytest.mark.parametrize(("method", "currency", "amount"), [("btc", "USD", "20"), ("btc-lightning", "SATS", "1000")])
async def test_the_same_wish_within_a_minute_is_the_same_invoice(
    rig: Rig, method: str, currency: str, amount: str
) -> None:
    customer = await rig.customer()
    first = await ask(rig, customer.key, amount, method, currency)
    again = await ask(rig, customer.owner, amount, method, currency)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert rig.btcpay.created == 1
    rig.sql("UPDATE topup SET created_at = created_at - interval '61 seconds'")
    assert (await ask(rig, customer.key, amount, method, currency)).json()["invoice_id"] != first.json()["invoice_id"]


async def test_fifty_same_wishes_at_one_moment_are_one_invoice(rig: Rig) -> None:
    customer = await rig.customer()
    answers = await asyncio.gather(*(ask(rig, customer.key, "20") for _ in range(50)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["invoice_id"] for answer in answers}) == 1
    assert rig.btcpay.created == 1


async def test_another_amount_currency_or_method_is_another_wish(rig: Rig) -> None:
    customer = await rig.customer()
    wishes = [("20", "btc", "USD"), ("21", "btc", "USD"), ("20", "xmr", "USD"), ("0.001", "btc", "BTC")]
    answers = [await ask(rig, customer.key, *wish) for wish in wishes]
    assert len({answer.json()["invoice_id"] for answer in answers}) == 4
    other = await ask(rig, (await rig.customer()).key, "20")
    assert other.json()["invoice_id"] not in {answer.json()["invoice_id"] for answer in answers}


async def test_what_was_paid_a_moment_ago_is_not_shown_again_for_paying(rig: Rig) -> None:
    """No webhook has told us yet."""
    customer = await rig.customer()
    first = (await ask(rig, customer.key, "20")).json()["invoice_id"]
    rig.btcpay.pay(first)
    again = await ask(rig, customer.key, "20")
    assert again.status_code == 201
    assert again.json()["invoice_id"] != first


async def test_keys_of_the_caller_s_own_say_what_is_one_request(rig: Rig) -> None:
    """Two keys are two top-ups, and a replay is answered without being counted."""
    customer = await rig.customer()

    def named() -> dict[str, str]:
        return customer.key | {"Idempotency-Key": uuid.uuid4().hex}

    requests = [named() for _ in range(10)]
    first = [await ask(rig, headers, "20") for headers in requests]
    assert len({answer.json()["invoice_id"] for answer in first}) == 10
    replays = [await ask(rig, headers, "20") for headers in requests * 3]
    assert {answer.status_code for answer in replays} == {201}
    assert all(answer.headers["idempotent-replayed"] == "true" for answer in replays)
    refused = named()
    assert (await ask(rig, refused, "20")).status_code == 429
    rig.sql("UPDATE topup SET expires_at = now() - interval '1 second'")
    assert (await ask(rig, refused, "20")).status_code == 201  # the refusal did not use the key up


async def test_a_wish_that_the_backend_was_silent_about_is_found_by_the_next_one(rig: Rig) -> None:
    """And not counted twice, however often it is asked for while the backend is down."""
    customer = await rig.customer()
    rig.btcpay.loses_answers = True
    assert (await ask(rig, customer.key, "20")).status_code == 503
    rig.btcpay.loses_answers, rig.btcpay.is_down = False, True
    assert {(await ask(rig, customer.key, "20")).status_code for _ in range(15)} == {503}
    rig.btcpay.is_down = False
    again = await ask(rig, customer.key, "20")
    assert again.status_code == 201
    assert again.json()["invoice_id"] in rig.btcpay.invoices
    assert (rig.btcpay.created, rig.sql("SELECT count(*) FROM topup")) == (1, [(1,)])


async def test_whoever_waits_for_another_s_invoice_hears_when_there_will_be_none(rig: Rig) -> None:
    customer = await rig.customer()
    reached, go_on = asyncio.Event(), asyncio.Event()
    create = rig.btcpay.create

    async def hanging(_: Any) -> Any:
        reached.set()
        await go_on.wait()
        raise GatewayUnavailable("hung up")

    rig.btcpay.create = hanging  # type: ignore[method-assign,assignment]
    first = asyncio.create_task(ask(rig, customer.key, "20"))
    await reached.wait()
    second = asyncio.create_task(ask(rig, customer.key, "20"))
    await asyncio.sleep(0.3)
    assert not second.done()
    go_on.set()
    assert [(await first).status_code, (await second).status_code] == [503, 503]
    rig.btcpay.create = create  # type: ignore[method-assign]
    assert (await ask(rig, customer.key, "20")).status_code == 201
    assert rig.sql("SELECT count(*) FROM topup") == [(1,)]
