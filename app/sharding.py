"""A database that Citus shards by account: which tables are where, and the metering functions where each account is.

A table whose primary key begins with `account_id` is distributed by it, and `account` by its id; so one shard has all of an account.
Every other table is small, or a look-up by a value, and stays whole on the coordinator. The metering functions are the same text as
on one server: beside each shard stands a schema whose views have the tables' names, and in it the functions are installed once
more. A call is delegated to the worker by the account's id, and what its function reads and writes there are plain tables.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from app.kernel.db import COMMITTED_TOGETHER, RUNTIME_ROLE
from app.kernel.shards import IN_SHARD, ON_SHARDS_HERE
from app.metering.functions import BY_ACCOUNT, FUNCTIONS, OF_ACCOUNT, Function

_DISTRIBUTED: Final[LiteralString] = """
SELECT c.oid::regclass::text AS name FROM pg_class c
JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
WHERE c.relnamespace = 'public'::regnamespace AND NOT c.relispartition AND (a.attname = 'account_id' OR c.relname = 'account')
      AND NOT EXISTS (SELECT FROM pg_dist_partition d WHERE d.logicalrelid = c.oid)
ORDER BY c.relname <> 'account',
         EXISTS (SELECT FROM pg_constraint f WHERE f.conrelid = c.oid AND f.contype = 'f' AND f.confrelid <> 'account'::regclass), c.relname
"""
"""What is not distributed yet, and those first that others refer to."""

_COPIED: Final = ("usage_archive",)
"""Written by the operator's commands alone, and read beside the tables of accounts: each node has all of it."""

_PLACES: Final[LiteralString] = """
SELECT a.shardid AS number, n.nodename AS host, n.nodeport AS port,
       jsonb_object_agg(c.relname, s.shardid ORDER BY c.relname) AS tables, (SELECT version_num FROM alembic_version) AS revision
FROM pg_dist_shard a JOIN pg_dist_placement p USING (shardid) JOIN pg_dist_node n USING (groupid)
JOIN pg_dist_partition d ON d.logicalrelid = 'public.account'::regclass
JOIN pg_dist_partition o ON o.colocationid = d.colocationid OR o.repmodel = 't'  -- a table that each node has all of is one shard
JOIN pg_class c ON c.oid = o.logicalrelid AND NOT c.relispartition AND c.relnamespace = 'public'::regnamespace
JOIN pg_dist_shard s ON s.logicalrelid = c.oid AND coalesce(s.shardminvalue, a.shardminvalue) = a.shardminvalue
WHERE a.logicalrelid = d.logicalrelid AND n.noderole = 'primary'
GROUP BY 1, 2, 3 ORDER BY 1
"""

_INSTALLED: Final[LiteralString] = """
SELECT coalesce(jsonb_object_agg(n.nspname, obj_description(n.oid, 'pg_namespace') || ' ' ||
                (SELECT count(*) FROM pg_class v WHERE v.relnamespace = n.oid AND v.relkind = 'v')), '{}')
FROM pg_namespace n WHERE n.nspname ~ '^shard_[0-9]+$'
"""
"""Of a node: what stands beside its shards. Views go with the shard that they are of, when that is moved."""

_SHARD_HERE_BODY: Final = """
DECLARE
    v_shard bigint := get_shard_id_for_distribution_column('public.account', p_account);
BEGIN
    IF EXISTS (SELECT FROM unnest(p_beside) id WHERE get_shard_id_for_distribution_column('public.account', id) <> v_shard) THEN
        RAISE EXCEPTION 'these accounts are not all in one shard' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM lock_shard_metadata(5, ARRAY[v_shard]);
    IF NOT EXISTS (SELECT FROM pg_dist_placement JOIN pg_dist_local_group USING (groupid) WHERE shardid = v_shard) THEN
        RAISE EXCEPTION 'shard % is on another node by now', v_shard USING ERRCODE = 'serialization_failure';
    END IF;
    IF to_regnamespace('shard_' || v_shard) IS NULL THEN
        RAISE EXCEPTION 'shard % came here since the last `satmeter migrate`: run it again', v_shard USING ERRCODE = 'cannot_connect_now';
    END IF;
    RETURN 'shard_' || v_shard;
END """
_SHARD_HERE: Final = Function(
    f"{BY_ACCOUNT}.shard_here",
    f"CREATE OR REPLACE FUNCTION {BY_ACCOUNT}.shard_here(p_account uuid, p_beside uuid[]) RETURNS text\n"
    f"LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $${_SHARD_HERE_BODY}$$;",
    _SHARD_HERE_BODY,
    {"account": "uuid", "beside": "uuid[]"},
    {},
)
"""The schema of an account's shard, which has those beside it too, and which is not moved until the transaction ends: Citus's own writers take the same ShareLock."""


