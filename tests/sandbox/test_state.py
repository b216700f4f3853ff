"""What survives a restart, what does not, and how it is kept."""

import asyncio
import stat
from pathlib import Path
from typing import Any

import bolt11

from app.sandbox.backend import Clock
from app.sandbox.lightning import LightningNode
from app.sandbox.store import Store

from .conftest import SECRET, Opener


async def test_open_invoices_stay_payable_over_a_restart(open_shop: Opener) -> None:
    async with open_shop() as shop:
        lightning, chain = await shop.create("BTC-LN"), await shop.create("LTC-CHAIN")
        await shop.drive(chain["id"], "pay")
        before = [await shop.methods(invoice["id"]) for invoice in (lightning, chain)]
    async with open_shop() as shop:
        assert [await shop.methods(invoice["id"]) for invoice in (lightning, chain)] == before
        assert (await shop.drive(lightning["id"], "pay"))["status"] == "Settled"
        assert (await shop.drive(chain["id"], "confirm"))["status"] == "Settled"
        newer = await shop.create()
        listed = (await shop.client.get("/sandbox/invoices")).json()
        assert [invoice["id"] for invoice in listed] == [newer["id"], chain["id"], lightning["id"]]


async def test_what_expired_meanwhile_is_told_at_the_start(open_shop: Opener, tmp_path: Path) -> None:
    async with open_shop() as shop:
        await shop.create(checkout={"expirationMinutes": 0.5})
        assert await shop.all_told() == ["InvoiceCreated"]
    Clock(Store(tmp_path / "sandbox")).move(31)
    async with open_shop() as shop:
        await asyncio.sleep(0.05)
        assert await shop.all_told() == ["InvoiceCreated", "InvoiceExpired"]


async def test_the_clock_and_the_node_key_are_remembered(open_shop: Opener) -> None:
    async def payee(shop: Any) -> Any:
        return bolt11.decode((await shop.methods((await shop.create())["id"]))[0]["destination"]).payee

    async with open_shop() as shop:
        await shop.world("clock", advance_seconds=5000)
        node = await payee(shop)
    async with open_shop() as shop:
        assert (await shop.client.get("/sandbox/")).json()["clockAheadSeconds"] == 5000
        assert await payee(shop) == node


async def test_every_file_is_its_owners_alone(open_shop: Opener, tmp_path: Path) -> None:
    async with open_shop() as shop:
        await shop.drive((await shop.create())["id"], "pay")
        await shop.all_told()
    files = [path for path in (tmp_path / "sandbox").rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"node", "invoices", "webhooks", "deliveries", "bolt11"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_secrets_do_not_show(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    request = LightningNode(store).request("invoice", 1000, "text", 1_800_000_000, 1_800_000_900)
    assert request.preimage not in repr(request)
    assert SECRET not in repr(store)


def test_a_journal_survives_a_line_cut_short(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    for record in ("one", "two"):
        store.append("log", "x", record)
    path = tmp_path / "state" / "log" / "x.jsonl"
    path.write_bytes(path.read_bytes() + b'"thr')
    assert store.journal("log", "x", str) == ["one", "two"]


def test_an_odd_id_never_leaves_its_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.put("things", "../../escaped", "x")
    assert store.get("things", "../../escaped", str) == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
