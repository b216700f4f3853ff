"""Running an audit: every check on one snapshot, so that traffic never looks like an error; it changes nothing."""

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.autotopup import AUTOTOPUP
from app.audit.books import BOOKS
from app.audit.check import Check, Finding, Proof, Secrets
from app.audit.closing import CLOSINGS
from app.audit.days import DAYS
from app.audit.holds import HOLDS
from app.audit.keys import KEYS
from app.audit.notices import NOTICES
from app.audit.offers import ALIASES, OFFERS
from app.audit.owners import OWNERS, TIMES
from app.audit.schema import SCHEMA
from app.audit.seals import SEALS
from app.audit.topups import TOPUPS
from app.audit.unbroken import AS_SEALED, Seals, look
from app.audit.usage import USAGE
from app.kernel.db import Database, row, rows
from app.kernel.money import usd_text
from app.kernel.progress import Told, nobody
from app.metering.compared import Ratio, ratios

FINDINGS_PER_CHECK: Final = 100

CHECKS: Final[tuple[Check, ...]] = (
    *BOOKS, *HOLDS, *KEYS, *USAGE, *DAYS, *TOPUPS, *OFFERS, *AUTOTOPUP, *NOTICES, *OWNERS, *TIMES, *SCHEMA,
)  # fmt: skip
"""Everything an audit looks at, in the order it looks."""

PROOFS: Final[tuple[Proof, ...]] = (*SEALS, *CLOSINGS, *ALIASES)
"""What it looks at besides where it is given the secrets that are kept outside the database."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit found, and how much it looked at. `told` are costs of the last day that proxies said, by model, beside
    the catalogue's: a figure may be right in the books and wrong all the same. `seals` is how far those go, if there are any."""

    findings: tuple[Finding, ...]
    checks: int
    accounts: int
    entries: int
    told: tuple[Ratio, ...] = ()
    seals: Seals | None = None

    @property
    def is_clean(self) -> bool:
        return not self.findings


async def audit(
    db: Database, secrets: Secrets | None = None, told: Told = nobody, noted_head: str | None = None
) -> Report:
    """Run every check on one snapshot, and with `secrets` every proof. Takes as long as it takes; locks nothing, writes nothing.

    `noted_head` is a head of the seals that an earlier audit printed: what was sealed then must still be sealed.
    Raises InvalidField for one that is none.
    """
    return await db.transaction(lambda session: _audit(session, secrets, told, noted_head))


async def _audit(session: AsyncSession, secrets: Secrets | None, told: Told, noted_head: str | None) -> Report:
    await row(session, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
    await row(session, "SET LOCAL statement_timeout = 0")
    # Whole tables are compared: where statistics are old, the planner would look rows up one by one, for hours.
    await row(session, "SET LOCAL enable_nestloop = off")
    # Where accounts live on several servers (Citus), one connection to each, so that each is seen as it is at one moment.
    await row(session, "SET LOCAL citus.max_adaptive_executor_pool_size = 1")
    findings: list[Finding] = []
    proofs = PROOFS if secrets is not None else ()
    number = len(CHECKS) + len(proofs)
    for done, check in enumerate(CHECKS):
        told(done, number)
        findings += await _findings(session, check)
    for done, proof in enumerate(proofs, len(CHECKS)):
        assert secrets is not None
        told(done, number)
        findings += await _unproved(session, proof, secrets)
    seals = None
    if secrets is not None:
        told(len(CHECKS) + len(proofs), number)
        broken, seals = await look(session, secrets.pepper, noted_head)
        findings += _cut_short(broken)
        number += len(AS_SEALED) * (seals is not None)
    told(number, number)
    size = await row(
        session, "SELECT (SELECT count(*) FROM account) AS accounts, (SELECT count(*) FROM entry) AS entries"
    )
    assert size is not None
    costs = tuple(await ratios(session))
    return Report(tuple(findings), number, size["accounts"], size["entries"], costs, seals)


def _cut_short(found: list[Finding]) -> list[Finding]:
    """The first findings of each check, and how many there are in all."""
    kept: list[Finding] = []
    for check in AS_SEALED:
        of_check = [finding for finding in found if finding.check == check]
        kept += of_check[:FINDINGS_PER_CHECK]
        if len(of_check) > FINDINGS_PER_CHECK:
            kept.append(Finding(check, "differences in all", str(len(of_check)), "0"))
    return kept


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


async def _unproved(session: AsyncSession, proof: Proof, secrets: Secrets) -> list[Finding]:
    """The same for a proof, row by row as they come: there may be millions."""
    found: list[str] = []
    count = 0
    async for each in await session.stream(
        text(f"{proof.sql} ORDER BY subject"), execution_options={"yield_per": 1000}
    ):
        if not proof.holds(secrets, dict(each._mapping)):
            count += 1
            found += [each.subject] * (count <= FINDINGS_PER_CHECK)
    findings = [Finding(proof.name, subject, proof.broken, proof.whole) for subject in found]
    if count > len(found):
        findings.append(Finding(proof.name, "differences in all", str(count), "0"))
    return findings


def _shown(check: Check, value: Any) -> str:
    if value is None:
        return "none"
    return usd_text(int(value)) if check.is_money else str(value)
