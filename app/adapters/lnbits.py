"""The LNbits adapter: Lightning invoices of one LNbits wallet, priced by a rate source of our own.

    create ─── rate ── POST payments (never repeated) ── checked ──────────────────────► Invoice
    fetch ──── GET payments/paginated?payment_hash ─┬──────────────────────────────────► Invoice
                                                    └─ pending, in time: GET payment ──► Invoice
    each question goes through asking.py

LNbits' words and what they mean stand in `lnbits_wire.py`.
"""

import asyncio
import hashlib
import hmac
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

import httpx

from app.adapters import lnbits_wire as wire
from app.adapters.asking import Answer, Asker, Patience, checked_key, checked_url
from app.kernel.errors import InvalidSignature
from app.kernel.logs import log
from app.topups.gateway import (
    GatewayError,
    GatewayRefused,
    GatewayUnavailable,
    Hint,
    Invoice,
    NewInvoice,
    Rate,
)

PAGE_PAYMENTS: Final = 200  # a page of 1,000, which is the most, could be larger than an answer may be
MAX_PAGES: Final = 5000
WEBHOOK_AGAIN_SECONDS: Final = 600.0
"""How long invoices are made without a webhook after LNbits refused ours."""

_PAYMENTS: Final = "/api/v1/payments"
_LISTING: Final = "/api/v1/payments/paginated"
_INVOICE_ERROR: Final = 520  # LNbits' own status for what a wallet or its node refused


class RateSource(Protocol):
    """Who says what a coin is worth. Raises GatewayRefused for a coin it has no rate for, GatewayUnavailable
    if it does not know now."""

    async def rate(self, coin: str) -> Rate:
        """USD per whole `coin` now."""

    async def close(self) -> None:
        """Give back the connections."""


