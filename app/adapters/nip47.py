"""The Nostr Wallet Connect adapter (NIP-47): asks customers' wallets over their relays, each call on connections of its own.

    probe    info event ── encryption ── get_info ── get_balance                                    ──► Probe
    pay      relay 1: subscribe ── publish ── wait ── (dropped: subscribe again, never publish) ─┐
             relay 2: the same signed event, if relay 1 failed or 8 s brought no answer ─────────┴─► PayReply
    look_up  the same way, with less patience                                                       ──► LookupReply

What is said stands in `nip47_wire.py`, how a relay is reached in `relay.py`, where it may be in `addresses.py`.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import bolt11

from app.adapters import nip47_wire as wire
from app.adapters.addresses import Resolve, resolve_by_system, resolve_for_probe
from app.adapters.nostr import Event, sign_event
from app.adapters.relay import Dial, Dialler, Published, Relay, RelayFailed, RelayPatience
from app.autotopup.wallet import (
    Connection,
    Encryption,
    LightningInvoice,
    LookupReply,
    PayOutcome,
    PayReply,
    Probe,
    SignedRequest,
    WalletUnreachable,
    WalletUnsuitable,
    WalletUri,
)

MAX_BOLT11_CHARS: Final = 4096
LIGHTNING_NETWORKS: Final = ("bc", "tb", "tbs", "bcrt")


@dataclass(frozen=True, slots=True)
class WalletPatience:
    """How long a wallet may take, in seconds, relays included; and when the next relay is tried as well."""

    pay_seconds: float = 90.0
    pay_stagger_seconds: float = 8.0
    answer_seconds: float = 10.0
    stagger_seconds: float = 3.0
    info_seconds: float = 10.0
    probe_seconds: float = 45.0
    reconnect_seconds: float = 1.0  # doubled with every drop, up to eight times
    relay: RelayPatience = field(default_factory=RelayPatience)


@dataclass(slots=True)
class _Delivery:
    """One signed request on its way to a wallet, and what became of it."""

    uri: WalletUri
    method: str
    event: Mapping[str, Any] = field(repr=False)
    dialler: Dialler
    copies: int = 0  # relays that may hold the request
    drops: int = 0  # connections lost while it was held: a relay that comes back may hand it out again
    answers: int = 0  # of the wallet's, readable or not
    was_sent: bool = False
    is_over: bool = False

    @property
    def id(self) -> str:
        return str(self.event["id"])

    @property
    def is_certain(self) -> bool:
        """Whether the wallet cannot have seen the request twice, and has said one thing only."""
        return self.copies == 1 and self.drops == 0 and self.answers == 1

    def read(self, event: Event) -> wire.Answer | None:
        """The wallet's answer, None if the event is none: forged, somebody else's, or not to be understood."""
        if not wire.is_response(event, self.uri.pubkey, self.id):
            return None
        self.answers += 1
        answer = wire.read_answer(event, self.uri, self.method)
        self.is_over = answer is not None
        return answer


class NwcWallets:
    """Wallets (app.autotopup.wallet) that speak NIP-47, in NIP-44 or NIP-04.

    `lightning_network` is ours, by its BOLT11 prefix. `resolve` and `dial` stand for DNS and TCP in tests.
    """

    def __init__(
        self,
        *,
        allow_private_relays: bool,
        lightning_network: str,
        patience: WalletPatience | None = None,
        resolve: Resolve | None = None,
        dial: Dial | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        assert lightning_network in LIGHTNING_NETWORKS, f"not a BOLT11 network: {lightning_network}"
        self._allow_private = allow_private_relays
        self._network = lightning_network
        self._patience = patience or WalletPatience()
        self._dialler, self._probing_dialler = (
            Dialler(
                allow_private=allow_private_relays, patience=self._patience.relay, resolve=resolve or own, dial=dial
            )
            for own in (resolve_by_system, resolve_for_probe)
        )
        self._now = now

    def parse(self, uri: str) -> WalletUri:
        """Raises InvalidField (param `nwc_url`), with no part of the URI in its text, or WalletSilent for its relays."""
        return wire.parse_uri(uri, allow_private=self._allow_private)

    async def probe(self, uri: WalletUri) -> Probe:
        """Info event, encryption, get_info, which proves that the wallet knows this key. Nothing is paid.

        Raises WalletUnreachable, always with the same text, or WalletUnsuitable.
        """
        try:
            async with asyncio.timeout(self._patience.probe_seconds):
                info = await self._info(uri)
                encryption, answer = await self._introduced(uri, info)
                wire.check_usable(answer, self._network)
                methods = wire.offered_methods(answer, info)
                if "pay_invoice" not in methods:
                    raise WalletUnsuitable("this connection may not pay invoices; allow it pay_invoice")
                balance = await self._balance(uri, encryption) if "get_balance" in methods else None
        except TimeoutError:
            raise WalletUnreachable(wire.UNREACHABLE) from None
        return Probe(encryption, methods, alias=wire.read_alias(answer), balance_msat=wire.read_balance(balance))

    async def reaches(self, relay: str) -> bool:
        """Whether a relay can be connected to from here; never raises."""
        try:
            async with asyncio.timeout(self._patience.info_seconds), self._dialler.open(relay, secrets.token_hex(32)):
                return True
        except (RelayFailed, TimeoutError):
            return False

    def read_invoice(self, bolt11: str) -> LightningInvoice:
        """Raises ValueError for what is not a valid BOLT11."""
        return _read_invoice(bolt11)

    def sign_payment(self, connection: Connection, bolt11: str, expires_at: datetime) -> SignedRequest:
        """A `pay_invoice` for the invoice's own amount. Not every wallet heeds its expiry; the invoice's own binds."""
        event = self._signed(connection.uri, connection.encryption, "pay_invoice", {"invoice": bolt11}, expires_at)
        return SignedRequest(event_id=str(event["id"]), event=event)

    async def pay(self, connection: Connection, request: SignedRequest, payment_hash: str) -> PayReply:
        """Publish the request, once to a relay, and wait for the wallet's first answer that makes sense.

        Never raises for what a wallet or relay does. A refusal is one only if it surely means that nothing was paid.
        """
        delivery = _Delivery(connection.uri, "pay_invoice", request.event, self._dialler)
        patience = self._patience
        answer = await self._answer(delivery, patience.pay_seconds, patience.pay_stagger_seconds)
        if answer is None:
            is_refused = delivery.was_sent and delivery.copies == 0
            reply = PayReply(PayOutcome.UNKNOWN, was_answered=delivery.answers > 0, was_taken=not is_refused)
        else:
            reply = wire.pay_reply(answer, payment_hash, is_certain=delivery.is_certain)
        return replace(reply, was_published=delivery.was_sent)

    async def look_up(self, connection: Connection, payment_hash: str) -> LookupReply:
        """Ask whether an invoice was paid. Never raises for what a wallet or relay does."""
        params = {"payment_hash": payment_hash}
        answer = await self._ask(self._dialler, connection.uri, connection.encryption, "lookup_invoice", params)
        return wire.lookup_reply(answer, payment_hash)

    # Getting to know a wallet

    async def _info(self, uri: WalletUri) -> wire.Info | None:
        """The info event from the first relay that has one, None if those that answer have none.

        Raises WalletUnreachable if no relay answers.
        """
        is_reached = False
        for relay in uri.relays:
            try:
                async with asyncio.timeout(self._patience.info_seconds):
                    info = await self._info_from(relay, uri)
                is_reached = True
            except (RelayFailed, TimeoutError):
                continue
            if info is not None:
                return info
        if not is_reached:
            raise WalletUnreachable(wire.UNREACHABLE)
        return None

    async def _info_from(self, relay_url: str, uri: WalletUri) -> wire.Info | None:
        async with self._probing_dialler.open(relay_url, uri.secret) as relay:
            await relay.subscribe(wire.info_query(uri.pubkey))
            return wire.newest_info(relay.stored(), uri.pubkey)

    async def _introduced(self, uri: WalletUri, info: wire.Info | None) -> tuple[Encryption, wire.Answer]:
        """The encryption the wallet understands, and its answer to `get_info` in it.

        A wallet that does not understand is silent, so without an info event it takes two tries. Raises
        WalletUnreachable, or WalletUnsuitable if it speaks neither of our encryptions.
        """
        for encryption in _to_try(info):
            answer = await self._ask(self._probing_dialler, uri, encryption, "get_info", {})
            if answer is not None and answer.code != "UNSUPPORTED_ENCRYPTION":
                return encryption, answer
            if answer is None and info is not None:
                break  # it would have understood, so it is away
        raise WalletUnreachable(wire.UNREACHABLE)

    async def _balance(self, uri: WalletUri, encryption: Encryption) -> wire.Answer | None:
        return await self._ask(self._probing_dialler, uri, encryption, "get_balance", {})

    # One request

    async def _ask(
        self, dialler: Dialler, uri: WalletUri, encryption: Encryption, method: str, params: Mapping[str, Any]
    ) -> wire.Answer | None:
        """The answer to a request that moves no money, None if there was none in time."""
        seconds = self._patience.answer_seconds
        event = self._signed(uri, encryption, method, params, self._now() + timedelta(seconds=seconds + 60))
        return await self._answer(_Delivery(uri, method, event, dialler), seconds, self._patience.stagger_seconds)

    def _signed(
        self, uri: WalletUri, encryption: Encryption, method: str, params: Mapping[str, Any], expires_at: datetime
    ) -> dict[str, Any]:
        content, tags = wire.request_content(uri, encryption, method, params)
        tags.append(["expiration", str(int(expires_at.timestamp()))])
        created_at = int(self._now().timestamp())
        return sign_event(uri.secret, kind=wire.REQUEST_KIND, content=content, tags=tags, created_at=created_at)

    async def _answer(self, delivery: _Delivery, seconds: float, stagger_seconds: float) -> wire.Answer | None:
        """The first answer from any relay, each next one started when those before failed or are slow."""
        waiting, asked = list(delivery.uri.relays), set[asyncio.Task[wire.Answer]]()
        try:
            async with asyncio.timeout(seconds):
                while waiting or asked:
                    if waiting:
                        asked.add(asyncio.create_task(self._converse(waiting.pop(0), delivery)))
                    timeout = stagger_seconds if waiting else None
                    done, asked = await asyncio.wait(asked, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                    if answered := [task for task in done if not isinstance(task.exception(), RelayFailed)]:
                        return answered[0].result()
        except TimeoutError:
            pass
        finally:
            await _cancelled(asked)
        return None

    async def _converse(self, relay_url: str, delivery: _Delivery) -> wire.Answer:
        """Publish on one relay and wait there, coming back as often as the connection is lost.

        Coming back is only for listening. The event is published here once, since a wallet may execute it again.
        Raises RelayFailed if this relay did not take it, so that there is nothing to wait for.
        """
        is_held = False
        pause_seconds = self._patience.reconnect_seconds
        while True:
            try:
                async with delivery.dialler.open(relay_url, delivery.uri.secret) as relay:
                    await relay.subscribe(wire.response_query(delivery.uri.pubkey, delivery.id))
                    if not is_held:
                        is_held = True
                        await _publish(relay, delivery)
                    return await _listen(relay, delivery)
            except _NotTaken:
                raise
            except RelayFailed:
                if not is_held:
                    raise
                delivery.drops += 1
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 8 * self._patience.reconnect_seconds)


class _NotTaken(RelayFailed):
    """The relay said that it did not take the request."""


async def _publish(relay: Relay, delivery: _Delivery) -> None:
    if delivery.is_over:
        raise _NotTaken  # answered through another relay meanwhile
    # Noted before it happens: from here on the wallet may see it.
    delivery.was_sent = True
    delivery.copies += 1
    if await relay.publish(delivery.event) is Published.REFUSED:
        delivery.copies -= 1
        raise _NotTaken


async def _listen(relay: Relay, delivery: _Delivery) -> wire.Answer:
    while True:
        answer = delivery.read(await relay.next_event())
        if answer is not None:
            return answer


async def _cancelled(tasks: set[asyncio.Task[wire.Answer]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _to_try(info: wire.Info | None) -> Sequence[Encryption]:
    """Raises WalletUnsuitable if the wallet says that it speaks neither."""
    if info is None:
        return (Encryption.NIP44, Encryption.NIP04)
    if not info.encryptions:
        raise WalletUnsuitable("the wallet speaks neither nip44_v2 nor nip04")
    return [one for one in (Encryption.NIP44, Encryption.NIP04) if one in info.encryptions]


def _read_invoice(text: str) -> LightningInvoice:
    """Raises ValueError for what is not a valid BOLT11, or asks for a part of a millisatoshi.

    Its checksum, its signature and its payment hash must be there; of the fields that BOLT11 leaves to the node, such as
    `min_final_cltv_expiry`, which LNbits' FakeWallet leaves out, none is asked for: the wallet that pays reads them.
    """
    _refuse_sloppy(text)
    try:
        found = bolt11.decode(text, ignore_exceptions=True)
        return LightningInvoice(
            network=str(found.currency),
            amount_msat=None if found.amount_msat is None else int(found.amount_msat),
            payment_hash=str(found.payment_hash),
            expires_at=datetime.fromtimestamp(found.expiry_time, UTC),
        )
    except Exception:  # noqa: BLE001 - a door: the library raises what its parts raise, mostly bitstring's ReadError
        raise ValueError("not a valid BOLT11 invoice") from None


def _refuse_sloppy(text: str) -> None:
    """What the library lets pass: mixed case, and pico-bitcoin that are cut off to whole millisatoshis."""
    prefix = text.lower().rpartition("1")[0]
    is_cut_off = prefix.endswith("p") and not prefix.endswith("0p")
    if len(text) > MAX_BOLT11_CHARS or text not in (text.lower(), text.upper()) or is_cut_off:
        raise ValueError("not a valid BOLT11 invoice")
