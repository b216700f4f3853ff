"""The pages: a checkout for each invoice with the sandbox's controls, and a list of the invoices there are.

Self-contained HTML that works without JavaScript; a little of it counts down, copies, and reloads when something came.
"""

from collections.abc import Mapping
from decimal import Decimal
from html import escape
from urllib.parse import quote

import segno
from litestar import MediaType, Response, Router, get, post
from litestar.response import Redirect

from .backend import Backend
from .errors import SandboxError
from .given import Call, Id, TheBackend
from .invoices import (
    Additional,
    Asked,
    Invoice,
    Payment,
    PaymentStatus,
    Prompt,
    Status,
    asked,
    confirmations_needed,
    round_up,
)
from .methods import find_method, payment_link
from .paper import HEADERS, copied, moment, page
from .rates import decimals_of
from .wire import plain, read_decimal

WORDS = {
    Status.NEW: "Waiting for payment",
    Status.PROCESSING: "Confirming",
    Status.SETTLED: "Paid",
    Status.EXPIRED: "Expired",
    Status.INVALID: "Invalid",
}
MORE_WORDS = {
    Additional.PAID_PARTIAL: "partly paid",
    Additional.PAID_LATE: "paid late",
    Additional.PAID_OVER: "paid over",
    Additional.MARKED: "marked by hand",
}
"""A state as a person says it; BTCPay's own word for it is in the driver's answers."""
SIGNS = {"USD": "$", "EUR": "€", "GBP": "£"}
# Enough to leave every coin's minimum behind, and to be seen on the invoice.
PART, OVER = Decimal("0.4"), Decimal("1.25")


# Routes


@get("/", media_type=MediaType.HTML)
async def list_page(backend: TheBackend) -> str:
    rows = "".join(_row(invoice) for invoice in backend.newest_first())
    table = f"""<table><thead><tr><th>Invoice</th><th class=r>Amount</th><th>Method</th><th>Status</th><th>Order</th>
<th class=r>Created</th></tr></thead><tbody>{rows}</tbody></table>"""
    empty = "<p class=quiet>No invoice yet. The first top-up will show up here.</p>"
    main = f"<main class=wide><h1>Invoices</h1>{table if rows else empty}{_rates(backend)}</main>"
    return page("Invoices", main, here="Invoices", is_wide=True)


@get("/i/{invoice_id:str}", media_type=MediaType.HTML)
async def checkout_page(request: Call, invoice_id: Id, backend: TheBackend) -> str:
    return _checkout(backend, backend.invoice(invoice_id), request.query_params.get("method"))


@get("/i/{invoice_id:str}/status")
async def checkout_status(invoice_id: Id, backend: TheBackend) -> dict[str, str]:
    """What the page asks for every other second: a mark that differs when the page should be drawn again."""
    return {"mark": _mark(backend.invoice(invoice_id))}


@post("/i/{invoice_id:str}", status_code=303, media_type=MediaType.HTML)
async def act(request: Call, invoice_id: Id, backend: TheBackend) -> Response[str] | Redirect:
    """A button was pressed. What cannot be done is said on the page."""
    form: Mapping[str, str] = {name: str(value) for name, value in (await request.form()).items()}
    method = form.get("method", "")
    try:
        await _do(backend, invoice_id, form)
    except SandboxError as error:
        html = _checkout(backend, backend.invoice(invoice_id), method, error.message)
        return Response(html, status_code=error.status, media_type=MediaType.HTML)
    # Relative, so that it holds behind a proxy that adds a prefix.
    return Redirect(f"{quote(invoice_id)}?method={quote(method)}", status_code=303)


async def _do(backend: Backend, invoice_id: str, form: Mapping[str, str]) -> None:
    match form.get("act"):
        case "pay":
            amount = read_decimal(form["amount"].strip(), "amount") if form.get("amount", "").strip() else None
            await backend.pay(invoice_id, amount, find_method(form.get("method", "")))
        case "confirm":
            await backend.confirm(invoice_id, int(read_decimal(form.get("blocks", "1"), "blocks")))
        case "double-spend":
            await backend.double_spend(invoice_id, None)
        case "expire":
            backend.expire(invoice_id)
        case "mark":
            backend.mark(invoice_id, form.get("status", ""))


