"""What the entries promise of themselves, and of the balances that are their sums."""

from typing import Final

from app.audit.check import Check

_BOOKED: Final = """
    (SELECT account_id, id AS first_id, id, amount_nusd, balance_after_nusd FROM entry
     UNION ALL SELECT account_id, first_id, last_id, amount_nusd, balance_after_nusd FROM entry_closing)"""
"""Entries, and what is kept of those that were put away: many in a row, from `first_id` to `id`."""

BOOKS: Final = (
    Check(
        "balance_is_sum_of_entries",
        "An account's balance is the sum of its entries.",
        f"""SELECT a.id::text AS subject, a.posted_nusd AS recorded, coalesce(e.total, 0) AS recomputed
           FROM account a LEFT JOIN (SELECT account_id, sum(amount_nusd) AS total FROM {_BOOKED} e GROUP BY 1) e ON e.account_id = a.id
           WHERE a.posted_nusd <> coalesce(e.total, 0)""",
        is_money=True,
    ),
    Check(
        "entries_are_counted",
        "An account's entry count is the number of its entries.",
        f"""SELECT a.id::text AS subject, a.entry_count AS recorded, coalesce(e.count, 0) AS recomputed
           FROM account a LEFT JOIN (SELECT account_id, sum(id - first_id + 1) AS count FROM {_BOOKED} e GROUP BY 1) e ON e.account_id = a.id
           WHERE a.entry_count <> coalesce(e.count, 0)""",
    ),
    Check(
        "entry_ids_have_no_gap",
        "Entries of an account are numbered 1, 2, 3 … The first wrong number is shown.",
        f"""SELECT DISTINCT ON (account_id) account_id::text AS subject, id AS recorded, place AS recomputed
           FROM (SELECT account_id, id, sum(id - first_id + 1) OVER (PARTITION BY account_id ORDER BY id ROWS UNBOUNDED PRECEDING) AS place
                 FROM {_BOOKED} e) e
           WHERE id <> place ORDER BY account_id, id""",
    ),
    Check(
        "balance_after_is_running_sum",
        "An entry's balance after it is the sum of the entries up to it. The first wrong one of an account is shown.",
        f"""SELECT DISTINCT ON (account_id) account_id || '/' || id AS subject, balance_after_nusd AS recorded, sum AS recomputed
           FROM (SELECT account_id, id, balance_after_nusd,
                        sum(amount_nusd) OVER (PARTITION BY account_id ORDER BY id ROWS UNBOUNDED PRECEDING) AS sum FROM {_BOOKED} e) e
           WHERE balance_after_nusd <> sum ORDER BY account_id, id""",
        is_money=True,
    ),
    Check(
        "entries_are_in_time_order",
        "An entry is not older than the one before it, give or take the five minutes a transaction can never last.",
        """SELECT account_id || '/' || id AS subject, created_at AS recorded, 'not before ' || before AS recomputed
           FROM (SELECT account_id, id, created_at, lag(created_at) OVER (PARTITION BY account_id ORDER BY id) AS before
                 FROM entry) e
           WHERE created_at < before - interval '5 minutes'""",
    ),
    Check(
        "entry_is_posted_once",
        "No account has two entries of one kind with one reference.",
        """SELECT account_id || '/' || kind || '/' || reference AS subject, count(*) AS recorded, 1 AS recomputed
           FROM entry GROUP BY account_id, kind, reference HAVING count(*) > 1""",
    ),
    Check(
        "entry_sign_fits_its_kind",
        "Top-ups and bonuses add, refunds never take, usage never adds.",
        """SELECT account_id || '/' || id AS subject, amount_nusd AS recorded, 0 AS recomputed FROM entry
           WHERE NOT CASE kind WHEN 'topup' THEN amount_nusd > 0 WHEN 'bonus' THEN amount_nusd > 0
                               WHEN 'refund' THEN amount_nusd >= 0 WHEN 'usage' THEN amount_nusd <= 0
                               WHEN 'adjustment' THEN true ELSE false END""",
        is_money=True,
    ),
    Check(
        "entry_contra_fits_its_kind",
        "Each kind of entry has its own house account (a top-up's is checked with its top-up).",
        """SELECT account_id || '/' || id AS subject, kind || ' from ' || contra AS recorded, 'another house account' AS recomputed
           FROM entry
           WHERE NOT CASE kind WHEN 'topup' THEN strpos(contra, ':') > 1 WHEN 'bonus' THEN contra = 'bonus:lightning'
                               WHEN 'usage' THEN contra = 'revenue:usage' WHEN 'refund' THEN contra = 'revenue:usage'
                               WHEN 'adjustment' THEN contra = 'adjustment' ELSE false END""",
    ),
    Check(
        "adjustment_has_its_reason",
        "An adjustment is what the review of a top-up decided (which is checked with the top-up), or an operator's written act.",
        """SELECT e.account_id || '/' || e.id AS subject, e.reference AS recorded, 'a review or an act of this account' AS recomputed
           FROM entry e LEFT JOIN admin_log l ON e.reference = 'act/' || l.id AND l.amount_nusd = e.amount_nusd
                                              AND split_part(l.subject, '/', 1) = e.account_id::text
           WHERE e.kind = 'adjustment' AND NOT starts_with(e.reference, 'review/') AND l.id IS NULL""",
    ),
    Check(
        "floor_has_its_act",
        "How far below zero an account may go is what an operator's last act about it (`account.floor`) allowed, else nothing.",
        """SELECT a.id::text AS subject, a.floor_nusd AS recorded, coalesce(l.amount_nusd, 0) AS recomputed
           FROM account a LEFT JOIN (SELECT DISTINCT ON (subject) subject, amount_nusd FROM admin_log WHERE act = 'account.floor'
                                     ORDER BY subject, created_at DESC, id DESC) l ON l.subject = a.id::text
           WHERE a.floor_nusd <> coalesce(l.amount_nusd, 0)""",
        is_money=True,
    ),
    Check(
        "stopped_account_stays_stopped",
        "An account that an operator froze or closed, and let go on by no later act, is not active.",
        """SELECT a.id::text AS subject, a.status AS recorded, split_part(l.act, '.', 2) AS recomputed
           FROM account a JOIN (SELECT DISTINCT ON (subject) subject, act FROM admin_log
                                WHERE act IN ('account.freeze', 'account.unfreeze', 'account.close')
                                ORDER BY subject, id DESC) l ON l.subject = a.id::text
           WHERE a.status = 'active' AND l.act <> 'account.unfreeze'""",
    ),
    Check(
        "all_balances_are_all_entries",
        "All balances together are all entries together.",
        f"""SELECT 'all accounts' AS subject, recorded, recomputed
           FROM (SELECT coalesce(sum(posted_nusd), 0) AS recorded FROM account) a,
                (SELECT coalesce(sum(amount_nusd), 0) AS recomputed FROM {_BOOKED} e) e
           WHERE recorded <> recomputed""",
        is_money=True,
    ),
    Check(
        "all_revenue_is_all_usage",
        "What the house earned is what all calls cost.",
        """SELECT 'revenue:usage' AS subject, recorded, recomputed
           FROM (SELECT coalesce(-sum(amount_nusd), 0) AS recorded
                 FROM (SELECT amount_nusd FROM entry WHERE kind = 'usage' UNION ALL SELECT amount_nusd FROM entry_closing) e) e,
                (SELECT coalesce(sum(cost_nusd), 0) AS recomputed
                 FROM (SELECT cost_nusd FROM usage UNION ALL SELECT cost_nusd FROM usage_dropped) u) u
           WHERE recorded <> recomputed""",
        is_money=True,
    ),
    Check(
        "figures_keep_their_sign",
        "Nothing held, spent or credited is negative, and no floor is above zero, should a constraint be gone.",
        """SELECT 'account ' || id AS subject, least(held_nusd, -floor_nusd, entry_count) AS recorded, 0 AS recomputed FROM account
           WHERE held_nusd < 0 OR floor_nusd > 0 OR entry_count < 0
           UNION ALL SELECT 'api_key ' || account_id || '/' || id, least(held_nusd, window_usage_nusd, lifetime_nusd, limit_nusd), 0
           FROM api_key WHERE least(held_nusd, window_usage_nusd, lifetime_nusd, limit_nusd) < 0
           UNION ALL SELECT 'hold ' || account_id || '/' || id, amount_nusd, 0 FROM hold WHERE amount_nusd < 0
           UNION ALL SELECT 'usage ' || account_id || '/' || id, least(cost_nusd, held_after_nusd), 0
           FROM usage WHERE least(cost_nusd, held_after_nusd) < 0
           UNION ALL SELECT 'topup ' || account_id || '/' || id, least(credited_nusd, bonus_nusd), 0
           FROM topup WHERE least(credited_nusd, bonus_nusd) < 0
           UNION ALL SELECT 'payment ' || account_id || '/' || topup_id || '/' || payment_id, worth_nusd, 0
           FROM payment WHERE worth_nusd < 0""",
        is_money=True,
    ),
)
