"""batches: many calls decided together, each as if it had come alone

The functions say for many calls what app/metering/statements.py says for one: the same verdicts, columns and rows.
The locks are statements of their own, so that what follows reads a snapshot taken after them. No call stands twice
in a batch; should one, or should a row be refused, the whole batch fails and its calls are run one by one.
"""

from collections.abc import Sequence

from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    for function in (_AUTHORIZE_BATCH, _SETTLE_BATCH, _CHARGE_BATCH):
        op.execute(function)
    for name in ("authorize_batch", "settle_batch", "charge_batch"):
        op.execute(f"REVOKE EXECUTE ON FUNCTION {name} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {name} TO satmeter_runtime")


# Without the generic plan every call would be planned anew, which costs more than running it. The tables may be of
# any size then, and only look-ups by index are right at all of them. An account that somebody else keeps locked makes
# the batch give up soon, so that the others' calls need not wait for it.
_SETTINGS = """
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_bitmapscan = off SET lock_timeout = '500ms'
"""

_LOCKS = """
    PERFORM 1 FROM account WHERE id = ANY (p_account_id) ORDER BY id FOR NO KEY UPDATE;
    PERFORM 1 FROM api_key k JOIN (SELECT DISTINCT u.account_id, u.key_id FROM unnest(p_account_id, p_key_id) u (account_id, key_id)) u
        ON k.account_id = u.account_id AND k.id = u.key_id
        ORDER BY k.account_id, k.id FOR NO KEY UPDATE OF k;
"""

# greatest() skips nulls: a key without a period keeps its window for ever.
_KEY_WINDOW = "greatest(k.window_start, date_trunc(k.reset_period, now(), 'UTC'))"
_KEY_USAGE = "CASE WHEN k.window_start < date_trunc(k.reset_period, now(), 'UTC') THEN 0 ELSE k.window_usage_nusd END"
_RESET_AT = "date_trunc(k.reset_period, now(), 'UTC') + ('1 ' || k.reset_period)::interval"

# What can be said before any money is counted; null where the money decides.
_REFUSAL = """
                WHEN k.id IS NULL OR k.deleted_at IS NOT NULL OR k.disabled_at IS NOT NULL OR k.expire_at <= now() THEN 'invalid_api_key'
                WHEN a.status <> 'active' THEN 'account_frozen'
                WHEN k.scopes IS NOT NULL AND NOT 'spend' = ANY (k.scopes) THEN 'missing_scope'
                WHEN k.allowed_models IS NOT NULL AND NOT coalesce(u.model = ANY (k.allowed_models), false) THEN 'model_not_allowed'"""

_MONEY_DECIDES = """
            verdict := CASE WHEN limit_nusd - usage_nusd < amount_nusd THEN 'key_limit_exceeded'
                            WHEN limit_nusd - usage_nusd - key_held_nusd < amount_nusd THEN 'key_funds_held'
                            WHEN posted_nusd - floor_nusd < greatest(amount_nusd, 1) THEN 'insufficient_balance'
                            WHEN posted_nusd - held_nusd - floor_nusd < amount_nusd THEN 'funds_held'
                            ELSE 'allow' END;"""

