-- What decides about money when models are called: a function for each verb, each of one shape.
--
--   lock    the accounts, in the order of their ids. Whoever changes an account's money, its keys' figures or its holds locks
--           that row first, so that nothing else need be locked, and two verbs can never want each other's rows.
--   read    in a statement of its own: PL/pgSQL gives it a snapshot taken after the locks, so that what it sees is the truth.
--   decide  item by item, in the order in which they came.
--   write   what was decided; a row that is read under the lock does not move, and is found again by its ctid.
--   answer  each item its own verdict.
--
-- A call alone is an array of one. No call (account_id, hold_id) stands twice in one array of calls. An account that somebody
-- else keeps locked is passed by, unless p_wait: its items get no row, and are asked again. No row either where there is no account.
--
-- A row is found by all that names it, whatever the planner was told of the tables when it planned: where it may look by the
-- account alone it does, as soon as its statistics have one row an account, and then reads all of a large account's for each
-- call. So a key, found by its account and an id of elsewhere, and a hold, is a subselect with a LIMIT, which is planned by itself;
-- and an entry is found by its reference, its account being compared as no index is asked.
--
-- What is only written down is taken from its array at the item's place, as PL/pgSQL keeps arrays unfolded; carried from step to
-- step it would cost a tenth of the time.
--
-- `migrate` installs this file whenever it differs from what is installed. The settings of each function: without the generic
-- plan every call would be planned anew, which costs more than running it; the tables may be of any size then, and only
-- look-ups by index are right at all of them.


-- Locks accounts and returns those that are locked now. p_lock has each account once.
CREATE OR REPLACE FUNCTION meter_lock(p_lock uuid[], p_wait boolean) RETURNS uuid[]
LANGUAGE plpgsql AS $$
BEGIN
    IF p_wait THEN
        RETURN ARRAY (SELECT id FROM account WHERE id = ANY (p_lock) ORDER BY id FOR NO KEY UPDATE);
    END IF;
    RETURN ARRAY (SELECT id FROM account WHERE id = ANY (p_lock) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED);
END $$;


-- A key's window at a moment. greatest() skips nulls: a key without a period keeps its window for ever.
CREATE OR REPLACE FUNCTION meter_window(p_key api_key, p_now timestamptz DEFAULT now()) RETURNS timestamptz
LANGUAGE sql STABLE AS $$ SELECT greatest(p_key.window_start, date_trunc(p_key.reset_period, p_now, 'UTC')) $$;


-- What was used in a window that began at p_start, as it stands at a moment; here and below by columns, for statements in which a
-- row has the type of its shard.
CREATE OR REPLACE FUNCTION meter_used(p_start timestamptz, p_period text, p_usage_nusd bigint, p_now timestamptz) RETURNS bigint
LANGUAGE sql STABLE AS $$ SELECT CASE WHEN p_start < date_trunc(p_period, p_now, 'UTC') THEN 0 ELSE p_usage_nusd END $$;


-- What a key has spent in its window.
CREATE OR REPLACE FUNCTION meter_spent(p_key api_key, p_now timestamptz DEFAULT now()) RETURNS bigint
LANGUAGE sql STABLE AS $$ SELECT meter_used(p_key.window_start, p_key.reset_period, p_key.window_usage_nusd, p_now) $$;


-- The same of further windows.
CREATE OR REPLACE FUNCTION meter_more_used(p_starts timestamptz[], p_periods text[], p_usage_nusd bigint[], p_now timestamptz) RETURNS bigint[]
LANGUAGE sql STABLE AS $$
    SELECT array_agg(meter_used(w.start, w.period, w.usage_nusd, p_now) ORDER BY w.number)
    FROM unnest(p_starts, p_periods, p_usage_nusd) WITH ORDINALITY w (start, period, usage_nusd, number)
$$;


-- The windows of the keys above a key, from the root down. A function of its own, as are the two below: most calls need none of
-- it, and what stands in a statement is made ready for each of them.
CREATE OR REPLACE FUNCTION meter_starts_above(p_key api_key, p_now timestamptz) RETURNS timestamptz[]
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN ARRAY (SELECT k.start FROM unnest(p_key.ancestor_ids) WITH ORDINALITY above (id, level)
                  LEFT JOIN LATERAL (SELECT meter_window(k, p_now) AS start FROM api_key k
                                     WHERE k.account_id = p_key.account_id AND k.id = above.id LIMIT 1) k ON true
                  ORDER BY above.level);
END $$;


-- The same of a key's further windows, of which most keys have none.
CREATE OR REPLACE FUNCTION meter_more_starts(p_key api_key, p_now timestamptz) RETURNS timestamptz[]
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN ARRAY (SELECT greatest(w.start, date_trunc(w.period, p_now, 'UTC'))
                  FROM unnest(p_key.more_periods, p_key.more_starts) WITH ORDINALITY w (period, start, number) ORDER BY w.number);
END $$;


-- With p_cost_nusd: and what comes to it by calls that began then, of which those count that began in the window.
CREATE OR REPLACE FUNCTION meter_more_spent(
    p_key api_key, p_now timestamptz, p_cost_nusd bigint[] DEFAULT NULL, p_begun timestamptz[] DEFAULT NULL
) RETURNS bigint[]
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN ARRAY (
        SELECT CASE WHEN w.start < date_trunc(w.period, p_now, 'UTC') THEN 0 ELSE w.usage_nusd END
               + (SELECT coalesce(sum(c.cost_nusd), 0)::bigint FROM unnest(p_cost_nusd, p_begun) c (cost_nusd, begun)
                  WHERE c.begun >= greatest(w.start, date_trunc(w.period, p_now, 'UTC')))
        FROM unnest(p_key.more_periods, p_key.more_starts, p_key.more_usage_nusd) WITH ORDINALITY w (period, start, usage_nusd, number)
        ORDER BY w.number);
END $$;


-- How many calls of a key were admitted in this minute; not counted where there is no limit to them.
CREATE OR REPLACE FUNCTION meter_calls(p_key api_key) RETURNS int
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN p_key.minute_start = date_trunc('minute', now()) THEN p_key.minute_calls ELSE 0 END
$$;


