"""The seam for a real chain: a node that is polled, is away at times, and cannot be driven."""

import asyncio
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import httpx

from app.sandbox.btcpay import create_sandbox
from app.sandbox.chain import Chain
from app.sandbox.invoices import Seen

from .conftest import INVOICES, Receiver, Shop, a_config, living


class Node:
    """A node as `litecoind -regtest` would be behind the Chain protocol."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.is_away = False

    async def new_address(self) -> str:
        self._answer()
        return "rltc1qnode"

    async def payments_to(self, address: str) -> Sequence[Seen]:
        self._answer()
        return list(self.seen)

    def _answer(self) -> None:
        if self.is_away:
            raise ConnectionRefusedError("node is away")


async def test_a_real_chain_is_polled_and_survives_its_absence(tmp_path: Path, receiver: Receiver) -> None:
    node = Node()
    assert isinstance(node, Chain)
    app = create_sandbox(
        a_config(tmp_path), chains={"LTC-CHAIN": node}, webhook_transport=httpx.MockTransport(receiver.handle)
    )
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    async with living(app), httpx.AsyncClient(transport=transport, base_url="http://sandbox.test") as client:
        shop = Shop(client, receiver)
        id = (await shop.create("LTC-CHAIN"))["id"]
        assert (await shop.methods(id))[0]["destination"] == "rltc1qnode"
        node.is_away = True
        refused = await shop.api("POST", INVOICES, json={"amount": "5", "checkout": {"paymentMethods": ["LTC"]}})
        assert refused.status_code == 400
        await asyncio.sleep(1.1)  # one tick finds the node away
        node.is_away = False
        node.seen = [Seen("tx-0", Decimal("0.125"), 1, 1_800_000_000)]
        for _ in range(40):
            if (await shop.get(id))["status"] == "Settled":
                break
            await asyncio.sleep(0.1)
        assert (await shop.get(id))["status"] == "Settled"
        driven = await client.post(f"/sandbox/invoices/{id}/pay")
        assert (driven.status_code, driven.json()["code"]) == (409, "impossible")