# A denied call consumes nothing, so the remainders are carried from call to call, not summed.
_AUTHORIZE_BATCH = f"""
CREATE FUNCTION authorize_batch(
    p_account_id uuid[], p_key_id uuid[], p_hold_id uuid[], p_service text[], p_request_id text[], p_request_hash bytea[],
    p_amount_nusd bigint[], p_model text[], p_endpoint text[], p_ttl_seconds bigint[], p_synchronous_commit text
) RETURNS TABLE (
    item bigint, verdict text, posted_nusd bigint, held_nusd bigint, floor_nusd bigint, limit_nusd bigint, usage_nusd bigint,
    key_held_nusd bigint, reset_at timestamptz, window_start timestamptz, expires_at timestamptz, request_hash bytea,
    earlier_nusd bigint
) {_SETTINGS} AS $$
#variable_conflict use_column
DECLARE
    account_id uuid;
    before_id uuid;
    amount_nusd bigint;
    ttl_seconds bigint;
    key_number bigint;
    account_nusd bigint;
    key_nusd bigint[] := array_fill(0::bigint, ARRAY[cardinality(p_hold_id)]);
    admitted boolean[] := array_fill(false, ARRAY[cardinality(p_hold_id)]);
BEGIN
    PERFORM set_config('synchronous_commit', p_synchronous_commit, true);
    {_LOCKS}
    FOR item, verdict, posted_nusd, held_nusd, floor_nusd, limit_nusd, usage_nusd, key_held_nusd, reset_at, window_start, expires_at,
        request_hash, earlier_nusd, account_id, amount_nusd, ttl_seconds, key_number IN
        SELECT u.item, CASE WHEN e.id IS NOT NULL THEN 'repeat' WHEN c.id IS NOT NULL THEN 'reuse' {_REFUSAL} END,
               a.posted_nusd, a.held_nusd, a.floor_nusd, k.limit_nusd, {_KEY_USAGE}, k.held_nusd, {_RESET_AT},
               coalesce(e.window_start, {_KEY_WINDOW}), e.expires_at, e.request_hash, e.amount_nusd,
               u.account_id, u.amount_nusd, u.ttl_seconds, dense_rank() OVER (ORDER BY u.account_id, u.key_id)
        FROM unnest(p_account_id, p_key_id, p_hold_id, p_amount_nusd, p_model, p_ttl_seconds)
             WITH ORDINALITY u (account_id, key_id, hold_id, amount_nusd, model, ttl_seconds, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
        LEFT JOIN hold e ON e.account_id = u.account_id AND e.id = u.hold_id
        LEFT JOIN usage c ON c.account_id = u.account_id AND c.hold_id = u.hold_id
        ORDER BY u.account_id, u.item
    LOOP
        IF account_id IS DISTINCT FROM before_id THEN
            before_id := account_id;
            account_nusd := 0;
        END IF;
        held_nusd := held_nusd + account_nusd;
        key_held_nusd := key_held_nusd + key_nusd[key_number];
        IF verdict IS NULL THEN {_MONEY_DECIDES}
            IF verdict = 'allow' THEN
                expires_at := now() + make_interval(secs => ttl_seconds);
                admitted[item] := true;
                account_nusd := account_nusd + amount_nusd;
                key_nusd[key_number] := key_nusd[key_number] + amount_nusd;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;

    WITH admitted_now AS MATERIALIZED (
        SELECT u.*, {_KEY_WINDOW} AS window_start, {_KEY_USAGE} AS usage_nusd
        FROM unnest(p_account_id, p_key_id, p_hold_id, p_service, p_request_id, p_request_hash, p_amount_nusd, p_model, p_endpoint,
                    p_ttl_seconds, admitted)
             u (account_id, key_id, hold_id, service, request_id, request_hash, amount_nusd, model, endpoint, ttl_seconds, is_admitted)
        JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
        WHERE u.is_admitted
    ),
    key_after AS (
        UPDATE api_key k SET held_nusd = k.held_nusd + n.held_nusd, window_start = n.window_start, window_usage_nusd = n.usage_nusd
        FROM (SELECT account_id, key_id, sum(amount_nusd)::bigint AS held_nusd, min(window_start) AS window_start, min(usage_nusd) AS usage_nusd
              FROM admitted_now GROUP BY 1, 2) n
        WHERE k.account_id = n.account_id AND k.id = n.key_id
    ),
    account_after AS (
        UPDATE account a SET held_nusd = a.held_nusd + n.held_nusd
        FROM (SELECT account_id, sum(amount_nusd)::bigint AS held_nusd FROM admitted_now GROUP BY 1) n WHERE a.id = n.account_id
    )
    INSERT INTO hold (account_id, id, service, request_id, request_hash, key_id, window_start, amount_nusd, model, endpoint, expires_at)
    SELECT n.account_id, n.hold_id, n.service, n.request_id, n.request_hash, n.key_id, n.window_start, n.amount_nusd, n.model, n.endpoint,
           now() + make_interval(secs => n.ttl_seconds)
    FROM admitted_now n;
END $$
"""

