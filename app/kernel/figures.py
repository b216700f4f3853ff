"""Figures that one process finds and every process tells: the last verdict of an audit, sums over all accounts, jobs done."""

from datetime import datetime
from typing import Final, NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import row, rows

JOB: Final = "job/"
"""What the figure of a job done begins with; its name follows."""


class Figure(NamedTuple):
    """A whole number, in the unit that its name ends with, and when it was found."""

    value: int
    found_at: datetime


async def keep(session: AsyncSession, **values: int) -> None:
    """Keep these figures, found now, in the place of those that bore their names."""
    for name, value in sorted(values.items()):  # in one order, so that two who keep several never wait for each other
        await row(
            session,
            """INSERT INTO figure (name, value) VALUES (:name, :value)
               ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value, found_at = now()""",
            name=name, value=value,
        )  # fmt: skip


async def kept(session: AsyncSession) -> dict[str, Figure]:
    found = await rows(session, "SELECT name, value, found_at FROM figure")
    return {each["name"]: Figure(each["value"], each["found_at"]) for each in found}
