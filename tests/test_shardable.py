"""Our SQL stays what a database sharded by account (Citus) takes: read as text, for where none runs.

What each rule refuses was an error of Citus 14.0.1's, whose message stands with it. What is known to break a rule is listed by the file it is
in, and may only become less.
"""

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlmodel import SQLModel

from app.metering.functions import FUNCTIONS
from tests.program import ROOT

_APP = ROOT / "app"
for _tables in _APP.rglob("tables.py"):
    importlib.import_module(".".join(_tables.relative_to(ROOT).with_suffix("").parts))
_KEYS = {name: next(iter(table.primary_key.columns)).name for name, table in SQLModel.metadata.tables.items()}
SHARDED = {name for name, first in _KEYS.items() if first == "account_id"} | {"account"}
LOCAL = _KEYS.keys() - SHARDED - {"usage_archive"}
"""The coordinator's alone; of usage_archive each server has a copy."""
_STRANGERS = ("adapters", "sandbox", "client", "gateway")
_TIME = r"\b(now\(\)|current_timestamp|clock_timestamp\(\))"
_CHANGES = re.compile(r"\b(UPDATE\s+\w+|DELETE\s+FROM)\b")
_SQL = re.compile(r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM|WITH)\b.*\b(FROM|SET|VALUES|AS)\b", re.DOTALL)


def _returning(sql: str) -> bool:
    return any(re.search(_TIME, part) for part in re.split(r"\bRETURNING\b", sql)[1:])


def _conditional(sql: str) -> bool:
    """In a statement that changes rows that are there: CASE … END and coalesce( … ) with the time in it."""
    if not _CHANGES.search(sql):
        return False
    cases = re.findall(r"\bCASE\b.*?\bEND\b", sql, re.DOTALL)
    return any(re.search(_TIME, part) for part in [*cases, *_arguments(sql, "coalesce")])


def _arguments(sql: str, function: str) -> Iterator[str]:
    for found in re.finditer(rf"\b{function}\(", sql, re.IGNORECASE):
        depth, end = 1, found.end()
        while depth and end < len(sql):
            depth += {"(": 1, ")": -1}.get(sql[end], 0)
            end += 1
        yield sql[found.end() : end]


def _on_conflict(sql: str) -> bool:
    return any(re.search(_TIME, part.split("RETURNING")[0]) for part in re.split(r"\bDO\s+UPDATE\s+SET\b", sql)[1:])


def _several_columns(sql: str) -> bool:
    return re.search(r"\(\s*[\w.]+\s*,[\w.,\s]+\)\s+(NOT\s+)?IN\s*\(\s*SELECT", sql) is not None


def _locks_any(sql: str) -> bool:
    """FOR UPDATE and its kin, and no account named: `account_id = …` or the account's own `id = …`."""
    if not re.search(r"\bFOR\s+(NO\s+KEY\s+)?(UPDATE|SHARE|KEY\s+SHARE)\b", sql):
        return False
    return re.search(r"\b(account_id|id)\s*=\s*(:|%\(|\{|p_|CAST\(:)", sql) is None


# --- tables and the selects in them -----------------------------------------------------------------

_WORDS = "ON|WHERE|SET|USING|JOIN|LEFT|RIGHT|INNER|CROSS|FULL|ORDER|GROUP|LIMIT|FOR|UNION|VALUES|SELECT|RETURNING|HAVING|AND|OR|DO|DEFAULT"
_FROM = re.compile(
    rf"(?:\b(?:FROM|JOIN|UPDATE|INTO|USING)|,)\s+(?:ONLY\s+)?(?:public\.)?(\w+)(?:\s+(?:AS\s+)?(?!(?:{_WORDS})\b)(\w+))?"
)
_PARAMETER = r"(?:CAST\()?(?::|%\(|\{|p_)"
_OF_ONE_ACCOUNT = re.compile(rf"\b(?:account_id|account\.id|a\.id)\s*=\s*{_PARAMETER}")


def _tables_of(sql: str) -> list[tuple[str, str]]:
    """The tables of ours that it names, each with what it calls it."""
    return [(name, alias or name) for name, alias in _FROM.findall(sql) if name in _KEYS]


def _selects_in(sql: str) -> Iterator[tuple[str, str, str]]:
    """Each SELECT in parentheses, with what stands before and after it."""
    for found in re.finditer(r"\(\s*(?=SELECT\b|WITH\b)", sql):
        depth, end = 1, found.end()
        while depth and end < len(sql):
            depth += {"(": 1, ")": -1}.get(sql[end], 0)
            end += 1
        yield sql[: found.start()], sql[found.end() : end - 1], sql[end:]


def _outer_tables(before: str, part: str, after: str) -> set[str]:
    """The tables outside of a select that it speaks of."""
    within = {alias for _, alias in _tables_of(part)}
    return {
        name for name, alias in _tables_of(before + after) if alias not in within and re.search(rf"\b{alias}\.", part)
    }


