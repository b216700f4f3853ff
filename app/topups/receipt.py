"""The receipt: what was asked, paid, credited and given on top, as data and as a page to print."""

import base64
import binascii
import html
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

import segno
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, rows
from app.kernel.errors import InvoiceNotFound
from app.kernel.money import COIN_PLACES, CURRENCIES, decimal_text, usd_text
from app.kernel.security import Pepper, equal
from app.kernel.settings import Settings
from app.topups.create import read_topup
from app.topups.methods import METHODS


@dataclass(frozen=True, slots=True)
class Receipt:
    """A top-up with its payments."""

    topup: Row
    payments: list[Row]

    @property
    def is_open(self) -> bool:
        return bool(self.topup["status"] == "New" and self.topup["expires_at"] > datetime.now(UTC))


def receipt_token(pepper: Pepper, account_id: uuid.UUID, topup_id: uuid.UUID) -> str:
    """What a receipt's address ends with: lets its bearer read this one receipt, and nothing else."""
    body = account_id.bytes + topup_id.bytes
    return base64.urlsafe_b64encode(body + pepper.tag(b"receipt", body)).decode().rstrip("=")


def receipt_url(settings: Settings, account_id: uuid.UUID, topup_id: uuid.UUID) -> str:
    return f"{settings.public_url}/receipts/{receipt_token(settings.pepper, account_id, topup_id)}"


def opened_token(pepper: Pepper, token: str) -> tuple[uuid.UUID, uuid.UUID]:
    """The account and top-up a token was made for. Raises InvoiceNotFound for any other text."""
    try:
        data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvoiceNotFound from None
    if "=" in token or len(data) != 48 or not equal(data[32:], pepper.tag(b"receipt", data[:32])):
        raise InvoiceNotFound
    return uuid.UUID(bytes=data[:16]), uuid.UUID(bytes=data[16:32])


async def read_receipt(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID) -> Receipt:
    payments = await rows(
        session,
        """SELECT * FROM payment WHERE account_id = :account_id AND topup_id = :topup_id AND status <> 'Invalid'
           ORDER BY received_at, payment_id""",
        account_id=account_id, topup_id=topup_id,
    )  # fmt: skip
    return Receipt(await read_topup(session, account_id, topup_id), payments)


def receipt_page(receipt: Receipt) -> str:
    """The page: the QR code while the invoice can be paid, what was paid and credited after."""
    topup, method = receipt.topup, METHODS[receipt.topup["method"]]
    amount = decimal_text(topup["amount_units"], CURRENCIES[topup["currency"]].places)
    body = _to_pay(receipt) if receipt.is_open else _paid(receipt)
    refresh = '<meta http-equiv="refresh" content="5">' if receipt.is_open or topup["status"] == "Processing" else ""
    return _PAGE.format(
        refresh=refresh,
        title=html.escape(f"{method.display_name} top-up of {amount} {topup['currency']}"),
        status=html.escape(_in_words(topup)),
        made=_time(topup["created_at"]),
        number=html.escape(topup["invoice_id"] or str(topup["id"])),
        body=body,
    )


def _in_words(topup: Row) -> str:
    extra = "" if topup["additional_status"] in ("None", None) else f" ({topup['additional_status']})"
    return f"{topup['status']}{extra}"


def _to_pay(receipt: Receipt) -> str:
    topup, coin = receipt.topup, METHODS[receipt.topup["method"]].coin
    due = decimal_text(topup["due_coin_units"], COIN_PLACES[coin])
    link = topup["payment_link"] or topup["destination"]
    # Upper case is what QR codes hold at half the size, and a Lightning invoice means the same in it.
    picture = segno.make(link.upper() if topup["method"] == "btc-lightning" else link, error="m").svg_inline(
        scale=5, border=2
    )
    return (
        f"<p class=due>Pay <b>{due} {coin}</b> before {_time(topup['expires_at'])}</p><div class=qr>{picture}</div>"
        f"<p class=where>{html.escape(topup['destination'])}</p>"
    )


def _paid(receipt: Receipt) -> str:
    topup, coin = receipt.topup, METHODS[receipt.topup["method"]].coin
    lines = [
        (f"Payment {html.escape(p['payment_id'])}<br><small>{_time(p['received_at'])}, {p['status']}</small>",
         f"{decimal_text(p['value_coin_units'], COIN_PLACES[coin])} {coin}")
        for p in receipt.payments
    ]  # fmt: skip
    if (rate := usd_rate(topup)) is not None:
        lines.append((f"Rate ({html.escape(rate_source(topup))})", f"1 {coin} = ${html.escape(rate)}"))
    lines.append(("Credited", _dollars(topup["credited_nusd"])))
    if topup["bonus_nusd"]:
        lines.append((f"Bonus, {topup['bonus_percent']} %", _dollars(topup["bonus_nusd"])))
    return "<table>" + "".join(f"<tr><td>{name}<td>{value}" for name, value in lines) + "</table>"


def _dollars(amount_nusd: int) -> str:
    """Exact, and with cents even where they are none: $6.50, $0.325."""
    whole, _, fraction = usd_text(amount_nusd).partition(".")
    return f"${whole}.{fraction.ljust(2, '0')}"


def usd_rate(topup: Row) -> str | None:
    """USD per coin: the invoice's own for one priced in USD, our quote for one priced in a coin."""
    rate = topup["rate"] if topup["currency"] == "USD" else topup["usd_per_coin"]
    return None if rate is None else format(rate, "f")


def rate_source(topup: Row) -> str:
    return str(topup["rate_source"] or topup["backend"])


def _time(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">{refresh}
<title>{title}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:3rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}}
h1{{font-size:1.3rem;margin:0}}.status{{display:inline-block;padding:.1rem .6rem;border:1px solid #999;border-radius:1rem}}
table{{width:100%;border-collapse:collapse;margin-top:1rem}}td{{padding:.5rem 0;border-bottom:1px solid #ddd;overflow-wrap:anywhere}}
td+td{{text-align:right;white-space:nowrap;padding-left:1rem;font-variant-numeric:tabular-nums}}small,.made{{color:#666}}
.qr{{text-align:center}}.where{{overflow-wrap:anywhere;font:13px monospace;text-align:center}}.due{{text-align:center}}
</style><h1>{title}</h1><p class=made>{made}, no. {number}</p><p class=status>{status}</p>{body}</html>"""
