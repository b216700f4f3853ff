"""A Lightning wallet that is asked over Nostr (NIP-47): it pays the sandbox's own invoices with money that is none.

It behaves, or misbehaves, as the driver says, so that whoever pays with customers' wallets can see how they fail.
Amounts are millisatoshis, times unix seconds.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from .backend import Backend
from .behaviour import UNREADABLE, Behaviour, Offer, Reply, State, distorted
from .ciphers import scheme_of, seal, unseal
from .errors import Impossible, NotFound
from .lines import Line, open_line
from .nostr import Event, public_key, sign
from .relay import Relay
from .store import Store

INFO, REQUEST, RESPONSE = 13194, 23194, 23195
METHODS = ("pay_invoice", "get_balance", "get_info", "lookup_invoice")
SHOWN = 100
"""How many of the newest payments and requests are shown."""


class Payment(Struct, frozen=True):
    """An invoice that this wallet paid."""

    request_id: str
    payment_hash: str
    preimage: str
    amount_msat: int
    invoice_id: str
    bolt11: str
    at: int

    def __repr__(self) -> str:
        return f"Payment(payment_hash={self.payment_hash!r}, amount_msat={self.amount_msat})"


class Heard(Struct, frozen=True):
    """A request: what came of it, and how often it came again, which changes nothing."""

    id: str
    method: str | None
    encryption: str
    at: int
    outcome: str = "began"
    repeats: int = 0


class Refusal(Exception):
    """A method that was not carried out, with NIP-47's error code."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(f"{code}: {message}")


class Ask(Struct, frozen=True):
    """A request that could be read."""

    event_id: str
    method: str
    params: dict[str, Any] = field(default_factory=dict)


