"""A customer's wallet that speaks NIP-47 over real relays and does what its script says, built on nostr-sdk alone.

None of our own Nostr code is in it, so that a mistake of ours is not answered by the same mistake here.

    async with FakeWallet(relay.url) as wallet:
        wallet.knows(invoice)                        # an invoice of `an_invoice`, whose preimage the wallet can find
        wallet.will("pay_invoice", refuse("QUOTA_EXCEEDED"))    # then, without a script, it pays again
        ... wallet.uri ...
        assert wallet.executed == ["pay_invoice"]
"""

import asyncio
import hashlib
import json
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import bolt11
import nostr_sdk as sdk
from bolt11 import Bolt11, Feature, FeatureExtra, Features, FeatureState, MilliSatoshi, TagChar, Tags
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

Json = dict[str, Any]
ZEROS = "00" * 32
METHODS = ("pay_invoice", "get_balance", "get_info", "lookup_invoice")


@dataclass(frozen=True)
class Invoice:
    """A real BOLT11 with the preimage that pays it."""

    text: str
    preimage: str = field(repr=False)

    @property
    def payment_hash(self) -> str:
        return hashlib.sha256(bytes.fromhex(self.preimage)).hexdigest()


def an_invoice(
    amount_msat: int | None = 25_000_000,
    network: str = "bcrt",
    expiry_seconds: int = 900,
    at: datetime | None = None,
    without: str | None = None,
) -> Invoice:
    """Signed with a new key, over what a Lightning node puts into an invoice, but for the field that is left out."""
    preimage = secrets.token_hex(32)
    tags = Tags()
    tags.add(TagChar.payment_hash, hashlib.sha256(bytes.fromhex(preimage)).hexdigest())
    tags.add(TagChar.payment_secret, secrets.token_hex(32))
    tags.add(TagChar.description, "credits")
    tags.add(TagChar.expire_time, expiry_seconds)
    tags.add(TagChar.min_final_cltv_expiry, 18)
    required: dict[Feature | FeatureExtra, FeatureState] = {
        Feature.var_onion_optin: FeatureState.required,
        Feature.payment_secret: FeatureState.required,
    }
    tags.add(TagChar.features, Features.from_feature_list(required))
    if without is not None:
        tags.tags = [tag for tag in tags.tags if tag.char is not TagChar[without]]
    amount = None if amount_msat is None else MilliSatoshi(amount_msat)
    date = int((at or datetime.now(UTC)).timestamp())
    unsigned = Bolt11(currency=network, amount_msat=amount, date=date, tags=tags)
    return Invoice(bolt11.encode(unsigned, secrets.token_hex(32), ignore_exceptions=without is not None), preimage)


@dataclass(frozen=True)
class Request:
    """What a client asks, decrypted."""

    id: str
    client: str
    encryption: str
    method: str
    params: Json
    tags: list[list[str]]


Reply = Callable[["FakeWallet", Request], Awaitable[Sequence[Json]]]
"""The events that a wallet sends for a request."""