router = Router("/", route_handlers=[list_page, checkout_page, checkout_status, act], response_headers=HEADERS)


# The list


def _row(invoice: Invoice) -> str:
    methods = ", ".join(prompt.facts.name for prompt in invoice.prompts)
    order = escape(str(invoice.metadata.get("orderId", "")))
    return (
        f"<tr><td><a href='i/{invoice.id}'>{invoice.id}</a></td>"
        f"<td class=r>{_money(invoice.price, invoice.currency)}</td><td>{methods}</td><td>{_pill(invoice)}</td>"
        f"<td class='quiet long'>{order}</td><td class='r quiet long'>{moment(invoice.created_at)}</td></tr>"
    )


def _rates(backend: Backend) -> str:
    rates = (f"1 {pair.replace('_', f' = {rate} ')}" for pair, rate in backend.rates.pairs.items() if rate)
    return f"<p class=quiet>{' · '.join(rates)}</p>"


# The checkout


def _checkout(backend: Backend, invoice: Invoice, wanted: str | None, problem: str = "") -> str:
    method = find_method(wanted or "")
    prompt = (method and invoice.prompt(method.id)) or next(iter(invoice.prompts), None)
    left_seconds = invoice.expires_at - backend.clock.now() if invoice.status is Status.NEW else 0
    body = _face(invoice, prompt, left_seconds) if prompt else _free(invoice)
    notice = f"<p class=problem role=alert>{escape(problem)}</p>" if problem else ""
    controls = _controls(invoice, prompt) if prompt else ""
    main = f"<main data-invoice={invoice.id} data-mark='{_mark(invoice)}'>{notice}{body}{controls}</main>"
    return page(f"{_money(invoice.price, invoice.currency)} · {WORDS[invoice.status]}", main, root="../")


def _mark(invoice: Invoice) -> str:
    payments = "".join(payment.status.value[0] for payment in invoice.payments)
    return f"{invoice.status.value}-{invoice.additional.value}-{payments}"


def _free(invoice: Invoice) -> str:
    return f"<section class=card>{_pill(invoice)}<p>There is nothing to pay.</p></section>"


def _face(invoice: Invoice, prompt: Prompt, left_seconds: int) -> str:
    figures = asked(invoice, prompt)
    order = escape(str(invoice.metadata.get("orderId", "")))
    is_open = invoice.status is Status.NEW
    return f"""<section class=card>
<header><div><h1>{_money(invoice.price, invoice.currency)}</h1><p class=quiet>{_bought(invoice) or (order and f"Order {order}")}</p></div>
<div class=state>{_pill(invoice)}{_countdown(left_seconds) if is_open else ""}</div></header>
{_tabs(invoice, prompt)}
{_to_pay(prompt, figures) if is_open else _verdict(invoice)}
{_payments(invoice)}
<p class=quiet>1 {prompt.facts.coin} = {_money(prompt.rate, invoice.currency)}, fixed when this invoice was made.</p>
</section>"""


def _bought(invoice: Invoice) -> str:
    return escape(str(invoice.metadata.get("itemDesc") or ""))


def _pill(invoice: Invoice) -> str:
    more = MORE_WORDS.get(invoice.additional)
    words = WORDS[invoice.status] + (f", {more}" if more else "")
    return f"<span class='pill {invoice.status.value.lower()}'>{words}</span>"


def _countdown(left_seconds: int) -> str:
    minutes, seconds = divmod(max(left_seconds, 0), 60)
    return f"<span class=quiet>expires in <b data-left={left_seconds}>{minutes}:{seconds:02}</b></span>"


