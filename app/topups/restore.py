"""Top-ups that our books forgot because they were restored to an earlier moment: written again from what the backend knows.

An invoice's order id is its top-up's, and the address its payer was to come back to names the account, under a MAC with the
pepper. So a top-up that we once made is told from an invoice that anybody else made in the same store.
"""

import uuid
from urllib.parse import urlsplit

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row
from app.kernel.errors import InvoiceNotFound
from app.kernel.logs import log
from app.kernel.money import CURRENCIES, units_of
from app.kernel.security import Pepper
from app.topups.finding import note_finding
from app.topups.gateway import GatewayRefused, GatewayUnavailable, Invoice, InvoiceGateway, Rate
from app.topups.methods import METHODS
from app.topups.receipt import opened_token

_PRICED_LATE = "its row was lost in a restore; it is priced by the rate of when it was found, not of when it was made"


async def restored(db: Database, gateway: InvoiceGateway, pepper: Pepper, invoice: Invoice) -> Row | None:
    """The top-up of an invoice that we made and know nothing of any more, written again; None for all others.

    Safe to call any number of times, from any number of processes. Raises GatewayUnavailable where a rate is needed and
    there is none now.
    """
    made_for = _account_of(pepper, invoice)
    if made_for is None:
        return None
    account_id, topup_id = made_for
    quote = await _quote(gateway, invoice)
    found = await db.transaction(lambda session: _write(session, gateway.name, account_id, topup_id, invoice, quote))
    if found is None:
        # Who opened it has no key to it any more, either: a person gives what was paid to their new one.
        log.error("topup.of_lost_account", topup_id=str(topup_id), account_id=str(account_id), invoice_id=invoice.id)
        return None
    log.warning("topup.restored", topup_id=str(topup_id), account_id=str(account_id), invoice_id=invoice.id)
    return found


def _account_of(pepper: Pepper, invoice: Invoice) -> tuple[uuid.UUID, uuid.UUID] | None:
    """The account and the top-up that an invoice of ours was made for."""
    try:
        found = opened_token(pepper, urlsplit(invoice.order_url or "").path.rpartition("/")[2])
    except (InvoiceNotFound, ValueError):
        return None
    return found if str(found[1]) == invoice.order_id else None


async def _quote(gateway: InvoiceGateway, invoice: Invoice) -> Rate | None:
    if invoice.currency == "USD":
        return None
    try:
        return await gateway.rate(METHODS[invoice.method].coin)
    except GatewayRefused as error:
        raise GatewayUnavailable(f"no rate for a restored top-up: {error}") from error


async def _write(
    session: AsyncSession,
    backend: str,
    account_id: uuid.UUID,
    topup_id: uuid.UUID,
    invoice: Invoice,
    quote: Rate | None,
) -> Row | None:
    """None without the account."""
    if await row(session, "SELECT 1 AS found FROM account WHERE id = :id", id=account_id) is None:
        return None
    made = await row(
        session,
        """INSERT INTO topup (account_id, id, backend, method, currency, amount_units, bonus_percent, usd_per_coin, rate_source,
                              rate_at, created_at, expires_at, watch_until, next_check_at)
           VALUES (:account_id, :id, :backend, :method, :currency, :amount, :bonus_percent, :usd_per_coin, :rate_source,
                   :rate_at, :created_at, :expires_at, :watch_until, now())
           ON CONFLICT (account_id, id) DO NOTHING RETURNING id""",
        account_id=account_id, id=topup_id, backend=backend, method=invoice.method, currency=invoice.currency,
        amount=units_of(invoice.amount, CURRENCIES[invoice.currency].places),
        bonus_percent=METHODS[invoice.method].bonus_percent, usd_per_coin=quote.usd if quote else None,
        rate_source=quote.source if quote else None, rate_at=quote.quoted_at if quote else None,
        created_at=invoice.created_at, expires_at=invoice.expires_at, watch_until=invoice.watched_until,
    )  # fmt: skip
    if made is not None and quote is not None:
        await note_finding(session, account_id, topup_id, _PRICED_LATE, gives_way=True)
    return await row(
        session, "SELECT account_id, id, invoice_id, review FROM topup WHERE account_id = :account_id AND id = :id",
        account_id=account_id, id=topup_id,
    )  # fmt: skip