_ON_SHARDS_HERE_BODY: Final = """
DECLARE
    v_schema text;
    v_found jsonb;
    v_all jsonb := '[]';
BEGIN
    FOR v_schema IN
        SELECT 'shard_' || s.shardid FROM pg_dist_shard s JOIN pg_dist_placement USING (shardid) JOIN pg_dist_local_group USING (groupid)
        WHERE s.logicalrelid = 'public.account'::regclass
    LOOP
        PERFORM set_config('search_path', v_schema || ', pg_temp', true);
        EXECUTE format('SELECT coalesce(jsonb_agg(q), ''[]'') FROM (%s) q', p_question) INTO v_found;
        v_all := v_all || v_found;
    END LOOP;
    RETURN v_all;
END """
_ON_SHARDS_HERE: Final = Function(
    ON_SHARDS_HERE,
    f"CREATE OR REPLACE FUNCTION {ON_SHARDS_HERE}(p_question text) RETURNS jsonb\nLANGUAGE plpgsql AS $${_ON_SHARDS_HERE_BODY}$$;",
    _ON_SHARDS_HERE_BODY,
    {"question": "text"},
    {},
)
"""The rows that a SELECT finds in each shard of this node, with the rights of who asks."""


_IN_SHARD_BODY: Final = f"""
DECLARE
    v_before text := current_setting('search_path');
    v_found record;
BEGIN
    PERFORM set_config('search_path', {BY_ACCOUNT}.shard_here(p_account, p_beside) || ', pg_temp', true);
    FOR v_found IN EXECUTE p_statement LOOP
        RETURN NEXT to_jsonb(v_found);
    END LOOP;
    PERFORM set_config('search_path', v_before, true);
END """
_IN_SHARD: Final = Function(
    IN_SHARD,
    f"CREATE OR REPLACE FUNCTION {IN_SHARD}(p_account uuid, p_beside uuid[], p_statement text) RETURNS SETOF jsonb\n"
    f"LANGUAGE plpgsql AS $${_IN_SHARD_BODY}$$;",
    _IN_SHARD_BODY,
    {"account": "uuid", "beside": "uuid[]", "statement": "text"},
    {},
)
"""The rows of a statement over accounts of one shard, with the rights of who asks."""


_NOTHING: Final = f"{BY_ACCOUNT}.nothing"
_COMMITTED_TOGETHER_BODY: Final = f"""
BEGIN
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        DELETE FROM {_NOTHING} WHERE id = 0;
    END IF;
END """
_COMMITTED_TOGETHER: Final = Function(
    COMMITTED_TOGETHER,
    f"CREATE OR REPLACE FUNCTION {COMMITTED_TOGETHER}() RETURNS void\n"
    f"LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $${_COMMITTED_TOGETHER_BODY}$$;",
    _COMMITTED_TOGETHER_BODY,
    {},
    {},
)
"""Asked before the commit of whatever wrote. A worker that is the only one with changes is told to commit before the coordinator
commits its own tables, of which Citus knows nothing; who dies in between leaves one half. A change to a table of the coordinator's
that Citus knows, be it to no row, has all of them prepare first."""


