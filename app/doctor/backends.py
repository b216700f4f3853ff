"""The payment backends: who we are there, what may be paid, whether we are told of it, and at what rate."""

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

from app.doctor.lines import Line, duration, fault, ok, warning
from app.kernel.db import row
from app.kernel.errors import DatabaseUnavailable
from app.kernel.money import CURRENCIES, decimal_of
from app.topups.gateway import GatewayError, GatewayRefused, Invoice, InvoiceGateway, NewInvoice
from app.topups.methods import METHODS, Method
from app.topups.setup import BackendSetup, Hook, Inspectable
from app.wiring import House, Rates, second_rates

NEEDED: Final = ("btcpay.store.cancreateinvoice", "btcpay.store.canviewinvoices", "btcpay.store.canviewstoresettings")
WEBHOOKS: Final = "btcpay.store.webhooks.canmodifywebhooks"
"""Not needed, and harmless: with it we can see the webhook; a forged one is a hint that is looked into, and no more."""
_MINTS: Final = ("unrestricted", "btcpay.store.canmodifyinvoices", "btcpay.store.canmodifystoresettings")
EVENTS: Final = frozenset(
    {"InvoiceReceivedPayment", "InvoicePaymentSettled", "InvoiceProcessing", "InvoiceExpired", "InvoiceSettled", "InvoiceInvalid"}
)  # fmt: skip
"""What a webhook must be told for a top-up to be credited at once; what else it is told does no harm."""
_RATE_WARNING_PERCENT: Final = 2
_RATE_FAULT_PERCENT: Final = 5
_PROBE_MINUTES: Final = 5
_SHORTER: Final = 60
"""Seconds that a BOLT11 may end before its invoice without anybody minding."""
_LAST_HINT: Final = """
    SELECT extract(epoch FROM now() - max(received_at))::float AS ago FROM webhook_delivery WHERE backend = :backend"""


async def look(house: House, _: str) -> list[Line]:
    found = await asyncio.gather(*(_one(house, gateway) for gateway in house.gateways), _rates(house))
    return [line for lines in found for line in lines]


async def _one(house: House, gateway: InvoiceGateway) -> list[Line]:
    about = f"{gateway.name}.reach"
    try:
        setup = await gateway.setup() if isinstance(gateway, Inspectable) else None
    except GatewayError as error:
        return [fault(about, str(error), "see BTCPAY_URL, BTCPAY_API_KEY and BTCPAY_STORE_ID")]
    if setup is None and not await gateway.is_healthy():
        return [fault(about, f"{gateway.name} does not answer, or not to our key")]
    lines = [ok(about, f"{gateway.name} answers, version {setup.version}" if setup else f"{gateway.name} answers")]
    if setup is not None:
        lines += _judged(house, setup)
        lines.append(await _hook(house, gateway, setup))
    offered = [METHODS[method] for method in METHODS if _takes(house, gateway, method)]
    lines += await asyncio.gather(*(_method(house, gateway, setup, method) for method in offered))
    return lines


def _takes(house: House, gateway: InvoiceGateway, method: str) -> bool:
    return method in house.gateways.methods and house.gateways.of_method(method) is gateway


# Who we are


def _judged(house: House, setup: BackendSetup) -> Iterator[Line]:
    if not setup.is_synchronized:
        yield fault("btcpay.sync", "one of its nodes is not in step with its chain", "wait, or see BTCPay's own log")
    yield permissions_line(setup.permissions, setup.store_id)


