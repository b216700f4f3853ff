"""Real nodes for a test: litecoind, monerod and two wallets, on free loopback ports, ended by the pids we started."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from app.sandbox.node import Node, NodeAway
from tests.program import free_ports

LITECOIN_USER = "u:p%40ss"  # a password that must be quoted in a URL
MONERO_USER = "merchant:p"


def needs(*binaries: str) -> None:
    """Skip where a node is not installed: `apt-get install --no-install-recommends litecoind monero`."""
    missing = [name for name in binaries if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; .ci/run installs litecoind and monero")


class Process:
    """A program of ours: started once, ended by its pid, its words kept in a file of the folder that it works in."""

    def __init__(self, folder: Path, program: str, *arguments: object, **environ: object) -> None:
        self.log = folder / f"{Path(program).name}.out"
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [program, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
                env=os.environ | {name: str(value) for name, value in environ.items()},
            )  # fmt: skip

    def end(self, seconds: float = 20) -> None:
        self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()

    async def until_it_answers(self, node: Node, method: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            assert self.popen.poll() is None, f"{node!r} ended:\n{self.log.read_text()[-2000:]}"
            try:
                return await node.tell(method)
            except NodeAway:
                assert time.monotonic() < deadline, f"{node!r} does not answer:\n{self.log.read_text()[-2000:]}"
            await asyncio.sleep(0.1)


class Litecoin:
    """`litecoind -regtest` with a merchant's wallet and a payer's, who also mines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.merchant_url = f"http://{LITECOIN_USER}@127.0.0.1:{self.port}/wallet/merchant"
        self.node = Node("litecoind", f"http://{LITECOIN_USER}@127.0.0.1:{self.port}/")
        self.merchant = Node("merchant", self.merchant_url)
        self.payer = Node("payer", f"http://{LITECOIN_USER}@127.0.0.1:{self.port}/wallet/payer")
        self.process: Process | None = None

    async def start(self) -> None:
        self.process = Process(
            self.folder, "litecoind", "-regtest", f"-datadir={self.folder}", "-server", "-listen=0", "-dnsseed=0",
            "-upnp=0", "-fallbackfee=0.0001", "-txindex=1", "-mempoolreplacement=1", "-rpcbind=127.0.0.1", "-rpcallowip=127.0.0.1",
            f"-rpcport={self.port}", "-rpcuser=u", "-rpcpassword=p@ss", "-printtoconsole=0",
        )  # fmt: skip
        await self.process.until_it_answers(self.node, "getblockcount")

    async def fund(self) -> None:
        for wallet in ("merchant", "payer"):
            await self.node.tell("createwallet", wallet_name=wallet, load_on_startup=True)
        await self.mine(110)

    def end(self) -> None:
        if self.process is not None:
            self.process.end()
            self.process = None

    async def mine(self, blocks: int = 1, transactions: Sequence[str] | None = None) -> list[str]:
        """Mine to a fresh address, so that no two blocks are the same; with `transactions`, one block of just these."""
        miner = await self.payer.ask(str, "getnewaddress", label="mined", address_type="bech32")
        if transactions is not None:
            block = await self.node.ask(dict[str, str], "generateblock", output=miner, transactions=list(transactions))
            return [block["hash"]]
        return await self.node.ask(list[str], "generatetoaddress", nblocks=blocks, address=miner)

    async def pay(self, address: str, coins: Decimal, *, replaceable: bool = False) -> str:
        """Returns the transaction's id."""
        return await self.payer.ask(str, "sendtoaddress", address=address, amount=f"{coins:f}", replaceable=replaceable)

    async def bump(self, txid: str) -> str:
        """Replace a transaction by one with a higher fee; returns the new one's id.

        Most Litecoin nodes refuse it: `-mempoolreplacement` is off unless it is asked for.
        """
        return str((await self.payer.ask(dict[str, Any], "bumpfee", txid=txid))["txid"])

    async def two_spends(self, address: str, coins: Decimal) -> tuple[str, str]:
        """A signed payment to `address`, and one of the same coins back to the payer; neither is sent."""
        coin = (await self.payer.ask(list[dict[str, Any]], "listunspent", minconf=101))[0]
        change = await self.payer.ask(str, "getnewaddress", label="", address_type="bech32")
        rest = Decimal(str(coin["amount"])) - Decimal("0.001")
        spends = []
        for outputs in ([{address: f"{coins}"}, {change: f"{rest - coins}"}], [{change: f"{rest}"}]):
            raw = await self.payer.ask(
                str, "createrawtransaction", inputs=[{"txid": coin["txid"], "vout": coin["vout"]}], outputs=outputs
            )
            spends.append((await self.payer.ask(dict[str, Any], "signrawtransactionwithwallet", hexstring=raw))["hex"])
        return spends[0], spends[1]

    async def confirmations(self, txid: str) -> int:
        """As the merchant's wallet counts them."""
        found = await self.merchant.ask(dict[str, Any], "gettransaction", txid=txid)
        return int(found["confirmations"])


