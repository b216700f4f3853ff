"""What comes many at a time is answered as if each had come alone, byte for byte but for the ids of charges."""

import asyncio
import hashlib
import json
import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from httpx import Response

from app.admin.tokens import create_token
from app.pricing.starter import ensure_starter
from tests.rig import Customer, Rig

_CHARGE_ID = re.compile(rb'"charge_id":"([^"]*)"')
_USED: list[dict[str, Any]] = [
    {"cost_usd": "0.05"}, {"cost_usd": 4.5e-05, "served_model": "x"}, {"cost_usd": 3}, {"cost_usd": 0},
    {"usage": {"input_tokens": 1000, "output_tokens": 100}}, {"usage": {"input_tokens": 7, "audio_seconds": 0.5}, "latency_ms": 2.5},
    {"usage": {"input_tokens": 9}, "served_model": "gpt-4o", "usage_estimated": True, "features_used": ["web"]},
    {"usage": {}}, {"usage": {}, "outcome": "partial"}, {"usage": {"input_tokens": 5}, "served_model": "nobody/sells-this"},
]  # fmt: skip
_BAD: list[dict[str, Any]] = [
    {}, {"cost_usd": -1}, {"cost_usd": "1e99"}, {"cost_usd": "x"}, {"cost_usd": "0.1", "unknown": 1}, {"usage": {"input_tokens": -1}},
    {"usage": {"output_tokens": "9"}}, {"cost_usd": "0.1", "outcome": "odd"}, {"cost_usd": "0.1", "features_used": [""]},
    {"cost_usd": "0.1", "provider_cost_usd": "no"}, {"cost_usd": "0.1", "served_model": ""},
]  # fmt: skip
_ODD: list[Any] = [5, "x", [], {}, {"specversion": "0.3"}]


@dataclass(frozen=True, slots=True)
class Side:
    """Customers with holds: the other side has the same ones, in the same order."""

    customers: list[Customer]
    holds: list[str]
    elsewhere: str
    """A hold of another service's."""


@pytest.fixture
async def shop(rig: Rig) -> Rig:
    """The rig with the starter catalogue on sale."""
    await ensure_starter(rig.house.db)
    return rig


async def a_side(shop: Rig) -> Side:
    customers = [await shop.customer(usd) for usd in ("10", "12")]
    holds = []
    for number in range(16):
        key = customers[number % 2].api_key
        answer = await shop.meter("authorize", request_id=f"{key[-9:]}-{number}", api_key=key, model="gpt-4o-mini", estimate={"input_tokens": 1000, "max_output_tokens": 100})  # fmt: skip
        holds.append(answer.json()["hold_id"])
    other = await create_token(shop.house.db, shop.house.settings.pepper, "service", f"other-{uuid.uuid4().hex[:8]}")
    held = await shop.client.post(
        "/v1/meter/authorize",
        headers={"Authorization": f"Bearer {other}"},
        json={"request_id": "theirs", "api_key": customers[0].api_key, "max_cost_usd": "0.01"},
    )
    return Side(customers, holds, held.json()["hold_id"])


def told(choice: random.Random) -> dict[str, Any]:
    return choice.choice(_BAD) if choice.random() < 0.2 else choice.choice(_USED)


def a_settle(seed: float, side: Side) -> Any:
    """Good, bad, told again, of nobody, of another customer and of another service, by a seed."""
    choice = random.Random(seed)
    number, used = choice.randrange(16), told(choice)
    key, other = (side.customers[place % 2].api_key for place in (number, number + 1))
    lost = {"request_id": f"{key[-9:]}-{number}"}
    which: list[Any] = [{"hold_id": side.holds[number]}] * 12 + [
        lost | {"api_key": key}, lost | {"api_key_hash": hashlib.sha256(key.encode()).hexdigest()}, lost | {"api_key": other}, lost,
        {"request_id": "never-seen", "api_key": key}, {"hold_id": side.elsewhere}, {"hold_id": side.holds[number][:-1]}, {"hold_id": ""},
        {"hold_id": side.holds[number], "api_key": key}, {},
    ]  # fmt: skip
    return choice.choice(_ODD) if choice.random() < 0.05 else choice.choice(which) | used


def an_event(seed: float, side: Side) -> Any:
    choice = random.Random(seed)
    number, used = choice.randrange(16), told(choice)
    key_hash = hashlib.sha256(side.customers[number % 2].api_key.encode()).hexdigest()
    how = choice.choice(
        ({}, {"model": "gpt-4o-mini"}, {"model": "gpt-4o-mini", "attributes": {"service_tier": "flex"}})
    )
    event: dict[str, Any] = {"specversion": "1.0", "id": f"e{number}", "source": f"/{key_hash}", "type": "t"}
    which: list[Any] = [
        *[{"subject": key_hash, "data": used | how}] * 8, *[{"data": {"hold_id": side.holds[number]} | used}] * 3,
        {"data": used | {"api_key_hash": key_hash.upper()}}, {"subject": "0" * 64, "data": used | how}, {"data": used},
        {"subject": "0" * 64, "data": used | {"api_key_hash": key_hash}}, {"subject": key_hash}, {"subject": "no hash", "data": used},
        {"data": {"hold_id": side.elsewhere} | used}, {"data": {"hold_id": "none"} | used},
    ]  # fmt: skip
    return choice.choice(_ODD) if choice.random() < 0.05 else event | choice.choice(which)


