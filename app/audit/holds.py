"""What holds promise: money is set aside as long as a call is in flight, and for nothing else."""

from typing import Final

from app.audit.check import Check
from app.audit.waited import in_vain

HOLDS: Final = (
    Check(
        "account_held_is_sum_of_open_holds",
        "What an account has set aside is the sum of its open holds.",
        """SELECT a.id::text AS subject, a.held_nusd AS recorded, coalesce(h.total, 0) AS recomputed
           FROM account a LEFT JOIN (SELECT account_id, sum(amount_nusd) AS total FROM hold WHERE state = 'open' GROUP BY 1) h
                                 ON h.account_id = a.id
           WHERE a.held_nusd <> coalesce(h.total, 0)""",
        is_money=True,
    ),
    Check(
        "hold_is_settled_by_its_usage",
        "A hold is settled if its call was charged, and only then.",
        """SELECT h.account_id || '/' || h.id AS subject, h.state AS recorded,
                  CASE WHEN e.id IS NULL THEN 'never charged' ELSE 'settled' END AS recomputed
           FROM hold h LEFT JOIN entry e ON e.account_id = h.account_id AND e.kind = 'usage' AND e.reference = h.id::text
           WHERE (h.state = 'settled') <> (e.id IS NOT NULL)""",
    ),
    Check(
        "usage_agrees_with_its_hold",
        "A charge counts to the key, the window and the request that its money was set aside for.",
        """SELECT h.account_id || '/' || h.id AS subject, concat_ws(' ', u.key_id, u.window_start, u.service, u.request_id) AS recorded,
                  concat_ws(' ', h.key_id, h.window_start, h.service, h.request_id) AS recomputed
           FROM hold h JOIN usage u ON u.account_id = h.account_id AND u.hold_id = h.id
           WHERE (u.key_id, u.window_start, u.service, u.request_id) <> (h.key_id, h.window_start, h.service, h.request_id)""",
    ),
    Check(
        "no_hold_outlives_its_time",
        "Five minutes after its time a hold is no longer open, unless the whole service stood still.",
        f"""SELECT account_id || '/' || id AS subject, 'open' AS recorded, 'expired ' || expires_at AS recomputed FROM hold
           WHERE state = 'open' AND {in_vain("expire holds", "expires_at + interval '5 minutes'")}""",
    ),
    Check(
        "hold_is_closed_when_it_says",
        "A hold has a time of closing if it is closed, and only then; its state is one of four.",
        """SELECT account_id || '/' || id AS subject, state AS recorded, coalesce(closed_at::text, 'never closed') AS recomputed
           FROM hold WHERE (state = 'open') <> (closed_at IS NULL) OR state NOT IN ('open', 'settled', 'released', 'expired')""",
    ),
)
