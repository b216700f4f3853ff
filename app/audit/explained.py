"""What explains an entry: its call, its top-up, the review or the operator's act that decided it. One look-up each, by its key."""

from typing import Final

from app.activity.calendar import is_call_id
from app.audit.usage import IS_OF_DROPPED_MONTH

_REFUNDED: Final = f"CASE WHEN {is_call_id('e.reference')} THEN e.reference::uuid END"


def unexplained(which: str) -> str:
    """SQL for the entries among `which` that nothing explains: account_id, id, created_at."""
    return f"""
    SELECT e.account_id, e.id, e.created_at FROM entry e
    WHERE {which} AND NOT coalesce(CASE e.kind
        WHEN 'usage' THEN EXISTS (SELECT FROM usage u WHERE u.account_id = e.account_id AND u.id = e.usage_id
                                                        AND u.cost_nusd = -e.amount_nusd AND u.hold_id::text = e.reference)
                          OR {IS_OF_DROPPED_MONTH.format(call="e.usage_id")}
        WHEN 'refund' THEN EXISTS (SELECT FROM usage u WHERE u.account_id = e.account_id AND u.id = {_REFUNDED}
                                                         AND u.cost_nusd >= e.amount_nusd)
                           OR {IS_OF_DROPPED_MONTH.format(call=_REFUNDED)}
        WHEN 'topup' THEN EXISTS (SELECT FROM topup t WHERE t.account_id = e.account_id AND t.id::text = split_part(e.reference, '/', 1)
                                                        AND t.credited_nusd >= e.amount_nusd AND t.backend || ':' || t.method = e.contra)
        WHEN 'bonus' THEN EXISTS (SELECT FROM topup t WHERE t.account_id = e.account_id AND t.id::text = split_part(e.reference, '/', 1)
                                                        AND t.bonus_nusd >= e.amount_nusd)
        WHEN 'adjustment' THEN (e.reference, e.amount_nusd, e.account_id::text) IN (
                                   SELECT 'act/' || l.id, l.amount_nusd, split_part(l.subject, '/', 1) FROM admin_log l)
                               OR (starts_with(e.reference, 'review/') AND EXISTS (
                                   SELECT FROM topup t WHERE t.account_id = e.account_id AND t.id::text = split_part(e.reference, '/', 2)
                                                         AND t.reviewed IS NOT NULL))
        END, false)"""