@pytest.mark.parametrize("seed", range(4))
async def test_a_batch_of_settlements_is_answered_as_its_items_are_alone(shop: Rig, seed: int) -> None:
    mine, twin = [await a_side(shop) for _ in range(2)]
    seeds = [random.Random(seed).random() + place for place in range(60)]
    answered = [await shop.client.post("/v1/meter/settle", headers=await shop.service(), json=a_settle(each, mine)) for each in seeds]  # fmt: skip
    alone = [_alone(each, b'{"status":200,"charge":%s}' % each.content.rstrip(b"\n")) for each in answered]
    together = await shop.meter("settle/batch", settles=[a_settle(each, twin) for each in seeds])
    _must_be_alike(alone, together)
    assert len({each.status_code for each in answered}) == 3
    assert await shop.balance(mine.customers[0]) == await shop.balance(twin.customers[0])


@pytest.mark.parametrize("seed", range(4))
async def test_a_batch_of_events_is_answered_as_its_items_are_alone(shop: Rig, seed: int) -> None:
    mine, twin = [await a_side(shop) for _ in range(2)]
    seeds = [random.Random(seed).random() + place for place in range(60)]
    headers = await shop.service() | {"Content-Type": "application/cloudevents+json"}
    posts = [(json.dumps(an_event(each, mine)), json.dumps(an_event(each, twin))) for each in seeds]
    posts = [each for each in posts if not each[0].startswith("[")]  # alone that is a batch
    answered = [await shop.client.post("/v1/meter/events", headers=headers, content=one) for one, _ in posts]
    alone = [_alone(each, each.content.rstrip(b"\n").removeprefix(b'{"results":[').removesuffix(b'],"charged":1,"refused":0}')) for each in answered]  # fmt: skip
    body = f"[{','.join(other for _, other in posts)}]"
    _must_be_alike(alone, await shop.client.post("/v1/meter/events", headers=headers, content=body))
    assert len({each.status_code for each in answered}) >= 5
    assert await shop.balance(mine.customers[0]) == await shop.balance(twin.customers[0])


async def test_a_refused_key_of_an_event_is_told_by_the_name_of_its_field(shop: Rig) -> None:
    event = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "subject": "no key", "data": {"cost_usd": 1}}
    headers = await shop.service() | {"Content-Type": "application/json"}
    answer = await shop.client.post("/v1/meter/events", headers=headers, content=json.dumps(event))
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "data.api_key_hash")


async def test_batches_of_several_callers_at_once_charge_every_hold_once(shop: Rig) -> None:
    side = await a_side(shop)
    settles = [{"hold_id": hold_id, "cost_usd": "0.01"} for hold_id in side.holds] * 3
    answers = await asyncio.gather(*(shop.meter("settle/batch", settles=settles) for _ in range(6)))
    told = {answer.content for answer in answers}
    assert [answer.json()["charged"] for answer in answers] == [48] * 6
    assert len(told) == 1, "each is told the one charge that there is of its hold"
    assert [float(await shop.balance(each)) for each in side.customers] == [9.92, 11.92]


def _alone(answer: Response, verdict: bytes) -> bytes:
    """What a batch should say of it."""
    if answer.status_code == 200:
        return verdict
    error = msgspec.json.decode(answer.content, type=dict[str, msgspec.Raw])["error"]
    return b'{"status":%d,"error":%s}' % (answer.status_code, bytes(error))


def _must_be_alike(alone: Sequence[bytes], together: Response) -> None:
    assert together.status_code == 200, together.text
    found = msgspec.json.decode(together.content, type=dict[str, msgspec.Raw])
    verdicts = [bytes(each) for each in msgspec.json.decode(found["results"], type=list[msgspec.Raw])]
    assert _by_number(verdicts) == _by_number(alone)
    charged = sum(each.startswith(b'{"status":200') for each in alone)
    assert (int(bytes(found["charged"])), int(bytes(found["refused"]))) == (charged, len(alone) - charged)


def _by_number(verdicts: Sequence[bytes]) -> list[bytes]:
    """With the charges numbered as they came, so that a charge that is told again is seen to be the same."""
    numbers: dict[bytes, int] = {}
    return [
        _CHARGE_ID.sub(lambda found: b'"charge_id":%d' % numbers.setdefault(found[1], len(numbers)), each)
        for each in verdicts
    ]
