"""The invoice as BTCPay 2.4.1 thinks of it: a pure state machine and pure figures; values in, values out.

Time is an argument everywhere (`now`, unix seconds). Nothing here talks to a chain, a disk or a receiver.
Source: HostedServices/InvoiceWatcher.cs, Services/Invoices/InvoiceEntity.cs, Services/Invoices/InvoiceRepository.cs
and HostedServices/NBXplorerListener.cs of BTCPay Server v2.4.1.
"""

from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from enum import StrEnum
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .methods import METHODS, Method


class Status(StrEnum):
    NEW = "New"
    PROCESSING = "Processing"
    SETTLED = "Settled"
    EXPIRED = "Expired"
    INVALID = "Invalid"


class Additional(StrEnum):
    NONE = "None"
    PAID_PARTIAL = "PaidPartial"
    PAID_LATE = "PaidLate"
    PAID_OVER = "PaidOver"
    MARKED = "Marked"


class PaymentStatus(StrEnum):
    PROCESSING = "Processing"
    SETTLED = "Settled"
    INVALID = "Invalid"


class EventType(StrEnum):
    CREATED = "InvoiceCreated"
    RECEIVED_PAYMENT = "InvoiceReceivedPayment"
    PAYMENT_SETTLED = "InvoicePaymentSettled"
    PROCESSING = "InvoiceProcessing"
    SETTLED = "InvoiceSettled"
    INVALID = "InvoiceInvalid"
    EXPIRED = "InvoiceExpired"
    EXPIRED_PAID_PARTIAL = "InvoiceExpiredPaidPartial"
    PAID_AFTER_EXPIRATION = "InvoicePaidAfterExpiration"


SPEED_CONFIRMATIONS = {"HighSpeed": 0, "MediumSpeed": 1, "LowMediumSpeed": 2, "LowSpeed": 6}


class Seen(Struct, frozen=True):
    """A payment as its chain shows it now: `value` in whole coins, `seen_at` in unix seconds.

    `replaced`: another transaction spent the same coins. `replaceable`: the payer announced that it might happen.
    `conflicts`: the transactions that would have spent the same coins, had this one not.
    """

    id: str
    value: Decimal
    confirmations: int
    seen_at: int
    replaced: bool = False
    replaceable: bool = False
    conflicts: tuple[str, ...] = ()


class Payment(Struct, frozen=True):
    """A payment as the invoice keeps it: `value` and the `fee` within it in whole coins."""

    id: str
    method: str
    value: Decimal
    fee: Decimal
    status: PaymentStatus
    received_at: int
    destination: str

    @property
    def is_accounted(self) -> bool:
        return self.status is not PaymentStatus.INVALID


class Prompt(Struct, frozen=True):
    """One way in which this invoice can be paid: `rate` is invoice currency per whole coin, `fee` whole coins."""

    method: str
    rate: Decimal
    fee: Decimal
    destination: str = ""

    @property
    def facts(self) -> Method:
        return METHODS[self.method]


class Invoice(Struct, frozen=True):
    """`price` is in `currency`, `tolerance` in percent, times in unix seconds; `number` orders equal times.

    `is_topup`: made without an amount; the first payment sets the price.
    """

    id: str
    number: int
    store_id: str
    price: Decimal
    currency: str
    is_topup: bool
    metadata: dict[str, Any]
    checkout: dict[str, Any]
    speed: str
    tolerance: Decimal
    created_at: int
    expires_at: int
    watched_until: int
    status: Status = Status.NEW
    additional: Additional = Additional.NONE
    prompts: tuple[Prompt, ...] = ()
    payments: tuple[Payment, ...] = ()

    def prompt(self, method: str) -> Prompt | None:
        return next((prompt for prompt in self.prompts if prompt.method == method), None)


class Event(Struct, frozen=True):
    """What happened, with the facts its webhook tells: a payment or a few booleans."""

    type: EventType
    facts: Mapping[str, bool]
    payment: Payment | None = None


