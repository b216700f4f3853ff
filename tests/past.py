"""Calls of long ago: what was charged now, moved back in time together with all that explains it."""

from typing import Any

import psycopg

from app.activity.archive import make_partitions
from app.kernel.db import Database

_ID = """rpad(lpad(to_hex(('x' || translate(left({id}::text, 13), '-', ''))::bit(48)::bigint - %(days)s::bigint * 86400000), 12, '0')
              || right(translate({id}::text, '-', ''), 20), 32, '0')::uuid"""
_BACK = "interval '1 day' * %(days)s"
_MOVES = (
    f"UPDATE account SET created_at = created_at - {_BACK}",
    f"""UPDATE entry SET created_at = created_at - {_BACK}, usage_id = {_ID.format(id="usage_id")},
        reference = CASE WHEN kind = 'refund' AND contra = 'revenue:usage' THEN ({_ID.format(id="reference")})::text ELSE reference END""",
    f"""UPDATE usage SET id = {_ID.format(id="id")}, created_at = created_at - {_BACK}, window_start = window_start - {_BACK}""",
    f"""UPDATE hold SET created_at = created_at - {_BACK}, window_start = window_start - {_BACK}, closed_at = closed_at - {_BACK},
        expires_at = expires_at - {_BACK} WHERE state <> 'open'""",
    f"""UPDATE hold SET window_start = window_start - {_BACK} WHERE state = 'open'""",
    f"""UPDATE api_key SET created_at = created_at - {_BACK}, window_start = window_start - {_BACK},
        more_starts = CASE WHEN more_starts IS NOT NULL THEN ARRAY (SELECT start - {_BACK} FROM unnest(more_starts) start) END""",
)


def move_back(conn: psycopg.Connection[Any], days: int) -> None:
    """As if everything so far had happened `days` earlier; top-ups stay as they are."""
    with conn.transaction():
        for statement in _MOVES:
            conn.execute(statement.encode(), {"days": days})


async def move_back_and_sort(db: Database, conn: psycopg.Connection[Any], days: int) -> None:
    """The same; and each call is in its month's partition."""
    move_back(conn, days)
    await make_partitions(db)
