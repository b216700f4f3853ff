"""The hot path's SQL: each verb is one statement, and so one round trip and one transaction.

How they hold under races. Every statement first locks the account's row, then the key's and the hold's;
a locking SELECT that had to wait returns the row as it is *after* the wait, so the verdict is computed
on the latest figures, and all money of one account moves in one order. Tables that are only read
(an earlier hold, an earlier charge) are seen as of the statement's start; where such a read came too
early, a UNIQUE key refuses the insert, the whole statement is undone, and the caller runs it again.

The `…_BATCH` statements ask PostgreSQL's functions for many calls at once: alembic/versions/0004_priced_calls.py has
them (0007 says what they lock), and they must say what the statements here say. They follow each other in one transaction.
"""

from typing import Final, LiteralString

_ACCOUNT: Final[LiteralString] = """
account_now AS MATERIALIZED (
    SELECT id, posted_nusd, held_nusd, floor_nusd, status FROM account WHERE id = %(account_id)s FOR NO KEY UPDATE
)"""

# greatest() skips nulls: a key without a period keeps its window for ever.
_KEY: Final[LiteralString] = """
key_now AS MATERIALIZED (
    SELECT k.account_id, k.id, k.limit_nusd, k.held_nusd, k.scopes, k.allowed_models,
           k.deleted_at IS NULL AND k.disabled_at IS NULL AND (k.expire_at IS NULL OR k.expire_at > now()) AS live,
           greatest(k.window_start, date_trunc(k.reset_period, now(), 'UTC')) AS window_start,
           CASE WHEN k.window_start < date_trunc(k.reset_period, now(), 'UTC') THEN 0 ELSE k.window_usage_nusd END AS usage_nusd,
           date_trunc(k.reset_period, now(), 'UTC') + ('1 ' || k.reset_period)::interval AS reset_at
    FROM api_key k JOIN account_now a ON k.account_id = a.id
    WHERE k.id = %(key_id)s FOR NO KEY UPDATE OF k
)"""

_HOLD: Final[LiteralString] = """
hold_now AS MATERIALIZED (
    SELECT h.account_id, h.id, h.state, h.amount_nusd, h.window_start, h.key_id
    FROM hold h JOIN account_now a ON h.account_id = a.id
    WHERE h.id = %(hold_id)s FOR NO KEY UPDATE OF h
)"""

# The order is the order of the reasons a caller is given. Also a call for nothing needs a nano-dollar that is left: an
# estimate may be wrong, and a key or an account that is exhausted is not to be used.
_ADMISSION: Final[LiteralString] = """
CASE WHEN k.id IS NULL OR NOT k.live THEN 'invalid_api_key'
     WHEN a.status <> 'active' THEN 'account_frozen'
     WHEN k.scopes IS NOT NULL AND NOT 'spend' = ANY (k.scopes) THEN 'missing_scope'
     WHEN k.allowed_models IS NOT NULL AND NOT coalesce(%(model)s = ANY (k.allowed_models), false) THEN 'model_not_allowed'
     WHEN k.limit_nusd - k.usage_nusd < greatest(%(min_nusd)s, 1) THEN 'key_limit_exceeded'
     WHEN k.limit_nusd - k.usage_nusd - k.held_nusd < %(min_nusd)s THEN 'key_funds_held'
     WHEN a.posted_nusd - a.floor_nusd < greatest(%(min_nusd)s, 1) THEN 'insufficient_balance'
     WHEN a.posted_nusd - a.held_nusd - a.floor_nusd < %(min_nusd)s THEN 'funds_held'
     ELSE 'allow' END"""

_CHARGED_BEFORE: Final[LiteralString] = """
earlier AS MATERIALIZED (
    SELECT 1 FROM entry WHERE account_id = %(account_id)s AND kind = 'usage' AND reference = %(hold_id)s::text
)"""

