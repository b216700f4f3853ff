"""An account in an agent's hands: the official client drives `satmeter mcp`, in this process, over stdio and over HTTP."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="the extra `mcp` is not installed")

from mcp import Client, StdioServerParameters

from app.agents.server import make_server
from app.agents.wire import Account, Refused
from app.cli import main
from app.kernel.settings import Settings
from app.main import create_app
from app.wiring import build
from tests.integration.street import _served
from tests.program import free_ports
from tests.rig import Customer, Rig
from tests.wallets import NWC_URL

READS = {"balance", "activity", "explain_charge", "topup_status"}
SPENDING = {"create_topup", "connect_wallet", "create_child_key"}


@pytest.fixture
def url(rig: Rig, settings: Settings) -> Iterator[str]:
    [port] = free_ports(1)
    with _served(create_app(build(settings, rig.database_url, gateway=rig.btcpay, wallets=rig.house.wallets)), port):
        yield f"http://127.0.0.1:{port}"


async def told(client: Client, tool: str, **arguments: Any) -> Any:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return result.structured_content


async def test_an_agent_reads_its_account_and_commits_money_only_where_that_is_allowed(rig: Rig, url: str) -> None:
    customer = await rig.customer("10")
    charged = (await rig.meter("charge", request_id="r1", api_key=customer.api_key, cost_usd="0.25", model="m")).json()
    async with Client(make_server(Account(url, customer.credit_id), allow_spend=False)) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == READS
        assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools.values())
        assert (await told(client, "balance"))["available"] == 9.75
        [row] = (await told(client, "activity", limit=5))["data"]
        assert (row["model"], row["price_in_usd"]) == ("m", 0.25)
        explained = await told(client, "explain_charge", charge_id=charged["charge_id"])
        assert "0.25" in json.dumps(explained)
        refused = await client.call_tool("explain_charge", {"charge_id": "../../keys"})
        assert refused.is_error
        assert (await client.call_tool("create_topup", {"amount": 5})).is_error
    assert rig.sql("SELECT count(*) FROM topup") == [(1,)]


async def test_an_agent_that_may_spend_tops_up_connects_a_wallet_and_makes_a_bounded_key(rig: Rig, url: str) -> None:
    customer = await rig.customer("10")
    async with Client(make_server(Account(url, customer.credit_id), allow_spend=True)) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == READS | SPENDING
        topup = await told(client, "create_topup", amount=5)
        assert topup["lightning_invoice"].startswith("ln")
        rig.btcpay.pay(topup["invoice_id"])
        await rig.poll()
        assert (await told(client, "topup_status", invoice_id=topup["invoice_id"]))["status"] == "Settled"
        key = (await told(client, "create_child_key", name="tool", usage_limit_usd=0.5, reset_period="daily"))["data"]
        assert key["usage_limit_usd"] == 0.5
        assert (await rig.authorize(key["api_key"], "0.6"))["error"]["code"] == "key_limit_exceeded"
        assert (await rig.authorize(key["api_key"], "0.4"))["decision"] == "allow"
        wallet = await told(client, "connect_wallet", nwc_url=NWC_URL, threshold_usd=5, topup_amount_usd=10)
        assert wallet["data"]["enabled"] is True
        assert "secret" not in json.dumps(wallet)


async def test_a_key_reads_what_a_key_may_and_is_told_what_needs_the_credit_id(rig: Rig, url: str) -> None:
    customer = await rig.customer("10")
    async with Client(make_server(Account(url, api_key=customer.api_key), allow_spend=True)) as client:
        assert (await told(client, "balance"))["balance"] == 10
        refused = await client.call_tool("connect_wallet", {"nwc_url": NWC_URL})
        assert refused.is_error
        assert "SATMETER_CREDIT_ID" in str(refused.content)
        assert customer.api_key not in str(refused.content)


async def test_a_service_that_is_away_is_told_as_that(rig: Rig) -> None:
    [port] = free_ports(1)
    async with Client(make_server(Account(f"http://127.0.0.1:{port}", "x"), allow_spend=False)) as client:
        refused = await client.call_tool("balance", {})
        assert refused.is_error
        assert "cannot be asked" in str(refused.content)


def environ(url: str, customer: Customer) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "SATMETER_URL": url, "SATMETER_API_KEY": customer.api_key}


@pytest.mark.long
async def test_the_command_speaks_stdio_and_streamable_http(rig: Rig, url: str, tmp_path: Path) -> None:
    customer, root = await rig.customer("10"), Path(__file__).parents[1]
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "app", "mcp"], env=environ(url, customer), cwd=root
    )
    async with Client(server) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == READS
        assert (await told(client, "balance"))["balance"] == 10
    [port] = free_ports(1)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", "mcp", "--allow-spend", "--http", str(port), cwd=root, env=environ(url, customer),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            await _listens(port)
        async with Client(f"http://127.0.0.1:{port}/mcp") as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == READS | SPENDING
            assert (await told(client, "balance"))["balance"] == 10
    finally:
        process.kill()
        await process.wait()


async def _listens(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return


def test_without_a_credential_the_command_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SATMETER_API_KEY", "SATMETER_CREDIT_ID"):
        monkeypatch.delenv(name, raising=False)
    assert main(["mcp"]) == 2
    assert "SATMETER_API_KEY" in capsys.readouterr().err
    with pytest.raises(Refused):
        Account.of({})
    assert "sk-x" not in repr(Account.of({"SATMETER_API_KEY": "sk-x"}))
