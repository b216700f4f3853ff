"""Our SQL stays what a database sharded by account (Citus) takes: read as text, for where none runs.

What each rule refuses was an error of Citus 14.0.1's, whose message stands with it. What is known to break a rule is listed by the file it is
in, and may only become less.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.program import ROOT

_APP = ROOT / "app"
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


@dataclass(frozen=True, slots=True)
class Rule:
    """What is refused, in Citus's words, and which texts break it."""

    says: str
    breaks: Callable[[str], bool]
    of_one_server: frozenset[str] = frozenset()
    """Files in which a statement does so to a table that is no account's, and stays whole on the coordinator; or is run beside a shard."""


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
}


def texts() -> Iterator[tuple[str, str]]:
    """Every text of ours that is SQL, with its file. What an f-string puts in stands as `{}`."""
    for path in sorted(_APP.rglob("*.py")):
        name = str(path.relative_to(_APP))
        if not name.startswith(_STRANGERS):
            yield from ((name, text) for text in _of(path) if _SQL.search(text))


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
    breaking = {file: text for file, text in texts() if rule.breaks(text)}
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
    ],
)
def test_the_reader_sees_what_was_refused(name: str, sql: str) -> None:
    assert RULES[name].breaks(sql)


def test_the_reader_reads_the_statements_there_are() -> None:
    found = list(texts())
    assert len(found) > 300
    assert any("INSERT INTO idempotency" in text for _, text in found)
