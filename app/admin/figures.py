"""What an operator's monitoring asks of the books: small questions, each answered from an index, and the sums that a job makes.

Whichever process is asked, the answer is the database's. No question reads a whole table; what only a whole table could
answer, the job `sum_up` finds every few minutes and keeps.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, row, rows
from app.kernel.figures import keep, kept

Labels = tuple[str, ...]
_STATUSES: Final = ("Creating", "New", "Processing", "Settled", "Expired", "Invalid", "Failed")
_OUTCOMES: Final = ("created", "invoiced", "sent", "paid_reported", "unknown", "rejected", "settled", "expired")
_SUMMED: Final = {
    "liabilities_nusd": "Sum of the positive balances: what is owed to customers, nano-USD",
    "debts_nusd": "Sum of the balances below zero, nano-USD",
    "held_nusd": "Sum of what calls in flight hold, nano-USD",
    "accounts": "Accounts that are not closed",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One figure of a name, a value for each combination of labels."""

    name: str
    words: str
    labels: Labels
    values: Sequence[tuple[Labels, float]]


@dataclass(frozen=True, slots=True)
class _Question:
    """A statement whose first columns are the labels and whose last is the value. `always` are labels that are 0 where
    nothing is found, so that a rule has something to compare."""

    name: str
    words: str
    labels: Labels
    sql: str
    always: tuple[Labels, ...] = ()


_ONE: Final = ((),)
_SEEN: Final = """
    SELECT min(p.received_at) AS seen_at FROM topup t
    JOIN payment p ON p.account_id = t.account_id AND p.topup_id = t.id AND p.status <> 'Invalid' AND p.worth_nusd = 0
    WHERE t.credited_nusd = 0 AND t.paid_coin_units > 0 GROUP BY t.account_id, t.id"""
"""Of each top-up that a payment was seen for and nothing credited, when the first one was seen."""
_AGE: Final = "coalesce(greatest(extract(epoch FROM now() - min({0})), 0), 0)::float8 AS value"

_QUESTIONS: Final = (
    _Question(
        "satmeter_topups", "Top-ups that were made within a day, by state", ("status",),
        "SELECT status, count(*) AS value FROM topup WHERE id >= :yesterday GROUP BY 1",
        tuple((status,) for status in _STATUSES),
    ),
    _Question(
        "satmeter_topups_watched", "Top-ups that are still asked about, by state", ("status",),
        "SELECT status, count(*) AS value FROM topup WHERE next_check_at IS NOT NULL GROUP BY 1",
        (("New",), ("Processing",)),
    ),
    _Question(
        "satmeter_topups_check_overdue_seconds", "How long the longest overdue look at a top-up waits", (),
        f"SELECT {_AGE.format('next_check_at')} FROM topup WHERE next_check_at IS NOT NULL",
    ),
    _Question(
        "satmeter_topups_uncredited", "Top-ups that a payment was seen for and nothing credited yet", (),
        f"SELECT count(*) AS value FROM ({_SEEN}) x",
    ),
    _Question(
        "satmeter_topups_uncredited_oldest_seconds", "Age of the oldest payment that was seen and is not credited; 0 if there is none",
        (), f"SELECT {_AGE.format('seen_at')} FROM ({_SEEN}) x",
    ),
    _Question(
        "satmeter_topups_to_review", "Top-ups that wait for a person to look", (),
        "SELECT count(*) AS value FROM topup WHERE review IS NOT NULL",
    ),
    _Question(
        "satmeter_inbox_waiting", "Webhooks that came and were not looked into", (),
        "SELECT count(*) AS value FROM webhook_delivery WHERE processed_at IS NULL",
    ),
    _Question(
        "satmeter_inbox_oldest_seconds", "How long the oldest of them waits", (),
        f"SELECT {_AGE.format('received_at')} FROM webhook_delivery WHERE processed_at IS NULL",
    ),
    _Question(
        "satmeter_holds_open", "Holds that are open", (), "SELECT count(*) AS value FROM hold WHERE state = 'open'",
    ),
    _Question(
        "satmeter_holds_expired", "Open holds whose time is over and that no job has closed yet", (),
        "SELECT count(*) AS value FROM hold WHERE state = 'open' AND expires_at < now()",
    ),
    _Question(
        "satmeter_notices", "Notices of the last day by state, and all that are to be sent", ("state",),
        """SELECT state, count(*) AS value FROM notice
           WHERE state = 'pending' OR closed_at > now() - interval '1 day' GROUP BY 1""",
        (("pending",), ("delivered",), ("dead",)),
    ),
    _Question(
        "satmeter_notices_overdue_seconds", "How long the notice that is longest due waits", (),
        f"SELECT {_AGE.format('next_at')} FROM notice WHERE state = 'pending'",
    ),
    _Question(
        "satmeter_autotopup_attempts", "Attempts of the last day to be paid by a wallet, by outcome or by where they are", ("outcome",),
        "SELECT state, count(*) AS value FROM nwc_attempt WHERE created_at > now() - interval '1 day' GROUP BY 1",
        tuple((outcome,) for outcome in _OUTCOMES),
    ),
)  # fmt: skip