AUTHORIZE: Final[LiteralString] = f"""
WITH {_ACCOUNT}, {_KEY}, {_CHARGED_BEFORE},
held_before AS MATERIALIZED (
    SELECT request_hash, amount_nusd, window_start, expires_at, created_at, price_version FROM hold
    WHERE account_id = %(account_id)s AND id = %(hold_id)s
),
verdict AS MATERIALIZED (
    SELECT CASE WHEN EXISTS (SELECT FROM held_before) THEN 'repeat'
                WHEN EXISTS (SELECT FROM earlier) THEN 'reuse'
                ELSE {_ADMISSION} END AS verdict,
           least(%(amount_nusd)s, a.posted_nusd - a.held_nusd - a.floor_nusd, k.limit_nusd - k.usage_nusd - k.held_nusd) AS granted_nusd
    FROM account_now a LEFT JOIN key_now k ON true
),
key_after AS (
    UPDATE api_key SET held_nusd = api_key.held_nusd + v.granted_nusd, window_start = k.window_start,
           window_usage_nusd = k.usage_nusd
    FROM key_now k, verdict v
    WHERE api_key.account_id = k.account_id AND api_key.id = k.id AND v.verdict = 'allow'
),
account_after AS (
    UPDATE account SET held_nusd = account.held_nusd + v.granted_nusd
    FROM verdict v WHERE account.id = %(account_id)s AND v.verdict = 'allow'
),
held AS (
    INSERT INTO hold (account_id, id, service, request_id, request_hash, key_id, window_start, amount_nusd, model, endpoint,
                      price_version, expires_at)
    SELECT k.account_id, %(hold_id)s, %(service)s, %(request_id)s, %(request_hash)s, k.id, k.window_start, v.granted_nusd,
           %(model)s, %(endpoint)s, %(price_version)s, now() + make_interval(secs => %(ttl_seconds)s)
    FROM key_now k, verdict v WHERE v.verdict = 'allow'
    RETURNING expires_at
)
SELECT v.verdict, a.posted_nusd, a.held_nusd, a.floor_nusd, k.limit_nusd, k.usage_nusd, k.held_nusd AS key_held_nusd, k.reset_at,
       coalesce(e.window_start, k.window_start) AS window_start, coalesce(e.expires_at, h.expires_at) AS expires_at,
       coalesce(e.created_at, now()) AS created_at, e.request_hash, coalesce(e.amount_nusd, v.granted_nusd) AS amount_nusd,
       CASE WHEN v.verdict = 'repeat' THEN e.price_version ELSE %(price_version)s END AS price_version,
       set_config('synchronous_commit', %(synchronous_commit)s, true) AS durability
FROM verdict v CROSS JOIN account_now a LEFT JOIN key_now k ON true LEFT JOIN held_before e ON true LEFT JOIN held h ON true
"""
"""A hold takes what there is, `amount_nusd` at most, where that is `min_nusd` at least."""

_RECORD_CHARGE: Final[LiteralString] = """
account_after AS (
    UPDATE account SET posted_nusd = account.posted_nusd - %(cost_nusd)s, held_nusd = account.held_nusd - due.freed_nusd,
           entry_count = account.entry_count + 1, updated_at = now()
    FROM due WHERE account.id = due.account_id
    RETURNING account.id, account.posted_nusd, account.held_nusd, account.entry_count,
              coalesce(account.posted_nusd < account.low_nusd, false) AS is_low
),
key_after AS (
    UPDATE api_key SET held_nusd = api_key.held_nusd - due.freed_nusd, lifetime_nusd = api_key.lifetime_nusd + %(cost_nusd)s,
           window_start = k.window_start,
           window_usage_nusd = k.usage_nusd + CASE WHEN due.window_start = k.window_start THEN %(cost_nusd)s ELSE 0 END
    FROM key_now k, due
    WHERE api_key.account_id = k.account_id AND api_key.id = k.id
),
posted AS (
    INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd, usage_id)
    SELECT a.id, a.entry_count, 'usage', %(hold_id)s::text, 'revenue:usage', -%(cost_nusd)s::bigint, a.posted_nusd, %(charge_id)s
    FROM account_after a
),
used AS (
    INSERT INTO usage (account_id, id, hold_id, service, request_id, key_id, window_start, model, served_model, provider,
                       endpoint, outcome, upstream_id, cost_nusd, balance_after_nusd, held_after_nusd, latency_ms, ttft_ms,
                       units, price_version, lines, flags)
    SELECT a.id, %(charge_id)s, %(hold_id)s, %(service)s, %(request_id)s, %(key_id)s, due.window_start,
           %(model)s, %(served_model)s, %(provider)s, %(endpoint)s, %(outcome)s, %(upstream_id)s, %(cost_nusd)s,
           a.posted_nusd, a.held_nusd, %(latency_ms)s, %(ttft_ms)s, %(units)s, %(price_version)s, %(lines)s,
           concat_ws(',', due.flags, %(flags)s::text)
    FROM account_after a, due
    RETURNING id, cost_nusd, balance_after_nusd, held_after_nusd, flags
)"""

