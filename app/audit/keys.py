"""What keys promise: their figures are those of their calls, and a secret leads to one key or one account."""

from typing import Final

from app.audit.check import Check
from app.audit.usage import NET

_COUNTED_TO: Final = """
    (SELECT account_id, id AS key_id, id AS counted_to FROM api_key
     UNION ALL SELECT account_id, id, unnest(ancestor_ids) FROM api_key WHERE ancestor_ids IS NOT NULL)"""
"""A key's calls count to the key and to every key above it."""
_WINDOWS: Final = """
    (SELECT account_id, id, reset_period AS period, window_start, window_usage_nusd AS usage_nusd FROM api_key
     UNION ALL SELECT account_id, id, unnest(more_periods), unnest(more_starts), unnest(more_usage_nusd)
     FROM api_key WHERE more_periods IS NOT NULL)"""

KEYS: Final = (
    Check(
        "key_held_is_sum_of_open_holds",
        "What a key has set aside is the sum of the open holds of it and the keys below it.",
        f"""SELECT k.account_id || '/' || k.id AS subject, k.held_nusd AS recorded, coalesce(h.total, 0) AS recomputed
           FROM api_key k
           LEFT JOIN (SELECT c.account_id, c.counted_to, sum(o.total) AS total
                      FROM (SELECT account_id, key_id, sum(amount_nusd) AS total FROM hold WHERE state = 'open' GROUP BY 1, 2) o
                      JOIN {_COUNTED_TO} c ON c.account_id = o.account_id AND c.key_id = o.key_id GROUP BY 1, 2) h
                  ON h.account_id = k.account_id AND h.counted_to = k.id
           WHERE k.held_nusd <> coalesce(h.total, 0)""",
        is_money=True,
    ),
    Check(
        "key_window_is_sum_of_its_usage",
        "A key's usage in each of its windows is what the calls that count to it cost, its own and those of keys below it, less what was"
        " refunded of them.",
        f"""SELECT w.account_id || '/' || w.id || CASE WHEN w.places > 1 THEN ' ' || coalesce(w.period, 'total') ELSE '' END AS subject,
                  w.usage_nusd AS recorded, coalesce(u.total, 0) AS recomputed
           FROM (SELECT *, count(*) OVER (PARTITION BY account_id, id) AS places FROM {_WINDOWS} w) w
           LEFT JOIN (SELECT w.account_id, w.id, w.period, sum(u.net_nusd) AS total
                      FROM (SELECT account_id, key_id, window_start, sum(net_nusd) AS net_nusd FROM {NET} u GROUP BY 1, 2, 3) u
                      JOIN {_COUNTED_TO} c ON c.account_id = u.account_id AND c.key_id = u.key_id
                      JOIN {_WINDOWS} w ON w.account_id = c.account_id AND w.id = c.counted_to
                      WHERE u.window_start >= w.window_start GROUP BY 1, 2, 3) u
                  ON u.account_id = w.account_id AND u.id = w.id AND coalesce(u.period, '') = coalesce(w.period, '')
           WHERE w.usage_nusd <> coalesce(u.total, 0)""",
        is_money=True,
    ),
    Check(
        "key_lifetime_is_sum_of_usage",
        "What a key ever spent itself is the cost of all its calls, less what was refunded of them.",
        f"""SELECT k.account_id || '/' || k.id AS subject, k.lifetime_nusd AS recorded, coalesce(u.total, 0) AS recomputed
           FROM api_key k LEFT JOIN (SELECT account_id, key_id, sum(net_nusd) AS total FROM {NET} u GROUP BY 1, 2) u
                                 ON u.account_id = k.account_id AND u.key_id = k.id
           WHERE k.lifetime_nusd <> coalesce(u.total, 0)""",
        is_money=True,
    ),
    Check(
        "key_stands_below_its_parent",
        "What stands above a key is its parent and what stands above that, of the same account, five at most.",
        """SELECT k.account_id || '/' || k.id AS subject, array_to_string(k.ancestor_ids, ' ') AS recorded,
                  array_to_string(CASE WHEN k.parent_id IS NOT NULL THEN array_append(p.ancestor_ids, p.id) END, ' ') AS recomputed
           FROM api_key k LEFT JOIN api_key p ON p.account_id = k.account_id AND p.id = k.parent_id
           WHERE k.ancestor_ids IS DISTINCT FROM CASE WHEN k.parent_id IS NOT NULL THEN array_append(p.ancestor_ids, p.id) END
              OR k.parent_id = k.id OR cardinality(k.ancestor_ids) > 5""",
    ),
    Check(
        "key_has_each_window_once",
        "A key's windows are of different periods that there are, each with its limit, start and usage.",
        """SELECT account_id || '/' || id AS subject, concat_ws(' ', reset_period, array_to_string(more_periods, ' ', 'total')) AS recorded,
                  'each once' AS recomputed
           FROM api_key WHERE more_periods IS NOT NULL AND NOT (
               limit_nusd IS NOT NULL AND 0 <= ALL (more_limits_nusd) AND 0 <= ALL (more_usage_nusd)
               AND cardinality(more_periods) = (SELECT count(DISTINCT coalesce(p, 'total')) FROM unnest(more_periods) p
                                                WHERE p IS NULL OR p IN ('day', 'week', 'month'))
               AND coalesce(reset_period, 'total') <> ALL (array_replace(more_periods, NULL, 'total'))
               AND array_position(more_limits_nusd, NULL) IS NULL AND array_position(more_starts, NULL) IS NULL
               AND array_position(more_usage_nusd, NULL) IS NULL AND cardinality(more_limits_nusd) = cardinality(more_periods)
               AND cardinality(more_starts) = cardinality(more_periods) AND cardinality(more_usage_nusd) = cardinality(more_periods)) IS TRUE""",
    ),
    Check(
        "account_has_one_credit_id",
        "Every account is known by exactly one credit id, beside the last one that ends or ended.",
        """SELECT a.id::text AS subject, count(c.secret_hash) AS recorded, 1 AS recomputed
           FROM account a LEFT JOIN credential c ON c.account_id = a.id AND c.kind = 'credit_id' AND c.ends_at IS NULL
           GROUP BY a.id HAVING count(c.secret_hash) <> 1
           UNION ALL
           SELECT c.account_id::text || ' ending', count(*), 1 FROM credential c
           WHERE c.kind = 'credit_id' AND c.ends_at IS NOT NULL GROUP BY c.account_id HAVING count(*) > 1""",
    ),
    Check(
        "account_has_one_way_back",
        "An account is recovered by one recovery code and one Nostr key at most, beside those that end.",
        """SELECT c.kind || ' of ' || c.account_id AS subject, count(*) AS recorded, 1 AS recomputed FROM credential c
           WHERE c.kind IN ('recovery_code', 'nostr') AND c.ends_at IS NULL GROUP BY c.account_id, c.kind HAVING count(*) > 1""",
    ),
    Check(
        "key_has_one_secret",
        "Every key is known by exactly one secret; a revoked one by no more than one.",
        """SELECT k.account_id || '/' || k.id AS subject, count(c.secret_hash) AS recorded, 1 AS recomputed
           FROM api_key k LEFT JOIN credential c ON c.account_id = k.account_id AND c.key_id = k.id AND c.kind = 'api_key'
           GROUP BY k.account_id, k.id, k.deleted_at
           HAVING count(c.secret_hash) <> 1 AND NOT (count(c.secret_hash) = 0 AND k.deleted_at IS NOT NULL)""",
    ),
    Check(
        "secret_opens_what_it_says",
        "A key's secret leads to a key of its account, a credit id to no key; a way back says which it is.",
        """SELECT c.kind || ' of ' || c.account_id || coalesce('/' || c.key_id, '') AS subject, c.key_id AS recorded, k.id AS recomputed
           FROM credential c LEFT JOIN api_key k ON k.account_id = c.account_id AND k.id = c.key_id
           WHERE CASE c.kind WHEN 'api_key' THEN k.id IS NULL WHEN 'credit_id' THEN c.key_id IS NOT NULL
                             WHEN 'recovery_code' THEN c.key_id IS NULL WHEN 'nostr' THEN c.key_id IS NULL OR c.label IS NULL
                             ELSE true END""",
    ),
)
