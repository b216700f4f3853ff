"""The books' auditor: recomputes every figure from what explains it; reports, never repairs.

A file a subject has its checks; `run` runs them all.
"""

from app.audit.check import Finding, Secrets
from app.audit.run import CHECKS, FINDINGS_PER_CHECK, PROOFS, Report, audit
from app.audit.unbroken import AS_SEALED

__all__ = ["AS_SEALED", "CHECKS", "FINDINGS_PER_CHECK", "PROOFS", "Finding", "Report", "Secrets", "audit"]