SETTLE: Final[LiteralString] = f"""
WITH {_ACCOUNT}, {_KEY}, {_HOLD}, {_CHARGED_BEFORE},
due AS MATERIALIZED (
    SELECT a.id AS account_id, CASE WHEN h.state = 'open' THEN h.amount_nusd ELSE 0 END AS freed_nusd,
           coalesce(h.window_start, %(window_start)s, k.window_start) AS window_start,
           nullif(concat_ws(',', CASE WHEN h.id IS NULL AND %(window_start)s::timestamptz IS NULL THEN 'no_hold'
                                      WHEN h.id IS NULL THEN 'hold_missing' WHEN h.state <> 'open' THEN 'late' END,
                            CASE WHEN %(cost_nusd)s > h.amount_nusd THEN 'above_hold' END), '') AS flags
    FROM account_now a LEFT JOIN hold_now h ON true LEFT JOIN key_now k ON true
    WHERE NOT EXISTS (SELECT FROM earlier) AND h.state IS DISTINCT FROM 'settled'
),
hold_after AS (
    UPDATE hold SET state = 'settled', closed_at = now()
    FROM due WHERE hold.account_id = due.account_id AND hold.id = %(hold_id)s
), {_RECORD_CHARGE}
SELECT false AS is_repeat, u.id, u.cost_nusd, u.balance_after_nusd, u.held_after_nusd, u.flags, a.is_low FROM used u, account_after a
UNION ALL SELECT true, NULL, NULL, NULL, NULL, NULL, false FROM earlier
"""
"""A call that no hold was promised for comes without a window.

No row: the account is gone, or the charge was recorded while this statement waited; run it again.
"""

CHARGE: Final[LiteralString] = f"""
WITH {_ACCOUNT}, {_KEY}, {_CHARGED_BEFORE},
held AS MATERIALIZED (
    SELECT 1 FROM hold WHERE account_id = %(account_id)s AND id = %(hold_id)s
),
verdict AS MATERIALIZED (
    SELECT CASE WHEN EXISTS (SELECT FROM held) THEN 'reuse'
                WHEN EXISTS (SELECT FROM earlier) THEN 'repeat'
                ELSE {_ADMISSION} END AS verdict
    FROM account_now a LEFT JOIN key_now k ON true
),
due AS MATERIALIZED (
    SELECT k.account_id, 0::bigint AS freed_nusd, k.window_start, NULL::text AS flags
    FROM key_now k, verdict v WHERE v.verdict = 'allow'
), {_RECORD_CHARGE}
SELECT v.verdict, a.posted_nusd, a.held_nusd, a.floor_nusd, k.limit_nusd, k.usage_nusd, k.held_nusd AS key_held_nusd, k.reset_at,
       u.id, u.cost_nusd, u.balance_after_nusd, u.held_after_nusd, u.flags, n.is_low
FROM verdict v CROSS JOIN account_now a LEFT JOIN key_now k ON true LEFT JOIN used u ON true LEFT JOIN account_after n ON true
"""

EARLIER_CHARGE: Final[LiteralString] = """
SELECT e.usage_id AS id, -e.amount_nusd AS cost_nusd, e.balance_after_nusd, coalesce(u.held_after_nusd, 0) AS held_after_nusd,
       coalesce(u.flags, '') AS flags, u.lines, u.key_id, u.model, u.endpoint, u.units
FROM entry e LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id
WHERE e.account_id = %(account_id)s AND e.kind = 'usage' AND e.reference = %(hold_id)s::text
"""
"""What a repeat is answered: the entry is there for ever, its call until that month's calls are dropped."""

HELD: Final[LiteralString] = """
SELECT amount_nusd FROM hold WHERE account_id = %(account_id)s AND id = %(hold_id)s
"""

RELEASE: Final[LiteralString] = f"""
WITH {_ACCOUNT}, {_HOLD},
freed AS MATERIALIZED (SELECT account_id, id, key_id, amount_nusd FROM hold_now WHERE state = 'open'),
hold_after AS (
    UPDATE hold SET state = 'released', closed_at = now()
    FROM freed f WHERE hold.account_id = f.account_id AND hold.id = f.id
),
key_after AS (
    UPDATE api_key SET held_nusd = api_key.held_nusd - f.amount_nusd
    FROM freed f WHERE api_key.account_id = f.account_id AND api_key.id = f.key_id
),
account_after AS (
    UPDATE account SET held_nusd = account.held_nusd - f.amount_nusd
    FROM freed f WHERE account.id = f.account_id
    RETURNING account.held_nusd
)
SELECT h.state AS state_before, a.posted_nusd, coalesce(n.held_nusd, a.held_nusd) AS held_nusd
FROM hold_now h CROSS JOIN account_now a LEFT JOIN account_after n ON true
"""

EXTEND: Final[LiteralString] = f"""
WITH {_ACCOUNT}, {_HOLD},
open AS MATERIALIZED (
    SELECT account_id, id, key_id, greatest(0, %(captured_nusd)s - amount_nusd) AS more_nusd FROM hold_now WHERE state = 'open'
),
hold_after AS (
    UPDATE hold SET amount_nusd = hold.amount_nusd + o.more_nusd,
           expires_at = greatest(hold.expires_at, now() + make_interval(secs => %(ttl_seconds)s))
    FROM open o WHERE hold.account_id = o.account_id AND hold.id = o.id
    RETURNING hold.amount_nusd, hold.expires_at
),
key_after AS (
    UPDATE api_key SET held_nusd = api_key.held_nusd + o.more_nusd
    FROM open o WHERE api_key.account_id = o.account_id AND api_key.id = o.key_id
),
account_after AS (
    UPDATE account SET held_nusd = account.held_nusd + o.more_nusd
    FROM open o WHERE account.id = o.account_id
    RETURNING account.held_nusd
)
SELECT h.state, n.amount_nusd, n.expires_at, a.posted_nusd, a.floor_nusd, coalesce(f.held_nusd, a.held_nusd) AS held_nusd
FROM hold_now h CROSS JOIN account_now a LEFT JOIN hold_after n ON true LEFT JOIN account_after f ON true
"""
"""A hold that has captured more than was set aside grows to it: that money is spent, whether or not there is more."""