def _whole_row(sql: str) -> bool:
    """Given to a function of ours: on a server the row is of its shard's type, and PostgreSQL's own take a row of any."""
    return any(
        re.search(rf"\b(?:{'|'.join(FUNCTIONS)})\((?:[^()]*,)?\s*{alias}\s*[,)]", sql)
        for name, alias in _tables_of(sql)
        if name in SHARDED
    )


def _sql_function(sql: str) -> bool:
    return re.search(r"\bLANGUAGE sql\b", sql) is not None and any(name in SHARDED for name, _ in _tables_of(sql))


def _local_exists(sql: str) -> bool:
    for before, part, after in _selects_in(sql):
        within, outside = {name for name, _ in _tables_of(part)}, _outer_tables(before, part, after)
        if re.search(r"\bEXISTS\s*$", before) and (
            (within & LOCAL and outside & SHARDED) or (within & SHARDED and outside & LOCAL)
        ):
            return True
    return False


def _lateral_limit(sql: str) -> bool:
    names = {name for name, _ in _tables_of(sql)}
    return bool(names & LOCAL and names & SHARDED) and any(
        re.search(r"\bLATERAL\s*$", before) and re.search(r"\bLIMIT\b", part) for before, part, _ in _selects_in(sql)
    )


def _not_routed(sql: str) -> bool:
    """In a statement of one account: a select of a sharded table that knows the account from the rows outside alone."""
    return _OF_ONE_ACCOUNT.search(sql) is not None and any(
        name in SHARDED
        and _outer_tables(before, part, after)
        and re.search(rf"\b{alias}\.(?:account_id|id)\s*=\s*\w+\.(?:account_id|id)\b", part)
        and not re.search(rf"\b(?:account_id|id)\s*=\s*{_PARAMETER}", part)
        for before, part, after in _selects_in(sql)
        for name, alias in _tables_of(part)
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """What is refused, in Citus's words, and which texts break it."""

    says: str
    breaks: Callable[[str], bool]
    of_one_server: frozenset[str] = frozenset()
    """Files in which a statement does so to a table that is no account's, and stays whole on the coordinator; or is run beside a shard."""
    of_functions: bool = False
    """Read in the functions that are installed, not in statements: those are run beside a shard, where the other rules are nobody's."""

    def reads(self) -> Iterator[tuple[str, str]]:
        return functions() if self.of_functions else texts()


RULES = {
    "time in RETURNING": Rule(
        "non-IMMUTABLE functions are not allowed in the RETURNING clause",
        _returning,
    ),
    "time in CASE or coalesce": Rule(
        "non-IMMUTABLE functions are not allowed in CASE or COALESCE",
        _conditional,
        of_one_server=frozenset({"audit/continuous.py"}),
    ),
    "time in ON CONFLICT": Rule(
        "functions used in the WHERE clause of ON CONFLICT must be IMMUTABLE",
        _on_conflict,
        of_one_server=frozenset({"admin/tokens.py", "audit/continuous.py", "kernel/figures.py"}),
    ),
    "several columns IN": Rule(
        "subquery has too many columns",
        _several_columns,
        of_one_server=frozenset({"kernel/ratelimit.py", "topups/inbox.py"}),
    ),
    "locks without an account": Rule(
        "could not run distributed query with FOR UPDATE/SHARE commands",
        _locks_any,
        of_one_server=frozenset({"activity/archive.py", "activity/rollup.py", "audit/putting_away.py"}),
    ),
    "a row as an argument": Rule(
        "function meter_window(api_key_102040, timestamp with time zone) does not exist",
        _whole_row,
    ),
    "a function in SQL": Rule(
        "could not create distributed plan. Possibly this is caused by the use of parameters in SQL functions",
        _sql_function,
        of_functions=True,
    ),
    "EXISTS over the coordinator's tables and a shard's": Rule(
        "direct joins between distributed and local tables are not supported",
        _local_exists,
    ),
    "LATERAL with LIMIT beside the coordinator's tables": Rule(
        "cannot push down this subquery: Limit clause is currently unsupported when a lateral subquery references a column from"
        " complex subqueries, CTEs or local tables",
        _lateral_limit,
    ),
    "an account known from outside alone": Rule(
        "could not run distributed query with FOR UPDATE/SHARE commands; without them all shards are asked for one account",
        _not_routed,
    ),
}


def texts() -> Iterator[tuple[str, str]]:
    """Every text of ours that is SQL, with its file. What an f-string puts in stands as `{}`."""
    for path in sorted(_APP.rglob("*.py")):
        name = str(path.relative_to(_APP))
        if not name.startswith(_STRANGERS):
            yield from ((name, text) for text in _of(path) if _SQL.search(text))


def functions() -> Iterator[tuple[str, str]]:
    """Every function that `migrate` installs, with its name."""
    yield from ((name, function.text) for name, function in FUNCTIONS.items())


def _of(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


@pytest.mark.parametrize("name", RULES)
def test_no_statement_is_what_a_sharded_database_refuses(name: str) -> None:
    rule = RULES[name]
    breaking = {file: text for file, text in rule.reads() if rule.breaks(text)}
    known = rule.of_one_server
    assert breaking.keys() <= known, {file: breaking[file] for file in breaking.keys() - known}
    assert known <= breaking.keys(), f"no longer so, take it off the list: {known - breaking.keys()}"


@pytest.mark.parametrize(
    ("name", "sql"),
    [
        (
            "time in RETURNING",
            "UPDATE rate_count SET count = 1 RETURNING extract(epoch FROM window_start - now()) AS s",
        ),
        ("time in CASE or coalesce", "UPDATE topup SET settled_at = coalesce(settled_at, now()) WHERE id = :id"),
        ("time in CASE or coalesce", "UPDATE topup SET a = CASE WHEN b THEN now() END WHERE id = :id"),
        ("time in ON CONFLICT", "INSERT INTO i (k) VALUES (1) ON CONFLICT (k) DO UPDATE SET t = 1 WHERE i.t < now()"),
        ("several columns IN", "UPDATE t SET a = 1 WHERE (account_id, id) IN (SELECT account_id, id FROM t LIMIT 5)"),
        ("locks without an account", "SELECT id FROM hold WHERE state = 'open' FOR UPDATE SKIP LOCKED"),
        ("a row as an argument", "SELECT k.id, meter_window(k, now()) FROM api_key k WHERE k.account_id = :account_id"),
        ("a row as an argument", "SELECT meter_spent(k) FROM account a, api_key k WHERE k.account_id = a.id"),
        ("a row as an argument", "SELECT a.id, meter_ways(a.id, e) FROM account a JOIN entry e ON e.account_id = a.id"),
        (
            "a function in SQL",
            "CREATE FUNCTION f(p_account uuid) RETURNS int LANGUAGE sql AS $$ SELECT 1 FROM hold WHERE account_id = p_account $$",
        ),
        (
            "EXISTS over the coordinator's tables and a shard's",
            "SELECT a.id FROM account a WHERE NOT EXISTS (SELECT 1 FROM credential c WHERE c.account_id = a.id)",
        ),
        (
            "EXISTS over the coordinator's tables and a shard's",
            "SELECT c.key_id FROM credential c WHERE EXISTS (SELECT FROM api_key k WHERE k.account_id = c.account_id AND k.id = c.key_id)",
        ),
        (
            "LATERAL with LIMIT beside the coordinator's tables",
            "SELECT i.id, e.id FROM topup_invoice i CROSS JOIN LATERAL (SELECT e.id FROM entry e WHERE e.account_id = i.account_id LIMIT 1) e",
        ),
        (
            "an account known from outside alone",
            "SELECT a.id, (SELECT count(*) FROM hold h WHERE h.account_id = a.id) AS holds FROM account a WHERE a.id = :account_id",
        ),
    ],
)
def test_the_reader_sees_what_was_refused(name: str, sql: str) -> None:
    assert RULES[name].breaks(sql)


@pytest.mark.parametrize(
    ("name", "sql"),
    [
        ("a row as an argument", "SELECT meter_used(k.window_start, k.reset_period, k.usage, :now) FROM api_key k"),
        ("a row as an argument", "SELECT to_jsonb(u) FROM usage u"),
        ("a row as an argument", "SELECT count(*) FROM usage u WHERE u.id IN (SELECT usage_id FROM entry)"),
        (
            "a function in SQL",
            "CREATE FUNCTION f(p_key api_key) RETURNS int LANGUAGE sql AS $$ SELECT p_key.held_nusd $$",
        ),
        ("a function in SQL", "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM FROM hold; END $$"),
        (
            "EXISTS over the coordinator's tables and a shard's",
            "SELECT a.id FROM account a WHERE EXISTS (SELECT 1 FROM hold h WHERE h.account_id = a.id)",
        ),
        (
            "LATERAL with LIMIT beside the coordinator's tables",
            "SELECT a.id FROM account a CROSS JOIN LATERAL (SELECT e.id FROM entry e WHERE e.account_id = a.id LIMIT 1) e",
        ),
        (
            "an account known from outside alone",
            "SELECT (SELECT count(*) FROM hold h WHERE h.account_id = :account_id AND h.key_id = k.id) FROM api_key k WHERE k.account_id = :account_id",
        ),
        (
            "an account known from outside alone",
            "SELECT a.id, (SELECT max(h.id) FROM hold h WHERE h.account_id = a.id) FROM account a",
        ),
    ],
)
def test_the_reader_lets_what_was_not_refused_pass(name: str, sql: str) -> None:
    assert not RULES[name].breaks(sql)


def test_the_reader_knows_which_tables_are_sharded() -> None:
    assert {"account", "api_key", "entry", "hold", "usage", "topup", "seal"} <= SHARDED
    assert {"credential", "admin_log", "idempotency", "topup_invoice", "service_token"} <= LOCAL


def test_the_reader_reads_the_statements_there_are() -> None:
    found = list(texts())
    assert len(found) > 300
    assert any("INSERT INTO idempotency" in text for _, text in found)
