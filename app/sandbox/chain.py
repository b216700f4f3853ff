"""Chains: where addresses come from and what was paid to them. The default one is simulated; a real node can stand in.

A chain attached to `litecoind -regtest` or `monerod --regtest` implements `Chain` with two RPC calls; it is polled,
while the simulated chain is driven through `SimulatedChain.pay`, `.confirm` and `.double_spend`.
"""

import secrets
from collections.abc import Sequence
from decimal import Decimal
from typing import Protocol, runtime_checkable

import bech32
from msgspec import Struct
from msgspec.structs import replace

from .errors import Impossible
from .ids import new_id
from .invoices import Seen
from .methods import METHODS, Method
from .store import Store


@runtime_checkable
class Chain(Protocol):
    """What the sandbox asks of a coin's chain. Either method may raise OSError while its node is away."""

    async def new_address(self) -> str:
        """A fresh address that nobody was asked to pay to before."""

    async def payments_to(self, address: str) -> Sequence[Seen]:
        """Every payment ever seen to this address, replaced ones too, oldest first."""


class AddressBook(Struct, frozen=True):
    """One simulated address and what was paid to it."""

    method: str
    address: str
    payments: tuple[Seen, ...] = ()


class SimulatedChain:
    """A chain without blocks: payments appear when the driver pays and confirm when the driver says so."""

    def __init__(self, method: Method, store: Store) -> None:
        self.method = method
        self.store = store

    async def new_address(self) -> str:
        address = self._fresh()
        self._save(AddressBook(self.method.id, address))
        return address

    async def payments_to(self, address: str) -> Sequence[Seen]:
        return self._book(address).payments

    def pay(self, address: str, value: Decimal, now: int, is_replaceable: bool = False) -> None:
        """Send `value` whole coins, unconfirmed."""
        transaction = secrets.token_hex(32)
        # XMR names a payment by account and subaddress, the others by the output's place in its transaction.
        id = f"{transaction}#0#{secrets.randbelow(900) + 1}" if self.method.coin == "XMR" else f"{transaction}-0"
        book = self._book(address)
        self._save(replace(book, payments=(*book.payments, Seen(id, value, 0, now, replaceable=is_replaceable))))

    def confirm(self, address: str, blocks: int) -> None:
        """Bury every payment to this address under `blocks` more blocks."""
        book = self._book(address)
        deeper = (p if p.replaced else replace(p, confirmations=p.confirmations + blocks) for p in book.payments)
        self._save(replace(book, payments=tuple(deeper)))

    def double_spend(self, address: str, payment_id: str | None = None) -> None:
        """Replace one payment: the named one, or the newest that is unconfirmed. Raises Impossible if there is none."""
        book = self._book(address)
        open_ones = [p for p in book.payments if not p.replaced and (p.confirmations == 0 or payment_id)]
        victim = next((p for p in reversed(open_ones) if payment_id in (None, p.id)), None)
        if victim is None:
            raise Impossible(f"{address} has no unconfirmed payment to double-spend")
        payments = tuple(replace(p, replaced=True, confirmations=0) if p is victim else p for p in book.payments)
        self._save(replace(book, payments=payments))

    def _book(self, address: str) -> AddressBook:
        return self.store.get("addresses", address, AddressBook) or AddressBook(self.method.id, address)

    def _save(self, book: AddressBook) -> None:
        self.store.put("addresses", book.address, book)

    def _fresh(self) -> str:
        if self.method.coin == "XMR":
            # A subaddress by its looks (regtest has the main network's prefixes); its checksum is not real.
            return "8" + secrets.choice("23456789AB") + new_id(93)
        address = bech32.encode(self.method.address_prefix, 0, secrets.token_bytes(20))
        assert address is not None, "20 bytes always make a witness program"
        return address


def simulated_chains(store: Store) -> dict[str, Chain]:
    """A simulated chain for each on-chain method."""
    return {id: SimulatedChain(method, store) for id, method in METHODS.items() if not method.is_lightning}
