"""Fakes that behave: a payment backend whose Lightning invoices can be read, and wallets that pay them, or do not."""

import hashlib
import re
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from app.autotopup.rules import DEFINITE
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
from app.kernel.errors import InvalidField
from app.topups.gateway import GatewayUnavailable, Invoice, InvoiceStatus, NewInvoice
from tests.rig import FakeBtcpay

PUBKEY = "ab" * 32
SECRET = "5ec1e7" * 10 + "5ec1"
NWC_URL = f"nostr+walletconnect://{PUBKEY}?relay=wss://relay.example.com/v1&secret={SECRET}&lud16=me@example.com"
_URI = re.compile(r"nostr\+walletconnect://([0-9a-f]{64})\?relay=(wss://[^&]+)&secret=([0-9a-f]{64})(?:&lud16=(.+))?")


class Killed(BaseException):
    """The process is gone: nothing of ours catches this."""


class Clock:
    """Time that a test moves; it also goes on by itself a little, as time does."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **duration: float) -> None:
        self.now += timedelta(**duration)


class FakeLightning(FakeBtcpay):
    """The fake backend with a BOLT11 of its own for every invoice, which expires by the given clock."""

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        super().__init__()
        self.clock = clock
        self.bolt11s: dict[str, LightningInvoice] = {}
        self.spoils: Callable[[LightningInvoice], LightningInvoice] = lambda bolt11: bolt11

    async def create(self, new: NewInvoice) -> Invoice:
        try:
            made = await super().create(new)
        except GatewayUnavailable:
            for invoice in self.invoices.values():  # it was made, but its answer is lost
                self._with_bolt11(invoice)
            raise
        return self._with_bolt11(made)

    def _with_bolt11(self, invoice: Invoice) -> Invoice:
        if invoice.method != "btc-lightning" or invoice.destination in self.bolt11s:
            return invoice
        now, life = self.clock().replace(microsecond=0), invoice.expires_at - invoice.created_at
        destination = f"lnbcrt1{uuid.uuid4().hex}"
        invoice = replace(
            invoice, destination=destination, payment_link=f"lightning:{destination}", created_at=now, expires_at=now + life,
            watched_until=now + (invoice.watched_until - invoice.created_at),
        )  # fmt: skip
        self.invoices[invoice.id] = invoice
        msat = int(invoice.total * 10**11)
        asks = LightningInvoice("bcrt", msat, hashlib.sha256(destination.encode()).hexdigest(), invoice.expires_at)
        self.bolt11s[destination] = self.spoils(asks)
        return invoice

    async def fetch(self, invoice_id: str) -> Invoice | None:
        invoice = await super().fetch(invoice_id)
        if invoice is not None and invoice.status is InvoiceStatus.NEW and invoice.expires_at <= self.clock():
            self.change(invoice_id, status=InvoiceStatus.EXPIRED)
        return self.invoices.get(invoice_id)

    def of(self, bolt11: str) -> Invoice:
        return next(invoice for invoice in self.invoices.values() if invoice.destination == bolt11)


@dataclass
class FakeWallets:
    """One wallet for everybody, which does what `acts` says, one after the other, and then `act` for ever.

    An act is `pays`, `pays unproven`, `pays silently`, `pays, then OTHER`, `silent`, `unreachable`, `not taken`, `garbage`,
    `wrong preimage`, `late` (silent; pays when `pay_late` is called), `dies unsent`, `dies sent`, `dies paid`, or an error code.
    """

    btcpay: FakeLightning = field(default_factory=FakeLightning)
    act: str = "pays"
    acts: list[str] = field(default_factory=list)
    published: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str, Encryption]] = field(default_factory=list)
    """Event id, BOLT11 and encryption of each request that was published."""
    late: list[str] = field(default_factory=list)
    methods: frozenset[str] = frozenset({"pay_invoice", "lookup_invoice", "get_info"})
    encryption: Encryption = Encryption.NIP44
    unfit: Exception | None = None
    answers_lookups: bool = True
    before_pay: Callable[[str, str], Awaitable[None]] | None = None
    """Told the event id and the BOLT11 before anything is published."""

    def parse(self, uri: str) -> WalletUri:
        found = _URI.fullmatch(uri)
        if found is None:
            raise InvalidField("nwc_url is not a Nostr Wallet Connect URL", param="nwc_url")
        return WalletUri(found[1], (found[2],), found[3], found[4])

    async def probe(self, uri: WalletUri) -> Probe:
        if self.unfit is not None:
            raise self.unfit
        return Probe(self.encryption, self.methods)

    def read_invoice(self, bolt11: str) -> LightningInvoice:
        if bolt11 not in self.btcpay.bolt11s:
            raise ValueError("not a BOLT11")
        return self.btcpay.bolt11s[bolt11]

    def sign_payment(self, connection: Connection, bolt11: str, expires_at: datetime) -> SignedRequest:
        assert connection.uri.secret == SECRET
        return SignedRequest(uuid.uuid4().hex, {"bolt11": bolt11, "encryption": connection.encryption})

    async def pay(self, connection: Connection, request: SignedRequest, payment_hash: str) -> PayReply:
        bolt11 = request.event["bolt11"]
        assert self.btcpay.bolt11s[bolt11].payment_hash == payment_hash
        if self.before_pay is not None:
            await self.before_pay(request.event_id, bolt11)
        act = self.acts.pop(0) if self.acts else self.act
        if act == "dies unsent":
            raise Killed
        if act == "unreachable":
            return PayReply(PayOutcome.UNKNOWN, was_published=False)
        self.published[bolt11] += 1
        self.requests.append((request.event_id, bolt11, request.event["encryption"]))
        if act.startswith("pays") or act == "dies paid":
            self._pay(bolt11)
        if act.startswith("dies"):
            raise Killed
        return self._reply(act, bolt11)

    def _reply(self, act: str, bolt11: str) -> PayReply:
        match act:
            case "pays":
                return PayReply(PayOutcome.PAID, is_proven=True, was_answered=True)
            case "pays unproven" | "wrong preimage":
                return PayReply(PayOutcome.PAID, was_answered=True)
            case "proves without paying":
                return PayReply(PayOutcome.PAID, is_proven=True, was_answered=True)
            case "pays silently" | "silent":
                return PayReply(PayOutcome.UNKNOWN)
            case "late":
                self.late.append(bolt11)
                return PayReply(PayOutcome.UNKNOWN)
            case "not taken":
                return PayReply(PayOutcome.UNKNOWN, was_taken=False)
            case "garbage":
                return PayReply(PayOutcome.UNKNOWN, was_answered=True)
            case _:
                code = act.removeprefix("pays, then ")
                outcome = PayOutcome.REFUSED if code in DEFINITE else PayOutcome.UNKNOWN
                return PayReply(outcome, code, f"the wallet says {code}", was_answered=True)

    def pay_late(self) -> None:
        while self.late:
            self._pay(self.late.pop())

    def _pay(self, bolt11: str) -> None:
        """Money leaves the wallet once per invoice, and not after it expired."""
        if self.paid[bolt11] == 0 and self.btcpay.bolt11s[bolt11].expires_at > self.btcpay.clock():
            self.paid[bolt11] += 1
            self.btcpay.pay(self.btcpay.of(bolt11).id)

    async def look_up(self, connection: Connection, payment_hash: str) -> LookupReply:
        if not self.answers_lookups:
            return LookupReply(is_proven=False, was_answered=False)
        paid = {self.btcpay.bolt11s[bolt11].payment_hash for bolt11, count in self.paid.items() if count}
        return LookupReply(is_proven=payment_hash in paid, was_answered=True)


UNREACHABLE = WalletUnreachable("The wallet could not be reached, or did not answer")
UNSUITABLE = WalletUnsuitable("The wallet is on another network")