def permissions_line(told: Sequence[str], store_id: str) -> Line:
    """Exactly what is needed, on our store alone. `told` is Greenfield's spelling: `permission` or `permission:store`."""
    about, held = "btcpay.permissions", [_split(permission) for permission in told]
    ours = {name for name, store in held if store in ("", store_id)}
    minting = sorted(ours & set(_MINTS)) + sorted({name for name, _ in held if name.startswith("btcpay.server.")})
    if minting:
        return fault(
            about, f"our key may do what we never need: {', '.join(minting)}; its thief could mark invoices as paid",
            f"make a key with {_words(NEEDED)} on this store",
        )  # fmt: skip
    missing = [name for name in NEEDED if name not in ours]
    if missing:
        return fault(about, f"our key lacks {', '.join(missing)}", f"make a key with {_words(NEEDED)} on this store")
    elsewhere = sorted({store for _, store in held if store not in ("", store_id)})
    everywhere = sorted({name for name, store in held if not store})
    more = sorted(ours - {*NEEDED, WEBHOOKS})
    if more or elsewhere or everywhere:
        reasons = [f"also has {', '.join(more)}"] * bool(more) + ["is good for other stores too"] * bool(elsewhere or everywhere)  # fmt: skip
        return warning(about, f"our key {' and '.join(reasons)}", f"{_words(NEEDED)} on this store are enough")
    return ok(about, "our key may do what is needed on our store, and nothing more")


def _split(permission: str) -> tuple[str, str]:
    name, _, store = permission.partition(":")
    return name, store


def _words(permissions: Sequence[str]) -> str:
    return ", ".join(permission.rpartition(".")[2] for permission in permissions)


# Whether we are told


async def _hook(house: House, gateway: InvoiceGateway, setup: BackendSetup) -> Line:
    try:
        found = await house.db.transaction(lambda session: row(session, _LAST_HINT, backend=gateway.name))
    except DatabaseUnavailable:
        found = None
    ago = found["ago"] if found else None
    # The sandbox calls us where we listen, whatever our public address is.
    own = f"http://127.0.0.1:{house.settings.port}"
    urls = {f"{base}/webhooks/{gateway.name}" for base in (house.settings.public_url, own if house.settings.uses_sandbox else house.settings.public_url)}  # fmt: skip
    return hook_line(setup.hooks, urls, ago)


def hook_line(hooks: Sequence[Hook] | None, urls: set[str], last_seconds_ago: float | None) -> Line:
    about, wanted = "btcpay.webhook", min(urls)
    came = "none has ever come" if last_seconds_ago is None else f"the last came {duration(last_seconds_ago)} ago"
    if hooks is None:
        return (warning if last_seconds_ago is None else ok)(
            about, f"our key may not see the store's webhooks; of genuine ones {came}",
            *(["look in BTCPay, or give the key canmodifywebhooks"] if last_seconds_ago is None else []),
        )  # fmt: skip
    ours = [hook for hook in hooks if hook.url.rstrip("/") in urls]
    if not ours:
        return fault(about, f"the store has no webhook to {wanted}", "make one there, with BTCPAY_WEBHOOK_SECRET; top-ups are found by asking meanwhile, later")  # fmt: skip
    hook = next((each for each in ours if each.is_enabled), ours[0])
    if not hook.is_enabled:
        return fault(about, f"the store's webhook to {hook.url} is disabled", "enable it in BTCPay")
    if hook.events is not None and (missing := EVENTS - hook.events):
        return fault(about, f"the webhook is not told of {', '.join(sorted(missing))}", "let it have every event")
    if hook.last_code == 401:
        return fault(about, "its last delivery was answered 401: its secret is not BTCPAY_WEBHOOK_SECRET", "set the same in both")  # fmt: skip
    if hook.last_at is not None and (hook.last_code is None or not 200 <= hook.last_code < 300):
        how = "no answer" if hook.last_code is None else f"HTTP {hook.last_code}"
        return fault(about, f"its last delivery got {how}", "is PUBLIC_URL reachable from BTCPay?")
    if not hook.is_repeated:
        return warning(about, "BTCPay does not repeat what could not be delivered", "turn on automatic redelivery")
    if hook.last_at is None:
        return ok(about, f"the store knows our webhook; its secret shows with the first event ({came})")
    return ok(about, f"the store knows our webhook, and its last delivery was taken; of genuine ones {came}")


# What may be paid


