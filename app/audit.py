"""The books' auditor: recomputes every figure from what explains it; reports, never repairs.

It sees one snapshot, so that traffic never looks like an error, and it changes nothing. A check is one SQL
text that returns a row for everything that differs: `subject`, `recorded`, `recomputed`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, PrimaryKeyConstraint, UniqueConstraint
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from app.activity.archive import FINGERPRINT
from app.activity.calendar import CALL, EDGE, IS_DROPPED, MOST, SUMS, day_of, first_id_of
from app.activity.tables import UsageArchive, UsageDay, UsageDropped
from app.autotopup.rules import OPEN
from app.autotopup.tables import NwcAttempt, NwcConnection, states_sql
from app.kernel.db import RUNTIME_ROLE, Database, row, rows
from app.kernel.money import COIN_PLACES, CURRENCIES, usd_text
from app.keys.tables import ApiKey, Credential
from app.ledger.tables import Account, Entry
from app.metering.tables import Hold, Usage
from app.pricing.quote import AUSD_PER_NUSD
from app.topups.methods import METHODS
from app.topups.tables import Payment, Topup, TopupInvoice

FINDINGS_PER_CHECK: Final = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference: what the books say of `subject`, and what follows from the rest of them. Money is in USD."""

    check: str
    subject: str
    recorded: str
    recomputed: str


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit found, and how much it looked at."""

    findings: tuple[Finding, ...]
    checks: int
    accounts: int
    entries: int

    @property
    def is_clean(self) -> bool:
        return not self.findings


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of the books: `says` is what must be true, `sql` finds where it is not."""

    name: str
    says: str
    sql: str
    is_money: bool = False


async def audit(db: Database) -> Report:
    """Run every check on one snapshot. Takes as long as it takes; locks nothing, writes nothing."""
    return await db.transaction(_audit)


