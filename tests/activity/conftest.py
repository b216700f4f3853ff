"""An owner's database besides the service's, for what only the owner may do, and short words for asking."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.activity.archive import Dropped, drop, export
from app.activity.rollup import roll_up
from app.kernel.db import Database
from tests.past import move_back_and_sort
from tests.rig import Customer, Rig, exact

D = Decimal


@dataclass(slots=True)
class Past:
    """The house, and its owner's hands."""

    rig: Rig
    owner: Database
    conn: psycopg.Connection[Any]
    folder: Path

    async def back(self, days: int) -> None:
        await move_back_and_sort(self.rig.house.db, self.conn, days)

    async def roll_up(self) -> int:
        return await roll_up(self.rig.house.db)

    async def export(self, month: date) -> Path:
        path = self.folder / f"{month:%Y-%m}-{len(list(self.folder.iterdir()))}.csv.gz"
        await export(self.owner, month, path, datetime.now(UTC))
        return path

    async def drop(self, month: date) -> Dropped:
        await self.export(month)
        return await drop(self.owner, month, datetime.now(UTC), force=True)

    async def charge(self, customer: Customer, usd: str, key: str = "", **more: Any) -> Any:
        """Charge a key, the customer's own if none is named; returns the answer."""
        more.setdefault("request_id", f"r{self.count()}")
        response = await self.rig.meter("charge", api_key=key or customer.api_key, cost_usd=usd, **more)
        answer = exact(response)
        assert answer["decision"] == "allow", answer
        return answer

    def count(self) -> int:
        [(count,)] = self.rig.sql("SELECT count(*) FROM entry")
        return int(count)

    def count_calls(self) -> int:
        [(count,)] = self.rig.sql("SELECT count(*) FROM usage")
        return int(count)

    async def ask(self, path: str, customer: Customer, **query: Any) -> Any:
        """As the account's owner."""
        response = await self.rig.client.get(path, headers=customer.owner, params=query)
        assert response.status_code == 200, response.text
        return exact(response)

    def fresh(self) -> list[tuple[Any, ...]]:
        """What the calls add up to, in the plainest of words."""
        return self.rig.sql(
            """SELECT u.account_id, (to_timestamp(('x' || translate(left(u.id::text, 13), '-', ''))::bit(48)::bigint / 1000.0) AT TIME ZONE 'UTC')::date,
                      u.key_id, coalesce(u.model, u.served_model, ''), count(*), sum(coalesce((u.units->>'input_tokens')::bigint, 0)),
                      sum(coalesce((u.units->>'output_tokens')::bigint, 0)), sum(u.cost_nusd),
                      sum(coalesce((SELECT amount_nusd FROM entry e WHERE e.kind = 'refund' AND e.reference = u.id::text), 0))
               FROM usage u GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"""
        )

    def kept(self) -> list[tuple[Any, ...]]:
        return self.rig.sql(
            """SELECT account_id, day, key_id, model, sum(requests), sum(input_tokens), sum(output_tokens), sum(cost_nusd), sum(refunded_nusd)
               FROM usage_day GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"""
        )


@pytest.fixture
async def past(rig: Rig, owner_conn: psycopg.Connection[Any], tmp_path: Path) -> AsyncIterator[Past]:
    owner = Database(rig.database_url, pool_size=2, role=None)
    await owner.open()
    yield Past(rig, owner, owner_conn, tmp_path)
    await owner.close()


def month_of(days_ago: int) -> date:
    return (datetime.now(UTC) - timedelta(days=days_ago)).date().replace(day=1)