EXPIRE: Final[LiteralString] = f"""
WITH {_ACCOUNT},
freed AS MATERIALIZED (
    SELECT h.account_id, h.id, h.key_id, h.amount_nusd FROM hold h JOIN account_now a ON h.account_id = a.id
    WHERE h.state = 'open' AND h.expires_at < now() FOR NO KEY UPDATE OF h
),
hold_after AS (
    UPDATE hold SET state = 'expired', closed_at = now()
    FROM freed f WHERE hold.account_id = f.account_id AND hold.id = f.id
),
key_after AS (
    UPDATE api_key SET held_nusd = api_key.held_nusd - f.freed_nusd
    FROM (SELECT account_id, key_id, sum(amount_nusd)::bigint AS freed_nusd FROM freed GROUP BY 1, 2) f
    WHERE api_key.account_id = f.account_id AND api_key.id = f.key_id
),
account_after AS (
    UPDATE account SET held_nusd = account.held_nusd - f.freed_nusd
    FROM (SELECT account_id, sum(amount_nusd)::bigint AS freed_nusd FROM freed GROUP BY 1) f WHERE account.id = f.account_id
)
SELECT count(*) AS count FROM freed
"""

ACCOUNTS_WITH_EXPIRED_HOLDS: Final[LiteralString] = """
SELECT coalesce(array_agg(DISTINCT account_id), '{}') AS account_ids
FROM (SELECT account_id FROM hold WHERE state = 'open' AND expires_at < now() ORDER BY expires_at LIMIT 1000) due
"""

# The batch functions of the migrations, and what their rows are. Every parameter is an array.

AUTHORIZE_BATCH: Final[LiteralString] = """authorize_batch(
    %(lock)s::uuid[], %(account_id)s::uuid[], %(key_id)s::uuid[], %(hold_id)s::uuid[], %(service)s::text[], %(request_id)s::text[],
    %(request_hash)s::bytea[], %(amount_nusd)s::bigint[], %(min_nusd)s::bigint[], %(model)s::text[], %(endpoint)s::text[],
    %(price_version)s::int[], %(ttl_seconds)s::bigint[],
    (%(synchronous_commit)s::text[])[1])"""

AUTHORIZED: Final[LiteralString] = """
    item bigint, verdict text, posted_nusd bigint, held_nusd bigint, floor_nusd bigint, limit_nusd bigint, usage_nusd bigint,
    key_held_nusd bigint, reset_at timestamptz, window_start timestamptz, expires_at timestamptz, created_at timestamptz,
    request_hash bytea, amount_nusd bigint, price_version int"""

_WORK: Final[LiteralString] = """
    %(lock)s::uuid[], %(account_id)s::uuid[], %(key_id)s::uuid[], %(hold_id)s::uuid[], %(service)s::text[], %(request_id)s::text[],
    %(charge_id)s::uuid[], %(cost_nusd)s::bigint[], %(outcome)s::text[], %(served_model)s::text[], %(provider)s::text[],
    %(upstream_id)s::text[], %(latency_ms)s::int[], %(ttft_ms)s::int[], %(units)s::jsonb[],
    %(price_version)s::int[], %(lines)s::jsonb[], %(model)s::text[], %(endpoint)s::text[], %(flags)s::text[]"""

SETTLE_BATCH: Final[LiteralString] = f"settle_batch({_WORK}, %(window_start)s::timestamptz[])"

SETTLED: Final[LiteralString] = """
    item bigint, is_repeat boolean, id uuid, cost_nusd bigint, balance_after_nusd bigint, held_after_nusd bigint, flags text,
    is_low boolean"""

CHARGE_BATCH: Final[LiteralString] = f"charge_batch({_WORK}, %(amount_nusd)s::bigint[])"

CHARGED: Final[LiteralString] = """
    item bigint, verdict text, posted_nusd bigint, held_nusd bigint, floor_nusd bigint, limit_nusd bigint, usage_nusd bigint,
    key_held_nusd bigint, reset_at timestamptz, id uuid, cost_nusd bigint, balance_after_nusd bigint, held_after_nusd bigint,
    flags text, is_low boolean"""
