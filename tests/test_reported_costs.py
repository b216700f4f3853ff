"""What programs report of costs is read as programs write it: no call is left uncharged for the form of a number."""

import hashlib
import json
import uuid
from decimal import Decimal
from typing import Any

import pytest
from httpx import Response

from tests.rig import Customer, Rig, exact

D = Decimal
WRITTEN = [
    ("4.5e-05", D("0.000045")), ("0.00032969999999999994", D("0.0003297")), ('"0.00032969999999999994"', D("0.0003297")),
    ("1E-3", D("0.001")), ("1e0", D(1)), ("0.1234567890", D("0.123456789")), ("1.4999999999999999e-09", D("1e-9")), ("5e-324", D("1e-9")),
    ("0.00", D(0)), ("0e7", D(0)), ('"000000000000000000000000000000000000001"', D(1)),
]  # fmt: skip
REFUSED = [
    "-4.5e-05",
    "-0.0",
    '"NaN"',
    '"Infinity"',
    "1e10",
    "1e999",
    "0." + "0" * 38 + "1",
    '"4.5e-05 "',
    "true",
    "{}",
]


async def send(rig: Rig, verb: str, text: str) -> Response:
    """The body as it stands, so that no encoder comes between."""
    headers = await rig.service() | {"Content-Type": "application/json"}
    return await rig.client.post(f"/v1/meter/{verb}", headers=headers, content=text)


async def told(rig: Rig, customer: Customer, number: str) -> dict[str, Response]:
    """One number in every place where a proxy tells money."""
    hash_ = hashlib.sha256(customer.api_key.encode()).hexdigest()
    who = [f'"request_id": "{uuid.uuid4().hex}", "api_key": "{customer.api_key}"' for _ in range(2)]
    holds = [(await rig.authorize(customer.api_key, "0.01"))["hold_id"] for _ in range(3)]
    event = '{"specversion": "1.0", "id": "%s", "source": "/g", "type": "t", "subject": "%s", "data": {"cost_usd": %s}}'
    return {
        "settle": await send(rig, "settle", f'{{"hold_id": "{holds[0]}", "cost_usd": {number}}}'),
        "settle/batch": await send(rig, "settle/batch", f'{{"settles": [{{"hold_id": "{holds[1]}", "cost_usd": {number}}}]}}'),
        "charge": await send(rig, "charge", f'{{{who[0]}, "cost_usd": {number}}}'),
        "events": await send(rig, "events", event % (uuid.uuid4().hex, hash_, number)),
        "authorize": await send(rig, "authorize", f'{{{who[1]}, "max_cost_usd": {number}}}'),
        "extend": await send(rig, "extend", f'{{"hold_id": "{holds[2]}", "captured_usd": {number}}}'),
    }  # fmt: skip


@pytest.mark.parametrize(("number", "amount_usd"), WRITTEN)
async def test_a_cost_is_charged_however_a_program_writes_it(rig: Rig, number: str, amount_usd: Decimal) -> None:
    customer = await rig.customer("10")
    answers = {verb: exact(answer) for verb, answer in (await told(rig, customer, number)).items()}
    for verb in ("settle/batch", "events"):
        answers[verb] = answers[verb]["results"][0]["charge"]
    for verb in ("settle", "settle/batch", "charge", "events"):
        assert answers[verb]["cost"]["total_cost_usd"] == amount_usd, verb
    assert answers["authorize"]["hold_usd"] == amount_usd
    assert answers["extend"]["hold_usd"] == max(D("0.01"), amount_usd)


@pytest.mark.parametrize("number", REFUSED)
async def test_what_no_cost_can_be_is_422_in_every_place(rig: Rig, number: str) -> None:
    customer = await rig.customer("10")
    for verb, answer in (await told(rig, customer, number)).items():
        if verb == "settle/batch":
            [verdict] = answer.json()["results"]
            assert (verdict["status"], verdict["error"]["param"]) == (422, "cost_usd")
            continue
        param = {"authorize": "max_cost_usd", "extend": "captured_usd", "events": "data.cost_usd"}.get(verb, "cost_usd")
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), (verb, answer.text)
    assert await rig.balance(customer) == 10


