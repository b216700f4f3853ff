"""The continuous audit's figures as Prometheus reads them: the database's, and so the same whichever process is asked."""

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from app.audit.continuous import figures
from app.kernel.db import Database


async def gauges(db: Database) -> list[Metric]:
    """None before the first round. Raises DatabaseUnavailable."""
    found = await db.transaction(figures)
    if found is None:
        return []
    return [
        GaugeMetricFamily(f"satmeter_{name}", says, value=value)
        for name, says, value in (
            ("entries_explained_ratio", "Share of entries that their call, top-up, review or act explains; 1 is right", found.explained_ratio),
            ("oldest_unexplained_seconds", "Age of the oldest cent that nothing explains; 0 if there is none", found.oldest_unexplained_seconds),
            ("continuous_audit_differences", "Differences that the continuous audit found in its last round", found.differences),
        )
    ]  # fmt: skip
