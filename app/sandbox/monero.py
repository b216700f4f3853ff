"""Monero on a real node: the wallet behind `monero-wallet-rpc` makes a subaddress per invoice and watches it."""

from collections.abc import Sequence
from decimal import Decimal

from msgspec import Struct, field
from msgspec.structs import replace

from .invoices import Seen
from .node import Node, Sightings

PICONERO_PER_XMR_PLACES = 12
SPENDABLE_CONFIRMATIONS = 10


class _Made(Struct, frozen=True):
    address: str


class _Index(Struct, frozen=True):
    """A subaddress by account (major) and place in it (minor)."""

    major: int
    minor: int


class _Found(Struct, frozen=True):
    index: _Index


class _Transfer(Struct, frozen=True):
    """A transfer in; `amount` in piconero. One in the pool has no confirmations yet."""

    txid: str
    amount: int
    subaddress: _Index = field(name="subaddr_index")
    confirmations: int = 0
    is_locked: bool = field(default=False, name="locked")


class _Transfers(Struct, frozen=True):
    mined: tuple[_Transfer, ...] = field(default=(), name="in")
    pool: tuple[_Transfer, ...] = ()


class MoneroChain:
    """A Chain over the wallet that is open in a monero-wallet-rpc; its first account is used.

    A payment is `txid#account#subaddress`. It has no confirmation while in the pool, and counts as spendable at ten,
    later where its sender locked it for longer. Monero shows nobody who else spent the same coins, so a payment
    that the wallet no longer shows counts as unconfirmed, not as replaced.
    """

    def __init__(self, node: Node, sightings: Sightings) -> None:
        self.node = node
        self.sightings = sightings

    async def new_address(self) -> str:
        made = await self.node.ask(_Made, "create_address", account_index=0)
        return self.sightings.begin(made.address)

    async def payments_to(self, address: str) -> Sequence[Seen]:
        if self.sightings.known(address) is None:
            return ()
        place = (await self.node.ask(_Found, "get_address_index", address=address)).index
        # The wallet looks for blocks by itself every 20 s only.
        await self.node.tell("refresh")
        transfers = await self.node.ask(
            _Transfers, "get_transfers", **{"in": True, "pool": True},
            account_index=place.major, subaddr_indices=[place.minor],
        )  # fmt: skip
        mined = {transfer.txid: transfer for transfer in transfers.mined}
        waiting = [transfer for transfer in transfers.pool if transfer.txid not in mined]
        shown = [self._seen(transfer) for transfer in (*mined.values(), *waiting) if transfer.subaddress == place]
        return self.sightings.update(address, shown, lambda lost: replace(lost, confirmations=0))

    def _seen(self, transfer: _Transfer) -> Seen:
        place = transfer.subaddress
        most = SPENDABLE_CONFIRMATIONS - 1 if transfer.is_locked else transfer.confirmations
        return Seen(
            id=f"{transfer.txid}#{place.major}#{place.minor}",
            value=Decimal(transfer.amount).scaleb(-PICONERO_PER_XMR_PLACES),
            confirmations=min(transfer.confirmations, most),
            seen_at=self.sightings.now(),
        )
