"""priced calls: what a hold was priced by, why a call cost what it did, and calls kept in a partition for each month

The batch functions are made anew: a hold may take what there is instead of what was asked (clamp), a charge finds an
earlier one by its entry, which is never dropped, and tells whether the balance is low now.

`usage` is partitioned by its id, a UUIDv7, which begins with the time in milliseconds. What keeps a call from being
charged twice is the entry's UNIQUE key; a partitioned table could not have one over (account_id, hold_id).
"""

from collections.abc import Sequence

from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_FUNCTIONS = ("authorize_batch", "settle_batch", "charge_batch")


def upgrade() -> None:
    op.execute("ALTER TABLE account ADD COLUMN low_nusd bigint")
    op.execute("ALTER TABLE hold ADD COLUMN price_version int")
    op.execute("DROP INDEX hold_open_of_account")  # written by every call and read by none
    for table in ("hold", "entry"):  # as for usage below: see account_key_of_calls
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {table}_account_id_fkey")
    # Most accounts have few entries, some have millions. The plan that suits both looks for an entry by its reference;
    # with the true number of accounts the planner would read through all entries of an account instead.
    op.execute("ALTER TABLE entry ALTER COLUMN account_id SET (n_distinct = 100)")
    _link_entries_to_their_calls()
    _partition_usage()
    for name in _FUNCTIONS:
        op.execute(f"DROP FUNCTION {name}")
    for function in (_AUTHORIZE_BATCH, _SETTLE_BATCH, _CHARGE_BATCH, _MAKE_USAGE_PARTITIONS):
        op.execute(function)
    for name in (*_FUNCTIONS, "make_usage_partitions"):
        op.execute(f"REVOKE EXECUTE ON FUNCTION {name} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {name} TO satmeter_runtime")
    op.execute("SELECT make_usage_partitions(3)")


def _link_entries_to_their_calls() -> None:
    op.execute("ALTER TABLE entry ADD COLUMN usage_id uuid")
    op.execute(
        """UPDATE entry e SET usage_id = u.id FROM usage u
           WHERE u.account_id = e.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text"""
    )
    op.execute("ALTER TABLE entry ADD CONSTRAINT entry_of_usage_has_its_call CHECK ((kind = 'usage') = (usage_id IS NOT NULL))")


def _partition_usage() -> None:
    op.execute("ALTER TABLE usage RENAME TO usage_before")
    op.execute("ALTER INDEX usage_pkey RENAME TO usage_before_pkey")
    op.execute(
        """CREATE TABLE usage (
               account_id uuid NOT NULL, id uuid NOT NULL, hold_id uuid NOT NULL, service text NOT NULL,
               request_id text NOT NULL, key_id uuid NOT NULL, window_start timestamptz NOT NULL DEFAULT now(), model text,
               served_model text, provider text, endpoint text, outcome text NOT NULL, upstream_id text, cost_nusd bigint NOT NULL,
               balance_after_nusd bigint NOT NULL, held_after_nusd bigint NOT NULL, latency_ms int, ttft_ms int, units jsonb,
               price_version int, lines jsonb, flags text NOT NULL DEFAULT '', created_at timestamptz NOT NULL DEFAULT now(),
               CONSTRAINT usage_cost_not_negative CHECK (cost_nusd >= 0),
               PRIMARY KEY (account_id, id)
           ) PARTITION BY RANGE (id)"""
    )
    columns = """account_id, id, hold_id, service, request_id, key_id, window_start, model, served_model, provider, endpoint, outcome,
                 upstream_id, cost_nusd, balance_after_nusd, held_after_nusd, latency_ms, ttft_ms, units, flags, created_at"""
    op.execute("CREATE TABLE usage_default PARTITION OF usage DEFAULT")
    op.execute(f"INSERT INTO usage ({columns}) SELECT {columns} FROM usage_before")
    op.execute("DROP TABLE usage_before")
    op.execute("CREATE INDEX usage_of_key ON usage (account_id, key_id, id)")
    op.execute("GRANT SELECT, INSERT ON usage TO satmeter_runtime")


