"""What the service's own role may do: no more than its code does, and what it can still forge, the audit names."""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from app.audit import Secrets, audit
from app.wiring import House
from tests.test_audit import USD, opened

APP: Final = Path(__file__).parent.parent / "app"
MODELS: Final = {"Seal": "seal", "SealRun": "seal_run", "Price": "price", "PricedModel": "priced_model"}
"""Rows of these are added by their class."""
RULES: Final = ("price_override", "markup", "fee")
"""These share their statements, which name the table by a constant."""


@pytest.fixture
def service_conn(clean: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(clean, autocommit=True, options="-c role=satmeter_runtime") as conn:
        yield conn


async def test_what_the_service_s_role_can_forge_is_named_and_the_rest_is_refused(
    house: House, service_conn: psycopg.Connection[Any]
) -> None:
    """$5 out of nothing, with balance and count set to match, and $100 to be had below zero."""
    account = await opened(house)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        service_conn.execute("UPDATE account SET floor_nusd = -100000000000")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        service_conn.execute("INSERT INTO account (id, floor_nusd) VALUES (%s, -100000000000)", [uuid.uuid4()])
    service_conn.execute(
        """INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd)
           VALUES (%s, 1, 'adjustment', 'forged', 'adjustment', %s, %s)""",
        [account.account_id, 5 * USD, 5 * USD],
    )
    service_conn.execute("UPDATE account SET posted_nusd = %s, entry_count = 1", [5 * USD])
    assert {each.check for each in (await audit(house.db)).findings} == {"adjustment_has_its_reason"}
    act_id = uuid.uuid4()
    service_conn.execute(
        "INSERT INTO admin_log (id, admin, act, subject, amount_nusd, proof) VALUES (%s, 'ops', 'account.adjust', %s, %s, 'proof')",
        [act_id, str(account.account_id), 5 * USD],
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        service_conn.execute("UPDATE entry SET reference = %s", [f"act/{act_id}"])
    found = (await audit(house.db, Secrets.of(house.settings))).findings
    assert {each.check for each in found} == {"adjustment_has_its_reason", "act_is_an_operator_s"}


FORBIDDEN: Final = (
    "UPDATE entry SET amount_nusd = 1", "DELETE FROM entry", "UPDATE usage SET cost_nusd = 0", "DELETE FROM usage",
    "DELETE FROM account", "UPDATE account SET floor_nusd = 0", "UPDATE account SET id = gen_random_uuid()",
    "UPDATE credential SET account_id = gen_random_uuid()", "UPDATE credential SET proof = NULL", "DELETE FROM api_key",
    "UPDATE api_key SET account_id = gen_random_uuid()", "UPDATE api_key SET masked_hash = NULL", "UPDATE hold SET key_id = gen_random_uuid()",
    "UPDATE hold SET request_hash = ''", "DELETE FROM topup", "UPDATE topup SET account_id = gen_random_uuid()", "UPDATE topup SET method = ''",
    "UPDATE topup SET bonus_percent = 5", "DELETE FROM payment", "UPDATE payment SET topup_id = gen_random_uuid()", "UPDATE payment SET late = true",
    "UPDATE topup_invoice SET invoice_id = ''", "DELETE FROM topup_invoice", "UPDATE topup_address SET destination = ''",
    "UPDATE admin_log SET amount_nusd = 1", "DELETE FROM admin_log", "UPDATE price SET price_pusd = 1", "DELETE FROM price",
    "UPDATE priced_model SET mode = ''", "UPDATE price_version SET source = ''", "UPDATE markup SET multiplier_ppm = 0",
    "UPDATE fee SET price_nusd = 0", "UPDATE price_override SET price_pusd = 0", "UPDATE admin_token SET secret_hash = ''",
    "UPDATE service_token SET secret_hash = ''", "DELETE FROM admin_token", "UPDATE seal SET links = ''", "DELETE FROM seal",
    "UPDATE seal_run SET mac = ''", "DELETE FROM seal_run", "INSERT INTO usage_dropped (month) VALUES (now())",
    "UPDATE usage_archive SET dropped_at = now()", "DELETE FROM entry_closing", "UPDATE entry_closing SET amount_nusd = 0",
    "INSERT INTO entry_closing (account_id) VALUES (gen_random_uuid())", "DELETE FROM webhook_delivery",
    "UPDATE credential_event SET act = ''", "DELETE FROM credential_event", "UPDATE credential SET ends_at = NULL", "UPDATE nostr_event SET event_id = ''", "UPDATE nwc_attempt SET amount_nusd = 1",
    "TRUNCATE account", "DROP TABLE entry", "CREATE TABLE mine (x int)", "ALTER TABLE entry DISABLE TRIGGER ALL",
    "CREATE ROLE mine",
)  # fmt: skip


def test_the_service_s_role_is_refused_whatever_it_does_not_do(service_conn: psycopg.Connection[Any]) -> None:
    allowed = []
    for statement in FORBIDDEN:
        try:
            service_conn.execute(statement.encode())
        except psycopg.errors.InsufficientPrivilege:
            continue
        allowed.append(statement)
    assert allowed == []


def test_the_service_s_role_has_no_right_that_its_code_does_not_use(service_conn: psycopg.Connection[Any]) -> None:
    """As far as the code's text tells: it writes to each table in this way, and sets each column by its name."""
    code = "\n".join(path.read_text() for path in sorted(APP.rglob("*")) if _is_ours(path))
    named = set(re.findall(r"\b([a-z0-9_]+) = ", code)) | set(re.findall(r"""["']([a-z0-9_]+)["']""", code))
    named |= set(re.findall(r"\b([a-z0-9_]+)=", code))
    rights = service_conn.execute(
        """SELECT table_name, privilege_type FROM information_schema.table_privileges
           WHERE grantee = 'satmeter_runtime' AND table_schema = 'public' AND privilege_type <> 'SELECT'"""
    ).fetchall()
    unused = [(table, right) for table, right in rights if not _is_used(code, table, right)]
    columns = service_conn.execute(
        """SELECT table_name, column_name FROM information_schema.column_privileges
           WHERE grantee = 'satmeter_runtime' AND table_schema = 'public' AND privilege_type = 'UPDATE'"""
    ).fetchall()
    whole = {table for table, right in rights if right == "UPDATE"}
    unused += [(table, column) for table, column in columns if table not in whole and column not in named]
    unused += [(table, "UPDATE") for table in {table for table, _ in columns} if not _is_used(code, table, "UPDATE")]
    assert len(rights) > 30
    assert len(columns) > 80
    assert unused == []


def _is_ours(path: Path) -> bool:
    """Strangers, who know us by the wire alone, write to no table of ours."""
    strangers = {"sandbox", "client", "gateway", "docs"}
    return path.suffix in (".py", ".sql") and path.relative_to(APP).parts[0] not in strangers


def _is_used(code: str, table: str, right: str) -> bool:
    """Whether some statement does that; those of rules name their table by a constant."""
    if right == "INSERT":
        by_class = any(
            f"insert({name})" in code or f"session, {name}," in code for name in MODELS if MODELS[name] == table
        )
        return by_class or _says(code, rf"INSERT INTO {table}\b") or (table in RULES and "INSERT INTO {table}" in code)
    if right == "UPDATE":
        by_constant = table in RULES and "UPDATE {table}" in code
        by_constant |= table.endswith("_token") and "UPDATE {before['kind']}_token SET" in code
        return (
            by_constant
            or _says(code, rf"UPDATE {table}\b")
            or _says(code, rf"INSERT INTO {table}\b[^;\"]{{0,1200}}DO UPDATE")
        )
    return _says(code, rf"DELETE FROM {table}\b")


def _says(code: str, pattern: str) -> bool:
    return re.search(pattern, code) is not None
