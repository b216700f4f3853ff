"""Every charge is explained: its lines, exact, add up to what was taken, to the nano-dollar."""

import asyncio
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.activity.api import Explanation
from app.activity.explain import Explained, lines_of
from app.kernel.db import Database, new_id
from app.kernel.settings import Settings
from app.metering.priced import Cost, Pricer
from app.pricing.catalogue import Catalogues
from app.pricing.quote import Call
from app.pricing.rows import Usage
from app.pricing.starter import ensure_starter
from tests.activity.conftest import Past
from tests.rig import exact

D = Decimal
COUNTS = st.integers(0, 10**9) | st.integers(0, 300)


class Desk:
    """The real Pricer over the starter catalogue, in an event loop of its own, so that hypothesis may ask it."""

    def __init__(self, runner: asyncio.Runner, url: str) -> None:
        self._runner, self._db = runner, Database(url, pool_size=2)
        self._pricer = Pricer(self._db, Catalogues())

    async def open(self) -> None:
        await self._db.open()
        await ensure_starter(self._db)

    async def close(self) -> None:
        await self._db.close()

    def cost(self, call: Call, used: Usage) -> Cost:
        return self._runner.run(self._pricer.cost(None, call, call, used, datetime.now(UTC), 10**9))


@pytest.fixture
def desk(clean: str, settings: Settings) -> Iterator[Desk]:
    with asyncio.Runner() as runner:
        desk = Desk(runner, clean)
        runner.run(desk.open())
        yield desk
        runner.run(desk.close())


def told(cost: Cost) -> Any:
    """The answer's JSON for a call that cost this, kept and read again as the database does it."""
    kept = json.loads(json.dumps(cost.lines))
    charge = {
        "id": new_id(), "account_id": uuid.uuid4(), "model": "m", "provider": None, "price_version": cost.price_version,
        "served_model": None, "priced_as": kept and kept["model"],
        "flags": ",".join(cost.flags), "cost_nusd": cost.cost_nusd, "refunded_nusd": 0,
    }  # fmt: skip
    found = Explanation.of(Explained(charge, lines_of(kept, cost.cost_nusd, ",".join(cost.flags))))
    return json.loads(msgspec.json.encode(found), parse_float=D, parse_int=D)


def test_the_lines_of_any_call_add_up_to_its_charge(desk: Desk) -> None:
    calls = st.sampled_from(["gpt-4o-mini", "gpt-4o", "claude-sonnet-4-5", "gemini-2.5-flash", "claude-haiku-4-5"])
    media = st.sampled_from([("dall-e-3", "images"), ("whisper-1", "audio_seconds"), ("tts-1", "characters"), ("veo3", "video_seconds")])  # fmt: skip

    @hypothesis_settings(max_examples=150, deadline=None)
    @given(calls, COUNTS, COUNTS, COUNTS, st.booleans(), media, st.integers(1, 5000))
    def adds_up(
        model: str, read: int, written: int, cached: int, searched: bool, other: tuple[str, str], count: int
    ) -> None:
        features = ("web",) if searched else ()
        tokens = Usage(input_tokens=read, output_tokens=written, cache_read_tokens=min(cached, read))
        for call, used in (
            (Call(model, features=features), tokens),
            (Call(other[0]), Usage(**{other[1]: count})),
            (Call("nobody-sells-this"), tokens),
        ):
            cost = desk.cost(call, used)
            answer = told(cost)
            lines = answer["lines"]
            assert all(line["units"] * line["unit_price_usd"] * line["markup"] == line["amount_usd"] for line in lines)
            assert sum(line["amount_usd"] for line in lines) == answer["exact_usd"]
            assert answer["exact_usd"] + answer["rounding_usd"] == answer["charged_usd"]
            assert 0 <= answer["rounding_usd"] < D("1e-9")
            assert answer["charged_usd"] == D(cost.cost_nusd).scaleb(-9)

    adds_up()