class Monero:
    """`monerod --regtest` and two wallet servers, the merchant's behind a password; the payer also mines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        p2p, self.port, merchant, payer = free_ports(4)
        self.ports = (p2p, merchant, payer)
        self.merchant_url = f"http://{MONERO_USER}@127.0.0.1:{merchant}"
        self.node = Node("monerod", f"http://127.0.0.1:{self.port}/json_rpc")
        self.merchant = Node("merchant", f"{self.merchant_url}/json_rpc", uses_digest=True)
        self.payer = Node("payer", f"http://127.0.0.1:{payer}/json_rpc")
        self.address = ""
        self.processes: list[Process] = []

    async def start(self) -> None:
        p2p, merchant, payer = self.ports
        daemon = Process(
            self.folder, "monerod", "--regtest", "--offline", "--no-igd", "--hide-my-port", "--non-interactive",
            "--data-dir", self.folder / "node", "--p2p-bind-ip", "127.0.0.1", "--p2p-bind-port", p2p, "--rpc-bind-ip",
            "127.0.0.1", "--rpc-bind-port", self.port, "--fixed-difficulty", 1, "--disable-rpc-ban", "--no-zmq",
        )  # fmt: skip
        self.processes.append(daemon)
        await daemon.until_it_answers(self.node, "get_block_count")
        wallets = (
            ("merchant", merchant, self.merchant, ("--rpc-login", MONERO_USER)),
            ("payer", payer, self.payer, ("--disable-rpc-login",)),
        )
        for name, port, node, login in wallets:
            await self._start_wallet(name, port, node, login)

    async def _start_wallet(self, name: str, port: int, node: Node, login: Sequence[str]) -> None:
        folder = self.folder / name
        folder.mkdir()
        wallet = Process(
            folder, "monero-wallet-rpc", "--rpc-bind-ip", "127.0.0.1", "--rpc-bind-port", port, *login, "--wallet-dir",
            folder, "--daemon-address", f"127.0.0.1:{self.port}", "--trusted-daemon", "--non-interactive",
            "--log-file", folder / "wallet.log",
        )  # fmt: skip
        self.processes.append(wallet)
        await wallet.until_it_answers(node, "get_version")
        await node.tell("create_wallet", filename=name, password="", language="English")

    async def fund(self) -> None:
        self.address = str((await self.payer.ask(dict[str, Any], "get_address", account_index=0))["address"])
        await self.mine(90)

    def end(self) -> None:
        for process in reversed(self.processes):
            process.end()

    async def mine(self, blocks: int = 1) -> None:
        """A few at a time: on a busy machine one takes up to a second."""
        for mined in range(0, blocks, 5):
            few = min(5, blocks - mined)
            await self.node.tell("generateblocks", amount_of_blocks=few, wallet_address=self.address)

    async def pay(self, address: str, coins: Decimal, *, locked_for_blocks: int = 0) -> str:
        """Returns the transaction's id."""
        await self.payer.tell("refresh")
        height = (await self.node.ask(dict[str, Any], "get_block_count"))["count"]
        paid = await self.payer.ask(
            dict[str, Any], "transfer", destinations=[{"address": address, "amount": int(coins.scaleb(12))}],
            unlock_time=height + locked_for_blocks if locked_for_blocks else 0,
        )  # fmt: skip
        return str(paid["tx_hash"])

    async def confirmations(self, txid: str) -> int:
        """As the merchant's wallet counts them."""
        await self.merchant.tell("refresh")
        found = await self.merchant.ask(dict[str, Any], "get_transfer_by_txid", txid=txid)
        return int(found["transfer"].get("confirmations", 0))


@contextlib.asynccontextmanager
async def running(node: Any) -> AsyncIterator[Any]:
    """A Litecoin or Monero from its start to its end, also when starting fails."""
    began = time.monotonic()
    try:
        await node.start()
        await node.fund()
        say(f"{type(node).__name__} is up and mined after {time.monotonic() - began:.1f} s")
        yield node
    finally:
        await asyncio.to_thread(node.end)


def say(line: str) -> None:
    """Progress, for whoever runs these with `-s`."""
    print(f"    {line}", flush=True)