class ShardingError(Exception):
    """The database cannot be sharded, or its shards are not this code's; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Place:
    """A shard of `account` with those beside it, and the node that has it."""

    number: int
    host: str
    port: int
    tables: Mapping[str, int]
    """By the name of a table, the number of its shard there."""
    revision: str
    """The migration that the tables are at."""

    @property
    def schema(self) -> str:
        return f"shard_{self.number}"

    @property
    def fingerprint(self) -> str:
        """Of all that is installed in its schema but for the shards' numbers."""
        text = "".join([self.revision, *sorted(self.tables), *(function.fingerprint for function in _metering())])
        return hashlib.sha256(text.encode()).hexdigest()

    def installed(self) -> str:
        """The statements that make its schema anew, in one transaction."""
        return ";\n".join([
            "BEGIN",
            "SET LOCAL citus.enable_ddl_propagation = off",  # else Citus would have the coordinator make it on every node
            "SET LOCAL client_min_messages = warning",
            f"DROP SCHEMA IF EXISTS {self.schema} CASCADE",
            f"CREATE SCHEMA {self.schema}",
            f"COMMENT ON SCHEMA {self.schema} IS '{self.fingerprint}'",
            f"GRANT USAGE ON SCHEMA {self.schema} TO {RUNTIME_ROLE}",
            f"SET LOCAL search_path = {self.schema}, pg_temp",
            *(self._view(name, shard) for name, shard in self.tables.items()),
            *(function.text.rstrip(";") for function in _metering()),
            *(f"ALTER FUNCTION {name} SET search_path = {self.schema}, pg_temp SET jit = off" for name in OF_ACCOUNT),
            "COMMIT",
        ])  # fmt: skip

    def _view(self, name: str, shard: int) -> str:
        """Who asks has the rights of the shard's table, and no others."""
        return (
            f'CREATE VIEW "{name}" WITH (security_invoker) AS SELECT *, ctid FROM public."{name}_{shard}";\n'
            f'GRANT SELECT, INSERT, UPDATE, DELETE ON "{name}" TO {RUNTIME_ROLE}'
        )


def is_sharded(conn: psycopg.Connection[Any]) -> bool:
    """Whether accounts are distributed here."""
    if not _has_citus(conn):
        return False
    found = conn.execute(
        "SELECT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = to_regclass('public.account'))"
    )
    return found.fetchone() == (True,)


def distribute(conn: psycopg.Connection[Any]) -> list[str]:
    """Distribute every table of accounts that is not yet, and return their names. `conn` is the owner's, and commits each.

    Raises ShardingError where there is no Citus, no worker, or not the right.
    """
    if not _has_citus(conn):
        raise ShardingError(
            "the database has no Citus: as a superuser, on the coordinator and every worker, CREATE EXTENSION citus;"
            " and on the coordinator citus_set_coordinator_host and citus_add_node for each worker"
        )
    if conn.execute("SELECT EXISTS (SELECT FROM pg_dist_node WHERE shouldhaveshards AND isactive)").fetchone() == (
        False,
    ):
        raise ShardingError("no node of this Citus takes shards: citus_add_node(host, port) for each worker")
    _let_nodes_be_the_service(conn)
    names = [name for (name,) in conn.execute(_DISTRIBUTED).fetchall()]
    for name in names:
        column, beside = ("id", "none") if name == "account" else ("account_id", "account")
        conn.execute("SELECT create_distributed_table(%s, %s, colocate_with => %s)", [name, column, beside])
    # A new row is written to its shard with every column, the defaults too; whose floor is not its act's is the audit's to find.
    conn.execute(sql.SQL("GRANT INSERT ON account TO {}").format(sql.Identifier(RUNTIME_ROLE)))
    for name in _COPIED:
        if conn.execute(
            "SELECT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = %s::regclass)", [name]
        ).fetchone() == (False,):
            conn.execute("SELECT create_reference_table(%s)", [name])
            names.append(name)
    return names


def wrappers() -> list[Function]:
    """What stands in place of the wrappers by account: each asks the function beside the account's shard."""
    return [_SHARD_HERE, _ON_SHARDS_HERE, _IN_SHARD, _COMMITTED_TOGETHER, *map(_delegated, OF_ACCOUNT.values())]


def delegate(conn: psycopg.Connection[Any]) -> None:
    """Have the wrappers run on the worker of the account that comes first, also within a transaction of more; and make the table that
    `committed_together` changes."""
    for function in (_IN_SHARD, *OF_ACCOUNT.values()):
        conn.execute(
            "SELECT create_distributed_function(%s::regproc::regprocedure, 'p_account', 'public.account', true)",
            [function.name],
        )
    conn.execute(f"CREATE TABLE IF NOT EXISTS {_NOTHING} (id int)".encode())
    conn.execute(
        """SELECT citus_add_local_table_to_metadata(c) FROM to_regclass(%s) c
           WHERE NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = c)""",
        [_NOTHING],
    )


