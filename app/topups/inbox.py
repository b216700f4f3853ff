"""The webhook inbox: store an authentic delivery once and answer; what it hints at is looked into later."""

from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, in_portions, row, rows
from app.kernel.errors import DatabaseUnavailable
from app.kernel.logs import log
from app.kernel.shards import is_sharded
from app.topups.credit import TopupRef, credit_if_paid
from app.topups.gateway import GatewayRefused, GatewayUnavailable, Hint, InvoiceGateway

_GIVE_UP_AFTER: Final = 20
_BODY_DAYS: Final = 90


async def store(db: Database, backend: str, hint: Hint, raw_body: bytes) -> bool:
    """Keep a delivery; False if it, or its redelivery, was kept before."""
    made = await db.transaction(
        lambda session: row(
            session,
            """INSERT INTO webhook_delivery (backend, delivery_id, type, invoice_id, raw_body, attempts)
               VALUES (:backend, :delivery_id, :type, :invoice_id, :raw_body, 0) ON CONFLICT DO NOTHING RETURNING 1 AS made""",
            backend=backend, delivery_id=hint.delivery_id, type=hint.type, invoice_id=hint.invoice_id, raw_body=raw_body,
        )
    )  # fmt: skip
    return made is not None


async def process_waiting(db: Database, gateway: InvoiceGateway, limit: int = 200) -> int:
    """Look into every invoice that waiting deliveries name, each once. Returns how many deliveries were taken."""
    taken = await db.transaction(lambda session: _claim(session, gateway.name, limit))
    defects: list[Exception] = []
    for invoice_id in dict.fromkeys(delivery["invoice_id"] for delivery in taken):
        try:
            await _look_into(db, gateway, invoice_id, [d for d in taken if d["invoice_id"] == invoice_id])
        except DatabaseUnavailable:
            if not await is_sharded(db):
                raise  # the others would fare no better; all of them come again
        except Exception as error:  # noqa: BLE001 - a defect in one must not keep the others waiting; raised below
            defects.append(error)
    if defects:
        raise ExceptionGroup("webhooks that could not be looked into", defects)
    return len(taken)


async def _look_into(db: Database, gateway: InvoiceGateway, invoice_id: str | None, deliveries: list[Row]) -> None:
    if await _is_done(db, gateway, invoice_id, max(delivery["attempts"] for delivery in deliveries)):
        keys = [(delivery["delivery_id"], delivery["type"]) for delivery in deliveries]
        await db.transaction(lambda session: _mark(session, gateway.name, keys))


async def _is_done(db: Database, gateway: InvoiceGateway, invoice_id: str | None, attempts: int) -> bool:
    if invoice_id is None:
        return True
    found = await db.transaction(lambda session: topup_of_invoice(session, gateway.name, invoice_id))
    if found is None:
        # Ours but not tied to its top-up yet, or never ours: the poller finds the first, nobody the second.
        return attempts >= _GIVE_UP_AFTER
    try:
        await credit_if_paid(db, gateway, found)
    except (GatewayUnavailable, GatewayRefused) as error:
        log.warning("webhook.later", invoice_id=invoice_id, attempts=attempts, error=str(error))
        return False
    return True


async def topup_of_invoice(session: AsyncSession, backend: str, invoice_id: str) -> TopupRef | None:
    found = await row(
        session,
        "SELECT account_id, topup_id FROM topup_invoice WHERE backend = :backend AND invoice_id = :invoice_id",
        backend=backend, invoice_id=invoice_id,
    )  # fmt: skip
    return TopupRef(found["account_id"], found["topup_id"]) if found else None


async def forget_old_bodies(db: Database, at_once: int = 5000) -> int:
    """Empty what was kept raw of deliveries longer than 90 days ago, in portions; that they came stays known.

    Returns how many.
    """
    return await in_portions(
        db,
        f"""UPDATE webhook_delivery SET raw_body = '' WHERE (backend, delivery_id, type) IN (
                SELECT backend, delivery_id, type FROM webhook_delivery
                WHERE octet_length(raw_body) > 0 AND received_at < now() - interval '{_BODY_DAYS} days'
                ORDER BY received_at LIMIT :at_once)
            RETURNING 1 AS emptied""",
        at_once,
    )


async def _claim(session: AsyncSession, backend: str, limit: int) -> list[Row]:
    """Take waiting deliveries; each comes again after a pause that grows, unless it is marked done."""
    return await rows(
        session,
        """UPDATE webhook_delivery SET attempts = attempts + 1,
                  next_try_at = now() + least(power(2, least(attempts, 6)) * 5, 300) * interval '1 second'
           WHERE (backend, delivery_id, type) IN (
                   SELECT backend, delivery_id, type FROM webhook_delivery
                   WHERE processed_at IS NULL AND next_try_at <= now() AND backend = :backend ORDER BY next_try_at LIMIT :limit)
             AND processed_at IS NULL AND next_try_at <= now()
           RETURNING delivery_id, type, invoice_id, attempts""",
        backend=backend, limit=limit,
    )  # fmt: skip


async def _mark(session: AsyncSession, backend: str, keys: list[tuple[str, str]]) -> None:
    await row(
        session,
        """UPDATE webhook_delivery SET processed_at = now() FROM unnest(CAST(:ids AS text[]), CAST(:types AS text[])) AS d(id, type)
           WHERE backend = :backend AND delivery_id = d.id AND webhook_delivery.type = d.type""",
        backend=backend, ids=[key[0] for key in keys], types=[key[1] for key in keys],
    )  # fmt: skip
