"""The real chains' side of the conversation, over nodes that answer as litecoind and monero-wallet-rpc were seen to."""

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from app.kernel.settings import SettingsError, load
from app.sandbox.btcpay import create_sandbox
from app.sandbox.chain import Chain
from app.sandbox.invoices import Invoice, Prompt, Seen, Status, observe
from app.sandbox.litecoin import LitecoinChain
from app.sandbox.methods import METHODS
from app.sandbox.monero import MoneroChain
from app.sandbox.node import Node, NodeAway, NodeRefused, Sightings, merged
from app.sandbox.store import Store

from .conftest import INVOICES, Opener, Receiver, Shop, a_config, living

NOW = 1_800_000_000
FIRST, SECOND = "a1" * 32, "b2" * 32


class FakeNode:
    """Answers each method with the JSON text it was given, or with an error; remembers what it was asked."""

    def __init__(self, **answers: str) -> None:
        self.answers = answers
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.seen: list[httpx.Request] = []

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        body = json.loads(request.content)
        self.asked.append((body["method"], body["params"]))
        text = self.answers.get(body["method"], "null")
        if text.startswith("error"):
            code = int(text.removeprefix("error"))
            return httpx.Response(500, json={"result": None, "error": {"code": code, "message": "no"}, "id": "sandbox"})
        return httpx.Response(200, content=f'{{"result": {text}, "error": null, "id": "sandbox"}}')

    def node(self, name: str = "litecoind") -> Node:
        return Node(name, "http://u:p%40ss@127.0.0.1:19443/wallet/merchant", httpx.MockTransport(self.handle))


def sightings(method: str, tmp_path: Path, now: Callable[[], int] = lambda: NOW) -> Sightings:
    return Sightings(METHODS[method], Store(tmp_path), now)


def listed(txid: str, amount: str, confirmations: int, **more: Any) -> str:
    """An entry of listtransactions with the amount's digits exactly as given."""
    entry = {"address": "rltc1q", "category": "receive", "vout": 1, "txid": txid, "confirmations": confirmations}
    return json.dumps({**entry, **more})[:-1] + f', "amount": {amount}}}'


# The conversation


async def test_a_password_signs_in_and_shows_nowhere() -> None:
    fake = FakeNode(getblockcount="7")
    node = fake.node()
    assert await node.ask(int, "getblockcount") == 7
    assert fake.seen[0].headers["authorization"].startswith("Basic ")
    assert "p%40ss" not in repr(node) + str(fake.seen[0].url)
    fake.answers["getblockcount"] = "error-18"
    with pytest.raises(NodeRefused) as refused:
        await node.ask(int, "getblockcount")
    assert refused.value.code == -18
    assert "ss@" not in str(refused.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.Response(401), "HTTP 401"),
        (httpx.Response(200, content=b'{"result": tru'), "rubbish"),
        (httpx.Response(200, content=b'{"result": "seven"}'), "rubbish"),
        (httpx.Response(200, content=b"{}"), "nothing"),
        (httpx.ReadTimeout("slow"), "ReadTimeout"),
    ],
)
async def test_whatever_is_no_answer_is_a_node_that_is_away(answer: httpx.Response | Exception, says: str) -> None:
    def handle(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(NodeAway, match=says):
        await Node("litecoind", "http://127.0.0.1:1", httpx.MockTransport(handle)).ask(int, "getblockcount")
    assert issubclass(NodeAway, OSError)


@pytest.mark.parametrize("url", ["127.0.0.1:19443", "ftp://127.0.0.1", "", "http://[::1"])
def test_what_is_no_address_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="the address of litecoind"):
        Node("litecoind", url)


# Litecoin


async def test_a_litecoin_amount_keeps_every_digit(tmp_path: Path) -> None:
    fake = FakeNode(getnewaddress='"rltc1q"', listtransactions=f"[{listed(FIRST, '83999999.99999999', 1)}]")
    chain = LitecoinChain(fake.node(), sightings("LTC-CHAIN", tmp_path))
    assert isinstance(chain, Chain)
    assert await chain.new_address() == "rltc1q"
    assert list(await chain.payments_to("rltc1q")) == [Seen(f"{FIRST}-1", Decimal("83999999.99999999"), 1, NOW)]


async def test_an_unconfirmed_litecoin_payment_is_replaced_once_the_node_refuses_it(tmp_path: Path) -> None:
    fake = FakeNode(getnewaddress='"rltc1q"', gettransaction='{"hex": "00"}', sendrawtransaction=f'"{FIRST}"')
    fake.answers["listtransactions"] = f"[{listed(FIRST, '0.1', 0, **{'bip125-replaceable': 'yes'})}]"
    chain = LitecoinChain(fake.node(), sightings("LTC-CHAIN", tmp_path))
    await chain.new_address()
    (waiting,) = await chain.payments_to("rltc1q")
    assert (waiting.replaced, waiting.replaceable) == (False, True)
    for code, is_replaced in ((-25, True), (-26, True), (-27, False)):
        fake.answers["sendrawtransaction"] = f"error{code}"
        (payment,) = await chain.payments_to("rltc1q")
        assert payment.replaced is is_replaced
    fake.answers["sendrawtransaction"] = "error-28"
    with pytest.raises(NodeRefused):
        await chain.payments_to("rltc1q")


