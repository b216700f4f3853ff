"""House tests: they keep words true: floors, settings, migrations, the README's commands."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool
from sqlmodel import SQLModel

import app.activity.tables
import app.admin.tables
import app.autotopup.tables
import app.console.tables
import app.kernel.tables
import app.keys.tables
import app.ledger.tables
import app.metering.tables
import app.notices.tables
import app.offers.tables
import app.pricing.tables
import app.topups.tables  # noqa: F401
from app.gateway.settings import OWN as GATEWAY
from app.kernel.settings import variables
from app.migrations import is_described_by_models
from tests import databases

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

PLANTED = (
    ("Imports run downstairs only", "app/ledger/post.py", "import app.topups.credit"),
    ("a new room fails until it has a floor", "app/helpers.py", "X = 1"),
    ("Litestar stands in doors only", "app/topups/owed.py", "import litestar"),
    ("Litestar stands in doors only", "app/metering/a_new_verb.py", "from litestar import get"),
    ("Litestar stands in doors only", "app/kernel/a_new_file.py", "from litestar.types import Scope"),
    ("Only adapters and the sandbox talk to the world", "app/topups/credit.py", "import httpx"),
    ("Only adapters and the sandbox talk to the world", "app/accounts/a_new_verb.py", "from websockets import connect"),
    ("Only wiring knows the adapters' names", "app/jobs.py", "import app.adapters.btcpay"),
    ("The sandbox is a stranger", "app/sandbox/invoices.py", "import app.kernel.money"),
    ("The sandbox is a stranger", "app/sandbox/a_new_file.py", "import app.migrations"),
    ("The client is a stranger", "app/client/meter.py", "import app.kernel.money"),
    ("The client is a stranger", "app/client/a_new_file.py", "import app.sandbox"),
    ("The client needs msgspec and httpx", "app/client/a_new_file.py", "import structlog"),
    ("The gateway is a stranger", "app/gateway/a_new_file.py", "import app.kernel.money"),
)


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LINT_IMPORTS, "--no-cache"], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}, capture_output=True, text=True)  # fmt: skip


def test_the_floors_hold() -> None:
    result = _lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


def test_a_new_verb_and_a_new_door_need_no_new_line_in_the_contracts(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "app", tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, line in {
        "app/topups/a_new_verb.py": "from app.kernel.db import Database",
        "app/metering/api/a_new_door.py": "from litestar import get",
        "app/web/a_new_file.py": "from litestar.types import Scope",
    }.items():
        (tmp_path / name).write_text(f"{line}\n")
    result = _lint_imports(tmp_path)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("contract", "name", "line"), PLANTED)
def test_a_planted_violation_of_each_contract_is_caught(contract: str, name: str, line: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "app", tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / name
    file.write_text((file.read_text() if file.exists() else "") + f"\n{line}\n")
    result = _lint_imports(tmp_path)
    assert result.returncode != 0
    broken = [line for line in result.stdout.splitlines() if " BROKEN" in line]
    assert any(contract in line for line in broken), result.stdout


def test_models_and_migrations_say_the_same(clean: str) -> None:
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(clean), poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_name": is_described_by_models})
        assert compare_metadata(context, SQLModel.metadata) == []


def test_a_test_begins_without_a_row_in_any_table_also_in_one_that_nobody_listed(clean: str) -> None:
    with psycopg.connect(clean, autocommit=True) as conn:
        conn.execute(
            "CREATE TABLE newcomer (parent int PRIMARY KEY); CREATE TABLE newest (child int REFERENCES newcomer)"
        )
        try:
            conn.execute("INSERT INTO newcomer VALUES (1); INSERT INTO newest VALUES (1)")
            conn.execute("INSERT INTO figure (name, value) VALUES ('x', 1)")
            version = conn.execute("SELECT version_num FROM alembic_version").fetchall()
            databases.empty(clean)
            for table in ("newcomer", "newest", "figure"):
                assert conn.execute(f"SELECT FROM {table}".encode()).fetchall() == [], table
            assert conn.execute("SELECT version_num FROM alembic_version").fetchall() == version
        finally:
            conn.execute("DROP TABLE newest, newcomer")


def test_the_runtime_role_may_append_to_the_books_and_never_rewrite_them(clean: str) -> None:
    with psycopg.connect(clean, autocommit=True, options="-c role=satmeter_runtime") as conn:
        for statement in (
            "UPDATE entry SET amount_nusd = 1", "DELETE FROM entry", "TRUNCATE entry", "DROP TABLE entry",
            "UPDATE usage SET cost_nusd = 0", "DELETE FROM usage", "DELETE FROM account", "DELETE FROM admin_log",
            "ALTER TABLE account ADD x int", "CREATE TABLE x (y int)",
        ):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement.encode())
        conn.execute("SELECT count(*) FROM entry")


def test_every_money_column_is_64_bits_wide_and_no_column_is_a_float(clean: str) -> None:
    with psycopg.connect(clean) as conn:
        found = conn.execute(
            """SELECT table_name, column_name, CASE udt_name WHEN '_int8' THEN 'bigint' ELSE data_type END FROM information_schema.columns
               WHERE table_schema = 'public' AND (column_name LIKE '%nusd' OR column_name LIKE '%units'
                     OR data_type IN ('real', 'double precision'))"""
        ).fetchall()
    assert [row for row in found if row[2] not in ("bigint", "jsonb")] == []


def test_sql_rules_that_keep_the_schema_shardable(clean: str) -> None:
    with psycopg.connect(clean) as conn:
        assert conn.execute("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal").fetchall() == []
        assert conn.execute("SELECT sequencename FROM pg_sequences WHERE schemaname = 'public'").fetchall() == []
        assert conn.execute("SELECT conname FROM pg_constraint WHERE condeferrable").fetchall() == []
        unique = conn.execute(
            """SELECT t.relname, array_agg(a.attname ORDER BY a.attnum) FROM pg_index i JOIN pg_class t ON t.oid = i.indrelid
               JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = ANY (i.indkey)
               WHERE i.indisunique AND t.relnamespace = 'public'::regnamespace GROUP BY i.indexrelid, t.relname"""
        ).fetchall()
    lookups = {
        "account", "credential", "topup_invoice", "webhook_delivery", "idempotency", "rate_count", "service_token",
        "admin_token", "admin_log", "alembic_version", "price_version", "priced_model", "price", "price_override", "markup",
        "fee", "usage_archive", "figure", "token_use", "audit_run", "seal_run", "job_lease", "audit_walk",
        "proof_ref", "offer_ask", "session_over",
    }  # fmt: skip
    assert [row for row in unique if row[0] not in lookups and "account_id" not in row[1]] == []


def test_every_setting_is_in_the_readme_and_in_the_example_file() -> None:
    example = re.findall(r"^#? ?([A-Z][A-Z_]+)=", (ROOT / "deploy/.env.example").read_text(), re.MULTILINE)
    readme = (ROOT / "README.md").read_text().split("## Settings", 1)[1].split("\n## ", 1)[0]
    assert sorted(example) == sorted((*variables(), *GATEWAY))
    assert sorted(
        set(re.findall(r"`([A-Z][A-Z_]{3,})`", readme)) - {"DEBUG", "INFO", "WARNING", "ERROR", "LNBITS_RATE_LIMIT_NO"}
    ) == sorted((*variables(), *GATEWAY))


def test_no_commit_stands_outside_the_database_module() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "app").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("commit", "rollback")
    ]
    assert [call for call in calls if not call.startswith("app/kernel/db.py")] == []


def test_no_float_is_made_near_money() -> None:
    rooms = (
        "kernel",
        "offers",
        "ledger",
        "keys",
        "accounts",
        "topups",
        "metering",
        "admin",
        "adapters",
        "pricing",
        "autotopup",
        "activity",
        "notices",
    )
    made = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for room in rooms
        for path in (ROOT / "app" / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "float"
    ]
    assert made == []


def test_top_level_holds_only_what_was_agreed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.split("/", 1)[0] for name in tracked if not name.startswith(".")}
    pages = {"README.md", "LICENSE", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert top <= pages | {"pyproject.toml", "Makefile", "app", "tests", "alembic", "deploy"}