class Change(Struct, frozen=True):
    """The invoice after something happened, and what there is to tell about it, in order."""

    invoice: Invoice
    events: tuple[Event, ...] = ()


# The machine


def advance(invoice: Invoice, now: int) -> Change:
    """Let the watcher look until nothing changes any more, as BTCPay's loop does (at most six times)."""
    if invoice.status in (Status.SETTLED, Status.INVALID):
        return Change(invoice)
    events: list[Event] = []
    for _ in range(6):
        change = _look(invoice, now)
        events += change.events
        if change.invoice == invoice:
            break
        invoice = change.invoice
    return Change(invoice, tuple(events))


def _look(invoice: Invoice, now: int) -> Change:
    """One pass of InvoiceWatcher.UpdateInvoice: expire, count, un-count, settle or give up, in this order."""
    events: list[Event] = []
    for rule in (_expire, _count, _recount, _conclude):
        change = rule(invoice, now)
        invoice = change.invoice
        events += change.events
    return Change(invoice, tuple(events))


def _expire(invoice: Invoice, now: int) -> Change:
    if invoice.status is not Status.NEW or invoice.expires_at > now:
        return Change(invoice)
    is_partial = invoice.additional is Additional.PAID_PARTIAL
    events = [Event(EventType.EXPIRED, {"partiallyPaid": is_partial})]
    if is_partial:
        events.append(Event(EventType.EXPIRED_PAID_PARTIAL, {}))
    return Change(replace(invoice, status=Status.EXPIRED), tuple(events))


def _count(invoice: Invoice, now: int) -> Change:
    """Payments move a New invoice to Processing and an Expired one to PaidLate; unconfirmed ones count."""
    if invoice.status not in (Status.NEW, Status.EXPIRED):
        return Change(invoice)
    sums = totals(invoice)
    has_payment = any(payment.is_accounted for payment in invoice.payments)
    is_paid = has_payment if _has_no_price_yet(invoice) else sums.minimum_net_due <= 0
    if is_paid and invoice.status is Status.NEW:
        return _to_processing(invoice)
    if is_paid and invoice.additional is not Additional.PAID_LATE:
        late = replace(invoice, additional=Additional.PAID_LATE)
        return Change(late, (Event(EventType.PAID_AFTER_EXPIRATION, {}),))
    if has_payment and not is_paid:
        return Change(replace(invoice, additional=Additional.PAID_PARTIAL))
    return Change(invoice)


def _has_no_price_yet(invoice: Invoice) -> bool:
    return invoice.is_topup and invoice.price == 0


def _to_processing(invoice: Invoice) -> Change:
    if _has_no_price_yet(invoice):
        invoice = replace(invoice, price=totals(invoice).paid_net)
    is_over = totals(invoice).net_due < 0
    additional = Additional.PAID_OVER if is_over else Additional.NONE
    paid = replace(invoice, status=Status.PROCESSING, additional=additional)
    return Change(paid, (Event(EventType.PROCESSING, {"overPaid": is_over}),))


def _recount(invoice: Invoice, now: int) -> Change:
    """A replaced payment may take PaidOver away, or silently put a Processing invoice back to New."""
    if invoice.status is not Status.PROCESSING:
        return Change(invoice)
    sums = totals(invoice)
    if sums.minimum_net_due > 0:
        has_payment = any(payment.is_accounted for payment in invoice.payments)
        additional = Additional.PAID_PARTIAL if has_payment else Additional.NONE
        return Change(replace(invoice, status=Status.NEW, additional=additional))
    if sums.net_due < 0:
        return Change(replace(invoice, additional=Additional.PAID_OVER))
    if invoice.additional is Additional.PAID_OVER:
        return Change(replace(invoice, additional=Additional.NONE))
    return Change(invoice)


