"""What auto-topup promises: one open attempt an account, and every attempt its top-up."""

from typing import Final

from app.audit.check import Check
from app.audit.waited import in_vain
from app.autotopup.rules import OPEN
from app.autotopup.tables import states_sql

AUTOTOPUP: Final = (
    Check(
        "attempt_has_its_topup",
        "An attempt that has an invoice has its top-up, over Lightning, of its own account and for its amount.",
        """SELECT n.account_id || '/' || n.id AS subject, concat_ws(' ', 'lightning', n.topup_id, n.amount_nusd) AS recorded,
                  coalesce(t.account_id || ' ' || t.method || ' ' || t.currency || ' ' || t.amount_units, 'no top-up') AS recomputed
           FROM nwc_attempt n LEFT JOIN topup t ON t.account_id = n.account_id AND t.id = n.topup_id
           WHERE (n.payment_hash IS NOT NULL OR n.topup_id IN (SELECT id FROM topup))
             AND (t.account_id, t.method, t.currency, t.amount_units)
                 IS DISTINCT FROM (n.account_id, 'btc-lightning', 'USD', n.amount_nusd)""",
    ),
    Check(
        "account_has_one_open_attempt",
        "No account has two open attempts: both invoices could be paid.",
        f"""SELECT account_id::text AS subject, count(*) AS recorded, 1 AS recomputed FROM nwc_attempt
            WHERE state IN ({states_sql(OPEN)}) GROUP BY account_id HAVING count(*) > 1""",
    ),
    Check(
        "settled_attempt_is_credited",
        "A settled attempt's top-up was credited; and an hour after a top-up was, its attempt is settled.",
        f"""SELECT n.account_id || '/' || n.id AS subject, n.state AS recorded,
                  CASE WHEN t.credited_nusd > 0 THEN 'settled' ELSE 'not credited' END AS recomputed
           FROM nwc_attempt n LEFT JOIN topup t ON t.account_id = n.account_id AND t.id = n.topup_id
           WHERE CASE WHEN n.state = 'settled' THEN coalesce(t.credited_nusd, 0) = 0
                      ELSE t.credited_nusd > 0 AND {in_vain("drive auto top-ups", "t.settled_at + interval '1 hour'")} END""",
    ),
    Check(
        "payment_is_asked_for_by_one_attempt",
        "No two attempts wait for one payment.",
        """SELECT payment_hash AS subject, count(*) AS recorded, 1 AS recomputed FROM nwc_attempt
           WHERE payment_hash IS NOT NULL GROUP BY payment_hash HAVING count(*) > 1""",
    ),
    Check(
        "attempt_pays_its_topup",
        "The Lightning invoice that a wallet is asked to pay is one that the backend told for the attempt's top-up.",
        """SELECT n.account_id || '/' || n.id AS subject, n.bolt11 AS recorded, 'what the backend told' AS recomputed
           FROM nwc_attempt n LEFT JOIN topup_address d
                ON d.account_id = n.account_id AND d.topup_id = n.topup_id AND d.destination = n.bolt11
           WHERE n.bolt11 IS NOT NULL AND d.topup_id IS NULL""",
    ),
    Check(
        "low_mark_is_the_threshold",
        "An account's low mark is the threshold of its wallet while that is active, and absent otherwise.",
        """SELECT a.id::text AS subject, a.low_nusd AS recorded, c.threshold_nusd AS recomputed
           FROM account a LEFT JOIN nwc_connection c ON c.account_id = a.id AND c.pause IS NULL
           WHERE a.low_nusd IS DISTINCT FROM c.threshold_nusd""",
        is_money=True,
    ),
)