# Needs `due`: what is to be charged, in arrival order, with the key's window as it is now.
_RECORD_CHARGES = """
charged AS MATERIALIZED (
    SELECT d.*, (a.posted_nusd - sum(d.cost_nusd) OVER earlier)::bigint AS balance_after_nusd,
           (a.held_nusd - sum(d.freed_nusd) OVER earlier)::bigint AS held_after_nusd,
           a.entry_count + row_number() OVER earlier AS entry_id
    FROM due d JOIN account a ON a.id = d.account_id
    WINDOW earlier AS (PARTITION BY d.account_id ORDER BY d.item ROWS UNBOUNDED PRECEDING)
),
account_after AS (
    UPDATE account a SET posted_nusd = a.posted_nusd - n.cost_nusd, held_nusd = a.held_nusd - n.freed_nusd,
           entry_count = a.entry_count + n.count, updated_at = now()
    FROM (SELECT account_id, sum(cost_nusd)::bigint AS cost_nusd, sum(freed_nusd)::bigint AS freed_nusd, count(*) AS count
          FROM due GROUP BY 1) n
    WHERE a.id = n.account_id
),
key_after AS (
    UPDATE api_key k SET held_nusd = k.held_nusd - n.freed_nusd, lifetime_nusd = k.lifetime_nusd + n.cost_nusd,
           window_start = n.window_start, window_usage_nusd = n.usage_nusd + n.window_cost_nusd
    FROM (SELECT account_id, key_id, sum(freed_nusd)::bigint AS freed_nusd, sum(cost_nusd)::bigint AS cost_nusd,
                 min(key_window_start) AS window_start, min(key_usage_nusd) AS usage_nusd,
                 coalesce(sum(cost_nusd) FILTER (WHERE window_start = key_window_start), 0)::bigint AS window_cost_nusd
          FROM due GROUP BY 1, 2) n
    WHERE k.account_id = n.account_id AND k.id = n.key_id
),
posted AS (
    INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd)
    SELECT account_id, entry_id, 'usage', hold_id::text, 'revenue:usage', -cost_nusd, balance_after_nusd FROM charged
),
used AS (
    INSERT INTO usage (account_id, id, hold_id, service, request_id, key_id, window_start, model, served_model, provider, endpoint,
                       outcome, upstream_id, cost_nusd, balance_after_nusd, held_after_nusd, latency_ms, ttft_ms, units, flags)
    SELECT account_id, charge_id, hold_id, service, request_id, key_id, window_start, model, served_model, provider, endpoint,
           outcome, upstream_id, cost_nusd, balance_after_nusd, held_after_nusd, latency_ms, ttft_ms, units, flags FROM charged
)"""

_WORK_PARAMETERS = """
    p_account_id uuid[], p_key_id uuid[], p_hold_id uuid[], p_service text[], p_request_id text[], p_charge_id uuid[],
    p_cost_nusd bigint[], p_outcome text[], p_served_model text[], p_provider text[], p_upstream_id text[], p_latency_ms int[],
    p_ttft_ms int[], p_units jsonb[], p_flags text[]"""
_WORK = """p_account_id, p_key_id, p_hold_id, p_service, p_request_id, p_charge_id, p_cost_nusd, p_outcome, p_served_model, p_provider,
                    p_upstream_id, p_latency_ms, p_ttft_ms, p_units, p_flags"""
_WORK_COLUMNS = """account_id, key_id, hold_id, service, request_id, charge_id, cost_nusd, outcome, served_model, provider,
                    upstream_id, latency_ms, ttft_ms, units, asked_flags"""

# A settle is never refused, so what each one leaves is a running sum. Every writer of a hold has its account locked.
_SETTLE_BATCH = f"""
CREATE FUNCTION settle_batch({_WORK_PARAMETERS}, p_window_start timestamptz[]
) RETURNS TABLE (item bigint, id uuid, cost_nusd bigint, balance_after_nusd bigint, held_after_nusd bigint, flags text)
{_SETTINGS} AS $$
#variable_conflict use_column
BEGIN
    {_LOCKS}
    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT u.*, {_KEY_WINDOW} AS key_window_start, {_KEY_USAGE} AS key_usage_nusd, h.id IS NULL AS is_missing, h.state,
               h.amount_nusd, h.window_start AS hold_window_start, h.model, h.endpoint, e.id AS earlier_id,
               e.cost_nusd AS earlier_cost_nusd, e.balance_after_nusd AS earlier_balance_nusd,
               e.held_after_nusd AS earlier_held_nusd, e.flags AS earlier_flags
        FROM unnest({_WORK}, p_window_start) WITH ORDINALITY u ({_WORK_COLUMNS}, ticket_window_start, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
        LEFT JOIN hold h ON h.account_id = u.account_id AND h.id = u.hold_id
        LEFT JOIN usage e ON e.account_id = u.account_id AND e.hold_id = u.hold_id
    ),
    due AS MATERIALIZED (
        SELECT u.*, CASE WHEN u.state = 'open' THEN u.amount_nusd ELSE 0 END AS freed_nusd,
               coalesce(u.hold_window_start, u.ticket_window_start) AS window_start,
               concat_ws(',', concat_ws(',', CASE WHEN u.is_missing THEN 'hold_missing' WHEN u.state <> 'open' THEN 'late' END,
                                        CASE WHEN u.cost_nusd > u.amount_nusd THEN 'above_hold' END), u.asked_flags) AS flags
        FROM asked u WHERE u.earlier_id IS NULL AND u.state IS DISTINCT FROM 'settled'
    ),
    hold_after AS (
        UPDATE hold h SET state = 'settled', closed_at = now()
        FROM due d WHERE h.account_id = d.account_id AND h.id = d.hold_id
    ), {_RECORD_CHARGES}
    SELECT item, charge_id, cost_nusd, balance_after_nusd, held_after_nusd, flags FROM charged
    UNION ALL
    SELECT item, earlier_id, earlier_cost_nusd, earlier_balance_nusd, earlier_held_nusd, earlier_flags FROM asked
    WHERE earlier_id IS NOT NULL;
END $$
"""