def _conclude(invoice: Invoice, now: int) -> Change:
    """Settled once confirmed payments alone cover the minimum; Invalid if they do not before monitoring ends."""
    if invoice.status is not Status.PROCESSING:
        return Change(invoice)
    sums = totals(invoice)
    if sums.minimum_net_due + sums.unconfirmed_net <= 0:
        facts = {"manuallyMarked": False, "overPaid": invoice.additional is Additional.PAID_OVER}
        return Change(replace(invoice, status=Status.SETTLED), (Event(EventType.SETTLED, facts),))
    if invoice.watched_until < now:
        event = Event(EventType.INVALID, {"manuallyMarked": False})
        return Change(replace(invoice, status=Status.INVALID), (event,))
    return Change(invoice)


def observe(invoice: Invoice, method: str, destination: str, seen: Sequence[Seen], now: int) -> Change:
    """Take over what a chain shows for one destination, then advance.

    A new payment is told with ReceivedPayment; where it is settled at first sight (Lightning, zero confirmations) its
    PaymentSettled comes before that, for `PaymentService.AddPayment` publishes it first.
    """
    events: list[Event] = []
    for sight in seen:
        change = _observe_one(invoice, method, destination, sight)
        invoice = change.invoice
        events += change.events
    change = advance(invoice, now)
    return Change(change.invoice, (*events, *change.events))


def _observe_one(invoice: Invoice, method: str, destination: str, sight: Seen) -> Change:
    status = _status_of(invoice, METHODS[method], sight)
    known = next((p for p in invoice.payments if (p.id, p.method) == (sight.id, method)), None)
    if known is None:
        return _receive(invoice, method, destination, sight, status)
    if known.status is status:
        return Change(invoice)
    payment = replace(known, status=status)
    payments = tuple(payment if p is known else p for p in invoice.payments)
    events = (_told(invoice, EventType.PAYMENT_SETTLED, payment),) if status is PaymentStatus.SETTLED else ()
    return Change(replace(invoice, payments=payments), events)


def _status_of(invoice: Invoice, method: Method, sight: Seen) -> PaymentStatus:
    if sight.replaced:
        return PaymentStatus.INVALID
    enough = sight.confirmations >= confirmations_needed(invoice, method, sight.replaceable)
    return PaymentStatus.SETTLED if method.is_lightning or enough else PaymentStatus.PROCESSING


def confirmations_needed(invoice: Invoice, method: Method, is_replaceable: bool = False) -> int:
    """Blocks until a payment counts as settled; HighSpeed still wants one where the payer may replace it."""
    if method.is_lightning:
        return 0
    if method.confirmations is not None:
        return method.confirmations
    return max(SPEED_CONFIRMATIONS[invoice.speed], 1 if is_replaceable else 0)


def _receive(invoice: Invoice, method: str, destination: str, sight: Seen, status: PaymentStatus) -> Change:
    prompt = invoice.prompt(method)
    if prompt is None or status is PaymentStatus.INVALID:
        return Change(invoice)
    # Who replaces a payment of theirs does not pay for a second one.
    fee = next((p.fee for p in invoice.payments if _is_replaced_by(p, method, sight)), prompt.fee)
    payment = Payment(sight.id, method, sight.value, fee, status, sight.seen_at, destination)
    events = [_told(invoice, EventType.RECEIVED_PAYMENT, payment)]
    if status is PaymentStatus.SETTLED:
        events.insert(0, _told(invoice, EventType.PAYMENT_SETTLED, payment))
    # From now on one more input must be paid for: BTCPay's default network fee mode, MultiplePaymentsOnly.
    dearer = tuple(replace(p, fee=p.facts.next_fee) if p is prompt else p for p in invoice.prompts)
    return Change(replace(invoice, payments=(*invoice.payments, payment), prompts=dearer), tuple(events))


def _is_replaced_by(payment: Payment, method: str, sight: Seen) -> bool:
    transaction, _, _ = payment.id.rpartition("-")
    return payment.method == method and not payment.is_accounted and transaction in sight.conflicts


def _told(invoice: Invoice, type: EventType, payment: Payment) -> Event:
    return Event(type, {"afterExpiration": invoice.status in (Status.EXPIRED, Status.INVALID)}, payment)


