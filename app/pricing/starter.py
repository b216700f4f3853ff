"""The small catalogue that a new development house begins with, so that its models have a price."""

from pathlib import Path
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, rows
from app.pricing.catalogue import activate, lock_versions, store
from app.pricing.drafts import Draft
from app.pricing.importer import read_prices
from app.pricing.rules import set_fee

STARTER: Final = Path(__file__).with_name("starter.json")


def starter() -> Draft:
    """Public list prices, as best known when they were written down."""
    return read_prices(STARTER.read_bytes())


async def ensure_starter(db: Database) -> bool:
    """Where there is no price version at all, make the starter catalogue version 1 and activate it. True if it did."""

    async def work(session: AsyncSession) -> bool:
        await lock_versions(session)
        if await rows(session, "SELECT 1 FROM price_version LIMIT 1"):
            return False
        draft = starter()
        version_id = await store(
            session, draft.prices, draft.models, source="starter", source_hash=draft.source_hash,
            note="public list prices, for development",
        )  # fmt: skip
        await activate(session, version_id)
        priced = {
            found["feature"] for found in await rows(session, "SELECT feature FROM fee WHERE effective_to IS NULL")
        }
        for fee in draft.fees:
            if fee.feature not in priced:
                await set_fee(session, fee.feature, fee.price_nusd, notice_seconds=0)  # nobody sells by it yet
        return True

    return await db.transaction(work)