# The runtime role may own no table, so it makes partitions as the owner does, and only these. What stood in the default
# partition moves to where it belongs: a month whose partition came too late loses nothing.
_MAKE_USAGE_PARTITIONS = """
CREATE FUNCTION make_usage_partitions(p_months_ahead int) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    made int := 0;
    name text;
    first_id uuid;
    end_id uuid;
    month timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('make_usage_partitions'));
    FOR month IN
        SELECT m FROM (SELECT date_trunc('month', now()) + make_interval(months => n) AS m FROM generate_series(0, p_months_ahead) n
                       UNION SELECT DISTINCT date_trunc('month', to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0))
                             FROM usage_default WHERE substr(id::text, 15, 1) = '7') months ORDER BY m
    LOOP
        name := 'usage_' || to_char(month, 'YYYY_MM');
        CONTINUE WHEN to_regclass('public.' || name) IS NOT NULL;
        first_id := rpad(lpad(to_hex((extract(epoch FROM month) * 1000)::bigint), 12, '0'), 32, '0')::uuid;
        end_id := rpad(lpad(to_hex((extract(epoch FROM month + interval '1 month') * 1000)::bigint), 12, '0'), 32, '0')::uuid;
        EXECUTE format('CREATE TABLE %I (LIKE usage INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name);
        EXECUTE format('WITH moved AS (DELETE FROM usage_default WHERE id >= %L AND id < %L RETURNING *) INSERT INTO %I SELECT * FROM moved',
                       first_id, end_id, name);
        EXECUTE format('ALTER TABLE usage ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, first_id, end_id);
        made := made + 1;
    END LOOP;
    RETURN made;
END $$
"""

# Without the generic plan every call would be planned anew, which costs more than running it. The tables may be of
# any size then, and only look-ups by index are right at all of them. An account that somebody else keeps locked makes
# the batch give up soon, so that the others' calls need not wait for it.
_SETTINGS = """
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_bitmapscan = off SET lock_timeout = '500ms'
"""

# Whoever changes a key's figures or a hold has their account's row locked, so that these locks are enough. A locked row
# does not move, either: it is found again by its ctid, which saves the way through the index.
_LOCKS = "PERFORM 1 FROM account WHERE id = ANY (p_account_id) ORDER BY id FOR NO KEY UPDATE;"

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
            verdict := CASE WHEN limit_nusd - usage_nusd < greatest(min_nusd, 1) THEN 'key_limit_exceeded'
                            WHEN limit_nusd - usage_nusd - key_held_nusd < min_nusd THEN 'key_funds_held'
                            WHEN posted_nusd - floor_nusd < greatest(min_nusd, 1) THEN 'insufficient_balance'
                            WHEN posted_nusd - held_nusd - floor_nusd < min_nusd THEN 'funds_held'
                            ELSE 'allow' END;"""

# A denied call consumes nothing, so the remainders are carried from call to call, not summed.
_AUTHORIZE_BATCH = f"""
CREATE FUNCTION authorize_batch(
    p_account_id uuid[], p_key_id uuid[], p_hold_id uuid[], p_service text[], p_request_id text[], p_request_hash bytea[],
    p_amount_nusd bigint[], p_min_nusd bigint[], p_model text[], p_endpoint text[], p_price_version int[], p_ttl_seconds bigint[],
    p_synchronous_commit text
) RETURNS TABLE (
    item bigint, verdict text, posted_nusd bigint, held_nusd bigint, floor_nusd bigint, limit_nusd bigint, usage_nusd bigint,
    key_held_nusd bigint, reset_at timestamptz, window_start timestamptz, expires_at timestamptz, created_at timestamptz,
    request_hash bytea, amount_nusd bigint, price_version int
) {_SETTINGS} AS $$
#variable_conflict use_column
DECLARE
    account_id uuid;
    before_id uuid;
    min_nusd bigint;
    ttl_seconds bigint;
    key_number bigint;
    account_nusd bigint;
    account_place tid;
    key_nusd bigint[] := array_fill(0::bigint, ARRAY[cardinality(p_hold_id)]);
    granted_nusd bigint[] := array_fill(NULL::bigint, ARRAY[cardinality(p_hold_id)]);
    places tid[] := array_fill(NULL::tid, ARRAY[cardinality(p_hold_id)]);
    windows timestamptz[] := array_fill(NULL::timestamptz, ARRAY[cardinality(p_hold_id)]);