-- Why a key may make no call at all, whatever it costs; null if it may. p_names are all names of the call's model.
CREATE OR REPLACE FUNCTION meter_refusal(p_key api_key, p_status text, p_names text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN p_key.id IS NULL OR p_key.deleted_at IS NOT NULL OR p_key.disabled_at IS NOT NULL
                     OR p_key.expire_at <= now() THEN 'invalid_api_key'
                WHEN p_status <> 'active' THEN 'account_frozen'
                WHEN p_key.scopes IS NOT NULL AND NOT 'spend' = ANY (p_key.scopes) THEN 'missing_scope'
                WHEN p_key.allowed_models IS NOT NULL
                     AND NOT coalesce(p_key.allowed_models && string_to_array(p_names, E'\x7f'), false) THEN 'model_not_allowed' END
$$;


-- Whether a key's call is one too many in this minute, or dearer than one may be; null if neither.
CREATE OR REPLACE FUNCTION meter_excess(p_calls_left bigint, p_needed bigint, p_most bigint) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_calls_left <= 0 THEN 'too_many_calls' WHEN p_needed > p_most THEN 'call_too_dear' END
$$;


-- What the money says, in the order of the reasons a caller is given. Also a call for nothing needs a nano-dollar that is
-- left: an estimate may be wrong, and a key or an account that is exhausted is not to be used.
CREATE OR REPLACE FUNCTION meter_shortage(
    p_needed bigint, p_limit bigint, p_spent bigint, p_key_held bigint, p_posted bigint, p_held bigint, p_floor bigint
) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_limit - p_spent < greatest(p_needed, 1) THEN 'key_limit_exceeded'
                WHEN p_limit - p_spent - p_key_held < p_needed THEN 'key_funds_held'
                WHEN p_posted - p_floor < greatest(p_needed, 1) THEN 'insufficient_balance'
                WHEN p_posted - p_held - p_floor < p_needed THEN 'funds_held' END
$$;


-- The highest balance, up to p_balance, below which something is to be told: half, a fifth and a twentieth of the last top-up are
-- reached, the balance is below what its owner calls low, or nothing is left.
CREATE OR REPLACE FUNCTION meter_mark(p_base bigint, p_low bigint, p_floor bigint, p_balance bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT max(m) FROM unnest(ARRAY[p_base / 2 + 1, p_base / 5 + 1, p_base / 20 + 1, p_low, p_floor + 1]) m WHERE m <= p_balance
$$;


-- What is told of a balance that fell below p_mark: its type and data, with the marks that it passed as reasons. Null if it did not.
CREATE OR REPLACE FUNCTION meter_notice(p_mark bigint, p_base bigint, p_low bigint, p_floor bigint, p_balance bigint) RETURNS jsonb
LANGUAGE sql IMMUTABLE AS $$
    SELECT jsonb_build_object('type', CASE WHEN bool_or(reason = 'empty') THEN 'balance.empty' ELSE 'balance.low' END, 'data', jsonb_build_object(
               'balance_usd', trim_scale(p_balance / 1000000000::numeric), 'last_topup_usd', trim_scale(p_base / 1000000000::numeric),
               'low_balance_usd', trim_scale(p_low / 1000000000::numeric), 'percent', min(percent),
               'reasons', jsonb_agg(reason ORDER BY mark DESC)))
    FROM (VALUES ('50_percent', 50, p_base / 2 + 1), ('20_percent', 20, p_base / 5 + 1), ('5_percent', 5, p_base / 20 + 1),
                 ('low_balance', NULL, p_low), ('empty', NULL, p_floor + 1)) v (reason, percent, mark)
    WHERE p_balance < mark AND mark <= p_mark
    HAVING count(*) > 0
$$;


-- The ways on which an account, or the operator, wants to be told of something of this type. What changes an address goes on all.
CREATE OR REPLACE FUNCTION meter_ways(p_account_id uuid, p_type text) RETURNS TABLE (channel text)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY
    SELECT way.name FROM notice_address n
    CROSS JOIN LATERAL (VALUES ('webhook', n.sealed_url IS NOT NULL AND n.webhook_off_at IS NULL), ('nostr', n.npub IS NOT NULL)) way (name, is_there)
    WHERE n.account_id = p_account_id AND way.is_there AND (n.events IS NULL OR p_type LIKE 'notices.%' OR p_type = ANY (n.events));
END $$;


-- What bounds a call of a key that stands under others, or that has several windows: p_chain are the keys above it from the root
-- down, and the key itself. The first refusal of any of them (the account's is not asked again); of all their windows the one
-- that leaves the least, and one that is used up before any other; the least that a call may cost, and the fewest that are left of this minute. Each says whose
-- it is: `bound` is the key's id and the window's period, empty where it is the key's own and its only one.
-- What calls of the same batch have taken so far is p_held_nusd or p_spent_nusd, and p_calls, by the numbers of p_key_id.
CREATE OR REPLACE FUNCTION meter_bounds(
    p_account_id uuid, p_chain uuid[], p_names text, p_needed_nusd bigint, p_now timestamptz,
    p_key_id uuid[], p_held_nusd bigint[], p_spent_nusd bigint[], p_calls bigint[]
) RETURNS TABLE (
    verdict text, limit_nusd bigint, spent_nusd bigint, key_held_nusd bigint, reset_at timestamptz, bound text,
    call_limit_nusd bigint, call_bound text, calls_left bigint, calls_bound text
) LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH chain AS MATERIALIZED (
        SELECT k.key, c.level, CASE WHEN c.level = cardinality(p_chain) THEN '' ELSE c.id::text END AS whose,
               coalesce(p_held_nusd[c.number], 0) AS held_nusd, coalesce(p_spent_nusd[c.number], 0) AS spent_nusd,
               coalesce(p_calls[c.number], 0) AS calls
        FROM (SELECT u.id, u.level, array_position(p_key_id, u.id) AS number FROM unnest(p_chain) WITH ORDINALITY u (id, level)) c
        LEFT JOIN LATERAL (SELECT k AS key FROM api_key k WHERE k.account_id = p_account_id AND k.id = c.id LIMIT 1) k ON true
    ),
    bounded AS (
        SELECT c.level, w.limit_nusd, w.spent_nusd + c.spent_nusd AS spent_nusd, (c.key).held_nusd + c.held_nusd AS held_nusd,
               date_trunc(w.period, p_now, 'UTC') + ('1 ' || w.period)::interval AS reset_at,
               c.whose || ':' || CASE WHEN c.whose = '' AND (c.key).more_limits_nusd IS NULL THEN '' ELSE coalesce(w.period, 'total') END AS bound
        FROM chain c, unnest(
            array_prepend((c.key).reset_period, (c.key).more_periods), array_prepend((c.key).limit_nusd, (c.key).more_limits_nusd),
            array_prepend(meter_spent(c.key, p_now), CASE WHEN (c.key).more_limits_nusd IS NOT NULL THEN meter_more_spent(c.key, p_now) END)
        ) w (period, limit_nusd, spent_nusd)
        WHERE w.limit_nusd IS NOT NULL
    )
    SELECT (SELECT r.verdict FROM (SELECT meter_refusal(c.key, 'active', p_names) AS verdict, c.level FROM chain c) r
            WHERE r.verdict IS NOT NULL ORDER BY r.level DESC LIMIT 1),
           b.limit_nusd, b.spent_nusd, b.held_nusd, b.reset_at, b.bound, m.most_nusd, m.whose, q.left, q.whose
    FROM (VALUES (1)) one
    LEFT JOIN LATERAL (
        SELECT * FROM bounded
        ORDER BY limit_nusd - spent_nusd < greatest(p_needed_nusd, 1) DESC, limit_nusd - spent_nusd - held_nusd, reset_at DESC NULLS FIRST,
                 level DESC
        LIMIT 1
    ) b ON true
    LEFT JOIN LATERAL (
        SELECT (c.key).call_limit_nusd AS most_nusd, c.whose FROM chain c WHERE (c.key).call_limit_nusd IS NOT NULL
        ORDER BY 1, c.level DESC LIMIT 1
    ) m ON true
    LEFT JOIN LATERAL (
        SELECT (c.key).requests_per_minute - meter_calls(c.key) - c.calls AS left, c.whose FROM chain c
        WHERE (c.key).requests_per_minute IS NOT NULL ORDER BY 1, c.level DESC LIMIT 1
    ) q ON true;
END $$;


-- verify: what an authorize for nothing would be answered, and what the key, and those above it, may be used for. Changes nothing.
-- Without p_names every model that is allowed is one that it may be. No row where there is no such account.
CREATE OR REPLACE FUNCTION meter_verify(p_account_id uuid, p_key_id uuid, p_names text) RETURNS TABLE (
    verdict text, posted_nusd bigint, held_nusd bigint, floor_nusd bigint, limit_nusd bigint, spent_nusd bigint, key_held_nusd bigint,
    reset_at timestamptz, bound text, available_nusd bigint, scopes jsonb, allowed_models jsonb
) LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT coalesce(meter_refusal(k, a.status, n.names), b.verdict, meter_excess(b.calls_left, 0, b.call_limit_nusd),
                    meter_shortage(0, b.limit_nusd, b.spent_nusd, b.key_held_nusd, a.posted_nusd, a.held_nusd, a.floor_nusd)),
           a.posted_nusd, a.held_nusd, a.floor_nusd, b.limit_nusd, b.spent_nusd, b.key_held_nusd,
           CASE WHEN b.calls_left <= 0 THEN date_trunc('minute', now()) + interval '1 minute' ELSE b.reset_at END,
           CASE WHEN b.calls_left <= 0 THEN b.calls_bound ELSE b.bound END,
           least(a.posted_nusd - a.held_nusd - a.floor_nusd, b.limit_nusd - b.spent_nusd - b.key_held_nusd),
           w.scopes, w.allowed_models
    FROM account a LEFT JOIN api_key k ON k.account_id = a.id AND k.id = p_key_id
    CROSS JOIN LATERAL (SELECT array_append(k.ancestor_ids, p_key_id) AS chain) c
    CROSS JOIN LATERAL (
        SELECT jsonb_agg(x.scopes) AS scopes, jsonb_agg(x.allowed_models ORDER BY u.level DESC) AS allowed_models,
               string_agg(nullif(array_to_string(x.allowed_models, E'\x7f'), ''), E'\x7f') AS names
        FROM unnest(c.chain) WITH ORDINALITY u (id, level)
        CROSS JOIN LATERAL (SELECT x.scopes, x.allowed_models FROM api_key x WHERE x.account_id = a.id AND x.id = u.id LIMIT 1) x
    ) w
    CROSS JOIN LATERAL (SELECT coalesce(p_names, w.names) AS names) n
    CROSS JOIN LATERAL meter_bounds(a.id, c.chain, n.names, 0, now(), NULL, NULL, NULL, NULL) b
    WHERE a.id = p_account_id;
END $$;


-- authorize: holds amount_nusd for a call, or what there is of it from min_nusd up. Locks the accounts.
-- A denied call consumes nothing, so what is left is carried from call to call. An open hold of the same request is
-- answered again while its key may still spend; another request of that id is `reuse`, one whose hold is closed `closed`.
-- What is held for a key is held for every key above it. v_key_ids are the calls' keys, and behind them those above.
-- A call whose window_start says when it began counts to whatever window of those keys begins no later: with one window and no
-- key above, that is the beginning of the window.
CREATE OR REPLACE FUNCTION meter_authorize(
    p_lock uuid[], p_wait boolean, p_synchronous_commit text, p_account_id uuid[], p_key_id uuid[], p_hold_id uuid[], p_service text[],
    p_request_id text[], p_request_hash bytea[], p_amount_nusd bigint[], p_min_nusd bigint[], p_model text[], p_names text[],
    p_endpoint text[], p_price_version int[], p_attributes text[], p_made_at timestamptz[], p_ttl_seconds bigint[], p_on_expiry text[]
) RETURNS TABLE (
    item bigint, verdict text, posted_nusd bigint, held_nusd bigint, floor_nusd bigint, limit_nusd bigint, spent_nusd bigint,
    key_held_nusd bigint, reset_at timestamptz, bound text, window_start timestamptz, expires_at timestamptz, made_at timestamptz,
    amount_nusd bigint, price_version int, state text
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    v_locked uuid[] := meter_lock(p_lock, p_wait);
    v_all boolean := cardinality(v_locked) = cardinality(p_lock);
    v_account_id uuid;
    v_before_id uuid;
    v_account_place tid;
    v_account_nusd bigint;
    v_now timestamptz := clock_timestamp();
    v_chain uuid[];
    v_bounds record;
    v_key_accounts uuid[] := p_account_id;
    v_key_ids uuid[] := p_key_id;
    v_above_id uuid;
    v_key_number bigint;
    v_min_nusd bigint;
    v_most_nusd bigint;
    v_calls_left bigint;
    v_key_calls bigint[] := array_fill(0::bigint, ARRAY[cardinality(p_hold_id)]);
    v_key_nusd bigint[] := array_fill(0::bigint, ARRAY[cardinality(p_hold_id)]);
    v_granted_nusd bigint[] := array_fill(NULL::bigint, ARRAY[cardinality(p_hold_id)]);
    v_places tid[] := array_fill(NULL::tid, ARRAY[cardinality(p_hold_id)]);
    v_windows timestamptz[] := array_fill(NULL::timestamptz, ARRAY[cardinality(p_hold_id)]);
BEGIN
    PERFORM set_config('synchronous_commit', p_synchronous_commit, true);
    FOR item, verdict, posted_nusd, held_nusd, floor_nusd, limit_nusd, spent_nusd, key_held_nusd, reset_at, window_start, expires_at,
        made_at, amount_nusd, price_version, state, v_account_id, v_account_place, v_min_nusd, v_most_nusd, v_calls_left, v_key_number,
        v_chain IN
        SELECT u.item,
               CASE WHEN h.request_hash <> u.request_hash OR e.is_there THEN 'reuse'
                    WHEN h.state <> 'open' OR h.expires_at <= now() THEN 'closed'
                    ELSE coalesce(meter_refusal(k, a.status, u.names), CASE WHEN h.id IS NOT NULL THEN 'repeat' END) END,
               a.posted_nusd, a.held_nusd, a.floor_nusd, k.limit_nusd, meter_spent(k, v_now), k.held_nusd,
               date_trunc(k.reset_period, v_now, 'UTC') + ('1 ' || k.reset_period)::interval,
               coalesce(h.window_start, meter_window(k, v_now)), h.expires_at, coalesce(h.created_at, u.made_at),
               coalesce(h.amount_nusd, u.amount_nusd), CASE WHEN h.id IS NULL THEN u.price_version ELSE h.price_version END,
               CASE WHEN h.state = 'open' AND h.expires_at <= now() THEN 'expired' ELSE h.state END,
               u.account_id, a.ctid, u.min_nusd, k.call_limit_nusd, k.requests_per_minute - meter_calls(k), array_position(p_key_id, u.key_id),
               CASE WHEN k.ancestor_ids IS NOT NULL OR k.more_limits_nusd IS NOT NULL THEN array_append(k.ancestor_ids, k.id) END
        FROM unnest(p_account_id, p_key_id, p_hold_id, p_request_hash, p_amount_nusd, p_min_nusd, p_names, p_price_version, p_made_at)
             WITH ORDINALITY u (account_id, key_id, hold_id, request_hash, amount_nusd, min_nusd, names, price_version, made_at, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
        LEFT JOIN LATERAL (SELECT * FROM hold h WHERE h.account_id = u.account_id AND h.id = u.hold_id LIMIT 1) h ON true
        LEFT JOIN LATERAL (
            SELECT true AS is_there FROM entry e
            WHERE h.id IS NULL AND e.reference = u.hold_id::text AND e.kind = 'usage' AND e.account_id IS NOT DISTINCT FROM u.account_id LIMIT 1
        ) e ON true
        WHERE v_all OR u.account_id = ANY (v_locked)
        ORDER BY u.account_id, u.item
    LOOP
        IF v_account_id IS DISTINCT FROM v_before_id THEN
            v_before_id := v_account_id;
            v_account_nusd := 0;
        END IF;
        held_nusd := held_nusd + v_account_nusd;
        bound := NULL;
        IF v_chain IS NULL THEN
            key_held_nusd := key_held_nusd + v_key_nusd[v_key_number];
            v_calls_left := v_calls_left - v_key_calls[v_key_number];
        ELSIF verdict IS NULL OR verdict = 'repeat' THEN
            SELECT * INTO v_bounds FROM meter_bounds(v_account_id, v_chain, p_names[item], v_min_nusd, v_now, v_key_ids, v_key_nusd, NULL, v_key_calls);
            IF verdict IS NULL THEN
                window_start := greatest(window_start, v_now);
            END IF;
            verdict := coalesce(v_bounds.verdict, verdict);
            limit_nusd := v_bounds.limit_nusd;
            spent_nusd := v_bounds.spent_nusd;
            key_held_nusd := v_bounds.key_held_nusd;
            reset_at := v_bounds.reset_at;
            bound := v_bounds.bound;
            v_most_nusd := v_bounds.call_limit_nusd;
            v_calls_left := v_bounds.calls_left;
        END IF;
        IF verdict IS NULL AND (v_calls_left IS NOT NULL OR v_most_nusd IS NOT NULL) THEN
            verdict := meter_excess(v_calls_left, v_min_nusd, v_most_nusd);
            IF verdict IS NULL THEN
                amount_nusd := least(amount_nusd, v_most_nusd);
            ELSE
                IF v_chain IS NOT NULL THEN
                    bound := CASE verdict WHEN 'too_many_calls' THEN v_bounds.calls_bound ELSE v_bounds.call_bound END;
                END IF;
                limit_nusd := v_most_nusd;
                reset_at := date_trunc('minute', now()) + interval '1 minute';
            END IF;
        END IF;
        IF verdict IS NULL THEN
            verdict := meter_shortage(v_min_nusd, limit_nusd, spent_nusd, key_held_nusd, posted_nusd, held_nusd, floor_nusd);
            IF verdict IS NULL THEN
                verdict := 'allow';
                amount_nusd := least(amount_nusd, posted_nusd - held_nusd - floor_nusd, limit_nusd - spent_nusd - key_held_nusd);
                v_key_calls[v_key_number] := v_key_calls[v_key_number] + 1;
                expires_at := now() + make_interval(secs => p_ttl_seconds[item]);
                v_granted_nusd[item] := amount_nusd;
                v_places[item] := v_account_place;
                v_windows[item] := window_start;
                v_account_nusd := v_account_nusd + amount_nusd;
                v_key_nusd[v_key_number] := v_key_nusd[v_key_number] + amount_nusd;
                IF v_chain IS NOT NULL THEN
                    FOREACH v_above_id IN ARRAY trim_array(v_chain, 1) LOOP
                        v_key_number := array_position(v_key_ids, v_above_id);
                        IF v_key_number IS NULL THEN
                            v_key_ids := v_key_ids || v_above_id;
                            v_key_accounts := v_key_accounts || v_account_id;
                            v_key_nusd := v_key_nusd || 0::bigint;
                            v_key_calls := v_key_calls || 0::bigint;
                            v_key_number := cardinality(v_key_ids);
                        END IF;
                        v_key_nusd[v_key_number] := v_key_nusd[v_key_number] + amount_nusd;
                        v_key_calls[v_key_number] := v_key_calls[v_key_number] + 1;
                    END LOOP;
                END IF;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;

    WITH granted AS MATERIALIZED (
        SELECT * FROM unnest(p_account_id, p_key_id, v_granted_nusd, v_places) WITH ORDINALITY u (account_id, key_id, amount_nusd, place, item)
        WHERE u.amount_nusd IS NOT NULL
    ),
    key_after AS (
        UPDATE api_key k SET held_nusd = k.held_nusd + g.held_nusd, window_start = meter_window(k, v_now),
               window_usage_nusd = meter_spent(k, v_now),
               minute_start = CASE WHEN k.requests_per_minute IS NOT NULL THEN date_trunc('minute', now()) END,
               minute_calls = CASE WHEN k.requests_per_minute IS NOT NULL THEN meter_calls(k) + g.calls END
        FROM unnest(v_key_accounts, v_key_ids, v_key_nusd, v_key_calls) g (account_id, key_id, held_nusd, calls)
        WHERE g.calls > 0 AND k.account_id = g.account_id AND k.id = g.key_id
    ),
    account_after AS (
        UPDATE account a SET held_nusd = a.held_nusd + g.held_nusd
        FROM (SELECT place, sum(amount_nusd)::bigint AS held_nusd FROM granted GROUP BY 1) g WHERE a.ctid = g.place
    )
    INSERT INTO hold (account_id, id, service, request_id, request_hash, key_id, window_start, amount_nusd, on_expiry, model, endpoint,
                      price_version, attributes, created_at, expires_at)
    SELECT account_id, p_hold_id[item], p_service[item], p_request_id[item], p_request_hash[item], key_id, v_windows[item], amount_nusd,
           p_on_expiry[item], p_model[item], p_endpoint[item], p_price_version[item], p_attributes[item]::jsonb, p_made_at[item],
           now() + make_interval(secs => p_ttl_seconds[item])
    FROM granted;
END $$;


-- charge: takes what calls cost, each once. Locks the accounts.
-- settle: a call under a hold costs what it cost, whatever the hold said, so that nothing is refused and what each item leaves
-- is a running sum. Also for calls that nothing was held for: with a request_hash the call is not told of by a ticket, and
-- leaves a hold that is settled already; another call of that id is `reuse`. at_least_hold: the cost is not less than what
-- was held. An open hold was never charged: its entry need not be looked for. Nor is that of a call among others that nothing
-- was held for and that has no hold: where one was removed with its hold's age (retention), entry_once refuses the whole batch,
-- and its calls are asked again, p_wait. Where the hold is of another key than the ticket says (one was lost, and the request
-- made again by another key), the call counts to the hold's.
-- charge: where needed_nusd is given (to all items or none), the key must be able to pay that much. A refused call consumes
-- nothing, so what is left is carried from call to call. What is known of a request_id is not asked for money again, and what is new
-- is not looked for again.
-- What a key is charged counts to every key above it, in each window that had begun when the call began; only lifetime_nusd is
-- the key's own.
CREATE OR REPLACE FUNCTION meter_charge(
    p_lock uuid[], p_wait boolean, p_account_id uuid[], p_key_id uuid[], p_hold_id uuid[], p_service text[], p_request_id text[],
    p_request_hash bytea[], p_window_start timestamptz[], p_needed_nusd bigint[], p_names text[], p_charge_id uuid[], p_cost_nusd bigint[],
    p_at_least_hold boolean[], p_outcome text[], p_model text[], p_served_model text[], p_provider text[], p_endpoint text[],
    p_upstream_id text[], p_upstream_model text[], p_provider_cost_nusd bigint[], p_latency_ms int[], p_ttft_ms int[], p_units text[],
    p_price_version int[], p_lines text[], p_flags text[]
) RETURNS TABLE (
    item bigint, verdict text, posted_nusd bigint, held_nusd bigint, floor_nusd bigint, limit_nusd bigint, spent_nusd bigint,
    key_held_nusd bigint, reset_at timestamptz, bound text, cost_nusd bigint, balance_after_nusd bigint, held_after_nusd bigint,
    flags text, is_low boolean
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    v_locked uuid[] := meter_lock(p_lock, p_wait);
    v_all boolean := cardinality(v_locked) = cardinality(p_lock);
    v_account_id uuid;
    v_before_id uuid;
    v_account_nusd bigint;
    v_now timestamptz := clock_timestamp();
    v_chain uuid[];
    v_bounds record;
    v_key_ids uuid[] := p_key_id;
    v_above_id uuid;
    v_key_number bigint;
    v_most_nusd bigint;
    v_calls_left bigint;
    v_key_calls bigint[];
    v_key_nusd bigint[];
    v_admitted boolean[];
    v_new boolean[];
BEGIN
    IF p_needed_nusd[1] IS NOT NULL THEN
        v_key_nusd := array_fill(0::bigint, ARRAY[cardinality(p_hold_id)]);
        v_key_calls := v_key_nusd;
        v_admitted := array_fill(false, ARRAY[cardinality(p_hold_id)]);
        v_new := v_admitted;
        FOR item, verdict, posted_nusd, held_nusd, floor_nusd, limit_nusd, spent_nusd, key_held_nusd, reset_at, v_account_id,
            v_most_nusd, v_calls_left, v_key_number, v_chain IN
            SELECT u.item, CASE WHEN h.is_there OR e.is_there THEN 'known' ELSE meter_refusal(k, a.status, u.names) END,
                   a.posted_nusd, a.held_nusd, a.floor_nusd, k.limit_nusd, meter_spent(k, v_now), k.held_nusd,
                   date_trunc(k.reset_period, v_now, 'UTC') + ('1 ' || k.reset_period)::interval,
                   u.account_id, k.call_limit_nusd, k.requests_per_minute - meter_calls(k), array_position(p_key_id, u.key_id),
                   CASE WHEN k.ancestor_ids IS NOT NULL OR k.more_limits_nusd IS NOT NULL THEN array_append(k.ancestor_ids, k.id) END
            FROM unnest(p_account_id, p_key_id, p_hold_id, p_names) WITH ORDINALITY u (account_id, key_id, hold_id, names, item)
            JOIN account a ON a.id = u.account_id
            LEFT JOIN api_key k ON k.account_id = u.account_id AND k.id = u.key_id
            LEFT JOIN LATERAL (
                SELECT true AS is_there FROM hold h WHERE h.account_id = u.account_id AND h.id = u.hold_id LIMIT 1
            ) h ON true
            LEFT JOIN LATERAL (
                SELECT true AS is_there FROM entry e
                WHERE h.is_there IS NULL AND e.reference = u.hold_id::text AND e.kind = 'usage'
                      AND e.account_id IS NOT DISTINCT FROM u.account_id
                LIMIT 1
            ) e ON true
            WHERE v_all OR u.account_id = ANY (v_locked)
            ORDER BY u.account_id, u.item
        LOOP
            IF v_account_id IS DISTINCT FROM v_before_id THEN
                v_before_id := v_account_id;
                v_account_nusd := 0;
            END IF;
            posted_nusd := posted_nusd - v_account_nusd;
            bound := NULL;
            IF v_chain IS NULL THEN
                spent_nusd := spent_nusd + v_key_nusd[v_key_number];
                v_calls_left := v_calls_left - v_key_calls[v_key_number];
            ELSIF verdict IS NULL THEN
                SELECT * INTO v_bounds FROM meter_bounds(v_account_id, v_chain, p_names[item], p_needed_nusd[item], v_now, v_key_ids, NULL, v_key_nusd, v_key_calls);
                verdict := v_bounds.verdict;
                limit_nusd := v_bounds.limit_nusd;
                spent_nusd := v_bounds.spent_nusd;
                key_held_nusd := v_bounds.key_held_nusd;
                reset_at := v_bounds.reset_at;
                bound := v_bounds.bound;
                v_most_nusd := v_bounds.call_limit_nusd;
                v_calls_left := v_bounds.calls_left;
            END IF;
            IF verdict IS NULL AND (v_calls_left IS NOT NULL OR v_most_nusd IS NOT NULL) THEN
                verdict := meter_excess(v_calls_left, p_needed_nusd[item], v_most_nusd);
                IF verdict IS NOT NULL THEN
                    IF v_chain IS NOT NULL THEN
                        bound := CASE verdict WHEN 'too_many_calls' THEN v_bounds.calls_bound ELSE v_bounds.call_bound END;
                    END IF;
                    limit_nusd := v_most_nusd;
                    reset_at := date_trunc('minute', now()) + interval '1 minute';
                END IF;
            END IF;
            IF verdict IS NULL THEN
                verdict := meter_shortage(p_needed_nusd[item], limit_nusd, spent_nusd, key_held_nusd, posted_nusd, held_nusd, floor_nusd);
                IF verdict IS NULL THEN
                    v_account_nusd := v_account_nusd + p_cost_nusd[item];
                    v_key_nusd[v_key_number] := v_key_nusd[v_key_number] + p_cost_nusd[item];
                    v_key_calls[v_key_number] := v_key_calls[v_key_number] + 1;
                    IF v_chain IS NOT NULL THEN
                        FOREACH v_above_id IN ARRAY trim_array(v_chain, 1) LOOP
                            v_key_number := array_position(v_key_ids, v_above_id);
                            IF v_key_number IS NULL THEN
                                v_key_ids := v_key_ids || v_above_id;
                                v_key_nusd := v_key_nusd || 0::bigint;
                                v_key_calls := v_key_calls || 0::bigint;
                                v_key_number := cardinality(v_key_ids);
                            END IF;
                            v_key_nusd[v_key_number] := v_key_nusd[v_key_number] + p_cost_nusd[item];
                            v_key_calls[v_key_number] := v_key_calls[v_key_number] + 1;
                        END LOOP;
                    END IF;
                    v_admitted[item] := true;
                    v_new[item] := true;
                    CONTINUE;
                END IF;
            ELSIF verdict = 'known' THEN
                v_admitted[item] := true;
                CONTINUE;
            END IF;
            RETURN NEXT;
        END LOOP;
    END IF;

    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT u.item, u.account_id, u.hold_id, u.request_hash, u.ticket_window_start, u.charge_id, u.is_admitted,
               coalesce(h.key_id, u.told_key_id) AS key_id,
               CASE WHEN u.at_least_hold THEN greatest(u.told_nusd, h.amount_nusd) ELSE u.told_nusd END AS cost_nusd,
               a.ctid AS place, a.posted_nusd, a.held_nusd, a.entry_count, a.low_nusd, a.notice_mark_nusd,
               k.key_window_start, k.ancestor_ids, k.is_wide, k.ancestor_starts,
               h.place AS hold_place, h.state, h.amount_nusd, h.window_start AS hold_window_start,
               CASE WHEN h.request_hash <> u.request_hash OR (h.id IS NULL AND e.is_there AND u.request_hash IS NOT NULL) THEN 'reuse'
                    WHEN e.is_there THEN 'repeat' ELSE 'charged' END AS verdict
        FROM unnest(p_account_id, p_key_id, p_hold_id, p_request_hash, p_window_start, p_charge_id, p_cost_nusd, p_at_least_hold, v_admitted, v_new)
             WITH ORDINALITY u (account_id, told_key_id, hold_id, request_hash, ticket_window_start, charge_id, told_nusd, at_least_hold,
                                is_admitted, is_new, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN LATERAL (
            SELECT h.*, h.ctid AS place FROM hold h
            WHERE u.is_new IS NOT TRUE AND h.account_id = u.account_id AND h.id = u.hold_id LIMIT 1
        ) h ON true
        LEFT JOIN LATERAL (
            SELECT meter_window(k, v_now) AS key_window_start, k.ancestor_ids, k.ancestor_ids IS NOT NULL OR k.more_limits_nusd IS NOT NULL AS is_wide,
                   CASE WHEN k.ancestor_ids IS NOT NULL THEN meter_starts_above(k, v_now) END AS ancestor_starts
            FROM api_key k WHERE k.account_id = u.account_id AND k.id = coalesce(h.key_id, u.told_key_id) LIMIT 1
        ) k ON true
        LEFT JOIN LATERAL (
            SELECT true AS is_there FROM entry e
            WHERE u.is_new IS NOT TRUE AND h.state IS DISTINCT FROM 'open' AND (h.id IS NOT NULL OR u.request_hash IS NULL OR u.is_admitted OR p_wait)
                  AND e.reference = u.hold_id::text AND e.kind = 'usage' AND e.account_id IS NOT DISTINCT FROM u.account_id
            LIMIT 1
        ) e ON true
        WHERE (v_all OR u.account_id = ANY (v_locked)) AND u.is_admitted IS DISTINCT FROM false
    ),
    charged AS MATERIALIZED (
        SELECT u.item, u.account_id, u.hold_id, u.request_hash, u.charge_id, u.is_admitted, u.key_id, u.cost_nusd, u.place, u.low_nusd,
               u.notice_mark_nusd, u.key_window_start, u.ancestor_ids, u.is_wide, u.ancestor_starts, u.hold_place, u.verdict, f.freed_nusd,
               coalesce(u.hold_window_start, u.ticket_window_start,
                        CASE WHEN u.is_wide THEN greatest(u.key_window_start, v_now) ELSE u.key_window_start END) AS window_start,
               concat_ws(',', CASE WHEN u.hold_place IS NULL AND u.ticket_window_start IS NULL AND u.is_admitted IS NULL THEN 'no_hold'
                                   WHEN u.hold_place IS NULL AND u.is_admitted IS NULL THEN 'hold_missing'
                                   WHEN u.state <> 'open' THEN 'late' END,
                         CASE WHEN u.cost_nusd > u.amount_nusd THEN 'above_hold' END, p_flags[u.item]) AS flags,
               (u.posted_nusd - sum(u.cost_nusd) OVER earlier)::bigint AS balance_after_nusd,
               (u.held_nusd - sum(f.freed_nusd) OVER earlier)::bigint AS held_after_nusd,
               u.entry_count + row_number() OVER earlier AS entry_id
        FROM asked u, LATERAL (SELECT CASE WHEN u.state = 'open' THEN u.amount_nusd ELSE 0 END AS freed_nusd) f
        WHERE u.verdict = 'charged'
        WINDOW earlier AS (PARTITION BY u.place ORDER BY u.item ROWS UNBOUNDED PRECEDING)
    ),
    hold_after AS (
        UPDATE hold h SET state = 'settled', closed_at = now() FROM charged c WHERE c.hold_place IS NOT NULL AND h.ctid = c.hold_place
    ),
    held AS (
        INSERT INTO hold (account_id, id, service, request_id, request_hash, key_id, window_start, amount_nusd, state, model, endpoint,
                          price_version, expires_at, closed_at)
        SELECT account_id, hold_id, p_service[item], p_request_id[item], request_hash, key_id, window_start, 0, 'settled', p_model[item],
               p_endpoint[item], p_price_version[item], now(), now()
        FROM charged WHERE request_hash IS NOT NULL
    ),
    account_after AS (
        UPDATE account a SET posted_nusd = a.posted_nusd - d.cost_nusd, held_nusd = a.held_nusd - d.freed_nusd,
               entry_count = a.entry_count + d.count, updated_at = now(),
               notice_mark_nusd = CASE WHEN a.posted_nusd - d.cost_nusd < a.notice_mark_nusd
                   THEN meter_mark(a.notice_base_nusd, a.low_balance_nusd, a.floor_nusd, a.posted_nusd - d.cost_nusd) ELSE a.notice_mark_nusd END
        FROM (SELECT place, sum(cost_nusd)::bigint AS cost_nusd, sum(freed_nusd)::bigint AS freed_nusd, count(*) AS count
              FROM charged GROUP BY 1) d
        WHERE a.ctid = d.place
    ),
    key_after AS (
        UPDATE api_key k SET held_nusd = k.held_nusd - d.freed_nusd, lifetime_nusd = k.lifetime_nusd + d.own_cost_nusd,
               window_start = meter_window(k, v_now), window_usage_nusd = meter_spent(k, v_now) + d.window_cost_nusd,
               more_starts = CASE WHEN k.more_limits_nusd IS NOT NULL THEN meter_more_starts(k, v_now) END,
               more_usage_nusd = CASE WHEN k.more_limits_nusd IS NOT NULL THEN meter_more_spent(k, v_now, d.costs_nusd, d.begun) END,
               minute_start = CASE WHEN k.requests_per_minute IS NOT NULL THEN date_trunc('minute', now()) END,
               minute_calls = CASE WHEN k.requests_per_minute IS NOT NULL THEN meter_calls(k) + d.calls END
        FROM (SELECT account_id, key_id, sum(freed_nusd)::bigint AS freed_nusd, sum(own_cost_nusd)::bigint AS own_cost_nusd,
                     count(is_admitted) AS calls,
                     coalesce(sum(cost_nusd) FILTER (WHERE window_start >= key_window_start), 0)::bigint AS window_cost_nusd,
                     array_agg(cost_nusd) FILTER (WHERE is_wide) AS costs_nusd, array_agg(window_start) FILTER (WHERE is_wide) AS begun
              FROM (SELECT account_id, key_id, freed_nusd, cost_nusd, cost_nusd AS own_cost_nusd, is_admitted, window_start,
                           key_window_start, is_wide FROM charged
                    UNION ALL
                    SELECT account_id, unnest(ancestor_ids), freed_nusd, cost_nusd, 0, is_admitted, window_start, unnest(ancestor_starts), true
                    FROM charged WHERE ancestor_ids IS NOT NULL) c
              GROUP BY 1, 2) d
        WHERE k.account_id = d.account_id AND k.id = d.key_id
    ),
    told AS (
        INSERT INTO notice (account_id, id, channel, type, data, next_at)
        SELECT t.account_id, t.id, way.channel, t.notice ->> 'type', t.notice -> 'data', now()
        FROM (SELECT c.account_id, gen_random_uuid() AS id,
                     meter_notice(a.notice_mark_nusd, a.notice_base_nusd, a.low_balance_nusd, a.floor_nusd, c.balance_nusd) AS notice
              FROM (SELECT account_id, place, min(balance_after_nusd) AS balance_nusd FROM charged
                    WHERE balance_after_nusd < notice_mark_nusd GROUP BY 1, 2) c
              JOIN account a ON a.ctid = c.place) t
        CROSS JOIN LATERAL meter_ways(t.account_id, t.notice ->> 'type') way
    ),
    posted AS (
        INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd, usage_id)
        SELECT account_id, entry_id, 'usage', hold_id::text, 'revenue:usage', -cost_nusd, balance_after_nusd, charge_id FROM charged
    ),
    used AS (
        INSERT INTO usage (account_id, id, hold_id, service, request_id, key_id, window_start, model, served_model, provider, endpoint,
                           outcome, upstream_id, upstream_model, cost_nusd, provider_cost_nusd, balance_after_nusd, held_after_nusd,
                           latency_ms, ttft_ms, units, price_version, lines, flags)
        SELECT account_id, charge_id, hold_id, p_service[item], p_request_id[item], key_id, window_start, p_model[item], p_served_model[item],
               p_provider[item], p_endpoint[item], p_outcome[item], p_upstream_id[item], p_upstream_model[item], cost_nusd,
               p_provider_cost_nusd[item], balance_after_nusd, held_after_nusd, p_latency_ms[item], p_ttft_ms[item], p_units[item]::jsonb,
               p_price_version[item], p_lines[item]::jsonb, flags
        FROM charged
    )
    SELECT item, verdict, NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::text,
           cost_nusd, balance_after_nusd, held_after_nusd, flags, coalesce(balance_after_nusd < low_nusd, false)
    FROM charged
    UNION ALL
    SELECT item, verdict, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, false FROM asked
    WHERE verdict <> 'charged';
END $$;


-- release: frees what is held for calls that were not made. Locks the accounts. A hold that captured something is left alone:
-- that money is spent. No state where there is no such hold.
CREATE OR REPLACE FUNCTION meter_release(
    p_lock uuid[], p_wait boolean, p_account_id uuid[], p_hold_id uuid[]
) RETURNS TABLE (item bigint, state text, captured_nusd bigint, posted_nusd bigint, held_nusd bigint) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    v_locked uuid[] := meter_lock(p_lock, p_wait);
    v_all boolean := cardinality(v_locked) = cardinality(p_lock);
BEGIN
    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT u.item, u.account_id, h.key_id, h.ctid AS hold_place, a.ctid AS place, h.state, h.captured_nusd, a.posted_nusd, a.held_nusd,
               CASE WHEN h.state = 'open' AND h.captured_nusd = 0 THEN h.amount_nusd END AS freed_nusd,
               (SELECT k.ancestor_ids FROM api_key k WHERE k.account_id = h.account_id AND k.id = h.key_id) AS ancestor_ids
        FROM unnest(p_account_id, p_hold_id) WITH ORDINALITY u (account_id, hold_id, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN hold h ON h.account_id = u.account_id AND h.id = u.hold_id
        WHERE v_all OR u.account_id = ANY (v_locked)
    ),
    hold_after AS (
        UPDATE hold h SET state = 'released', closed_at = now()
        FROM asked q WHERE h.ctid = q.hold_place AND q.freed_nusd IS NOT NULL
    ),
    key_after AS (
        UPDATE api_key k SET held_nusd = k.held_nusd - q.freed_nusd
        FROM (SELECT account_id, key_id, sum(freed_nusd)::bigint AS freed_nusd
              FROM (SELECT account_id, key_id, freed_nusd FROM asked
                    UNION ALL SELECT account_id, unnest(ancestor_ids), freed_nusd FROM asked WHERE ancestor_ids IS NOT NULL) c
              GROUP BY 1, 2) q
        WHERE k.account_id = q.account_id AND k.id = q.key_id AND q.freed_nusd > 0
    ),
    account_after AS (
        UPDATE account a SET held_nusd = a.held_nusd - q.freed_nusd
        FROM (SELECT place, sum(freed_nusd)::bigint AS freed_nusd FROM asked GROUP BY 1) q WHERE a.ctid = q.place AND q.freed_nusd > 0
    )
    SELECT item, state, captured_nusd, posted_nusd,
           (held_nusd - coalesce(sum(freed_nusd) OVER (PARTITION BY place ORDER BY item ROWS UNBOUNDED PRECEDING), 0))::bigint
    FROM asked;
END $$;


-- extend: keeps open holds for ttl_seconds from now at least, and lets them grow to captured_nusd, what their calls have cost
-- so far: that money is spent, whether or not there is more. Locks the accounts. No state where there is no such hold.
CREATE OR REPLACE FUNCTION meter_extend(
    p_lock uuid[], p_wait boolean, p_account_id uuid[], p_hold_id uuid[], p_ttl_seconds bigint[], p_captured_nusd bigint[]
) RETURNS TABLE (
    item bigint, state text, amount_nusd bigint, expires_at timestamptz, posted_nusd bigint, held_nusd bigint, floor_nusd bigint
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    v_locked uuid[] := meter_lock(p_lock, p_wait);
    v_all boolean := cardinality(v_locked) = cardinality(p_lock);
BEGIN
    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT u.item, u.account_id, u.captured_nusd, h.key_id, h.ctid AS hold_place, a.ctid AS place, h.state, a.posted_nusd, a.held_nusd,
               a.floor_nusd, h.amount_nusd, greatest(h.expires_at, now() + make_interval(secs => u.ttl_seconds)) AS expires_at,
               CASE WHEN h.state = 'open' THEN greatest(0, u.captured_nusd - h.amount_nusd) ELSE 0 END AS more_nusd,
               (SELECT k.ancestor_ids FROM api_key k WHERE k.account_id = h.account_id AND k.id = h.key_id) AS ancestor_ids
        FROM unnest(p_account_id, p_hold_id, p_ttl_seconds, p_captured_nusd)
             WITH ORDINALITY u (account_id, hold_id, ttl_seconds, captured_nusd, item)
        JOIN account a ON a.id = u.account_id
        LEFT JOIN hold h ON h.account_id = u.account_id AND h.id = u.hold_id
        WHERE v_all OR u.account_id = ANY (v_locked)
    ),
    hold_after AS (
        UPDATE hold h SET amount_nusd = h.amount_nusd + q.more_nusd, captured_nusd = greatest(h.captured_nusd, q.captured_nusd),
               expires_at = q.expires_at
        FROM asked q WHERE h.ctid = q.hold_place AND q.state = 'open'
    ),
    key_after AS (
        UPDATE api_key k SET held_nusd = k.held_nusd + q.more_nusd
        FROM (SELECT account_id, key_id, sum(more_nusd)::bigint AS more_nusd
              FROM (SELECT account_id, key_id, more_nusd FROM asked
                    UNION ALL SELECT account_id, unnest(ancestor_ids), more_nusd FROM asked WHERE ancestor_ids IS NOT NULL) c
              GROUP BY 1, 2) q
        WHERE k.account_id = q.account_id AND k.id = q.key_id AND q.more_nusd > 0
    ),
    account_after AS (
        UPDATE account a SET held_nusd = a.held_nusd + q.more_nusd
        FROM (SELECT place, sum(more_nusd)::bigint AS more_nusd FROM asked GROUP BY 1) q WHERE a.ctid = q.place AND q.more_nusd > 0
    )
    SELECT item, state, amount_nusd + more_nusd, expires_at, posted_nusd,
           (held_nusd + sum(more_nusd) OVER (PARTITION BY place ORDER BY item ROWS UNBOUNDED PRECEDING))::bigint, floor_nusd
    FROM asked;
END $$;


-- expire: closes the holds of these accounts that nobody settled in time. Locks the accounts. What was captured is charged, or
-- all that was held where its proxy wants that, at most as many as p_charge_id has ids for the charges; the rest is freed.
-- A settle that comes later still charges, unless something was charged here.
CREATE OR REPLACE FUNCTION meter_expire(p_lock uuid[], p_wait boolean, p_charge_id uuid[]) RETURNS TABLE (freed bigint, charged bigint)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    v_locked uuid[] := meter_lock(p_lock, p_wait);
    v_account_id uuid[];
    v_key_id uuid[];
    v_hold_id uuid[];
    v_service text[];
    v_request_id text[];
    v_cost_nusd bigint[];
    v_outcome text[];
    v_model text[];
    v_endpoint text[];
    v_flags text[];
BEGIN
    SELECT array_agg(h.account_id), array_agg(h.key_id), array_agg(h.id), array_agg(h.service), array_agg(h.request_id),
           array_agg(CASE h.on_expiry WHEN 'hold' THEN h.amount_nusd ELSE h.captured_nusd END), array_agg('partial'::text),
           array_agg(h.model), array_agg(h.endpoint), array_agg(CASE h.on_expiry WHEN 'hold' THEN 'hold_expired' ELSE 'captured' END)
    INTO v_account_id, v_key_id, v_hold_id, v_service, v_request_id, v_cost_nusd, v_outcome, v_model, v_endpoint, v_flags
    FROM (SELECT * FROM hold
          WHERE account_id = ANY (v_locked) AND state = 'open' AND expires_at < now()
                AND (on_expiry = 'hold' OR (on_expiry = 'captured' AND captured_nusd > 0))
          ORDER BY expires_at, id LIMIT cardinality(p_charge_id)) h;
    charged := coalesce(cardinality(v_hold_id), 0);
    IF charged > 0 THEN
        PERFORM FROM meter_charge(v_locked, true, v_account_id, v_key_id, v_hold_id, v_service, v_request_id, NULL, NULL, NULL, NULL,
                                  p_charge_id[:charged::int], v_cost_nusd, NULL, v_outcome, v_model, NULL, NULL, v_endpoint, NULL, NULL, NULL,
                                  NULL, NULL, NULL, NULL, NULL, v_flags);
    END IF;

    WITH due AS MATERIALIZED (
        SELECT account_id, id, key_id, amount_nusd,
               (SELECT k.ancestor_ids FROM api_key k WHERE k.account_id = hold.account_id AND k.id = hold.key_id) AS ancestor_ids
        FROM hold
        WHERE account_id = ANY (v_locked) AND state = 'open' AND expires_at < now()
              AND (on_expiry = 'release' OR (on_expiry = 'captured' AND captured_nusd = 0))
    ),
    hold_after AS (
        UPDATE hold h SET state = 'expired', closed_at = now() FROM due d WHERE h.account_id = d.account_id AND h.id = d.id
    ),
    key_after AS (
        UPDATE api_key k SET held_nusd = k.held_nusd - d.freed_nusd
        FROM (SELECT account_id, key_id, sum(amount_nusd)::bigint AS freed_nusd
              FROM (SELECT account_id, key_id, amount_nusd FROM due
                    UNION ALL SELECT account_id, unnest(ancestor_ids), amount_nusd FROM due WHERE ancestor_ids IS NOT NULL) c
              GROUP BY 1, 2) d
        WHERE k.account_id = d.account_id AND k.id = d.key_id
    ),
    account_after AS (
        UPDATE account a SET held_nusd = a.held_nusd - d.freed_nusd
        FROM (SELECT account_id, sum(amount_nusd)::bigint AS freed_nusd FROM due GROUP BY 1) d WHERE a.id = d.account_id
    )
    SELECT count(*) INTO freed FROM due;
    RETURN NEXT;
END $$;


-- Makes the partitions of `usage` that are not there yet, and returns how many it made: of this month and p_ahead more, or by day
-- of today and p_ahead more. The runtime role may own no table, so it makes them as their owner does, and only these.
-- What stood in the default partition moves to where it belongs: a call whose partition came too late is not lost.
-- A month that has a partition stays whole, and one of which a day has its own goes on by days: so either may follow the other at
-- any moment. By day, months to come that nothing is in yet give way. Nobody is kept waiting for long: what cannot be locked within
-- half a second is left for the next time.
-- Where accounts are sharded (Citus), calls are written beside each shard, where LOCK does not reach and a table that has rows of the
-- default partition's is refused. There the default partition is taken off while its calls move, which locks each shard's `usage`, and
-- moves each call within its shard; all nodes commit that together, or none.
CREATE OR REPLACE FUNCTION make_usage_partitions(p_ahead int, p_by_day boolean DEFAULT false, p_now timestamptz DEFAULT now()) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    made int := 0;
    v_last timestamptz := date_trunc('day', p_now) + make_interval(days => p_ahead);
    v_empty text;
    v_is_used boolean;
    v_is_locked boolean := false;
    v_is_sharded boolean := false;
    v_is_off boolean := false;
    v_name text;
    v_day timestamptz;
    v_first timestamptz;
    v_step interval;
    v_first_id uuid;
    v_end_id uuid;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('make_usage_partitions'));
    IF to_regclass('pg_dist_partition') IS NOT NULL THEN
        SELECT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = 'usage'::regclass) INTO v_is_sharded;
    END IF;
    SET LOCAL citus.multi_shard_modify_mode = 'sequential';  -- one connection to each node, so that its locks are not in its own way
    SET LOCAL citus.propagate_set_commands = 'local';
    SET LOCAL lock_timeout = '500ms';

    IF NOT p_by_day THEN
        v_last := date_trunc('month', p_now) + make_interval(months => p_ahead + 1) - interval '1 day';
    END IF;
    FOR v_empty IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE p_by_day AND i.inhparent = 'usage'::regclass AND c.relname ~ '^usage_[0-9]{4}_[0-9]{2}$' AND to_date(right(c.relname, 7), 'YYYY_MM') > p_now
    LOOP
        EXECUTE format('SELECT EXISTS (SELECT 1 FROM %I)', v_empty) INTO v_is_used;
        CONTINUE WHEN v_is_used;
        BEGIN
            IF v_is_sharded THEN
                EXECUTE format('ALTER TABLE usage DETACH PARTITION %I', v_empty);
            ELSE
                LOCK TABLE ONLY usage IN ACCESS EXCLUSIVE MODE;
                EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', v_empty);
            END IF;
            EXECUTE format('SELECT EXISTS (SELECT 1 FROM %I)', v_empty) INTO v_is_used;
            IF v_is_used AND v_is_sharded THEN
                RAISE lock_not_available;  -- a call came in just now: the partition is put back, and stays
            ELSIF NOT v_is_used THEN
                EXECUTE format('DROP TABLE %I', v_empty);
            END IF;
            v_is_locked := true;
        EXCEPTION WHEN lock_not_available THEN
            EXIT;
        END;
    END LOOP;

    FOR v_day IN
        SELECT generate_series(date_trunc('day', p_now), v_last, interval '1 day') AS day
        UNION SELECT DISTINCT date_trunc('day', to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0))
              FROM usage_default WHERE substr(id::text, 15, 1) = '7'
        ORDER BY day
    LOOP
        v_name := 'usage_' || to_char(v_day, 'YYYY_MM');
        v_first := date_trunc('month', v_day);
        v_step := '1 month';
        CONTINUE WHEN to_regclass('public.' || v_name) IS NOT NULL;
        IF p_by_day OR EXISTS (SELECT FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
                               WHERE i.inhparent = 'usage'::regclass AND starts_with(c.relname, v_name || '_')) THEN
            v_name := 'usage_' || to_char(v_day, 'YYYY_MM_DD');
            v_first := v_day;
            v_step := '1 day';
            CONTINUE WHEN to_regclass('public.' || v_name) IS NOT NULL;
        END IF;
        v_first_id := rpad(lpad(to_hex((extract(epoch FROM v_first) * 1000)::bigint), 12, '0'), 32, '0')::uuid;
        v_end_id := rpad(lpad(to_hex((extract(epoch FROM v_first + v_step) * 1000)::bigint), 12, '0'), 32, '0')::uuid;
        IF v_is_sharded AND NOT v_is_off THEN
            SELECT EXISTS (SELECT 1 FROM usage_default WHERE id >= v_first_id AND id < v_end_id) INTO v_is_off;
            IF v_is_off THEN
                ALTER TABLE usage DETACH PARTITION usage_default;
            END IF;
        ELSIF NOT v_is_sharded AND NOT v_is_locked AND v_first + v_step > p_now THEN
            SELECT EXISTS (SELECT 1 FROM usage_default WHERE id >= v_first_id AND id < v_end_id) INTO v_is_locked;
            IF v_is_locked THEN  -- calls of now come in there: they wait at the door, and find the new partition behind it
                LOCK TABLE ONLY usage IN ACCESS EXCLUSIVE MODE;
            END IF;
        END IF;
        EXECUTE format('CREATE TABLE %I (LIKE usage INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', v_name);
        IF NOT v_is_sharded THEN
            EXECUTE format('WITH moved AS (DELETE FROM usage_default WHERE id >= %L AND id < %L RETURNING *) INSERT INTO %I SELECT * FROM moved',
                           v_first_id, v_end_id, v_name);
        END IF;
        EXECUTE format('ALTER TABLE usage ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', v_name, v_first_id, v_end_id);
        IF v_is_off THEN
            EXECUTE format('INSERT INTO %I SELECT * FROM usage_default WHERE id >= %L AND id < %L', v_name, v_first_id, v_end_id);
            EXECUTE format('DELETE FROM usage_default WHERE id >= %L AND id < %L', v_first_id, v_end_id);
        END IF;
        made := made + 1;
    END LOOP;
    IF v_is_off THEN
        ALTER TABLE usage ATTACH PARTITION usage_default DEFAULT;
    END IF;
    RETURN made;
END $$;
