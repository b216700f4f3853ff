"""What kept secrets promise: each opens where it stands, with the sealing keys there are."""

from typing import Final

from app.audit.check import Proof, Secrets
from app.autotopup import connect
from app.kernel.db import Row
from app.kernel.security import UnsealError
from app.keys import issue


def _opens(secrets: Secrets, sealed: str, name: str) -> bool:
    try:
        secrets.sealer.open(sealed, name)
    except UnsealError:
        return False
    return True


def _key_opens(secrets: Secrets, row: Row) -> bool:
    return _opens(secrets, row["sealed_secret"], issue.sealed_as(row["account_id"], row["id"]))


def _wallet_opens(secrets: Secrets, row: Row) -> bool:
    return _opens(secrets, row["sealed_secret"], connect.sealed_as(row["account_id"]))


# Saved answers are not looked at: they are forgotten in two days, and one that does not open is refused with a reason.
SEALS: Final = (
    Proof(
        "kept_key_opens",
        "A key that is kept for showing opens where it stands: no sealing key is missing, and no secret was moved.",
        """SELECT account_id || '/' || id AS subject, account_id, id, sealed_secret FROM api_key
           WHERE sealed_secret IS NOT NULL""",
        _key_opens, broken="does not open", whole="opens",
    ),
    Proof(
        "wallet_secret_opens",
        "A connected wallet's secret opens where it stands.",
        "SELECT account_id::text AS subject, account_id, sealed_secret FROM nwc_connection",
        _wallet_opens, broken="does not open", whole="opens",
    ),
)  # fmt: skip
