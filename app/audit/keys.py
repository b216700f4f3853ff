"""What keys promise: their figures are those of their calls, and a secret leads to one key or one account."""

from typing import Final

from app.audit.check import Check
from app.audit.usage import NET

KEYS: Final = (
    Check(
        "key_held_is_sum_of_open_holds",
        "What a key has set aside is the sum of its open holds.",
        """SELECT k.account_id || '/' || k.id AS subject, k.held_nusd AS recorded, coalesce(h.total, 0) AS recomputed
           FROM api_key k
           LEFT JOIN (SELECT account_id, key_id, sum(amount_nusd) AS total FROM hold WHERE state = 'open' GROUP BY 1, 2) h
                  ON h.account_id = k.account_id AND h.key_id = k.id
           WHERE k.held_nusd <> coalesce(h.total, 0)""",
        is_money=True,
    ),
    Check(
        "key_window_is_sum_of_its_usage",
        "A key's usage in its window is what the calls that count to this window cost, less what was refunded of them.",
        f"""SELECT k.account_id || '/' || k.id AS subject, k.window_usage_nusd AS recorded, coalesce(u.total, 0) AS recomputed
           FROM api_key k
           LEFT JOIN (SELECT account_id, key_id, window_start, sum(net_nusd) AS total FROM {NET} u GROUP BY 1, 2, 3) u
                  ON u.account_id = k.account_id AND u.key_id = k.id AND u.window_start = k.window_start
           WHERE k.window_usage_nusd <> coalesce(u.total, 0)""",
        is_money=True,
    ),
    Check(
        "key_lifetime_is_sum_of_usage",
        "What a key ever spent is the cost of all its calls, less what was refunded of them.",
        f"""SELECT k.account_id || '/' || k.id AS subject, k.lifetime_nusd AS recorded, coalesce(u.total, 0) AS recomputed
           FROM api_key k LEFT JOIN (SELECT account_id, key_id, sum(net_nusd) AS total FROM {NET} u GROUP BY 1, 2) u
                                 ON u.account_id = k.account_id AND u.key_id = k.id
           WHERE k.lifetime_nusd <> coalesce(u.total, 0)""",
        is_money=True,
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