def _tabs(invoice: Invoice, chosen: Prompt) -> str:
    if len(invoice.prompts) < 2:
        return f"<p class=quiet>To be paid with {chosen.facts.name}.</p>"
    links = (
        f"<a href='?method={prompt.method}'{' aria-current=page' if prompt is chosen else ''}>{prompt.facts.name}</a>"
        for prompt in invoice.prompts
    )
    return f"<nav class=ways aria-label='Ways to pay'><span class=quiet>Pay with</span>{''.join(links)}</nav>"


def _to_pay(prompt: Prompt, figures: Asked) -> str:
    link = payment_link(prompt.facts, prompt.destination, figures.due)
    # Upper case is what QR codes hold at half the size, and BOLT11 means the same in it.
    code = segno.make(link.upper() if prompt.facts.is_lightning else link, error="m", micro=False)
    svg = code.svg_inline(border=2, omitsize=True, dark="#12161c", light="#fff")
    kind = "Lightning invoice" if prompt.facts.is_lightning else f"{prompt.facts.name} address"
    return f"""<div class=pay><div class=qr>{svg}</div><div class=what>
<p class=label>Send exactly</p><p class=coins>{_coins(figures.due, prompt)}</p>{_already(figures, prompt)}
<p class=label>{kind}</p>{copied(prompt.destination, "destination", f"the {kind}")}
<a class=wallet href="{escape(link)}">Open in a wallet</a>{_fee(figures, prompt)}</div></div>"""


def _coins(amount: Decimal, prompt: Prompt) -> str:
    satoshis = f" <small>{amount.scaleb(8).normalize():,f} sat</small>" if prompt.facts.is_lightning else ""
    return f"{amount.normalize():f} {prompt.facts.coin}{satoshis}"


def _already(figures: Asked, prompt: Prompt) -> str:
    if figures.total_paid == 0:
        return ""
    return f"<p class=quiet>{_coins(figures.total_paid, prompt)} of {_coins(figures.amount, prompt)} received.</p>"


def _fee(figures: Asked, prompt: Prompt) -> str:
    return f"<p class=quiet>Includes a network fee of {_coins(figures.fee, prompt)}.</p>" if figures.fee > 0 else ""


def _verdict(invoice: Invoice) -> str:
    words = {
        Status.PROCESSING: "Payment seen. Waiting for confirmations.",
        Status.SETTLED: "Paid, thank you.",
        Status.EXPIRED: "This invoice has expired. A late payment is seen, but does not settle it by itself.",
        Status.INVALID: "This invoice is invalid.",
    }[invoice.status]
    kind = invoice.status.value.lower()
    icon = f"<svg viewBox='0 0 24 24' aria-hidden=true>{DRAWN[invoice.status]}</svg>"
    return f"<div class='verdict {kind}'>{icon}<p>{words}{_way_back(invoice)}</p></div>"


DRAWN = {
    Status.PROCESSING: "<circle cx=12 cy=12 r=9 /><path d='M12 7v5l3.5 2'/>",
    Status.SETTLED: "<circle cx=12 cy=12 r=9 /><path d='M8 12.5l2.7 2.7L16 9.5'/>",
    Status.EXPIRED: "<path d='M7 3h10M7 21h10M8 3v3.5L12 11l4-4.5V3M8 21v-3.5L12 13l4 4.5V21'/>",
    Status.INVALID: "<circle cx=12 cy=12 r=9 /><path d='M9 9l6 6M15 9l-6 6'/>",
}
"""A clock, a tick, an hourglass, a cross: drawn, since not every machine has a font with them."""


def _way_back(invoice: Invoice) -> str:
    url = str(invoice.checkout.get("redirectURL") or "")
    is_web = url.startswith(("http://", "https://"))
    return f" <a href='{escape(url)}'>Return to the shop</a>" if is_web else ""


def _payments(invoice: Invoice) -> str:
    if not invoice.payments:
        return ""
    return f"<table><tbody>{''.join(_payment(invoice, payment) for payment in invoice.payments)}</tbody></table>"