_CHARGE_BATCH = f"""
CREATE FUNCTION charge_batch({_WORK_PARAMETERS}, p_amount_nusd bigint[], p_model text[], p_endpoint text[]
) RETURNS TABLE (
    item bigint, verdict text, posted_nusd bigint, held_nusd bigint, floor_nusd bigint, limit_nusd bigint, usage_nusd bigint,
    key_held_nusd bigint, reset_at timestamptz, id uuid, cost_nusd bigint, balance_after_nusd bigint, held_after_nusd bigint,
    flags text, earlier_key_id uuid, earlier_model text, earlier_endpoint text
) {_SETTINGS} AS $$
#variable_conflict use_column
DECLARE
    account_id uuid;
    before_id uuid;
    amount_nusd bigint;
    due_nusd bigint;
    key_number bigint;
    account_nusd bigint;
    key_nusd bigint[] := array_fill(0::bigint, ARRAY[cardinality(p_hold_id)]);
    admitted boolean[] := array_fill(false, ARRAY[cardinality(p_hold_id)]);
BEGIN
    {_LOCKS}
    FOR item, verdict, posted_nusd, held_nusd, floor_nusd, limit_nusd, usage_nusd, key_held_nusd, reset_at, id, cost_nusd,
        balance_after_nusd, held_after_nusd, flags, earlier_key_id, earlier_model, earlier_endpoint, account_id, amount_nusd, due_nusd,
        key_number IN
        SELECT u.item, CASE WHEN h.id IS NOT NULL THEN 'reuse' WHEN e.id IS NOT NULL THEN 'repeat' {_REFUSAL} END,
               a.posted_nusd, a.held_nusd, a.floor_nusd, k.limit_nusd, {_KEY_USAGE}, k.held_nusd, {_RESET_AT},
               e.id, e.cost_nusd, e.balance_after_nusd, e.held_after_nusd, e.flags, e.key_id, e.model, e.endpoint,
               u.account_id, u.amount_nusd, u.cost_nusd, dense_rank() OVER (ORDER BY u.account_id, u.key_id)
        FROM unnest(p_account_id, p_key_id, p_hold_id, p_cost_nusd, p_amount_nusd, p_model)
             WITH ORDINALITY u (account_id, key_id, hold_id, cost_nusd, amount_nusd, model, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
        LEFT JOIN hold h ON h.account_id = u.account_id AND h.id = u.hold_id
        LEFT JOIN usage e ON e.account_id = u.account_id AND e.hold_id = u.hold_id
        ORDER BY u.account_id, u.item
    LOOP
        IF account_id IS DISTINCT FROM before_id THEN
            before_id := account_id;
            account_nusd := 0;
        END IF;
        posted_nusd := posted_nusd - account_nusd;
        usage_nusd := usage_nusd + key_nusd[key_number];
        IF verdict IS NULL THEN {_MONEY_DECIDES}
            IF verdict = 'allow' THEN
                id := p_charge_id[item];
                cost_nusd := due_nusd;
                balance_after_nusd := posted_nusd - due_nusd;
                held_after_nusd := held_nusd;
                flags := coalesce(p_flags[item], '');
                admitted[item] := true;
                account_nusd := account_nusd + due_nusd;
                key_nusd[key_number] := key_nusd[key_number] + due_nusd;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;

    WITH due AS MATERIALIZED (
        SELECT u.*, 0::bigint AS freed_nusd, {_KEY_WINDOW} AS window_start, {_KEY_WINDOW} AS key_window_start,
               {_KEY_USAGE} AS key_usage_nusd, concat_ws(',', u.asked_flags) AS flags
        FROM unnest({_WORK}, p_model, p_endpoint, admitted) WITH ORDINALITY u ({_WORK_COLUMNS}, model, endpoint, is_admitted, item)
        JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
        WHERE u.is_admitted
    ), {_RECORD_CHARGES}
    SELECT count(*) FROM charged INTO key_number;
END $$
"""
