"""Short words for what the tests of notices do."""

from datetime import UTC, datetime, timedelta
from typing import Any

from tests.rig import Customer, Rig


async def set_notices(rig: Rig, customer: Customer, **wanted: Any) -> Any:
    answer = await rig.client.put("/notices", headers=customer.owner, json=wanted)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def deliver(rig: Rig, *, after: timedelta = timedelta(0)) -> int:
    """A turn of the courier, as if so much time had passed; waits until everything it began is done."""
    begun = await rig.house.courier.deliver(datetime.now(UTC) + after)
    await rig.house.courier.idle()
    return begun


async def deliveries(rig: Rig, customer: Customer, **query: Any) -> list[Any]:
    answer = await rig.client.get("/notices/deliveries", headers=customer.owner, params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


async def spend(rig: Rig, customer: Customer, usd: str) -> None:
    held = await rig.authorize(customer.api_key, usd)
    assert held["decision"] == "allow", held
    await rig.settle(held["hold_id"], usd)


def told(rig: Rig, type: str) -> list[dict[str, Any]]:
    """The data of every notice of a type, oldest first, whoever it is to."""
    return [data for (data,) in rig.sql("SELECT data FROM notice WHERE type = %s ORDER BY created_at, id", type)]