class LnbitsGateway:
    """An InvoiceGateway (app.topups.gateway) for btc-lightning on one wallet of an LNbits server, 1.6 or newer.

    The key is the wallet's invoice key, which can make and read invoices; the admin key could spend and is never
    needed. The server's rate limit (200 questions a minute unless told otherwise) must leave room for ours: each
    open top-up asks up to eight times a minute. A `client` that is passed in stays its owner's to close; the rate
    source is closed with the gateway. Source: LNbits 1.6.2, lnbits/core/views/payment_api.py.
    """

    def __init__(
        self,
        *,
        base_url: str,
        invoice_key: str,
        rates: RateSource,
        webhook_url: str | None = None,
        service_name: str = "Satmeter",
        client: httpx.AsyncClient | None = None,
        patience: Patience | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`webhook_url` is where LNbits tells us of payments; without it they are found by asking alone.

        Raises ValueError, naming the setting, if one of them cannot be right.
        """
        self._base_url = checked_url(base_url, "LNBITS_URL")
        self._invoice_key = checked_key(invoice_key, "LNBITS_INVOICE_KEY")
        self._webhook_url = checked_url(webhook_url, "the webhook URL") if webhook_url else None
        self._hint_key = hashlib.sha256(b"satmeter lnbits hint\n" + invoice_key.encode()).digest()
        self._rates, self._service_name = rates, service_name
        self._now, self._monotonic = now, monotonic
        self._no_webhook_until = -math.inf
        self._webhook_trouble: str | None = None
        self._asker = Asker(
            "LNbits",
            self._base_url,
            {"X-Api-Key": invoice_key},
            client=client,
            patience=patience,
            monotonic=monotonic,
            own_words=frozenset({_INVOICE_ERROR}),
        )

    @property
    def name(self) -> str:
        return "lnbits"

    def __repr__(self) -> str:
        return f"LnbitsGateway({self._base_url!r})"

    async def create(self, new: NewInvoice) -> Invoice:
        """Make one invoice, its price in sats rounded up and its rate fixed for its life.

        LNbits has no idempotency key, so this POST is never repeated: after GatewayUnavailable the invoice may
        exist, and `find(new.order_id)` tells. Raises GatewayRefused if LNbits said no, or made an invoice that
        is not what was asked for.
        """
        if new.method != wire.METHOD:
            raise GatewayRefused(f"LNbits has no payment method {new.method!r}; there is {wire.METHOD}")
        rate = await self._price(new.currency)
        made = await self._made(new, rate)
        reason = wire.why_unpayable(new, rate, made)
        if reason is not None:
            raise GatewayRefused(f"LNbits made invoice {made.payment_hash}, but {reason}")
        return wire.to_invoice(made, self._now())

    async def fetch(self, invoice_id: str) -> Invoice | None:
        """The invoice as it stands now, None if this wallet has none of that payment hash, or we did not make it."""
        if not wire.is_payment_hash(invoice_id):
            return None
        body = await self._get(_LISTING, {"payment_hash": invoice_id, "limit": "10"})
        _, found = wire.read_page(body, payment_hash=invoice_id)
        if not found:
            return None
        return wire.to_invoice(await self._refreshed(found[0]), self._now())

    async def find(self, order_id: str) -> Sequence[Invoice]:
        """Every invoice of ours with exactly this order id, oldest first."""
        if not order_id:
            return ()
        query = {"external_id": order_id, "sortby": "time", "direction": "asc", "limit": str(PAGE_PAYMENTS)}
        _, found = wire.read_page(await self._get(_LISTING, query), external_id=order_id)
        now = self._now()
        return [wire.to_invoice(one, now) for one in found if one.extra.order_id == order_id]

    async def list_since(self, since: datetime) -> Sequence[Invoice]:
        """Every invoice of ours made at or after `since`, oldest first.

        LNbits may not have asked its node about the pending ones: `fetch` before deciding that one is unpaid.
        """
        assert since.tzinfo is not None, "since must be aware"
        now = self._now()
        return [wire.to_invoice(one, now) for one in await self._listed(since) if one.time >= since]

    async def rate(self, coin: str) -> Rate:
        """USD per whole BTC now, as our own rate source says."""
        if coin != "BTC":
            raise GatewayRefused(f"no rate for {coin!r}; LNbits takes BTC")
        return await self._rates.rate(coin)

    def read_webhook(self, raw_body: bytes, headers: Mapping[str, str]) -> Hint | None:
        """Which invoice a webhook is about, None if it is about none of ours or makes no sense.

        LNbits does not sign its webhooks, so this is never more than a hint. But it sends the invoice's `extra`
        along, in which we put a token that only we can make: raises InvalidSignature without it, so that
        strangers cannot fill the inbox. LNbits delivers everything twice; both have the same `delivery_id`.
        """
        claim = wire.read_claim(raw_body)
        if claim is None:
            return None
        if not hmac.compare_digest(claim.token, self._hint_token(claim.order_id)):
            raise InvalidSignature
        return Hint(f"{claim.payment_hash}:{claim.status}", "lnbits", claim.payment_hash)

    async def is_healthy(self) -> bool:
        """Whether LNbits answers, knows our key, and there is a rate to price by; never raises.

        Past LNbits' breaker, so that asking neither opens nor closes it.
        """
        try:
            async with asyncio.timeout(self._asker.patience.health_seconds):
                wallet = await self._asker.exchange("GET", "/api/v1/wallet")
                is_ours = wallet.status == 200 and wire.is_wallet(wallet.body)
                return is_ours and bool(await self._rates.rate("BTC"))
        except (GatewayError, httpx.HTTPError, TimeoutError, OSError, RuntimeError):
            return False  # RuntimeError is httpx's word for a client that was closed

    async def close(self) -> None:
        """Give back the connections, unless the client is somebody else's."""
        await self._asker.close()
        await self._rates.close()

    def troubles(self) -> Sequence[str]:
        """What works less well than it is set up to, in sentences for the operator."""
        return (self._webhook_trouble,) if self._webhook_trouble else ()

    # Parts of a verb

    async def _made(self, new: NewInvoice, rate: Rate) -> wire.PaymentWire:
        """The invoice; without a webhook where LNbits' rules refuse ours: payments are then found by asking alone.

        A refusal is final, so asking once more makes no second invoice. Ours is tried again after a while: its
        operator may have allowed it. Source: lnbits/helpers.py, check_callback_url.
        """
        if self._webhook_url is None or self._monotonic() < self._no_webhook_until:
            return await self._posted(new, rate, None)
        try:
            made = await self._posted(new, rate, self._webhook_url)
        except GatewayRefused as refusal:
            if not wire.is_about_callback(str(refusal)):
                raise
            made = await self._posted(new, rate, None)
            self._note_refused_webhook(str(refusal))
            return made
        self._webhook_trouble = None
        return made

    async def _posted(self, new: NewInvoice, rate: Rate, webhook_url: str | None) -> wire.PaymentWire:
        body = wire.new_invoice_body(
            new,
            rate,
            hint_token=self._hint_token(new.order_id),
            webhook_url=webhook_url,
            service_name=self._service_name,
        )
        return wire.read_payment(self._wanted(await self._asker.ask("POST", _PAYMENTS, content=body), may_refuse=True))

    def _note_refused_webhook(self, refusal: str) -> None:
        self._no_webhook_until = self._monotonic() + WEBHOOK_AGAIN_SECONDS
        self._webhook_trouble = (
            f"LNbits takes no webhook to {self._webhook_url}: invoices are made without one, and payments are found by"
            " asking. Allow it in LNbits' callback URL rules, or set LNBITS_WEBHOOK=off"
        )
        log.warning("lnbits.webhook_refused", backend=self.name, url=self._webhook_url, error=refusal)

    async def _price(self, currency: str) -> Rate:
        """Units of `currency` per whole BTC, who said so and when."""
        if currency == "USD":
            return await self._rates.rate("BTC")
        if currency not in wire.FIXED_RATES:
            raise GatewayRefused(f"LNbits takes USD, {', '.join(wire.FIXED_RATES)}, not {currency!r}")
        return Rate(wire.FIXED_RATES[currency], "by definition", self._now())

    async def _refreshed(self, listed: wire.PaymentWire) -> wire.PaymentWire:
        """The payment after LNbits has asked its node, where that can do no harm."""
        if not wire.is_worth_rechecking(listed, self._now()):
            return listed
        fresh = wire.read_details(await self._get(f"{_PAYMENTS}/{listed.payment_hash}"))
        if fresh.payment_hash != listed.payment_hash:
            raise GatewayUnavailable("LNbits answered rubbish: payment.details.payment_hash")
        return fresh

    async def _listed(self, since: datetime) -> list[wire.PaymentWire]:
        """Every payment of ours from `since` on, oldest first.

        Each page starts at the second in which the last one ended, so that neither a new payment nor an order
        that varies among equal times shifts anything; what comes twice is kept once.
        """
        found: dict[str, wire.PaymentWire] = {}
        start = since.astimezone(UTC).replace(microsecond=0)
        for _ in range(MAX_PAGES):
            count, page = await self._page_from(start)
            found |= {one.payment_hash: one for one in page}
            if count < PAGE_PAYMENTS:
                return list(found.values())
            last = max((one.time.astimezone(UTC).replace(microsecond=0) for one in page), default=start)
            if last <= start:
                raise GatewayUnavailable(f"LNbits lists no further than {PAGE_PAYMENTS} payments from {start:%c}")
            start = last
        raise GatewayUnavailable(f"LNbits lists more than {len(found)} payments; ask for a shorter period")

    async def _page_from(self, start: datetime) -> tuple[int, list[wire.PaymentWire]]:
        query = {
            "tag": wire.TAG,
            "time[ge]": start.isoformat(),
            "sortby": "time",
            "direction": "asc",
            "limit": str(PAGE_PAYMENTS),
        }
        return wire.read_page(await self._get(_LISTING, query))

    def _hint_token(self, order_id: str) -> str:
        return hmac.new(self._hint_key, order_id.encode(), hashlib.sha256).hexdigest()[:32]

    # One question

    async def _get(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        return self._wanted(await self._asker.ask("GET", path, query), may_refuse=False)

    def _wanted(self, answer: Answer, *, may_refuse: bool) -> bytes:
        """The body of a success; raises what any other status means."""
        if answer.status in (200, 201):
            return answer.body
        refusal = _meaning(answer, may_refuse=may_refuse)
        # An error page may echo our request, header and all.
        raise type(refusal)(str(refusal).replace(self._invoice_key, "[invoice key]"))


def _meaning(answer: Answer, *, may_refuse: bool) -> GatewayError:
    """What a status other than 200 and 201 means.

    A wrong key is a 404 that speaks of the wallet. 520 is final only with `"status": "failed"`: any other is a
    node that did not answer, and may have made the invoice.
    """
    problem = wire.read_problem(answer.body)
    is_final = answer.status == 400 or (answer.status == _INVOICE_ERROR and problem is not None and problem.is_final)
    if may_refuse and problem is not None and is_final:
        return wire.refusal(problem, answer.status)
    if answer.status in (401, 403):
        return GatewayUnavailable(f"LNbits refused our key (HTTP {answer.status}); see LNBITS_INVOICE_KEY")
    if answer.status == 404 and problem is not None and "wallet" in problem.text.lower():
        return GatewayUnavailable("LNbits has no wallet with our key (HTTP 404); see LNBITS_INVOICE_KEY")
    if answer.status == 404:
        return GatewayUnavailable("LNbits has no such route (HTTP 404); see LNBITS_URL")
    if 300 <= answer.status < 400:
        return GatewayUnavailable(
            f"LNbits redirected us (HTTP {answer.status}); it is not installed yet, or LNBITS_URL is not its final address"
        )
    text = f": {problem.text}" if problem and problem.text else ""
    return GatewayUnavailable(f"LNbits answered HTTP {answer.status}{text}")
