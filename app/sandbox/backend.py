"""The sandbox's living state: it asks the chains, lets the pure machine decide, writes down, and tells the webhooks."""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from decimal import Decimal

from msgspec import Struct
from msgspec.structs import replace

from . import invoices
from .chain import Chain, SimulatedChain
from .errors import Impossible, Invalid, NoPaymentMethod, NotFound
from .ids import new_id
from .invoices import Change, Event, EventType, Invoice, Prompt, Seen, Status, advance, asked, observe
from .lightning import LightningNode, Request, to_coins, to_msat
from .methods import Method
from .rates import RateBook, round_price
from .setup import Setup
from .store import Store
from .webhooks import Post
from .wire import Order

BELOW_DUST = (
    "Amount below the dust threshold. For amounts of this size, it is recommended to enable an off-chain (Lightning) "
    "payment method"
)


class ClockSetting(Struct, frozen=True):
    """How far the sandbox's clock is ahead of the machine's."""

    ahead_seconds: int = 0


class Clock:
    """The machine's time plus what the driver moved it ahead by, which is remembered between runs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ahead_seconds = (store.get("settings", "clock", ClockSetting) or ClockSetting()).ahead_seconds

    def now(self) -> int:
        """Unix seconds."""
        return int(time.time()) + self.ahead_seconds

    def move(self, seconds: int) -> None:
        """Move ahead, or back where negative."""
        self.ahead_seconds += seconds
        self.store.put("settings", "clock", ClockSetting(self.ahead_seconds))


class Backend:
    """Every invoice of the store and what can happen to it.

    A verb that waits for a chain reads the invoice again afterwards: others may have changed it meanwhile.
    """

    def __init__(
        self,
        store_id: str,
        public_url: str,
        store: Store,
        chains: Mapping[str, Chain],
        node: LightningNode,
        post: Post,
        rates: RateBook,
        clock: Clock,
        setup: Setup,
    ) -> None:
        self.store_id = store_id
        self.public_url = public_url
        self.store = store
        self.chains = chains
        self.node = node
        self.post = post
        self.rates = rates
        self.clock = clock
        self.setup = setup
        kept = sorted(store.every("invoices", Invoice), key=lambda invoice: invoice.number)
        self._invoices = {invoice.id: invoice for invoice in kept}
        self._next_number = kept[-1].number + 1 if kept else 1

    # Reading

    def invoice(self, id: str) -> Invoice:
        """The invoice as the clock leaves it now. Raises NotFound."""
        if id not in self._invoices:
            raise NotFound("invoice")
        return self._apply(advance(self._invoices[id], self.clock.now()))

    def newest_first(self) -> Iterator[Invoice]:
        for id in list(reversed(self._invoices)):
            yield self.invoice(id)

    # Making

    async def create(self, order: Order) -> Invoice:
        """Make an invoice with every method that can be offered. Raises NoPaymentMethod if there is none."""
        invoice = self._draft(order)
        problems: list[str] = []
        # BTCPay offers nothing to pay for an invoice over zero.
        for method in order.methods if order.amount != 0 else ():
            prompt = await self._offer(invoice, method, problems)
            if prompt is not None:
                invoice = replace(invoice, prompts=(*invoice.prompts, prompt))
        if problems and not invoice.prompts:
            raise NoPaymentMethod(problems)
        self._apply(Change(invoice, (Event(EventType.CREATED, {}),)))
        return self.invoice(invoice.id)

    def _draft(self, order: Order) -> Invoice:
        now = self.clock.now()
        number = self._next_number
        self._next_number += 1
        expires_at = now + order.expires_in_seconds
        return Invoice(
            id=new_id(),
            number=number,
            store_id=self.store_id,
            price=round_price(order.amount or Decimal(0), order.currency),
            currency=order.currency,
            is_topup=order.amount is None,
            metadata=order.metadata,
            checkout=order.options,
            speed=order.speed,
            tolerance=order.tolerance,
            created_at=now,
            expires_at=expires_at,
            watched_until=expires_at + order.watched_for_seconds,
        )

    async def _offer(self, invoice: Invoice, method: Method, problems: list[str]) -> Prompt | None:
        if method.id in self.setup.disabled | self.setup.offline:
            is_down = method.id in self.setup.offline
            problems.append(f"{method.id}: {'Full node not available' if is_down else 'No wallet has been linked'}")
            return None
        rate = self.rates.rate(method.coin, invoice.currency)
        if rate is None:
            problems.append(f"{method.id}: Rate unavailable ({method.coin}_{invoice.currency})")
            return None
        prompt = Prompt(method.id, rate, method.first_fee)
        amount = asked(replace(invoice, prompts=(prompt,)), prompt).amount
        if not invoice.is_topup and amount < method.dust:
            problems.append(f"{method.id}: {BELOW_DUST}")
            return None
        if method.is_lightning:
            return self._lightning(invoice, prompt, amount)
        try:
            return replace(prompt, destination=await self.chains[method.id].new_address())
        except OSError as error:
            problems.append(f"{method.id}: Full node not available ({error})")
            return None

    def _lightning(self, invoice: Invoice, prompt: Prompt, amount: Decimal) -> Prompt:
        """The prompt with a BOLT11 over what is due. What its node rounded is a fee, negative where that was down.

        Source: LightningLikePaymentHandler.cs (the tweak fee), v2.4.1.
        """
        payable = self.node.payable(amount) if amount > 0 else amount
        tweaked = replace(prompt, fee=prompt.fee + payable - amount)
        return replace(tweaked, destination=self._bolt11(invoice, payable).bolt11)

    def _bolt11(self, invoice: Invoice, amount: Decimal) -> Request:
        """A BOLT11 for this many whole bitcoins that lasts as long as the invoice, unless its node knows better."""
        text = f"Paid to Sandbox store (Order ID: {invoice.metadata.get('orderId', '')})"
        now, minutes = self.clock.now(), self.setup.bolt11_minutes
        until = invoice.expires_at if minutes is None else now + minutes * 60
        return self.node.request(invoice.id, to_msat(amount) or None, text, now, until)

    # Paying and the rest of the world

    async def pay(
        self,
        id: str,
        amount: Decimal | None = None,
        method: Method | None = None,
        is_late: bool = False,
        is_replaceable: bool = False,
    ) -> Invoice:
        """Pay whole coins: what is due if no amount is given, the full amount again if nothing is due."""
        if is_late and self.invoice(id).status is Status.NEW:
            self.expire(id)
        invoice = self.invoice(id)
        prompt = self._prompt_to_pay(invoice, method)
        figures = asked(invoice, prompt)
        value = amount if amount is not None else (figures.due if figures.due > 0 else figures.amount)
        if value <= 0:
            raise Invalid(("amount", f"{value} {prompt.facts.coin} cannot be paid; give a positive amount"))
        if prompt.facts.is_lightning:
            return self._pay_lightning(invoice, prompt, to_msat(value))
        self._simulated(prompt.method).pay(prompt.destination, value, self.clock.now(), is_replaceable)
        return await self.poll(id)

    def pay_bolt11(self, text: str, amount_msat: int | None = None) -> tuple[Request, Invoice]:
        """Pay as a wallet does: once, before expiry, at least what is asked. Returns the request with its preimage.

        Raises NotFound for a BOLT11 that is not ours, Impossible for one that no node would take money for.
        """
        request = self.node.find(text)
        if request is None:
            raise NotFound("bolt11")
        value_msat = amount_msat or request.amount_msat or 0
        if request.paid_msat:
            raise Impossible("invoice already paid")
        if self.clock.now() >= request.expires_at:
            raise Impossible("invoice expired")
        if value_msat <= 0 or value_msat < (request.amount_msat or 0):
            raise Impossible(f"the invoice asks for {request.amount_msat or 'some'} msat, {value_msat} msat offered")
        return self._settle_bolt11(self.invoice(request.invoice_id), request, value_msat)

    def _prompt_to_pay(self, invoice: Invoice, method: Method | None) -> Prompt:
        prompt = invoice.prompt(method.id) if method else next(iter(invoice.prompts), None)
        if prompt is None:
            raise Impossible(f"invoice {invoice.id} does not offer {method.id if method else 'any payment method'}")
        return prompt

    def _pay_lightning(self, invoice: Invoice, prompt: Prompt, amount_msat: int) -> Invoice:
        """Pay the invoice's BOLT11 any amount; one that was paid already is followed by another."""
        request = self.node.find(prompt.destination)
        if request is None or request.paid_msat:
            request = self._bolt11(invoice, to_coins(amount_msat))
        return self._settle_bolt11(invoice, request, amount_msat)[1]

    def _settle_bolt11(self, invoice: Invoice, request: Request, amount_msat: int) -> tuple[Request, Invoice]:
        now = self.clock.now()
        paid = self.node.take_payment(request, amount_msat)
        sight = Seen(paid.payment_hash, to_coins(amount_msat), 0, now)
        invoice = self._apply(observe(invoice, "BTC-LN", paid.bolt11, [sight], now))
        return paid, self._ask_again(invoice)

    def _ask_again(self, invoice: Invoice) -> Invoice:
        """A BOLT11 is paid once, so a partial payment is followed by another one over the rest."""
        prompt = invoice.prompt("BTC-LN")
        if prompt is None or invoice.status is not Status.NEW:
            return invoice
        renewed = self._lightning(invoice, prompt, asked(invoice, prompt).due)
        prompts = tuple(renewed if other is prompt else other for other in invoice.prompts)
        return self._apply(Change(replace(invoice, prompts=prompts)))

    async def confirm(self, id: str, blocks: int) -> Invoice:
        """Bury this invoice's on-chain payments under more blocks."""
        for prompt in self._on_chain(self.invoice(id)):
            self._simulated(prompt.method).confirm(prompt.destination, blocks)
        return await self.poll(id)

    async def double_spend(self, id: str, payment_id: str | None) -> Invoice:
        """Replace an on-chain payment: the newest unconfirmed one unless it is named. Raises Impossible."""
        paid = {payment.method for payment in self.invoice(id).payments if payment_id in (None, payment.id)}
        prompts = [prompt for prompt in self._on_chain(self.invoice(id)) if prompt.method in paid]
        if not prompts:
            raise Impossible(f"invoice {id} has no on-chain payment to double-spend")
        self._simulated(prompts[0].method).double_spend(prompts[0].destination, payment_id)
        return await self.poll(id)

    def expire(self, id: str, with_monitoring: bool = False) -> Invoice:
        """Let this invoice's time run out now; `with_monitoring` ends the time to confirm as well."""
        invoice = self.invoice(id)
        now = self.clock.now()
        gone = max(invoice.expires_at - now, 0)
        watched_until = now - 1 if with_monitoring else invoice.watched_until - gone
        shortened = replace(invoice, expires_at=invoice.expires_at - gone, watched_until=watched_until)
        self._apply(Change(shortened))
        return self.invoice(id)

    def mark(self, id: str, status: str) -> Invoice:
        """The operator's word. Raises Invalid where BTCPay does not allow it."""
        invoice = self.invoice(id)
        change = invoices.mark(invoice, Status(status)) if status in ("Settled", "Invalid") else None
        if change is None:
            sentence = "Status can only be marked to invalid or settled within certain conditions."
            raise Invalid(("status", sentence))
        return self._apply(change)

    async def poll(self, id: str) -> Invoice:
        """Take over what the chains show for this invoice now. Raises OSError while a real node is away."""
        for prompt in self._on_chain(self.invoice(id)):
            seen = await self.chains[prompt.method].payments_to(prompt.destination)
            self._apply(observe(self.invoice(id), prompt.method, prompt.destination, seen, self.clock.now()))
        return self.invoice(id)

    async def tick(self) -> None:
        """What happens by itself: invoices expire or fail to confirm, and real chains are asked for news."""
        for invoice in list(self._invoices.values()):
            if invoice.status in (Status.NEW, Status.PROCESSING):
                self.invoice(invoice.id)
            if self.clock.now() <= invoice.watched_until and any(map(self._is_real, invoice.prompts)):
                # A node that is away now is asked again at the next tick.
                with suppress(OSError):
                    await self.poll(invoice.id)

    # Inside

    def _on_chain(self, invoice: Invoice) -> list[Prompt]:
        return [prompt for prompt in invoice.prompts if prompt.method in self.chains]

    def _is_real(self, prompt: Prompt) -> bool:
        return prompt.method in self.chains and not isinstance(self.chains[prompt.method], SimulatedChain)

    def _simulated(self, method: str) -> SimulatedChain:
        chain = self.chains[method]
        if not isinstance(chain, SimulatedChain):
            raise Impossible(f"{method} is attached to a real chain: pay and mine there")
        return chain

    def _apply(self, change: Change) -> Invoice:
        """Keep the invoice, then tell; nothing is written when nothing changed."""
        invoice = change.invoice
        if self._invoices.get(invoice.id) != invoice:
            self._invoices[invoice.id] = invoice
            self.store.put("invoices", invoice.id, invoice)
        for event in change.events:
            self.post.publish(invoice, event)
        return invoice
