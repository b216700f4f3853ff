"""What each connection is like: the service's own role, UTC, with time limits; as it begins, or in each transaction.

A pooler that gives a connection a server process of its own for one transaction at a time forgets everything else: then a transaction
itself begins with what it must be, or is refused by PostgreSQL.
"""

from collections.abc import Mapping
from typing import Any, Final

import psycopg
from psycopg.rows import tuple_row

_SESSION: Final[Mapping[str, str]] = {
    "TimeZone": "UTC",
    "statement_timeout": "15s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "30s",
    "jit": "off",
}
"""What every connection of ours is like, as PostgreSQL shows it. Compiling a question takes longer than answering any of ours."""
POOLERS: Final = ("none", "session", "transaction")
"""What may stand in front of PostgreSQL. `session` is proved to be one, and then as good as none."""


class WrongSession(psycopg.OperationalError):
    """The connection has not become what it was asked to be: our role, with our time limits."""


def session_of(role: str | None) -> dict[str, str]:
    """The settings of each connection, as PostgreSQL shows them; without a role it stays the owner's."""
    return dict(_SESSION) | ({"role": role} if role else {})


def as_options(session: Mapping[str, str]) -> str:
    """The same for the start of a connection, so that a RESET comes back to them."""
    return " ".join(f"-c {name}={value}" for name, value in session.items())


def as_shown(session: Mapping[str, str]) -> str:
    """Asks for them: one row with one array."""
    columns = ", ".join(f"current_setting('{name}')" for name in session)
    return f"SELECT ARRAY[{columns}] AS shown"


def as_set(session: Mapping[str, str], *, of_transaction: bool = False) -> str:
    """Sets them; the role last, since it may lose the right to set the others.

    Of a transaction that is only as long as the statements sent together, for which PostgreSQL warns of SET LOCAL.
    """
    local = "true" if of_transaction else "false"
    columns = ", ".join(f"set_config('{name}', '{value}', {local})" for name, value in session.items())
    return f"SELECT {columns}"


def as_begin(session: Mapping[str, str]) -> str:
    """Begins a transaction that is so, in one message. What it runs may still choose its isolation: this was no query."""
    return "; ".join(["BEGIN", *(f"SET LOCAL {name} = '{value}'" for name, value in session.items())])


async def prove(conn: psycopg.AsyncConnection[Any], session: Mapping[str, str]) -> None:
    """A pooler may drop what a connection asks for at its start, and it would be the owner's, without any limit.

    Then it is asked for once more. Raises WrongSession if that does not help either.
    """
    wanted = list(session.values())
    async with conn.cursor(row_factory=tuple_row) as cursor:
        shown = as_shown(session).encode()
        if await _first(cursor, shown) == wanted:
            return
        try:
            await cursor.execute(as_set(session).encode(), prepare=False)
        except psycopg.errors.InsufficientPrivilege as error:
            raise WrongSession("the connection may not become what it must be") from error
        if await _first(cursor, shown) != wanted:
            raise WrongSession(f"the connection is not as it must be: {', '.join(session)}")


async def _first(cursor: psycopg.AsyncCursor[tuple[Any, ...]], statement: bytes) -> Any:
    found = await (await cursor.execute(statement, prepare=False)).fetchone()
    assert found is not None
    return found[0]