BEGIN
    PERFORM set_config('synchronous_commit', p_synchronous_commit, true);
    {_LOCKS}
    FOR item, verdict, posted_nusd, held_nusd, floor_nusd, limit_nusd, usage_nusd, key_held_nusd, reset_at, window_start, expires_at,
        created_at, request_hash, amount_nusd, price_version, account_id, account_place, min_nusd, ttl_seconds, key_number IN
        SELECT u.item, CASE WHEN e.id IS NOT NULL THEN 'repeat' WHEN c.id IS NOT NULL THEN 'reuse' {_REFUSAL} END,
               a.posted_nusd, a.held_nusd, a.floor_nusd, k.limit_nusd, {_KEY_USAGE}, k.held_nusd, {_RESET_AT},
               coalesce(e.window_start, {_KEY_WINDOW}), e.expires_at, coalesce(e.created_at, now()), e.request_hash,
               coalesce(e.amount_nusd, u.amount_nusd), CASE WHEN e.id IS NULL THEN u.price_version ELSE e.price_version END,
               u.account_id, a.ctid, u.min_nusd, u.ttl_seconds, dense_rank() OVER (ORDER BY u.account_id, u.key_id)
        FROM unnest(p_account_id, p_key_id, p_hold_id, p_amount_nusd, p_min_nusd, p_model, p_price_version, p_ttl_seconds)
             WITH ORDINALITY u (account_id, key_id, hold_id, amount_nusd, min_nusd, model, price_version, ttl_seconds, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
        LEFT JOIN hold e ON e.account_id = u.account_id AND e.id = u.hold_id
        LEFT JOIN entry c ON c.account_id = u.account_id AND c.kind = 'usage' AND c.reference = u.hold_id::text
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
                amount_nusd := least(amount_nusd, posted_nusd - held_nusd - floor_nusd, limit_nusd - usage_nusd - key_held_nusd);
                expires_at := now() + make_interval(secs => ttl_seconds);
                granted_nusd[item] := amount_nusd;
                places[item] := account_place;
                windows[item] := window_start;
                account_nusd := account_nusd + amount_nusd;
                key_nusd[key_number] := key_nusd[key_number] + amount_nusd;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;

    WITH admitted_now AS MATERIALIZED (
        SELECT * FROM unnest(p_account_id, p_key_id, p_hold_id, p_service, p_request_id, p_request_hash, granted_nusd, p_model, p_endpoint,
                             p_price_version, p_ttl_seconds, windows, places)
             u (account_id, key_id, hold_id, service, request_id, request_hash, amount_nusd, model, endpoint, price_version, ttl_seconds,
                window_start, place)
        WHERE u.amount_nusd IS NOT NULL
    ),
    key_after AS (
        UPDATE api_key k SET held_nusd = k.held_nusd + n.held_nusd, window_start = {_KEY_WINDOW}, window_usage_nusd = {_KEY_USAGE}
        FROM (SELECT account_id, key_id, sum(amount_nusd)::bigint AS held_nusd FROM admitted_now GROUP BY 1, 2) n
        WHERE k.account_id = n.account_id AND k.id = n.key_id
    ),
    account_after AS (
        UPDATE account a SET held_nusd = a.held_nusd + n.held_nusd
        FROM (SELECT place, sum(amount_nusd)::bigint AS held_nusd FROM admitted_now GROUP BY 1) n WHERE a.ctid = n.place
    )
    INSERT INTO hold (account_id, id, service, request_id, request_hash, key_id, window_start, amount_nusd, model, endpoint,
                      price_version, expires_at)
    SELECT n.account_id, n.hold_id, n.service, n.request_id, n.request_hash, n.key_id, n.window_start, n.amount_nusd, n.model, n.endpoint,
           n.price_version, now() + make_interval(secs => n.ttl_seconds)
    FROM admitted_now n;
END $$
"""

# Needs `due`: what is to be charged, in arrival order, with its account's figures and its key's window as they are now.
_RECORD_CHARGES = f"""
charged AS MATERIALIZED (
    SELECT d.*, (d.posted_nusd - sum(d.cost_nusd) OVER earlier)::bigint AS balance_after_nusd,
           (d.held_nusd - sum(d.freed_nusd) OVER earlier)::bigint AS held_after_nusd,
           d.entry_count + row_number() OVER earlier AS entry_id
    FROM due d
    WINDOW earlier AS (PARTITION BY d.place ORDER BY d.item ROWS UNBOUNDED PRECEDING)
),
account_after AS (
    UPDATE account a SET posted_nusd = a.posted_nusd - n.cost_nusd, held_nusd = a.held_nusd - n.freed_nusd,
           entry_count = a.entry_count + n.count, updated_at = now()
    FROM (SELECT place, sum(cost_nusd)::bigint AS cost_nusd, sum(freed_nusd)::bigint AS freed_nusd, count(*) AS count
          FROM due GROUP BY 1) n
    WHERE a.ctid = n.place
),
key_after AS (
    UPDATE api_key k SET held_nusd = k.held_nusd - n.freed_nusd, lifetime_nusd = k.lifetime_nusd + n.cost_nusd,
           window_start = {_KEY_WINDOW}, window_usage_nusd = {_KEY_USAGE} + n.window_cost_nusd
    FROM (SELECT account_id, key_id, sum(freed_nusd)::bigint AS freed_nusd, sum(cost_nusd)::bigint AS cost_nusd,
                 coalesce(sum(cost_nusd) FILTER (WHERE window_start = key_window_start), 0)::bigint AS window_cost_nusd
          FROM due GROUP BY 1, 2) n
    WHERE k.account_id = n.account_id AND k.id = n.key_id
),
posted AS (
    INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd, usage_id)
    SELECT account_id, entry_id, 'usage', hold_id::text, 'revenue:usage', -cost_nusd, balance_after_nusd, charge_id FROM charged
),
used AS (
    INSERT INTO usage (account_id, id, hold_id, service, request_id, key_id, window_start, model, served_model, provider, endpoint,
                       outcome, upstream_id, cost_nusd, balance_after_nusd, held_after_nusd, latency_ms, ttft_ms, units, price_version,
                       lines, flags)
    SELECT account_id, charge_id, hold_id, service, request_id, key_id, window_start, model, served_model, provider, endpoint,
           outcome, upstream_id, cost_nusd, balance_after_nusd, held_after_nusd, latency_ms, ttft_ms, units, price_version, lines,
           flags FROM charged
)"""

_WORK_PARAMETERS = """
    p_account_id uuid[], p_key_id uuid[], p_hold_id uuid[], p_service text[], p_request_id text[], p_charge_id uuid[],
    p_cost_nusd bigint[], p_outcome text[], p_served_model text[], p_provider text[], p_upstream_id text[], p_latency_ms int[],
    p_ttft_ms int[], p_units jsonb[], p_price_version int[], p_lines jsonb[], p_model text[], p_endpoint text[], p_flags text[]"""
_WORK = """p_account_id, p_key_id, p_hold_id, p_service, p_request_id, p_charge_id, p_cost_nusd, p_outcome, p_served_model, p_provider,
                    p_upstream_id, p_latency_ms, p_ttft_ms, p_units, p_price_version, p_lines, p_model, p_endpoint, p_flags"""
_WORK_COLUMNS = """account_id, key_id, hold_id, service, request_id, charge_id, cost_nusd, outcome, served_model, provider,
                    upstream_id, latency_ms, ttft_ms, units, price_version, lines, model, endpoint, asked_flags"""

# A settle is never refused, so what each one leaves is a running sum. An open hold was never charged: its entry need not be
# looked for.
_SETTLE_BATCH = f"""
CREATE FUNCTION settle_batch({_WORK_PARAMETERS}, p_window_start timestamptz[]
) RETURNS TABLE (
    item bigint, is_repeat boolean, id uuid, cost_nusd bigint, balance_after_nusd bigint, held_after_nusd bigint, flags text, is_low boolean
)
{_SETTINGS} AS $$
#variable_conflict use_column
BEGIN
    {_LOCKS}
    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT u.*, a.ctid AS place, a.posted_nusd, a.held_nusd, a.entry_count, a.low_nusd, {_KEY_WINDOW} AS key_window_start,
               h.ctid AS hold_place, h.state, h.amount_nusd, h.window_start AS hold_window_start, coalesce(e.is_there, false) AS is_repeat
        FROM unnest({_WORK}, p_window_start) WITH ORDINALITY u ({_WORK_COLUMNS}, ticket_window_start, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
        LEFT JOIN hold h ON h.account_id = u.account_id AND h.id = u.hold_id
        LEFT JOIN LATERAL (
            SELECT true AS is_there FROM entry e
            WHERE h.state IS DISTINCT FROM 'open' AND e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
            LIMIT 1
        ) e ON true
    ),
    due AS MATERIALIZED (
        SELECT u.*, CASE WHEN u.state = 'open' THEN u.amount_nusd ELSE 0 END AS freed_nusd,
               coalesce(u.hold_window_start, u.ticket_window_start, u.key_window_start) AS window_start,
               concat_ws(',', CASE WHEN u.hold_place IS NULL AND u.ticket_window_start IS NULL THEN 'no_hold'
                                   WHEN u.hold_place IS NULL THEN 'hold_missing' WHEN u.state <> 'open' THEN 'late' END,
                         CASE WHEN u.cost_nusd > u.amount_nusd THEN 'above_hold' END, u.asked_flags) AS flags
        FROM asked u WHERE NOT u.is_repeat AND u.state IS DISTINCT FROM 'settled'
    ),
    hold_after AS (
        UPDATE hold h SET state = 'settled', closed_at = now()
        FROM due d WHERE h.ctid = d.hold_place
    ), {_RECORD_CHARGES}
    SELECT item, false, charge_id, cost_nusd, balance_after_nusd, held_after_nusd, flags, coalesce(balance_after_nusd < low_nusd, false)
    FROM charged
    UNION ALL
    SELECT item, true, NULL, NULL, NULL, NULL, NULL, false FROM asked WHERE is_repeat;
