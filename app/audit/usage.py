"""What calls promise: each was charged once, what its price lines add up to, and has its entry."""

from typing import Final

from app.activity.calendar import end_of, first_id_of
from app.audit.check import Check
from app.pricing.quote import AUSD_PER_NUSD

NET: Final = """
    (SELECT u.account_id, u.key_id, u.window_start, u.cost_nusd - coalesce(r.amount_nusd, 0) AS net_nusd
     FROM usage u LEFT JOIN entry r ON r.account_id = u.account_id AND r.kind = 'refund' AND r.reference = u.id::text
     UNION ALL SELECT account_id, key_id, window_start, cost_nusd - refunded_nusd FROM usage_dropped)"""
"""Calls with what they cost after a refund, and what is kept of those that were dropped."""

IS_OF_DROPPED_MONTH: Final = f"""
    EXISTS (SELECT FROM usage_archive x WHERE x.dropped_at IS NOT NULL AND {{call}} >= {first_id_of("x.month")}
                                          AND {{call}} < {first_id_of(end_of("x"))})"""

USAGE: Final = (
    Check(
        "usage_has_its_entry",
        "Every charged call has exactly one entry that took its cost.",
        """SELECT u.account_id || '/' || u.id AS subject, count(e.id) AS recorded, 1 AS recomputed
           FROM usage u LEFT JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           GROUP BY u.account_id, u.id, u.hold_id HAVING count(e.id) <> 1""",
    ),
    Check(
        "usage_entry_has_its_call",
        "Every entry of usage has exactly one call behind it, or is of a month whose calls were dropped.",
        f"""SELECT e.account_id || '/' || e.id AS subject, count(u.id) AS recorded, 1 AS recomputed
           FROM entry e LEFT JOIN usage u ON u.account_id = e.account_id AND u.hold_id::text = e.reference
           WHERE e.kind = 'usage' AND NOT ({IS_OF_DROPPED_MONTH.format(call="e.usage_id")}) IS TRUE
           GROUP BY e.account_id, e.id, e.reference HAVING count(u.id) <> 1""",
    ),
    Check(
        "usage_entry_takes_the_cost",
        "The entry of a call takes what the call cost.",
        """SELECT u.account_id || '/' || u.id AS subject, u.cost_nusd AS recorded, -e.amount_nusd AS recomputed
           FROM usage u JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           WHERE u.cost_nusd <> -e.amount_nusd""",
        is_money=True,
    ),
    Check(
        "usage_tells_the_balance_after_it",
        "The balance that a call was answered with is its entry's.",
        """SELECT u.account_id || '/' || u.id AS subject, u.balance_after_nusd AS recorded, e.balance_after_nusd AS recomputed
           FROM usage u JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           WHERE u.balance_after_nusd <> e.balance_after_nusd""",
        is_money=True,
    ),
    Check(
        "usage_and_entry_are_one_moment",
        "A call and its entry were written by one transaction, and so bear one time.",
        """SELECT u.account_id || '/' || u.id AS subject, u.created_at AS recorded, e.created_at AS recomputed
           FROM usage u JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           WHERE u.created_at <> e.created_at""",
    ),
    Check(
        "usage_entry_names_its_call",
        "An entry of usage names the call whose hold it refers to.",
        """SELECT e.account_id || '/' || e.id AS subject, e.usage_id AS recorded, u.id AS recomputed
           FROM usage u JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           WHERE e.usage_id IS DISTINCT FROM u.id""",
    ),
    Check(
        "refund_is_of_a_charge",
        "A refund gives back at most what the call it names did cost.",
        """SELECT e.account_id || '/' || e.id AS subject, e.amount_nusd AS recorded, coalesce(-c.amount_nusd, 0) AS recomputed
           FROM entry e LEFT JOIN entry c ON c.account_id = e.account_id AND c.kind = 'usage' AND c.usage_id::text = e.reference
           WHERE e.kind = 'refund' AND (c.id IS NULL OR e.amount_nusd > -c.amount_nusd)""",
        is_money=True,
    ),
    Check(
        "lines_add_up_to_the_cost",
        "What a call cost is its price lines added up and rounded up once, and the rest of its hold for what has no price; its"
        " figures by kind add up to its lines.",
        f"""SELECT u.account_id || '/' || u.id AS subject, u.cost_nusd AS recorded,
                   CASE WHEN u.cost_nusd <> l.total THEN l.total ELSE p.total END AS recomputed
            FROM usage u CROSS JOIN LATERAL (
                SELECT ceil(coalesce(sum((line->>2)::numeric * (line->>3)::numeric * (line->>4)::numeric
                                         * (coalesce((u.lines->>'divisor')::numeric, 1) / coalesce((line->>5)::numeric, 1))), 0)
                            / (coalesce((u.lines->>'divisor')::numeric, 1) * {AUSD_PER_NUSD})) AS total
                FROM jsonb_array_elements(u.lines->'lines') line) l
            CROSS JOIN LATERAL (SELECT sum(part::bigint) AS total FROM jsonb_array_elements_text(u.lines->'parts') part) p
            WHERE jsonb_exists(u.lines, 'lines') AND (l.total <> p.total OR u.cost_nusd < l.total
                OR (u.cost_nusd > l.total AND u.flags !~ '(^|,)(not_priced:|served_not_priced)'))""",
        is_money=True,
    ),
    Check(
        "request_is_charged_once",
        "No account was charged twice for one request of one service.",
        """SELECT account_id || '/' || service || '/' || request_id AS subject, count(*) AS recorded, 1 AS recomputed
           FROM usage GROUP BY account_id, service, request_id HAVING count(*) > 1""",
    ),
)
