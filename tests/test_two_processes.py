"""Two processes over one database: what each keeps in memory is a hint, and one moment prices a call in both."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any, cast

import httpx
import pytest

from app.admin.tokens import create_token
from app.kernel.db import Database
from app.kernel.settings import Settings
from app.main import create_app
from app.pricing import rules
from app.pricing.catalogue import activate, store
from app.pricing.rows import Dimension, PriceRow
from app.wiring import build
from tests.rig import Customer, Rig, exact
from tests.wallets import FakeLightning, FakeWallets

D = Decimal
USED = {"input_tokens": 1000, "output_tokens": 0}


@pytest.fixture
async def other(rig: Rig, settings: Settings) -> AsyncIterator[Rig]:
    """A second process: its own caches, over the same database."""
    btcpay = FakeLightning()
    house = build(settings, rig.database_url, gateway=btcpay, wallets=FakeWallets(btcpay))
    await house.db.open()
    transport = httpx.ASGITransport(cast("Any", create_app(house)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
        yield Rig(client, house, rig.database_url, _service=await rig.service())
    await house.close()


async def a_version(db: Database, price_pusd: int, model: str = "m") -> int:
    prices = [PriceRow(model, "p", dimension, price_pusd) for dimension in (Dimension.INPUT, Dimension.OUTPUT)]
    return await db.transaction(lambda session: store(session, prices, (), source="test", source_hash="0"))


async def make_active(db: Database, version_id: int, notice_seconds: float = rules.NOTICE_SECONDS) -> None:
    await db.transaction(
        lambda session: activate(session, version_id, allow_drops=True, allow_leaps=True, notice_seconds=notice_seconds)
    )


async def ask(rig: Rig, customer: Customer, model: str = "m", **more: Any) -> Any:
    estimate = {"input_tokens": 1000, "max_output_tokens": 0}
    body = {"request_id": uuid.uuid4().hex, "api_key": customer.api_key, "model": model, "estimate": estimate} | more
    return exact(await rig.meter("authorize", **body))


async def test_a_version_that_one_process_does_not_know_yet_prices_its_settle(rig: Rig, other: Rig) -> None:
    customer = await rig.customer("10")
    await make_active(rig.house.db, await a_version(rig.house.db, 1000))
    await ask(other, customer)  # which has read the versions at this moment
    await make_active(rig.house.db, await a_version(rig.house.db, 2000), notice_seconds=0)
    rig.house.catalogues._fresh_until = None
    holds = [await ask(rig, customer) for _ in range(3)]
    assert {held["price_version"] for held in holds} == {2}
    settled = await other.meter("settle", hold_id=holds[0]["hold_id"], usage=USED)
    assert settled.status_code == 200, settled.text
    batch = exact(await other.meter("settle/batch", settles=[{"hold_id": holds[1]["hold_id"], "usage": USED}]))
    event = {
        "specversion": "1.0", "id": "1", "source": "s", "type": "t", "data": {"hold_id": holds[2]["hold_id"], "usage": USED},
    }  # fmt: skip
    told = exact(await other.meter("events", **event))
    costs = [exact(settled)["cost"], batch["results"][0]["charge"]["cost"], told["results"][0]["charge"]["cost"]]
    assert [cost["total_cost_usd"] for cost in costs] == [D("0.000002")] * 3


async def test_what_is_sold_for_the_first_time_is_sold_by_every_process_at_once(rig: Rig, other: Rig) -> None:
    customer = await rig.customer("10")
    assert (await ask(other, customer))["error"]["code"] == "model_not_priced"
    await make_active(rig.house.db, await a_version(rig.house.db, 1000))
    assert (await ask(other, customer))["decision"] == "allow"


async def test_a_version_that_is_gone_never_refuses_a_settle(rig: Rig) -> None:
    customer = await rig.customer("10")
    await make_active(rig.house.db, await a_version(rig.house.db, 1000))
    held = await ask(rig, customer)
    rig.sql("DELETE FROM price")
    rig.sql("DELETE FROM price_version")
    rig.house.catalogues._fresh_until = None
    done = exact(await rig.meter("settle", hold_id=held["hold_id"], usage=USED))
    assert (done["cost"]["total_cost_usd"], done["flags"]) == (D("0.000001"), ["not_priced"])


async def test_a_key_and_a_token_that_one_process_has_seen_refused_work_there_once_they_are_made(
    rig: Rig, other: Rig
) -> None:
    customer = await rig.customer("10")
    key = await rig.new_key(customer)
    assert (await other.authorize(key["api_key"], "0.1"))["decision"] == "allow"
    await rig.client.delete(f"/keys/{key['_id']}", headers=customer.owner)
    denied = await other.authorize(key["api_key"], "0.1")
    assert (denied["status"], denied["error"]["code"]) == (401, "invalid_api_key")
    token = await create_token(rig.house.db, rig.house.settings.pepper, "service", "second")
    answer = await other.client.post(
        "/v1/meter/authorize", headers={"Authorization": f"Bearer {token}"},
        json={"request_id": "r", "api_key": customer.api_key, "max_cost_usd": 1},
    )  # fmt: skip
    assert answer.json()["decision"] == "allow"


@pytest.mark.parametrize("what", ["version", "override", "markup", "fee"])
async def test_calls_that_race_a_dearer_price_are_charged_what_they_were_held_for(
    rig: Rig, other: Rig, what: str
) -> None:
    """Each call is held for by one process and settled by the other, while the price rises to its 98-fold."""
    customer = await rig.customer("10")
    db = rig.house.db
    await make_active(db, await a_version(db, 1000))
    await db.transaction(lambda s: rules.set_fee(s, "web", 1000, notice_seconds=0))
    dearer = await a_version(db, 98_000)
    calls: list[tuple[Decimal, Decimal]] = []
    is_raised = asyncio.Event()

    async def call(holding: Rig, settling: Rig) -> None:
        features = ["web"] if what == "fee" else []
        held = await ask(holding, customer, features=features)
        settled = exact(await settling.meter("settle", hold_id=held["hold_id"], usage=USED, features_used=features))
        calls.append((held["hold_usd"], settled["cost"]["total_cost_usd"]))

    async def traffic(holding: Rig, settling: Rig) -> None:
        while not is_raised.is_set():
            await call(holding, settling)
            await asyncio.sleep(0.05)
        await call(holding, settling)

    async def raise_the_price() -> None:
        await asyncio.sleep(0.3)
        match what:
            case "version":
                await make_active(db, dearer)
            case "override":
                await db.transaction(lambda s: rules.set_override(s, "m", Dimension.INPUT, 98_000))
            case "markup":
                await db.transaction(lambda s: rules.set_markup(s, "default", multiplier_ppm=98_000_000))
            case _:
                await db.transaction(lambda s: rules.set_fee(s, "web", 98_000))
        await asyncio.sleep(rules.NOTICE_SECONDS + 0.5)
        is_raised.set()

    pairs = [(rig, other), (other, rig), (rig, rig), (other, other)]
    await asyncio.gather(raise_the_price(), *(traffic(*pair) for pair in pairs))
    assert all(held == cost for held, cost in calls), [call for call in calls if call[0] != call[1]][:5]
    assert calls[0][0] < calls[-1][0], "the price was raised"
    await rig.audit()


async def test_a_version_that_was_to_begin_is_taken_back_by_the_one_in_effect(rig: Rig) -> None:
    customer = await rig.customer("10")
    db = rig.house.db
    first, second = await a_version(db, 1000), await a_version(db, 98_000)
    await make_active(db, first)
    await make_active(db, second)
    assert (await ask(rig, customer))["price_version"] == first
    await make_active(db, first)
    rig.sql("UPDATE price_version SET activated_at = activated_at - interval '1 minute'")  # that minute has passed
    rig.house.catalogues._fresh_until = None
    assert (await ask(rig, customer))["price_version"] == first
    assert rig.sql("SELECT id, state FROM price_version ORDER BY id") == [(first, "active"), (second, "retired")]


async def test_a_repeat_is_told_what_its_first_was_held_for(rig: Rig, other: Rig) -> None:
    customer = await rig.customer("10")
    await make_active(rig.house.db, await a_version(rig.house.db, 1000))
    first = await ask(rig, customer, request_id="same")
    await make_active(rig.house.db, await a_version(rig.house.db, 2000), notice_seconds=0)
    again = await ask(other, customer, request_id="same")
    assert {name: again[name] for name in first} == first | {"available_usd": again["available_usd"], "repeat": True}


async def test_a_call_that_a_gateway_asked_for_is_priced_by_the_version_of_its_ask(rig: Rig) -> None:
    customer = await rig.customer("10")
    await make_active(rig.house.db, await a_version(rig.house.db, 1000))
    token = (await rig.service())["Authorization"].split()[1]
    asked = await rig.client.get(
        "/v1/meter/ext-authz", headers=customer.key | {"X-Service-Token": f"{token}; id=1; model=m"}
    )
    await make_active(rig.house.db, await a_version(rig.house.db, 98_000), notice_seconds=0)
    rig.house.catalogues._fresh_until = None
    done = exact(await rig.meter("settle", hold_id=asked.headers["x-billing-request-id"], usage=USED))
    assert done["cost"]["total_cost_usd"] == D("0.000001")
