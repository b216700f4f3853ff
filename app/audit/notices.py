"""What the outbox promises: nothing is told that did not happen, nothing waits for ever, and marks are what they are made of."""

from typing import Final

from app.audit.check import Check

NOTICES: Final = (
    Check(
        "told_topup_was_credited",
        "A notice of a top-up is of one of its own account that was credited.",
        """SELECT n.account_id || '/' || n.id AS subject, n.type AS recorded, 'not credited' AS recomputed
           FROM notice n LEFT JOIN topup t ON t.account_id = n.account_id AND t.id::text = n.data ->> 'topup_id'
           WHERE n.type IN ('topup.settled', 'topup.late', 'topup.partial') AND coalesce(t.credited_nusd, 0) = 0""",
    ),
    Check(
        "notices_do_not_wait",
        "A notice is delivered, tried again or given up within two days of when it is due.",
        """SELECT n.account_id || '/' || n.id || '/' || n.channel AS subject, 'due since ' || n.next_at AS recorded, 'tried' AS recomputed
           FROM notice n WHERE n.state = 'pending' AND n.next_at < now() - interval '2 days'""",
    ),
    Check(
        "notice_mark_is_one_of_its_marks",
        "The balance below which an account is told next is a share of its last top-up, what it calls low, or nothing left; none where"
        " nobody would be told.",
        """SELECT a.id::text AS subject, a.notice_mark_nusd AS recorded,
                  CASE WHEN n.account_id IS NOT NULL
                       THEN meter_mark(a.notice_base_nusd, a.low_balance_nusd, a.floor_nusd, a.notice_mark_nusd) END AS recomputed
           FROM account a LEFT JOIN notice_address n ON n.account_id = a.id
           WHERE a.notice_mark_nusd IS NOT NULL
             AND (n.account_id IS NULL
                  OR a.notice_mark_nusd IS DISTINCT FROM meter_mark(a.notice_base_nusd, a.low_balance_nusd, a.floor_nusd, a.notice_mark_nusd))""",
        is_money=True,
    ),
)