async def books(db: Database, now: datetime) -> list[Family]:
    """Every figure of the books. Raises DatabaseUnavailable, also where one takes longer than seconds."""

    async def work(session: AsyncSession) -> list[Family]:
        await row(session, "SET TRANSACTION READ ONLY")
        await row(session, "SET LOCAL statement_timeout = '5s'")
        yesterday = _first_id(now - timedelta(days=1))
        asked = [await _answer(session, question, yesterday) for question in _QUESTIONS]
        return [*asked, *await _kept(session)]

    return await db.transaction(work)


async def _answer(session: AsyncSession, question: _Question, yesterday: uuid.UUID) -> Family:
    params = {"yesterday": yesterday} if ":yesterday" in question.sql else {}
    found = [tuple(each.values()) for each in await rows(session, question.sql, **params)]
    values: dict[Labels, float] = dict.fromkeys(question.always, 0) | {each[:-1]: each[-1] for each in found}
    return Family(question.name, question.words, question.labels, list(values.items()))


async def _kept(session: AsyncSession) -> list[Family]:
    """A job is a `task` here: `job` is what Prometheus calls whom it scrapes."""
    figures = await kept(session)
    jobs: dict[str, list[tuple[Labels, float]]] = {"done": [], "failed": [], "every": []}
    sums: list[Family] = []
    for name, (value, found_at) in sorted(figures.items()):
        kind, _, rest = name.partition("/")
        if kind == "job":
            jobs["done"].append(((rest,), found_at.timestamp()))
            jobs["every"].append(((rest,), value / 1000))
        elif kind == "job_failed":
            jobs["failed"].append(((rest,), found_at.timestamp()))
        elif name in _SUMMED:
            sums.append(Family(f"satmeter_{name}", _SUMMED[name], (), [((), value)]))
        elif name == "audit_differences":
            words = "Figures that differed in the last audit"
            sums.append(Family("satmeter_audit_differences", words, (), [((), value)]))
            words = "When the last audit ended, Unix time"
            sums.append(Family("satmeter_audit_timestamp_seconds", words, (), [((), found_at.timestamp())]))
    return [
        *sums,
        Family(
            "satmeter_job_success_timestamp_seconds", "When a job last did its work, Unix time", ("task",), jobs["done"]
        ),
        Family(
            "satmeter_job_failure_timestamp_seconds", "When a job last failed, Unix time", ("task",), jobs["failed"]
        ),
        Family(
            "satmeter_job_interval_seconds",
            "How often a job is to be done; 0: at start alone",
            ("task",),
            jobs["every"],
        ),
    ]


def _first_id(moment: datetime) -> uuid.UUID:
    """What every id that we made from this moment on is greater than: a UUIDv7 begins with its milliseconds."""
    milliseconds = int(moment.astimezone(UTC).timestamp() * 1000)
    return uuid.UUID(int=milliseconds << 80)


async def sum_up(db: Database) -> None:
    """The sums over all accounts, found and kept."""

    async def work(session: AsyncSession) -> None:
        found = await row(
            session,
            """SELECT coalesce(sum(posted_nusd) FILTER (WHERE posted_nusd > 0), 0)::bigint AS liabilities_nusd,
                      coalesce(-sum(posted_nusd) FILTER (WHERE posted_nusd < 0), 0)::bigint AS debts_nusd,
                      coalesce(sum(held_nusd), 0)::bigint AS held_nusd, count(*) FILTER (WHERE status <> 'closed') AS accounts
               FROM account""",
        )
        assert found is not None
        await keep(session, **found)

    await db.transaction(work)