async def test_a_priced_charge_is_explained_by_its_id_and_by_its_charge_id(past: Past) -> None:
    await ensure_starter(past.rig.house.db)
    customer = await past.rig.customer("10")
    made = exact(
        await past.rig.meter(
            "charge", request_id="c", api_key=customer.api_key, model="gpt-4o-mini",
            usage={"input_tokens": 1001, "output_tokens": 7, "cache_read_tokens": 500},
        )
    )  # fmt: skip
    by_charge = await past.ask(f"/activity/{made['charge_id']}/explain", customer)
    [call] = (await past.ask("/queries/history", customer))["data"]
    assert await past.ask(f"/activity/{call['id']}/explain", customer) == by_charge
    assert by_charge["charge_id"] == made["charge_id"]
    assert by_charge["charged_usd"] == by_charge["net_usd"] == made["cost"]["total_cost_usd"] == call["price_in_usd"]
    lines = {line["name"]: line for line in by_charge["lines"]}
    assert (lines["input"]["units"], lines["cache_read"]["units"], lines["output"]["units"]) == (501, 500, 7)
    assert lines["output"]["unit_price_usd"] == D("0.0000006")
    assert sum(line["amount_usd"] for line in lines.values()) + by_charge["rounding_usd"] == by_charge["charged_usd"]
    assert (by_charge["model"], by_charge["provider"], by_charge["price_version"]) == ("gpt-4o-mini", "openai", 1)


@pytest.mark.parametrize(
    ("served", "priced_as"), [("gpt-4o", "gpt-4o"), ("home-made", "gpt-4o-mini"), (None, "gpt-4o-mini")]
)
async def test_the_model_that_was_priced_is_named_besides_the_one_that_was_asked_for(
    past: Past, served: str | None, priced_as: str
) -> None:
    await ensure_starter(past.rig.house.db)
    customer = await past.rig.customer("10")
    held = await past.rig.authorize(customer.api_key, "1", model="gpt-4o-mini")
    usage = {"input_tokens": 1000, "output_tokens": 10}
    done = exact(await past.rig.meter("settle", hold_id=held["hold_id"], usage=usage, served_model=served))
    answer = await past.ask(f"/activity/{done['charge_id']}/explain", customer)
    assert (answer["model"], answer["served_model"], answer["priced_as"]) == ("gpt-4o-mini", served, priced_as)


async def test_a_call_that_came_priced_has_one_line_and_tells_its_refund(past: Past) -> None:
    customer = await past.rig.customer("10")
    made = await past.charge(customer, "0.000045", model="m", usage_estimated=True)
    await past.rig.meter("refund", charge_id=made["charge_id"], amount_usd="0.000005")
    answer = await past.ask(f"/activity/{made['charge_id']}/explain", customer)
    assert answer["lines"] == [
        {
            "kind": "call",
            "name": "given",
            "units": 1,
            "unit_price_usd": D("0.000045"),
            "markup": 1,
            "amount_usd": D("0.000045"),
        }
    ]
    assert (answer["charged_usd"], answer["refunded_usd"], answer["net_usd"]) == (
        D("0.000045"),
        D("0.000005"),
        D("0.00004"),
    )
    assert (answer["rounding_usd"], answer["flags"], answer["price_version"]) == (0, ["usage_estimated"], None)
    assert answer["priced_as"] is None


async def test_anothers_charge_is_404_exactly_as_a_missing_one(past: Past) -> None:
    customer, stranger = await past.rig.customer("10"), await past.rig.customer("10")
    made = await past.charge(stranger, "0.01")
    [theirs] = (await past.ask("/queries/history", stranger))["data"]
    bodies = set()
    for bad in (made["charge_id"], theirs["id"], str(uuid.uuid4()), "x", "%00", "a%ff", "x" * 5000, made["charge_id"][:-1], "١" * 32):  # fmt: skip
        refused = await past.rig.client.get(f"/activity/{bad}/explain", headers=customer.owner)
        assert refused.status_code == 404, bad
        bodies.add(refused.text)
    assert len(bodies) == 1
