"""What the sums by day promise, and what is kept of months whose calls were dropped."""

from typing import Final

from app.activity.archive import FINGERPRINT
from app.activity.calendar import IS_DROPPED, end_of, first_id_of
from app.activity.summed import FIGURES, KEY, SUMMED, SUMS, told_by
from app.audit.check import Check

_COLUMNS: Final = ", ".join(FIGURES)

DAYS: Final = (
    Check(
        "days_are_the_sum_of_their_calls",
        "The days of an account say what its entries tell of calls, up to its mark and to the last figure.",
        f"""WITH fresh AS (SELECT {", ".join(KEY)}, {SUMS} FROM ({told_by(SUMMED)}) calls GROUP BY {", ".join(KEY)}),
                 kept AS (SELECT {", ".join(KEY)}, {_COLUMNS} FROM usage_day)
            SELECT concat_ws('/', account_id, day, key_id, model, served_model, provider) AS subject,
                   coalesce(k.requests, 0) || ' calls: ' || concat_ws(' ', {", ".join(f"k.{name}" for name in FIGURES)}) AS recorded,
                   coalesce(f.requests, 0) || ' calls: ' || concat_ws(' ', {", ".join(f"f.{name}" for name in FIGURES)}) AS recomputed
            FROM kept k FULL JOIN fresh f USING ({", ".join(KEY)})
            WHERE NOT {IS_DROPPED.format(day="day")}
              AND ({", ".join(f"k.{name}" for name in FIGURES)}) IS DISTINCT FROM ({", ".join(f"f.{name}" for name in FIGURES)})
            UNION ALL
            SELECT s.account_id || '', s.entries || ' entries summed', coalesce(a.entry_count, 0) || ' entries'
            FROM usage_summed s LEFT JOIN account a ON a.id = s.account_id WHERE s.entries NOT BETWEEN 0 AND coalesce(a.entry_count, 0)""",
    ),
    Check(
        "dropped_calls_are_in_their_entries",
        "What is kept of an account's calls of a dropped month is what their entries took; one that came later is still there.",
        f"""WITH dropped AS (SELECT month, {first_id_of("month")} AS first_id, {first_id_of(end_of("x"))} AS end_id
                             FROM usage_archive x WHERE dropped_at IS NOT NULL),
                 taken AS (SELECT account_id, month, sum(calls) AS calls, sum(nusd) AS nusd
                           FROM (SELECT e.account_id, d.month, count(*) AS calls, -sum(e.amount_nusd) AS nusd
                                 FROM dropped d JOIN entry e ON e.kind = 'usage' AND e.usage_id >= d.first_id AND e.usage_id < d.end_id
                                 GROUP BY 1, 2
                                 UNION ALL SELECT account_id, month, last_id - first_id + 1, -amount_nusd FROM entry_closing) t
                           GROUP BY 1, 2),
                 kept AS (SELECT account_id, month, sum(calls) AS calls, sum(cost_nusd) AS nusd
                          FROM (SELECT account_id, month, calls, cost_nusd FROM usage_dropped
                                UNION ALL SELECT u.account_id, d.month, 1, u.cost_nusd
                                FROM dropped d JOIN usage u ON u.id >= d.first_id AND u.id < d.end_id) k GROUP BY 1, 2)
            SELECT account_id || '/' || month AS subject, concat(coalesce(k.calls, 0), ' calls, ', coalesce(k.nusd, 0), ' nano-USD') AS recorded,
                   concat(coalesce(t.calls, 0), ' calls, ', coalesce(t.nusd, 0), ' nano-USD') AS recomputed
            FROM kept k FULL JOIN taken t USING (account_id, month)
            WHERE (k.calls, k.nusd) IS DISTINCT FROM (t.calls, t.nusd)""",
    ),
    Check(
        "put_away_entries_are_those_of_their_archive",
        "As many entries are closed for a month or day of calls as were put away, and none for one whose entries were not.",
        """SELECT coalesce(x.month, c.month)::text AS subject, coalesce(c.entries, 0) AS recorded, coalesce(x.entries, 0) AS recomputed
           FROM (SELECT month, entries FROM usage_archive WHERE entries_dropped_at IS NOT NULL) x
           FULL JOIN (SELECT month, sum(last_id - first_id + 1) AS entries FROM entry_closing GROUP BY 1) c ON c.month = x.month
           WHERE coalesce(c.entries, 0) <> coalesce(x.entries, 0)""",
    ),
    Check(
        "days_of_dropped_months_stay",
        "The days of a dropped month are as they were when its calls were dropped.",
        f"""SELECT x.month::text AS subject, coalesce(f.now, '0') AS recorded, x.fingerprint AS recomputed
            FROM usage_archive x LEFT JOIN (
                SELECT x.month, {FINGERPRINT} AS now FROM usage_archive x JOIN usage_day d ON d.day >= x.month AND d.day < {end_of("x")}
                GROUP BY x.month) f ON f.month = x.month
            WHERE x.dropped_at IS NOT NULL AND coalesce(f.now, '0') <> x.fingerprint""",
    ),
)
