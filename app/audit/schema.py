"""What the database itself must still refuse: constraints, rights, and nothing hidden between us and the books."""

from typing import Final

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, PrimaryKeyConstraint, UniqueConstraint
from sqlmodel import SQLModel

from app.activity.tables import UsageArchive, UsageDay, UsageDropped, UsageSummed
from app.audit.check import Check, values
from app.audit.tables import Seal, SealRun
from app.autotopup.tables import NwcAttempt, NwcConnection
from app.kernel.db import RUNTIME_ROLE
from app.keys.tables import ApiKey, Credential, CredentialEvent, NostrEvent
from app.ledger.tables import Account, Entry, EntryClosing
from app.metering.tables import Hold, Usage
from app.offers.tables import Offer, ProofRef
from app.topups.tables import Payment, Topup, TopupAddress, TopupInvoice

_BOOKS: Final = tuple(
    SQLModel.metadata.tables[str(model.__tablename__)]
    for model in (
        Account, Entry, EntryClosing, ApiKey, Credential, Hold, Usage, UsageDay, UsageSummed, UsageDropped, UsageArchive, Topup, TopupInvoice, TopupAddress, Payment,
        NwcConnection, NwcAttempt, Offer, ProofRef, Seal, SealRun, CredentialEvent, NostrEvent,
    )
)  # fmt: skip
_REPLACED: Final = ("usage_day", "nwc_connection")
"""Written anew as a whole: sums that can be had again, and a wallet that its owner connects again."""
_BOOK_NAMES: Final = values((table.name,) for table in _BOOKS)
_RULE_NAMES: Final = values(
    (table.name, str(rule.name))
    for table in _BOOKS
    for rule in sorted(table.constraints, key=lambda rule: str(rule.name))
    if isinstance(rule, CheckConstraint | UniqueConstraint)
)
_RULE_COUNTS: Final = values(
    (table.name, letter, sum(isinstance(rule, kind) for rule in table.constraints))
    for table in _BOOKS
    for letter, kind in (("p", PrimaryKeyConstraint), ("f", ForeignKeyConstraint))
)

SCHEMA: Final = (
    Check(
        "constraints_are_in_force",
        "The database still refuses what it should: every constraint of the models is there and valid.",
        f"""SELECT x.place || ' ' || x.name AS subject, 'missing' AS recorded, 'in force' AS recomputed
            FROM (VALUES {_RULE_NAMES}) AS x (place, name)
            LEFT JOIN pg_constraint c ON c.conrelid = to_regclass(x.place) AND c.conname = x.name AND c.convalidated
            WHERE c.oid IS NULL
            UNION ALL
            SELECT x.place || CASE x.kind WHEN 'p' THEN ' primary key' ELSE ' foreign keys' END, count(c.oid)::text, x.wanted::text
            FROM (VALUES {_RULE_COUNTS}) AS x (place, kind, wanted)
            LEFT JOIN pg_constraint c ON c.conrelid = to_regclass(x.place) AND c.contype::text = x.kind AND c.convalidated
            GROUP BY x.place, x.kind, x.wanted HAVING count(c.oid) < x.wanted""",
    ),
    Check(
        "books_are_append_only",
        "The service's role may not change or delete what was written to the books.",
        f"""SELECT '{RUNTIME_ROLE} on ' || x.place AS subject, 'may change rows' AS recorded, 'may only add rows' AS recomputed
            FROM pg_roles r CROSS JOIN (VALUES ('entry'), ('entry_closing'), ('usage'), ('usage_dropped'), ('usage_archive'), ('topup_invoice'), ('topup_address'), ('proof_ref'), ('admin_log'), ('seal'), ('seal_run'), ('credential_event')) AS x (place)
            WHERE r.rolname = '{RUNTIME_ROLE}'
              AND (has_table_privilege(r.oid, to_regclass(x.place), 'UPDATE, DELETE, TRUNCATE, TRIGGER')
                   OR has_any_column_privilege(r.oid, to_regclass(x.place), 'UPDATE'))""",
    ),
    Check(
        "what_binds_is_not_rewritten",
        "The service's role may not change whose a row is, a credential, or how far below zero an account may go.",
        f"""SELECT '{RUNTIME_ROLE} on ' || x.place || '.' || a.attname AS subject, 'may change it' AS recorded, 'may not' AS recomputed
            FROM pg_roles r
            CROSS JOIN (VALUES {values((table.name,) for table in _BOOKS if table.name not in _REPLACED)}) AS x (place)
            JOIN pg_attribute a ON a.attrelid = to_regclass(x.place) AND a.attnum > 0 AND NOT a.attisdropped
            WHERE r.rolname = '{RUNTIME_ROLE}' AND has_column_privilege(r.oid, to_regclass(x.place), a.attnum, 'UPDATE')
              AND (a.attname IN ('account_id', 'created_at', 'floor_nusd', 'secret_hash', 'backend', 'method', 'currency')
                   OR (a.attname = 'id' OR a.attname = 'key_id')
                   OR (a.attname = 'proof' AND x.place <> 'api_key'))""",
    ),
    Check(
        "nothing_stands_between_us_and_the_books",
        "The books are plain tables: no trigger, rule, view or row security of anybody's changes or hides a row.",
        f"""SELECT x.place || ' ' || f.what AS subject, f.what AS recorded, 'nothing' AS recomputed
            FROM (VALUES {_BOOK_NAMES}) AS x (place)
            CROSS JOIN LATERAL (
                SELECT 'trigger ' || tgname AS what FROM pg_trigger
                WHERE tgrelid = to_regclass(x.place) AND (NOT tgisinternal OR tgenabled <> 'O')
                UNION ALL SELECT 'rule ' || rulename FROM pg_rewrite WHERE ev_class = to_regclass(x.place)
                UNION ALL SELECT 'row security' FROM pg_class WHERE oid = to_regclass(x.place) AND relrowsecurity
                UNION ALL SELECT 'not a table' FROM pg_class WHERE oid = to_regclass(x.place) AND relkind NOT IN ('r', 'p')
            ) f""",
    ),
)
