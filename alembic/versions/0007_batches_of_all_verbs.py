"""batches of all verbs: authorizes, settles and charges of one moment are decided in one transaction

The batch functions of 0004 locked the accounts of their own calls. Functions that follow each other in one transaction
must not: two such transactions could each hold what the other wants next. The first now locks the accounts of all,
in their order, and the others get null.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_AS_IT_IS = sa.text(
    """SELECT pg_get_functiondef(f.oid), pg_get_function_identity_arguments(f.oid)
       FROM (SELECT CAST(CAST(:name AS regproc) AS oid) AS oid) f"""
)
_LOCKED_ITS_OWN = "PERFORM 1 FROM account WHERE id = ANY (p_account_id) ORDER BY id FOR NO KEY UPDATE;"
_LOCKS_WHAT_IT_IS_TOLD = """IF p_lock IS NOT NULL THEN
        PERFORM 1 FROM account WHERE id = ANY (p_lock) ORDER BY id FOR NO KEY UPDATE;
    END IF;"""


def upgrade() -> None:
    for name in ("authorize_batch", "settle_batch", "charge_batch"):
        before, arguments = op.get_bind().execute(_AS_IT_IS, {"name": name}).one()
        after = _replaced(_replaced(before, f"{name}(", f"{name}(p_lock uuid[], "), _LOCKED_ITS_OWN, _LOCKS_WHAT_IT_IS_TOLD)
        op.execute(f"DROP FUNCTION {name}({arguments})")
        op.get_bind().exec_driver_sql(after)
        op.execute(f"REVOKE EXECUTE ON FUNCTION {name} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {name} TO satmeter_runtime")


def _replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    return text.replace(old, new)