async def test_two_thousand_costs_as_json_dumps_writes_them_are_all_charged(rig: Rig) -> None:
    customer = await rig.customer("10")
    costs = [tokens * price for tokens in range(1, 401) for price in (1.5e-07, 6e-07, 7.5e-08, 3e-06, 1.1e-06)]
    holds = [await rig.authorize(customer.api_key, "0.000001", f"r{number}") for number in range(len(costs))]
    settles = [{"hold_id": held["hold_id"], "cost_usd": cost} for held, cost in zip(holds, costs, strict=True)]
    results: list[Any] = []
    for start in range(0, len(settles), 500):
        results += exact(await rig.meter("settle/batch", settles=settles[start : start + 500]))["results"]
    charged = [each["charge"]["cost"]["total_cost_usd"] for each in results if each["status"] == 200]
    assert len(charged) == len(costs)
    assert charged == [max(D("1e-9"), round(D(json.dumps(cost)), 9)) for cost in costs]


@pytest.mark.parametrize(
    ("charged", "asked", "refunded"),
    [
        ("0.0000000014", "0.0000000014", "0.000000001"), ("0.5", "0.5000000009", "0.5"), ("2.5e-09", "2.5e-09", "0.000000002"),
        ("0.00032969999999999994", "0.00032969999999999994", "0.0003297"), ("0.5", "1e-12", "0.000000001"), ("0.1", "5e-2", "0.05"),
    ],
)  # fmt: skip
async def test_a_refund_that_was_rounded_up_beyond_its_charge_is_the_charge(
    rig: Rig, charged: str, asked: str, refunded: str
) -> None:
    customer = await rig.customer("10")
    charge = exact(await rig.meter("charge", request_id="c", api_key=customer.api_key, cost_usd=charged))
    for _ in range(2):
        done = exact(await rig.meter("refund", charge_id=charge["charge_id"], amount_usd=asked))
        assert done["refunded_usd"] == D(refunded)
    more = charge["cost"]["total_cost_usd"] + D("1e-9")
    refused = await rig.meter("refund", charge_id=charge["charge_id"], amount_usd=str(more))
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "amount_usd")


@pytest.mark.parametrize("amount", ["1e1", "20.0000000001", "2e1"])
async def test_what_a_person_pays_stays_strict(rig: Rig, amount: str) -> None:
    customer = await rig.customer()
    headers = customer.owner | {"Content-Type": "application/json"}
    topup = await rig.client.post(
        "/topup/create/btc", headers=headers, content=f'{{"amount": {amount}, "currency": "USD"}}'
    )
    key = await rig.client.post("/keys", headers=headers, content=f'{{"name": "k", "usage_limit_usd": {amount}}}')
    assert (topup.status_code, key.status_code) == (422, 422)


async def test_where_nothing_is_sold_by_catalogue_a_told_cost_is_no_question_to_the_database(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cost is compared with the catalogue's; an operator who has none would wait once more for each call of a batch."""
    customer, used = await rig.customer("10"), {"input_tokens": 12, "output_tokens": 9}
    holds = [(await rig.authorize(customer.api_key, "0.01", model="m"))["hold_id"] for _ in range(20)]
    asked = 0
    transaction = rig.house.db.transaction

    def counted(work: Any) -> Any:
        nonlocal asked
        asked += 1
        return transaction(work)

    monkeypatch.setattr(rig.house.db, "transaction", counted)
    settles = [{"hold_id": hold_id, "cost_usd": "0.001", "usage": used} for hold_id in holds]
    assert (await rig.meter("settle/batch", settles=settles)).json()["charged"] == 20
    assert asked < 5