async def _method(house: House, gateway: InvoiceGateway, setup: BackendSetup | None, method: Method) -> Line:
    """A small invoice that nobody pays is the only proof that one could be: made as for a customer."""
    about = f"method.{method.id}"
    if setup is not None and method.id not in setup.methods:
        return fault(about, f"{method.display_name} is offered, but not enabled in the store", "enable it there, or take it out of PAYMENT_METHODS")  # fmt: skip
    if setup is not None and not setup.nodes.get(method.id, True):
        return fault(about, f"the node of {method.display_name} is not available", "start it, or take the method out of PAYMENT_METHODS")  # fmt: skip
    try:
        invoice = await gateway.create(_probe(method))
    except GatewayRefused as error:
        return fault(about, f"{method.display_name} cannot be paid: {error}", "is its node online, has it a rate?")
    except GatewayError as error:
        return fault(about, f"{method.display_name} could not be tried: {error}")
    return _life(house, about, method, invoice)


def _probe(method: Method) -> NewInvoice:
    limits = method.limits["USD"]
    return NewInvoice(
        order_id=f"doctor-{uuid.uuid4().hex}", method=method.id, amount=decimal_of(limits.least, CURRENCIES["USD"].places),
        currency="USD", expires_in_minutes=_PROBE_MINUTES, monitor_minutes=_PROBE_MINUTES,
    )  # fmt: skip


def _life(house: House, about: str, method: Method, invoice: Invoice) -> Line:
    """A BOLT11 that outlives its invoice can be paid when nobody looks any more, one that ends before disappoints."""
    made = f"{method.display_name} can be paid"
    if not method.is_lightning:
        return ok(about, made)
    ends = house.wallets.read_invoice(invoice.destination).expires_at
    longer = (ends - invoice.expires_at).total_seconds()
    if longer > _SHORTER:
        return warning(about, f"{made}, but its node's invoices live {duration(longer)} longer than BTCPay's", "one that is paid late is credited only once BTCPay sees it; see PRODUCTION.md")  # fmt: skip
    if longer < -_SHORTER:
        left = max((ends - datetime.now(UTC)).total_seconds(), 0)
        return warning(about, f"{made}, but only for {duration(left)} of an invoice's {_PROBE_MINUTES} minutes", "raise the node's invoice expiry")  # fmt: skip
    return ok(about, f"{made}, for as long as the invoice says")


# At what rate


async def _rates(house: House) -> list[Line]:
    """Each coin's rate beside a second source's, where that knows the coin. The sandbox's are its own affair."""
    coins = {
        METHODS[method].coin: house.gateways.of_method(method) for method in METHODS if method in house.gateways.methods
    }
    if house.settings.uses_sandbox and not house.settings.rate_fixed:
        return [ok("rate", "the sandbox's rates buy nothing, and are compared with none")]
    other = second_rates(house.settings)
    try:
        return [await _rate(coin, gateway, other) for coin, gateway in coins.items()]
    finally:
        await other.close()


async def _rate(coin: str, gateway: InvoiceGateway, other: Rates) -> Line:
    about = f"rate.{coin}"
    try:
        ours = (await gateway.rate(coin)).usd
    except GatewayError as error:
        return fault(about, f"there is no rate: {error}", "see the store's rate settings")
    try:
        theirs = (await other.rate("BTC" if coin == "LBTC" else coin)).usd
    except GatewayRefused:
        return ok(about, f"1 {coin} = {ours:.2f} USD; no second source knows it (RATE_NAMES)")
    except GatewayError as error:
        return warning(
            about, f"1 {coin} = {ours:.2f} USD; the second source could not be asked: {error}", "see RATE_URL"
        )
    return rate_line(coin, ours, theirs)


def rate_line(coin: str, ours: Decimal, theirs: Decimal) -> Line:
    """USD per coin, of the backend and of a second source."""
    apart = abs(ours - theirs) * 100 / theirs
    found = f"1 {coin} = {ours:.2f} USD, {theirs:.2f} by a second source: {apart:.1f} % apart"
    if apart > _RATE_FAULT_PERCENT:
        return fault(f"rate.{coin}", found, "stop top-ups until it is right: see the store's rate settings")
    if apart > _RATE_WARNING_PERCENT:
        return warning(f"rate.{coin}", found, "see the store's rate settings, and its spread")
    return ok(f"rate.{coin}", found)