def _payment(invoice: Invoice, payment: Payment) -> str:
    prompt = invoice.prompt(payment.method)
    assert prompt is not None, "a payment came in by a method of its invoice"
    return (
        f"<tr><td><code title='{escape(payment.id)}'>{escape(payment.id[:10])}…</code></td>"
        f"<td>{_coins(payment.value, prompt)}</td>"
        f"<td class=r><span class='pill {payment.status.value.lower()}'>{PAYMENT_WORDS[payment.status]}</span></td></tr>"
    )


PAYMENT_WORDS = {
    PaymentStatus.PROCESSING: "Confirming",
    PaymentStatus.SETTLED: "Confirmed",
    PaymentStatus.INVALID: "Does not count",
}


def _money(amount: Decimal, currency: str) -> str:
    sign = SIGNS.get(currency)
    shown = f"{amount:,.{decimals_of(currency)}f}" if sign else f"{amount.normalize():,f}"
    return f"{sign}{shown}" if sign else f"{shown} {escape(currency)}"


# The controls


def _controls(invoice: Invoice, prompt: Prompt) -> str:
    figures = asked(invoice, prompt)
    base = figures.due if figures.due > 0 else figures.amount
    part, over = (round_up(base * share, prompt.facts.decimals) for share in (PART, OVER))
    coin = prompt.facts.coin
    is_new = invoice.status is Status.NEW
    return f"""<details class=controls open><summary>Sandbox controls</summary>
<p class=quiet>Pretend to be the payer and the network: nothing of this costs anything.</p>
{_next_step(invoice, prompt, base)}
<div class=grid>
{_button(prompt, "pay", f"Pay part <small>{part.normalize():f} {coin}</small>", amount=plain(part))}
{_button(prompt, "pay", f"Pay over <small>{over.normalize():f} {coin}</small>", amount=plain(over))}
{"" if is_new else _button(prompt, "pay", f"Pay again <small>{base.normalize():f} {coin}</small>", amount=plain(base))}
{_chain_buttons(invoice, prompt)}
{_button(prompt, "expire", "Expire now") if is_new else ""}
{_button(prompt, "mark", "Mark settled", status="Settled")}
{_button(prompt, "mark", "Mark invalid", status="Invalid")}
<form method=post class=free>{_hidden(prompt)}<input name=amount inputmode=decimal placeholder="amount in {coin}"
 aria-label="Amount in {coin}"><button name=act value=pay>Pay this</button></form>
</div></details>"""


def _next_step(invoice: Invoice, prompt: Prompt, amount: Decimal) -> str:
    """The one big button: pay, then confirm, then nothing."""
    if invoice.status is Status.NEW:
        return _button(prompt, "pay", f"Pretend to pay {_coins(amount, prompt)}", "main")
    if invoice.status is Status.PROCESSING and not prompt.facts.is_lightning:
        blocks = max(confirmations_needed(invoice, prompt.facts), 1)
        return _button(prompt, "confirm", f"Pretend to confirm with {_blocks(blocks)}", "main", blocks=str(blocks))
    return ""


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


def _chain_buttons(invoice: Invoice, prompt: Prompt) -> str:
    if prompt.facts.is_lightning:
        return ""
    counts = sorted({1, max(confirmations_needed(invoice, prompt.facts), 1)})
    confirms = (_button(prompt, "confirm", f"Confirm ({_blocks(count)})", blocks=str(count)) for count in counts)
    return "".join(confirms) + _button(prompt, "double-spend", "Double-spend")


def _button(prompt: Prompt, act: str, label: str, look: str = "plain", **fields: str) -> str:
    hidden = "".join(f"<input type=hidden name={name} value='{escape(value)}'>" for name, value in fields.items())
    button = f"<button class={look} name=act value={act}>{label}</button>"
    return f"<form method=post>{_hidden(prompt)}{hidden}{button}</form>"


def _hidden(prompt: Prompt) -> str:
    return f"<input type=hidden name=method value={prompt.method}>"