async def _audit(session: AsyncSession) -> Report:
    await row(session, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
    await row(session, "SET LOCAL statement_timeout = 0")
    # Whole tables are compared: where statistics are old, the planner would look rows up one by one, for hours.
    await row(session, "SET LOCAL enable_nestloop = off")
    findings = [finding for check in CHECKS for finding in await _findings(session, check)]
    size = await row(
        session, "SELECT (SELECT count(*) FROM account) AS accounts, (SELECT count(*) FROM entry) AS entries"
    )
    assert size is not None
    return Report(tuple(findings), len(CHECKS), size["accounts"], size["entries"])


async def _findings(session: AsyncSession, check: Check) -> list[Finding]:
    """The first findings of a check by subject; a last one says how many more there are."""
    found = await rows(
        session,
        f"SELECT *, count(*) OVER () AS total FROM ({check.sql}) differing ORDER BY subject LIMIT {FINDINGS_PER_CHECK}",
    )
    findings = [
        Finding(check.name, each["subject"], _shown(check, each["recorded"]), _shown(check, each["recomputed"]))
        for each in found
    ]
    if found and found[0]["total"] > len(found):
        findings.append(Finding(check.name, "differences in all", str(found[0]["total"]), "0"))
    return findings


def _shown(check: Check, value: Any) -> str:
    if value is None:
        return "none"
    return usd_text(int(value)) if check.is_money else str(value)


def _values(given: Iterable[tuple[str | int | Decimal, ...]]) -> str:
    """Constants of ours as the rows of a VALUES list."""
    texts = (
        [
            f"'{each}'" if isinstance(each, str) else f"{each:f}" if isinstance(each, Decimal) else str(each)
            for each in line
        ]
        for line in given
    )
    return ", ".join(f"({', '.join(line)})" for line in texts)


_NET: Final = """
    (SELECT u.account_id, u.key_id, u.window_start, u.cost_nusd - coalesce(r.amount_nusd, 0) AS net_nusd
     FROM usage u LEFT JOIN entry r ON r.account_id = u.account_id AND r.kind = 'refund' AND r.reference = u.id::text
     UNION ALL SELECT account_id, key_id, window_start, cost_nusd - refunded_nusd FROM usage_dropped)"""
"""Calls with what they cost after a refund, and what is kept of those that were dropped."""

_IS_OF_DROPPED_MONTH: Final = f"""
    EXISTS (SELECT FROM usage_archive x WHERE x.dropped_at IS NOT NULL AND {{call}} >= {first_id_of("x.month")}
                                          AND {{call}} < {first_id_of("(x.month + interval '1 month')::date")})"""

_LEDGER: Final = (
    Check(
        "balance_is_sum_of_entries",
        "An account's balance is the sum of its entries.",
        """SELECT a.id::text AS subject, a.posted_nusd AS recorded, coalesce(e.total, 0) AS recomputed
           FROM account a LEFT JOIN (SELECT account_id, sum(amount_nusd) AS total FROM entry GROUP BY 1) e ON e.account_id = a.id
           WHERE a.posted_nusd <> coalesce(e.total, 0)""",
        is_money=True,
    ),
    Check(
        "entries_are_counted",
        "An account's entry count is the number of its entries.",
        """SELECT a.id::text AS subject, a.entry_count AS recorded, coalesce(e.count, 0) AS recomputed
           FROM account a LEFT JOIN (SELECT account_id, count(*) AS count FROM entry GROUP BY 1) e ON e.account_id = a.id
           WHERE a.entry_count <> coalesce(e.count, 0)""",
    ),
    Check(
        "entry_ids_have_no_gap",
        "Entries of an account are numbered 1, 2, 3 … The first wrong number is shown.",
        """SELECT DISTINCT ON (account_id) account_id::text AS subject, id AS recorded, place AS recomputed
           FROM (SELECT account_id, id, row_number() OVER (PARTITION BY account_id ORDER BY id) AS place FROM entry) e
           WHERE id <> place ORDER BY account_id, id""",
    ),
    Check(
        "balance_after_is_running_sum",
        "An entry's balance after it is the sum of the entries up to it. The first wrong one of an account is shown.",
        """SELECT DISTINCT ON (account_id) account_id || '/' || id AS subject, balance_after_nusd AS recorded, sum AS recomputed
           FROM (SELECT account_id, id, balance_after_nusd,
                        sum(amount_nusd) OVER (PARTITION BY account_id ORDER BY id ROWS UNBOUNDED PRECEDING) AS sum FROM entry) e
           WHERE balance_after_nusd <> sum ORDER BY account_id, id""",
        is_money=True,
    ),
    Check(
        "entries_are_in_time_order",
        "An entry is not older than the one before it, give or take the five minutes a transaction can never last.",
        """SELECT account_id || '/' || id AS subject, created_at AS recorded, 'not before ' || before AS recomputed
           FROM (SELECT account_id, id, created_at, lag(created_at) OVER (PARTITION BY account_id ORDER BY id) AS before
                 FROM entry) e
           WHERE created_at < before - interval '5 minutes'""",
    ),
    Check(
        "entry_is_posted_once",
        "No account has two entries of one kind with one reference.",
        """SELECT account_id || '/' || kind || '/' || reference AS subject, count(*) AS recorded, 1 AS recomputed
           FROM entry GROUP BY account_id, kind, reference HAVING count(*) > 1""",
    ),
    Check(
        "entry_sign_fits_its_kind",
        "Top-ups and bonuses add, refunds never take, usage never adds.",
        """SELECT account_id || '/' || id AS subject, amount_nusd AS recorded, 0 AS recomputed FROM entry
           WHERE NOT CASE kind WHEN 'topup' THEN amount_nusd > 0 WHEN 'bonus' THEN amount_nusd > 0
                               WHEN 'refund' THEN amount_nusd >= 0 WHEN 'usage' THEN amount_nusd <= 0
                               WHEN 'adjustment' THEN true ELSE false END""",
        is_money=True,
    ),
    Check(
        "entry_contra_fits_its_kind",
        "Each kind of entry has its own house account (a top-up's is checked with its top-up).",
        """SELECT account_id || '/' || id AS subject, kind || ' from ' || contra AS recorded, 'another house account' AS recomputed
           FROM entry
           WHERE NOT CASE kind WHEN 'topup' THEN strpos(contra, ':') > 1 WHEN 'bonus' THEN contra = 'bonus:lightning'
                               WHEN 'usage' THEN contra = 'revenue:usage' WHEN 'refund' THEN contra IN ('refund', 'revenue:usage')
                               WHEN 'adjustment' THEN contra = 'adjustment' ELSE false END""",
    ),
    Check(
        "all_balances_are_all_entries",
        "All balances together are all entries together.",
        """SELECT 'all accounts' AS subject, recorded, recomputed
           FROM (SELECT coalesce(sum(posted_nusd), 0) AS recorded FROM account) a,
                (SELECT coalesce(sum(amount_nusd), 0) AS recomputed FROM entry) e
           WHERE recorded <> recomputed""",
        is_money=True,
    ),
    Check(
        "all_revenue_is_all_usage",
        "What the house earned is what all calls cost.",
        """SELECT 'revenue:usage' AS subject, recorded, recomputed
           FROM (SELECT coalesce(-sum(amount_nusd), 0) AS recorded FROM entry WHERE kind = 'usage') e,
                (SELECT coalesce(sum(cost_nusd), 0) AS recomputed
                 FROM (SELECT cost_nusd FROM usage UNION ALL SELECT cost_nusd FROM usage_dropped) u) u
           WHERE recorded <> recomputed""",
        is_money=True,
    ),
)

_HOLDS_AND_KEYS: Final = (
    Check(
        "account_held_is_sum_of_open_holds",
        "What an account has set aside is the sum of its open holds.",
        """SELECT a.id::text AS subject, a.held_nusd AS recorded, coalesce(h.total, 0) AS recomputed
           FROM account a LEFT JOIN (SELECT account_id, sum(amount_nusd) AS total FROM hold WHERE state = 'open' GROUP BY 1) h
                                 ON h.account_id = a.id
           WHERE a.held_nusd <> coalesce(h.total, 0)""",
        is_money=True,
    ),
    Check(
        "key_held_is_sum_of_open_holds",
        "What a key has set aside is the sum of its open holds.",
        """SELECT k.account_id || '/' || k.id AS subject, k.held_nusd AS recorded, coalesce(h.total, 0) AS recomputed
           FROM api_key k
           LEFT JOIN (SELECT account_id, key_id, sum(amount_nusd) AS total FROM hold WHERE state = 'open' GROUP BY 1, 2) h
                  ON h.account_id = k.account_id AND h.key_id = k.id
           WHERE k.held_nusd <> coalesce(h.total, 0)""",
        is_money=True,
    ),
    Check(
        "key_window_is_sum_of_its_usage",
        "A key's usage in its window is what the calls that count to this window cost, less what was refunded of them.",
        f"""SELECT k.account_id || '/' || k.id AS subject, k.window_usage_nusd AS recorded, coalesce(u.total, 0) AS recomputed
           FROM api_key k
           LEFT JOIN (SELECT account_id, key_id, window_start, sum(net_nusd) AS total FROM {_NET} u GROUP BY 1, 2, 3) u
                  ON u.account_id = k.account_id AND u.key_id = k.id AND u.window_start = k.window_start
           WHERE k.window_usage_nusd <> coalesce(u.total, 0)""",
        is_money=True,
    ),
    Check(
        "key_lifetime_is_sum_of_usage",
        "What a key ever spent is the cost of all its calls, less what was refunded of them.",
        f"""SELECT k.account_id || '/' || k.id AS subject, k.lifetime_nusd AS recorded, coalesce(u.total, 0) AS recomputed
           FROM api_key k LEFT JOIN (SELECT account_id, key_id, sum(net_nusd) AS total FROM {_NET} u GROUP BY 1, 2) u
                                 ON u.account_id = k.account_id AND u.key_id = k.id
           WHERE k.lifetime_nusd <> coalesce(u.total, 0)""",
        is_money=True,
    ),
    Check(
        "hold_is_settled_by_its_usage",
        "A hold is settled if its call was charged, and only then.",
        """SELECT h.account_id || '/' || h.id AS subject, h.state AS recorded,
                  CASE WHEN e.id IS NULL THEN 'never charged' ELSE 'settled' END AS recomputed
           FROM hold h LEFT JOIN entry e ON e.account_id = h.account_id AND e.kind = 'usage' AND e.reference = h.id::text
           WHERE (h.state = 'settled') <> (e.id IS NOT NULL)""",
    ),
    Check(
        "usage_agrees_with_its_hold",
        "A charge counts to the key, the window and the request that its money was set aside for.",
        """SELECT h.account_id || '/' || h.id AS subject, concat_ws(' ', u.key_id, u.window_start, u.service, u.request_id) AS recorded,
                  concat_ws(' ', h.key_id, h.window_start, h.service, h.request_id) AS recomputed
           FROM hold h JOIN usage u ON u.account_id = h.account_id AND u.hold_id = h.id
           WHERE (u.key_id, u.window_start, u.service, u.request_id) <> (h.key_id, h.window_start, h.service, h.request_id)""",
    ),
    Check(
        "no_hold_outlives_its_time",
        "Five minutes after its time a hold is no longer open.",
        """SELECT account_id || '/' || id AS subject, 'open' AS recorded, 'expired ' || expires_at AS recomputed FROM hold
           WHERE state = 'open' AND expires_at < now() - interval '5 minutes'""",
    ),
    Check(
        "hold_is_closed_when_it_says",
        "A hold has a time of closing if it is closed, and only then; its state is one of four.",
        """SELECT account_id || '/' || id AS subject, state AS recorded, coalesce(closed_at::text, 'never closed') AS recomputed
           FROM hold WHERE (state = 'open') <> (closed_at IS NULL) OR state NOT IN ('open', 'settled', 'released', 'expired')""",
    ),
    Check(
        "figures_keep_their_sign",
        "Nothing held, spent or credited is negative, and no floor is above zero, should a constraint be gone.",
        """SELECT 'account ' || id AS subject, least(held_nusd, -floor_nusd, entry_count) AS recorded, 0 AS recomputed FROM account
           WHERE held_nusd < 0 OR floor_nusd > 0 OR entry_count < 0
           UNION ALL SELECT 'api_key ' || account_id || '/' || id, least(held_nusd, window_usage_nusd, lifetime_nusd, limit_nusd), 0
           FROM api_key WHERE least(held_nusd, window_usage_nusd, lifetime_nusd, limit_nusd) < 0
           UNION ALL SELECT 'hold ' || account_id || '/' || id, amount_nusd, 0 FROM hold WHERE amount_nusd < 0
           UNION ALL SELECT 'usage ' || account_id || '/' || id, least(cost_nusd, held_after_nusd), 0
           FROM usage WHERE least(cost_nusd, held_after_nusd) < 0
           UNION ALL SELECT 'topup ' || account_id || '/' || id, least(credited_nusd, bonus_nusd), 0
           FROM topup WHERE least(credited_nusd, bonus_nusd) < 0
           UNION ALL SELECT 'payment ' || account_id || '/' || topup_id || '/' || payment_id, worth_nusd, 0
           FROM payment WHERE worth_nusd < 0""",
        is_money=True,
    ),
)

_USAGE: Final = (
    Check(
        "usage_has_its_entry",
        "Every charged call has exactly one entry that took its cost.",
        """SELECT u.account_id || '/' || u.id AS subject, count(e.id) AS recorded, 1 AS recomputed
           FROM usage u LEFT JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           GROUP BY u.account_id, u.id, u.hold_id HAVING count(e.id) <> 1""",
    ),
    Check(
        "usage_entry_has_its_call",
        "Every entry of usage has exactly one call behind it, or is of a month whose calls were dropped.",
        f"""SELECT e.account_id || '/' || e.id AS subject, count(u.id) AS recorded, 1 AS recomputed
           FROM entry e LEFT JOIN usage u ON u.account_id = e.account_id AND u.hold_id::text = e.reference
           WHERE e.kind = 'usage' AND NOT ({_IS_OF_DROPPED_MONTH.format(call="e.usage_id")}) IS TRUE
           GROUP BY e.account_id, e.id, e.reference HAVING count(u.id) <> 1""",
    ),
    Check(
        "usage_entry_takes_the_cost",
        "The entry of a call takes what the call cost.",
        """SELECT u.account_id || '/' || u.id AS subject, u.cost_nusd AS recorded, -e.amount_nusd AS recomputed
           FROM usage u JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           WHERE u.cost_nusd <> -e.amount_nusd""",
        is_money=True,
    ),
    Check(
        "usage_tells_the_balance_after_it",
        "The balance that a call was answered with is its entry's.",
        """SELECT u.account_id || '/' || u.id AS subject, u.balance_after_nusd AS recorded, e.balance_after_nusd AS recomputed
           FROM usage u JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           WHERE u.balance_after_nusd <> e.balance_after_nusd""",
        is_money=True,
    ),
    Check(
        "usage_and_entry_are_one_moment",
        "A call and its entry were written by one transaction, and so bear one time.",
        """SELECT u.account_id || '/' || u.id AS subject, u.created_at AS recorded, e.created_at AS recomputed
           FROM usage u JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           WHERE u.created_at <> e.created_at""",
    ),
    Check(
        "usage_entry_names_its_call",
        "An entry of usage names the call whose hold it refers to.",
        """SELECT e.account_id || '/' || e.id AS subject, e.usage_id AS recorded, u.id AS recomputed
           FROM usage u JOIN entry e ON e.account_id = u.account_id AND e.kind = 'usage' AND e.reference = u.hold_id::text
           WHERE e.usage_id IS DISTINCT FROM u.id""",
    ),
    Check(
        "refund_is_of_a_charge",
        "A refund that is taken from revenue gives back at most what the call it names did cost.",
        """SELECT e.account_id || '/' || e.id AS subject, e.amount_nusd AS recorded, coalesce(-c.amount_nusd, 0) AS recomputed
           FROM entry e LEFT JOIN entry c ON c.account_id = e.account_id AND c.kind = 'usage' AND c.usage_id::text = e.reference
           WHERE e.kind = 'refund' AND e.contra = 'revenue:usage' AND e.amount_nusd > coalesce(-c.amount_nusd, 0)""",
        is_money=True,
    ),
    Check(
        "lines_add_up_to_the_cost",
        "What a call cost is its price lines added up and rounded up once; its figures by kind add up to it too.",
        f"""SELECT u.account_id || '/' || u.id AS subject, u.cost_nusd AS recorded,
                   CASE WHEN u.cost_nusd <> l.total THEN l.total ELSE p.total END AS recomputed
            FROM usage u CROSS JOIN LATERAL (
                SELECT ceil(coalesce(sum((line->>2)::numeric * (line->>3)::numeric * (line->>4)::numeric), 0) / {AUSD_PER_NUSD}) AS total
                FROM jsonb_array_elements(u.lines->'lines') line) l
            CROSS JOIN LATERAL (SELECT sum(part::bigint) AS total FROM jsonb_array_elements_text(u.lines->'parts') part) p
            WHERE u.lines IS NOT NULL AND (u.cost_nusd <> l.total OR u.cost_nusd <> p.total)""",
        is_money=True,
    ),
    Check(
        "request_is_charged_once",
        "No account was charged twice for one request of one service.",
        """SELECT account_id || '/' || service || '/' || request_id AS subject, count(*) AS recorded, 1 AS recomputed
           FROM usage GROUP BY account_id, service, request_id HAVING count(*) > 1""",
    ),
)

_LATE: Final = "interval '2 hours'"
"""So long after a day was summed, what came late may not be in its sum yet."""

_DAYS: Final = (
    Check(
        "days_are_the_sum_of_their_calls",
        "A day that is over says what its calls add up to, but for what came in the last two hours; no other day says anything.",
        f"""WITH calls AS (SELECT {day_of("u.id")} AS day, {CALL}),
                 fresh AS (SELECT account_id, day, key_id, model, {SUMS},
                                  count(*) FILTER (WHERE created_at < now() - {_LATE}) AS old_requests,
                                  least(coalesce(sum(input_tokens) FILTER (WHERE created_at < now() - {_LATE}), 0), {MOST}) AS old_input,
                                  least(coalesce(sum(output_tokens) FILTER (WHERE created_at < now() - {_LATE}), 0), {MOST}) AS old_output,
                                  coalesce(sum(cost_nusd) FILTER (WHERE created_at < now() - {_LATE}), 0) AS old_nusd,
                                  coalesce(sum(refunded_nusd) FILTER (WHERE refunded_at < now() - {_LATE}), 0) AS old_refunded
                           FROM calls WHERE day < (SELECT day FROM {EDGE} edge) GROUP BY 1, 2, 3, 4),
                 kept AS (SELECT * FROM usage_day d WHERE NOT {IS_DROPPED.format(day="d.day")})
            SELECT concat_ws('/', account_id, day, key_id, model) AS subject,
                   coalesce(k.requests, 0) || ' calls: ' || concat_ws(' ', k.input_tokens, k.output_tokens, k.cost_nusd, k.refunded_nusd) AS recorded,
                   coalesce(f.requests, 0) || ' calls: ' || concat_ws(' ', f.input_tokens, f.output_tokens, f.cost_nusd, f.refunded_nusd) AS recomputed
            FROM kept k FULL JOIN fresh f USING (account_id, day, key_id, model)
            WHERE NOT {IS_DROPPED.format(day="day")}
              AND (NOT coalesce(k.requests, 0) BETWEEN coalesce(f.old_requests, 0) AND coalesce(f.requests, 0)
               OR NOT coalesce(k.input_tokens, 0) BETWEEN coalesce(f.old_input, 0) AND coalesce(f.input_tokens, 0)
               OR NOT coalesce(k.output_tokens, 0) BETWEEN coalesce(f.old_output, 0) AND coalesce(f.output_tokens, 0)
               OR NOT coalesce(k.cost_nusd, 0) BETWEEN coalesce(f.old_nusd, 0) AND coalesce(f.cost_nusd, 0)
               OR NOT coalesce(k.refunded_nusd, 0) BETWEEN coalesce(f.old_refunded, 0) AND coalesce(f.refunded_nusd, 0))""",
    ),
    Check(
        "dropped_calls_are_in_their_entries",
        "What is kept of an account's calls of a dropped month is what their entries took; one that came later is still there.",
        f"""WITH dropped AS (SELECT month, {first_id_of("month")} AS first_id, {first_id_of("(month + interval '1 month')::date")} AS end_id
                             FROM usage_archive WHERE dropped_at IS NOT NULL),
                 taken AS (SELECT e.account_id, d.month, count(*) AS calls, -sum(e.amount_nusd) AS nusd
                           FROM dropped d JOIN entry e ON e.kind = 'usage' AND e.usage_id >= d.first_id AND e.usage_id < d.end_id
                           GROUP BY 1, 2),
                 kept AS (SELECT account_id, month, sum(calls) AS calls, sum(cost_nusd) AS nusd
                          FROM (SELECT account_id, month, calls, cost_nusd FROM usage_dropped
                                UNION ALL SELECT u.account_id, d.month, 1, u.cost_nusd
                                FROM dropped d JOIN usage u ON u.id >= d.first_id AND u.id < d.end_id) k GROUP BY 1, 2)
            SELECT account_id || '/' || month AS subject, concat(coalesce(k.calls, 0), ' calls, ', coalesce(k.nusd, 0), ' nano-USD') AS recorded,
                   concat(coalesce(t.calls, 0), ' calls, ', coalesce(t.nusd, 0), ' nano-USD') AS recomputed
            FROM kept k FULL JOIN taken t USING (account_id, month)
            WHERE (k.calls, k.nusd) IS DISTINCT FROM (t.calls, t.nusd)""",
    ),
    Check(
        "days_of_dropped_months_stay",
        "The days of a dropped month are as they were when its calls were dropped.",
        f"""SELECT x.month::text AS subject, f.now AS recorded, x.fingerprint AS recomputed
            FROM usage_archive x CROSS JOIN LATERAL ({FINGERPRINT.format(month="x.month")}) f (now)
            WHERE x.dropped_at IS NOT NULL AND f.now <> x.fingerprint""",
    ),
)

_TOPUP_ENTRY: Final = """
    (SELECT account_id, id, kind, reference, contra, amount_nusd, split_part(reference, '/', 1) AS topup_id,
            sum(amount_nusd) OVER (PARTITION BY account_id, kind, split_part(reference, '/', 1) ORDER BY id) - amount_nusd AS before
     FROM entry WHERE kind IN ('topup', 'bonus'))"""
"""Entries of top-ups with the top-up they name, and what that top-up had been given before."""


_CURRENCY_UNITS: Final = _values(
    (code, Decimal(1).scaleb(9 - (8 if code == "SATS" else currency.places))) for code, currency in CURRENCIES.items()
)
_COIN_UNITS: Final = _values(
    (method.id, Decimal(1).scaleb(9 - COIN_PLACES[method.coin])) for method in METHODS.values()
)
_VALUED: Final = f"""
    (SELECT t.*, coin_unit, floor(usd_rate * 10) + 1 AS dust_nusd,
            CASE t.currency WHEN 'USD' THEN amount_units ELSE floor(amount_units * currency_unit * usd_rate) END AS face_nusd
     FROM (SELECT account_id, id, method, currency, amount_units, status, additional_status, coalesce(review, reviewed) AS seen,
                  credited_nusd, settled_at,
                  CASE currency WHEN 'USD' THEN rate ELSE usd_per_coin END AS usd_rate FROM topup) t
     LEFT JOIN (VALUES {_CURRENCY_UNITS}) AS f (currency, currency_unit) ON f.currency = t.currency
     LEFT JOIN (VALUES {_COIN_UNITS}) AS c (method, coin_unit) ON c.method = t.method)"""
"""Top-ups with what they ask for in nano-USD. A unit times USD per whole coin gives nano-USD; dust is what
crediting forgives a full payment."""

_PAID: Final = """
    (SELECT account_id, topup_id, sum(worth_nusd) AS worth_nusd, count(*) FILTER (WHERE status = 'Settled') AS settled,
            coalesce(sum(worth_nusd) FILTER (WHERE status = 'Settled'), 0) AS settled_nusd
     FROM payment GROUP BY 1, 2)"""

_TOPUPS: Final = (
    Check(
        "topup_credit_is_sum_of_entries",
        "What a top-up says it credited is the sum of its entries.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.credited_nusd AS recorded, coalesce(e.total, 0) AS recomputed
            FROM topup t LEFT JOIN (SELECT account_id, topup_id, sum(amount_nusd) AS total FROM {_TOPUP_ENTRY} e
                                    WHERE kind = 'topup' GROUP BY 1, 2) e
                                ON e.account_id = t.account_id AND e.topup_id = t.id::text
            WHERE t.credited_nusd <> coalesce(e.total, 0)""",
        is_money=True,
    ),
    Check(
        "topup_bonus_is_sum_of_entries",
        "What a top-up says it gave as a bonus is the sum of its bonus entries.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.bonus_nusd AS recorded, coalesce(e.total, 0) AS recomputed
            FROM topup t LEFT JOIN (SELECT account_id, topup_id, sum(amount_nusd) AS total FROM {_TOPUP_ENTRY} e
                                    WHERE kind = 'bonus' GROUP BY 1, 2) e
                                ON e.account_id = t.account_id AND e.topup_id = t.id::text
            WHERE t.bonus_nusd <> coalesce(e.total, 0)""",
        is_money=True,
    ),
    Check(
        "topup_entry_has_its_topup",
        "Every entry of a top-up or a bonus names a top-up of the same account.",
        f"""SELECT e.account_id || '/' || e.id AS subject, e.reference AS recorded, 'a top-up of this account' AS recomputed
            FROM {_TOPUP_ENTRY} e LEFT JOIN topup t ON t.account_id = e.account_id AND t.id::text = e.topup_id
            WHERE t.id IS NULL""",
    ),
    Check(
        "topup_entries_form_a_chain",
        "The reference of a top-up's entry names what the top-up had been given before it.",
        f"""SELECT account_id || '/' || id AS subject, reference AS recorded, topup_id || '/' || before AS recomputed
            FROM {_TOPUP_ENTRY} e WHERE reference <> topup_id || '/' || before""",
    ),
    Check(
        "topup_entry_comes_from_its_backend",
        "The money of a top-up comes from the house account of its backend and method.",
        f"""SELECT e.account_id || '/' || e.id AS subject, e.contra AS recorded, t.backend || ':' || t.method AS recomputed
            FROM {_TOPUP_ENTRY} e JOIN topup t ON t.account_id = e.account_id AND t.id::text = e.topup_id
            WHERE e.kind = 'topup' AND e.contra <> t.backend || ':' || t.method""",
    ),
    Check(
        "review_entry_has_its_review",
        "An adjustment that a review decided names a reviewed top-up of the same account.",
        """SELECT e.account_id || '/' || e.id AS subject, e.reference AS recorded, 'a reviewed top-up of this account' AS recomputed
           FROM entry e LEFT JOIN topup t ON t.account_id = e.account_id AND t.id::text = split_part(e.reference, '/', 2)
           WHERE e.kind = 'adjustment' AND starts_with(e.reference, 'review/') AND t.reviewed IS NULL""",
    ),
    Check(
        "topup_bonus_is_its_share",
        "A bonus is its percentage of what was credited, rounded down.",
        """SELECT account_id || '/' || id AS subject, bonus_nusd AS recorded,
                  floor(credited_nusd::numeric * bonus_percent / 100) AS recomputed
           FROM topup WHERE bonus_nusd <> floor(credited_nusd::numeric * bonus_percent / 100)""",
        is_money=True,
    ),
    Check(
        "bonus_percent_is_what_the_method_gives",
        "No top-up has a higher bonus than its method gives.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.bonus_percent AS recorded, coalesce(m.percent, 0) AS recomputed
            FROM topup t LEFT JOIN (VALUES {_values((method.id, method.bonus_percent) for method in METHODS.values())})
                                AS m (method, percent) ON m.method = t.method
            WHERE t.bonus_percent NOT BETWEEN 0 AND coalesce(m.percent, 0)""",
    ),
    Check(
        "credit_is_backed_by_payments",
        "A top-up credited no more than its payments are worth, or its face where they miss it by dust.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.credited_nusd AS recorded, coalesce(p.worth_nusd, 0) AS recomputed
            FROM {_VALUED} t LEFT JOIN {_PAID} p ON p.account_id = t.account_id AND p.topup_id = t.id
            WHERE t.credited_nusd > coalesce(p.worth_nusd, 0)
              AND NOT (t.credited_nusd = coalesce(t.face_nusd, 0) AND p.worth_nusd + t.dust_nusd >= t.face_nusd) IS TRUE""",
        is_money=True,
    ),
    Check(
        "credited_topup_has_a_settled_payment",
        "A top-up that credited something has a settled payment, or is or was shown to a person.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.credited_nusd AS recorded, 0 AS recomputed
            FROM topup t LEFT JOIN {_PAID} p ON p.account_id = t.account_id AND p.topup_id = t.id
            WHERE t.credited_nusd > 0 AND coalesce(t.review, t.reviewed) IS NULL AND coalesce(p.settled, 0) = 0""",
        is_money=True,
    ),
    Check(
        "only_settled_payments_are_worth_something",
        "A payment is valued once it settled; one that fell back after that is or was shown to a person.",
        """SELECT p.account_id || '/' || p.topup_id || '/' || p.payment_id AS subject, p.worth_nusd AS recorded, 0 AS recomputed
           FROM payment p LEFT JOIN topup t ON t.account_id = p.account_id AND t.id = p.topup_id
           WHERE p.worth_nusd > 0 AND p.status <> 'Settled' AND coalesce(t.review, t.reviewed) IS NULL""",
        is_money=True,
    ),
    Check(
        "payment_is_worth_its_coins",
        "A payment is worth no more than its coins less the fee, at the top-up's rate (a unit of rounding each).",
        f"""SELECT p.account_id || '/' || p.topup_id || '/' || p.payment_id AS subject, p.worth_nusd AS recorded,
                   floor((p.value_coin_units - p.fee_coin_units) * t.coin_unit * t.usd_rate) AS recomputed
            FROM payment p JOIN {_VALUED} t ON t.account_id = p.account_id AND t.id = p.topup_id
            WHERE p.worth_nusd > 0
              AND p.worth_nusd > coalesce((p.value_coin_units - p.fee_coin_units + 2) * t.coin_unit * t.usd_rate, 0)""",
        is_money=True,
    ),
    Check(
        "settled_payments_are_valued",
        "A settled payment that came in time is worth at least its coins less the fee, unless a person marked the invoice.",
        f"""SELECT p.account_id || '/' || p.topup_id || '/' || p.payment_id AS subject, p.worth_nusd AS recorded,
                   floor((p.value_coin_units - p.fee_coin_units) * t.coin_unit * t.usd_rate) AS recomputed
            FROM payment p JOIN {_VALUED} t ON t.account_id = p.account_id AND t.id = p.topup_id
            WHERE p.status = 'Settled' AND NOT p.late AND t.seen IS NULL AND t.status IN ('Settled', 'Expired')
              AND p.worth_nusd < floor((p.value_coin_units - p.fee_coin_units) * t.coin_unit * t.usd_rate)""",
        is_money=True,
    ),
    Check(
        "settled_payments_are_credited",
        "What settled payments are worth was credited, or the face where they exceed it by dust.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.credited_nusd AS recorded, p.settled_nusd AS recomputed
            FROM {_VALUED} t JOIN {_PAID} p ON p.account_id = t.account_id AND p.topup_id = t.id
            WHERE t.credited_nusd < p.settled_nusd
              AND NOT (t.credited_nusd = t.face_nusd AND p.settled_nusd - t.dust_nusd <= t.face_nusd) IS TRUE""",
        is_money=True,
    ),
    Check(
        "settled_topup_is_credited",
        "A top-up that the backend settled an hour ago has credited what it asked for, or is or was shown to a person.",
        f"""SELECT account_id || '/' || id AS subject, credited_nusd AS recorded, face_nusd AS recomputed FROM {_VALUED} t
            WHERE status = 'Settled' AND additional_status <> 'Marked' AND seen IS NULL AND credited_nusd < face_nusd
              AND coalesce(settled_at, '-infinity') < now() - interval '1 hour'""",
        is_money=True,
    ),
    Check(
        "payment_counts_for_one_topup",
        "No payment of a backend is worth something to two top-ups.",
        """SELECT t.backend || '/' || p.payment_id AS subject, count(*) AS recorded, 1 AS recomputed
           FROM payment p JOIN topup t ON t.account_id = p.account_id AND t.id = p.topup_id
           WHERE p.worth_nusd > 0 GROUP BY t.backend, p.payment_id HAVING count(*) > 1""",
    ),
    Check(
        "payment_has_its_topup",
        "Every payment belongs to a top-up.",
        """SELECT p.account_id || '/' || p.topup_id || '/' || p.payment_id AS subject, p.topup_id AS recorded, NULL AS recomputed
           FROM payment p LEFT JOIN topup t ON t.account_id = p.account_id AND t.id = p.topup_id WHERE t.id IS NULL""",
    ),
    Check(
        "invoice_of_topup_is_known",
        "A top-up's invoice is looked up to this top-up, and so to no other.",
        """SELECT t.account_id || '/' || t.id AS subject, t.backend || '/' || t.invoice_id AS recorded,
                  i.account_id || '/' || i.topup_id AS recomputed
           FROM topup t LEFT JOIN topup_invoice i ON i.backend = t.backend AND i.invoice_id = t.invoice_id
           WHERE t.invoice_id IS NOT NULL AND (i.account_id, i.topup_id) IS DISTINCT FROM (t.account_id, t.id)""",
    ),
    Check(
        "known_invoice_has_its_topup",
        "An invoice that is looked up leads to a top-up of this backend that has an invoice"
        " (a repeat after a lost answer may have made it a second one, which nobody is shown).",
        """SELECT i.backend || '/' || i.invoice_id AS subject, i.account_id || '/' || i.topup_id AS recorded, t.invoice_id AS recomputed
           FROM topup_invoice i
           LEFT JOIN topup t ON t.account_id = i.account_id AND t.id = i.topup_id AND t.backend = i.backend
           WHERE t.invoice_id IS NULL""",
    ),
    Check(
        "open_topup_is_watched",
        "A top-up that can still be paid will be asked about again, and was not forgotten for a day.",
        """SELECT account_id || '/' || id AS subject, coalesce(next_check_at::text, 'never again') AS recorded,
                  'until ' || watch_until AS recomputed
           FROM topup WHERE status <> 'Failed' AND watch_until > now()
                        AND coalesce(next_check_at, '-infinity') < now() - interval '1 day'""",
    ),
    Check(
        "webhooks_are_looked_into",
        "A webhook about an invoice we know is looked into within the hour.",
        """SELECT d.backend || '/' || d.delivery_id || '/' || d.type AS subject, 'waiting since ' || d.received_at AS recorded,
                  'processed' AS recomputed
           FROM webhook_delivery d JOIN topup_invoice i ON i.backend = d.backend AND i.invoice_id = d.invoice_id
           WHERE d.processed_at IS NULL AND d.received_at < now() - interval '1 hour'""",
    ),
)

_AUTOTOPUP: Final = (
    Check(
        "attempt_has_its_topup",
        "An attempt that has an invoice has its top-up, over Lightning, of its own account and for its amount.",
        """SELECT n.account_id || '/' || n.id AS subject, concat_ws(' ', 'lightning', n.topup_id, n.amount_nusd) AS recorded,
                  coalesce(t.account_id || ' ' || t.method || ' ' || t.currency || ' ' || t.amount_units, 'no top-up') AS recomputed
           FROM nwc_attempt n LEFT JOIN topup t ON t.id = n.topup_id
           WHERE (n.payment_hash IS NOT NULL OR t.id IS NOT NULL)
             AND (t.account_id, t.method, t.currency, t.amount_units)
                 IS DISTINCT FROM (n.account_id, 'btc-lightning', 'USD', n.amount_nusd)""",
    ),
    Check(
        "account_has_one_open_attempt",
        "No account has two open attempts: both invoices could be paid.",
        f"""SELECT account_id::text AS subject, count(*) AS recorded, 1 AS recomputed FROM nwc_attempt
            WHERE state IN ({states_sql(OPEN)}) GROUP BY account_id HAVING count(*) > 1""",
    ),
    Check(
        "settled_attempt_is_credited",
        "A settled attempt's top-up was credited; and an hour after a top-up was, its attempt is settled.",
        """SELECT n.account_id || '/' || n.id AS subject, n.state AS recorded,
                  CASE WHEN t.credited_nusd > 0 THEN 'settled' ELSE 'not credited' END AS recomputed
           FROM nwc_attempt n LEFT JOIN topup t ON t.account_id = n.account_id AND t.id = n.topup_id
           WHERE CASE WHEN n.state = 'settled' THEN coalesce(t.credited_nusd, 0) = 0
                      ELSE t.credited_nusd > 0 AND t.settled_at < now() - interval '1 hour' END""",
    ),
    Check(
        "payment_is_asked_for_by_one_attempt",
        "No two attempts wait for one payment.",
        """SELECT payment_hash AS subject, count(*) AS recorded, 1 AS recomputed FROM nwc_attempt
           WHERE payment_hash IS NOT NULL GROUP BY payment_hash HAVING count(*) > 1""",
    ),
    Check(
        "low_mark_is_the_threshold",
        "An account's low mark is the threshold of its wallet while that is active, and absent otherwise.",
        """SELECT a.id::text AS subject, a.low_nusd AS recorded, c.threshold_nusd AS recomputed
           FROM account a LEFT JOIN nwc_connection c ON c.account_id = a.id AND c.pause IS NULL
           WHERE a.low_nusd IS DISTINCT FROM c.threshold_nusd""",
        is_money=True,
    ),
)

_OWNED: Final = (
    "entry", "hold", "usage", "usage_day", "usage_dropped", "topup", "payment", "api_key", "credential", "topup_invoice",
    "nwc_connection", "nwc_attempt",
)  # fmt: skip
_BY_KEY: Final = ("hold", "usage", "usage_day", "usage_dropped", "topup")

_OWNERS: Final = (
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
    Check(
        "account_has_one_credit_id",
        "Every account is known by exactly one credit id.",
        """SELECT a.id::text AS subject, count(c.secret_hash) AS recorded, 1 AS recomputed
           FROM account a LEFT JOIN credential c ON c.account_id = a.id AND c.kind = 'credit_id'
           GROUP BY a.id HAVING count(c.secret_hash) <> 1""",
    ),
    Check(
        "key_has_one_secret",
        "Every key is known by exactly one secret; a revoked one by no more than one.",
        """SELECT k.account_id || '/' || k.id AS subject, count(c.secret_hash) AS recorded, 1 AS recomputed
           FROM api_key k LEFT JOIN credential c ON c.account_id = k.account_id AND c.key_id = k.id AND c.kind = 'api_key'
           GROUP BY k.account_id, k.id, k.deleted_at
           HAVING count(c.secret_hash) <> 1 AND NOT (count(c.secret_hash) = 0 AND k.deleted_at IS NOT NULL)""",
    ),
    Check(
        "secret_opens_what_it_says",
        "A key's secret leads to a key of its account, a credit id to no key.",
        """SELECT c.kind || ' of ' || c.account_id || coalesce('/' || c.key_id, '') AS subject, c.key_id AS recorded, k.id AS recomputed
           FROM credential c LEFT JOIN api_key k ON k.account_id = c.account_id AND k.id = c.key_id
           WHERE CASE c.kind WHEN 'api_key' THEN k.id IS NULL WHEN 'credit_id' THEN c.key_id IS NOT NULL ELSE true END""",
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

_TIME: Final = (
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

_BOOKS: Final = tuple(
    SQLModel.metadata.tables[str(model.__tablename__)]
    for model in (
        Account, Entry, ApiKey, Credential, Hold, Usage, UsageDay, UsageDropped, UsageArchive, Topup, TopupInvoice, Payment,
        NwcConnection, NwcAttempt,
    )
)  # fmt: skip
_BOOK_NAMES: Final = _values((table.name,) for table in _BOOKS)
_RULE_NAMES: Final = _values(
    (table.name, str(rule.name))
    for table in _BOOKS
    for rule in sorted(table.constraints, key=lambda rule: str(rule.name))
    if isinstance(rule, CheckConstraint | UniqueConstraint)
)
_RULE_COUNTS: Final = _values(
    (table.name, letter, sum(isinstance(rule, kind) for rule in table.constraints))
    for table in _BOOKS
    for letter, kind in (("p", PrimaryKeyConstraint), ("f", ForeignKeyConstraint))
)

_LOCKS: Final = (
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
            FROM pg_roles r CROSS JOIN (VALUES ('entry'), ('usage'), ('usage_dropped'), ('usage_archive'), ('topup_invoice'), ('admin_log')) AS x (place)
            WHERE r.rolname = '{RUNTIME_ROLE}'
              AND (has_table_privilege(r.oid, to_regclass(x.place), 'UPDATE, DELETE, TRUNCATE, TRIGGER')
                   OR has_any_column_privilege(r.oid, to_regclass(x.place), 'UPDATE'))""",
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

CHECKS: Final[tuple[Check, ...]] = (
    *_LEDGER, *_HOLDS_AND_KEYS, *_USAGE, *_DAYS, *_TOPUPS, *_AUTOTOPUP, *_OWNERS, *_TIME, *_LOCKS,
)  # fmt: skip
"""Everything an audit looks at, in the order it looks."""
