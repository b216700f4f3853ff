"""What the sums by day promise, and what is kept of months whose calls were dropped."""

from typing import Final

from app.activity.archive import FINGERPRINT
from app.activity.calendar import CALL, EDGE, IS_DROPPED, MOST, SUMS, day_of, end_of, first_id_of
from app.audit.check import Check

_LATE: Final = "interval '2 hours'"
"""So long after a day was summed, what came late may not be in its sum yet."""

DAYS: Final = (
    Check(
        "days_are_the_sum_of_their_calls",
        "A day that is over says what its calls add up to, but for what came in the last two hours; no other day says anything.",
        f"""WITH calls AS (SELECT {day_of("u.id")} AS day, {CALL}),
                 fresh AS (SELECT account_id, day, key_id, model, {SUMS},
                                  count(*) FILTER (WHERE created_at < now() - {_LATE}) AS old_requests,
                                  least(coalesce(sum(input_tokens) FILTER (WHERE created_at < now() - {_LATE}), 0), {MOST}) AS old_input,
                                  least(coalesce(sum(output_tokens) FILTER (WHERE created_at < now() - {_LATE}), 0), {MOST}) AS old_output,
                                  coalesce(sum(cost_nusd) FILTER (WHERE created_at < now() - {_LATE}), 0) AS old_nusd,
                                  coalesce(sum(refunded_nusd) FILTER (WHERE refunded_at < now() - {_LATE}), 0) AS old_refunded
                           FROM calls WHERE day < (SELECT day FROM {EDGE} edge) GROUP BY 1, 2, 3, 4),
                 kept AS (SELECT * FROM usage_day d WHERE NOT {IS_DROPPED.format(day="d.day")})
            SELECT concat_ws('/', account_id, day, key_id, model) AS subject,
                   coalesce(k.requests, 0) || ' calls: ' || concat_ws(' ', k.input_tokens, k.output_tokens, k.cost_nusd, k.refunded_nusd) AS recorded,
                   coalesce(f.requests, 0) || ' calls: ' || concat_ws(' ', f.input_tokens, f.output_tokens, f.cost_nusd, f.refunded_nusd) AS recomputed
            FROM kept k FULL JOIN fresh f USING (account_id, day, key_id, model)
            WHERE NOT {IS_DROPPED.format(day="day")}
              AND (NOT coalesce(k.requests, 0) BETWEEN coalesce(f.old_requests, 0) AND coalesce(f.requests, 0)
               OR NOT coalesce(k.input_tokens, 0) BETWEEN coalesce(f.old_input, 0) AND coalesce(f.input_tokens, 0)
               OR NOT coalesce(k.output_tokens, 0) BETWEEN coalesce(f.old_output, 0) AND coalesce(f.output_tokens, 0)
               OR NOT coalesce(k.cost_nusd, 0) BETWEEN coalesce(f.old_nusd, 0) AND coalesce(f.cost_nusd, 0)
               OR NOT coalesce(k.refunded_nusd, 0) BETWEEN coalesce(f.old_refunded, 0) AND coalesce(f.refunded_nusd, 0))""",
    ),
    Check(
        "dropped_calls_are_in_their_entries",
        "What is kept of an account's calls of a dropped month is what their entries took; one that came later is still there.",
        f"""WITH dropped AS (SELECT month, {first_id_of("month")} AS first_id, {first_id_of(end_of("x"))} AS end_id
                             FROM usage_archive x WHERE dropped_at IS NOT NULL),
                 taken AS (SELECT e.account_id, d.month, count(*) AS calls, -sum(e.amount_nusd) AS nusd
                           FROM dropped d JOIN entry e ON e.kind = 'usage' AND e.usage_id >= d.first_id AND e.usage_id < d.end_id
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
        "days_of_dropped_months_stay",
        "The days of a dropped month are as they were when its calls were dropped.",
        f"""SELECT x.month::text AS subject, f.now AS recorded, x.fingerprint AS recomputed
            FROM usage_archive x CROSS JOIN LATERAL ({FINGERPRINT.format(month="x.month", end=end_of("x"))}) f (now)
            WHERE x.dropped_at IS NOT NULL AND f.now <> x.fingerprint""",
    ),
)
