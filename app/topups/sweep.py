"""The sweep: invoices that the backend knows and we do not, found by the order id we gave them.

Also those whose top-ups we do not know any more, after the database was restored to an earlier moment.
"""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Final

from app.kernel.db import Database, Row, row
from app.kernel.logs import log
from app.kernel.security import Pepper
from app.topups.create import attach
from app.topups.credit import TopupRef, credit_if_paid
from app.topups.finding import note_finding
from app.topups.gateway import GatewayError, Invoice, InvoiceGateway
from app.topups.restore import restored

REGULAR: Final = timedelta(hours=2)
CATCH_UP: Final = timedelta(days=8)
"""At start: longer than an on-chain invoice is watched, whatever happened while we were away."""


async def sweep(db: Database, gateway: InvoiceGateway, back: timedelta = REGULAR, pepper: Pepper | None = None) -> int:
    """Tie every invoice of the last while to its top-up, and credit what was paid. Returns how many were found.

    With the `pepper` also where the top-up itself was lost in a restore.
    Raises GatewayUnavailable if the backend could not be asked.
    """
    found = 0
    for invoice in await gateway.list_since(datetime.now(UTC) - back):
        topup = await _topup_of(db, gateway.name, invoice)
        if topup is None and pepper is not None:
            topup = await restored(db, gateway, pepper, invoice)
        if topup is None or topup["invoice_id"] == invoice.id:
            continue
        found += 1
        await _adopt(db, gateway, topup, invoice)
    return found


async def _topup_of(db: Database, backend: str, invoice: Invoice) -> Row | None:
    """Our top-up with this order id; None for invoices that others made in the same store."""
    try:
        topup_id = uuid.UUID(invoice.order_id or "")
    except ValueError:
        return None
    return await db.transaction(
        lambda session: row(
            session,
            "SELECT account_id, id, invoice_id, review FROM topup WHERE id = :id AND backend = :backend",
            id=topup_id,
            backend=backend,
        )
    )


async def _adopt(db: Database, gateway: InvoiceGateway, topup: Row, invoice: Invoice) -> None:
    if topup["invoice_id"] is not None:
        await _flag_second(db, topup, invoice)
        return
    ref = TopupRef(topup["account_id"], topup["id"])
    await db.transaction(lambda session: attach(session, gateway.name, ref.account_id, ref.topup_id, invoice))
    log.info("topup.adopted", topup_id=str(ref.topup_id), invoice_id=invoice.id)
    try:
        await credit_if_paid(db, gateway, ref)
    except GatewayError as error:
        log.warning("topup.check_failed", topup_id=str(ref.topup_id), error=str(error))  # the poller comes again


async def _flag_second(db: Database, topup: Row, invoice: Invoice) -> None:
    """Two invoices for one top-up should not be; if the second was paid, a person must see it."""
    if not invoice.payments or topup["review"] is not None:
        return
    review = f"a second invoice of this top-up, {invoice.id}, was paid"
    await db.transaction(
        lambda session: note_finding(session, topup["account_id"], topup["id"], review, gives_way=True)
    )
    log.error("topup.needs_review", topup_id=str(topup["id"]), error=review)
