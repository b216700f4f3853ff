"""Who everything belongs to, and when it was: of an account and a key that exist, in an order that can be."""

from typing import Final

from app.audit.check import Check

_OWNED: Final = (
    "entry", "entry_closing", "hold", "usage", "usage_day", "usage_summed", "usage_dropped", "topup", "payment", "api_key", "credential", "topup_invoice",
    "nwc_connection", "nwc_attempt", "credential_event", "nostr_event", "offer", "proof_ref",
)  # fmt: skip
_BY_KEY: Final = ("hold", "usage", "usage_day", "usage_dropped", "topup", "offer")

OWNERS: Final = (
    Check(
        "everything_has_its_account",
        "Whatever names an account names one that exists.",
        " UNION ALL ".join(
            f"""SELECT '{table} of ' || x.account_id AS subject, count(*) AS recorded, 0 AS recomputed
                FROM {table} x LEFT JOIN account a ON a.id = x.account_id WHERE a.id IS NULL GROUP BY x.account_id"""
            for table in _OWNED
        ),
    ),
    Check(
        "everything_has_its_key",
        "Whatever names a key names one of its own account.",
        " UNION ALL ".join(
            f"""SELECT '{table} of ' || x.account_id || '/' || x.key_id AS subject, count(*) AS recorded, 0 AS recomputed
                FROM {table} x LEFT JOIN api_key k ON k.account_id = x.account_id AND k.id = x.key_id
                WHERE x.key_id IS NOT NULL AND k.id IS NULL GROUP BY x.account_id, x.key_id"""
            for table in _BY_KEY
        ),
    ),
)

_MOMENTS: Final = (
    ("account", "id::text", "created_at"),
    ("entry", "account_id || '/' || id", "created_at"),
    ("hold", "account_id || '/' || id", "created_at"),
    ("hold", "account_id || '/' || id", "closed_at"),
    ("hold", "account_id || '/' || id", "window_start"),
    ("usage", "account_id || '/' || id", "created_at"),
    ("usage", "account_id || '/' || id", "window_start"),
    ("api_key", "account_id || '/' || id", "created_at"),
    ("api_key", "account_id || '/' || id", "window_start"),
    ("topup", "account_id || '/' || id", "created_at"),
    ("topup", "account_id || '/' || id", "settled_at"),
    ("webhook_delivery", "backend || '/' || delivery_id", "received_at"),
)
_EARLIER_LATER: Final = (
    ("hold", "created_at", "closed_at"),
    ("hold", "window_start", "closed_at"),
    ("usage", "window_start", "created_at"),
    ("topup", "created_at", "settled_at"),
)

TIMES: Final = (
    Check(
        "nothing_is_from_the_future",
        "Nothing was written, closed or begun later than now, give or take five minutes of clocks.",
        " UNION ALL ".join(
            f"""SELECT '{table}.{column} ' || {subject} AS subject, {column} AS recorded, 'not after ' || now() AS recomputed
                FROM {table} WHERE {column} > now() + interval '5 minutes'"""
            for table, subject, column in _MOMENTS
        ),
    ),
    Check(
        "nothing_ends_before_it_began",
        "Ends come after beginnings, give or take five minutes of clocks.",
        " UNION ALL ".join(
            f"""SELECT '{table} ' || account_id || '/' || id AS subject, '{later} ' || {later} AS recorded,
                       'not before {earlier} ' || {earlier} AS recomputed
                FROM {table} WHERE {later} < {earlier} - interval '5 minutes'"""
            for table, earlier, later in _EARLIER_LATER
        ),
    ),
)