async def test_litecoin_that_a_block_spent_otherwise_is_replaced_though_the_node_lists_it_no_more(
    tmp_path: Path,
) -> None:
    now = [NOW]
    fake = FakeNode(getnewaddress='"rltc1q"', listtransactions=f"[{listed(FIRST, '0.1', 1)}]")
    chain = LitecoinChain(fake.node(), sightings("LTC-CHAIN", tmp_path, lambda: now[0]))
    await chain.new_address()
    await chain.payments_to("rltc1q")
    now[0] += 60
    fake.answers["listtransactions"] = f"[{listed(SECOND, '0.1', 1, walletconflicts=[FIRST])}]"
    # A restart remembers too.
    again = LitecoinChain(fake.node(), sightings("LTC-CHAIN", tmp_path, lambda: now[0]))
    gone, came = await again.payments_to("rltc1q")
    assert (gone.id, gone.replaced, gone.confirmations, gone.seen_at) == (f"{FIRST}-1", True, 0, NOW)
    assert (came.id, came.replaced, came.conflicts, came.seen_at) == (f"{SECOND}-1", False, (FIRST,), NOW + 60)


async def test_what_is_no_payment_of_the_address_is_not_listed(tmp_path: Path) -> None:
    entries = [listed(FIRST, "0.1", 1, category="immature"), listed(FIRST, "-0.1", 1, category="send")]
    fake = FakeNode(getnewaddress='"rltc1q"', listtransactions=f"[{', '.join(entries)}]")
    chain = LitecoinChain(fake.node(), sightings("LTC-CHAIN", tmp_path))
    await chain.new_address()
    assert list(await chain.payments_to("rltc1q")) == []


# Monero


def transfer(txid: str, amount: int, minor: int = 3, **more: Any) -> dict[str, Any]:
    return {"txid": txid, "amount": amount, "subaddr_index": {"major": 0, "minor": minor}, "locked": True, **more}


def a_wallet(**transfers: Any) -> FakeNode:
    return FakeNode(
        create_address='{"address": "8x", "address_index": 3}',
        get_address_index='{"index": {"major": 0, "minor": 3}}',
        get_transfers=json.dumps(transfers),
    )


async def test_a_monero_payment_is_told_to_the_piconero_from_pool_to_spendable(tmp_path: Path) -> None:
    fake = a_wallet(pool=[transfer(FIRST, 18_000_000_123_456_789_012)])
    chain = MoneroChain(fake.node("monero-wallet-rpc"), sightings("XMR-CHAIN", tmp_path))
    assert isinstance(chain, Chain)
    address = await chain.new_address()
    id, value = f"{FIRST}#0#3", Decimal("18000000.123456789012")
    assert list(await chain.payments_to(address)) == [Seen(id, value, 0, NOW)]
    steps = ((9, True, 9), (10, False, 10), (14, True, 9), (20, False, 20))
    for confirmations, is_locked, counted in steps:
        mined = transfer(FIRST, 18_000_000_123_456_789_012, confirmations=confirmations, locked=is_locked)
        fake.answers["get_transfers"] = json.dumps({"in": [mined], "pool": [transfer(FIRST, 1)]})
        assert list(await chain.payments_to(address)) == [Seen(id, value, counted, NOW)]
    assert ("refresh", {}) in fake.asked
    assert {"in": True, "pool": True, "account_index": 0, "subaddr_indices": [3]} in [asked[1] for asked in fake.asked]


async def test_a_monero_payment_that_is_no_longer_shown_is_unconfirmed(tmp_path: Path) -> None:
    fake = a_wallet(**{"in": [transfer(FIRST, 10**12, confirmations=10, locked=False), transfer(SECOND, 1, 4)]})
    chain = MoneroChain(fake.node(), sightings("XMR-CHAIN", tmp_path))
    address = await chain.new_address()
    assert [payment.confirmations for payment in await chain.payments_to(address)] == [10]
    fake.answers["get_transfers"] = "{}"
    (lost,) = await chain.payments_to(address)
    assert (lost.confirmations, lost.replaced) == (0, False)


# What is remembered


def test_a_payment_stays_as_old_as_at_first_sight() -> None:
    known = (Seen("a", Decimal(1), 0, 5), Seen("b", Decimal(2), 0, 6))
    shown = (Seen("c", Decimal(3), 1, 9), Seen("b", Decimal(2), 4, 9))
    payments = merged(known, shown, lambda lost: replace(lost, replaced=True))
    assert payments == (
        Seen("a", Decimal(1), 0, 5, replaced=True),
        Seen("b", Decimal(2), 4, 6),
        Seen("c", Decimal(3), 1, 9),
    )


