"""Running an audit: every check on one snapshot, so that traffic never looks like an error; it changes nothing."""

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.autotopup import AUTOTOPUP
from app.audit.books import BOOKS
from app.audit.check import Check
from app.audit.days import DAYS
from app.audit.holds import HOLDS
from app.audit.keys import KEYS
from app.audit.owners import OWNERS, TIMES
from app.audit.schema import SCHEMA
from app.audit.topups import TOPUPS
from app.audit.usage import USAGE
from app.kernel.db import Database, row, rows
from app.kernel.money import usd_text

FINDINGS_PER_CHECK: Final = 100

CHECKS: Final[tuple[Check, ...]] = (
    *BOOKS, *HOLDS, *KEYS, *USAGE, *DAYS, *TOPUPS, *AUTOTOPUP, *OWNERS, *TIMES, *SCHEMA,
)  # fmt: skip
"""Everything an audit looks at, in the order it looks."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference: what the books say of `subject`, and what follows from the rest of them. Money is in USD."""

    check: str
    subject: str
    recorded: str
    recomputed: str


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit found, and how much it looked at."""

    findings: tuple[Finding, ...]
    checks: int
    accounts: int
    entries: int

    @property
    def is_clean(self) -> bool:
        return not self.findings


async def audit(db: Database) -> Report:
    """Run every check on one snapshot. Takes as long as it takes; locks nothing, writes nothing."""
    return await db.transaction(_audit)


async def _audit(session: AsyncSession) -> Report:
    await row(session, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
    await row(session, "SET LOCAL statement_timeout = 0")
    # Whole tables are compared: where statistics are old, the planner would look rows up one by one, for hours.
    await row(session, "SET LOCAL enable_nestloop = off")
    findings = [finding for check in CHECKS for finding in await _findings(session, check)]
    size = await row(
        session, "SELECT (SELECT count(*) FROM account) AS accounts, (SELECT count(*) FROM entry) AS entries"
    )
    assert size is not None
    return Report(tuple(findings), len(CHECKS), size["accounts"], size["entries"])


async def _findings(session: AsyncSession, check: Check) -> list[Finding]:
    """The first findings of a check by subject; a last one says how many more there are."""
    found = await rows(
        session,
        f"SELECT *, count(*) OVER () AS total FROM ({check.sql}) differing ORDER BY subject LIMIT {FINDINGS_PER_CHECK}",
    )
    findings = [
        Finding(check.name, each["subject"], _shown(check, each["recorded"]), _shown(check, each["recomputed"]))
        for each in found
    ]
    if found and found[0]["total"] > len(found):
        findings.append(Finding(check.name, "differences in all", str(found[0]["total"]), "0"))
    return findings


def _shown(check: Check, value: Any) -> str:
    if value is None:
        return "none"
    return usd_text(int(value)) if check.is_money else str(value)