@dataclass(eq=False)
class FakeWallet:
    """One wallet and one connection to it; `relays` are what it listens on, `uri` names them all."""

    relays: Sequence[str] | str
    encryptions: tuple[str, ...] = ("nip44_v2", "nip04")
    methods: tuple[str, ...] = METHODS
    network: str = "regtest"
    announces: bool = True  # publishes an info event
    tags_encryption: bool = True  # and says in it how it encrypts; older wallets do not
    separator: str = " "
    remembers: bool = True  # executes a request once, however often a relay hands it out
    balance_msat: int = 1_000_000_000
    pay: Callable[[str], Awaitable[str | None]] | None = None
    """Pays a BOLT11 for real and returns its preimage, None if it could not; else the wallet knows what it was told."""

    requests: list[Request] = field(default_factory=list)
    preimages: dict[str, str] = field(default_factory=dict, repr=False)
    paid: list[str] = field(default_factory=list)  # the BOLT11s, as often as they were paid
    keys: sdk.Keys = field(default_factory=sdk.Keys.generate, repr=False)
    client_keys: sdk.Keys = field(default_factory=sdk.Keys.generate, repr=False)
    _scripts: dict[str, deque[Reply]] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _listening: dict[str, asyncio.Event] = field(default_factory=dict)

    @property
    def pubkey(self) -> str:
        return str(self.keys.public_key().to_hex())

    @property
    def secret(self) -> str:
        return str(self.client_keys.secret_key().to_hex())

    @property
    def uri(self) -> str:
        relays = "".join(f"relay={quote(url, safe='')}&" for url in self._urls)
        return f"nostr+walletconnect://{self.pubkey}?{relays}secret={self.secret}"

    @property
    def executed(self) -> list[str]:
        return [request.method for request in self.requests]

    def knows(self, invoice: Invoice) -> Invoice:
        self.preimages[invoice.text] = invoice.preimage
        return invoice

    def will(self, method: str, *replies: Reply) -> None:
        """Answer the next requests for this method so, one after the other, before it behaves again."""
        self._scripts.setdefault(method, deque()).extend(replies)

    async def __aenter__(self) -> "FakeWallet":
        self._listening = {url: asyncio.Event() for url in self._urls}
        for url in self._urls:
            self._start(self._stay(url))
        await self.until_listening()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until_listening(self, seconds: float = 30.0) -> None:
        """Subscribed on all its relays; after a relay's restart that takes a moment."""
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(event.wait() for event in self._listening.values()))

    # At the relays

    @property
    def _urls(self) -> Sequence[str]:
        return [self.relays] if isinstance(self.relays, str) else self.relays

    def _start(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stay(self, url: str) -> None:
        while True:
            with suppress(OSError, TimeoutError, WebSocketException):
                async with connect(url, proxy=None, compression=None, close_timeout=0.2) as socket:
                    await self._listen(socket, self._listening[url])
            self._listening[url].clear()
            await asyncio.sleep(0.1)

    async def _listen(self, socket: ClientConnection, is_listening: asyncio.Event) -> None:
        if self.announces:
            await socket.send(json.dumps(["EVENT", self.info_event()]))
        await socket.send(json.dumps(["REQ", "wallet", {"kinds": [23194], "#p": [self.pubkey]}]))
        async for text in socket:
            match json.loads(text):
                case ["EOSE", "wallet"]:
                    is_listening.set()
                case ["EVENT", "wallet", event]:
                    self._start(self._serve(socket, event))

    async def _serve(self, socket: ClientConnection, event: Json) -> None:
        if self.remembers and event["id"] in self._seen:
            return
        self._seen.add(event["id"])
        request = self.read(event)
        if request is None:
            return
        self.requests.append(request)
        script = self._scripts.get(request.method)
        reply = script.popleft() if script else behave
        for answer in await reply(self, request):
            with suppress(WebSocketException):
                await socket.send(json.dumps(["EVENT", answer]))

    # Its words

    def info_event(self) -> Json:
        tags = [["encryption", " ".join(self.encryptions)]] if self.tags_encryption else []
        return self.event(13194, self.separator.join(self.methods), tags)

    def read(self, event: Json) -> Request | None:
        """None if it is encrypted in a way this wallet does not speak: then it stays silent, as LNbits does."""
        encryption = dict(tag[:2] for tag in event["tags"]).get("encryption", "nip04")
        if encryption not in self.encryptions or not sdk.Event.from_json(json.dumps(event)).verify():
            return None
        body = json.loads(self.decrypt(event["content"], event["pubkey"], encryption))
        return Request(event["id"], event["pubkey"], encryption, body["method"], body["params"], event["tags"])

    def decrypt(self, content: str, client: str, encryption: str) -> str:
        decrypt = self.keys.nip04_decrypt if encryption == "nip04" else self.keys.nip44_decrypt
        return str(decrypt(sdk.PublicKey.parse(client), content))

    def encrypt(self, text: str, client: str, encryption: str) -> str:
        encrypt = self.keys.nip04_encrypt if encryption == "nip04" else self.keys.nip44_encrypt
        return str(encrypt(sdk.PublicKey.parse(client), text))

    def event(self, kind: int, content: str, tags: Sequence[list[str]], keys: sdk.Keys | None = None) -> Json:
        built = sdk.EventBuilder(sdk.Kind(kind), content).tags([sdk.Tag.parse(tag) for tag in tags])
        event: Json = json.loads(built.finalize(keys or self.keys).as_json())
        return event

    def answer(
        self,
        request: Request,
        text: str,
        *,
        encryption: str | None = None,
        keys: sdk.Keys | None = None,
        has_p: bool = True,
    ) -> Json:
        """A response event around any text."""
        content = self.encrypt(text, request.client, encryption or request.encryption)
        tags = [["e", request.id]] + [["p", request.client]] * has_p
        return self.event(23195, content, tags, keys)


# What it does with a request


async def behave(wallet: FakeWallet, request: Request) -> Sequence[Json]:
    """What a good wallet does."""
    return await _GOOD.get(request.method, refuse("NOT_IMPLEMENTED"))(wallet, request)


def result(**fields: Any) -> Reply:
    """Answer with this result, whatever was asked."""

    async def reply(wallet: FakeWallet, request: Request) -> Sequence[Json]:
        body = {"result_type": request.method, "error": None, "result": fields}
        return [wallet.answer(request, json.dumps(body))]

    return reply


def refuse(code: str, message: str = "no") -> Reply:
    async def reply(wallet: FakeWallet, request: Request) -> Sequence[Json]:
        body = {"result_type": request.method, "error": {"code": code, "message": message}, "result": None}
        return [wallet.answer(request, json.dumps(body))]

    return reply


def say(text: str, *, encryption: str | None = None, has_p: bool = True) -> Reply:
    """Answer with any text, encrypted in this way or in the request's."""

    async def reply(wallet: FakeWallet, request: Request) -> Sequence[Json]:
        return [wallet.answer(request, text, encryption=encryption, has_p=has_p)]

    return reply


async def stay_silent(wallet: FakeWallet, request: Request) -> Sequence[Json]:
    return []


def both(*replies: Reply) -> Reply:
    """All their events, in this order."""

    async def reply(wallet: FakeWallet, request: Request) -> Sequence[Json]:
        return [event for one in replies for event in await one(wallet, request)]

    return reply


def after(waited: Awaitable[Any], then: Reply) -> Reply:
    async def reply(wallet: FakeWallet, request: Request) -> Sequence[Json]:
        await waited
        return await then(wallet, request)

    return reply


def altered(change: Callable[[Json], Json], reply: Reply) -> Reply:
    """Its events as somebody changed them after they were signed."""

    async def altering(wallet: FakeWallet, request: Request) -> Sequence[Json]:
        return [change(event) for event in await reply(wallet, request)]

    return altering


async def _pay(wallet: FakeWallet, request: Request) -> Sequence[Json]:
    text = request.params["invoice"]
    preimage = await wallet.pay(text) if wallet.pay is not None else wallet.preimages.get(text)
    if preimage is None:
        return await refuse("PAYMENT_FAILED", "no route")(wallet, request)
    wallet.paid.append(text)
    return await result(preimage=preimage, fees_paid=1000)(wallet, request)


async def _get_info(wallet: FakeWallet, request: Request) -> Sequence[Json]:
    about = {"alias": "fake", "color": "#ff9900", "pubkey": "02" * 33, "block_height": 100, "block_hash": "00" * 32}
    return await result(**about, network=wallet.network, methods=list(wallet.methods), notifications=[])(
        wallet, request
    )


async def _get_balance(wallet: FakeWallet, request: Request) -> Sequence[Json]:
    return await result(balance=wallet.balance_msat)(wallet, request)


async def _look_up(wallet: FakeWallet, request: Request) -> Sequence[Json]:
    payment_hash = request.params.get("payment_hash")
    for text in wallet.paid:
        found = bolt11.decode(text)
        if found.payment_hash == payment_hash:
            known = {
                "type": "outgoing",
                "invoice": text,
                "payment_hash": payment_hash,
                "preimage": wallet.preimages[text],
            }
            amounts = {"amount": int(found.amount_msat or 0), "fees_paid": 1000, "created_at": found.date}
            return await result(**known, **amounts, settled_at=found.date)(wallet, request)
    return await refuse("NOT_FOUND")(wallet, request)


_GOOD: dict[str, Reply] = {
    "pay_invoice": _pay,
    "get_info": _get_info,
    "get_balance": _get_balance,
    "lookup_invoice": _look_up,
}