END $$
"""

_CHARGE_BATCH = f"""
CREATE FUNCTION charge_batch({_WORK_PARAMETERS}, p_amount_nusd bigint[]
) RETURNS TABLE (
    item bigint, verdict text, posted_nusd bigint, held_nusd bigint, floor_nusd bigint, limit_nusd bigint, usage_nusd bigint,
    key_held_nusd bigint, reset_at timestamptz, id uuid, cost_nusd bigint, balance_after_nusd bigint, held_after_nusd bigint,
    flags text, is_low boolean
) {_SETTINGS} AS $$
#variable_conflict use_column
DECLARE
    account_id uuid;
    before_id uuid;
    min_nusd bigint;
    low_nusd bigint;
    due_nusd bigint;
    key_number bigint;
    account_nusd bigint;
    account_place tid;
    window_start timestamptz;
    key_nusd bigint[] := array_fill(0::bigint, ARRAY[cardinality(p_hold_id)]);
    places tid[] := array_fill(NULL::tid, ARRAY[cardinality(p_hold_id)]);
    windows timestamptz[] := array_fill(NULL::timestamptz, ARRAY[cardinality(p_hold_id)]);
BEGIN
    {_LOCKS}
    FOR item, verdict, posted_nusd, held_nusd, floor_nusd, limit_nusd, usage_nusd, key_held_nusd, reset_at,
        account_id, account_place, window_start, min_nusd, due_nusd, low_nusd, key_number IN
        SELECT u.item, CASE WHEN h.id IS NOT NULL THEN 'reuse' WHEN e.id IS NOT NULL THEN 'repeat' {_REFUSAL} END,
               a.posted_nusd, a.held_nusd, a.floor_nusd, k.limit_nusd, {_KEY_USAGE}, k.held_nusd, {_RESET_AT},
               u.account_id, a.ctid, {_KEY_WINDOW}, u.amount_nusd, u.cost_nusd, a.low_nusd, dense_rank() OVER (ORDER BY u.account_id, u.key_id)
        FROM unnest(p_account_id, p_key_id, p_hold_id, p_cost_nusd, p_amount_nusd, p_model)
             WITH ORDINALITY u (account_id, key_id, hold_id, cost_nusd, amount_nusd, model, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
        LEFT JOIN hold h ON h.account_id = u.account_id AND h.id = u.hold_id
        LEFT JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
        ORDER BY u.account_id, u.item
    LOOP
        IF account_id IS DISTINCT FROM before_id THEN
            before_id := account_id;
            account_nusd := 0;
        END IF;
        posted_nusd := posted_nusd - account_nusd;
        usage_nusd := usage_nusd + key_nusd[key_number];
        id := NULL;
        cost_nusd := NULL;
        balance_after_nusd := NULL;
        held_after_nusd := NULL;
        flags := NULL;
        is_low := NULL;
        IF verdict IS NULL THEN {_MONEY_DECIDES}
            IF verdict = 'allow' THEN
                id := p_charge_id[item];
                cost_nusd := due_nusd;
                balance_after_nusd := posted_nusd - due_nusd;
                held_after_nusd := held_nusd;
                flags := coalesce(p_flags[item], '');
                is_low := coalesce(balance_after_nusd < low_nusd, false);
                places[item] := account_place;
                windows[item] := window_start;
                account_nusd := account_nusd + due_nusd;
                key_nusd[key_number] := key_nusd[key_number] + due_nusd;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;

    WITH due AS MATERIALIZED (
        SELECT u.*, a.posted_nusd, a.held_nusd, a.entry_count, 0::bigint AS freed_nusd, u.window_start AS key_window_start,
               coalesce(u.asked_flags, '') AS flags
        FROM unnest({_WORK}, windows, places) WITH ORDINALITY u ({_WORK_COLUMNS}, window_start, place, item)
        JOIN account a ON a.ctid = u.place
    ), {_RECORD_CHARGES}
    SELECT count(*) FROM charged INTO key_number;
END $$
"""