def install(conn: psycopg.Connection[Any]) -> int:
    """Make the schema beside every shard that is not as it must be, on the node that has it, and drop those of shards that went
    elsewhere. Returns how many were made.

    Raises ShardingError for the first node that refuses.
    """
    missing, left_over = _looked_over(conn)
    for place in missing:
        _run_on(conn, place.host, place.port, place.installed())
    for host, port, schema in left_over:
        _run_on(
            conn,
            host,
            port,
            f"BEGIN; SET LOCAL citus.enable_ddl_propagation = off; DROP SCHEMA {schema} CASCADE; COMMIT",
        )
    return len(missing)


def check(conn: psycopg.Connection[Any]) -> None:
    """Raises ShardingError unless each shard that can be reached has this code's functions beside it; changes nothing."""
    missing, _ = _looked_over(conn)
    if missing:
        names = ", ".join(place.schema for place in missing[:3])
        raise ShardingError(
            f"{len(missing)} shards do not have this code's functions beside them ({names}): run `python -m app migrate`"
        )


def _looked_over(conn: psycopg.Connection[Any]) -> tuple[list[Place], list[tuple[str, int, str]]]:
    """Of the nodes that can be reached: the places that are not as they must be, and the schemas of no place there."""
    places = [Place(*found) for found in conn.execute(_PLACES).fetchall()]
    nodes = conn.execute(
        "SELECT nodename, nodeport FROM pg_dist_node WHERE noderole = 'primary' AND isactive ORDER BY 1, 2"
    ).fetchall()
    found = conn.execute(
        "SELECT node_name, node_port, success, result FROM master_run_on_worker(%s::text[], %s::int[], %s::text[], true)",
        [[host for host, _ in nodes], [port for _, port in nodes], [_INSTALLED] * len(nodes)],
    ).fetchall()
    installed = {(host, port): json.loads(result) for host, port, success, result in found if success}
    here = [place for place in places if (place.host, place.port) in installed]
    missing = [
        place
        for place in here
        if installed[place.host, place.port].get(place.schema) != f"{place.fingerprint} {len(place.tables)}"
    ]
    wanted = {(place.host, place.port, place.schema) for place in here}
    left_over = [
        (*node, schema) for node, schemas in installed.items() for schema in schemas if (*node, schema) not in wanted
    ]
    return missing, left_over


def _run_on(conn: psycopg.Connection[Any], host: str, port: int, command: str) -> None:
    found = conn.execute(
        "SELECT success, result FROM master_run_on_worker(ARRAY[%s::text], ARRAY[%s::int], ARRAY[%s::text], false)",
        [host, port, command],
    ).fetchone()
    assert found is not None
    if not found[0]:
        raise ShardingError(f"the node {host}:{port} refused: {found[1]}")


def _has_citus(conn: psycopg.Connection[Any]) -> bool:
    return conn.execute("SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')").fetchone() == (True,)


def _let_nodes_be_the_service(conn: psycopg.Connection[Any]) -> None:
    """The coordinator connects to a worker as who asks it. Whom the workers let in so is what their pg_hba.conf says."""
    if conn.execute("SELECT rolcanlogin FROM pg_roles WHERE rolname = %s", [RUNTIME_ROLE]).fetchone() == (True,):
        return
    try:
        conn.execute(sql.SQL("ALTER ROLE {} LOGIN").format(sql.Identifier(RUNTIME_ROLE)))
    except psycopg.errors.InsufficientPrivilege as error:
        raise ShardingError(
            f"nodes connect to each other as {RUNTIME_ROLE}; as a superuser: ALTER ROLE {RUNTIME_ROLE} LOGIN"
        ) from error


def _metering() -> Iterable[Function]:
    return (function for function in FUNCTIONS.values() if function.name.startswith("meter_"))


def _delegated(function: Function) -> Function:
    inner = function.name.partition(".")[2]
    passed = ", ".join(f"${number}" for number in range(1, len(function.parameters)))
    using = ", ".join(f"p_{name}" for name in function.parameters if name != "account")
    beside = "p_lock" if "lock" in function.parameters else "NULL"
    body = (
        f"\nBEGIN\n    RETURN QUERY EXECUTE format('SELECT * FROM %I.{inner}({passed})', {BY_ACCOUNT}.shard_here(p_account, {beside}))"
        f"\n    USING {using};\nEND "
    )
    return Function(
        function.name, function.text.replace(function.body, body), body, function.parameters, function.columns
    )
