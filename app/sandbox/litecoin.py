"""Litecoin on a real node: a wallet of `litecoind` makes the addresses and watches them."""

from collections.abc import Sequence
from decimal import Decimal

from msgspec import Struct, field
from msgspec.structs import replace

from .invoices import Seen
from .node import Node, NodeRefused, Sightings

MANY = 1000  # transactions to one address; BTCPay never gives an address to two invoices
# A block holds a replacement, or it spends again what another one in the mempool does; or its fee is below that one's.
TRANSACTION_ERROR, TRANSACTION_REJECTED = -25, -26


class _Listed(Struct, frozen=True):
    """An entry of `listtransactions`; the amount in whole coins, exactly as the node prints it."""

    category: str
    amount: Decimal
    confirmations: int
    txid: str
    vout: int
    address: str = ""
    replaceable: str = field(default="unknown", name="bip125-replaceable")
    conflicts: tuple[str, ...] = field(default=(), name="walletconflicts")


class _Transaction(Struct, frozen=True):
    hex: str


class LitecoinChain:
    """A Chain over one wallet of a litecoind, regtest's or any other network's.

    A payment is `txid-vout`. Confirmations are the node's, so they go back to 0 in a reorganisation. A payment counts
    as replaced when a block holds another spend of its coins, or when the node no longer takes it: BTCPay finds that
    out by broadcasting it once more, and so do we. Source: NBXplorerListener.UpdatePaymentStates, v2.4.1.
    """

    def __init__(self, node: Node, sightings: Sightings) -> None:
        self.node = node
        self.sightings = sightings

    async def new_address(self) -> str:
        """A segwit address, labelled with itself: the label is how its payments are listed."""
        address = await self.node.ask(str, "getnewaddress", label="", address_type="bech32")
        await self.node.tell("setlabel", address=address, label=address)
        return self.sightings.begin(address)

    async def payments_to(self, address: str) -> Sequence[Seen]:
        if self.sightings.known(address) is None:
            return ()
        listed = await self.node.ask(
            list[_Listed], "listtransactions", label=address, count=MANY, skip=0, include_watchonly=True
        )
        shown = [await self._seen(each) for each in listed if (each.category, each.address) == ("receive", address)]
        # The node lists nothing whose coins a block spent otherwise.
        return self.sightings.update(address, shown, lambda lost: replace(lost, confirmations=0, replaced=True))

    async def _seen(self, listed: _Listed) -> Seen:
        is_replaced = listed.confirmations == 0 and await self._is_replaced(listed.txid)
        return Seen(
            id=f"{listed.txid}-{listed.vout}",
            value=listed.amount,
            confirmations=listed.confirmations,
            seen_at=self.sightings.now(),
            replaced=is_replaced,
            replaceable=listed.replaceable == "yes",
            conflicts=() if is_replaced else listed.conflicts,
        )

    async def _is_replaced(self, txid: str) -> bool:
        """Whether the node would not take this unconfirmed transaction again. One that it has, it takes."""
        transaction = await self.node.ask(_Transaction, "gettransaction", txid=txid, include_watchonly=True)
        try:
            await self.node.tell("sendrawtransaction", hexstring=transaction.hex, maxfeerate=0)
        except NodeRefused as refusal:
            if refusal.code in (TRANSACTION_ERROR, TRANSACTION_REJECTED):
                return True
            if refusal.code != -27:  # mined between the two questions
                raise
        return False