def mark(invoice: Invoice, status: Status) -> Change | None:
    """The operator's word, as Settled or Invalid; None where BTCPay does not allow it now."""
    if status not in markable(invoice):
        return None
    marked = replace(invoice, status=status, additional=Additional.MARKED)
    if status is Status.SETTLED:
        return Change(marked, (Event(EventType.SETTLED, {"manuallyMarked": True, "overPaid": False}),))
    return Change(marked, (Event(EventType.INVALID, {"manuallyMarked": True}),))


def markable(invoice: Invoice) -> list[Status]:
    """What the operator may mark this invoice as. Source: InvoiceState.CanMarkComplete and CanMarkInvalid."""
    is_marked = invoice.additional is Additional.MARKED
    statuses = []
    if invoice.status is not Status.SETTLED:
        statuses.append(Status.SETTLED)
    if invoice.status in (Status.NEW, Status.PROCESSING, Status.EXPIRED) or (
        invoice.status is Status.SETTLED and is_marked
    ):
        statuses.append(Status.INVALID)
    return statuses


# The figures


class Totals(Struct, frozen=True):
    """Sums over the accounted payments of every method, all in the invoice's currency.

    `net_due` is negative when overpaid beyond what the coin's own rounding explains.
    """

    paid_gross: Decimal
    paid_net: Decimal
    unconfirmed_net: Decimal
    net_due: Decimal
    minimum_net_due: Decimal


class Asked(Struct, frozen=True):
    """One method's view of the invoice in whole coins; `due` is negative when overpaid, `fee` is part of `amount`."""

    amount: Decimal
    due: Decimal
    total_paid: Decimal
    method_paid: Decimal
    fee: Decimal


def totals(invoice: Invoice) -> Totals:
    """What was paid and what is still due. Source: InvoiceEntity.UpdateTotals."""
    rates = {prompt.method: prompt.rate for prompt in invoice.prompts}
    counted = [payment for payment in invoice.payments if payment.is_accounted]
    unconfirmed = [payment for payment in counted if payment.status is PaymentStatus.PROCESSING]
    gross = sum((p.value * rates[p.method] for p in counted), Decimal(0))
    net = sum(((p.value - p.fee) * rates[p.method] for p in counted), Decimal(0))
    unconfirmed_net = sum(((p.value - p.fee) * rates[p.method] for p in unconfirmed), Decimal(0))
    minimum = invoice.price * (1 - invoice.tolerance / 100)
    sums = Totals(gross, net, unconfirmed_net, invoice.price - net, minimum - net)
    # Whoever paid one method exactly is not overpaying: the excess is what rounding the coin up cost.
    if sums.net_due < 0 and any(_asked(invoice, prompt, sums).due == 0 for prompt in invoice.prompts):
        return replace(sums, net_due=Decimal(0))
    return sums


def asked(invoice: Invoice, prompt: Prompt) -> Asked:
    """What this method asks for now. Source: InvoiceEntity.PaymentPrompt.Calculate."""
    return _asked(invoice, prompt, totals(invoice))


def _asked(invoice: Invoice, prompt: Prompt, sums: Totals) -> Asked:
    gross_due = invoice.price + (sums.paid_gross - sums.paid_net)
    if sums.minimum_net_due > 0:
        gross_due += prompt.rate * prompt.fee
    due = Decimal(0) if sums.net_due == 0 else gross_due - sums.paid_gross
    own = [p.value for p in invoice.payments if p.is_accounted and p.method == prompt.method]

    def coins(amount: Decimal) -> Decimal:
        return round_up(amount / prompt.rate, prompt.facts.decimals)

    method_paid = round_up(sum(own, Decimal(0)), prompt.facts.decimals)
    return Asked(coins(gross_due), coins(due), coins(sums.paid_gross), method_paid, coins(gross_due - invoice.price))


def round_up(amount: Decimal, decimals: int) -> Decimal:
    """Towards more money asked, at this many decimals. A 1 in the 28th digit is division's own noise and is dropped."""
    return round(amount, 18).quantize(Decimal(1).scaleb(-decimals), ROUND_CEILING)