@pytest.mark.parametrize("chain", [LitecoinChain, MoneroChain])
async def test_an_address_of_another_chain_is_not_asked_about(tmp_path: Path, chain: Any) -> None:
    fake = FakeNode()
    assert list(await chain(fake.node(), sightings("LTC-CHAIN", tmp_path)).payments_to("simulated")) == []
    assert fake.asked == []


# In the sandbox


@pytest.mark.parametrize("method", ["LTC-CHAIN", "XMR-CHAIN"])
async def test_with_its_node_down_a_method_cannot_be_asked_for_and_the_others_can(
    open_shop: Opener, method: str
) -> None:
    nowhere = "http://user:secret-word@127.0.0.1:9"
    async with open_shop(litecoin_rpc=f"{nowhere}/wallet/w", monero_wallet_rpc=nowhere) as shop:
        body = {"amount": "20", "checkout": {"paymentMethods": [method]}}
        refused = await shop.api("POST", INVOICES, json=body)
        assert (refused.status_code, refused.json()["code"]) == (400, "generic-error")
        assert refused.json()["message"].startswith("Error retrieving a matching payment method or rate.")
        assert "Full node not available" in refused.json()["message"]
        assert "secret-word" not in refused.text
        await shop.create("BTC-LN")
        both = await shop.create(method, checkout={"paymentMethods": [method, "BTC-CHAIN"]})
        assert [offered["paymentMethodId"] for offered in await shop.methods(both["id"])] == ["BTC-CHAIN"]


async def test_simulated_payments_outlive_the_change_to_a_real_node(open_shop: Opener, tmp_path: Path) -> None:
    async with open_shop() as shop:
        id = (await shop.create("LTC-CHAIN"))["id"]
        await shop.drive(id, "pay")
        await shop.drive(id, "confirm")
    fake = FakeNode(listtransactions="[]")
    chain = LitecoinChain(fake.node(), Sightings(METHODS["LTC-CHAIN"], Store(tmp_path / "sandbox"), lambda: NOW))
    app = create_sandbox(a_config(tmp_path / "sandbox"), chains={"LTC-CHAIN": chain})
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    async with living(app), httpx.AsyncClient(transport=transport, base_url="http://sandbox.test") as client:
        shop = Shop(client, Receiver())
        await shop.world("clock", advance_seconds=1)  # ticks, and so polls
        invoice = (await client.get(f"/sandbox/invoices/{id}")).json()
        assert invoice["status"] == "Settled"
        assert [payment["status"] for payment in invoice["paymentMethods"][0]["payments"]] == ["Settled"]


def test_a_node_that_is_no_address_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="litecoind"):
        create_sandbox(a_config(tmp_path, litecoin_rpc="127.0.0.1:19443"))
    config = a_config(
        tmp_path, litecoin_rpc="http://u:hidden@127.0.0.1:1", monero_wallet_rpc="http://u:hidden@127.0.0.1:1"
    )
    assert "hidden" not in repr(config)


@pytest.mark.parametrize("name", ["SANDBOX_LITECOIN_RPC", "SANDBOX_MONERO_WALLET_RPC"])
def test_a_nodes_address_is_a_secret_setting_of_development(tmp_path: Path, name: str) -> None:
    url = "http://user:hidden@127.0.0.1:19443/wallet/merchant"
    settings = load({"DATA_DIR": str(tmp_path), name: url})
    assert url in (settings.sandbox_litecoin_rpc, settings.sandbox_monero_wallet_rpc)
    assert "hidden" not in repr(settings)
    with pytest.raises(SettingsError, match=f"{name} must be") as refused:
        load({"DATA_DIR": str(tmp_path), name: "user:hidden@127.0.0.1"})
    assert "hidden" not in str(refused.value)
    with pytest.raises(SettingsError, match=f"{name} is set"):
        load({"ENVIRONMENT": "production", name: url})


def test_who_replaces_a_payment_pays_no_fee_for_a_second_one() -> None:
    invoice = Invoice(
        id="i", number=1, store_id="s", price=Decimal(20), currency="USD", is_topup=False, metadata={}, checkout={},
        speed="MediumSpeed", tolerance=Decimal(0), created_at=NOW, expires_at=NOW + 900, watched_until=NOW + 9000,
        prompts=(Prompt("LTC-CHAIN", Decimal(80), Decimal(0), "rltc1q"),),
    )  # fmt: skip
    first = Seen(f"{FIRST}-0", Decimal("0.25"), 0, NOW)
    seen = observe(invoice, "LTC-CHAIN", "rltc1q", [first], NOW).invoice
    replacement = Seen(f"{SECOND}-1", Decimal("0.25"), 0, NOW, conflicts=(FIRST,))
    bumped = observe(seen, "LTC-CHAIN", "rltc1q", [replace(first, replaced=True), replacement], NOW).invoice
    assert bumped.status is Status.PROCESSING
    assert [payment.fee for payment in bumped.payments] == [0, 0]
    stranger = replace(replacement, conflicts=())
    another = observe(seen, "LTC-CHAIN", "rltc1q", [replace(first, replaced=True), stranger], NOW).invoice
    assert another.status is Status.NEW
    assert another.payments[1].fee == Decimal("0.00001")