class Wallet:
    """One wallet with one connection, whose secret is made at the first start and kept with the rest of the state."""

    def __init__(
        self, store: Store, backend: Backend, relay: Relay, relay_url: str, now: Callable[[], float] = time.time
    ) -> None:
        self.store, self.backend, self.relay, self.relay_url, self.now = store, backend, relay, relay_url, now
        self.state = store.get("wallet", "state", State) or State(secrets.token_hex(32), secrets.token_hex(32))
        store.put("wallet", "state", self.state)
        self.pubkey = public_key(self.state.wallet_key)
        self.payments = {paid.payment_hash: paid for paid in store.journal("wallet", "payments", Payment)}
        self.heard = {heard.id: heard for heard in store.journal("wallet", "requests", Heard)}
        self._lines: list[Line] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._told_at = 0

    # --- what it is ---

    @property
    def relays(self) -> tuple[str, ...]:
        """Where it listens."""
        return self.state.relays or (self.relay_url,)

    @property
    def uri(self) -> str:
        """What a customer pastes; it spends from this wallet."""
        relays = "&".join(f"relay={quote(relay, safe='')}" for relay in self.relays)
        return f"nostr+walletconnect://{self.pubkey}?{relays}&secret={self.state.client_key}"

    async def start(self) -> None:
        """Listen on every relay, and say there what it can do."""
        wanted = {"kinds": [REQUEST], "#p": [self.pubkey]}
        self._lines = [open_line(url, self.relay_url, self.relay, wanted, self.hear) for url in self.relays]
        self._tell_abilities()

    async def stop(self) -> None:
        """Hang up, and forget what it meant to say later."""
        for line in self._lines:
            await line.hang_up()
        self._lines = []
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def become(self, state: State) -> None:
        """Behave in another way from now on; what was begun ends as it began."""
        moves = state.relays != self.state.relays
        self._keep(state)
        if moves:
            for line in self._lines:
                await line.hang_up()
            await self.start()
        else:
            self._tell_abilities()

    # --- being asked ---

    def hear(self, event: Event, line: Line) -> None:
        """A relay's word. Each request is carried out once, however often it comes."""
        if event.kind != REQUEST or self.pubkey not in event.tagged("p"):
            return
        known = self.heard.get(event.id)
        if known is not None:
            self.heard[event.id] = replace(known, repeats=known.repeats + 1)
            return
        task = asyncio.create_task(self._serve(event, line), name="wallet request")
        self.heard[event.id] = Heard(event.id, None, scheme_of(event.content), int(self.now()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, event: Event, line: Line) -> None:
        if event.expires_at is not None and event.expires_at <= self.now():
            return self._note(event.id, None, "expired")
        ask = self._read(event)
        # Written down before anything is done, so that a restart in between does not do it twice.
        self._note(event.id, ask.method if ask else None, "began" if ask else "unreadable")
        self.store.append("wallet", "requests", self.heard[event.id])
        if ask is None:
            return
        replies = await self._consider(ask, event)
        for reply in replies:
            line.say(self._response(event, reply))
        self._note(event.id, ask.method, _outcome(replies))

    def _read(self, event: Event) -> Ask | None:
        """The request, None if it cannot be read. Its payload tells how it is encrypted, whatever its tag says."""
        try:
            text = unseal(scheme_of(event.content), self.state.wallet_key, event.pubkey, event.content)
            body = msgspec.json.decode(text)
        except ValueError:
            return None
        if not isinstance(body, dict) or not isinstance(body.get("method"), str):
            return None
        params = body.get("params")
        return Ask(event.id, body["method"], params if isinstance(params, dict) else {})

    async def _consider(self, ask: Ask, event: Event) -> list[Reply]:
        if scheme_of(event.content) not in self.state.encryption.schemes:
            return [_error(ask, "UNSUPPORTED_ENCRYPTION", f"this wallet reads {self.state.encryption.value}")]
        if event.pubkey != public_key(self.state.client_key):
            return [_error(ask, "UNAUTHORIZED", "no wallet is connected to this key")]
        if self.state.methods and ask.method not in self.state.methods:
            return [self._do(ask)]
        return await self._misbehave(ask)

    async def _misbehave(self, ask: Ask) -> list[Reply]:
        state, behaviour = self.state, self.state.behaviour
        if behaviour is Behaviour.REFUSES:
            return [_error(ask, state.code, "the sandbox wallet was told to refuse")]
        if behaviour is Behaviour.SILENT:
            return []
        if behaviour is Behaviour.LIES:
            return [_result(ask, {"preimage": secrets.token_hex(32), "fees_paid": 0})]
        if behaviour is Behaviour.PAYS_LATE:
            await asyncio.sleep(state.delay_seconds)
        reply = self._do(ask)
        if behaviour is Behaviour.ANSWERS_LATE:
            await asyncio.sleep(state.delay_seconds)
        return distorted(reply, behaviour)

    # --- what it can do ---

    def _do(self, ask: Ask) -> dict[str, Any]:
        verbs: Mapping[str, Callable[[Ask], dict[str, Any]]] = {
            "pay_invoice": self._pay_invoice,
            "get_balance": lambda _: {"balance": self.state.balance_msat},
            "get_info": lambda _: self._info(),
            "lookup_invoice": self._look_up,
        }
        try:
            if ask.method not in verbs:
                raise Refusal("NOT_IMPLEMENTED", f"this wallet knows {', '.join(METHODS)}")
            return _result(ask, verbs[ask.method](ask))
        except Refusal as refusal:
            return _error(ask, refusal.code, refusal.message)

    def _pay_invoice(self, ask: Ask) -> dict[str, Any]:
        text, amount_msat = ask.params.get("invoice"), ask.params.get("amount")
        if not isinstance(text, str) or not (amount_msat is None or type(amount_msat) is int):
            raise Refusal("OTHER", "params are invoice, a BOLT11, and amount, millisatoshis or nothing")
        known = self.backend.node.find(text)
        self._afford((known.amount_msat if known else None) or amount_msat or 0)
        try:
            request, invoice = self.backend.pay_bolt11(text, amount_msat)
        except (NotFound, Impossible) as error:
            raise Refusal("PAYMENT_FAILED", error.message) from error
        paid = Payment(
            ask.event_id, request.payment_hash, request.preimage, request.paid_msat, invoice.id, text, int(self.now())
        )
        self.payments[paid.payment_hash] = paid
        self.store.append("wallet", "payments", paid)
        budget_msat = None if self.state.budget_msat is None else self.state.budget_msat - paid.amount_msat
        balance_msat = self.state.balance_msat - paid.amount_msat
        self._keep(replace(self.state, balance_msat=balance_msat, budget_msat=budget_msat))
        return {"preimage": paid.preimage, "fees_paid": 0}

    def _afford(self, amount_msat: int) -> None:
        if amount_msat > self.state.balance_msat:
            raise Refusal("INSUFFICIENT_BALANCE", f"{amount_msat} msat asked, {self.state.balance_msat} msat here")
        if self.state.budget_msat is not None and amount_msat > self.state.budget_msat:
            raise Refusal(
                "QUOTA_EXCEEDED", f"{amount_msat} msat asked, {self.state.budget_msat} msat of the budget left"
            )

    def _look_up(self, ask: Ask) -> dict[str, Any]:
        text = ask.params.get("invoice")
        request = self.backend.node.find(text) if isinstance(text, str) else None
        paid = self.payments.get(str(request.payment_hash if request else ask.params.get("payment_hash")))
        if paid is None:
            raise Refusal("NOT_FOUND", "this wallet knows no such payment")
        return {
            "type": "outgoing", "state": "settled", "invoice": paid.bolt11, "preimage": paid.preimage,
            "payment_hash": paid.payment_hash, "amount": paid.amount_msat, "fees_paid": 0, "created_at": paid.at,
            "settled_at": paid.at,
        }  # fmt: skip

    def _info(self) -> dict[str, Any]:
        return {
            "alias": "Sandbox wallet", "color": "#ffc933", "pubkey": "02" + self.pubkey, "network": "regtest",
            "block_height": 1, "block_hash": "00" * 32, "methods": list(METHODS), "notifications": [],
        }  # fmt: skip

    # --- saying and keeping ---

    def _tell_abilities(self) -> None:
        offered = [("encryption", " ".join(self.state.encryption.schemes))]
        # A newer one replaces the older, which two in one second would not.
        self._told_at = max(int(self.now()), self._told_at + 1)
        tags = [] if self.state.encryption is Offer.UNTOLD else offered
        event = sign(self.state.wallet_key, INFO, " ".join(METHODS), tags, self._told_at)
        for line in self._lines:
            line.say(event)

    def _response(self, request: Event, reply: Reply) -> Event:
        """Encrypted as the request was, or as the wallet can. A text that is not NIP-47's goes out as it is."""
        scheme = scheme_of(request.content)
        spoken = scheme if scheme in self.state.encryption.schemes else self.state.encryption.schemes[0]
        is_gibberish = reply == UNREADABLE
        text = reply if isinstance(reply, str) else msgspec.json.encode(reply).decode()
        content = text if is_gibberish else seal(spoken, self.state.wallet_key, request.pubkey, text)
        tags = [("p", request.pubkey), ("e", request.id)]
        return sign(self.state.wallet_key, RESPONSE, content, tags, int(self.now()))

    def _note(self, id: str, method: str | None, outcome: str) -> None:
        self.heard[id] = replace(self.heard[id], method=method, outcome=outcome)

    def _keep(self, state: State) -> None:
        self.state = state
        self.store.put("wallet", "state", state)


def _result(ask: Ask, result: dict[str, Any]) -> dict[str, Any]:
    return {"result_type": ask.method, "error": None, "result": result}


def _error(ask: Ask, code: str, message: str) -> dict[str, Any]:
    return {"result_type": ask.method, "error": {"code": code, "message": message}, "result": None}


def _outcome(replies: list[Reply]) -> str:
    """In a word: the error's code, `answered`, or what else was done."""
    if not replies:
        return "unanswered"
    first = replies[0]
    if isinstance(first, str):
        return "garbage"
    return str(first["error"]["code"]) if first["error"] else "answered"


def view(wallet: Wallet) -> dict[str, Any]:
    """The wallet as the driver shows it, the newest payments and requests first."""
    state = wallet.state
    return {
        "uri": wallet.uri,
        "pubkey": wallet.pubkey,
        "relays": list(wallet.relays),
        "balance_msat": state.balance_msat,
        "budget_msat": state.budget_msat,
        "behaviour": state.behaviour,
        "code": state.code,
        "delay_seconds": state.delay_seconds,
        "methods": list(state.methods),
        "encryption": state.encryption,
        "payments": [
            {name: value for name, value in msgspec.to_builtins(paid).items() if name != "preimage"}
            for paid in list(wallet.payments.values())[: -SHOWN - 1 : -1]
        ],
        "requests": [msgspec.to_builtins(heard) for heard in list(wallet.heard.values())[: -SHOWN - 1 : -1]],
    }
