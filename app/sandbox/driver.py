"""The driver's routes under /sandbox: the payer, his wallet, the miners, the exchange, the clock and bad luck, for whoever asks.

Every act on an invoice answers the invoice as it is afterwards, with its payment methods and all payments.
They stand in no real BTCPay. Nobody is asked for a key: serve them on loopback only.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from litestar import Router, get, post

from .backend import Backend
from .behaviour import ordered
from .errors import Invalid, NotFound
from .given import Call, Id, TheBackend, TheOutage, TheWallet
from .invoices import Invoice
from .lightning import Rounding
from .methods import Method, find_method
from .outage import Mode, Outage
from .wallet import view
from .wire import invoice_view, methods_view, plain, read_decimal, read_object


def show(invoice: Invoice, backend: Backend) -> dict[str, Any]:
    """An invoice with its payment methods, replaced payments included."""
    return {**invoice_view(invoice, backend.public_url), "paymentMethods": methods_view(invoice, only_accounted=False)}


@get("/invoices")
async def list_all(backend: TheBackend) -> list[dict[str, Any]]:
    """Every invoice, newest first."""
    return [show(invoice, backend) for invoice in backend.newest_first()]


@get("/invoices/{invoice_id:str}")
async def get_one(invoice_id: Id, backend: TheBackend) -> dict[str, Any]:
    return show(backend.invoice(invoice_id), backend)


# What can happen to an invoice


@post("/invoices/{invoice_id:str}/pay", status_code=200)
async def pay(request: Call, invoice_id: Id, backend: TheBackend) -> dict[str, Any]:
    """{"amount": coins as decimal string, default what is due; "paymentMethodId"; "late": expire it before;
    "replaceable": the payment signals that it may be replaced}"""
    body = read_object(await request.body())
    amount = None if body.get("amount") is None else read_decimal(body["amount"], "amount")
    is_late, is_replaceable = bool(body.get("late")), bool(body.get("replaceable"))
    return show(await backend.pay(invoice_id, amount, _read_method(body), is_late, is_replaceable), backend)


def _read_method(body: Mapping[str, Any]) -> Method | None:
    spelling = body.get("paymentMethodId")
    method = None if spelling is None else find_method(str(spelling))
    if spelling is not None and method is None:
        raise Invalid(("paymentMethodId", "Invalid PaymentMethodId"))
    return method


@post("/invoices/{invoice_id:str}/confirm", status_code=200)
async def confirm(request: Call, invoice_id: Id, backend: TheBackend) -> dict[str, Any]:
    """{"blocks": how many more, default 1}"""
    blocks = _read_integer(read_object(await request.body()), "blocks", 1)
    return show(await backend.confirm(invoice_id, blocks), backend)


@post("/invoices/{invoice_id:str}/double-spend", status_code=200)
async def double_spend(request: Call, invoice_id: Id, backend: TheBackend) -> dict[str, Any]:
    """{"paymentId": default the newest unconfirmed one}"""
    body = read_object(await request.body())
    payment_id = None if body.get("paymentId") is None else str(body["paymentId"])
    return show(await backend.double_spend(invoice_id, payment_id), backend)


@post("/invoices/{invoice_id:str}/expire", status_code=200)
async def expire(request: Call, invoice_id: Id, backend: TheBackend) -> dict[str, Any]:
    """{"monitoring": true to end the time to confirm as well}"""
    body = read_object(await request.body())
    return show(backend.expire(invoice_id, bool(body.get("monitoring"))), backend)


@post("/invoices/{invoice_id:str}/mark", status_code=200)
async def mark(request: Call, invoice_id: Id, backend: TheBackend) -> dict[str, Any]:
    """{"status": "Settled" or "Invalid"}"""
    body = read_object(await request.body())
    return show(backend.mark(invoice_id, str(body.get("status"))), backend)


@post("/invoices/{invoice_id:str}/redeliver", status_code=200)
async def redeliver(request: Call, invoice_id: Id, backend: TheBackend) -> dict[str, Any]:
    """{"type": which event, default the last delivered; "times": default 1}; to every webhook that got it."""
    body = read_object(await request.body())
    invoice, letters = backend.invoice(invoice_id), backend.post
    for rows in letters.deliveries.values():
        told = [row for row in rows if row.invoice_id == invoice_id and body.get("type") in (None, row.type)]
        for _ in range(_read_integer(body, "times", 1) if told else 0):
            letters.redeliver(told[-1])
    return show(invoice, backend)


@post("/lightning/pay", status_code=200)
async def pay_bolt11(request: Call, backend: TheBackend) -> dict[str, Any]:
    """{"bolt11", "amount_msat": for a BOLT11 without amount}: pay as a wallet; answers the preimage and the invoice.

    404 for a BOLT11 that is not ours, 409 for one that was paid, has expired or asks for more.
    """
    body = read_object(await request.body())
    amount_msat = _read_integer(body, "amount_msat", 0) or None
    paid, invoice = backend.pay_bolt11(str(body.get("bolt11")), amount_msat)
    return {
        "payment_hash": paid.payment_hash,
        "preimage": paid.preimage,
        "amount_msat": paid.paid_msat,
        "invoice": show(invoice, backend),
    }


@post("/lightning/rounding", status_code=200)
async def round_lightning(request: Call, backend: TheBackend, outage: TheOutage) -> dict[str, Any]:
    """{"rounding": off, or down or up to whole sats as Blink's and Strike's nodes do}; new invoices alone take notice."""
    wanted = read_object(await request.body()).get("rounding")
    if wanted not in list(Rounding):
        raise Invalid(("rounding", f"{wanted!r} is none of {', '.join(Rounding)}"))
    backend.node.round_to(Rounding(wanted))
    return _world(backend, outage)


@get("/lightning/{text:str}")
async def look_up_bolt11(text: Id, backend: TheBackend) -> dict[str, Any]:
    """What the node knows of a BOLT11 of its own; the preimage once it is paid."""
    request = backend.node.find(text)
    if request is None:
        raise NotFound("bolt11")
    return {
        "payment_hash": request.payment_hash,
        "amount_msat": request.amount_msat,
        "expires_at": request.expires_at,
        "paid_msat": request.paid_msat,
        "preimage": request.preimage if request.paid_msat else None,
        "invoice_id": request.invoice_id,
    }


# The wallet


@get("/wallet")
async def get_wallet(wallet: TheWallet) -> dict[str, Any]:
    """The wallet: the URI that connects it, its balance, how it behaves, what it paid and what it was asked."""
    return view(wallet)


@post("/wallet", status_code=200)
async def change_wallet(request: Call, wallet: TheWallet) -> dict[str, Any]:
    """{"behaviour": pays, refuses, silent, loses_answer, answers_late, pays_late, answers_twice, wrong_preimage,
    zero_preimage, lies, garbage; "methods": to which, default pay_invoice, for silent all; "code": of refuses;
    "delay_seconds": of the late ones; "encryption": both, nip44_v2, nip04, untold; "balance_msat"; "budget_msat", null
    for none; "relays": where it listens, default [] for the sandbox's own}; what is left out stays"""
    await wallet.become(ordered(wallet.state, await request.body()))
    return view(wallet)


# The world around


@get("/")
async def get_world(backend: TheBackend, outage: TheOutage) -> dict[str, Any]:
    """The clock, the rates, the outage, and how many webhook events wait."""
    return _world(backend, outage)


def _world(backend: Backend, outage: Outage) -> dict[str, Any]:
    return {
        "now": backend.clock.now(),
        "clockAheadSeconds": backend.clock.ahead_seconds,
        "rates": {pair: None if rate is None else plain(rate) for pair, rate in backend.rates.pairs.items()},
        "down": {"mode": outage.mode, "methods": sorted(outage.methods), "seconds": outage.seconds},
        "rounding": backend.node.rounding.value,
        "waitingEvents": backend.post.waiting,
        "losingEvents": backend.post.is_losing_everything,
    }


@post("/lose-events", status_code=200)
async def lose_events(request: Call, backend: TheBackend) -> dict[str, int]:
    """Drop what is queued and being retried, as a restart does. {"from_now_on": true} drops all later events too."""
    body = read_object(await request.body())
    backend.post.is_losing_everything = bool(body.get("from_now_on"))
    return {"lost": await backend.post.lose_events()}


@post("/down", status_code=200)
async def go_down(request: Call, backend: TheBackend, outage: TheOutage) -> dict[str, Any]:
    """{"mode": refuse, lost, slow, error, rubbish, off; "methods": HTTP verbs, default all; "seconds": slow's delay}"""
    body = read_object(await request.body())
    if body.get("mode") not in list(Mode):
        raise Invalid(("mode", f"{body.get('mode')!r} is none of {', '.join(Mode)}"))
    outage.mode = Mode(body["mode"])
    outage.methods = frozenset(str(method).upper() for method in body.get("methods") or ())
    outage.seconds = float(read_decimal(body.get("seconds") or 30, "seconds"))
    return _world(backend, outage)


@post("/rates", status_code=200)
async def set_rates(request: Call, backend: TheBackend, outage: TheOutage) -> dict[str, Any]:
    """{"BTC_USD": "65000", "LTC_USD": null for an exchange that does not answer}; new invoices alone take notice."""
    body = read_object(await request.body())
    backend.rates.set({pair: _read_rate(value, pair) for pair, value in body.items()})
    return _world(backend, outage)


def _read_rate(value: Any, pair: str) -> Decimal | None:
    rate = None if value is None else read_decimal(value, pair)
    if rate is not None and rate <= 0:
        raise Invalid((pair, "A rate is positive, or null for none"))
    return rate


@post("/setup", status_code=200)
async def set_up(request: Call, backend: TheBackend) -> Mapping[str, Any]:
    """{"permissions": of the API key; "disabled", "offline": payment methods' ids; "synchronized": false while a node
    catches up; "version"; "bolt11_minutes": how long a BOLT11 lasts, null for as long as its invoice}; the rest stays"""
    backend.setup.change(await request.body())
    return backend.setup.view()


@post("/clock", status_code=200)
async def move_clock(request: Call, backend: TheBackend, outage: TheOutage) -> dict[str, Any]:
    """{"advance_seconds": n}; whatever that lets expire has expired in the answer."""
    backend.clock.move(_read_integer(read_object(await request.body()), "advance_seconds", 0))
    await backend.tick()
    return _world(backend, outage)


def _read_integer(body: Mapping[str, Any], field: str, default: int) -> int:
    value = body.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Invalid((field, f"{value!r} is not a whole number"))
    return value


router = Router(
    "/sandbox",
    route_handlers=[
        list_all,
        get_one,
        pay,
        confirm,
        double_spend,
        expire,
        mark,
        redeliver,
        pay_bolt11,
        round_lightning,
        look_up_bolt11,
        get_wallet,
        change_wallet,
        get_world,
        lose_events,
        go_down,
        set_rates,
        set_up,
        move_clock,
    ],
)
